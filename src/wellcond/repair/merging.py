"""Merges two networks that were trained apart: their channels are matched first, and the statistics taken anew."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.calibration.models import calibrate
from wellcond.repair.averaging import average
from wellcond.repair.channels import Channels, find_channels
from wellcond.runtime.checks import checked
from wellcond.runtime.models import Call, device_of, moved, run_on, unwrapped


@checked
def merge(
    first: nn.Module,
    second: nn.Module,
    loader: Sequence[Any] | Iterable[Any],
    *,
    share: float = 0.5,
    matched: bool = True,
    call: Call | None = None,
    **options: Any,
) -> nn.Module:
    """Return a network between two of one architecture, its channels matched and its statistics its own.

    Without matched channels nothing of two networks fits together; without new statistics the features of the merged
    network have almost no variance left, and each layer lowers it further.

    Args:
        first: A network of convolutions, linear layers and batch normalizations that `torch.fx` can trace.
        second: Another one; is not changed.
        loader: Training data, as `wellcond.calibrate` takes it; it is gone through twice, so it must not be an iterator
            that ends.
        share: Of the first one, from 0 to 1.
        matched: Whether to `align` the second one's channels to the first one's (on a copy of it).
        call: As in `wellcond.calibrate`.
        **options: Further ones of `wellcond.calibrate`.

    Returns:
        A new network.

    Raises:
        TypeError: If a network cannot be traced, or the loader is an iterator.
        ValueError: If they are of different architectures, or the share is out of its range.

    Source: Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair" (ICLR 2023).

    Example:
        >>> networks = [nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)) for _ in range(2)]
        >>> type(merge(*networks, [torch.randn(16, 2)])).__name__
        'Sequential'
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    if isinstance(loader, Iterator):
        raise TypeError("loader must be something to go through twice, such as a DataLoader or a list, not an iterator")
    other = align(copy.deepcopy(unwrapped(second)), first, loader, call=call) if matched else second
    return calibrate(average([first, other], weights=[share, 1 - share]), loader, call=call, **options)


@checked
def align(model: nn.Module, to: nn.Module, loader: Iterable[Any], *, call: Call | None = None) -> nn.Module:
    """Permute a network's channels, in place, so that each is like the same channel of another network.

    The network computes what it did. Of all permutations of a layer's channels the one is taken that makes the sum of
    the correlations largest, over the samples and positions of the loader's batches, of each channel with that of the
    other network in its place.

    Args:
        model: A network of convolutions, linear layers and batch normalizations that `torch.fx` can trace.
        to: The network to follow, of the same architecture; is not changed.
        loader: Batches, as `wellcond.calibrate` takes them.
        call: As in `wellcond.calibrate`.

    Returns:
        `model`.

    Raises:
        TypeError: If a network cannot be traced.
        ValueError: If they are of different architectures, or the loader is empty.

    Source: Li et al., "Convergent Learning: Do different neural networks learn the same representations?" (2016).

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> other = copy.deepcopy(network)
        >>> find_channels(other)[0].select(torch.tensor([2, 0, 1]))
        >>> bool(torch.equal(align(other, network, [torch.randn(99, 2)])[0].weight, network[0].weight))
        True
    """
    own, wanted = unwrapped(model), unwrapped(to)
    groups, of_other = find_channels(own), find_channels(wanted)
    if [(each.size, each.modules) for each in groups] != [(each.size, each.modules) for each in of_other]:
        raise ValueError(f"model and to must be of one architecture, got {type(own).__name__}, {type(wanted).__name__}")
    free = [channels for channels in groups if channels.fixed is None]
    correlations = _correlations(own, wanted, free, loader, call)
    with torch.no_grad():
        for channels, correlation in zip(free, correlations, strict=True):
            channels.select(best_matches(correlation))
    return model


def _correlations(
    model: nn.Module, to: nn.Module, groups: list[Channels], loader: Iterable[Any], call: Call | None
) -> list[Tensor]:
    """Return how each channel of `to` (rows) correlates with each of `model` (columns), summed over the layers."""
    seen: list[dict[str, Tensor]] = [{}, {}]
    names = {name for channels in groups for name in channels.modules}
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name, kept=kept: kept.update({name: output.detach()})
        )
        for network, kept in zip((to, model), seen, strict=True)
        for name in names
    ]
    modes = [(module, module.training) for network in (to, model) for module in network.modules()]
    sums: dict[str, list[Tensor]] = {}
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            for batch in loader:
                for network in (to, model):
                    run_on(network, moved(batch, device_of(network)), call)
                for name in names & seen[0].keys() & seen[1].keys():
                    rows = [kept[name].movedim(1, -1).flatten(0, -2).double().cpu() for kept in seen]
                    _add(sums.setdefault(name, []), *rows)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    if not sums:
        raise ValueError("the loader gave no batch")
    return [
        sum((_correlation(sums[name]) for name in channels.modules if name in sums), torch.zeros(()))
        for channels in groups
    ]


def _add(sums: list[Tensor], one: Tensor, other: Tensor) -> None:
    """Add rows to sums: how many, of each, of squares of each, of products."""
    new = [torch.tensor(float(len(one))), one.sum(0), other.sum(0), one.square().sum(0), other.square().sum(0)]
    new.append(one.T @ other)
    if not sums:
        sums += new
    else:
        for total, value in zip(sums, new, strict=True):
            total += value


def _correlation(sums: list[Tensor]) -> Tensor:
    count, one, other, one_squared, other_squared, products = sums
    covariance = products / count - torch.outer(one / count, other / count)
    scales = [
        (square / count - (total / count).square()).clamp_min(1e-12).sqrt()
        for total, square in ((one, one_squared), (other, other_squared))
    ]
    return covariance / torch.outer(*scales)


def best_matches(gains: Tensor) -> Tensor:
    """Return for each row the column of a perfect matching whose gains sum to the most (the Hungarian method).

    Args:
        gains: Shape [n, n].

    Returns:
        Shape [n], integers.

    Example:
        >>> best_matches(torch.tensor([[3.0, 2.0], [2.0, 0.0]]))
        tensor([1, 0])
    """
    cost = -gains.double().cpu()
    size = len(cost)
    # Row and column 0 stand for none; each row finds the cheapest path to a free column.
    of_rows, of_columns = torch.zeros(size + 1, dtype=torch.float64), torch.zeros(size + 1, dtype=torch.float64)
    matched, way = [0] * (size + 1), torch.zeros(size + 1, dtype=torch.int64)
    for row in range(1, size + 1):
        matched[0], column = row, 0
        least = torch.full((size + 1,), float("inf"), dtype=torch.float64)
        used = torch.zeros(size + 1, dtype=torch.bool)
        while matched[column]:
            used[column] = True
            reduced = cost[matched[column] - 1] - of_rows[matched[column]] - of_columns[1:]
            better = ~used[1:] & (reduced < least[1:])
            least[1:] = torch.where(better, reduced, least[1:])
            way[1:][better] = column
            following = int(torch.where(used, float("inf"), least)[1:].argmin()) + 1
            step = float(least[following])
            of_rows[[matched[each] for each in used.nonzero().flatten().tolist()]] += step
            of_columns[used] -= step
            least[~used] -= step
            column = following
        while column:
            previous = int(way[column])
            matched[column] = matched[previous]
            column = previous
    result = torch.empty(size, dtype=torch.int64)
    for column in range(1, size + 1):
        result[matched[column] - 1] = column - 1
    return result
