"""One rank of `test_torchrun.py`: ``torchrun ... lab_worker.py FOLDER`` gives every command of `COMMANDS` in turn.

Torchrun and imports take most of the time, so that all commands share one start.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from wellcond.__main__ import main
from wellcond.lab.methods.method import METHODS
from wellcond.lab.methods.norms import NormSpec

# Preconditioning without batch statistics, which no method of the lab is; whoever trains with it adds it to `METHODS`.
WITHOUT_BATCH = replace(METHODS["W-SGDM"], name="W-SGDM+GN", norm=NormSpec("gn", (("num_groups", 8),)))

STOPPED_AT = 7
RUNS = [(method, "ddp") for method in ("SGDM", "W-SGDM", "MBN", "GN", "W-SGDM+GN")]
RUNS += [(method, "fsdp") for method in ("SGDM", "W-SGDM", "MBN", "W-SGDM+GN")]
RESUMED = [("W-SGDM", "ddp"), ("W-SGDM", "fsdp")]
COMPARE = ["--epochs", "1", "--train-images", "64", "--test-images", "64", "--val-images", "32", "--quiet"]
COMPARE = ["compare", *COMPARE, "--seeds", "1", "--methods", "SGDM,MBN", "--lrs", "SGD=0.1"]


def train(method: str, *more: str) -> list[str]:
    """Return the command of a short run: 10 steps in 2 epochs, with refreshes."""
    sizes = ["--epochs", "2", "--train-images", "160", "--test-images", "64", "--val-images", "32"]
    refresh = ["--stats-every", "2", "--solve-every", "2"]
    return ["train", "--method", method, "--lr", "0.03", *sizes, *refresh, "--quiet", *more]


@contextmanager
def stopping() -> Iterator[None]:
    """Let every run fail once it has been kept after so many steps."""
    from wellcond.lab.training.checkpoint import Keeper

    keep = Keeper._keep

    def keep_and_stop(self, trainer):
        keep(self, trainer)
        if trainer.global_step == STOPPED_AT:
            raise RuntimeError("stopped")

    Keeper._keep = keep_and_stop
    try:
        yield
    finally:
        Keeper._keep = keep


def run_all(folder: Path) -> dict[str, int]:
    """Return the exit code of each command."""
    codes = {}
    for method, strategy in RUNS:
        out = folder / f"{method} {strategy}"
        codes[out.name] = main([*train(method, "--strategy", strategy), "--out", str(out)])
    for method, strategy in RESUMED:
        out = folder / f"{method} {strategy} resumed"
        command = [*train(method, "--strategy", strategy, "--checkpoint-every", "0"), "--out", str(out)]
        with stopping():
            codes[f"{out.name}, stopped"] = main(command)
        codes[f"{out.name}, kept"] = len(list(out.glob("runs/*.ckpt")))
        codes[out.name] = main(command)
    codes["compare"] = main([*COMPARE, "--out", str(folder / "compare")])
    codes["odd batch"] = main(train("SGDM", "--batch-size", "15", "--out", str(folder / "odd")))
    codes["second order"] = main(train("AdaHessian", "--out", str(folder / "second order")))
    return codes


if __name__ == "__main__":
    METHODS[WITHOUT_BATCH.name] = WITHOUT_BATCH
    folder = Path(sys.argv[1])
    if sys.argv[2:] == ["fail"]:
        from wellcond.lab.training.module import Training

        step = Training.training_step

        def training_step(self, batch, batch_index):
            if dist.get_rank() == 1 and batch_index == 2:
                raise RuntimeError("no such luck")
            return step(self, batch, batch_index)

        Training.training_step = training_step
        sys.exit(main([*train("SGDM"), "--out", str(folder / "failing")]))
    dist.init_process_group("gloo")
    try:
        codes = run_all(folder)
    except BaseException:
        traceback.print_exc()
        raise
    (folder / f"codes{dist.get_rank()}.json").write_text(json.dumps(codes))
    dist.barrier()
    dist.destroy_process_group()
