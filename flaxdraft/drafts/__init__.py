"""Draft architectures, one a file: `Config`, `make`, `name_table`, and the names that it answers to.

A new architecture is a new file; nothing else is edited.
"""
