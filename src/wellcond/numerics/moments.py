"""Means and variances of features: one pass gives each instance's; batches', layers' and groups' follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.runtime.tracing import is_recorded

# Above this ratio of squared mean to variance, E[x²] − μ² loses too many digits (16: four bits) and is not used.
_CANCELLATION = 16.0


class Moments(NamedTuple):
    """Means and biased variances.

    Attributes:
        mean: Any shape, float32 or wider.
        var: The same shape, biased (divided by `elements`), never negative.
        elements: How many values are behind each entry; a tensor that broadcasts with `mean` where it differs between
            entries.
    """

    mean: Tensor
    var: Tensor
    elements: int | Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that statistics of features of a dtype are kept in: float32 or wider.

    >>> statistics_dtype(torch.bfloat16), statistics_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def positions(inputs: Tensor) -> int:
    """Return how many positions each channel of each instance has: 1 for inputs [N, C].

    >>> positions(torch.zeros(2, 3, 4, 5))
    20
    """
    return math.prod(inputs.shape[2:])


def instance_moments(inputs: Tensor) -> Moments:
    """Return the mean and variance of each channel of each instance over its positions, (3.3) of the thesis.

    One pass over the inputs; features whose mean dwarfs their spread are passed over again, shifted, so that nothing
    cancels. Not differentiable: `wellcond.nn.functional.normalize` has the analytic backward.

    Args:
        inputs: Shape [N, C, *positions], any memory format.

    Returns:
        Shape [N, C].

    Raises:
        ValueError: If the inputs have fewer than two dimensions.

    Example:
        >>> moments = instance_moments(torch.tensor([[[1.0, 3.0], [5.0, 5.0]]]))
        >>> moments.mean.tolist(), moments.var.tolist(), moments.elements
        ([[2.0, 5.0]], [[1.0, 0.0]], 2)
    """
    inputs, axes, dtype = _prepare(inputs)
    if _has_fast_sums(inputs):
        instances = _from_sums(*_sums(inputs, axes, dtype), positions(inputs))
        if not _cancels(instances):
            return instances
    return _instances(inputs, axes, dtype)


def instance_and_ghost_moments(inputs: Tensor, sizes: Sequence[int] | None) -> tuple[Moments, Moments]:
    """Return the moments of each instance and those of each group of samples, from the same pass.

    Args:
        inputs: Shape [N, C, *positions], any memory format.
        sizes: Of the groups, as `ghost_sizes` gives them; None for one group.

    Returns:
        Shapes [N, C] and [groups, C], or [C] for one group. Rounding in an instance's variance is small beside the
        variance of its group, not beside its own.

    Raises:
        ValueError: If the inputs have fewer than two dimensions.
    """
    inputs, axes, dtype = _prepare(inputs)
    if _has_fast_sums(inputs):
        total, square = _sums(inputs, axes, dtype)
        whole = _from_sums(sum_samples(total, sizes), sum_samples(square, sizes), _counts(inputs, sizes, dtype))
        if not _cancels(whole):
            return _from_sums(total, square, positions(inputs)), whole
    instances = _instances(inputs, axes, dtype)
    return instances, merge_samples(instances, sizes)


def ghost_moments(inputs: Tensor, sizes: Sequence[int] | None) -> Moments:
    """Return the mean and variance of each channel over each group of samples and all positions.

    Args:
        inputs: Shape [N, C, *positions], any memory format.
        sizes: Of the groups, as `ghost_sizes` gives them; None for one group.

    Returns:
        Shape [groups, C], or [C] for one group.

    Example:
        >>> ghost_moments(torch.tensor([[1.0], [3.0], [5.0], [5.0]]), ghost_sizes(4, 2)).mean
        tensor([[2.],
                [5.]])
    """
    inputs, axes, dtype = _prepare(inputs)
    if _is_channels_last(inputs):
        parts = [inputs] if sizes is None else inputs.split(list(sizes))
        mean, var = _of_parts(parts)
        mean, var = (mean[0], var[0]) if sizes is None else (mean, var)
        return Moments(mean, var, _counts(inputs, sizes, dtype))
    if _has_fast_sums(inputs):
        total, square = _sums(inputs, axes, dtype)
        whole = _from_sums(sum_samples(total, sizes), sum_samples(square, sizes), _counts(inputs, sizes, dtype))
        if not _cancels(whole):
            return whole
    return merge_samples(_instances(inputs, axes, dtype), sizes)


def merge_moments(moments: Moments, dim: int | Sequence[int], keepdim: bool = False) -> Moments:
    """Combine the moments of parts of equal size: the mean of means; the mean variance plus the variance of means.

    No squares of means are subtracted, so nothing cancels.

    Args:
        moments: Of the parts, all of the same size.
        dim: Over which dimensions the parts lie.
        keepdim: Keep those dimensions, with size 1.

    Returns:
        The moments of the union. No parts at all: zeros.

    Example:
        >>> parts = Moments(torch.tensor([0.0, 4.0]), torch.tensor([1.0, 3.0]), 10)
        >>> merge_moments(parts, dim=0)
        Moments(mean=tensor(2.), var=tensor(6.), elements=20)
    """
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    parts = math.prod([moments.mean.shape[d] for d in dims])
    if parts == 0:
        mean = moments.mean.sum(dims, keepdim=keepdim)
        return Moments(mean, torch.zeros_like(mean), 0)
    mean = moments.mean.mean(dims, keepdim=True)
    off = moments.mean - mean
    var = torch.addcmul(moments.var, off, off).mean(dims, keepdim=keepdim)
    if not keepdim:
        mean = mean.squeeze(dims)
    return Moments(mean, var, moments.elements * parts)


def merge_unequal(moments: Moments) -> Moments:
    """Combine the moments of parts of different sizes, which lie along the first dimension.

    Args:
        moments: Of the parts; `elements` is a tensor that broadcasts with the means and is not all zero.

    Returns:
        The moments of the union; its `elements` are a tensor.

    Example:
        >>> parts = Moments(torch.tensor([0.0, 3.0]), torch.tensor([0.0, 0.0]), torch.tensor([2.0, 1.0]))
        >>> merge_unequal(parts)
        Moments(mean=tensor(1.), var=tensor(2.), elements=tensor(3.))
    """
    count = torch.as_tensor(moments.elements, dtype=moments.mean.dtype, device=moments.mean.device)
    total = count.sum(0, keepdim=True)
    share = count / total
    mean = (share * moments.mean).sum(0, keepdim=True)
    var = (share * (moments.var + (moments.mean - mean).square())).sum(0)
    return Moments(mean.squeeze(0), var, total.squeeze(0))


def batch_moments(inputs: Tensor) -> Moments:
    """Return the mean and variance of each channel over the batch and all positions, shape [C].

    >>> batch_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]])).mean
    tensor([2., 0.])
    """
    return ghost_moments(inputs, None)


def layer_moments(inputs: Tensor) -> Moments:
    """Return the mean and variance of each instance over all channels and positions, shape [N, 1].

    >>> layer_moments(torch.tensor([[1.0, 3.0]])).mean
    tensor([[2.]])
    """
    return merge_moments(instance_moments(inputs), dim=1, keepdim=True)


def group_moments(inputs: Tensor, groups: int) -> Moments:
    """Return the mean and variance of each instance over each group of channels and all positions, shape [N, groups].

    Raises:
        ValueError: If the channels do not divide into so many groups.

    >>> group_moments(torch.tensor([[1.0, 3.0, 5.0, 5.0]]), groups=2).mean
    tensor([[2., 5.]])
    """
    if groups < 1 or inputs.shape[1] % groups:
        raise ValueError(f"groups must divide the {inputs.shape[1]} channels, got {groups}")
    mean, var, count = instance_moments(inputs)
    grouped = Moments(mean.unflatten(1, (groups, -1)), var.unflatten(1, (groups, -1)), count)
    return merge_moments(grouped, dim=2)


def ghost_sizes(samples: int, group_size: int | None) -> tuple[int, ...] | None:
    """Return the sizes of a batch's ghost groups: its samples in order, `group_size` at a time.

    A remainder of more than half a group is a group of its own; a smaller one joins the last group.

    Args:
        samples: In the batch.
        group_size: Samples of a group; None for one group of all.

    Returns:
        Sizes, all equal but the last; None for one group of all.

    Example:
        >>> ghost_sizes(8, 4), ghost_sizes(7, 4), ghost_sizes(10, 4), ghost_sizes(5, 4)
        ((4, 4), (4, 3), (4, 6), None)
    """
    if group_size is None or samples <= group_size:
        return None
    whole, rest = samples // group_size, samples % group_size  # The compiler has no divmod.
    # Nor do older ones change a list's entry.
    sizes = [group_size] * whole + [rest] if 2 * rest > group_size else [group_size] * (whole - 1) + [group_size + rest]
    return tuple(sizes) if len(sizes) > 1 else None


def merge_samples(instances: Moments, sizes: Sequence[int] | None) -> Moments:
    """Combine instance moments into those of consecutive groups of samples.

    Args:
        instances: Shape [N, C], all of the same size.
        sizes: Of the groups, in order; all equal but the last, as `ghost_sizes` gives them; None for one group.

    Returns:
        Shape [groups, C], or [C] for one group; `elements` are a tensor [groups, 1] if the last group differs.

    Example:
        >>> instances = Moments(torch.tensor([[0.0], [2.0], [9.0]]), torch.zeros(3, 1), 5)
        >>> merge_samples(instances, (2, 1))
        Moments(mean=tensor([[1.],
                [9.]]), var=tensor([[1.],
                [0.]]), elements=tensor([[10.],
                [ 5.]]))
    """
    mean, var, count = instances
    if sizes is None:
        return merge_moments(instances, dim=0)
    if sizes[-1] == sizes[0]:
        split = (len(sizes), sizes[0])
        return merge_moments(Moments(mean.unflatten(0, split), var.unflatten(0, split), count), dim=1)
    last = mean.shape[0] - sizes[-1]
    head = merge_samples(Moments(mean[:last], var[:last], count), sizes[:-1])
    tail = merge_moments(Moments(mean[last:], var[last:], count), dim=0, keepdim=True)
    counts = _sample_counts(sizes, mean) * count
    return Moments(torch.cat([head.mean, tail.mean]), torch.cat([head.var, tail.var]), counts)


def sum_samples(values: Tensor, sizes: Sequence[int] | None) -> Tensor:
    """Sum [N, C] over consecutive groups of samples, to [groups, C], or to [C] for one group.

    >>> sum_samples(torch.tensor([[1.0], [2.0], [4.0]]), (2, 1)).flatten().tolist()
    [3.0, 4.0]
    """
    if sizes is None:
        return values.sum(0)
    if sizes[-1] == sizes[0]:
        return values.reshape(len(sizes), sizes[0], -1).sum(1)
    last = values.shape[0] - sizes[-1]
    return torch.cat([sum_samples(values[:last], sizes[:-1]), values[last:].sum(0, keepdim=True)])


def spread_samples(values: Tensor, sizes: Sequence[int] | None) -> Tensor:
    """Repeat each group's row for each of its samples, [groups, C] to [N, C]; one group's [C] stays as it is.

    >>> spread_samples(torch.tensor([[1.0], [2.0]]), (2, 1)).flatten().tolist()
    [1.0, 1.0, 2.0]
    """
    if sizes is None:
        return values
    if sizes[-1] == sizes[0]:
        return values.repeat_interleave(sizes[0], 0)
    head = spread_samples(values[:-1], sizes[:-1])
    return torch.cat([head, values[-1:].expand(sizes[-1], -1)])


def unbiased(moments: Moments) -> Tensor:
    """Return the unbiased variance, as `nn.BatchNorm*` keeps it in `running_var`; where there is one element, zero.

    >>> unbiased(Moments(torch.tensor(0.0), torch.tensor(3.0), 4))
    tensor(4.)
    """
    count = moments.elements
    if isinstance(count, Tensor):
        return moments.var * (count / (count - 1).clamp_min(1))
    return moments.var * (count / max(count - 1, 1))


def _prepare(inputs: Tensor) -> tuple[Tensor, tuple[int, ...], torch.dtype]:
    """Return the inputs without their graph, the axes of their positions, and the dtype of their statistics."""
    if inputs.dim() < 2:
        raise ValueError(f"inputs must have the shape [N, C, *positions], got {list(inputs.shape)}")
    return inputs.detach(), tuple(range(2, inputs.dim())), statistics_dtype(inputs.dtype)


def _is_channels_last(inputs: Tensor) -> bool:
    """Whether the memory has channels last, for which, on the CPU, only batch normalization's own kernel is fast."""
    return (
        inputs.device.type == "cpu"
        and inputs.dtype in (torch.float32, torch.float64)  # It would round the statistics of others.
        and inputs.dim() > 3
        and inputs.numel() > 0
        and positions(inputs) > 1
        and not inputs.is_contiguous()
        and inputs.movedim(1, -1).is_contiguous()
        and not is_recorded()
    )


def _of_parts(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of each channel over each part, [parts, C], by torch's kernel."""
    moments = [torch.batch_norm_update_stats(part, None, None, 0.0) for part in parts]
    return torch.stack([mean for mean, _ in moments]), torch.stack([var for _, var in moments])


def _has_fast_sums(inputs: Tensor) -> bool:
    """Whether a sum and a norm beat `torch.var_mean`, and can be looked at: on the CPU, not compiled."""
    return (
        inputs.device.type == "cpu"
        and not _is_channels_last(inputs)
        and inputs.numel() > 0
        and positions(inputs) > 1
        and not is_recorded()
    )


def _sums(inputs: Tensor, axes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return Σ x and Σ x² over the positions, [N, C]."""
    norm = torch.linalg.vector_norm(inputs, dim=axes, dtype=dtype)
    return inputs.sum(axes, dtype=dtype), norm.square_()


def _from_sums(total: Tensor, square: Tensor, count: int | Tensor) -> Moments:
    """Return the mean and E[x²] − μ², not below zero."""
    mean = total / count
    return Moments(mean, torch.addcmul(square / count, mean, mean, value=-1.0).clamp_min_(0.0), count)


def _cancels(moments: Moments) -> bool:
    """Whether some mean dwarfs its spread, so that E[x²] − μ² has lost its digits."""
    return bool((moments.mean.square() > _CANCELLATION * moments.var).any())


def _counts(inputs: Tensor, sizes: Sequence[int] | None, dtype: torch.dtype) -> int | Tensor:
    """Return how many elements each group has."""
    if sizes is None:
        return inputs.shape[0] * positions(inputs)
    if sizes[-1] == sizes[0]:
        return sizes[0] * positions(inputs)
    return _sample_counts(sizes, inputs.new_empty((), dtype=dtype)) * positions(inputs)


def _sample_counts(sizes: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor([[float(size)] for size in sizes], dtype=like.dtype, device=like.device)


def _instances(inputs: Tensor, axes: tuple[int, ...], dtype: torch.dtype) -> Moments:
    """Return instance moments from deviations from the mean."""
    count = positions(inputs)
    if count == 1 or inputs.numel() == 0:
        mean = inputs.sum(axes, dtype=dtype) if axes else inputs.to(dtype)
        return Moments(mean, torch.zeros_like(mean), count)
    if _is_channels_last(inputs):
        return Moments(*_of_parts(inputs.split(1)), count)
    if inputs.is_contiguous() and inputs.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
        # Batch normalization's own statistics, each channel of each instance taken for a channel of one instance.
        mean, var = torch.batch_norm_update_stats(inputs.view(1, -1, count), None, None, 0.0)
        if mean.dtype == dtype:
            return Moments(mean.view(inputs.shape[:2]), var.view(inputs.shape[:2]), count)
    var, mean = torch.var_mean(inputs.to(dtype), axes, correction=0)
    return Moments(mean, var, count)
