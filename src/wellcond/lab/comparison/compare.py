"""Runs a comparison: every (seed, lr, method), the choice of the lr, and the runs at equal wall time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wellcond.lab.comparison.lr_choice import choose_lr
from wellcond.lab.comparison.statistics import median_ratio
from wellcond.lab.engines.select import execute
from wellcond.lab.hardware.launch import from_first, launched
from wellcond.lab.methods.method import Method
from wellcond.lab.plan import Plan
from wellcond.lab.runs.records import RunRecord, RunSpec, RunStore
from wellcond.lab.training.progress import RunProgress


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        plan: What was compared.
        records: Every run.
        chosen: The lr chosen for each method.
        time_ratios: Each method's time per step over its baseline's; None where no pair of runs has times.
        evaluation_ratios: Each method's time to evaluate an image over its baseline's; None where no pair has times.
        memory_ratios: Each method's peak memory over its baseline's; None where no pair has it.
        equal_time_steps: Steps that each method but the baselines can take in its baseline's wall time.
    """

    plan: Plan
    records: dict[RunSpec, RunRecord]
    chosen: dict[str, float]
    time_ratios: dict[str, float | None]
    evaluation_ratios: dict[str, float | None]
    memory_ratios: dict[str, float | None]
    equal_time_steps: dict[str, int]

    def runs(self, method: Method, lr: float | None = None, steps: int | None = None) -> list[RunRecord]:
        """Return a method's runs in the order of the seeds, at the chosen lr unless another is named."""
        lr = self.chosen[method.name] if lr is None else lr
        return [self.records[self.plan.spec(method, lr, seed, steps)] for seed in range(self.plan.settings.seeds)]


def run_comparison(plan: Plan, store: RunStore, progress: RunProgress, equal_time: bool = True) -> Comparison:
    """Execute what the store does not have yet, and choose what depends on it.

    Args:
        plan: What to compare.
        store: Where finished runs are kept; those already there are not repeated.
        progress: Told of every finished run.
        equal_time: Train each method but the baselines again for its baseline's wall time.

    Returns:
        The comparison with all its runs.

    Raises:
        RunFailedError: If a run fails; the finished ones are kept.
    """
    records: dict[RunSpec, RunRecord] = {}
    specs = plan.specs()
    with_baseline = [method for method in plan.methods if equal_time and plan.baselines[method.name] != method.name]
    _complete(plan, specs, store, records, progress, later=len(with_baseline) * plan.settings.seeds)
    seeds = range(plan.settings.seeds)
    chosen = {
        method.name: choose_lr({lr: [records[plan.spec(method, lr, seed)] for seed in seeds] for lr in method.lrs})
        for method in plan.methods
    }
    ratios = {method.name: time_ratio(plan, method, records) for method in plan.methods}
    evaluation = {
        method.name: paired_ratio(plan, method, records, lambda record: record.evaluation_seconds)
        for method in plan.methods
    }
    memory = {method.name: paired_ratio(plan, method, records, _peak) for method in plan.methods}
    budgets = {
        method.name: max(1, round(plan.steps / ratio))
        for method in with_baseline
        if (ratio := ratios[method.name]) is not None
    }
    equal = [
        plan.spec(method, chosen[method.name], seed, budgets[method.name])
        for seed in seeds
        for method in with_baseline
        if method.name in budgets
    ]
    # A budget of exactly a full run is that full run, which is there already.
    equal = [spec for spec in equal if spec not in records]
    _complete(plan, equal, store, records, progress, later=0)
    return Comparison(plan, records, chosen, ratios, evaluation, memory, budgets)


def _complete(
    plan: Plan,
    specs: Sequence[RunSpec],
    store: RunStore,
    records: dict[RunSpec, RunRecord],
    progress: RunProgress,
    later: int,
) -> None:
    """Add the records of these runs; `later` is how many more runs are to come after them, as far as is known."""
    # What the first rank finds, so that all train the same runs.
    kept = from_first(lambda: {spec: record for spec in specs if (record := store.load(spec)) is not None})
    records.update(kept)
    missing = [spec for spec in specs if spec not in kept]
    progress.expect(missing=len(missing), kept=len(kept), later=later)
    for spec, record in execute(plan, missing, store):
        if launched().rank == 0:
            store.save(spec, record)
        records[spec] = record
        progress.advance(spec.method.name)


def time_ratio(plan: Plan, method: Method, records: dict[RunSpec, RunRecord]) -> float | None:
    """Return the median ratio of a method's seconds per step to its baseline's; see `paired_ratio`."""
    return paired_ratio(plan, method, records, lambda record: record.seconds_per_step)


def paired_ratio(
    plan: Plan, method: Method, records: dict[RunSpec, RunRecord], measured: Callable[[RunRecord], float | None]
) -> float | None:
    """Return the median, over (seed, lr) pairs, of what was measured of the method over its baseline's.

    Args:
        plan: What was compared.
        method: The method.
        records: All runs of all epochs.
        measured: What to take of a run; None where it has none.

    Returns:
        The ratio; None where no pair has both.
    """
    baseline = next(other for other in plan.methods if other.name == plan.baselines[method.name])
    pairs = [
        (measured(mine), measured(theirs))
        for seed in range(plan.settings.seeds)
        for mine, theirs in (
            (records[plan.spec(method, lr, seed)], records[plan.spec(baseline, reference_lr, seed)])
            for lr, reference_lr in zip(method.lrs, baseline.lrs, strict=True)
        )
        if mine.epochs and theirs.epochs
    ]
    both = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
    if not both:
        return None
    return median_ratio([mine for mine, _ in both], [theirs for _, theirs in both])


def _peak(record: RunRecord) -> float | None:
    return None if record.memory is None else float(record.memory.peak)
