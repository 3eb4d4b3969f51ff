"""What engines ask of P-EAGLE drafts: EAGLE-3's tables and rules, as far as they hold, and what parallel drafts have
besides. `engines/` has one table an engine; `tensors.py` knows the tensors, `rules.py` and `sanity.py` hold a directory
against all of it. `contract.py` is the way in."""
