"""IBN-Net of known networks: which norms change, that weights carry over, and that nothing else is changed."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.layers
import timm.models.densenet
import timm.models.resnet
import timm.models.senet
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from wellcond.nn.convert.ibn_net import ibn_a, ibn_b
from wellcond.nn.norm.instance_batch import InstanceBatchNorm2d

PLACEMENT = json.loads(str(np.load(Path(__file__).parents[2] / "golden" / "ibn_placement.npz")["placement"]))

TV = torchvision.models.resnet
TIMM = timm.models.resnet
SENET = timm.models.senet
STAGES = [2, 2, 1, 1]
Make = Callable[[], nn.Module]


def timm_resnet(block: type[nn.Module], **options: Any) -> nn.Module:
    return TIMM.ResNet(block, STAGES, num_classes=5, zero_init_last=False, **options)


def timm_with_everything(block: type[nn.Module]) -> nn.Module:
    """With all that a block can have; what timm puts into other blocks alone is in the last ones, too."""
    options = {"stem_type": "deep", "avg_down": True, "aa_layer": timm.layers.BlurPool2d, "drop_path_rate": 0.5}
    model = timm_resnet(block, act_layer=nn.SiLU, block_args={"attn_layer": "se"}, **options)
    for last in (model.layer1[1], model.layer2[1]):
        last.drop_block, last.aa = timm.layers.DropBlock2d(0.3, 3), nn.AvgPool2d(3, 1, 1)
    return model


def senet(block: type[nn.Module], groups: int = 1, **options: Any) -> nn.Module:
    arguments = {"drop_rate": 0.0, "inplanes": 64, "input_3x3": False, "downsample_kernel_size": 1}
    return SENET.SENet(
        block, STAGES, groups, reduction=16, downsample_padding=0, num_classes=5, **{**arguments, **options}
    )


RESNETS: dict[str, Make] = {
    "torchvision basic": lambda: TV.ResNet(TV.BasicBlock, STAGES, num_classes=5),
    "torchvision bottleneck": lambda: TV.ResNet(TV.Bottleneck, STAGES, num_classes=5),
    "torchvision resnext": lambda: TV.ResNet(TV.Bottleneck, STAGES, num_classes=5, groups=32, width_per_group=4),
    "timm basic": lambda: timm_resnet(TIMM.BasicBlock),
    "timm resnext": lambda: timm_resnet(TIMM.Bottleneck, cardinality=32, base_width=4),
    "timm se": lambda: timm_resnet(TIMM.Bottleneck, block_args={"attn_layer": "se"}),
    "timm everything": lambda: timm_with_everything(TIMM.BasicBlock),
    "timm all bottleneck": lambda: timm_with_everything(TIMM.Bottleneck),
    "senet basic": lambda: senet(SENET.SEResNetBlock),
    "senet bottleneck": lambda: senet(SENET.SEResNetBottleneck),
    "senet resnext": lambda: senet(SENET.SEResNeXtBottleneck, groups=32),
    "senet 154": lambda: senet(SENET.SEBottleneck, groups=64, inplanes=128, input_3x3=True),
}
DENSENETS: dict[str, Make] = {
    "torchvision": lambda: torchvision.models.DenseNet(8, (4, 2, 1, 4), 16, num_classes=5),
    "timm": lambda: timm.models.densenet.DenseNet(8, (4, 2, 1, 4), num_classes=5),
}
NETWORKS: dict[str, Make] = RESNETS | {f"{name} densenet": make for name, make in DENSENETS.items()}
resnets = pytest.mark.parametrize("make", RESNETS.values(), ids=RESNETS)
networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def built(make: Make, seed: int = 0) -> nn.Module:
    """A network in float64 whose norms have statistics and parameters of their own."""
    torch.manual_seed(seed)
    model = make().double()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return model


def images(samples: int = 3, size: int = 32) -> Tensor:
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(actual: object, expected: object, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def placement(model: nn.Module) -> dict[str, tuple[str, Any]]:
    """Type and channels of each norm layer by name, as the golden file has it."""
    found: dict[str, tuple[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, InstanceBatchNorm2d):
            count = module.instance_channels
            found[name] = ("IBN", [count, module.num_features - count])
        elif isinstance(module, _BatchNorm | _InstanceNorm):
            found[name] = (type(module).__name__, module.num_features)
    return found


# which norms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PLACEMENT))
@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_placement_is_the_authors(name: str, package: str) -> None:
    network, _, letter = name.split("_")
    make = torchvision.models.get_model if package == "torchvision" else timm.create_model
    with torch.device("meta"):
        model = make(network)
    model = {"a": ibn_a, "b": ibn_b}[letter](model)
    assert placement(model) == {layer: (kind, channels) for layer, kind, channels in PLACEMENT[name]}


@pytest.mark.parametrize(("network", "like"), [("resnext50_32x4d", 2), ("seresnet50", 1), ("legacy_seresnet50", 1)])
def test_placement_in_relatives_of_resnet50(network: str, like: int) -> None:
    """As in a ResNet-50; a ResNeXt is wider inside its blocks."""
    with torch.device("meta"):
        model = timm.create_model(network)
        plain, other = placement(model), copy.deepcopy(model)
    expected = {
        f"layer{stage}.{block}.bn1": (32 * like * 2 ** (stage - 1)) for stage, block in blocks_of_three_stages()
    }
    halves = {name: ("IBN", [width, width]) for name, width in expected.items()}
    assert placement(ibn_a(model)) == plain | halves
    stem = "layer0.bn1" if network.startswith("legacy") else "bn1"
    instances = {stem: 64, "layer1.2.IN": 256, "layer2.3.IN": 512}
    assert placement(ibn_b(other)) == plain | {name: ("InstanceNorm2d", width) for name, width in instances.items()}


def blocks_of_three_stages() -> list[tuple[int, int]]:
    return [(stage, block) for stage, count in ((1, 3), (2, 4), (3, 6)) for block in range(count)]


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_placement_in_densenet121(package: str) -> None:
    """The first norm of every third layer of the first three blocks; 0.6 of the channels, rounded down, by batch."""
    make = torchvision.models.get_model if package == "torchvision" else timm.create_model
    with torch.device("meta"):
        model = make("densenet121")
    plain = placement(model)
    expected = {}
    for number, (channels, layers) in enumerate([(64, 6), (128, 12), (256, 24)]):
        for layer in range(0, layers, 3):
            width = channels + 32 * layer
            by_batch = int(width * 0.6)
            expected[f"features.denseblock{number + 1}.denselayer{layer + 1}.norm1"] = (
                "IBN",
                [width - by_batch, by_batch],
            )
    ibn_a(model)
    assert placement(model) == plain | expected
    converted = model.features.denseblock1.denselayer1.norm1
    assert converted.order == "batch_first"
    assert isinstance(converted, timm.layers.BatchNormAct2d) == (package == "timm")


def test_fraction_and_stages_are_options() -> None:
    model = ibn_a(built(RESNETS["torchvision basic"]), instance_fraction=0.25, stages=[4, 2])
    ibns = {name: channels for name, (kind, channels) in placement(model).items() if kind == "IBN"}
    assert ibns == {"layer2.0.bn1": [32, 96], "layer2.1.bn1": [32, 96], "layer4.0.bn1": [128, 384]}
    model = ibn_a(built(DENSENETS["timm"]), instance_fraction=0.5, stages=(4,))
    ibns = {name: channels for name, (kind, channels) in placement(model).items() if kind == "IBN"}
    assert {name.rsplit(".", 3)[1] for name in ibns} == {"denseblock4"}
    assert all(channels[0] - channels[1] in (0, 1) for channels in ibns.values())


# what they compute --------------------------------------------------------------------------------------------------


def instance_part(module: nn.Module, count: int, last: bool, act: nn.Module) -> None:
    """Let a batch normalization's output have some of its channels replaced by instance normalization's."""

    def hook(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        own = act(F.instance_norm(inputs[0], weight=layer.weight, bias=layer.bias, eps=layer.eps))
        if last:
            return torch.cat([output[:, : output.shape[1] - count], own[:, output.shape[1] - count :]], 1)
        return torch.cat([own[:, :count], output[:, count:]], 1)

    module.register_forward_hook(hook)


@networks
def test_ibn_a_computes_what_it_says(make: Make) -> None:
    """The converted network and the plain one with instance normalization put in by hooks."""
    model, plain = built(make), built(make)
    parameters = dict(model.named_parameters())
    layers = dict(model.named_modules())
    assert ibn_a(model) is model
    for name, (kind, channels) in placement(model).items():
        if kind == "IBN":
            assert model.get_submodule(name) is layers[name]
            dense = "dense" in name
            act = nn.ReLU() if isinstance(layers[name], timm.layers.BatchNormAct2d) else nn.Identity()
            instance_part(plain.get_submodule(name), channels[0], dense, act)
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert_alike(model, plain)


def assert_alike(model: nn.Module, plain: nn.Module) -> None:
    """Equal outputs in training and evaluation, gradients, and state; all parameters and buffers of the first."""
    outputs = []
    for network in (model, plain):
        torch.manual_seed(5)
        outputs.append(network(images()))
        outputs[-1].square().sum().backward()
    close(*outputs)
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        close(parameter.grad, theirs[name].grad, 1e-6)
    state = plain.state_dict()
    close(dict(model.state_dict()), {name: state[name] for name in model.state_dict()})
    with torch.no_grad():
        close(model.eval()(images()), plain.eval()(images()))


@resnets
def test_ibn_b_changes_nothing_else(make: Make) -> None:
    """Without its instance normalizations, it is the plain network, gradients and randomness included."""
    model, plain = built(make), built(make)
    parameters = dict(model.named_parameters())
    stem_norm = [name for name in placement(model) if not name.startswith(("layer1", "layer2", "layer3", "layer4"))][-1]
    assert ibn_b(model) is model
    stem = model.get_submodule(stem_norm)
    assert type(stem) is nn.InstanceNorm2d
    added = {name: parameter for name, parameter in model.named_parameters() if name not in parameters}
    assert set(added) == {f"layer{stage}.1.IN.{name}" for stage in (1, 2) for name in ("weight", "bias")}
    assert all(parameter.dtype == torch.float64 for parameter in added.values())
    assert all((parameter == (1 if "weight" in name else 0)).all() for name, parameter in added.items())
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    for network in (model, plain):
        network.get_submodule(stem_norm.rpartition(".")[0]).register_module(stem_norm.rpartition(".")[2], nn.Identity())
    model.layer1[1].IN = model.layer2[1].IN = nn.Identity()
    assert_alike(model, plain)


@resnets
def test_ibn_b_normalizes_the_sum(make: Make) -> None:
    model = ibn_b(built(make))
    seen: dict[str, Tensor] = {}
    block = model.layer1[1]
    with torch.no_grad():
        block.IN.weight.uniform_(0.5, 1.5)
        block.IN.bias.normal_()
    block.IN.register_forward_hook(lambda module, inputs, output: seen.update(sum=inputs[0].clone()))
    block.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0].clone(), y=output.clone()))
    model(images())
    total = seen["sum"]
    # After the activation it would not be negative; here, the branch of one kind of block ends with another one.
    assert (total < 0).any() or isinstance(block, SENET.SEResNetBlock)
    mean = total.mean((2, 3), keepdim=True)
    var = ((total - mean) ** 2).mean((2, 3), keepdim=True)
    gamma, beta = (parameter.view(-1, 1, 1) for parameter in (block.IN.weight, block.IN.bias))
    act = F.silu if any(isinstance(module, nn.SiLU) for module in block.modules()) else F.relu
    close(seen["y"], act((total - mean) / (var + 1e-5) ** 0.5 * gamma + beta))


@pytest.mark.parametrize("convert", [ibn_a, ibn_b])
@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept(convert: Callable[[nn.Module], nn.Module], training: bool) -> None:
    model = convert(RESNETS["timm basic"]().train(training))
    assert all(module.training == training for module in model.modules())


def test_stem_of_ibn_b_is_instance_normalized() -> None:
    model = built(RESNETS["torchvision basic"])
    weight = model.bn1.weight
    ibn_b(model)
    x = torch.randn(2, 64, 5, 5, dtype=torch.float64)
    assert model.bn1.weight is weight
    close(model.bn1(x), F.instance_norm(x, weight=weight, bias=model.bn1.bias))
    assert "bn1.running_mean" not in model.state_dict()


@pytest.mark.parametrize("convert", [ibn_a, ibn_b])
def test_both_in_either_order(convert: Callable[[nn.Module], nn.Module]) -> None:
    other = {ibn_a: ibn_b, ibn_b: ibn_a}[convert]
    model = other(convert(built(RESNETS["torchvision basic"])))
    expected = {f"layer{stage}.{block}.bn1": "IBN" for stage, block in ((1, 0), (1, 1), (2, 0), (2, 1), (3, 0))}
    expected |= dict.fromkeys(["bn1", "layer1.1.IN", "layer2.1.IN"], "InstanceNorm2d")
    assert {name: kind for name, (kind, _) in placement(model).items() if kind != "BatchNorm2d"} == expected
    model(images()).sum().backward()


# weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torchvision basic", "timm se", "senet basic", "timm densenet"])
def test_plain_weights_load_before_or_after(name: str) -> None:
    make = NETWORKS[name]
    before, after = built(make), ibn_a(built(make, seed=1))
    plain = copy.deepcopy(before.state_dict())
    ibn_a(before)
    after.load_state_dict(plain)
    close(dict(before.state_dict()), dict(plain), 0)
    assert torch.equal(before.eval()(images()), after.eval()(images()))
    assert torch.equal(after(images()), after(images()))
    built(make, seed=2).load_state_dict(after.state_dict())


@pytest.mark.parametrize("network", ["resnet18", "resnet50", "densenet121"])
def test_authors_checkpoints_of_ibn_a_load(network: str) -> None:
    """Their keys, made from the placement: the parts of a layer apart, no running statistics of the instances' part."""
    model = ibn_a(torchvision.models.get_model(network))
    torch.manual_seed(3)
    ours, theirs = {}, {}
    for key, value in model.state_dict().items():
        name, _, tensor = key.rpartition(".")
        ours[key] = torch.randn_like(value) if value.is_floating_point() else value + 7
        layer = model.get_submodule(name)
        if not isinstance(layer, InstanceBatchNorm2d):
            theirs[key] = ours[key]
        elif tensor == "num_batches_tracked":
            theirs[f"{name}.BN.{tensor}"] = ours[key]
        else:
            count = layer.instance_channels
            instances = slice(count) if "dense" not in name else slice(layer.num_features - count, None)
            rest = slice(count, None) if "dense" not in name else slice(layer.num_features - count)
            theirs[f"{name}.BN.{tensor}"] = ours[key][rest]
            if tensor in ("weight", "bias"):
                theirs[f"{name}.IN.{tensor}"] = ours[key][instances]
            else:
                ours[key][instances] = 0 if tensor == "running_mean" else 1
    model.load_state_dict(theirs)
    close(dict(model.state_dict()), ours, 0)


def test_authors_checkpoints_of_ibn_b_have_the_same_keys() -> None:
    model = ibn_b(torchvision.models.resnet18())
    plain = torchvision.models.resnet18().state_dict()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        del plain[f"bn1.{name}"]
    added = {f"layer{stage}.1.IN.{name}" for stage in (1, 2) for name in ("weight", "bias")}
    assert set(model.state_dict()) == set(plain) | added


# networks as they are used ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deep copy", "pickle"])
@pytest.mark.parametrize("name", ["torchvision basic", "timm everything", "senet basic", "timm densenet"])
def test_copies(name: str, way: str) -> None:
    model = ibn_a(built(NETWORKS[name])).eval()
    if "densenet" not in name:
        ibn_b(model)
    other = copy.deepcopy(model) if way == "deep copy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(other(images()), model(images()))
    assert repr(other) == repr(model)
    assert not {id(parameter) for parameter in other.parameters()} & {id(parameter) for parameter in model.parameters()}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert not torch.equal(other(images()), model(images()))


@pytest.mark.parametrize("name", ["torchvision bottleneck", "timm se", "senet resnext", "timm densenet"])
def test_trains(name: str) -> None:
    """A few steps in float32, channels last and mixed precision: every parameter moves, the loss falls."""
    torch.manual_seed(0)
    model = ibn_a(NETWORKS[name]())
    if "densenet" not in name:
        ibn_b(model)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    x, labels = images(6, 48).float().to(memory_format=torch.channels_last), torch.arange(6) % 5
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all((new != old).any() for new, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["torchvision basic", "timm resnext"])
def test_ibn_b_traces(name: str) -> None:
    model = ibn_b(built(RESNETS[name])).eval()
    close(torch.fx.symbolic_trace(model)(images()), model(images()))


def test_a_block_stays_an_instance_of_its_class() -> None:
    model = ibn_b(built(RESNETS["torchvision basic"]))
    assert isinstance(model.layer1[1], TV.BasicBlock)
    assert type(model.layer1[1]).__name__ == "BasicBlockIN"
    assert type(model.layer1[0]) is TV.BasicBlock


# what is refused ----------------------------------------------------------------------------------------------------


def assert_refused(
    convert: Callable[..., nn.Module],
    model: nn.Module,
    message: str,
    error: type[Exception] = TypeError,
    **options: Any,
) -> None:
    """An error, and nothing changed."""
    before = [(name, type(module), set(vars(module))) for name, module in model.named_modules()]
    with pytest.raises(error, match=message):
        convert(model, **options)
    assert [(name, type(module), set(vars(module))) for name, module in model.named_modules()] == before


@pytest.mark.parametrize("convert", [ibn_a, ibn_b])
def test_unknown_networks_are_refused(convert: Callable[..., nn.Module]) -> None:
    known = "is not a network that is known: torchvision.models.resnet.ResNet, timm.models.resnet.ResNet"
    with torch.device("meta"):
        vgg = torchvision.models.vgg11_bn()
    assert_refused(convert, vgg, "torchvision.models.vgg.VGG " + known)
    assert_refused(convert, nn.Sequential(RESNETS["torchvision basic"]()), "container.Sequential " + known)


@pytest.mark.parametrize("name", DENSENETS)
def test_there_is_no_densenet_ibn_b(name: str) -> None:
    assert_refused(
        ibn_b, built(DENSENETS[name]), r"DenseNet is not a network that is known: .*senet\.SENet; in others.*where"
    )


class OwnBlock(TV.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@pytest.mark.parametrize("convert", [ibn_a, ibn_b])
def test_unknown_blocks_are_refused(convert: Callable[..., nn.Module]) -> None:
    model = TV.ResNet(OwnBlock, [1, 1, 1, 1], num_classes=2)
    assert_refused(convert, model, r"'layer1\.0' is a .*OwnBlock, but .* are the blocks BasicBlock, Bottleneck$")
    with torch.device("meta"):
        model = timm.create_model("res2net50_26w_4s")
    assert_refused(convert, model, r"'layer1\.\d' is a timm\.models\.res2net\.Bottle2neck")
    model = built(RESNETS["timm basic"])
    model.layer1[1] = TV.BasicBlock(64, 64)
    assert_refused(convert, model, r"'layer1\.1' is a torchvision\.models\.resnet\.BasicBlock")


@pytest.mark.parametrize("convert", [ibn_a, ibn_b])
def test_other_norms_are_refused(convert: Callable[..., nn.Module]) -> None:
    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(8, channels)

    model = TV.ResNet(TV.BasicBlock, STAGES, num_classes=2, norm_layer=norm)
    name = "layer1.0.bn1" if convert is ibn_a else "bn1"
    assert_refused(convert, model, f"'{name}'.* batch normalization")
    model = nn.SyncBatchNorm.convert_sync_batchnorm(built(RESNETS["timm basic"]))
    assert_refused(convert, model, f"'{name}'")


def test_one_layer_that_cannot_be_converted_stops_all() -> None:
    model = built(RESNETS["torchvision basic"])
    model.layer3[0].bn1 = nn.Identity()
    assert_refused(ibn_a, model, r"changed none:\s+'layer3\.0\.bn1': Identity is not a batch normalization")
    model = built(RESNETS["torchvision basic"])
    model.layer2[1].extra = nn.Identity()
    assert_refused(ibn_b, model, r"'layer2\.1' has the parts \['extra'\]")
    model = built(RESNETS["torchvision basic"])
    model.layer2[1].forward = lambda x: x
    assert_refused(ibn_b, model, r"'layer2\.1' has its own 'forward'")


def test_twice_is_refused() -> None:
    model = ibn_b(built(RESNETS["timm basic"]))
    assert_refused(ibn_b, model, r"'layer1\.1' has instance normalization after its addition already")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instance_fraction": 2}, r"instance_fraction must lie in \[0, 1\], got 2"),
        ({"stages": [0, 1]}, r"stages must be different numbers from 1 to 4, got \[0, 1\]"),
        ({"stages": [1, 5]}, r"stages must be different numbers from 1 to 4, got \[1, 5\]"),
        ({"stages": [2, 2]}, r"stages must be different numbers from 1 to 4, got \[2, 2\]"),
        ({"stages": [1.0]}, r"stages must be different numbers from 1 to 4, got \[1\.0\]"),
        ({"stages": []}, r"stages must be different numbers from 1 to 4, got \[\]"),
        ({"stages": 2}, r"stages must be different numbers from 1 to 4, got 2"),
    ],
)
@pytest.mark.parametrize("name", ["torchvision basic", "timm densenet"])
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    assert_refused(ibn_a, NETWORKS[name](), message, ValueError, **options)
