"""What serving engines ask of an EAGLE-3 draft's directory.

`engines/` holds one table an engine, `terms.py` says what its entries mean, `kinds.py` finds the attentions,
`tensors.py` knows the tensors, `rules.py` and `sanity.py` hold a directory against all of it. `contract.py` is the way
in.
"""
