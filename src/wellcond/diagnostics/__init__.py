"""Read-only probes of a model's features, gradients and normalizations."""

from wellcond.diagnostics._disparity import Disparity, LayerDisparity, disparity
from wellcond.diagnostics._landscape import Landscape, landscape
from wellcond.diagnostics._lipschitz import Lipschitz, Smoothness, lipschitz
from wellcond.diagnostics.gradients import GradientRecorder, GradientStatistics, LayerGradients, gradient_statistics
from wellcond.diagnostics.laws import Histogram, NoiseDistribution
from wellcond.diagnostics.noise import BatchNoise, LayerNoise, batch_noise
from wellcond.diagnostics.spectra import FeatureSpectrum, LayerSpectrum, Spectrum
from wellcond.diagnostics.spectrum import feature_spectrum
from wellcond.diagnostics.weights import LayerWeightMeans, WeightMeans, weight_means

__all__ = [
    "BatchNoise",
    "Disparity",
    "FeatureSpectrum",
    "GradientRecorder",
    "GradientStatistics",
    "Histogram",
    "Landscape",
    "LayerDisparity",
    "LayerGradients",
    "LayerNoise",
    "LayerSpectrum",
    "LayerWeightMeans",
    "Lipschitz",
    "NoiseDistribution",
    "Smoothness",
    "Spectrum",
    "WeightMeans",
    "batch_noise",
    "disparity",
    "feature_spectrum",
    "gradient_statistics",
    "landscape",
    "lipschitz",
    "weight_means",
]
