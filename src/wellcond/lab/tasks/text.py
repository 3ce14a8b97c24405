"""Language modelling of a text file, by characters or bytes: a small GPT predicts the next one."""

from __future__ import annotations

import logging
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wellcond.lab.data.splits import derived_seed
from wellcond.lab.data.text import Text, read_text
from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import TEXT_METHODS
from wellcond.lab.networks.gpt import Gpt, select_gpt
from wellcond.lab.networks.gpt_specs import GPTS
from wellcond.lab.networks.weights import load_weights
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.training_options import SeedSpec
from wellcond.lab.tasks.base import Defaults, Role
from wellcond.lab.tasks.given_data import DataTask
from wellcond.lab.tasks.objectives import NextToken
from wellcond.lab.tasks.rows import LabelledRows, RowsSeed

_logger = logging.getLogger(__name__)
# A run of minutes on two cores: a text of any length is seen in part in each epoch, and as a whole over them.
_EPOCHS = 6
_BATCH = 16
_MOST_TRAINING = 512
_MOST_HELD_OUT = 128
# Logits of evaluation that are in memory at once.
_MOST_LOGITS = 2**24
_FOR_IMAGES = {"--image-size": "image_size", "--augment": "augmentation", "--ghost-batch": "ghost_batch"}


class TextTask(DataTask):
    """A text, the first part of which trains, the next validates and the last tests.

    A sample is a block of characters, whose next ones are to be predicted; those of training begin anywhere.

    Args:
        text: The text.
        block: Characters of a block.
        train_images: Blocks that train in each epoch.
        validation_images: Blocks that choose the lr.
        test_images: Blocks that measure.
        batch_size: What suits it.
    """

    kind = "language modelling"
    samples = "blocks"
    augmentation = "none"

    def __init__(
        self, text: Text, block: int, train_images: int, validation_images: int, test_images: int, batch_size: int
    ) -> None:
        self.text, self.block = text, block
        self.train_images, self.validation_images, self.test_images = train_images, validation_images, test_images
        self.objective = NextToken(len(text.vocabulary), text.level)
        self.metric = self.objective.metric
        self.defaults = Defaults(next(iter(GPTS)), _EPOCHS, batch_size, smallest_batch=1, methods=TEXT_METHODS)
        self._on = lru_cache(maxsize=1)(self._on_device)

    @cached_property
    def name(self) -> str:
        """What the text is called."""
        return self.text.name

    def fingerprint(self) -> str:
        """Return a digest of the file, and of how it is read and parted."""
        return f"{self.text.digest}-{self.text.level}-{self.block}-{self.test_images}"

    def describe(self) -> dict[str, Any]:
        """Return how long the text is, and what it is made of."""
        level = self.text.level
        return {
            f"{level}s": len(self.text.tokens),
            f"different {level}s": len(self.text.vocabulary),
            "block": self.block,
            f"{level}s that train": self.trained_on,
        }

    @property
    def trained_on(self) -> int:
        """Tokens of the first part, which trains."""
        return len(self.text.tokens) - _held_out_tokens(self.block, self.validation_images, self.test_images)

    def network(self, model: str, seed: int, weights: str | None) -> nn.Module:
        """Return the network that a run begins with."""
        spec = select_gpt(model)
        if spec.block != self.block:
            raise LabError(
                f"model {model} sees blocks of {spec.block}, and the text is cut into blocks of {self.block}"
            )
        network = Gpt(spec, len(self.text.vocabulary))
        if weights is not None:
            load_weights(network, model, weights)
        return network

    def for_seed(self, spec: SeedSpec, device: torch.device, rank: int, ranks: int) -> RowsSeed:
        """Return the text on a device: parts are the same for every seed, order and beginnings are not."""
        training, held_out = self._on(device)
        rows = TextRows(training, self.block, spec.seed)
        piece = max(1, _MOST_LOGITS // (self.block * len(self.text.vocabulary)))
        return RowsSeed(rows, held_out, self.objective, spec, device, piece, rank, ranks)

    def _on_device(self, device: torch.device) -> tuple[Tensor, dict[Role, LabelledRows]]:
        tokens = torch.from_numpy(self.text.tokens.astype(np.int32)).to(device)
        test = self.test_images * self.block + 1
        validation = self.validation_images * self.block + 1
        first = len(tokens) - test - validation
        return tokens[:first], {
            "validation": blocks_of(tokens[first : first + validation], self.block),
            "test": blocks_of(tokens[first + validation :], self.block),
        }


class TextRows:
    """Blocks of the part that trains; where the first one begins is drawn for each epoch.

    Args:
        tokens: The part, [n].
        block: Tokens of a block.
        seed: What the beginnings are drawn from.
    """

    def __init__(self, tokens: Tensor, block: int, seed: int) -> None:
        self.tokens, self.block, self.seed = tokens, block, seed

    def __len__(self) -> int:
        return training_blocks(len(self.tokens), self.block)

    def take(self, positions: Tensor, epoch: int) -> LabelledRows:
        """Return the blocks at these positions, each with the tokens that follow."""
        begin = derived_seed(f"beginning of epoch {epoch}", self.seed) % self.block
        places = begin + positions[:, None] * self.block + torch.arange(self.block + 1, device=positions.device)
        taken = self.tokens[places].long()
        return LabelledRows(taken[:, :-1], taken[:, 1:])


def blocks_of(tokens: Tensor, block: int) -> LabelledRows:
    """Return a part as blocks, one after the other, with the token that follows each: all but the first count once.

    >>> rows = blocks_of(torch.arange(7), 3)
    >>> rows.inputs.tolist(), rows.targets.tolist()
    ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """
    taken = tokens.long().unfold(0, block + 1, block)
    return LabelledRows(taken[:, :-1].contiguous(), taken[:, 1:].contiguous())


def training_blocks(tokens: int, block: int) -> int:
    """Return how many blocks there are wherever the first begins, each followed by one more token."""
    return max(0, (tokens - block) // block)


def _held_out_tokens(block: int, validation: int, test: int) -> int:
    """Return the tokens that so many blocks that validate and that test take."""
    return (validation + test) * block + 2


def open_text(settings: Settings) -> TextTask:
    """Return the task of a text file.

    Raises:
        LabError: If the network is unknown, the file cannot be read, or it is too short for the numbers asked for.
    """
    path = Path(settings.data)
    spec = select_gpt(settings.model or next(iter(GPTS)))
    for option, name in _FOR_IMAGES.items():
        if getattr(settings, name) is not None:
            raise LabError(f"{option} is for images, and {path} is a text")
    text = read_text(path)
    if text.level == "byte":
        _logger.warning("--data %s: is not UTF-8, so its bytes are predicted, not its characters", path)
    length = len(text.tokens)
    # A tenth each, as far as evaluation does not take longer than training.
    share = max(1, min(_MOST_HELD_OUT, length // spec.block // 10))
    validation, test = settings.validation_images or share, settings.test_images or share
    there = training_blocks(length - _held_out_tokens(spec.block, validation, test), spec.block)
    train = settings.train_images or min(_MOST_TRAINING, max(1, there))
    if train > there:
        raise LabError(
            f"--data {path}: {length} {text.level}s are too few: {validation} blocks of {spec.block} that validate, "
            f"{test} that test and {train} that train need {_needed(spec.block, train, validation, test)}"
        )
    return TextTask(text, spec.block, train, validation, test, min(_BATCH, train))


def _needed(block: int, train: int, validation: int, test: int) -> int:
    """Return the tokens of the shortest text with so many blocks."""
    return (train + 1) * block + _held_out_tokens(block, validation, test)
