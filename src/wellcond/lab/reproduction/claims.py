"""Decides what a source says of learned shares: one share in two panels, paired over the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from wellcond.lab.comparison.statistics import Difference, paired_difference
from wellcond.lab.report.shares import PARTS, average_share
from wellcond.lab.reproduction.recipe import ClaimTable
from wellcond.lab.training.extras import Shares
from wellcond.nn.norm.switchable import NORMALIZERS

NOTICEABLE = 0.001
"""The least change of a share that counts: smaller ones can be very regular and mean nothing."""

SharesOfRuns = Mapping[float, Sequence[Shares | None]]
"""From an lr to each seed's shares; None for a run that has none."""


@dataclass(frozen=True)
class Claim:
    """A statement of a source, and whether the runs bear it out.

    Attributes:
        table: What the recipe says of it.
        verdict: ``"shown"``, ``"refuted"``, or ``"undecided"`` if the interval holds zero, there is none, or the change
            is less than `NOTICEABLE`.
        differences: Of each normalizer's share, averaged over the layers, the second panel's minus the first's: in the
            means, in the variances, and in both ("both", their average), which decides.
        at_lr: The difference of that share ("both") at each lr of the grid, since the chosen ones may differ.
    """

    table: ClaimTable
    verdict: str
    differences: dict[str, dict[str, Difference]]
    at_lr: dict[str, Difference]

    def said(self) -> list[str]:
        """Return the verdict and what it rests on, as sentences."""
        first, second = self.table.panels
        mine = {part: _signed(difference) for part, difference in self.differences[self.table.share].items()}
        ending = {"shown": "shown.", "refuted": "refuted, it falls.", "undecided": "neither shown nor refuted."}
        others = [
            f"{kind.upper()}'s {_signed(self.differences[kind]['both'])}"
            for kind in self.differences
            if kind != self.table.share
        ]
        count = self.differences[self.table.share]["both"].count
        seeds = "one seed, so without an interval" if count == 1 else f"{count} seeds, 95 % intervals"
        return [
            f"{self.table.statement}: {ending[self.verdict]} From {first} to {second} it changes by {mine['both']}, "
            f"averaged over layers, means and variances ({mine['mean']} in the means, {mine['var']} in the variances; "
            f"paired over {seeds}); {', '.join(others)}.",
            "At the same lr in both: " + ", ".join(f"{_signed(d)} (lr {lr})" for lr, d in self.at_lr.items()) + ".",
        ]

    def describe(self) -> dict[str, Any]:
        """Return what reproduce.json holds of it."""
        return {
            **self.table.model_dump(),
            "verdict": self.verdict,
            "differences": {
                kind: {part: asdict(difference) for part, difference in parts.items()}
                for kind, parts in self.differences.items()
            },
            "at_lr": {lr: asdict(difference) for lr, difference in self.at_lr.items()},
            "said": self.said(),
        }


def check_claim(
    table: ClaimTable, chosen: Sequence[Sequence[Shares | None]], at_lr: Sequence[SharesOfRuns]
) -> Claim | None:
    """Return what the runs of two panels say of a statement; None if those at the chosen lrs have no shares.

    Args:
        table: The statement.
        chosen: Of each panel the shares of the method's runs at the chosen lr, one a seed.
        at_lr: Of each panel those at each lr.
    """
    pairs = _pairs(*chosen)
    if not pairs:
        return None
    kinds = [kind for kind in NORMALIZERS if any(kind in layer["mean"] for layer in pairs[0][0].values())]
    differences = {kind: {part: _difference(pairs, part, kind) for part in (*PARTS, "both")} for kind in kinds}
    deciding = differences[table.share]["both"]
    decided = deciding.beyond_chance and abs(deciding.mean) >= NOTICEABLE
    verdict = "undecided" if not decided else "shown" if deciding.mean > 0 else "refuted"
    first, second = at_lr
    each_lr = {f"{lr:g}": _pairs(first[lr], second[lr]) for lr in first if lr in second}
    found = {lr: _difference(both, "both", table.share) for lr, both in each_lr.items() if both}
    return Claim(table, verdict, differences, found)


def _pairs(first: Sequence[Shares | None], second: Sequence[Shares | None]) -> list[tuple[Shares, Shares]]:
    return [(one, other) for one, other in zip(first, second, strict=True) if one and other]


def _difference(pairs: Sequence[tuple[Shares, Shares]], part: str, kind: str) -> Difference:
    parts = tuple(PARTS) if part == "both" else (part,)
    first, second = (
        [fmean(average_share(shares, each, kind) for each in parts) for shares in side]
        for side in zip(*pairs, strict=True)
    )
    return paired_difference(second, first)


def _signed(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        return f"{difference.mean:+.4f}"
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
