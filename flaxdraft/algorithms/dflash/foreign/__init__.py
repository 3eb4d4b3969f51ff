"""DFlash drafts that other trainers wrote (SpecForge, z-lab, speculators), brought into this project's layout.

`configs.py` reads the trainers' config.json, `names.py` says what tensors are called, and `convert.py` puts the result
into a directory. What is the same of every algorithm's drafts is in flaxdraft/serving/foreign/.
"""
