"""`wellcond.lab.compare` on a user's own task."""

from __future__ import annotations

import torch
from torch import nn

from wellcond.lab import Metric, Task, compare
from wellcond.lab.training.run_memory import RunMemory


class Points(Task):
    """Two classes of points, no validation split."""

    metric = Metric("accuracy")
    epochs = 2
    splits = ("test",)

    def __init__(self, width=8):
        self.width = width
        inputs = torch.randn(80, 2, generator=torch.Generator().manual_seed(0))
        self.inputs, self.labels = inputs, (inputs[:, 0] > inputs[:, 1]).long()

    def model(self, seed):
        return nn.Sequential(nn.Linear(2, self.width), nn.ReLU(), nn.Linear(self.width, 2))

    def batches(self, seed, epoch):
        order = torch.randperm(60)
        return [(self.inputs[some], self.labels[some]) for some in order.split(16)]

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def scores(self, model, split):
        right = model(self.inputs[60:]).argmax(1) == self.labels[60:]
        return {"accuracy": 100 * right.float().mean()}


def test_a_comparison_from_python(tmp_path, monkeypatch):
    monkeypatch.setattr(RunMemory, "of", lambda self, spec, data: None)
    options = {"seeds": 1, "lrs": [0.1, 0.3], "out": tmp_path, "quiet": True}
    result = compare(Points(), ["SGDM", "SGDM+GC"], **options)
    assert [method.name for method in result.summary.methods] == ["SGDM", "SGDM+GC"]
    assert "SGDM+GC" in result.table()
    assert "chosen on the test split" in result.report().read_text()
    rows = result.rows()
    assert {row["seed"] for row in rows} == {0}
    assert len([row for row in rows if row["run_steps"] == 8]) == 2 * 2 * 2
    assert result.report(tmp_path / "here" / "page.html").read_text().startswith("<!")
    again = compare(Points(), ["SGDM", "SGDM+GC"], **options)
    assert again.rows() == rows
    other = compare(Points(width=9), ["SGDM"], seeds=1, lrs=[0.1], out=tmp_path, quiet=True)
    assert all(row not in rows for row in other.rows())


def test_several_processes_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(RunMemory, "of", lambda self, spec, data: None)
    options = {"seeds": 2, "lrs": [0.1], "quiet": True}
    one = compare(Points(), ["SGDM"], out=tmp_path / "one", **options)
    two = compare(Points(), ["SGDM"], out=tmp_path / "two", jobs=2, **options)

    def scores(result):
        return [(row["seed"], row["epoch"], row["test_score"], row["train_loss"]) for row in result.rows()]

    assert sorted(scores(one)) == sorted(scores(two))
