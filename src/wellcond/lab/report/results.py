"""Writes what a comparison found to its folder: numbers, curves, the epochs of every run, the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wellcond.lab.comparison.compare import Comparison
from wellcond.lab.comparison.summary import Summary
from wellcond.lab.hardware.launch import launched
from wellcond.lab.hardware.machine import machine, versions
from wellcond.lab.plan import Plan
from wellcond.lab.report.charts import Axis, curves
from wellcond.lab.report.drawing import draw_png
from wellcond.lab.report.findings import describe_comparison, notes
from wellcond.lab.report.page import render_report
from wellcond.lab.report.table import to_csv
from wellcond.lab.runs.comparison_file import FILE_NAME, write_comparison
from wellcond.lab.runs.files import replacing, rounded, to_json, write_atomically
from wellcond.lab.runs.option import options_of
from wellcond.lab.runs.records import RunRecord, RunSpec
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.training_options import TrainingOptions
from wellcond.lab.tasks.base import Task

FORMAT = 2
"""The version of results.json's layout."""

# What tells the run of a line of epochs.csv.
_RUN = ("method", "lr", "seed", "run_steps", "epoch")


@dataclass(frozen=True)
class Results:
    """A comparison in numbers, with what it takes to read and repeat it.

    Attributes:
        summary: The numbers.
        settings: What was compared, the defaults filled in.
        command: The command line.
        versions: Of Python and of the packages that decide the numbers.
        machine: Where they were measured.
        file: Text of the file that repeats it.
    """

    summary: Summary
    settings: dict[str, Any]
    command: str
    versions: dict[str, str]
    machine: dict[str, str]
    file: str

    @property
    def title(self) -> str:
        """What was compared, in one line."""
        s = self.settings
        ghost = "" if s["ghost_batch"] is None else f", ghost groups of {s['ghost_batch']}"
        size = f" of {s['image_size']}" if "image_size" in s else ""
        return (
            f"{_called(s)}{size}, {s['model']}, "
            f"{_counted(s['epochs'], 'epoch')} of {_counted(s['steps_per_epoch'], 'step')}{ghost}"
        )


def _called(settings: dict[str, Any]) -> str:
    """Return what was trained on, in words."""
    if settings["samples"] != "images":
        return str(settings["data"]).rpartition(":")[2]
    return f"{Path(settings['data']).name}: {settings['train_images']} training images"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def collect_results(comparison: Comparison, summary: Summary, command: str) -> Results:
    """Return a comparison's results.

    Args:
        comparison: The finished comparison.
        summary: Its numbers.
        command: The command line that made it.
    """
    file = write_comparison(comparison.plan.settings, command)
    return Results(summary, _settings(comparison.plan), command, versions(), machine(), file)


def write_results(results: Results, records: Mapping[RunSpec, RunRecord], folder: Path) -> list[Path]:
    """Write results.json, epochs.csv, the curves, the file that repeats the comparison, and the report.

    Args:
        results: What to write.
        records: Every run.
        folder: Where to; it must exist.

    Returns:
        The files, the report first.
    """
    summary = results.summary
    report, numbers, epochs = (folder / name for name in ("report.html", "results.json", "epochs.csv"))
    pictures: dict[Axis, Path] = {"epochs": folder / "curves-epochs.png", "seconds": folder / "curves-seconds.png"}
    note = f"mean over {summary.seeds} seeds, band: ± 1 standard deviation" if summary.seeds > 1 else ""
    write_atomically(numbers, results_json(results))
    write_atomically(folder / FILE_NAME, results.file)
    write_atomically(
        report,
        render_report(
            summary,
            results.title,
            results.settings,
            results.command,
            results.versions,
            results.machine,
            results.file,
        ),
    )
    for axis, picture in pictures.items():
        with replacing(picture) as file:
            draw_png(curves(summary, axis), file, note)
    write_atomically(epochs, to_csv(_epochs(records), _RUN))
    return [report, *pictures.values(), numbers, epochs, folder / FILE_NAME]


def results_json(results: Results) -> str:
    """Return what results.json holds."""
    return to_json(
        {
            "format": FORMAT,
            "title": results.title,
            "command": results.command,
            "settings": rounded(results.settings),
            "versions": results.versions,
            "machine": results.machine,
            "findings": describe_comparison(results.summary),
            "notes": notes(results.summary),
            **asdict(results.summary),
        }
    )


def _epochs(records: Mapping[RunSpec, RunRecord]) -> list[dict[str, Any]]:
    """Return a line for each epoch of each run."""
    rows = []
    for spec, record in records.items():
        for number, epoch in enumerate(record.epochs, start=1):
            measured = asdict(epoch)
            metrics = measured.pop("metrics")
            run = dict(zip(_RUN, (spec.method.name, spec.lr, spec.seed, spec.steps, number), strict=True))
            rows.append(run | measured | metrics)
    return rows


def _settings(plan: Plan) -> dict[str, Any]:
    return {
        "data": plan.settings.task or plan.settings.data,
        "task": plan.task.kind,
        "samples": plan.task.samples,
        **plan.task.describe(),
        **_numbers(plan.task),
        "methods": [method.name for method in plan.methods],
        "seeds": plan.settings.seeds,
        **_search(plan.settings),
        **{name: getattr(plan.template, name) for name, said in options_of(TrainingOptions).items() if said.offered},
        "steps_per_epoch": plan.steps_per_epoch,
        "jobs": plan.settings.jobs,
        "threads": plan.threads,
        **_processes(plan.settings),
    }


def _numbers(task: Task) -> dict[str, Any]:
    """Return how many samples the task has, in its own word for them, and what they go through."""
    parts = {"train": task.train_images, "validation": task.validation_images, "test": task.test_images}
    # A task of one's own need not count what it holds out, and augments by itself.
    counts = {f"{part}_{task.samples}": count for part, count in parts.items() if count}
    return counts | ({"augmentation": task.augmentation} if task.augmentation else {})


def _search(settings: Settings) -> dict[str, Any]:
    """Return how trials were laid out and chosen, where that is not the usual."""
    said: dict[str, Any] = {} if settings.mode == "final" else {"chosen for": "the fewest epochs to the target"}
    if settings.time_shares != (1.0,):
        said["shares of the baseline's time"] = ", ".join(f"{share:g}" for share in settings.time_shares)
    if settings.sweeps:
        said["swept"] = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in settings.sweeps)
    if settings.trial_seeds not in (None, settings.seeds):
        said["seeds that choose"] = settings.trial_seeds
    if settings.search != "grid":
        said["search"] = settings.search
    return said


def _processes(settings: Settings) -> dict[str, Any]:
    ranks = launched().size
    if ranks == 1:
        return {}
    return {
        "processes of a run": ranks,
        "strategy": "fsdp" if settings.strategy == "fsdp" else "ddp",
        "batch statistics": "of each process's share of a batch; evaluated with the first process's running statistics",
    }
