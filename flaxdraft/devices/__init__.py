"""Meshes, hosts, where arrays live, reads back to the host."""
