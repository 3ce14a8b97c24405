"""Gradient transforms and the one way to attach them to an optimizer."""

from wellcond.runtime.checks import WellcondWarning
from wellcond.transforms.attaching import attach, attachments
from wellcond.transforms.attachment import Attachment
from wellcond.transforms.base import Coverage, Decay, GradientTransform, Slot
from wellcond.transforms.centralize import GradientCentralization
from wellcond.transforms.constraints import NormClipping, ZScore
from wellcond.transforms.hidden_weights import HiddenWeights
from wellcond.transforms.orthogonalize import Orthogonalize
from wellcond.transforms.preconditioner.transform import FeatureDescent, FeatureWhitening
from wellcond.transforms.projection import GradientProjection

__all__ = [
    "Attachment",
    "Coverage",
    "Decay",
    "FeatureDescent",
    "FeatureWhitening",
    "GradientCentralization",
    "GradientProjection",
    "GradientTransform",
    "HiddenWeights",
    "NormClipping",
    "Orthogonalize",
    "Slot",
    "WellcondWarning",
    "ZScore",
    "attach",
    "attachments",
]
