"""What engines ask of DFlash2 drafts besides what they ask of DFlash's (`algorithms/dflash/serving`)."""
