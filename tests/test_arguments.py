"""Every public constructor and function refuses what an argument cannot be, and names the argument."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import wellcond
from pairs import parametrize_pairs
from wellcond import diagnostics, optim
from wellcond import nn as W
from wellcond.runtime.checks import ArgumentError, checked

DATA = [(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(4, dtype=torch.int64))]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 2))


def of_kind(kind: str) -> nn.Module:
    return W.convert_norm(model(), kind)


def loss(outputs: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, batch[1])


def torchvision_net() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=2)


NORM = {"num_features": 8}
LINEAR = {"in_features": 4, "out_features": 3}
CONV = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}
PROBE: dict[str, Any] = {"model": model, "batch": lambda: DATA[0], "loss": lambda: loss}
OVER_DATA: dict[str, Any] = {"model": model, "loader": lambda: DATA}
# What each takes at least; functions make what must be new each time.
VALID: dict[Callable[..., Any], dict[str, Any]] = {
    **{getattr(W, name): NORM for name in W.__all__ if re.search(r"(Norm|Renorm)[123]d$", name)},
    **{getattr(W, f"GhostBatchNorm{dims}d"): {"num_features": 8, "group_size": 2} for dims in (1, 2, 3)},
    **{getattr(W, name): LINEAR for name in W.__all__ if name.endswith("Linear")},
    **{getattr(W, name): CONV for name in W.__all__ if name.endswith(("Conv2d", "Deconvolution2d"))},
    W.MomentumScheduler: {"model": lambda: of_kind("mbn"), "total_epochs": 3},
    W.BatchRenormScheduler: {"model": lambda: of_kind("brn")},
    W.SparsityScheduler: {"model": lambda: of_kind("ssn"), "total_steps": 3},
    W.connect_cross_iteration: {"model": lambda: of_kind("cbn")},
    W.connect_kalman: {"model": lambda: of_kind("kn")},
    W.convert_layers: {"model": model, "to": "wnn"},
    W.convert_norm: {"model": model, "to": "bsr"},
    W.conversion_report: {"model": lambda: of_kind("bsr")},
    W.fold_switchable: {"model": lambda: of_kind("ssn")},
    W.gamma_decay: {"model": model},
    W.ibn_a: {"model": torchvision_net},
    W.ibn_b: {"model": torchvision_net},
    W.sparsestmax: {"logits": lambda: torch.randn(3), "radius": 0.5},
    W.switch_logits: {"model": model},
    W.weight_centralize: {"module": lambda: nn.Linear(4, 2)},
    W.weight_normalize: {"module": lambda: nn.Linear(4, 2)},
    W.weight_standardize: {"module": lambda: nn.Linear(4, 2)},
    wellcond.FeatureDescent: {},
    wellcond.FeatureWhitening: {},
    wellcond.GradientCentralization: {},
    wellcond.calibrate: {**OVER_DATA, "batch_size": 2},
    **{getattr(optim, name): {"model": model, "lr": 0.1} for name in ("FSGD", "WSGDM", "FAdam", "WAdam")},
    diagnostics.GradientRecorder: {"model": model},
    diagnostics.batch_noise: {**OVER_DATA, "batch_size": 2},
    diagnostics.disparity: OVER_DATA,
    diagnostics.feature_spectrum: OVER_DATA,
    diagnostics.gradient_statistics: {**OVER_DATA, "loss": lambda: loss},
    diagnostics.landscape: PROBE,
    diagnostics.lipschitz: PROBE,
    diagnostics.weight_means: {"model": model},
}
# Made by the library alone, or to be derived from; `attach` and `calibrated` have their own tests.
NOT_CALLED = {"Attachment", "GradientTransform", "Layout", "WellcondWarning", "attach", "calibrated", "register_layout"}
NOT_CALLED |= {"SecondMoments", "second_moments"}
CANDIDATES = [True, False, 1, 0, -1, 0.5, math.nan, math.inf, -math.inf, "no", None, [], {}, 10**30, 10**400, object()]
# Integers and numbers that may be 0 or less.
SMALL = {"padding", "warmup_steps", "scale_after", "burn_in", "seed", "lr", "weight_decay"}
# Numbers that must be positive, or not negative, or at most 1.
NOT_NEGATIVE = {"eps", "damping", "momentum", "base_inference_decay", "stats_decay", "instance_fraction", "d_max"}
SHARES = {"momentum", "base_inference_decay", "stats_decay", "instance_fraction", "gain", "radius", "gradient_momentum"}
# Words that are one of a few.
CHOICES = {"to", "what", "nonneg", "order", "whitening", "directions", "damping_mode", "padding_mode", "solver"}
CHOICES |= {"second_moment", "precision", "target", "name", "decay", "where", "layers", "norm"}


def whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def admitted(name: str, part: str, value: Any) -> bool | None:
    """Whether a value is of a part of an annotation; None where that cannot be told from its words."""
    if part in ("bool", "None"):
        return isinstance(value, bool) if part == "bool" else value is None
    if part == "int":
        return whole(value) and abs(value) < 2**63 and (value >= 1 or name in SMALL)
    if part == "float":
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value in (10**30, 10**400):
            return None if value == 10**30 and not isinstance(value, bool) else False
        if not math.isfinite(value) or (name in NOT_NEGATIVE and value < 0) or (name in SHARES and value > 1):
            return False
        return None if value in (0, 1, -1) else True
    if part == "str" or part.startswith("Literal"):
        return False if not isinstance(value, str) or name in CHOICES else None
    if part in ("Predicate", "Call", "Loss") or part.startswith("Callable"):
        return callable(value)
    if part in ("nn.Module", "_Module", "Tensor", "torch.Tensor", "torch.dtype", "dist.ProcessGroup", "nn.Linear"):
        return False
    if part == "torch.device":
        return None if whole(value) and abs(value) < 2**31 else False
    return None


def cases() -> dict[str, tuple[Callable[..., Any], str, list[Any]]]:
    found = {}
    for function in VALID:
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
                continue
            annotation = str(parameter.annotation)
            parts = re.split(r" \| (?![^\[]*\])", annotation.strip("'"))
            wrong = [value for value in CANDIDATES if all(admitted(name, part, value) is False for part in parts)]
            if function.__module__.startswith(optim.__name__):  # Torch's own errors say "learning rate" and "epsilon".
                wrong = [value for value in wrong if value != -1]
            if wrong:
                found[f"{function.__name__}-{name}"] = (function, name, wrong)
    return found


CASES = cases()
# `**options` of the layers with constants that are renewed, by hand: their types stand in a TypedDict.
for layer in ("WhitenedLinear", "WhitenedConv2d", "EigenLinear", "GeneralizedWhitenedConv2d"):
    for option, wrong in (
        ("damping", (True, "no", None, -1.0, math.nan, math.inf, 10**400)),
        ("damping_mode", (True, None, "no", 3)),
        ("refresh_every", (True, 0, -1, 0.5, "no", 10**30)),
        ("refresh_warmup", (0, 1, None, "no", 0.5)),
        ("stats_every", (True, 0, None, 0.5, 10**30)),
        ("stats_decay", (True, -0.1, 1.0, "no", None, math.nan)),
        ("synchronize", (1, "yes", None, [])),
    ):
        CASES[f"{layer}-{option}"] = (getattr(W, layer), option, list(wrong))


def called(function: Callable[..., Any], **changed: Any) -> Any:
    arguments = {
        name: value() if inspect.isfunction(value) else value
        for name, value in VALID[function].items()
        if name not in changed
    }
    return function(**arguments, **changed)


@pytest.mark.parametrize("case", CASES)
def test_wrong_arguments_are_refused_by_name(case: str) -> None:
    function, name, values = CASES[case]
    for value in values:
        with pytest.raises((TypeError, ValueError), match=rf"(?s)\b{name}\b") as caught:
            called(function, **{name: value})
        assert "unexpected keyword" not in str(caught.value)


def test_every_public_callable_is_walked() -> None:
    public = {
        getattr(module, name): name
        for module in (wellcond, W, diagnostics)
        for name in module.__all__
        if name[0] != "_"
    }
    records = {
        kind for kind in public if inspect.isclass(kind) and hasattr(kind, "__dataclass_fields__")
    } - VALID.keys()
    left = {name for kind, name in public.items() if callable(kind) and kind not in VALID and kind not in records}
    assert left == NOT_CALLED


@pytest.mark.parametrize("function", VALID, ids=lambda function: function.__name__)
def test_right_arguments_are_taken(function: Callable[..., Any]) -> None:
    if function is W.fold_switchable:
        pytest.skip("has nothing to fold")
    called(function)


def test_torchs_order_is_pointed_out() -> None:
    with pytest.raises(
        ValueError, match="affine must be True or False, got 0.1, as argument 3 of .* in nn.BatchNorm that is momentum"
    ):
        W.MomentumBatchNorm2d(64, 1e-5, 0.1)
    with pytest.raises(
        ValueError, match="instance_fraction must be 0 or select at least one of the 64 channels, got 1e-05 .*eps"
    ):
        W.InstanceBatchNorm2d(64, 1e-5)
    for layer in (W.GhostBatchNorm2d, W.DecorrelatedBatchNorm2d, W.IterNorm2d):
        with pytest.raises(
            ValueError, match="must be a positive integer, got 1e-05, as argument 2 .* in nn.BatchNorm that is eps"
        ):
            layer(64, 1e-5, 0.1)


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.124])
def test_a_share_that_selects_no_channel_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="instance_fraction"):
        W.InstanceBatchNorm2d(8, fraction)
    assert W.InstanceBatchNorm2d(8, 0.125).instance_channels == 1
    assert W.InstanceBatchNorm2d(8, 0).instance_channels == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("in_features", 0), ("out_features", 0), ("in_features", -1), ("out_features", 2**40)],
)
def test_sizes_of_linear_layers(name: str, value: int) -> None:
    for layer in (W.WhitenedLinear, W.EigenLinear, W.GeneralizedWhitenedLinear):
        with pytest.raises(ValueError, match=name):
            layer(**LINEAR | {name: value})


@parametrize_pairs(
    ("value", [0, -1, (3, 0), (3, 3, 3), (1.5, 1), 2**40]),
    ("name", ["kernel_size", "stride", "dilation"]),
    ("layer", [kind for kind, valid in VALID.items() if valid is CONV]),
)
def test_geometry_of_convolutions(layer: type[nn.Module], name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        layer(**CONV | {name: value})


def test_checked_keeps_what_a_function_is() -> None:
    @checked
    def scale(value: float, unit: str | None = None, *rest: int, twice: bool = False) -> float:
        """Scale."""
        return value * (2 if twice else 1)

    assert scale(2, twice=True) == 4
    assert scale.__doc__ == "Scale."
    assert list(inspect.signature(scale).parameters) == ["value", "unit", "rest", "twice"]
    with pytest.raises(ArgumentError, match="value must be a finite number, got True"):
        scale(True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'thrice'"):
        scale(1.0, thrice=True)
