"""`wellcond bench`: ratios of turns in one run, a preconditioner's refreshes apart, and memory."""

from __future__ import annotations

import argparse
import io
import json

import pytest
import torch
from rich.console import Console

from wellcond.lab.benchmark import steps as measuring
from wellcond.lab.benchmark.steps import NoiseWorkload, Workload, measure_steps
from wellcond.lab.benchmark.timing import StepTimer, time_rounds
from wellcond.lab.cli import bench
from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import Refresh, select_methods
from wellcond.lab.training.progress import StepProgress


def execute(*options: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers(dest="command"))
    small = ["--model", "convnet", "--image-size", "8", "--batch-size", "8"]
    command = ["bench", *small, *options]
    return bench.run(parser.parse_args(command), " ".join(["wellcond", *command]))


def test_table_and_json_say_the_same(tmp_path, capsys):
    file = tmp_path / "steps.json"
    assert execute("--methods", "SGDM,W-SGDM,MBN", "--rounds", "3", "--json", str(file)) == 0
    content = json.loads(file.read_text())
    assert content["command"].endswith(f"--json {file}")
    assert content["settings"] == {
        "model": "convnet",
        "batch_size": 8,
        "image_size": 8,
        "rounds": 3,
        "stats_every": 50,
        "solve_every": 500,
        "threads": torch.get_num_threads(),
    }
    assert {"processor", "cores"} <= set(content["machine"])
    plain, whitened, momentum = content["methods"]
    assert [method["method"] for method in content["methods"]] == ["SGDM", "W-SGDM", "MBN"]
    assert plain["ratio"] == {"low": 1.0, "median": 1.0, "high": 1.0}
    assert plain["refresh"] is momentum["refresh"] is None
    assert plain["memory_ratio"] == 1.0
    assert whitened["memory"]["optimizer_state"] > plain["memory"]["optimizer_state"] == plain["memory"]["parameters"]
    shares = whitened["refresh"]["statistics_ms"] / 50 + whitened["refresh"]["solve_ms"] / 500
    expected = whitened["ratio"]["median"] + shares / plain["milliseconds"]["median"]
    assert whitened["refresh"]["amortised_ratio"] == pytest.approx(expected, rel=1e-4)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert max(map(len, lines)) <= 120
    assert "…" not in captured.out
    (row,) = (line for line in lines if line.startswith("W-SGDM"))
    ratio = whitened["ratio"]
    assert f"{ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})" in row
    assert f"{whitened['memory_ratio']:.3f}" in row


class Clock(StepTimer):
    """A step that takes as long as it says, and notes its turn."""

    def __init__(self, name, whole, part, turns):
        self.name, self.whole, self.part, self.turns = name, whole, part, turns

    def seconds(self):
        self.turns.append(self.name)
        return self.whole, self.part


def test_rounds_turn_and_the_warm_up_does_not_count():
    turns: list[str] = []
    timers = {name: Clock(name, whole, whole / 4, turns) for name, whole in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    times, parts = time_rounds(timers, 3, warm_up=1)
    assert "".join(turns) == "abc" + "abc" + "bca" + "cab"
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [3.0] * 3}
    assert parts["c"] == [0.75] * 3


def test_costs_follow_from_the_seconds(monkeypatch):
    seconds = {(10**9, 10**9): (2.0, 0.5), (1, 10**9): (3.0, 0.6), (1, 1): (13.0, 9.0)}

    def timer(workload, method, refresh):
        if method.name == "SGDM":
            return Clock("plain", 1.0, 0.25, [])
        return Clock("whitened", *seconds[refresh.stats_every, refresh.solve_every], [])

    monkeypatch.setattr(Workload, "timer", timer)
    monkeypatch.setattr(measuring, "_memory", lambda method, workload: measuring.Memory(1, 0, 1, 7))
    workload = NoiseWorkload("convnet", 8, 8, Refresh(10, 100), torch.device("cpu"))
    plain, whitened = measure_steps(select_methods(["SGDM", "W-SGDM"]), workload, rounds=2)
    assert (plain.ratio.median, plain.forward_backward_ms, plain.optimizer_ms) == (1.0, 750.0, 250.0)
    assert (whitened.ratio.median, whitened.forward_backward_ms, whitened.optimizer_ms) == (2.0, 1500.0, 500.0)
    assert whitened.refresh is not None
    assert (whitened.refresh.statistics_ms, whitened.refresh.solve_ms) == (1000.0, 10_000.0)
    # An ordinary step of 2 s, 1 s more in every 10th, 10 s more in every 100th, over 1 s.
    assert whitened.refresh.amortised_ratio == pytest.approx(2.2)


def test_methods_of_every_kind_can_be_timed(recwarn):
    names = ["SGDM", "SGDM+GC", "FAdam", "MBN", "ND", "Lookahead", "AdaHessian"]
    workload = NoiseWorkload("convnet", 4, 8, Refresh(50, 500), torch.device("cpu"))
    costs = measure_steps(select_methods(names), workload, rounds=1)
    assert [cost.method for cost in costs] == names
    assert not recwarn.list
    assert all(cost.ratio.median > 0 and cost.memory.peak > cost.memory.parameters for cost in costs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--batch-size", "1"], "--batch-size must be at least 2, got 1"),
        (["--methods", "SGDN"], "SGDM"),
        (["--image-size", "2"], "at least 4x4"),
        (["--model", "resnet"], "resnet"),
        (["--json", "nowhere/steps.json"], "there is no folder nowhere"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(LabError, match=message):
        execute(*options)


@pytest.mark.parametrize("rounds", [1, 5])
def test_progress_counts_every_step_that_it_said_there_would_be(rounds):
    said = io.StringIO()
    progress = StepProgress(Console(file=said), "timing", every=0.0)
    workload = NoiseWorkload("convnet", 4, 8, Refresh(50, 500), torch.device("cpu"))
    with progress:
        measure_steps(select_methods(["SGDM", "W-SGDM"]), workload, rounds, progress)
    assert progress.done == progress.total > 0
    lines = said.getvalue().splitlines()
    assert lines[0] == f"timing: {progress.total} steps"
    numbers = [int(line.partition(" ")[0]) for line in lines[1:]]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] < progress.total
    for what in ("SGDM", "W-SGDM, gathering second moments", "W-SGDM, solving", "SGDM, counting memory"):
        assert any(line.endswith(f"now {what}") for line in lines)


def test_a_quiet_progress_says_nothing():
    said = io.StringIO()
    with StepProgress(Console(file=said), "timing", quiet=True, every=0.0) as progress:
        progress.expect(3)
        progress.advance("SGDM")
    assert said.getvalue() == ""


def test_the_command_says_at_once_what_it_will_do(capsys):
    assert execute("--methods", "SGDM", "--rounds", "1") == 0
    assert capsys.readouterr().err.startswith("timing 1 methods on convnet: 5 steps\n")
