"""Writes the tables that README.md and the pages in docs quote, from the JSON files in docs/results.

    python docs/quote_results.py            # rewrite the tables
    python docs/quote_results.py --check    # only say whether they are up to date
    python docs/quote_results.py --adopt out/reproduce.json reproduced-6.3

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, where docs/results/NAME.json holds what
`wellcond compare` (results.json), `wellcond reproduce` (reproduce.json), a recipe, a benchmark (--json) or
docs/draw_figures.py wrote. ``<!-- begin NAME, rows: A | B -->`` quotes these rows alone, and what was found of all of
them is left out. ``<!-- begin reproduced-summary -->`` stands for all that docs/reproduced.md quotes, and
``<!-- begin effects -->`` for what each technique did in every committed comparison, and
``<!-- begin fixed-norm-summary -->`` for how DW-SGDM stands beside the others in all of them that have it,
``<!-- begin fixed-norm-parts -->`` for what each of its parts adds.

``--adopt FILE NAME`` copies a reproduce.json to docs/results/NAME.json without the folders that its command and its
settings name, which are those of the machine that wrote it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmark_tables import (
    cost_table,
    fidelity_table,
    inference_table,
    layers_table,
    measured_table,
    plain_tables,
    step_table,
)
from effects import effects_table
from figure_tables import figure_table
from fixed_norm import fixed_norm_table, parts_table
from normalizer_tables import normalizers_table
from peers import peers_table
from quoted_words import difference, markdown, run_by, spread
from reproductions import adopted, reproduction_tables, summary_table

from wellcond.lab.comparison.statistics import paired_difference
from wellcond.lab.comparison.summary import read_summary
from wellcond.lab.report.formats import quantity_text, ratio_text
from wellcond.lab.report.tables import quoted_table, share_tables
from wellcond.lab.runs.files import to_json
from wellcond.lab.runs.metric import ACCURACY

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
REPRODUCED = ROOT / "docs" / "reproduced.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SUMMARY = "reproduced-summary"
EFFECTS = "effects"
FIXED_NORM = {"fixed-norm-summary": fixed_norm_table, "fixed-norm-parts": parts_table}


def comparison_table(results: dict[str, Any]) -> str:
    """Return a comparison as a Markdown table with the command and the machine that made it."""
    summary = read_summary(results)
    score = quantity_text(summary.score, summary.metric)
    lines = [
        f"{results['title']}; {summary.seeds} paired seeds. Test {score}, mean ± std; differences to the baseline with "
        "a 95 % interval.",
        "",
        quoted_table(summary).to_markdown(),
    ]
    for table in share_tables(summary):
        lines += ["", f"{table.caption}:", "", table.to_markdown()]
    notes = [f"- {note}" for note in (*results["findings"], *results["notes"])]
    return "\n".join([*lines, "", *notes, "", run_by(results)])


def forms_table(results: dict[str, Any]) -> str:
    """Return how each form of the second moment compares with the dense one, with the command that made it."""
    last = results["epochs"]
    by_name = {method["name"]: method for method in results["methods"]}
    score = quantity_text(results["score"], ACCURACY)
    lines = [
        f"{results['title']}; {results['seeds']} paired seeds. Test {score}, mean ± std; "
        "difference to the dense form with a 95 % interval.",
        "",
    ]
    rows = []
    for name, method in by_name.items():
        dense = by_name.get(f"{'-'.join(name.split('-')[: 2 if name.startswith('W-') else 1])}-dense")
        ends = [curve["test_score"][-1] for curve in method["curves"]]
        to_dense = ""
        if dense is not None and dense is not method:
            other = [curve["test_score"][-1] for curve in dense["curves"]]
            to_dense = difference(asdict(paired_difference(ends, other)))
        loss = _training_loss(method)
        time = f"{method['milliseconds_per_step']:.1f} ms"
        if name != method["baseline"]:
            time = ratio_text(method["time_ratio"])
        rows.append([name, spread(method["scores"][str(last)]), to_dense, f"{loss:.4f}", time])
    heads = ["method", f"epoch {last}", "difference to dense", "training loss", "time/step"]
    return "\n".join([*lines, markdown(heads, rows), "", run_by(results)])


def _training_loss(method: dict[str, Any]) -> float:
    """Return the mean training loss of the last epoch."""
    return fmean(curve["train_loss"][-1] for curve in method["curves"])


def with_rows(results: dict[str, Any], rows: Sequence[str]) -> dict[str, Any]:
    """Return results with the named rows alone, and without what was found of all of them.

    Args:
        results: What a file in docs/results holds.
        rows: Their names, as the table's first column has them; one that a file with several tables has in only one of
            them is left out of the others.

    Raises:
        KeyError: If there is no such row.
    """
    found: set[str] = set()

    def chosen(table: dict[str, Any]) -> dict[str, Any]:
        found.update(name for name in rows if name in table)
        return {name: row for name, row in table.items() if name in rows}

    less = dict(results)
    if "findings" in less:
        less["findings"] = []
    if less.get("recipe") == "normalizers":
        for panel in less["panels"]:
            chosen({method["label"]: method for method in panel["methods"]})
    elif "methods" in less:
        less["methods"] = list(chosen({method["name"]: method for method in less["methods"]}).values())
    elif "shapes" in less:
        tables = ("training", "evaluation", "peak_extra_nc")
        less["shapes"] = [
            {key: chosen(value) if key in tables else value for key, value in shape.items()} for shape in less["shapes"]
        ]
    elif "options" in less:
        less["results"] = {m: chosen(table) for m, table in less["results"].items()}
    else:
        less["results"] = chosen(less["results"])
    if unknown := set(rows) - found:
        raise KeyError(f"no such row: {', '.join(sorted(unknown))}")
    return less


def quoted(page: str) -> str:
    """Return a page with every quoted table made anew."""

    def table(match: re.Match[str]) -> str:
        name, rows = match["name"], match["rows"]
        if name == SUMMARY:
            return f"<!-- begin {name} -->\n{summary_table(reproduced())}\n<!-- end {name} -->"
        if name == EFFECTS:
            return f"<!-- begin {name} -->\n{effects_table(_load, reproduced())}\n<!-- end {name} -->"
        if name in FIXED_NORM:
            return f"<!-- begin {name} -->\n{FIXED_NORM[name](_load)}\n<!-- end {name} -->"
        results = _load(name)
        if rows is not None:
            results = with_rows(results, [row.strip() for row in rows.split("|")])
        if "tables" in results:
            body = plain_tables(results)
        elif results.get("recipe") == "normalizers":
            body = normalizers_table(results, rows and [row.strip() for row in rows.split("|")])
        elif "panels" in results:
            body = reproduction_tables(results)
        elif "methods" in results:
            tables = {"-forms": forms_table, "-peers": peers_table}
            body = next((make for end, make in tables.items() if name.endswith(end)), comparison_table)(results)
        elif "shapes" in results:
            body = layers_table(results)
        elif "figure" in results:
            body = figure_table(results)
        elif "measured" in results:
            body = measured_table(results)
        elif "options" in results:
            body = inference_table(results)
        elif "fidelity" in results:
            body = fidelity_table(results)
        else:
            body = step_table(results) if "plain SGD" in results["results"] else cost_table(results)
        head = name if rows is None else f"{name}, rows: {rows}"
        return f"<!-- begin {head} -->\n{body}\n<!-- end {name} -->"

    marks = r"<!-- begin (?P<name>[\w.-]+)(?:, rows: (?P<rows>[^\n]*?))? -->.*?<!-- end (?P=name) -->"
    return re.sub(marks, table, page, flags=re.DOTALL)


def reproduced() -> list[dict[str, Any]]:
    """Return what the tables of docs/reproduced.md hold, in their order there."""
    names = re.findall(r"<!-- begin (reproduced-(?!summary)[\w.-]+) -->", REPRODUCED.read_text(encoding="utf-8"))
    return [_load(name) for name in names]


def adopt(file: Path, name: str) -> None:
    """Copy a reproduce.json to the committed results.

    Args:
        file: The file.
        name: What it is called there.
    """
    content = adopted(json.loads(file.read_text(encoding="utf-8")))
    (RESULTS / f"{name}.json").write_text(to_json(content), encoding="utf-8")


def _load(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return results


def main(arguments: list[str]) -> int:
    """Rewrite or check the pages; return the exit code."""
    if arguments[:1] == ["--adopt"]:
        file, name = arguments[1:]
        adopt(Path(file), name)
        return 0
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    stale = [page for page, text in texts.items() if quoted(text) != text]
    if "--check" in arguments:
        return 1 if stale else 0
    for page in stale:
        page.write_text(quoted(texts[page]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
