"""Drafts that other trainers wrote (SpecForge, TorchSpec, NeMo Automodel, EAGLE, speculators), brought into this
project's layout.

`names.py` renames tensors, `vocabulary.py` finds out what d2t means, `configs.py` reads the trainers' config.json, and
`convert.py` puts the result into a directory. PyTorch's own files are opened by tools/convert/from_pytorch.py alone.
"""
