"""Iterative Normalization: partial whitening, as the authors compute it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wellcond.nn.norm.decorrelated import DecorrelatedBatchNorm2d
from wellcond.nn.norm.iternorm import IterNorm2d

FLOAT64 = torch.float64
GOLDEN = Path(__file__).parents[2] / "golden" / "iternorm_g1.npz"


def close(actual: object, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def with_variances(values: list[float], samples: int = 64) -> Tensor:
    """A batch whose covariance has exactly these eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(samples * 4, len(values), generator=generator, dtype=FLOAT64)
    rows = torch.linalg.qr(rows - rows.mean(0))[0] * (len(rows) * torch.tensor(values, dtype=FLOAT64)) ** 0.5
    mixing = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=FLOAT64))[0]
    return (rows @ mixing).view(samples, 2, 2, len(values)).permute(0, 3, 1, 2).contiguous()


def variances_of(y: Tensor) -> Tensor:
    """The eigenvalues of an output's covariance, ascending."""
    return torch.linalg.eigvalsh(y.detach().transpose(0, 1).flatten(1).cov(correction=0))


@pytest.fixture
def golden() -> dict[str, Any]:
    arrays = np.load(GOLDEN)
    hyper = json.loads(str(arrays["hyper"]))
    return {"hyper": hyper} | {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "hyper"}


def as_the_authors(golden: dict[str, Any]) -> IterNorm2d:
    hyper = golden["hyper"]
    layer = IterNorm2d(
        hyper["num_features"], hyper["num_channels_used"], hyper["T_used"], hyper["eps"], hyper["momentum"]
    )
    layer.double()
    state = {name.removeprefix("state0_"): value for name, value in golden.items() if name.startswith("state0_")}
    layer.load_state_dict(state)
    return layer


def test_trains_and_evaluates_as_the_authors_code(golden: dict[str, Any]) -> None:
    layer = as_the_authors(golden)
    for step, batch in enumerate(golden["x_train"]):
        x = batch.clone().requires_grad_()
        y = layer(x)
        close(y, golden["train_y"][step])
        close(layer.running_mean, golden["buf_running_mean"][step].flatten())
        close(layer.running_whitening, golden["buf_running_wm"][step])
        if step == 0:
            (y * golden["up"]).sum().backward()
            close(x.grad, golden["train0_dx"])
            close(layer.weight.grad, golden["train0_d_weight"].flatten())
            close(layer.bias.grad, golden["train0_d_bias"].flatten())
    close(layer.eval()(golden["x_eval"]), golden["eval_y"])


def test_loads_checkpoints_of_the_authors(golden: dict[str, Any]) -> None:
    """Those keep no variance, and do not count batches."""
    state = {
        "weight": golden["state0_weight"],
        "bias": golden["state0_bias"],
        "running_mean": golden["buf_running_mean"][-1],
        "running_wm": golden["buf_running_wm"][-1],
    }
    model = nn.Sequential(IterNorm2d(6).double().eval())
    model.load_state_dict({f"0.{name}": value for name, value in state.items()})
    close(model(golden["x_eval"]), golden["eval_y"])
    assert int(model[0].num_batches_tracked) > 0
    close(model[0].running_var, torch.ones(6))
    other = IterNorm2d(6, channels_per_group=3)
    with pytest.raises(RuntimeError, match="size mismatch for running_whitening"):
        other.load_state_dict(state)


def test_evaluation_has_a_gradient(golden: dict[str, Any]) -> None:
    """The authors' raises an IndexError."""
    assert "IndexError" in golden["hyper"]["eval_backward_error"]
    layer = as_the_authors(golden)
    layer(golden["x_train"][0])
    layer.eval()
    assert torch.autograd.gradcheck(layer, (golden["x_eval"][:2].clone().requires_grad_(),))


def test_five_steps_whiten_partially() -> None:
    """Eigenvalues of 1, 0.1, 0.01 and 0.001 become variances of 1, 0.99, 0.40 and 0.05."""
    y = IterNorm2d(4, affine=False).double()(with_variances([1.0, 0.1, 0.01, 0.001]))
    close(variances_of(y), torch.tensor([0.05, 0.40, 0.99, 1.0]), 5e-3)
    close(y.mean((0, 2, 3)), torch.zeros(4))


def test_more_steps_whiten_more_up_to_decorrelated_batch_normalization() -> None:
    x = with_variances([2.0, 0.3, 0.1, 0.01, 0.002])
    errors = []
    for steps in (1, 3, 5, 7, 10, 15, 20):
        y = IterNorm2d(5, steps=steps, affine=False).double()(x)
        errors.append(float((variances_of(y) - 1).abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.99
    assert errors[-1] < 1.1 * 1e-5 / 0.002  # what ε takes from the smallest
    close(y, DecorrelatedBatchNorm2d(5, affine=False).double()(x), 1e-9)
    float32 = IterNorm2d(5, steps=20, affine=False)(x.float())
    close(float32, y, 5e-3)


def test_gradient_with_many_steps_is_that_of_decorrelated_batch_normalization() -> None:
    x = with_variances([2.0, 0.3, 0.1, 0.05], samples=4).requires_grad_()
    upstream = torch.sin(torch.arange(x.numel(), dtype=FLOAT64)).view(x.shape)
    gradients = [
        torch.autograd.grad(layer.double()(x), x, upstream)
        for layer in (IterNorm2d(4, steps=30), DecorrelatedBatchNorm2d(4))
    ]
    close(*gradients, 1e-8)


def test_second_derivatives() -> None:
    layer = IterNorm2d(4, channels_per_group=2, steps=3, track_running_stats=False, eps=1e-2).double()
    x = with_variances([1.0, 0.5, 0.2, 0.2], samples=2)[..., :1].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_description() -> None:
    expected = "IterNorm2d(8, channels_per_group=4, steps=3, eps=0.001, momentum=None, affine=True)"
    assert repr(IterNorm2d(8, 4, 3, 1e-3, None)) == expected


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, None])
def test_steps_are_checked(steps: object) -> None:
    with pytest.raises(ValueError, match="steps must be a positive integer"):
        IterNorm2d(3, steps=steps)
