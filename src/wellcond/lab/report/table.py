"""Renders a table in words for the terminal, as Markdown and as CSV; pages render it by a template."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

NOTHING = "–"
"""What a cell without a number holds."""

# Heads longer than this are broken on the terminal.
_HEAD = 14
# Characters between two columns, and of a column of words, which may be broken, on the terminal.
_GAP, _WORDED = 2, 30


@dataclass(frozen=True)
class Cell:
    """A number in words.

    Attributes:
        text: The words; `NOTHING` for none.
        kind: ``"up"`` for better and ``"down"`` for worse by more than chance, ``"chosen"``, or ``"text"``.
    """

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table; the cells are in the order of the columns."""

    name: str
    cells: tuple[Cell, ...]
    is_baseline: bool = False


@dataclass(frozen=True)
class ReportTable:
    """A table in words.

    Attributes:
        title: What it shows, in a word or two.
        caption: What it shows, in full.
        heads: Of the columns, that of the names first.
        rows: The lines.
        worded: Whether the last column is in words, which may be broken.
    """

    title: str
    caption: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]
    worded: bool = False

    def without_empty(self) -> ReportTable:
        """Return the table without the columns that hold nothing."""
        places = range(len(self.heads) - 1)
        shown = [place for place in places if any(row.cells[place].text != NOTHING for row in self.rows)]
        return replace(
            self,
            heads=(self.heads[0], *(self.heads[place + 1] for place in shown)),
            rows=tuple(replace(row, cells=tuple(row.cells[place] for place in shown)) for row in self.rows),
        )

    def to_markdown(self) -> str:
        """Return the table as Markdown; cells without anything are empty."""
        lines = [self.heads, ("---",) * len(self.heads)]
        lines += [(row.name, *("" if cell.text == NOTHING else cell.text for cell in row.cells)) for row in self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def print(self, console: Console, style: str = "italic") -> None:
        """Print the table, families apart from each other; one that is too wide in parts, below each other."""
        if self.caption:
            console.print(self.caption, style=style, highlight=False)
        for number, part in enumerate(self._parts(console.width)):
            if number:
                console.print()
            part._print(console)

    def _parts(self, width: int) -> Iterator[ReportTable]:
        """Yield the table with as many columns at a time as there is room for; at least one."""
        needed = [self._width(place) for place in range(len(self.heads))]
        begin = 1
        while begin < len(self.heads):
            end = begin + 1
            while end < len(self.heads) and needed[0] + sum(_GAP + w for w in needed[begin : end + 1]) <= width:
                end += 1
            rows = tuple(replace(row, cells=row.cells[begin - 1 : end - 1]) for row in self.rows)
            worded = self.worded and end == len(self.heads)
            yield replace(self, heads=(self.heads[0], *self.heads[begin:end]), rows=rows, worded=worded)
            begin = end

    def _width(self, place: int) -> int:
        """Return the characters that a column needs."""
        from rich.cells import cell_len

        cells = [row.name if place == 0 else row.cells[place - 1].text for row in self.rows]
        if self.worded and place + 1 == len(self.heads):
            cells = [cell[:_WORDED] for cell in cells]
        head = self.heads[place] if place == 0 else textwrap.fill(self.heads[place], _HEAD)
        return max(map(cell_len, (*head.splitlines(), *cells)), default=0)

    def _print(self, console: Console) -> None:
        import rich.table

        table = rich.table.Table(box=None, padding=(0, 1), pad_edge=False)
        table.add_column(self.heads[0], no_wrap=True)
        for place, head in enumerate(self.heads[1:], start=2):
            last = self.worded and place == len(self.heads)
            table.add_column(textwrap.fill(head, _HEAD), justify="right", no_wrap=not last, overflow="fold")
        for place, row in enumerate(self.rows):
            ends = place + 1 == len(self.rows) or self.rows[place + 1].is_baseline
            cells = (cell.text for cell in row.cells)
            table.add_row(row.name, *cells, style="dim" if row.is_baseline else None, end_section=ends)
        console.print(table)


def plain_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> ReportTable:
    """Return a table of texts.

    Args:
        heads: Of the columns.
        rows: The lines, their names first.

    >>> print(plain_table(["layer", "rank"], [["0", "8"]]).to_markdown())
    | layer | rank |
    | --- | --- |
    | 0 | 8 |
    """
    lines = tuple(Row(name, tuple(Cell(text) for text in texts)) for name, *texts in rows)
    return ReportTable("", "", tuple(heads), lines)


def to_csv(rows: Sequence[Mapping[str, Any]], heads: Iterable[str] = ()) -> str:
    """Return rows as CSV.

    Args:
        rows: From each column's name to the value; what a row lacks is empty.
        heads: The first columns, which are there without rows as well.
    """
    text = io.StringIO()
    names = dict.fromkeys([*heads, *(name for row in rows for name in row)])
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
