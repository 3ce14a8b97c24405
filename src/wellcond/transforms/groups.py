"""Which parameters an optimizer holds now."""

from __future__ import annotations

from collections.abc import KeysView

from torch import Tensor
from torch.optim import Optimizer


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
