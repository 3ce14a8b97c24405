"""Options that several commands share: the data, the network, and how it is trained."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from wellcond.lab.data.named_data import AUGMENTATIONS
from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import split_list
from wellcond.lab.networks.registry import MODELS
from wellcond.lab.runs.settings import ACCELERATORS, MODES, PRECISIONS, STRATEGIES, Settings

_DEFAULTS = Settings()


def add_method_options(group: argparse._ActionsContainer, default: str) -> None:
    """Add what names the methods.

    Args:
        group: Where to.
        default: What they are if none is named.
    """
    group.add_argument(
        "--methods",
        default=None,
        metavar="A,B,...",
        help=f"methods, separated by commas: names of `wellcond list methods`, or methods as they are written "
        f"(default: {default})",
    )
    group.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="TEXT",
        help="one more, e.g. 'mine = AdamW(weight_decay=0.1) + GradientCentralization + lrs=[0.001, 0.003, 0.01]'; may "
        "be given for several, with or without --methods",
    )


def given_methods(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    """Return the methods of `add_method_options`; None if none is named."""
    if arguments.methods is None and not arguments.method:
        return None
    return (*split_list(arguments.methods or ""), *arguments.method)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add what names the data and how much of it is used."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default=_DEFAULTS.data,
        metavar="WHAT",
        help="digits, a file (a text, a table, frozen features, images as .parquet), or a folder of data: parquet "
        "files, CIFAR, a folder of images a class, ... (see `wellcond list data`; default: %(default)s)",
    )
    data.add_argument(
        "--test-data",
        metavar="DIR",
        help="of segmentation: measure on the images of this folder, of another place or style (default: on the "
        "data's own)",
    )
    data.add_argument(
        "--target-column", metavar="NAME", help="of a table: the column that is to be told (default: the last)"
    )
    data.add_argument(
        "--kind",
        metavar="NAME",
        help="of a table: classification or regression (default: by whether the target is of words or few integers)",
    )
    data.add_argument(
        "--train-images",
        type=int,
        metavar="N",
        help="images (rows of a table, blocks of a text in an epoch) that train (default: digits 1000, texts 512, else "
        "all)",
    )
    data.add_argument(
        "--val-images",
        dest="validation_images",
        type=int,
        metavar="N",
        help="images, rows or blocks that choose the lr (default: a tenth; digits: 398)",
    )
    data.add_argument(
        "--test-images",
        type=int,
        metavar="N",
        help="images, rows or blocks that measure (default: a fifth, of a text a tenth, or the test file; digits: 399)",
    )
    data.add_argument(
        "--image-size",
        type=int,
        metavar="S",
        help="average-pool the images to SxS (default: as they are); files of images are cut to it (default: 224)",
    )
    data.add_argument(
        "--augment",
        dest="augmentation",
        metavar="NAME",
        help=f"{', '.join(AUGMENTATIONS)} (default: none for digits, else crop-flip)",
    )


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Add what names a task of one's own."""
    task = parser.add_argument_group("a task of your own, in the place of data and network")
    task.add_argument(
        "--task",
        metavar="MODULE:NAME",
        help="a class with model, batches, loss and scores (see wellcond.lab.Task), importable from the current "
        "folder, such as my_project.training:MyTask or training.py:MyTask; or a LightningModule",
    )
    task.add_argument(
        "--task-args",
        nargs="+",
        action="extend",
        type=_pair,
        default=[],
        metavar="NAME=VALUE",
        help="what the class is built with; values as TOML writes them, other texts as they are",
    )
    task.add_argument(
        "--data-module",
        metavar="MODULE:NAME",
        help="the LightningDataModule of a LightningModule (default: the module's own loaders)",
    )
    task.add_argument(
        "--data-args",
        nargs="+",
        action="extend",
        type=_pair,
        default=[],
        metavar="NAME=VALUE",
        help="what the LightningDataModule is built with",
    )
    task.add_argument(
        "--score",
        metavar="NAME:max|min",
        help="which of the task's scores counts, such as val_acc:max (default: its metric; of a LightningModule the "
        "logged val_* that is an accuracy, or val_loss)",
    )


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must look like lr_warmup=3, got {text!r}")
    return name, value


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what names the network."""
    model = parser.add_argument_group("network")
    model.add_argument(
        "--model",
        metavar="NAME",
        help=f"{', '.join(MODELS)}, torchvision:NAME, timm:NAME (default: by data, convnet for digits)",
    )
    model.add_argument(
        "--weights",
        metavar="FILE",
        help="state dict that every run begins with, or torchvision:IMAGENET1K_V1 and the like for the models of "
        "torchvision; a classifier of other classes is left out (default: drawn from the seed)",
    )


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add what a run consists of, whatever the method."""
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, metavar="N", help="epochs of a run (default: by data)")
    training.add_argument(
        "--batch-size", type=int, metavar="N", help="images, rows or blocks of a batch (default: by data)"
    )
    training.add_argument(
        "--ghost-batch",
        type=int,
        metavar="M",
        help="take batch statistics in training over groups of M images, as if each were on a device of its own; "
        "methods without batch statistics (GN) stay as they are (default: over the whole batch)",
    )
    training.add_argument(
        "--stats-every",
        type=int,
        metavar="N",
        help="steps between statistics of a preconditioner (default: by run length)",
    )
    training.add_argument(
        "--solve-every", type=int, metavar="N", help="steps between its solves (default: by run length)"
    )
    training.add_argument(
        "--schedule",
        default=_DEFAULTS.schedule,
        metavar="NAME",
        help="cosine (to 0), constant, step:EVERY,FACTOR or steps:EPOCH,...,FACTOR, which multiply the lr by FACTOR "
        "every EVERY epochs or at these (default: %(default)s)",
    )
    training.add_argument(
        "--warmup",
        type=float,
        default=_DEFAULTS.warmup,
        metavar="EPOCHS",
        help="let the lr rise over the first epochs (default: not)",
    )
    training.add_argument(
        "--precision",
        default=_DEFAULTS.precision,
        metavar="NAME",
        help=f"{', '.join(PRECISIONS)} (default: %(default)s)",
    )
    training.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=_DEFAULTS.channels_last,
        help="keep networks of images in memory channels last, which many convolutions compute faster "
        "(default: %(default)s)",
    )
    training.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=_DEFAULTS.deterministic,
        help="use deterministic algorithms only, and fail where there is none (default: %(default)s)",
    )
    training.add_argument(
        "--label-smoothing",
        type=float,
        default=_DEFAULTS.label_smoothing,
        metavar="SHARE",
        help="share of the target that is spread over all classes in training (default: 0)",
    )


def add_search_options(group: argparse._ArgumentGroup) -> None:
    """Add what is tried of each method, and what it is chosen for."""
    group.add_argument(
        "--sweep",
        dest="sweeps",
        action="append",
        default=[],
        metavar="OPTION=A,B,...",
        help="also try these values of an option, e.g. damping=0.01,0.1,1 or weight_decay=0,5e-4, of every method that "
        "has it (batch_size and ghost_batch: all); the others try more lrs, so that all try equally many; may be given "
        "for several",
    )
    group.add_argument(
        "--search",
        default=_DEFAULTS.search,
        metavar="NAME",
        help="grid (all combinations) or random (points between the ends of each range) (default: %(default)s)",
    )
    group.add_argument(
        "--trials", type=int, metavar="N", help="trials of each method in a random search (default: as many as a grid)"
    )
    group.add_argument(
        "--trial-seeds",
        type=int,
        metavar="N",
        help="train every trial with the first N seeds only, which choose; with the other seeds only the chosen trial "
        "of each method (default: all)",
    )
    group.add_argument(
        "--mode",
        default=_DEFAULTS.mode,
        metavar="NAME",
        help=f"{' or '.join(MODES)}: what trials are chosen for on validation, the score at the end or the fewest "
        "epochs to --target, as speed-run boards count them (default: %(default)s)",
    )
    group.add_argument(
        "--time-fractions",
        dest="time_shares",
        default="1",
        metavar="A,B,...",
        help="also train every method for these fractions of its baseline's time, each with a complete schedule "
        "(default: %(default)s, equal time)",
    )


def parse_shares(text: str) -> tuple[float, ...]:
    """Read fractions of the baseline's time from the command line.

    Args:
        text: Numbers, separated by commas.

    Raises:
        LabError: If one is no number.

    >>> parse_shares("1,0.5")
    (0.5, 1.0)
    """
    try:
        return tuple(sorted(float(part) for part in text.split(",")))
    except ValueError:
        raise LabError(f"--time-fractions must be numbers separated by commas, got {text!r}") from None


def add_process_options(group: argparse._ArgumentGroup) -> None:
    """Add what a run trains on, in how many processes, and how it survives being stopped."""
    group.add_argument(
        "--accelerator",
        default=_DEFAULTS.accelerator,
        metavar="NAME",
        help=f"{', '.join(ACCELERATORS)} (default: %(default)s, a CUDA device if there is one)",
    )
    group.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="processes of this machine that train each run together, each with its share of a batch and a CUDA device "
        "of its own if there are any; for several machines start the command with torchrun or srun (default: 1)",
    )
    group.add_argument(
        "--strategy",
        default=_DEFAULTS.strategy,
        metavar="NAME",
        help=f"{', '.join(STRATEGIES)}: how several processes train together, with a network each (ddp) or with its "
        "weights sharded (fsdp) (default: %(default)s)",
    )
    group.add_argument(
        "--checkpoint-every",
        type=float,
        default=_DEFAULTS.checkpoint_every,
        metavar="SECONDS",
        help="how often an unfinished run is kept, to go on from there (default: %(default)g)",
    )


def leave_open(parser: argparse.ArgumentParser) -> None:
    """Let options that are settings have no value unless they are given: a comparison's file comes before the defaults.

    Args:
        parser: A command's, with all its options.
    """
    for action in parser._actions:
        if action.dest in {field.name for field in fields(Settings)} - {"methods", "lrs"}:
            if action.help is not None:
                shown = action.help.replace("%(default)s", str(action.default))
                action.help = shown.replace("%(default)g", f"{action.default}")
            action.default = argparse.SUPPRESS


def given_settings(arguments: argparse.Namespace, **more: Any) -> Settings:
    """Return the settings that the arguments stand for.

    Args:
        arguments: The command's; those called as a field of `Settings` become its value.
        more: Fields that the command works out itself.

    Raises:
        LabError: If a value is out of its range.
    """
    given = {field.name: getattr(arguments, field.name) for field in fields(Settings) if field.name in arguments}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Settings(**(given | more))
