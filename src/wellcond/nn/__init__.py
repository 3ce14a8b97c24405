"""Layers that stand in for `nn.BatchNorm*`, their schedules, and the conversion of whole models."""

from wellcond.nn.bsr import BSRBatchNorm1d, BSRBatchNorm2d, BSRBatchNorm3d
from wellcond.nn.convert import convert_norm
from wellcond.nn.convert_layers import convert_layers
from wellcond.nn.deconvolution import NetworkDeconvolution2d
from wellcond.nn.decorrelated import DecorrelatedBatchNorm2d
from wellcond.nn.eigen import EigenConv2d, EigenLinear
from wellcond.nn.evalnorm import EvalNorm1d, EvalNorm2d, EvalNorm3d
from wellcond.nn.fold import fold_switchable
from wellcond.nn.generalized import GeneralizedWhitenedConv2d, GeneralizedWhitenedLinear
from wellcond.nn.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from wellcond.nn.ibn import ibn_a, ibn_b
from wellcond.nn.instance_batch import InstanceBatchNorm2d
from wellcond.nn.iternorm import IterNorm2d
from wellcond.nn.kalman import KalmanBatchNorm2d
from wellcond.nn.kalman_wiring import connect_kalman
from wellcond.nn.momentum import MomentumBatchNorm1d, MomentumBatchNorm2d, MomentumBatchNorm3d
from wellcond.nn.population import PopulationNorm1d, PopulationNorm2d, PopulationNorm3d, gamma_decay
from wellcond.nn.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from wellcond.nn.report import ConversionReport, conversion_report
from wellcond.nn.schedule import BatchRenormScheduler, MomentumScheduler, SparsityScheduler
from wellcond.nn.sparse_switchable import SparseSwitchableNorm1d, SparseSwitchableNorm2d, SparseSwitchableNorm3d
from wellcond.nn.sparsestmax import sparsestmax
from wellcond.nn.standardize import weight_standardize
from wellcond.nn.switchable import SwitchableNorm1d, SwitchableNorm2d, SwitchableNorm3d, switch_logits
from wellcond.nn.whitened import WhitenedConv2d, WhitenedLinear

__all__ = [
    "BSRBatchNorm1d",
    "BSRBatchNorm2d",
    "BSRBatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "BatchRenormScheduler",
    "ConversionReport",
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
    "weight_standardize",
]
