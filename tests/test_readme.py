"""The README and the pages in docs run, and quote what the committed results say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from forked import forking

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Those that quote measurements; a page on how to use something may have none.
QUOTING = [page for page in PAGES if "<!-- begin" in page.read_text(encoding="utf-8")]
# Those with code; API pages take theirs from docstrings, which run as doctests.
CODED = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]

SHOWN = re.compile(r"```python\n(?P<code>.*?)```(?P<output>\n\n(?:(?:    [^\n]*)?\n)*    [^\n]*\n)?", re.DOTALL)
"""A block of code, and the indented block right behind it, if there is one, which is what the code prints."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Run(NamedTuple):
    """What came of running a page's code from top to bottom, as one session."""

    exit_code: int | None
    errors: str
    printed: list[str]


def run_page(page: Path, folder: Path) -> Run:
    """Run a page in a process of its own."""
    out, err = folder / "out", folder / "err"
    mark = "\x00next block\x00"
    session = [f"import os, sys; sys.stdout, sys.stderr = open({str(out)!r}, 'w'), open({str(err)!r}, 'w')"]
    session.append(f"os.chdir({str(folder)!r})")
    session.append("import warnings, wellcond; warnings.simplefilter('error', wellcond.WellcondWarning)")
    for block in SHOWN.finditer(page.read_text(encoding="utf-8")):
        session += [block["code"], f"print({mark!r}, end='')"]
    # As in a script, classes that the page defines are of __main__.
    process = forking().Process(target=exec, args=("\n".join(session), {"__name__": "__main__"}))
    process.start()
    process.join(600)  # far more than it takes, on a busy machine either
    if process.is_alive():
        process.kill()
        process.join()
    return Run(process.exitcode, err.read_text(encoding="utf-8"), out.read_text(encoding="utf-8").split(mark))


@pytest.mark.parametrize("page", CODED, ids=name_of)
def test_its_code_runs_from_top_to_bottom_and_prints_what_it_shows(page: Path, tmp_path: Path) -> None:
    done = run_page(page, tmp_path)
    assert done.exit_code == 0, done.errors
    blocks = SHOWN.finditer(page.read_text(encoding="utf-8"))
    for block, output in zip(blocks, done.printed, strict=False):
        if block["output"] is not None and "print(" in block["code"]:
            assert output.split() == block["output"].split()


def test_the_readme_and_the_pages_on_techniques_have_code() -> None:
    names = {name_of(page) for page in CODED}
    assert "README.md" in names
    assert {name_of(page) for page in (ROOT / "docs" / "techniques").glob("*.md")} <= names


def test_a_page_that_fails_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint('one')\n```\n\n    one\n\n```python\nraise RuntimeError('two')\n```\n")
    done = run_page(page, tmp_path)
    assert done.exit_code == 1
    assert "RuntimeError: two" in done.errors
    assert done.printed[0] == "one\n"


def test_its_tables_are_those_of_the_committed_results() -> None:
    command = [sys.executable, str(ROOT / "docs" / "quote_results.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run: python docs/quote_results.py"


def test_the_readme_and_the_pages_on_methods_quote_measurements() -> None:
    pages = {"README.md", "docs/feature-preconditioning.md", "docs/normalization.md", "docs/normalizers.md"}
    pages |= {name_of(page) for page in (ROOT / "docs" / "techniques").glob("*.md")}
    assert {name_of(page) for page in QUOTING} >= pages


@pytest.mark.parametrize("page", QUOTING, ids=name_of)
def test_every_table_it_quotes_names_the_command_that_made_it(page: Path) -> None:
    marks = r"<!-- begin ([\w.-]+)(?:, rows: [^\n]*)? -->\n(.*?)<!-- end \1 -->"
    tables = re.findall(marks, page.read_text(encoding="utf-8"), re.DOTALL)
    assert tables
    for name, body in tables:
        assert re.search(r"^`?(wellcond|python) .*(`|</code>)", body, re.MULTILINE), name
