"""A table on the terminal: whatever the width, no number is cut."""

from __future__ import annotations

import io

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from wellcond.lab.report.table import plain_table

CELL = st.text("0123456789.±x-–", min_size=1, max_size=24)


@settings(max_examples=50)
@given(
    width=st.integers(40, 160),
    cells=st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(CELL, min_size=n, max_size=n), min_size=1, max_size=3)),
)
def test_no_cell_is_cut(width, cells):
    heads = ["method", *(f"column {'abcdefghi'[place]}" for place in range(len(cells[0])))]
    rows = [(f"W-Adam {place}", *line) for place, line in enumerate(cells)]
    console = Console(file=io.StringIO(), width=width)
    plain_table(heads, rows).print(console)
    printed = console.file.getvalue()
    assert max(map(len, printed.splitlines())) <= width
    for row in rows:
        mine = [word for line in printed.splitlines() if line.startswith(row[0]) for word in line.split()[2:]]
        assert mine == list(row[1:])


def test_a_table_that_fits_is_one():
    console = Console(file=io.StringIO(), width=40)
    plain_table(["method", "first", "second"], [("SGDM", "1.0", "2.0")]).print(console)
    assert console.file.getvalue().count("SGDM") == 1
