"""Estimates the seconds of comparisons from a few steps of each method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from wellcond.lab.hardware.machine import training_device
from wellcond.lab.methods.optimizers import take_step
from wellcond.lab.plan import Plan
from wellcond.lab.runs.records import RunSpec, RunStore
from wellcond.lab.training.network import initial_network

_STEPS = 3


def estimate_seconds(plans: Iterable[Plan], store: RunStore) -> tuple[int, float]:
    """Return how many runs are missing, and about how long they will take.

    Runs at equal wall time are not counted, nor what a run needs beside its steps and evaluations.

    Args:
        plans: The comparisons; a run that several of them have counts once.
        store: The finished runs.

    Returns:
        The number of runs, and the seconds for all of them, as many at once as the plans say.
    """
    missing: set[RunSpec] = set()
    total = 0.0
    for plan in plans:
        for trials in plan.trials.values():
            tried = {spec for trial in trials for spec in plan.table[trial][: plan.trial_seeds]}
            # Which trial the other seeds train is not known yet; all take about as long.
            specs = (tried | set(plan.table[trials[0]])) - missing
            wanted = {spec for spec in specs if store.load(spec) is None}
            if wanted:
                total += len(wanted) * _seconds_of_run(plan, plan.table[trials[0]][0]) / plan.settings.jobs
                missing |= wanted
    return len(missing), total


def _seconds_of_run(plan: Plan, spec: RunSpec) -> float:
    """Return the seconds of a run's steps and evaluations, measured on its first batches."""
    method = spec.method
    device = training_device()
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            task = plan.task
            model = initial_network(task, replace(spec, weights=None)).to(device)
            optimizer, handle = method.build(model, spec.lr, spec.refresh)
            data = task.for_seed(spec, device, rank=0, ranks=1)
            batches = data.batches().endless()

            def train() -> None:
                batch = next(batches)
                take_step(optimizer, lambda: data.loss(model, batch), method.second_order, method.clipping)

            step = _timed(train, device)
            # In training mode: it is the one way to call a network that every task has.
            with torch.no_grad():
                image = _timed(lambda: data.loss(model, next(batches)), device) / spec.batch_size
            if handle is not None:
                handle.remove()
    finally:
        torch.set_num_threads(threads)
    evaluated = spec.epochs * (plan.task.validation_images + plan.task.test_images)
    return spec.steps * step + evaluated * image


def _timed(act: Callable[[], object], device: torch.device) -> float:
    """Return the mean seconds of an act, the first time left out."""
    started = 0.0
    for index in range(_STEPS + 1):
        if index == 1:
            started = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / _STEPS
