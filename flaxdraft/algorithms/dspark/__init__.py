"""DSpark (arXiv 2607.05147): DFlash's block in one pass, whose first slot predicts as well; a Markov head that corrects
each slot's logits by the token before it; a confidence in each slot. Builds on `algorithms/dflash`."""
