"""Prompts in, supervised features out."""
