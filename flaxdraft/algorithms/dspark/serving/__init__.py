"""What engines ask of DSpark drafts besides what they ask of DFlash's (`algorithms/dflash/serving`)."""
