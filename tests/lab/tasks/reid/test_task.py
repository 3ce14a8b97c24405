"""Re-identification: whole identities, batches of P times K, the strong baseline's losses, exact order."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from reid_files import write_person, write_reid
from torch import nn

from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import METHODS, Refresh
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.tasks.open import open_task
from wellcond.lab.tasks.reid.batches import erased, identity_order
from wellcond.lab.tasks.reid.images import (
    PersonImages,
    draw_identities,
    draw_persons,
    held_out_surplus,
    make_search,
    read_persons,
)
from wellcond.lab.tasks.reid.networks import (
    Judged,
    build_reid,
    hardest_triplets,
    move_centers,
    reid_loss,
)
from wellcond.lab.tasks.reid.specs import REID_NETWORKS
from wellcond.lab.training.runner import Runner
from wellcond.runtime.ranks import Ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_reid(tmp_path_factory.mktemp("data") / "Market-1501")


@pytest.fixture(scope="module")
def plan(root):
    settings = Settings(
        data=str(root), methods=("AdamW", "W-Adam"), image_size=32, epochs=1, batch_size=8, validation_images=8, seeds=2
    )
    return make_plan(settings)


def seed_data(plan, **changes):
    spec = replace(plan.spec(plan.methods[0], 0.01, seed=0), **changes)
    return plan.task.for_seed(spec, CPU, 0, 1)


def persons(identities, cameras):
    """Return images without files."""
    from pathlib import Path

    names = tuple(Path(f"{number}.jpg") for number in range(len(identities)))
    return PersonImages(names, np.array(identities), np.array(cameras))


@pytest.mark.parametrize("duke", [False, True])
def test_names_tell_identity_and_camera(tmp_path, duke):
    root = write_reid(tmp_path / "data", train=1, test=1, each=2, duke=duke)
    gallery = read_persons(root / "bounding_box_test")
    # Junk, of identity -1, is left out; distractors, of identity 0, are kept.
    assert gallery.identities.tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert gallery.cameras.tolist() == [1, 1, 2, 1, 1, 2, 2]


def test_a_folder_of_the_layout_is_re_identification(plan):
    task = plan.task
    assert (task.kind, task.metric.name, task.name) == ("re-identification", "mAP", "Market-1501")
    # 8 persons of 6 images; 8 validate; of a person that is cut up to 5 are lost.
    assert (task.validation_images, task.train_images) == (8, 48 - 8 - 5)
    # 8 queries; 4 persons of 6 images and 3 distractors.
    assert task.test_images == 8 + 24 + 3
    assert 0 < task.chance < 50


def test_identities_are_drawn_whole_but_for_the_last():
    identities = np.repeat([1, 2, 3, 4, 5], 6)
    for seed in range(5):
        drawn = draw_identities(identities, 15, seed)
        counts = np.unique(identities[drawn], return_counts=True)[1]
        assert sorted(counts.tolist()) == [3, 6, 6]
    assert any(
        set(identities[draw_identities(identities, 6, seed)]) != set(identities[draw_identities(identities, 6, 0)])
        for seed in range(5)
    )
    # Each distractor stands for itself: were they one person, all four or none would be drawn, but for a last one.
    mixed = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    assert {int((mixed[draw_identities(mixed, 6, seed)] == 0).sum()) for seed in range(20)} >= {2, 3}


@pytest.mark.parametrize("seed", range(4))
def test_who_validates_does_not_train(seed):
    pool = persons(np.repeat(np.arange(1, 9), 6), np.tile([1, 1, 1, 2, 2, 2], 8))
    surplus = held_out_surplus(pool.identities)
    assert surplus == 5
    split = draw_persons(pool, 48 - 8 - surplus, 8, seed)
    asked, searched = split.validation.query, split.validation.gallery
    assert len(split.train) == 35
    assert len(asked) + len(searched) == 8
    assert not set(split.train.identities) & {*asked.identities, *searched.identities}


def test_a_search_asks_once_for_each_person_and_camera_that_can_be_matched():
    images = persons([1, 1, 1, 1, 2, 2, 3], [1, 1, 2, 2, 1, 1, 1])
    for seed in range(5):
        search = make_search(images, seed)
        assert sorted(zip(search.query.identities.tolist(), search.query.cameras.tolist(), strict=True)) == [
            (1, 1),
            (1, 2),
        ]
        assert len(search.gallery) == 5
        assert not set(search.query.files) & set(search.gallery.files)


def test_batches_have_k_images_of_each_of_p_persons():
    labels = np.repeat(np.arange(6), [9, 8, 3, 4, 4, 12])
    batches = identity_order(labels, 3, seed=0, epoch=2)
    assert len(batches) == 40 // 12
    for batch in batches:
        assert len(batch) == 12
        blocks = labels[np.array(batch)].reshape(3, 4)
        assert (blocks == blocks[:, :1]).all()
        assert len(set(blocks[:, 0])) == 3
    assert batches == identity_order(labels, 3, seed=0, epoch=2)
    assert batches != identity_order(labels, 3, seed=0, epoch=3)


def test_an_image_is_dealt_once_before_it_is_dealt_again():
    labels = np.repeat(np.arange(4), 8)
    for epoch in range(5):
        batches = identity_order(labels, 4, seed=0, epoch=epoch)
        assert sorted(image for batch in batches for image in batch) == list(range(32))


def test_order_and_augmentation_resume_exactly(plan):
    data = seed_data(plan)
    whole = data.batches()
    assert len(whole) == 35 // 8
    first, second = list(whole), list(whole)
    resumed = data.batches()
    resumed.resume_at(1, 2)
    rest = list(resumed)
    assert len(rest) == 2
    for one, other in zip(rest, second[2:], strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert not torch.equal(first[0].images, second[0].images)
    assert first[0].images.shape == (8, 3, 32, 16)


def test_ranks_share_the_persons_of_each_batch(plan):
    spec = plan.spec(plan.methods[0], 0.01, seed=0)
    whole = list(plan.task.for_seed(spec, CPU, 0, 1).batches())
    data = [plan.task.for_seed(spec, CPU, rank, 2) for rank in range(2)]
    for batch, left, right in zip(whole, *(part.batches() for part in data), strict=True):
        assert torch.equal(torch.cat([left.images, right.images]), batch.images)
        assert len(left.labels.unique()) == 1
    with pytest.raises(LabError, match="must be a multiple of the 3 processes"):
        plan.task.for_seed(spec, CPU, 0, 3)


def test_erasing_paints_a_rectangle_of_the_mean_colour():
    pixels = torch.ones(3, 64, 32, dtype=torch.uint8)
    for seed in range(20):
        after = erased(pixels, np.random.default_rng(seed))
        painted = after[0] == 124
        assert ((after == torch.tensor([124, 116, 104])[:, None, None]).all(dim=0) == painted).all()
        rows, columns = painted.any(dim=1).nonzero()[:, 0], painted.any(dim=0).nonzero()[:, 0]
        assert painted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        share = float(painted.double().mean())
        assert share == pytest.approx(len(rows) * len(columns) / (64 * 32))
        assert 0.015 < share < 0.43  # sides are whole pixels
    assert (pixels == 1).all()


def test_triplets_are_the_hardest_of_each_image():
    features = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) // 4
    losses = []
    for own in range(12):
        distances = [float((features[own] - features[other]).norm()) for other in range(12)]
        same = max(distances[other] for other in range(12) if labels[other] == labels[own])
        nearest = min(distances[other] for other in range(12) if labels[other] != labels[own])
        losses.append(max(0.0, 0.3 + same - nearest))
    assert float(hardest_triplets(features, labels)) == pytest.approx(np.mean(losses))
    twins = torch.zeros(4, 2, requires_grad=True)
    hardest_triplets(twins, torch.tensor([0, 0, 1, 1])).backward()
    assert twins.grad.isfinite().all()


def test_centers_take_steps_of_sgd_on_the_mean_squared_distance():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(4, 3, generator=generator)
    features, labels = torch.randn(6, 3, generator=generator), torch.tensor([0, 0, 1, 1, 1, 3])
    parameter = nn.Parameter(centers.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    (features - parameter[labels]).square().sum(dim=1).mean().backward()
    optimizer.step()
    move_centers(centers, features, labels)
    torch.testing.assert_close(centers, parameter.detach())


def test_the_loss_is_the_sum_of_its_three_parts():
    generator = torch.Generator().manual_seed(0)
    features, logits = torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)
    labels = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2])
    centers = torch.randn(3, 5, generator=generator)
    targets = torch.full((8, 3), 0.1 / 3)
    targets[torch.arange(8), labels] += 0.9
    identity = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
    center = sum(float((features[i] - centers[labels[i]]).square().sum()) for i in range(8)) / 8
    expected = float(identity + hardest_triplets(features, labels)) + 0.0005 * center
    assert float(reid_loss(Judged(features, logits), labels, centers, Ranks(False))) == pytest.approx(
        expected, rel=1e-5
    )


def test_the_network_keeps_the_last_size_and_has_a_neck_without_shift():
    network = build_reid(REID_NETWORKS["reid-r18"], 7, None)
    assert network.trunk(torch.zeros(1, 3, 64, 32)).shape == (1, 512, 4, 2)
    assert network.classifier.bias is None
    assert not network.neck.bias.requires_grad
    with torch.device("meta"):
        large = build_reid(REID_NETWORKS["reid-r50"], 751, None)
    assert large.trunk(torch.zeros(2, 3, 256, 128, device="meta")).shape == (2, 2048, 16, 8)
    assert large(torch.zeros(2, 3, 256, 128, device="meta")).logits.shape == (2, 751)


def test_classes_are_the_identities_that_train(plan):
    for seed in range(2):
        network = plan.task.initial_model("reid-tiny", seed, None)
        labels = torch.cat([batch.labels for batch in seed_data(plan, seed=seed).batches()])
        assert int(labels.max()) < network.classifier.out_features
        assert network.classifier.out_features == len(set(plan.task.split(seed).train.identities))


@pytest.mark.parametrize("method", ["W-Adam", "AdamW+GC", "BSR"])
def test_methods_train(plan, method):
    data = seed_data(plan)
    network = METHODS[method].with_layers(plan.task.initial_model("reid-tiny", 0, None)).train()
    optimizer, _ = METHODS[method].build(network, 1e-3, Refresh(1, 2))
    centers = network.centers.clone()
    for batch in data.batches():
        optimizer.zero_grad()
        loss = data.loss(network, batch)
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert not torch.equal(centers, network.centers)
    with torch.no_grad():
        evaluation = data.evaluate(network.eval(), "validation", Stopwatch(CPU))
    assert 0 < evaluation.score <= 100
    assert evaluation.images == 8


def test_features_of_the_colours_find_everyone(plan):
    class Colours(nn.Module):
        def forward(self, images):
            rows = images.mean(dim=3).flatten(1)
            return rows - rows.mean(dim=1, keepdim=True)

    evaluation = seed_data(plan).evaluate(Colours(), "test", Stopwatch(CPU))
    assert evaluation.score == pytest.approx(100.0)
    assert evaluation.loss is None
    assert evaluation.images == plan.task.test_images
    assert evaluation.metrics == {"rank-1": 100.0, "rank-5": 100.0, "rank-10": 100.0}


def test_features_that_are_not_finite_have_no_score(plan):
    network = plan.task.initial_model("reid-tiny", 0, None).eval()
    with torch.no_grad():
        network.neck.weight.fill_(torch.inf)
        assert np.isnan(seed_data(plan).evaluate(network, "test", Stopwatch(CPU)).score)


def test_a_run_is_the_same_twice(plan):
    spec = plan.spec(METHODS["W-Adam"], 1e-3, seed=0)
    first, again = (Runner(copy.copy(plan.task), CPU).run(spec) for _ in range(2))
    assert not first.diverged
    assert first.epochs[0].test_loss is None
    assert replace(first.epochs[0], seconds=0.0) == replace(again.epochs[0], seconds=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "reid-r51"}, "did you mean 'reid-r50'"),
        ({"augmentation": "erase"}, "unknown augmentation"),
        ({"batch_size": 10}, "--batch-size must be 4 times the identities"),
        ({"batch_size": 48}, "--batch-size must be 4 times the identities"),
        ({"train_images": 40, "validation_images": 8}, "--train-images 40: there are 43 images"),
        ({"test_images": 100}, "--test-images must be at most 35"),
        ({"test_images": 1}, "no person is seen by two cameras"),
        ({"validation_images": 1}, "no person is seen by two cameras"),
    ],
)
def test_what_does_not_fit_is_refused(root, changes, message):
    with pytest.raises(LabError, match=message):
        open_task(Settings(data=str(root), **changes))


def test_missing_parts_are_told_with_where_they_come_from(tmp_path):
    with pytest.raises(LabError, match=r"DukeMTMC-reID: there is no such folder.*bounding_box_train"):
        open_task(Settings(data=str(tmp_path / "DukeMTMC-reID")))
    write_person(tmp_path / "x" / "query", 1, 1, 1)
    with pytest.raises(LabError, match=r"needs a folder bounding_box_train.*download Market-1501"):
        open_task(Settings(data=str(tmp_path / "x")))
    write_person(tmp_path / "x" / "bounding_box_train", 1, 1, 1)
    (tmp_path / "x" / "bounding_box_train" / "portrait.jpg").touch()
    with pytest.raises(LabError, match=r"portrait\.jpg: names must begin as 0002_c1"):
        open_task(Settings(data=str(tmp_path / "x")))
