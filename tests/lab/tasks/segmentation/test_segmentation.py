"""Segmentation: the real layouts, label maps and cuts, mIoU against sets of pixels, runs that go on, another place."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from segmentation_files import WRITERS, write_cityscapes, write_gta5, write_voc
from stopped_runs import stop_after, uncounted
from torch import nn
from torchvision.models import resnet18, resnet50

from wellcond.__main__ import main
from wellcond.lab.data.epoch_loader import Key
from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import METHODS
from wellcond.lab.networks.trunks import TRUNKS, build_trunk, dilate_last
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.tasks.open import open_task
from wellcond.lab.tasks.segmentation.formats import CITYSCAPES, VOC
from wellcond.lab.tasks.segmentation.networks import build_segmenter
from wellcond.lab.tasks.segmentation.scores import confusion, mean_iou
from wellcond.lab.tasks.segmentation.specs import SEGMENTERS
from wellcond.lab.tasks.segmentation.views import SegmentationViews
from wellcond.lab.training.checkpoint import Checkpointing
from wellcond.lab.training.run_memory import RunMemory
from wellcond.lab.training.runner import Runner

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("quick_collections")


@pytest.fixture(autouse=True)
def _memory_is_not_counted(monkeypatch):
    monkeypatch.setattr(RunMemory, "of", uncounted)


def settings_of(root, **options):
    given = {"epochs": 2, "seeds": 1, "batch_size": 2, "image_size": 24, "validation_images": 2, "jobs": 1}
    return Settings(data=str(root), methods=("SGDM",), **(given | options))


@pytest.fixture(scope="module", params=WRITERS)
def root(request, tmp_path_factory):
    return WRITERS[request.param](tmp_path_factory.mktemp(request.param))


def test_a_run_is_the_same_though_stopped(tmp_path):
    plan = make_plan(settings_of(write_voc(tmp_path / "voc")))
    plan.task.check_files()
    spec = plan.spec(METHODS["SGDM"], 0.1, seed=0)
    first = Runner(plan.task, CPU).run(spec)
    checkpoints = Checkpointing(tmp_path, every=0.0)
    stop_after(plan.task, checkpoints, spec, steps=plan.steps_per_epoch + 1)
    again = Runner(open_task(plan.settings), CPU, checkpoints=checkpoints).run(spec)

    def timeless(record):
        epochs = tuple(replace(epoch, seconds=0.0) for epoch in record.epochs)
        return replace(record, epochs=epochs, evaluation_seconds=None)

    assert timeless(first) == timeless(again)
    assert not first.diverged
    assert first.epochs[-1].train_score is None
    assert set(first.epochs[-1].metrics) == {"pixel accuracy"}


def test_every_layout_gives_its_two_classes_and_leaves_the_rest_out(root):
    task = open_task(settings_of(root))
    expected = {"cityscapes": (0, 13), "gta5": (0, 13), "ade20k": (0, 149), "voc": (0, 20)}
    name = next(name for name in expected if task.name.startswith(name))
    pixels, labels = SegmentationViews(task.pool, 24)[Key(0, 0)]
    assert (tuple(pixels.shape), tuple(labels.shape)) == ((3, 24, 36), (24, 36))
    assert sorted(set(labels.flatten().tolist())) == [*expected[name], 255]
    assert bool((labels[0] == 255).all())
    square, ground = (float(pixels[:, labels == label].float().mean()) for label in reversed(expected[name]))
    assert square > ground + 40
    assert len(task.pool.pairs) == 8
    assert len(task.test.pairs) == (2 if name == "gta5" else 3)
    assert {pair.image for pair in task.pool.pairs}.isdisjoint(pair.image for pair in task.test.pairs)


def test_cityscapes_maps_of_the_numbers_that_are_trained_on(tmp_path):
    one, other = (
        open_task(settings_of(write_cityscapes(tmp_path / str(ready), train_ids=ready))) for ready in (False, True)
    )
    for place in range(8):
        views = (SegmentationViews(task.pool, 24)[Key(place, 0)] for task in (one, other))
        assert all(torch.equal(*parts) for parts in zip(*views, strict=True))
    assert one.pool.classes == CITYSCAPES
    assert len(VOC) == 21


def test_images_and_maps_are_cut_together(root):
    task = open_task(settings_of(root))
    for augmentation in ("none", "flip", "scale-crop-flip"):
        views = SegmentationViews(task.pool, 20, augmentation)
        seen = set()
        for chance in range(12):
            pixels, labels = views[Key(0, chance)]
            assert (tuple(pixels.shape), tuple(labels.shape)) == ((3, 20, 20), (20, 20))
            assert all(torch.equal(*parts) for parts in zip((pixels, labels), views[Key(0, chance)], strict=True))
            seen.add(labels.numpy().tobytes())
            there = labels != 255
            found = sorted(set(labels[there].tolist()))
            if len(found) == 2:
                means = [float(pixels[:, labels == label].float().mean()) for label in found]
                assert means[1] > means[0] + 25
        assert len(seen) in {"none": (1,), "flip": (2,)}.get(augmentation, range(6, 13))


def test_ranks_share_each_batch(tmp_path):
    plan = make_plan(settings_of(write_voc(tmp_path)))
    spec = plan.spec(METHODS["SGDM"], 0.1, seed=0)
    whole, *shares = (plan.task.for_seed(spec, CPU, *place).batches() for place in ((0, 1), (0, 2), (1, 2)))
    for batch, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)


def test_mean_intersection_over_union_against_sets_of_pixels():
    generator = np.random.default_rng(0)
    labels, found = generator.integers(0, 5, (2, 3, 40)), generator.integers(0, 5, (2, 3, 40))
    labels[0, 0, :20] = 255
    shares = []
    for label in range(6):  # no pixel is of the last one
        true, told = (labels == label) & (labels != 255), (found == label) & (labels != 255)
        if (true | told).any():
            shares.append((true & told).sum() / (true | told).sum())
    counts = sum(confusion(torch.tensor(a), torch.tensor(b), 6) for a, b in zip(found, labels, strict=True))
    score, right = mean_iou(counts)
    assert score == pytest.approx(100 * np.mean(shares))
    assert right == pytest.approx(100 * (found == labels)[labels != 255].mean())


def test_a_network_that_sees_what_is_bright(tmp_path):
    """Told from the pixels by hand it scores all, each image whole; void pixels count for nothing."""
    plan = make_plan(settings_of(write_voc(tmp_path)))
    data = plan.task.for_seed(plan.spec(METHODS["SGDM"], 0.1, 0), CPU, 0, 1)

    class Bright(nn.Module):
        def forward(self, images):
            logits = torch.full((len(images), 21, *images.shape[-2:]), -9.0)
            logits[:, 0], logits[:, 20] = -images.mean(1), images.mean(1) + 0.3
            return logits

    with torch.no_grad():
        found = data.evaluate(Bright(), "test", Stopwatch(CPU))
    assert found.score > 95
    assert (found.images, found.metrics["pixel accuracy"] > 97) == (3, True)


def test_a_batch_without_a_pixel_that_counts(tmp_path):
    plan = make_plan(settings_of(write_voc(tmp_path)))
    data = plan.task.for_seed(plan.spec(METHODS["SGDM"], 0.1, 0), CPU, 0, 1)
    batch = next(iter(data.batches()))
    network = plan.task.initial_model(plan.template.model, 0, None)
    loss = data.loss(network, batch._replace(labels=batch.labels.fill_(255)))
    assert float(loss.detach()) == 0.0


def test_measured_in_another_place(tmp_path):
    root, other = write_cityscapes(tmp_path / "city"), write_gta5(tmp_path / "game")
    here, there = (open_task(settings_of(root, test_data=place)) for place in (None, str(other)))
    assert len(there.test.pairs) == 10
    assert all(pair.image.is_relative_to(other) for pair in there.test.pairs)
    assert here.pool.pairs == there.pool.pairs
    assert here.fingerprint() != there.fingerprint()
    assert there.describe()["test images"] == str(other)
    back = open_task(settings_of(other, test_data=str(root)))
    assert (len(back.pool.pairs), len(back.test.pairs)) == (10, 3)
    with pytest.raises(LabError, match="must have the 21 classes"):
        open_task(settings_of(write_voc(tmp_path / "voc"), test_data=str(root)))
    with pytest.raises(LabError, match=r"--test-data .*nowhere: there is no such folder"):
        open_task(settings_of(root, test_data=str(tmp_path / "nowhere")))
    with pytest.raises(LabError, match="--test-data is not for digits"):
        open_task(Settings(test_data=str(root)))


# networks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEGMENTERS)
def test_every_network_tells_every_pixel(name):
    with torch.device("meta"):
        network = build_segmenter(SEGMENTERS[name], 7, None)
        logits = network(torch.empty(2, 3, 40, 52))
    assert logits.shape == (2, 7, 40, 52)


@pytest.mark.parametrize(("trunk", "reference"), [("r50", resnet50), ("r18", resnet18)])
def test_trunks_are_dilated_as_torchvisions(trunk, reference):
    with torch.device("meta"):
        ours = build_trunk(TRUNKS[trunk], nn.BatchNorm2d, None)
        dilate_last(ours)
        features = ours(torch.empty(1, 3, 64, 64))
        assert features.shape[-2:] == (8, 8)
        if trunk == "r50":
            theirs = reference(replace_stride_with_dilation=[False, True, True])
            found = dict(ours.named_modules())
            for name, module in theirs.named_modules():
                if isinstance(module, nn.Conv2d):
                    mine = found[name]
                    assert (mine.stride, mine.dilation, mine.padding) == (
                        module.stride,
                        module.dilation,
                        module.padding,
                    )


@pytest.mark.parametrize("name", ["IBN-a", "SN", "W-SGDM", "GN"])
def test_methods_reach_trunk_and_head(tmp_path, name):
    plan = make_plan(replace(settings_of(write_voc(tmp_path), model="fcn-r18"), methods=("SGDM", name)))
    model = METHODS[name].with_layers(plan.task.initial_model("fcn-r18", 0, None), None)
    if name == "SN":
        assert type(model.head[1]).__name__ == "SwitchableNorm2d"
    if name == "IBN-a":
        assert any(type(module).__name__ == "InstanceBatchNorm2d" for module in model.trunk.modules())


def test_weights_are_of_the_trunk(tmp_path):
    torch.save(resnet18(num_classes=3).state_dict(), tmp_path / "r18.pt")
    task = open_task(settings_of(write_voc(tmp_path / "voc")))
    model = task.initial_model("fcn-r18", 0, str(tmp_path / "r18.pt"))
    given = torch.load(tmp_path / "r18.pt")
    assert torch.equal(model.trunk.get_parameter("layer4.1.conv2.weight"), given["layer4.1.conv2.weight"])
    with pytest.raises(LabError, match="--weights are of a trunk"):
        task.initial_model("fcn-tiny", 0, str(tmp_path / "r18.pt"))


# bad files ----------------------------------------------------------------------------------------------------------


def _colours(file):
    Image.open(file).convert("RGB").save(file)


def _smaller(file):
    Image.open(file).resize((30, 20)).save(file)


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "missing": lambda file: file.unlink(),
    "colours": _colours,
    "smaller": _smaller,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", WRITERS)
def test_damaged_label_maps_are_one_line_before_training(tmp_path, capsys, monkeypatch, kind, damage):
    monkeypatch.setattr("wellcond.lab.engines.select._engine", None)
    root = WRITERS[kind](tmp_path / kind)
    file = open_task(settings_of(root)).pool.pairs[4].labels
    DAMAGES[damage](file)
    arguments = ["--methods", "SGDM", "--seeds", "1", "--batch-size", "2", "--quiet", "--out", str(tmp_path / "out")]
    assert main(["compare", "--data", str(root), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"wellcond: error: --data: [^\n]*{re.escape(str(file))}[^\n]*\n", captured.err)


def test_parts_that_are_missing(tmp_path):
    root = write_voc(tmp_path / "voc")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("")
    with pytest.raises(LabError, match=r"val\.txt: holds no images"):
        open_task(settings_of(root))
    (root / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(LabError, match=r"val\.txt: cannot be read"):
        open_task(settings_of(root))
    for option in ({"augmentation": "crop-flip"}, {"model": "resnet8"}, {"test_images": 99}):
        with pytest.raises(LabError):
            open_task(settings_of(write_gta5(tmp_path / f"gta5 {next(iter(option))}"), **option))
