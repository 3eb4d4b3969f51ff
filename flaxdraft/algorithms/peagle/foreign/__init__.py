"""P-EAGLE drafts that other trainers wrote (SpecForge, speculators), brought into this project's layout.

`configs.py` reads the trainers' config.json, `names.py` says what tensors are called, and `convert.py` puts the result
into a directory. What sequential drafts need as well is EAGLE-3's (`algorithms/eagle3/foreign`).
"""
