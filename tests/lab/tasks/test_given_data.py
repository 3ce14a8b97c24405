"""What the tasks of `--data` share: images that are evaluated one by one on several ranks, defaults by size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wellcond.lab.data.epoch_loader import Key
from wellcond.lab.data.epochs import Epochs
from wellcond.lab.tasks.base import Defaults, DefaultsBySize, Evaluation
from wellcond.lab.tasks.given_data import SplitSeed


class Seed(SplitSeed):
    """Evaluates nothing."""

    def batches(self) -> Epochs:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: object) -> torch.Tensor:
        raise NotImplementedError

    def evaluate(self, model: nn.Module, role: str, stopwatch: object) -> Evaluation:
        raise NotImplementedError


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_every_image_is_evaluated_once_in_as_many_passes_on_every_rank(count: int, ranks: int) -> None:
    images = [10 + place for place in range(count)]
    shares = [Seed(None, None, None, torch.device("cpu"), rank, ranks).one_by_one(images) for rank in range(ranks)]
    assert sorted(image for own, _ in shares for image in own) == images
    assert len({len(keys) for _, keys in shares}) == 1
    for own, keys in shares:
        assert keys[: len(own)] == [[Key(image, 0)] for image in own]
        assert all(key == [Key(10, 0)] for key in keys[len(own) :])


def test_defaults_are_those_of_the_size() -> None:
    small, large = Defaults("a", 1, 2), Defaults("b", 3, 4)
    by_size = DefaultsBySize(small, large, least=10)
    assert [by_size.of(samples) for samples in (0, 9, 10, 11)] == [small, small, large, large]
