"""Classification in memory: what it measures, that ranks measure it together, and the weights it begins with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import METHODS
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.stopwatch import Stopwatch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plan():
    return make_plan(Settings(methods=("SGDM",), seeds=1, epochs=1, train_images=200))


def evaluated(plan, model, rank=0, ranks=1):
    data = plan.task.for_seed(plan.spec(METHODS["SGDM"], 0.1, 0), CPU, rank, ranks)
    with torch.no_grad():
        return data.evaluate(model, "test", Stopwatch(CPU))


@pytest.fixture
def model(plan):
    return plan.task.initial_model("convnet", 0, None).eval()


def test_scores_are_those_of_the_formulas(plan, model):
    data = plan.task.for_seed(plan.spec(METHODS["SGDM"], 0.1, 0), CPU, 0, 1)
    test, (mean, std) = plan.task.data.test, data.split.moments
    labels = torch.from_numpy(test.labels)
    with torch.no_grad():
        logits = model((test.images.float() - mean) / std).double()
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    found = evaluated(plan, model)
    assert found.images == plan.task.test_images == 399
    assert found.score == pytest.approx(100 * float((ranks < 1).double().mean()), rel=1e-6)
    assert found.metrics == {"top-5": pytest.approx(100 * float((ranks < 5).double().mean()), rel=1e-6)}
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


@pytest.mark.parametrize("ranks", [2, 3, 400])  # with 400 the last has no image
def test_ranks_find_together_what_one_finds(plan, model, monkeypatch, ranks):
    shares = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda sums: shares.append(sums.clone()))
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    for rank in range(ranks) if ranks < 10 else (0, 398, 399):
        evaluated(plan, model, rank, ranks)
    # A network sharded over the ranks needs every one of them in every forward pass.
    assert len(passes) == len(shares)
    if ranks > 10:
        assert shares[-1].tolist() == [0, 0, 0]
        return
    one = evaluated(plan, model)
    loss, first, among = torch.stack(shares).sum(0).tolist()
    assert loss / one.images == pytest.approx(one.loss, rel=1e-6)
    assert 100 * first / one.images == pytest.approx(one.score, rel=1e-6)
    assert 100 * among / one.images == pytest.approx(one.metrics["top-5"], rel=1e-6)


def test_few_classes_have_no_top_five(tmp_path, write_images):
    write_images(tmp_path / "images.parquet", count=60)
    plan = make_plan(Settings(data=str(tmp_path / "images.parquet"), methods=("SGDM",), batch_size=8))
    assert evaluated(plan, plan.task.initial_model("resnet8", 0, None).eval()).metrics == {}
    assert plan.task.chance == pytest.approx(100 / 3)


def test_label_smoothing_mixes_the_targets_in_training_only(plan, model):
    spec = replace(plan.template, label_smoothing=0.2)
    smooth, plain = (plan.task.for_seed(each, CPU, 0, 1) for each in (spec, plan.template))
    batch = next(iter(plain.batches()))
    log = F.log_softmax(model(batch[0]), dim=1)
    target = 0.8 * F.one_hot(batch[1], 10) + 0.2 / 10
    torch.testing.assert_close(smooth.loss(model, batch), -(target * log).sum(1).mean())
    with torch.no_grad():
        losses = [each.evaluate(model, "validation", Stopwatch(CPU)).loss for each in (smooth, plain)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_weights_come_from_a_file(plan, tmp_path, wrap):
    theirs = plan.task.initial_model("convnet", 5, None)
    torch.save(wrap(theirs.state_dict()), tmp_path / "weights.pt")
    for seed in (0, 1):
        mine = plan.task.initial_model("convnet", seed, str(tmp_path / "weights.pt")).state_dict()
        assert all(torch.equal(mine[name], value) for name, value in theirs.state_dict().items())


def test_weights_that_do_not_fit_are_told_before_training(tmp_path):
    file = tmp_path / "weights.pt"
    settings = Settings(methods=("SGDM",), weights=str(file))
    file.write_text("not weights")
    with pytest.raises(LabError, match="cannot be read as a state dict"):
        make_plan(settings)
    torch.save(torch.nn.Linear(2, 2).state_dict(), file)
    with pytest.raises(LabError, match="is of another network than convnet: missing"):
        make_plan(settings)
    torch.save([1], file)
    with pytest.raises(LabError, match="must hold a state dict, .*got list"):
        make_plan(settings)


def test_other_weights_under_the_same_name_are_another_run(plan, tmp_path):
    file = tmp_path / "weights.pt"
    keys = set()
    for seed in (1, 2):
        torch.save(plan.task.initial_model("convnet", seed, None).state_dict(), file)
        keys.add(make_plan(Settings(methods=("SGDM",), weights=str(file))).template.key())
    assert len(keys) == 2
