"""EAGLE-3's draft architectures, one a file."""
