"""Make neural networks train better from the statistics of their features and gradients."""

from wellcond import diagnostics, nn, optim, theory
from wellcond.calibration.models import calibrate, calibrated
from wellcond.layouts import Layout, register_layout
from wellcond.transforms import (
    Attachment,
    FeatureDescent,
    FeatureWhitening,
    GradientCentralization,
    GradientTransform,
    WellcondWarning,
    attach,
)
from wellcond.version import __version__

__all__ = [
    "Attachment",
    "FeatureDescent",
    "FeatureWhitening",
    "GradientCentralization",
    "GradientTransform",
    "Layout",
    "WellcondWarning",
    "__version__",
    "attach",
    "calibrate",
    "calibrated",
    "diagnostics",
    "nn",
    "optim",
    "register_layout",
    "theory",
]
