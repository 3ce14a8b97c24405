"""A user's score of training batches: weighted by their rows, whole or shared, and one number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wellcond.lab import Metric, Task
from wellcond.lab.errors import DataError
from wellcond.lab.tasks.base import TaskSeed
from wellcond.lab.tasks.own import as_task

CPU = torch.device("cpu")


class Signs(Task):
    metric = Metric("accuracy")

    def model(self, seed):
        return nn.Linear(2, 1)

    def batches(self, seed, epoch):
        return [(torch.randn(rows, 2), torch.ones(rows)) for rows in (4, 7)]

    def loss(self, model, batch):
        return model(batch[0]).square().mean()

    def scores(self, model, split):
        return {"accuracy": 50.0}


class Scored(Signs):
    def train_score(self, output, batch):
        return 100 * (output[:, 0] > 0).double().mean()


def test_none_is_made_without_it():
    data = TaskSeed(Signs(), 0, CPU)
    assert data.train_score(torch.ones(4, 1), next(iter(data.batches()))) is None


@pytest.mark.parametrize("task", [Scored(), as_task(type("Plain", (), {**vars(Signs), **vars(Scored)})())])
def test_it_is_weighted_by_the_rows_of_each_share(task):
    shares = [TaskSeed(task, 0, CPU, rank, 2) for rank in range(2)]
    for number, rows in enumerate((4, 7)):
        parts = [list(data.batches())[number] for data in shares]
        outputs = torch.arange(rows)[:, None] - 2.0
        begin = rows // 2
        own = [
            data.train_score(*each)
            for data, *each in zip(shares, outputs.split([begin, rows - begin]), parts, strict=True)
        ]
        total, count = sum(own).tolist()
        assert count == rows
        assert total / count == pytest.approx(100 * (rows - 3) / rows)


def test_it_must_be_one_number():
    class Many(Signs):
        def train_score(self, output, batch):
            return output[:, 0]

    data = TaskSeed(Many(), 0, CPU)
    with pytest.raises(DataError, match=r"train_score must return one number, got a tensor of shape \[4\]"):
        data.train_score(torch.ones(4, 1), next(iter(data.batches())))
