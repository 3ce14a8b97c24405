"""The base of the frameworks' callbacks: a schedule that follows a count, and the counts of what is attached."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

from wellcond.runtime.checks import check_choice
from wellcond.transforms import attachments

Interval = Literal["epoch", "step"]


class LayerSchedule(Protocol):
    """A schedule of layers, such as `wellcond.nn.MomentumScheduler`."""

    count: int

    def step(self) -> None:
        """Go on by one epoch or one step."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""


class FollowingSchedule:
    """Has a schedule make its steps before the epoch or step to which they belong.

    The frameworks write checkpoints in different places around the end of an epoch. A schedule that catches up when
    the next begins is right after a resume from any of them: its count is that of the epochs, or steps, that are done.

    Args:
        schedule: The schedule, or None.
        interval: What its `step()` counts.

    Raises:
        TypeError: If it is no schedule.
        ValueError: If the interval is another.
    """

    def __init__(self, schedule: LayerSchedule | None, interval: Interval) -> None:
        if schedule is not None and not all(hasattr(schedule, name) for name in ("count", "step", "load_state_dict")):
            raise TypeError(
                "schedule must be one of wellcond.nn, such as MomentumScheduler(model, ...), "
                f"got {type(schedule).__name__}"
            )
        check_choice("schedule_interval", interval, ("epoch", "step"))
        self.schedule = schedule
        self.interval = interval

    def reach(self, interval: Interval, done: int) -> None:
        """Step until as many epochs, or steps, as are done have been counted.

        Args:
            interval: What is counted here; another schedule is left alone.
            done: How many of them are done.
        """
        if self.schedule is None or interval != self.interval:
            return
        while self.schedule.count < done:
            self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule's state; nothing without one."""
        return {} if self.schedule is None else {"schedule": self.schedule.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the schedule its state, if both are there."""
        if self.schedule is not None and "schedule" in state_dict:
            self.schedule.load_state_dict(state_dict["schedule"])


def metrics(optimizers: Iterable[object], synchronize: bool = False) -> dict[str, Any]:
    """Return ``metrics()`` of all that is attached to the optimizers, flat and named for a log.

    Args:
        optimizers: The optimizers, also in a framework's wrapper; from the second on they are numbered.
        synchronize: Whether to wait for the device and return floats.

    Returns:
        ``"wellcond/<transform>/<metric>"`` → number.
    """
    found: dict[str, Any] = {}
    for handle in (handle for optimizer in optimizers for handle in attachments(optimizer)):
        for name, number in handle.metrics(synchronize=synchronize).items():
            key, again = f"wellcond/{name}", 1
            while key in found:
                again += 1
                key = f"wellcond/{again}/{name}"
            found[key] = number
    return found


def counts(optimizers: Iterable[object]) -> dict[str, float]:
    """Return ``stats()`` of all that is attached to the optimizers, flat and named for a log; equal names are added.

    Args:
        optimizers: The optimizers, also in a framework's wrapper.

    Returns:
        ``"wellcond/<transform>/<count>"`` → number.

    Example:
        >>> import torch, wellcond
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = wellcond.optim.WSGDM(model, lr=0.1)
        >>> counts([optimizer])["wellcond/whitening/weights"]
        1.0
    """
    found: dict[str, float] = {}
    for handle in (handle for optimizer in optimizers for handle in attachments(optimizer)):
        for transform, numbers in handle.stats().items():
            for name, number in numbers.items():
                key = f"wellcond/{transform}/{name}"
                found[key] = found.get(key, 0.0) + float(number)
    return found
