"""Streamed images: the formats, what a view depends on, and that processes, ranks and interruptions change nothing."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_sets import pixels, write_aircraft, write_cars, write_class_folders, write_cub, write_dogs, write_image
from PIL import Image

from wellcond.lab.data.fine_grained import FINE_GRAINED
from wellcond.lab.data.image_files import find_class_folders, read_class_folders
from wellcond.lab.data.splits import draw_split
from wellcond.lab.data.streams import StreamedBatches, evaluation_stream, loading_processes
from wellcond.lab.data.views import EvaluationViews, Pictures, TrainingViews, evaluation_view, training_view
from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import METHODS
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.tasks.folders import FolderTask
from wellcond.lab.tasks.open import open_task
from wellcond.lab.training.runner import Runner

CPU = torch.device("cpu")
SIZE = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("folders") / "shades")


@pytest.fixture(scope="module")
def data(root):
    return read_class_folders(str(root), *find_class_folders(root))


@pytest.fixture(scope="module")
def pool(data):
    return Pictures(data.pool)


def listing(part):
    return [(os.fsdecode(file), int(label)) for file, label in zip(part.files, part.labels, strict=True)]


def make_batches(pool, seed=0, workers=0, rank=0, ranks=1, positions=None, augmentation="crop-flip", crop="area"):
    view = training_view(crop, augmentation, SIZE)
    chosen = np.arange(len(pool.files.labels)) if positions is None else positions
    return StreamedBatches(TrainingViews(pool, view, seed), chosen, 5, SIZE, CPU, workers, rank, ranks)


def same(some, others):
    some, others = list(some), list(others)
    return len(some) == len(others) and all(
        torch.equal(a, b) for one, other in zip(some, others, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_class_folders_are_listed_with_their_roles(data):
    train = listing(data.pool)
    assert len(train) == 24
    assert ("n00/train_0.png", 0) in train
    assert ("n02/train_7.JPEG", 2) in train
    assert len(listing(data.test)) == 9
    assert all("val_" in name for name, _ in listing(data.test))
    assert data.pool.classes == ("n00", "n01", "n02")


@pytest.mark.parametrize("change", ["class missing", "class empty", "no classes"])
def test_class_folders_that_do_not_fit(tmp_path, change):
    root = write_class_folders(tmp_path, train=2, val=1)
    if change == "class missing":
        (root / "val" / "n01").rename(root / "val" / "n09")
        message = "train and val must hold the same class folders, but only one of them has n01, n09"
    elif change == "class empty":
        for file in (root / "train" / "n01").iterdir():
            file.unlink()
        message = "train must hold a folder of images a class: .*n01"
    else:  # ImageNet's validation images as they are given out
        for file in [*(root / "val").glob("*/*")]:
            file.rename(root / "val" / f"{file.parent.name}{file.name}")
        for folder in [*(root / "val").glob("n*[0-9]")]:
            folder.rmdir()
        message = "val must hold a folder of images a class: "
    with pytest.raises(LabError, match=message):
        read_class_folders(str(root), *find_class_folders(root))


@pytest.mark.parametrize(
    ("write", "name", "first", "roles"),
    [
        (write_cub, "cub-200-2011", "001.Bird_0/Bird_0.jpg", (18, 6)),
        (write_cars, "stanford-cars", "cars_train/00001.jpg", (18, 9)),
        (write_aircraft, "fgvc-aircraft", "data/images/0000000.jpg", (18, 6)),
        (write_dogs, "stanford-dogs", "n02080-Breed/n02080_0.jpg", (18, 6)),
        (lambda path: write_dogs(path, lists="."), "stanford-dogs", "n02080-Breed/n02080_0.jpg", (18, 6)),
    ],
)
def test_fine_grained_lists(tmp_path, write, name, first, roles):
    folder = write(tmp_path)
    kind = next(kind for kind in FINE_GRAINED if kind.name == name and kind.find(folder))
    assert kind.find(tmp_path) == folder
    data = kind.open(folder)
    assert (len(data.pool.labels), len(data.test.labels)) == roles
    assert listing(data.pool)[0] == (first, 0)
    assert not {data.pool.path(n) for n in range(roles[0])} & {data.test.path(n) for n in range(roles[1])}
    # The class is what the image shows: a JPEG's brightness is its class.
    for part in (data.pool, data.test):
        shown = [np.asarray(Image.open(part.path(n))).mean() for n in range(len(part.labels))]
        assert np.array_equal(np.round((np.array(shown) - 25) / 50), part.labels)
    assert data.crop == "position"


def test_damaged_lists_are_told(tmp_path):
    folder = write_cub(tmp_path)
    (folder / "train_test_split.txt").write_text("1 1\n")
    kind = FINE_GRAINED[0]
    with pytest.raises(LabError, match="lists of cub-200-2011 are missing or damaged"):
        kind.open(folder)
    (folder / "image_class_labels.txt").unlink()
    with pytest.raises(LabError, match=r"lists of cub-200-2011 .*image_class_labels\.txt"):
        kind.open(folder)


def test_pictures_are_the_files_pixels_kept_or_not(data):
    kept, streamed = Pictures(data.pool), Pictures(data.pool, keep=False)
    assert kept.in_memory
    assert not streamed.in_memory
    for position in (0, 5, 23):
        assert torch.equal(kept[position], streamed[position])
    name, label = listing(data.pool)[0]
    assert name.endswith("0.png")
    assert torch.equal(kept[0], torch.from_numpy(pixels(label, 0, width=40)).permute(2, 0, 1))


def test_grey_images_become_rgb_and_broken_ones_are_named(tmp_path):
    root = write_class_folders(tmp_path, train=2, val=1)
    Image.fromarray(np.full((20, 20), 7, np.uint8)).save(root / "train" / "n00" / "train_0.png")
    (root / "train" / "n00" / "train_1.JPEG").write_bytes(b"no image")
    data = read_class_folders(str(root), *find_class_folders(root))
    streamed = Pictures(data.pool, keep=False)
    assert torch.equal(streamed[0], torch.full((3, 20, 20), 7))
    with pytest.raises(LabError, match=r"train_1\.JPEG cannot be decoded"):
        Pictures(data.pool)
    views = EvaluationViews(streamed, evaluation_view(SIZE))
    for workers in (0, 1):
        with pytest.raises(LabError, match=r"^--data: .*train_1\.JPEG cannot be decoded$"):
            list(evaluation_stream(views, np.array([0, 1]), 2, SIZE, CPU, workers))


def test_the_evaluation_sees_the_centre_at_eight_sevenths(tmp_path):
    # The shorter side of 16 is right already, so only the centre's 14×14 are cut out.
    write_image(tmp_path / "image.png", 0, seed=3, height=16, width=24)
    image = torch.from_numpy(pixels(0, 3, 16, 24)).permute(2, 0, 1)
    assert torch.equal(evaluation_view(14)(image), image[:, 1:15, 5:19])


@pytest.mark.parametrize("crop", ["area", "position"])
@pytest.mark.parametrize("augmentation", ["none", "flip", "crop-flip"])
def test_training_views(crop, augmentation):
    image = torch.from_numpy(pixels(1, 3, 16, 24)).permute(2, 0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        views = [training_view(crop, augmentation, 14)(image) for _ in range(64)]
    assert all(view.shape == (3, 14, 14) and view.dtype == torch.uint8 for view in views)
    centre = image[:, 1:15, 5:19]
    allowed = {"none": [centre], "flip": [centre, centre.flip(2)]}.get(augmentation)
    if allowed is None and crop == "position":  # every place of 14×14 in 16×24, mirrored or not
        places = [image[:, top : top + 14, left : left + 14] for top in range(3) for left in range(11)]
        allowed = places + [place.flip(2) for place in places]
    if allowed is not None:
        hits = [[index for index, place in enumerate(allowed) if torch.equal(view, place)] for view in views]
        assert all(hits)
        assert len({hit[0] for hit in hits}) == len(allowed) if len(allowed) < 3 else len({h[0] for h in hits}) > 20
    else:
        assert len({view.numpy().tobytes() for view in views}) > 60


def test_an_epoch_is_every_whole_batch_of_the_positions_once(pool):
    positions = np.arange(2, 22)
    batches = make_batches(pool, positions=positions)
    assert len(batches) == 4
    labels = torch.cat([labels for _, labels in batches])
    assert sorted(labels.tolist()) == sorted(pool.files.labels[positions].tolist())
    images, _ = next(iter(batches))
    assert images.shape == (5, 3, SIZE, SIZE)
    assert images.dtype == torch.float32


def test_images_are_normalized_by_imagenets_moments(data, pool):
    views = EvaluationViews(pool, evaluation_view(SIZE))
    (images, labels), *rest = evaluation_stream(views, np.array([3, 1]), 2, SIZE, CPU, 0)
    assert not rest
    assert labels.tolist() == [int(data.pool.labels[3]), int(data.pool.labels[1])]
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    expected = (evaluation_view(SIZE)(pool[3]).double() / 255 - mean) / std
    torch.testing.assert_close(images[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_order_and_views_hang_on_seed_and_epoch_alone(pool):
    before = torch.random.get_rng_state()
    batches = make_batches(pool)
    first, second = list(batches), list(batches)
    assert batches.epoch == 2
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    again = make_batches(pool)
    assert same(first, again)
    assert same(second, again)
    assert not same(first, second)
    assert not same(first, make_batches(pool, seed=1))


def test_processes_and_memory_change_nothing(data, pool):
    streamed = make_batches(Pictures(data.pool, keep=False), workers=2)
    here = make_batches(pool)
    for _ in range(2):
        assert same(here, streamed)
    # Also after an epoch that was given up in the middle.
    next(iter(streamed))
    here.resume_at(3, 0)
    assert same(here, streamed)


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_batches_are_those_that_were_missed(pool, workers):
    whole = make_batches(pool)
    epochs = [list(whole) for _ in range(3)]
    resumed = make_batches(pool, workers=workers)
    resumed.resume_at(1, 3)
    assert same(resumed, epochs[1][3:])
    assert same(resumed, epochs[2])
    resumed.resume_at(0, 4)
    assert list(resumed) == []
    with pytest.raises(ValueError, match="batch must be between 0 and 4, got 5"):
        resumed.resume_at(0, 5)


def test_ranks_share_each_batch(pool):
    whole = list(make_batches(pool))
    shares = [list(make_batches(pool, rank=rank, ranks=2)) for rank in range(2)]
    for batch, first, second in zip(whole, *shares, strict=True):
        for one, a, b in zip(batch, first, second, strict=True):
            assert torch.equal(one[:2], a)
            assert torch.equal(one[2:], b)


def test_ranks_evaluate_equally_many_batches_and_every_image_once(pool):
    views = EvaluationViews(pool, evaluation_view(SIZE))
    positions = np.arange(16)
    whole = list(evaluation_stream(views, positions, 5, SIZE, CPU, 0))
    shares = [list(evaluation_stream(views, positions, 5, SIZE, CPU, 0, rank, 2)) for rank in range(2)]
    assert [len(share) for share in shares] == [4, 4]
    assert [len(labels) for _, labels in shares[1]] == [2, 2, 2, 0]  # the last batch has one image
    for batch, first, second in zip(whole, *shares, strict=True):
        assert torch.equal(batch[0][0::2], first[0])
        assert torch.equal(batch[0][1::2], second[0])
    assert shares[1][-1][0].shape == (0, 3, SIZE, SIZE)


@pytest.fixture(scope="module")
def plan(root):
    settings = Settings(data=str(root), image_size=SIZE, model="convnet", batch_size=5, validation_images=9, seeds=1)
    plan = make_plan(replace(settings, epochs=1, methods=("SGDM",)))
    plan.task.workers = 0
    return plan


def test_test_images_never_select(data, plan):
    assert (plan.task.train_images, plan.task.validation_images, plan.task.test_images) == (15, 9, 9)
    drawn = plan.task.for_seed(replace(plan.template, seed=3), CPU, 0, 1).split
    expected = draw_split(data.pool.labels, 15, 9, seed=3)
    assert np.array_equal(drawn.train, expected.train)
    assert np.array_equal(drawn.validation, expected.validation)
    assert listing(plan.task.test.files) == listing(data.test)


class Brightness(torch.nn.Module):
    """Knows the classes, which are shades, from the mean before normalization; of class 2 it says 0."""

    def forward(self, images):
        mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
        std = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
        shade = ((images * std + mean).mean(dim=(1, 2, 3)) - 25) / 50
        return 20.0 * torch.nn.functional.one_hot(shade.round().long() % 2, 3).float()


@pytest.mark.parametrize("role", ["validation", "test"])
def test_evaluation_counts_what_the_network_says(plan, role):
    evaluation = plan.task.for_seed(plan.template, CPU, 0, 1).evaluate(Brightness(), role, Stopwatch(CPU))
    assert evaluation.images == 9  # three of each class
    assert evaluation.score == pytest.approx(100 * 2 / 3)
    # Sure of the right class two times in three, and otherwise of a wrong one by 20.
    assert evaluation.loss == pytest.approx(20 / 3, abs=1e-3)
    assert evaluation.metrics == {}  # of three classes all are among the first five


def test_the_fingerprint_sees_a_changed_file_a_class_and_the_size(tmp_path):
    def fingerprint(size=SIZE):
        data = read_class_folders(str(root), *find_class_folders(root))
        return FolderTask(data, 1, 1, "none", size).fingerprint()

    root = write_class_folders(tmp_path, train=2, val=1)
    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(size=24) != first
    write_image(root / "val" / "n00" / "val_0.png", 0, seed=1, height=9)
    second = fingerprint()
    assert second != first
    (root / "train" / "n00" / "train_0.png").rename(root / "train" / "n01" / "other.png")
    assert fingerprint() != second


@pytest.mark.parametrize("write", [write_class_folders, write_cub, write_cars, write_aircraft, write_dogs])
def test_a_run_of_each_format(tmp_path, write):
    write(tmp_path / "data")
    settings = Settings(
        data=str(tmp_path / "data"), image_size=SIZE, model="convnet", batch_size=8, epochs=1, methods=("W-SGDM",)
    )
    plan = make_plan(settings)
    plan.task.workers = 0
    spec = plan.spec(METHODS["W-SGDM"], METHODS["W-SGDM"].lrs[0], seed=0)
    record = Runner(plan.task, CPU).run(spec)
    assert [epoch.steps for epoch in record.epochs] == [plan.steps_per_epoch]
    assert not record.diverged
    assert plan.task.describe()["image_size"] == "16x16"


def test_a_run_is_the_same_whatever_the_processes(root):
    settings = Settings(data=str(root), image_size=SIZE, model="convnet", batch_size=8, epochs=2, methods=("SGDM",))
    plan = make_plan(settings)
    spec = plan.spec(METHODS["SGDM"], 0.1, seed=0)
    records = []
    for workers in (0, 1):
        plan.task.workers = workers
        record = Runner(plan.task, CPU).run(spec)
        records.append([replace(epoch, seconds=0.0) for epoch in record.epochs])
    assert records[0] == records[1]


def test_numbers_that_do_not_fit(root):
    settings = Settings(data=str(root), image_size=SIZE, model="convnet", batch_size=8, methods=("SGDM",))
    with pytest.raises(LabError, match="--train-images 30: there are 24 images besides the test images"):
        make_plan(replace(settings, train_images=30))
    with pytest.raises(LabError, match="--test-images 10: .*shades has 9 images, of which at most 9 can test"):
        make_plan(replace(settings, test_images=10))
    assert make_plan(replace(settings, test_images=6)).task.test_images == 6
    with pytest.raises(LabError, match="model resnet18 needs images of at least 16x16, got 8x8"):
        make_plan(replace(settings, image_size=8, model="resnet18"))
    with pytest.raises(LabError, match="unknown augmentation 'cutout'"):
        make_plan(replace(settings, augmentation="cutout"))


def test_defaults_are_those_of_imagenet_for_data_of_its_size(data):
    task = open_task(Settings(data=str(data.pool.root.parent)))
    assert (task.image_size, task.defaults.model) == (224, "torchvision:resnet18")
    large = replace(data, pool=data.pool.take(np.zeros(100_000, dtype=np.int64)))
    defaults = FolderTask(large, 1, 1, "none").defaults
    assert (defaults.model, defaults.epochs, defaults.batch_size) == ("torchvision:resnet50", 100, 256)


def test_large_data_is_not_kept_in_memory(data, monkeypatch):
    many = data.pool.take(np.zeros(100_001, dtype=np.int64))
    assert not Pictures(many).in_memory
    monkeypatch.setattr("wellcond.lab.data.views._MOST_BYTES", 1000)
    assert not Pictures(data.pool).in_memory


def test_processes_are_the_cores_that_training_leaves(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert loading_processes() == 7
    assert loading_processes(jobs=4) == 1
    assert loading_processes(jobs=8) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert loading_processes() == 16
