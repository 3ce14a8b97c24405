"""Classification and regression of tables' rows and of frozen features."""

from __future__ import annotations

import logging
import math
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wellcond.lab.data.batches import check_augmentation
from wellcond.lab.data.encoding import AUGMENTATIONS, encode, encoded_columns
from wellcond.lab.data.features import is_features, read_features
from wellcond.lab.data.splits import TEST_SEED, Indices, Split, derived_seed, draw_split, stratified_draw, without
from wellcond.lab.data.table_files import read_columns
from wellcond.lab.data.tables import KINDS, Table, make_table
from wellcond.lab.errors import LabError, unknown_name
from wellcond.lab.given_paths import short_name
from wellcond.lab.networks.mlp import Mlp, select_mlp
from wellcond.lab.networks.weights import load_weights
from wellcond.lab.runs.metric import Metric
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.training_options import SeedSpec
from wellcond.lab.tasks.base import Defaults, Role
from wellcond.lab.tasks.counts import count_images
from wellcond.lab.tasks.given_data import DataTask
from wellcond.lab.tasks.objectives import Classification, Objective, Regression
from wellcond.lab.tasks.rows import FixedRows, LabelledRows, RowsSeed

_logger = logging.getLogger(__name__)
# Chosen once: every comparison on the same data tests on the same rows.
_MOST_TEST = 10_000
_PIECE = 4096
# Steps of a run that suffice for a network of this size, and what keeps runs of few and of many rows short.
_STEPS, _FEWEST_EPOCHS, _MOST_EPOCHS = 400, 2, 40


class TableTask(DataTask):
    """A table whose rows of numbers and categories predict a class or a number.

    Args:
        table: The rows.
        test: Which of them measure.
        train_images: Rows that train in each seed.
        validation_images: Rows that choose the lr in each seed.
        augmentation: One of `AUGMENTATIONS`.
        model: The network that is used where nothing else is asked for.
    """

    samples = "rows"

    def __init__(
        self, table: Table, test: Indices, train_images: int, validation_images: int, augmentation: str, model: str
    ) -> None:
        self.table, self.test = table, test
        self.train_images, self.validation_images, self.test_images = train_images, validation_images, len(test)
        self.augmentation = augmentation
        self.kind = table.target.kind
        self.pool = without(len(table), test)
        self.defaults = _defaults(model, train_images)
        self._split = lru_cache(maxsize=1)(self._draw)

    @cached_property
    def name(self) -> str:
        """What the data is called."""
        return self.table.name

    @cached_property
    def metric(self) -> Metric:
        """The score that counts."""
        return self._objective(self.pool).metric

    @cached_property
    def chance(self) -> float:
        """The score of guessing: of the mean, where a number is to be told."""
        return self.metric.worst if self.metric.worst is not None else 100.0 / len(self.table.target.classes)

    def fingerprint(self) -> str:
        """Return a digest of every number, category and target, and of which rows test."""
        return f"{self.table.fingerprint()}-{self.kind}-{derived_seed(repr(self.test.tolist()), 0)}"

    def describe(self) -> dict[str, Any]:
        """Return what the columns are, and what was done with them."""
        table = self.table
        learned = {"classes": len(table.target.classes)} if table.target.classes else {}
        return {
            "target": table.target.name,
            **learned,
            "columns of numbers": table.numbers.shape[1],
            "columns of words": len(table.sizes),
            "numbers": "standardized by the rows that train" if self.augmentation != "none" else "as they are",
            **table.notes,
        }

    def network(self, model: str, seed: int, weights: str | None) -> nn.Module:
        """Return the network that a run begins with."""
        spec, layout = select_mlp(model), encoded_columns(self.table)
        network = Mlp(spec, layout.numbers, layout.sizes, max(1, len(self.table.target.classes)))
        if weights is not None:
            load_weights(network, model, weights)
        return network

    def for_seed(self, spec: SeedSpec, device: torch.device, rank: int, ranks: int) -> RowsSeed:
        """Return one seed's rows on a device."""
        drawn, encoded = self._split(spec.seed, spec.train_images, spec.validation_images)
        held_out: dict[Role, LabelledRows] = {
            "validation": self._rows(encoded, drawn.validation, device),
            "test": self._rows(encoded, self.test, device),
        }
        objective = self._objective(drawn.train, spec.label_smoothing)
        training = FixedRows(self._rows(encoded, drawn.train, device))
        return RowsSeed(training, held_out, objective, spec, device, _PIECE, rank, ranks)

    def _draw(self, seed: int, train: int, validation: int) -> tuple[Split, Tensor]:
        found = draw_split(self.table.target.labels[self.pool], train, validation, seed)
        drawn = Split(self.pool[found.train], self.pool[found.validation])
        return drawn, encode(self.table, drawn.train, standardize=self.augmentation != "none")

    def _rows(self, encoded: Tensor, rows: Indices, device: torch.device) -> LabelledRows:
        target = self.table.target
        targets = torch.from_numpy(target.labels[rows] if target.classes else target.numbers[rows])
        return LabelledRows(encoded[torch.from_numpy(rows)].to(device), targets.to(device))

    def _objective(self, train: Indices, smoothing: float = 0.0) -> Objective:
        target = self.table.target
        if target.classes:
            return Classification(len(target.classes), smoothing)
        numbers = target.numbers[train]
        errors = target.numbers[self.test] - target.numbers[self.pool].mean()
        return Regression(
            float(numbers.mean()), float(numbers.std()) or 1.0, math.sqrt(float(np.square(errors).mean()))
        )


def open_table(settings: Settings) -> TableTask:
    """Return the task of a CSV, parquet or numpy file.

    Raises:
        LabError: If a name is unknown, the data cannot be read, or the numbers do not fit it.
    """
    return _open(settings, "mlp-bn")


def open_features(settings: Settings) -> TableTask:
    """Return the task of a `.npz` file of frozen features.

    Raises:
        LabError: If a name is unknown, the data cannot be read, or the numbers do not fit it.
    """
    return _open(settings, "linear")


def _open(settings: Settings, model: str) -> TableTask:
    path = Path(settings.data)
    augmentation = check_augmentation(settings.augmentation or AUGMENTATIONS[0], AUGMENTATIONS)
    if settings.image_size is not None:
        raise LabError(f"--image-size is for images, and {path} has none")
    if settings.kind is not None and settings.kind not in KINDS:
        raise unknown_name("kind", settings.kind, KINDS)
    select_mlp(settings.model or model)
    name = short_name(path, "table")
    if is_features(path):
        if settings.target_column is not None:
            raise LabError(f"--target-column is for tables, and {path} has its targets in y")
        table = read_features(path, name, settings.kind)
    else:
        table = make_table(path, name, read_columns(path), settings.target_column, settings.kind)
    for about, note in table.notes.items():
        _logger.warning("--data %s: %s: %s", path, about, note)
    test = _draw_test(settings, table)
    train, validation = count_images(settings, len(table) - len(test), "rows besides the test rows")
    return TableTask(table, test, train, validation, augmentation, model)


def _draw_test(settings: Settings, table: Table) -> Indices:
    """Return the rows that test: the same ones for every seed and comparison."""
    wanted = settings.test_images
    if table.test is not None:
        if wanted is not None and wanted > len(table.test):
            raise LabError(f"--test-images must be at most {len(table.test)}, the rows of x_test, got {wanted}")
        if wanted is None or wanted == len(table.test):
            return table.test
        return table.test[stratified_draw(table.target.labels[table.test], wanted, TEST_SEED)]
    rows = len(table)
    wanted = max(1, min(rows // 5, _MOST_TEST)) if wanted is None else wanted
    if wanted > rows - 2:
        raise LabError(f"--test-images {wanted}: there are {rows} rows, of which at most {rows - 2} can test")
    return stratified_draw(table.target.labels, wanted, TEST_SEED)


def _defaults(model: str, rows: int) -> Defaults:
    """Return what suits this many rows that train."""
    batch_size = min(rows, 32 if rows < 2_000 else 128 if rows < 50_000 else 512)
    steps = max(1, rows // batch_size)
    epochs = min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, math.ceil(_STEPS / steps)))
    return Defaults(model, epochs, batch_size, smallest_batch=2 if select_mlp(model).batch_norm else 1)
