"""CIFAR-10 and CIFAR-100 as their site gives them out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from image_sets import write_cifar

from wellcond.lab.data.load import load_data
from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import METHODS
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.settings import Settings
from wellcond.lab.training.runner import Runner


@pytest.mark.parametrize("inside", [True, False])
def test_cifar_10_is_five_batches_and_a_test_batch(tmp_path, inside):
    written = write_cifar(tmp_path, classes=10)
    data = load_data(str(tmp_path / "cifar-10-batches-py" if inside else tmp_path), None, None)
    assert data.name == "cifar-10"
    assert np.array_equal(data.pool.images, np.concatenate([written[f"data_batch_{n}"] for n in range(1, 6)]))
    assert np.array_equal(data.test.images, written["test_batch"])
    assert data.pool.labels.tolist() == [n % 10 for n in range(12)] * 5
    assert data.pool.classes == tuple(f"class {n}" for n in range(10))


def test_cifar_100_has_its_fine_classes(tmp_path):
    written = write_cifar(tmp_path, classes=100, count=120)
    data = load_data(str(tmp_path), 16, test_images=20)
    assert data.name == "cifar-100"
    assert len(data.pool.classes) == 100
    assert data.pool.labels.tolist() == [n % 100 for n in range(120)]
    assert data.size == (16, 16)
    expected = written["train"].reshape(120, 3, 16, 2, 16, 2).mean(axis=(3, 5))
    assert np.array_equal(data.pool.images, np.round(expected))
    assert len(data.test.labels) == 20


def test_both_at_once_are_refused(tmp_path):
    write_cifar(tmp_path, 10)
    write_cifar(tmp_path, 100)
    with pytest.raises(LabError, match="holds both cifar-10-batches-py and cifar-100-python; name one of them"):
        load_data(str(tmp_path), None, None)


def test_missing_and_damaged_files(tmp_path):
    write_cifar(tmp_path, 10)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "data_batch_3").write_bytes(b"\x80\x04 cut off")
    with pytest.raises(
        LabError, match=r"cifar-10-batches-py: damaged or not CIFAR's .*unpack https://.*-python.tar.gz"
    ):
        load_data(str(tmp_path), None, None)
    (folder / "data_batch_3").unlink()
    with pytest.raises(LabError, match=r"cifar-10-batches-py: data_batch_3 is missing; unpack https://"):
        load_data(str(tmp_path), None, None)


def test_a_run(tmp_path):
    write_cifar(tmp_path, 10)
    plan = make_plan(Settings(data=str(tmp_path), epochs=1, batch_size=20, seeds=1, model="convnet"))
    assert (plan.task.train_images, plan.task.validation_images, plan.task.test_images) == (54, 6, 12)
    assert plan.task.augmentation == "crop-flip"
    record = Runner(plan.task, torch.device("cpu")).run(plan.spec(METHODS["SGDM"], 0.1, seed=0))
    assert [epoch.steps for epoch in record.epochs] == [2]
    assert record.epochs[0].metrics.keys() == {"top-5"}
