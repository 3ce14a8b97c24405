"""A user's task trains, resumes and repeats as a built-in one does."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from wellcond.lab import Metric, Task
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.settings import Settings
from wellcond.lab.training.checkpoint import Checkpointing
from wellcond.lab.training.runner import Runner

CPU = torch.device("cpu")


class Sums(Task):
    """Sums of random numbers, with dropout, drawn from the global generator."""

    metric = Metric("error", unit="", higher_is_better=False)
    epochs = 2
    steps = 7

    def model(self, seed):
        return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))

    def batches(self, seed, epoch):
        for _ in range(self.steps):
            inputs = torch.randn(16, 4)
            yield {"inputs": inputs, "sums": inputs.sum(1, keepdim=True)}

    def loss(self, model, batch):
        noise = random.random() + np.random.rand()  # noqa: NPY002
        return (model(batch["inputs"]) - batch["sums"]).square().mean() * (1 + 0.01 * noise)

    def scores(self, model, split):
        inputs = torch.randn(100, 4)
        error = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        return {"error": error, "loss": error, "largest": inputs.max()}


def plan_of(task, **settings):
    return make_plan(Settings(methods=("SGDM", "W-SGDM"), seeds=2, **settings), task)


def test_a_run_measures_the_users_scores():
    plan = plan_of(Sums())
    all_runs = plan.template
    assert (plan.steps_per_epoch, all_runs.epochs, all_runs.batch_size, all_runs.model) == (7, 2, 16, "Sequential")
    record = Runner(plan.task, CPU).run(plan.spec(plan.methods[1], 0.03, seed=1))
    assert [epoch.steps for epoch in record.epochs] == [7, 14]
    last = record.epochs[-1]
    assert last.test_score == last.test_loss
    assert last.test_score < plan.task.untrained_score
    assert set(last.metrics) == {"largest"}
    assert last.test_score != last.validation_score
    record.check(14, plan.task.metric)


class TakesSkip(Sums):
    """Leaves out batches itself."""

    def batches(self, seed, epoch, skip=0):
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        for number in range(self.steps):
            inputs = torch.randn(16, 4, generator=generator)
            if number >= skip:
                yield {"inputs": inputs, "sums": inputs.sum(1, keepdim=True)}


class StoppingError(Exception):
    """Ends a run."""


@pytest.mark.parametrize("kind", [Sums, TakesSkip])
@pytest.mark.parametrize("after", [3, 7, 9])
def test_a_run_goes_on_exactly(kind, after, tmp_path):
    task = kind()
    plan = plan_of(task)
    spec = plan.spec(plan.methods[1], 0.03, seed=1)
    whole = Runner(task, CPU).run(spec)
    checkpoints = Checkpointing(tmp_path, 0)
    made = 0

    class Breaks(kind):
        def loss(self, model, batch):
            nonlocal made
            made += 1
            if made > after:
                raise StoppingError
            return super().loss(model, batch)

    with pytest.raises(StoppingError):
        Runner(Breaks(), CPU, checkpoints=checkpoints).run(spec)
    assert checkpoints.file(spec).step() == after
    resumed = Runner(task, CPU, checkpoints=checkpoints).run(spec)

    def told(record):
        return [replace(epoch, seconds=0.0) for epoch in record.epochs]

    assert told(resumed) == told(whole)
