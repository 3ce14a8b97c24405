"""What is done with each parameter's gradient, as a table to read before training."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from wellcond.layouts import find_layers
from wellcond.transforms.base import Slot


def coverage_lines(model: nn.Module, held: Collection[int], slots: Sequence[Slot]) -> list[str]:
    """Write one line a parameter: its name, shape, what is done with its gradient or why nothing is, and state bytes.

    Args:
        model: The model.
        held: The ``id`` of each parameter that the optimizer holds.
        slots: A transform's slots, of covered and of refused weights.

    Returns:
        The lines.
    """
    unknown = find_layers(model).unknown
    lines: dict[str, tuple[str, str]] = {}
    for slot in slots:
        coverage = slot.coverage
        for use in slot.uses:
            lines[use.name] = (coverage.how, _bytes(coverage.state_bytes) if coverage.applies else "")
            if coverage.applies and not slot.enabled:
                lines[use.name] = ("unchanged: switched off by its parameter group", "")
        if slot.enabled and slot.bias is not None and slot.layer.bias_name is not None:
            lines[slot.layer.bias_name] = (f"together with {slot.layer.name}", "")
    rows = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if nn.parameter.is_lazy(parameter):
            rows.append((name, "?", "known after its first forward pass", ""))
            continue
        if id(parameter) not in held:
            lines.setdefault(name, ("not held by this optimizer", ""))
        elif name in unknown:
            how = f"unchanged: no rule for the layer type {unknown[name]} (see register_layout)"
            lines.setdefault(name, (how, ""))
        rows.append((name, str(tuple(parameter.shape)), *lines.get(name, ("unchanged", ""))))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
    ]


def _bytes(count: int) -> str:
    """Write a number of bytes for people."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
