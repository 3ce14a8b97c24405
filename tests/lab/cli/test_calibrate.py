"""`wellcond calibrate`: what it writes is what `wellcond.calibrate` gives, and what it prints was measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wellcond
from wellcond.__main__ import main
from wellcond.lab.methods.method import METHODS
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.settings import Settings

M = 4
SMALL = Settings(methods=("SGDM",), model="convnet", batch_size=M, train_images=400)


@pytest.fixture(scope="module")
def plan():
    return make_plan(SMALL)


def seed_data(plan):
    return plan.task.for_seed(plan.spec(METHODS["SGDM"], 0.1, seed=0), torch.device("cpu"), rank=0, ranks=1)


@pytest.fixture(scope="module")
def trained(plan) -> nn.Module:
    """A convnet trained for a few steps in batches of 4, for which batch statistics are noisy."""
    model = plan.task.initial_model("convnet", 0, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for images, labels in seed_data(plan).batches():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def calibrate(checkpoint, out, *options):
    arguments = ["--model", "convnet", "--train-images", "400", "--batch-size", str(M), "--out", str(out)]
    return main(["calibrate", str(checkpoint), *arguments, *options])


def evaluated(model, images, labels):
    with torch.no_grad():
        logits = model.eval()(images)
    return 100.0 * float((logits.argmax(1) == labels).float().mean()), float(F.cross_entropy(logits, labels))


@pytest.mark.parametrize("what", ["bsr", "evalnorm", "bn"])
def test_the_file_holds_the_calibrated_network_and_the_table_its_scores(plan, trained, tmp_path, capsys, what):
    checkpoint, out = tmp_path / "trained.pt", tmp_path / "calibrated.pt"
    torch.save(trained.state_dict(), checkpoint)
    assert calibrate(checkpoint, out, "--what", what) == 0
    lines = capsys.readouterr().out.splitlines()

    model = plan.task.initial_model("convnet", 0, str(checkpoint))
    split = seed_data(plan).split
    mean, std = split.moments
    test = (split.test.images.float() - mean) / std
    before = evaluated(model, test, split.test.labels)
    # All 400 images in the order of the seed's first epoch, in batches of 4.
    reference = wellcond.calibrate(model, list(seed_data(plan).batches()), batch_size=M, what=what)
    written = torch.load(out, weights_only=True)
    assert written.keys() == reference.state_dict().keys()

    loaded = plan.task.initial_model("convnet", 1, None)
    if what != "bn":
        loaded = wellcond.nn.convert_norm(loaded, what)
    loaded.load_state_dict(written)
    after = evaluated(loaded, test, split.test.labels)
    assert after != before
    (row,) = (line.split() for line in lines if line.startswith("399 test"))
    assert row[2:7] == [f"{before[0]:.2f}", f"{after[0]:.2f}", f"{after[0] - before[0]:+.2f}"] + [
        f"{loss:.4g}" for loss in (before[1], after[1])
    ]
    assert any(line.startswith("398 validation") for line in lines)
    assert f"from 400 training images in batches of {M}" in "\n".join(lines)
    for name, parameter in trained.named_parameters():
        assert torch.equal(written[name], parameter)


@pytest.mark.parametrize("wrap", [lambda state: {"state_dict": state}, lambda state: {"model": state}])
def test_a_checkpoint_may_hold_the_state_dict_under_a_key(trained, tmp_path, wrap):
    torch.save(wrap(trained.state_dict()), tmp_path / "trained.pt")
    assert calibrate(tmp_path / "trained.pt", tmp_path / "out.pt", "--what", "bn") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "1"], "--batch-size must be at least 2"),
        (["--seed", "-1"], "--seed must be 0 or more, got -1"),
        (["--model", "resnet8"], "is of another network"),
        (["--out", "nowhere/out.pt"], "there is no folder nowhere"),
        (["--out", "trained.pt"], "would write over the checkpoint"),
        (["--what", "ema"], "--what"),
    ],
)
def test_mistakes_are_one_line(trained, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    torch.save(trained.state_dict(), "trained.pt")
    assert calibrate("trained.pt", "out.pt", "--what", "bsr", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("wellcond: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_checkpoint_that_is_not_there_is_named(tmp_path, capsys):
    assert calibrate(tmp_path / "gone.pt", tmp_path / "out.pt", "--what", "bn") == 2
    assert capsys.readouterr().err == f"wellcond: error: there is no checkpoint {tmp_path / 'gone.pt'}\n"


def test_without_a_batch_size_the_statistics_are_those_of_all_images_or_of_some(plan, trained, tmp_path, capsys):
    torch.save(trained.state_dict(), tmp_path / "trained.pt")
    files = ["--model", "convnet", "--train-images", "400", "--out", str(tmp_path / "out.pt")]
    assert main(["calibrate", str(tmp_path / "trained.pt"), *files, "--what", "bn", "--samples", "100"]) == 0
    assert "bn for convnet on digits, from 100 training images\n" in capsys.readouterr().out
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    images = torch.cat([images for images, _ in seed_data(plan).batches()])[:100]
    first = F.conv2d(images, written["0.0.weight"], padding=1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(written["0.1.running_mean"], first.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(written["0.1.running_var"], first.var(1), rtol=1e-4, atol=1e-5)
    for options, message in (
        (["--what", "bsr"], "--what bsr needs --batch-size"),
        (["--what", "bn", "--samples", "0"], "--samples must be a positive integer, got 0"),
        (["--what", "bn", "--until", "0"], "--until must be positive, such as 0.01, got 0"),
    ):
        assert main(["calibrate", str(tmp_path / "trained.pt"), *files, *options]) == 2
        assert message in capsys.readouterr().err
