"""DSpark drafts that other trainers wrote (DeepSpec, SpecForge, speculators), brought into this project's layout as
DFlash's are (`algorithms/dflash/foreign`)."""
