"""A comparison in numbers: what the table, the report and results.json all show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from wellcond.lab.comparison.statistics import Difference, Spread
from wellcond.lab.runs.memory import Memory
from wellcond.lab.runs.metric import ACCURACY, Metric
from wellcond.lab.runs.records import CoverageRows
from wellcond.lab.tasks.evaluation import singular

LEVEL = 0.01
"""The probability below which a mean counts as beyond the target, as speed-run boards have it."""


@dataclass(frozen=True)
class GridPoint:
    """One trial of a method's grid: means over the seeds.

    Attributes:
        lr: The lr.
        validation_score: After the last epoch: what the choice goes by first (see `choose`). None if a run diverged.
        validation_loss: After the last epoch: what decides a tie. None if a run diverged, or evaluation has no loss.
        early_test_score: After the early epoch: shows whether an early gain hangs on the choice.
        diverged_runs: Runs that ended with a NaN or infinite loss.
        swept: The other options that it sets, by name.
        chosen: Whether it is the one that was chosen.
    """

    lr: float
    validation_score: float | None
    validation_loss: float | None
    early_test_score: float | None
    diverged_runs: int
    swept: dict[str, Any] = field(default_factory=dict)
    chosen: bool = False


@dataclass(frozen=True)
class EqualTime:
    """A method in its baseline's wall time: its steps, its test score, and the difference to the baseline."""

    steps: int
    score: Spread
    difference: Difference
    others: dict[str, Difference] = field(default_factory=dict)


@dataclass(frozen=True)
class AtShare:
    """A method in a share of its baseline's wall time, with a complete schedule of its own.

    Attributes:
        share: The share of the time of the baseline's full run.
        steps: The steps that fit in it.
        score: The test score after them.
        difference: To the baseline's full run; of a baseline, to its own.
        same_time: To the baseline in the same share of time; None for a baseline.
    """

    share: float
    steps: int
    score: Spread
    difference: Difference
    same_time: Difference | None


@dataclass(frozen=True)
class ToTarget:
    """The time at which a method's mean over the seeds is beyond the target by more than chance.

    Attributes:
        epoch: The first such epoch; None if there is none.
        steps: The steps until then.
        seconds: The training seconds until then, the median over the seeds.
        p_value: How likely a mean so far beyond the target would be by chance, in that epoch or else in the last.
    """

    epoch: int | None
    steps: int | None
    seconds: float | None
    p_value: float | None


@dataclass(frozen=True)
class Curve:
    """One seed's run of the chosen trial, one number an epoch; `metrics` are of the test images."""

    seed: int
    seconds: tuple[float, ...]
    train_loss: tuple[float, ...]
    validation_score: tuple[float, ...]
    validation_loss: tuple[float | None, ...]
    test_score: tuple[float, ...]
    test_loss: tuple[float | None, ...]
    metrics: dict[str, tuple[float, ...]] = field(default_factory=dict)
    train_score: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class MethodSummary:
    """The gains and costs of one method.

    Attributes:
        name: The method.
        description: What it is.
        baseline: What the differences and the time ratio are against; its own name for a baseline.
        lr: The lr chosen on validation.
        lr_edge: ``"lowest"`` or ``"highest"`` if that is the end of the grid, otherwise None.
        lr_grid: What it was chosen from.
        scores: Test score after the epochs that the table shows, by epoch.
        epochs_to_target: Mean epochs to the target over the seeds that reached it; None if none did.
        reached_target: How many seeds reached it.
        early_difference: Paired difference after the early epoch; None for a baseline or without an early epoch.
        final_difference: Paired difference after the last epoch; None for a baseline.
        milliseconds_per_step: Median over all runs; None if every run diverged at once.
        time_ratio: Time per step over the baseline's.
        evaluation_ratio: Time to evaluate an image over the baseline's; None where it is the same network: for a
            baseline, and for a method with its baseline's layers.
        equal_time: The method at equal wall time; None for a baseline.
        diverged_runs: Runs, of all lrs and budgets, that ended with a NaN or infinite loss.
        warnings: What the transforms and layers warned of.
        curves: The runs at the chosen lr.
        transforms: Names of its transforms.
        norm: Kind of its normalization layers; None for batch normalization.
        layers: What it does to convolutions; None for nothing.
        recipe: What it trains with, as it would be written.
        extras: What the layers of these runs have learned: from a kind of `EXTRAS` to each seed's, None for a run that
            has none.
        seconds_per_epoch: Median seconds of the steps of a whole epoch; None if every run diverged at once.
        memory: The bytes that training takes (see `measure_memory`); None where they were not counted.
        memory_ratio: Its peak over the baseline's.
        coverage: What each transform does with each parameter and keeps for it, by transform.
        swept: The other options that the chosen trial sets, by name.
        edges: ``"lowest"`` or ``"highest"`` for each of them that is at the end of its grid.
        to_target: When the mean over the seeds is beyond the target.
        shares: The method in shares of the baseline's wall time.
        unfinished: The seeds whose run of the chosen trial diverged.
    """

    name: str
    description: str
    baseline: str
    lr: float
    lr_edge: str | None
    lr_grid: tuple[GridPoint, ...]
    scores: dict[int, Spread]
    epochs_to_target: float | None
    reached_target: int
    early_difference: Difference | None
    final_difference: Difference | None
    milliseconds_per_step: float | None
    time_ratio: float | None
    evaluation_ratio: float | None
    equal_time: EqualTime | None
    diverged_runs: int
    warnings: tuple[str, ...]
    curves: tuple[Curve, ...]
    extras: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    transforms: tuple[str, ...] = ()
    norm: str | None = None
    layers: str | None = None
    recipe: str = ""
    seconds_per_epoch: float | None = None
    memory: Memory | None = None
    memory_ratio: float | None = None
    coverage: dict[str, CoverageRows] = field(default_factory=dict)
    swept: dict[str, Any] = field(default_factory=dict)
    edges: dict[str, str] = field(default_factory=dict)
    to_target: ToTarget | None = None
    shares: tuple[AtShare, ...] = ()
    unfinished: tuple[int, ...] = ()

    @property
    def is_baseline(self) -> bool:
        """Whether it is measured against itself."""
        return self.name == self.baseline


@dataclass(frozen=True)
class Summary:
    """A comparison in numbers.

    Attributes:
        score: What the score is called.
        seeds: How many paired seeds.
        epochs: Epochs of a run.
        steps: Steps of a run.
        shown_epochs: The epochs that the table shows.
        early_epoch: The epoch of the early difference; None for runs of one epoch.
        target: The test score to which epochs are counted.
        chance: What a diverged run counts as, such as the score of guessing.
        jobs: Runs at the same time.
        ghost_batch: Samples of the groups that batch statistics were taken over in training; None for the whole batch.
        methods: In the order of the comparison.
        machines: What executed the runs: one, or several of a cluster.
        metric: What the score is: its unit, and which direction is better.
        mode: What trials were chosen for: ``"final"`` scores, or the fewest epochs to the ``"target"``.
        sweeps: The options that were swept beside the lr, with their values.
        chosen_on: The split that chooses the lr: ``"validation"``, or ``"test"`` where the task has no other.
        samples: What a row of a batch is, in the plural.
    """

    score: str
    seeds: int
    epochs: int
    steps: int
    shown_epochs: tuple[int, ...]
    early_epoch: int | None
    target: float
    chance: float
    jobs: int
    ghost_batch: int | None
    methods: tuple[MethodSummary, ...]
    machines: tuple[str, ...] = ()
    metric: Metric = ACCURACY
    mode: str = "final"
    sweeps: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    chosen_on: str = "validation"
    samples: str = "images"

    @property
    def sample(self) -> str:
        """What one of the samples is called."""
        return singular(self.samples)

    def families(self) -> dict[str, tuple[MethodSummary, ...]]:
        """Return, for each baseline, itself and the methods that are measured against it."""
        names = dict.fromkeys(method.baseline for method in self.methods)
        return {name: tuple(method for method in self.methods if method.baseline == name) for name in names}


def read_summary(content: dict[str, Any]) -> Summary:
    """Return the comparison that a results.json holds, also one of an earlier version.

    Args:
        content: What the file holds.
    """
    from pydantic import TypeAdapter

    # What earlier versions did not measure.
    methods = [
        {"evaluation_ratio": None, **method, "lr_grid": [_known(point, method) for point in method["lr_grid"]]}
        for method in content["methods"]
    ]
    return TypeAdapter(Summary).validate_python({"ghost_batch": None, **content, "methods": methods})


def _known(point: dict[str, Any], method: dict[str, Any]) -> dict[str, Any]:
    chosen = (point["lr"], point.get("swept", {})) == (method["lr"], method.get("swept", {}))
    return {"chosen": chosen, **point}
