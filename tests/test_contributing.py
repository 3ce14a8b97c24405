"""What CONTRIBUTING says of the code is so: the paths from a class to its formula."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    line
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    if (line.startswith("| ") and "`nn/" in line) or line.startswith("| FSGD")
]


def defined(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else ()
            names |= {f"{node.name}.{part.name}" for part in inner if isinstance(part, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("row", ROWS)
def test_every_stop_on_the_way_is_there(row: str) -> None:
    assert len(ROWS) == 3
    files = re.findall(r"`([\w/]+\.py)`", row)
    assert 2 <= len(files) <= 3
    known = set().union(*(defined(ROOT / "src/wellcond" / file) for file in files))
    assert set(re.findall(r"`([\w.]+)`", row)) - set(files) <= known
