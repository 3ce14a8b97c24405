"""The lr at given steps, from the formulas; epochs become steps exactly."""

from __future__ import annotations

import math

import pytest
import torch

from wellcond.lab.errors import LabError
from wellcond.lab.methods.schedule import parse_schedule


def lrs(text, epochs, steps, warmup=0.0, lr=0.4):
    """Return the lr of each step as torch's scheduler sets it, two steps beyond the end included."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = parse_schedule(text).scheduler(optimizer, epochs, steps, warmup)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_cosine_goes_from_the_lr_to_zero():
    expected = [0.4 * 0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    assert lrs("cosine", epochs=4, steps=20) == pytest.approx(expected, rel=1e-12)


def test_constant_stays():
    assert lrs("constant", epochs=4, steps=20) == [0.4] * 20


def test_step_multiplies_at_the_first_step_of_every_so_many_epochs():
    # 7 epochs of 5 steps: the lr changes at the beginning of epochs 2, 4 and 6.
    expected = [0.4 * 0.1 ** (step // 10) for step in range(35)]
    assert lrs("step:2,0.1", epochs=7, steps=35) == pytest.approx(expected, rel=1e-12)


def test_steps_multiplies_at_each_epoch_named():
    expected = [0.4] * 15 + [0.08] * 10 + [0.016] * 10
    assert lrs("steps:3,5,0.2", epochs=7, steps=35) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("text", "epochs"), [("step:60,0.1", 200), ("steps:30,60,90,0.1", 100), ("step:7,0.5", 7)])
@pytest.mark.parametrize("steps_per_epoch", [1, 3, 390, 391, 10009])
def test_milestones_are_whole_epochs_exactly(text, epochs, steps_per_epoch):
    named = {"step:60,0.1": [60, 120, 180], "steps:30,60,90,0.1": [30, 60, 90], "step:7,0.5": []}[text]
    changes = parse_schedule(text).changes(epochs, epochs * steps_per_epoch)
    assert changes == [epoch * steps_per_epoch for epoch in named]


def test_a_shorter_run_has_the_whole_schedule():
    # At equal wall time a method has fewer steps: the lr falls at the same shares of them.
    assert parse_schedule("steps:30,60,0.1").changes(epochs=90, steps=300) == [100, 200]


def test_warmup_rises_linearly_and_the_cosine_follows():
    seen = lrs("cosine", epochs=4, steps=20, warmup=1)
    assert seen[:5] == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4])
    expected = [0.4 * 0.5 * (1 + math.cos(math.pi * step / 15)) for step in range(15)]
    assert seen[5:] == pytest.approx(expected, rel=1e-12)


def test_warmup_does_not_move_milestones():
    assert lrs("steps:2,0.1", epochs=4, steps=8, warmup=0.5) == pytest.approx([0.4] * 4 + [0.04] * 4)
    assert lrs("steps:2,0.1", epochs=4, steps=8, warmup=1) == pytest.approx([0.2] + [0.4] * 3 + [0.04] * 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("linear", "--schedule must be cosine, constant, step:EVERY,FACTOR or steps:EPOCH,...,FACTOR, got 'linear'"),
        ("cosine:3", "got 'cosine:3'"),
        ("step:60", "got 'step:60'"),
        ("step:30,60,0.1", "got 'step:30,60,0.1'"),
        ("steps:0.1", "got 'steps:0.1'"),
        ("step:x,0.1", "got 'step:x,0.1'"),
        ("steps:60,30,0.1", "--schedule steps:60,30,0.1: epochs must be positive and ascending"),
        ("step:0,0.1", "--schedule step:0,0.1: epochs must be positive and ascending"),
        ("step:5,0", "--schedule step:5,0: the factor must be above 0 and at most 1, got 0"),
        ("step:5,2", "--schedule step:5,2: the factor must be above 0 and at most 1, got 2"),
    ],
)
def test_mistakes(text, said):
    with pytest.raises(LabError) as caught:
        parse_schedule(text)
    assert str(caught.value).endswith(said)
