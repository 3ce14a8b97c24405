"""Transforms and optimizers by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import wellcond
from wellcond.transforms.by_name import TRANSFORMS, named


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_name_is_the_transform_with_its_defaults(name: str) -> None:
    (transform,) = named([name])
    assert transform == TRANSFORMS[name]()
    assert transform.name == name
    model = nn.Linear(4, 3)
    handle = wellcond.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, name)
    assert handle.transforms == (TRANSFORMS[name](),)


def test_names_and_transforms_mix_in_their_order() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, "centralization", wellcond.FeatureWhitening(damping=0.5))
    assert list(handle.stats()) == ["centralization", "whitening"]


@given(st.text(max_size=12).filter(lambda name: name not in TRANSFORMS))
def test_every_other_name_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=f"no transform is called .* Known: {', '.join(TRANSFORMS)}$"):
        named([name])


@pytest.mark.parametrize(
    ("name", "meant"),
    [("whiting", "whitening"), ("FeatureWhitening", "whitening"), ("GradientCentralisation", "centralization")],
)
def test_a_near_name_is_guessed(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        named([name])
