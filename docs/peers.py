"""A comparison with what a user would pick instead, the best at equal wall time first."""

from __future__ import annotations

from html import escape
from typing import Any

from quoted_words import interval, last_difference, markdown


def peers_table(results: dict[str, Any]) -> str:
    """Return one line a method, with the command and the machine that made it.

    Args:
        results: What a `wellcond compare` wrote, of methods with one baseline.
    """
    methods = results["methods"]
    baseline = next(method for method in methods if method["baseline"] == method["name"])
    epochs, metric = str(results["epochs"]), results["metric"]
    sign = 1 if metric["higher_is_better"] else -1
    digits = 1 if metric["unit"] == "%" else 3
    score = f"test {metric['name']}" + (" in %" if metric["unit"] == "%" else "")

    def gain(method: dict[str, Any]) -> float:
        return 0.0 if method is baseline else sign * _mean(method["equal_time"]["difference"])

    rows = []
    for method in sorted(methods, key=gain, reverse=True):
        final = method["scores"][epochs]
        cells = [method["name"], f"{final['mean']:.{digits}f} ± {final['std']:.{digits}f}"]
        if method is baseline:
            cells += ["", "", "", f"{method['milliseconds_per_step']:.1f} ms"]
        else:
            same_time = method["equal_time"]["difference"]
            cells += [
                interval(method["final_difference"], digits),
                interval(same_time, digits),
                _verdict(same_time, sign),
                f"× {method['time_ratio']:.2f}",
            ]
        rows.append([*cells, f"{method['lr']:g}" + ("*" if method["lr_edge"] else "")])
    name = baseline["name"]
    heads = ["method", score, f"beside {name}", "at equal time", "by more than chance?", "time per step", "lr"]
    starred = ["*: at an end of its grid; a better one may lie beyond.", ""]
    edges = starred if any(method["lr_edge"] for method in methods) else []
    versions, machine = results["versions"], results["machine"]
    made_by = f"wellcond {versions['wellcond']}, torch {versions['torch']}, {machine['processor']}, "
    lines = [
        f"{results['title']}; {results['seeds']} paired seeds; mean ± std, differences to {name} with a 95 % interval; "
        f"at equal time, each method has {name}'s wall time and a whole schedule in it. "
        f"{len(baseline['lr_grid'])} learning rates were tried for each, chosen on validation"
        f"{_with_seeds(results)}.",
        "",
        markdown(heads, rows),
        "",
        *edges,
        *_additions(methods, name, digits),
        f"<details><summary>The command ({made_by}{machine['cores']} cores)</summary><code>",
        f"{escape(results['command'])}</code></details>",
    ]
    return "\n".join(lines)


def _with_seeds(results: dict[str, Any]) -> str:
    """Return how many of the seeds chose, where it was not all."""
    chose = results["settings"].get("seeds that choose", results["seeds"])
    if chose == results["seeds"]:
        return ""
    return f" with the first {chose} seeds" if chose > 1 else " with the first seed"


def _additions(methods: list[dict[str, Any]], baseline: str, digits: int) -> list[str]:
    """Return how methods with an addition, such as ``Muon+FD``, stand beside those without, after the last epoch."""
    by_name = {method["name"]: method for method in methods}
    said = []
    for name, method in by_name.items():
        plain = by_name.get(name.rpartition("+")[0])
        found = None if plain is None or plain["name"] == baseline else last_difference(method, plain)
        if plain is not None and found is not None:
            said.append(f"{name} beside {plain['name']} {interval(found, digits)}")
    return [f"After the last epoch, paired by seed: {'; '.join(said)}.", ""] if said else []


def _mean(difference: dict[str, Any]) -> float:
    return float(difference["mean"])


def _verdict(difference: dict[str, Any], sign: int) -> str:
    low, high = sorted((sign * difference["low"], sign * difference["high"]))
    if low > 0:
        return "better"
    return "worse" if high < 0 else "no"
