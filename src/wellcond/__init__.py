"""Make neural networks train better from the statistics of their features and gradients."""

from wellcond import optim
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
    "optim",
    "register_layout",
]
