"""Forms of the second moment against their definitions, and what else the preconditioners' options promise."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond
from pairs import parametrize_pairs
from wellcond import FeatureDescent, FeatureWhitening
from wellcond.layouts import find_layers
from wellcond.transforms.preconditioner import solves

BOTH = pytest.mark.parametrize("transform_type", [FeatureWhitening, FeatureDescent])
NAMES = {FeatureWhitening: "whitening", FeatureDescent: "descent"}
MODES = ["relative", "mean", "absolute"]
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

# the formula --------------------------------------------------------------------------------------------------------


def power(moment: Tensor, exponent: float, damping: float, mode: str) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(0)
    damped = values + damping * {"relative": values[-1], "mean": values.mean(), "absolute": 1.0}[mode]
    return vectors @ torch.diag(damped**-exponent) @ vectors.mT


def patches(layer: Any, x: Tensor) -> list[Tensor]:
    """Of each group the patches [n, channels, taps]: what the output says of its weight, position by position.

    The output is linear in the weight, and the derivative of one output value by its unit's weight is the patch.
    """
    output = layer(x)
    found = []
    for group in range(layer.groups):
        unit = group * (layer.out_channels // layer.groups)
        values = output[:, unit].flatten()
        rows = [torch.autograd.grad(value, layer.weight, retain_graph=True)[0][unit] for value in values]
        found.append(torch.stack(rows).flatten(2))
    return found


def joint(gradients: dict[str, Tensor], groups: int) -> Tensor:
    """Pack weight and bias as [groups, out, inputs + 1]."""
    matrix = gradients["weight"].flatten(1).unflatten(0, (groups, -1))
    return torch.cat([matrix, gradients["bias"].view(groups, -1, 1)], 2) if "bias" in gradients else matrix


def kronecker(layer: Any, x: Tensor, before: Tensor, exponent: float, damping: float, mode: str) -> Tensor:
    """The definition: both margins of the full second moment Q[c, k, c', k'], group by group."""
    bias, taps = layer.bias is not None, math.prod(layer.kernel_size)
    changed = []
    for rows, gradient in zip(patches(layer, x), before, strict=True):
        if bias:
            rows = torch.cat([rows, torch.full((len(rows), 1, taps), taps**-0.5, dtype=rows.dtype)], 1)
        q = torch.einsum("nck,ndl->ckdl", rows, rows) / len(rows)
        r_c, r_k = torch.einsum("ckdk->cd", q) / taps, torch.einsum("ckcl->kl", q) / rows.shape[1]
        # Q is R_C ⊗ R_K / m, m being the mean of either diagonal: half of it for either factor.
        # Q is R_C ⊗ R_K / m, m being the mean of either diagonal.
        mean = r_c.diagonal().mean()
        torch.testing.assert_close(r_k.diagonal().mean(), mean)
        t = power(torch.kron(r_c, r_k) / mean, exponent, damping, mode)
        whole = gradient[:, : gradient.shape[1] - bias].reshape(len(gradient), -1, taps)
        if bias:
            spread = gradient[:, -1:, None].expand(-1, 1, taps) * taps**-0.5
            whole = torch.cat([whole, spread], 1)
        product = (whole.flatten(1) @ t).view_as(whole)
        parts = [product[:, : product.shape[1] - bias].flatten(1)]
        if bias:
            parts.append(product[:, -1].sum(1, keepdim=True) * taps**-0.5)
        changed.append(torch.cat(parts, 1))
    return torch.stack(changed)


def recovered(changed: Tensor, before: Tensor) -> Tensor:
    return changed * before.norm() / changed.norm()


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def attached(model: nn.Module, transform: Any, lr: float = 0.0, params: Any = None) -> tuple[Any, wellcond.Attachment]:
    optimizer = torch.optim.SGD(model.parameters() if params is None else params, lr=lr)
    return optimizer, wellcond.attach(optimizer, model, transform)


IMMEDIATE: dict[str, Any] = {"stats_decay": 0.9, "stats_every": 1, "solve_every": 1}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def one_step(model: nn.Module, transform: Any, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], str, Any]:
    """Return the gradients before and after one step, the report, and the optimizer."""
    optimizer, handle = attached(model, transform)
    optimizer.zero_grad()
    output = model(x)
    (output.sin() * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    before = gradients_of(model)
    optimizer.step()
    report = handle.report()
    handle.remove()
    return before, gradients_of(model), report, optimizer


# Kronecker factors --------------------------------------------------------------------------------------------------

CONV_CASES: list[tuple[int, dict[str, Any], list[int]]] = [
    (1, {"kernel_size": 3}, [3, 4, 7]),
    (1, {"kernel_size": 4, "stride": 3, "padding": 2, "dilation": 2, "bias": False}, [3, 4, 9]),
    (1, {"kernel_size": 2, "groups": 2, "padding": "same"}, [3, 4, 6]),
    (2, {"kernel_size": 3, "padding": 1}, [2, 4, 5, 4]),
    (2, {"kernel_size": (2, 3), "stride": (2, 1), "groups": 2, "bias": False}, [2, 4, 5, 5]),
    (2, {"kernel_size": (3, 1), "stride": 2, "padding": (2, 0), "dilation": (2, 1), "groups": 2}, [2, 4, 6, 4]),
    (2, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "stride": 3}, [2, 4, 6, 6]),
    (2, {"kernel_size": 2, "stride": 3, "padding_mode": "circular", "padding": 1}, [3, 4, 4, 5]),
    (3, {"kernel_size": 2, "padding": 1}, [2, 4, 2, 3, 2]),
    (3, {"kernel_size": (1, 2, 2), "stride": (2, 1, 1), "groups": 2, "bias": False}, [2, 4, 3, 3, 3]),
]


@parametrize_pairs(
    ("axes, options, shape", CONV_CASES),
    ("mode", MODES),
    ("transform_type", [FeatureWhitening, FeatureDescent]),
)
def test_kronecker_form_is_its_definition(
    transform_type: type, mode: str, axes: int, options: dict[str, Any], shape: list[int]
) -> None:
    torch.manual_seed(0)
    layer = CONVS[axes](4, 6, dtype=torch.float64, **options)
    x = torch.randn(*shape, dtype=torch.float64) + 0.3
    chosen = transform_type(damping=0.05, damping_mode=mode, second_moment="kronecker", **IMMEDIATE)
    before, after, report, _ = one_step(layer, chosen, x)
    groups = layer.groups
    packed = joint(before, groups)
    wanted = recovered(kronecker(layer, x, packed, transform_type.exponent, 0.05, mode), packed)
    assert "⊗ taps" in report
    close(joint(after, groups), wanted)


@pytest.mark.parametrize("mode", MODES)
@BOTH
def test_kronecker_form_without_norm_recovery_has_the_products_own_scale(transform_type: type, mode: str) -> None:
    """R_C ⊗ R_K / m is of the scale of the second moment itself."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 2, dtype=torch.float64)
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64) * 3
    chosen = transform_type(damping=0.05, damping_mode=mode, second_moment="kronecker", restore_norm=False, **IMMEDIATE)
    before, after, _, _ = one_step(layer, chosen, x)
    wanted = kronecker(layer, x, joint(before, 1), transform_type.exponent, 0.05, mode)
    close(joint(after, 1), wanted)


@BOTH
def test_kronecker_form_of_a_transposed_convolution(transform_type: type) -> None:
    """Its patches are taken from the output's side, in float64 by autograd; the output unit is the second axis."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(3, 4, (2, 3), stride=(2, 1), padding=(0, 1), bias=False, dtype=torch.float64)
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    chosen = transform_type(damping=0.05, damping_mode="relative", second_moment="kronecker", **IMMEDIATE)
    before, after, report, _ = one_step(layer, chosen, x)
    values = layer(x)[:, 1].flatten()
    rows = torch.stack([torch.autograd.grad(v, layer.weight, retain_graph=True)[0][:, 1] for v in values]).flatten(2)
    r_c = torch.einsum("nck,ndk->cd", rows, rows) / len(rows) / 6
    r_k = torch.einsum("nck,ncl->kl", rows, rows) / len(rows) / 3
    t = power(torch.kron(r_c, r_k) / r_c.diagonal().mean(), transform_type.exponent, 0.05, "relative")
    gradient = before["weight"].transpose(0, 1).flatten(2)
    wanted = recovered((gradient.flatten(1) @ t).view_as(gradient), gradient)
    assert "channels 3 ⊗ taps 6" in report
    close(after["weight"].transpose(0, 1).flatten(2), wanted)


@BOTH
@pytest.mark.parametrize("restore_norm", [True, False])
def test_kronecker_form_is_exact_where_the_second_moment_is_a_product(transform_type: type, restore_norm: bool) -> None:
    """Patches a_i b_jᵀ for all pairs: Q = E[a aᵀ] ⊗ E[b bᵀ]."""
    torch.manual_seed(0)
    layer = nn.Conv1d(3, 5, 4, bias=False, dtype=torch.float64)
    a, b = torch.randn(8, 3, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    x = torch.einsum("ic,jk->ijck", a, b).flatten(0, 1)
    chosen = transform_type(
        damping=1e-11, damping_mode="absolute", second_moment="kronecker", restore_norm=restore_norm, **IMMEDIATE
    )
    before, after, _, _ = one_step(layer, chosen, x)
    rows = x.flatten(1)
    t = power(rows.mT @ rows / len(rows), transform_type.exponent, 0.0, "absolute")
    wanted = before["weight"].flatten(1) @ t
    wanted = recovered(wanted, before["weight"]) if restore_norm else wanted
    close(after["weight"].flatten(1), wanted, 1e-4)


@BOTH
@pytest.mark.parametrize(("channels", "groups", "kernel"), [(4, 1, 1), (4, 4, 3), (4, 2, 1)])
def test_one_tap_or_one_channel_leaves_nothing_to_factor(
    transform_type: type, channels: int, groups: int, kernel: int
) -> None:
    results = []
    for form in ("dense", "kronecker"):
        torch.manual_seed(0)
        layer = nn.Conv2d(channels, 4, kernel, groups=groups, dtype=torch.float64)
        x = torch.randn(3, channels, 5, 5, dtype=torch.float64)
        _, after, report, _ = one_step(layer, transform_type(second_moment=form, **IMMEDIATE), x)
        assert "⊗" not in report
        results.append(joint(after, groups))
    close(*results)


# low rank -----------------------------------------------------------------------------------------------------------


def dense_step(transform_type: type, rows: Tensor, before: Tensor, mode: str, tail_after: int | None = None) -> Tensor:
    """G T by the whole matrix; its eigenvalues beyond the first ones replaced by their mean, if that is asked for."""
    values, vectors = torch.linalg.eigh(rows.mT @ rows / len(rows))
    values = values.clamp_min(0)
    if tail_after is not None:
        values[:-tail_after] = values[:-tail_after].mean()
    damped = values + 0.05 * {"relative": values[-1], "mean": values.mean(), "absolute": 1.0}[mode]
    return before @ vectors @ torch.diag(damped**-transform_type.exponent) @ vectors.mT


@parametrize_pairs(
    ("options", [{"second_moment": "low_rank"}, {"max_dim": 64}, {"second_moment": "dense", "max_dim": 64}]),
    ("mode", MODES),
    ("restore_norm", [True, False]),
    ("transform_type", {name: kind for kind, name in NAMES.items()}),
)
def test_a_sketch_is_exact_where_the_inputs_have_few_directions(
    transform_type: type, mode: str, restore_norm: bool, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(80, 3, bias=False, dtype=torch.float64)
    x = torch.randn(40, 5, dtype=torch.float64) @ torch.randn(5, 80, dtype=torch.float64)
    chosen = transform_type(damping=0.05, damping_mode=mode, restore_norm=restore_norm, **options, **IMMEDIATE)
    before, after, report, _ = one_step(layer, chosen, x)
    wanted = dense_step(transform_type, x, before["weight"], mode)
    assert "sketched at rank" in report
    close(after["weight"], recovered(wanted, before["weight"]) if restore_norm else wanted, 1e-6)


@BOTH
def test_a_sketch_of_a_convolution_and_its_bias(transform_type: type) -> None:
    torch.manual_seed(0)
    layer = nn.Conv1d(16, 3, 5, stride=2, dtype=torch.float64)  # patches of 80, and the constant
    x = torch.einsum("nr,rcl->ncl", torch.randn(6, 1).double(), torch.randn(1, 16, 9).double())
    chosen = transform_type(damping=0.05, second_moment="low_rank", **IMMEDIATE)
    before, after, report, _ = one_step(layer, chosen, x)
    rows = torch.cat([patches(layer, x)[0].flatten(1), torch.ones(18, 1).double()], 1)
    assert torch.linalg.matrix_rank(rows) <= 10
    wanted = dense_step(transform_type, rows, joint(before, 1)[0], chosen.damping_mode)
    assert "81 × 81 sketched at rank 10" in report
    close(joint(after, 1)[0], recovered(wanted, joint(before, 1)[0]), 1e-6)


@BOTH
def test_a_kronecker_forms_sketched_channels(transform_type: type) -> None:
    """Channels of few directions: the sketch of the channel factor loses nothing."""
    torch.manual_seed(0)
    results = []
    mix = torch.randn(66, 3, dtype=torch.float64)
    x = torch.einsum("cr,nrl->ncl", mix, torch.randn(4, 3, 6, dtype=torch.float64))
    for options in ({"second_moment": "kronecker"}, {"second_moment": "kronecker", "max_dim": 64, "rank": 6}):
        torch.manual_seed(1)
        layer = nn.Conv1d(66, 3, 2, dtype=torch.float64)
        before, after, report, _ = one_step(layer, transform_type(damping=0.05, **options, **IMMEDIATE), x)
        results.append(joint(after, 1))
    assert "channels 67 of rank 6 ⊗ taps 2" in report
    close(*results, 1e-6)
    wanted = kronecker(layer, x, joint(before, 1), transform_type.exponent, 0.05, transform_type().damping_mode)
    close(results[0], recovered(wanted, joint(before, 1)))


def test_a_sketch_follows_the_leading_directions_of_a_spectrum_without_end() -> None:
    """A subspace iteration: after a few solves its gradient is close to the truncated formula's."""
    torch.manual_seed(0)
    layer = nn.Linear(96, 4, bias=False, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64))[0]
    x = torch.linalg.qr(torch.randn(200, 96, dtype=torch.float64))[0] * 0.7 ** torch.arange(96).double() @ basis * 50
    optimizer, _ = attached(layer, FeatureWhitening(damping=0.05, second_moment="low_rank", rank=12, **IMMEDIATE))
    errors = []
    for _ in range(12):
        optimizer.zero_grad()
        layer(x).sin().sum().backward()
        before = layer.weight.grad.clone()
        optimizer.step()
        wanted = recovered(dense_step(FeatureWhitening, x, before, "relative", tail_after=12), before)
        errors.append(float((layer.weight.grad - wanted).norm() / wanted.norm()))
    assert errors[-1] < 0.02
    assert errors[-1] <= errors[0]


@parametrize_pairs(
    ("mode", MODES),
    ("transform_type", [FeatureWhitening, FeatureDescent]),
    ("bias", [True, False]),
)
def test_a_truncated_form_is_the_dense_one_with_a_flat_tail(
    transform_type: type, bias: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wellcond.transforms.preconditioner.forms.TRUNCATED_FROM", 64)
    torch.manual_seed(0)
    layer = nn.Linear(70, 3, bias=bias, dtype=torch.float64)
    x = torch.randn(90, 70, dtype=torch.float64) * torch.linspace(0.1, 3, 70) + 0.2
    for restore_norm in (True, False):
        chosen = transform_type(damping=0.05, damping_mode=mode, rank=9, restore_norm=restore_norm, **IMMEDIATE)
        before, after, report, _ = one_step(layer, chosen, x)
        rows = torch.cat([x, torch.ones(90, 1).double()], 1) if bias else x
        packed = joint(before, 1)[0]
        wanted = dense_step(transform_type, rows, packed, mode, tail_after=9)
        assert "of rank 9" in report
        assert "sketched" not in report
        close(joint(after, 1)[0], recovered(wanted, packed) if restore_norm else wanted)
        layer.zero_grad()


def shapes_of(optimizer: Any, weight: Tensor) -> dict[str, tuple[int, ...]]:
    return {
        name.removeprefix("wellcond_whitening_"): tuple(value.shape)
        for name, value in optimizer.state[weight].items()
        if isinstance(value, Tensor) and value.dim()
    }


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: nn.Linear(100, 2), {}, "dense 101 × 101"),
        (lambda: nn.Linear(256, 2, bias=False), {}, "256 × 256 of rank 32"),
        (lambda: nn.Linear(256, 2, bias=False), {"second_moment": "dense"}, "dense 256 × 256"),
        (lambda: nn.Linear(256, 2, bias=False), {"max_dim": 200}, "256 × 256 sketched at rank 25"),
        (lambda: nn.Linear(256, 2, bias=False), {"max_dim": 256}, "256 × 256 of rank 32"),
        (lambda: nn.Linear(1100, 2), {}, "1101 × 1101 sketched at rank 128"),
        (lambda: nn.Linear(1100, 2), {"second_moment": "dense"}, "dense 1101 × 1101"),
        (lambda: nn.Linear(256, 2), {"rank": 7}, "257 × 257 of rank 7"),
        (lambda: nn.Linear(256, 2), {"rank": 7, "second_moment": "dense"}, "dense 257 × 257"),
        (lambda: nn.Linear(256, 2), {"rank": 400}, "dense 257 × 257"),
        (lambda: nn.Linear(40, 2), {"max_dim": 8}, "41 × 41 sketched at rank 1"),
        (lambda: nn.Conv2d(8, 2, 3), {}, "dense 73 × 73"),
        (lambda: nn.Conv2d(8, 2, 3), {"second_moment": "kronecker"}, "channels 9 ⊗ taps 9"),
        (lambda: nn.Conv2d(8, 2, 3), {"second_moment": "blocks"}, "tap blocks 9 × 9 × 9"),
        (lambda: nn.Conv2d(8, 2, 3), {"second_moment": "blocks", "rank": 3}, "tap blocks 9 × 9 × 9 of rank 3"),
        (lambda: nn.Conv1d(8, 2, 3), {"second_moment": "blocks", "max_dim": 8}, "tap blocks 3 × 9 × 9 sketched at rank 1"),  # noqa: E501
        (lambda: nn.Conv2d(8, 4, 3, groups=2), {"second_moment": "blocks"}, "tap blocks 18 × 5 × 5"),
        (lambda: nn.Conv2d(8, 2, 1), {"second_moment": "blocks"}, "dense 9 × 9"),
        (lambda: nn.Conv2d(8, 8, 3, groups=8), {"second_moment": "blocks"}, "dense 8 × 10 × 10"),
        (lambda: nn.Conv2d(16, 2, 3), {}, "channels 17 ⊗ taps 9"),
        (lambda: nn.Conv2d(32, 4, 3, groups=2), {}, "channels 2 × 17 ⊗ taps 2 × 9"),
        (lambda: nn.Conv2d(300, 2, 3), {}, "channels 301 of rank 37 ⊗ taps 9"),
        (lambda: nn.Conv2d(16, 2, 3), {"second_moment": "low_rank"}, "145 × 145 sketched at rank 18"),
        (lambda: nn.Conv2d(300, 2, 1), {}, "301 × 301 of rank 37"),
    ],
)  # fmt: skip
def test_which_form_is_chosen(make: Any, options: dict[str, Any], words: str) -> None:
    layer = make()
    _, handle = attached(layer, FeatureWhitening(**options))
    line = next(line for line in handle.report().splitlines() if line.startswith("weight"))
    assert f"preconditioned, {words}  " in line


def test_the_rank_is_the_states_width() -> None:
    layer = nn.Linear(256, 2)
    _, _, _, optimizer = one_step(layer, FeatureWhitening(rank=7, max_dim=64, **IMMEDIATE), torch.randn(9, 256))
    layer = nn.Linear(256, 2)
    optimizer, _ = attached(layer, FeatureWhitening(rank=7, max_dim=64, **IMMEDIATE))
    layer(torch.randn(9, 256)).sum().backward()
    optimizer.step()
    thin = (1, 257, 7)
    assert shapes_of(optimizer, layer.weight) == {
        "sketch": thin, "basis": thin, "directions": thin, "trace": (1,), "excess": (1, 7), "tail": (1,)
    }  # fmt: skip


# precision ----------------------------------------------------------------------------------------------------------

FORMS: dict[str, tuple[Any, dict[str, Any], list[int]]] = {
    "dense": (lambda: nn.Conv2d(3, 8, 3), {"second_moment": "dense"}, [4, 3, 6, 6]),
    "kronecker": (lambda: nn.Conv2d(6, 8, 3), {"second_moment": "kronecker"}, [4, 6, 6, 6]),
    "sketched": (lambda: nn.Linear(80, 8), {"second_moment": "low_rank"}, [30, 80]),
    "truncated": (lambda: nn.Linear(260, 8), {"rank": 20}, [40, 260]),
    "sketched channels": (lambda: nn.Conv1d(66, 8, 3), {"second_moment": "kronecker", "max_dim": 64}, [6, 66, 7]),
    "groups": (lambda: nn.Conv1d(8, 8, 3, groups=2), {"second_moment": "kronecker"}, [6, 8, 7]),
    "blocks": (lambda: nn.Conv2d(6, 8, 3, groups=2), {"second_moment": "blocks"}, [4, 6, 6, 6]),
    "truncated blocks": (lambda: nn.Conv2d(6, 8, 3), {"second_moment": "blocks", "rank": 3}, [4, 6, 6, 6]),
    "sketched blocks": (lambda: nn.Conv1d(20, 8, 3), {"second_moment": "blocks", "max_dim": 8, "rank": 3}, [6, 20, 7]),
    "norm": (lambda: nn.LayerNorm(9), {"norm_layers": True}, [12, 9]),
}


@BOTH
@pytest.mark.parametrize("form", FORMS)
def test_products_in_bfloat16_are_close_and_their_norm_is_recovered(transform_type: type, form: str) -> None:
    make, options, shape = FORMS[form]
    results = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        layer = make()
        x = torch.randn(*shape) + 0.2
        chosen = transform_type(damping=0.1, damping_mode="relative", precision=precision, **options, **IMMEDIATE)
        before, after, _, _ = one_step(layer, chosen, x)
        old, new = (torch.cat([g.flatten() for g in grads.values()]) for grads in (before, after))
        assert float(new.norm()) == pytest.approx(float(old.norm()), rel=1e-2)
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
        results.append(new)
    assert not torch.equal(*results)
    assert float((results[0] - results[1]).norm() / results[0].norm()) < 2e-2


@parametrize_pairs(
    ("form", list(FORMS)),
    ("precision", ["float32", "tf32", "bfloat16"]),
    ("dtype", [torch.float64, torch.float32, torch.bfloat16]),
)
def test_what_is_kept_in_which_precision(form: str, precision: Any, dtype: torch.dtype) -> None:
    """Statistics in float32 or wider, always; what gradients are multiplied with in the precision asked for."""
    make, options, shape = FORMS[form]
    layer = make().to(dtype)
    optimizer, _ = attached(layer, FeatureWhitening(precision=precision, **options, **IMMEDIATE))
    layer(torch.randn(*shape, dtype=dtype)).sin().sum().backward()
    optimizer.step()
    statistics = torch.promote_types(dtype, torch.float32)
    products = torch.bfloat16 if precision == "bfloat16" else statistics
    for name, value in optimizer.state[layer.weight].items():
        if isinstance(value, Tensor) and value.is_floating_point():
            used = name.endswith(("_preconditioner", "_directions", "_excess", "_tail"))
            assert value.dtype == (products if used else statistics), name
    assert layer.weight.grad.dtype == dtype


def train(model: nn.Module, optimizer: Any, steps: range, shape: list[int], dtype: torch.dtype = torch.float32) -> None:
    for step in steps:
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(step)).to(dtype) * (1 + 0.2 * step)
        optimizer.zero_grad()
        model(x).sin().sum().backward()
        optimizer.step()


@parametrize_pairs(
    ("form", list(FORMS)),
    ("transform_type", [FeatureWhitening, FeatureDescent]),
    ("precision", ["float32", "bfloat16"]),
)
def test_resuming_is_exact_in_every_form(transform_type: type, form: str, precision: Any) -> None:
    make, options, shape = FORMS[form]
    chosen = transform_type(
        precision=precision, stats_every=2, solve_every=4, stats_decay=0.5, gradient_momentum=0.5, **options
    )

    def start() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = make()
        return model, attached(model, chosen, lr=0.05)[0]

    straight, optimizer = start()
    train(straight, optimizer, range(11), shape)
    for stop in (3, 5):
        first, optimizer = start()
        train(first, optimizer, range(stop), shape)
        resumed, second = start()
        resumed.load_state_dict(copy.deepcopy(first.state_dict()))
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(resumed, second, range(stop, 11), shape)
        for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)


# memory -------------------------------------------------------------------------------------------------------------


def in_words(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise ValueError(count)


@parametrize_pairs(
    ("form", [*FORMS, "embedding", "tied"]),
    ("precision", ["float32", "bfloat16"]),
    ("dtype", [torch.float64, torch.float32, torch.bfloat16]),
    ("momentum", [0.0, 0.9]),
)
def test_the_report_says_how_many_bytes_are_kept(
    form: str, precision: Any, dtype: torch.dtype, momentum: float
) -> None:
    """All but a few numbers of bookkeeping: the sum of the sizes of the state's tensors."""
    model: nn.Module
    if form in ("embedding", "tied"):
        model, options, x = nn.Sequential(nn.Embedding(40, 12), nn.Linear(12, 40, bias=False)), {}, torch.arange(9)
        if form == "tied":
            model[1].weight = model[0].weight
        model = model.to(dtype)
    else:
        make, options, shape = FORMS[form]
        model, x = nn.Sequential(make()).to(dtype), torch.randn(*shape, dtype=dtype)
    chosen = FeatureWhitening(precision=precision, gradient_momentum=momentum, **options, **IMMEDIATE)
    optimizer, handle = attached(model, chosen)
    model(x).sin().sum().backward()
    optimizer.step()
    lines = {line.split()[0]: line for line in handle.report().splitlines()[1:]}
    for layer in find_layers(model):
        kept = [
            value.numel() * value.element_size()
            for name, value in optimizer.state[layer.weight].items()
            if name.startswith("wellcond_") and isinstance(value, Tensor) and value.dim() > 0
        ]
        assert lines[layer.name].endswith(f" {in_words(sum(kept))}"), (lines[layer.name], sum(kept))


# momentum variants --------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("stats_decay", [0.9, 0.0])
@pytest.mark.parametrize("beta", [0.9, 0.0])
@pytest.mark.parametrize("restore_norm", [True, False])
def test_momentum_variants(transform_type: type, stats_decay: float, beta: float, restore_norm: bool) -> None:
    """Variant I averages gradients before the product, variant II takes M from the last observed step alone."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    chosen = transform_type(
        damping=0.1, stats_decay=stats_decay, stats_every=2, solve_every=2, solve_warmup=False,
        gradient_momentum=beta, restore_norm=restore_norm,
    )  # fmt: skip
    weight = torch.cat([layer.weight.detach(), layer.bias.detach().unsqueeze(1)], 1)
    optimizer, _ = attached(layer, chosen, lr=0.05)
    average = torch.zeros_like(weight)
    moment, updates, t = torch.zeros(5, 5, dtype=torch.float64), 0, torch.zeros(())
    for step in range(9):
        x = torch.randn(7, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64) * (1 + step)
        optimizer.zero_grad()
        layer(x).sin().sum().backward()
        optimizer.step()
        rows = torch.cat([x, torch.ones(7, 1).double()], 1)
        gradient = (rows @ weight.mT).cos().mT @ rows
        if step % 2 == 0:
            updates += 1
            moment = stats_decay * moment + (1 - stats_decay) * rows.mT @ rows / 7
            t = power(moment / (1 - stats_decay**updates), transform_type.exponent, 0.1, transform_type().damping_mode)
        average = beta * average + gradient
        changed = average @ t
        weight = weight - 0.05 * (recovered(changed, average) if restore_norm else changed)
        close(torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1).detach(), weight)


@pytest.mark.parametrize("separate", [True, False])
def test_gradient_momentum_of_attentions_packed_bias(separate: bool) -> None:
    """One bias belongs to three projections: its average must be taken once a step."""
    torch.manual_seed(0)
    options = {"kdim": 5, "vdim": 3} if separate else {}
    attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64, **options)
    # One huge damping: the product with T is the gradient itself, so that momentum alone is left.
    chosen = FeatureDescent(damping=1e9, gradient_momentum=0.5, **IMMEDIATE)
    optimizer, _ = attached(attention, chosen)
    query, key = torch.randn(2, 3, 4).double(), torch.randn(2, 3, attention.kdim).double()
    value = torch.randn(2, 3, attention.vdim).double()
    averages = {name: torch.zeros_like(p) for name, p in attention.named_parameters()}
    for step in range(4):
        optimizer.zero_grad()
        ((1 + step) * attention(query, key, value)[0]).sin().sum().backward()
        for name, p in attention.named_parameters():
            averages[name] = 0.5 * averages[name] + p.grad
        optimizer.step()
        for name, p in attention.named_parameters():
            close(p.grad, averages[name], 1e-6)


# switches -----------------------------------------------------------------------------------------------------------


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def grouped(model: nn.Sequential, **first: Any) -> list[dict[str, Any]]:
    return [{"params": list(model[0].parameters()), **first}, {"params": list(model[2].parameters())}]


def step_on(model: nn.Sequential, optimizer: Any, step: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return name → gradient before and after."""
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64) * (1 + step)
    optimizer.zero_grad()
    model(x).sin().sum().backward()
    before = gradients_of(model)
    optimizer.step()
    return {name: (before[name], p.grad.clone()) for name, p in model.named_parameters()}


def is_changed(pair: tuple[Tensor, Tensor]) -> bool:
    return not torch.equal(*pair)


def test_a_group_that_is_switched_off_keeps_its_gradient_and_costs_nothing() -> None:
    model = two_layers()
    optimizer, handle = attached(model, FeatureWhitening(**IMMEDIATE), params=grouped(model, wellcond_whitening=False))
    for step in range(3):
        pairs = step_on(model, optimizer, step)
        assert {name for name, pair in pairs.items() if is_changed(pair)} == {"2.weight", "2.bias"}
    assert not any(key.startswith("wellcond_") for key in optimizer.state.get(model[0].weight, {}))
    assert handle.stats()["whitening"]["weights"] == 1
    line = next(line for line in handle.report().splitlines() if line.startswith("0.weight"))
    assert "switched off by its parameter group" in line


@pytest.mark.parametrize("start", [True, False])
def test_a_group_is_switched_during_training(start: bool) -> None:
    """While it is on, statistics are those of the steps in which it was on."""
    model = two_layers()
    optimizer, _ = attached(
        model,
        FeatureWhitening(stats_decay=0.5, stats_every=1, solve_every=1),
        params=grouped(model, wellcond_whitening=start),
    )
    on = [start] * 3 + [not start] * 3 + [start] * 3
    changed = []
    for step, switch in enumerate(on):
        optimizer.param_groups[0]["wellcond_whitening"] = switch
        changed.append(is_changed(step_on(model, optimizer, step)["0.weight"]))
    # The forward pass that precedes the first step after switching on was not watched: at most that one is lost.
    assert not any(c for c, switch in zip(changed, on, strict=True) if not switch)
    late = [c for i, (c, switch) in enumerate(zip(changed, on, strict=True)) if switch and i and on[i - 1]]
    assert all(late)


def test_what_a_switched_off_group_saw_does_not_count_later() -> None:
    """The forward pass before the step at which the switch is noticed is not kept until it is switched on again."""
    moments = []
    for outlier in (1.0, 1e3):
        layer = two_layers()[0]
        optimizer, _ = attached(layer, FeatureWhitening(stats_decay=0.5, stats_every=1, solve_every=1))
        for step, switch in enumerate([True, True, False, False, True, True]):
            optimizer.param_groups[0]["wellcond_whitening"] = switch
            optimizer.zero_grad()
            x = torch.randn(9, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            layer(x if switch else outlier * x).sin().sum().backward()
            optimizer.step()
        moments.append(optimizer.state[layer.weight]["wellcond_whitening_second_moment"])
    close(*moments)


@pytest.mark.parametrize("start", [True, False])
def test_switches_and_their_statistics_survive_a_checkpoint(start: bool) -> None:
    """The switch is a parameter group's entry like any other: what is loaded replaces what the group was made with."""

    def make() -> tuple[nn.Sequential, Any]:
        model = two_layers()
        groups = grouped(model, wellcond_whitening=start)
        return model, attached(model, FeatureWhitening(stats_every=2, solve_every=4), lr=0.05, params=groups)[0]

    def run(model: nn.Sequential, optimizer: Any, steps: range) -> None:
        for step in steps:
            if step == 3:
                optimizer.param_groups[0]["wellcond_whitening"] = not start
            step_on(model, optimizer, step)

    straight, optimizer = make()
    run(straight, optimizer, range(13))
    for stop in (4, 7):
        first, optimizer = make()
        run(first, optimizer, range(stop))
        saved = copy.deepcopy(optimizer.state_dict())
        assert saved["param_groups"][0]["wellcond_whitening"] is not start
        resumed, second = make()
        resumed.load_state_dict(copy.deepcopy(first.state_dict()))
        second.load_state_dict(saved)
        run(resumed, second, range(stop, 13))
        for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b), (stop, name)


# solvers ------------------------------------------------------------------------------------------------------------


@parametrize_pairs(
    ("mode", MODES),
    ("transform_type", [FeatureWhitening, FeatureDescent]),
    ("second_moment", ["dense", "kronecker"]),
)
def test_newton_schulz_trains_as_eigh_does(transform_type: type, mode: Any, second_moment: Any) -> None:
    trained = []
    for solver in ("eigh", "newton_schulz"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 2, groups=2)).double()
        chosen = transform_type(
            solver=solver, damping_mode=mode, second_moment=second_moment, stats_every=2, solve_every=4
        )
        optimizer, handle = attached(model, chosen, lr=0.02)
        train(model, optimizer, range(12), [3, 3, 5, 5], torch.float64)
        assert handle.stats()[NAMES[transform_type]]["failed_solves"] == 0
        trained.append([p.detach() for p in model.parameters()])
    for first, second in zip(*trained, strict=True):
        close(first, second, 1e-6)


# solves spread over steps -------------------------------------------------------------------------------------------

WIDTHS = (7, 5, 9, 6, 8, 7)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise([*WIDTHS, 3])]
    return nn.Sequential(*itertools.chain.from_iterable((layer, nn.Tanh()) for layer in layers)).double()


def solved_at(model: nn.Sequential, optimizer: Any) -> list[int]:
    return [optimizer.state[layer.weight]["wellcond_whitening_solved_at"] for layer in model[::2]]


def run_chain(model: nn.Sequential, optimizer: Any, steps: range) -> list[list[int]]:
    """Return for each step the layers that were solved in it."""
    solved = []
    for step in steps:
        train(model, optimizer, range(step, step + 1), [6, WIDTHS[0]], torch.float64)
        solved.append([i for i, at in enumerate(solved_at(model, optimizer)) if at == step])
    return solved


SPREAD: dict[str, Any] = {"stats_every": 8, "solve_every": 16, "stats_decay": 0.8}


@pytest.mark.parametrize("at_once", [1.0, 400.0, 800.0, 1e9])
def test_solves_are_spread_oldest_first_within_the_budget(at_once: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solves, "SOLVED_AT_ONCE", at_once)
    model = chain()
    optimizer, _ = attached(model, FeatureWhitening(solve_warmup=False, **SPREAD), lr=0.02)
    solved = run_chain(model, optimizer, range(64))
    costs = [width**3 for width in WIDTHS]
    budget = max(at_once, sum(costs) / 8)
    assert solved[0] == list(range(6))  # a first solve does not wait
    last = [0] * 6
    for step, layers in enumerate(solved[1:], start=1):
        interval = step // 16 * 16
        due = [i for i in range(6) if last[i] < interval]
        # As long as the budget lasts, and no longer; the last one may end beyond it.
        oldest = sorted(due, key=lambda i: last[i])
        wanted: list[int] = []
        while oldest and sum(costs[i] for i in wanted) < budget:
            wanted.append(oldest.pop(0))
        assert layers == sorted(wanted)
        for i in layers:
            last[i] = step
    for start in (16, 32, 48):
        counts = [sum(i in layers for layers in solved[start : start + 16]) for i in range(6)]
        assert counts == [1] * 6
        # All done before statistics change again.
        assert all(not layers for layers in solved[start + 8 : start + 16])
    busiest = max(len(layers) for layers in solved[1:])
    assert busiest == (6 if at_once == 1e9 else busiest)
    assert (busiest < 6) == (at_once < 1e9)


def test_spread_solves_during_warmup_still_come_to_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solves, "SOLVED_AT_ONCE", 1.0)
    model = chain()
    optimizer, _ = attached(model, FeatureWhitening(stats_every=8, solve_every=32), lr=0.02)
    solved = run_chain(model, optimizer, range(64))
    for start, stop in ((0, 8), (8, 16), (16, 32), (32, 64)):
        assert [sum(i in layers for layers in solved[start:stop]) for i in range(6)] == [1] * 6


@pytest.mark.parametrize("stop", [17, 18, 19, 33, 34])
def test_resuming_in_the_middle_of_a_spread_is_exact(stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solves, "SOLVED_AT_ONCE", 1.0)

    def start() -> tuple[nn.Sequential, Any]:
        model = chain()
        return model, attached(model, FeatureWhitening(solve_warmup=False, **SPREAD), lr=0.02)[0]

    straight, optimizer = start()
    solved = run_chain(straight, optimizer, range(40))
    first, optimizer = start()
    begun = run_chain(first, optimizer, range(stop))
    # In the middle indeed: some are solved since the interval began, and some are not.
    assert 0 < sum(map(len, begun[stop // 16 * 16 :])) < 6
    resumed, second = start()
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert begun + run_chain(resumed, second, range(stop, 40)) == solved
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
