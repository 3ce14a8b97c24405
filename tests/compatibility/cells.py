"""What works with what, cell by cell: a program that finds out, and what it should find.

`docs/compatibility.py` renders the page from what the programs find; the tests compare both with what is expected.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import wellcond

Outcome = Literal["works", "plain gradient", "refused", "fails"]
# Says nothing where it works, or why a gradient stays plain: the report's own words, or a warning's.
Program = Callable[[], "str | None"]
PACKAGE = str(Path(wellcond.__file__).parent)
MODULES = (
    "cells_optimizers",
    "cells_wrappers",
    "cells_frameworks",
    "cells_ranks",
    "cells_layers",
    "cells_tensors",
    "cells_states",
)


@dataclass(frozen=True)
class Cell:
    """One cell of the table.

    Attributes:
        area: The section of the page.
        name: What is tried.
        program: Finds out. Raises if a number is not what it must be.
        expected: What may be found: one outcome, or several where either is right.
        verified: What the program compares, in a few words; for the page.
    """

    area: str
    name: str
    program: Program
    expected: tuple[Outcome, ...]
    verified: str


@dataclass(frozen=True)
class Found:
    """What a program found.

    Attributes:
        outcome: "fails" if a number was wrong, or anything was raised that is no clear refusal.
        message: What the user is told.
    """

    outcome: Outcome
    message: str


class RefusedError(Exception):
    """`wellcond.attach` has refused, in clear words and with nothing left behind."""


CELLS: list[Cell] = []


def cell(
    area: str, name: str, *expected: Outcome, verified: str, program: Program | None = None
) -> Callable[[Program], Program]:
    """Add a cell; a decorator unless a program is given.

    Args:
        area: The section of the page.
        name: What is tried.
        *expected: What may be found; without any, "works".
        verified: What is compared.
        program: Finds out.

    Returns:
        The decorator.
    """

    def add(given: Program) -> Program:
        assert (area, name) not in {(each.area, each.name) for each in CELLS}, name
        CELLS.append(Cell(area, name, given, expected or ("works",), verified))
        return given

    return add if program is None else lambda given: add(program)


def all_cells() -> list[Cell]:
    """Import every module of cells, and return what they hold, in the order of the page."""
    for module in MODULES:
        importlib.import_module(module)
    order = {name: index for index, name in enumerate(dict.fromkeys(each.area for each in CELLS))}
    return sorted(CELLS, key=lambda each: order[each.area])


def run(cell: Cell) -> Found:
    """Run a cell's program; whatever it raises is what was found."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # What a user is not told is no part of what works.
            warnings.simplefilter("error", wellcond.WellcondWarning)
            reason = cell.program()
    except RefusedError as refusal:
        return Found("refused", one_line(str(refusal)))
    except Exception as error:
        return Found("fails", one_line(f"{type(error).__name__}: {error}"))
    finally:
        torch.set_rng_state(state)
    return Found("works", "") if reason is None else Found("plain gradient", one_line(reason))


def one_line(text: str) -> str:
    """Return a text without line breaks, and without what differs between machines."""
    return " ".join(text.split())


def attach(optimizer: Any, model: nn.Module, *transforms: Any, **options: Any) -> wellcond.Attachment:
    """Attach; a refusal must be a TypeError or ValueError out of this library, and leave nothing behind.

    Raises:
        RefusedError: If it is refused so.
        AssertionError: If it is refused otherwise.
    """
    hooks = _hooks(optimizer, model)
    try:
        return wellcond.attach(optimizer, model, *transforms, **options)
    except (TypeError, ValueError) as error:
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        assert last is not None
        if not last.tb_frame.f_code.co_filename.startswith(PACKAGE):
            raise
        if _hooks(optimizer, model) != hooks:
            raise AssertionError(f"hooks are left behind by the refusal: {error}") from error
        raise RefusedError(str(error)) from error


def _hooks(optimizer: Any, model: nn.Module) -> tuple[int, ...]:
    """Count what hangs on a model and an optimizer."""
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_optimizer_load_state_dict_pre_hooks")
    modules = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    return modules, *(len(getattr(optimizer, name, ())) for name in names)


def reason_of(handle: wellcond.Attachment, name: str) -> str:
    """Return why a parameter keeps its plain gradient, as the report says it; it must say so."""
    for rows in handle.coverage().values():
        for row in rows:
            if row.name == name:
                assert row.state_bytes is None, f"{name} is reported as '{row.how}'"
                assert "together with" not in row.how, f"{name} is reported as '{row.how}'"
                return row.how
    raise AssertionError(f"{name} is not in the report")
