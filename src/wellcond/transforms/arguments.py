"""Checks the arguments of `attach` before anything is changed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from wellcond.transforms.base import GradientTransform
from wellcond.transforms.stepping import followers_of


def check_transforms(optimizer: Optimizer, transforms: Sequence[object]) -> None:
    """Refuse what is no transform, and a kind that is attached already.

    Args:
        optimizer: The optimizer.
        transforms: What was given.

    Raises:
        TypeError: If one is no transform.
        ValueError: If there is none, or one of its kind is attached already.
    """
    if not transforms:
        raise ValueError("attach needs at least one transform, got none")
    attached = {name for other in followers_of(optimizer) for name in other.names}
    for transform in transforms:
        if not isinstance(transform, GradientTransform):
            hint = f": did you mean {transform.__name__}()?" if isinstance(transform, type) else ""
            if isinstance(transform, (list, tuple)):
                hint = ": give them one by one, not as a sequence"
            raise TypeError(f"transforms must be GradientTransforms, got {transform!r}{hint}")
        if transform.name in attached:
            raise ValueError(
                f"{type(transform).__name__} is attached to this {type(optimizer).__name__} already: "
                "attach each kind once, or call remove() on the earlier handle first"
            )
        attached.add(transform.name)


def check_synchronize(synchronize: object) -> None:
    """Refuse what is neither a boolean nor a process group.

    Args:
        synchronize: What was given.

    Raises:
        TypeError: Naming the argument.
    """
    group = getattr(dist, "ProcessGroup", None)
    # What torch gives a rank as the handle of a group that it is not in.
    outsider = getattr(getattr(dist, "GroupMember", None), "NON_GROUP_MEMBER", None)
    if isinstance(synchronize, bool) or (group is not None and isinstance(synchronize, group)):
        return
    if outsider is None or synchronize is not outsider:
        raise TypeError(f"synchronize must be True, False or a torch.distributed.ProcessGroup, got {synchronize!r}")


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
