"""docs/sources.md: what it names exists, every recipe is named, every item is here or has its reason."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
ITEMS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| item |", "| --- |"))
]
RECIPES = sorted((ROOT / "src/wellcond/lab/reproduction/recipes").glob("*.toml"))


def state(here: str) -> str:
    if here.startswith("not here: "):
        return "not here"
    return "in part" if re.search(r"in part|no recipe|not in the recipe", here) else "here"


def test_items_are_counted() -> None:
    found = [state(here) for _, here, _ in ITEMS]
    counts = re.search(r"Of (\d+) items (\d+) are here, (\d+) in part, and (\d+) are not", PAGE)
    assert counts is not None
    expected = (len(found), found.count("here"), found.count("in part"), found.count("not here"))
    assert tuple(map(int, counts.groups())) == expected


def test_each_is_here_or_has_a_reason() -> None:
    for item, here, _ in ITEMS:
        assert item
        assert len(here.removeprefix("not here: ")) > 3, item
        assert here != "–", item


def test_the_files_exist() -> None:
    named = set(re.findall(r"`([\w/.]+\.py)`", PAGE))
    assert len(named) > 80
    missing = [name for name in named if not ((ROOT / name).is_file() or (ROOT / "src/wellcond" / name).is_file())]
    assert missing == []


def test_every_recipe_is_named_and_every_named_recipe_exists() -> None:
    stems = {file.stem for file in RECIPES}
    named = {name for name in re.findall(r"recipe ([\w-]+)", PAGE) if name in stems or re.search(r"\d|slides", name)}
    assert named == stems
    names = {
        name.casefold()
        for file in RECIPES
        for name in re.findall(r'"([^"]+)"', re.search(r"(?m)^names = \[(.*)\]", file.read_text()).group(1))  # type: ignore[union-attr]
    }
    for asked in re.findall(r'reproduce ("[^"`]+"|[\w.-]+)', " ".join(shown for _, _, shown in ITEMS)):
        plain = re.sub(r"^(figure|table) ", "", asked.strip('"')).casefold()
        assert plain in names or asked.strip('"').casefold() in names, asked
