"""Each outermost step transforms once, however an optimizer is built; copies step plainly, and say so."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import random
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond
from wellcond import FeatureWhitening, GradientCentralization
from wellcond.transforms import WellcondWarning, attachments

OBSERVING: dict[str, Any] = {"stats_every": 1, "solve_every": 1}


def net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return model(x * torch.tensor([1.0, 5.0, 1.0, 0.2], dtype=torch.float64) + 1).square().mean()


def overriding(base: type, how: str) -> type:
    """Derive a class whose step does what people's do around super().step()."""

    class Mine(base):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            if how == "keyword":
                return super().step(closure=closure)
            if how == "closure first" and closure is not None:
                with torch.enable_grad():
                    loss = closure()
                super().step()
                return loss
            if how == "stumbling":
                with contextlib.suppress(ZeroDivisionError):
                    super().step(None if closure is None else fail)
            return super().step(closure)

    return Mine


def fail() -> None:
    raise ZeroDivisionError


HOWS = ("plain", "keyword", "closure first")


def train(
    make: Callable[[Any], torch.optim.Optimizer],
    transforms: tuple[Any, ...],
    with_closure: bool,
    step_of: Callable[[torch.optim.Optimizer], Callable[..., Any]] = lambda optimizer: optimizer.step,
) -> tuple[list[Tensor], Any]:
    model = net()
    optimizer = make(model.parameters())
    handle = wellcond.attach(optimizer, model, *transforms)
    for step in range(5):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        if with_closure:
            step_of(optimizer)(closure)
        else:
            closure()
            step_of(optimizer)()
    return [p.detach().clone() for p in model.parameters()], handle


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_a_stack_of_classes_that_call_super_steps_once(seed: int, with_closure: bool) -> None:
    draw = random.Random(seed)
    base = draw.choice([torch.optim.SGD, torch.optim.AdamW])
    options = {"lr": 0.05, "weight_decay": 0.1}
    base([nn.Parameter(torch.zeros(1))], **options)  # torch hooks a class when its first object is made
    kind = base
    for _ in range(draw.randint(1, 4)):
        kind = overriding(kind, draw.choice(HOWS))
        if draw.random() < 0.5:
            kind([nn.Parameter(torch.zeros(1))], **options)
    transforms = draw.choice([(GradientCentralization(),), (GradientCentralization(), FeatureWhitening(**OBSERVING))])
    right, handle = train(lambda p: base(p, **options), transforms, with_closure)
    ours, its = train(lambda p: kind(p, **options), transforms, with_closure)
    for a, b in zip(right, ours, strict=True):
        assert torch.equal(a, b)
    assert its._slots[transforms[-1].name][0].state.get("step") == handle._slots[transforms[-1].name][0].state.get(
        "step"
    )


def test_an_inner_step_that_fails_and_is_caught_leaves_nothing_behind() -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    transforms = (GradientCentralization(where="update"), FeatureWhitening(**OBSERVING))
    right, _ = train(lambda p: torch.optim.SGD(p, lr=0.05), transforms, True)
    ours, _ = train(lambda p: overriding(torch.optim.SGD, "stumbling")(p, lr=0.05), transforms, True)
    for a, b in zip(right, ours, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [torch.optim.SGD, overriding(torch.optim.SGD, "plain")])
def test_a_step_after_one_that_failed_is_transformed(kind: Any) -> None:
    """As after a batch that ran out of memory and was skipped."""
    models = [net(), net()]
    for model, failing in zip(models, (True, False), strict=True):
        optimizer = kind(model.parameters(), lr=0.1)
        wellcond.attach(optimizer, model, GradientCentralization())
        if failing:
            with pytest.raises(ZeroDivisionError):
                optimizer.step(fail)
        loss_of(model, 0).backward()
        optimizer.step()
    assert torch.equal(models[0].weight, models[1].weight)
    assert float(models[0].weight.grad.sum(dim=1).abs().max()) < 1e-12


def wrapped_as_schedulers_do(optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    return optimizer.step


def patched_on_the_object(optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    if "step" not in vars(optimizer):
        step = type(optimizer).step

        @functools.wraps(step)
        def patched(self: Any, closure: Any = None) -> Any:
            return step(self, closure)

        optimizer.step = types.MethodType(patched, optimizer)  # type: ignore[method-assign]
    return optimizer.step


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("step_of", [wrapped_as_schedulers_do, patched_on_the_object])
def test_a_step_that_was_patched_on_the_object(step_of: Any, with_closure: bool) -> None:
    transforms = (GradientCentralization(), FeatureWhitening(**OBSERVING))
    right, _ = train(lambda p: torch.optim.SGD(p, lr=0.05), transforms, with_closure)
    ours, _ = train(lambda p: torch.optim.SGD(p, lr=0.05), transforms, with_closure, step_of)
    for a, b in zip(right, ours, strict=True):
        assert torch.equal(a, b)


# copies -------------------------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
}


def attached(kind: Any = torch.optim.AdamW) -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = net()
    optimizer = kind(model.parameters(), lr=0.05)
    wellcond.attach(optimizer, model, FeatureWhitening(**OBSERVING))
    go_on(model, optimizer, range(3))
    return model, optimizer


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


class CopiesItAll(torch.optim.AdamW):
    """Some classes copy their whole __dict__."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, CopiesItAll])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_steps_plainly_says_so_once_and_leaves_the_original_alone(how: str, kind: Any) -> None:
    model, optimizer = attached(kind)
    reference, its = attached(kind)
    other, copied = COPIES[how]((model, optimizer))
    assert attachments(copied) == []
    plain = copy.deepcopy(model)
    bare = torch.optim.AdamW(plain.parameters(), lr=0.05)
    bare.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.warns(WellcondWarning, match=f"this {kind.__name__} is a copy of one to which whitening is attached"):
        go_on(other, copied, range(3, 4))
    go_on(other, copied, range(4, 6))
    go_on(plain, bare, range(3, 6))
    assert torch.equal(other.weight, plain.weight)
    assert not any("wellcond" in key for entry in copied.state.values() for key in entry)
    go_on(model, optimizer, range(3, 6))
    go_on(reference, its, range(3, 6))
    assert torch.equal(model.weight, reference.weight)


@pytest.mark.parametrize("how", COPIES)
def test_attaching_to_a_copy_goes_on_where_the_original_was(how: str) -> None:
    model, optimizer = attached()
    other, copied = COPIES[how]((model, optimizer))
    wellcond.attach(copied, other, FeatureWhitening(**OBSERVING))
    go_on(model, optimizer, range(3, 8))
    go_on(other, copied, range(3, 8))
    assert torch.equal(model.weight, other.weight)


def test_a_shallow_copy_does_not_transform_nor_break_the_original() -> None:
    model, optimizer = attached()
    reference, its = attached()
    shallow = copy.copy(optimizer)
    with pytest.warns(WellcondWarning, match="is a copy of one"):
        go_on(model, shallow, range(3, 4))
    with torch.no_grad():
        model.load_state_dict(reference.state_dict())
    optimizer.load_state_dict(copy.deepcopy(its.state_dict()))
    go_on(model, optimizer, range(3, 5))
    go_on(reference, its, range(3, 5))
    assert torch.equal(model.weight, reference.weight)


def test_after_remove_copies_are_plain_and_silent() -> None:
    model, optimizer = attached()
    attachments(optimizer)[0].remove()
    other, copied = copy.deepcopy((model, optimizer))
    go_on(other, copied, range(3, 5))
    assert vars(copied).keys() == vars(copy.deepcopy(torch.optim.AdamW(net().parameters()))).keys()


# states that are loaded in an optimizer's own way -------------------------------------------------------------------


class OwnLoading(torch.optim.AdamW):
    """Loads as bitsandbytes does: torch's hooks are not run."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        state = {parameters[index]: copy.deepcopy(entry) for index, entry in state_dict["state"].items()}
        self.__setstate__({"state": state, "param_groups": self.param_groups})


class InPlaceLoading(OwnLoading):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, entry in state_dict["state"].items():
            self.state[parameters[index]] = copy.deepcopy(entry)


@pytest.mark.parametrize("trained_before", [False, True])
@pytest.mark.parametrize("kind", [OwnLoading, InPlaceLoading])
def test_a_state_that_was_loaded_without_torchs_hooks_is_taken_up(kind: Any, trained_before: bool) -> None:
    model, optimizer = attached(kind)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    go_on(model, optimizer, range(3, 8))
    resumed = net()
    theirs = kind(resumed.parameters(), lr=0.05)
    wellcond.attach(theirs, resumed, FeatureWhitening(**OBSERVING))
    if trained_before:
        go_on(resumed, theirs, range(20, 23))
    resumed.load_state_dict(saved[0])
    theirs.load_state_dict(saved[1])
    go_on(resumed, theirs, range(3, 8))
    assert torch.equal(model.weight, resumed.weight)


def test_a_plain_state_that_was_loaded_without_torchs_hooks_has_statistics_start_anew() -> None:
    model, optimizer = attached(OwnLoading)
    plain = torch.optim.AdamW(model.parameters(), lr=0.05)
    go_on(model, plain, range(3))
    optimizer.load_state_dict(plain.state_dict())
    with pytest.warns(WellcondWarning, match="no statistics of whitening for 1 of the weights"):
        go_on(model, optimizer, range(3, 4))
    assert optimizer.state[model.weight]["wellcond_whitening_step"] == 1


def test_a_state_that_was_cleared_or_moved_changes_nothing_of_ours() -> None:
    model, optimizer = attached()
    before = optimizer.state[model.weight]["wellcond_whitening_step"]
    for entry in optimizer.state.values():  # as Lightning moves it to a device
        entry.update({key: value.clone() for key, value in entry.items() if isinstance(value, Tensor)})
    go_on(model, optimizer, range(3, 4))
    optimizer.state.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go_on(model, optimizer, range(4, 5))
    assert optimizer.state[model.weight]["wellcond_whitening_step"] == before + 2
