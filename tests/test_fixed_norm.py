"""The table of how DW-SGDM stands beside the others: signs, pairs and what is set in bold."""

from __future__ import annotations

from typing import Any

import fixed_norm
import quote_results


def results(higher_is_better: bool, mine: list[float], theirs: list[float]) -> dict[str, Any]:
    equal = {"mean": -0.25, "low": -0.5, "high": 0.0, "count": len(mine)}
    others = {name: {"mean": 2.0, "low": 1.0, "high": 3.0, "count": len(mine)} for name in ("AdamW", "W-SGDM", "Muon")}
    methods: list[dict[str, Any]] = [
        {"name": name, "baseline": "SGDM", "curves": [{"test_score": [0.0, score]} for score in theirs]}
        for name in fixed_norm.OTHERS
    ]
    methods.append(
        {
            "name": fixed_norm.METHOD,
            "baseline": "SGDM",
            "curves": [{"test_score": [0.0, score]} for score in mine],
            "equal_time": {"difference": equal, "others": others},
        }
    )
    return {
        "command": "wellcond compare",
        "seeds": len(mine),
        "metric": {"higher_is_better": higher_is_better},
        "methods": methods,
    }


def cells(found: dict[str, Any]) -> list[list[str]]:
    """Return the first comparison's rows of both tables, without what was trained."""
    table = fixed_norm.fixed_norm_table(lambda name: found)
    first = next(iter(fixed_norm.SETTINGS.values()))
    return [line.strip("| ").split(" | ")[1:] for line in table.splitlines() if line.startswith(f"| {first} ")]


def test_more_is_better_and_what_chance_does_not_explain_is_bold() -> None:
    epochs, time = cells(results(True, [3.0, 5.0, 4.0], [1.0, 2.0, 3.0]))
    assert epochs == ["3", *["+2.0 [-0.5, +4.5]"] * 4]
    assert time == ["3", "-0.2 [-0.5, +0.0]", *["**+2.0 [+1.0, +3.0]**"] * 3]
    epochs, time = cells(results(False, [3.0, 3.0, 3.001], [4.0, 4.0, 4.0]))
    assert epochs == ["3", *["**+1.000 [+0.998, +1.001]**"] * 4]
    assert time == ["3", "+0.250 [-0.000, +0.500]", *["**-2.000 [-3.000, -1.000]**"] * 3]


def test_a_run_that_diverged_leaves_its_cell_empty() -> None:
    found = results(True, [3.0, 5.0], [1.0, 2.0])
    found["methods"][0]["curves"][1]["test_score"] = []
    assert cells(found)[0][1] == ""


def test_every_comparison_with_all_of_them_is_listed() -> None:
    wanted = {fixed_norm.METHOD, *fixed_norm.OTHERS}
    have = {
        file.stem
        for file in quote_results.RESULTS.glob("*-peers.json")
        if wanted <= {method["name"] for method in quote_results._load(file.stem)["methods"]}
    }
    assert have == fixed_norm.SETTINGS.keys()


def test_parts_are_compared_in_pairs() -> None:
    names = {name for pair in fixed_norm.PARTS.values() for name in pair}
    found: dict[str, Any] = {
        "command": "wellcond compare --methods 'a<b'",
        "metric": {"higher_is_better": True},
        "methods": [
            {"name": name, "curves": [{"test_score": [float(len(name)) + seed]} for seed in range(3)]} for name in names
        ],
    }
    table, _, commands = fixed_norm.parts_table(lambda name: found).partition("\n\n")
    assert commands.count("wellcond compare --methods &#x27;a&lt;b&#x27;</code>") == len(fixed_norm.ABLATIONS)
    lines = table.splitlines()[2:]
    for line, (name, other) in zip(lines, fixed_norm.PARTS.values(), strict=True):
        gain = len(name) - len(other)
        text = f"{gain:+.1f} [{gain:+.1f}, {gain:+.1f}]"
        assert line.count(f"**{text}**" if gain else text) == 2
