"""Writes the tables of what the benchmarks measured, from their JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from quoted_words import difference, made_by, markdown

from wellcond.lab.comparison.statistics import paired_difference


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
    return "\n".join([markdown(heads, lines), "", made_by(results)])


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
    return "\n".join([markdown(heads, lines), "", base, "", made_by(results)])


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
                cells.append(difference(asdict(paired_difference(row["accuracy"], ema["accuracy"]))))
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
