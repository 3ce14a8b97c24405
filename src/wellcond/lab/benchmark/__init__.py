"""Measures the cost of a training step of each method."""
