"""What engines ask of Domino drafts besides what they ask of DFlash's (`algorithms/dflash/serving`)."""
