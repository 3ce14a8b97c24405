"""Kalman Normalization: the layer, its graph of statistics, and the trace that connects layers."""
