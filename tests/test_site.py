"""The documentation site is whole: every public name, warning and decision is in it; its commands are understood."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

import wellcond
from wellcond.lab.cli.main import _parser as command_line
from wellcond.lab.reproduction.panels import scaled_panels
from wellcond.lab.reproduction.recipe import load_recipe
from wellcond.lab.runs.settings import Scale

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# names --------------------------------------------------------------------------------------------------------------


def public_names() -> set[str]:
    modules = {"": wellcond, "nn.": wellcond.nn, "diagnostics.": wellcond.diagnostics, "lab.": wellcond.lab}
    found = {f"{prefix}{name}" for prefix, module in modules.items() for name in module.__all__}
    found |= {f"optim.{name}" for name in ("FSGD", "FAdam", "WSGDM", "WAdam", "create")}
    found |= {"integrations.lightning.WellcondCallback", "integrations.transformers.WellcondTrainerCallback"}
    public = {
        name for name, value in vars(wellcond.theory).items() if getattr(value, "__module__", "") == "wellcond.theory"
    }
    found |= {f"theory.{name}" for name in public if not name.startswith("_")}
    return found - {"__version__", "nn", "optim", "theory", "diagnostics"}


def test_every_public_name_is_in_the_api_pages() -> None:
    shown = [
        name
        for page in (DOCS / "api").glob("*.md")
        for name in re.findall(r"^::: wellcond\.(\S+)", page.read_text(), re.M)
    ]
    assert len(shown) == len(set(shown))
    assert public_names() <= set(shown)
    modules = ROOT / "src" / "wellcond"
    assert not [name for name in shown if (modules / f"{name.replace('.', '/')}.py").exists()]


def test_every_decision_is_listed_under_its_title() -> None:
    listed = dict(re.findall(r"^\d+\. \[(.+)\]\(decisions/(\S+)\)$", (DOCS / "decisions.md").read_text(), re.M))
    files = sorted((DOCS / "decisions").glob("*.md"))
    titles = [file.read_text().splitlines()[0].removeprefix("# ").partition(". ")[2] for file in files]
    assert listed == {title: file.name for title, file in zip(titles, files, strict=True)}


# warnings -----------------------------------------------------------------------------------------------------------


def text_of(message: ast.expr) -> str:
    """Return a message's text with … for what is filled in."""
    if isinstance(message, ast.Constant):
        return str(message.value)
    assert isinstance(message, ast.JoinedStr), ast.dump(message)
    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in message.values]
    return re.sub("…+", "…", "".join(parts))


def warnings_in_the_source() -> dict[str, str]:
    """Return the text of every warning with its category's name."""
    found = {}
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
                category = ast.unparse(node.args[1]) if len(node.args) > 1 else "UserWarning"
                found[text_of(node.args[0])] = category
    return found


def test_every_warning_is_explained_and_every_explained_one_exists() -> None:
    table = re.findall(r"^\| `(.+?)` \| .+ \| .+ \|$", (DOCS / "warnings.md").read_text(encoding="utf-8"), re.M)
    assert len(table) == len(set(table))
    assert set(table) == set(warnings_in_the_source())


def test_every_warning_is_of_the_one_category() -> None:
    assert set(warnings_in_the_source().values()) == {"WellcondWarning"}


# commands -----------------------------------------------------------------------------------------------------------


def shown_commands(page: Path) -> list[str]:
    """Return a page's whole `wellcond …` commands: in shell blocks, in indented blocks, and below quoted tables."""
    lines = page.read_text(encoding="utf-8").splitlines()
    in_shell = False
    commands = []
    for line in lines:
        if line.startswith("```"):
            in_shell = line == "```sh"
        elif in_shell and line.startswith("wellcond "):
            commands.append(line)
        elif made := re.match(r"`(wellcond .+?)`", line):
            commands.append(made[1])
        elif line.startswith("    wellcond "):
            commands.append(line.strip())
    return commands


@each_page
def test_the_commands_that_it_shows_are_understood(page: Path) -> None:
    for command in shown_commands(page):
        program, *arguments = shlex.split(command, comments=True)
        assert program == "wellcond"
        command_line().parse_args(arguments)


def test_commands_are_found() -> None:
    assert "wellcond compare --methods SGDM,SGDM+GC,W-SGDM --seeds 3 --out runs/try" in shown_commands(DOCS / "lab.md")
    assert any("--lrs SGD=" in command for command in shown_commands(DOCS / "normalization.md"))


def test_code_in_pages_is_marked_with_what_it_is() -> None:
    for page in PAGES:
        for fence in re.findall(r"^```(.+)$", page.read_text(encoding="utf-8"), re.M):
            assert fence in ("python", "sh", "toml"), f"{page}: {fence}"


def test_recipes_that_pages_show_are_recipes(tmp_path: Path) -> None:
    shown = [block for page in PAGES for block in re.findall(r"```toml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]
    assert shown
    for text in shown:
        file = tmp_path / "shown.toml"
        file.write_text(text, encoding="utf-8")
        recipe = load_recipe(file)
        for scale in get_args(Scale):
            assert scaled_panels(recipe, scale)


# examples -----------------------------------------------------------------------------------------------------------


def test_the_examples_page_holds_every_example(tmp_path: Path) -> None:
    page = program("examples_page")
    (tmp_path / "plain_loop.py").write_text('"""A loop."""\n\nprint("one")\n')
    (tmp_path / "_shared.py").write_text("data = 1\n")
    assert page.sections(tmp_path) == (
        '## Plain loop\n\nA loop.\n\n```python title="examples/plain_loop.py"\n"""A loop."""\n\nprint("one")\n```\n'
    )
    (tmp_path / "unsaid.py").write_text("print(1)\n")
    with pytest.raises(ValueError, match="unsaid.py must begin with a docstring"):
        page.sections(tmp_path)


def test_the_examples_of_the_project_have_docstrings() -> None:
    page = program("examples_page")
    assert page.sections(page.EXAMPLES).count("\n```python title=") == len(list(page.EXAMPLES.glob("[!_]*.py")))


# quotes and pictures ------------------------------------------------------------------------------------------------


def program(name: str) -> Any:
    """Import one of the programs in docs, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quoted_rows_are_those_of_the_whole_table_and_must_exist() -> None:
    quotes = program("quote_results")
    whole = quotes.quoted("<!-- begin digits -->\n<!-- end digits -->").splitlines()
    some = quotes.quoted("<!-- begin digits, rows: SGDM | W-SGDM -->\n<!-- end digits -->").splitlines()
    assert some[0] == "<!-- begin digits, rows: SGDM | W-SGDM -->"
    rows = [line for line in some if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == ["method", "---", "SGDM", "W-SGDM"]
    assert set(rows) <= set(whole)
    assert quotes.quoted("\n".join(some)).splitlines() == some
    with pytest.raises(KeyError, match="no such row: Nonsense"):
        quotes.quoted("<!-- begin digits, rows: SGDM | Nonsense -->\n<!-- end digits -->")


def test_pictures_show_the_committed_numbers() -> None:
    assert program("plot_results").main(["--check"]) == 0, "run: python docs/plot_results.py"


def test_every_picture_is_shown() -> None:
    pictures = set(program("plot_results").PICTURES)
    texts = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert pictures <= set(re.findall(r"!\[[^\]]+\]\([^)]*results/([\w-]+\.png)\)", texts))


@pytest.mark.parametrize("name", ["norm-small-batch-curves.png", "normalizers.png"])
def test_a_picture_says_which_numbers_it_shows(name: str, tmp_path: Path) -> None:
    plots = program("plot_results")
    path = tmp_path / name
    plots.draw(name, path)
    with Image.open(path) as picture:
        assert picture.info["numbers"] == plots.digest_of(plots.PICTURES[name][0])
        assert picture.width > 800


def test_pictures_of_other_numbers_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = program("plot_results")
    for path in (DOCS / "results").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    assert plots.main(["--check"]) == 0
    (tmp_path / "digits.json").write_bytes((tmp_path / "digits.json").read_bytes() + b" ")
    assert plots.main(["--check"]) == 1
    assert plots.is_stale("digits-curves-epochs.png")
    assert not plots.is_stale("normalizers.png")
