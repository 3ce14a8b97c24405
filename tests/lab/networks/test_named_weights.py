"""Weights by name: where a user's copy lies, or one line that says what is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wellcond.lab.errors import LabError
from wellcond.lab.networks.named_weights import NAMED_WEIGHTS, bind_weights
from wellcond.lab.networks.trunks import TRUNKS, build_trunk
from wellcond.nn import SwitchableNorm2d

NEEDED = ["torchvision:IMAGENET1K_V1", "resnet50-gn", "resnext101-32x4d"]


def test_each_has_its_place():
    given = ["resnet50-gn=a=b.pth", "resnext101-32x4d=none", "resnet101-gn=unused.pth"]
    assert bind_weights(given, NEEDED) == {NEEDED[0]: NEEDED[0], "resnet50-gn": "a=b.pth", "resnext101-32x4d": None}
    assert bind_weights(["none"], NEEDED) == dict.fromkeys(NEEDED)
    assert bind_weights(["resnet50-gn=a.pth", "none"], NEEDED)["resnet50-gn"] == "a.pth"
    assert bind_weights([f"{NEEDED[0]}=mine.pth", "none"], NEEDED)[NEEDED[0]] == "mine.pth"
    assert bind_weights([], []) == {}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([], "--weights resnet50-gn=FILE, resnext101-32x4d=FILE must say where weights lie, or =none to draw them."),
        (["resnet50-gn=a.pth"], "--weights resnext101-32x4d=FILE must say where weights lie"),
        (["resnet50-gm=a.pth"], "unknown weights 'resnet50-gm': did you mean 'resnet50-gn'?"),
        (["a.pth"], "--weights must be NAME=FILE, NAME=torchvision:NAME, NAME=none or none, got 'a.pth'"),
        (["resnet50-gn="], "--weights must be NAME=FILE"),
        (["resnet50-gn=a", "resnet50-gn=b"], "--weights must give each of them once, got resnet50-gn twice"),
    ],
)
def test_mistakes_are_one_line(given, line):
    with pytest.raises(LabError) as caught:
        bind_weights(given, NEEDED)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    if not given:
        assert all(NAMED_WEIGHTS[name] in str(caught.value) for name in NEEDED[1:])


def test_group_normalization_as_mmdetection_calls_it(tmp_path):
    """gn1, gn2 … there, bn1, bn2 … in torchvision's networks, whatever normalizes."""

    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(8, channels)

    torch.manual_seed(0)
    theirs = TRUNKS["tiny"].build(norm)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    file = tmp_path / "weights.pth"
    torch.save({key.replace("bn", "gn"): value for key, value in theirs.state_dict().items()}, file)
    assert any(".gn1." in key or key.startswith("gn1.") for key in torch.load(file))
    found = build_trunk(TRUNKS["tiny"], norm, str(file)).state_dict()
    assert found.keys() == theirs.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in theirs.state_dict().items())


def test_switchable_normalization_as_its_authors_call_it(tmp_path):
    """sn1, mean_weight and tensors of [1, C, 1, 1] there; the shares and the averages arrive."""
    torch.manual_seed(0)
    theirs = TRUNKS["tiny"].build(SwitchableNorm2d)
    for value in theirs.state_dict().values():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.1, 1.0)
    norms = [name for name, layer in theirs.named_modules() if isinstance(layer, SwitchableNorm2d)]
    state = {key: value for key, value in theirs.state_dict().items() if not key.endswith("num_batches_tracked")}
    for name in norms:
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{part}"] = state[f"{name}.{part}"].reshape(1, -1, 1, 1)
    saved = {key.replace("bn", "sn").replace("_logits", "_weight"): value for key, value in state.items()}
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in saved.items()}}, file)
    found = build_trunk(TRUNKS["tiny"], SwitchableNorm2d, str(file))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(found.eval()(images), theirs.eval()(images))
