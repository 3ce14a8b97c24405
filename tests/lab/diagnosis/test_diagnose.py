"""`wellcond diagnose`: every probe on models of all kinds, findings that say what the numbers say, a page by itself."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.diagnostics import FeatureSpectrum, LayerSpectrum, Spectrum, disparity, weight_means
from wellcond.lab.cli.main import main
from wellcond.lab.diagnosis.diagnose import (
    PROBES,
    Diagnosis,
    ProbeResult,
    diagnose,
    measured_disparity,
    trained_briefly,
)
from wellcond.lab.diagnosis.figures import draw, sections
from wellcond.lab.diagnosis.findings import concentration, describe_diagnosis
from wellcond.lab.diagnosis.page import diagnosis_json, render_diagnosis

SETTINGS = {"model": "net", "data": "noise"}


def resnet() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    model = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3, channels=(16,) * 4)
    return model, torch.randn(8, 3, 32, 32)


def vit() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=1, num_classes=3, embed_dim=24, num_heads=3
    )
    return model, torch.randn(8, 3, 16, 16)


def encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), torch.randn(8, 6, 8)


def bare() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)), torch.randn(8, 8)


def small() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    return model, torch.randn(8, 2, 6, 6)


def made(make: Callable[[], tuple[nn.Module, Tensor]], count: int = 4) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model, x = make()
    return model, [(torch.randn_like(x), torch.arange(len(x)) % 3) for _ in range(count)]


def loss(output: Tensor, batch: Any) -> Tensor:
    output = output.mean(dim=1) if output.dim() == 3 else output
    return F.cross_entropy(output, batch[1])


def page_of(found: Diagnosis) -> str:
    return render_diagnosis(found, title="a net", settings=SETTINGS, command="wellcond diagnose <&>")


@pytest.mark.parametrize("make", [resnet, vit, encoder, bare])
def test_models_of_all_kinds(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    model, batches = made(make)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = diagnose(model, batches, loss, batch_size=4)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    has_norms = make is resnet
    for name in PROBES:
        probe: ProbeResult[object] = getattr(found, name)
        if name in ("noise", "disparity") and not has_norms:
            assert probe.found is None
            assert f"{type(model).__name__} has no batch normalization" in probe.reason
        else:
            assert probe.found is not None, probe.reason
    said = describe_diagnosis(found)
    assert any(line.startswith("Not measured: ") for line in said) is not has_norms
    assert all(line[-1] == "." and "nan" not in line for line in said)
    page = page_of(found)
    # Not a reference to anything outside, but for the names of SVG's own vocabulary.
    assert not re.search(r"(src|href)=\"(?!#|data:image/png)", page)
    assert page.count("<svg") == (11 if has_norms else 9)
    assert len(page.encode()) < 2_000_000
    assert "wellcond diagnose &lt;&amp;&gt;" in page
    content = json.loads(diagnosis_json(found, title="a net", settings=SETTINGS, command="c"))
    assert content["findings"] == said
    assert set(content["spectrum"]["found"]["layers"]) == set(found.spectrum.found.layers)


def test_training_before_is_recorded() -> None:
    model, batches = made(small)
    initial = weight_means(model)
    training = trained_briefly(model, iter(batches * 3), loss, steps=10, lr=0.1)
    assert (training.steps, len(training.losses)) == (10, 10)
    assert training.losses[-1] < training.losses[0]
    assert training.weights_before.found.to_dict() == initial.to_dict()
    assert training.gradients.found.layers["0.weight"].batches == tuple(range(10))
    assert all(parameter.grad is None for parameter in model.parameters())
    found = diagnose(model, batches, loss, batch_size=4, training=training)
    assert any(line.startswith("Training moved the mean of a weight vector from") for line in describe_diagnosis(found))
    assert any(line.startswith("Over the 10 steps of training before: ") for line in describe_diagnosis(found))
    assert "over the 10 steps of training" in page_of(found)
    json.loads(diagnosis_json(found, title="t", settings=SETTINGS, command="c"))
    with pytest.raises(
        ValueError, match=r"the loss is (nan|inf) after \d+ steps at lr 1e\+30: train with a smaller one"
    ):
        trained_briefly(model, iter(batches * 3), loss, steps=10, lr=1e30)
    with pytest.raises(ValueError, match="there is no batch to train"):
        trained_briefly(model, [], loss, steps=1, lr=0.1)
    with pytest.raises(ValueError, match="there is no batch to diagnose"):
        diagnose(model, [], loss, batch_size=4)


def test_the_three_ways_to_evaluate_are_measured_on_the_same_batches() -> None:
    model, batches = made(small, count=10)
    found = measured_disparity(model, batches, 2)
    assert found.kinds == ("ema", "evalnorm_fixed", "evalnorm", "bsr")
    plain = disparity(model, batches[1::2], batch_size=2)
    assert found.layers["1"].rms["ema"] == plain.layers["1"].rms["ema"]
    assert found.mean["bsr"] < found.mean["ema"]


# Findings -------------------------------------------------------------------------------------------------------------


def spectrum_of(values: tuple[float, ...], **more: Any) -> Spectrum:
    return Spectrum(1, more.pop("width", len(values)), 100, (values,), (more.pop("trace", sum(values)),), **more)


def with_inputs(**inputs: Spectrum) -> Diagnosis:
    layers = {name: LayerSpectrum(own, spectrum_of((1.0, 1.0))) for name, own in inputs.items()}
    nothing: ProbeResult[Any] = ProbeResult(None, "nothing")
    others = dict.fromkeys(PROBES, nothing) | {"spectrum": ProbeResult(FeatureSpectrum(False, True, 1, 2048, layers))}
    return Diagnosis(batch_size=4, batches=1, **others)


def test_concentrated_features_are_named() -> None:
    few = spectrum_of((60.0, 20.0, 10.0, 7.0, *[3.0 / 572] * 572))
    assert concentration("layer3.0.conv1", few) == "layer3.0.conv1: 90 % of the feature energy in 3 of 576 directions"
    sketched = spectrum_of((60.0, 37.0), width=576, trace=100.0, exact=False)
    assert concentration("", sketched) == "(model): at least 97 % of the feature energy in 2 of 576 directions"
    even = spectrum_of((1.0,) * 20)
    said = describe_diagnosis(with_inputs(few=few, even=even))
    assert said[0] == "few: 90 % of the feature energy in 3 of 576 directions."
    assert "even" not in said[0]
    said = describe_diagnosis(with_inputs(**{f"layer{i}": few for i in range(5)}))
    assert [line.split(":")[0] for line in said[:3]] == ["layer0", "layer1", "layer2"]
    assert said[3].endswith("are the inputs of 2 more layers.")
    assert describe_diagnosis(with_inputs(even=even))[0] == (
        "No layer's input has 90 % of its energy within a tenth of its directions; the most uneven, of layer even, "
        "has an effective rank of 20 of 20."
    )


def test_singular_and_badly_conditioned_inputs_are_named() -> None:
    said = describe_diagnosis(
        with_inputs(a=spectrum_of((1.0, 0.0)), b=spectrum_of((8.0, 1.0)), c=spectrum_of((4.0, 1.0)))
    )
    assert any("is singular in 1 (a) of 3 layers: a preconditioner needs" in line for line in said)
    assert "The largest finite condition number of an input is 8, in layer b." in said
    starved = Spectrum(1, 200, 100, ((1.0, *[0.0] * 199),), (1.0,))
    assert any(
        "1 of them saw fewer samples than dimensions" in line for line in describe_diagnosis(with_inputs(a=starved))
    )


def test_what_was_not_measured_is_said_once() -> None:
    assert describe_diagnosis(with_inputs(a=spectrum_of((2.0, 1.0)))).count("Not measured: nothing.") == 1


# The page -------------------------------------------------------------------------------------------------------------


def test_figures_keep_their_labels_and_lose_their_size() -> None:
    svg = draw(lambda ax: (ax.plot([0.0, 1.0], [0.125, 0.375]), ax.set_yticks([0.125, 0.375])))
    assert svg.startswith("<svg")
    assert "0.125" in svg
    head = svg[: svg.index(">")]
    assert "viewBox" in head
    assert " width=" not in head
    assert " height=" not in head
    assert not re.search(r' d="[^"]*\.\d{3}', svg)
    assert draw(lambda ax: ax.plot([1, 2])) == draw(lambda ax: ax.plot([1, 2]))


def test_many_layers_and_points_stay_readable() -> None:
    names = [f"layer{i}" for i in range(60)]
    labels: list[str] = []

    def plot(ax: Any) -> None:
        ax.plot(range(60))
        ax.plot([math.sin(i) for i in range(5000)], ".")
        ax.set_xticks(range(60), names)

    svg = draw(plot)
    labels = re.findall(r"layer\d+", re.sub(r"<!--.*?-->", "", svg))
    assert 0 < len(set(labels)) <= 16
    assert "data:image/png" in svg
    assert len(svg) < 100_000


def test_every_section_says_what_it_shows() -> None:
    model, batches = made(small)
    found = diagnose(model, batches, loss, batch_size=4)
    shown = list(sections(found))
    assert [section.title for section in shown] == [
        "Features",
        "Gradients",
        "Weights",
        "Smoothness",
        "Batch statistics",
    ]
    assert all(section.lead and section.drawn for section in shown)
    assert str(found.noise.found) in [drawn.text for drawn in shown[-1].drawn]


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    assert main(["diagnose", "convnet", "digits", "--steps", "3", "--batches", "4", "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    content = json.loads((folder / "diagnose.json").read_text(encoding="utf-8"))
    assert content["title"] == "convnet after 3 steps of SGD at lr 0.05, on 4 batches of 32 of digits"
    assert all(f" - {line}" in printed for line in content["findings"])
    assert len(content["training"]["losses"]) == 3
    assert list(content["spectrum"]["found"]["layers"]) == ["0.0", "1.0", "3.0", "6"]
    page = (folder / "diagnose.html").read_text(encoding="utf-8")
    assert content["command"] in page
    assert "Why convnet trains as it does" in page


def test_the_checkpoint_is_what_is_diagnosed(tmp_path: Path) -> None:
    from wellcond.lab.networks.registry import initial_model

    model = initial_model("convnet", 1, 10, 5)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    arguments = ["diagnose", "--batches", "2", "--checkpoint", str(tmp_path / "net.pt"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    content = json.loads((tmp_path / "out" / "diagnose.json").read_text(encoding="utf-8"))
    found = content["weights"]["found"]["layers"]["0.0.weight"]["means"]
    assert found == pytest.approx(weight_means(model).layers["0.0.weight"].means, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonet"], "nonet"),
        (["convnet", "nodata.parquet"], "nodata.parquet"),
        (["--batches", "1"], "--batches must be an integer of at least 2, got 1"),
        (["--steps", "-1"], "--steps must be an integer of at least 0, got -1"),
        (["--lr", "0"], "--lr must be positive, got 0"),
        (["--steps", "5", "--lr", "1e30"], "--lr 1e+30: the loss is"),
        (["--checkpoint", "none.pt"], "none.pt"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", *arguments, "--out", str(tmp_path / "out")]) == 2
    *begun, error = capsys.readouterr().err.splitlines()
    assert said in error
    # Only a loss is found wrong after the work has begun, which a line says where there is no terminal.
    assert begun == (["diagnosing convnet: 13 steps"] if "--steps" in arguments and "1e30" in arguments else [])
