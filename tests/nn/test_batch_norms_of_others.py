"""Batch normalizations of other libraries: converted by a rule or refused by name; and what conversion says it did."""

from __future__ import annotations

import copy
import logging
import pickle
import re

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn import intrinsic
from torch.ao.nn.intrinsic import qat
from torch.ao.quantization import get_default_qat_qconfig
from torchvision.ops import FrozenBatchNorm2d

import wellcond
from wellcond.nn import conversion_report, convert_norm

KINDS = ("bn", "mbn", "bsr", "brn", "cbn", "evalnorm", "pn")


def filled(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name in ("running_mean", "running_var", "weight", "bias"):
        getattr(layer, name).data.uniform_(0.5, 2, generator=generator)
    return layer


def frozen_layers() -> dict[str, nn.Module]:
    layers = {"torchvision": FrozenBatchNorm2d(8), "torchvision, eps 0": FrozenBatchNorm2d(8, eps=0.0)}
    timm = pytest.importorskip("timm.layers")
    layers["timm"] = timm.FrozenBatchNormAct2d(8, eps=1e-3)
    detr = pytest.importorskip("transformers.models.detr.modeling_detr")
    layers["transformers"] = detr.DetrFrozenBatchNorm2d(8)
    return {name: filled(layer) for name, layer in layers.items()}


FROZEN = ("torchvision", "torchvision, eps 0", "timm", "transformers")


def images(seed: int = 0) -> Tensor:
    return torch.randn(6, 3, 7, 7, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_ones_become_layers_that_evaluate_as_they_did(name: str, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), frozen_layers()[name], nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).eval()
    expected, before, layer = model(images()), copy.deepcopy(model.state_dict()), model[1]
    eps = getattr(layer, "eps", 1e-5)
    convert_norm(model, kind)
    assert model[1] is layer
    assert isinstance(layer, nn.BatchNorm2d)
    assert layer.eps == eps
    torch.testing.assert_close(model(images()), expected)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value)
    pickle.loads(pickle.dumps(model))
    if eps > 0 or kind != "bn":  # Torch trains with no ε of 0.
        model.train()(images()).sum().backward()
        assert int(layer.num_batches_tracked) == 1
    model.load_state_dict(before, strict=False)


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_ones_are_calibrated_and_stay_frozen(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), frozen_layers()[name]).eval()
    kind = type(model[1])
    wellcond.calibrate(model, [images(), images(1)], batch_size=6, what="bn")
    assert type(model[1]) is kind
    assert list(model[1].parameters()) == []
    hidden = [model[0](x) for x in (images(), images(1))]
    torch.testing.assert_close(model[1].running_mean, torch.stack([h.mean((0, 2, 3)) for h in hidden]).mean(0))
    assert f"{kind.__name__}: new running statistics" in str(conversion_report(model))
    state = copy.deepcopy(model.state_dict())
    with wellcond.calibrated(model, [images()], 2):
        assert type(model[1]).__name__.startswith("BSR")
    assert type(model[1]) is kind
    torch.testing.assert_close(dict(model.state_dict()), dict(state))
    wellcond.calibrate(model, [images(), images(1)], batch_size=2, what="bsr")
    assert re.search(rf"{kind.__name__} → BSR\w*: new regression sums", str(conversion_report(model)))


class InPlaceABN(nn.Module):
    """As that library's: the buffers of batch normalization, another forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs() / (self.running_var + 1e-5).sqrt()
        return nn.functional.leaky_relu(x * scale[:, None, None] + self.bias[:, None, None])


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def fused_in_training() -> nn.Module:
    layer = qat.ConvBn2d(8, 8, 1, qconfig=get_default_qat_qconfig())
    return layer


REFUSED = {
    "in place": (lambda: InPlaceABN(8), "1", "InPlaceABN keeps running statistics as a batch normalization does"),
    "own forward": (lambda: Doubled(8), "1", "Doubled is a subclass of BatchNorm2d that is not known"),
    "synchronized": (lambda: nn.SyncBatchNorm(8), "1", "convert before nn.SyncBatchNorm.convert_sync_batchnorm"),
    "lazy": (nn.LazyBatchNorm2d, "1", "has no parameters yet"),
    "quantization aware": (fused_in_training, "1.bn", "is a part of '1', a ConvBn2d"),
    "fused": (lambda: intrinsic.ConvBn2d(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), "1.1", "is a part of '1', a ConvBn2d"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("to", ["bsr", "gn", "sn"])
def test_others_are_refused_by_name_and_nothing_changes(case: str, to: str) -> None:
    make, name, reason = REFUSED[case]
    model = nn.Sequential(nn.BatchNorm2d(8), make(), nn.BatchNorm2d(8))
    options = {"num_groups": 2} if to == "gn" else {}
    with pytest.raises(TypeError, match=re.escape(f"'{name}': ") + ".*" + re.escape(reason)):
        convert_norm(model, to, **options)
    assert type(model[0]) is type(model[2]) is nn.BatchNorm2d
    convert_norm(model, to, lambda path, _: path != name, **options)
    assert type(model[0]) is type(model[2]) is not nn.BatchNorm2d
    assert conversion_report(model).changed.keys() == {"0", "2"}
    assert conversion_report(model).left[name].endswith("not selected by `where`")


def test_calibration_refuses_what_it_does_not_know() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), InPlaceABN(8)).eval()
    with pytest.raises(TypeError, match=r"cannot calibrate '2' \(InPlaceABN\)"):
        wellcond.calibrate(model, [images()], batch_size=2, what="bn")
    wellcond.calibrate(model, [images()], batch_size=2, what="bn", where=lambda name, _: name == "1")


# the report -----------------------------------------------------------------------------------------------------------


def test_the_report_names_every_normalization(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), wellcond.nn.BSRBatchNorm2d(8), nn.LayerNorm(4), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match="model, a Sequential, was not converted"):
        conversion_report(model)
    with caplog.at_level(logging.INFO, logger="wellcond"):
        convert_norm(model, "bsr", where=lambda name, _: name != "3")
    report = conversion_report(model)
    assert report.changed == {"0": "BatchNorm2d → BSRBatchNorm2d"}
    assert report.left == {
        "1": "BSRBatchNorm2d: is of the kind already",
        "2": "LayerNorm: no batch normalization",
        "3": "BatchNorm2d: not selected by `where`",
    }
    assert str(report) in caplog.text
    with pytest.raises(ValueError, match="was not converted"):
        conversion_report(copy.deepcopy(model))


# inputs that cannot be normalized -------------------------------------------------------------------------------------

SINGLE = {
    "gn, one channel": ("gn", {"num_groups": 8}, nn.BatchNorm1d, (5, 8), (5, 8, 2)),
    "gn, one position": ("gn", {"num_groups": 8}, nn.BatchNorm2d, (5, 8, 1, 1), (5, 8, 1, 2)),
    "in, no position": ("in", {}, nn.BatchNorm1d, (8, 8), (5, 8, 2)),
    "in, one position": ("in", {}, nn.BatchNorm2d, (5, 8, 1, 1), (5, 8, 1, 2)),
    "in, one voxel": ("in", {}, nn.BatchNorm3d, (5, 8, 1, 1, 1), (5, 8, 1, 1, 2)),
}


@pytest.mark.parametrize("case", SINGLE)
@pytest.mark.parametrize("training", [True, False])
def test_single_values_are_refused_with_the_layers_name(case: str, training: bool) -> None:
    to, options, kind, bad, good = SINGLE[case]
    model = nn.Sequential(nn.Identity(), nn.Sequential(kind(8)))
    convert_norm(model, to, **options).train(training)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=r"'1\.0': .* input of size.* nothing but the bias"):
            other(torch.randn(bad))
        assert other(torch.randn(good)).std() > 0.5


def test_layer_norm_of_one_channel_and_switches_between_samples_statistics() -> None:
    model = convert_norm(nn.Sequential(nn.BatchNorm1d(1)), "ln")
    with pytest.raises(ValueError, match="'0'"):
        model(torch.randn(5, 1))
    layer = wellcond.nn.SwitchableNorm1d(1, normalizers=("in", "ln"))
    with pytest.raises(ValueError, match="expected more than 1 value per instance"):
        layer(torch.randn(5, 1))
    assert layer(torch.randn(5, 1, 4)).std() > 0.5
