"""What taking second moments needs of memory, beside what the model's own passes need, and the bound that is stated.

    python benchmarks/moments_memory.py --json docs/results/moments-memory.json

Every kind runs in a process of its own: the most memory that it ever held, less that of the same passes without
moments.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from timing import setting, write

import wellcond
from wellcond.lab.networks.registry import MODELS

KINDS = ("dense", "auto", "kronecker", "blocks", "sketch")


def run(kind: Any, batch: int, batches: int) -> dict[str, float]:
    """Pass over random images, and return the most memory held, in bytes, and what is known of it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = MODELS["resnet18"].build(3, 10).eval()
    loader = [torch.randn(batch, 3, 32, 32) for _ in range(batches)]
    found: dict[str, float] = {}
    with torch.no_grad():
        for images in loader:
            model(images)
    if kind != "none":
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        moments = wellcond.second_moments(model, loader, kind=kind, max_dim=1024, rank=64)
        found = {"kept": float(moments.bytes), "bound": float(moments.memory_bound or 0)}
        found["before"] = before * 1024.0
    return {**found, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(run(options.kind, options.batch, options.batches)))
        return
    rows: dict[str, dict[str, list[float]]] = {}
    for kind in KINDS:
        command = [sys.executable, __file__, "--kind", kind, "--batch", str(options.batch)]
        said = subprocess.run([*command, "--batches", str(options.batches)], capture_output=True, text=True, check=True)
        found = json.loads(said.stdout)
        row = {"kept": found["kept"], "peak above the model's own": found["peak"] - found["before"]}
        rows[kind] = {f"{key}, MB": [value / 1e6] for key, value in {**row, "bound": found["bound"]}.items()}
        print(kind, {key: round(values[0]) for key, values in rows[kind].items()}, flush=True)
    about = f"ResNet-18 (CIFAR stem), {options.batches} batches of {options.batch} images"
    what = {"about": about, "seeds": 1, "percent": False, "digits": 0}
    write(options.json, {**setting(options, torch.device("cpu")), "measured": what, "results": rows})


if __name__ == "__main__":
    main()
