"""The description of a run and its record of measurements, kept together as one file a run."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from wellcond.lab.methods.method import Method, Refresh
from wellcond.lab.runs.figures import check_count, check_number
from wellcond.lab.runs.files import partial, write_atomically
from wellcond.lab.runs.metric import ACCURACY, Metric
from wellcond.lab.runs.training_options import SeedSpec

if TYPE_CHECKING:
    from wellcond.lab.runs.memory import Memory

# Of a file's name; with its digest and ending it stays below the 255 bytes that file systems take.
_LONGEST = 200

CoverageRows: TypeAlias = list[dict[str, Any]]
"""One row a parameter: its name and shape, what is done with its gradient, and the bytes that are kept for it."""


@dataclass(frozen=True, kw_only=True)
class RunSpec(SeedSpec):
    """Everything that determines a run's result, its seconds included.

    Attributes:
        epochs: Epochs that the schedule is made for; `steps` may be fewer than they have, at equal wall time.
        stats_every: Steps between two gatherings of second moments.
        solve_every: Steps between two solves.
        method: How to train.
        lr: The highest lr of the schedule.
        steps: Training steps of the run.
        steps_per_epoch: Batches of an epoch.
        metric: What the scores are.
        data: The task's fingerprint.
        weights_digest: Digest of the weights that the run begins with; None draws them.
        environment: The machine, the versions and the sharing of cores that the seconds were measured with.
        swept: What a sweep has set, as pairs of an option's name and its value: a part of the name, which other fields
            hold already.
    """

    # Of what the options may leave open, the length of the run has decided these.
    epochs: int = field()
    stats_every: int = field()
    solve_every: int = field()
    method: Method
    lr: float
    steps: int
    steps_per_epoch: int = 1
    metric: Metric = ACCURACY
    data: str
    weights_digest: str | None = None
    environment: str
    # The same run whether a sweep or the method itself sets an option.
    swept: tuple[tuple[str, object], ...] = field(default=(), compare=False)

    @property
    def refresh(self) -> Refresh:
        """The preconditioners' intervals."""
        return Refresh(self.stats_every, self.solve_every)

    @property
    def name(self) -> str:
        """A readable name that no two runs of one comparison share."""
        swept = "".join(f" {name} {_brief(value)}" for name, value in self.swept)
        return f"{self.method.name} lr {self.lr:g}{swept} seed {self.seed} ({self.steps} steps)"

    def key(self) -> str:
        """Return the digest of all fields that determine the result."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()

    def content(self) -> dict[str, Any]:
        """Return all fields that determine the result."""
        found = asdict(self)
        del found["swept"]
        # What else is tried, and what it is set beside, is no part of a run: a grid that is widened keeps its runs.
        for name in ("lrs", "baseline", "description"):
            del found["method"][name]
        return found


def _brief(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class EpochRecord:
    """The measurements at the end of an epoch; scores in the unit of the run's metric.

    Attributes:
        steps: Training steps so far.
        seconds: Seconds of training so far, evaluation excluded.
        train_loss: Mean loss over the epoch's batches.
        validation_score: On the seed's validation images.
        validation_loss: On the seed's validation images; None where evaluation has no loss.
        test_score: On the test images.
        test_loss: On the test images; None where evaluation has no loss.
        metrics: Further scores of the test images, by name.
        train_score: On the epoch's training batches, each as the network was when it trained on it; None where the
            task has no score of training batches.
    """

    steps: int
    seconds: float
    train_loss: float
    validation_score: float
    validation_loss: float | None
    test_score: float
    test_loss: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    train_score: float | None = None

    def check(self, steps: int, begun: tuple[int, float], metric: Metric) -> None:
        """Check what was read from a file.

        Args:
            steps: Steps of the run.
            begun: Steps and seconds when the epoch began.
            metric: What the scores are.

        Raises:
            ValueError: If it holds what no run measures; the message names the figure and what was found.
        """
        check_count("steps", self.steps, begun[0] + 1, steps)
        check_number("seconds", self.seconds, begun[1])
        check_number("train_loss", self.train_loss)
        for name in ("validation_score", "test_score"):
            check_number(name, getattr(self, name), *metric.span)
        if self.train_score is not None:
            check_number("train_score", self.train_score, *metric.span)
        for name in ("validation_loss", "test_loss"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        if not isinstance(self.metrics, dict):
            raise ValueError(f"metrics must be figures by name, got {self.metrics!r}")
        for name, value in self.metrics.items():
            check_number(f"metrics.{name}", value)


@dataclass(frozen=True)
class RunRecord:
    """The measurements of a run.

    Attributes:
        epochs: One record for each epoch that ended with finite losses.
        diverged: Whether the run ended early with a NaN or infinite loss.
        stopped: Whether the task's stopping rule ended it early.
        threads: Torch's threads during the run.
        transforms: What the transforms counted.
        warnings: What the transforms and layers warned of.
        evaluation_seconds: Seconds that the network takes to evaluate an image; None if no epoch ended with finite
            losses.
        extras: What the trained layers have learned, by kind (see `EXTRAS`); nothing of a diverged run.
        memory: The bytes that its training takes on a device; None where they were not counted.
        machine: What executed it, in words.
        coverage: What each transform did with each parameter and kept for it, by transform.
    """

    epochs: tuple[EpochRecord, ...]
    diverged: bool
    threads: int
    transforms: dict[str, Any]
    warnings: tuple[str, ...]
    evaluation_seconds: float | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    memory: Memory | None = None
    machine: str = ""
    coverage: dict[str, CoverageRows] = field(default_factory=dict)
    stopped: bool = False

    @property
    def seconds_per_step(self) -> float | None:
        """Mean training seconds of a step; None if the run diverged in its first epoch."""
        return self.epochs[-1].seconds / self.epochs[-1].steps if self.epochs else None

    def check(self, steps: int, metric: Metric = ACCURACY) -> None:
        """Check what was read from a file.

        Args:
            steps: Steps of the run.
            metric: What its scores are.

        Raises:
            ValueError: If it holds what no run measures; the message names the figure and what was found.

        >>> epoch = EpochRecord(10, 1.0, 0.5, 90.0, 0.4, 500.0, 0.4)
        >>> RunRecord((epoch,), False, 1, {}, ()).check(steps=10)
        Traceback (most recent call last):
        ValueError: test_score must be a number from 0 to 100, got 500.0
        """
        begun = (0, 0.0)
        for epoch in self.epochs:
            epoch.check(steps, begun, metric)
            begun = (epoch.steps, epoch.seconds)
        for name in ("diverged", "stopped"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.stopped and (self.diverged or not self.epochs):
            raise ValueError("a run that was stopped must have an epoch and no divergence")
        if not self.diverged and not self.stopped and begun[0] != steps:
            raise ValueError(f"the last epoch must end after {steps} steps, got {begun[0]}")
        check_count("threads", self.threads, 1)
        if self.evaluation_seconds is not None:
            check_number("evaluation_seconds", self.evaluation_seconds, 0)
        if self.memory is not None:
            for kind in fields(self.memory):
                check_count(f"memory.{kind.name}", getattr(self.memory, kind.name), 0)
        for name, kinds in (("transforms", dict), ("extras", dict), ("coverage", dict), ("machine", str)):
            if not isinstance(getattr(self, name), kinds):
                raise ValueError(f"{name} must be a {kinds.__name__}, got {getattr(self, name)!r}")
        if not all(isinstance(said, str) for said in self.warnings):
            raise ValueError(f"warnings must be texts, got {self.warnings!r}")


class RunStore:
    """The finished runs of a folder, one JSON file each.

    Args:
        folder: Where they lie; it must exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, spec: RunSpec) -> Path:
        """Return the file of a run: readable, and different for everything that determines its result."""
        return self._file(spec, ".json")

    def checkpoint(self, spec: RunSpec) -> Path:
        """Return the file that a run is kept in while it is not finished."""
        return self._file(spec, ".ckpt")

    def _file(self, spec: RunSpec, ending: str) -> Path:
        swept = "".join(f"-{name}{_brief(value)}" for name, value in spec.swept)
        readable = f"{spec.method.name}-lr{spec.lr:g}{swept}-seed{spec.seed}-{spec.steps}steps"
        digest = spec.key()[:8]
        path = self.folder / f"{re.sub(r'[^A-Za-z0-9.+-]+', '-', readable)[:_LONGEST]}-{digest}{ending}"
        if path.exists():
            return path
        # Another comparison that has this run may sweep other options, and so call it otherwise.
        return next(iter(sorted(self.folder.glob(f"*-{digest}{ending}"))), path)

    def load(self, spec: RunSpec) -> RunRecord | None:
        """Return the kept record of a run; None if it is not there, or, with a note, if it is none of this run."""
        from wellcond.lab.runs.memory import Memory

        path = self.path(spec)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["key"] != spec.key():
                return None
            result = dict(content["result"])
            epochs = tuple(EpochRecord(**epoch) for epoch in result.pop("epochs"))
            memory = result.pop("memory")
            record = RunRecord(
                epochs=epochs,
                warnings=tuple(result.pop("warnings")),
                memory=None if memory is None else Memory(**memory),
                **result,
            )
            record.check(spec.steps, spec.metric)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = " ".join(str(error).split()) if isinstance(error, (OSError, ValueError)) else "its parts are others"
            print(
                f"wellcond: note: {path} is not what a run keeps ({why}): the run {spec.name} begins anew",
                file=sys.stderr,
            )
            return None
        return record

    def save(self, spec: RunSpec, record: RunRecord) -> None:
        """Keep a finished run. The file appears complete or not at all, whenever the process is killed."""
        content = {"key": spec.key(), "spec": spec.content(), "result": asdict(record)}
        write_atomically(self.path(spec), json.dumps(content, indent=1))
        self.checkpoint(spec).unlink(missing_ok=True)
        partial(self.checkpoint(spec)).unlink(missing_ok=True)
