"""Files stay short, and their first sentence says what they do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "wellcond"
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "version.py"]
QUESTIONS = ("What", "How", "Which", "Whether", "Where", "When", "Who", "Whom", "Whose", "Why")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_a_file_is_short_and_begins_with_a_statement(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    module = ast.parse(text)
    classes = [part for part in ast.walk(module) if isinstance(part, ast.ClassDef) and not part.name.startswith("_")]
    assert ast.get_docstring(module)
    for described in (module, *classes):
        said = ast.get_docstring(described)
        assert said is None or said.split()[0] not in QUESTIONS, said
