"""Factorizations of second moments: when they are due, whose turn it is, and by which rank they are done."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wellcond.runtime.checks import WellcondWarning
from wellcond.runtime.ranks import Ranks
from wellcond.transforms.base import Slot
from wellcond.transforms.preconditioner.factors import Power
from wellcond.transforms.preconditioner.form import Form

# Solves of together this cost (the sum of widths cubed) are not worth spreading over steps.
SOLVED_AT_ONCE = 2e9


def form_of(slot: Slot) -> Form:
    """Return the form of a slot's second moment."""
    form = slot.coverage.plan
    assert isinstance(form, Form)
    return form


def tensor_of(slot: Slot, key: str) -> Tensor:
    """Return one of the tensors of a slot's state."""
    value = slot.state[key]
    assert isinstance(value, Tensor)
    return value


def count_of(slot: Slot, key: str) -> int:
    """Return one of the counts of a slot's state."""
    value = slot.state[key]
    assert isinstance(value, int)
    return value


@dataclass(frozen=True)
class SolveSchedule:
    """The steps at which factorizations are due.

    Attributes:
        stats_every: Steps between two updates of a second moment.
        solve_every: Steps between two of its factorizations.
        warmup: Whether to factorize early too, after 1, 2, 4, … times ``stats_every`` steps below ``solve_every``.

    Example:
        >>> schedule = SolveSchedule(stats_every=2, solve_every=10, warmup=True)
        >>> [step for step in range(25) if schedule.due_until(step) > schedule.due_until(step - 1)]
        [0, 2, 4, 8, 10, 20]
    """

    stats_every: int
    solve_every: int
    warmup: bool

    def due_until(self, step: int) -> int:
        """Count the factorizations that are due at steps 0 … step: it grows exactly where one is."""
        if step < 0:
            return 0
        regular = step // self.solve_every + 1
        if not self.warmup:
            return regular
        # stats_every · 2^k for k = 0, 1, … below solve_every, as far as they have been reached.
        reached = min(step, self.solve_every - 1) // self.stats_every
        return regular + reached.bit_length()

    def due(self, slots: Sequence[Slot]) -> list[Slot]:
        """Return those of which something was seen, and a factorization of that is due and not done."""
        known: dict[tuple[int, int], bool] = {}  # most slots have the same counts
        found = []
        for slot in slots:
            if count_of(slot, "updated_at") >= 0:
                counts = count_of(slot, "step"), count_of(slot, "solved_at")
                if counts not in known:
                    known[counts] = self.due_until(counts[0]) > self.due_until(counts[1])
                if known[counts]:
                    found.append(slot)
        return found

    def whose_turn(self, slots: Sequence[Slot]) -> list[Slot]:
        """Choose which of the due factorizations to do in this step: all that are a layer's first, or cheap together.

        Of the others those that have waited longest, so many that all are done before statistics change again.
        """
        due = self.due(slots)
        if not due:
            return []
        chosen = [slot for slot in due if count_of(slot, "solved_at") < 0]
        waiting = sorted((s for s in due if count_of(s, "solved_at") >= 0), key=lambda s: count_of(s, "solved_at"))
        budget = max(SOLVED_AT_ONCE, sum(form_of(slot).cost for slot in slots) / self.stats_every)
        for slot in waiting:
            if budget <= 0:
                break
            budget -= form_of(slot).cost
            chosen.append(slot)
        return chosen


def solve(slots: Sequence[Slot], power: Power, ranks: Ranks) -> None:
    """T ← (M + damping)^(−p), each by one rank for all; the last good T stays if that fails.

    Args:
        slots: Those whose turn it is, the same on all ranks.
        power: Which power.
        ranks: Among which the work is shared out.
    """
    if not slots:
        return
    owners = ranks.owners([form_of(slot).cost for slot in slots])
    # Per layer: was anything seen, and could it be factorized?
    outcome = torch.zeros(len(slots), 2, dtype=torch.int64, device=slots[0].layer.weight.device)
    for index, (slot, owner) in enumerate(zip(slots, owners, strict=True)):
        if owner != ranks.rank or not bool(tensor_of(slot, "mass") > 0):
            continue  # nothing seen yet (every input so far was not finite): this solve stays due
        solved = form_of(slot).solve(slot.state, tensor_of(slot, "mass"), power)
        outcome[index] = torch.tensor([1, solved is not None], device="cpu")
        if solved is not None:
            slot.state |= {key: value.to(tensor_of(slot, key).dtype) for key, value in solved.items()}
    ranks.add([outcome])
    results = outcome.tolist()
    for rank in range(ranks.size):
        sent = [s for s, owner, (_, good) in zip(slots, owners, results, strict=True) if owner == rank and good]
        ranks.send([tensor_of(slot, key) for slot in sent for key in form_of(slot).solved_keys()], rank)
    for slot, (seen, good) in zip(slots, results, strict=True):
        if seen:
            slot.state["solved_at"] = count_of(slot, "step")
        if seen and not good:
            if count_of(slot, "failed") == 0:
                warnings.warn(
                    f"the second moment of layer '{slot.layer.module_name}' could not be factorized: "
                    "its last good preconditioner stays in use (handle.stats() counts how often; a larger damping "
                    "helps)",
                    WellcondWarning,
                    stacklevel=2,
                )
            slot.state["failed"] = count_of(slot, "failed") + 1
