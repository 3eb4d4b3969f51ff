"""A run's stages and its command."""
