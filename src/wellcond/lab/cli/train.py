"""`wellcond train`: one run, its course written as it happens, its weights kept."""

from __future__ import annotations

import argparse
import math
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from wellcond.lab.cli.options import (
    add_data_options,
    add_options,
    add_task_options,
    add_training_options,
    given_settings,
)
from wellcond.lab.cli.paths import OutputFile, OutputFolder
from wellcond.lab.cli.processes import in_processes
from wellcond.lab.engines.select import RunFailedError
from wellcond.lab.errors import CommandEndedError, LabError
from wellcond.lab.hardware.interrupts import Interrupted, interruptible
from wellcond.lab.hardware.launch import from_first, launched
from wellcond.lab.methods.method import select_methods
from wellcond.lab.runs.files import replacing, rounded, to_json, write_atomically
from wellcond.lab.runs.locks import locked
from wellcond.lab.runs.option import check_whole
from wellcond.lab.runs.records import RunRecord, RunSpec, RunStore
from wellcond.lab.runs.settings import Settings, check_seed

if TYPE_CHECKING:
    from wellcond.lab.plan import Plan

_DESCRIPTION = """\
Train one network with one method, and write how it goes: the loss every few steps, scores after each epoch, the lr and
what the method's transforms count, for TensorBoard and as CSV; in the end run.json and the trained weights.

An unfinished run is kept now and then. The same command again continues where it was stopped, or only shows the
result."""

_EXAMPLES = """\
examples:
  wellcond train --method W-SGDM
      the bundled digits, in seconds
  wellcond train --method W-SGDM --data cifar10/ --model resnet18 --epochs 30 --batch-size 128 --lr 0.1 --save model.pt
      the weights as a plain state dict, which --weights reads
  wellcond train --method MBN --data imagenet/ --devices 8 --precision bf16-mixed
      on 8 GPUs of this machine; --batch-size is that of all together
  torchrun --nnodes 2 --nproc-per-node 8 ... -m wellcond train --method FSGD --data imagenet/ --strategy fsdp
      on several machines, the weights sharded over their GPUs; `srun` does as well

With several processes batch statistics are of each one's share of a batch, as in PyTorch, and evaluation uses the first
one's running statistics.

`wellcond list` shows the methods, models and data that can be named."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "train",
        help="train one network with one method, and log how it goes",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--method", default="SGDM", metavar="TEXT", help="a method, by name or as written (default: %(default)s)"
    )
    what.add_argument("--lr", type=float, metavar="LR", help="highest lr (default: the middle of the method's grid)")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and order (default: %(default)s)")
    add_training_options(parser)
    add_data_options(parser)
    add_task_options(parser)
    output = parser.add_argument_group("running and results")
    output.add_argument(
        "--out", action=OutputFolder, metavar="DIR", help="folder of the results (default: runs/train-<data>)"
    )
    output.add_argument("--save", action=OutputFile, metavar="FILE", help="write the trained weights there, too")
    output.add_argument(
        "--log-every", type=int, default=20, metavar="N", help="steps between two logged losses (default: %(default)s)"
    )
    add_options(output, "processes")
    output.add_argument("--quiet", action="store_true", help="no progress: only errors and the files' places")


def run(arguments: argparse.Namespace, command_line: str) -> int:
    """Train, write the results and show them.

    Args:
        arguments: The options.
        command_line: As it was typed, for run.json.

    Returns:
        The exit code.

    Raises:
        LabError: If a value is out of its range, or does not go with the others.
        CommandEndedError: If the run is interrupted or fails.
    """
    (method,) = select_methods([arguments.method])
    lr = method.lrs[len(method.lrs) // 2] if arguments.lr is None else arguments.lr
    if not 0 < lr < math.inf:
        raise LabError(f"--lr must be a positive number, got {lr:g}")
    check_seed(arguments.seed)
    check_whole("log-every", arguments.log_every)
    settings = given_settings(arguments, methods=(arguments.method,), lrs=((method.optimizer, (lr,)),), seeds=1)
    return in_processes(settings, command_line, lambda first: _train(arguments, settings, lr, command_line, first))


def _train(arguments: argparse.Namespace, settings: Settings, lr: float, command_line: str, first: bool) -> int:
    from wellcond.lab.plan import make_plan, writable_folder

    plan = make_plan(settings)
    spec = plan.spec(plan.methods[0], lr, arguments.seed)
    out = Path("runs") / f"train-{plan.task.name}" if arguments.out is None else Path(arguments.out)
    folder = writable_folder(out)
    store = RunStore(folder / "runs")
    weights = store.path(spec).with_suffix(".pt")
    with locked(folder, here=first):
        record = from_first(lambda: store.load(spec) if weights.exists() else None)
        if record is None:
            with _keeping_the_run(spec, folder):
                record = _run(arguments, plan, spec, store, weights)
            if first:
                store.save(spec, record)
        if not first:
            return 0
        files = [folder / "run.json", folder / "logs" / weights.stem, weights]
        write_atomically(files[0], to_json(rounded(_content(plan, spec, record, command_line))))
        if arguments.save is not None:
            files[2] = arguments.save
            with replacing(arguments.save) as part:
                shutil.copyfile(weights, part)
    console = Console()
    if not arguments.quiet:
        console.print(_result(plan, spec, record), highlight=False, soft_wrap=True)
    console.print(f"Written: {' '.join(str(file) for file in files)}", highlight=False, soft_wrap=True)
    return 0


def _run(arguments: argparse.Namespace, plan: Plan, spec: RunSpec, store: RunStore, weights: Path) -> RunRecord:
    from wellcond.lab.hardware.machine import training_device
    from wellcond.lab.training.checkpoint import Checkpointing
    from wellcond.lab.training.logs import RunLog
    from wellcond.lab.training.run_display import RunDisplay
    from wellcond.lab.training.runner import Runner

    settings = plan.settings
    watchers: list[Any] = [RunLog(store.folder.parent, weights.stem, arguments.log_every)]
    if not arguments.quiet:
        watchers.append(RunDisplay(Console(stderr=True), spec.steps, plan.task.metric.name))
    runner = Runner(
        plan.task,
        training_device(settings.accelerator),
        settings.strategy,
        Checkpointing(store.folder, settings.checkpoint_every),
        watchers,
        weights,
    )
    try:
        plan.task.check(training_device(settings.accelerator))
        return runner.run(spec)
    except LabError:
        raise
    except Exception as error:
        raise RunFailedError(spec, traceback.format_exc()) from error


@contextmanager
def _keeping_the_run(spec: RunSpec, folder: Path) -> Iterator[None]:
    try:
        with interruptible():
            yield
    except Interrupted as ended:
        raise CommandEndedError(
            f"{ended}; what was last kept of the run is in {folder}; the same command continues.", ended.code
        ) from None
    except RunFailedError as error:
        raise CommandEndedError(f"error: {error}", code=1) from error


def _content(plan: Plan, spec: RunSpec, record: RunRecord, command_line: str) -> dict[str, Any]:
    from wellcond.lab.hardware.machine import machine, versions

    result = asdict(record)
    return {
        "command": command_line,
        "task": {"kind": plan.task.kind, "score": plan.task.metric.name, **plan.task.describe()},
        "run": spec.content(),
        "processes": launched().size,
        "strategy": plan.settings.strategy,
        "versions": versions(),
        "machine": machine(),
        **result,
    }


def _result(plan: Plan, spec: RunSpec, record: RunRecord) -> str:
    if record.diverged:
        return f"{spec.name}: diverged after {len(record.epochs)} epochs"
    last = record.epochs[-1]
    training = "" if last.train_score is None else f"training {last.train_score:.2f}, "
    return (
        f"{spec.name}: test {plan.task.metric.name} {last.test_score:.2f}, validation {last.validation_score:.2f}, "
        f"{training}"
        f"loss {last.train_loss:.4g}, {last.seconds:.3g} s of training"
    )
