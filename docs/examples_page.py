"""Fills the examples' page of the site: every program in examples/, by its docstring and whole."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"


def sections(folder: Path) -> str:
    """Return a section for each program in a folder, in the order of their names, and none for those called ``_…``."""
    parts = []
    for file in sorted(folder.glob("[!_]*.py")):
        text = file.read_text(encoding="utf-8")
        about = ast.get_docstring(ast.parse(text))
        if about is None:
            raise ValueError(f"{file.name} must begin with a docstring, which is what the page says of it")
        title = file.stem.replace("_", " ").capitalize()
        parts.append(f'## {title}\n\n{about}\n\n```python title="examples/{file.name}"\n{text.rstrip()}\n```\n')
    return "\n".join(parts)


def on_page_markdown(markdown: str, *, page: Any, **given: Any) -> str:
    """Add the examples to their page; MkDocs calls this for every page."""
    return f"{markdown}\n{sections(EXAMPLES)}" if page.file.src_uri == "examples.md" else markdown
