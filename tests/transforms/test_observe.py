"""Which rows count: those behind the gradient that a weight has when the optimizer steps."""

from __future__ import annotations

import copy
import functools
import gc
import io
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import wellcond
from wellcond import FeatureWhitening, WellcondWarning
from wellcond.layouts import LinearLayout, register_layout
from wellcond.transforms.arrivals import LayerCall

EVERY_STEP: dict[str, Any] = {"stats_every": 1, "solve_every": 1, "stats_decay": 0.0}
FLOAT64 = torch.float64


class Net(nn.Module):
    """Two layers; the second may be called twice in one pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 3, bias=False, dtype=FLOAT64)
        self.second = nn.Linear(3, 3, bias=False, dtype=FLOAT64)
        self.drop = nn.Dropout(0.5)
        self.twice = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x).tanh())
        return self.second(h.sin()) if self.twice else h


class Program:
    """Runs passes of a model and keeps, by the formula, the rows behind the gradient that is there."""

    def __init__(self, seed: int) -> None:
        self.net = Net()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.0)
        self.handle = wellcond.attach(self.optimizer, self.net, FeatureWhitening(**EVERY_STEP))
        self.generator = torch.Generator().manual_seed(seed)
        self.scale = 1.0
        self.rows: dict[str, list[Tensor]] = {"first": [], "second": []}

    def inputs(self) -> Tensor:
        size = int(torch.randint(1, 4, (), generator=self.generator))
        return torch.randn(size, 4, dtype=FLOAT64, generator=self.generator).requires_grad_()

    @torch.no_grad()
    def counts(self, x: Tensor) -> None:
        x = x * self.scale
        h = (x @ self.net.first.weight.mT).tanh()
        self.rows["first"].append(x)
        self.rows["second"].append(h)
        if self.net.twice:
            self.rows["second"].append((h @ self.net.second.weight.mT).sin())

    def train(self) -> None:
        x = self.inputs()
        self.net.train()
        self.net(x).square().sum().backward()
        self.counts(x)

    def train_in_eval_mode(self) -> None:
        x = self.inputs()
        self.net.eval()
        self.net(x).square().sum().backward()
        self.counts(x)

    def two_calls_of_the_second_layer(self) -> None:
        self.net.twice = True
        self.train()
        self.net.twice = False

    def retained(self) -> None:
        x = self.inputs()
        loss = self.net(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        self.counts(x)

    def checkpointed(self, reentrant: bool, offloaded: bool) -> None:
        x = self.inputs()
        with torch.autograd.graph.save_on_cpu() if offloaded else torch.enable_grad():
            checkpoint(self.net, x, use_reentrant=reentrant).square().sum().backward()
        self.counts(x)

    def selectively_checkpointed(self) -> None:
        x = self.inputs()
        saved = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
        checkpoint(self.net, x, use_reentrant=False, context_fn=saved).square().sum().backward()
        self.counts(x)

    def without_gradients(self) -> None:
        with torch.no_grad():
            self.net(self.inputs())
        with torch.inference_mode():
            self.net(self.inputs().detach())

    def logged(self) -> None:
        self.net(self.inputs())

    def identity_that_is_detached(self) -> None:
        norm = self.net.first(torch.eye(4, dtype=FLOAT64)).norm(dim=0).detach()
        x = self.inputs()
        (self.net(x) * norm.sum()).square().sum().backward()
        self.counts(x)

    def gradient_of_the_input(self) -> None:
        x = self.inputs()
        torch.autograd.grad(self.net(x).square().sum(), x)

    def copied(self) -> None:
        copy.deepcopy(self.net)(self.inputs()).square().sum().backward()

    def empty_batch(self) -> None:
        self.net(self.inputs()[:0]).square().sum().backward()

    def zero_grad(self, set_to_none: bool) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)
        self.rows = {"first": [], "second": []}

    def hook_that_changes_the_input(self) -> None:
        self.scale *= 2.0
        self.net.first.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))

    def step(self) -> None:
        before = {name: self.moment(name) for name in self.rows}
        self.optimizer.step()
        for name, rows in self.rows.items():
            weight = getattr(self.net, name).weight
            if rows:
                x = torch.cat(rows)
                torch.testing.assert_close(self.moment(name), x.mT @ x / len(x), rtol=1e-10, atol=1e-12)
            elif weight.grad is None:
                assert before[name] is None or torch.equal(self.moment(name), before[name])
        self.optimizer.zero_grad()
        self.rows = {"first": [], "second": []}

    def moment(self, name: str) -> Any:
        state = self.optimizer.state.get(getattr(self.net, name).weight, {})
        found = state.get("wellcond_whitening_second_moment")
        return None if found is None else found[0].clone()


ACTIONS: dict[str, Callable[[Program], None]] = {
    "train": Program.train,
    "train in eval mode": Program.train_in_eval_mode,
    "two calls": Program.two_calls_of_the_second_layer,
    "retained": Program.retained,
    "checkpoint": lambda program: program.checkpointed(False, False),
    "reentrant checkpoint": lambda program: program.checkpointed(True, False),
    "selective checkpoint": Program.selectively_checkpointed,
    "offloaded checkpoint": lambda program: program.checkpointed(False, True),
    "offloaded reentrant checkpoint": lambda program: program.checkpointed(True, True),
    "no_grad": Program.without_gradients,
    "logged": Program.logged,
    "detached identity": Program.identity_that_is_detached,
    "gradient of the input": Program.gradient_of_the_input,
    "copied": Program.copied,
    "empty": Program.empty_batch,
    "zero_grad": lambda program: program.zero_grad(True),
    "zero_grad to zeros": lambda program: program.zero_grad(False),
    "pre-hook": Program.hook_that_changes_the_input,
    "step": Program.step,
}


@settings(max_examples=60, deadline=None)
@example(seed=0, actions=["step", "empty", "step"])
@given(seed=st.integers(0, 99), actions=st.lists(st.sampled_from(list(ACTIONS)), min_size=1, max_size=9))
def test_rows_count_whose_gradient_arrives(seed: int, actions: list[str]) -> None:
    program = Program(seed)
    for action in [*actions, "train", "step"]:
        ACTIONS[action](program)


@pytest.mark.parametrize("action", list(ACTIONS))
def test_each_kind_of_pass_alone(action: str) -> None:
    program = Program(0)
    for each in (action, "step", "train", action, "step"):
        ACTIONS[each](program)


def test_gradients_put_there_by_hand_are_those_of_the_rows_that_autograd_was_asked_for() -> None:
    program = Program(0)
    parameters = list(program.net.parameters())
    for _ in range(2):
        x = program.inputs()
        program.gradient_of_the_input()
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(program.net(x).square().sum(), parameters), strict=True
        ):
            parameter.grad = gradient
        program.counts(x)
        program.step()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 6), (7, 4)),
    "linear, one row": (lambda: nn.Linear(4, 6), (4,)),
    "linear, 3 axes": (lambda: nn.Linear(4, 6), (2, 3, 4)),
    "linear, 4 axes": (lambda: nn.Linear(4, 6), (2, 1, 3, 4)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), (2, 3, 4)),
    "convolution": (lambda: nn.Conv2d(2, 6, 3), (2, 2, 5, 5)),
    "convolution of one image": (lambda: nn.Conv2d(2, 6, 3), (2, 5, 5)),
    "convolution of one signal": (lambda: nn.Conv1d(2, 6, 3), (2, 5)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(2, 6, 3), (2, 5, 5)),
}


def activated(y: Tensor, inplace: bool) -> Tensor:
    return nn.functional.relu(y, inplace=inplace)


def with_a_scaled_part(y: Tensor, inplace: bool) -> Tensor:
    if not inplace:
        return torch.cat([y[..., :2] * 0.5, y[..., 2:]], dim=-1)
    y[..., :2] *= 0.5
    return y


def activated_as_a_view(y: Tensor, inplace: bool) -> Tensor:
    nn.functional.relu(y.unsqueeze(0), inplace=True) if inplace else None
    return y if inplace else y.relu()


@pytest.mark.parametrize("change", [activated, with_a_scaled_part, activated_as_a_view])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_what_is_done_in_place_to_an_output_changes_nothing(
    kind: str, change: Callable[[Tensor, bool], Tensor]
) -> None:
    make, shape = LAYERS[kind]
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layer = make()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        wellcond.attach(optimizer, layer, FeatureWhitening(**EVERY_STEP))
        change(layer(torch.randn(shape)), inplace).square().sum().backward()
        optimizer.step()
        results.append((layer.weight.grad, optimizer.state[layer.weight]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(state["wellcond_whitening_updated_at"] == 0 for _, state in results)


def test_calls_that_lead_nowhere_hold_nothing_but_the_latest() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wellcond.attach(optimizer, net, FeatureWhitening())
    gc.collect()
    before = sum(type(found) is LayerCall for found in gc.get_objects())
    for _ in range(5):
        net(torch.randn(6, 4))
    assert sum(type(found) is LayerCall for found in gc.get_objects()) == before + 2  # one a layer, to look at
    del net, optimizer
    gc.collect()
    assert sum(type(found) is LayerCall for found in gc.get_objects()) == before


class Broken(nn.Linear):
    """A layer whose rule fails once it is told to."""


class BrokenLayout(LinearLayout):
    """Fails in one place."""

    place = ""

    def inputs(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.place == "inputs":
            raise KeyError("no such input")
        return super().inputs(module, args, kwargs)

    def rows(self, module: nn.Module, inputs: Tensor) -> Any:
        if self.place == "rows":
            raise RuntimeError("no such rows")
        return super().rows(module, inputs)


BROKEN = BrokenLayout()
register_layout(Broken, BROKEN)


@pytest.mark.parametrize("place", ["inputs", "rows"])
@pytest.mark.parametrize("size", [2, 200])
def test_what_fails_in_an_observation_never_raises_in_the_forward_pass(
    place: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Broken(3, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    handle = wellcond.attach(optimizer, net, FeatureWhitening(**EVERY_STEP))
    for step in range(4):
        monkeypatch.setattr(BROKEN, "place", place if step else "")
        optimizer.zero_grad()
        net(torch.randn(size, 4)).square().sum().backward()
        gradient = net[2].weight.grad.clone()
        if step == 1:
            with pytest.warns(
                WellcondWarning, match=rf"the input of '2\.weight' could not be observed \(.*no such {place[:4]}"
            ):
                optimizer.step()
        else:
            optimizer.step()
        assert torch.equal(net[2].weight.grad, gradient) == (step > 0)
    line = next(line for line in handle.report().splitlines() if line.startswith("2.weight"))
    assert "plain gradient: its input could not be observed" in line
    assert handle.stats()["whitening"]["weights"] == 1
    assert not any("wellcond" in str(key) for key in optimizer.state[net[2].weight])


def traced_by_jit(net: nn.Module, x: Tensor) -> str:
    return re.sub(r"\.___torch_mangle_\d+", "", str(torch.jit.trace(net, x, check_trace=False).graph))


def exported(net: nn.Module, x: Tensor) -> str:
    return str(torch.export.export(net, (x,)).graph)


def exported_strictly(net: nn.Module, x: Tensor) -> str:
    return str(torch.export.export(net, (x,), strict=True).graph)


def of_make_fx(net: nn.Module, x: Tensor) -> str:
    return make_fx(lambda x: net(x), tracing_mode="real")(x).code


def of_fake_tensors(net: nn.Module, x: Tensor) -> str:
    return make_fx(lambda x: net(x), tracing_mode="fake", _allow_non_fake_inputs=True)(x).code


def of_fx(net: nn.Module, x: Tensor) -> str:
    return torch.fx.symbolic_trace(net).code


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("trace", [traced_by_jit, exported, exported_strictly, of_make_fx, of_fake_tensors, of_fx])
def test_tracing_sees_no_hook_and_no_hook_sees_it(trace: Callable[[nn.Module, Tensor], str]) -> None:
    graphs = []
    for attach in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        if attach:
            wellcond.attach(optimizer, net, FeatureWhitening(**EVERY_STEP))
        graphs.append(trace(net, torch.randn(5, 4)))
    assert graphs[0] == graphs[1]
    x = torch.randn(6, 4)
    net(x).sum().backward()
    optimizer.step()
    rows = torch.cat([x, torch.ones(6, 1)], 1)
    torch.testing.assert_close(
        optimizer.state[net[0].weight]["wellcond_whitening_second_moment"][0], rows.mT @ rows / 6
    )


def test_a_model_can_be_copied_and_saved_between_forward_and_step() -> None:
    program = Program(0)
    program.train()
    file = io.BytesIO()
    torch.save(program.net, file)
    file.seek(0)
    for other in (copy.deepcopy(program.net), torch.load(file, weights_only=False)):
        other(program.inputs()).square().sum().backward()
    program.step()


# windows ------------------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """Layers of which some are frozen, never reached, or never called as modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.frozen, self.unused, self.inlined = (nn.Linear(4, 4) for _ in range(4))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(self.used(x))
        return nn.functional.linear(x, self.inlined.weight, self.inlined.bias)


@pytest.mark.filterwarnings("ignore:for 1 of")
def test_hooks_rest_where_nothing_is_due_or_can_come() -> None:
    net = Parts()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, net, FeatureWhitening(stats_every=50))
    for _ in range(40):
        optimizer.zero_grad()
        net(torch.randn(4, 4)).square().sum().backward()
        optimizer.step()
    assert not net.used._forward_hooks
    assert not net.frozen._forward_hooks
    assert not net.used.weight._backward_hooks
    lines = {line.split()[0]: line for line in handle.report().splitlines()}
    assert "plain gradient: its module is never called (F.linear on its weight?)" in lines["inlined.weight"]
    assert "plain gradient" not in lines["used.weight"]
    observed = {slot.layer.name: slot.observed for slot in handle._slots["whitening"]}
    assert observed == {"used.weight": 1, "frozen.weight": 0, "unused.weight": 0, "inlined.weight": 0}


def test_between_windows_a_pass_runs_no_code_of_ours() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wellcond.attach(optimizer, net, FeatureWhitening(stats_every=10), wellcond.GradientCentralization())
    ours: list[str] = []

    def called(frame: Any, event: str, argument: Any) -> None:
        if frame.f_globals.get("__name__", "").startswith("wellcond"):
            ours.append(frame.f_code.co_name)

    for step in range(12):
        optimizer.zero_grad()
        ours.clear()
        sys.setprofile(called)
        try:
            net(torch.randn(2, 5, 4)).square().sum().backward()
        finally:
            sys.setprofile(None)
        assert bool(ours) == (step % 10 == 0)
        optimizer.step()


def test_a_layer_that_is_first_reached_late_is_seen_then() -> None:
    net = Parts()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wellcond.attach(optimizer, net, FeatureWhitening(stats_every=50))
    for step in range(8):
        optimizer.zero_grad()
        x = torch.randn(4, 4)
        (net.unused(x) if step == 6 else net.used(x)).square().sum().backward()
        optimizer.step()
    assert optimizer.state[net.unused.weight]["wellcond_whitening_updated_at"] == 6


@pytest.mark.parametrize("order", ["compile, attach", "attach, compile"])
@pytest.mark.parametrize("kind", ["module", "sequential", "function", "in place"])
def test_compiled_graphs_are_never_cut(order: str, kind: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    ran: list[Any] = []
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)

        def run(*args: Any) -> Any:
            ran.append(graph)
            return graph(*args)

        return run

    net: nn.Module = (
        Net().float() if kind != "sequential" else nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    seen = []

    def attach() -> None:
        seen.append(wellcond.attach(optimizer, net, FeatureWhitening(stats_every=3, solve_every=3)))

    if order == "attach, compile":
        attach()
    call: Callable[[Tensor], Tensor] = net
    if kind == "in place":
        net.compile(backend=backend)
    elif kind == "function":
        call = torch.compile(lambda x: net(x).square(), backend=backend)
    else:
        call = torch.compile(net, backend=backend)
    if order == "compile, attach":
        attach()
    counts = []
    for _ in range(9):
        ran.clear()
        optimizer.zero_grad()
        call(torch.randn(5, 4)).sum().backward()
        optimizer.step()
        counts.append(len(ran))
    assert counts == [0, 1, 1] * 3
    assert len(compiled) == 1  # for training; below another without gradients
    assert all(slot.observed == 3 for slot in seen[0]._slots["whitening"])
    ran.clear()
    with torch.no_grad():
        call(torch.randn(5, 4))  # although inputs are due
    assert len(ran) == 1
    seen[0].remove()
    assert torch._dynamo.eval_frame._stance.stance == "default"


class Trainer:
    """An object whose method is compiled."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def loss(self, x: Tensor) -> Tensor:
        return self.net(x).square().sum()


CALLS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "module": lambda net: net,
    "inner module": lambda net: nn.Sequential(net, nn.Tanh()),
    "bound forward": lambda net: net.forward,
    "function": lambda net: lambda x: net(x).sum(),
    "default": lambda net: lambda x, net=net: net(x).sum(),
    "method": lambda net: Trainer(net).loss,
}


@pytest.mark.parametrize("kind", CALLS)
def test_only_code_that_calls_observed_modules_runs_eagerly(kind: str) -> None:
    """Whatever else is attached and waits for a pass, be it for ever."""
    torch._dynamo.reset()
    ran: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        return lambda *args: (ran.append(1), graph(*args))[1]

    waiting, other = (nn.Sequential(nn.Linear(4, 3), nn.Tanh()) for _ in range(2))
    optimizer = torch.optim.SGD(waiting.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, waiting, FeatureWhitening(stats_every=2, solve_every=2))
    for _ in range(2):  # the second step opens a window again
        optimizer.zero_grad()
        waiting(torch.randn(5, 4)).sum().backward()
        optimizer.step()
    for net, compiled in ((waiting, 0), (other, 1)):
        ran.clear()
        torch.compile(CALLS[kind](net), backend=backend)(torch.randn(5, 4))
        assert len(ran) == compiled
    handle.remove()
    assert torch._dynamo.eval_frame._stance.stance == "default"


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 1000), stats_every=st.sampled_from([1, 2, 5]))
def test_the_random_stream_is_the_one_without_us(seed: int, stats_every: int) -> None:
    """With dropout inside attention, between layers, and draws between steps: outputs are equal to the last bit."""

    def outputs(attached: bool) -> list[Tensor]:
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(4, 6), nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3, batch_first=True), nn.Dropout(0.2)
        )
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        if attached:
            wellcond.attach(optimizer, net, FeatureWhitening(stats_every=stats_every, norm_layers=True))
        found = []
        for _ in range(4):
            found.append(net(torch.randn(2, 5, 4)).detach())
            net(torch.randn(2, 5, 4)).sum().backward()
            optimizer.step()
        return [*found, torch.rand(3)]

    for with_us, without in zip(outputs(True), outputs(False), strict=True):
        assert torch.equal(with_us, without)


@pytest.mark.parametrize("small", [True, False])
def test_what_was_noted_can_be_looked_at_before_the_step(small: bool) -> None:
    """The sums of passes that count or still may, and the latest; looking changes nothing of what the step takes in."""
    layer = nn.Linear(4 if small else 2, 3, bias=False, dtype=FLOAT64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    handle = wellcond.attach(optimizer, layer, FeatureWhitening(**EVERY_STEP))
    slot = handle._slots["whitening"][0]
    passes = [torch.randn(1 if small else 9, layer.in_features, dtype=FLOAT64) for _ in range(4)]

    def noted() -> Tensor:
        assert slot.pending is not None
        return slot.pending[0][0]

    assert slot.pending is None
    layer(passes[0])
    torch.testing.assert_close(noted(), passes[0].mT @ passes[0])
    layer(passes[1]).sum().backward()  # the one before is gone by now
    torch.testing.assert_close(noted(), passes[1].mT @ passes[1])
    alive = layer(passes[2])
    rows = torch.cat(passes[1:3])
    for _ in range(2):
        torch.testing.assert_close(noted(), rows.mT @ rows)
    with torch.no_grad():
        layer(passes[3])
    alive.sum().backward()
    torch.testing.assert_close(noted(), rows.mT @ rows)
    optimizer.step()
    assert slot.pending is None
    moment = optimizer.state[layer.weight]["wellcond_whitening_second_moment"][0]
    torch.testing.assert_close(moment, rows.mT @ rows / len(rows))
