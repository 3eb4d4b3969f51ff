"""Drafts that other trainers wrote (SpecForge, TorchSpec, NeMo Automodel, EAGLE, speculators), brought into this
project's layout.

`names.py` says what tensors are called, `configs.py` reads the trainers' config.json, and `convert.py` puts the result
into a directory; what other algorithms' drafts need as well is in flaxdraft/serving/foreign/. PyTorch's own files are
opened by tools/convert/from_pytorch.py alone.
"""
