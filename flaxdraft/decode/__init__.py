"""Generation and lossless speculative decoding on the device."""
