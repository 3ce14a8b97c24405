"""How whitening both sides in a fixed norm (DW-SGDM) stands beside the others, in all comparisons that have it."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from quoted_words import interval, last_difference, markdown

METHOD = "DW-SGDM"
OTHERS = ("SGDM", "AdamW", "W-SGDM", "Muon")
SETTINGS = {
    "fixed-norm-digits-peers": "digits, small convolutional network, batch normalization",
    "fixed-norm-mlp-bn-peers": "digits as a table, MLP, batch normalization",
    "fixed-norm-mlp-peers": "digits as a table, MLP, no normalization",
    "fixed-norm-resnet8-peers": "CIFAR-10, 16 × 16, ResNet-8, batch normalization",
    "cifar10-jpeg-16-peers": "CIFAR-10, 16 × 16, thin ResNet-18, batch normalization",
    "cifar10-jpeg-peers": "CIFAR-10, 32 × 32, thin ResNet-18, batch normalization",
    "tinyshakespeare-peers": "Shakespeare, small GPT, layer normalization (bits)",
}
"""Committed comparisons in which all of these stand, and what was trained."""

PARTS = {
    "the norm of all layers together (normalized SGD)": ("normalized-SGD", "SGDM"),
    "a share of each layer's weights' norm (LARS)": ("LARS", "SGDM"),
    "the fixed norm": ("fixed-norm", "SGDM"),
    "whitening of the inputs' side (W-SGDM)": ("W-SGDM", "SGDM"),
    "on top of it, the fixed norm": ("W-SGDM-fixed", "W-SGDM"),
    "on top of it, the outputs' side": ("W-SGDM-both-sides", "W-SGDM"),
    "on top of it, both (DW-SGDM)": (METHOD, "W-SGDM"),
}
"""What is added, and the methods with it and without."""

ABLATIONS = ("fixed-norm-resnet8-peers", "fixed-norm-mlp-peers")
"""Committed comparisons that have them."""


def fixed_norm_table(load: Callable[[str], dict[str, Any]]) -> str:
    """Return one line a comparison: what DW-SGDM gains over each of the others, after equal epochs and in equal time.

    Args:
        load: From a name in docs/results to what the file holds.
    """
    results = {name: load(name) for name in SETTINGS}
    heads = ["trained", "seeds", *(f"beside {other}" for other in OTHERS)]
    lines = []
    for title, gain in (("After equally many epochs", _after_epochs), ("In equal time", _in_equal_time)):
        rows = [
            [SETTINGS[name], str(found["seeds"]), *(_text(gain(found, other), found["metric"]) for other in OTHERS)]
            for name, found in results.items()
        ]
        lines += [f"{title}:", "", markdown(heads, rows), ""]
    return "\n".join([*lines, *_commands(results)])


def parts_table(load: Callable[[str], dict[str, Any]]) -> str:
    """Return what each part of DW-SGDM adds after equally many epochs, paired by seed.

    Args:
        load: From a name in docs/results to what the file holds.
    """
    results = {name: load(name) for name in ABLATIONS}
    rows = [
        [part, *(_text(_after_epochs(found, other, name), found["metric"]) for found in results.values())]
        for part, (name, other) in PARTS.items()
    ]
    table = markdown(["what is added", *(SETTINGS[name] for name in ABLATIONS)], rows)
    return "\n".join([table, "", *_commands(results)])


def _commands(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return what made the comparisons, folded, a line each."""
    commands = [escape(found["command"]) for found in results.values()]
    return [
        "<details><summary>The commands</summary><code>",
        "</code><br><code>\n".join(commands) + "</code></details>",
    ]


def _after_epochs(results: dict[str, Any], other: str, name: str = METHOD) -> dict[str, Any] | None:
    by_name = {method["name"]: method for method in results["methods"]}
    return last_difference(by_name[name], by_name[other])


def _in_equal_time(results: dict[str, Any], other: str) -> dict[str, Any] | None:
    method = next(method for method in results["methods"] if method["name"] == METHOD)
    found: dict[str, Any] = method["equal_time"]
    return found["difference"] if other == method["baseline"] else found["others"].get(other)


def _text(difference: dict[str, Any] | None, metric: dict[str, Any]) -> str:
    """Return a difference so that more is better."""
    if difference is None:
        return ""
    sign, digits = (1, 1) if metric["higher_is_better"] else (-1, 3)
    low, high = sorted(sign * difference[end] for end in ("low", "high"))
    text = interval({"mean": sign * difference["mean"], "low": low, "high": high}, digits)
    return f"**{text}**" if low > 0 or high < 0 else text
