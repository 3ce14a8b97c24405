"""Writes the tables of the recipe ``normalizers``: accuracies over the batch size, and learned shares."""

from __future__ import annotations

from typing import Any

from quoted_words import difference, markdown, run_by, spread

from wellcond.lab.comparison.statistics import Spread
from wellcond.lab.report.formats import share_text
from wellcond.lab.report.shares import PARTS


def normalizers_table(results: dict[str, Any], rows: list[str] | None = None) -> str:
    """Return the normalizers' accuracies by samples behind one set of statistics, and the average shares learned.

    Args:
        results: What reproduce.json holds.
        rows: The methods to show, without what was found of all of them; None for all.
    """
    panels = [
        panel | {"methods": [method for method in panel["methods"] if rows is None or method["label"] in rows]}
        for panel in results["panels"]
    ]
    first = panels[0]
    heads = ["method", *(f"{what}, {panel['name']}" for panel in panels for what in ("accuracy", "difference to BN"))]
    table = []
    for place, method in enumerate(first["methods"]):
        cells = [method["label"]]
        for panel in panels:
            each = panel["methods"][place]
            cells += [spread(each["ours"]), "" if each["difference"] is None else difference(each["difference"])]
        table.append(cells)
    lines = [
        f"{first['title']}; m samples behind one set of batch statistics; {first['seeds']} paired seeds. Test "
        "accuracy in %, mean ± std; differences to BN at the same m with a 95 % interval.",
        "",
        markdown(heads, table),
    ]
    learned = [
        (panel["name"], method["label"], method["shares"]["average"])
        for panel in panels
        for method in panel["methods"]
        if method["shares"]
    ]
    if learned:
        kinds = list(learned[0][2]["mean"])
        shares = [
            [f"{name}, {called}", *(share_text(Spread(**average[part][kind])) for kind in kinds)]
            for name, _, average in learned
            for part, called in PARTS.items()
        ]
        heads = [f"{learned[0][1]}'s shares, average over layers", *(kind.upper() for kind in kinds)]
        lines += ["", markdown(heads, shares)]
    notes = [f"- {line}" for line in (*(_findings(results) if rows is None else ()), *_notes(panels))]
    return "\n".join([*lines, "", *notes, "", run_by(results)])


def _findings(results: dict[str, Any]) -> list[str]:
    said = []
    for panel in results["panels"]:
        best = max(panel["methods"], key=lambda method: method["ours"]["mean"])
        said.append(f"At {panel['name']} the best mean test accuracy is {best['label']}'s, {spread(best['ours'])} %.")
        for method in panel["methods"]:
            if method["shares"]:
                shares = [
                    f"{share_text(Spread(**method['shares']['average'][part]['ln']))} in the {called}"
                    for part, called in PARTS.items()
                ]
                layers = len(method["shares"]["layers"])
                said.append(f"At {panel['name']} LN's share is {' and '.join(shares)}, averaged over {layers} layers.")
    return said + [line for claim in results["claims"] for line in claim["said"]]


def _notes(panels: list[dict[str, Any]]) -> list[str]:
    said = []
    for panel in panels:
        for method in panel["methods"]:
            name = f"{method['label']} at {panel['name']}"
            if method["lr_edge"] is not None:
                said.append(f"{name}: the chosen lr {method['lr']:g} is the {method['lr_edge']} of its grid.")
            if method["diverged_runs"]:
                runs = f"{method['diverged_runs']} runs"
                said.append(f"{name}: {runs} ended with a NaN or infinite loss, and count as guessing.")
    return said
