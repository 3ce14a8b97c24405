"""The networks: shapes, sizes, and weights that follow from the seed."""

from __future__ import annotations

import pytest
import torch

from wellcond.lab.errors import LabError
from wellcond.lab.models import MODELS, initial_model, select_model


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("channels", [1, 3])
def test_logits_from_the_smallest_image(name, channels):
    size = MODELS[name].smallest_image
    model = initial_model(name, channels, 7, seed=0)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # 3 convolutions 27·16, 144·32, 288·32, their norms 2·(16+32+32), a linear layer 32·10+10.
        ("convnet", 432 + 4608 + 9216 + 160 + 330),
        # The CIFAR ResNet-18 that the literature counts as 11.17 million.
        ("resnet18", 11_173_962),
    ],
)
def test_number_of_parameters(name, parameters):
    assert sum(parameter.numel() for parameter in initial_model(name, 3, 10, seed=0).parameters()) == parameters


def test_resnet8_has_seven_convolutions_in_its_main_path():
    convolutions = [m for m in initial_model("resnet8", 3, 10, seed=0).modules() if isinstance(m, torch.nn.Conv2d)]
    assert sum(m.kernel_size == (3, 3) for m in convolutions) == 7
    assert {m.out_channels for m in convolutions} == {16, 32, 64}


def test_the_seed_decides_the_weights_and_nothing_else():
    before = torch.random.get_rng_state()
    first, again, other = (initial_model("convnet", 1, 10, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["0.0.weight"], other["0.0.weight"])


def test_images_too_small_for_a_network_are_refused():
    with pytest.raises(LabError, match="model resnet18 needs images of at least 16x16, got 8x8"):
        select_model("resnet18", 8)
