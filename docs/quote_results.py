"""Writes the tables that README.md quotes, from the JSON files in docs/results.

    python docs/quote_results.py            # rewrite the tables
    python docs/quote_results.py --check    # only say whether they are up to date

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, where docs/results/NAME.json holds what
`wellcond compare` (results.json) or benchmarks/step_time.py (--json) wrote.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def comparison_table(results: dict[str, Any]) -> str:
    """Return a comparison as a Markdown table with the command and the machine that made it."""
    early, last = results["early_epoch"], results["epochs"]
    lines = [
        f"{results['title']}; {results['seeds']} paired seeds. Test accuracy in %, mean ± std; differences to the "
        "baseline with a 95 % interval.",
        "",
        f"| method | epoch {early} | epoch {last} | difference, epoch {early} | difference, epoch {last} "
        "| time per step | difference at equal time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in results["methods"]:
        accuracy = method["accuracy"]
        cells = [method["name"], _spread(accuracy[str(early)]), _spread(accuracy[str(last)])]
        if method["equal_time"] is None:
            cells += ["", "", f"{method['milliseconds_per_step']:.1f} ms", ""]
        else:
            cells += [
                _difference(method["early_difference"]),
                _difference(method["final_difference"]),
                f"× {method['time_ratio']:.2f}",
                _difference(method["equal_time"]["difference"]),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    versions, machine = results["versions"], results["machine"]
    notes = [*results["findings"], *results["notes"]]
    return "\n".join(
        [
            *lines,
            "",
            *(f"- {note}" for note in notes),
            "",
            f"`{results['command']}` (wellcond {versions['wellcond']}, torch {versions['torch']}, "
            f"{machine['processor']}, {machine['cores']} cores)",
        ]
    )


def cost_table(results: dict[str, Any]) -> str:
    """Return a benchmark of training steps as a Markdown table with the command and the machine that made it."""
    rows = dict(results["results"])
    plain = rows.pop("plain SGD")
    lines = [
        "| | whole step, median (quartiles) | by the optimizer's part | with refreshes amortised |",
        "| --- | --- | --- | --- |",
        f"| plain SGD | {plain['ms']:.0f} ms | | |",
    ]
    for name, row in rows.items():
        amortised = f"× {row['amortised_ratio']:.2f}" if "amortised_ratio" in row else ""
        spread = f"({row['lower_quartile']:.3f} to {row['upper_quartile']:.3f})"
        lines.append(
            f"| {name} | × {row['ratio']:.3f} {spread} | × {row['ratio_by_optimizer_part']:.4f} | {amortised} |"
        )
    made = f"`{results['command']}` ({results['model']}, batch {results['batch']}, {results['rounds']} rounds, "
    return "\n".join([*lines, "", f"{made}torch {results['torch']}, {results['machine']})"])


def _spread(value: dict[str, Any]) -> str:
    return f"{value['mean']:.1f} ± {value['std']:.1f}"


def _difference(value: dict[str, Any]) -> str:
    return f"{value['mean']:+.1f} [{value['low']:+.1f}, {value['high']:+.1f}]"


def quoted(readme: str) -> str:
    """Return a README with every quoted table made anew."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        results = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        body = comparison_table(results) if "methods" in results else cost_table(results)
        return f"<!-- begin {name} -->\n{body}\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (?P<name>[\w-]+) -->.*?<!-- end (?P=name) -->", table, readme, flags=re.DOTALL)


def main(arguments: list[str]) -> int:
    """Rewrite or check the README; return the exit code."""
    readme = README.read_text(encoding="utf-8")
    if "--check" in arguments:
        return 0 if quoted(readme) == readme else 1
    README.write_text(quoted(readme), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
