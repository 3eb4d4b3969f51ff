"""DFlash2 (z-lab, August 2026): DFlash's layers with a short convolution around each attention and feed-forward, and a
selector that goes along the block and chooses among each slot's likeliest tokens by the token before it. Builds on
`algorithms/dflash`."""
