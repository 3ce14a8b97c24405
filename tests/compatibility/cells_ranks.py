"""Several processes: what `cells_on_ranks` found when it ran on two ranks."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from cells import RefusedError, cell

AREA = "Parallelism (two ranks)"
POOLED = "weights after 3 steps against one process with all samples, on gradients changed by hand"
# Name of a check there → the cell. A check that can end a process group has processes of its own.
CHECKS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "ddp": ("DistributedDataParallel", (), POOLED),
    "ddp_no_sync": ("DistributedDataParallel, accumulating under no_sync", (), POOLED),
    "ddp_static_graph": ("DistributedDataParallel(static_graph=True)", (), POOLED),
    "fsdp2": ("fully_shard (FSDP2)", (), POOLED),
    "fsdp2_wrapped_after": (
        "fully_shard after attach, the optimizer given the shards",
        (),
        POOLED + ", from the second step on",
    ),
    "zero": ("ZeroRedundancyOptimizer", ("refused",), "refused when attached, with nothing left behind"),
    "tensor_parallel": (
        "tensor parallel (ColwiseParallel, RowwiseParallel)",
        ("plain gradient",),
        "the gradient against that of one process, changed by hand (column-wise) or as it was (row-wise)",
    ),
    "fsdp1_original": (
        "FullyShardedDataParallel(use_orig_params=True) (FSDP1)",
        ("plain gradient",),
        "the reason names sharding; a plain gradient is as it was",
    ),
    "fsdp1_flat": (
        "FullyShardedDataParallel(use_orig_params=False) (FSDP1)",
        ("plain gradient",),
        "the reason names sharding; a plain gradient is as it was",
    ),
}
ALONE: dict[str, tuple[str, tuple[str, ...], str]] = {
    "join": (
        "DistributedDataParallel.join(), uneven inputs",
        (),
        "both ranks do all their steps",
    ),
    "zero_inner": (
        "ZeroRedundancyOptimizer, attached to its inner optimizer",
        ("refused",),
        "refused at the first step, on both ranks",
    ),
    "stages": (
        "a model per rank (pipeline stages), default group",
        ("refused",),
        "refused at the first step, on both ranks",
    ),
    "stages_own_group": (
        "a model per rank, synchronize=False",
        (),
        "each rank's weights against its model trained alone",
    ),
}


@functools.cache
def _found(names: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Run checks on two ranks; return of each what was found, the worse of both ranks'."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        worker = Path(__file__).with_name("cells_on_ranks.py")
        # One thread and no network interface but the loop's: two processes on any machine.
        settings = os.environ | {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        }
        logs = [(folder / f"log{rank}").open("w+") for rank in range(2)]
        processes = [
            subprocess.Popen(
                [sys.executable, str(worker), str(rank), str(folder), *names], stdout=log, stderr=log, env=settings
            )
            for rank, log in enumerate(logs)
        ]
        try:
            for process in processes:
                process.wait(600)  # far more than it takes, on a busy machine either
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                process.kill()
                process.wait()
            for log in logs:
                log.close()
        ranks = []
        for rank in range(2):
            file = folder / f"rank{rank}.pt"
            ranks.append(torch.load(file) if file.exists() else {})
        lost = ("fails", "a process ended without a result")
        order = ("works", "plain gradient", "refused", "fails")
        return {name: max((rank.get(name, lost) for rank in ranks), key=lambda f: order.index(f[0])) for name in names}


def _replay(name: str, names: tuple[str, ...]) -> str | None:
    outcome, message = _found(names)[name]
    if outcome == "refused":
        raise RefusedError(message)
    if outcome == "fails":
        raise AssertionError(message)
    return message if outcome == "plain gradient" else None


for name, (title, expected, verified) in CHECKS.items():
    cell(AREA, title, *expected, verified=verified)(lambda name=name: _replay(name, tuple(CHECKS)))
for name, (title, expected, verified) in ALONE.items():
    cell(AREA, title, *expected, verified=verified)(lambda name=name: _replay(name, (name,)))
