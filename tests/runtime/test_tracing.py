"""What torch is doing now is found out in one place, and rightly in each state that a pass can be in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from wellcond.runtime import tracing
from wellcond.runtime.autocast import without_autocast

SOURCE = Path(tracing.__file__).parents[1]
ASKED = ("is_transformed", "is_recorded", "is_script_traced", "is_traced", "is_repeated", "may_be_repeated")


def state() -> set[str]:
    return {name for name in ASKED if getattr(tracing, name)()}


def seen_in_passes(reentrant: bool) -> list[set[str]]:
    seen = []

    def run(x: Tensor) -> Tensor:
        seen.append(state())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    checkpoint(run, x, use_reentrant=reentrant).sum().backward()
    return seen


def test_only_one_module_asks_torchs_private_parts():
    askers = [path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if "torch._C." in path.read_text()]
    assert askers == ["runtime/tracing.py"]


def test_an_ordinary_pass_is_in_no_state():
    assert state() == set()


def test_without_gradients_a_pass_may_be_one_that_is_repeated():
    with torch.no_grad():
        assert state() == {"may_be_repeated"}


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoints_second_pass_is_repeated(reentrant):
    first, second = seen_in_passes(reentrant)
    assert first == {"may_be_repeated"}
    assert "is_repeated" in second
    assert tracing.backward_number() == tracing.NO_BACKWARD


def test_a_function_transform_is_seen():
    seen = []
    torch.func.grad(lambda x: seen.append(state()) or x.sin())(torch.tensor(1.0))
    assert seen == [{"is_transformed", "is_recorded", "is_traced"}]


def test_a_trace_is_seen():
    seen = []
    torch.jit.trace(lambda x: seen.append(state()) or x.sin(), torch.ones(1), check_trace=False)
    assert {"is_script_traced", "is_traced"} <= seen[0]


def test_symbolic_values_are_seen():
    seen = []
    make_fx(lambda x: seen.append(state()) or x.sin(), tracing_mode="fake")(torch.ones(1))
    assert "is_traced" in seen[-1]


def test_a_compiler_records():
    compiled = torch.compile(lambda x: x + float(tracing.is_recorded()), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == 1.0


@pytest.mark.parametrize("kinds", [(), ("cpu",), ("meta",), ("cpu", "meta", "cpu")])
def test_autocast_is_off_within_and_back_on_after(kinds):
    with torch.autocast("cpu", torch.bfloat16):
        with without_autocast(*map(torch.device, kinds)):
            assert torch.is_autocast_enabled("cpu") == ("cpu" not in kinds)
        assert torch.is_autocast_enabled("cpu")
