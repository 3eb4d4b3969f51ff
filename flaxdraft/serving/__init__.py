"""What every algorithm's export has in common: writing a directory, asking engines' rules, the model card.

`contract.py` says what an algorithm brings, its own package `serving`; nothing here knows which algorithms there are,
and nothing computes on an accelerator.
"""
