"""What was asked for, checked as far as it can be without the data."""

from __future__ import annotations

from dataclasses import dataclass

from wellcond.lab.errors import LabError
from wellcond.lab.images import DIGITS
from wellcond.lab.methods import DEFAULT_METHODS


@dataclass(frozen=True)
class Settings:
    """What was asked for; None stands for the default that suits the data.

    Attributes:
        data: ``"digits"``, a parquet file, or a folder of them.
        methods: Names in `METHODS`.
        model: A name in `MODELS`.
        lrs: lr grids by optimizer, where they are not the methods' own.
        seeds: How many paired seeds.
        epochs: Epochs of a run.
        train_images: Images that train.
        validation_images: Images that choose the lr.
        test_images: Images that measure.
        image_size: Height and width to average-pool the images to.
        augmentation: A name in `AUGMENTATIONS`.
        batch_size: Images of a batch.
        ghost_batch: Images of the groups that batch statistics are taken over in training; None for the whole batch.
        stats_every: Steps between two gatherings of second moments.
        solve_every: Steps between two solves.
        target: Test accuracy, in percent, to count the epochs to.
        jobs: Runs at the same time.
    """

    data: str = DIGITS
    methods: tuple[str, ...] = DEFAULT_METHODS
    model: str | None = None
    lrs: tuple[tuple[str, tuple[float, ...]], ...] = ()
    seeds: int = 5
    epochs: int | None = None
    train_images: int | None = None
    validation_images: int | None = None
    test_images: int | None = None
    image_size: int | None = None
    augmentation: str | None = None
    batch_size: int | None = None
    ghost_batch: int | None = None
    stats_every: int | None = None
    solve_every: int | None = None
    target: float | None = None
    jobs: int = 1

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "train_images", "validation_images", "test_images", "image_size"):
            self._check_positive(name)
        for name in ("batch_size", "ghost_batch", "stats_every", "solve_every", "jobs"):
            self._check_positive(name)
        if self.target is not None and not 0 < self.target <= 100:
            raise LabError(f"--target must be a percentage above 0 and at most 100, got {self.target:g}")

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and value < 1:
            option = name.replace("_", "-").replace("validation", "val")
            raise LabError(f"--{option} must be a positive integer, got {value}")
