"""DFlash (arXiv 2602.06036): layers that read the target's tapped states and fill a block in one pass."""
