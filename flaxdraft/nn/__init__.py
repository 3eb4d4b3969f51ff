"""Blocks that targets and drafts share."""
