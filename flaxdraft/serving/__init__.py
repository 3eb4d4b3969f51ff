"""What serving engines ask of a draft's directory: one table an engine, and what is derived from the tables.

`engines/` holds the tables, `contract.py` says what their entries mean, `layout.py` the tensors of a draft, `lint.py`
compares a directory with all of it. Nothing here computes on an accelerator.
"""
