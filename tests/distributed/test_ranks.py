"""Several processes (gloo, CPU) against one process with the joined batch; ranks against each other, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import worker
from launch_ranks import Ranks, assert_ranks_identical, results_of, run_ranks
from torch import Tensor

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_ranks(worker, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_ranks(worker, 3, tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def one_process() -> Callable[[str], dict[str, Any]]:
    found: dict[str, Any] = {}

    def result(name: str) -> dict[str, Any]:
        if name not in found:
            found[name] = worker.checks()[name](0, 1)
        return found[name]

    return result


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


@pytest.mark.parametrize(
    "name", [name for name in DDP_CHECKS if name != "ddp accumulate" and worker.runs_on_three_ranks(name)]
)
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


# every kind of layer, every form ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("transform", "form"), worker.SPREAD)
def test_spread_factorizations_leave_some_layers_waiting(
    transform: str, form: str, one_process: Callable[[str], dict[str, Any]]
) -> None:
    """Or the tests of spread factorizations above would be those of all at once."""
    name = f"ddp everything {transform} {form}"
    at_once = [len(set(steps)) for steps in one_process(name)["solves of each step"]]
    spread = [len(set(steps)) for steps in one_process(f"{name} spread")["solves of each step"]]
    assert max(at_once) == 1 < max(spread)


def assert_each_layer_is_solved_once_where_it_is_due(ranks: Ranks, alone: dict[str, Any]) -> None:
    results = results_of(ranks, "counted solves")
    solved = [pair for result in results for pair in result["mine"]["solved"]]
    assert sorted(solved) == sorted(alone["mine"]["solved"])
    assert len(solved) == len(set(solved))
    assert {step for step, _ in solved} == {0, 2, 4}
    assert sum(r["mine"]["decompositions"] for r in results) == alone["mine"]["decompositions"] > 0
    costs = results[0]["costs"]
    assert {name for _, name in solved} == set(costs)
    for due in {step for step, _ in solved}:
        loads = [sum(costs[name] for step, name in r["mine"]["solved"] if step == due) for r in results]
        # No rank could hand its smallest piece to another and both be better off: the most expensive piece bounds it.
        assert max(loads) <= max(max(costs.values()), sum(loads) / len(loads) + min(costs.values()))
        assert min(loads) > 0
    assert_ranks_identical([result["state"] for result in results])
    assert_close_to(results[0]["state"], alone["state"])


def test_two_ranks_share_out_the_factorizations(two_ranks: Ranks, one_process: Callable[[str], dict[str, Any]]) -> None:
    assert_each_layer_is_solved_once_where_it_is_due(two_ranks, one_process("counted solves"))


def test_three_ranks_share_out_the_factorizations(
    three_ranks: Ranks, one_process: Callable[[str], dict[str, Any]]
) -> None:
    assert_each_layer_is_solved_once_where_it_is_due(three_ranks, one_process("counted solves"))


@pytest.mark.parametrize("form", ["dense", "kronecker", "low_rank"])
def test_trouble_on_one_rank_leaves_every_form_with_the_statistics_of_the_good_batches(
    form: str, two_ranks: Ranks, one_process: Callable[[str], dict[str, Any]]
) -> None:
    results = results_of(two_ranks, f"everything in trouble {form}")
    alone = one_process(f"everything in trouble {form}")
    assert_ranks_identical(results)
    assert_close_to(results[0], alone)
    assert results[0]["stats"] == alone["stats"]
    assert results[0]["stats"]["skipped_updates"] > 0
    assert results[0]["stats"]["failed_solves"] == 0
    assert all(bool(torch.isfinite(v).all()) for v in results[0].values() if isinstance(v, Tensor))


def test_a_factorization_that_fails_on_its_owner_is_counted_and_said_on_every_rank(two_ranks: Ranks) -> None:
    found = [rank["failing owner"] for rank in two_ranks]
    assert [one["error"] for one in found] == [None, None]
    results = [one["result"] for one in found]
    owned, others = (set(result["mine"]) for result in results)
    assert owned
    assert others
    assert not owned & others
    assert_ranks_identical([result["after"] for result in results])
    for result, one in zip(results, found, strict=True):
        assert result["stats"]["whitening"]["failed_solves"] == len(owned)
        said = [message for message in one["warnings"] if "could not be factorized" in message]
        assert len(said) == len(owned)
        assert len(said) == len(one["warnings"])
        for name in owned | others:
            key = f"{name} wellcond_whitening_preconditioner"
            kept = torch.equal(result["before"][key], result["after"][key])
            assert kept == (name in owned), name
        assert all(bool(torch.isfinite(v).all()) for v in result["after"].values() if isinstance(v, Tensor))


@pytest.mark.parametrize("name", [name for name in worker.checks() if name.startswith("checkpoint")])
def test_a_job_resumed_through_torchs_distributed_checkpoint_equals_the_one_not_stopped(
    name: str, two_ranks: Ranks
) -> None:
    """Under DDP, under FSDP2 with sharded state dicts, and there with whole ones."""
    results = results_of(two_ranks, name)
    for result in results:
        assert any("wellcond_whitening" in key for key in result["uninterrupted"])
        assert_ranks_identical([result["uninterrupted"], result["resumed"]])
    assert_ranks_identical([result["resumed"] for result in results])


@pytest.mark.parametrize("name", [name for name in worker.checks() if name.startswith("sharded everything")])
def test_sharded_weights_of_every_kind_of_layer_equal_one_process(
    name: str, two_ranks: Ranks, one_process: Callable[[str], dict[str, Any]]
) -> None:
    """And so DDP, which equals one process too."""
    results = results_of(two_ranks, name)
    assert_ranks_identical(results)
    assert "plain gradient" not in results[0]["report"]
    (stats,) = results[0]["stats"].values()
    assert stats == {"weights": 9, "failed_solves": 0, "skipped_updates": 0}
    assert_close_to(results[0], one_process(name))


# FSDP2 --------------------------------------------------------------------------------------------------------------


def is_said_to_be_plain(result: dict[str, Any]) -> bool:
    line = next(line for line in result["report"].splitlines() if line.startswith("0.weight"))
    return any(said in line for said in ("plain gradient", "not centred", "unchanged"))


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
@pytest.mark.parametrize("layer", list(worker.LAYERS))
def test_sharded_layers_are_preconditioned(transform: str, layer: str, two_ranks: Ranks) -> None:
    assert not is_said_to_be_plain(results_of(two_ranks, f"fsdp {transform} {layer}")[0])


# second moments, projection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in worker.checks() if name.startswith("moments")])
def test_moments_of_all_ranks_equal_those_of_one_process(
    name: str, two_ranks: Ranks, one_process: Callable[[str], dict[str, Any]]
) -> None:
    results = results_of(two_ranks, name)
    assert_ranks_identical(results)
    assert_close_to(results[0], one_process(name))
    assert results[0].get("samples", 18) == 18


@pytest.mark.parametrize("layer", list(worker.LAYERS))
def test_sharded_layers_are_projected(layer: str, two_ranks: Ranks) -> None:
    result = results_of(two_ranks, f"fsdp projection {layer} sgd")[0]
    assert "0.weight" in result["report"]
    assert "not projected" not in result["report"]
    assert result["stats"]["projection"]["directions"] > 0
