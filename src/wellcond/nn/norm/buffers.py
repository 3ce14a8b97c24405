"""Statistics that keep their precision when a module is cast, and that a repeated forward pass leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class KeptStatistics(nn.Module):
    """Base of the modules that keep statistics: casting the module to half precision does not round them."""

    def statistics(self) -> Iterator[tuple[str, torch.dtype]]:
        """Name the buffers that hold statistics, each with the narrowest dtype that it may have."""
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                yield name, torch.float32

    @property
    def recomputing(self) -> bool:
        """Whether this forward pass runs inside a backward pass: activation checkpointing repeats an earlier one."""
        return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers.get(name) for name, _ in self.statistics()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, narrowest in self.statistics():
            old, new = before.get(name), self._buffers.get(name)
            if old is not None and new is not None and new.dtype.itemsize < narrowest.itemsize:
                # Cast by way of the narrow dtype they would be rounded: move the old ones instead.
                dtype = _wide(narrowest, new.device)
                self._buffers[name] = new.to(dtype) if old.is_meta else old.to(new.device, dtype)
        return self

    def _widen_statistics(self) -> None:
        """Widen what the constructor made narrow."""
        for name, narrowest in self.statistics():
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.dtype.itemsize < narrowest.itemsize:
                self._buffers[name] = buffer.to(_wide(narrowest, buffer.device))


def _wide(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype, or float32 where the device has no float64."""
    return torch.float32 if device.type == "mps" else dtype
