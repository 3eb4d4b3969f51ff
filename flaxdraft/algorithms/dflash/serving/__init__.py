"""What engines ask of DFlash drafts. `engines/` has one table an engine, `terms.py` their form; `tensors.py` knows the
tensors, `rules.py` and `sanity.py` hold a directory against all of it. `contract.py` is the way in."""
