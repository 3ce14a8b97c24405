"""States of a model: modes, frozen parts, compiled, copied, checkpointed, moved, changed after attaching."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from by_hand import ByHand, assert_equal, batch, check_training, loss_of, net, plain_step, whitening
from cells import attach, cell, reason_of
from torch import nn
from torch.utils.checkpoint import checkpoint

AREA = "States of a model"
SAME = "weights after 3 steps against the plain optimizer on gradients changed by hand"
UNTOUCHED = "weights after 2 more steps, as without it"


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return a plain optimizer."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@cell(
    AREA,
    "training in evaluation mode",
    verified=SAME,
)
def evaluation() -> None:
    model, other = net(), net()
    optimizer, plain = sgd(model), sgd(other)
    attach(optimizer, model, whitening())
    hand = ByHand(other)
    for index in range(3):
        model.train(index == 0)
        plain_step(model, optimizer, index, lambda: None)
        plain_step(other, plain, index, hand.change_gradients)
    assert_equal(model.parameters(), other.parameters(), 1e-7, "in evaluation mode")


def untouched(between: Callable[[nn.Module, Any], None]) -> None:
    """What is done between two steps changes nothing of the training."""
    results = []
    for done in (True, False):
        model = net()
        optimizer = sgd(model)
        attach(optimizer, model, whitening(stats_every=2, solve_every=2, stats_decay=0.5))
        for index in range(4):
            plain_step(model, optimizer, index, lambda: None)
            if done and index == 1:
                between(model, optimizer)
        results.append(list(model.parameters()))
    assert_equal(*results, 0.0, "training")


def train_copy(model: nn.Module, optimizer: Any) -> None:
    """Train a deep copy with its own optimizer."""
    other = copy.deepcopy(model)
    plain_step(other, sgd(other), 7, lambda: None)


def no_grad_passes(model: nn.Module, optimizer: Any) -> None:
    """Validate in both modes."""
    with torch.no_grad():
        model(100 * batch(7))
        model.eval()(100 * batch(8))
    model.train()


def logged_pass(model: nn.Module, optimizer: Any) -> None:
    """Do a pass whose output is only looked at: no gradient comes of it."""
    model(100 * batch(7)).detach().norm()


def export(model: nn.Module, optimizer: Any) -> None:
    """Export the model, and compare the program's output."""
    program = torch.export.export(model, (batch(7),))
    assert_equal([program.module()(batch(7))], [model(batch(7)).detach()], 1e-12, "the exported program")
    model.zero_grad()


def trace(model: nn.Module, optimizer: Any) -> None:
    """Trace the model with torch.jit, and compare."""
    with torch.no_grad():
        traced = torch.jit.trace(model, batch(7), check_trace=False)
        assert_equal([traced(batch(7))], [model(batch(7))], 1e-12, "the traced model")


def fx(model: nn.Module, optimizer: Any) -> None:
    """Trace the model with torch.fx, and compare."""
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        assert_equal([traced(batch(7))], [model(batch(7))], 1e-12, "the traced model")


def functional(model: nn.Module, optimizer: Any) -> None:
    """Take gradients with torch.func."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.grad(lambda values: loss_of(torch.func.functional_call(model, values, (100 * batch(7),))))(weights)


def unpickled(model: nn.Module, optimizer: Any) -> None:
    """Pickle the model, and train what comes back."""
    other = pickle.loads(pickle.dumps(model))
    plain_step(other, sgd(other), 7, lambda: None)


for name, between in {
    "a deep copy that is trained beside it": train_copy,
    "a pickled copy that is trained beside it": unpickled,
    "validation passes between steps": no_grad_passes,
    "a training-mode pass whose gradient is dropped": logged_pass,
    "torch.export of the attached model": export,
    "torch.jit.trace of the attached model": trace,
    "torch.fx of the attached model": fx,
    "torch.func.grad through the attached model": functional,
}.items():
    cell(AREA, name, verified=UNTOUCHED)(lambda between=between: untouched(between))


@cell(
    AREA,
    "the generator's step through a frozen or ignored discriminator",
    verified="the discriminator's weights against training with its own passes alone",
)
def adversarial() -> None:
    results = []
    for both in (True, False):
        model = net()
        optimizer = sgd(model)
        attach(optimizer, model, whitening())
        for index in range(3):
            if both:
                # Another optimizer's step goes through the model; the gradients that it leaves are thrown away.
                x = (50 * batch(20 + index)).requires_grad_()
                torch.autograd.grad(loss_of(model(x)), x)
            plain_step(model, optimizer, index, lambda: None)
        results.append(list(model.parameters()))
    assert_equal(*results, 1e-9, "the discriminator")


def freeze(model: nn.Module, frozen: bool = True) -> nn.Module:
    """Freeze the first layer, or train it."""
    for parameter in model[0].parameters():
        parameter.requires_grad_(not frozen)
    return model


@cell(AREA, "frozen weights", "plain gradient", verified=SAME + "; no state is kept for them")
def frozen() -> str:
    models = [freeze(net()), freeze(net())]
    optimizers = [sgd(model) for model in models]
    handle = attach(optimizers[0], models[0], whitening())
    hand = ByHand(models[1])
    for index in range(3):
        plain_step(models[0], optimizers[0], index, lambda: None)
        plain_step(models[1], optimizers[1], index, hand.change_gradients)
    assert_equal(models[0].parameters(), models[1].parameters(), 1e-7, "frozen")
    state = optimizers[0].state.get(models[0][0].weight, {})
    assert not any(str(key).startswith("wellcond_") for key in state), "state is kept for a frozen weight"
    return reason_of(handle, "0.weight")


@cell(AREA, "weights frozen at first, trained later", verified=SAME + ", from their first or second step on")
def trained_later() -> None:
    from_its_first_or_second_step(
        lambda model: sgd(freeze(model)), lambda model, optimizer: freeze(model, False) and None, new=0
    )


def compiled(before: bool) -> None:
    """Compile before or after attaching; by the back end that only captures."""
    model, other = net(), net()
    optimizer, plain = sgd(model), sgd(other)
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager") if before else None
    attach(optimizer, run if before else model, whitening())
    run = run or torch.compile(model, backend="eager")
    hand = ByHand(other)
    for index in range(3):
        plain_step(run, optimizer, index, lambda: None)
        plain_step(other, plain, index, hand.change_gradients)
    assert_equal(model.parameters(), other.parameters(), 1e-7, "compiled")


cell(AREA, "torch.compile before attaching", verified=SAME)(lambda: compiled(True))
cell(AREA, "torch.compile after attaching", verified=SAME)(lambda: compiled(False))


def checkpointed(reentrant: bool) -> None:
    """Recompute activations in the backward pass: each sample counts once."""

    def step(model: nn.Module, optimizer: Any, index: int, change: Callable[[], None]) -> None:
        optimizer.zero_grad()
        x = batch(index).requires_grad_(reentrant)
        if "_note" in str(model[0]._forward_pre_hooks):
            loss_of(model(x)).backward()  # by hand without recomputation
        else:
            loss_of(checkpoint(model, x, use_reentrant=reentrant)).backward()
        change()
        optimizer.step()

    check_training(sgd, step, techniques=("whitening",))


cell(AREA, "activation checkpointing", verified=SAME)(lambda: checkpointed(False))
cell(AREA, "activation checkpointing (use_reentrant=True)", verified=SAME)(lambda: checkpointed(True))


def cast(change: Callable[[nn.Module], Any], start: torch.dtype, tolerance: float) -> None:
    """Cast the model after attaching, before the first step."""
    model, other = net(dtype=start), net()
    optimizer, plain = sgd(model), sgd(other)
    attach(optimizer, model, whitening())
    previous = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        change(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(previous)
    hand = ByHand(other)
    for index in range(3):
        optimizer.zero_grad()
        loss_of(model(batch(index).to(model[0].weight.dtype)).double()).backward()
        optimizer.step()
        plain_step(other, plain, index, hand.change_gradients)
    assert_equal([p.detach().double() for p in model.parameters()], other.parameters(), tolerance, "cast")


cell(AREA, "cast to float64 after attaching", verified=SAME)(lambda: cast(nn.Module.double, torch.float32, 1e-5))
cell(AREA, "cast to bfloat16 after attaching", verified=SAME + ", to 10 %")(
    lambda: cast(nn.Module.bfloat16, torch.float32, 0.1)
)


@cell(AREA, "made on the meta device, attached, then materialized", verified=SAME)
def materialized() -> None:
    other = net()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer, plain = sgd(model), sgd(other)
    attach(optimizer, model, whitening())
    previous = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(previous)
    model.load_state_dict(other.state_dict())
    hand = ByHand(other)
    for index in range(3):
        plain_step(model, optimizer, index, lambda: None)
        plain_step(other, plain, index, hand.change_gradients)
    assert_equal(model.parameters(), other.parameters(), 1e-7, "materialized")


@cell(AREA, "a group added during training", verified=SAME + ", from the group's first or second step on")
def added_group() -> None:
    def changed(model: nn.Module, optimizer: Any) -> None:
        optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.01})

    from_its_first_or_second_step(lambda model: torch.optim.SGD(model[0].parameters(), lr=0.05), changed)


def from_its_first_or_second_step(
    make: Callable[[nn.Module], Any], change: Callable[[nn.Module, Any], None], new: int = 1
) -> None:
    """Change what trains before the second step: the new layer is as by hand at once, or after one plain step."""
    model = net()
    optimizer = make(model)
    attach(optimizer, model, whitening())
    for index in range(4):
        if index == 1:
            change(model, optimizer)
        plain_step(model, optimizer, index, lambda: None)
    problems = []
    for late in (False, True):
        other = net()
        plain = make(other)
        hand = ByHand(other)
        for index in range(4):
            if index == 1:
                change(other, plain)
                hand = ByHand(other)
                if late:
                    del hand.layers[new]
            if index == 2:
                hand = ByHand(other)
            plain_step(other, plain, index, hand.change_gradients)
        try:
            assert_equal(model.parameters(), other.parameters(), 1e-7, "with other parameters")
        except AssertionError as error:
            problems.append(error)
    if len(problems) == 2:
        raise problems[0]


@cell(
    AREA,
    "a group removed during training",
    verified="the removed weights stay and hold no state; the others as by hand",
)
def removed_group() -> None:
    models = [net(), net()]
    optimizers = [
        torch.optim.SGD([{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}], lr=0.05)
        for model in models
    ]
    handle = attach(optimizers[0], models[0], whitening())
    hand = ByHand(models[1])
    for index in range(3):
        for number, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            if index == 1:
                for parameter in optimizer.param_groups.pop()["params"]:
                    optimizer.state.pop(parameter, None)
            plain_step(model, optimizer, index, hand.change_gradients if number else lambda: None)
    assert_equal(models[0].parameters(), models[1].parameters(), 1e-7, "with a group removed")
    assert models[0][2].weight not in optimizers[0].state, "state is written for a weight that left"
    assert handle.stats()["whitening"]["weights"] == 1, handle.stats()
    reason_of(handle, "2.weight")


@cell(
    AREA,
    "a new head in the place of the old one",
    verified=SAME + ", from its first or second step on",
)
def new_head() -> None:
    def changed(model: nn.Module, optimizer: Any) -> None:
        model[2] = net()[2]
        optimizer.param_groups[0]["params"][2:] = model[2].parameters()

    from_its_first_or_second_step(sgd, changed)


@cell(AREA, "a layer unused in a step", verified=SAME)
def unused() -> None:
    def step(model: nn.Module, optimizer: Any, index: int, change: Callable[[], None]) -> None:
        optimizer.zero_grad()
        x = batch(index)
        output = model(x) if index != 1 else model[0](x)[:, :3]
        loss_of(output).backward()
        change()
        optimizer.step()

    models = [net(), net()]
    optimizers = [sgd(model) for model in models]
    attach(optimizers[0], models[0], whitening())
    hand = ByHand(models[1])
    for index in range(3):
        step(models[0], optimizers[0], index, lambda: None)
        step(models[1], optimizers[1], index, hand.change_gradients)
    assert_equal(models[0].parameters(), models[1].parameters(), 1e-7, "with a layer unused")


@cell(
    AREA,
    "handle.remove()",
    verified="weights after 2 more steps against the plain optimizer; no hook and no state is left",
)
def removed() -> None:
    model = net()
    optimizer = sgd(model)
    handle = attach(optimizer, model, whitening())
    plain_step(model, optimizer, 0, lambda: None)
    handle.remove()
    other = net()
    other.load_state_dict(model.state_dict())
    plain = sgd(other)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for index in (1, 2):
        plain_step(model, optimizer, index, lambda: None)
        plain_step(other, plain, index, lambda: None)
    assert_equal(model.parameters(), other.parameters(), 0.0, "after remove()")
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(str(key).startswith("wellcond_") for state in optimizer.state.values() for key in state)
