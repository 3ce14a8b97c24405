"""The bytes that training takes: exact where they are known beforehand, the same each time, and blind to the rest."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from wellcond.lab.benchmark.steps import NoiseWorkload
from wellcond.lab.methods.method import METHODS, Refresh
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.memory import measure_memory, tensor_bytes
from wellcond.lab.runs.settings import Settings
from wellcond.lab.training.run_memory import RunMemory

CPU = torch.device("cpu")
MB = 2**20


def linear(width: int, momentum: float):
    """A step of one weight matrix [width, width], whose input is one row."""

    def build():
        model = nn.Linear(width, width, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, foreach=False)
        row = torch.ones(1, width)

        def step():
            optimizer.zero_grad()
            model(row).sum().backward()
            optimizer.step()

        return model, optimizer, step

    return build


def test_parts_are_exact_and_the_peak_is_their_sum_where_features_are_small():
    memory = measure_memory(linear(512, momentum=0.9), CPU)
    assert (memory.parameters, memory.buffers, memory.optimizer_state) == (MB, 0, MB)
    # Weight, gradient, momentum; the rows are 2 kB each.
    assert 3 * MB <= memory.peak < 3 * MB + 64 * 1024


def test_without_momentum_the_optimizer_keeps_nothing():
    memory = measure_memory(linear(512, momentum=0.0), CPU)
    assert memory.optimizer_state == 0
    assert 2 * MB <= memory.peak < 2 * MB + 64 * 1024


def test_a_temporary_counts_although_it_is_gone_at_the_end():
    def build():
        model, optimizer, step = linear(64, momentum=0.0)()
        return model, optimizer, lambda: (torch.zeros(8 * MB // 4), step())

    memory = measure_memory(build, CPU)
    assert memory.peak >= 8 * MB


def test_the_count_is_the_same_each_time_whatever_the_process_holds():
    workload = NoiseWorkload("convnet", 32, 8, Refresh(1, 1), CPU)

    def build():
        timer = workload.timer(METHODS["W-SGDM"], Refresh(1, 1))
        return timer.model, timer.optimizer, timer.seconds

    first = measure_memory(build, CPU)
    held = torch.ones(4 * MB)
    second = measure_memory(build, CPU)
    assert measure_memory(build, CPU) == second
    assert first.peak - second.peak < 4096  # constants that the process keeps from its first step on
    assert held.sum() == 4 * MB


def test_a_preconditioners_state_is_counted_with_the_optimizers():
    def memory(name):
        workload = NoiseWorkload("convnet", 32, 8, Refresh(1, 1), CPU)

        def build():
            timer = workload.timer(METHODS[name], Refresh(1, 1))
            return timer.model, timer.optimizer, timer.seconds

        return measure_memory(build, CPU)

    plain, dense = memory("SGDM"), memory("W-SGDM-dense")
    assert plain.optimizer_state == plain.parameters  # momentum
    # Second moments [d, d] and their powers of inputs of 3·9, 16·9, 32·9 and 32 + 1 (bias) features.
    squares = sum(width**2 for width in (3 * 9, 16 * 9, 32 * 9, 33))
    assert dense.optimizer_state - plain.optimizer_state == pytest.approx(2 * 4 * squares, rel=0.02)


def test_shared_memory_counts_once():
    weight = torch.zeros(100)
    assert tensor_bytes([weight, weight, weight.view(10, 10), weight[:3]]) == 400


def test_counting_says_nothing_and_leaves_the_environment(capfd):
    before = dict(os.environ)
    measure_memory(linear(8, momentum=0.9), CPU)
    assert dict(os.environ) == before
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_the_memory_of_a_run_is_that_of_every_run_like_it():
    plan = make_plan(Settings(methods=("SGDM", "W-SGDM"), seeds=1, epochs=1, train_images=64))
    counted = {}
    for name in ("SGDM", "W-SGDM"):
        spec = plan.spec(METHODS[name], 0.1, 0)
        data = plan.task.for_seed(spec, CPU, rank=0, ranks=1)
        first, again = (RunMemory(plan.task, CPU).of(spec, data) for _ in range(2))
        # The first step of a process may keep a few kB of constants; see `measure_memory`.
        assert again == replace(first, peak=pytest.approx(first.peak, abs=10_000))
        counter = RunMemory(plan.task, CPU)
        assert counter.of(spec, data) is counter.of(replace(spec, lr=0.3, steps=9), data)
        counted[name] = first
    assert counted["W-SGDM"].parameters == counted["SGDM"].parameters
    assert counted["W-SGDM"].optimizer_state > counted["SGDM"].optimizer_state
