"""Layers that stand in for `nn.BatchNorm*`, their schedules, and the conversion of whole models."""

from wellcond.nn.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from wellcond.nn.momentum import MomentumBatchNorm1d, MomentumBatchNorm2d, MomentumBatchNorm3d

__all__ = [
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "MomentumBatchNorm1d",
    "MomentumBatchNorm2d",
    "MomentumBatchNorm3d",
]
