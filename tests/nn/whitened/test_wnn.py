"""Whitened networks against the formula, written out over rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.nn.whitened.wnn import WhitenedConv2d, WhitenedLinear

FLOAT64 = torch.float64
GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (2, 1)},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 1},
]
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def batch(step: int = 0, samples: int = 24, width: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    mixing = torch.randn(width, width, generator=generator, dtype=FLOAT64)
    return torch.randn(samples, width, generator=generator, dtype=FLOAT64) @ mixing + 3


def images(step: int = 0, samples: int = 6) -> Tensor:
    return batch(step, samples * 30).view(samples, 6, 5, 4).movedim(3, 1)


def patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Rows [groups, n, d] of the zero-padded input, by torch's own unfold."""
    unfolded = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    groups = unfolded.unflatten(1, (layer.groups, -1))
    return groups.permute(1, 0, 3, 2).flatten(1, 2)


def moments(rows: Tensor, centered: bool) -> tuple[Tensor, Tensor]:
    """μ and Σ of rows [n, d], by a loop."""
    mean = sum(rows) / len(rows) if centered else torch.zeros(rows.shape[1], dtype=FLOAT64)
    return mean, sum(torch.outer(row - mean, row - mean) for row in rows) / len(rows)


def observed(layer: Any, x: Tensor) -> Any:
    layer(x)
    assert layer.refresh()
    return layer


# P and μ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whitening", ["zca", "pca"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_transform_is_the_damped_inverse_root(whitening: Any, bias: bool, mode: Any) -> None:
    x = batch()
    layer = WhitenedLinear(
        4, 3, bias, dtype=FLOAT64, whitening=whitening, stats_every=1, damping=0.05, damping_mode=mode
    )
    observed(layer, x)
    mean, covariance = moments(x, bias)
    damped = covariance + 0.05 * (torch.linalg.eigvalsh(covariance)[-1] if mode == "relative" else 1) * torch.eye(
        4, dtype=FLOAT64
    )
    P = layer.transform[0]
    torch.testing.assert_close(layer.center[0], mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(P @ damped @ P.T, torch.eye(4, dtype=FLOAT64), rtol=0, atol=1e-11)
    if whitening == "zca":
        torch.testing.assert_close(P, P.T)
        assert (torch.linalg.eigvalsh(P) > 0).all()
    else:
        variances = (P @ covariance @ P.T).diagonal()
        torch.testing.assert_close(P @ covariance @ P.T, variances.diag(), rtol=0, atol=1e-11)
        assert (variances.diff() < 0).all()  # leading first


@pytest.mark.parametrize("whitening", ["zca", "pca"])
def test_whitening_error_after_a_refresh(whitening: Any) -> None:
    """‖E[õ õᵀ] − I‖ and ‖E õ‖ vanish on what was observed, without damping."""
    x = batch(1, samples=500)
    layer = observed(WhitenedLinear(4, 3, dtype=FLOAT64, whitening=whitening, stats_every=1, damping=0.0), x)
    whitened = (x - layer.center[0]) @ layer.transform[0].T
    assert torch.linalg.norm(whitened.T @ whitened / len(x) - torch.eye(4)) < 1e-10
    assert torch.linalg.norm(whitened.mean(0)) < 1e-10
    assert torch.linalg.norm(x.T @ x / len(x) - torch.eye(4)) > 1


@every_geometry
@pytest.mark.parametrize("bias", [True, False])
def test_convolution_is_the_formula_at_every_patch(geometry: dict[str, Any], bias: bool) -> None:
    """h = V P (o − μ) + d for explicit rows o, at borders too; P from all of them."""
    torch.manual_seed(0)
    x = images()
    layer = WhitenedConv2d(4, 6, **geometry, bias=bias, dtype=FLOAT64, stats_every=1, damping=0.01)
    plain = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups).detach()
    observed(layer, x)
    assert not torch.allclose(layer.transform[0], torch.eye(len(layer.transform[0]), dtype=FLOAT64))
    y = layer(x)
    torch.testing.assert_close(y, plain, rtol=0, atol=1e-10)
    rows = patches(layer, x)
    expected = []
    for group, weight in enumerate(layer.weight.flatten(1).chunk(layer.groups)):
        mean, covariance = moments(rows[group], bias)
        damped = covariance + 0.01 * torch.linalg.eigvalsh(covariance)[-1] * torch.eye(len(covariance), dtype=FLOAT64)
        values, vectors = torch.linalg.eigh(damped)
        P = vectors @ values.rsqrt().diag() @ vectors.T
        torch.testing.assert_close(layer.transform[group], P, rtol=0, atol=1e-9)
        whitened = torch.stack([P @ (row - mean) for row in rows[group]])
        expected.append(whitened @ weight.T)
    result = torch.cat(expected, dim=1) + (layer.bias if bias else 0)  # [n, out]
    torch.testing.assert_close(y.movedim(1, -1).reshape(-1, 6), result, rtol=0, atol=1e-9)


def test_large_inputs_are_observed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = WhitenedConv2d(4, 6, 3, padding=1, dtype=FLOAT64, stats_every=1)
    pieces = WhitenedConv2d.from_layer(whole.to_plain(), stats_every=1)
    observed(whole, images())
    monkeypatch.setattr("wellcond.numerics.pieces.CHUNK", 2 * 4 * 30 * 9)
    assert len(list(pieces.input_rows(images()))) == 3
    observed(pieces, images())
    torch.testing.assert_close(pieces.transform, whole.transform)
    torch.testing.assert_close(pieces.center, whole.center)


# refreshes ----------------------------------------------------------------------------------------------------------


def of_kind(kind: str, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    if kind.startswith("linear"):
        return WhitenedLinear(4, 3, kind == "linear", dtype=FLOAT64, **options), batch
    geometry = GEOMETRIES[int(kind[-1])]
    return WhitenedConv2d(4, 6, **geometry, dtype=FLOAT64, **options), images


@pytest.mark.parametrize("whitening", ["zca", "pca"])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv0", "conv1", "conv2", "conv3"])
def test_refreshes_in_training_leave_the_function_unchanged(kind: str, whitening: Any) -> None:
    layer, data = of_kind(kind, whitening=whitening, stats_every=1, refresh_every=None)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    probe = data(99)
    for step in range(6):
        optimizer.zero_grad()
        (layer(data(step)) - 1).square().mean().backward()
        optimizer.step()
        before, weight = layer(probe).detach(), layer.weight.detach().clone()
        assert layer.refresh()
        assert not torch.allclose(layer.weight, weight)
        torch.testing.assert_close(layer(probe), before, rtol=1e-10, atol=1e-10)


def test_refreshes_in_the_forward_leave_the_function_unchanged() -> None:
    """The same, when the layer itself decides: the pass that renews gives what the old constants would have given."""
    layer, data = of_kind("linear", stats_every=1, refresh_every=2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    renewed = 0
    for step in range(7):
        expected, P = layer.to_plain()(data(step)), layer.transform.clone()
        y = layer(data(step))
        renewed += not torch.equal(P, layer.transform)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        optimizer.zero_grad()
        (y - 1).square().mean().backward()
        optimizer.step()
    assert renewed == 4  # after 1, 2, 4 and 6 steps


def test_gradients_are_those_of_the_formula() -> None:
    """∂L/∂V = Σ δ õᵀ and ∂L/∂d = Σ δ with õ = P(o − μ)."""
    x = batch()
    layer = observed(WhitenedLinear(4, 3, dtype=FLOAT64, stats_every=1), x)
    layer.zero_grad()
    upstream = torch.sin(torch.arange(72, dtype=FLOAT64)).view(24, 3)
    layer(x).backward(upstream)
    gradient = torch.zeros(3, 4, dtype=FLOAT64)
    for row, delta in zip(x, upstream, strict=True):
        gradient += torch.outer(delta, layer.transform[0] @ (row - layer.center[0]))
    torch.testing.assert_close(layer.weight.grad, gradient, rtol=0, atol=1e-11)
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0), rtol=0, atol=1e-11)


def test_it_trains_faster_where_inputs_are_badly_conditioned() -> None:
    """Least squares with inputs of condition 10⁴: at each one's best learning rate."""
    torch.manual_seed(0)
    x = torch.randn(256, 6, dtype=FLOAT64) @ torch.diag(torch.logspace(0, -2, 6, dtype=FLOAT64)) + 2
    y = x @ torch.randn(6, 1, dtype=FLOAT64) * 3

    def final_loss(layer: nn.Module, lr: float) -> float:
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
        for _ in range(100):
            optimizer.zero_grad()
            loss = F.mse_loss(layer(x), y)
            loss.backward()
            optimizer.step()
        return loss.item() if loss.isfinite() else float("inf")

    def whitened() -> nn.Module:
        torch.manual_seed(1)
        return WhitenedLinear(6, 1, dtype=FLOAT64, stats_every=1, refresh_every=1, damping=1e-6)

    rates = (0.003, 0.01, 0.03, 0.1, 0.3)
    best = min(final_loss(whitened(), lr) for lr in rates)
    best_plain = min(final_loss(whitened().to_plain(), lr) for lr in rates)
    assert best < 1e-6
    assert best_plain > 1e-4


# truncation ---------------------------------------------------------------------------------------------------------


def low_rank(step: int, rank: int = 2) -> Tensor:
    basis = torch.linalg.qr(torch.randn(5, rank, generator=torch.Generator().manual_seed(3), dtype=FLOAT64))[0]
    generator = torch.Generator().manual_seed(step)
    return torch.randn(20, rank, generator=generator, dtype=FLOAT64) @ basis.T + torch.arange(5, dtype=FLOAT64)


@pytest.mark.parametrize("whitening", ["zca", "pca"])
@pytest.mark.parametrize("components", [2, 4])
def test_truncation_is_exact_where_the_inputs_have_no_more_directions(whitening: Any, components: int) -> None:
    torch.manual_seed(0)
    options = {"whitening": whitening, "components": components, "stats_every": 1, "refresh_every": None}
    layer = WhitenedLinear(5, 3, dtype=FLOAT64, **options)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02, momentum=0.9)
    for step in range(4):
        optimizer.zero_grad()
        (layer(low_rank(step)) - 1).square().mean().backward()
        optimizer.step()
        before = layer(low_rank(9)).detach()
        assert layer.refresh()
        torch.testing.assert_close(layer(low_rank(9)), before, rtol=1e-9, atol=1e-9)
        assert int(torch.linalg.matrix_rank(layer.transform[0])) == components


@pytest.mark.parametrize("whitening", ["zca", "pca"])
def test_truncation_keeps_the_leading_directions(whitening: Any) -> None:
    """W_new = W_old Π with the projection Π on them, and the output at μ stays."""
    x = batch(width=5)
    layer = WhitenedLinear(5, 3, dtype=FLOAT64, whitening=whitening, components=3, stats_every=1)
    weight, at_mean = layer.weight.detach().clone(), layer(x.mean(0)).detach()
    layer.inputs.pending = None
    observed(layer, x)
    leading = torch.linalg.eigh(moments(x, True)[1])[1][:, -3:]
    torch.testing.assert_close(layer.folded()[0], weight @ leading @ leading.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer(x.mean(0)), at_mean, rtol=0, atol=1e-10)
    if whitening == "pca":
        assert (layer.transform[0, 3:] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"whitening": "qr"}, "whitening must be one of 'zca', 'pca', got 'qr'"),
        ({"components": 0}, "components must be a positive integer, got 0"),
        ({"components": 6}, "components must be at most the 5 inputs of an output, got 6"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WhitenedLinear(5, 3, **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tau'"):
        WhitenedLinear(5, 3, tau=3)
