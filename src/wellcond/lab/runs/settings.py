"""The settings of a command, checked as far as possible without the data."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from wellcond.lab.data.named_data import AUGMENTATIONS, DIGITS
from wellcond.lab.errors import LabError
from wellcond.lab.runs.option import check_options, check_whole, number, one_of, option, options_of, whole_number
from wellcond.lab.runs.training_options import TrainingOptions
from wellcond.lab.trials import Search, Sweep, check_sweep

Scale = Literal["smoke", "small", "full"]
"""How much a recipe trains."""

ENGINES = ("local", "ray")
"""What can execute runs: this machine, or the machines of a Ray cluster."""

STRATEGIES = ("auto", "ddp", "fsdp")
"""How several processes train a run: with a network each (DDP, ``"auto"``), or with its weights sharded (FSDP2)."""

ACCELERATORS = ("auto", "cpu", "cuda")
"""What trains; ``"auto"`` is a CUDA device if there is one."""

MODES = ("final", "target")
"""What trials are chosen for: the score at the end, or the fewest epochs to a target."""

_data = partial(option, "data")
_search = partial(option, "search")
_task = partial(option, "task")
_runs = partial(option, "runs")
_processes = partial(option, "processes")


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


def _check_shares(flag: str, shares: tuple[float, ...]) -> None:
    listed = ",".join(f"{share:g}" for share in shares)
    if not all(0 < share <= 1 for share in shares):
        raise LabError(f"--{flag} must be above 0 and at most 1, got {listed}")
    if len(set(shares)) < len(shares):
        raise LabError(f"--{flag} must name each fraction once, got {listed}")


def _check_sweeps(flag: str, sweeps: tuple[Sweep, ...]) -> None:
    for sweep in sweeps:
        check_sweep(*sweep)


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """What is compared, on which data, and which trials of each method."""

    data: str = _data(
        DIGITS,
        "digits, a file (a text, a table, frozen features, images as .parquet), or a folder of data: parquet files, "
        "CIFAR, a folder of images a class, ... (see `wellcond list data`; default: %(default)s)",
        "WHAT",
    )
    methods: tuple[str, ...] | None = None
    lrs: tuple[tuple[str, tuple[float, ...]], ...] = ()
    test_data: str | None = _data(
        None,
        "of segmentation: measure on the images of this folder, of another place or style (default: on the data's own)",
        "DIR",
    )
    target_column: str | None = _data(None, "of a table: the column that is to be told (default: the last)", "NAME")
    kind: str | None = _data(
        None,
        "of a table: classification or regression (default: by whether the target is of words or few integers)",
        "NAME",
    )
    train_images: int | None = _data(
        None,
        "images (rows of a table, blocks of a text in an epoch) that train (default: digits 1000, texts 512, else all)",
        "N",
        check=whole_number(),
        by_task=True,
    )
    validation_images: int | None = _data(
        None,
        "images, rows or blocks that choose the lr (default: a tenth; digits: 398)",
        "N",
        flag="val-images",
        check=whole_number(),
        by_task=True,
    )
    test_images: int | None = _data(
        None,
        "images, rows or blocks that measure (default: a fifth, of a text a tenth, or the test file; digits: 399)",
        "N",
        check=whole_number(),
        by_task=True,
    )
    image_size: int | None = _data(
        None,
        "average-pool the images to SxS (default: as they are); files of images are cut to it (default: 224)",
        "S",
        check=whole_number(4096),
        by_task=True,
    )
    augmentation: str | None = _data(
        None,
        f"{', '.join(AUGMENTATIONS)} (default: none for digits, else crop-flip)",
        "NAME",
        flag="augment",
        by_task=True,
    )
    seeds: int = _search(5, "paired seeds (default: %(default)s)", "N", check=whole_number(1000))
    sweeps: tuple[Sweep, ...] = _search(
        (),
        "also try these values of an option, e.g. damping=0.01,0.1,1 or weight_decay=0,5e-4, of every method that has "
        "it (batch_size and ghost_batch: all); the others try more lrs, so that all try equally many; may be given for "
        "several",
        "OPTION=A,B,...",
        flag="sweep",
        check=_check_sweeps,
    )
    search: Search = _search(  # noqa: RUF009  # a field
        "grid",
        "grid (all combinations) or random (points between the ends of each range) (default: %(default)s)",
        "NAME",
        check=one_of(get_args(Search)),
    )
    trials: int | None = _search(
        None, "trials of each method in a random search (default: as many as a grid)", "N", check=whole_number()
    )
    trial_seeds: int | None = _search(
        None,
        "train every trial with the first N seeds only, which choose; with the other seeds only the chosen trial of "
        "each method (default: all)",
        "N",
        check=whole_number(),
    )
    mode: str = _search(
        "final",
        f"{' or '.join(MODES)}: what trials are chosen for on validation, the score at the end or the fewest epochs to "
        "--target, as speed-run boards count them (default: %(default)s)",
        "NAME",
        check=one_of(MODES),
    )
    time_shares: tuple[float, ...] = _search(
        (1.0,),
        "also train every method for these fractions of its baseline's time, each with a complete schedule "
        "(default: 1, equal time)",
        "A,B,...",
        flag="time-fractions",
        check=_check_shares,
    )


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingOptions, _Compared):
    """The settings of a command; None stands for the default that suits the data.

    A field with a help text is an option of the commands. The others:

    Attributes:
        methods: Names in `METHODS`, or methods as they are written; None: those that the task names.
        lrs: lr grids by optimizer, where they are not the methods' own.
        task_is_given: Whether the task is an object that was handed over, which `task` only names.
    """

    target: float | None = _runs(
        None, "test score to count the epochs to, in the score's unit", "SCORE", check=number("a finite number")
    )
    jobs: int = _runs(
        1, "runs at the same time on a machine (default: %(default)s, for clean times)", "N", check=whole_number()
    )
    engine: str = _runs(
        "local",
        f"what executes the runs, {' or '.join(ENGINES)}: this machine, or those of a Ray cluster "
        "(default: %(default)s)",
        "NAME",
        check=one_of(ENGINES),
    )
    ray_address: str | None = _runs(
        None, "the Ray cluster (default: that of RAY_ADDRESS, else one of this machine alone)", "ADDRESS"
    )
    accelerator: str = _processes(
        "auto",
        f"{', '.join(ACCELERATORS)} (default: %(default)s, a CUDA device if there is one)",
        "NAME",
        check=one_of(ACCELERATORS),
    )
    devices: int | None = _processes(
        None,
        "processes of this machine that train each run together, each with its share of a batch and a CUDA device of "
        "its own if there are any; for several machines start the command with torchrun or srun (default: 1)",
        "N",
        check=lambda flag, value: check_whole(flag, value, most=most_processes()),
    )
    strategy: str = _processes(
        "auto",
        f"{', '.join(STRATEGIES)}: how several processes train together, with a network each (ddp) or with its weights "
        "sharded (fsdp) (default: %(default)s)",
        "NAME",
        check=one_of(STRATEGIES),
    )
    checkpoint_every: float = _processes(
        30.0,
        "how often an unfinished run is kept, to go on from there (default: %(default)g)",
        "SECONDS",
        check=number("0 or more seconds", 0),
    )
    task: str | None = _task(
        None,
        "a class with model, batches, loss and scores (see wellcond.lab.Task), importable from the current folder, "
        "such as my_project.training:MyTask or training.py:MyTask; or a LightningModule",
        "MODULE:NAME",
    )
    task_args: tuple[tuple[str, str], ...] = _task(
        (), "what the class is built with; values as TOML writes them, other texts as they are", "NAME=VALUE"
    )
    data_module: str | None = _task(
        None, "the LightningDataModule of a LightningModule (default: the module's own loaders)", "MODULE:NAME"
    )
    data_args: tuple[tuple[str, str], ...] = _task((), "what the LightningDataModule is built with", "NAME=VALUE")
    score: str | None = _task(
        None,
        "which of the task's scores counts, such as val_acc:max (default: its metric; of a LightningModule the logged "
        "val_* that is an accuracy, or val_loss)",
        "NAME:max|min",
    )
    task_is_given: bool = False

    def __post_init__(self) -> None:
        check_options(self)
        if self.trials is not None and self.search != "random":
            raise LabError("--trials is for --search random; a grid has all combinations")
        if self.trial_seeds is not None and self.trial_seeds > self.seeds:
            raise LabError(f"--trial-seeds must be at most the number of seeds ({self.seeds}), got {self.trial_seeds}")
        self._check_engine()
        self._check_task()

    def _check_task(self) -> None:
        options = options_of(Settings)
        if self.task is None:
            for name, said in options.items():
                if said.group == "task" and getattr(self, name) != said.default:
                    raise LabError(f"--{said.flag} is for a task of your own: --task module:Name")
            return
        if self.data != DIGITS:
            raise LabError(f"--data {self.data} cannot go with --task {self.task}, which has its own data")
        for name, said in options.items():
            if said.by_task and getattr(self, name) != said.default:
                raise LabError(f"--{said.flag} is for --data; --task {self.task} decides it itself (see --task-args)")
        for flag, given in (("task-args", self.task_args), ("data-args", self.data_args)):
            names = [key for key, _ in given]
            if len(set(names)) < len(names):
                raise LabError(f"--{flag} must give each name once, got {', '.join(names)}")

    def _check_engine(self) -> None:
        if self.engine == "local":
            check_whole("jobs", self.jobs, most=most_processes())
            if self.ray_address is not None:
                raise LabError("--ray-address is for --engine ray only")
        elif importlib.util.find_spec("ray") is None:
            raise LabError("--engine ray needs Ray, which is not installed: pip install 'wellcond[ray]'")
