"""Weights that a network begins with: the formats, what is left out, and what is said of others."""

from __future__ import annotations

import argparse
import logging

import pytest
import torch
from torch import nn

from wellcond.lab.errors import LabError
from wellcond.lab.networks.registry import initial_model


@pytest.fixture
def given():
    """Weights that no seed of the tests draws."""
    return initial_model("convnet", 3, 10, seed=99).state_dict()


def wrap_plain(state):
    return state


def wrap_lightning(state):
    return {"state_dict": {f"model.{key}": value for key, value in state.items()}, "epoch": 3}


def wrap_parallel(state):
    return {"model": {f"module.{key}": value for key, value in state.items()}, "optimizer": {"state": {}}}


def wrap_compiled_parallel(state):
    return {"state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}}


def without_batch_counts(state):
    return {key: value for key, value in state.items() if "num_batches" not in key}


@pytest.mark.parametrize(
    "wrap", [wrap_plain, wrap_lightning, wrap_parallel, wrap_compiled_parallel, without_batch_counts]
)
def test_layouts_of_checkpoints(tmp_path, given, wrap, caplog):
    file = tmp_path / "weights.pt"
    torch.save(wrap(given), file)
    loaded = initial_model("convnet", 3, 10, 0, str(file)).state_dict()
    assert loaded.keys() == given.keys()
    assert all(torch.equal(loaded[key], given[key]) for key in given if "num_batches" not in key)
    assert not caplog.records


def test_safetensors(tmp_path, given):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(given, tmp_path / "weights.safetensors")
    loaded = initial_model("convnet", 3, 10, 0, str(tmp_path / "weights.safetensors")).state_dict()
    assert all(torch.equal(loaded[key], given[key]) for key in given)
    (tmp_path / "other.safetensors").write_text("no tensors")
    with pytest.raises(LabError, match="other.safetensors: not a safetensors file"):
        initial_model("convnet", 3, 10, 0, str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize(
    ("name", "classifier"),
    [("convnet", "6"), ("resnet11-bottleneck", "fc"), ("vgg-small", "classifier"), ("densenet-small", "classifier")],
)
def test_a_classifier_of_other_classes_is_left_out_and_said(tmp_path, caplog, name, classifier):
    file = tmp_path / "weights.pt"
    given = initial_model(name, 3, 100, seed=99).state_dict()
    torch.save(given, file)
    drawn = initial_model(name, 3, 10, seed=0).state_dict()
    with caplog.at_level(logging.WARNING, logger="wellcond"):
        for _ in range(2):
            loaded = initial_model(name, 3, 10, 0, str(file)).state_dict()
    for key in loaded:
        expected = drawn if key.startswith(f"{classifier}.") else given
        assert torch.equal(loaded[key], expected[key]), key
    (record,) = caplog.records  # once, not for every run
    assert str(file) in record.message
    assert f"{classifier}.weight {list(given[f'{classifier}.weight'].shape)}" in record.message


def test_weights_without_a_classifier(tmp_path, given, caplog):
    file = tmp_path / "weights.pt"
    torch.save({key: value for key, value in given.items() if not key.startswith("6.")}, file)
    with caplog.at_level(logging.WARNING, logger="wellcond"):
        initial_model("convnet", 3, 10, 0, str(file))
    (record,) = caplog.records
    assert "no 6.bias, 6.weight in there; the classifier begins at random" in record.message


def test_weights_of_another_network(tmp_path, given):
    file = tmp_path / "weights.pt"
    torch.save({**given, "extra": torch.ones(1)}, file)
    with pytest.raises(LabError, match="is of another network than convnet: unexpected extra"):
        initial_model("convnet", 3, 10, 0, str(file))
    del given["0.0.weight"]
    torch.save(given, file)
    with pytest.raises(LabError, match=r"another network than convnet: missing 0\.0\.weight"):
        initial_model("convnet", 3, 10, 0, str(file))
    torch.save(initial_model("convnet", 1, 10, 0).state_dict(), file)
    with pytest.raises(LabError, match=r"0\.0\.weight must be \[16, 3, 3, 3\] in model convnet, got \[16, 1, 3, 3\]"):
        initial_model("convnet", 3, 10, 0, str(file))
    torch.save(initial_model("resnet8", 3, 10, 0).state_dict(), file)
    with pytest.raises(LabError, match=r"missing .* and \d+ more; unexpected .* and \d+ more"):
        initial_model("vgg-small", 3, 10, 0, str(file))


def test_files_that_hold_no_weights(tmp_path):
    with pytest.raises(LabError, match=r"--weights must be a file or torchvision:NAME .*, got nowhere.pt"):
        initial_model("convnet", 3, 10, 0, "nowhere.pt")
    file = tmp_path / "weights.pt"
    file.write_text("nothing")
    with pytest.raises(LabError, match="cannot be read as a state dict"):
        initial_model("convnet", 3, 10, 0, str(file))
    torch.save({"arguments": argparse.Namespace(lr=1)}, file)  # what weights_only refuses
    with pytest.raises(LabError, match="cannot be read as a state dict by .*; save it alone"):
        initial_model("convnet", 3, 10, 0, str(file))
    torch.save([1, 2], file)
    with pytest.raises(LabError, match="must hold a state dict, by itself or under state_dict, model, .*got list"):
        initial_model("convnet", 3, 10, 0, str(file))


KINDS = {
    "sparse": lambda weight: weight.to_sparse(),
    "nested": lambda weight: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "without values": lambda weight: weight.to("meta"),
    "quantized": lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
    "complex64": lambda weight: weight.to(torch.complex64),
    "int8": lambda weight: weight.to(torch.int8),
    "bool": lambda weight: weight > 0,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_kinds_that_no_weight_has(tmp_path, given, kind):
    file = tmp_path / "weights.pt"
    for key in ("0.0.weight", "0.1.running_mean"):
        torch.save(given | {key: KINDS[kind](given[key])}, file)
        with pytest.raises(LabError, match=rf"weights\.pt: {key} must be .*, got .*{kind}"):
            initial_model("convnet", 3, 10, 0, str(file))
    torch.save({key: value.to(torch.float64) for key, value in given.items()}, file)
    initial_model("convnet", 3, 10, 0, str(file))  # of another width


def published(state):
    """Return a stand-in for the download of published weights."""

    def get_state_dict(self, *args, **kwargs):
        if isinstance(state, Exception):
            raise state
        return state

    return get_state_dict


def test_published_weights(monkeypatch):
    import torchvision

    given = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", published(given))
    model = initial_model("torchvision:resnet18", 3, 10, 0, "torchvision:IMAGENET1K_V1")
    assert torch.equal(model.state_dict()["conv1.weight"], given["conv1.weight"])
    assert isinstance(model.fc, nn.Linear)
    assert model.fc.out_features == 10
    with pytest.raises(LabError, match=r"unknown weights of torchvision:resnet18 'IMAGENET1K_V9': did you mean"):
        initial_model("torchvision:resnet18", 3, 10, 0, "torchvision:IMAGENET1K_V9")
    with pytest.raises(LabError, match="only models called torchvision:NAME have these, got --model resnet18-thin"):
        initial_model("resnet18-thin", 3, 10, 0, "torchvision:IMAGENET1K_V1")
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", published(OSError("no network")))
    with pytest.raises(LabError, match=r"--weights torchvision:IMAGENET1K_V1: cannot be downloaded \(no network\)"):
        initial_model("torchvision:resnet18", 3, 10, 0, "torchvision:IMAGENET1K_V1")


def test_densenets_of_old_versions(tmp_path):
    model = initial_model("densenet-small", 3, 10, seed=99)
    given = model.state_dict()
    old = {key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value for key, value in given.items()}
    assert old.keys() != given.keys()
    torch.save(old, tmp_path / "weights.pt")
    loaded = initial_model("densenet-small", 3, 10, 0, str(tmp_path / "weights.pt")).state_dict()
    assert all(torch.equal(loaded[key], given[key]) for key in given)
