"""What is the same of every algorithm's drafts that other trainers wrote: files of foreign names and tables, brought
into this project's layout.

`names.py` renames tensors by an algorithm's `Layout`, `vocabulary.py` finds out which tokens a draft knows, `layers.py`
completes the layer that speculators nests in its config.json, `report.py` says what became of it all. The rest is each
algorithm's own, in its folder's `foreign/`.
"""
