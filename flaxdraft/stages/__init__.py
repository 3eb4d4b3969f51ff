"""What is done before and by whom: claims on folders, kept results, locks, provenance."""
