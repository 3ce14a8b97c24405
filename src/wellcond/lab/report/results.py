"""Writes what a comparison found to its folder: JSON, curves, and the report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wellcond.lab.comparison.compare import Comparison
from wellcond.lab.comparison.summary import Summary
from wellcond.lab.hardware.launch import launched
from wellcond.lab.hardware.machine import machine, versions
from wellcond.lab.plan import Plan
from wellcond.lab.report.curves import draw_png
from wellcond.lab.report.findings import findings, notes
from wellcond.lab.report.page import render_report
from wellcond.lab.runs.records import write_atomically
from wellcond.lab.runs.settings import Settings

FORMAT = 2
"""The version of results.json's layout."""


@dataclass(frozen=True)
class Results:
    """A comparison in numbers, with what it takes to read and repeat it.

    Attributes:
        summary: The numbers.
        settings: What was compared, the defaults filled in.
        command: The command line.
        versions: Of Python and of the packages that decide the numbers.
        machine: Where they were measured.
    """

    summary: Summary
    settings: dict[str, Any]
    command: str
    versions: dict[str, str]
    machine: dict[str, str]

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
    return Results(summary, _settings(comparison.plan), command, versions(), machine())


def write_results(results: Results, folder: Path) -> list[Path]:
    """Write results.json, the curves and the report.

    Args:
        results: What to write.
        folder: Where to; it must exist.

    Returns:
        The files, the report first.
    """
    report, numbers = folder / "report.html", folder / "results.json"
    pictures = [folder / "curves-epochs.png", folder / "curves-seconds.png"]
    draw_png(results.summary, "epochs", pictures[0])
    draw_png(results.summary, "seconds", pictures[1])
    write_atomically(numbers, to_json(results))
    write_atomically(
        report,
        render_report(
            results.summary, results.title, results.settings, results.command, results.versions, results.machine
        ),
    )
    return [report, *pictures, numbers]


def to_json(results: Results) -> str:
    """Return the results as JSON, one method a line: small, and still to be read by eye."""
    summary = asdict(results.summary)
    methods = summary.pop("methods")
    content = {
        "format": FORMAT,
        "title": results.title,
        "command": results.command,
        "settings": results.settings,
        "versions": results.versions,
        "machine": results.machine,
        "findings": findings(results.summary),
        "notes": notes(results.summary),
        **summary,
    }
    lines = [f"{json.dumps(key)}: {json.dumps(rounded(value))}" for key, value in content.items()]
    listed = ",\n".join(json.dumps(rounded(method)) for method in methods)
    return "{\n" + ",\n".join([*lines, f'"methods": [\n{listed}\n]']) + "\n}\n"


def rounded(value: Any) -> Any:
    """Return a value as JSON takes it, with its floats cut to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def _settings(plan: Plan) -> dict[str, Any]:
    return {
        "data": plan.settings.task or plan.settings.data,
        "task": plan.task.kind,
        "samples": plan.task.samples,
        **plan.task.describe(),
        "train_images": plan.task.train_images,
        "validation_images": plan.task.validation_images,
        "test_images": plan.task.test_images,
        "augmentation": plan.task.augmentation,
        "model": plan.model,
        "methods": [method.name for method in plan.methods],
        "seeds": plan.settings.seeds,
        "epochs": plan.epochs,
        "batch_size": plan.batch_size,
        "ghost_batch": plan.settings.ghost_batch,
        "steps_per_epoch": plan.steps_per_epoch,
        "stats_every": plan.refresh.stats_every,
        "solve_every": plan.refresh.solve_every,
        "schedule": plan.settings.schedule,
        "warmup": plan.settings.warmup,
        "precision": plan.settings.precision,
        "deterministic": plan.settings.deterministic,
        "label_smoothing": plan.settings.label_smoothing,
        "weights": plan.settings.weights,
        "jobs": plan.settings.jobs,
        "threads": plan.threads,
        **_processes(plan.settings),
    }


def _processes(settings: Settings) -> dict[str, Any]:
    ranks = launched().size
    if ranks == 1:
        return {}
    return {
        "processes of a run": ranks,
        "strategy": "fsdp" if settings.strategy == "fsdp" else "ddp",
        "batch statistics": "of each process's share of a batch; evaluated with the first process's running statistics",
    }
