"""Make neural networks train better from the statistics of their features and gradients."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wellcond.version import __version__

if TYPE_CHECKING:
    from wellcond import diagnostics, nn, optim, repair, theory
    from wellcond.calibration.models import calibrate, calibrated
    from wellcond.diagnostics.input_moments import second_moments
    from wellcond.layouts import Layout, register_layout
    from wellcond.moments.collection import SecondMoments
    from wellcond.runtime.checks import WellcondWarning
    from wellcond.transforms import (
        Attachment,
        FeatureDescent,
        FeatureWhitening,
        GradientCentralization,
        GradientProjection,
        NormClipping,
        Orthogonalize,
        ZScore,
        attach,
    )
    from wellcond.transforms.base import GradientTransform

__all__ = [
    "Attachment",
    "FeatureDescent",
    "FeatureWhitening",
    "GradientCentralization",
    "GradientProjection",
    "GradientTransform",
    "Layout",
    "NormClipping",
    "Orthogonalize",
    "SecondMoments",
    "WellcondWarning",
    "ZScore",
    "__version__",
    "attach",
    "calibrate",
    "calibrated",
    "diagnostics",
    "nn",
    "optim",
    "register_layout",
    "repair",
    "second_moments",
    "theory",
]

# Names are looked up when they are first used (PEP 562): the command line says its version, its help and its lists
# without waiting for torch. See docs/decisions/0014-names-are-imported-when-used.md.
_SUBPACKAGES = ("diagnostics", "lab", "nn", "optim", "repair", "theory")
_FROM = {
    "wellcond.calibration.models": ("calibrate", "calibrated"),
    "wellcond.diagnostics.input_moments": ("second_moments",),
    "wellcond.layouts": ("Layout", "register_layout"),
    "wellcond.moments.collection": ("SecondMoments",),
    "wellcond.transforms": (
        "Attachment",
        "FeatureDescent",
        "FeatureWhitening",
        "GradientCentralization",
        "GradientProjection",
        "GradientTransform",
        "NormClipping",
        "Orthogonalize",
        "WellcondWarning",
        "ZScore",
        "attach",
    ),
}
_PLACES = {name: module for module, names in _FROM.items() for name in names}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import what a public name stands for, once."""
        if name in _SUBPACKAGES:
            return import_module(f"{__name__}.{name}")
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(_PLACES[name]), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
