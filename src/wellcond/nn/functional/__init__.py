"""The computations of the layers, as functions."""
