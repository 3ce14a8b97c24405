"""The ranks that train one model together: which they are, whether they agree, and those that ran out of batches."""

from __future__ import annotations

import hashlib
import sys
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wellcond.layouts.unusual import is_sharded
from wellcond.runtime.ranks import Ranks
from wellcond.transforms.base import GradientTransform, Slot

ADVICE = (
    "pass the process group of the ranks that train this model together, attach(…, synchronize=group), or "
    "synchronize=False"
)


class Replicas:
    """The ranks over which an attachment averages statistics.

    Args:
        model: The model, as it was given to `attach`.
        synchronize: True: the group of its DDP or FSDP wrapper, or else the default group; a group; or False.
    """

    def __init__(self, model: nn.Module, synchronize: bool | dist.ProcessGroup) -> None:
        self._model = model
        self._synchronize = synchronize
        self._group: bool | dist.ProcessGroup | None = None
        self._checked: list[Slot] | None = None
        self._join_hooks: list[_JoinHooks] = []

    def ranks(self, transforms: Sequence[GradientTransform], slots: dict[str, list[Slot]]) -> Ranks:
        """Return the ranks of the coming step, after a check that they train the same weights.

        Args:
            transforms: What is attached.
            slots: The slots of each by its name.

        Returns:
            The ranks.

        Raises:
            ValueError: On all ranks, if they do not.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return Ranks(False)
        if self._group is None:
            self._group = _group_of(self._model) if self._synchronize is True else self._synchronize
        ranks = Ranks(self._synchronize if self._group is None else self._group)
        # What observes nothing has nothing to share.
        sharing = [t for t in transforms if type(t).observe is not GradientTransform.observe]
        shared = [(each, slot) for each in sharing for slot in slots[each.name] if slot.coverage.applies]
        if ranks.size > 1 and sharing and self._checked != [slot for _, slot in shared]:
            lines = [f"{t.name} of '{s.layer.name}' {tuple(s.layer.weight.shape)}: {s.coverage.how}" for t, s in shared]
            weights = [slot.layer.weight for _, slot in shared]
            device = next(iter(self._model.parameters())).device
            _check_alike(ranks, lines, weights if self._synchronize is True else [], device)
            self._checked = [slot for _, slot in shared]
        return ranks

    def stand_in_when_joined(self, step: Callable[[], None]) -> None:
        """Have a step's collectives matched on a rank that has run out of batches under ``model.join()``.

        Args:
            step: Does what a step does with other ranks; held weakly.
        """
        for module in self._model.modules():
            if isinstance(module, DistributedDataParallel) and self._synchronize is not False:
                found = vars(module).get("join_hook")
                hooks = found if isinstance(found, _JoinHooks) else _JoinHooks(module)
                hooks.steps.append(weakref.WeakMethod(step))
                vars(module)["join_hook"] = hooks
                self._join_hooks.append(hooks)

    def leave(self, step: Callable[[], None]) -> None:
        """Undo `stand_in_when_joined`."""
        for hooks in self._join_hooks:
            hooks.steps = [known for known in hooks.steps if known() not in (None, step)]
        self._join_hooks = []


def _group_of(model: nn.Module) -> bool | dist.ProcessGroup:
    """Return the group over which a model's wrapper averages gradients; True for the default group."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            group: dist.ProcessGroup = module.process_group
            return group
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            meshes = {parameter.device_mesh for parameter in module.parameters() if is_sharded(parameter)}
            if all(mesh.size() == dist.get_world_size() for mesh in meshes):
                return True
            mesh = meshes.pop()
            if meshes or mesh.ndim > 1:
                raise ValueError(f"the model is sharded over a part of the ranks in several ways: {ADVICE}")
            return mesh.get_group()
    return True


def _check_alike(ranks: Ranks, lines: Sequence[str], weights: Sequence[Tensor], device: torch.device) -> None:
    """Raise on all ranks if they cover other weights, or weights of other values: those of another model.

    Args:
        ranks: The ranks.
        lines: What is done with each weight.
        weights: The weights, to be compared; sharded ones are not.
        device: Where tensors can be sent from.
    """
    digest = int.from_bytes(hashlib.sha256("\n".join(lines).encode()).digest()[:7], "big")
    digests = ranks.gather(torch.tensor([digest], device=device)).flatten().tolist()
    if len(set(digests)) > 1:
        for rank, other in enumerate(ranks.gather_objects(list(lines))):
            for mine, theirs in zip([*lines, "nothing"], [*other, "nothing"], strict=False):
                if mine != theirs:
                    raise ValueError(
                        f"the ranks do not train the same weights: rank {ranks.rank} has {mine}, rank {rank} has "
                        f"{theirs}; {ADVICE}"
                    )
    whole = [(line, weight) for line, weight in zip(lines, weights, strict=False) if not is_sharded(weight)]
    if not whole:
        return
    sums = ranks.gather(torch.stack([_bits(weight).to(device) for _, weight in whole]))
    for (line, _), same in zip(whole, (sums == sums[0]).all(dim=0).tolist(), strict=True):
        if not same:
            raise ValueError(
                f"the ranks start from different weights ({line}), so these are no copies of one model: {ADVICE}"
            )


def _bits(weight: Tensor) -> Tensor:
    """Return a number that equal tensors share whatever order they are summed in."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    return weight.detach().contiguous().view(kinds.get(weight.itemsize, torch.int64)).sum(dtype=torch.int64)


class _JoinHooks:
    """In the place of ``DistributedDataParallel.join_hook``: what a rank does that has run out of batches."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self._model = weakref.ref(model)
        self.steps: list[weakref.WeakMethod[Callable[[], None]]] = []

    def __call__(self, **kwargs: Any) -> Any:
        from torch.distributed.algorithms.join import JoinHook

        steps, found = self.steps, self._model()
        assert found is not None
        model: DistributedDataParallel = found
        inner = type(model).join_hook(model, **kwargs)

        class Joined(JoinHook):
            def main_hook(self) -> None:
                inner.main_hook()
                # Under `no_sync` the other ranks go on without a step.
                if model.require_forward_param_sync:
                    for known in steps:
                        if (step := known()) is not None:
                            step()

            def post_hook(self, is_last_joiner: bool) -> None:
                inner.post_hook(is_last_joiner)

        return Joined()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied: Any = memo[id(self._model())]
        return types.MethodType(type(copied).join_hook, copied)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return getattr, (self._model(), "join_hook")
