"""P-EAGLE (arXiv 2602.01469): EAGLE-3's draft with more layers, which proposes at all depths in one pass."""
