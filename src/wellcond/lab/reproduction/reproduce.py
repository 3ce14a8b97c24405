"""Runs a recipe: every panel a comparison, and the source's figures beside what it measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from wellcond.lab.comparison.compare import Comparison, MethodRuns, run_comparison
from wellcond.lab.comparison.statistics import Difference, Spread, paired_difference, spread
from wellcond.lab.comparison.summary import Curve, MethodSummary, Summary
from wellcond.lab.comparison.summing_up import summarize
from wellcond.lab.errors import LabError
from wellcond.lab.hardware.machine import machine, training_device, versions
from wellcond.lab.plan import Plan, make_plan
from wellcond.lab.report.findings import notes
from wellcond.lab.report.results import collect_results
from wellcond.lab.reproduction.claims import Claim, SharesOfRuns, check_claim
from wellcond.lab.reproduction.panels import ScaledPanel
from wellcond.lab.reproduction.recipe import PanelTable, Recipe
from wellcond.lab.runs.records import RunStore
from wellcond.lab.runs.settings import Scale, Settings
from wellcond.lab.tasks.base import Task
from wellcond.lab.tasks.open import find_layout, open_task
from wellcond.lab.training.progress import RunProgress

SECONDS = "seconds per epoch"
"""The metric that every run has: training seconds of an epoch."""

# Of two panels whose settings agree in these, the second can take the first's images.
_DATA_FIELDS = ("data", "image_size", "train_images", "validation_images", "test_images", "augmentation")


@dataclass(frozen=True)
class Figure:
    """A method of a panel: the source's figures and ours.

    Attributes:
        label: How the source calls the method.
        summary: What was measured of it.
        paper: The source's mean and standard deviation; None where it gives no figure.
        ours: Our mean and standard deviation over the seeds, as the recipe counts its score; None if a probe measures
            it and all runs diverged.
        ends: The score of each seed.
        paper_difference: The source's mean less its baseline's mean.
        difference: Ours, paired over the seeds; None for a baseline.
        equal_time: The same at the baseline's wall time.
        paper_metrics: The source's further figures.
        metrics: Ours, also seconds per epoch.
    """

    label: str
    summary: MethodSummary
    paper: tuple[float, float | None] | None
    ours: Spread | None
    ends: tuple[float, ...]
    paper_difference: float | None
    difference: Difference | None
    equal_time: Difference | None
    paper_metrics: dict[str, float]
    metrics: dict[str, float]

    @property
    def verdict(self) -> str:
        """Whether our difference points where the source's does: one line, empty where one of them is missing."""
        if self.difference is None or self.paper_difference is None:
            return ""
        if self.difference.mean == 0 or self.paper_difference == 0:
            return "no difference"
        same = self.difference.mean * self.paper_difference > 0
        if self.difference.low is None:
            chance = "one seed"
        else:
            chance = "beyond chance" if self.difference.beyond_chance else "within chance"
        return f"{'same direction' if same else 'other direction'}, {chance}"


@dataclass(frozen=True)
class PanelResults:
    """A panel that was run.

    Attributes:
        name: What it is called.
        title: What was trained, in one line.
        settings: What was compared, the defaults filled in.
        differs: What the scale changed: from a setting to the source's own value and the scale's.
        summary: What was measured.
        figures: Its methods.
        notes: What weakens the numbers.
        shares: The learned shares of each method's runs, by lr, of those that have any; none where options are swept.
    """

    name: str
    title: str
    settings: dict[str, Any]
    differs: dict[str, tuple[Any, Any]]
    summary: Summary
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]
    shares: dict[str, SharesOfRuns] = field(default_factory=dict)

    def learned(self, label: str) -> tuple[Any, ...]:
        """Return the shares of each run of a method's chosen trial; none if it was not compared."""
        return next((m.extras.get("shares", ()) for m in self.summary.methods if m.name == label), ())


@dataclass(frozen=True)
class Reproduction:
    """A recipe that was run.

    Attributes:
        recipe: The recipe.
        scale: At which scale.
        data: From each data set's name to where it lies.
        command: The command line.
        panels: Its panels.
        claims: What the source says of learned shares and the runs say to it; without those whose panels were not run.
        versions: Of Python and of the packages that decide the numbers.
        machine: Where they were measured.
    """

    recipe: Recipe
    scale: Scale
    data: dict[str, str]
    command: str
    panels: tuple[PanelResults, ...]
    claims: tuple[Claim, ...]
    versions: dict[str, str]
    machine: dict[str, str]


class TaskShelf:
    """Keeps the last task that was opened, for the next panel on the same images."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[Any, ...], Task] | None = None

    def open(self, settings: Settings) -> Task:
        """Return the task of these settings, opened anew only if it is another than the last."""
        key = tuple(getattr(settings, name) for name in _DATA_FIELDS)
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # before the next one is loaded: both might not fit into memory
            self._kept = (key, open_task(settings))
        return self._kept[1]


def reproduce(
    recipe: Recipe,
    panels: Sequence[ScaledPanel],
    settings: Sequence[Settings],
    store: RunStore,
    progress: RunProgress,
) -> tuple[PanelResults, ...]:
    """Run panels one after the other.

    Args:
        recipe: The recipe.
        panels: Its panels.
        settings: Those of each panel.
        store: Where finished runs are kept.
        progress: Told of every finished run.

    Returns:
        The panels' results.

    Raises:
        LabError: If a panel's settings do not fit its data.
        RunFailedError: If a run fails; the finished ones are kept.
    """
    shelf = TaskShelf()
    _check(panels, settings, shelf)
    results = []
    for panel, asked in zip(panels, settings, strict=True):
        with _naming(panel):
            plan = make_plan(asked, shelf.open(asked))
        progress.say(f"{panel.table.name}: {', '.join(method.name for method in plan.methods)}")
        comparison = run_comparison(plan, store, progress, equal_time=recipe.equal_time)
        results.append(panel_results(recipe, panel, comparison))
    return tuple(results)


def _check(panels: Sequence[ScaledPanel], settings: Sequence[Settings], shelf: TaskShelf) -> None:
    """Look at every panel's data and settings before the first is run, which may take days."""
    for panel, asked in zip(panels, settings, strict=True):
        with _naming(panel):
            find_layout(asked.data)
    checked = None
    for panel, asked in zip(panels, settings, strict=True):
        with _naming(panel):
            task = shelf.open(asked)
            make_plan(asked, task)
            if task is not checked:
                task.check(training_device(asked.accelerator))
            checked = task


@contextmanager
def _naming(panel: ScaledPanel) -> Iterator[None]:
    try:
        yield
    except LabError as error:
        raise LabError(f"panel {panel.table.name}: {error}") from error


def panel_results(recipe: Recipe, panel: ScaledPanel, comparison: Comparison) -> PanelResults:
    """Return a panel's figures beside the source's.

    Args:
        recipe: The recipe.
        panel: The panel.
        comparison: Its finished comparison.
    """
    summary = summarize(comparison)
    results = collect_results(comparison, summary, "")
    figures = tuple(_figure(recipe, panel, comparison, method) for method in summary.methods)
    return PanelResults(
        name=panel.table.name,
        title=results.title,
        settings={key: value for key, value in results.settings.items() if key != "methods"},
        differs=panel.differs,
        summary=summary,
        figures=figures,
        notes=tuple(notes(summary)),
        shares={} if summary.sweeps else {name: _shares(found) for name, found in comparison.methods.items()},
    )


def _shares(found: MethodRuns) -> SharesOfRuns:
    return {trial.lr: [run.extras.get("shares") for run in runs] for trial, runs in found.trials.items()}


def _figure(recipe: Recipe, panel: ScaledPanel, comparison: Comparison, method: MethodSummary) -> Figure:
    table = panel.table
    ends = _ends(recipe, table, comparison.plan, method)
    if table.figure is not None:
        difference = _probed_difference(table.figure, comparison, method)
        equal_time = None
    else:
        flipped = recipe.score == "error"
        difference = _counted(method.final_difference, flipped)
        equal_time = _counted(method.equal_time.difference if method.equal_time else None, flipped)
    paper, base = table.paper.get(method.name), table.paper.get(method.baseline)
    paper_difference = paper[0] - base[0] if paper and base and not method.is_baseline else None
    return Figure(
        label=method.name,
        summary=method,
        paper=paper,
        ours=spread(ends) if ends else None,
        ends=ends,
        # Of two figures with two digits; more would be noise of the subtraction.
        paper_difference=None if paper_difference is None else round(paper_difference, 4),
        difference=difference,
        equal_time=equal_time,
        paper_metrics={
            name: by_label[method.name][0] for name, by_label in table.metrics.items() if method.name in by_label
        },
        metrics=_metrics(method.curves),
    )


def _ends(recipe: Recipe, table: PanelTable, plan: Plan, method: MethodSummary) -> tuple[float, ...]:
    """Return what each seed ended with: its last test score (that of guessing if it diverged), or the probe's."""
    if table.figure is not None:
        return tuple(found[table.figure] for found in method.extras.get("probe", ()) if found is not None)
    ends = [plan.task.chance if curve.seed in method.unfinished else curve.test_score[-1] for curve in method.curves]
    return tuple(100.0 - end for end in ends) if recipe.score == "error" else tuple(ends)


def _probed_difference(figure: str, comparison: Comparison, method: MethodSummary) -> Difference | None:
    """Return the paired difference of a probe's figure, over the seeds in which both runs have it."""
    if method.is_baseline:
        return None
    mine, theirs = comparison.methods[method.name].runs, comparison.methods[method.baseline].runs
    pairs = [
        (one.extras["probe"][figure], other.extras["probe"][figure])
        for one, other in zip(mine, theirs, strict=True)
        if "probe" in one.extras and "probe" in other.extras
    ]
    return paired_difference([one for one, _ in pairs], [other for _, other in pairs]) if pairs else None


def _counted(difference: Difference | None, flipped: bool) -> Difference | None:
    """Return a difference as the score counts it: fewer errors are a negative difference."""
    if difference is None or not flipped:
        return difference
    if difference.low is None or difference.high is None:
        return Difference(-difference.mean, None, None, difference.count)
    return Difference(-difference.mean, -difference.high, -difference.low, difference.count)


def _metrics(curves: Sequence[Curve]) -> dict[str, float]:
    """Return the mean of each metric after the last epoch, over the runs that have it, and the seconds of an epoch."""
    names = dict.fromkeys(name for curve in curves for name in curve.metrics)
    found = {name: fmean(curve.metrics[name][-1] for curve in curves if curve.metrics.get(name)) for name in names}
    seconds = [curve.seconds[-1] / len(curve.seconds) for curve in curves if curve.seconds]
    return found | ({SECONDS: fmean(seconds)} if seconds else {})


def collect(
    recipe: Recipe, scale: Scale, data: Mapping[str, str], command: str, panels: tuple[PanelResults, ...]
) -> Reproduction:
    """Return the panels with what it takes to read and repeat them."""
    by_name = {panel.name: panel for panel in panels}
    claims = []
    for table in recipe.claims:
        both = [by_name[name] for name in table.panels if name in by_name]
        chosen = [panel.learned(table.method) for panel in both]
        if len(both) == 2 and all(chosen):
            claims.append(check_claim(table, chosen, [panel.shares.get(table.method, {}) for panel in both]))
    said = tuple(claim for claim in claims if claim is not None)
    return Reproduction(recipe, scale, dict(data), command, panels, said, versions(), machine())
