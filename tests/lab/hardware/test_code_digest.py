"""Kept runs are of this code: what computes is in the digest, and what only describes or presents is not."""

from __future__ import annotations

import ast
import re
import shutil
from functools import cache
from pathlib import Path

import pytest

import wellcond
from wellcond.lab.hardware import code_digest as module
from wellcond.lab.hardware.code_digest import code_digest, computing_files
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.records import RunRecord, RunStore
from wellcond.lab.runs.settings import Settings

PACKAGE = Path(wellcond.__file__).parent
TELLS_ALONE = {
    "lab.data.named_data",
    "lab.errors",
    "lab.given_paths",
    "lab.hardware.code_digest",
    "lab.hardware.interrupts",
    "lab.hardware.launch",
    "lab.hardware.machine",
    "lab.importing",
    "lab.own_digest",
    "lab.runs.figures",
    "lab.runs.files",
    "lab.runs.metric",
    "lab.runs.option",
    "lab.runs.records",
    "lab.runs.settings",
    "lab.runs.training_options",
    "lab.source_text",
    "lab.trials",
}
"""What a run imports that does not decide its numbers, or whose choices its settings tell."""


@pytest.fixture(autouse=True, scope="module")
def each_source_is_read_once():
    """Keep what is made of a source, which takes longest: nearly all stay as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "code_of", cache(module.code_of))
        yield


@pytest.fixture
def copy(tmp_path):
    """A copy of the package's code."""
    return Path(
        shutil.copytree(PACKAGE, tmp_path / "wellcond", ignore=shutil.ignore_patterns("__pycache__", "*.j2", "*.toml"))
    )


def digest(package: Path) -> str:
    module._digest.cache_clear()
    return code_digest(package)


def dotted(file: Path, package: Path = PACKAGE) -> str:
    return ".".join(file.relative_to(package).with_suffix("").parts)


def imports(file: Path) -> set[Path]:
    """Return the files of wellcond that a file imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    inside = [PACKAGE.joinpath(*name.split(".")[1:]) for name in names if name.split(".")[0] == "wellcond"]
    return {path for at in inside for path in (at.with_suffix(".py"), at / "__init__.py") if path.is_file()}


@pytest.fixture(scope="module")
def reached():
    """What a run imports, by the names of modules, without those that only hold others."""
    begin = re.compile(r"class Runner\b|^class (?!Opened)\w+Task\b", re.MULTILINE)
    waiting = [file for file in PACKAGE.rglob("*.py") if begin.search(file.read_text(encoding="utf-8"))]
    assert len(waiting) >= 5
    files: set[Path] = set()
    while waiting:
        file = waiting.pop()
        if file not in files:
            files.add(file)
            waiting += imports(file)
    return {dotted(file) for file in files if file.name != "__init__.py"}


def test_everything_that_a_run_imports_is_in_it(reached):
    assert reached - TELLS_ALONE <= {dotted(file) for file in computing_files()}
    assert reached >= TELLS_ALONE


def test_nothing_else_is(reached):
    files = {dotted(file) for file in computing_files() if file.name != "__init__.py"}
    assert not files & TELLS_ALONE
    # What opens the data chooses the task, though no run imports it; and a recipe names a transform by its path.
    assert files - reached == {"lab.tasks.by_path", "lab.tasks.open", "lab.methods.gradient_decay"}


@pytest.mark.parametrize("named", [*module._COMPUTING, *module._PRESENTING])
def test_each_name_on_the_lists_is_a_part_of_the_lab(named):
    lab = PACKAGE / "lab"
    assert (lab / named).is_dir() or (lab / f"{named}.py").is_file()


CHANGES = {
    "a network": ("lab/networks/residual.py", "bias=False", "bias=True", False),
    "how images are cut": ("lab/data/views.py", "size * 8 / 7", "size * 9 / 8", False),
    "a transform": ("transforms/centralize.py", "return ", "return +", False),
    "a network's docstring": ("lab/networks/residual.py", '"""', '"""Also: ', True),
    "the core's docstring": ("transforms/centralize.py", '"""', '"""Also: ', True),
    "a comment": ("transforms/attachment.py", "\nfrom __future__", "\n# Said.\nfrom __future__", True),
    "how far a run is": ("lab/training/run_display.py", "transient=True", "transient=False", True),
    "a report": ("lab/report/page.py", "return ", "return +", True),
    "a command": ("lab/cli/compare.py", "return ", "return +", True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_and_the_kept_run(copy, tmp_path, monkeypatch, change):
    name, old, new, kept = CHANGES[change]
    monkeypatch.setattr(module, "_PACKAGE", copy)
    settings = Settings(methods=("SGDM",), seeds=1, epochs=1, train_images=64)
    module._digest.cache_clear()
    before = make_plan(settings).specs()[0]
    store = RunStore(tmp_path)
    store.save(before, RunRecord((), True, 1, {}, ()))
    file = copy / name
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    module._digest.cache_clear()
    after = make_plan(settings).specs()[0]
    assert (store.load(after) is not None) == kept
    assert (after == before) == kept


def test_a_moved_docstring_is_no_change_and_a_new_file_is_one(copy):
    before = digest(copy)
    (copy / "lab" / "page_of_mine.py").write_text("X = 1\n")
    assert digest(copy) == before
    (copy / "transforms" / "mine.py").write_text('"""Mine."""\n\n\ndef f() -> None:\n    """Do nothing."""\n')
    added = digest(copy)
    assert added != before
    (copy / "transforms" / "mine.py").write_text("def f() -> None:\n    'Do it.'\n\n\n# The end.\n")
    assert digest(copy) == added
