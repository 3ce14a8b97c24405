"""Detection in the COCO layout: what is read, in which order, and that the library's layers and transforms fit."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from coco_files import rectangle, write_coco
from torch import nn
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import METHODS, Refresh
from wellcond.lab.networks.trunks import TRUNKS, build_trunk
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.tasks.detection.coco import CocoImages, CocoPaths, find_coco, mirrored
from wellcond.lab.tasks.detection.networks import DETECTORS, build_detector
from wellcond.lab.tasks.detection.task import DetectionBatch, grouped_order
from wellcond.lab.tasks.open import open_task
from wellcond.lab.training.runner import Runner
from wellcond.nn import SwitchableNorm2d
from wellcond.nn.norm.bsr import BSRBatchNorm2d

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def plan(root):
    settings = Settings(
        data=str(root), methods=("SGDM", "W-SGDM"), image_size=64, epochs=1, batch_size=2, validation_images=4, seeds=1
    )
    return make_plan(settings)


def seed_data(plan, **changes):
    spec = replace(plan.spec(plan.methods[0], 0.01, seed=0), **changes)
    return plan.task.for_seed(spec, CPU, 0, 1)


def same(first: DetectionBatch, second: DetectionBatch) -> bool:
    return (
        first.chance == second.chance
        and all(torch.equal(one, other) for one, other in zip(first.images, second.images, strict=True))
        and all(
            one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
            for one, other in zip(first.targets, second.targets, strict=True)
        )
    )


def test_a_folder_of_the_layout_is_detection(plan):
    task = plan.task
    assert (task.kind, task.metric.name, task.chance, task.name) == ("detection", "AP", 0.0, "coco")
    # 14 images of which two have no objects.
    assert (task.train_images, task.validation_images, task.test_images) == (8, 4, 4)
    assert task.describe()["classes"] == 2


def test_labels_follow_the_categories_numbers_and_boxes_have_corners(root):
    paths = find_coco(root)
    content = json.loads(paths[0].annotations.read_text())
    images = CocoImages(paths[0])
    things = [thing for thing in content["annotations"] if thing["image_id"] == 101]
    target = images.target(101, with_masks=True)
    assert target["labels"].tolist() == [{3: 1, 7: 2}[thing["category_id"]] for thing in things]
    left, top, width, height = things[0]["bbox"]
    assert target["boxes"][0].tolist() == [left, top, left + width, top + height]
    mask = target["masks"][0].bool()
    assert mask.shape == images.read(101).shape[1:]
    assert mask[top : top + height, left : left + width].all()
    assert mask.sum() == width * height


def test_crowds_and_slivers_are_not_learned(tmp_path):
    write_coco(tmp_path)
    file = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"] = [
        rectangle(1, 500, 3, [2, 2, 10, 10]),
        rectangle(2, 500, 3, [2, 2, 10, 10], crowd=1),
        rectangle(3, 500, 3, [2, 2, 0.5, 10]),
        rectangle(4, 501, 3, [40, 2, 100, 10]),  # over the right border
    ]
    file.write_text(json.dumps(content))
    images = CocoImages(CocoPaths(file, tmp_path / "val2017"))
    assert len(images.objects(500)) == 1
    assert images.with_objects().tolist() == [500, 501]
    assert images.target(501, with_masks=False)["boxes"].tolist() == [[40, 2, 64, 12]]


def test_mirroring_moves_pixels_boxes_and_masks_together(root):
    images = CocoImages(find_coco(root)[0])
    pixels, target = images.read(101), images.target(101, with_masks=True)
    flipped, moved = mirrored(pixels, target)
    for box, mask in zip(moved["boxes"].int().tolist(), moved["masks"], strict=True):
        left, top, right, bottom = box
        assert mask[top:bottom, left:right].all()
        assert mask.sum() == (right - left) * (bottom - top)
    again = mirrored(flipped, moved)
    assert torch.equal(again[0], pixels)
    assert torch.equal(again[1]["boxes"], target["boxes"])


def test_order_is_a_function_of_seed_and_epoch_and_resumes_exactly(plan):
    data = seed_data(plan)
    whole = data.batches()
    assert len(whole) == 4
    first, second = list(whole), list(whole)
    assert whole.epoch == 2
    resumed = data.batches()
    resumed.resume_at(1, 2)
    rest = list(resumed)
    assert len(rest) == 2
    assert all(same(one, other) for one, other in zip(rest, second[2:], strict=True))
    assert not all(same(one, other) for one, other in zip(first, second, strict=True))
    other_seed = list(seed_data(plan, seed=1).batches())
    assert not all(same(one, other) for one, other in zip(first, other_seed, strict=True))


def test_half_of_the_images_are_mirrored_only_with_flip(plan):
    data = seed_data(plan)
    plain = seed_data(plan, augmentation="none")
    flipped = []
    for _, one, other in zip(range(12), data_images(data, 3), data_images(plain, 3), strict=False):
        assert torch.equal(one, other) or torch.equal(one, other.flip(-1))
        flipped.append(not torch.equal(one, other))
    assert 0 < sum(flipped) < len(flipped)


def data_images(data, epochs):
    batches = data.batches()
    return [image for _ in range(epochs) for batch in batches for image in batch.images]


def test_ranks_share_each_batch(plan):
    spec = plan.spec(plan.methods[0], 0.01, seed=0)
    whole = list(plan.task.for_seed(spec, CPU, 0, 1).batches())
    shares = [list(plan.task.for_seed(spec, CPU, rank, 2).batches()) for rank in range(2)]
    for batch, left, right in zip(whole, *shares, strict=True):
        assert torch.equal(batch.images[0], left.images[0])
        assert torch.equal(batch.images[1], right.images[0])
        assert left.chance != right.chance


def test_batches_are_of_one_orientation_but_for_one():
    upright = np.arange(50) % 3 == 0
    batches = grouped_order(np.arange(50), upright, 4, seed=3, epoch=0)
    assert len(batches) == 12
    assert len({image for batch in batches for image in batch}) == 48
    mixed = [batch for batch in batches if len({bool(upright[image]) for image in batch}) > 1]
    assert len(mixed) <= 1


def test_validation_images_come_from_train_by_seed(plan):
    first, second = seed_data(plan), seed_data(plan, seed=1)
    assert set(first.split.train) & set(first.split.validation) == set()
    assert {*first.split.train, *first.split.validation} <= set(range(100, 112))
    assert set(first.split.validation) != set(second.split.validation)


def test_a_perfect_detector_scores_100_on_both_roles(plan):
    class Oracle(nn.Module):
        def __init__(self, images, ids):
            super().__init__()
            self.images, self.left = images, list(ids)

        def forward(self, shown):
            assert len(shown) == 1
            target = self.images.target(int(self.left.pop(0)), with_masks=False)
            return [{**target, "scores": torch.ones(len(target["labels"]))}]

    data = seed_data(plan)
    for role, images, ids in (
        ("test", plan.task.test, plan.task.test_ids),
        ("validation", plan.task.pool, data.split.validation),
    ):
        evaluation = data.evaluate(Oracle(images, ids), role, Stopwatch(CPU))
        assert evaluation.score == pytest.approx(100.0)
        assert evaluation.loss is None
        assert evaluation.images == 4
        assert evaluation.metrics["AP75"] == pytest.approx(100.0)


def test_a_network_without_finite_weights_has_no_score(plan):
    model = plan.task.initial_model("fasterrcnn-tiny", 0, None)
    with torch.no_grad():
        model.rpn.head.cls_logits.bias.fill_(torch.nan)
        assert np.isnan(seed_data(plan).evaluate(model.eval(), "test", Stopwatch(CPU)).score)


def test_the_loss_draws_by_the_batch_and_leaves_the_global_generator(plan):
    data = seed_data(plan)
    model = plan.task.initial_model("fasterrcnn-tiny", 0, None).train()
    batch = next(iter(data.batches()))
    before = torch.random.get_rng_state()
    losses = [data.loss(copy.deepcopy(model), batch) for _ in range(2)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(*losses)


def train(data, network, method, steps, lr=0.01):
    """Train some steps; return the losses, what the transforms cover, and the optimizer."""
    network.train()
    optimizer, handle = METHODS[method].build(network, lr, Refresh(1, 1))
    losses = []
    for _, batch in zip(range(steps), data.batches(), strict=False):
        optimizer.zero_grad()
        loss = data.loss(network, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, "" if handle is None else handle.report(), optimizer


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("fasterrcnn-tiny", "SGDM+GC"),
        ("maskrcnn-tiny", "W-SGDM"),
        ("fasterrcnn-tiny", "FSGD"),
        ("maskrcnn-swin-tiny", "W-SGDM"),
    ],
)
def test_transforms_change_the_step_of_every_convolution_and_linear_layer(plan, model, method):
    data = seed_data(plan, model=model)
    start = plan.task.initial_model(model, 0, None)
    plain, transformed, longer = (copy.deepcopy(start) for _ in range(3))
    train(data, plain, "SGDM", 1)
    _, report, _ = train(data, transformed, method, 1)
    layers = {
        f"{name}.weight"
        for name, layer in start.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    }
    # The pyramid, the proposals' convolutions, which run once a level, and the heads' linear layers among them.
    assert {
        "backbone.fpn.inner_blocks.3.0.weight",
        "rpn.head.conv.0.0.weight",
        "roi_heads.box_head.fc6.weight",
    } < layers
    word = "centred over" if method == "SGDM+GC" else "preconditioned"
    assert layers <= {line.split()[0] for line in report.splitlines() if word in line}
    before, ours, theirs = (dict(network.named_parameters()) for network in (start, transformed, plain))
    for name in layers:
        # Without a gradient, as where no box was proposed on a level, both only decay.
        if float((theirs[name] - before[name]).detach().norm()) > 1e-4 * float(before[name].detach().norm()):
            assert not torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-7), name
    losses, *_ = train(data, longer, method, 3)
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    assert all(bool(parameter.isfinite().all()) for parameter in longer.parameters())


def test_the_proposals_layers_have_the_second_moment_of_all_levels(plan):
    """They run once a level: the moment is of the inputs of all five, a constant 1 appended for the bias."""
    network = plan.task.initial_model("fasterrcnn-tiny", 0, None)
    layer = network.rpn.head.cls_logits
    inputs = []
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().double()))
    *_, optimizer = train(seed_data(plan), network, "W-SGDM", 1)
    assert len({level.shape for level in inputs}) == len(inputs) == 5
    rows = torch.cat([level.movedim(1, -1).flatten(0, -2) for level in inputs])
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    (moment,) = (value for name, value in optimizer.state[layer.weight].items() if name.endswith("_second_moment"))
    # A running mean that began at 0: the corner of the constants is how much of it there is.
    mean = moment[0].double() / moment[0, -1, -1].double()
    torch.testing.assert_close(mean, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_bsr_trains_unfrozen_at_two_images_and_evaluates(plan):
    data = seed_data(plan)
    network = METHODS["BSR"].with_layers(plan.task.initial_model("fasterrcnn-tiny", 0, None))
    norms = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    # The stem's, two of each of four blocks, and those of three shortcuts.
    assert len(norms) == 12
    assert all(isinstance(layer, BSRBatchNorm2d) for layer in norms)
    losses, *_ = train(data, network, "BSR", 4)
    assert np.isfinite(losses).all()
    with torch.no_grad():
        evaluation = data.evaluate(network.eval(), "test", Stopwatch(CPU))
    assert 0 <= evaluation.score <= 100


def test_ghost_groups_of_two_of_a_batch_of_four(plan):
    data = seed_data(plan, batch_size=4)
    network = METHODS["SGDM"].with_layers(plan.task.initial_model("fasterrcnn-tiny", 0, None), ghost_batch=2)
    losses, *_ = train(data, network, "SGDM", 2)
    assert len(losses) == 2
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("name", ["fasterrcnn-tiny", "fasterrcnn-tiny-frozenbn"])
def test_pretrained_trunks_keep_stem_and_first_stage(plan, tmp_path, name):
    spec = DETECTORS[name]
    trunk = build_trunk(TRUNKS["tiny"], nn.BatchNorm2d, None)
    for layer in trunk.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
    file = tmp_path / "trunk.pt"
    torch.save(trunk.state_dict(), file)
    network = build_detector(spec, 2, 64, str(file))
    body = network.backbone.body
    assert torch.equal(body.layer4[0].conv1.weight, trunk.layer4[0].conv1.weight)
    assert torch.equal(body.bn1.running_mean, trunk.bn1.running_mean)
    assert not any(parameter.requires_grad for parameter in (*body.conv1.parameters(), *body.layer1.parameters()))
    assert all(parameter.requires_grad for parameter in body.layer2[0].conv1.parameters())
    frozen = "frozenbn" in name
    assert isinstance(body.layer2[0].bn1, FrozenBatchNorm2d if frozen else nn.BatchNorm2d)
    before = {key: value.clone() for key, value in body.state_dict().items()}
    losses, *_ = train(seed_data(plan), network, "SGDM", 1)
    assert np.isfinite(losses).all()
    changed = {key for key, value in body.state_dict().items() if not torch.equal(value, before[key])}
    assert not {key for key in changed if key.startswith(("conv1", "bn1", "layer1"))}
    assert ("layer3.0.bn1.running_mean" in changed) is not frozen


def test_without_weights_everything_trains(plan):
    network = plan.task.initial_model("maskrcnn-tiny", 0, None)
    assert all(parameter.requires_grad for parameter in network.parameters())
    with torch.random.fork_rng():
        torch.manual_seed(5)
        again = plan.task.initial_model("maskrcnn-tiny", 0, None)
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), again.parameters(), strict=True))


def test_the_sources_detectors_have_torchvisions_shapes():
    """On the meta device: a trunk's and heads' shapes are those that published detectors have."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    with torch.device("meta"):
        ours = build_detector(DETECTORS["maskrcnn-r50"], 90, 800, None)
        theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        grouped = build_detector(DETECTORS["maskrcnn-r50-gn"], 90, 800, None)
    shapes = [{name: value.shape for name, value in model.named_parameters()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in grouped.modules())
    assert ours.transform.min_size == (800,)
    assert ours.transform.max_size == 1333


PARTS = ("backbone.body", "backbone.fpn", "roi_heads.box_head", "roi_heads.mask_head")


def layers_of(network: nn.Module, part: str) -> set[type[nn.Module]]:
    kinds = (nn.BatchNorm2d, FrozenBatchNorm2d, nn.GroupNorm, SwitchableNorm2d, nn.LayerNorm)
    return {type(layer) for layer in network.get_submodule(part).modules() if isinstance(layer, kinds)}


@pytest.mark.parametrize(
    ("suffix", "trunk", "heads"),
    [
        ("", {nn.BatchNorm2d}, set()),
        ("-frozenbn", {FrozenBatchNorm2d}, set()),
        ("-gn", {nn.GroupNorm}, {nn.GroupNorm}),
        ("-sn", {SwitchableNorm2d}, {SwitchableNorm2d}),
        ("-frozenbn-gn", {FrozenBatchNorm2d}, {nn.GroupNorm}),
        ("-frozenbn-sn", {FrozenBatchNorm2d}, {SwitchableNorm2d}),
        ("-gn-sn", {nn.GroupNorm}, {SwitchableNorm2d}),
    ],
)
def test_trunk_and_heads_have_the_layers_of_their_name(suffix, trunk, heads):
    for name in (f"maskrcnn-r50{suffix}", f"maskrcnn-tiny{suffix}"):
        with torch.device("meta"):
            network = build_detector(DETECTORS[name], 2, 64, None)
        assert [layers_of(network, part) for part in PARTS] == [trunk, heads, heads, heads]
        # Four convolutions and a linear layer with norm layers, two linear layers without.
        linear = [layer for layer in network.roi_heads.box_head.modules() if isinstance(layer, nn.Linear)]
        assert len(linear) == (1 if heads else 2)
        assert f"fasterrcnn{name.removeprefix('maskrcnn')}" in DETECTORS


@pytest.mark.parametrize("name", ["maskrcnn-tiny-sn", "maskrcnn-tiny-frozenbn-gn", "maskrcnn-swin-tiny"])
def test_other_heads_and_trunks_train_and_find_nothing_where_nothing_is(plan, name):
    network = plan.task.initial_model(name, 0, None)
    losses, *_ = train(seed_data(plan, model=name), network, "W-SGDM", 3)
    assert np.isfinite(losses).all()
    network.eval()
    network.roi_heads.score_thresh = 2.0  # no box reaches it: the mask head gets an empty batch
    (found,) = network([torch.rand(3, 64, 64)])
    assert found["masks"].shape == (0, 1, 64, 64)


def test_the_swin_trunk_is_torchvisions():
    from torchvision.models import swin_t

    with torch.device("meta"):
        network = build_detector(DETECTORS["maskrcnn-swin-t"], 80, 800, None)
        theirs = swin_t()
    shapes = [
        {key: value.shape for key, value in part.state_dict().items()} for part in (theirs, network.backbone.body)
    ]
    of_trunk = {key: shape for key, shape in shapes[0].items() if key.startswith("features.")}
    assert {key: shape for key, shape in shapes[1].items() if not key.startswith("norms.")} == of_trunk
    chances = [
        [layer.p for layer in part.modules() if isinstance(layer, StochasticDepth)] for part in (theirs, network)
    ]
    assert chances[0] == chances[1]
    drawn = build_detector(DETECTORS["maskrcnn-swin-tiny"], 2, 64, None)
    maps = drawn.backbone.body(torch.rand(1, 3, 64, 96))
    assert {key: tuple(value.shape) for key, value in maps.items()} == {
        str(stage): (1, 16 * 2**stage, 16 // 2**stage, 24 // 2**stage) for stage in range(4)
    }


def test_a_run_goes_from_the_settings_to_a_record(plan):
    record = Runner(plan.task, CPU).run(plan.spec(METHODS["SGDM"], 0.01, seed=0))
    assert not record.diverged
    (epoch,) = record.epochs
    assert epoch.steps == 4
    assert epoch.test_loss is None
    assert {"AP50", "AP75"} <= epoch.metrics.keys()


def test_missing_parts_are_told_with_where_they_come_from(tmp_path):
    with pytest.raises(LabError, match=r"coco2017.*cocodataset\.org"):
        open_task(Settings(data=str(tmp_path / "coco2017")))
    root = write_coco(tmp_path / "data")
    (root / "val2017").rename(root / "elsewhere")
    with pytest.raises(LabError, match=r"needs a folder val2017.*cocodataset\.org"):
        open_task(Settings(data=str(root)))
    (root / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(LabError, match=r"found instances_train2017\.json.*cocodataset\.org"):
        open_task(Settings(data=str(root)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet8"}, "unknown model 'resnet8'"),
        ({"model": "fasterrcnn-r5"}, "did you mean 'fasterrcnn-r50'"),
        ({"augmentation": "crop-flip"}, "unknown augmentation"),
        ({"train_images": 12, "validation_images": 1}, "--train-images 12: there are 12 images with objects"),
        ({"test_images": 5}, "--test-images must be at most 4"),
    ],
)
def test_what_does_not_fit_is_refused(root, changes, message):
    with pytest.raises(LabError, match=message):
        open_task(Settings(data=str(root), **changes))


def test_the_fingerprint_tells_annotations_and_test_images_apart(root, tmp_path):
    first = open_task(Settings(data=str(root)))
    assert first.fingerprint() == open_task(Settings(data=str(root))).fingerprint()
    assert first.fingerprint() != open_task(Settings(data=str(root), test_images=2)).fingerprint()
    assert first.fingerprint() != open_task(Settings(data=str(write_coco(tmp_path / "x", train=15)))).fingerprint()
