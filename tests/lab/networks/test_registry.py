"""The networks: shapes, sizes against the published ones, and weights that follow from the seed."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import wellcond
from wellcond.lab.errors import LabError
from wellcond.lab.networks.registry import MODELS, find_model, initial_model, select_model


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("channels", [1, 3])
def test_logits_from_the_smallest_image(name, channels):
    size = MODELS[name].smallest_image
    with torch.device("meta"):  # shapes without the work
        model = MODELS[name].build(channels, 7)
        logits = model(torch.empty(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", list(MODELS))
def test_the_last_convolution_sees_two_by_two_of_the_smallest_image(name):
    sizes = []
    size = MODELS[name].smallest_image
    with torch.device("meta"):
        model = MODELS[name].build(3, 7)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda module, args, out: sizes.append(out.shape[2:]))
        model(torch.empty(2, 3, size, size))
    assert min(sizes) == (2, 2)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # 3 convolutions 27·16, 144·32, 288·32, their norms 2·(16+32+32), a linear layer 32·10+10.
        ("convnet", 432 + 4608 + 9216 + 160 + 330),
        # CIFAR-10 variants as https://github.com/kuangliu/pytorch-cifar counts them: 11.17, 21.28, 23.52 and 42.51
        # million,
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        ("resnet101", 42_512_970),
        # one linear layer 512·10, convolutions with biases,
        ("vgg11", 9_231_114),
        ("vgg16", 14_728_266),
        # a stem without a norm of its own,
        ("densenet121", 6_956_298),
        # and 27,104,586 there, where the stem is a 1×1 convolution; 3×3 adds 8·3·64.
        ("resnext29", 27_104_586 + 8 * 3 * 64),
    ],
)
def test_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = MODELS[name].build(3, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet8", 8),
        ("resnet14", 14),
        ("resnet11-bottleneck", 11),
        ("resnet18-thin", 18),
        ("resnet34", 34),
        ("resnet101", 101),
        ("vgg11", 9),  # eleven with the two hidden linear layers that the CIFAR variant leaves out
        ("densenet121", 121),
        ("resnext29", 29),
    ],
)
def test_a_network_is_as_deep_as_its_name_says(name, layers):
    with torch.device("meta"):
        model = MODELS[name].build(3, 10)
    shortcuts = ("shortcut", "downsample")
    main = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not any(part in path for part in shortcuts)
    ]
    assert len(main) == layers


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vgg-small", "vgg11"),
        ("resnet14", "resnet34"),
        ("resnet11-bottleneck", "resnet50"),
        ("densenet-small", "densenet121"),
        ("resnext-small", "resnext29"),
    ],
)
def test_small_relatives_are_made_of_the_same_layers(name, kind):
    def layers(name):
        with torch.device("meta"):
            return {
                (type(m).__name__, getattr(m, "kernel_size", None), getattr(m, "groups", None))
                for m in MODELS[name].build(3, 10).modules()
            }

    assert layers(name) == layers(kind)
    with torch.device("meta"):
        model = MODELS[name].build(3, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000


def test_resnet8_has_seven_convolutions_in_its_main_path():
    convolutions = [m for m in initial_model("resnet8", 3, 10, seed=0).modules() if isinstance(m, torch.nn.Conv2d)]
    assert sum(m.kernel_size == (3, 3) for m in convolutions) == 7
    assert {m.out_channels for m in convolutions} == {16, 32, 64}


@pytest.mark.parametrize(
    ("name", "total"),
    # Sums of all weights of seed 0 when the committed results were measured.
    [("convnet", 613.4855541651636), ("resnet8", 2625.2705813839757), ("resnet18", 109470.11038317633)],
)
def test_weights_that_committed_results_rest_on(name, total):
    model = initial_model(name, 3, 10, seed=0)
    assert sum(float(p.detach().double().abs().sum()) for p in model.parameters()) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "convnet"])
def test_every_layer_is_normalized_and_preconditioned(name):
    with torch.device("meta"):
        model = MODELS[name].build(3, 10)
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        converted = wellcond.nn.convert_norm(model, to="bsr")
    assert sum(isinstance(m, wellcond.nn.BSRBatchNorm2d) for m in converted.modules()) == norms > 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, wellcond.GradientCentralization())
    assert "no rule for the layer type" not in handle.report()


@pytest.mark.parametrize("name", ["vgg-small", "densenet-small", "resnext-small", "resnet11-bottleneck"])
def test_small_relatives_train(name):
    model = initial_model(name, 3, 4, seed=0)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(16) % 4
    images = torch.randn(16, 3, 16, 16, generator=generator) * 0.3 + labels[:, None, None, None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_seed_decides_the_weights_and_nothing_else():
    before = torch.random.get_rng_state()
    first, again, other = (initial_model("convnet", 1, 10, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["0.0.weight"], other["0.0.weight"])


def test_images_too_small_for_a_network_are_refused():
    with pytest.raises(LabError, match="model resnet18 needs images of at least 16x16, got 8x8"):
        select_model("resnet18", 8)


def test_networks_of_torchvision_have_the_classes_of_the_data():
    with torch.device("meta"):
        model = find_model("torchvision:resnet50").build(3, 7)
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 7)
    assert model.conv1.kernel_size == (7, 7)
    # ResNet-50's published 25,557,032 without the 1000 classes that it has there.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == 25_557_032 - 993 * (2048 + 1)


def test_networks_with_auxiliary_classifiers_return_logits_alone():
    with torch.device("meta"):
        model = find_model("torchvision:googlenet").build(3, 7).train()
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 7)


def test_networks_of_timm_have_the_classes_and_channels_of_the_data():
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = find_model("timm:resnet18.a1_in1k").build(1, 7)
        assert model(torch.empty(2, 1, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", r"unknown model 'resnet19': did you mean 'resnet1\w'"),
        ("torchvision:resnet51", r"unknown torchvision model 'resnet51': did you mean 'resnet\d+'"),
        ("timm:resnet1888", r"unknown timm model 'resnet1888': did you mean 'resnet18\w*'"),
        ("keras:resnet18", "models are called NAME, torchvision:NAME or timm:NAME, got 'keras:resnet18'"),
    ],
)
def test_unknown_names(name, message):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(LabError, match=message):
        find_model(name)


def test_timm_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(LabError, match="model timm:resnet18 needs the package timm: pip install timm"):
        find_model("timm:resnet18")


def test_sizes_that_only_the_network_knows_of():
    before = torch.random.get_rng_state()
    assert select_model("torchvision:vit_b_16", 224).name == "torchvision:vit_b_16"
    with pytest.raises(LabError, match="model torchvision:vit_b_16 does not take images of 32x32: .*224"):
        select_model("torchvision:vit_b_16", 32)
    # Its initialization looks at values, so it cannot be tried without them.
    assert select_model("torchvision:regnet_x_400mf", 32).name == "torchvision:regnet_x_400mf"
    with pytest.raises(LabError, match="^model torchvision:resnet18 needs images of 3 channels, got 1"):
        select_model("torchvision:resnet18", 32, channels=1)
    assert torch.equal(before, torch.random.get_rng_state())
