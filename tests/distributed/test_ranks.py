"""Several processes (gloo, CPU) against one process with the joined batch; ranks against each other, bit by bit."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORKER = Path(__file__).with_name("worker.py")
TIMEOUT = 150
Ranks = list[dict[str, Any]]


def _load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wellcond_test_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = _load_worker()


def run_ranks(world: int, folder: Path) -> Ranks:
    """Start the ranks, insist on exit code 0 from each within the time, and return what each of them saved."""
    logs = [(folder / f"log{rank}.txt").open("w+") for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(world), str(folder)], stdout=log, stderr=subprocess.STDOUT
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes: list[int | str] = []
        for process in processes:
            try:
                codes.append(process.wait(TIMEOUT))
            except subprocess.TimeoutExpired:
                codes.append("timed out")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    output = ""
    for log in logs:
        log.seek(0)
        output += log.read()[-3000:]
        log.close()
    assert codes == [0] * world, f"exit codes {codes}\n{output}"
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_ranks(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_ranks(3, tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def one_process() -> Callable[[str], dict[str, Any]]:
    found: dict[str, Any] = {}

    def result(name: str) -> dict[str, Any]:
        if name not in found:
            found[name] = worker.checks()[name](0, 1)
        return found[name]

    return result


def results_of(ranks: Ranks, name: str) -> list[dict[str, Any]]:
    for rank, found in enumerate(ranks):
        assert found[name]["error"] is None, f"rank {rank}:\n{found[name]['error']}"
        # A check of one awkward layer may find it left alone, which it then says.
        assert [said for said in found[name]["warnings"] if "covers none of the weights" not in said] == []
    return [found[name]["result"] for found in ranks]


def assert_ranks_identical(results: list[dict[str, Any]]) -> None:
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for key, value in results[0].items():
            same = torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
            assert same, key


def assert_close_to(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {k for k, v in expected.items() if isinstance(v, Tensor)} <= set(result)
    for key, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(result[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


# DDP ----------------------------------------------------------------------------------------------------------------

DDP_CHECKS = [name for name in worker.checks() if name.startswith("ddp")]


@pytest.mark.parametrize("name", DDP_CHECKS)
def test_two_ranks_with_unequal_batches_equal_one_process_with_the_joined_batch(
    name: str, two_ranks: Ranks, one_process: Callable[[str], dict[str, Any]]
) -> None:
    results = results_of(two_ranks, name)
    assert_ranks_identical(results)
    assert_close_to(results[0], one_process(name))


@pytest.mark.parametrize("name", [name for name in DDP_CHECKS if name != "ddp accumulate"])
def test_three_ranks_equal_one_process_with_the_joined_batch(
    name: str, three_ranks: Ranks, one_process: Callable[[str], dict[str, Any]]
) -> None:
    results = results_of(three_ranks, name)
    assert_ranks_identical(results)
    assert_close_to(results[0], one_process(name))


def test_micro_batches_that_are_empty_on_some_ranks_do_no_harm(
    three_ranks: Ranks, one_process: Callable[[str], dict[str, Any]]
) -> None:
    """Of three ranks one has a single sample: its second micro-batch is empty."""
    results = results_of(three_ranks, "ddp accumulate")
    assert_ranks_identical(results)
    assert_close_to(results[0], one_process("ddp accumulate"))


def joined_moments(parts_by_step: list[list[int]]) -> list[Tensor]:
    """Return M after each step from the ranks whose batches were good; no good one leaves M as it is."""
    moment, found = torch.zeros(4, 4, dtype=torch.float64), []
    for step, ranks in enumerate(parts_by_step):
        rows = [torch.cat([x, torch.ones(1)]) for rank in ranks for x in worker.samples(step, rank, 2, 3)]
        if rows:
            observed = sum((torch.outer(row, row) for row in rows), torch.zeros_like(moment)) / len(rows)
            moment = 0.8 * moment + 0.2 * observed
        found.append(moment)
    return found


def test_a_rank_with_an_empty_or_non_finite_batch_neither_hangs_nor_poisons_the_others(two_ranks: Ranks) -> None:
    results = results_of(two_ranks, "trouble")
    expected = joined_moments([[0, 1], [0], [1], [0], []])
    for result in results:
        for moment, wanted in zip(result["moments"], expected, strict=True):
            torch.testing.assert_close(moment[0], wanted, rtol=1e-12, atol=1e-12)
        assert all(bool(torch.isfinite(g).all()) for g in result["gradients"])
        assert result["stats"]["skipped_updates"] >= 1
        assert result["stats"]["failed_solves"] == 0
    for a, b in zip(results[0]["gradients"], results[1]["gradients"], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(results[0]["moments"], results[1]["moments"], strict=True):
        assert torch.equal(a, b)


def test_unsynchronized_statistics_are_each_ranks_own(two_ranks: Ranks) -> None:
    for rank, result in enumerate(results_of(two_ranks, "local statistics")):
        for moment, wanted in zip(result["moments"], joined_moments([[rank]] * 5), strict=True):
            torch.testing.assert_close(moment[0], wanted, rtol=1e-12, atol=1e-12)


def test_a_layer_that_only_one_rank_runs_does_not_hang_and_ranks_stay_identical(two_ranks: Ranks) -> None:
    results = results_of(two_ranks, "unused layer")
    assert_ranks_identical(results)
    assert all(bool(torch.isfinite(v).all()) for v in results[0].values() if isinstance(v, Tensor))
    assert float(results[0]["b.weight wellcond_whitening_second_moment"].abs().sum()) > 0


# FSDP2 --------------------------------------------------------------------------------------------------------------


def is_said_to_be_plain(result: dict[str, Any]) -> bool:
    line = next(line for line in result["report"].splitlines() if line.startswith("0.weight"))
    return "plain gradient" in line or "not centred" in line


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in worker.checks()
        if name.startswith("fsdp centralization") and not any(layer in name for layer in worker.AWKWARD)
    ],
)
def test_centralization_of_sharded_weights_equals_one_process(
    name: str, two_ranks: Ranks, one_process: Callable[[str], dict[str, Any]]
) -> None:
    results = results_of(two_ranks, name)
    assert_ranks_identical(results)
    assert not is_said_to_be_plain(results[0])
    assert_close_to(results[0], one_process(name))


@pytest.mark.filterwarnings("ignore:GradientCentralization covers none")
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in worker.checks()
        if name.startswith("fsdp") and ("centralization" not in name or any(layer in name for layer in worker.AWKWARD))
    ],
)
def test_what_is_done_to_awkwardly_sharded_weights_equals_one_process_or_is_said_not_to_happen(
    name: str, two_ranks: Ranks, one_process: Callable[[str], dict[str, Any]]
) -> None:
    """Groups that lie across ranks, or a rank without any row: never a crash, never a silent difference."""
    results = results_of(two_ranks, name)
    assert_ranks_identical(results)
    if is_said_to_be_plain(results[0]):
        (stats,) = results[0]["stats"].values()
        assert stats["weights"] == 0
        assert_close_to(results[0], worker.plain_training(name))
    else:
        assert_close_to(results[0], one_process(name))


@pytest.mark.parametrize("transform", list(worker.TRANSFORMS))
@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_ordinary_sharded_layers_are_preconditioned(transform: str, layer: str, two_ranks: Ranks) -> None:
    assert not is_said_to_be_plain(results_of(two_ranks, f"fsdp {transform} {layer}")[0])
