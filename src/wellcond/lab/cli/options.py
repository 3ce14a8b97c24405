"""Makes the options that several commands share from the fields of `Settings`, and settings from what was given."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, get_type_hints

from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import split_list
from wellcond.lab.runs.option import options_of
from wellcond.lab.runs.settings import Settings
from wellcond.lab.trials import Sweep


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


def add_options(to: argparse._ActionsContainer, group: str) -> None:
    """Add the options of `Settings` that belong together.

    Args:
        to: A command, or a group of its options.
        group: Their group.
    """
    hints = get_type_hints(Settings)
    for name, option in options_of(Settings).items():
        if option.group == group and option.offered:
            to.add_argument(
                f"--{option.flag}",
                dest=name,
                default=list(option.default) if isinstance(option.default, tuple) else option.default,
                help=option.help,
                **_reading(hints[name], option.metavar),
            )


def _reading(hint: Any, metavar: str | None) -> dict[str, Any]:
    """Return how argparse reads an option whose field has this type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if hint == tuple[tuple[str, str], ...]:
        return {"metavar": metavar, "nargs": "+", "action": "extend", "type": _pair}
    if hint == tuple[Sweep, ...]:
        return {"metavar": metavar, "action": "append"}
    # A list is one text, which the command takes apart; a field that may be left open has None beside its type.
    number = next((kind for kind in (int, float) if hint in (kind, kind | None)), None)
    return {"metavar": metavar, "type": number}


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add what names the data and how much of it is used."""
    add_options(parser.add_argument_group("data"), "data")


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Add what names a task of one's own."""
    add_options(parser.add_argument_group("a task of your own, in the place of data and network"), "task")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the network and what a run consists of, whatever the method."""
    for group in ("network", "training"):
        add_options(parser.add_argument_group(group), group)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must look like lr_warmup=3, got {text!r}")
    return name, value


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
