"""EAGLE-3 (arXiv 2503.01840): a one-layer draft fed by three hidden states of its target."""
