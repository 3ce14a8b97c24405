"""A sample of the zoo: architectures of each library with transforms and conversions. `tools/zoo.py` runs all."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import zoo_trials
from torch import Tensor, nn
from zoo_architectures import Architecture, architectures, shrink
from zoo_trials import Trial

import wellcond
import zoo
from wellcond.transforms.base import Slot

# Of a transform, the least share of the parameters that it must change; of a conversion nothing.
SAMPLE: dict[str, dict[str, float]] = {
    "timm/resnet": {
        "GradientCentralization": 0.9,
        "FeatureWhitening": 0.9,
        "FeatureDescent": 0.9,
        **dict.fromkeys(("norm bsr", "norm mbn", "norm iternorm", "norm sn", "norm kn", "layers wnn"), 0.0),
    },
    "timm/efficientnet": {"FeatureWhitening": 0.0, "norm evalnorm": 0.0, "norm ghost": 0.0, "norm dbn": 0.0},
    "timm/nfnet": {"GradientCentralization": 0.0, "FeatureWhitening": 0.0},
    "timm/beit": {"FeatureWhitening": 0.0},
    "timm/vision_transformer": {"FeatureWhitening": 0.9, "FeatureDescent": 0.9},
    "timm/swin_transformer": {"FeatureWhitening": 0.9},
    "torchvision/mobilenet_v3": {"FeatureWhitening": 0.9, "norm brn": 0.0, "norm ssn": 0.0},
    "torchvision/vit": {"GradientCentralization": 0.8, "FeatureWhitening": 0.9},
    "transformers/bert": {"GradientCentralization": 0.7, "FeatureWhitening": 0.9},
    "transformers/gpt2": {"FeatureDescent": 0.9},
    "transformers/t5": {"FeatureWhitening": 0.9},
    "transformers/llama": {"FeatureWhitening": 0.9},
    "transformers/bart": {"FeatureWhitening": 0.5},
    "transformers/mixtral": {"FeatureWhitening": 0.1},
    "transformers/jamba": {"FeatureWhitening": 0.0},
}
PAIRS = [(title, action) for title, actions in SAMPLE.items() for action in actions]


def family(title: str) -> Architecture:
    library, _, name = title.partition("/")
    return next(each for each in architectures(library) if each.family == name)


@functools.cache
def trial(title: str) -> Trial:
    return Trial(title, *family(title).build())


@pytest.mark.parametrize(("title", "action"), PAIRS)
def test_three_steps_of(title: str, action: str) -> None:
    state = torch.get_rng_state()
    outcome = trial(title).run(action)
    torch.set_rng_state(state)
    assert outcome.result == "ok", outcome.line()
    assert (outcome.coverage or 0.0) >= SAMPLE[title][action], outcome.line()


def test_what_has_no_batch_normalization_is_refused_by_name() -> None:
    outcome = trial("transformers/llama").run("norm bsr")
    assert outcome.result == "refused"
    assert "LlamaForCausalLM has no batch normalization" in outcome.detail


# the zoo's own checks can fail --------------------------------------------------------------------------------------


def toy() -> Trial:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(6, 4)
    return Trial("toy/toy", model, lambda model: model(x))


@dataclass(frozen=True)
class Doubling(wellcond.GradientCentralization):
    """Wrong: it is no projection."""

    def update(self, slots: list[Slot]) -> None:
        super().update(slots)
        for slot in slots:
            slot.layer.weight.grad.mul_(2)


@dataclass(frozen=True)
class Meddling(wellcond.GradientCentralization):
    """Wrong: it changes the gradient of a weight that it does not cover."""

    def update(self, slots: list[Slot]) -> None:
        super().update(slots)
        slots[0].layer.module.bias.grad.add_(1)


@dataclass(frozen=True)
class Blind(wellcond.FeatureWhitening):
    """Wrong: it takes no statistics in."""

    def wants_inputs(self, slot: Slot) -> bool:
        return False


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("GradientCentralization", Doubling, "was not projected"),
        ("GradientCentralization", Meddling, "is not covered, but its gradient was changed"),
        ("FeatureWhitening", Blind, "never received statistics"),
    ],
)
def test_a_wrong_transform_is_found(
    name: str, wrong: type[wellcond.GradientTransform], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert toy().run(name).result == "ok"
    monkeypatch.setitem(zoo_trials.TRANSFORMS, name, wrong)
    outcome = toy().run(name)
    assert outcome.result == "FAIL"
    assert said in outcome.detail


def test_a_conversion_that_loses_something_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert toy().run("norm bsr").result == "ok"

    def forgetful(model: nn.Module, to: str, **options: object) -> nn.Module:
        model = convert(model, to=to, **options)
        for module in model.modules():
            if type(module) is nn.BatchNorm1d:
                module.reset_running_stats()
        return model

    convert = wellcond.nn.convert_norm
    monkeypatch.setattr(wellcond.nn, "convert_norm", forgetful)
    outcome = toy().run("norm bsr")
    assert outcome.result == "FAIL"
    assert "after converting there and back" in outcome.detail


def test_a_loss_that_is_not_finite_is_found() -> None:
    class Exploding(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            # Divides by zero once it has been trained.
            return super().forward(input) / float(torch.equal(self.bias, self.first))

    model = Exploding(4, 3)
    model.first = model.bias.detach().clone()
    x = torch.randn(6, 4)
    outcome = Trial("toy/exploding", nn.Sequential(model), lambda model: model(x)).run("GradientCentralization")
    assert outcome.result == "FAIL"
    assert "the loss is" in outcome.detail


# the command line ---------------------------------------------------------------------------------------------------


def test_the_command_prints_a_line_for_each_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "zoo.json"
    arguments = ["--only", "timm/vision_transformer$", "--action", "GradientCentralization", "--action", "norm bsr"]
    assert zoo.main([*arguments, "--json", str(file)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("timm/")]
    assert [line.split()[1] for line in lines] == ["GradientCentralization", "norm"]
    assert "% of the parameters" in lines[0]
    assert [outcome["result"] for outcome in json.loads(file.read_text())] == ["ok", "refused"]


def test_a_failure_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(zoo_trials.TRANSFORMS, "GradientCentralization", Doubling)
    assert zoo.main(["--only", "timm/vision_transformer$", "--action", "GradientCentralization"]) == 1
    assert "was not projected" in capsys.readouterr().out


def test_configurations_are_made_small_all_the_way_down() -> None:
    settings = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "use_cache": True,
        "eos_token_id": 50256,
        "layer_types": ["full", "sliding"] * 16,
        "vision_config": {"image_size": 448, "depths": [2, 2, 6, 2]},
    }
    assert shrink(settings) == {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "use_cache": False,
        "eos_token_id": 127 - 50256 % 7,
        "layer_types": ["full", "sliding"],
        "vision_config": {"image_size": 64, "depths": [1, 1, 1, 1]},
    }
    assert settings["hidden_size"] == 4096
