"""Files stay short, and their first sentence says what they do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "wellcond"
FILES = [
    path
    for folder in ("calibration", "diagnostics", "nn", "numerics", "runtime")
    for path in sorted((SOURCE / folder).rglob("*.py"))
]
QUESTIONS = ("What", "How", "Which", "Whether", "Where", "When", "Why")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_a_file_is_short_and_begins_with_a_statement(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    said = ast.get_docstring(ast.parse(text))
    assert said
    assert said.split()[0] not in QUESTIONS
