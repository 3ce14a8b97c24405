"""Whatever fails within `attach`, model and optimizer are as they were: each step of it is made to fail in turn."""

from __future__ import annotations

import copy
import gc
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond
from wellcond import FeatureWhitening, GradientCentralization

CHAIN = (GradientCentralization(), FeatureWhitening(stats_every=1, solve_every=1))


class Stop(BaseException):
    """No exception that anybody catches."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def pair(loaded: bool) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Return a model and its optimizer; with state of an earlier attachment in it, as after a resume."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if loaded:
        handle = wellcond.attach(optimizer, model, *CHAIN)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        handle.remove()
        optimizer.load_state_dict(state)
        model.zero_grad()
    return model, optimizer


def contents(thing: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in vars(thing).items():
        found[key] = list(value) if isinstance(value, dict) else id(value)
    return found


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    state = {
        id(key): {name: value.clone() if isinstance(value, Tensor) else value for name, value in entry.items()}
        for key, entry in optimizer.state.items()
    }
    return [contents(optimizer), [contents(module) for module in model.modules()]], state


def assert_same_state(before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]]) -> None:
    assert before.keys() == after.keys()
    for key, entry in before.items():
        assert entry.keys() == after[key].keys()
        for name, value in entry.items():
            assert torch.equal(value, after[key][name]) if isinstance(value, Tensor) else value == after[key][name]


def calls_within_attach(loaded: bool) -> int:
    """Count the calls of functions of ours, and of torch's that change a model or an optimizer, that attach makes."""
    wellcond.attach(*reversed(pair(loaded)), *CHAIN)  # what is done once only
    model, optimizer = pair(loaded)
    with _Stopping(sys.maxsize) as counter:
        wellcond.attach(optimizer, model, *CHAIN)
    return counter.calls


class _Stopping:
    """Raises at the n-th call of one of our functions, as a profiler sees them."""

    def __init__(self, at: int) -> None:
        self.at, self.calls, self.name = at, 0, ""

    def __enter__(self) -> _Stopping:
        gc.disable()  # nothing can be raised in what the collector calls
        sys.setprofile(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        gc.enable()

    def _called(self, frame: types.FrameType, event: str, argument: Any) -> None:
        name = frame.f_globals.get("__name__", "")
        registers = frame.f_code.co_name.startswith("register_") and name.startswith("torch.")
        ours = name.startswith("wellcond.") and frame.f_code.co_name not in ("_take_off", "remove", "restore")
        # By its return `attach` is done, and so is what it constructs.
        done = event == "return" and (registers or frame.f_code.co_name in ("attach", "__init__"))
        done |= frame.f_code.co_name == "<genexpr>"  # which is closed by the collector, where nothing can be raised
        if event in ("call", "return") and (ours or registers) and not done:
            self.calls += 1
            if self.calls == self.at:
                sys.setprofile(None)
                self.name = frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name
                raise Stop(f"{event} {self.name}")


def every_call() -> Iterator[tuple[bool, int]]:
    for loaded in (False, True):
        # Each call and each return: some 2000, of which a spread is tried, and all the last, where things are changed.
        count = calls_within_attach(loaded)
        yield from ((loaded, at) for at in {*range(1, count, 23), *range(max(1, count - 160), count + 1)})


def test_attach_that_fails_anywhere_leaves_everything_as_it_was() -> None:
    stopped = set()
    for loaded, at in every_call():
        model, optimizer = pair(loaded)
        before, state = snapshot(model, optimizer)
        with _Stopping(at) as stopping:
            try:
                wellcond.attach(optimizer, model, *CHAIN)
            except Stop as error:
                stopped.add(str(error))
        if not stopping.name:
            continue  # a few calls are made once only
        after, state_after = snapshot(model, optimizer)
        assert after == before, stopping.name
        assert_same_state(state, state_after)
    places = " ".join(stopped)
    for name in ("register_step_pre_hook", "register_load_state_dict_post_hook", "install", "show"):
        assert name in places, f"{name} was not among what was made to fail"


def test_a_warning_that_is_made_an_error_leaves_nothing_either() -> None:
    model, optimizer = pair(False)
    before, _ = snapshot(model, optimizer)
    with pytest.raises(wellcond.WellcondWarning, match="covers none"):
        wellcond.attach(optimizer, model, FeatureWhitening(), GradientCentralization("conv"))
    assert snapshot(model, optimizer)[0] == before
