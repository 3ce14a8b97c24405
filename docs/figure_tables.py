"""Writes the numbers of the figures that docs/draw_figures.py drew."""

from __future__ import annotations

from statistics import fmean, median, stdev
from typing import Any

from quoted_words import markdown, run_by


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
    return "\n".join([markdown(rows[0], rows[1:]), "", run_by(results)])


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
