"""From what was asked for to the runs that answer it; every mistake in the settings shows here, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from wellcond.lab.batches import check_augmentation
from wellcond.lab.errors import LabError
from wellcond.lab.images import DIGITS, ImageData, load_data
from wellcond.lab.machine import environment
from wellcond.lab.methods import DEFAULT_METHODS, Method, Refresh, baselines, select_methods, with_lrs
from wellcond.lab.models import initial_model, select_model
from wellcond.lab.records import RunSpec

DIGITS_TARGET = 95.0


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


@dataclass(frozen=True)
class Plan:
    """A comparison, ready to run.

    Attributes:
        settings: What was asked for.
        data: The images, the test ones set apart.
        methods: What is compared.
        baselines: From a method's name to its baseline's.
        epochs: Epochs of a run.
        batch_size: Images of a batch.
        train_images: Images that train in each seed.
        validation_images: Images that choose the lr in each seed.
        augmentation: A name in `AUGMENTATIONS`.
        model: A name in `MODELS`.
        refresh: The preconditioners' intervals.
        target: Test accuracy to count epochs to; None: the first baseline's final accuracy decides.
        threads: Torch's threads in each job.
    """

    settings: Settings
    data: ImageData
    methods: tuple[Method, ...]
    baselines: dict[str, str]
    epochs: int
    batch_size: int
    train_images: int
    validation_images: int
    augmentation: str
    model: str
    refresh: Refresh
    target: float | None
    threads: int
    template: RunSpec

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training images."""
        return self.train_images // self.batch_size

    @property
    def steps(self) -> int:
        """Steps of a run of all epochs."""
        return self.epochs * self.steps_per_epoch

    @property
    def chance(self) -> float:
        """The accuracy of guessing, in percent: what a diverged run counts as."""
        return 100.0 / len(self.data.pool.classes)

    def spec(self, method: Method, lr: float, seed: int, steps: int | None = None) -> RunSpec:
        """Return one run of the comparison, of all epochs unless it says how many steps."""
        grouped = method.norm is None or method.norm.has_batch_statistics
        return replace(
            self.template,
            method=method,
            lr=lr,
            seed=seed,
            steps=self.steps if steps is None else steps,
            # Without batch statistics it is the same run whatever the groups: comparisons can share it.
            ghost_batch=self.template.ghost_batch if grouped else None,
        )

    def specs(self) -> list[RunSpec]:
        """Return every run of all epochs.

        Methods come innermost, so that a machine that slows down or speeds up meets all of them alike.
        """
        return [
            self.spec(method, method.lrs[rank], seed)
            for seed in range(self.settings.seeds)
            for rank in range(max(len(method.lrs) for method in self.methods))
            for method in self.methods
            if rank < len(method.lrs)
        ]


def make_plan(settings: Settings) -> Plan:
    """Check the settings against the data and fill in what they leave open.

    Args:
        settings: What was asked for.

    Returns:
        The plan.

    Raises:
        LabError: If a name is unknown, the data cannot be read, or the numbers do not fit together.
    """
    methods = with_lrs(select_methods(settings.methods), dict(settings.lrs))
    is_digits = settings.data == DIGITS
    augmentation = check_augmentation(settings.augmentation or ("none" if is_digits else "crop-flip"))
    model_name = settings.model or ("convnet" if is_digits else "resnet8")
    # The name first: reading a large file only to find the model misspelt would waste a minute.
    select_model(model_name, image_size=10**6)
    data = load_data(settings.data, settings.image_size, settings.test_images, settings.train_images)
    model = select_model(model_name, min(data.size))
    train_images, validation_images = _counts(settings, len(data.pool.labels))
    batch_size = settings.batch_size or (32 if is_digits else 64)
    if batch_size > train_images:
        raise LabError(f"--batch-size must be at most the number of training images ({train_images}), got {batch_size}")
    if batch_size == 1:
        raise LabError("--batch-size must be at least 2, because the networks use batch normalization, got 1")
    _check_ghost_batch(settings, batch_size)
    epochs = settings.epochs or (6 if is_digits else 8)
    steps = epochs * (train_images // batch_size)
    refresh = Refresh.for_run_of(steps)
    refresh = Refresh(settings.stats_every or refresh.stats_every, settings.solve_every or refresh.solve_every)
    _check_methods(methods, data, model.name, settings.ghost_batch, refresh)
    threads = max(1, torch.get_num_threads() // settings.jobs)
    return Plan(
        settings=settings,
        data=data,
        methods=methods,
        baselines=baselines(methods),
        epochs=epochs,
        batch_size=batch_size,
        train_images=train_images,
        validation_images=validation_images,
        augmentation=augmentation,
        model=model.name,
        refresh=refresh,
        target=settings.target or (DIGITS_TARGET if is_digits else None),
        threads=threads,
        template=RunSpec(
            method=methods[0],
            lr=methods[0].lrs[0],
            seed=0,
            steps=steps,
            stats_every=refresh.stats_every,
            solve_every=refresh.solve_every,
            model=model.name,
            batch_size=batch_size,
            ghost_batch=settings.ghost_batch,
            augmentation=augmentation,
            train_images=train_images,
            validation_images=validation_images,
            data=data.fingerprint(),
            environment=environment(settings.jobs, threads),
        ),
    )


def regrouped(plan: Plan, ghost_batch: int | None) -> Plan:
    """Return the same comparison with batch statistics over other groups; it shares the images in memory.

    Args:
        plan: The comparison.
        ghost_batch: Images of the groups; None for the whole batch.

    Raises:
        LabError: If the groups are larger than the batch, or a method cannot take them.
    """
    settings = replace(plan.settings, ghost_batch=ghost_batch)
    _check_ghost_batch(settings, plan.batch_size)
    _check_methods(plan.methods, plan.data, plan.model, ghost_batch, plan.refresh)
    return replace(plan, settings=settings, template=replace(plan.template, ghost_batch=ghost_batch))


def output_folder(plan: Plan, out: str | None) -> Path:
    """Return the folder that a comparison writes to, made and found writable.

    Args:
        plan: The comparison; its data names the folder if `out` does not.
        out: The folder that was asked for; None: ``runs/compare-<data>``.

    Returns:
        The folder, with its subfolder ``runs``.

    Raises:
        LabError: If it cannot be made or written to.
    """
    folder = Path(out) if out is not None else Path("runs") / f"compare-{plan.data.name}"
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        probe = folder / "runs" / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise LabError(f"--out {folder}: cannot write there ({error.strerror or error})") from error
    return folder


def _counts(settings: Settings, pool: int) -> tuple[int, int]:
    """Return how many images of the pool train and how many validate."""
    train, validation = settings.train_images, settings.validation_images
    if settings.data == DIGITS:
        train = train or min(1000, pool - 1)
        validation = validation or min(398, pool - train)
    else:
        validation = validation or max(1, min(pool // 10, 5000, (train or pool) // 2))
        train = train or pool - validation
    if train < 1 or validation < 1 or train + validation > pool:
        raise LabError(
            f"--train-images {train}: there are {pool} images besides the test images, "
            f"and {max(1, validation)} of them validate"
        )
    return train, validation


def _check_ghost_batch(settings: Settings, batch_size: int) -> None:
    if settings.ghost_batch is not None and settings.ghost_batch > batch_size:
        raise LabError(f"--ghost-batch must be at most the batch size ({batch_size}), got {settings.ghost_batch}")


def _check_methods(
    methods: Sequence[Method], data: ImageData, model: str, ghost_batch: int | None, refresh: Refresh
) -> None:
    """Build every method once, so that options that a transform or a layer refuses are told now."""
    for method in methods:
        network = initial_model(model, data.channels, len(data.pool.classes), seed=0)
        try:
            method.build(method.with_layers(network, ghost_batch), method.lrs[0], refresh)
        except (TypeError, ValueError) as error:
            raise LabError(f"method {method.name}: {error}") from error
