"""Executes runs on the machines of a Ray cluster; their records come back to this process, which keeps them."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from wellcond.lab.engines.select import Finished, RunFailedError, given_task, told_by_worker
from wellcond.lab.errors import DataError, LabError
from wellcond.lab.hardware.code_digest import code_digest
from wellcond.lab.hardware.machine import training_device, versions
from wellcond.lab.plan import Plan
from wellcond.lab.runs.records import RunRecord, RunSpec, RunStore
from wellcond.lab.runs.settings import Settings
from wellcond.lab.tasks.base import Task
from wellcond.lab.tasks.open import open_task

LOST_WORKERS = 3
"""How often a run is begun again on another worker when its own is lost, before the comparison ends."""


class RayCluster:
    """Executes runs on a Ray cluster.

    A run takes as many of Ray's CPUs as it has threads and, on GPUs, the share 1 / jobs of one. When the worker or the
    machine of a run is lost, Ray begins it again elsewhere; a run that raises is not repeated. Workers open the data
    under its path, so that all machines must have it there, and must have the same versions of everything.

    Args:
        address: The cluster, such as ``"10.0.0.1:6379"`` or ``"auto"``; None: that of the environment variable
            RAY_ADDRESS, or else a cluster of this machine alone, which ends with the runs.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address

    def execute(self, plan: Plan, specs: Sequence[RunSpec], store: RunStore) -> Iterator[Finished]:
        """Execute runs; see `Engine.execute`.

        Raises:
            LabError: If there is no cluster at the address, or none of its machines has what a run needs.
        """
        connected = ray.is_initialized()
        if not connected:
            _connect(self.address)
        running: dict[Any, RunSpec] = {}
        try:
            gpus = ray.cluster_resources().get("GPU", 0)
            needs = {"num_cpus": plan.threads, "num_gpus": 1 / plan.settings.jobs if gpus else 0}
            _check_machines(needs)
            task = ray.remote(max_retries=LOST_WORKERS, retry_exceptions=False, **needs)(_work)
            settings = ray.put((_anywhere(plan.settings), given_task(plan), sys.path))
            folder = store.folder.resolve()
            expected = (versions(), code_digest())
            for spec in specs:
                running[task.remote(settings, expected, plan.threads, folder, spec)] = spec
            while running:
                (finished, *_), _ = ray.wait(list(running), num_returns=1)
                spec = running.pop(finished)
                try:
                    answer = ray.get(finished)
                except RayError as error:
                    raise RunFailedError(
                        spec, f"its worker was lost {LOST_WORKERS + 1} times, the last time so:\n{error}"
                    ) from error
                yield told_by_worker(spec, answer)
        finally:
            for unfinished in running:
                ray.cancel(unfinished, force=True)
            if not connected:
                ray.shutdown()


def _connect(address: str | None) -> None:
    """Join the cluster, or begin one on this machine if neither the address nor RAY_ADDRESS names any."""
    named = address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if named:
            _knock(named)
            ray.init(address=named, **quiet)
        else:
            ray.init(include_dashboard=False, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise LabError(f"--engine ray: there is no Ray cluster at the address {named!r}: {first}") from None


def _knock(address: str) -> None:
    """Raise an OSError if nobody listens there: Ray itself would try for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _check_machines(needs: dict[str, float]) -> None:
    """Raise if no machine could ever begin a run: Ray would wait for one without a word."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(
        node.get("CPU", 0) >= needs["num_cpus"] and node.get("GPU", 0) >= needs["num_gpus"] for node in machines
    ):
        most = max((node.get("CPU", 0) for node in machines), default=0)
        raise LabError(
            f"--engine ray: a run takes {needs['num_cpus']:g} CPUs, as many as it has threads (see --jobs and "
            f"OMP_NUM_THREADS), and no machine of the cluster has more than {most:g}"
        )


def _anywhere(settings: Settings) -> Settings:
    """Return the settings with paths that do not depend on the folder in which a process runs."""
    weights = settings.weights
    return replace(
        settings,
        data=str(Path(settings.data).resolve()) if Path(settings.data).exists() else settings.data,
        weights=weights if weights is None or not Path(weights).exists() else str(Path(weights).resolve()),
    )


def _work(
    sent: tuple[Settings, Task | None, list[str]],
    expected: tuple[dict[str, str], str],
    threads: int,
    folder: Path,
    spec: RunSpec,
) -> RunRecord | DataError | str:
    """Execute a run on a worker; return its record, a mistake in the data, or why it failed."""
    try:
        here = (versions(), code_digest())
        if here != expected:
            return f"its worker has other software: {here[0]}, not {expected[0]}, or other code of the same version"
        torch.set_num_threads(threads)
        settings, given, paths = sent
        # A task of one's own is imported from where the command runs, if the machines share it.
        sys.path += [path for path in paths if path not in sys.path]
        runner = _runner(settings, folder, given)
        if runner.task.digest != spec.data:
            return f"the data in {settings.data} on its worker is not the data here"
        record: RunRecord = runner.run(spec)
        return record
    except DataError as error:
        return error
    except Exception:
        return traceback.format_exc()


@lru_cache(maxsize=1)
def _runner(settings: Settings, folder: Path, given: Task | None) -> Any:
    """Return a worker's runner, whose data it keeps for the runs to come."""
    from wellcond.lab.training.checkpoint import Checkpointing
    from wellcond.lab.training.runner import Runner

    # On a machine that does not share the folder, an unfinished run cannot be kept where the next one would look.
    checkpoints = Checkpointing(folder, settings.checkpoint_every) if folder.is_dir() else None
    return Runner(given or open_task(settings), training_device(settings.accelerator), checkpoints=checkpoints)
