"""The hot operations, each beside its plain reference."""
