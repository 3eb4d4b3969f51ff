"""DFlash2 drafts that other trainers wrote (SpecForge, z-lab, speculators), brought into this project's layout as
DFlash's are (`algorithms/dflash/foreign`)."""
