"""Writes docs/compatibility.md, what works with what, from what the cells in tests/compatibility find.

    python docs/compatibility.py            # say where the page and the behaviour differ
    python docs/compatibility.py --write    # rewrite the page

Every cell is run in this process (those of several ranks start two more). The exit code is 1 if a cell is not as it
should be, which is printed, or, without --write, if the page is out of date.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cells import Cell, Found

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
HINT = "docs/compatibility.md is out of date: python docs/compatibility.py --write"
INTRODUCTION = """# What works with what

Each line is tried by a test, and a test compares this page with what it finds. "Works" is said of numbers that were
compared, as the last column says; "plain gradient" means that the weight trains as without transforms, and that the
report (or a warning) says why; "refused" means that `wellcond.attach` raises an error with nothing left behind, or that
the first step after the change does. The message is what you are told. Where nothing else is said, the transform is
[FeatureWhitening](feature-preconditioning.md), on two linear layers in float64.
"""


def render(found: dict[Cell, Found]) -> str:
    """Write the page: a table per area, and in it one row for all cells that are alike."""
    lines = [INTRODUCTION]
    for area in dict.fromkeys(cell.area for cell in found):
        lines += [
            f"## {area}",
            "",
            "| what | outcome | what you are told | what is compared |",
            "| --- | --- | --- | --- |",
        ]
        rows: dict[tuple[str, str, str], list[str]] = {}
        for cell, result in found.items():
            if cell.area == area:
                rows.setdefault((result.outcome, result.message, cell.verified), []).append(cell.name)
        for (outcome, message, verified), names in rows.items():
            shown = ";<br>".join(_escaped(name) for name in names)
            told = f"`{as_code(message)}`" if message else ""
            lines.append(f"| {shown} | {outcome} | {told} | {_escaped(verified)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def as_code(message: str) -> str:
    """Return a message as a table can show it between back quotes."""
    return message.replace("|", "¦").replace("`", "'")


def shown_cells(page: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Read a page: (area, name) → (outcome, message)."""
    shown = {}
    area = ""
    for line in page.splitlines():
        if line.startswith("## "):
            area = line.removeprefix("## ")
        elif match := re.fullmatch(r"\| (.+) \| (works|plain gradient|refused|fails) \| (?:`(.+)`)? \| (.+) \|", line):
            for name in match[1].split(";<br>"):
                shown[area, name.replace("\\", "")] = (match[2], match[3] or "")
    return shown


def _escaped(text: str) -> str:
    return re.sub(r"([_*<>|])", r"\\\1", text)


def main() -> int:
    """Run the cells, and compare or write."""
    sys.path.insert(0, str(ROOT / "tests" / "compatibility"))
    from cells import all_cells, run

    logging.disable(logging.WARNING)
    found, wrong = {}, 0
    for cell in all_cells():
        found[cell] = run(cell)
        if found[cell].outcome not in cell.expected:
            wrong += 1
            expected = " or ".join(cell.expected)
            print(
                f"{cell.area}: {cell.name}: {found[cell].outcome} (expected: {expected}) {found[cell].message}",
                flush=True,
            )
    page = render(found)
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
        return int(wrong > 0)
    old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if old != page:
        print(HINT)
    return int(wrong > 0 or old != page)


if __name__ == "__main__":
    sys.exit(main())
