"""P-EAGLE's draft architectures, one a file."""
