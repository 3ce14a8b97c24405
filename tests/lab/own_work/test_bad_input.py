"""What cannot be compared is said in one line before anything is trained."""

from __future__ import annotations

import itertools
import re
import sys

import pytest
import torch
from torch import nn

from wellcond.lab import LabError, Metric, Task, compare
from wellcond.lab.cli.main import main
from wellcond.lab.tasks.own import as_task

CPU = torch.device("cpu")


class Fine(Task):
    """Nothing is wrong with it."""

    metric = Metric("accuracy")
    epochs = 1

    def model(self, seed):
        return nn.Linear(2, 2)

    def batches(self, seed, epoch):
        return [torch.randn(4, 2) for _ in range(3)]

    def loss(self, model, batch):
        return model(batch).square().mean()

    def scores(self, model, split):
        return {"accuracy": 50.0}


CALLS = itertools.count()


class Unseeded(Fine):
    def model(self, seed):
        model = nn.Linear(2, 2)
        nn.init.constant_(model.bias, next(CALLS))
        return model


class SameModel(Fine):
    def __init__(self):
        self.kept = nn.Linear(2, 2)

    def model(self, seed):
        return self.kept


class NoModel(Fine):
    def model(self, seed):
        return "resnet"


class Frozen(Fine):
    def model(self, seed):
        return nn.Linear(2, 2).requires_grad_(False)


class Detached(Fine):
    def loss(self, model, batch):
        return super().loss(model, batch).detach()


class LossOfANumber(Fine):
    def loss(self, model, batch):
        return float(super().loss(model, batch))


class LossOfEach(Fine):
    def loss(self, model, batch):
        return model(batch).square()


class LossOfNothing(Fine):
    def loss(self, model, batch):
        return torch.zeros((), requires_grad=True) + 1


class InfiniteLoss(Fine):
    def loss(self, model, batch):
        return super().loss(model, batch) * float("inf")


class BreaksInLoss(Fine):
    def loss(self, model, batch):
        return batch["images"]


class NoBatches(Fine):
    def batches(self, seed, epoch):
        return []


class BatchesOfNothing(Fine):
    def batches(self, seed, epoch):
        return None


class OtherBatches(Fine):
    def batches(self, seed, epoch):
        return [torch.full((4, 2), float(next(CALLS))) for _ in range(3)]


class FewerBatches(Fine):
    def batches(self, seed, epoch):
        return [torch.ones(4, 2) for _ in range(1 + next(CALLS) % 2)]


class NanScore(Fine):
    def scores(self, model, split):
        return {"accuracy": float("nan")}


class NoSuchScore(Fine):
    def scores(self, model, split):
        return {"acc": 50.0}


class ScoreOfText(Fine):
    def scores(self, model, split):
        return {"accuracy": "good"}


class ScoresOfANumber(Fine):
    def scores(self, model, split):
        return 50.0


class OffTheScale(Fine):
    def scores(self, model, split):
        return {"accuracy": 101.0}


class ChangesTheModel(Fine):
    def scores(self, model, split):
        model.weight.mul_(2)
        return {"accuracy": 50.0}


class OnlyValidates(Fine):
    splits = ("validation",)


WRONG = {
    Unseeded: r"Unseeded: .*two of seed 0 differ in bias.*pairing would be void",
    SameModel: "same object twice",
    NoModel: "must return a torch.nn.Module, got str",
    Frozen: "parameters to train, got none",
    Detached: "must have a gradient",
    LossOfANumber: "must return a tensor, got float",
    LossOfEach: r"one number, got a tensor of shape \[4, 2\]",
    LossOfNothing: "none of its parameters gets a gradient",
    InfiniteLoss: "must be finite",
    BreaksInLoss: r"loss\(model, batch\) failed: IndexError.* \(test_bad_input.py, line \d+\)",
    NoBatches: "gave no batch",
    BatchesOfNothing: "to iterate over, got NoneType",
    OtherBatches: "batch 0 of seed 0 and epoch 0 differs between two calls",
    FewerBatches: "differs between two calls",
    NanScore: "accuracy is nan",
    NoSuchScore: "must give the metric 'accuracy' of the validation split, got acc",
    ScoreOfText: "accuracy must be a number, got str",
    ScoresOfANumber: "numbers by name, got float",
    OffTheScale: "a percentage is from 0 to 100",
    ChangesTheModel: "leave the network as it is",
    OnlyValidates: "splits must be",
}


def test_nothing_is_said_of_a_task_that_is_fine():
    state = torch.random.get_rng_state()
    Fine().check(CPU)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_what_is_wrong_is_said_before_anything_is_trained(kind):
    with pytest.raises(LabError, match=WRONG[kind]) as told:
        kind().check(CPU)
    assert str(told.value).startswith(kind.__name__)


class Lacks:
    """Has no scores."""

    model = batches = loss = print


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Lacks, "has no scores"),
        (nn.Linear(2, 2), "got the network Linear"),
        (3, "int has no model, batches, loss, scores"),
        (Task, "Task has no model"),
    ],
)
def test_what_is_no_task_is_said(given, message):
    with pytest.raises(LabError, match=message):
        as_task(given)


MODULE = """
import torch
from torch import nn
from wellcond.lab import Task, Metric

class Mine(Task):
    metric = Metric("accuracy")
    def __init__(self, width, depth=1):
        if width < 0:
            raise ValueError("width must not be negative")
        self.width = width
    def model(self, seed):
        return nn.Linear(2, self.width)
    def batches(self, seed, epoch):
        return [torch.randn(4, 2)]
    def loss(self, model, batch):
        return model(batch).square().mean()
    def scores(self, model, split):
        return {"accuracy": float("nan")}

def make():
    return 3
"""

COMMANDS = {
    "--task nothing_here:Mine": "there is no module 'nothing_here'",
    "--task given_task": r"must look like my_project.training:MyTask, got 'given_task'",
    "--task given_task:Other": "given_task has no Other; its classes: .*Mine",
    "--task missing.py:Mine": "there is no file missing.py",
    "--task broken:Mine": r"importing it failed: NameError: .*\(broken.py, line 1\)",
    "--task asks:Mine": "No module named .not_installed_here. .asks.py",
    "--task given_task:Mine": "needs width: give --task-args width=VALUE",
    "--task given_task:Mine --task-args width=1 height=2": "--task-args height: .* takes width, depth",
    "--task given_task:Mine --task-args width": "must look like lr_warmup=3, got 'width'",
    "--task given_task:Mine --task-args width=1 width=2": "must give each name once",
    "--task given_task:Mine --task-args width=-1": r"failed: ValueError: width must not be negative \(given_task.py",
    "--task given_task:Mine --task-args width=2": "accuracy is nan",
    "--task given_task:make": "int has no model",
    "--task given_task:Mine --task-args width=2 --batch-size 3": "--batch-size is for --data",
    "--task given_task:Mine --task-args width=2 --data cifar": "--data cifar cannot go with --task",
    "--task given_task:Mine --task-args width=2 --data-module given_task:make": "is for a LightningModule",
    "--task given_task:Mine --task-args width=2 --score accuracy": "--score must look like val_acc:max",
    "--task given_task:Mine --task-args width=2 --score f1:max": "must give the metric 'f1'",
    "--task-args width=2": "--task-args is for a task of your own",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "given_task.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("undefined_name\n")
    (tmp_path / "asks.py").write_text("import not_installed_here\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("given_task", None)


@pytest.mark.parametrize("options", COMMANDS)
@pytest.mark.usefixtures("folder")
def test_the_command_line_says_what_is_wrong_in_one_line(options, capsys):
    assert main(["compare", "--methods", "SGDM", "--seeds", "1", *options.split()]) == 2
    told = capsys.readouterr().err.strip()
    assert len(told.splitlines()) == 1
    assert re.search(COMMANDS[options], told), told


class NanLater(Fine):
    """Its scores are at fault only once it is trained."""

    def scores(self, model, split):
        return {"accuracy": 50.0 if next(self.asked) < 3 else float("nan")}

    def __init__(self):
        self.asked = itertools.count()


class Diverges(NanLater):
    """Its scores are not numbers because its weights are none."""

    def loss(self, model, batch):
        return super().loss(model, batch) * 1e30


@pytest.mark.parametrize("kind", [NanLater, Diverges])
def test_a_score_that_is_no_number_is_told_from_divergence(kind, tmp_path):
    options = {"seeds": 1, "lrs": [0.1], "epochs": 3, "out": tmp_path, "quiet": True}
    if kind is NanLater:
        with pytest.raises(LabError, match="after epoch 1, and the network and its loss are finite"):
            compare(kind(), ["SGDM"], **options)
        return
    assert compare(kind(), ["SGDM"], **options).summary.methods[0].diverged_runs == 1
