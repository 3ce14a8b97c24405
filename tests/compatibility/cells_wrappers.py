"""What wraps optimizers, gradients or weights: schedulers, loss scaling, averages, Lookahead, frameworks' wrappers."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import torch
from by_hand import assert_equal, batch, check_training, loss_of, net, plain_step, whitening
from cells import attach, cell
from torch import nn
from torch.optim import lr_scheduler, swa_utils

import wellcond

AREA = "Wrappers, schedulers, averages"
SAME = "weights after 3 steps against the plain optimizer on gradients changed by hand"


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return a plain optimizer."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 3),
    "SequentialLR of LinearLR and ExponentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [1]
    ),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
}


def scheduled(schedule: Callable[[Any], Any]) -> Callable[..., None]:
    """Return a step that moves a schedule on, which is made at the first."""
    schedules: dict[int, Any] = {}

    def step(model: nn.Module, optimizer: Any, index: int, change: Callable[[], None]) -> None:
        if index == 0:
            schedules[id(optimizer)] = schedule(optimizer)
        plain_step(model, optimizer, index, change)
        schedules[id(optimizer)].step()

    return step


for name, schedule in SCHEDULERS.items():
    cell(AREA, name, verified=SAME)(lambda schedule=schedule: check_training(sgd, scheduled(schedule)))


@cell(
    AREA,
    "GradScaler",
    verified="weights after 3 steps, one of them skipped for an overflow, against training without it",
)
def grad_scaler() -> None:
    results = []
    for scaled in (True, False):
        model = net()
        optimizer = sgd(model)
        attach(optimizer, model, whitening())
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(4):
            optimizer.zero_grad()
            loss = loss_of(model(batch(step)))
            if scaled:
                scaler.scale(loss).backward()
                if step == 3:
                    model[0].weight.grad[0, 0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
            elif step < 3:
                loss.backward()
                optimizer.step()
        results.append(list(model.parameters()))
    assert_equal(*results, 1e-9, "scaled")


def clipped(model: nn.Module, optimizer: Any, index: int, change: Callable[[], None]) -> None:
    """Clip before the step: the transform is behind the clipping."""
    optimizer.zero_grad()
    loss_of(model(batch(index))).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    change()
    optimizer.step()


cell(AREA, "clip_grad_norm_", verified=SAME)(lambda: check_training(sgd, clipped))


def accumulated(model: nn.Module, optimizer: Any, index: int, change: Callable[[], None]) -> None:
    """Add up the gradients of two halves of the batch."""
    optimizer.zero_grad()
    for part in batch(index).split([3, 5]):
        loss_of(model(part)).backward()
    change()
    optimizer.step()


cell(AREA, "gradient accumulation", verified=SAME + "; M is of all passes")(lambda: check_training(sgd, accumulated))


def averaged(make: Callable[[nn.Module], nn.Module]) -> None:
    """Update an average of the model after each step, and compare the averages."""
    averages: dict[int, nn.Module] = {}

    def step(model: nn.Module, optimizer: Any, index: int, change: Callable[[], None]) -> None:
        if index == 0:
            averages[id(model)] = make(model)
        plain_step(model, optimizer, index, change)
        average: Any = averages[id(model)]
        getattr(average, "update_parameters", getattr(average, "update", None))(model)
        # A pass of the average must not count as one of the model.
        average(batch(50)).sum().backward()

    check_training(sgd, step, after=lambda model, optimizer: averages[id(model)])


cell(AREA, "AveragedModel (SWA)", verified="the averages after 3 steps, as above")(
    lambda: averaged(swa_utils.AveragedModel)
)
cell(AREA, "AveragedModel with get_ema_multi_avg_fn (EMA)", verified="the averages after 3 steps, as above")(
    lambda: averaged(lambda model: swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5)))
)


@cell(AREA, "timm ModelEmaV3", verified="the averages after 3 steps, as above")
def timm_ema() -> None:
    from timm.utils import ModelEmaV3

    averaged(lambda model: ModelEmaV3(model, decay=0.5))


cell(AREA, "pytorch_optimizer Lookahead", verified=SAME)(
    lambda: check_training(lambda model: pytorch_optimizer.Lookahead(sgd(model), k=2))
)


@cell(AREA, "timm lookahead_sgd", verified=SAME)
def timm_lookahead() -> None:
    from timm.optim import create_optimizer_v2

    check_training(lambda model: create_optimizer_v2(model, opt="lookahead_sgd", lr=0.05, weight_decay=0.0))


cell(AREA, "Lookahead, attached to the inner optimizer", verified=SAME)(
    lambda: check_training(
        lambda model: pytorch_optimizer.Lookahead(sgd(model), k=2), attach_to=lambda wrapper: wrapper.optimizer
    )
)


@cell(
    AREA,
    "a state dict saved, loaded into new objects, continued",
    verified="weights against a run that was not stopped, bit for bit",
)
def resumed() -> None:
    def parts() -> tuple[nn.Module, Any]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        attach(optimizer, model, whitening(stats_every=2, solve_every=4, stats_decay=0.5))
        return model, optimizer

    (model, optimizer), (other, other_optimizer) = parts(), parts()
    for step in range(6):
        if step == 3:
            other.load_state_dict(copy.deepcopy(model.state_dict()))
            other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for each, each_optimizer in ((model, optimizer), (other, other_optimizer))[: 1 if step < 3 else 2]:
            plain_step(each, each_optimizer, step, lambda: None)
    assert_equal(other.parameters(), model.parameters(), 0.0, "resumed")


def copied(copy_of: Callable[[Any], Any]) -> str:
    """Copy model and optimizer together, and train the copy: a plain optimizer, which says so once."""
    model = net()
    optimizer = sgd(model)
    attach(optimizer, model, whitening())
    plain_step(model, optimizer, 0, lambda: None)
    other, other_optimizer = copy_of((model, optimizer))
    untransformed = net()
    untransformed.load_state_dict(model.state_dict())
    plain = sgd(untransformed)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always", wellcond.WellcondWarning)
        for index in (1, 2):
            plain_step(other, other_optimizer, index, lambda: None)
            plain_step(untransformed, plain, index, lambda: None)
    assert_equal(other.parameters(), untransformed.parameters(), 0.0, "the copy")
    (warning,) = record
    return str(warning.message)


for name, copy_of in {
    "copy.deepcopy of model and optimizer together": copy.deepcopy,
    "pickle of model and optimizer together": lambda pair: pickle.loads(pickle.dumps(pair)),
}.items():
    cell(AREA, name, "plain gradient", verified="the copy's weights after one more step, as without transforms")(
        lambda copy_of=copy_of: copied(copy_of)
    )
