"""Runs a worker script on several processes, for the tests; and what every worker script does."""

from __future__ import annotations

import datetime
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from wellcond import WellcondWarning

TIMEOUT = 900
Ranks = list[dict[str, Any]]
Check = Callable[[int, int], Any]


def run_ranks(worker: ModuleType, world: int, folder: Path) -> Ranks:
    """Start the ranks, insist on exit code 0 from each within the time, and return what each of them saved."""
    assert worker.__file__ is not None
    logs = [(folder / f"log{rank}.txt").open("w+") for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, worker.__file__, str(rank), str(world), str(folder)], stdout=log, stderr=subprocess.STDOUT
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


def results_of(ranks: Ranks, name: str) -> list[Any]:
    """Return what a check found on each rank; fail if it raised or warned on one."""
    for rank, found in enumerate(ranks):
        assert found[name]["error"] is None, f"rank {rank}:\n{found[name]['error']}"
        # A check of one awkward layer may find it left alone, which it then says.
        assert [said for said in found[name]["warnings"] if "covers none of the weights" not in said] == []
    return [found[name]["result"] for found in ranks]


def assert_ranks_identical(results: list[dict[str, Any]]) -> None:
    """Fail unless all ranks found the same, bit by bit."""
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for key, value in results[0].items():
            same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
            assert same, key


def serve(checks: Mapping[str, Check]) -> None:
    """Run every check as the rank that the command line says, and save what they found, raised and warned."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=600),
    )
    torch.save({name: _run(check, rank, world) for name, check in checks.items()}, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _run(check: Check, rank: int, world: int) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            result = check(rank, world)
        said = [str(w.message) for w in record if issubclass(w.category, WellcondWarning)]
        return {"result": result, "error": None, "warnings": said}
    except Exception:
        return {"result": None, "error": traceback.format_exc(), "warnings": []}
