"""Inequality 4.8 and the landscape along a step, against quadratic losses and dense Hessians; the model stays."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.utils import parametrizations

from pairs import parametrize_pairs
from wellcond.diagnostics._landscape import Landscape, landscape
from wellcond.diagnostics._lipschitz import Lipschitz, Smoothness, dominant_eigenvalue, lipschitz
from wellcond.nn import KalmanBatchNorm2d, MomentumBatchNorm2d, SwitchableNorm2d, WhitenedLinear

OUT, IN, SAMPLES = 3, 6, 10


def close(value: Any, rel: float = 1e-8) -> Any:
    return pytest.approx(value, rel=rel, abs=1e-10)


def projection(width: int) -> Tensor:
    """P = I − e eᵀ, e = 1/√D · 1."""
    e = torch.full((width,), width**-0.5, dtype=torch.float64)
    return torch.eye(width, dtype=torch.float64) - torch.outer(e, e)


class Quadratic:
    """The loss 1/2 Σ_s y_sᵀ B y_s + bᵀ y_s with y = W x, whose Hessian is B ⊗ XᵀX."""

    def __init__(self, sign: float = 1.0) -> None:
        torch.manual_seed(3)
        self.model = nn.Linear(IN, OUT, bias=False).double()
        # A mean that is far from zero, as after a ReLU, is what centralization takes away.
        self.x = torch.randn(SAMPLES, IN, dtype=torch.float64) + 1.0
        eigenvectors = torch.linalg.qr(torch.randn(OUT, OUT, dtype=torch.float64)).Q
        self.between = sign * eigenvectors @ torch.diag(torch.tensor([3.0, 1.0, -0.5]).double()) @ eigenvectors.T
        self.linear = torch.randn(OUT, dtype=torch.float64)
        self.hessian = torch.kron(self.between, self.x.T @ self.x)
        self.project = torch.kron(torch.eye(OUT, dtype=torch.float64), projection(IN))

    def loss(self, output: Tensor, batch: Tensor) -> Tensor:
        return 0.5 * (output @ self.between * output).sum() + (output @ self.linear).sum()

    def value(self, weight: Tensor) -> float:
        return float(self.loss(self.x @ weight.view(OUT, IN).T, self.x))

    @property
    def weight(self) -> Tensor:
        return self.model.weight.detach().clone().flatten()

    @property
    def gradient(self) -> Tensor:
        return self.hessian @ self.weight + torch.outer(self.linear, self.x.sum(0)).flatten()


# inequality 4.8 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_quadratic_loss(sign: float) -> None:
    own = Quadratic(sign)
    found = lipschitz(own.model, own.x, own.loss, tolerance=1e-10)
    assert found.loss == close(own.value(own.weight))
    whole, p, h = found.whole, own.project, own.hessian
    assert whole.gradient_norm == close(float(own.gradient.norm()))
    assert whole.centred_gradient_norm == close(float((p @ own.gradient).norm()))
    values = torch.linalg.eigvalsh(h)
    assert whole.hessian_eigenvalue == close(float(values[values.abs().argmax()]))
    assert math.copysign(1, whole.hessian_eigenvalue) == sign
    values = torch.linalg.eigvalsh(p @ h @ p)
    assert whole.projected_eigenvalue == close(float(values[values.abs().argmax()]))
    assert whole.centred_hessian_norm == close(float(torch.linalg.matrix_norm(p @ h, 2)))
    assert whole.hessian_norm == abs(whole.hessian_eigenvalue)
    assert whole.projected_hessian_norm < whole.centred_hessian_norm < whole.hessian_norm
    assert whole.gradient_ratio == whole.centred_gradient_norm / whole.gradient_norm
    assert whole.hessian_ratio == whole.projected_hessian_norm / whole.hessian_norm
    assert found.holds
    assert whole.converged
    assert whole.residual <= 1e-10
    assert found.layers == {}


class Nonlinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 2, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 2, groups=2)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.up(torch.tanh(self.first(x))).tanh().mean((2, 3)))


def nonlinear() -> tuple[Nonlinear, tuple[Tensor, Tensor]]:
    torch.manual_seed(5)
    model = Nonlinear().double()
    return model, (torch.randn(8, 4, 3, 3, dtype=torch.float64) + 1, torch.arange(8) % 3)


def cross_entropy(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])


def units_of(name: str, shape: torch.Size) -> list[Tensor]:
    """Return, for each output unit, which of a weight's elements are its vector; by hand for `Nonlinear`."""
    places = torch.arange(shape.numel()).view(shape)
    if name == "up.weight":
        return [places[2 * group : 2 * group + 2, out].flatten() for group in range(2) for out in range(2)]
    return [row.flatten() for row in places]


def dense(model: nn.Module, batch: Any, names: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradient, Hessian and P in some weights."""
    weights = [model.get_parameter(name).detach() for name in names]
    sizes = [weight.numel() for weight in weights]

    def loss(vector: Tensor) -> Tensor:
        parts = [part.view_as(weight) for part, weight in zip(vector.split(sizes), weights, strict=True)]
        return cross_entropy(functional_call(model, dict(zip(names, parts, strict=True)), (batch[0],)), batch)

    start = torch.cat([weight.flatten() for weight in weights])
    blocks = []
    for name, weight in zip(names, weights, strict=True):
        block = torch.eye(weight.numel(), dtype=torch.float64)
        for unit in units_of(name, weight.shape):
            block[unit[:, None], unit] = projection(len(unit))
        blocks.append(block)
    return (
        torch.autograd.functional.jacobian(loss, start),
        torch.autograd.functional.hessian(loss, start),
        torch.block_diag(*blocks),
    )


def test_all_weights_and_each_against_dense_hessians() -> None:
    model, batch = nonlinear()
    names = ["first.weight", "up.weight", "last.weight"]
    found = lipschitz(model, batch, cross_entropy, per_layer=True, iterations=200, tolerance=1e-9)
    assert list(found.layers) == names
    for own, weights in [(found.whole, names), *((found.layers[name], [name]) for name in names)]:
        g, h, p = dense(model, batch, weights)
        assert own.gradient_norm == close(float(g.norm()))
        assert own.centred_gradient_norm == close(float((p @ g).norm()))
        assert own.hessian_norm == close(float(torch.linalg.matrix_norm(h, 2)))
        assert own.centred_hessian_norm == close(float(torch.linalg.matrix_norm(p @ h, 2)))
        assert own.projected_hessian_norm == close(float(torch.linalg.matrix_norm(p @ h @ p, 2)))
        assert own.holds
        assert own.converged
    chosen = lipschitz(model, batch, cross_entropy, where=lambda name, module: name == "up", tolerance=1e-9)
    assert chosen.whole.hessian_norm == close(found.layers["up.weight"].hessian_norm)


def test_a_few_iterations_stay_below_and_say_so() -> None:
    own = Quadratic()
    exact = float(torch.linalg.matrix_norm(own.hessian, 2))
    norms = []
    for iterations in (1, 2, 3):
        found = lipschitz(own.model, own.x, own.loss, iterations=iterations, tolerance=1e-12).whole
        assert found.products == 4 * iterations
        norms.append(found.hessian_norm)
    assert norms == sorted(norms)
    assert norms[-1] <= exact * (1 + 1e-12)
    first = lipschitz(own.model, own.x, own.loss, iterations=1, tolerance=1e-12)
    assert not first.whole.converged
    assert " open " in str(first)


def test_a_linear_loss_has_no_hessian() -> None:
    model = nn.Linear(4, 3).double()
    x = torch.rand(5, 4, dtype=torch.float64)
    found = lipschitz(model, x, lambda output, batch: output.sum()).whole
    assert found.hessian_norm == found.projected_hessian_norm == found.centred_hessian_norm == found.residual == 0.0
    assert found.hessian_ratio == 1.0
    assert found.gradient_norm == close(float(x.sum(0).norm()) * math.sqrt(3))
    assert found.holds


def test_the_inequality_can_fail_to_hold() -> None:
    fine = Smoothness(2.0, 1.0, -3.0, 1.0, 2.0, 1e-3, 12, 1e-2)
    assert fine.holds
    for changes in ({"centred_gradient_norm": 2.1}, {"projected_eigenvalue": -2.5}, {"centred_hessian_norm": 3.5}):
        assert not Smoothness(**(vars(fine) | changes)).holds
        assert " fails " in str(Lipschitz(1.0, Smoothness(**(vars(fine) | changes)), {}))


@pytest.mark.parametrize("seed", range(3))
def test_the_dominant_eigenvalue(seed: int) -> None:
    torch.manual_seed(seed)
    matrix = torch.randn(40, 40, dtype=torch.float64)
    matrix = matrix + matrix.T
    values = torch.linalg.eigvalsh(matrix)
    start = torch.randn(40, dtype=torch.float64)
    found, residual = dominant_eigenvalue(matrix.mv, start, 200, 1e-3)
    exact = float(values[values.abs().argmax()])
    assert residual <= 1e-3
    assert abs(found - exact) <= residual * abs(found)
    assert dominant_eigenvalue(matrix.mv, start, 200, 1e-9)[0] == close(exact)
    # A pair λ, −λ, which makes plain power iteration go round in circles.
    pair = torch.diag(torch.tensor([2.0, -2.0, 1.0]).double())
    assert abs(dominant_eigenvalue(pair.mv, start[:3], 10, 1e-9)[0]) == close(2.0)
    # In one dimension, of a multiple of the identity, and of zero, the first product says all.
    assert dominant_eigenvalue(lambda v: -7 * v, start, 10, 1e-9)[0] == close(-7.0)
    assert dominant_eigenvalue(lambda v: 0 * v, start, 10, 1e-9) == (0.0, 0.0)
    assert dominant_eigenvalue(lambda v: 5 * v, start[:1], 10, 1e-9) == close((5.0, 0.0))
    assert dominant_eigenvalue(lambda v: v, torch.zeros(3), 10, 1e-9) == (0.0, 0.0)
    assert math.isnan(dominant_eigenvalue(lambda v: math.inf * v, start, 10, 1e-9)[0])


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class FirstOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled() and grad.requires_grad:
            raise NotImplementedError("no double backward here")
        return 2 * grad


def test_what_has_no_second_derivative_is_an_error() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    # Torch itself would not notice the first: the gradient that comes in is constant.
    for loss in (
        lambda output, batch: OnceOnly.apply(output).sum(),
        lambda output, batch: OnceOnly.apply(output).square().sum(),
    ):
        with pytest.raises(RuntimeError, match="lipschitz needs second derivatives, .* OnceOnly is marked"):
            lipschitz(model, torch.rand(4, 3), loss)
    with pytest.raises(RuntimeError, match="lipschitz needs second derivatives, .* differentiated twice"):
        lipschitz(model, torch.rand(4, 3), lambda output, batch: FirstOnly.apply(output).square().sum())
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


# landscape ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centralize", [False, True])
def test_along_a_step_of_a_quadratic_loss(centralize: bool) -> None:
    own = Quadratic()
    p = own.project if centralize else torch.eye(OUT * IN, dtype=torch.float64)
    w, g, h = own.weight, p @ own.gradient, own.hessian
    sizes = (0.1, 0.01, 0.3)
    found = landscape(own.model, own.x, own.loss, step_sizes=sizes, centralize=centralize)
    assert torch.equal(own.weight, w)
    assert found.loss == close(own.value(w))
    assert found.gradient_norm == close(float(g.norm()))
    assert found.step_sizes == sizes
    assert found.losses == close(tuple(own.value(w - size * g) for size in sizes))
    assert found.distances == close(tuple(size * float(g.norm()) for size in sizes))
    assert found.gradient_changes == close(tuple(size * float((p @ h @ g).norm()) for size in sizes))
    # The gradient of a quadratic loss changes at one rate.
    beta = float((p @ h @ g).norm() / g.norm())
    assert found.smoothness == close((beta,) * 3)
    assert found.effective_smoothness == close(beta)
    assert beta <= float(torch.linalg.matrix_norm(p @ h @ p, 2))
    assert found.loss_range == (min(found.losses), max(found.losses))
    assert found.centralize is centralize


def test_parameters_of_all_kinds_are_moved() -> None:
    model, batch = nonlinear()
    twin = copy.deepcopy(model)
    cross_entropy(twin(batch[0]), batch).backward()
    start = {name: p.grad.clone() for name, p in twin.named_parameters()}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter -= 0.5 * parameter.grad
    twin.zero_grad()
    loss = cross_entropy(twin(batch[0]), batch)
    loss.backward()
    changes = [start[name] - p.grad for name, p in twin.named_parameters()]
    found = landscape(model, batch, cross_entropy, step_sizes=[0.5])
    assert found.losses == close((float(loss.detach()),))
    assert found.gradient_changes == close((math.sqrt(sum(float(change.square().sum()) for change in changes)),))
    # Of one module alone: the others' parameters stay.
    chosen = landscape(model, batch, cross_entropy, step_sizes=[0.5], where=lambda name, module: name == "last")
    norm = math.hypot(float(start["last.weight"].norm()), float(start["last.bias"].norm()))
    assert chosen.gradient_norm == close(norm)
    model.last.bias.requires_grad_(False)
    chosen = landscape(model, batch, cross_entropy, step_sizes=[0.5], where=lambda name, module: name == "last")
    assert chosen.gradient_norm == close(float(start["last.weight"].norm()))


def test_a_module_has_the_parameters_of_its_parametrizations() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    x = torch.randn(5, 4)
    found = landscape(model, x, lambda output, batch: output.square().mean(), where=lambda name, module: name == "0")
    (model(x).square().mean()).backward()
    squares = [float(p.grad.double().square().sum()) for p in model[0].parameters()]
    assert len(squares) == 3
    assert found.gradient_norm == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


def test_every_evaluation_is_of_the_same_function() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), MomentumBatchNorm1dLike(64), nn.Linear(64, 2)).double()
    x = torch.randn(16, 8, dtype=torch.float64)
    found = landscape(model, x, lambda output, batch: output.square().mean(), step_sizes=[1e-12, 1e-12])
    assert found.losses == pytest.approx((found.loss,) * 2, rel=1e-9)
    assert found.losses[0] == found.losses[1]


class MomentumBatchNorm1dLike(nn.Module):
    """Normalizes with an average over the calls in training: what it does depends on its buffer."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        self.average.mul_(0.5).add_(0.5 * x.detach().mean(0))
        return x - self.average


def test_weights_of_few_digits_say_how_far_they_went() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4).bfloat16()
    x = torch.randn(16, 8, dtype=torch.bfloat16)

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return output.float().square().mean()

    found = landscape(model, x, loss, step_sizes=[1e-9, 0.1])
    assert found.distances[0] < 1e-9 * found.gradient_norm * 0.5
    assert found.distances[1] == pytest.approx(0.1 * found.gradient_norm, rel=0.1)
    assert found.smoothness[0] == 0.0
    assert found.effective_smoothness == found.smoothness[1] > 0


# both -----------------------------------------------------------------------------------------------------------------


def resnet() -> tuple[nn.Module, Tensor]:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=3), torch.randn(4, 3, 24, 24)


def vit() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5, drop_rate=0.1
    )
    return model, torch.randn(4, 3, 16, 16)


def encoder() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(4, 6, 8)


def normalized(norm: Callable[[int], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm(4), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(4, 2, 2))
    return model, torch.randn(6, 2, 5, 5)


def whitened() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(WhitenedLinear(5, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(16, 5)


def momentum() -> tuple[nn.Module, Tensor]:
    return normalized(MomentumBatchNorm2d)


def switchable() -> tuple[nn.Module, Tensor]:
    return normalized(SwitchableNorm2d)


def kalman() -> tuple[nn.Module, Tensor]:
    return normalized(KalmanBatchNorm2d)


def energy(output: Tensor, batch: Any) -> Tensor:
    return (output - 1).square().mean()


def few_lipschitz(model: nn.Module, batch: Any, loss: Any = energy) -> Lipschitz:
    return lipschitz(model, batch, loss, iterations=12, tolerance=0.05)


def few_landscape(model: nn.Module, batch: Any, loss: Any = energy) -> Landscape:
    return landscape(model, batch, loss, step_sizes=(0.01, 0.1))


PROBES = pytest.mark.parametrize("probe", [few_lipschitz, few_landscape])


def state_of(model: nn.Module) -> dict[str, Any]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        "values": {name: value.detach().clone() for name, value in tensors.items()},
        "places": {name: (id(value), value.data_ptr(), value._version) for name, value in tensors.items()},
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "requires": {name: p.requires_grad for name, p in model.named_parameters()},
        "attributes": [
            {k: v for k, v in vars(module).items() if not isinstance(v, dict)} for module in model.modules()
        ],
        "random": torch.get_rng_state(),
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert torch.equal(after["random"], before["random"])
    for kind in ("values", "gradients"):
        assert after[kind].keys() == before[kind].keys()
        for name, value in after[kind].items():
            assert torch.equal(value, before[kind][name]), name
    for kind in ("places", "requires", "attributes"):
        assert after[kind] == before[kind]


@parametrize_pairs(
    ("make", [resnet, vit, encoder, momentum, switchable, kalman, whitened]),
    ("probe", [few_lipschitz, few_landscape]),
    ("training", [True, False]),
)
def test_models_of_all_kinds_are_left_as_they_are_found(
    probe: Callable[..., Any], make: Callable[[], tuple[nn.Module, Tensor]], training: bool
) -> None:
    model, x = make()
    energy(model(x), x).backward()
    model.train(training)
    before = state_of(model)
    found = probe(model, x)
    assert_same(model, before)
    if isinstance(found, Lipschitz):
        assert found.whole.hessian_norm > 0
        assert found.whole.centred_gradient_norm <= found.whole.gradient_norm * (1 + 1e-6)
    else:
        assert 0 < found.effective_smoothness < math.inf


@PROBES
def test_they_are_left_as_they_are_found_when_something_raises(probe: Callable[..., Any]) -> None:
    model, x = normalized(nn.BatchNorm2d)
    energy(model(x), x).backward()
    before = state_of(model)
    calls = []

    def failing(output: Tensor, batch: Any) -> Tensor:
        calls.append(output)
        if len(calls) == (1 if probe is few_lipschitz else 3):
            raise KeyError("no label")
        return energy(output, batch)

    with pytest.raises(KeyError, match="no label"):
        probe(model, x, failing)
    assert_same(model, before)


@PROBES
def test_wrappers_calls_and_batches(probe: Callable[..., Any]) -> None:
    model, x = normalized(nn.BatchNorm2d)
    model.eval()
    expected = probe(model, x).to_dict()
    assert probe(nn.DataParallel(model), (x, 0)).to_dict() == expected
    assert probe(torch.compile(model), [x]).to_dict() == expected
    with torch.inference_mode():
        assert probe(model, x).to_dict() == expected
    function = lipschitz if probe is few_lipschitz else landscape
    options: dict[str, Any] = (
        {"iterations": 12, "tolerance": 0.05} if probe is few_lipschitz else {"step_sizes": (0.01, 0.1)}
    )
    called = function(model, {"x": x}, energy, call=lambda model, batch: model(batch["x"]), **options)
    assert called.to_dict() == expected


@pytest.mark.parametrize(
    ("function", "arguments", "error", "said"),
    [
        (lipschitz, {"iterations": 0}, ValueError, "iterations must be a positive integer, got 0"),
        (lipschitz, {"tolerance": 0.0}, ValueError, "tolerance must be between 0 and 1, got 0.0"),
        (lipschitz, {"where": lambda name, module: False}, ValueError, "where selects none"),
        (lipschitz, {"model": nn.LayerNorm(4)}, ValueError, "LayerNorm has no linear map or convolution"),
        (landscape, {"step_sizes": ()}, ValueError, r"step_sizes must be positive numbers, at least one, got \(\)"),
        (landscape, {"step_sizes": (0.1, -1)}, ValueError, r"step_sizes must be positive .* got \(0\.1, -1\)"),
        (landscape, {"step_sizes": (math.inf,)}, ValueError, r"step_sizes must be positive"),
        (landscape, {"where": "0"}, TypeError, "where must be a predicate of .*, got '0'"),
        (landscape, {"where": lambda name, module: False}, ValueError, "no parameter that where selects"),
        (landscape, {"model": nn.ReLU()}, ValueError, "ReLU has no parameter that requires a gradient"),
    ],
)
def test_bad_arguments_are_named(function: Any, arguments: Any, error: type[Exception], said: str) -> None:
    model, x = normalized(nn.BatchNorm2d)
    with pytest.raises(error, match=said):
        function(**({"model": model, "batch": x, "loss": energy} | arguments))


@pytest.mark.parametrize("function", [lipschitz, landscape])
def test_a_loss_of_something_else_is_named(function: Any) -> None:
    model, x = nn.Linear(3, 2), torch.ones(2, 3)
    other = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="the loss does not depend on any of the"):
        function(model, x, lambda output, batch: other * 2)
    with pytest.raises(TypeError, match="loss must return a scalar tensor, got int"):
        function(model, x, lambda output, batch: 0)


# results --------------------------------------------------------------------------------------------------------------


def test_tables_and_dictionaries() -> None:
    model, batch = nonlinear()
    bounds = lipschitz(model, batch, cross_entropy, per_layer=True)
    lines = str(bounds).splitlines()
    assert repr(bounds) == str(bounds)
    assert lines[0] == f"Lipschitzness with and without centralization, at a loss of {bounds.loss:.4g}"
    assert [line.split()[0] for line in lines[2:]] == ["(all)", *bounds.layers]
    assert lines[2].split()[1] == f"{bounds.whole.gradient_norm:.4g}"
    assert all(line.split()[-2] == "holds" for line in lines[2:])
    read = json.loads(json.dumps(bounds.to_dict()))
    assert read == bounds.to_dict()
    assert read["whole"]["hessian_norm"] == bounds.whole.hessian_norm
    assert read["layers"]["last.weight"]["holds"] is True
    step = landscape(model, batch, cross_entropy, step_sizes=(0.1, 0.2))
    lines = repr(step).splitlines()
    assert lines[0].startswith(f"Loss {step.loss:.4g} along a step against its gradient of norm")
    assert [line.split()[0] for line in lines[2:]] == ["0.1", "0.2"]
    read = json.loads(json.dumps(step.to_dict()))
    assert read == step.to_dict()
    assert read["effective_smoothness"] == step.effective_smoothness == max(read["smoothness"])
    broken = Landscape(1.0, 1.0, (0.1, 0.2), (1.0, math.nan), (1.0, math.nan), (0.1, 0.2), False)
    assert math.isnan(broken.effective_smoothness)
    assert all(map(math.isnan, broken.loss_range))
    with pytest.raises(AttributeError):
        step.loss = 0.0  # type: ignore[misc]


def test_the_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model, batch = nonlinear()
    bounds = lipschitz(model, batch, cross_entropy, per_layer=True)
    ax = bounds.plot()
    assert list(ax.lines[1].get_ydata()) == [own.hessian_ratio for own in (bounds.whole, *bounds.layers.values())]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["all weights", *bounds.layers]
    step = landscape(model, batch, cross_entropy, step_sizes=(0.2, 0.1))
    own = step.plot(label="BN")
    assert own.lines[0].get_xdata().tolist() == [0.0, 0.1, 0.2]
    assert own.lines[0].get_ydata().tolist() == [step.loss, step.losses[1], step.losses[0]]
    assert own.lines[0].get_label() == f"BN, β = {step.effective_smoothness:.3g}"
    assert step.plot(own) is own
    plt.close(ax.figure)
    plt.close(own.figure)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"Lipschitz\.plot needs matplotlib"):
        bounds.plot()
    with pytest.raises(ImportError, match=r"Landscape\.plot needs matplotlib"):
        step.plot()
