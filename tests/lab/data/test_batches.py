"""Batches: order and augmentation follow from the seed, and pixels end up where they should."""

from __future__ import annotations

import pytest
import torch

import wellcond.lab.data.batches
from wellcond.lab.data.batches import TrainingBatches, augment, channel_moments, evaluation_batches

IDENTITY = (torch.zeros(3, 1, 1), torch.ones(3, 1, 1))


def images(count=10, size=8):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batches(seed, augmentation="none"):
    return TrainingBatches(images(), torch.arange(10), IDENTITY, 4, augmentation, seed)


def test_moments_are_those_of_all_pixels():
    data = images(50)
    mean, std = channel_moments(data)
    pixels = data.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.flatten().double(), pixels.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(std.flatten().double(), pixels.std(1, correction=0), rtol=1e-6, atol=0)


def test_a_constant_channel_is_not_divided_by_zero():
    assert channel_moments(torch.full((2, 1, 4, 4), 7, dtype=torch.uint8))[1].item() == 1.0


def test_an_epoch_shows_each_image_at_most_once_and_drops_the_incomplete_batch():
    stream = batches(0)
    assert len(stream) == 2
    epoch = list(stream)
    labels = torch.cat([labels for _, labels in epoch])
    assert len(labels) == len(set(labels.tolist())) == 8
    for some_images, some_labels in epoch:
        assert torch.equal(some_images, images()[some_labels].float())


@pytest.mark.parametrize("augmentation", ["none", "flip", "crop-flip"])
def test_the_seed_decides_every_epoch(augmentation):
    first, again, other = batches(0, augmentation), batches(0, augmentation), batches(1, augmentation)
    epochs = [torch.cat([x for x, _ in stream]) for stream in (first, again, first, again, other)]
    assert torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[2], epochs[3])
    assert not torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[4])


def test_flip_mirrors_about_half():
    data = images(200)
    flipped = augment(data, "flip", torch.Generator().manual_seed(1))
    mirrored = torch.tensor([torch.equal(new, old.flip(2)) for new, old in zip(flipped, data, strict=True)])
    kept = torch.tensor([torch.equal(new, old) for new, old in zip(flipped, data, strict=True)])
    assert (mirrored ^ kept).all()
    assert 70 < mirrored.sum() < 130


def test_crop_shifts_by_at_most_an_eighth_and_fills_with_black():
    data = images(40, size=16)
    padded = torch.nn.functional.pad(data, (2, 2, 2, 2))
    for new, source in zip(augment(data, "crop-flip", torch.Generator().manual_seed(1)), padded, strict=True):
        windows = [source[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
        assert any(torch.equal(new, window) or torch.equal(new, window.flip(2)) for window in windows)


@pytest.mark.parametrize("augmentation", ["none", "flip", "crop-flip"])
@pytest.mark.parametrize(("epoch", "batch"), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (0, 2)])
def test_a_resumed_stream_goes_on_as_if_not_interrupted(augmentation, epoch, batch):
    whole, resumed = batches(3, augmentation), batches(3, augmentation)
    epochs = [list(whole) for _ in range(4)]
    resumed.resume_at(epoch, batch)
    rest = list(resumed)
    assert resumed.epoch == epoch + 1
    following = list(resumed)
    for seen, expected in ((rest, epochs[epoch][batch:]), (following, epochs[epoch + 1])):
        assert len(seen) == len(expected)
        for (images, labels), (their_images, their_labels) in zip(seen, expected, strict=True):
            assert torch.equal(images, their_images)
            assert torch.equal(labels, their_labels)


def test_a_resumed_stream_touches_no_image_of_a_skipped_batch(monkeypatch):
    taken = []
    original = wellcond.lab.data.batches.move_pixels
    monkeypatch.setattr("wellcond.lab.data.batches.move_pixels", lambda *a: taken.append(len(a[0])) or original(*a))
    stream = batches(0, "flip")
    stream.resume_at(0, 1)
    list(stream)
    assert taken == [4]


@pytest.mark.parametrize("batch", [-1, 3])
def test_a_batch_that_an_epoch_does_not_have_is_refused(batch):
    with pytest.raises(ValueError, match=f"batch must be between 0 and 2, got {batch}"):
        batches(0).resume_at(0, batch)


@pytest.mark.parametrize("augmentation", ["none", "crop-flip"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_each_batch(augmentation, ranks):
    def stream(rank, ranks):
        return TrainingBatches(images(), torch.arange(10), IDENTITY, 4, augmentation, 0, rank, ranks)

    shares = [list(stream(rank, ranks)) for rank in range(ranks)]
    for index, (whole, labels) in enumerate(stream(0, 1)):
        for rank in range(ranks):
            own = slice(4 * rank // ranks, 4 * (rank + 1) // ranks)
            assert torch.equal(shares[rank][index][0], whole[own])
            assert torch.equal(shares[rank][index][1], labels[own])
        assert torch.equal(torch.cat([share[index][1] for share in shares]), labels)


def test_evaluation_shows_every_image_once_in_order():
    data = images(1001)
    mean, std = channel_moments(data)
    parts = list(evaluation_batches(data, torch.arange(1001), (mean, std)))
    assert torch.equal(torch.cat([labels for _, labels in parts]), torch.arange(1001))
    torch.testing.assert_close(torch.cat([x for x, _ in parts]), (data.float() - mean) / std)
