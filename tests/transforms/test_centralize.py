"""Gradient Centralization against Φ(g_i) = g_i − mean(g_i), written row by row, and re-implemented optimizers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wellcond
from pairs import parametrize_pairs
from wellcond import GradientCentralization

STEPS = 8


class Scale(nn.Module):
    """A norm-like scale of a type that no rule speaks of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 5, 1, 1))


class Zoo(nn.Module):
    """One layer of each kind; gradients are given, so nothing is ever called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)
        self.conv1 = nn.Conv1d(4, 6, 3, groups=2)
        self.conv2 = nn.Conv2d(3, 4, (2, 3))
        self.conv3 = nn.Conv3d(2, 3, 2)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.up1 = nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.up2 = nn.ConvTranspose2d(3, 5, 2)
        self.up3 = nn.ConvTranspose3d(6, 3, 2, groups=3)
        self.bilinear = nn.Bilinear(2, 3, 4)
        self.cell = nn.GRUCell(3, 2)
        self.batch_norm = nn.BatchNorm2d(4)
        self.layer_norm = nn.LayerNorm([3, 4])
        self.scale = Scale()
        self.embedding = nn.Embedding(6, 3)


CONV_WEIGHTS = {f"{name}.weight" for name in ("conv1", "conv2", "conv3", "depthwise", "up1", "up2", "up3")}
LINEAR_WEIGHTS = {"linear.weight", "bilinear.weight", "cell.weight_ih", "cell.weight_hh"}
CENTRED = CONV_WEIGHTS | LINEAR_WEIGHTS
TRANSPOSED_GROUPS = {"up1.weight": 2, "up2.weight": 1, "up3.weight": 3}


def zoo(dtype: torch.dtype = torch.float64, seed: int = 0) -> Zoo:
    torch.manual_seed(seed)
    return Zoo().to(dtype)


def rows(name: str, tensor: Tensor) -> Iterator[Tensor]:
    """Yield, output unit by output unit, a view of everything that feeds it."""
    if name not in TRANSPOSED_GROUPS:
        yield from (tensor[i] for i in range(tensor.shape[0]))
        return
    per_group = tensor.shape[0] // TRANSPOSED_GROUPS[name]
    for group in range(TRANSPOSED_GROUPS[name]):
        for unit in range(tensor.shape[1]):
            yield tensor[group * per_group : (group + 1) * per_group, unit]


def centred(name: str, tensor: Tensor, chosen: set[str] = CENTRED) -> Tensor:
    result = tensor.clone()
    if name in chosen:
        for row in rows(name, result):
            row -= row.sum() / row.numel()
    return result


def row_sums(name: str, tensor: Tensor) -> Tensor:
    return torch.stack([row.sum() for row in rows(name, tensor.detach())])


def give_gradients(model: nn.Module, step: int) -> None:
    """Set gradients that depend on the step alone, with a large mean, so that not centring shows."""
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = (noise + 0.7).to(parameter.dtype)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = STEPS,
    before_step: Callable[[int], None] = lambda step: None,
) -> None:
    for step in range(steps):
        give_gradients(model, step)
        before_step(step)
        optimizer.step()


def trained(make: Callable[[Any], torch.optim.Optimizer], *transforms: Any, **options: Any) -> dict[str, Tensor]:
    model = zoo()
    optimizer = make(model.parameters())
    if transforms:
        wellcond.attach(optimizer, model, *transforms)
    train(model, optimizer, **options)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# re-implemented optimizers, in float64, one parameter at a time -----------------------------------------------------


def reference_sgd(
    project: Callable[[Tensor, Tensor], Tensor],
    w: Tensor,
    gradients: list[Tensor],
    *,
    lr: Callable[[int], float] = lambda t: 0.1,
    momentum: float = 0.0,
    nesterov: bool = False,
    dampening: float = 0.0,
    maximize: bool = False,
) -> Tensor:
    """SGD on project(g, w), the gradient with weight decay and projection in the order under test."""
    buffer = None
    for t, g in enumerate(gradients):
        direction = project(-g if maximize else g, w)
        if momentum:
            buffer = direction if buffer is None else momentum * buffer + (1 - dampening) * direction
            direction = direction + momentum * buffer if nesterov else buffer
        w = w - lr(t) * direction
    return w


def reference_adam(
    project: Callable[[Tensor, Tensor], Tensor],
    w: Tensor,
    gradients: list[Tensor],
    *,
    lr: Callable[[int], float] = lambda t: 0.1,
    finish: Callable[[Tensor, Tensor, float], Tensor] = lambda w, update, lr: w - lr * update,
) -> Tensor:
    """Adam with β = (0.9, 0.99), ε = 1e-8 on project(g, w); ``finish`` applies the update m̂/(√v̂+ε)."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(gradients):
        direction = project(g, w)
        m = 0.9 * m + 0.1 * direction
        v = 0.99 * v + 0.01 * direction * direction
        m_hat, v_hat = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.99 ** (t + 1))
        w = finish(w, m_hat / (v_hat.sqrt() + 1e-8), lr(t))
    return w


@functools.cache
def all_gradients() -> list[dict[str, Tensor]]:
    found = []
    for step in range(STEPS):
        model = zoo()
        give_gradients(model, step)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return found


def gradients_of(name: str) -> list[Tensor]:
    """Return the gradients of the steps, as `give_gradients` sets them."""
    return [gradients[name].clone() for gradients in all_gradients()]


def assert_equals_reference(
    actual: dict[str, Tensor], reference: Callable[[str, Tensor, list[Tensor]], Tensor]
) -> None:
    start = dict(zoo().named_parameters())
    for name, value in actual.items():
        expected = reference(name, start[name].detach().clone(), gradients_of(name))
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def placed(name: str, weight_decay: float, decay: str) -> Callable[[Tensor, Tensor], Tensor]:
    """P(g + λw) with decay inside the projection, P(g) + λw with it outside."""
    if decay == "inside":
        return lambda g, w: centred(name, g + weight_decay * w)
    return lambda g, w: centred(name, g) + weight_decay * w


# the operator -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(6, 2),
        lambda: nn.Conv1d(2, 2, 3),
        lambda: nn.Conv2d(4, 2, (1, 3), groups=2),
        lambda: nn.ConvTranspose1d(2, 2, 3),
        lambda: nn.ConvTranspose1d(4, 2, 3, groups=2),
    ],
)
def test_the_operator_is_the_projection_p(make: Callable[[], nn.Module]) -> None:
    """Apply it to every unit gradient of output unit 1: the images are the columns of P = I − e eᵀ, e = 1/√6."""
    layer = make().double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    wellcond.attach(optimizer, layer, GradientCentralization())
    transposed = isinstance(layer, nn.ConvTranspose1d)
    groups = getattr(layer, "groups", 1)

    def unit_row(tensor: Tensor) -> Tensor:
        if not transposed:
            return tensor[1]
        return tensor[:, 1] if groups == 1 else tensor[2:, 0]

    columns = []
    for j in range(6):
        layer.weight.grad = torch.zeros_like(layer.weight)
        row = unit_row(layer.weight.grad)
        row[tuple(int(i) for i in torch.unravel_index(torch.tensor(j), row.shape))] = 1.0
        others = layer.weight.grad.clone()
        optimizer.step()
        columns.append(unit_row(layer.weight.grad).flatten().clone())
        unit_row(others).zero_()
        rest = layer.weight.grad.clone()
        unit_row(rest).zero_()
        assert torch.equal(rest, others)
    p = torch.stack(columns, dim=1)
    e = torch.full((6,), 1 / math.sqrt(6), dtype=torch.float64)
    torch.testing.assert_close(p, torch.eye(6, dtype=torch.float64) - torch.outer(e, e), rtol=0, atol=1e-15)
    torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-15)
    torch.testing.assert_close(p, p.mT, rtol=0, atol=1e-15)


@given(
    seed=st.integers(0, 10**6),
    out=st.integers(1, 5),
    inputs=st.integers(2, 9),
    offset=st.sampled_from([0.0, 1.0, -1e3]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rows_sum_to_zero_and_the_norm_does_not_grow(seed: int, out: int, inputs: int, offset: float) -> None:
    """(4.8), and by Pythagoras exactly: ‖Φ(G)‖² = ‖G‖² − D Σ mean(g_i)²."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inputs, out, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    wellcond.attach(optimizer, layer, GradientCentralization())
    g = offset + torch.randn(out, inputs, generator=generator, dtype=torch.float64)
    layer.weight.grad = g.clone()
    optimizer.step()
    after = layer.weight.grad
    assert float(after.sum(dim=1).abs().max()) < 1e-12 * inputs * (1 + abs(offset))
    assert float(after.norm()) <= float(g.norm()) * (1 + 1e-14)
    removed = sum(inputs * float(row.mean()) ** 2 for row in g)
    assert float(after.norm() ** 2) == pytest.approx(float(g.norm() ** 2) - removed, rel=1e-9, abs=1e-9 * removed)


def test_every_weight_is_centred_over_all_but_its_output_unit() -> None:
    model = zoo()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wellcond.attach(optimizer, model, GradientCentralization())
    give_gradients(model, 0)
    expected = {name: centred(name, p.grad) for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-14)
        if name not in CENTRED:
            assert torch.equal(parameter.grad, expected[name]), name


# row sums -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 0.3},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.3},
        {"momentum": 0.9, "weight_decay": 0.3, "maximize": True},
    ],
    ids=str,
)
def test_row_sums_stay_for_ever_under_sgd(options: dict[str, Any]) -> None:
    start = dict(zoo().named_parameters())
    end = trained(lambda p: torch.optim.SGD(p, lr=0.1, **options), GradientCentralization(), steps=30)
    for name in CENTRED:
        assert not torch.allclose(end[name], start[name])
        torch.testing.assert_close(row_sums(name, end[name]), row_sums(name, start[name]), rtol=0, atol=1e-12)


def test_with_decay_outside_the_row_sums_shrink() -> None:
    start = dict(zoo().named_parameters())
    end = trained(
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3), GradientCentralization(decay="outside"), steps=10
    )
    for name in CENTRED:
        expected = row_sums(name, start[name]) * (1 - 0.1 * 0.3) ** 10
        torch.testing.assert_close(row_sums(name, end[name]), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("gamma", [-2.0, 0.5, 10.0])
def test_the_answer_to_a_shift_of_the_input_never_changes(gamma: float) -> None:
    """(4.5), c for its gamma: w_tᵀx − w_tᵀ(x + c·1) = −c·1ᵀw_0 whatever t."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 3, dtype=torch.float64)
    first = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
    wellcond.attach(optimizer, layer, GradientCentralization())
    for _ in range(20):
        optimizer.zero_grad()
        layer(torch.rand(8, 6, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        x = torch.randn(6, dtype=torch.float64)
        with torch.no_grad():
            change = layer(x) - layer(x + gamma)
        torch.testing.assert_close(change, -gamma * first.sum(dim=1), rtol=0, atol=1e-12)


# reference optimizers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["inside", "outside"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "maximize": True},
    ],
    ids=str,
)
def test_sgd_equals_algorithm_3(decay: str, options: dict[str, Any]) -> None:
    actual = trained(
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.2, **options),
        GradientCentralization(decay=decay),
    )
    assert_equals_reference(actual, lambda name, w, g: reference_sgd(placed(name, 0.2, decay), w, g, **options))


@pytest.mark.parametrize("decay", ["inside", "outside"])
def test_adam_with_l2_decay_equals_algorithm_4(decay: str) -> None:
    actual = trained(
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99), weight_decay=0.2),
        GradientCentralization(decay=decay),
    )
    assert_equals_reference(actual, lambda name, w, g: reference_adam(placed(name, 0.2, decay), w, g))


@pytest.mark.parametrize("where", ["gradient", "update"])
@pytest.mark.parametrize("decay", ["inside", "outside"])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam])
def test_decoupled_decay_inside_is_centred_and_outside_is_not(
    where: str, decay: str, make: type[torch.optim.Optimizer]
) -> None:
    extra = {} if make is torch.optim.AdamW else {"decoupled_weight_decay": True}
    actual = trained(
        lambda p: make(p, lr=0.1, betas=(0.9, 0.99), weight_decay=0.2, **extra),
        GradientCentralization(where=where, decay=decay),
    )

    def reference(name: str, w: Tensor, gradients: list[Tensor]) -> Tensor:
        def finish(w: Tensor, update: Tensor, lr: float) -> Tensor:
            update = centred(name, update) if where == "update" else update
            shrink = centred(name, w) if decay == "inside" else w
            return w - lr * update - lr * 0.2 * shrink

        project = (lambda g, w: centred(name, g)) if where == "gradient" else (lambda g, w: g)
        return reference_adam(project, w, gradients, finish=finish)

    assert_equals_reference(actual, reference)


def test_centring_the_update_with_l2_decay_inside_centres_the_whole_update() -> None:
    actual = trained(
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99), weight_decay=0.2),
        GradientCentralization(where="update"),
    )

    def reference(name: str, w: Tensor, gradients: list[Tensor]) -> Tensor:
        def finish(w: Tensor, update: Tensor, lr: float) -> Tensor:
            return w - lr * centred(name, update)

        return reference_adam(lambda g, w: g + 0.2 * w, w, gradients, finish=finish)

    assert_equals_reference(actual, reference)


def schedule(step: int) -> float:
    return 0.1 / (1 + step)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_changing_learning_rate_and_decay_are_read_at_every_step(as_tensor: bool) -> None:
    def decay_at(step: int) -> float:
        return 0.3 * step  # zero in the first step: a flag read once would miss it

    model = zoo()
    lr = torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=0.0)
    wellcond.attach(optimizer, model, GradientCentralization())

    def before(step: int) -> None:
        group = optimizer.param_groups[0]
        group["weight_decay"] = decay_at(step)
        if as_tensor:
            group["lr"].fill_(schedule(step))
        else:
            group["lr"] = schedule(step)

    train(model, optimizer, before_step=before)

    def reference(name: str, w: Tensor, gradients: list[Tensor]) -> Tensor:
        buffer = None
        for t, g in enumerate(gradients):
            direction = centred(name, g + decay_at(t) * w)
            buffer = direction if buffer is None else 0.9 * buffer + direction
            w = w - schedule(t) * buffer
        return w

    assert_equals_reference({n: p.detach() for n, p in model.named_parameters()}, reference)


# where="update" -----------------------------------------------------------------------------------------------------

ADAPTIVE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p, **o: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, **o),
    "Adam": lambda p, **o: torch.optim.Adam(p, lr=0.05, **o),
    "Adam amsgrad": lambda p, **o: torch.optim.Adam(p, lr=0.05, amsgrad=True, **o),
    "AdamW": lambda p, **o: torch.optim.AdamW(p, lr=0.05, **o),
    "RAdam": lambda p, **o: torch.optim.RAdam(p, lr=0.05, **o),
    "RAdam decoupled": lambda p, **o: torch.optim.RAdam(p, lr=0.05, decoupled_weight_decay=True, **o),
    "NAdam": lambda p, **o: torch.optim.NAdam(p, lr=0.05, **o),
    "NAdam decoupled": lambda p, **o: torch.optim.NAdam(p, lr=0.05, decoupled_weight_decay=True, **o),
    "Adagrad": lambda p, **o: torch.optim.Adagrad(p, lr=0.05, **o),
    "Adadelta": lambda p, **o: torch.optim.Adadelta(p, lr=0.5, **o),
    "Adamax": lambda p, **o: torch.optim.Adamax(p, lr=0.05, **o),
    "RMSprop": lambda p, **o: torch.optim.RMSprop(p, lr=0.05, momentum=0.5, centered=True, **o),
    "Adafactor": lambda p, **o: torch.optim.Adafactor(p, lr=0.05, **o),
}
DECOUPLED = ("AdamW", "RAdam decoupled", "NAdam decoupled", "Adafactor")


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_centred_updates_leave_row_means_where_they_were(name: str, weight_decay: float) -> None:
    start = dict(zoo().named_parameters())
    end = trained(
        lambda p: ADAPTIVE[name](p, weight_decay=weight_decay), GradientCentralization(where="update"), steps=15
    )
    for weight in CENTRED:
        assert not torch.allclose(end[weight], start[weight])
        torch.testing.assert_close(row_sums(weight, end[weight]), row_sums(weight, start[weight]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in ADAPTIVE if name != "Adafactor"])
def test_centring_updates_projects_the_plain_optimizers_own_path(name: str) -> None:
    """Without decay these updates depend on gradients alone, here given: w_t − w_0 must be P applied to the plain one.

    Adafactor is left out: it scales its update by the weight's own size.
    """
    start = {k: v.detach() for k, v in zoo().named_parameters()}
    plain = trained(lambda p: ADAPTIVE[name](p, weight_decay=0.0))
    actual = trained(lambda p: ADAPTIVE[name](p, weight_decay=0.0), GradientCentralization(where="update"))
    for weight, value in actual.items():
        expected = start[weight] + centred(weight, plain[weight] - start[weight])
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", DECOUPLED)
def test_outside_decoupled_decay_row_means_follow_the_decay_alone(name: str) -> None:
    """Row means are multiplied by 1 − lr·λ in each step, with lr and λ as they are in that step."""
    start = dict(zoo().named_parameters())
    model = zoo()
    optimizer = ADAPTIVE[name](model.parameters(), weight_decay=0.3)
    wellcond.attach(optimizer, model, GradientCentralization(where="update", decay="outside"))

    def before(step: int) -> None:
        optimizer.param_groups[0]["lr"] = schedule(step)
        optimizer.param_groups[0]["weight_decay"] = 0.2 + 0.1 * step

    train(model, optimizer, before_step=before)
    share = math.prod(1 - schedule(t) * (0.2 + 0.1 * t) for t in range(STEPS))
    for weight in CENTRED:
        expected = share * row_sums(weight, start[weight])
        torch.testing.assert_close(row_sums(weight, model.get_parameter(weight)), expected, rtol=1e-10, atol=1e-12)


def test_the_gradient_itself_is_not_changed_when_updates_are_centred() -> None:
    model = zoo()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    wellcond.attach(optimizer, model, GradientCentralization(where="update"))
    give_gradients(model, 0)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, before[name])


def test_centred_updates_keep_row_means_when_the_closure_runs_several_times_within_a_step() -> None:
    """L-BFGS moves the weights between its closure calls: the row means to keep are those before the step."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, dtype=torch.float64)
    start = layer.weight.detach().mean(dim=1)
    inputs, targets = torch.rand(16, 5, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.1, max_iter=4)
    wellcond.attach(optimizer, layer, GradientCentralization(where="update"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (layer(inputs) - targets).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    torch.testing.assert_close(layer.weight.detach().mean(dim=1), start, rtol=0, atol=1e-12)


@pytest.mark.parametrize("where", ["gradient", "update"])
@pytest.mark.parametrize("make", ["SGD", "AdamW"])
def test_a_weight_without_a_gradient_is_left_as_the_plain_optimizer_leaves_it(where: str, make: str) -> None:
    model = zoo()
    optimizer = ADAPTIVE[make](model.parameters(), weight_decay=0.3)
    wellcond.attach(optimizer, model, GradientCentralization(where=where))
    for step in range(4):
        give_gradients(model, step)
        if step >= 2:
            model.up2.weight.grad = None
            before = model.up2.weight.detach().clone()
        optimizer.step()
        if step >= 2:
            assert torch.equal(model.up2.weight, before)


# which layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["gradient", "update"])
@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("all", CENTRED),
        ("conv", CONV_WEIGHTS),
        (lambda name, module: name in ("linear", "up1"), {"linear.weight", "up1.weight"}),
        (lambda name, module: isinstance(module, nn.GRUCell), {"cell.weight_ih", "cell.weight_hh"}),
        (lambda name, module: False, set()),
    ],
    ids=["all", "conv", "by name", "by type", "none"],
)
@pytest.mark.filterwarnings("ignore:GradientCentralization covers none")
def test_exactly_the_chosen_layers_are_centred(where: str, layers: Any, chosen: set[str]) -> None:
    """All others are bit-identical to the plain optimizer's."""
    plain = trained(lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1))
    actual = trained(
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
        GradientCentralization(layers=layers, where=where),
    )
    changed = {name for name in plain if not torch.equal(plain[name], actual[name])}
    assert changed == chosen


def test_biases_norm_scales_and_embeddings_are_never_touched_by_default() -> None:
    plain = trained(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    actual = trained(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), GradientCentralization())
    untouched = {name for name in plain if torch.equal(plain[name], actual[name])}
    assert {"embedding.weight", "scale.weight", "layer_norm.weight", "batch_norm.weight"} <= untouched
    assert {name for name in plain if "bias" in name} <= untouched


def test_an_embedding_that_is_asked_for_is_centred_over_tokens() -> None:
    """Its output units are the features: the mean of each column of (tokens, features) goes."""
    model = zoo()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wellcond.attach(optimizer, model, GradientCentralization(layers=lambda name, module: name == "embedding"))
    give_gradients(model, 0)
    gradient = model.embedding.weight.grad
    assert gradient is not None
    expected = gradient - gradient.mean(dim=0, keepdim=True)
    optimizer.step()
    torch.testing.assert_close(model.embedding.weight.grad, expected, rtol=0, atol=1e-14)


def test_a_predicate_is_not_asked_about_norms_it_cannot_have() -> None:
    """Norm scales: never, even when a predicate says yes to everything."""
    actual = trained(lambda p: torch.optim.SGD(p, lr=0.1), GradientCentralization(layers=lambda name, module: True))
    plain = trained(lambda p: torch.optim.SGD(p, lr=0.1))
    for name in ("batch_norm.weight", "layer_norm.weight", "scale.weight", "linear.bias"):
        assert torch.equal(plain[name], actual[name])


@pytest.mark.filterwarnings("ignore:GradientCentralization covers none")
def test_one_input_per_output_unit_is_left_alone_and_reported() -> None:
    """Centring a row of one number would stop the layer from learning at all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Conv2d(4, 4, 1, groups=4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, GradientCentralization())
    give_gradients(model, 0)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)
    lines = [line for line in handle.report().splitlines() if line.startswith(("0.weight", "1.weight"))]
    assert len(lines) == 2
    assert all("not centred" in line for line in lines)


def test_the_report_has_a_line_for_every_parameter_and_names_unknown_types() -> None:
    model = zoo()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, GradientCentralization())
    lines = {line.split()[0]: line for line in handle.report().splitlines()}
    assert {name for name, _ in model.named_parameters()} <= set(lines)
    assert "Scale" in lines["scale.weight"]
    for name in CENTRED:
        assert "centred over" in lines[name]
        assert "not centred" not in lines[name]


# implementations of one optimizer -----------------------------------------------------------------------------------


@parametrize_pairs(
    ("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad]),
    ("variant", [{"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}]),
    ("where", ["gradient", "update"]),
)
def test_foreach_fused_and_for_loop_give_the_same(
    where: str, variant: dict[str, bool], make: type[torch.optim.Optimizer]
) -> None:
    transform = GradientCentralization(where=where)
    expected = trained(lambda p: make(p, lr=0.05, weight_decay=0.1, foreach=False), transform)
    actual = trained(lambda p: make(p, lr=0.05, weight_decay=0.1, **variant), transform)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("where", ["gradient", "update"])
def test_a_tensor_learning_rate_is_as_good_as_a_number(where: str) -> None:
    transform = GradientCentralization(where=where, decay="outside")
    lr = torch.tensor(0.05, dtype=torch.float64)
    expected = trained(lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, foreach=False), transform)
    actual = trained(lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.1, foreach=False), transform)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)
    assert float(lr) == 0.05


def test_parameter_groups_keep_their_own_decay_and_learning_rate() -> None:
    model = zoo()
    groups = [
        {"params": list(model.linear.parameters()), "lr": 0.2, "weight_decay": 0.5},
        {"params": list(model.up1.parameters()), "lr": 0.01, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    wellcond.attach(optimizer, model, GradientCentralization())
    train(model, optimizer)
    start = dict(zoo().named_parameters())
    for name, lr, weight_decay in (("linear.weight", 0.2, 0.5), ("up1.weight", 0.01, 0.0)):
        expected = reference_sgd(
            placed(name, weight_decay, "inside"), start[name].detach(), gradients_of(name), lr=lambda t, lr=lr: lr
        )
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=1e-11, atol=1e-12)
    assert torch.equal(model.conv2.weight, start["conv2.weight"])


def test_bfloat16_gradients_are_centred_to_their_own_precision() -> None:
    model = zoo(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wellcond.attach(optimizer, model, GradientCentralization())
    give_gradients(model, 0)
    expected = {name: centred(name, p.grad.double()) for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    for name in CENTRED:
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.dtype == torch.bfloat16
        # Half a unit in the last place of the mean, and half of one of the difference.
        torch.testing.assert_close(gradient.double(), expected[name], rtol=2**-8, atol=2 * 2**-8)


@pytest.mark.parametrize("where", ["gradient", "update"])
def test_channels_last_weights_are_centred_alike(where: str) -> None:
    transform = GradientCentralization(where=where)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2)).double()
        model.to(memory_format=memory_format)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        wellcond.attach(optimizer, model, transform)
        for _ in range(3):
            optimizer.zero_grad()
            inputs = torch.linspace(-1, 2, 2 * 3 * 36, dtype=torch.float64).reshape(2, 3, 6, 6)
            model(inputs.to(memory_format=memory_format)).square().mean().backward()
            optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ADAPTIVE if name not in DECOUPLED])
def test_coupled_decay_outside_a_centred_update_is_refused_when_attaching(name: str) -> None:
    model = zoo()
    transform = GradientCentralization(where="update", decay="outside")
    with pytest.raises(ValueError, match="decoupled"):
        wellcond.attach(ADAPTIVE[name](model.parameters(), weight_decay=0.1), model, transform)
    optimizer = ADAPTIVE[name](model.parameters(), weight_decay=0.0)
    wellcond.attach(optimizer, model, transform)  # no decay: nothing to tell apart
    train(model, optimizer, steps=1)


def test_a_refused_attachment_leaves_the_optimizer_as_it_was() -> None:
    model = zoo()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="decoupled"):
        wellcond.attach(optimizer, model, GradientCentralization(where="update", decay="outside"))
    train(model, optimizer)
    plain = trained(lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain[name])
    wellcond.attach(optimizer, model, GradientCentralization())


class Unlabelled(torch.optim.Optimizer):
    """An optimizer of one's own whose groups do not say how they decay."""

    def __init__(self, params: Any, lr: float, weight_decay: float, decoupled: bool) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._is_decoupled = decoupled

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                direction = p.grad.sign() if self._is_decoupled else p.grad
                p.sub_(group["lr"] * (direction + group["weight_decay"] * p))


@pytest.mark.parametrize("where", ["gradient", "update"])
@pytest.mark.parametrize("decay", ["inside", "outside"])
def test_an_optimizer_with_unknown_decay_is_asked_about_where_it_matters(where: str, decay: str) -> None:
    model = zoo()
    optimizer = Unlabelled(model.parameters(), 0.1, 0.2, decoupled=False)
    transform = GradientCentralization(where=where, decay=decay)
    if (where == "gradient") == (decay == "inside"):
        with pytest.raises(ValueError, match="weight_decay="):
            wellcond.attach(optimizer, model, transform)
    else:
        wellcond.attach(optimizer, model, transform)
        train(model, optimizer, steps=1)


@pytest.mark.parametrize("decoupled", [False, True])
def test_an_optimizer_with_unknown_decay_works_once_it_is_told(decoupled: bool) -> None:
    model = zoo()
    optimizer = Unlabelled(model.parameters(), 0.1, 0.2, decoupled)
    kind = "decoupled" if decoupled else "coupled"
    wellcond.attach(optimizer, model, GradientCentralization(), weight_decay=kind)
    train(model, optimizer)
    start = dict(zoo().named_parameters())
    for name in CENTRED:
        w = start[name].detach()
        for g in gradients_of(name):
            if decoupled:
                w = w - 0.1 * centred(name, g).sign() - 0.1 * 0.2 * centred(name, w)
            else:
                w = w - 0.1 * centred(name, g + 0.2 * w)
        torch.testing.assert_close(model.get_parameter(name).detach(), w, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("layers", "linear"),
        ("layers", None),
        ("layers", ["conv"]),
        ("where", "momentum"),
        ("where", None),
        ("decay", "both"),
        ("decay", True),
    ],
)
def test_bad_arguments_are_named_with_their_value_and_what_is_allowed(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument) as caught:
        GradientCentralization(**{argument: value})
    assert repr(value) in str(caught.value)
    allowed = {"layers": "conv", "where": "update", "decay": "outside"}[argument]
    assert allowed in str(caught.value)


def test_a_bad_weight_decay_kind_is_refused() -> None:
    model = zoo()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="weight_decay.*l2"):
        wellcond.attach(optimizer, model, GradientCentralization(), weight_decay="l2")
