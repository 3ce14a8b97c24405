"""What each technique did in every comparison that is committed: the sizes behind the advice of what to try first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from quoted_words import markdown
from reproductions import claims

from wellcond.lab.reproduction.report import metric_of

TECHNIQUES = {
    "Gradient Centralization": ("SGDM+GC", "AdamW+GC"),
    "feature whitening": ("W-SGDM", "W-Adam"),
    "whitening with centralization": ("W-SGDM+GC",),
    "feature descent": ("FSGD", "FAdam"),
    "BSR": ("BSR",),
    "MBN": ("MBN",),
}
"""Techniques, with the lab's methods that use nothing else."""

COMPARISONS = ("cifar10-jpeg-small", "digits", "norm-small-batch")
"""Committed results of `wellcond compare` in which they stand."""


class Effect(NamedTuple):
    """One measured difference.

    Attributes:
        difference: Mean and interval of the paired difference after the last epoch, in points.
        equal_time: The same at equal wall time; None where it was not measured.
        time_ratio: Time per step over the baseline's.
    """

    difference: dict[str, Any]
    equal_time: dict[str, Any] | None
    time_ratio: float | None


def effects_table(load: Callable[[str], dict[str, Any]], reproduced: Sequence[dict[str, Any]]) -> str:
    """Return one line a technique and comparison, and how often it was seen in all of them.

    Args:
        load: From a name in docs/results to what the file holds.
        reproduced: What the files of docs/reproduced.md hold.
    """
    heads = ["technique", "compared with", "where", "after the last epoch", "at equal time", "time per step"]
    rows = []
    commands = []
    for technique, methods in TECHNIQUES.items():
        for name in COMPARISONS:
            results = load(name)
            for method in results["methods"]:
                if method["name"] not in methods:
                    continue
                effect = _effect(method)
                cells = [technique, f"{method['baseline']} ({method['name']})", _where(results)]
                cells += [_signed(effect.difference), "" if effect.equal_time is None else _signed(effect.equal_time)]
                cells.append("" if effect.time_ratio is None else f"× {effect.time_ratio:.2f}")
                rows.append(cells)
                commands.append(f"`{results['command']}`")
    lines = [markdown(heads, rows), "", *_counted(load, reproduced), "", "; ".join(dict.fromkeys(commands))]
    return "\n".join(lines)


def all_effects(
    load: Callable[[str], dict[str, Any]], reproduced: Sequence[dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Return, for each technique, the paired difference of every committed comparison with its baseline.

    Args:
        load: From a name in docs/results to what the file holds.
        reproduced: What the files of docs/reproduced.md hold.
    """
    found: dict[str, list[dict[str, Any]]] = {technique: [] for technique in TECHNIQUES}
    for technique, methods in TECHNIQUES.items():
        for name in COMPARISONS:
            found[technique] += [_effect(m).difference for m in load(name)["methods"] if m["name"] in methods]
    for technique, difference in _of_reproductions(reproduced):
        found[technique].append(difference)
    return found


def _of_reproductions(reproduced: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for results in reproduced:
        for claim in claims(results):
            label = claim.method["label"]
            technique = next((name for name, methods in TECHNIQUES.items() if label in methods), None)
            if label.endswith("w/ GC"):
                technique = "Gradient Centralization"
            if technique is not None and claim.method["difference"] is not None:
                yield technique, _as_gain(claim.method["difference"], results["score"])


def _as_gain(difference: dict[str, Any], score: str) -> dict[str, Any]:
    """Return a difference so that more is better."""
    if metric_of(score).higher_is_better or difference["low"] is None:
        return difference
    return {"mean": -difference["mean"], "low": -difference["high"], "high": -difference["low"]}


def _counted(load: Callable[[str], dict[str, Any]], reproduced: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for technique, differences in all_effects(load, reproduced).items():
        better = sum(_sign(difference) > 0 for difference in differences)
        worse = sum(_sign(difference) < 0 for difference in differences)
        count = len(differences)
        lines.append(
            f"- {technique[0].upper()}{technique[1:]}, in {count} comparison{'s' if count > 1 else ''}, those of the "
            f"sources' tables included: better than its baseline by more than chance {_times(better)}, worse "
            f"{_times(worse)}, within chance {_times(count - better - worse)}."
        )
    return lines


def _times(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def _sign(difference: dict[str, Any]) -> int:
    """Return 1 or -1 where the interval leaves zero out, else 0."""
    if difference["low"] is None:
        return 0
    return (difference["low"] > 0) - (difference["high"] < 0)


def _effect(method: dict[str, Any]) -> Effect:
    equal = method["equal_time"]
    return Effect(method["final_difference"], None if equal is None else equal["difference"], method["time_ratio"])


def _where(results: dict[str, Any]) -> str:
    data, _, rest = results["title"].partition(": ")
    ghost = rest.rpartition("ghost groups of ")[2] if "ghost groups of" in rest else ""
    name = "CIFAR-10 (JPEG)" if data.startswith("cifar10-jpeg") else data
    groups = f", {ghost} images a group" if ghost else ""
    return f"{name}, {results['settings']['model']}, {results['epochs']} epochs{groups}"


def _signed(value: dict[str, Any]) -> str:
    return f"{value['mean']:+.1f} [{value['low']:+.1f}, {value['high']:+.1f}]"
