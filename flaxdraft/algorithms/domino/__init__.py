"""Domino (arXiv 2605.29707): DFlash's block in one pass, then a small recurrent head that goes along the block and
corrects each slot's logits by the tokens before it. Builds on `algorithms/dflash`."""
