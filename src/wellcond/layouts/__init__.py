"""The meaning of each layer type's parameters: the axis of output units, and the rows that its input offers them.

A layout sees a weight as matrices ``[groups, out, *inputs]`` — one row per output unit — and the layer's input as the
rows ``[groups, n, d]`` which those matrices multiply. Nothing else in the library hard-codes an axis.
"""

from wellcond.layouts.attention import AttentionLayout
from wellcond.layouts.conv import ConvLayout, ConvTransposeLayout, WhitenedConvLayout
from wellcond.layouts.layers import Layer, Layers, find_layers
from wellcond.layouts.layout import Layout, Rows, WeightKind
from wellcond.layouts.linear import (
    BilinearLayout,
    EmbeddingBagLayout,
    EmbeddingLayout,
    LinearLayout,
    TransposedLinearLayout,
    WhitenedLinearLayout,
)
from wellcond.layouts.norm import BatchNormLayout, NormLayout
from wellcond.layouts.recurrent import RecurrentLayout
from wellcond.layouts.registry import layout_of, register_layout
from wellcond.layouts.watching import UnknownInputError

__all__ = [
    "AttentionLayout",
    "BatchNormLayout",
    "BilinearLayout",
    "ConvLayout",
    "ConvTransposeLayout",
    "EmbeddingBagLayout",
    "EmbeddingLayout",
    "Layer",
    "Layers",
    "Layout",
    "LinearLayout",
    "NormLayout",
    "RecurrentLayout",
    "Rows",
    "TransposedLinearLayout",
    "UnknownInputError",
    "WeightKind",
    "WhitenedConvLayout",
    "WhitenedLinearLayout",
    "find_layers",
    "layout_of",
    "register_layout",
]
