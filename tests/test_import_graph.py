"""No module imports itself by a detour, be it through an import inside of a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
Graph = dict[str, set[str]]


def modules_in(folder: Path) -> dict[str, Path]:
    """Return the files of a folder's packages, by module."""
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(folder.rglob("*.py"))
    }


def imported(tree: ast.AST, modules: dict[str, Path]) -> Iterator[str]:
    """Yield the modules that one imports anywhere in its text; those whose names alone it needs for types, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules else str(node.module)


def graph_of(folder: Path) -> Graph:
    """Return what each module imports; that a package's own __init__ runs before its modules is no import."""
    modules = modules_in(folder)
    return {
        name: set(imported(ast.parse(path.read_text(encoding="utf-8")), modules)) & set(modules)
        for name, path in modules.items()
    }


def circles(graph: Graph) -> list[list[str]]:
    """Return the sets of modules that reach one another, by Tarjan's algorithm."""
    found: list[list[str]] = []
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        path.append(name)
        for other in sorted(graph[name]):
            if other not in number:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in path:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:
            circle = path[path.index(name) :]
            del path[path.index(name) :]
            if len(circle) > 1 or name in graph[name]:
                found.append(sorted(circle))

    for name in sorted(graph):
        if name not in number:
            visit(name)
    return found


# What an engine is and what images are have to come below the modules that choose among several of them.
TO_UNTANGLE = [
    ["wellcond.lab.data.cifar", "wellcond.lab.data.load", "wellcond.lab.data.parquet"],
    ["wellcond.lab.engines.local", "wellcond.lab.engines.ray", "wellcond.lab.engines.select"],
]


def test_the_package_has_no_other_circle() -> None:
    graph = graph_of(SOURCE)
    assert len(graph) > 100
    assert circles(graph) == TO_UNTANGLE


@pytest.mark.parametrize(
    "how",
    ["from package.b import b", "from package import b", "import package.b", "def f():\n    from package.b import b"],
)
def test_a_circle_is_found_wherever_the_import_is(tmp_path: Path, how: str) -> None:
    package = tmp_path / "package"
    package.mkdir()
    files = {"__init__": "", "a": how, "b": "from package import c", "c": "from package.a import a", "d": how}
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    assert circles(graph_of(tmp_path)) == [["package.a", "package.b", "package.c"]]
