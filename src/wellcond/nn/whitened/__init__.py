"""Layers whose weights are whitened between constants that are refreshed now and then."""
