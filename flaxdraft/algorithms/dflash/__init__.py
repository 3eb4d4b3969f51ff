"""DFlash (arXiv 2602.06036): some layers that read the target's tapped states and fill a block of tokens in one pass."""
