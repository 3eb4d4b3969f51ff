"""Draft architectures, one a file: `Config`, `make`, `NAME_TABLE`, and the names that it answers to.

A new architecture is a new file; nothing else is edited.
"""
