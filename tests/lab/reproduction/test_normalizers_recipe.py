"""The recipe of normalizers: one command, resumable, and a verdict that follows from the shares."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from wellcond.lab.comparison.statistics import paired_difference
from wellcond.lab.methods.method import METHODS

pytestmark = pytest.mark.usefixtures("quick_collections")

ROOT = Path(__file__).parents[3]


def load(file: Path):
    """Return a script as a module."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


recipe = load(ROOT / "recipes" / "normalizers.py")


def run(*arguments: str) -> tuple[int, str, str]:
    """Return the recipe's exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = recipe.main(arguments)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of a smoke test and what it printed."""
    folder = tmp_path_factory.mktemp("normalizers")
    code, out, _ = run("--scale", "smoke", "--out", str(folder))
    assert code == 0
    return folder, out


def test_it_compares_every_normalizer_at_every_batch_size(smoke):
    folder, printed = smoke
    content = json.loads((folder / "normalizers.json").read_text())
    assert len((folder / "normalizers.json").read_text()) < 50_000
    assert content["command"] == f"python recipes/normalizers.py --scale smoke --out {folder}"
    assert set(content["versions"]) == {"python", "torch", "lightning", "wellcond"}
    assert {"processor", "cores", "platform"} <= set(content["machine"])
    assert content["settings"]["batch_size"] == 32
    assert list(content["groups"]) == ["32", "4", "2"]
    for group in content["groups"].values():
        assert list(group["methods"]) == ["BN", "GN", "SN", "IBN", "KN", "IterNorm"]
        for name, method in group["methods"].items():
            assert 0 <= method["accuracy"]["mean"] <= 100
            assert (method["difference"] is None) == (name == "BN")
            assert method["lr"] == 0.1
        assert list(group["shares"]["layers"]) == ["0.1", "1.1", "3.1"]
        for one in (*group["shares"]["layers"].values(), group["shares"]["average"]):
            for part in ("mean", "var"):
                assert sum(share["mean"] for share in one[part].values()) == pytest.approx(1, abs=1e-4)
        for name in ("GN", "SN"):
            assert f"  {name:<10}" in printed
    accuracies = [group["methods"]["GN"]["accuracy"] for group in content["groups"].values()]
    assert accuracies[0] == accuracies[1] == accuracies[2]  # it knows no groups


def test_one_seed_decides_nothing_and_says_so(smoke):
    folder, printed = smoke
    claim = json.loads((folder / "normalizers.json").read_text())["claim"]
    assert claim["statement"] == "LN's share rises as the batch shrinks"
    assert (claim["verdict"], claim["groups"]) == ("undecided", [32, 2])
    assert claim["differences"]["ln"]["both"]["count"] == 1
    assert list(claim["at_lr"]) == ["0.1"]
    assert "LN's share rises as the batch shrinks: neither shown nor refuted." in printed
    assert "one seed, so without an interval" in printed


def test_it_leaves_a_figure_and_a_report_of_each_comparison(smoke):
    folder, _ = smoke
    with Image.open(folder / "normalizers.png") as picture:
        picture.verify()
        assert picture.size == (2025, 780)
    assert "<svg" in (folder / "normalizers.svg").read_text()
    for m in (32, 4, 2):
        page = (folder / f"m{m}" / "report.html").read_text()
        assert "What SN learned" in page
        assert ("Ghost groups" in page) == (m != 32)
        assert "Equal time." not in page


def test_the_same_command_again_trains_nothing(smoke, monkeypatch):
    folder, printed = smoke

    def refuse(*_):
        raise AssertionError("a run was started")

    monkeypatch.setattr("wellcond.lab.training.runner.Runner.run", refuse)
    before = (folder / "normalizers.json").read_text()
    code, out, _ = run("--scale", "smoke", "--out", str(folder))
    assert code == 0
    assert (folder / "normalizers.json").read_text() == before
    assert "16 runs to train: about " in printed  # group normalization's three are one
    assert "0 runs to train" in out


def test_an_estimate_trains_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a run was started")

    monkeypatch.setattr("wellcond.lab.training.runner.Runner.run", refuse)
    code, out, _ = run("--scale", "smoke", "--seeds", "3", "--estimate", "--out", str(tmp_path))
    assert (code, out.startswith("48 runs to train: about ")) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "--data must name a parquet file or a folder of them; --scale smoke needs none"),
        (["--scale", "smoke", "--seeds", "0"], "--seeds must be a positive integer, got 0"),
        (
            ["--data", "nowhere.parquet"],
            "--data must be 'digits', a parquet file or a folder of data (see `wellcond list data`); "
            "there is no nowhere.parquet",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == (2, "", f"normalizers: error: {line}\n")
    assert list(tmp_path.iterdir()) == []


def test_its_methods_are_those_of_the_lab():
    assert set(recipe.METHODS.values()) <= set(METHODS)
    assert {METHODS[name].baseline for name in recipe.METHODS.values()} == {"SGDM"}


def shares(*lns: float) -> dict[str, dict[str, dict[str, float]]]:
    """Return shares of one layer for each of LN's, which are greater by 0.1 in the variances; BN has the rest."""
    return {
        str(index): {
            part: {"in": 0.1, "ln": ln + more, "bn": 0.9 - ln - more} for part, more in (("mean", 0), ("var", 0.1))
        }
        for index, ln in enumerate(lns)
    }


@pytest.mark.parametrize(
    ("small", "verdict"),
    [
        ([(0.40, 0.50), (0.42, 0.50), (0.41, 0.52)], "shown"),
        ([(0.10, 0.20), (0.12, 0.20), (0.11, 0.22)], "refuted"),
        ([(0.10, 0.20), (0.42, 0.50), (0.31, 0.22)], "undecided"),
        ([(0.3001, 0.3001), (0.3101, 0.3101), (0.3201, 0.3201)], "undecided"),  # regular, but nothing
    ],
)
def test_the_verdict_follows_from_the_paired_difference(small, verdict):
    large = [0.30, 0.31, 0.32]
    pairs = [(shares(one, one), shares(*other)) for one, other in zip(large, small, strict=True)]
    claim = recipe.claim_of(pairs, {0.1: pairs, 0.2: []})
    # Averaged over two layers; the 0.1 between means and variances is in both m.
    expected = paired_difference([sum(other) / 2 for other in small], large)
    for part in ("mean", "var", "both"):
        found = claim.differences["ln"][part]
        assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))
    assert claim.differences["bn"]["both"].mean == pytest.approx(-expected.mean)
    assert claim.differences["in"]["both"].mean == pytest.approx(0)
    assert claim.verdict == verdict
    assert list(claim.at_lr) == ["0.1"]
    said = recipe.say(claim)[0]
    ending = {"shown": "shown.", "refuted": "refuted, it falls.", "undecided": "neither shown nor refuted."}[verdict]
    assert said.startswith(f"LN's share rises as the batch shrinks: {ending} From m = 32 to 2 ")
    assert f"{expected.mean:+.4f} [{expected.low:+.4f}, {expected.high:+.4f}]" in said
    assert "3 seeds" in said


def test_without_shares_there_is_no_verdict():
    assert recipe.claim_of([], {0.1: []}) is None


def test_its_results_can_be_quoted(smoke):
    content = json.loads((smoke[0] / "normalizers.json").read_text())
    for group in content["groups"].values():  # as of several seeds
        for method in group["methods"].values():
            method["accuracy"]["std"] = 1.25
            if method["difference"] is not None:
                method["difference"] |= {"low": -3.0, "high": 3.0}
        for part in group["shares"]["average"].values():
            for share in part.values():
                share["std"] = 0.01
    table = load(ROOT / "docs" / "quote_results.py").normalizers_table(content)
    lines = table.splitlines()
    heading = next(line for line in lines if line.startswith("| method"))
    rows = [line for line in lines if line.startswith(("| BN", "| GN", "| SN ", "| IBN", "| KN", "| IterNorm"))]
    assert [row.count("|") for row in rows] == [heading.count("|")] * 6
    assert sum(line.startswith("| m = ") for line in lines) == 6
    assert "`python recipes/normalizers.py --scale smoke" in lines[-1]
