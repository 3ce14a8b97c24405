"""Claims on learned shares: a verdict that follows from the runs, in the page and in what documents quote."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
from normalizer_tables import normalizers_table
from PIL import Image
from stopped_runs import uncounted

from wellcond.__main__ import main
from wellcond.lab.comparison.statistics import paired_difference
from wellcond.lab.report.drawing import draw_png
from wellcond.lab.reproduction.across import across_charts
from wellcond.lab.reproduction.claims import check_claim
from wellcond.lab.reproduction.recipe import ClaimTable
from wellcond.lab.runs.metric import ACCURACY
from wellcond.lab.training.run_memory import RunMemory

pytestmark = pytest.mark.usefixtures("quick_collections")

METHODS = ["BN", "GN", "SN", "IBN", "KN", "IterNorm"]
STATEMENT = "LN's share rises as the batch shrinks"
TABLE = ClaimTable(statement=STATEMENT, method="SN", share="ln", panels=["m = 32", "m = 2"])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of the recipe's smoke scale."""
    folder = tmp_path_factory.mktemp("normalizers")
    arguments = ["--scale", "smoke", "--quiet", "--no-equal-time", "--out", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunMemory, "of", uncounted)
        assert main(["reproduce", "normalizers", *arguments]) == 0
    return folder


def test_it_compares_every_normalizer_at_every_batch_size(smoke):
    content = json.loads((smoke / "reproduce.json").read_text())
    assert [panel["name"] for panel in content["panels"]] == ["m = 32", "m = 4", "m = 2"]
    for panel in content["panels"]:
        assert [method["label"] for method in panel["methods"]] == METHODS
        (learned,) = [method["shares"] for method in panel["methods"] if method["shares"]]
        assert list(learned["layers"]) == ["0.1", "1.1", "3.1"]
        for one in (*learned["layers"].values(), learned["average"]):
            for part in ("mean", "var"):
                assert sum(share["mean"] for share in one[part].values()) == pytest.approx(1, abs=1e-4)
    accuracies = [panel["methods"][1]["ours"] for panel in content["panels"]]
    assert accuracies[0] == accuracies[1] == accuracies[2]  # group normalization knows no groups


def test_one_seed_decides_nothing_and_says_so(smoke):
    (claim,) = json.loads((smoke / "reproduce.json").read_text())["claims"]
    assert (claim["statement"], claim["verdict"], claim["panels"]) == (STATEMENT, "undecided", ["m = 32", "m = 2"])
    assert claim["differences"]["ln"]["both"]["count"] == 1
    assert list(claim["at_lr"]) == ["0.1"]
    page = (smoke / "reproduce.html").read_text().replace("&#39;", "'")
    for line in claim["said"]:
        assert line in page
    assert "neither shown nor refuted" in page
    assert "one seed, so without an interval" in page
    assert "What SN learned" in page


def test_the_panels_are_set_side_by_side(smoke, tmp_path):
    content = json.loads((smoke / "reproduce.json").read_text())
    score, means, variances = across_charts(content["panels"], ACCURACY)
    assert [series.name for series in score.series] == METHODS
    for series, method in zip(score.series, content["panels"][2]["methods"], strict=True):
        assert series.y[2] == method["ours"]["mean"]
    for chart, part in ((means, "mean"), (variances, "var")):
        for series, kind in zip(chart.series, ("in", "ln", "bn"), strict=True):
            found = [panel["methods"][2]["shares"]["average"][part][kind]["mean"] for panel in content["panels"]]
            assert list(series.y) == found
    draw_png([score, means, variances], tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as picture:
        picture.verify()


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
    first, second = [shares(one, one) for one in large], [shares(*other) for other in small]
    claim = check_claim(TABLE, [first, second], [{0.1: first, 0.2: [None] * 3}, {0.1: second, 0.2: second}])
    # Averaged over two layers; the 0.1 between means and variances is in both m.
    expected = paired_difference([sum(other) / 2 for other in small], large)
    for part in ("mean", "var", "both"):
        found = claim.differences["ln"][part]
        assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))
    assert claim.differences["bn"]["both"].mean == pytest.approx(-expected.mean)
    assert claim.differences["in"]["both"].mean == pytest.approx(0)
    assert claim.verdict == verdict
    assert list(claim.at_lr) == ["0.1"]
    said = claim.said()[0]
    ending = {"shown": "shown.", "refuted": "refuted, it falls.", "undecided": "neither shown nor refuted."}[verdict]
    assert said.startswith(f"{STATEMENT}: {ending} From m = 32 to m = 2 ")
    assert f"{expected.mean:+.4f} [{expected.low:+.4f}, {expected.high:+.4f}]" in said
    assert "3 seeds" in said


def test_without_shares_there_is_no_verdict():
    assert check_claim(TABLE, [[None], [None]], [{0.1: [None]}, {0.1: [None]}]) is None


def test_its_results_can_be_quoted(smoke):
    several = deepcopy(json.loads((smoke / "reproduce.json").read_text()))
    for panel in several["panels"]:
        for method in panel["methods"]:
            method["ours"]["std"] = 1.25
    lines = normalizers_table(several).splitlines()
    heading = next(line for line in lines if line.startswith("| method"))
    rows = [line for line in lines if line.startswith(tuple(f"| {name} " for name in METHODS))]
    assert [row.count("|") for row in rows] == [heading.count("|")] * 6
    assert sum(line.startswith("| m = ") for line in lines) == 6
    assert "`wellcond reproduce normalizers --scale smoke" in lines[-1]
    some = normalizers_table(several, ["BN", "GN"])
    assert "| SN" not in some
    assert "shares" not in some
