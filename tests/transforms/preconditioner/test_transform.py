"""FeatureWhitening and FeatureDescent against the formulas of their source, summed patch by patch in float64."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wellcond
from wellcond import FeatureDescent, FeatureWhitening, GradientCentralization, WellcondWarning
from wellcond.transforms.preconditioner.transform import FeaturePreconditioner

BOTH = pytest.mark.parametrize("transform_type", [FeatureWhitening, FeatureDescent])
NAMES = {FeatureWhitening: "whitening", FeatureDescent: "descent"}
DAMPING = {FeatureWhitening: 1e-2, FeatureDescent: 0.1}

# the reference ------------------------------------------------------------------------------------------------------


def input_rows(layer: nn.Module, x: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (group, x) for every sample and output position, the patch laid out as the weight's row is."""
    if isinstance(layer, nn.Linear):
        for row in x.reshape(-1, x.shape[-1]):
            yield 0, row.numpy()
        return
    assert isinstance(layer, nn.Conv2d)
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = layer.kernel_size, layer.stride, layer.dilation, layer.padding
    samples, channels, height, width = x.shape
    padded = np.zeros((samples, channels, height + 2 * ph, width + 2 * pw))
    padded[:, :, ph : ph + height, pw : pw + width] = x.numpy()
    per_group = channels // layer.groups
    tops = range(0, height + 2 * ph - dh * (kh - 1), sh)
    lefts = range(0, width + 2 * pw - dw * (kw - 1), sw)
    for n, group, top, left in itertools.product(range(samples), range(layer.groups), tops, lefts):
        patch = padded[
            n,
            group * per_group : (group + 1) * per_group,
            top : top + dh * (kh - 1) + 1 : dh,
            left : left + dw * (kw - 1) + 1 : dw,
        ]
        yield group, patch.reshape(-1)


def second_moment(layer: nn.Module, inputs: list[Tensor], bias: bool) -> np.ndarray:
    """X Xᵀ/N over all rows of all the given inputs, a constant 1 appended for the bias."""
    groups = getattr(layer, "groups", 1)
    width = layer.weight[0].numel() + bias
    total, count = np.zeros((groups, width, width)), np.zeros(groups)
    for x in inputs:
        for group, row in input_rows(layer, x.detach().double()):
            full = np.append(row, 1.0) if bias else row
            total[group] += np.outer(full, full)
            count[group] += 1
    return total / count[:, None, None]


def inverse_power(matrix: np.ndarray, transform_type: type, damping: float) -> np.ndarray:
    """(M + εI)⁻¹, or (M + ελ_max I)^(−1/2), group by group."""
    result = np.zeros_like(matrix)
    for g, m in enumerate(matrix):
        if transform_type is FeatureDescent:
            result[g] = np.linalg.inv(m + damping * np.eye(len(m)))
        else:
            values, vectors = np.linalg.eigh(m)
            for value, vector in zip(np.maximum(values, 0), vectors.T, strict=True):
                result[g] += np.outer(vector, vector) / math.sqrt(value + damping * values[-1])
    return result


def preconditioned(
    layer: nn.Module, t: np.ndarray, weight_grad: Tensor, bias_grad: Tensor | None, restore: bool = True
) -> tuple[Tensor, Tensor | None]:
    """G̃ = (G T)·‖G‖/‖G T‖ over all groups together, the bias gradient as G's last column."""
    groups = t.shape[0]
    g = weight_grad.detach().double().reshape(groups, weight_grad.shape[0] // groups, -1)
    if bias_grad is not None:
        g = torch.cat([g, bias_grad.detach().double().reshape(groups, -1, 1)], dim=2)
    changed = torch.stack([g[i] @ torch.from_numpy(t[i]) for i in range(groups)])
    if restore and float(changed.norm()) > 0:
        changed = changed * (g.norm() / changed.norm())
    if bias_grad is None:
        return changed.reshape(weight_grad.shape), None
    return changed[..., :-1].reshape(weight_grad.shape), changed[..., -1].reshape(bias_grad.shape)


class Reference:
    """The technique, written beside a plain training loop: it changes ``.grad`` before the plain optimizer's step."""

    def __init__(
        self,
        model: nn.Module,
        transform_type: type,
        damping: float,
        *,
        decay: float,
        stats_every: int,
        solve_every: int,
        warmup: bool,
        restore: bool = True,
    ) -> None:
        self.transform_type, self.damping, self.decay, self.restore = transform_type, damping, decay, restore
        self.stats_every, self.solve_every, self.warmup = stats_every, solve_every, warmup
        self.layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        self.inputs: dict[nn.Module, list[Tensor]] = {layer: [] for layer in self.layers}
        self.moments: dict[nn.Module, Any] = dict.fromkeys(self.layers, 0.0)
        self.powers: dict[nn.Module, np.ndarray] = {}
        self.updates = self.step = 0
        self.solved_at: list[int] = []
        for layer in self.layers:
            layer.register_forward_pre_hook(lambda module, args: self.inputs[module].append(args[0].detach()))

    def solve_is_due(self) -> bool:
        doubling = [self.stats_every * 2**k for k in range(20)]
        early = self.warmup and self.step in [s for s in doubling if s < self.solve_every]
        return early or self.step % self.solve_every == 0

    def change_gradients(self) -> None:
        if self.step % self.stats_every == 0:
            self.updates += 1
            for layer in self.layers:
                observed = second_moment(layer, self.inputs[layer], layer.bias is not None)
                self.moments[layer] = self.decay * self.moments[layer] + (1 - self.decay) * observed
        if self.solve_is_due():
            self.solved_at.append(self.step)
            for layer in self.layers:
                debiased = self.moments[layer] / (1 - self.decay**self.updates)
                self.powers[layer] = inverse_power(debiased, self.transform_type, self.damping)
        for layer in self.layers:
            bias_grad = None if layer.bias is None else layer.bias.grad
            weight_grad, bias_grad = preconditioned(
                layer, self.powers[layer], layer.weight.grad, bias_grad, self.restore
            )
            layer.weight.grad = weight_grad
            if bias_grad is not None:
                layer.bias.grad = bias_grad
            self.inputs[layer].clear()
        self.step += 1


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 6, 2, groups=2, dilation=(1, 2), bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.Tanh(),
        nn.Linear(5, 3, bias=False),
    ).double()


def batch(step: int, size: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs whose scale drifts from step to step, so that an old second moment is a wrong one."""
    generator = torch.Generator().manual_seed(77 + step)
    x = torch.randn(size, 2, 6, 7, generator=generator, dtype=torch.float64)
    x = x * (1 + 0.3 * step) + torch.linspace(-1, 1, 2, dtype=torch.float64).view(2, 1, 1)
    return x[..., :6], torch.randint(3, (size,), generator=generator)


def loss_of(model: nn.Module, step: int, **options: Any) -> Tensor:
    x, y = batch(step, **options)
    return nn.functional.cross_entropy(model(x), y)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2, weight_decay=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=1e-2),
}


def run_both(
    transform_type: type,
    make: Callable[[Any], torch.optim.Optimizer],
    *,
    steps: int = 13,
    stats_every: int = 2,
    solve_every: int = 4,
    warmup: bool = True,
    restore: bool = True,
    change_groups: Callable[[dict[str, Any], int], None] = lambda group, step: None,
) -> tuple[nn.Module, nn.Module, Reference]:
    ours, plain = small_net(), small_net()
    our_optimizer, plain_optimizer = make(ours.parameters()), make(plain.parameters())
    wellcond.attach(
        our_optimizer,
        ours,
        transform_type(
            damping=DAMPING[transform_type],
            stats_decay=0.9,
            stats_every=stats_every,
            solve_every=solve_every,
            solve_warmup=warmup,
            restore_norm=restore,
        ),
    )
    reference = Reference(
        plain,
        transform_type,
        DAMPING[transform_type],
        decay=0.9,
        stats_every=stats_every,
        solve_every=solve_every,
        warmup=warmup,
        restore=restore,
    )
    for step in range(steps):
        for optimizer in (our_optimizer, plain_optimizer):
            change_groups(optimizer.param_groups[0], step)
            optimizer.zero_grad()
        loss_of(ours, step).backward()
        our_optimizer.step()
        loss_of(plain, step).backward()
        reference.change_gradients()
        plain_optimizer.step()
    return ours, plain, reference


def assert_same_weights(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-9) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@BOTH
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("warmup", [False, True])
def test_training_equals_the_plain_optimizer_on_preconditioned_gradients(
    transform_type: type, optimizer: str, warmup: bool
) -> None:
    ours, plain, reference = run_both(transform_type, OPTIMIZERS[optimizer], warmup=warmup)
    assert reference.solved_at == ([0, 2, 4, 8, 12] if warmup else [0, 4, 8, 12])
    assert_same_weights(ours, plain)


@BOTH
@pytest.mark.parametrize(
    ("stats_every", "solve_every", "solves"),
    [
        (1, 9, [0, 1, 2, 4, 8, 9, 18]),
        (2, 7, [0, 2, 4, 7, 14]),
        (3, 3, [0, 3, 6, 9, 12, 15, 18]),
        (5, 3, [0, 3, 6, 9, 12, 15, 18]),
    ],
)
def test_warmup_solves_at_doubling_steps_until_the_interval(
    transform_type: type, stats_every: int, solve_every: int, solves: list[int]
) -> None:
    """Also where the two intervals do not divide each other, or factorizations come more often than statistics."""
    ours, plain, reference = run_both(
        transform_type, OPTIMIZERS["SGD"], steps=19, stats_every=stats_every, solve_every=solve_every
    )
    assert reference.solved_at == solves
    assert_same_weights(ours, plain)


def test_sgd_by_hand_decay_enters_after_norm_recovery() -> None:
    """Algorithm 5 written out: m ← β m + (G̃ + λ W), W ← W − η m, without any torch optimizer."""
    ours, plain = small_net(), small_net()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9, weight_decay=0.3)
    wellcond.attach(optimizer, ours, FeatureDescent(damping=0.1, stats_decay=0.9, stats_every=2, solve_every=4))
    reference = Reference(plain, FeatureDescent, 0.1, decay=0.9, stats_every=2, solve_every=4, warmup=True)
    momenta = [torch.zeros_like(p) for p in plain.parameters()]
    for step in range(8):
        optimizer.zero_grad()
        loss_of(ours, step).backward()
        optimizer.step()
        plain.zero_grad()
        loss_of(plain, step).backward()
        reference.change_gradients()
        with torch.no_grad():
            for p, m in zip(plain.parameters(), momenta, strict=True):
                m.mul_(0.9).add_(p.grad + 0.3 * p)
                p.sub_(0.1 * m)
    assert_same_weights(ours, plain)


@BOTH
def test_without_norm_recovery_the_raw_product_is_used(transform_type: type) -> None:
    ours, plain, _ = run_both(transform_type, lambda p: torch.optim.SGD(p, lr=0.02), restore=False)
    assert_same_weights(ours, plain)


@BOTH
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_learning_rate_and_decay_schedules_are_followed(transform_type: type, optimizer: str) -> None:
    def change(group: dict[str, Any], step: int) -> None:
        group["lr"] = 0.1 / (1 + step) ** 2
        group["weight_decay"] = 0.05 * step

    ours, plain, _ = run_both(transform_type, OPTIMIZERS[optimizer], change_groups=change)
    assert_same_weights(ours, plain)


def test_whitening_does_not_depend_on_the_scale_of_its_input_but_descent_does() -> None:
    """ε is relative to λ_max in one and absolute in the other."""
    directions: dict[type, list[Tensor]] = {}
    for transform_type in (FeatureWhitening, FeatureDescent):
        for scale in (1.0, 100.0):
            torch.manual_seed(0)
            layer = nn.Linear(5, 3, bias=False, dtype=torch.float64)
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
            wellcond.attach(optimizer, layer, transform_type())
            layer(scale * torch.randn(20, 5, dtype=torch.float64)).square().sum().backward()
            layer.weight.grad = torch.linspace(-1, 2, 15, dtype=torch.float64).reshape(3, 5)
            optimizer.step()
            directions.setdefault(transform_type, []).append(layer.weight.grad)
    torch.testing.assert_close(*directions[FeatureWhitening], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(*directions[FeatureDescent], rtol=1e-3, atol=1e-3)


# one step: the dense formula and the norm ---------------------------------------------------------------------------

IMMEDIATE: dict[str, Any] = {"stats_decay": 0.0, "stats_every": 1, "solve_every": 1}


def attached(
    model: nn.Module, transform: FeaturePreconditioner, lr: float = 0.1, params: Any = None
) -> tuple[torch.optim.Optimizer, wellcond.Attachment]:
    optimizer = torch.optim.SGD(model.parameters() if params is None else params, lr=lr)
    return optimizer, wellcond.attach(optimizer, model, transform)


def state_of(optimizer: torch.optim.Optimizer, weight: Tensor, key: str) -> Any:
    found = [value for name, value in optimizer.state[weight].items() if name.endswith(f"_{key}")]
    assert len(found) == 1, f"{key} in {list(optimizer.state[weight])}"
    return found[0]


def moment_of(optimizer: torch.optim.Optimizer, weight: Tensor) -> Tensor:
    return state_of(optimizer, weight, "second_moment").clone()


@st.composite
def layer_cases(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    seed, bias, size = draw(st.integers(0, 10**6)), draw(st.booleans()), draw(st.integers(1, 4))
    torch.manual_seed(seed)
    if draw(st.booleans()):
        layer: nn.Module = nn.Linear(draw(st.integers(1, 6)), draw(st.integers(1, 5)), bias=bias)
        x = torch.randn(size, draw(st.integers(1, 3)), layer.in_features)
    else:
        groups, per_group, out = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
        layer = nn.Conv2d(
            groups * per_group,
            groups * out,
            (draw(st.integers(1, 3)), draw(st.integers(1, 2))),
            stride=draw(st.integers(1, 2)),
            padding=draw(st.integers(0, 1)),
            dilation=draw(st.integers(1, 2)),
            groups=groups,
            bias=bias,
        )
        x = torch.randn(size, groups * per_group, 5, 5)
    return layer, x


@BOTH
@given(case=layer_cases())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_gradient_becomes_the_dense_formulas_and_keeps_its_norm(
    transform_type: type, case: tuple[nn.Module, Tensor]
) -> None:
    layer, x = case
    layer.double()
    x = x.double()
    optimizer, _ = attached(layer, transform_type(damping=DAMPING[transform_type], **IMMEDIATE))
    layer(x).sin().sum().backward()
    before = layer.weight.grad.clone(), None if layer.bias is None else layer.bias.grad.clone()
    optimizer.step()
    t = inverse_power(second_moment(layer, [x], layer.bias is not None), transform_type, DAMPING[transform_type])
    weight_grad, bias_grad = preconditioned(layer, t, *before)
    torch.testing.assert_close(layer.weight.grad, weight_grad, rtol=1e-8, atol=1e-10)
    if bias_grad is not None:
        torch.testing.assert_close(layer.bias.grad, bias_grad, rtol=1e-8, atol=1e-10)


@BOTH
@given(case=layer_cases())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_norm_of_weight_and_bias_together_is_recovered_in_float32(
    transform_type: type, case: tuple[nn.Module, Tensor]
) -> None:
    layer, x = case
    optimizer, _ = attached(layer, transform_type(**IMMEDIATE))

    def norm() -> float:
        return math.sqrt(sum(float(p.grad.double().square().sum()) for p in layer.parameters()))

    layer(3 * x).sin().sum().backward()
    before = norm()
    optimizer.step()
    assert norm() == pytest.approx(before, rel=1e-6)


@BOTH
def test_a_zero_gradient_stays_zero(transform_type: type) -> None:
    layer = nn.Linear(4, 3)
    optimizer, _ = attached(layer, transform_type(**IMMEDIATE))
    (0 * layer(torch.randn(5, 4)).sum()).backward()
    optimizer.step()
    assert torch.equal(layer.weight.grad, torch.zeros(3, 4))
    assert torch.equal(layer.bias.grad, torch.zeros(3))


@BOTH
@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e15])
def test_tiny_and_huge_gradients_keep_their_norm(transform_type: type, magnitude: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False)
    optimizer, _ = attached(layer, transform_type(**IMMEDIATE), lr=0.0)
    layer(torch.randn(5, 4)).sum().backward()
    layer.weight.grad = magnitude * torch.randn(3, 4)
    before = float(layer.weight.grad.double().norm())
    optimizer.step()
    assert float(layer.weight.grad.double().norm()) == pytest.approx(before, rel=1e-5)


# which layers -------------------------------------------------------------------------------------------------------


@BOTH
def test_where_chooses_layers_and_the_others_get_the_plain_gradient(transform_type: type) -> None:
    model, plain = small_net(), small_net()
    chosen = transform_type(where=lambda name, module: name == "2" or isinstance(module, nn.Linear), **IMMEDIATE)
    optimizer, handle = attached(model, chosen, lr=0.0)
    loss_of(model, 0).backward()
    loss_of(plain, 0).backward()
    optimizer.step()
    changed = {
        name
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True)
        if not torch.equal(p.grad, q.grad)
    }
    assert changed == {"2.weight", "5.weight", "5.bias", "7.weight"}
    lines = {line.split()[0]: line for line in handle.report().splitlines()[1:]}
    assert "plain gradient" in lines["0.weight"]
    assert "precondition" in lines["2.weight"]
    assert handle.stats()[NAMES[transform_type]]["weights"] == 3


@BOTH
def test_layers_without_rows_are_reported_and_get_the_plain_gradient(transform_type: type) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.EmbeddingBag(7, 4),
        nn.Unflatten(1, (1, 4)),
        nn.BatchNorm1d(1),
        nn.Flatten(),
        nn.LayerNorm(4),
        nn.Linear(4, 2),
    )
    optimizer, handle = attached(model, transform_type(**IMMEDIATE), lr=0.0)
    model(torch.randint(7, (6, 3))).square().sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    same = [torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True)]
    assert same == [True] * 5 + [False, False]
    lines = {line.split()[0]: line for line in handle.report().splitlines()[1:]}
    assert "plain gradient: a bag mixes its tokens" in lines["0.weight"]
    assert "plain gradient: a norm layer (norm_layers=False)" in lines["2.weight"]
    assert "plain gradient: a norm layer (norm_layers=False)" in lines["4.weight"]


@BOTH
def test_with_a_frozen_bias_the_weight_alone_is_preconditioned(transform_type: type) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    layer.bias.requires_grad_(False)
    bias = layer.bias.clone()
    x = torch.randn(6, 4, dtype=torch.float64)
    optimizer, _ = attached(layer, transform_type(damping=0.05, **IMMEDIATE))
    layer(x).sin().sum().backward()
    before = layer.weight.grad.clone()
    optimizer.step()
    t = inverse_power(second_moment(layer, [x], False), transform_type, 0.05)
    torch.testing.assert_close(layer.weight.grad, preconditioned(layer, t, before, None)[0], rtol=1e-9, atol=1e-11)
    assert layer.bias.grad is None
    assert torch.equal(layer.bias, bias)


@BOTH
def test_a_bias_outside_the_optimizer_keeps_its_own_gradient(transform_type: type) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64)
    optimizer, handle = attached(layer, transform_type(damping=0.05, **IMMEDIATE), params=[layer.weight])
    layer(x).sin().sum().backward()
    before, bias_grad = layer.weight.grad.clone(), layer.bias.grad.clone()
    optimizer.step()
    t = inverse_power(second_moment(layer, [x], False), transform_type, 0.05)
    torch.testing.assert_close(layer.weight.grad, preconditioned(layer, t, before, None)[0], rtol=1e-9, atol=1e-11)
    assert torch.equal(layer.bias.grad, bias_grad)
    assert "not held" in next(line for line in handle.report().splitlines() if line.startswith("bias"))


@BOTH
def test_a_frozen_weight_stays_and_its_bias_trains_on_the_plain_gradient(transform_type: type) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    layer.weight.requires_grad_(False)
    weight, bias = layer.weight.clone(), layer.bias.detach().clone()
    optimizer, _ = attached(layer, transform_type(**IMMEDIATE), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(6, 4)).sum().backward()
        optimizer.step()
    assert torch.equal(layer.weight, weight)
    torch.testing.assert_close(layer.bias.detach(), bias - 3 * 0.1 * 6, rtol=1e-6, atol=1e-6)


@BOTH
def test_a_weight_frozen_and_thawed_during_training_is_preconditioned_again(transform_type: type) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    optimizer, _ = attached(layer, transform_type(damping=0.05, **IMMEDIATE), lr=0.0)
    for step in range(6):
        layer.weight.requires_grad_(step not in (2, 3))
        optimizer.zero_grad()
        x = torch.randn(6, 4, dtype=torch.float64)
        layer(x).sin().sum().backward()
        before = None if layer.weight.grad is None else layer.weight.grad.clone(), layer.bias.grad.clone()
        optimizer.step()
        if before[0] is None:
            assert torch.equal(layer.bias.grad, before[1])
        else:
            t = inverse_power(second_moment(layer, [x], True), transform_type, 0.05)
            expected, _ = preconditioned(layer, t, before[0], before[1])
            torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-9, atol=1e-11)


# several forward passes in one step ---------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("sizes", [(1, 3, 4), (2, 2, 2, 2), (8,), (7, 1)])
def test_micro_batches_equal_one_big_batch(transform_type: type, sizes: tuple[int, ...]) -> None:
    """Statistics are averaged weighted by N: a micro-batch of 7 counts seven times one of 1."""
    results = []
    for parts in (sizes, (sum(sizes),)):
        model = small_net()
        optimizer, _ = attached(model, transform_type(stats_decay=0.5, stats_every=2, solve_every=2))
        for step in range(4):
            x, y = batch(step, size=sum(sizes))
            optimizer.zero_grad()
            for xs, ys in zip(x.split(list(parts)), y.split(list(parts)), strict=True):
                nn.functional.cross_entropy(model(xs), ys, reduction="sum").backward()
            optimizer.step()
        results.append((model, [moment_of(optimizer, model[i].weight) for i in (0, 2, 5, 7)]))
    assert_same_weights(results[0][0], results[1][0], 1e-10)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@BOTH
def test_several_forwards_and_a_module_called_twice_are_all_seen(transform_type: type) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, dtype=torch.float64)
    optimizer, _ = attached(layer, transform_type(**IMMEDIATE), lr=0.0)
    x, z = torch.randn(3, 4, dtype=torch.float64), torch.randn(7, 2, 4, dtype=torch.float64)
    hidden = layer(x)
    (layer(hidden).square().sum() + layer(z).sum()).backward()
    optimizer.step()
    expected = second_moment(layer, [x, hidden, z], True)
    torch.testing.assert_close(moment_of(optimizer, layer.weight).numpy(), expected, rtol=1e-12, atol=1e-12)


@BOTH
@pytest.mark.parametrize("biases", ["none", "own", "shared", "one"])
def test_a_tied_weight_sees_the_inputs_of_all_its_layers(transform_type: type, biases: str) -> None:
    """The bias goes along only where all uses share it; otherwise each bias has its plain gradient."""
    torch.manual_seed(0)
    first = nn.Linear(4, 4, bias=biases != "none", dtype=torch.float64)
    second = nn.Linear(4, 4, bias=biases in ("own", "shared"), dtype=torch.float64)
    second.weight = first.weight
    if biases == "shared":
        second.bias = first.bias
    model = nn.Sequential(first, nn.Tanh(), second)
    optimizer, handle = attached(model, transform_type(damping=0.05, **IMMEDIATE), lr=0.0)
    x = torch.randn(6, 4, dtype=torch.float64)
    hidden = first(x).tanh().detach()
    optimizer.zero_grad()
    # The line above was a forward of its own, in train mode: take its observation out of this step.
    handle.remove()
    handle = wellcond.attach(optimizer, model, transform_type(damping=0.05, **IMMEDIATE))
    model(x).sin().sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    together = biases == "shared"
    m = second_moment(first, [x, hidden], together)
    torch.testing.assert_close(moment_of(optimizer, first.weight).numpy(), m, rtol=1e-12, atol=1e-12)
    t = inverse_power(m, transform_type, 0.05)
    weight_grad, bias_grad = preconditioned(first, t, before["0.weight"], before["0.bias"] if together else None)
    torch.testing.assert_close(first.weight.grad, weight_grad, rtol=1e-9, atol=1e-11)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.testing.assert_close(parameter.grad, bias_grad if together else before[name], rtol=1e-9, atol=1e-11)
    assert handle.stats()[NAMES[transform_type]]["weights"] == 1


@BOTH
@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_weight_tied_to_an_embedding_sees_the_inputs_of_both(transform_type: type, embedding_first: bool) -> None:
    """Either use's second moment is kept; which one the model lists first makes no difference."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head) if embedding_first else nn.ModuleList([head, embedding])
    optimizer, handle = attached(model, transform_type(**IMMEDIATE), lr=0.0)
    tokens = torch.tensor([1, 2, 3, 1])
    head(embedding(tokens)).square().sum().backward()
    before = head.weight.grad.clone()
    optimizer.step()
    assert not torch.allclose(head.weight.grad, before, rtol=1e-2)
    assert float(head.weight.grad.norm()) == pytest.approx(float(before.norm()), rel=1e-5)
    assert handle.stats()[NAMES[transform_type]]["weights"] == 1
    hidden = embedding(tokens).detach()
    torch.testing.assert_close(
        state_of(optimizer, head.weight, "token_moment")[0], torch.tensor([0, 2, 1, 1, 0, 0, 0]) / 4
    )
    moment = optimizer.state[head.weight][f"wellcond_{NAMES[transform_type]}_second_moment"]
    torch.testing.assert_close(moment[0], hidden.mT @ hidden / 4)


@BOTH
def test_inputs_given_by_keyword_are_seen(transform_type: type) -> None:
    torch.manual_seed(0)
    moments = []
    x = torch.randn(5, 4)
    for call in (lambda layer: layer(x), lambda layer: layer(input=x)):
        torch.manual_seed(1)
        layer = nn.Linear(4, 3)
        optimizer, _ = attached(layer, transform_type(**IMMEDIATE))
        call(layer).sum().backward()
        optimizer.step()
        moments.append(moment_of(optimizer, layer.weight))
    assert torch.equal(*moments)
    assert float(moments[0].abs().sum()) > 0


@BOTH
def test_eval_and_no_grad_passes_do_not_count(transform_type: type) -> None:
    results = []
    for disturbed in (False, True):
        model = small_net()
        optimizer, _ = attached(model, transform_type(stats_every=1, solve_every=2))
        for step in range(4):
            optimizer.zero_grad()
            if disturbed:
                with torch.no_grad():
                    model(100 * batch(50 + step)[0])
                with torch.inference_mode():
                    model(100 * batch(55 + step)[0])
                model.eval()
                model(100 * batch(60 + step)[0])
                model.train()
            loss_of(model, step).backward()
            optimizer.step()
        results.append((model, moment_of(optimizer, model[0].weight)))
    assert torch.equal(results[0][1], results[1][1])
    for a, b in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
        assert torch.equal(a, b)


@BOTH
def test_an_unbatched_convolution_is_seen_like_a_batch_of_one(transform_type: type) -> None:
    moments = []
    x = torch.linspace(-1, 2, 2 * 5 * 6, dtype=torch.float64).reshape(1, 2, 5, 6)
    for inputs in (x, x[0]):
        torch.manual_seed(0)
        layer = nn.Conv2d(2, 3, 3, dtype=torch.float64)
        optimizer, _ = attached(layer, transform_type(**IMMEDIATE))
        layer(inputs).sum().backward()
        optimizer.step()
        moments.append(moment_of(optimizer, layer.weight))
    torch.testing.assert_close(*moments, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(moments[0].numpy(), second_moment(layer, [x], True), rtol=1e-12)


@pytest.mark.parametrize("numbers", [1, 400, 10**9])
def test_laying_rows_out_in_pieces_changes_nothing(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one sample, of a few, and of the whole batch; the batch is no multiple of the few."""
    monkeypatch.setattr("wellcond.numerics.pieces.CHUNK", numbers)
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 4, 2, groups=2, dtype=torch.float64)
    optimizer, _ = attached(layer, FeatureWhitening(**IMMEDIATE))
    x = torch.randn(7, 2, 4, 5, dtype=torch.float64)
    layer(x).sum().backward()
    optimizer.step()
    expected = second_moment(layer, [x], True)
    np.testing.assert_allclose(moment_of(optimizer, layer.weight).numpy(), expected, rtol=1e-12, atol=1e-14)


# activation checkpointing -------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.net = small_net()
        self.use_reentrant = use_reentrant

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return module(x)
        return checkpoint(module, x, use_reentrant=self.use_reentrant)

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(self.net[:4], x.requires_grad_())
        return self.run(self.net[4:7], x) @ self.net[7].weight.mT


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_checkpointed_samples_count_once(use_reentrant: bool, parts: int) -> None:
    results = []
    for setting in (None, use_reentrant):
        model = Checkpointed(setting)
        chosen = FeatureDescent(stats_every=2, solve_every=2, stats_decay=0.5, where=lambda name, _: name != "net.7")
        optimizer, _ = attached(model, chosen)
        for step in range(5):
            optimizer.zero_grad()
            for i, (x, y) in enumerate(
                zip(*(t.split([3, 1] if parts == 2 else [4]) for t in batch(step)), strict=True)
            ):
                # One micro-batch checkpointed, the other not: were a recomputation counted, M would differ.
                model.use_reentrant = setting if i == 0 else None
                nn.functional.cross_entropy(model(x.clone()), y).backward()
            optimizer.step()
        results.append((model, [moment_of(optimizer, model.net[i].weight) for i in (0, 2, 5)]))
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert_same_weights(results[0][0], results[1][0], 1e-11)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("checkpointed_first", [False, True])
def test_a_layer_called_inside_and_outside_a_checkpoint_counts_both(
    use_reentrant: bool, checkpointed_first: bool
) -> None:
    moments = []
    for checkpoint_it in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(3, 3, dtype=torch.float64)
        optimizer, _ = attached(layer, FeatureDescent(**IMMEDIATE))
        x = torch.randn(4, 3, dtype=torch.float64).requires_grad_()

        def inside(h: Tensor, layer: nn.Module = layer, checkpoint_it: bool = checkpoint_it) -> Tensor:
            return checkpoint(layer, h, use_reentrant=use_reentrant) if checkpoint_it else layer(h)

        order = (inside, layer) if checkpointed_first else (layer, inside)
        order[1](order[0](x).sin()).sum().backward()
        optimizer.step()
        moments.append(moment_of(optimizer, layer.weight))
    torch.testing.assert_close(*moments, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_discarded_forward_does_not_disturb_a_later_checkpoint(use_reentrant: bool) -> None:
    """Step 0 looks at an output without a backward pass; step 1 must still be seen, once."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 3, dtype=torch.float64)
    optimizer, _ = attached(layer, FeatureDescent(**IMMEDIATE), lr=0.0)
    layer(torch.randn(2, 3, dtype=torch.float64))
    layer(torch.randn(4, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    x = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    optimizer.step()
    expected = second_moment(layer, [x], True)
    torch.testing.assert_close(moment_of(optimizer, layer.weight).numpy(), expected, rtol=1e-12, atol=1e-12)


# precision ----------------------------------------------------------------------------------------------------------


@BOTH
def test_under_autocast_statistics_are_float32(transform_type: type) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
    optimizer, _ = attached(model, transform_type(**IMMEDIATE))
    x = torch.randn(5, 2, 4, 4)
    seen: list[Tensor] = []
    model[3].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).float().square().sum()
    loss.backward()
    optimizer.step()
    assert seen[0].dtype == torch.bfloat16
    for layer, inputs in ((model[0], x), (model[3], seen[0])):
        m = moment_of(optimizer, layer.weight)
        assert m.dtype == torch.float32
        np.testing.assert_allclose(m.double().numpy(), second_moment(layer, [inputs], True), rtol=1e-5, atol=1e-6)
        assert all(v.dtype != torch.bfloat16 for v in optimizer.state[layer.weight].values() if isinstance(v, Tensor))


@BOTH
def test_stepping_inside_autocast_multiplies_in_float32(transform_type: type) -> None:
    grads = []
    for enabled in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(6, 3)
        optimizer, _ = attached(layer, transform_type(**IMMEDIATE), lr=0.0)
        layer(torch.randn(9, 6)).sin().sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.step()
        grads.append(layer.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@BOTH
def test_statistics_of_bfloat16_parameters_are_float32(transform_type: type) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).bfloat16()
    optimizer, _ = attached(layer, transform_type(damping=0.05, **IMMEDIATE), lr=0.0)
    x = torch.randn(30, 4).bfloat16()
    layer(x).sin().sum().backward()
    before = layer.weight.grad.clone(), layer.bias.grad.clone()
    optimizer.step()
    m = moment_of(optimizer, layer.weight)
    expected = second_moment(layer, [x], True)
    assert m.dtype == torch.float32
    np.testing.assert_allclose(m.double().numpy(), expected, rtol=1e-5, atol=1e-6)
    weight_grad, bias_grad = preconditioned(layer, inverse_power(expected, transform_type, 0.05), *before)
    assert layer.weight.grad.dtype == torch.bfloat16
    scale = float(weight_grad.abs().max())
    torch.testing.assert_close(layer.weight.grad.double(), weight_grad, rtol=2**-8, atol=1e-4 * scale)
    torch.testing.assert_close(layer.bias.grad.double(), bias_grad, rtol=2**-8, atol=1e-4 * scale)


# numerical trouble --------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_inputs_never_enter_the_second_moment(transform_type: type, bad: float) -> None:
    """The step is one that a loss scaler would make with finite gradients, or that clipping repaired."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    optimizer, handle = attached(layer, transform_type(stats_every=1, solve_every=1))
    before: Tensor | None = None
    for step in range(5):
        optimizer.zero_grad()
        x = torch.randn(6, 4)
        if step == 2:
            before = moment_of(optimizer, layer.weight)
            x[3, 1] = bad
        layer(x).sum().backward()
        for p in layer.parameters():
            p.grad.nan_to_num_(1.0, 1.0, 1.0)
        optimizer.step()
        if step == 2:
            assert before is not None
            assert torch.equal(moment_of(optimizer, layer.weight), before)
            assert handle.stats()[NAMES[transform_type]]["skipped_updates"] == 1
    assert handle.stats()[NAMES[transform_type]] == {"weights": 1, "failed_solves": 0, "skipped_updates": 1}
    assert before is not None
    assert not torch.equal(moment_of(optimizer, layer.weight), before)
    assert all(bool(torch.isfinite(p).all()) for p in layer.parameters())


@BOTH
def test_a_non_finite_first_batch_leaves_the_plain_gradient_until_a_finite_one(transform_type: type) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    optimizer, _ = attached(layer, transform_type(damping=0.05, stats_every=1, solve_every=1), lr=0.0)
    for step in range(2):
        x = torch.randn(6, 4, dtype=torch.float64)
        if step == 0:
            x[0, 0] = math.nan
        layer(x).sum().backward()
        for p in layer.parameters():
            p.grad = torch.randn_like(p)
        before = layer.weight.grad.clone(), layer.bias.grad.clone()
        optimizer.step()
        if step == 0:
            torch.testing.assert_close(layer.weight.grad, before[0])
        else:
            t = inverse_power(second_moment(layer, [x], True), transform_type, 0.05)
            expected, _ = preconditioned(layer, t, *before)
            torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-9, atol=1e-11)


@BOTH
def test_a_non_finite_micro_batch_does_not_take_the_finite_one_with_it(transform_type: type) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    optimizer, _ = attached(layer, transform_type(**IMMEDIATE), lr=0.0)
    good, bad = torch.randn(5, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    bad[2, 2] = math.inf
    for x in (bad, good):
        layer(x).sum().backward()
    for p in layer.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    expected = second_moment(layer, [good], True)
    torch.testing.assert_close(moment_of(optimizer, layer.weight).numpy(), expected, rtol=1e-12, atol=1e-12)


@BOTH
@pytest.mark.parametrize("bias", [False, True])
def test_inputs_that_are_all_zero_give_no_nan(transform_type: type, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=bias)
    optimizer, handle = attached(layer, transform_type(**IMMEDIATE))
    for step in range(3):
        optimizer.zero_grad()
        layer(torch.zeros(5, 4) if step < 2 else torch.randn(5, 4)).sum().backward()
        optimizer.step()
        assert all(bool(torch.isfinite(p).all()) and bool(torch.isfinite(p.grad).all()) for p in layer.parameters())
    assert handle.stats()[NAMES[transform_type]]["failed_solves"] == 0


@BOTH
def test_a_zero_element_batch_changes_no_statistics_and_no_nan_appears(transform_type: type) -> None:
    model = small_net()
    optimizer, _ = attached(model, transform_type(stats_every=1, solve_every=1))
    for step in range(4):
        optimizer.zero_grad()
        if step == 2:
            before = moment_of(optimizer, model[0].weight)
            model(torch.zeros(0, 2, 6, 6, dtype=torch.float64)).sum().backward()
        else:
            loss_of(model, step).backward()
        optimizer.step()
        if step == 2:
            assert torch.equal(moment_of(optimizer, model[0].weight), before)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_an_empty_batch_is_not_counted_as_a_non_finite_one() -> None:
    layer = nn.Linear(4, 3)
    optimizer, handle = attached(layer, FeatureWhitening(**IMMEDIATE))
    for size in (5, 0, 5):
        optimizer.zero_grad()
        layer(torch.randn(size, 4)).sum().backward()
        optimizer.step()
    assert handle.stats()["whitening"]["skipped_updates"] == 0


def test_an_empty_batch_does_not_use_up_the_turn_of_a_full_one() -> None:
    """Statistics are due every 50 steps: after an empty batch at step 0 the next batch is the first observation."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    optimizer, _ = attached(layer, FeatureWhitening(stats_every=50, solve_every=500, solve_warmup=False), lr=0.0)
    for size in (0, 5):
        optimizer.zero_grad()
        layer(torch.randn(size, 4, dtype=torch.float64)).sin().sum().backward()
        before = layer.weight.grad.clone()
        optimizer.step()
    assert float(moment_of(optimizer, layer.weight).abs().sum()) > 0
    assert not torch.allclose(layer.weight.grad, before)


@pytest.mark.parametrize(("transform_type", "function"), [(FeatureWhitening, "eigh"), (FeatureDescent, "cholesky")])
def test_after_a_failed_factorization_the_last_good_one_stays(
    transform_type: type, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    options: dict[str, Any] = {"stats_decay": 0.0, "stats_every": 1, "solve_every": 1}
    optimizer, handle = attached(layer, transform_type(damping=0.05, **options), lr=0.0)
    good_inputs: Tensor | None = None
    real = getattr(torch.linalg, function)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    caught: list[list[Any]] = []
    for step in range(6):
        monkeypatch.setattr(torch.linalg, function, fails if step in (2, 3) else real)
        optimizer.zero_grad()
        x = torch.randn(6, 4, dtype=torch.float64) * (1 + step)
        layer(x).sin().sum().backward()
        before = layer.weight.grad.clone(), layer.bias.grad.clone()
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            optimizer.step()
        caught.append([w for w in record if issubclass(w.category, WellcondWarning)])
        if step not in (2, 3):
            good_inputs = x
        assert good_inputs is not None
        t = inverse_power(second_moment(layer, [good_inputs], True), transform_type, 0.05)
        expected, _ = preconditioned(layer, t, *before)
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-9, atol=1e-11)
    assert [len(found) for found in caught] == [0, 0, 1, 0, 0, 0]
    assert handle.stats()[NAMES[transform_type]]["failed_solves"] == 2


def test_inputs_never_seen_are_reported_once() -> None:
    """A layer whose weight is used without calling it cannot be preconditioned: say so, and step as the plain one."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(3, 2)})
    optimizer, _ = attached(model, FeatureWhitening(stats_every=1, solve_every=1), lr=0.0)
    grads = []
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(4):
            optimizer.zero_grad()
            hidden = nn.functional.linear(torch.randn(5, 4), model["a"].weight, model["a"].bias)
            model["b"](hidden).sum().backward()
            grads.append(model["a"].weight.grad.clone())
            optimizer.step()
            torch.testing.assert_close(model["a"].weight.grad, grads[-1])
    found = [w for w in record if issubclass(w.category, WellcondWarning)]
    assert len(found) == 1
    assert "a" in str(found[0].message)


# together with centralization ---------------------------------------------------------------------------------------


def test_transforms_are_applied_left_to_right() -> None:
    """Precondition, then centre: rows sum to zero. The other way round they do not."""
    sums = []
    for order in (0, 1):
        torch.manual_seed(0)
        layer = nn.Linear(5, 3, bias=False, dtype=torch.float64)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        transforms = [FeatureWhitening(**IMMEDIATE), GradientCentralization()]
        wellcond.attach(optimizer, layer, *(transforms if order == 0 else transforms[::-1]))
        x = torch.randn(8, 5, dtype=torch.float64)
        layer(x).sin().sum().backward()
        g = layer.weight.grad.clone()
        optimizer.step()
        t = inverse_power(second_moment(layer, [x], False), FeatureWhitening, 1e-3)
        if order == 0:
            expected, _ = preconditioned(layer, t, g, None)
            expected = expected - expected.mean(dim=1, keepdim=True)
        else:
            expected, _ = preconditioned(layer, t, g - g.mean(dim=1, keepdim=True), None)
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-9, atol=1e-11)
        sums.append(float(layer.weight.grad.sum(dim=1).abs().max()))
    assert sums[0] < 1e-12 < 1e-3 < sums[1]


# arguments ----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_sources() -> None:
    whitening, descent = FeatureWhitening(), FeatureDescent()
    assert (whitening.damping, whitening.damping_mode) == (1e-3, "relative")
    assert (descent.damping, descent.damping_mode) == (0.1, "absolute")
    for transform in (whitening, descent):
        assert (transform.stats_decay, transform.stats_every, transform.solve_every) == (0.95, 50, 500)
        assert (transform.norm, transform.restore_norm) == ("restore", None)
        assert transform.solve_warmup is True


@BOTH
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("damping", 0.0),
        ("damping", -1e-3),
        ("damping", math.nan),
        ("damping", math.inf),
        ("damping", "0.1"),
        ("damping", None),
        ("damping_mode", "adaptive"),
        ("stats_decay", 1.0),
        ("stats_decay", -0.1),
        ("stats_decay", math.nan),
        ("stats_decay", None),
        ("stats_every", 0),
        ("stats_every", -3),
        ("stats_every", 2.0),
        ("stats_every", True),
        ("solve_every", 0),
        ("solve_every", 1.5),
        ("solver", "svd"),
        ("second_moment", "sparse"),
        ("precision", "float16"),
        ("max_dim", 0),
        ("max_dim", 64.0),
        ("rank", 0),
        ("rank", -1),
        ("gradient_momentum", 1.0),
        ("gradient_momentum", -0.5),
        ("norm_layers", "no"),
        ("where", "linear"),
        ("restore_norm", "no"),
        ("norm", "keep"),
        ("solve_warmup", "no"),
    ],
)
def test_bad_arguments_are_named_with_their_value(transform_type: type, argument: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=argument) as caught:
        transform_type(**{argument: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("damping_mode", ["relative", "mean", "absolute"])
def test_a_solver_that_does_not_apply_is_refused_at_construction(damping_mode: str) -> None:
    with pytest.raises(ValueError, match="cholesky"):
        FeatureWhitening(solver="cholesky", damping_mode=damping_mode)
    assert FeatureDescent(solver="cholesky", damping_mode=damping_mode).solver == "cholesky"


@pytest.mark.parametrize("damping_mode", ["relative", "mean", "absolute"])
@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
def test_descent_gives_the_same_with_either_solver(solver: str, damping_mode: str) -> None:
    models = []
    for chosen in ("auto", solver):
        model = small_net()
        options = {"damping_mode": damping_mode, "stats_every": 2, "solve_every": 4}
        optimizer, _ = attached(model, FeatureDescent(solver=chosen, **options))
        for step in range(6):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        models.append(model)
    assert_same_weights(*models, 1e-10)
