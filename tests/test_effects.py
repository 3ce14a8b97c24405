"""The sizes behind the advice: every one is of a committed file, with its own sign and interval."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import effects
import pytest
import quote_results
from reproductions import summary_table

ROOT = Path(__file__).parents[1]


def table() -> str:
    return effects.effects_table(quote_results._load, quote_results.reproduced())


def test_every_row_is_a_method_of_a_file() -> None:
    rows = [line.strip("| ").split(" | ") for line in table().splitlines() if line.startswith("| ")][2:]
    wanted = sum(
        method["name"] in methods
        for methods in effects.TECHNIQUES.values()
        for name in effects.COMPARISONS
        for method in quote_results._load(name)["methods"]
    )
    assert len(rows) == wanted
    for row in rows:
        baseline, method = re.fullmatch(r"(.+) \((.+)\)", row[1]).groups()  # type: ignore[union-attr]
        found = [
            each
            for name in effects.COMPARISONS
            for each in quote_results._load(name)["methods"]
            if each["name"] == method and f"{each['time_ratio']:.2f}" in row[-1]
        ]
        assert any(
            each["baseline"] == baseline and row[3].startswith(f"{each['final_difference']['mean']:+.1f} ")
            for each in found
        )


def test_counts_add_up_and_hold_what_the_summary_of_the_reproductions_says() -> None:
    found = effects.all_effects(quote_results._load, quote_results.reproduced())
    for line, differences in zip(re.findall(r"^- .*$", table(), re.M), found.values(), strict=True):
        words = {"once": 1, "twice": 2, "never": 0}
        times = [
            words.get(word, 0) or int(number or 0)
            for word, number in re.findall(r"(once|twice|never)|(\d+) times", line)
        ]
        assert sum(times) == len(differences)
    worse = [each for each in found["Gradient Centralization"] if each["high"] is not None and each["high"] < 0]
    (other_way,) = re.findall(r"^- The other way: (.*)\.$", summary_table(quote_results.reproduced()), re.M)
    assert len(worse) == sum("w/ GC" in each for each in other_way.split(", "))


@pytest.mark.parametrize("score", ["error", "accuracy"])
def test_less_error_is_a_gain(score: str) -> None:
    difference: dict[str, Any] = {"mean": -1.0, "low": -2.0, "high": -0.5}
    gain = effects._as_gain(difference, score)
    assert (gain["mean"] > 0) == (score == "error")
    assert gain["low"] < gain["mean"] < gain["high"]


def test_the_home_page_and_the_readme_quote_them() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        assert "<!-- begin effects -->" in page.read_text(encoding="utf-8")


def test_at_1280_pixels_the_columns_of_a_table_fit_beside_the_navigation() -> None:
    """As measured in a browser, the text is 750 pixels wide there; Material's rem is 20 pixels."""
    css = (ROOT / "docs" / "assets" / "site.css").read_text(encoding="utf-8").partition("@media")[0]
    others, first = (float(width) * 20 for width in re.findall(r"min-width: ([\d.]+)rem", css))
    texts = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md")]
    most = max(
        line.count("|") - 1
        for text in texts
        for line in text.splitlines()
        if re.match(r"\| .* \|$", line) and "equal time" in line
    )
    assert most >= 7
    assert min(first, others) + (most - 1) * others <= 750
