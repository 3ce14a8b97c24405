"""Buffers of statistics: they keep their precision when a module is cast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from wellcond.runtime.tracing import is_repeated

if TYPE_CHECKING:
    from typing_extensions import Self


class KeptStatistics(nn.Module):
    """Base of the modules that keep statistics: casting the module to half precision does not round them."""

    # Buffers that no state dict holds: they follow from others, or are counted anew, from zero.
    transient: ClassVar[tuple[str, ...]] = ()

    def statistics(self) -> Iterator[tuple[str, torch.dtype]]:
        """Name the buffers that hold statistics, each with the narrowest dtype that it may have."""
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                yield name, torch.float32

    @property
    def recomputing(self) -> bool:
        """Whether this forward pass runs inside a backward pass: activation checkpointing repeats an earlier one."""
        return is_repeated()

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

    def own_or(self, name: str, value: float, like: Tensor) -> Tensor:
        """Return what a checkpoint without a tensor of this name is completed with: this module's own values.

        Args:
            name: Of a parameter or buffer.
            value: Taken instead if the module is on the meta device, where there are no values.
            like: A tensor of the checkpoint, whose device is then taken.
        """
        own = getattr(self, name).detach()
        if own.is_meta:
            return torch.full(own.shape, value, dtype=own.dtype, device=like.device)
        return cast(Tensor, own.clone())  # Assigned, it must not be the memory of another buffer.

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        # With `assign=True` the checkpoint's tensors are the buffers now, of whatever dtype, and on another device than
        # a module on the meta device has the rest on.
        self._widen_statistics()
        held = [buffer for name, buffer in self._buffers.items() if buffer is not None and name not in self.transient]
        for name in self.transient:
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.is_meta and held and not held[0].is_meta:
                self._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=held[0].device)

    def _widen_statistics(self) -> None:
        """Widen what the constructor, or a checkpoint, made narrow."""
        for name, narrowest in self.statistics():
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.dtype.itemsize < narrowest.itemsize:
                self._buffers[name] = buffer.to(_wide(narrowest, buffer.device))


def _wide(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype, or float32 where the device has no float64."""
    return torch.float32 if device.type == "mps" else dtype
