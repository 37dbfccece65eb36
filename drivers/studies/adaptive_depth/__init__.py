"""Layers cut in two where it is worth it."""
