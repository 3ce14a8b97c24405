"""A comparison's file: what is written is read again, the command line goes before it, and mistakes are named."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from typing import get_type_hints

import pytest

from wellcond.__main__ import main
from wellcond.lab.errors import LabError
from wellcond.lab.runs.comparison_file import read_comparison, write_comparison
from wellcond.lab.runs.settings import Settings


def given(tmp_path, text):
    file = tmp_path / "compare.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_every_field_is_written_and_read_again(tmp_path):
    several = {
        "methods": ("SGDM", "'a \"b\", c' = SGD(momentum=0.9) + lrs=[0.1, 0.3, 1.0] # é\u2028"),
        "lrs": (("SGD", (0.1, 0.2, 0.3)), ("my.module:Lion", (1e-4,) * 3)),
        "epochs": 7,
        "warmup": 1.0,
        "deterministic": True,
        "data": "C:\\images\tfolder\x7f",
        "weights": "torchvision:IMAGENET1K_V1",
        "target": 90.0,
    }
    for settings in (Settings(), replace(Settings(), **several)):
        again = Settings(**read_comparison(given(tmp_path, write_comparison(settings, "wellcond compare"))))
        assert again == settings


def test_a_table_of_pairs_takes_what_its_field_takes(tmp_path):
    hints = get_type_hints(Settings)
    assert read_comparison(given(tmp_path, "[lrs]\nSGD = [1, 0.5]")) == {"lrs": (("SGD", (1.0, 0.5)),)}
    assert {field.name for field in fields(Settings)} == set(hints)
    assert all(field.default is not MISSING for field in fields(Settings))  # a file may leave any of them out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch = 3", "unknown key 'epoch': did you mean 'epochs'? Known: data, methods, "),
        ("epochs = '3'", "epochs must be an integer, got '3'"),
        ("epochs = true", "epochs must be an integer, got True"),
        ("methods = 'SGDM'", "methods must be a list, got 'SGDM'"),
        ("lrs = [1]", "lrs must be a table, got [1]"),
        ("deterministic = 1", "deterministic must be true or false, got 1"),
        ("epochs = ", "not TOML: "),
    ],
)
def test_mistakes_are_named(tmp_path, text, said):
    with pytest.raises(LabError) as caught:
        read_comparison(given(tmp_path, text))
    assert said in str(caught.value)


def test_the_command_line_goes_before_the_file(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("wellcond.lab.cli.compare.in_processes", lambda settings, line, act: seen.append(settings) or 0)
    text = (
        "epochs = 3\nseeds = 2\nmethods = ['SGDM']\ndeterministic = true\nwarmup = 1\n[lrs]\nSGD = [0.1]\nAdamW = [0.2]"
    )
    file = str(given(tmp_path, text))
    assert main(["compare", file]) == 0
    assert main(["compare", file, "--seeds", "1", "--method", "AdamW", "--lrs", "SGD=0.3", "--no-deterministic"]) == 0
    first, second = seen
    assert (first.epochs, first.seeds, first.methods, first.deterministic, first.warmup) == (3, 2, ("SGDM",), True, 1.0)
    assert second == replace(
        first, seeds=1, methods=("AdamW",), deterministic=False, lrs=(("SGD", (0.3,)), ("AdamW", (0.2,)))
    )


def test_results_hold_the_file_that_repeats_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--epochs", "1", "--seeds", "1", "--train-images", "64", "--quiet"]
    mine = "mine = SGD(momentum=0.9) + GradientCentralization + lrs=[0.1, 0.2, 0.3]"
    assert main(["compare", *small, "--methods", "SGDM", "--method", mine, "--out", "out"]) == 0
    numbers = (tmp_path / "out" / "results.json").read_text(encoding="utf-8")
    assert mine in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "runs").iterdir()}
    assert main(["compare", "out/compare.toml", "--quiet", "--out", "out"]) == 0
    # The same runs: none was trained again.
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "runs").iterdir()} == kept
    again = (tmp_path / "out" / "results.json").read_text(encoding="utf-8")
    assert again.split('"versions"')[1] == numbers.split('"versions"')[1]
