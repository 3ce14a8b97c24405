"""Read-only probes: what a model's features, gradients and normalizations are like."""

from wellcond.diagnostics.disparity import Disparity, LayerDisparity, disparity

__all__ = ["Disparity", "LayerDisparity", "disparity"]
