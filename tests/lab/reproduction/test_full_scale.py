"""Every recipe at the sources' own scale: planned without its data on the meta device, and what it says is missing."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models

from wellcond.__main__ import main
from wellcond.lab.data.named_data import NAMED_DATA
from wellcond.lab.errors import LabError
from wellcond.lab.methods.grammar import Times
from wellcond.lab.methods.spec import GroupSpec
from wellcond.lab.networks import registry
from wellcond.lab.networks.named_weights import bind_weights
from wellcond.lab.networks.trunks import TRUNKS
from wellcond.lab.plan import make_plan
from wellcond.lab.reproduction.panels import needed_data, needed_weights, scaled_panels
from wellcond.lab.reproduction.recipe import bundled_recipes
from wellcond.lab.tasks.base import Defaults, Metric, Task
from wellcond.lab.tasks.detection.task import DetectionTask
from wellcond.lab.tasks.reid.networks import build_reid
from wellcond.lab.tasks.reid.specs import select_reid
from wellcond.lab.tasks.segmentation.networks import build_segmenter
from wellcond.lab.tasks.segmentation.specs import select_segmenter
from wellcond.nn import SwitchableNorm2d

RECIPES = {recipe.name: recipe for recipe in bundled_recipes()}

# Of each data set: classes, training images, height and width.
SIZES = {
    "cifar10": (10, 50_000, 32),
    "cifar100": (100, 50_000, 32),
    "mini-imagenet": (100, 50_000, 84),
    "imagenet": (1000, 1_281_167, 224),
    "aircraft": (100, 6_667, 224),
    "cars": (196, 8_144, 224),
    "dogs": (120, 12_000, 224),
    "cub": (200, 5_994, 224),
    "coco": (80, 117_266, 800),
    "cityscapes": (19, 2_975, 512),
    "ade20k": (150, 20_210, 512),
    "gta5": (19, 24_966, 512),
    "market1501": (751, 12_936, 256),
    "dukemtmc": (702, 16_522, 256),
}


class StandIn(Task):
    """A task of the sizes of a data set that is not there; its networks are the real task's."""

    is_rehearsed = False
    augmentation = "none"
    test_images = 1000
    chance = 0.0
    digest = "data"

    def __init__(self, name: str, validation_images: int) -> None:
        self.name = name
        self.classes, images, self.size = SIZES[name]
        self.validation_images, self.train_images = validation_images, images - validation_images
        kinds = {"coco": "detection", "market1501": "re-identification", "dukemtmc": "re-identification"}
        kinds |= dict.fromkeys(("cityscapes", "ade20k", "gta5"), "segmentation")
        self.kind = kinds.get(name, "classification")
        scores = {"detection": "AP", "re-identification": "mAP", "segmentation": "mIoU"}
        self.metric = Metric(scores.get(self.kind, "accuracy"))
        self.defaults = Defaults("resnet18", 200, 128, smallest_batch=1 if name == "coco" else 2)

    def steps_with(self, batch_size: int) -> int:
        return self.train_images // batch_size

    def initial_model(self, model: str, seed: int, weights: str | None) -> nn.Module:
        if self.kind == "detection":
            fields = SimpleNamespace(image_size=None, pool=SimpleNamespace(classes=range(self.classes)))
            return DetectionTask.network(fields, model, seed, weights)  # type: ignore[arg-type]
        if self.kind == "re-identification":
            return build_reid(select_reid(model), self.classes, weights)
        if self.kind == "segmentation":
            return build_segmenter(select_segmenter(model), self.classes, weights)
        if ":" not in model:
            registry.select_model(model, self.size)
        return registry.initial_model(model, 3, self.classes, seed, weights)


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(32, channels)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[str]:
    """Files of the shapes of the weights that recipes name, a value each; those with GN are called as MMDetection's,
    those with SN as their authors'."""
    folder = tmp_path_factory.mktemp("weights")
    built = {
        "resnext101-32x4d": ("x101-32x4d", nn.BatchNorm2d),
        "resnet50-gn": ("r50", group_norm),
        "resnet101-gn": ("r101", group_norm),
        "resnet50-gn-ws": ("r50", group_norm),
        "resnet50-sn": ("r50", SwitchableNorm2d),
    }
    given = []
    for name, (trunk, norm) in built.items():
        with torch.device("meta"):
            state = TRUNKS[trunk].build(norm).state_dict()
        file = folder / f"{name}.pth"
        called = {group_norm: "gn", SwitchableNorm2d: "sn"}.get(norm, "bn")
        kept = {
            key.replace("bn", called).replace("_logits", "_weight"): torch.zeros((), dtype=value.dtype).expand(
                value.shape
            )
            for key, value in state.items()
            if not key.startswith("fc.")
        }
        torch.save({"state_dict": kept}, file)
        given.append(f"{name}={file}")
    return given


@pytest.fixture
def published(monkeypatch):
    """Torchvision's weights without the download: their names and shapes."""

    def state(name: str, _: str) -> dict[str, torch.Tensor]:
        library, _, within = name.partition(":")
        if library != "torchvision":
            raise LabError(f"no published weights of {name}")
        with torch.device("meta"):
            return torchvision_models.get_model(within).state_dict()

    monkeypatch.setattr("wellcond.lab.networks.weights._published", state)


# Panels that differ in their data's name, in the groups of a batch or in intervals alone build the same networks.
PLANNED: set[object] = set()


@pytest.mark.parametrize("name", RECIPES)
def test_every_panel_plans_at_full_scale(name, weights, published):
    panels = scaled_panels(RECIPES[name], "full")
    places = bind_weights(weights, needed_weights(panels))
    for panel in (panel.with_weights(places) for panel in panels):
        settings = panel.settings({data: f"/nowhere/{data}" for data in needed_data(panels)}, 1, None)
        methods = tuple((one.optimizer, one.options, one.transforms, one.norm) for one in panel.methods)
        built = (settings.model, settings.weights, settings.ghost_batch is None, methods)
        if built in PLANNED:
            continue
        PLANNED.add(built)
        with torch.device("meta"), warnings.catch_warnings():
            # Copying values into tensors without values does nothing, as torch says.
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
            plan = make_plan(settings, StandIn(panel.data, settings.validation_images or 1000))
        assert [method.name for method in plan.methods] == [method.name for method in panel.methods]
        assert plan.template.epochs == settings.epochs
        assert plan.steps > 0


def test_the_sources_settings_are_in_the_recipes():
    """What the sources say in their text and not in a table."""
    bounds = {"3.2": (2.0, 1.0), "2.9": (1.5, 0.5)}
    for name, (r_max, d_max) in bounds.items():
        panel = scaled_panels(RECIPES[name], "full")[-1]
        (renorm,) = (method for method in panel.methods if method.name == "BRN")
        norm = renorm.norm
        assert norm is not None
        assert dict(norm.options) == {"r_max": r_max, "d_max": d_max}
    (panel,) = scaled_panels(RECIPES["4.2"], "full")
    found = {
        method.name: next((dict(spec.options).get("decay") for spec in method.transforms), None)
        for method in panel.methods
    }
    assert (found["SGDW w/ GC"], found["AdamW w/ GC"]) == ("outside", "outside")
    assert (found["SGDW w/ GC and decay"], found["AdamW w/ GC and decay"]) == ("inside", "inside")
    # 0.1 for the classifier, 0.01 for what was trained before.
    for method in scaled_panels(RECIPES["4.7"], "full")[0].methods:
        assert method.lrs == (0.01,)
        assert method.groups == (GroupSpec(("head",), (("lr", Times(10.0)),)),)
    (search,) = scaled_panels(RECIPES["6.2"], "full")
    ((option, values),) = search.settings({"cifar100": "/nowhere"}, 1, None).sweeps
    assert (option, len(values)) == ("weight_decay", 9)
    assert {len(method.lrs) for method in search.methods} == {8}
    # Of norm layers and position biases Swin's AdamW decays nothing.
    swin = scaled_panels(RECIPES["6.7"], "full", ["Swin-T"])[0]
    for method in swin.methods:
        assert [dict(group.options)["weight_decay"] for group in method.groups] == [0.0]


def test_the_preconditioners_are_the_published_ones_at_full_scale():
    seen = 0
    for recipe in RECIPES.values():
        for panel in scaled_panels(recipe, "full"):
            settings = panel.settings(dict.fromkeys(NAMED_DATA, "/nowhere"), 1, None)
            for method in panel.methods:
                for spec in method.transforms:
                    if spec.refreshed:
                        options = dict(spec.options)
                        assert (options["second_moment"], options["solve_warmup"]) == ("dense", False), recipe.name
                        assert options.get("stats_every", settings.stats_every) is not None, recipe.name
                        seen += 1
    assert seen > 50


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_line_says_what_data_is_missing(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WELLCOND_DATA", raising=False)
    needed = [data for data in needed_data(scaled_panels(RECIPES[name], "full")) if data != "digits"]
    assert needed
    assert main(["reproduce", name]) == 2
    line = capsys.readouterr().err
    asked = ", ".join(f"{data}=PATH" for data in needed)
    assert line.startswith(f"wellcond: error: --data {asked} must say where the data lie: ")
    assert all(NAMED_DATA[data] in line for data in needed)
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "missing"),
    [("4.8", "resnext101-32x4d"), ("4.9", "resnet101-gn"), ("slides table 3", "resnet50-gn")],
)
def test_weights_that_are_not_there_are_named_before_anything_runs(name, missing, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", name, "--data", f"coco={tmp_path}"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("wellcond: error: --weights ")
    assert f"{missing}=FILE" in line
    assert line.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_drawn_weights_are_a_difference_to_the_source():
    (panel,) = scaled_panels(RECIPES["4.8"], "full", ["X101-32x4d"])
    drawn = panel.with_weights(bind_weights(["none"], needed_weights([panel])))
    assert drawn.settings({"coco": "/nowhere"}, 1, None).weights is None
    assert drawn.differs["weights"] == ("resnext101-32x4d", None)
    given = panel.with_weights(bind_weights(["resnext101-32x4d=a.pth"], needed_weights([panel])))
    assert given.settings({"coco": "/nowhere"}, 1, None).weights == "a.pth"
    assert given.differs == {}


LATE = """\
title = "A panel that cannot run behind one that can"
source = "a paper, table 9.2"
names = ["9.2"]
score = "accuracy"
baseline = "plain"

[settings]
data = "digits"
model = "convnet"
train_images = 128
validation_images = 64
test_images = 128
epochs = 1
seeds = 1

[[method]]
label = "plain"
method = "SGDM"
lrs = [0.1]

[[panel]]
name = "first"

[[panel]]
name = "second"
settings = {{ {fault} }}

[scale.small]

[scale.smoke]
"""


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (
            "batch_size = 4096",
            "panel second: --batch-size must be at most the number of training images (128), got 4096",
        ),
        ('model = "vgg16"', "panel second: model vgg16 needs images of at least 32x32, got 8x8"),
        ('weights = "nowhere.pth"', "panel second: --weights must be a file or torchvision:NAME"),
    ],
)
def test_the_last_panels_fault_stops_the_first(fault, line, capsys, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a run was started")

    monkeypatch.setattr("wellcond.lab.training.runner.Runner.run", refuse)
    file = tmp_path / "late.toml"
    file.write_text(LATE.format(fault=fault))
    assert main(["reproduce", str(file), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith(f"wellcond: error: {line}")
