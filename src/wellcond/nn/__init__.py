"""Layers that stand in for `nn.BatchNorm*`, their schedules, and the conversion of whole models."""

from wellcond.nn.convert.fold import fold_switchable
from wellcond.nn.convert.ibn_net import ibn_a, ibn_b
from wellcond.nn.convert.layers import convert_layers
from wellcond.nn.convert.norms import convert_norm
from wellcond.nn.convert.report import ConversionReport, conversion_report
from wellcond.nn.functional.sparse_simplex import sparsestmax
from wellcond.nn.norm.bsr import BSRBatchNorm1d, BSRBatchNorm2d, BSRBatchNorm3d
from wellcond.nn.norm.cross_iteration import (
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    CrossIterationBatchNorm3d,
    connect_cross_iteration,
)
from wellcond.nn.norm.decorrelated import DecorrelatedBatchNorm2d
from wellcond.nn.norm.evalnorm import EvalNorm1d, EvalNorm2d, EvalNorm3d
from wellcond.nn.norm.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from wellcond.nn.norm.instance_batch import InstanceBatchNorm2d
from wellcond.nn.norm.iternorm import IterNorm2d
from wellcond.nn.norm.kalman.layer import KalmanBatchNorm2d
from wellcond.nn.norm.kalman.trace import connect_kalman
from wellcond.nn.norm.momentum import MomentumBatchNorm1d, MomentumBatchNorm2d, MomentumBatchNorm3d
from wellcond.nn.norm.moving_average import (
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
    MovingAverageBatchNorm3d,
)
from wellcond.nn.norm.population import PopulationNorm1d, PopulationNorm2d, PopulationNorm3d, gamma_decay
from wellcond.nn.norm.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from wellcond.nn.norm.sparse_switchable import SparseSwitchableNorm1d, SparseSwitchableNorm2d, SparseSwitchableNorm3d
from wellcond.nn.norm.switchable import SwitchableNorm1d, SwitchableNorm2d, SwitchableNorm3d, switch_logits
from wellcond.nn.schedule import BatchRenormScheduler, MomentumScheduler, SparsityScheduler
from wellcond.nn.standardize import weight_centralize, weight_standardize
from wellcond.nn.weight_normalization import weight_normalize
from wellcond.nn.whitened.deconvolution import NetworkDeconvolution2d
from wellcond.nn.whitened.eigen import EigenConv2d, EigenLinear
from wellcond.nn.whitened.gwnn import GeneralizedWhitenedConv2d, GeneralizedWhitenedLinear
from wellcond.nn.whitened.wnn import WhitenedConv2d, WhitenedLinear

__all__ = [
    "BSRBatchNorm1d",
    "BSRBatchNorm2d",
    "BSRBatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "BatchRenormScheduler",
    "ConversionReport",
    "CrossIterationBatchNorm1d",
    "CrossIterationBatchNorm2d",
    "CrossIterationBatchNorm3d",
    "DecorrelatedBatchNorm2d",
    "EigenConv2d",
    "EigenLinear",
    "EvalNorm1d",
    "EvalNorm2d",
    "EvalNorm3d",
    "GeneralizedWhitenedConv2d",
    "GeneralizedWhitenedLinear",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "InstanceBatchNorm2d",
    "IterNorm2d",
    "KalmanBatchNorm2d",
    "MomentumBatchNorm1d",
    "MomentumBatchNorm2d",
    "MomentumBatchNorm3d",
    "MomentumScheduler",
    "MovingAverageBatchNorm1d",
    "MovingAverageBatchNorm2d",
    "MovingAverageBatchNorm3d",
    "NetworkDeconvolution2d",
    "PopulationNorm1d",
    "PopulationNorm2d",
    "PopulationNorm3d",
    "SparseSwitchableNorm1d",
    "SparseSwitchableNorm2d",
    "SparseSwitchableNorm3d",
    "SparsityScheduler",
    "SwitchableNorm1d",
    "SwitchableNorm2d",
    "SwitchableNorm3d",
    "WhitenedConv2d",
    "WhitenedLinear",
    "connect_cross_iteration",
    "connect_kalman",
    "conversion_report",
    "convert_layers",
    "convert_norm",
    "fold_switchable",
    "gamma_decay",
    "ibn_a",
    "ibn_b",
    "sparsestmax",
    "switch_logits",
    "weight_centralize",
    "weight_normalize",
    "weight_standardize",
]
