"""Layers whose class overrides forward: the statistics of what the weight multiplied, or none, with the reason."""

from __future__ import annotations

import collections
import copy
import pickle
import random
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wellcond
from wellcond import FeatureWhitening, GradientCentralization, WellcondWarning
from wellcond.layouts import find_layers, layout_of

# Layers, each with its input, the function that it calls, and the weight's rows as explicit sums.

Case = tuple[Callable[[type[nn.Module]], nn.Module], type[nn.Module], tuple[int, ...]]

BASES: dict[str, Case] = {
    "linear": (lambda cls: cls(6, 6), nn.Linear, (5, 6)),
    "conv1d": (lambda cls: cls(4, 4, 3, padding=1), nn.Conv1d, (3, 4, 9)),
    "conv2d": (lambda cls: cls(4, 4, 3, padding=1, groups=2), nn.Conv2d, (3, 4, 6, 6)),
    "conv3d": (lambda cls: cls(2, 2, 2), nn.Conv3d, (2, 2, 4, 4, 4)),
    "transposed1d": (lambda cls: cls(4, 4, 3, stride=2, padding=1), nn.ConvTranspose1d, (3, 4, 9)),
    "transposed2d": (lambda cls: cls(4, 4, 3, stride=2, groups=2), nn.ConvTranspose2d, (2, 4, 5, 5)),
    "layer_norm": (lambda cls: cls(6), nn.LayerNorm, (5, 4, 6)),
    "rms_norm": (lambda cls: cls(6), nn.RMSNorm, (5, 4, 6)),
    "group_norm": (lambda cls: cls(2, 6), nn.GroupNorm, (5, 6, 4)),
}

# What a forward may do to its input before it calls its base class's: each changes what the weight multiplies.
BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    "scales": lambda x: 3 * x,
    "normalizes": lambda x: F.normalize(x, dim=1),
    "rectifies": torch.relu,
    "mirrors": lambda x: x.flip(1),
    "pads": lambda x: F.pad(x, (1, 2)) if x.dim() > 2 else x - 1,
    "permutes": lambda x: x.roll(1, 0).transpose(-1, -2).contiguous().transpose(-1, -2),
    "repeats": lambda x: torch.cat([x, 2 * x]),
}
AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda y: y,
    "scales": lambda y: y * 0.5,
    "transposes": lambda y: y.transpose(0, -1),
    "sums": lambda y: y.sum(0),
}


def subclass(base: type[nn.Module], before: str, after: str) -> type[nn.Module]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return AFTER[after](base.forward(self, BEFORE[before](x)))

    return type("Own", (base,), {"forward": forward})


def explicit_sums(layer: nn.Module, base: nn.Module, given: Tensor) -> Tensor:
    """Sum x xᵀ over what the base class's layer multiplies: by the gradient, from the formula G = Σ δ xᵀ.

    For each output number by itself δ is a unit vector, so its unit's row of the gradient is the row x itself.
    """
    outputs = base(given)
    (found,) = find_layers(base)
    groups, units, *inputs = found.matrix_shape
    width = int(torch.tensor(inputs).prod())
    sums = torch.zeros(groups, width, width, dtype=torch.float64)
    flat = outputs.flatten()
    for index in range(flat.numel()):
        (gradient,) = torch.autograd.grad(flat[index], base.weight, retain_graph=True)
        rows = found.matrix(gradient).reshape(groups, units, width).double()
        sums += rows.mT @ rows
    return sums / units


def observed(layer: nn.Module, *args: Any, **options: Any) -> tuple[Tensor | None, str]:
    """Train one step, and return the second moment that was taken in, and the report's line of the weight."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    choice = {"stats_every": 1, "stats_decay": 0.0, "second_moment": "dense", "norm_layers": True} | options
    handle = wellcond.attach(optimizer, layer, FeatureWhitening(**choice))
    gradients_before = [parameter.grad for parameter in layer.parameters()]
    assert gradients_before == [None] * len(gradients_before)
    layer(*args).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    optimizer.step()
    line = next(line for line in handle.report().splitlines() if line.startswith("weight"))
    slots = [slot for slot in handle._slots["whitening"] if slot.coverage.applies]
    handle.remove()
    if not slots or slots[0].unseen is not None:
        for name, parameter in layer.named_parameters():
            if name in plain:
                assert torch.equal(parameter.grad, plain[name]), "not plain"
        return None, line
    return slots[0].state["second_moment"].clone(), line


def without_bias(layer: nn.Module) -> nn.Module:
    layer.bias = None
    return layer


@given(
    kind=st.sampled_from(sorted(BASES)),
    before=st.sampled_from(sorted(BEFORE)),
    after=st.sampled_from(sorted(AFTER)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_subclass_is_observed_in_its_own_forward(kind: str, before: str, after: str, seed: int) -> None:
    make, base, shape = BASES[kind]
    torch.manual_seed(seed)
    if base in (nn.LayerNorm, nn.RMSNorm) and before == "pads":
        before = "rectifies"
    layer, plain = without_bias(make(subclass(base, before, after))), without_bias(make(base))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape)
    given_to_base = BEFORE[before](x)
    found, line = observed(layer, x)
    assert found is not None, line
    expected = explicit_sums(layer, plain, given_to_base)
    # Rows that no gradient distinguishes count too: compare up to their number.
    scale = (found.double() * expected).sum() / expected.square().sum()
    torch.testing.assert_close(found.double(), expected * scale, rtol=1e-4, atol=1e-5 * float(found.abs().max()))


def weight_uses() -> dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], Callable[[Tensor], Tensor] | None]]:
    """Forwards of a linear layer with six inputs and outputs, each with the rows; None: must not be observed."""
    same = lambda x: x  # noqa: E731
    return {
        "matmul with the transpose": (lambda m, x: x @ m.weight.t(), same),
        "addmm": (lambda m, x: torch.addmm(torch.ones(6), x, m.weight.T), same),
        "normalized rows": (lambda m, x: F.linear(x, F.normalize(m.weight)), same),
        "normalized by hand": (lambda m, x: F.linear(x, m.weight / m.weight.norm(dim=1, keepdim=True)), same),
        "centred rows": (lambda m, x: F.linear(x, m.weight - m.weight.mean(1, keepdim=True)), same),
        "standardized by hand, in place": (_standardized, same),
        "reduced axis by axis": (_axis_by_axis, same),
        "one factor": (lambda m, x: F.linear(x, m.weight * 0.3), same),
        "a factor for each unit": (lambda m, x: F.linear(x, torch.rand(6, 1) * m.weight), same),
        "an addition": (lambda m, x: F.linear(x, m.weight + torch.rand(6, 6)), same),
        "cast": (lambda m, x: F.linear(x.double(), m.weight.double()).float(), same),
        "straight through": (lambda m, x: F.linear(x, m.weight + (m.weight.round() - m.weight).detach()), same),
        "twice": (
            lambda m, x: torch.cat([F.linear(x, m.weight), F.linear(2 * x, m.weight)]),
            lambda x: torch.cat([x, 2 * x]),
        ),
        "in a chain": (lambda m, x: F.linear(F.linear(x, m.weight), m.weight), "chain"),
        "in a chain that is cut": (lambda m, x: F.linear(F.linear(x, m.weight).detach(), m.weight), "cut chain"),
        "without gradient, and with": (_with_and_without, same),
        "the other side": (lambda m, x: x @ m.weight, None),
        "the other side, by linear": (lambda m, x: F.linear(x, m.weight.t()), None),
        "mirrored inputs": (lambda m, x: F.linear(x, m.weight.flip(1)), None),
        "permuted inputs": (lambda m, x: F.linear(x, m.weight[:, [1, 0, 2, 3, 5, 4]]), None),
        "a factor for each input": (lambda m, x: F.linear(x, m.weight * torch.rand(6)), None),
        "a mask": (lambda m, x: F.linear(x, m.weight * (torch.rand(6, 6) > 0.5)), None),
        "columns normalized": (lambda m, x: F.linear(x, F.normalize(m.weight, dim=0)), None),
        "a function of each element": (lambda m, x: F.linear(x, torch.tanh(m.weight)), None),
        "symmetrized": (lambda m, x: F.linear(x, m.weight + m.weight.t()), None),
        "mirrored and added": (lambda m, x: F.linear(x, m.weight + m.weight.flip(1)), None),
        "a custom function added": (lambda m, x: F.linear(x, m.weight + _Double.apply(m.weight)), None),
        "scaled by what it is mixed into": (lambda m, x: F.linear(x, m.weight * (m.weight @ m.weight).mean()), None),
        "squared": (lambda m, x: F.linear(x, m.weight @ m.weight), None),
        "einsum": (lambda m, x: torch.einsum("ni,oi->no", x, m.weight), None),
        "einsum beside": (lambda m, x: F.linear(x, m.weight) + torch.einsum("ni,oi->no", x, m.weight), None),
        "a custom function beside": (lambda m, x: F.linear(x, m.weight) + _Times.apply(x, m.weight), None),
        "a norm beside": (lambda m, x: F.linear(x, m.weight) + m.weight.norm(), None),
        "half of it": (lambda m, x: F.linear(x, m.weight[:3]), None),
        "a sum over its rows": (lambda m, x: x * m.weight.sum(0), None),
        "written to": (_writing, None),
        "the weight itself": (lambda m, x: m.weight * 1, None),
        "bias by itself": (lambda m, x: F.linear(x, m.weight) + m.bias, None),
    }


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return torch.from_numpy(2 * weight.detach().numpy())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0].flip(1)


def _standardized(module: nn.Module, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(module.weight, dim=1, keepdim=True)
    weight = module.weight - mean
    weight *= torch.rsqrt(variance + 1e-5)
    return F.linear(x, weight)


def _axis_by_axis(module: nn.Module, x: Tensor) -> Tensor:
    weight = module.weight.view(6, 2, 3)
    energy = weight.square().mean(1, keepdim=True).mean(2, keepdim=True)
    return F.linear(x, (weight / energy).view(6, 6))


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() @ weight.detach().numpy().T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0].T @ ctx.saved_tensors[0]


def _with_and_without(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        shift = F.linear(5 * x, module.weight)
    return F.linear(x, module.weight) + shift + F.linear(7 * x, module.weight.detach())


def _writing(module: nn.Module, x: Tensor) -> Tensor:
    module.weight.data.mul_(1.0)
    return F.linear(x, module.weight)


@pytest.mark.parametrize("name", list(weight_uses()))
@pytest.mark.parametrize("bound", ["class", "object"])
def test_what_a_forward_makes_of_the_weight_is_understood_or_refused(name: str, bound: str) -> None:
    torch.manual_seed(0)
    use, rows = weight_uses()[name]
    layer = nn.Linear(6, 6, bias=name == "bias by itself")
    if bound == "class":
        layer.__class__ = type("Own", (nn.Linear,), {"forward": lambda self, x: use(self, x)})
    else:
        layer.forward = types.MethodType(lambda self, x: use(self, x), layer)
    x = torch.randn(5, 6)
    if rows is None:
        with pytest.warns(WellcondWarning, match=r"'weight' could not be observed \(its forward"):
            found, line = observed(layer, x)
        assert found is None
        assert "plain gradient: its input could not be observed (its forward" in line
        return
    found, line = observed(layer, x)
    assert found is not None, line
    once = x @ layer.weight.detach().T
    seen = {"chain": torch.cat([x, once]), "cut chain": once}.get(rows, x) if isinstance(rows, str) else rows(x)
    seen = seen.double()
    torch.testing.assert_close(found[0].double(), seen.T @ seen / len(seen), rtol=1e-5, atol=1e-5)


def test_a_table_with_positions_of_its_own_counts_what_it_looks_up() -> None:
    class Sliced(nn.Embedding):  # in the manner of Whisper
        def forward(self, tokens: Tensor) -> Tensor:
            return self.weight[2 : 2 + tokens.shape[1]]

    class Indexed(nn.Embedding):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.weight[tokens % 3]

    class Normalized(nn.Embedding):
        def forward(self, tokens: Tensor) -> Tensor:
            return F.embedding(tokens, torch.tanh(F.normalize(self.weight, dim=-1))) * 2

    class Cut(nn.Embedding):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.weight[tokens, :2]

    torch.manual_seed(0)
    tokens = torch.randint(0, 8, (3, 4))
    frequencies = torch.bincount(tokens.flatten(), minlength=8) / 12
    expected = {Sliced: torch.tensor([0, 0, 1, 1, 1, 1, 0, 0]) / 4, Normalized: frequencies}
    expected[Indexed] = torch.bincount(tokens.flatten() % 3, minlength=8) / 12
    for kind, right in expected.items():
        found, line = observed(kind(8, 4), tokens)
        assert found is not None, line
        torch.testing.assert_close(found[0], right)
    with pytest.warns(WellcondWarning, match="parts of vectors"):
        assert observed(Cut(8, 4), tokens)[0] is None


def test_a_bias_is_taken_along_only_where_the_product_adds_it() -> None:
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    torch.manual_seed(0)
    x = torch.randn(2, 2, 5, 5)
    found, line = observed(Own(2, 3, 3), x)
    assert found is not None, line
    rows = F.pad(F.unfold(2 * x, 3).transpose(1, 2).reshape(-1, 18), (0, 1), value=1.0)
    torch.testing.assert_close(found[0], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)


class Meter:
    """What people keep averages in."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.number = 0


def test_looking_leaves_no_trace() -> None:
    """Buffers, attributes, children's statistics, random numbers, hooks: as if nobody had looked."""
    hooked: list[nn.Module] = []

    class Own(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("calls", torch.zeros(()))
            self.norm = nn.BatchNorm1d(4)
            self.norm.register_forward_hook(lambda module, *_: hooked.append(module))
            self.norm.compile(backend="eager")
            self.count = 0
            self.mean = torch.zeros(())
            self.meter = Meter()
            self.tallies: dict[str, Any] = {"calls": 0, "seen": [], "by size": collections.Counter()}
            self.others = [nn.BatchNorm1d(4)]
            self.act = self.counted

        def counted(self, x: Tensor) -> Tensor:
            self.count += 1
            return x

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.mean += x.detach().mean()
            self.meter.values.append(random.random())
            self.meter.number += 1
            self.tallies["calls"] += 1
            self.tallies["seen"].append(len(x))
            self.tallies["by size"][len(x)] += 1
            x = self.act(self.others[0](x))
            return super().forward(self.norm(F.dropout(x, 0.3, self.training)))

    def everything(layer: Own) -> list[Any]:
        meter, other = layer.meter, layer.others[0]
        return [
            layer.count,
            float(layer.mean),
            meter.values,
            meter.number,
            layer.tallies,
            int(other.num_batches_tracked),
        ]

    def run(attach: bool) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - the generator that forwards share
        layer = Own()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        if attach:
            wellcond.attach(optimizer, layer, FeatureWhitening(stats_every=1))
        output = layer(torch.randn(6, 4))
        output.square().sum().backward()
        return layer, output, torch.tensor([float(torch.rand(())), random.random(), np.random.random()])  # noqa: NPY002

    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: hooked.append(module))
    looked, plain = run(True), run(False)
    handle.remove()
    assert len(hooked) == 2 * 4, "in each run the hook of all modules is called for three of them, that of one for it"
    assert everything(looked[0]) == everything(plain[0])
    assert looked[0].count == 1
    assert torch.equal(looked[1], plain[1])
    assert torch.equal(looked[2], plain[2])
    for name, value in plain[0].state_dict().items():
        assert torch.equal(looked[0].state_dict()[name], value), name
    for (name, left), (_, right) in zip(looked[0].named_parameters(), plain[0].named_parameters(), strict=True):
        assert torch.equal(left.grad, right.grad), name


def test_the_rows_are_those_of_the_very_pass() -> None:
    """Whatever its forward draws, and whoever draws after it."""

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.given = F.dropout(x, 0.5) * random.random() + float(np.random.random())  # noqa: NPY002
            return super().forward(self.given)

    for seed in range(5):
        torch.manual_seed(seed)
        layers = nn.Sequential(Own(4, 4, bias=False), nn.Dropout(0.5), Own(4, 4, bias=False)).double()
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.0)
        wellcond.attach(optimizer, layers, FeatureWhitening(stats_every=1, stats_decay=0.0))
        for _ in range(2):
            optimizer.zero_grad()
            layers(torch.randn(6, 4, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
            for layer in (layers[0], layers[2]):
                moment = optimizer.state[layer.weight]["wellcond_whitening_second_moment"][0]
                torch.testing.assert_close(moment, layer.given.mT @ layer.given / 6)


def test_a_generator_of_the_layers_own_is_not_drawn_from() -> None:
    class Own(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.generator = torch.Generator().manual_seed(0)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.rand(x.shape, generator=self.generator))

    layer = Own()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, layer, FeatureWhitening(stats_every=1))
    layer(torch.ones(2, 4)).sum().backward()
    wanted = torch.Generator().manual_seed(0)
    torch.rand(2, 4, generator=wanted)
    assert torch.equal(layer.generator.get_state(), wanted.get_state())
    with pytest.warns(WellcondWarning, match="draws from a random generator of its own"):
        optimizer.step()
    assert "plain gradient" in handle.report()


def test_a_forward_that_writes_to_its_input_is_left_alone() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    def run(attach: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Own(4, 4, bias=False))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model[:2].requires_grad_(False)
        if attach:
            handle = wellcond.attach(optimizer, model, FeatureWhitening(stats_every=1))
        model(torch.randn(6, 4)).square().sum().backward()
        if attach:
            with pytest.warns(WellcondWarning, match="changes its input in place"):
                optimizer.step()
            assert "changes its input in place" in handle.report()
        else:
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    for looked, plain in zip(run(True), run(False), strict=True):
        assert torch.equal(looked, plain)


def test_a_checkpointed_segment_counts_its_saved_tensors_right() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.relu(x))

    model = nn.Sequential(Own(4, 4), nn.ReLU(), Own(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, FeatureWhitening(stats_every=1))
    for _ in range(2):
        x = torch.randn(5, 4, requires_grad=True)
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum().backward()
        optimizer.step()
    assert handle.stats()["whitening"] == {"weights": 2, "failed_solves": 0, "skipped_updates": 0}


def test_a_function_in_the_place_of_forward_is_named() -> None:
    layer = nn.Linear(4, 3, bias=False)
    layer.forward = lambda x: F.linear(torch.relu(x), layer.weight)
    model = nn.Sequential(layer, nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, FeatureWhitening())
    assert "plain gradient: a function was put in the place of its forward" in handle.report()


def test_a_forward_that_is_replaced_after_attaching_is_named() -> None:
    layer = nn.Linear(4, 3, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, layer, FeatureWhitening())
    layer.forward = lambda x: F.linear(torch.relu(x), layer.weight)
    layer(torch.randn(5, 4)).sum().backward()
    with pytest.warns(WellcondWarning, match="replaced after its rule was looked up"):
        optimizer.step()
    # The report looks again, and finds the function.
    assert "a function was put in the place of its forward" in handle.report()


def test_a_method_that_the_forward_calls_counts_as_the_forward() -> None:
    class Own(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(F.pad(x, (2, 0, 2, 0)), weight, bias)

    torch.manual_seed(0)
    x = torch.randn(2, 2, 5, 5)
    found, line = observed(Own(2, 3, 3, bias=False), x)
    assert found is not None, line
    rows = F.unfold(F.pad(x, (2, 0, 2, 0)), 3).transpose(1, 2).reshape(-1, 18)
    torch.testing.assert_close(found[0], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)


def test_attention_with_its_own_forward_keeps_plain_gradients() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x, x, x, need_weights=False)[0]

    attention = Own(4, 2)
    optimizer = torch.optim.SGD(attention.parameters(), lr=0.1)
    with pytest.warns(WellcondWarning, match="covers none"):
        handle = wellcond.attach(optimizer, attention, FeatureWhitening())
    assert handle.report().count("plain gradient: its class overrides the forward that its rule is for") == 2
    attention(torch.randn(5, 3, 4)).square().sum().backward()
    optimizer.step()


def test_a_rule_of_ones_own_holds_for_the_forward_that_it_knows() -> None:
    class Taught(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ni,oi->no", 2 * x, self.weight)

    class Rule(wellcond.Layout):
        has_rows = True

        def rows(self, module: nn.Module, inputs: Tensor) -> Tensor:
            return 2 * inputs.unsqueeze(0)

    class Further(Taught):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 1)

    from wellcond.layouts import registry

    wellcond.register_layout(Taught, Rule())
    try:
        x = torch.randn(5, 4)
        found, _ = observed(Taught(4, 3, bias=False), x)
        torch.testing.assert_close(found[0], 4 * x.T @ x / 5)
        (layer,) = find_layers(Further(4, 3, bias=False))
        assert not layer.layout.has_rows
        assert "overrides the forward" in layer.layout.missing_rows
    finally:
        del registry._LAYOUTS[Taught]


def test_centralization_needs_the_weights_axes_alone() -> None:
    class Own(nn.ConvTranspose2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 1)))

    layer = Own(4, 6, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    wellcond.attach(optimizer, layer, GradientCentralization())
    layer(torch.randn(2, 4, 5, 5)).square().sum().backward()
    optimizer.step()
    assert float(layer.weight.grad.mean((0, 2, 3)).abs().max()) < 1e-5


def test_rules_of_own_forwards_can_be_copied_and_pickled() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    rule = layout_of(Own(3, 2))
    for again in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert type(again) is type(rule)
        assert again.family is rule.family is type(layout_of(nn.Linear(3, 2)))


def test_parametrized_subclasses_multiply_the_computed_weight() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    torch.manual_seed(0)
    for parametrization in (torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm):
        layer = parametrization(Own(4, 3, bias=False))
        (found,) = find_layers(layer)
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        x = torch.randn(5, 4)
        (inputs,) = found.inputs((x,), {})
        assert torch.equal(inputs, 2 * x)
        assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


# layers of other libraries ------------------------------------------------------------------------------------------


def _patches(stride: int, same: bool) -> Callable[[Tensor], Tensor]:
    """Patches of a 3 × 3 kernel, padded as TensorFlow's SAME pads, or not."""

    def rows(x: Tensor) -> Tensor:
        if same:
            total = max((-(-x.shape[-1] // stride) - 1) * stride + 3 - x.shape[-1], 0)
            x = F.pad(x, (total // 2, total - total // 2) * 2)
        return F.unfold(x, 3, stride=stride).transpose(1, 2).reshape(1, -1, 18)

    return rows


def _normalized(axes: tuple[int, ...], channel: int, eps: float) -> Callable[[Tensor], Tensor]:
    def rows(x: Tensor) -> Tensor:
        centred = x - x.mean(axes, keepdim=True)
        normalized = centred / (centred.square().mean(axes, keepdim=True) + eps).sqrt()
        return normalized.movedim(channel, 0).reshape(x.shape[channel], -1, 1)

    return rows


def _in_groups(x: Tensor) -> Tensor:
    return (
        _normalized((2, 3, 4), 0, 1e-5)(x.unflatten(1, (2, 2)))
        .reshape(5, 2, 2, 9)
        .permute(1, 2, 0, 3)
        .reshape(4, -1, 1)
    )


IMAGE, MAP = (2, 2, 7, 7), (5, 4, 3, 3)
LIBRARY: list[tuple[str, str, tuple[Any, ...], tuple[int, ...], Callable[[Tensor], Tensor]]] = [
    ("timm.layers", "Conv2dSame", (2, 3, 3, 2), IMAGE, _patches(2, True)),
    ("timm.layers", "StdConv2d", (2, 3, 3, 1, 0), IMAGE, _patches(1, False)),
    ("timm.layers", "StdConv2dSame", (2, 3, 3, 2), IMAGE, _patches(2, True)),
    ("timm.layers", "ScaledStdConv2d", (2, 3, 3, 1, 0), IMAGE, _patches(1, False)),
    ("timm.layers", "ScaledStdConv2dSame", (2, 3, 3, 2), IMAGE, _patches(2, True)),
    ("timm.layers", "Linear", (4, 3), (5, 4), lambda x: x.unsqueeze(0)),
    ("timm.layers", "LayerNorm", (4,), (5, 3, 4), _normalized((2,), 2, 1e-6)),
    ("timm.layers", "LayerNormFp32", (4,), (5, 3, 4), _normalized((2,), 2, 1e-6)),
    ("timm.layers", "LayerNorm2d", (4,), MAP, _normalized((1,), 1, 1e-6)),
    ("timm.layers", "LayerNorm2dFp32", (4,), MAP, _normalized((1,), 1, 1e-6)),
    ("timm.layers", "GroupNormAct", (4, 2), MAP, _in_groups),
    ("timm.layers", "GroupNorm1", (4,), MAP, _normalized((1, 2, 3), 1, 1e-5)),
    ("torchvision.models.convnext", "LayerNorm2d", (4,), MAP, _normalized((1,), 1, 1e-5)),
]


@pytest.mark.parametrize(("module", "name", "arguments", "shape", "rows"), LIBRARY, ids=[case[1] for case in LIBRARY])
def test_layers_of_other_libraries(
    module: str, name: str, arguments: tuple[Any, ...], shape: tuple[int, ...], rows: Callable[[Tensor], Tensor]
) -> None:
    library = pytest.importorskip(module)
    torch.manual_seed(0)
    layer = without_bias(getattr(library, name)(*arguments))
    x = torch.randn(shape) + 0.3
    found, line = observed(layer, x)
    assert found is not None, line
    expected = rows(x.double())
    torch.testing.assert_close(found.double(), expected.mT @ expected / expected.shape[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])
def test_projections_of_windows_are_as_the_block_uses_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    torch.manual_seed(0)
    block = getattr(swin, kind)(8, [2, 2], [1, 1], 2)
    found = {layer.name: layer for layer in find_layers(block)}
    assert (found["qkv.weight"].bias is not None) is (kind == "ShiftedWindowAttention")
    assert found["proj.weight"].bias is block.proj.bias
    x = torch.randn(2, 5, 5, 8)  # padded to 6 × 6
    (inputs,) = found["qkv.weight"].inputs((x,), {})
    (rows,) = found["qkv.weight"].rows(inputs)
    padded = F.pad(x, (0, 0, 0, 1, 0, 1)).reshape(-1, 8)
    torch.testing.assert_close(rows.T @ rows, padded.T @ padded)
    (joined,) = found["proj.weight"].inputs((x,), {})
    captured: dict[int, Tensor] = {}

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        captured[id(weight)] = x
        return x @ weight.T if bias is None else x @ weight.T + bias

    monkeypatch.setattr(swin.F, "linear", linear)
    block(x)
    torch.testing.assert_close(joined, captured[id(block.proj.weight)])


def test_blocks_that_use_a_childs_weight_are_observed() -> None:
    timm = pytest.importorskip("timm")
    for name, size in (("beit_base_patch16_224", 32), ("swinv2_tiny_window8_256", 64)):
        options = {"depths": (1, 1)} if "swin" in name else {"depth": 1}
        heads = {"num_heads": (2, 2)} if "swin" in name else {"num_heads": 2}
        model = timm.create_model(name, img_size=size, embed_dim=16, num_classes=3, **heads, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        handle = wellcond.attach(optimizer, model, FeatureWhitening(stats_every=1))
        model.train()
        model(torch.randn(2, 3, size, size)).square().sum().backward()
        optimizer.step()
        lines = [
            line for line in handle.report().splitlines() if line.split()[0].endswith(("qkv.weight", "proj.weight"))
        ]
        assert lines
        assert all("preconditioned" in line for line in lines), lines


def test_a_layer_that_is_never_called_is_said_to_be_so() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.called(F.linear(x, self.used.weight))

    model = Block()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = wellcond.attach(optimizer, model, FeatureWhitening())
    assert "plain gradient" not in handle.report()
    for _ in range(3):
        model(torch.randn(3, 4)).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WellcondWarning)
            optimizer.step()
    lines = handle.report().splitlines()
    assert "plain gradient: its module is never called" in lines[1]
    assert "preconditioned" in lines[3]
    assert handle.stats()["whitening"]["unseen"] == 1
