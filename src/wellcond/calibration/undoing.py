"""Makes layers again what they were: after an error, after a ``with`` block, or once frozen ones have been measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from wellcond.nn.convert.frozen import thawed


class Snapshot:
    """Keeps the classes and attributes of layers, and the values of their buffers, to put them back.

    Args:
        layers: The layers.

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> before = Snapshot([layer])
        >>> _ = layer(torch.tensor([[1.0], [3.0]]))
        >>> before.put_back()
        >>> layer.running_mean
        tensor([0.])
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
        self._values: list[tuple[Tensor, Tensor]] = []
        for layer in layers:
            state = dict(vars(layer))
            state |= {name: dict(state[name]) for name in ("_parameters", "_buffers", "_modules")}
            self._layers.append((layer, type(layer), state))
            with torch.no_grad():
                self._values += [
                    (buffer, buffer.clone()) for buffer in layer.buffers(recurse=False) if not is_lazy(buffer)
                ]

    def put_back(self, values: bool = True) -> None:
        """Make the layers what they were.

        Args:
            values: Of the buffers, too; or let these be what they have become.
        """
        for layer, kind, state in self._layers:
            layer.__class__ = kind
            layer.__dict__.clear()
            layer.__dict__.update(state)
        if values:
            with torch.no_grad():
                for buffer, value in self._values:
                    buffer.copy_(value)

    def keep_modes(self) -> None:
        """Note that the mode that each layer is in now is to stay."""
        for layer, _, state in self._layers:
            state["training"] = layer.training


@contextmanager
def undone_on_error(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Make layers, which may have been converted and filled, what they were if anything raises or interrupts."""
    before = Snapshot(layers)
    try:
        yield
    except BaseException:
        before.put_back()
        raise


@contextmanager
def thawed_meanwhile(frozen: Iterable[nn.Module], again: bool) -> Iterator[None]:
    """Make frozen layers plain ones, for statistics to be taken of them; and frozen again, with new statistics."""
    layers = list(frozen)
    before = Snapshot(layers)
    for layer in layers:
        plain = thawed(layer)
        layer.__class__ = type(plain)
        layer.__dict__.clear()
        layer.__dict__.update(vars(plain))
    yield
    if again:
        before.put_back(values=False)
