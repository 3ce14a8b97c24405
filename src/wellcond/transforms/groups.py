"""Reads the parameters that an optimizer holds now, and its settings for each of their groups."""

from __future__ import annotations

from collections.abc import KeysView, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from wellcond.transforms.base import Terms
from wellcond.transforms.weight_decay import WeightDecayKind, group_decay


class Groups:
    """The parameters of an optimizer as they were when last looked at, and in which group each is.

    They are compared by identity: another parameter at the same place is another parameter.
    """

    def __init__(self) -> None:
        # The parameters themselves are kept, so that no new one can have the id of one that is gone.
        self._parameters: list[Tensor] = []
        self._ids: list[list[int]] = []
        self._group_of: dict[int, int] = {}
        self._switches: list[list[Any]] | None = None
        self.terms: list[Terms] = []

    def look(self, optimizer: Optimizer) -> bool:
        """Take in what the optimizer holds now.

        Args:
            optimizer: The optimizer.

        Returns:
            Whether anything is new, gone, or elsewhere.
        """
        groups = optimizer.param_groups
        ids = [list(map(id, group["params"])) for group in groups]
        if ids == self._ids:
            return False
        self._parameters, self._ids = [parameter for group in groups for parameter in group["params"]], ids
        self._group_of = {key: index for index, keys in enumerate(ids) for key in keys}
        self.terms = [Terms() for _ in groups]
        self._switches = None
        return True

    def read(self, optimizer: Optimizer, kind: WeightDecayKind, switches: Sequence[str]) -> bool:
        """Take in what the groups say of the coming step: into `terms`, and which switches are on.

        Args:
            optimizer: The optimizer.
            kind: Of its weight decay.
            switches: Keys of the groups that turn something off.

        Returns:
            Whether a switch was turned since, or nothing had been read of these groups.
        """
        grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        now = []
        for group, terms in zip(optimizer.param_groups, self.terms, strict=True):
            terms.decay = group_decay(optimizer, group, kind)
            terms.grad_scale, terms.found_inf = grad_scale, found_inf
            now.append([bool(group.get(switch, True)) for switch in switches])
        turned, self._switches = now != self._switches, now
        return turned

    def is_on(self, index: int, switch: int) -> bool:
        """Say whether a group lets something act: `read` tells which of its ``switches``."""
        return self._switches is None or self._switches[index][switch]

    def acted_on(self, switch: int) -> set[int]:
        """Return the ``id`` of each parameter in a group that lets something act."""
        return {key for key, index in self._group_of.items() if self.is_on(index, switch)}

    @property
    def held(self) -> KeysView[int]:
        """The ``id`` of each parameter; supports ``in``."""
        return self._group_of.keys()

    def group_of(self, parameter: Tensor) -> int | None:
        """Return the number of a parameter's group, or None if the optimizer does not hold it."""
        return self._group_of.get(id(parameter))
