"""The awkward cases of calibration: those of the benchmark, each right, and further ones of the same kinds."""

from __future__ import annotations

import copy
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao.nn.intrinsic import qat
from torch.ao.quantization import get_default_qat_qconfig
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import wellcond
from wellcond.calibration.progress import CalibrationProgress, ProgressLine
from wellcond.calibration.standard_error import StandardError
from wellcond.nn import IterNorm2d, conversion_report
from wellcond.runtime.checks import WellcondWarning

FOLDER = Path(__file__).parents[2] / "benchmarks"


def _cases() -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("awkward_cases", FOLDER / "awkward_cases.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["awkward_cases"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


cases = _cases()
ALONE = [case for case in cases.CASES if case.ranks == 1]
LOW_PRECISION = ("mixed precision", "a half-precision model")


@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.name)
def test_statistics_are_those_of_all_samples_together(case: Any) -> None:
    found = cases.measured(case, "wellcond")
    assert isinstance(found, float), found
    assert found <= (0.01 if case.name in LOW_PRECISION else 1e-5)


def test_another_tool_is_found_out() -> None:
    by_name = {case.name: case for case in ALONE}
    assert cases.measured(by_name["dropout and stochastic depth"], "update_bn") > cases.RIGHT
    assert cases.measured(by_name["batches are mappings of keywords"], "update_bn") == "raises TypeError"


# of any sizes ---------------------------------------------------------------------------------------------------------


def stack(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU()).double().eval()


def images(count: int, seed: int = 0, size: int = 6) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=draw, dtype=torch.float64) * (1 + seed) + seed


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    most=st.one_of(st.none(), st.integers(1, 20)),
    scale=st.sampled_from([1.0, 1e-4]),
)
@settings(max_examples=10, deadline=None)
def test_ragged_batches_count_as_their_samples_and_no_more_than_asked_for(
    sizes: list[int], most: int | None, scale: float
) -> None:
    model = stack()
    batches = [images(size, seed) * scale + 3 for seed, size in enumerate(sizes)]
    wellcond.calibrate(model, batches, max_samples=most)
    values = model[0](torch.cat(batches)[:most]).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean, values.mean(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model[1].running_var, values.var(1), rtol=1e-7, atol=1e-20)
    said = conversion_report(model).data
    assert f"{min(sum(sizes), most or 99)} sample" in said
    assert int(model[1].num_batches_tracked) <= len(sizes)


def test_a_lone_last_sample_counts_and_does_not_spoil_what_follows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2)).double()
    draws = torch.randn(33, 3, dtype=torch.float64)
    wellcond.calibrate(model, draws.split(8))
    features = model[0](draws)
    torch.testing.assert_close(model[1].running_mean, features.mean(0))
    torch.testing.assert_close(model[1].running_var, features.var(0))
    with torch.no_grad():
        second = model[2](model[1].eval()(features))
    torch.testing.assert_close(model[3].running_var, second.var(0), rtol=0.5, atol=0.0)


def test_groups_of_m_and_a_limit_of_samples() -> None:
    one = wellcond.calibrate(stack(), [images(7), images(7, 1)], 2, "bn", max_samples=9)
    # Of the second batch, whose first three samples are left of nine, one group of two.
    rows = torch.cat([images(7)[:6], images(7, 1)[:2]])
    expected = wellcond.calibrate(stack(), [rows], 2, "bn")
    assert int(one[1].num_batches_tracked) == int(expected[1].num_batches_tracked) == 4
    torch.testing.assert_close(one[1].running_mean, expected[1].running_mean)


def test_a_kind_with_statistics_of_its_own_is_weighed_by_samples() -> None:
    def alone(batch: Tensor) -> Tensor:
        model = stack(IterNorm2d)
        return wellcond.calibrate(model, [batch])[1].running_mean

    one, other = images(2), images(6, 1)
    found = wellcond.calibrate(stack(IterNorm2d), [one, other])[1].running_mean
    torch.testing.assert_close(found, (2 * alone(one) + 6 * alone(other)) / 8)


def test_a_momentum_takes_each_of_the_loaders_batches() -> None:
    model, reference = stack(), stack()
    reference[1].momentum = 0.3
    batches = [images(4), images(2, 1)]
    wellcond.calibrate(model, batches, momentum=0.3)
    reference[1].train()
    for batch in batches:
        reference(batch)
    torch.testing.assert_close(model[1].running_var, reference[1].running_var)


# when to stop ---------------------------------------------------------------------------------------------------------


@given(
    groups=st.lists(st.tuples(st.floats(-3, 3), st.integers(1, 9)), min_size=4, max_size=9),
)
@settings(max_examples=20, deadline=None)
def test_the_standard_error_is_that_of_a_weighted_mean(groups: list[tuple[float, int]]) -> None:
    error = StandardError()
    for mean, weight in groups:
        error.add(torch.tensor([[mean + 1e4]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), weight)
    means = torch.tensor([mean for mean, _ in groups], dtype=torch.float64)
    weights = torch.tensor([float(weight) for _, weight in groups], dtype=torch.float64)
    center = (weights * means).sum() / weights.sum()
    n = len(groups)
    spread = (weights.square() * (means - center).square()).sum() * n / (n - 1)
    expected = spread.sqrt() / weights.sum()
    between = (weights.square() * (means - center).square()).sum() / weights.square().sum()
    torch.testing.assert_close(error.value(), expected / (1 + between).sqrt(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_the_pass_stops_once_statistics_are_precise_and_they_are(batch_size: int | None) -> None:
    def endless() -> Iterator[Tensor]:
        for seed in range(5000):
            yield torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    seen: list[CalibrationProgress] = []
    model = stack()
    wellcond.calibrate(model, endless(), batch_size, "bn", until=0.02, progress=seen.append)
    assert 4 <= len(seen) < 200
    assert [each.batches for each in seen] == list(range(1, len(seen) + 1))
    assert seen[-1].standard_error <= 0.02 < seen[-2].standard_error
    assert seen[-1].samples == 16 * len(seen)
    with torch.no_grad():
        values = (
            model[0](torch.cat([x for x, _ in zip(endless(), range(300), strict=False)])).transpose(0, 1).flatten(1)
        )
    errors = (model[1].running_mean - values.mean(1)) / values.std(1)
    assert float(errors.square().mean().sqrt()) < 0.06


def test_a_loader_that_ends_too_soon_is_told() -> None:
    with pytest.warns(WellcondWarning, match="the loader ended at a standard error of .*, above until=1e-06"):
        wellcond.calibrate(stack(), [images(4, seed) for seed in range(6)], until=1e-6)
    with pytest.warns(WellcondWarning, match="fewer than 4 batches, too few to tell a standard error for until=0.1"):
        wellcond.calibrate(stack(), [images(4)], until=0.1)
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match="until must be positive"):
            wellcond.calibrate(stack(), [images(4)], until=bad)
    for what in ("bsr", "evalnorm"):
        with pytest.raises(ValueError, match=f"batch_size must be given for what='{what}'"):
            wellcond.calibrate(stack(), [images(4)], what=what)


def test_progress_is_shown_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    wellcond.calibrate(stack(), [images(4), images(3)], progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("calibrate: 2 batches, 7 samples in ")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    line = ProgressLine(terminal)
    line(CalibrationProgress(1, 1, 0.25))
    line.end()
    first, second = terminal.getvalue().split("\r")[1:]
    assert first.startswith("calibrate: 1 batch, 1 sample, standard error 0.25 in ")
    assert second.endswith("\n")


# interrupted ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["bn", "bsr", "evalnorm"])
@pytest.mark.parametrize("place", ["loader", "forward", "replacing", "showing"])
def test_whatever_interrupts_leaves_the_model_as_it_was(what: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(stack(), nn.Conv2d(4, 4, 1).double(), nn.BatchNorm2d(4).double()).train()
    before = copy.deepcopy(model.state_dict())
    batches: Any = [images(4), images(4, 1)]
    options: dict[str, Any] = {}
    handle = None
    if place == "loader":

        def interrupted() -> Iterator[Tensor]:
            yield images(4)
            raise KeyboardInterrupt

        batches = interrupted()
    elif place == "forward":
        calls: list[None] = []

        def hook(*_: Any) -> None:
            calls.append(None)
            if len(calls) == 2:
                raise KeyboardInterrupt

        handle = model[1].register_forward_hook(hook)
    elif place == "replacing":
        from wellcond.calibration import estimates

        done: list[None] = []
        for kind in (estimates.RunningStatistics, estimates.RegressionSums, estimates.Mixture):

            def replace(self: Any, layer: Any, average: Any, original: Any = kind.replace) -> None:
                original(self, layer, average)
                done.append(None)
                if len(done) == 2:
                    raise KeyboardInterrupt

            monkeypatch.setattr(kind, "replace", replace)
    else:

        def show(progress: CalibrationProgress) -> None:
            raise KeyboardInterrupt

        options["progress"] = show
    with pytest.raises(KeyboardInterrupt):
        wellcond.calibrate(model, batches, 2, what, **options)
    if handle is not None:
        handle.remove()
    assert type(model[0][1]) is type(model[2]) is nn.BatchNorm2d
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)


# layers and models ----------------------------------------------------------------------------------------------------


def test_statistics_beyond_half_precision_are_refused_and_nothing_changes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2)).half()
    with pytest.raises(ValueError, match=r"running_var of BatchNorm1d.* has values beyond torch.float16"):
        wellcond.calibrate(model, [torch.tensor([[60000.0, 1.0], [-60000.0, 2.0]]).half()])
    assert model[0].running_mean.tolist() == [0.0, 0.0]


def test_a_lazy_layer_is_named() -> None:
    with pytest.raises(TypeError, match="'1'.*run the model once"):
        wellcond.calibrate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d()), [images(4).float()])
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LazyBatchNorm2d())
    options = {"where": lambda name, _: name == "1", "call": lambda model, x: model[1](model[0](x))}
    with wellcond.calibrated(model, [images(4).float()], **options):
        assert int(model[1].num_batches_tracked) == 1
    assert int(model[1].num_batches_tracked) == 0


def test_the_normalization_inside_of_a_layer_for_quantization_aware_training() -> None:
    torch.manual_seed(0)
    layer = qat.ConvBn2d(3, 4, 3, qconfig=get_default_qat_qconfig())
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    layer.apply(torch.ao.quantization.disable_fake_quant)
    layer.apply(torch.ao.quantization.disable_observer)
    with torch.no_grad():
        plain[0].weight.copy_(layer.weight)
    model = nn.Sequential(layer)
    x = [images(6).float(), images(3, 1).float()]
    wellcond.calibrate(model, x)
    wellcond.calibrate(plain, x)
    torch.testing.assert_close(layer.bn.running_mean, plain[1].running_mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.bn.running_var, plain[1].running_var, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("alone", [True, False])
def test_a_detector_of_torchvision_with_frozen_normalization_as_it_comes(alone: bool) -> None:
    torch.manual_seed(0)
    trunk = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5
    )
    model = RetinaNet(trunk, 3, min_size=32, max_size=48).eval()
    pictures = [torch.rand(3, 32, 40), torch.rand(3, 36, 32)]
    seen: list[Tensor] = []
    stem = model.backbone.body
    handle = stem.bn1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = list(pictures) if alone else (pictures, [{"boxes": torch.zeros(0, 4)}] * 2)
    wellcond.calibrate(model, [batch])
    handle.remove()
    assert type(stem.bn1) is FrozenBatchNorm2d
    values = torch.cat(seen).transpose(0, 1).flatten(1)
    torch.testing.assert_close(stem.bn1.running_mean, values.mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stem.bn1.running_var, values.var(1), rtol=1e-4, atol=1e-6)
    assert conversion_report(model).data == "of 1 batch, 2 samples"
    assert all(name in conversion_report(model).changed for name in ("backbone.body.bn1", "backbone.body.layer4.1.bn2"))


def test_a_network_of_transformers_gets_its_batches_as_it_does_in_training() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config).eval()
    batches = [{"pixel_values": images(n, n, 16).float(), "labels": torch.zeros(n, dtype=torch.long)} for n in (4, 3)]
    embedder = model.resnet.embedder.embedder
    with torch.no_grad():
        values = torch.cat([embedder.convolution(b["pixel_values"]) for b in batches]).transpose(0, 1).flatten(1)
    wellcond.calibrate(model, batches)
    torch.testing.assert_close(embedder.normalization.running_mean, values.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedder.normalization.running_var, values.var(1), rtol=1e-4, atol=1e-5)


def test_weights_quantized_by_torchao_are_calibrated_as_they_are() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    x = torch.randn(64, 8)
    wellcond.calibrate(model, [x])
    with torch.no_grad():
        torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0), rtol=1e-4, atol=1e-5)
