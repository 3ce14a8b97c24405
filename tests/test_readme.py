"""The README runs, and quotes what the committed results say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_its_code_runs_from_top_to_bottom() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    # As one session: later blocks use what earlier ones made.
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_its_tables_are_those_of_the_committed_results() -> None:
    command = [sys.executable, str(ROOT / "docs" / "quote_results.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run: python docs/quote_results.py"


def test_every_table_it_quotes_names_the_command_that_made_it() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r"<!-- begin ([\w-]+) -->\n(.*?)<!-- end \1 -->", readme, re.DOTALL)
    assert tables
    for name, body in tables:
        assert re.search(r"^`(wellcond|python) .*`", body, re.MULTILINE), name
