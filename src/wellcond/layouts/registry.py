"""Finds the rule of a layer type."""

from __future__ import annotations

import sys

from torch import nn

from wellcond.layouts.attention import AttentionLayout
from wellcond.layouts.blocks import BLOCKS
from wellcond.layouts.conv import ConvLayout, ConvTransposeLayout
from wellcond.layouts.layout import Layout
from wellcond.layouts.linear import (
    BilinearLayout,
    EmbeddingBagLayout,
    EmbeddingLayout,
    LinearLayout,
    TransposedLinearLayout,
)
from wellcond.layouts.norm import BatchNormLayout, GroupNormLayout, LayerNormLayout
from wellcond.layouts.own_forward import watched, without_rows
from wellcond.layouts.recurrent import RecurrentLayout
from wellcond.layouts.twin import can_be_moved, own_forward

_LAYOUTS: dict[type[nn.Module], Layout] = {
    nn.Linear: LinearLayout(),
    nn.Bilinear: BilinearLayout(),
    nn.MultiheadAttention: AttentionLayout(),
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU, nn.RNNBase), RecurrentLayout()),
    **dict.fromkeys((nn.RNNCell, nn.LSTMCell, nn.GRUCell, nn.RNNCellBase), RecurrentLayout()),
    nn.Embedding: EmbeddingLayout(),
    nn.EmbeddingBag: EmbeddingBagLayout(),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvLayout()),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ConvTransposeLayout()),
    nn.modules.batchnorm._NormBase: BatchNormLayout(),
    nn.LayerNorm: LayerNormLayout(),
    nn.RMSNorm: LayerNormLayout(),
    nn.GroupNorm: GroupNormLayout(),
}
_OF_OTHER_LIBRARIES: dict[tuple[str, str], Layout] = {
    ("transformers.pytorch_utils", "Conv1D"): TransposedLinearLayout(),
    **BLOCKS,
}


def register_layout(module_type: type[nn.Module], layout: Layout) -> None:
    """Teach the library a layer type (and its subclasses); a later rule for the same type replaces the earlier one.

    Args:
        module_type: A subclass of ``nn.Module``.
        layout: Its rule.

    Raises:
        TypeError: If either argument is of another type.

    Example:
        >>> import torch
        >>> from wellcond.layouts import NormLayout
        >>> class Gate(nn.Module):  # y = x * weight: not a linear map over features
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(1, 8, 1, 1))
        >>> register_layout(Gate, NormLayout())
        >>> layout_of(Gate()).kind
        'norm'
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of nn.Module, got {module_type!r}")
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout, got {layout!r}")
    _LAYOUTS[module_type] = layout


def layout_of(module: nn.Module) -> Layout | None:
    """Find the rule for a layer by its class, or by the nearest base class that has one.

    A rule knows the forward of the class that it is registered for. Where a subclass, or the object itself, has a
    forward of its own, a variant is returned: it looks at what that forward multiplies the weight with, or, where such
    calls cannot be read, knows the weight alone (``has_rows`` is False, ``missing_rows`` says why).

    Args:
        module: Any module.

    Returns:
        The rule, or None for a layer type that is not known.

    Example:
        >>> layout_of(nn.Conv2d(3, 8, 3)).kind
        'conv'
        >>> layout_of(nn.ReLU()) is None
        True
    """
    for cls in type(module).__mro__:
        layout = _LAYOUTS.get(cls) or _of_other_libraries(cls)
        if layout is None:
            continue
        if not layout.has_rows or own_forward(module, cls, layout.forward_uses) is None:
            return layout
        if not can_be_moved(module):
            return without_rows(layout, "a function was put in the place of its forward (see register_layout)")
        return watched(layout)
    return None


def _of_other_libraries(cls: type) -> Layout | None:
    """Return the rule for a layer type of a library that may be missing; if there is such a layer, it was imported."""
    layout = _OF_OTHER_LIBRARIES.get((cls.__module__, cls.__qualname__))
    known = layout is not None and cls is getattr(sys.modules.get(cls.__module__), cls.__name__, None)
    return layout if known else None
