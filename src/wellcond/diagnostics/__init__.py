"""Read-only probes: what a model's features, gradients and normalizations are like."""

from wellcond.diagnostics.disparity import Disparity, LayerDisparity, disparity
from wellcond.diagnostics.laws import Histogram, NoiseDistribution
from wellcond.diagnostics.noise import BatchNoise, LayerNoise, batch_noise

__all__ = [
    "BatchNoise",
    "Disparity",
    "Histogram",
    "LayerDisparity",
    "LayerNoise",
    "NoiseDistribution",
    "batch_noise",
    "disparity",
]
