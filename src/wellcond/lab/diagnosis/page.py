"""A diagnosis as one self-contained HTML page, and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wellcond.lab.diagnosis.diagnose import Diagnosis
from wellcond.lab.diagnosis.figures import sections
from wellcond.lab.diagnosis.findings import describe_diagnosis
from wellcond.lab.hardware.machine import machine, versions
from wellcond.lab.report.page import page_environment
from wellcond.lab.runs import files
from wellcond.lab.runs.files import rounded, write_atomically


def write_diagnosis(
    diagnosis: Diagnosis, folder: Path, *, title: str, settings: dict[str, Any], command: str
) -> list[Path]:
    """Write diagnose.html and diagnose.json.

    Args:
        diagnosis: What was found.
        folder: Where to; it must exist.
        title: What was diagnosed, in one line.
        settings: How, as JSON takes it; ``model`` and ``data`` among them.
        command: The command line that made it.

    Returns:
        The files, the page first.
    """
    page, numbers = folder / "diagnose.html", folder / "diagnose.json"
    write_atomically(numbers, diagnosis_json(diagnosis, title=title, settings=settings, command=command))
    write_atomically(page, render_diagnosis(diagnosis, title=title, settings=settings, command=command))
    return [page, numbers]


def render_diagnosis(diagnosis: Diagnosis, *, title: str, settings: dict[str, Any], command: str) -> str:
    """Return the page, which refers to nothing outside itself."""
    template = page_environment().get_template("diagnosis.html.j2")
    return template.render(
        model=settings["model"],
        data=settings["data"],
        title=title,
        findings=describe_diagnosis(diagnosis),
        sections=list(sections(diagnosis)),
        settings=settings,
        command=command,
        versions=versions(),
        machine=machine(),
    )


def diagnosis_json(diagnosis: Diagnosis, *, title: str, settings: dict[str, Any], command: str) -> str:
    """Return all numbers as JSON, one probe a line; what is infinite or not a number is null."""
    content = {
        "title": title,
        "command": command,
        "settings": settings,
        "versions": versions(),
        "machine": machine(),
        "findings": describe_diagnosis(diagnosis),
        **diagnosis.to_dict(),
    }
    return files.to_json(rounded(content))
