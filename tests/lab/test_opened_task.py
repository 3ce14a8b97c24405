"""Tasks that are opened without a method: the same network and batches as in a comparison, and its words."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from row_files import write_csv, write_features, write_text

from wellcond.lab.cli.main import main
from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import DEFAULT_METHODS, TEXT_METHODS
from wellcond.lab.opened_task import opened_task
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.settings import Settings

CPU = torch.device("cpu")
KINDS = {"text": write_text, "table": write_csv, "features": write_features, "digits": lambda root: Path("digits")}


@pytest.fixture(params=KINDS)
def settings(request, tmp_path):
    return Settings(data=str(KINDS[request.param](tmp_path)), batch_size=4)


def test_it_is_the_task_that_methods_are_compared_on(settings):
    opened, plan = opened_task(settings), make_plan(settings)
    spec = plan.spec(plan.methods[0], 0.1, seed=3)
    mine, theirs = opened.data(3, CPU), plan.task.for_seed(spec, CPU, 0, 1)
    for one, other in zip(islice(mine.batches(), 2), islice(theirs.batches(), 2), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    network, same = (task.initial_model(plan.template.model, 3, None) for task in (opened.task, plan.task))
    assert all(torch.equal(*pair) for pair in zip(network.parameters(), same.parameters(), strict=True))


def test_what_is_compared_by_default_is_the_tasks_own(settings):
    plan = make_plan(settings)
    wanted = TEXT_METHODS if plan.task.kind == "language modelling" else DEFAULT_METHODS
    assert plan.settings.methods == wanted == tuple(method.name for method in plan.methods)
    chosen = make_plan(Settings(data=settings.data, batch_size=4, methods=("FAdam",)))
    assert [method.name for method in chosen.methods] == ["FAdam"]


def test_too_large_a_batch_is_told_in_the_datas_word(settings):
    with pytest.raises(LabError, match=r"at most the number of training (images|rows|blocks) \(\d+\), got 1000000"):
        opened_task(Settings(data=settings.data, batch_size=1_000_000))


def test_the_list_says_which_methods_a_text_is_compared_with(capsys):
    assert main(["list", "data"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "by default" in line]
    assert len(lines) == 1
    assert "GPT" in lines[0]
    assert lines[0].endswith(", ".join(TEXT_METHODS))


OWN = """
import torch
from torch import nn


class Mine:
    epochs, score, higher_is_better = 2, "error", False
    default_methods = ("AdamW", "mine = AdamW() + GradientCentralization")
    samples = "signals"

    def model(self, seed):
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def batches(self, seed, epoch):
        for _ in range(6):
            x = torch.randn(16, 3)
            yield x, x.sum(1, keepdim=True)

    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    def scores(self, model, split):
        x = torch.randn(64, 3)
        return {"error": (model(x) - x.sum(1, keepdim=True)).abs().mean()}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "mine_opened.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return "mine_opened.py:Mine"


def test_a_task_of_ones_own_names_its_methods(own):
    plan = make_plan(Settings(task=own))
    assert [method.name for method in plan.methods] == ["AdamW", "mine"]


def test_a_task_of_ones_own_is_diagnosed_and_begins_with_given_weights(own, tmp_path, capsys):
    assert main(["diagnose", "--task", own, "--batches", "6", "--steps", "4", "--out", "page"]) == 0
    assert "Sequential after 4 steps of SGD at lr 0.05, on 6 batches of 16 of Mine" in capsys.readouterr().out
    network = opened_task(Settings(task=own)).network(5, None)
    torch.save(network.state_dict(), "given.pt")
    assert main(["diagnose", "--task", own, "--checkpoint", "given.pt", "--batches", "2", "--out", "other"]) == 0
    begun = make_plan(Settings(task=own, weights="given.pt")).task.initial_model("", 0, "given.pt")
    assert all(torch.equal(*pair) for pair in zip(network.parameters(), begun.parameters(), strict=True))


def test_batches_without_an_end_are_told(own, tmp_path, monkeypatch):
    monkeypatch.setattr("wellcond.lab.tasks.base.MOST_BATCHES", 20)
    (tmp_path / "endless_opened.py").write_text(OWN.replace("for _ in range(6)", "while True"))
    with pytest.raises(LabError, match="gives more than 20 batches: an epoch must end"):
        make_plan(Settings(task="endless_opened.py:Mine"))
