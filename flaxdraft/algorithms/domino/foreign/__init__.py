"""Domino drafts that other trainers wrote (SpecForge), brought into this project's layout as DFlash's are
(`algorithms/dflash/foreign`)."""
