"""Repairs networks whose statistics are stale: after averaging, merging, rounding or pruning, and on shifted data."""

from wellcond.repair.adaptation import adapting
from wellcond.repair.averaging import average
from wellcond.repair.merging import align, merge
from wellcond.repair.pruning import prune_channels
from wellcond.repair.rounding import round_weights

__all__ = ["adapting", "align", "average", "merge", "prune_channels", "round_weights"]
