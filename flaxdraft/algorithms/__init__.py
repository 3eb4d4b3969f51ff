"""Training algorithms, one a file. A new one is a new file; nothing else is edited."""
