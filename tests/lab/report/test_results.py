"""What a comparison leaves behind: the table, results.json, the curves and the report."""

from __future__ import annotations

import csv
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from wellcond.__main__ import main
from wellcond.lab.comparison.statistics import Difference
from wellcond.lab.comparison.summary import read_summary
from wellcond.lab.report.formats import difference_text
from wellcond.lab.report.tables import tables
from wellcond.lab.runs.files import rounded

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Checker(HTMLParser):
    """Follows tags and keeps what refers to something."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag, attributes):
        self.references += [value for key, value in attributes if key in ("src", "href", "xlink:href", "srcset")]
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def check_page(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, str]:
    """A small comparison's folder and what it printed."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("results")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        arguments = ["--methods", "SGDM,W-SGDM,AdamW,FAdam", "--seeds", "2", "--epochs", "3", "--train-images", "96"]
        assert main(["compare", *arguments, "--out", str(folder)]) == 0
    return folder, printed.getvalue()


def test_json_holds_what_it_takes_to_read_and_repeat_the_numbers(results):
    folder, _ = results
    text = (folder / "results.json").read_text()
    assert len(text) < 300_000
    content = json.loads(text)
    assert content["format"] == 2
    assert content["command"].startswith("wellcond compare --methods SGDM,W-SGDM,AdamW,FAdam --seeds 2")
    assert set(content["versions"]) == {"python", "torch", "lightning", "wellcond"}
    assert {"processor", "cores", "platform"} <= set(content["machine"])
    assert content["settings"] | {"train_images": 96, "seeds": 2, "epochs": 3, "stats_every": 1} == content["settings"]
    assert content["settings"]["ghost_batch"] is None
    assert "ghost" not in content["title"]
    assert (content["seeds"], content["steps"], content["early_epoch"], content["target"]) == (2, 9, 2, 95.0)
    assert content["findings"]
    assert [method["name"] for method in content["methods"]] == ["SGDM", "W-SGDM", "AdamW", "FAdam"]
    for method in content["methods"]:
        assert method["baseline"] == ("SGDM" if "SGDM" in method["name"] else "AdamW")
        assert [point["lr"] for point in method["lr_grid"]] == sorted(point["lr"] for point in method["lr_grid"])
        assert set(method["scores"]) == {"1", "2", "3"}
        assert [curve["seed"] for curve in method["curves"]] == [0, 1]
        for curve in method["curves"]:
            assert all(len(values) == 3 for key, values in curve.items() if key not in ("seed", "metrics"))
            assert {name: len(values) for name, values in curve["metrics"].items()} == {"top-5": 3}
            assert curve["seconds"] == sorted(curve["seconds"])
        final = method["scores"]["3"]
        assert final["mean"] == pytest.approx(sum(curve["test_score"][2] for curve in method["curves"]) / 2, 1e-5)
        if method["name"] == method["baseline"]:
            assert method["time_ratio"] == 1.0
            assert method["evaluation_ratio"] is None
            assert method["equal_time"] is None
        else:
            assert method["equal_time"]["steps"] == max(1, round(9 / method["time_ratio"]))
            assert method["equal_time"]["others"] == {}  # the only other of its family is the baseline
            assert method["final_difference"]["low"] <= method["final_difference"]["mean"]


def test_the_report_is_one_well_formed_page_that_links_to_the_files_beside_it(results):
    folder, _ = results
    page = (folder / "report.html").read_text()
    checker = check_page(page)
    references = [reference for reference in checker.references if not reference.startswith("#")]
    assert references == ["results.json", "compare.toml", "epochs.csv", "curves-epochs.png", "curves-seconds.png"]
    assert all((folder / name).is_file() for name in references)
    assert checker.scripts == 0
    assert "http://" not in page
    assert "https://" not in page
    content = json.loads((folder / "results.json").read_text())
    for method in content["methods"]:
        assert f'<th scope="row">{method["name"]}</th>' in page
    for text in ("Findings", "Equal time", "Paired seeds", "max-width: 760px", "prefers-color-scheme: dark"):
        assert text in page
    # A scatter, charts of accuracy and of losses, the seeds and the lrs for each of two families.
    scores = [score for method in content["methods"] for curve in method["curves"] for score in curve["train_score"]]
    scored = 0 if None in scores else 2
    assert page.count("<figure>") == 14 + scored
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert content["versions"]["torch"] in page


def test_the_scatters_points_say_the_summarys_numbers(results):
    folder, _ = results
    page = unescape((folder / "report.html").read_text())
    for method in json.loads((folder / "results.json").read_text())["methods"]:
        if method["name"] == method["baseline"]:
            assert f"<title>{method['name']}, x 1.00, the baseline</title>" in page
        else:
            gain = difference_text(Difference(**method["final_difference"]))
            assert f"<title>{method['name']}, x {method['time_ratio']:.2f}, {gain} points</title>" in page


def test_tables_show_the_numbers_of_the_file(results):
    """Rounded from the same digits, the figures of the terminal, the page and the file cannot differ."""
    folder, printed = results
    page = (folder / "report.html").read_text()
    content = json.loads((folder / "results.json").read_text())
    assert read_summary(content) == rounded(read_summary(content))
    for table in tables(read_summary(content)):
        for row in table.rows:
            line = next(line for line in printed.splitlines() if all(cell.text in line for cell in row.cells))
            assert line.startswith(row.name)
            assert all(f">{cell.text}</td>" in page for cell in row.cells)


def test_costs_are_in_the_json_the_table_and_the_report(results):
    folder, printed = results
    page = (folder / "report.html").read_text()
    methods = {method["name"]: method for method in json.loads((folder / "results.json").read_text())["methods"]}
    plain, whitened = methods["SGDM"], methods["W-SGDM"]
    assert plain["memory_ratio"] == 1.0
    assert plain["memory"]["optimizer_state"] == plain["memory"]["parameters"]  # the momentum
    assert methods["AdamW"]["memory"]["optimizer_state"] == pytest.approx(2 * plain["memory"]["parameters"], rel=1e-3)
    assert whitened["memory_ratio"] == pytest.approx(whitened["memory"]["peak"] / plain["memory"]["peak"], rel=1e-4)
    for method in methods.values():
        assert method["seconds_per_epoch"] == pytest.approx(method["milliseconds_per_step"] * 3 / 1000, rel=1e-4)
    for text in (f"{whitened['memory_ratio']:.2f} times (W-SGDM)", f"x {whitened['memory_ratio']:.2f}"):
        assert text in printed
        assert text in page
    # What is kept for a parameter, in the words of the attachment's own report.
    (rows,) = whitened["coverage"].values()
    assert plain["coverage"] == {}
    kept = whitened["memory"]["optimizer_state"] - plain["memory"]["optimizer_state"]
    assert sum(row["state_bytes"] or 0 for row in rows) == pytest.approx(kept, rel=0.02)
    for row in rows:
        assert f'<th scope="row">{row["name"]}</th>' in page


def test_what_a_name_holds_is_escaped(tmp_path, write_images, capsys):
    file = tmp_path / "<b>&.parquet"
    write_images(file, count=120)
    arguments = ["--data", str(file), "--epochs", "1", "--seeds", "1", "--batch-size", "16", "--methods", "SGDM"]
    out = tmp_path / "out"
    assert main(["compare", *arguments, "--model", "convnet", "--out", str(out), "--quiet"]) == 0
    page = (out / "report.html").read_text()
    check_page(page)
    assert "<b>&." not in page
    assert "&lt;b&gt;&amp;.parquet" in page
    assert "Only baselines were run" in page
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("\n") == 2  # the files' places


def test_the_table_is_readable_when_piped(results):
    folder, printed = results
    lines = [line.rstrip() for line in printed.splitlines()]
    assert max(len(line) for line in lines if not line.startswith("Written")) <= 120
    assert "\x1b" not in printed
    assert "…" not in printed
    assert sum(line.startswith("W-SGDM ") for line in lines) == 3
    for text in ("epochs to 95 %", "time/step", "equal time", "Findings", "±", "["):
        assert text in printed
    assert lines[-1].split()[1:] == [
        str(folder / name)
        for name in (
            "report.html",
            "curves-epochs.png",
            "curves-seconds.png",
            "results.json",
            "epochs.csv",
            "compare.toml",
        )
    ]


def test_the_curves_are_pictures_of_both_families(results):
    folder, _ = results
    for name in ("curves-epochs.png", "curves-seconds.png"):
        with Image.open(folder / name) as picture:
            picture.verify()
            assert picture.size == (1650, 630)


def test_every_epoch_of_every_run_is_a_line_of_the_csv(results):
    folder, _ = results
    with (folder / "epochs.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    kept = [json.loads(file.read_text()) for file in folder.glob("runs/*.json")]
    assert len(rows) == sum(len(run["result"]["epochs"]) for run in kept)
    found = {
        (row["method"], float(row["lr"]), int(row["seed"]), int(row["run_steps"]), int(row["epoch"])): row
        for row in rows
    }
    for run in kept:
        spec = run["spec"]
        for number, epoch in enumerate(run["result"]["epochs"], start=1):
            row = found[(spec["method"]["name"], spec["lr"], spec["seed"], spec["steps"], number)]
            for name in ("steps", "seconds", "train_loss", "validation_score", "test_score", "test_loss"):
                assert float(row[name]) == epoch[name]
            assert float(row["top-5"]) == epoch["metrics"]["top-5"]
