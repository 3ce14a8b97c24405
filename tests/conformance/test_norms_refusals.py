"""Normalization layers say what they cannot use, and stay as they were."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from norm_formulas import splitting
from norm_kinds import (
    FLOAT64,
    KINDS,
    POSITIONS,
    Kind,
    assert_same_state,
    check_evaluation,
    check_training,
    close,
    draw,
    kinds,
    trained,
    wide,
    with_dimensions,
    with_pairs,
)

import wellcond.nn


@with_pairs(("training", [True, False]))
def test_no_samples(kind: Kind, dims: int, training: bool) -> None:
    """As nn.BatchNorm, but for the statistics, which an empty batch says nothing about."""
    layer = trained(kind, dims).train(training)
    before = {name: value for name, value in wide(layer.state_dict()).items() if name != "num_batches_tracked"}
    x = draw(dims)[:0].requires_grad_()
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    close(layer.weight.grad, torch.zeros(3))
    after = wide(layer.state_dict())
    close({name: after[name] for name in before}, before)


@with_dimensions
def test_one_value_per_channel_is_refused(kind: Kind, dims: int) -> None:
    layer = trained(kind, dims)
    state = copy.deepcopy(layer.state_dict())
    x = torch.ones(1, 3, *(1 for _ in POSITIONS[dims]), dtype=FLOAT64)
    with pytest.raises(ValueError, match="(?i)expected more than 1 value per channel when training, got input size"):
        layer(x)
    assert_same_state(layer.state_dict(), state)
    if kind.whole is not splitting:
        check_evaluation(kind, layer, x)


@with_pairs(("training", [True, False]))
def test_wrong_channels_are_refused(kind: Kind, dims: int, training: bool) -> None:
    layer = trained(kind, dims).train(training)
    state = copy.deepcopy(layer.state_dict())
    for channels in (1, 2, 4):  # one would broadcast
        with pytest.raises(ValueError, match="expected 3 channels"):
            layer(draw(dims, channels=channels))
    assert_same_state(layer.state_dict(), state)


@with_dimensions
def test_wrong_number_of_dimensions_is_refused(kind: Kind, dims: int) -> None:
    layer = kind.make(dims)
    with pytest.raises(ValueError, match=r"expected .* input \(got .* input\)"):
        layer(draw(dims).unsqueeze(-1))


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_not_a_number_does_not_spread_over_channels(kind: Kind, training: bool) -> None:
    layer = trained(kind).train(training)
    x = draw(2)
    x[0, 1, 0, 0] = torch.nan
    y = layer(x)
    assert y[0, 1, 0, 0].isnan()
    if not kind.mixes_channels:
        assert y[:, [0, 2]].isfinite().all()
    assert layer.running_mean[[0, 2]].isfinite().all()


@with_dimensions
def test_without_affine(kind: Kind, dims: int) -> None:
    layer = kind.make(dims, affine=False)
    assert layer.weight is None
    assert layer.bias is None
    for step in range(2):
        check_training(kind, layer, draw(dims, step))
    check_evaluation(kind, layer, draw(dims))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"eps": -1e-5}, "eps"),
    ({"group_size": 0}, "group_size"),
    ({"group_size": 1.5}, "group_size"),
    ({"group_size": True}, "group_size"),
    ({"momentum": 1.5}, "momentum"),
    ({"momentum": -0.1}, "momentum"),
    ({"synchronize": True, "group_size": 2}, "synchronize"),
    ({"num_features": 0}, "num_features"),
]
# Kinds of a family differ in options that are good: what its class refuses is the same.
FAMILIES = sorted({kind.family for kind in KINDS.values()})


def takes(family: str, options: dict[str, Any]) -> bool:
    return inspect.signature(getattr(wellcond.nn, f"{family}2d")).parameters.keys() >= options.keys()


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [(family, options, message) for family in FAMILIES for options, message in BAD if takes(family, options)],
    ids=str,
)
def test_bad_options_are_refused(family: str, options: dict[str, Any], message: str) -> None:
    if family == "GhostBatchNorm":
        options = {"group_size": 2, **options}
    with pytest.raises(ValueError, match=message):
        getattr(wellcond.nn, f"{family}2d")(**{"num_features": 3, **options})


def test_every_family_refuses_some_options_and_every_option_is_refused_by_some_family() -> None:
    assert all(sum(takes(family, options) for options, _ in BAD) >= 4 for family in FAMILIES)
    assert all(any(takes(family, options) for family in FAMILIES) for options, _ in BAD)
