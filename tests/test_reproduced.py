"""What the pages say of reproduced tables follows from the committed numbers, and the named commands make these."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import quote_results
from reproductions import adopted, claims, reproduction_tables, summary_table, verdict

from wellcond.lab.cli.main import _parser as command_line
from wellcond.lab.reproduction.panels import scaled_panels
from wellcond.lab.reproduction.recipe import find_recipe
from wellcond.lab.runs.files import to_json

FILES = sorted((Path(__file__).parents[1] / "docs" / "results").glob("reproduced-*.json"))

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def load(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


# the committed files ------------------------------------------------------------------------------------------------


@each_file
def test_the_named_command_is_what_made_the_file(file: Path) -> None:
    content = load(file)
    program, *words = shlex.split(content["command"])
    assert program == "wellcond"
    given = command_line().parse_args(words)
    assert given.scale == content["scale"] == "small"
    recipe = find_recipe(given.table)
    assert recipe.name == content["recipe"]
    # Without --panels and --methods: the recipe's scale alone says what was run.
    panels = scaled_panels(recipe, given.scale)
    assert [panel["name"] for panel in content["panels"]] == [panel.table.name for panel in panels]
    for panel, expected in zip(content["panels"], panels, strict=True):
        assert [method["label"] for method in panel["methods"]] == [method.name for method in expected.methods]
        for method, override in zip(panel["methods"], expected.methods, strict=True):
            paper = expected.table.paper.get(method["label"])
            assert method["paper"] == (None if paper is None else list(paper))
            assert tuple(point["lr"] for point in method["lr_grid"]) == override.lrs
        seeds = given.seeds or expected.fields["seeds"]
        assert panel["seeds"] == seeds
        for name in ("model", "epochs", "batch_size", "train_images", "schedule"):
            assert panel["settings"][name] == expected.fields[name], name


@each_file
def test_a_file_names_no_folder_of_the_machine_that_made_it(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not re.search(r'[" =]/\w', text)
    assert "--out out" in text
    assert len(text) < 60_000


def test_every_file_is_quoted_in_the_page() -> None:
    assert sorted(quote_results.reproduced(), key=lambda content: content["recipe"]) == sorted(
        (load(file) for file in FILES), key=lambda content: content["recipe"]
    )


# adoption -----------------------------------------------------------------------------------------------------------


def method(label: str, baseline: str, **changed: Any) -> dict[str, Any]:
    plain = {
        "label": label,
        "baseline": baseline,
        "paper": [90.0, 0.5],
        "ours": {"mean": 50.0, "std": 1.0, "count": 3},
        "paper_difference": None,
        "difference": None,
        "equal_time": None,
        "lr": 0.1,
        "time_ratio": 1.0,
        "memory_ratio": 1.0,
        "metrics": {"seconds per epoch": 2.0},
    }
    return plain | changed


def difference(mean: float, half: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "count": 3}


def reproduction(*panels: list[dict[str, Any]], recipe: str = "9.9") -> dict[str, Any]:
    return {
        "recipe": recipe,
        "title": "This against that",
        "source": f"thesis, table {recipe}",
        "score": "accuracy",
        "scale": "small",
        "data": {"cifar10": "/data/sets/c.parquet"},
        "command": f"wellcond reproduce {recipe} --data cifar10=/data/sets/c.parquet --out /tmp/9 --panels 'A / B'",
        "versions": {"wellcond": "1", "torch": "2"},
        "machine": {"processor": "P", "cores": "2"},
        "panels": [
            {
                "name": f"A / {number}",
                "title": "c.parquet: 20 images",
                "settings": {"data": "/data/sets/c.parquet", "epochs": 2},
                "differs": {"epochs": [200, 2], "model": ["large", f"small{number}"], "image_size": [None, 16]},
                "seeds": 3,
                "notes": ["Said of all.", *(["Said of one."] if number else [])],
                "methods": methods,
            }
            for number, methods in enumerate(panels)
        ],
    }


def test_adopting_takes_folders_away_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = reproduction([method("old", "old")])
    (tmp_path / "reproduce.json").write_text(to_json(content), encoding="utf-8")
    monkeypatch.setattr(quote_results, "RESULTS", tmp_path)
    assert quote_results.main(["--adopt", str(tmp_path / "reproduce.json"), "reproduced-9.9"]) == 0
    kept = load(tmp_path / "reproduced-9.9.json")
    assert kept == adopted(content)
    assert kept["command"] == "wellcond reproduce 9.9 --data cifar10=c.parquet --out out --panels 'A / B'"
    assert kept["data"] == {"cifar10": "c.parquet"}
    assert kept["panels"][0]["settings"] == {"data": "c.parquet", "epochs": 2}
    kept |= {key: content[key] for key in ("command", "data")}
    kept["panels"][0]["settings"]["data"] = content["panels"][0]["settings"]["data"]
    assert kept == content


def test_a_bundled_data_set_keeps_its_name() -> None:
    content = reproduction([method("old", "old")]) | {"data": {"digits": "digits"}}
    assert adopted(content)["data"] == {"digits": "digits"}


# words --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "mean", "half", "said"),
    [
        (0.4, 2.0, 1.0, "same direction, beyond chance"),
        (-0.4, -2.0, 1.0, "same direction, beyond chance"),
        (0.4, -2.0, 1.0, "other direction, beyond chance"),
        (-0.4, 2.0, 1.0, "other direction, beyond chance"),
        (0.4, 2.0, 3.0, "within chance"),
        (0.4, -2.0, 3.0, "within chance"),
        (None, 2.0, 1.0, "above its baseline, beyond chance"),
        (0.0, -2.0, 1.0, "below its baseline, beyond chance"),
        (None, 2.0, 3.0, "within chance"),
    ],
)
def test_the_verdict_is_made_from_the_numbers(source: float | None, mean: float, half: float, said: str) -> None:
    assert verdict(method("new", "old", paper_difference=source, difference=difference(mean, half))) == said


def test_one_seed_and_a_baseline_have_no_direction() -> None:
    assert verdict(method("old", "old")) == ""
    alone = {"mean": 2.0, "low": None, "high": None, "count": 1}
    assert verdict(method("new", "old", paper_difference=0.4, difference=alone)) == "one seed"


def two_families() -> dict[str, Any]:
    """Return two panels: in the first new is seen, but not at equal time; in the second it points the other way."""
    adam = method("adam", "old", paper_difference=-0.3, difference=difference(5.0, 1.0))
    timed = {"steps": 9, "difference": difference(0.1, 1.0)}
    new = method("new", "old", paper_difference=0.4, difference=difference(2.0, 1.0), equal_time=timed)
    new["metrics"] = {"seconds per epoch": 3.0}
    newer = method("newer", "adam", paper_difference=0.2, difference=difference(1.0, 3.0), time_ratio=1.25)
    worse = method("new", "old", paper_difference=1.4, difference=difference(-2.0, 1.0))
    return reproduction([method("old", "old"), adam, new, newer], [method("old", "old"), worse])


def test_what_serves_as_a_baseline_is_no_claim() -> None:
    assert [claim.what for claim in claims(two_families())] == [
        "9.9 new in A / 0",
        "9.9 newer in A / 0",
        "9.9 new in A / 1",
    ]


def test_a_panel_shows_source_and_ours_side_by_side() -> None:
    lines = reproduction_tables(adopted(two_families())).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    heads, new = rows[0], dict(zip(rows[0], rows[4], strict=True))
    assert heads[:5] == ["method", "source", "ours", "source's difference", "our difference"]
    assert new == {
        "method": "new",
        "source": "90.00 ± 0.50",
        "ours": "50.00 ± 1.00",
        "source's difference": "+0.40",
        "our difference": "+2.00 [+1.00, +3.00]",
        "at equal time": "+0.10 [-0.90, +1.10]",
        "time/step": "x 1.00",
        "time/epoch": "x 1.50",
        "memory": "x 1.00",
        "lr": "0.1",
        "verdict": "same direction, beyond chance",
    }
    assert rows[5][0] == "newer (to adam)"
    # What all panels have in place of the source's is said once, and so is a note of all.
    text = "\n".join(lines)
    assert text.count("epochs 2 (200), image size 16") == 1
    assert text.count("model small1 (large)") == 1
    assert "\n- Said of all.\n- A / 1: Said of one.\n" in text
    assert lines[-1].startswith("`wellcond reproduce 9.9 --data cifar10=c.parquet --out out")


def test_the_summary_counts_what_was_seen() -> None:
    text = summary_table([two_families()])
    assert "a method in a panel each: 3. " in text
    assert (
        "by more than chance: 1. Not to be told from chance at this size: 1. The other way by more than chance: 1."
        in text
    )
    assert "also compared at equal wall time: 1; seen there, too: 0." in text
    assert (
        "\n- Seen: 9.9 new in A / 0.\n- Not told from chance: 9.9 newer in A / 0.\n- The other way: 9.9 new in A / 1.\n"
        in text
    )
    assert "\n| 9.9 | new (to old) | 2 | +0.40 to +1.40 | -2.00 to +2.00 | 1 | 0 | 0 | 1 |\n" in text
    assert "\n| 9.9 | newer (to adam) | 1 | +0.20 | +1.00 | 0 |  | 1 | 0 |\n" in text


def test_a_figure_without_numbers_is_told_apart() -> None:
    found = reproduction(
        [method("old", "old", paper=None), method("new", "old", paper=None, difference=difference(2.0, 1.0))],
        [method("old", "old", paper=None), method("new", "old", paper=None, difference=difference(2.0, 3.0))],
    ) | {"source": "thesis, figure 9.8"}
    text = summary_table([two_families(), found])
    assert "a method in a panel each: 3. " in text
    assert (
        "- Figure 9.8 prints no figures. new to old, here: above its baseline, beyond chance in A / 0; "
        "within chance in A / 1." in text
    )
