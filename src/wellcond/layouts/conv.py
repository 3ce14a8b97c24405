"""Convolutions and transposed convolutions: their rows are the patches that the kernel sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.layouts.layout import Layout, Rows
from wellcond.numerics.windows import Window, patch_rows


class ConvLayout(Layout):
    """``nn.Conv1d/2d/3d``: weight (out, in/groups, *kernel); rows are the patches under the kernel (im2col)."""

    kind = "conv"
    has_rows = True
    forward_uses = ("_conv_forward",)

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """View as [groups, out/groups, in/groups, *kernel]."""
        groups = self.groups(module)
        return weight.unsqueeze(0) if groups == 1 else torch.unflatten(weight, 0, (groups, -1))

    def groups(self, module: nn.Module) -> int:
        """Return the convolution's groups."""
        return cast(nn.Conv2d, module).groups

    def rows(self, module: nn.Module, inputs: Tensor) -> Rows:
        """Lay out the padded input's patches; stride, dilation, padding and its mode are the layer's own.

        Args:
            module: An ``nn.Conv1d/2d/3d``.
            inputs: Shape (N, C, *space), or (C, *space) without a batch axis.

        Returns:
            Shape [groups, N · output positions, C/groups · kernel taps].
        """
        return patch_rows(self.padded(module, inputs), self.window(module))

    def output_rows(self, module: nn.Module, output: Any) -> Tensor | None:
        """Lay out the channels of every position, those of all groups side by side."""
        return _channel_rows(module, output)

    def window(self, module: nn.Module) -> Window:
        """Return the kernel's own window."""
        conv = cast(nn.Conv2d, module)
        return Window(tuple(conv.kernel_size), tuple(conv.stride), tuple(conv.dilation), conv.groups)

    def padded(self, module: nn.Module, *inputs: Any) -> Tensor:
        """Pad as the layer pads."""
        conv = cast(nn.Conv2d, module)
        batch = with_batch_axis(inputs[0], len(conv.kernel_size))
        padding = conv.padding if isinstance(conv.padding, str) else tuple(int(size) for size in conv.padding)
        pads = pads_of(tuple(conv.kernel_size), tuple(conv.dilation), padding)
        return F.pad(batch, pads, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)


class WhitenedConvLayout(ConvLayout):
    """A convolution that whitens its patches itself: its gradient is not to be preconditioned by their second moment.

    `rows` are what the layer is given, before it whitens that.
    """

    has_rows = False
    missing_rows = "the layer whitens its features itself"


class ConvTransposeLayout(Layout):
    """``nn.ConvTranspose1d/2d/3d``: weight (in, out/groups, *kernel), so the output unit is the *second* axis.

    The layer is a convolution of stride 1 over the input with ``stride − 1`` zeros between its positions, whose kernel
    is mirrored. Mirroring the input instead leaves the set of patches, and so the second moment, the same.
    """

    kind = "conv"
    output_axis = 1
    has_rows = True
    forward_uses = ("_output_padding",)

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """View as [groups, out/groups, in/groups, *kernel]."""
        return torch.unflatten(weight, 0, (self.groups(module), -1)).transpose(1, 2)

    def groups(self, module: nn.Module) -> int:
        """Return the convolution's groups."""
        return cast(nn.ConvTranspose2d, module).groups

    def unit_mean(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Average over the inputs of each unit's own group."""
        if self.groups(module) == 1:
            return super().unit_mean(module, weight)
        rows = self.matrix(module, weight)  # [groups, out, in, *kernel]
        mean = rows.mean(dim=list(range(2, rows.dim())), keepdim=True)
        return mean.expand(*rows.shape[:3], *mean.shape[3:]).transpose(1, 2).flatten(0, 1)

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Pick the input and, where the call gives it, the output size."""
        given = dict(zip(("input", "output_size"), args, strict=False)) | dict(kwargs)
        inputs = given.get("input")
        return (inputs, given.get("output_size")) if isinstance(inputs, Tensor) else None

    def rows(self, module: nn.Module, inputs: Tensor, output_size: list[int] | None = None) -> Rows:
        """Lay out what each output position sums over, in the kernel's order.

        Args:
            module: An ``nn.ConvTranspose1d/2d/3d``.
            inputs: Shape (N, C, *space), or (C, *space) without a batch axis.
            output_size: As the layer's forward was given it.

        Returns:
            Shape [groups, N · output positions, C/groups · kernel taps]; output positions run backwards.
        """
        return patch_rows(self.padded(module, inputs, output_size), self.window(module))

    def output_rows(self, module: nn.Module, output: Any) -> Tensor | None:
        """Lay out the channels of every position, those of all groups side by side."""
        return _channel_rows(module, output)

    def window(self, module: nn.Module) -> Window:
        """Return a window of stride 1."""
        conv = cast(nn.ConvTranspose2d, module)
        return Window(tuple(conv.kernel_size), (1,) * len(conv.kernel_size), tuple(conv.dilation), conv.groups)

    def padded(self, module: nn.Module, *inputs: Any) -> Tensor:
        """Put zeros between and around the input's positions, and mirror them."""
        conv = cast(nn.ConvTranspose2d, module)
        axes = len(conv.kernel_size)
        batch = with_batch_axis(inputs[0], axes)
        size, stride, dilation = tuple(conv.kernel_size), tuple(conv.stride), tuple(conv.dilation)
        padding = tuple(int(size) for size in conv.padding)
        output_size = inputs[1] if len(inputs) > 1 else None
        extra = conv._output_padding(batch, output_size, list(stride), list(padding), list(size), axes, list(dilation))
        return spread_out(batch, size, stride, padding, tuple(extra), dilation)


def spread_out(
    batch: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    extra: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the input of the convolution of stride 1, kernel mirrored, that a transposed convolution is.

    Args:
        batch: Shape (N, C, *space).
        size: The kernel's, per axis, as what follows.
        stride: Of the transposed convolution.
        padding: Likewise.
        extra: Its output padding.
        dilation: Likewise.

    Returns:
        Shape (N, C, *larger), mirrored: zeros between and around the input's positions.
    """
    axes = len(size)
    shape = [step * (length - 1) + 1 for step, length in zip(stride, batch.shape[2:], strict=True)]
    spaced = batch.new_zeros(*batch.shape[:2], *shape)
    places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in stride))
    spaced[places] = batch
    pads: list[int] = []
    for axis in reversed(range(axes)):
        edge = dilation[axis] * (size[axis] - 1) - padding[axis]
        pads += [edge, edge + extra[axis]]
    return F.pad(spaced, pads).flip(list(range(2, 2 + axes)))


def with_batch_axis(inputs: Tensor, axes: int) -> Tensor:
    """Return an input of a convolution over ``axes`` axes with a batch axis, be it of one sample."""
    return inputs.unsqueeze(0) if inputs.dim() == axes + 1 else inputs


def pads_of(size: Sequence[int], dilation: Sequence[int], padding: str | Sequence[int]) -> list[int]:
    """Return a convolution's padding in the order of `F.pad`: last axis first, before and after."""
    pads: list[int] = []
    for axis in reversed(range(len(size))):
        total = dilation[axis] * (size[axis] - 1)
        if isinstance(padding, str):
            pads += [total // 2, total - total // 2] if padding == "same" else [0, 0]
        else:
            pads += [padding[axis]] * 2
    return pads


def _channel_rows(conv: nn.Module, output: Any) -> Tensor | None:
    if not isinstance(output, Tensor):
        return None
    batch = with_batch_axis(output, len(cast(nn.Conv2d, conv).kernel_size))
    return batch.movedim(1, -1).flatten(0, -2).unsqueeze(0)
