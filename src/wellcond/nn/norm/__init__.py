"""Normalization layers, one family a file, on one base."""
