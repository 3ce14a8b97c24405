"""Reports what is done with each parameter's gradient, as a table to read before training."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import nn

from wellcond.layouts import find_layers
from wellcond.runtime.checks import WellcondWarning
from wellcond.runtime.texts import bytes_text
from wellcond.transforms.base import GradientTransform, Slot


class ParameterCoverage(NamedTuple):
    """A transform's treatment of one parameter.

    Attributes:
        name: The parameter's qualified name.
        shape: Its shape; empty if it has none yet.
        how: What is done with its gradient, or why nothing is.
        state_bytes: Bytes that are kept for it; None where it is not covered.
    """

    name: str
    shape: tuple[int, ...]
    how: str
    state_bytes: int | None


def coverage_rows(model: nn.Module, held: Collection[int], slots: Sequence[Slot]) -> list[ParameterCoverage]:
    """Say for each parameter what is done with its gradient or why nothing is, and how much is kept for it.

    Args:
        model: The model.
        held: The ``id`` of each parameter that the optimizer holds.
        slots: A transform's slots, of covered and of refused weights.

    Returns:
        One row a parameter, in the model's order.
    """
    found_layers = find_layers(model)
    unknown, unfit = found_layers.unknown, found_layers.unfit
    biases = {id(layer.bias) for layer in found_layers if layer.bias is not None}
    no_numbers = {id(slot.layer.weight) for slot in slots if slot.layer.unfit}
    done: dict[int, tuple[str, int | None]] = {}
    for slot in slots:
        coverage = slot.coverage
        if coverage.applies and not slot.enabled:
            done[id(slot.layer.weight)] = ("unchanged: switched off by its parameter group", None)
            continue
        done[id(slot.layer.weight)] = (_how(slot), coverage.state_bytes if coverage.applies else None)
        if slot.enabled and slot.bias is not None:
            done[id(slot.bias)] = (f"together with {slot.layer.name}", None)
    rows = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if nn.parameter.is_lazy(parameter):
            rows.append(ParameterCoverage(name, (), "known after its first forward pass", None))
            continue
        found: tuple[str, int | None] = ("unchanged: a vector beside the weights of its layer", None)
        if id(parameter) not in held:
            found = ("not held by this optimizer", None)
        elif not parameter.requires_grad and parameter.grad is None and id(parameter) not in no_numbers:
            found = ("unchanged: frozen (requires_grad=False)", None)
        elif id(parameter) in done:
            found = done[id(parameter)]
        elif name in unfit:
            found = (f"unchanged: {unfit[name]}", None)
        elif name in unknown:
            found = (f"unchanged: no rule for the layer type {unknown[name]} (see register_layout)", None)
        elif id(parameter) in biases:
            found = ("unchanged: a bias", None)
        rows.append(ParameterCoverage(name, tuple(parameter.shape), *found))
    return rows


def coverage_lines(model: nn.Module, held: Collection[int], slots: Sequence[Slot]) -> list[str]:
    """Write `coverage_rows` as lines of text, in columns, and how many parameters and bytes they are in all."""
    lazy = {name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)}
    found = coverage_rows(model, held, slots)
    rows = [
        (
            row.name,
            "?" if row.name in lazy else str(row.shape),
            row.how,
            "" if row.state_bytes is None else bytes_text(row.state_bytes),
        )
        for row in found
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
    ]
    return [*lines, _total(model, found)]


def _total(model: nn.Module, rows: Sequence[ParameterCoverage]) -> str:
    """Say how many parameters are covered and what is kept for them; one that has several names counts once."""
    parameters = model.named_parameters(remove_duplicate=False)
    once = {id(parameter): row for (_, parameter), row in zip(parameters, rows, strict=True)}
    covered = [row for row in once.values() if row.state_bytes is not None or row.how.startswith("together with ")]
    kept = sum(row.state_bytes or 0 for row in once.values())
    return f"in all: {len(covered)} of {len(once)} parameters, {bytes_text(kept)} kept"


def warn_of_idle(transform: GradientTransform, slots: Sequence[Slot]) -> None:
    """Say that a transform covers none of the weights, and why.

    Args:
        transform: The transform.
        slots: Its slots.
    """
    reasons = list(dict.fromkeys(_why_idle(slot) for slot in slots))
    why = f" ({'; '.join(reasons[:3])})" if reasons else ""
    warnings.warn(
        f"{type(transform).__name__} covers none of the weights, so it will do nothing{why}",
        WellcondWarning,
        stacklevel=5,
    )


def _why_idle(slot: Slot) -> str:
    if not slot.coverage.applies:
        return slot.coverage.how
    return "switched off by its parameter group"


def _how(slot: Slot) -> str:
    """Say what is done with a weight's gradient, as it has turned out."""
    how = slot.coverage.how
    if slot.unseen is None or not slot.coverage.applies:
        return how
    ever = slot.observed > 0 or slot.state.get("updated_at", -1) != -1
    return f"{how}, but its statistics stand still: {slot.unseen}" if ever else f"plain gradient: {slot.unseen}"
