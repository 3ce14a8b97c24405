"""What an optimizer's parameter groups say now: which parameters it holds, and which transforms may act on them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, KeysView
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from wellcond.transforms.base import GradientTransform


class Groups:
    """The parameters of an optimizer as they were when last looked at, and in which group each is.

    They are compared by identity: another parameter at the same place is another parameter.
    """

    def __init__(self) -> None:
        # The parameters themselves are kept, so that no new one can have the id of one that is gone.
        self._parameters: list[Tensor] = []
        self._ids: list[int] = []
        self._sizes: list[int] = []
        self._group_of: dict[int, int] = {}

    def look(self, optimizer: Optimizer) -> bool:
        """Take in what the optimizer holds now.

        Args:
            optimizer: The optimizer.

        Returns:
            Whether anything is new, gone, or elsewhere.
        """
        groups = optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        ids = list(map(id, parameters))
        sizes = [len(group["params"]) for group in groups]
        if ids == self._ids and sizes == self._sizes:
            return False
        self._parameters, self._ids, self._sizes = parameters, ids, sizes
        self._group_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        return True

    @property
    def held(self) -> KeysView[int]:
        """The ``id`` of each parameter; supports ``in``."""
        return self._group_of.keys()

    def group_of(self, parameter: Tensor) -> int | None:
        """Return the number of a parameter's group, or None if the optimizer does not hold it."""
        return self._group_of.get(id(parameter))


def unknown_switches(optimizer: Optimizer, transforms: Iterable[GradientTransform]) -> str | None:
    """Find what in the parameter groups looks like a switch of a transform but is none.

    Args:
        optimizer: The optimizer.
        transforms: Those that are attached; of those that are not, the switches of the known kinds count too.

    Returns:
        What to say of it, or None.
    """
    names = {transform.name for transform in transforms} | _known_names(GradientTransform)
    allowed = sorted(f"wellcond_{name}" for name in names)
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if not str(key).startswith("wellcond_"):
                continue
            if key not in allowed:
                near = difflib.get_close_matches(str(key), allowed, n=1)
                hint = f": did you mean {near[0]!r}?" if near else ""
                return f"parameter group {index} has {key!r}; a transform is switched by {', '.join(allowed)}{hint}"
            if not isinstance(value, bool):
                return f"{key} of parameter group {index} must be True or False, got {value!r}"
    return None


def _known_names(kind: type[Any]) -> set[str]:
    own = {kind.name} if isinstance(getattr(kind, "name", None), str) else set()
    return own.union(*(_known_names(sub) for sub in kind.__subclasses__()))
