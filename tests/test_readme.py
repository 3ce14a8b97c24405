"""The README and the pages in docs run, and quote what the committed results say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Those that quote measurements; a page on how to use something may have none.
QUOTING = [page for page in PAGES if "<!-- begin" in page.read_text(encoding="utf-8")]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@each_page
def test_its_code_runs_from_top_to_bottom(page: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    # As one session: later blocks use what earlier ones made.
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@each_page
def test_a_report_that_it_shows_is_what_its_code_prints(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for code, shown in re.findall(r"```python\n(.*?)```\n\n((?:(?:    [^\n]*)?\n)+)", text, re.DOTALL):
        if "print(" not in code:
            continue
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stdout.split() == shown.split()


def test_its_tables_are_those_of_the_committed_results() -> None:
    command = [sys.executable, str(ROOT / "docs" / "quote_results.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run: python docs/quote_results.py"


def test_the_readme_and_the_pages_on_methods_quote_measurements() -> None:
    assert {page.name for page in QUOTING} >= {
        "README.md",
        "feature-preconditioning.md",
        "normalization.md",
        "normalizers.md",
    }


@pytest.mark.parametrize("page", QUOTING, ids=lambda page: page.name)
def test_every_table_it_quotes_names_the_command_that_made_it(page: Path) -> None:
    tables = re.findall(r"<!-- begin ([\w-]+) -->\n(.*?)<!-- end \1 -->", page.read_text(encoding="utf-8"), re.DOTALL)
    assert tables
    for name, body in tables:
        assert re.search(r"^`(wellcond|python) .*`", body, re.MULTILINE), name
