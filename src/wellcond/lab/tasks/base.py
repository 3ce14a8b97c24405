"""A task: a model, its training batches, its loss and its scores, which methods are compared on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.lab.data.randomness import seeded
from wellcond.lab.errors import DataError, naming_errors
from wellcond.lab.hardware.machine import training_device
from wellcond.lab.methods.method import DEFAULT_METHODS
from wellcond.lab.networks.weights import load_weights
from wellcond.lab.own_digest import held, source_digest, state_digest
from wellcond.lab.runs.metric import Metric
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.runs.training_options import SeedSpec
from wellcond.lab.tasks.batch_parts import rows_of
from wellcond.lab.tasks.check import check_task
from wellcond.lab.tasks.evaluation import ROLES, Evaluation, Role
from wellcond.lab.tasks.seed_data import SeedData, TaskSeed

__all__ = [
    "ROLES",
    "Defaults",
    "DefaultsBySize",
    "Evaluation",
    "Metric",
    "Role",
    "SeedData",
    "Task",
    "TaskSeed",
]

MOST_BATCHES = 1_000_000
"""The most batches of an epoch that are counted: one that does not end is told."""


@dataclass(frozen=True)
class Defaults:
    """The settings of a comparison on this data where nothing else is asked for.

    Attributes:
        model: Name of the network.
        epochs: Epochs of a run.
        batch_size: Samples of a batch.
        target: Score, in the metric's unit, to count the epochs to; None: the first baseline's final score decides.
        smallest_batch: The least batch size that can train; 2 where batch statistics are taken over images.
        methods: Methods by name, or as they are written.
    """

    model: str
    epochs: int
    batch_size: int
    target: float | None = None
    smallest_batch: int = 2
    methods: tuple[str, ...] = DEFAULT_METHODS


@dataclass(frozen=True)
class DefaultsBySize:
    """Defaults of small data, and of data as large as the sources'.

    Attributes:
        small: For fewer samples.
        large: The sources' own, from `least` samples on.
        least: How many samples are many.
    """

    small: Defaults
    large: Defaults
    least: int

    def of(self, samples: int) -> Defaults:
        """Return what suits this many samples that do not test."""
        return self.large if samples >= self.least else self.small


class Task:
    """The base of a task: your model, your data, your loss and your scores, on which methods are compared.

    Subclass it and write four methods and the metric; everything else is done for you: paired seeds, lr grids, the
    choice of the lr on the validation split, runs at equal wall time, runs that go on where they were stopped, several
    processes, the report. A class with these four methods that is no subclass will do, too.

    The global random generators of Python, numpy and torch are seeded before `model`, `batches` and `scores` are
    called, and while batches are drawn, and are left as they were: what is drawn from them is the same for every method
    of a seed. A generator of your own must be seeded with what you are given.

    Attributes:
        metric: The score that chooses the lr and that the report compares. In its place, `score` may name it and
            `higher_is_better` say which way; it has no unit, then.
        epochs: Epochs of a run, where nothing else is asked for.
        splits: What `scores` can be asked for. ``("test",)`` where nothing validates: the lr is chosen on the test
            split, then, and the report says so.
        samples: What one row of a batch is, in the plural, for the report.
        target: Score to count the epochs to; None: what the first baseline reaches decides.
        default_methods: What is compared where no methods are named: names of `wellcond list methods`, or methods as
            they are written.

    Example:
        A network on random numbers, complete:

        >>> class Sums(Task):
        ...     metric = Metric("error", unit="", higher_is_better=False)
        ...     epochs = 2
        ...
        ...     def model(self, seed):
        ...         return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        ...
        ...     def batches(self, seed, epoch):
        ...         for _ in range(10):
        ...             inputs = torch.randn(16, 4)
        ...             yield inputs, inputs.sum(1, keepdim=True)
        ...
        ...     def loss(self, model, batch):
        ...         inputs, sums = batch
        ...         return (model(inputs) - sums).square().mean()
        ...
        ...     def scores(self, model, split):
        ...         inputs = torch.randn(100, 4)
        ...         error = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        ...         return {"error": error}
        >>> task = Sums()
        >>> task.steps_per_epoch, task.batch_size, task.model_name
        (10, 16, 'Sequential')

    See Also:
        The page "Compare on your own work", with a second example that reads data and holds some of it out.
    """

    score: str = ""
    higher_is_better: bool = True
    epochs: int = 10
    splits: tuple[Role, ...] = ROLES
    samples: str = "samples"
    target: float | None = None
    default_methods: tuple[str, ...] = DEFAULT_METHODS

    # What you write ---------------------------------------------------------------------------------------------------

    def model(self, seed: int) -> nn.Module:
        """Return the network that a run begins with.

        Args:
            seed: The run's. torch's generator is seeded by it already: layers as they are built need nothing more. Two
                networks of one seed must be equal, or the methods of a seed would begin with different weights.
        """
        raise NotImplementedError(f"{type(self).__name__} must have a method model(self, seed)")

    def batches(self, seed: int, epoch: int) -> Iterable[Any]:
        """Return the training batches of an epoch: a loader, a list, or what a generator yields.

        Args:
            seed: The run's.
            epoch: From 0. The batches must be a function of seed and epoch; every epoch has equally many.

        Returns:
            Batches in any nesting of tuples, lists, dicts and dataclasses; their tensors are moved to the device that
            trains. Where several processes train a run, each takes its rows of every tensor. If the method takes
            ``rank`` and ``ranks`` as well, it gives each process its own batches; if it takes ``skip``, it leaves out
            the first so many, which else are made and dropped where a run goes on within an epoch.
        """
        raise NotImplementedError(f"{type(self).__name__} must have a method batches(self, seed, epoch)")

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a batch.

        Args:
            model: The network, in training mode, with the method's layers.
            batch: One of `batches`, on the device.

        Returns:
            A scalar with its graph.
        """
        raise NotImplementedError(f"{type(self).__name__} must have a method loss(self, model, batch)")

    def train_score(self, output: Any, batch: Any) -> Tensor | float | None:
        """Return the metric of a training batch, for records and curves of training; None, as here, without one.

        Args:
            output: What the network's last forward pass in `loss` returned: nothing is computed twice.
            batch: The batch.

        Returns:
            The mean over the batch's samples. Leave it on the device: to read it would make every step wait.
        """
        return None

    def scores(self, model: nn.Module, split: Role) -> Mapping[str, float]:
        """Return what the network scores after an epoch.

        Args:
            model: The network, in evaluation mode and under ``torch.no_grad``; inputs belong on its device.
            split: ``"validation"`` or ``"test"``.

        Returns:
            Numbers by name: the metric, the mean ``"loss"`` if there is one (it decides between lrs that score alike),
            and whatever else is worth a column in the records.
        """
        raise NotImplementedError(f"{type(self).__name__} must have a method scores(self, model, split)")

    def stop(self, scores: list[float]) -> bool:
        """Return whether a run ends now, before its last epoch.

        Args:
            scores: The metric on the validation split after each epoch so far.
        """
        return False

    def fingerprint(self) -> str:
        """Return what tells this data from other data, such as the digest of a file or its name and date.

        Kept runs of another fingerprint are not taken for this task's. The code of the task's modules belongs to it
        without being named. By default it is a digest of the object's attributes.
        """
        return state_digest(self)

    def describe(self) -> dict[str, Any]:
        """Return what the report says of the task beside its name, as JSON takes it."""
        return {}

    # What the lab asks ------------------------------------------------------------------------------------------------

    kind: str = "own work"
    augmentation: str = ""
    validation_images: int = 0

    @cached_property
    def test_images(self) -> int:
        """Samples that measure, where the task counts them."""
        return 0

    @cached_property
    def metric(self) -> Metric:
        """The score that counts."""
        if not self.score:
            raise DataError(f"{type(self).__name__} must have a metric, such as metric = Metric('accuracy')")
        return Metric(self.score, unit="", higher_is_better=self.higher_is_better)

    @cached_property
    def name(self) -> str:
        """A short name, fit for a file name."""
        return type(self).__name__

    @cached_property
    def chance(self) -> float:
        """What a run that diverged counts as."""
        end = self.metric.end
        return self.untrained_score if end is None else end

    @cached_property
    def untrained_score(self) -> float:
        """What the network of seed 0 scores on the test split before training."""
        device = training_device()
        model = self.initial_model("", 0, None).to(device).eval()
        with torch.no_grad():
            return TaskSeed(self, 0, device).evaluate(model, "test", Stopwatch(device)).score

    @cached_property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        with seeded("batches of epoch 0", 0):
            batches = self.batches(0, 0)
            try:
                return len(batches)  # type: ignore[arg-type]
            except TypeError:
                counted = sum(1 for _ in islice(batches, MOST_BATCHES + 1))
        if counted > MOST_BATCHES:
            raise DataError(f"batches(seed, epoch) gives more than {MOST_BATCHES} batches: an epoch must end")
        return counted

    def steps_with(self, batch_size: int) -> int:
        """Return the batches of an epoch, where a comparison may ask for another batch size."""
        return self.steps_per_epoch

    @cached_property
    def batch_size(self) -> int:
        """Samples of the first batch."""
        with seeded("batches of epoch 0", 0):
            return rows_of(next(iter(self.batches(0, 0)), None))

    @cached_property
    def model_name(self) -> str:
        """What the network is called."""
        return type(self.initial_model("", 0, None)).__name__

    @cached_property
    def train_images(self) -> int:
        """Samples that train in each seed."""
        return self.steps_per_epoch * self.batch_size

    @cached_property
    def defaults(self) -> Defaults:
        """What is used where nothing else is asked for."""
        return Defaults(self.model_name, self.epochs, self.batch_size, self.target, 1, tuple(self.default_methods))

    @cached_property
    def digest(self) -> str:
        """A digest of the task's data and of its own code, so that no other task's results are taken for its."""
        return "-".join(part for part in (source_digest(self.sources), self.fingerprint()) if part)

    @property
    def sources(self) -> tuple[Any, ...]:
        """The classes and functions whose code it is."""
        return (type(self),)

    def check(self, device: torch.device) -> None:
        """Check all that can be checked before the first run begins.

        Args:
            device: What trains.

        Raises:
            LabError: If a file is missing or broken, or runs of the task could not be compared (see `check_task`).
        """
        self.check_files()
        if not self.is_rehearsed:
            return

        def naming(what: str) -> AbstractContextManager[None]:
            return naming_errors(f"{self.name}: {what}")

        try:
            vars(self)["untrained_score"] = check_task(self, device, naming)
        except DataError as error:
            raise DataError(str(error) if str(error).startswith(self.name) else f"{self.name}: {error}") from error

    is_rehearsed: bool = True

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes that another process needs, without what this one has worked out."""
        # Another metric than the class's may have been asked for.
        return held(self) | ({"metric": self.metric} if "metric" in vars(self) else {})

    def check_files(self) -> None:
        """Look at every file that runs will read, before the first of them begins.

        Raises:
            DataError: If one is missing or broken.
        """

    def initial_model(self, model: str, seed: int, weights: str | None) -> nn.Module:
        """Return the network that a run begins with; the global generators are left as they were.

        Args:
            model: The network's name, where the task has several.
            seed: The run's seed: weights are drawn from ``derived_seed("weights", seed)``.
            weights: Where other weights come from; None draws all.

        Raises:
            LabError: If the task has no such network, or it does not fit the data or the weights.
        """
        with seeded("weights", seed):
            network = self.model(seed)
        if weights is not None:
            load_weights(network, self.name, weights)
        return network

    def for_seed(self, spec: SeedSpec, device: torch.device, rank: int, ranks: int) -> SeedData:
        """Return one seed's data.

        Args:
            spec: The run, or what of it the data are made from.
            device: Where the batches go.
            rank: Which process of the run this is.
            ranks: How many processes the run has.
        """
        return TaskSeed(self, spec.seed, device, rank, ranks)
