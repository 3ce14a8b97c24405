"""Runs a worker script on several processes, for the tests; and what every worker script does."""

from __future__ import annotations

import datetime
import os
import runpy
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
    from forked import forking  # which a worker that is run by hand does not find

    assert worker.__file__ is not None
    logs = [folder / f"log{rank}.txt" for rank in range(world)]
    processes = [
        forking().Process(target=_run_script, args=(worker.__file__, [str(rank), str(world), str(folder)], log))
        for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            process.start()
        codes: list[int | str] = []
        for process in processes:
            process.join(TIMEOUT)
            codes.append("timed out" if process.exitcode is None else process.exitcode)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    output = "".join(log.read_text()[-3000:] for log in logs)
    assert codes == [0] * world, f"exit codes {codes}\n{output}"
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def _run_script(script: str, arguments: list[str], log: Path) -> None:
    """Run a script as the interpreter does, and write what it says to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


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
