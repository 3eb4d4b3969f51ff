"""The draft's architectures, one a file."""
