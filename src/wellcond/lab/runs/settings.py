"""The settings of a command, checked as far as possible without the data."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Literal, get_args

from wellcond.lab.data.named_data import DIGITS
from wellcond.lab.errors import LabError, unknown_name
from wellcond.lab.methods.schedule import parse_schedule
from wellcond.lab.runs.records import TrainingPrecision
from wellcond.lab.training.probes import PROBES
from wellcond.lab.trials import Search, Sweep, check_sweep

Scale = Literal["smoke", "small", "full"]
"""How much a recipe trains."""

PRECISIONS: tuple[TrainingPrecision, ...] = get_args(TrainingPrecision)

ENGINES = ("local", "ray")
"""What can execute runs: this machine, or the machines of a Ray cluster."""

STRATEGIES = ("auto", "ddp", "fsdp")
"""How several processes train a run: with a network each (DDP, ``"auto"``), or with its weights sharded (FSDP2)."""

ACCELERATORS = ("auto", "cpu", "cuda")
"""What trains; ``"auto"`` is a CUDA device if there is one."""


MODES = ("final", "target")
"""What trials are chosen for: the score at the end, or the fewest epochs to a target."""

MOST = 1_000_000
"""The most of anything that is counted and not otherwise limited: epochs, steps, images."""

_MOST_COUNTED = 10**9
# What built-in data leave open and a task of one's own does not.
_OF_DATA = (
    *("model", "train_images", "validation_images", "test_images", "image_size", "augmentation"),
    *("batch_size", "label_smoothing", "probe"),
)
_LIMITS = {"seeds": 1000, "image_size": 4096}


def check_whole(option: str, value: int, least: int = 1, most: int = MOST) -> None:
    """Check an integer.

    Args:
        option: What it was given by, without the dashes.
        value: The integer.
        least: The least that it may be.
        most: The most.

    Raises:
        LabError: If it is less or more.
    """
    if value < least:
        rule = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise LabError(f"--{option} must be {rule}, got {value}")
    if value > most:
        raise LabError(f"--{option} must be at most {most}, got {value}")


def check_seed(seed: int) -> None:
    """Check the number of a seed.

    Raises:
        LabError: If it is negative or does not fit 63 bits.
    """
    if seed < 0:
        raise LabError(f"--seed must be 0 or more, got {seed}")
    if seed >= 2**63:
        raise LabError(f"--seed must be below 2^63, got {seed}")


def most_processes() -> int:
    """Return how many processes may share this machine: each takes some hundred megabytes and seconds to start."""
    return max(8, 2 * (os.cpu_count() or 1))


@dataclass(frozen=True)
class Settings:
    """The settings of a command; None stands for the default that suits the data.

    Attributes:
        data: ``"digits"``, a parquet file, or a folder in one of `LAYOUTS`.
        task: Import path of a task of one's own, in the place of data; None: `data` says it.
        task_args: What it is built with: names and texts.
        data_module: Import path of the LightningDataModule of a `task` that is a LightningModule.
        data_args: What that is built with.
        score: Which of the task's scores counts, such as ``"val_acc:max"``.
        task_is_given: Whether the task is an object that was handed over, which `task` only names.
        methods: Names in `METHODS`, or methods as they are written; None: those that the task names.
        model: A name in `MODELS`, or ``torchvision:NAME`` or ``timm:NAME``.
        lrs: lr grids by optimizer, where they are not the methods' own.
        seeds: How many paired seeds.
        epochs: Epochs of a run.
        train_images: Images that train.
        validation_images: Images that choose the lr.
        test_images: Images that measure.
        test_data: Of segmentation: another folder, whose images measure; None for the data's own.
        target_column: The column of a table that is to be told; None for the last.
        kind: What is learned of a table's target, one of `KINDS`; None for what it looks like.
        image_size: Height and width to average-pool the images to, or to cut files of images to.
        augmentation: A name in `AUGMENTATIONS`.
        batch_size: Images of a batch.
        ghost_batch: Images of the groups that batch statistics are taken over in training; None for the whole batch.
        stats_every: Steps between two gatherings of second moments.
        solve_every: Steps between two solves.
        target: Test score, in percent, to count the epochs to.
        jobs: Runs at the same time on a machine.
        weights: File of the weights that runs begin with, or ``torchvision:NAME`` of published ones; None draws them.
        schedule: How the lr goes, in the form that `parse_schedule` reads.
        warmup: Epochs in which the lr rises at the beginning.
        precision: One of `PRECISIONS`.
        channels_last: Whether networks of images lie in memory channels last, which many convolutions compute faster.
        deterministic: Whether only deterministic algorithms may be used.
        label_smoothing: Share of the target that is spread over all classes, in training.
        probe: A name in `PROBES`: what is measured of each trained network; None for nothing.
        engine: ``"local"`` for this machine, ``"ray"`` for those of a Ray cluster.
        ray_address: The cluster; None: RAY_ADDRESS names it, or else it is this machine alone.
        strategy: One of `STRATEGIES`.
        devices: Processes of this machine that train each run together; None: as many as were started.
        accelerator: One of `ACCELERATORS`.
        checkpoint_every: Seconds between two checkpoints of an unfinished run; 0 makes one after every step.
        mode: One of `MODES`.
        time_shares: Shares of the baseline's time in which methods train again, each with a schedule of its own.
        sweeps: Options that are swept beside the lr, with their values.
        search: How trials are laid out, ``"grid"`` or ``"random"``.
        trials: Trials of each method in a random search; None: as many as the longest grid has.
        trial_seeds: Seeds that every trial is trained with, and chosen by; the others train only the chosen trial of
            each method. None: all.
    """

    data: str = DIGITS
    methods: tuple[str, ...] | None = None
    model: str | None = None
    lrs: tuple[tuple[str, tuple[float, ...]], ...] = ()
    seeds: int = 5
    epochs: int | None = None
    train_images: int | None = None
    validation_images: int | None = None
    test_images: int | None = None
    test_data: str | None = None
    target_column: str | None = None
    kind: str | None = None
    image_size: int | None = None
    augmentation: str | None = None
    batch_size: int | None = None
    ghost_batch: int | None = None
    stats_every: int | None = None
    solve_every: int | None = None
    target: float | None = None
    jobs: int = 1
    weights: str | None = None
    schedule: str = "cosine"
    warmup: float = 0.0
    precision: TrainingPrecision = "32-true"
    channels_last: bool = False
    deterministic: bool = False
    label_smoothing: float = 0.0
    probe: str | None = None
    engine: str = "local"
    ray_address: str | None = None
    strategy: str = "auto"
    devices: int | None = None
    accelerator: str = "auto"
    checkpoint_every: float = 30.0
    mode: str = "final"
    time_shares: tuple[float, ...] = (1.0,)
    sweeps: tuple[Sweep, ...] = ()
    search: Search = "grid"
    trials: int | None = None
    trial_seeds: int | None = None
    task: str | None = None
    task_args: tuple[tuple[str, str], ...] = ()
    data_module: str | None = None
    data_args: tuple[tuple[str, str], ...] = ()
    score: str | None = None
    task_is_given: bool = False

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "train_images", "validation_images", "test_images", "image_size"):
            self._check_positive(name)
        for name in ("batch_size", "ghost_batch", "stats_every", "solve_every", "jobs", "devices"):
            self._check_positive(name)
        for name in ("trials", "trial_seeds"):
            self._check_positive(name)
        if self.target is not None and not math.isfinite(self.target):
            raise LabError(f"--target must be a finite number, got {self.target:g}")
        parse_schedule(self.schedule)
        if not 0 <= self.warmup < math.inf:
            raise LabError(f"--warmup must be 0 or more epochs, got {self.warmup:g}")
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        if self.probe is not None and self.probe not in PROBES:
            raise unknown_name("probe", self.probe, PROBES)
        if not 0 <= self.label_smoothing < 1:
            raise LabError(f"--label-smoothing must be at least 0 and below 1, got {self.label_smoothing:g}")
        if not 0 <= self.checkpoint_every < math.inf:
            raise LabError(f"--checkpoint-every must be 0 or more seconds, got {self.checkpoint_every:g}")
        if not all(0 < share <= 1 for share in self.time_shares):
            raise LabError(f"--time-fractions must be above 0 and at most 1, got {_listed(self.time_shares)}")
        if len(set(self.time_shares)) < len(self.time_shares):
            raise LabError(f"--time-fractions must name each fraction once, got {_listed(self.time_shares)}")
        for sweep in self.sweeps:
            check_sweep(*sweep)
        if self.trials is not None and self.search != "random":
            raise LabError("--trials is for --search random; a grid has all combinations")
        if self.trial_seeds is not None and self.trial_seeds > self.seeds:
            raise LabError(f"--trial-seeds must be at most the number of seeds ({self.seeds}), got {self.trial_seeds}")
        for name, known in (
            ("strategy", STRATEGIES),
            ("accelerator", ACCELERATORS),
            ("mode", MODES),
            ("search", get_args(Search)),
        ):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        self._check_engine()
        self._check_task()

    def _check_task(self) -> None:
        if self.task is None:
            for name in ("task_args", "data_module", "data_args", "score"):
                if getattr(self, name):
                    raise LabError(f"--{name.replace('_', '-')} is for a task of your own: --task module:Name")
            return
        if self.data != DIGITS:
            raise LabError(f"--data {self.data} cannot go with --task {self.task}, which has its own data")
        for name in _OF_DATA:
            if getattr(self, name):
                option = name.replace("_", "-").replace("validation", "val").replace("augmentation", "augment")
                raise LabError(f"--{option} is for --data; --task {self.task} decides it itself (see --task-args)")
        for name, given in (("task-args", self.task_args), ("data-args", self.data_args)):
            names = [key for key, _ in given]
            if len(set(names)) < len(names):
                raise LabError(f"--{name} must give each name once, got {', '.join(names)}")

    def _check_engine(self) -> None:
        if self.engine not in ENGINES:
            raise unknown_name("engine", self.engine, ENGINES)
        if self.engine == "ray" and importlib.util.find_spec("ray") is None:
            raise LabError("--engine ray needs Ray, which is not installed: pip install 'wellcond[ray]'")
        if self.engine != "ray" and self.ray_address is not None:
            raise LabError("--ray-address is for --engine ray only")

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        most = _LIMITS.get(name, MOST if name == "epochs" else _MOST_COUNTED)
        if name == "devices" or (name == "jobs" and self.engine == "local"):
            most = most_processes()
        check_whole(name.replace("_", "-").replace("validation", "val"), value, most=most)


def _listed(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{number:g}" for number in numbers)
