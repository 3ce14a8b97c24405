"""A comparison from Python: `wellcond compare` as a function, on a task of one's own."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from wellcond.lab.comparison.compare import Comparison, run_comparison
from wellcond.lab.comparison.summary import Summary
from wellcond.lab.comparison.summing_up import summarize
from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import Method
from wellcond.lab.plan import Plan, make_plan, output_folder
from wellcond.lab.report.results import Results, collect_results, write_results
from wellcond.lab.report.terminal import print_summary
from wellcond.lab.runs.locks import locked
from wellcond.lab.runs.records import RunStore
from wellcond.lab.runs.settings import Settings
from wellcond.lab.tasks.base import Task
from wellcond.lab.tasks.own import as_task, scored_by
from wellcond.lab.training.progress import RunProgress

if TYPE_CHECKING:
    import pandas as pd

_WIDTH = 120


@dataclass(frozen=True)
class Result:
    """A finished comparison.

    Attributes:
        comparison: Every run, and what was chosen.
        summary: The numbers that the table and the report show.
        results: The same, with what it takes to read and repeat it.
        folder: Where the runs and the report are.
    """

    comparison: Comparison
    summary: Summary
    results: Results
    folder: Path

    def table(self) -> str:
        """Return what `wellcond compare` prints: each method's gain and cost against its baseline."""
        text = io.StringIO()
        print_summary(self.summary, self.results.title, Console(file=text, width=_WIDTH))
        return text.getvalue()

    def rows(self) -> list[dict[str, Any]]:
        """Return one dictionary for each epoch of each run.

        Its keys are ``method``, ``lr``, ``seed``, ``chosen`` (whether it is a full run of the chosen trial),
        ``run_steps``, ``epoch`` (from 1), ``steps``, ``seconds``, ``train_loss``, scores and losses of both splits, and
        the further scores of the test split as ``test_<name>``.
        """
        plan = self.comparison.plan
        chosen = {spec for found in self.comparison.methods.values() for spec in plan.table[found.chosen]}
        return [
            {
                "method": spec.method.name,
                "lr": spec.lr,
                "seed": spec.seed,
                "chosen": spec in chosen,
                "run_steps": spec.steps,
                "epoch": number,
                "steps": epoch.steps,
                "seconds": epoch.seconds,
                "train_loss": epoch.train_loss,
                "train_score": epoch.train_score,
                "validation_score": epoch.validation_score,
                "validation_loss": epoch.validation_loss,
                "test_score": epoch.test_score,
                "test_loss": epoch.test_loss,
                **{f"test_{name}": value for name, value in epoch.metrics.items()},
            }
            for spec, record in self.comparison.records.items()
            for number, epoch in enumerate(record.epochs, start=1)
        ]

    def frame(self) -> pd.DataFrame:
        """Return `rows` as a table of pandas.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise ImportError("frame() needs pandas: pip install pandas; rows() gives the same without it") from None
        return pd.DataFrame(self.rows())

    def report(self, path: str | Path | None = None) -> Path:
        """Write the report.

        Args:
            path: The HTML file; None: ``report.html`` in the comparison's folder, where it is already.

        Returns:
            The file.
        """
        written = self.folder / "report.html"
        if path is None:
            return written
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(written.read_text(encoding="utf-8"), encoding="utf-8")
        return file


def compare(
    task: Any,
    methods: Sequence[str | Method] | None = None,
    *,
    seeds: int = 5,
    epochs: int | None = None,
    lrs: Mapping[str, Sequence[float]] | Sequence[float] | None = None,
    out: str | Path | None = None,
    jobs: int = 1,
    score: str | None = None,
    quiet: bool = False,
    **options: Any,
) -> Result:
    """Train with several methods and paired seeds, and return what each gained and cost.

    Finished runs are kept in the folder, and an unfinished one every half minute: the same call again goes on where it
    was stopped, or only shows the results.

    Args:
        task: A `Task`, an object with its four methods, a class of either, an import path such as
            ``"my_project.training:MyTask"``, or what ``--data`` takes, such as ``"digits"``.
        methods: Names of methods as `wellcond list methods` shows them, or methods; None: the task's default methods.
        seeds: How many paired seeds.
        epochs: Epochs of a run; None: the task's.
        lrs: Learning rates to try: one list for all methods, or by optimizer, as ``{"SGD": [0.03, 0.1]}``; None: the
            methods' own.
        out: Folder of the results; None: ``runs/compare-<task>``.
        jobs: Runs at the same time.
        score: Which of the task's scores counts, such as ``"accuracy:max"``; None: the task's metric.
        quiet: Show no progress.
        options: Further fields of `Settings`, such as ``schedule``, ``precision`` or ``accelerator``.

    Returns:
        The result, with ``.table()``, ``.frame()`` and ``.report(path)``.

    Raises:
        LabError: If something asked for does not go together, or the task cannot be compared on.
        RunFailedError: If a run raises an exception; the finished runs are kept.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> settings = {"train_images": 64, "validation_images": 32, "epochs": 1, "quiet": True}
        >>> result = compare("digits", ["SGDM", "SGDM+GC"], seeds=1, lrs=[0.1], out=folder, **settings)
        >>> [method.name for method in result.summary.methods]
        ['SGDM', 'SGDM+GC']
    """
    plan = _plan(task, methods, seeds, epochs, lrs, jobs, score, options)
    folder = output_folder(plan, None if out is None else str(out))
    progress = RunProgress(Console(file=sys.stderr), quiet=quiet)
    with locked(folder), progress:
        comparison = run_comparison(plan, RunStore(folder / "runs"), progress)
    summary = summarize(comparison)
    results = collect_results(comparison, summary, f"wellcond.lab.compare({plan.task.name})")
    write_results(results, comparison.records, folder)
    return Result(comparison, summary, results, folder)


def _plan(
    task: Any,
    methods: Sequence[str | Method] | None,
    seeds: int,
    epochs: int | None,
    lrs: Mapping[str, Sequence[float]] | Sequence[float] | None,
    jobs: int,
    score: str | None,
    options: dict[str, Any],
) -> Plan:
    if isinstance(methods, str):
        raise LabError(f"methods must be a list of names, got the text {methods!r}")
    more = {method.name: method for method in methods or () if isinstance(method, Method)}
    names = (
        None if methods is None else tuple(method.name if isinstance(method, Method) else method for method in methods)
    )
    given: Task | None = None
    source: dict[str, Any] = {"score": score}
    if isinstance(task, str):
        source |= {"task": task} if ":" in task and not Path(task).exists() else {"data": task}
    else:
        given = as_task(task)
        if score is not None:
            given = scored_by(given, score)
        source |= {"task": given.name, "task_is_given": True}
    try:
        settings = Settings(methods=names, seeds=seeds, epochs=epochs, jobs=jobs, **source, **options)
    except TypeError as error:
        raise LabError(f"compare() {str(error).partition('() ')[2] or error}") from None
    return make_plan(settings, given, lrs=lrs, more=more)
