"""Decorrelated Batch Normalization, and what both whitening layers share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pairs import parametrize_pairs
from wellcond.nn.norm.decorrelated import BatchWhitening, DecorrelatedBatchNorm2d
from wellcond.nn.norm.iternorm import IterNorm2d

FLOAT64 = torch.float64
LAYERS: dict[str, Callable[..., BatchWhitening]] = {"decorrelated": DecorrelatedBatchNorm2d, "iternorm": IterNorm2d}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
widths = pytest.mark.parametrize("width", [1, 2, 3, 6])
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def draw(step: int = 0, samples: int = 5, channels: int = 6, size: tuple[int, int] = (4, 3)) -> Tensor:
    """Correlated channels of different means."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(samples, channels, *size, generator=generator, dtype=FLOAT64)
    others = torch.randn(channels, channels, generator=generator, dtype=FLOAT64)
    mixing = torch.eye(channels, dtype=FLOAT64) + 0.4 * others
    return torch.einsum("ij,njhw->nihw", mixing, x) + torch.arange(channels).view(-1, 1, 1)


def close(actual: object, expected: object, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def with_affine(layer: BatchWhitening) -> BatchWhitening:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) + 1)
    return layer


def inverse_root(layer: BatchWhitening, damped: Tensor) -> Tensor:
    """The layer's W of Σ + εI; Newton's iteration converges to the inverse root within 30 steps here."""
    identity = torch.eye(len(damped), dtype=FLOAT64)
    scale = damped.diagonal().sum()
    if not isinstance(layer, IterNorm2d):
        root, rest = identity, damped / scale
        for _ in range(30):
            step = (3 * identity - rest) / 2
            root, rest = root @ step, step @ step @ rest
        return root / scale**0.5
    root = identity
    for _ in range(layer.steps):
        root = 1.5 * root - 0.5 * root @ root @ root @ damped / scale
    return root / scale**0.5


def trained_by_formula(layer: BatchWhitening, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """y = γ·W(x − μ) + β position by position in float64; the batch's mean, unbiased variance, and W."""
    width = layer.channels_per_group
    rows = x.double().permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    count = len(rows)
    mean = rows.sum(0) / count
    outputs, roots = [], []
    for start in range(0, x.shape[1], width):
        off = rows[:, start : start + width] - mean[start : start + width]
        covariance = sum(torch.outer(row, row) for row in off) / count
        roots.append(inverse_root(layer, covariance + layer.eps * torch.eye(width, dtype=FLOAT64)))
        outputs.append(torch.stack([roots[-1] @ row for row in off]))
    y = torch.cat(outputs, 1)
    if layer.weight is not None:
        y = y * layer.weight.double() + layer.bias.double()
    y = y.view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
    own = {"running_mean": mean, "running_var": rows.var(0), "running_whitening": torch.stack(roots)}
    return y, {name: value.detach() for name, value in own.items()}


def evaluated_by_formula(layer: BatchWhitening, x: Tensor) -> Tensor:
    off = (x.double() - layer.running_mean.double().view(-1, 1, 1)).permute(0, 2, 3, 1)
    parts = off.split(layer.channels_per_group, -1)
    white = [part @ root.double().T for part, root in zip(parts, layer.running_whitening, strict=True)]
    y = torch.cat(white, -1).permute(0, 3, 1, 2)
    if layer.weight is not None:
        y = y * layer.weight.double().view(-1, 1, 1) + layer.bias.double().view(-1, 1, 1)
    return y


def covariance_of(y: Tensor) -> Tensor:
    return y.detach().double().transpose(0, 1).flatten(1).cov(correction=0)


# ------------------------------------------------------------------------------------------------------- the formula


@parametrize_pairs(
    ("make", LAYERS),
    ("width", [1, 2, 3, 6]),
    ("momentum", [0.3, None]),
    ("affine", [True, False]),
)
def test_follows_the_formula(
    make: Callable[..., BatchWhitening], width: int, momentum: float | None, affine: bool
) -> None:
    layer = make(6, width, momentum=momentum, affine=affine).double()
    with_affine(layer)
    running = {"running_mean": torch.zeros(6, dtype=FLOAT64), "running_var": torch.ones(6, dtype=FLOAT64)}
    running["running_whitening"] = torch.eye(width, dtype=FLOAT64).expand(6 // width, width, width)
    close({name: getattr(layer, name) for name in running}, running)
    for step in range(3):
        x = draw(step).requires_grad_()
        expected, own = trained_by_formula(layer, x)
        y = layer(x)
        close(y, expected)
        upstream = torch.sin(torch.arange(x.numel(), dtype=FLOAT64)).view(x.shape)
        tensors = [x, *layer.parameters()]
        close(torch.autograd.grad(y, tensors, upstream), torch.autograd.grad(expected, tensors, upstream), 1e-9)
        share = 1 / (step + 1) if momentum is None else momentum
        running = {name: (1 - share) * value + share * own[name] for name, value in running.items()}
        close({name: getattr(layer, name) for name in running}, running)
    assert int(layer.num_batches_tracked) == 3
    layer.eval()
    state = copy.deepcopy(layer.state_dict())
    x = draw(9).requires_grad_()
    y, expected = layer(x), evaluated_by_formula(layer, x)
    close(y, expected)
    tensors = [x, *layer.parameters()]
    close(torch.autograd.grad(y, tensors, upstream), torch.autograd.grad(expected, tensors, upstream))
    close(layer.state_dict(), state, 0)


def test_output_is_white_up_to_epsilon() -> None:
    """E[ŷŷᵀ] = Σ(Σ + εI)⁻¹ exactly: 1 − ε/(λ + ε) in each direction."""
    x = draw(samples=16)
    for eps in (1e-5, 1e-2):
        y = DecorrelatedBatchNorm2d(6, eps=eps, affine=False).double()(x)
        smallest = float(torch.linalg.eigvalsh(covariance_of(x))[0])
        off = covariance_of(y) - torch.eye(6)
        assert float(torch.linalg.matrix_norm(off, 2)) == pytest.approx(eps / (smallest + eps), rel=1e-6)
        close(y.mean((0, 2, 3)), torch.zeros(6))
    y = DecorrelatedBatchNorm2d(6, eps=0.0, affine=False)(x.float())
    close(covariance_of(y), torch.eye(6), 1e-4)


def test_zca_keeps_each_channel_what_it_was() -> None:
    """Of all whitenings the symmetric one is nearest to its input: with little correlation y is almost x, scaled."""
    x = torch.randn(64, 4, 5, 5, dtype=FLOAT64)
    x[:, 1] += 0.1 * x[:, 0]
    y = DecorrelatedBatchNorm2d(4, affine=False).double()(x)
    for channel in range(4):
        pair = torch.stack([x[:, channel].flatten(), y[:, channel].flatten()])
        assert float(torch.corrcoef(pair)[0, 1]) > 0.99


@layers
def test_groups_do_not_know_each_other(make: Callable[..., BatchWhitening]) -> None:
    layer = make(6, 3).double()
    x = draw().requires_grad_()
    y = layer(x)
    other = x.detach().clone()
    other[:, 3:] = draw(1)[:, 3:]
    close(layer(other)[:, :3], y[:, :3], 0)
    (grad,) = torch.autograd.grad(y[:, :3].sin().sum(), x)
    close(grad[:, 3:], torch.zeros(5, 3, 4, 3), 0)
    assert grad[:, :3].abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"channels_per_group": 1}, {"channels_per_group": 5}], ids=str)
def test_groups_of_one_channel_are_batch_normalization(options: dict[str, Any]) -> None:
    """At seven channels, five at most leave one a group."""
    layer, plain = DecorrelatedBatchNorm2d(7, **options).double(), nn.BatchNorm2d(7).double()
    assert layer.channels_per_group == 1
    for step in range(2):
        x, other = draw(step, channels=7).requires_grad_(), draw(step, channels=7).requires_grad_()
        y, expected = layer(x), plain(other)
        close(y, expected)
        y.sin().sum().backward()
        expected.sin().sum().backward()
        close(x.grad, other.grad)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        close(getattr(layer, name), getattr(plain, name))


# --------------------------------------------------------------------------------------------------------- gradients


def awkward(name: str) -> Tensor:
    """A batch [4, 4, 2, 2] whose covariance has repeated eigenvalues, or zero ones."""
    x = draw(3, samples=4, channels=4, size=(2, 2))
    if name == "constant channel":
        x[:, 1] = 3.0
    elif name == "constant":
        x = torch.full_like(x, -2.0)
    elif name == "equal channels":
        x[:, 2] = x[:, 0]
    elif name == "isotropic":
        rows = x.permute(0, 2, 3, 1).reshape(16, 4)
        x = torch.linalg.qr(rows - rows.mean(0))[0].view(4, 2, 2, 4).permute(0, 3, 1, 2).contiguous() * 4
        close(covariance_of(x), torch.eye(4))
    elif name == "fewer values than channels":
        x = x[:3, :, :1, :1].contiguous()
    return x


@parametrize_pairs(
    ("name", ["usual", "constant channel", "constant", "equal channels", "isotropic", "fewer values than channels"]),
    ("make", LAYERS),
    ("training", {"training": True, "evaluation": False}),
    ("width", [2, 4]),
)
def test_gradients(make: Callable[..., BatchWhitening], training: bool, width: int, name: str) -> None:
    layer = with_affine(make(4, width, eps=1e-2).double())
    layer(draw(4, channels=4))
    layer.train(training)
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (layer.weight, layer.bias))

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    assert torch.autograd.gradcheck(function, (awkward(name).requires_grad_(), weight, bias))


@layers
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_singular_covariances_give_finite_results(make: Callable[..., BatchWhitening], eps: float) -> None:
    for name in ("constant channel", "constant", "equal channels", "fewer values than channels"):
        layer = make(4, eps=eps)
        x = awkward(name).float().requires_grad_()
        y = layer(x)
        y.sin().sum().backward()
        assert y.isfinite().all(), name
        assert x.grad.isfinite().all(), name
        assert all(buffer.isfinite().all() for buffer in layer.buffers()), name
        # What has no variance is not magnified beyond 1/√ε times its rounding.
        assert float(y.detach().abs().max()) < 5


@layers
def test_not_a_number_gives_no_error(make: Callable[..., BatchWhitening]) -> None:
    """Loss scaling skips a step with infinite values; it must be able to."""
    x = draw().requires_grad_()
    with torch.no_grad():
        x[0, 0, 0, 0] = torch.inf
    layer = make(6, 3).double()
    y = layer(x)
    y.sum().backward()
    assert y[:, :3].isnan().all()
    assert y[:, 3:].isfinite().all()
    assert x.grad[:, 3:].isfinite().all()


# ------------------------------------------------------------------------------------------------- memory, precision


@parametrize_pairs(
    ("make", LAYERS),
    ("training", {"training": True, "evaluation": False}),
    ("width", [1, 2, 3, 6]),
    ("size", [(4, 3), (1, 2)]),
    ("dtype", [torch.float32, FLOAT64]),
)
def test_channels_last(
    make: Callable[..., BatchWhitening], training: bool, width: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    layer = with_affine(make(6, width).to(dtype)).train(training)
    twin = copy.deepcopy(layer)
    # In float32 the gradient through an eigendecomposition is good to about ε κ^1.5: κ is 14 here, and 2400 for step 0,
    # where either layout is 0.003 off the gradient in float64.
    x = draw(2, samples=32, size=size).to(dtype).requires_grad_()
    other = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    y, expected = twin(other), layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert expected.is_contiguous()
    tolerance = 1e-10 if dtype == FLOAT64 else 1e-4
    close(y, expected, tolerance)
    expected.sin().sum().backward()
    y.sin().sum().backward()
    assert other.grad.is_contiguous(memory_format=torch.channels_last)
    close(other.grad, x.grad, tolerance)
    close(dict(twin.named_buffers()), dict(layer.named_buffers()), tolerance)


@parametrize_pairs(
    ("make", LAYERS),
    ("training", {"training": True, "evaluation": False}),
    ("dtype", [torch.bfloat16, torch.float16]),
    ("cast", {"float32 module": False, "cast module": True}),
)
def test_half_precision(make: Callable[..., BatchWhitening], training: bool, dtype: torch.dtype, cast: bool) -> None:
    """The output is rounded once; nothing before it is, or W would multiply that."""
    layer = with_affine(make(6))
    layer(draw(3).float())
    if cast:
        layer.to(dtype)
    assert layer.running_whitening.dtype == torch.float32
    layer.train(training)
    x = draw().to(dtype).requires_grad_()
    expected = trained_by_formula(layer, x)[0] if training else evaluated_by_formula(layer, x)
    y = layer(x)
    assert y.dtype == dtype
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=unit, atol=1e-4)
    upstream = draw(1).to(dtype)
    tensors = [x, *layer.parameters()]
    exact = torch.autograd.grad(expected, tensors, upstream.double())
    for grad, reference in zip(torch.autograd.grad(y, tensors, upstream), exact, strict=True):
        torch.testing.assert_close(
            grad.double(), reference.double(), rtol=4 * unit, atol=4 * unit * float(reference.abs().max())
        )


@layers
@modes
def test_autocast_leaves_statistics_alone(make: Callable[..., BatchWhitening], training: bool) -> None:
    layer, x = make(6).train(training), draw().float()
    twin = copy.deepcopy(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        half = layer(nn.functional.conv2d(x, torch.ones(6, 1, 1, 1), groups=6))
    assert y.dtype == torch.float32
    assert half.dtype == torch.bfloat16
    close(y, twin(x), 0)


@layers
def test_mean_far_from_zero(make: Callable[..., BatchWhitening]) -> None:
    x = draw() + torch.tensor([1e4, -1e4, 0, 1e4, 1e4, 0]).view(-1, 1, 1)
    layer = make(6, affine=False)
    close(layer(x.float()), trained_by_formula(layer, x.float())[0], 2e-2)  # μ itself is rounded to 5e-4


# -------------------------------------------------------------------------------------------------------------- state


@layers
def test_state_dict_round_trip_and_copies(make: Callable[..., BatchWhitening]) -> None:
    layer = with_affine(make(6, 3).double())
    layer(draw())
    other = make(6, 3).double()
    other.load_state_dict(layer.state_dict())
    twin = copy.deepcopy(layer)
    for each in (other, twin):
        close(
            each(draw(1)),
            make(6, 3, affine=False).double()(draw(1)) * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1),
        )
    layer(draw(1))
    for each in (other, twin):
        close(each.state_dict(), layer.state_dict(), 0)
        close(each.eval()(draw(2)), layer.eval()(draw(2)), 0)


@layers
@widths
@pytest.mark.parametrize("counted", [True, False])
def test_state_of_batch_norm_evaluates_as_batch_norm(
    make: Callable[..., BatchWhitening], width: int, counted: bool
) -> None:
    plain = nn.BatchNorm2d(6).double()
    for step in range(3):
        plain(draw(step))
    state = plain.state_dict()
    if not counted:
        del state["num_batches_tracked"]
    layer = make(6, width).double()
    layer(draw(7))  # what it had must go
    model = nn.Sequential(layer)
    assert model.load_state_dict({f"0.{name}": value for name, value in state.items()}, strict=True) == ([], [])
    assert "running_whitening" not in state
    close(layer.eval()(draw(8)), plain.eval()(draw(8)))
    close(layer.running_var, plain.running_var, 0)


@layers
def test_state_loads_into_batch_norm(make: Callable[..., BatchWhitening]) -> None:
    """running_var is what BatchNorm's would be, so that converting back makes sense."""
    layer, plain, other = make(6).double(), nn.BatchNorm2d(6).double(), nn.BatchNorm2d(6).double()
    for step in range(3):
        layer(draw(step))
        plain(draw(step))
    missing, unexpected = other.load_state_dict(layer.state_dict(), strict=False)
    assert (missing, unexpected) == ([], ["running_whitening"])
    close(other.eval()(draw(5)), plain.eval()(draw(5)))


@layers
def test_update_bn_averages_over_the_loader(make: Callable[..., BatchWhitening]) -> None:
    model = nn.Sequential(make(6, 3).double())
    model(draw(9))
    batches = [draw(step) for step in range(3)]
    torch.optim.swa_utils.update_bn(batches, model)
    own = [trained_by_formula(model[0], x)[1] for x in batches]
    for name in ("running_mean", "running_var", "running_whitening"):
        close(getattr(model[0], name), torch.stack([each[name] for each in own]).mean(0))


@layers
def test_without_running_statistics(make: Callable[..., BatchWhitening]) -> None:
    layer = make(6, track_running_stats=False).double()
    assert layer.running_whitening is None
    assert set(layer.state_dict()) == {"weight", "bias"}
    x = draw()
    close(layer.eval()(x), trained_by_formula(layer, x)[0])
    layer.load_state_dict(nn.BatchNorm2d(6, track_running_stats=False).state_dict())


@layers
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_counts_once(make: Callable[..., BatchWhitening], use_reentrant: bool) -> None:
    layer = with_affine(make(6, 3).double())
    other = copy.deepcopy(layer)
    for step in range(2):
        x, again = draw(step).requires_grad_(), draw(step).requires_grad_()
        layer(x).sin().sum().backward()
        checkpoint(other, again, use_reentrant=use_reentrant).sin().sum().backward()
        close(again.grad, x.grad)
    close(other.state_dict(), layer.state_dict(), 0)
    close([p.grad for p in other.parameters()], [p.grad for p in layer.parameters()])


@layers
def test_reset(make: Callable[..., BatchWhitening]) -> None:
    layer = make(6, 3)
    layer(draw().float())
    layer.reset_running_stats()
    close(layer.state_dict(), make(6, 3).state_dict(), 0)
    meta = make(6, 3, device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    close(meta.state_dict(), make(6, 3).state_dict(), 0)


# ---------------------------------------------------------------------------------------------------- compiling, edges


@layers
def test_compiles_as_a_whole(make: Callable[..., BatchWhitening]) -> None:
    torch._dynamo.reset()
    layer = with_affine(make(6, 3).double())
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)
    for step in range(3):
        x, again = draw(step).requires_grad_(), draw(step).requires_grad_()
        y, expected = compiled(x), other(again)
        y.backward(draw(9))
        expected.backward(draw(9))
        close(y, expected)
        close(x.grad, again.grad)
    close(dict(layer.named_buffers()), dict(other.named_buffers()))
    layer.eval()
    close(compiled(draw(4)), other.eval()(draw(4)))


@layers
def test_exports_for_any_batch(make: Callable[..., BatchWhitening]) -> None:
    layer = with_affine(make(6, 3)).eval()
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(layer, (draw().float(),), dynamic_shapes=dynamic)
    for samples in (1, 9):
        x = draw(samples=samples).float()
        close(program.module()(x), layer(x), 1e-5)


@layers
@modes
@pytest.mark.parametrize("synchronize", [False, True], ids=["alone", "synchronized"])
def test_empty_batch(make: Callable[..., BatchWhitening], training: bool, synchronize: bool) -> None:
    layer = make(6, synchronize=synchronize).train(training)
    state = copy.deepcopy(layer.state_dict())
    x = draw().float()[:0].requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 6, 4, 3)
    close(layer.weight.grad, torch.zeros(6))
    close(layer.state_dict(), state, 0)


@layers
def test_one_value_per_channel_is_refused(make: Callable[..., BatchWhitening]) -> None:
    with pytest.raises(ValueError, match="expected more than 1 value per channel when training"):
        make(6)(torch.randn(1, 6, 1, 1))
    assert make(6).eval()(torch.randn(1, 6, 1, 1)).shape == (1, 6, 1, 1)


@layers
@pytest.mark.parametrize("value", [0, -2, 2.0, True, None])
def test_width_is_checked(make: Callable[..., BatchWhitening], value: object) -> None:
    with pytest.raises(ValueError, match="channels_per_group must be a positive integer"):
        make(6, value)


@layers
def test_stands_in_for_batch_norm(make: Callable[..., BatchWhitening]) -> None:
    assert isinstance(make(6), nn.BatchNorm2d)
    with pytest.raises(ValueError, match="expected 4D input"):
        make(6)(torch.randn(3, 6, 4))
    with pytest.raises(ValueError, match="expected 6 channels"):
        make(6)(torch.randn(3, 3, 4, 4))


def test_description_says_the_width_that_is_used() -> None:
    expected = "DecorrelatedBatchNorm2d(24, channels_per_group=12, eps=1e-05, momentum=0.1, affine=True)"
    assert repr(DecorrelatedBatchNorm2d(24)) == expected
