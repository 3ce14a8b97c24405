"""Writes the tables that README.md and the pages in docs quote, from the JSON files in docs/results.

    python docs/quote_results.py            # rewrite the tables
    python docs/quote_results.py --check    # only say whether they are up to date
    python docs/quote_results.py --adopt out/reproduce.json reproduced-6.3

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, where docs/results/NAME.json holds what
`wellcond compare` (results.json), `wellcond reproduce` (reproduce.json), a recipe, a benchmark (--json) or
docs/draw_figures.py wrote. ``<!-- begin NAME, rows: A | B -->`` quotes these rows alone, and what was found of all of
them is left out. ``<!-- begin reproduced-summary -->`` stands for all that docs/reproduced.md quotes, and
``<!-- begin effects -->`` for what each technique did in every committed comparison.

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
from statistics import fmean, median, stdev
from typing import Any

from effects import effects_table
from reproductions import adopted, markdown, reproduction_tables, summary_table

from wellcond.lab.comparison.statistics import Difference, Spread, paired_difference
from wellcond.lab.comparison.summary import read_summary
from wellcond.lab.report.formats import difference_text, quantity_text, ratio_text, spread_text
from wellcond.lab.report.tables import quoted_table
from wellcond.lab.runs.files import to_json
from wellcond.lab.runs.metric import ACCURACY

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
REPRODUCED = ROOT / "docs" / "reproduced.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SUMMARY = "reproduced-summary"
EFFECTS = "effects"


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
    notes = [f"- {note}" for note in (*results["findings"], *results["notes"])]
    return "\n".join([*lines, "", *notes, "", _run_by(results)])


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
        difference = ""
        if dense is not None and dense is not method:
            other = [curve["test_score"][-1] for curve in dense["curves"]]
            difference = _difference(asdict(paired_difference(ends, other)))
        loss = _training_loss(method)
        time = f"{method['milliseconds_per_step']:.1f} ms"
        if name != method["baseline"]:
            time = ratio_text(method["time_ratio"])
        rows.append([name, _spread(method["scores"][str(last)]), difference, f"{loss:.4f}", time])
    heads = ["method", f"epoch {last}", "difference to dense", "training loss", "time/step"]
    return "\n".join([*lines, markdown(heads, rows), "", _run_by(results)])


def plain_tables(results: dict[str, Any]) -> str:
    """Return the tables that a benchmark laid out itself, with the command and the machine that made them."""
    lines = [results["about"], ""]
    for table in results["tables"]:
        lines += [f"**{table['title']}**", ""] if table["title"] else []
        lines += [f"| {' | '.join(row)} |" for row in (table["heads"], ["---"] * len(table["heads"]), *table["rows"])]
        lines.append("")
    return "\n".join([*lines, f"`{results['command']}` (torch {results['torch']}, {results['machine']})"])


def step_table(results: dict[str, Any]) -> str:
    """Return a benchmark of training steps as a Markdown table with the command and the machine that made it."""
    rows = dict(results["results"])
    plain = rows.pop("plain SGD")
    lines = [["plain SGD", f"{plain['ms']:.0f} ms", ""]]
    for name, row in rows.items():
        spread = f"({row['lower_quartile']:.3f} to {row['upper_quartile']:.3f})"
        lines.append([name, f"× {row['ratio']:.3f} {spread}", f"× {row['ratio_by_optimizer_part']:.4f}"])
    heads = ["", "whole step, median (quartiles)", "by the optimizer's part"]
    return "\n".join([markdown(heads, lines), "", _made_by(results)])


def cost_table(results: dict[str, Any]) -> str:
    """Return a benchmark of preconditioners as a Markdown table with the command and the machine that made it."""
    rows = results["results"]
    peak = all("peak_mb" in row for row in rows.values())
    bare = any("of_bare_product" in row for row in rows.values())
    heads = ["", "ordinary step, median (quartiles)", "product, each step"]
    heads += ["product / bare G T"] * bare
    heads += ["statistics, once in 50", "solve, once in 500", "by these, amortised", "state / parameters"]
    heads += ["peak"] * peak
    lines = []
    for name, row in rows.items():
        amortised = f"× {row['amortised_ratio']:.3f}"
        if "amortised_lower_quartile" in row:
            amortised += f" ({row['amortised_lower_quartile']:.3f} to {row['amortised_upper_quartile']:.3f})"
        cells = [
            name,
            f"× {row['ratio']:.3f} ({row['lower_quartile']:.3f} to {row['upper_quartile']:.3f})",
            _milliseconds(row["product_ms"]),
            *[f"× {row['of_bare_product']:.2f}" if "of_bare_product" in row else ""] * bare,
            _milliseconds(row["statistics_ms"]),
            f"{row['solve_ms'] / 1e3:.2f} s" if row["solve_ms"] >= 5 else _milliseconds(row["solve_ms"]),
            amortised,
            f"{row['state_share']:.2f}",
            *[f"{row.get('peak_mb', 0.0):+.0f} MB"] * peak,
        ]
        lines.append(cells)
    steps = [row["sgdm_ms"] for row in rows.values()]
    low, high = (_milliseconds(step).removesuffix(" ms") for step in (min(steps), max(steps)))
    clock = " on the processor's clock" if results.get("clock") == "processor" else ""
    base = f"SGDM's step{clock}: {low} to {high} ms beside the variants."
    return "\n".join([markdown(heads, lines), "", base, "", _made_by(results)])


def _milliseconds(value: float) -> str:
    if value == 0:  # nothing, or less than chance gives to one of two times
        return "≈ 0"
    return f"{value:.0f} ms" if abs(value) >= 10 else f"{value:.2f} ms"


def fidelity_table(results: dict[str, Any]) -> str:
    """Return how close each form's direction comes to the whole second moment's, with the command that made it."""
    powers = list(next(iter(results["results"].values()))["cosine"])
    heads = ["form", *(f"cosine, p = {p}: mean (lowest to highest layer)" for p in powers), "numbers kept / weights"]
    rows = []
    for name, row in results["results"].items():
        cells = [name]
        for p in powers:
            layers = [fmean(seeds) for seeds in row["cosine"][p].values()]
            cells.append(f"{row['mean_cosine'][p]:.3f} ({min(layers):.3f} to {max(layers):.3f})")
        rows.append([*cells, format(row["kept"], ".2f")])
    run, layers = results["fidelity"], len(next(iter(results["results"].values()))["cosine"][powers[0]])
    size = f"{run['image_size']}x{run['image_size']}"
    trained = f"{results['model']} after {run['steps']} steps of batch {results['batch']}"
    seeds = f"{run['seeds']} seed{'' if run['seeds'] == 1 else 's'}"
    averaged = f"mean over {layers} 3 × 3 convolutions and {seeds}"
    lines = [
        markdown(heads, rows),
        "",
        f"{run['data']}, {run['train_images']} training images of {size}: {trained}; {averaged}; second moments of "
        f"{run['observed']} further batches, the same for every form.",
        "",
        f"`{results['command']}` (wellcond {run['wellcond']}, torch {results['torch']}, {results['machine']})",
    ]
    return "\n".join(lines)


def measured_table(results: dict[str, Any]) -> str:
    """Return what an example gained, by several seeds, as a Markdown table with the command that made it."""
    what, rows = results["measured"], results["results"]
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    scale, digits = (100, 1) if what["percent"] else (1, what.get("digits", 3))
    lines = [
        f"{what['about']}; {what['seeds']} seeds, mean ± std{', in percent' if what['percent'] else ''}.",
        "",
        f"| | {' | '.join(columns)} |",
        f"| {' | '.join(['---'] * (len(columns) + 1))} |",
    ]
    for name, row in rows.items():
        cells = []
        for column in columns:
            values = [scale * value for value in row[column]]
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.{digits}f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    chosen = {name: value for name, value in what.get("chosen", {}).items() if value is not None}
    note = [f"Chosen on images or text of their own: {', '.join(f'{n} {v:g}' for n, v in chosen.items())}.", ""]
    made = f"`{results['command']}` (torch {results['torch']}, {results['machine']})"
    return "\n".join([*lines, "", *(note if chosen else []), made])


def layers_table(results: dict[str, Any]) -> str:
    """Return a benchmark of normalization layers as Markdown tables, with the command and the machine that made it."""
    shapes = results["shapes"]
    lines = []
    for what, base, title in (
        ("training", results.get("base", "nn.BatchNorm2d"), "forward and backward"),
        ("evaluation", "nn.InstanceNorm2d", "evaluation, forward"),
    ):
        if what not in shapes[0]:
            continue
        heads = [f"{title}, as a ratio to {base}", *(" × ".join(str(n) for n in shape["shape"]) for shape in shapes)]
        table = []
        for name in shapes[0][what]:
            rows = [shape[what][name] for shape in shapes]
            if name == base:
                cells = [f"{row['ms']:.2f} ms" for row in rows]
            else:
                cells = [f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})" for row in rows]
            table.append([name, *cells])
        lines += [markdown(heads, table), ""]
    lines.append(f"Medians with quartiles of ratios in the same round. {_memory(shapes)}".rstrip())
    made = f"`{results['command']}` ({results['rounds']} rounds, torch {results['torch']}, {results['machine']})"
    return "\n".join([*lines, "", made])


def _memory(shapes: list[dict[str, Any]]) -> str:
    """Return what layers hold beyond nn.BatchNorm2d: floats for each sample and channel, or copies of the input."""
    if "peak_extra_nc" not in shapes[0]:
        return ""
    copies: dict[str, float] = {}
    small = 0.0
    for shape in shapes:
        positions = shape["shape"][2] * shape["shape"][3]
        for name, extra in shape["peak_extra_nc"].items():
            if name.startswith("nn.") or name.startswith("1x1"):
                continue
            if extra > 0.25 * positions:
                copies[name] = max(copies.get(name, 0.0), extra / positions)
            else:
                small = max(small, extra)
    text = (
        "Peak memory of a forward and backward pass above that of nn.BatchNorm2d: at most "
        f"{small:.1f} floats for each sample and channel"
    )
    if copies:
        listed = ", ".join(f"{name} {size:.1f}" for name, size in copies.items())
        text += f"; in copies of the input: {listed}"
    return f"{text}."


def inference_table(results: dict[str, Any]) -> str:
    """Return how ways to evaluate one network compare, with the command and the machine that made it."""
    groups = list(results["results"])
    heads = ["evaluation", *(f"{what}, m = {m}" for m in groups for what in ("disparity", "accuracy"))]
    rows = []
    for name in results["results"][groups[0]]:
        cells = [name]
        for m in groups:
            row, ema = results["results"][m][name], results["results"][m]["EMA"]
            cells.append(f"{fmean(row['disparity']):.3f} ± {stdev(row['disparity']):.3f}")
            if row is ema:
                cells.append(f"{fmean(row['accuracy']):.1f} ± {stdev(row['accuracy']):.1f} %")
            else:
                cells.append(_difference(asdict(paired_difference(row["accuracy"], ema["accuracy"]))))
        rows.append(cells)
    seeds, options = len(results["results"][groups[0]]["EMA"]["accuracy"]), results["options"]
    trained = f"{options['train_images']} training images, ResNet-8, {options['epochs']} epochs at lr {options['lr']}"
    lines = [
        markdown(heads, rows),
        "",
        f"{Path(options['data']).name}: {trained}, ghost groups of m; {seeds} seeds, every way with the same weights. "
        "Disparity: mean ± std. Accuracy: EMA's mean ± std, then differences to it with a 95 % interval.",
    ]
    made = f"`{results['command']}` (torch {results['torch']}, {results['machine']})"
    return "\n".join([*lines, "", made])


def normalizers_table(results: dict[str, Any]) -> str:
    """Return the normalizers' accuracies by samples behind one set of statistics, and SN's average shares."""
    groups = results["groups"]
    heads = ["method", *(f"{what}, m = {m}" for m in groups for what in ("accuracy", "difference to BN"))]
    lines = [
        f"{results['title']}; m samples behind one set of batch statistics; {results['seeds']} paired seeds. Test "
        "accuracy in %, mean ± std; differences to BN at the same m with a 95 % interval.",
        "",
    ]
    rows = []
    for name in next(iter(groups.values()))["methods"]:
        cells = [name]
        for group in groups.values():
            method = group["methods"][name]
            difference = method["difference"]
            cells += [_spread(method["accuracy"]), "" if difference is None else _difference(difference)]
        rows.append(cells)
    lines.append(markdown(heads, rows))
    averages = {m: group["shares"]["average"] for m, group in groups.items() if group["shares"] is not None}
    shares = []
    for m, average in averages.items():
        for part, called in (("mean", "means"), ("var", "variances")):
            cells = [
                f"{average[part][kind]['mean']:.3f} ± {average[part][kind]['std']:.3f}" for kind in ("in", "ln", "bn")
            ]
            shares.append([f"m = {m}, {called}", *cells])
    if shares:
        lines += ["", markdown(["SN's shares, average over layers", "IN", "LN", "BN"], shares)]
    notes = [f"- {note}" for note in (*results["findings"], *results["notes"])]
    return "\n".join([*lines, "", *notes, "", _run_by(results)])


def figure_table(results: dict[str, Any]) -> str:
    """Return what a figure shows in numbers, with the command that drew it."""
    found = results["found"]
    rows = {
        "noise": _noise_rows,
        "disparity": _disparity_rows,
        "spectra": _spectra_rows,
        "gradients": _gradient_rows,
        "smoothness": _smoothness_rows,
        "closed-forms": _closed_form_rows,
        "pn": _population_rows,
    }[results["figure"]](found)
    return "\n".join([markdown(rows[0], rows[1:]), "", _run_by(results)])


def _noise_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = [["momentum λ of MBN", "variance of the mean's noise", "derived", "thesis (2.11)"]]
    for momentum, row in found["momentum"].items():
        rows.append([momentum, *(f"{row[what]:.3g}" for what in ("found", "derived", "thesis"))])
    return rows


def _disparity_rows(found: dict[str, Any]) -> list[list[str]]:
    kinds = {"ema": "EMA", "evalnorm": "EvalNorm, fitted", "bsr": "BSR"}
    rows = [["", *kinds.values(), "BSR < EvalNorm < EMA"]]
    for name, row in found.items():
        seeds = [row["disparity"][kind] for kind in kinds]
        cells = [f"{fmean(own):.3f} ± {stdev(own):.3f}" for own in seeds]
        rows.append([name, *cells, f"in {row['in_order']} of {len(seeds[0])} seeds"])
    return rows


def _spectra_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = [["output of", "method", "condition number, median (range)", "effective rank, mean ± std"]]
    for layer, methods in found.items():
        for method, row in methods.items():
            own = row["condition"]
            condition = f"{median(own):.0f} ({min(own):.0f} to {max(own):.0f})"
            rank = f"{fmean(row['effective_rank']):.1f} ± {stdev(row['effective_rank']):.1f}"
            rows.append([layer, method, condition, rank])
    return rows


def _gradient_rows(found: dict[str, Any]) -> list[list[str]]:
    methods = list(next(iter(found.values())))
    return [["mean over the iterations", *methods]] + [
        [name, *(f"{row[method]:.3f}" for method in methods)] for name, row in found.items()
    ]


def _smoothness_rows(found: dict[str, Any]) -> list[list[str]]:
    own = found["inequality"]
    verdict = "holds" if own["holds"] else "does not hold"
    rows = [["normalization, gradient", "effective smoothness β along the step"]]
    rows += [[name, f"{row['effective_smoothness']:.2f}"] for name, row in found["landscape"].items()]
    left = f"{verdict}: ‖P∇L‖ is {own['gradient_ratio']:.2f} ‖∇L‖, ‖P∇²LP‖ is {own['hessian_ratio']:.2f} ‖∇²L‖"
    return [*rows, ["inequality 4.8", left]]


def _closed_form_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = [["quantity", "drawn ± standard error", "derived", "printed"]]
    for name, row in found.items():
        printed = "" if row["thesis"] is None else f"{row['thesis']:.4g}"
        rows.append([name, f"{row['drawn']:.4g} ± {row['error']:.2g}", f"{row['derived']:.4g}", printed])
    return rows


def _population_rows(found: dict[str, Any]) -> list[list[str]]:
    heads = ["m"]
    for which in ("first layer", "all layers"):
        heads += [f"{which}: ζγ²", "loss by other batches", "loss by the own batch"]
    rows = [heads]
    for m, row in found["fixed_weights"].items():
        cells = [m]
        for which in ("first layer", "all layers"):
            cells.append(f"{row[f'penalty, {which}']:+.4f}")
            cells += ["{:+.4f} ± {:.4f}".format(*row[key]) for key in (f"{which}, independent", which)]
        rows.append(cells)
    return rows


def _training_loss(method: dict[str, Any]) -> float:
    """Return the mean training loss of the last epoch."""
    return fmean(curve["train_loss"][-1] for curve in method["curves"])


def _run_by(results: dict[str, Any]) -> str:
    versions, machine = results["versions"], results["machine"]
    made = f"`{results['command']}` (wellcond {versions['wellcond']}, torch {versions['torch']}, "
    return f"{made}{machine['processor']}, {machine['cores']} cores)"


def _made_by(results: dict[str, Any]) -> str:
    made = f"`{results['command']}` ({results['model']}, batch {results['batch']}, {results['rounds']} rounds, "
    return f"{made}torch {results['torch']}, {results['machine']})"


def _spread(value: dict[str, Any]) -> str:
    return spread_text(Spread(**value))


def _difference(value: dict[str, Any]) -> str:
    return difference_text(Difference(**value))


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
    if "groups" in less:
        less["groups"] = {m: group | {"methods": chosen(group["methods"])} for m, group in less["groups"].items()}
        if "SN" not in rows:
            less["groups"] = {m: group | {"shares": None} for m, group in less["groups"].items()}
        less["notes"] = [note for note in less["notes"] if note.split(" at m = ")[0] in rows]
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
        results = _load(name)
        if rows is not None:
            results = with_rows(results, [row.strip() for row in rows.split("|")])
        if "tables" in results:
            body = plain_tables(results)
        elif results.get("recipe") == "normalizers":
            body = normalizers_table(results)
        elif "panels" in results:
            body = reproduction_tables(results)
        elif "methods" in results:
            body = forms_table(results) if name.endswith("-forms") else comparison_table(results)
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
    names = re.findall(r"<!-- begin (reproduced-[\d.]+) -->", REPRODUCED.read_text(encoding="utf-8"))
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
