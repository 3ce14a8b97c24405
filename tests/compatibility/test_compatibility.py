"""Every cell of docs/compatibility.md: it is as it should be, and the page says what is so."""

from __future__ import annotations

import pytest
from cells import Cell, all_cells, run
from cells_layers import KINDS, PLAIN_LAYERS, RECURRENT, layers_of_torch

import compatibility

CELLS = all_cells()


@pytest.fixture(scope="module")
def shown() -> dict[tuple[str, str], tuple[str, str]]:
    """What the page shows."""
    return compatibility.shown_cells(compatibility.PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.area}: {cell.name}")
def test_it_is_as_expected_and_as_the_page_says(cell: Cell, shown: dict[tuple[str, str], tuple[str, str]]) -> None:
    found = run(cell)
    assert found.outcome in cell.expected, f"{found.outcome}: {found.message}"
    assert shown.get((cell.area, cell.name)) == (found.outcome, compatibility.as_code(found.message)), (
        compatibility.HINT
    )


def test_the_page_has_no_cell_that_is_not_tried(shown: dict[tuple[str, str], tuple[str, str]]) -> None:
    assert set(shown) == {(cell.area, cell.name) for cell in CELLS}


def test_every_layer_of_torch_with_weights_has_a_cell() -> None:
    tried = {name.partition("(")[0] for name in (*KINDS, *PLAIN_LAYERS, "MultiheadAttention")}
    tried |= {kind.__name__ for kind in RECURRENT}
    # A lazy norm is the norm itself after its first pass.
    norms = {name for name in layers_of_torch() if name.startswith("Lazy") and "Norm" in name}
    assert layers_of_torch() - norms <= tried
    assert len(layers_of_torch()) > 25
