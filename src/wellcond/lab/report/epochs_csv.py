"""What every run measured after every epoch, as a table that any program reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from wellcond.lab.runs.records import RunRecord, RunSpec, write_atomically

_RUN = ("method", "lr", "seed", "run_steps", "epoch")


def write_epochs(records: Mapping[RunSpec, RunRecord], file: Path) -> None:
    """Write one line for each epoch of each run.

    Args:
        records: The runs.
        file: The CSV file.
    """
    rows = [
        dict(zip(_RUN, (spec.method.name, spec.lr, spec.seed, spec.steps, number), strict=True)) | _flat(asdict(epoch))
        for spec, record in records.items()
        for number, epoch in enumerate(record.epochs, start=1)
    ]
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names) or list(_RUN), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, text.getvalue())


def _flat(epoch: dict[str, object]) -> dict[str, object]:
    metrics = epoch.pop("metrics")
    assert isinstance(metrics, dict)
    return epoch | metrics
