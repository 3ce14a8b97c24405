"""What `wellcond reproduce` measured, as pages quote it: a table a panel, and what was seen of all the sources say.

Everything is made from the numbers in reproduce.json, the words too.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from quoted_words import markdown

from wellcond.lab.comparison.statistics import Difference
from wellcond.lab.report.formats import quantity_text, signed_text
from wellcond.lab.reproduction.report import CHANCE, OPPOSITE, SEEN, against, metric_of, panel_table, verdict

# adoption -----------------------------------------------------------------------------------------------------------


def adopted(content: dict[str, Any]) -> dict[str, Any]:
    """Return what reproduce.json holds without the folders of the machine that wrote it.

    Args:
        content: Of the file. Data are named by their last part, and the results' folder is called out.
    """
    panels = [
        panel | {"settings": panel["settings"] | {"data": _last_part(panel["settings"]["data"])}}
        for panel in content["panels"]
    ]
    return content | {
        "data": {name: _last_part(path) for name, path in content["data"].items()},
        "command": _without_folders(content["command"]),
        "panels": panels,
    }


def _without_folders(command: str) -> str:
    """Return a command line that names files without their folders.

    >>> _without_folders("wellcond reproduce 4.1 --data c=/data/c.parquet --out /tmp/4.1 --panels 'A / B'")
    "wellcond reproduce 4.1 --data c=c.parquet --out out --panels 'A / B'"
    """
    words = shlex.split(command)
    for index, option in enumerate(words[:-1]):
        if option == "--out":
            words[index + 1] = "out"
        elif option == "--data":
            name, _, path = words[index + 1].partition("=")
            words[index + 1] = f"{name}={_last_part(path)}"
    return shlex.join(words)


def _last_part(path: str) -> str:
    return PurePosixPath(path).name


# one table ----------------------------------------------------------------------------------------------------------


def reproduction_tables(results: dict[str, Any]) -> str:
    """Return a reproduction as Markdown tables, one a panel, with the command and the machine that made it."""
    panels = results["panels"]
    shared = [item for item in _otherwise(panels[0]) if all(item in _otherwise(panel) for panel in panels)]
    lines = [
        f"{results['source'].capitalize()}: {results['title']}; {results['scale']} scale. {_score(results)}, mean ± "
        "std. Differences, times and memory are to the baseline; our differences are over paired seeds, with a 95 % "
        "interval. A star marks an lr at the edge of its grid.",
        "",
        f"In the source's place: {', '.join(shared)}.",
    ]
    for panel in panels:
        own = [item for item in _otherwise(panel) if item not in shared]
        of_own = f" In the source's place: {', '.join(own)}." if own else ""
        lines += ["", f"**{panel['name']}** ({panel['title']}; {panel['seeds']} paired seeds).{of_own}", ""]
        lines.append(panel_table(panel, results["score"]).to_markdown())
    notes = dict.fromkeys(note for panel in panels for note in panel["notes"])
    for note in notes:
        names = [panel["name"] for panel in panels if note in panel["notes"]]
        notes[note] = "" if len(names) == len(panels) else f"{', '.join(names)}: "
    listed = [f"- {where}{note}" for note, where in notes.items()]
    return "\n".join([*lines, *([""] if listed else []), *listed, "", f"`{results['command']}` {_made_with(results)}"])


def _otherwise(panel: dict[str, Any]) -> list[str]:
    """Return what the scale changed, each with the source's own value in brackets where it has one."""
    changed = []
    for name, (source, own) in panel["differs"].items():
        value = f"{name.replace('_', ' ')} {'default' if own is None else own}"
        changed.append(value if source is None else f"{value} ({source})")
    return changed


def _score(results: dict[str, Any]) -> str:
    metric = metric_of(results["score"])
    return f"Test {quantity_text(metric.name, metric)}"


def _made_with(results: dict[str, Any]) -> str:
    versions, machine = results["versions"], results["machine"]
    made = f"(wellcond {versions['wellcond']}, torch {versions['torch']}, "
    return f"{made}{machine['processor']}, {machine['cores']} cores)"


# all tables ---------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """A method in a panel: something that the source says, and what was seen of it.

    Attributes:
        table: The recipe's name.
        panel: The panel's; empty if the table has no other.
        method: Of the panel in reproduce.json.
    """

    table: str
    panel: str
    method: dict[str, Any]

    @property
    def what(self) -> str:
        """The claim in a few words."""
        return f"{self.table} {self.method['label']}{f' in {self.panel}' if self.panel else ''}"


def claims(results: dict[str, Any]) -> Iterator[Claim]:
    """Yield every method of every panel that is not itself a baseline of others."""
    panels = results["panels"]
    for panel in panels:
        baselines = {method["baseline"] for method in panel["methods"]}
        for method in panel["methods"]:
            if method["label"] not in baselines:
                yield Claim(results["recipe"], panel["name"] if len(panels) > 1 else "", method)


def summary_table(tables: Sequence[dict[str, Any]]) -> str:
    """Return which of the sources' differences were seen, in words and as a table a method a line.

    Args:
        tables: What the files hold, in the order in which to show them.
    """
    every = [claim for results in tables for claim in claims(results)]
    compared = [claim for claim in every if claim.method["paper_difference"]]
    by_verdict = {
        said: [claim for claim in compared if verdict(claim.method) == said] for said in (SEEN, CHANCE, OPPOSITE)
    }
    timed = [claim for claim in by_verdict[SEEN] if claim.method["equal_time"] is not None]
    kept = [claim for claim in timed if _seen_at_equal_time(claim.method)]
    lines = [
        "Differences to a baseline that the tables print and that were measured here, a method in a panel each: "
        f"{len(compared)}. Seen, so that ours points the same way by more than chance: {len(by_verdict[SEEN])}. Not to "
        f"be told from chance at this size: {len(by_verdict[CHANCE])}. The other way by more than chance: "
        f"{len(by_verdict[OPPOSITE])}. Of those seen, also compared at equal wall time: {len(timed)}; seen there, "
        f"too: {len(kept)}. Levels cannot be compared with the source's, since data and networks are others; "
        "directions can.",
        "",
    ]
    called = {SEEN: "Seen", CHANCE: "Not told from chance", OPPOSITE: "The other way"}
    lines += [
        f"- {called[said]}: {', '.join(claim.what for claim in found)}." for said, found in by_verdict.items() if found
    ]
    for results in tables:
        lines += _without_figures(results)
    lines += ["", *_summary_rows(tables), ""]
    first = tables[0]
    data = " ".join(f"--data {name}={path}" for name, path in first["data"].items())
    made = dict.fromkeys(_made_with(results) for results in tables)
    command = f"wellcond reproduce {first['recipe']} --scale {first['scale']} {data}"
    return "\n".join([*lines, f"`{command}`, and so for each table {'; '.join(made)}"])


def _summary_rows(tables: Sequence[dict[str, Any]]) -> list[str]:
    heads = ["table", "method", "panels", "source's difference", "our difference", SEEN, "also at equal time"]
    rows = [[*heads, CHANCE, OPPOSITE]]
    for results in tables:
        by_label: dict[str, list[dict[str, Any]]] = {}
        for claim in claims(results):
            if claim.method["paper_difference"] and claim.method["difference"] is not None:
                by_label.setdefault(claim.method["label"], []).append(claim.method)
        for methods in by_label.values():
            said = [verdict(method) for method in methods]
            timed = any(method["equal_time"] is not None for method in methods)
            kept = sum(_seen_at_equal_time(method) for method in methods if verdict(method) == SEEN)
            rows.append(
                [
                    results["recipe"],
                    against(methods[0]),
                    str(len(methods)),
                    _range([method["paper_difference"] for method in methods]),
                    _range([method["difference"]["mean"] for method in methods]),
                    str(said.count(SEEN)),
                    str(kept) if timed else "",
                    str(said.count(CHANCE)),
                    str(said.count(OPPOSITE)),
                ]
            )
    return [markdown(rows[0], rows[1:])]


def _without_figures(results: dict[str, Any]) -> list[str]:
    """Return one line a method of a table whose source prints no figures, nothing for others."""
    found: dict[str, dict[str, list[str]]] = {}
    for claim in claims(results):
        if claim.method["paper"] is None and claim.method["difference"] is not None:
            called = f"{claim.method['label']} to {claim.method['baseline']}"
            found.setdefault(called, {}).setdefault(verdict(claim.method), []).append(claim.panel or "its one panel")
    place = results["source"].rpartition(", ")[2].capitalize()
    return [
        f"- {place} prints no figures. {called}, here: "
        + "; ".join(f"{said} in {', '.join(panels)}" for said, panels in by_verdict.items())
        + "."
        for called, by_verdict in found.items()
    ]


def _seen_at_equal_time(method: dict[str, Any]) -> bool:
    equal = method["equal_time"]
    if equal is None:
        return False
    difference = Difference(**equal["difference"])
    return difference.beyond_chance and difference.mean * method["paper_difference"] > 0


def _range(values: Sequence[float]) -> str:
    low, high = signed_text(min(values), 2), signed_text(max(values), 2)
    return low if low == high else f"{low} to {high}"
