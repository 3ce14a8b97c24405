"""What tasks are made of: parts of batches, the digest, scores, and what a LightningModule logs."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from wellcond.lab import LabError, LightningTask, Metric
from wellcond.lab.errors import DataError
from wellcond.lab.importing import import_path
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.tasks.batch_parts import Share, on_device, rows_of, shared
from wellcond.lab.tasks.by_path import parse_value
from wellcond.lab.tasks.lightning_task import default_metric
from wellcond.lab.tasks.seed_data import TaskSeed

CPU = torch.device("cpu")


@dataclass
class Pair:
    left: torch.Tensor
    right: object


@given(rows=st.integers(1, 9), ranks=st.integers(1, 4))
def test_ranks_share_the_rows_of_any_nesting(rows, ranks):
    tensor = torch.arange(rows)
    batch = {"a": [tensor, "text"], "b": Pair(tensor * 2, (tensor[:, None], 3.0)), "c": torch.tensor(7.0)}
    assert rows_of(batch) == rows
    if rows < ranks:
        with pytest.raises(DataError, match=f"{rows} rows cannot be shared by {ranks}"):
            shared(batch, 0, ranks)
        return
    shares = [shared(batch, rank, ranks) for rank in range(ranks)]
    weights = [share.weight if isinstance(share, Share) else 1.0 for share in shares]
    own = [share.batch if isinstance(share, Share) else share for share in shares]
    assert torch.equal(torch.cat([part["a"][0] for part in own]), tensor)
    assert torch.equal(torch.cat([part["b"].right[0] for part in own])[:, 0], tensor)
    assert all(part["a"][1] == "text" and part["c"] == 7 for part in own)
    # The mean over ranks of weighted means is the mean over rows.
    mean = sum(weight * part["a"][0].double().mean() for weight, part in zip(weights, own, strict=True)) / ranks
    assert float(mean) == pytest.approx(float(tensor.double().mean()))


class Movable:
    def __init__(self):
        self.place = None

    def to(self, device):
        self.place = device
        return self


def test_what_can_be_moved_is_moved():
    movable = Movable()
    on_device([movable, {"x": Pair(torch.ones(2), None)}], CPU)
    assert movable.place == CPU


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.5", 0.5), ("false", False), ('"3"', "3"), ("{a = 1}", {"a": 1}), ("a,b", "a,b"), ("None", None)],
)
def test_values_of_arguments(text, value):
    assert parse_value(text) == value


TASK = '''"""A task."""
from {package}.network import build

class Mine:
    """Says what it is."""
    score, epochs = "accuracy", 1
    def __init__(self, width=2):
        self.width = width
    def model(self, seed):
        return build(self.width)
    def batches(self, seed, epoch):
        return []
    def loss(self, model, batch):
        return 1
    def scores(self, model, split):
        return {{}}
'''
NETWORK = "from torch import nn\n\ndef build(width):\n    return nn.Linear(width, {bias})\n"


def digest_of(folder, name, task=TASK, bias=1, **arguments):
    from wellcond.lab.tasks.own import as_task

    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "task.py").write_text(task.format(package=name))
    (package / "network.py").write_text(NETWORK.format(bias=bias))
    digest = as_task(import_path(f"{name}.task:Mine")(**arguments)).digest
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]
    # As if the same project had been changed.
    for file in package.iterdir():
        if file.is_file():
            file.unlink()
    return digest


def test_the_digest_hangs_on_code_and_arguments_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    texts = []

    def digest(task=TASK, **arguments):
        # Under a name of its own each time: Python would keep the module; the name is taken out of the text again.
        name = f"project{len(texts)}"
        texts.append(name)
        monkeypatch.setattr("wellcond.lab.own_digest.code_of", lambda text: _code(text.replace(name, "project")))
        return digest_of(tmp_path, name, task, **arguments).replace(name, "project")

    from wellcond.lab.source_text import code_of as _code

    first = digest()
    assert digest(TASK.replace('"""A task."""', '"""Another."""') + "\n# a comment\n") == first
    assert digest(TASK.replace("return 1", "return 2")) != first
    assert digest(bias=3) != first
    assert digest(width=3) != first


def test_the_score_that_counts_by_default():
    assert default_metric(["loss", "acc", "f1"], "Lit").name == "acc"
    assert default_metric(["loss", "mIoU"], "Lit").higher_is_better
    assert not default_metric(["loss", "mse"], "Lit").higher_is_better
    for names in ([], ["f1_macro", "f1_micro"], ["something"]):
        with pytest.raises(DataError, match="--score val_acc:max"):
            default_metric(names, "Lit")


class Lit(pl.LightningModule):
    """Logs by hand, at the end of an epoch, and of two loaders."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.seen = []

    def training_step(self, batch):
        return {"loss": self.net(batch[0]).square().mean()}

    def validation_step(self, batch, batch_idx):
        self.log_dict({"val_loss": batch[0].mean(), "val/number": float(batch_idx)})
        self.seen.append(len(batch[0]))

    def on_validation_epoch_end(self):
        self.log("val_acc", sum(self.seen))
        self.seen.clear()


class Manual(Lit):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


def loader(rows=10, batch=4):
    return DataLoader(TensorDataset(torch.arange(3.0 * rows).view(rows, 3)), batch_size=batch)


def test_a_lightning_module_with_loaders():
    task = LightningTask(Lit, train=loader(), validation=loader())
    assert (task.splits, task.metric, task.steps_per_epoch) == (("test",), Metric("acc", unit=""), 3)
    task.check(CPU)
    found = TaskSeed(task, 0, CPU).evaluate(task.model(0).eval(), "test", Stopwatch(CPU))
    assert found.score == 10
    assert found.loss == pytest.approx(14.5)  # the mean over samples, as Lightning takes it
    assert found.metrics == {"number": pytest.approx((0 * 4 + 1 * 4 + 2 * 2) / 10)}


def test_what_a_lightning_module_must_be():
    with pytest.raises(LabError, match="must be a class"):
        LightningTask(Lit())
    with pytest.raises(LabError, match="automatic_optimization = False"):
        LightningTask(Manual, train=loader(), validation=loader()).model(0)
    with pytest.raises(LabError, match="one training loader, got 0"):
        LightningTask(Lit).steps_per_epoch  # noqa: B018
    with pytest.raises(LabError, match="must have validation or test data"):
        LightningTask(Lit, train=loader()).splits  # noqa: B018
    with pytest.raises(LabError, match="--score must look like"):
        LightningTask(Lit, train=loader(), score="val_acc")
