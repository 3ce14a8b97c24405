"""One word means one thing: no two modules define a class, a function or a type alias of one name."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "wellcond"
SHARED = {
    "add_parser": "each command adds its own, and lab/cli/main.py calls them alike",
    "run": "each command runs by it, and lab/cli/main.py calls them alike",
    "main": "the entry points: __main__.py waits with the imports, lab/cli/main.py does the work",
}


def defined_names(tree: ast.Module) -> Iterator[str]:
    """Yield the public classes, functions and type aliases of a module, those under an ``if`` or ``try`` too."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        statement = pending.pop()
        for part in ("body", "orelse", "finalbody"):
            if isinstance(statement, (ast.If, ast.Try)):
                pending += getattr(statement, part, [])
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield statement.name
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if ast.unparse(statement.annotation).endswith("TypeAlias"):
                yield statement.target.id
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            # `Role = Literal[...]`; constants are written in capitals, and type variables bind a name to itself.
            name = statement.targets[0].id
            if not name.isupper() and not ast.unparse(statement.value).startswith(("TypeVar(", "ParamSpec(")):
                yield name


def modules_by_name(root: Path) -> dict[str, set[str]]:
    """Return the modules below a folder that define each public name."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(root.rglob("*.py")):
        for name in defined_names(ast.parse(path.read_text(encoding="utf-8"))):
            if not name.startswith("_"):
                found[name].add(path.relative_to(root).as_posix())
    return found


def test_a_name_is_defined_in_one_module() -> None:
    twice = {name: sorted(modules) for name, modules in modules_by_name(SOURCE).items() if len(modules) > 1}
    assert {name: modules for name, modules in twice.items() if name not in SHARED} == {}
    assert set(twice) == set(SHARED), "a name that is listed here is defined once by now"


def test_all_ways_to_define_a_name_are_seen(tmp_path: Path) -> None:
    ways = (
        "def Word(): ...",
        "class Word: ...",
        "Word = dict[str, int]",
        "from typing import TypeAlias\nWord: TypeAlias = 'int'",
        "if True:\n    class Word: ...",
        "try:\n    pass\nexcept ImportError:\n    pass\nelse:\n    def Word(): ...",
    )
    for number, text in enumerate(ways):
        (tmp_path / f"module{number}.py").write_text(text, encoding="utf-8")
    (tmp_path / "other.py").write_text("WORD = 1\n_Word = int\nT = TypeVar('T')\nprint(WORD)", encoding="utf-8")
    assert modules_by_name(tmp_path) == {"Word": {f"module{number}.py" for number in range(len(ways))}}
