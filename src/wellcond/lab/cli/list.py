"""`wellcond list`: the methods, models, data and recipes that can be named."""

from __future__ import annotations

import argparse

from wellcond.lab.data.named_data import DIGITS
from wellcond.lab.methods.method import DEFAULT_METHODS, METHODS
from wellcond.lab.networks.gpt_specs import GPTS
from wellcond.lab.networks.mlp_specs import MLPS
from wellcond.lab.networks.registry import MODELS
from wellcond.lab.tasks.detection.networks import DETECTORS
from wellcond.lab.tasks.open import LAYOUTS, DataLayout
from wellcond.lab.tasks.reid.specs import REID_NETWORKS
from wellcond.lab.tasks.segmentation.specs import SEGMENTERS


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("list", help="show the methods, models, data or recipes that can be named")
    parser.add_argument("what", nargs="?", choices=("methods", "models", "data", "recipes"), help="default: all")


def run(arguments: argparse.Namespace, command_line: str) -> int:
    """Print what was asked for, one line each, and return the exit code."""
    what = arguments.what
    for kind in [what] if what else list(_LISTED):
        if not what:
            print(f"{kind}:")
        named = _LISTED[kind]()
        width = max(len(name) for name, _ in named)
        for name, description in named:
            # Plain lines rather than a table: they can be searched and cut by other programs at any width. A method is
            # a line to copy, and what it is stands below.
            between = "\n      " if kind == "methods" else " " * (2 + width - len(name))
            print(f"  {name}{between}{description}")
    return 0


def _all_methods() -> list[tuple[str, str]]:
    by_default = dict.fromkeys(DEFAULT_METHODS, "")
    return [
        (method.written(), f"{method.description}{by_default.get(method.name, ' (not run by default)')}")
        for method in METHODS.values()
    ]


def _models() -> list[tuple[str, str]]:
    return [
        *((model.name, model.description) for model in MODELS.values()),
        *((model.name, model.description) for model in DETECTORS.values()),
        *((model.name, model.description) for model in REID_NETWORKS.values()),
        *((model.name, model.description) for model in SEGMENTERS.values()),
        *((model.name, model.description) for model in GPTS.values()),
        *((model.name, model.description) for model in MLPS.values()),
        ("torchvision:NAME", "an image classifier of torchvision, ImageNet stem (torchvision:resnet50)"),
        ("timm:NAME", "one of timm, if that is installed (timm:resnet50.a1_in1k)"),
    ]


def _data() -> list[tuple[str, str]]:
    return [
        (DIGITS, "scikit-learn's bundled digits: 1,797 images of 8x8 in 10 classes"),
        *((layout.name, f"{layout.description}{_methods(layout)}") for layout in LAYOUTS),
    ]


def _recipes() -> list[tuple[str, str]]:
    # Here: the others need not wait for pydantic.
    from wellcond.lab.reproduction.recipe import bundled_headings

    return [(recipe.names[0], f"{recipe.title} ({recipe.source})") for recipe in bundled_headings()]


_LISTED = {"methods": _all_methods, "models": _models, "data": _data, "recipes": _recipes}


def _methods(layout: DataLayout) -> str:
    """Return what is compared on data by default, where it is other than on most."""
    return "" if layout.methods == DEFAULT_METHODS else f"; by default {', '.join(layout.methods)}"
