"""The spectra that `feature_spectrum` finds: their figures, table and plots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from wellcond.diagnostics.tables import axes_for, table
from wellcond.runtime.checks import check_choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Side = Literal["input", "output"]
SpectrumQuantity = Literal["eigenvalues", "condition", "effective_rank", "whitening_error"]

_SIDES: tuple[Side, ...] = ("input", "output")
# More lines than this in one plot are not told apart.
_LINES = 6


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a layer's second moment M, of its input's or its output's rows.

    Grouped convolutions, and attention's queries, keys and values, have one M per group. Where M was wider than
    `feature_spectrum`'s ``max_dim`` it is known from a sketch only: ``exact`` is False, ``eigenvalues`` are the leading
    ones, each at most ``missing`` too small, and what is derived from them says in which direction it may be off.

    Attributes:
        groups: How many matrices.
        width: d, their order.
        rows: Samples × positions that each is the average of; the fewest of the groups.
        eigenvalues: Of each group, descending.
        traces: Of each group, exact also for a sketch.
        exact: Whether these are all eigenvalues.
        resolution: Eigenvalues below this part of the largest are rounding, of the features or of sums, and count as
            zero.

    Example:
        >>> found = Spectrum(1, 4, 100, ((8.0, 1.0, 0.5, 0.5),), (10.0,))
        >>> found.condition, found.energy(1), found.directions(0.9)
        (16.0, 0.8, 2)
    """

    groups: int
    width: int
    rows: int
    eigenvalues: tuple[tuple[float, ...], ...] = field(repr=False)
    traces: tuple[float, ...] = field(repr=False)
    exact: bool = True
    resolution: float = 0.0

    @property
    def missing(self) -> float:
        """The largest that an eigenvalue of a sketch may be too small by: tr(M − N), of the group that has most."""
        return max(self._missing(group) for group in range(self.groups))

    @property
    def condition(self) -> float:
        """λ₁/λ_d of the worst group, infinite where M is singular; of a sketch, a lower bound."""
        return self.damped_condition(0.0)

    def damped_condition(self, damping: float) -> float:
        """Return (λ₁ + δ)/(λ_d + δ) with δ = damping · λ₁, as the relative damping of `FeatureWhitening` has it.

        Args:
            damping: At least 0.

        Returns:
            That of the worst group, at most (1 + damping)/damping; of a sketch, a lower bound.

        Raises:
            ValueError: If the damping is negative.
        """
        if not damping >= 0:
            raise ValueError(f"damping must be at least 0, got {damping!r}")
        return max(self._condition(group, damping) for group in range(self.groups))

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of λ/tr M, from 1 to d (Roy and Vetterli 2007); the mean over groups.

        0 of a zero matrix; of a sketch, an upper bound.
        """
        return math.fsum(_effective_rank(values) for values in self._completed()) / self.groups

    @property
    def whitening_error(self) -> float:
        """‖M/λ̄ − I‖_F/√d with λ̄ = tr M/d: 0 of white features, √(d−1) where all lie on one line.

        Root mean square over groups; 1 of a zero matrix. Of a sketch it is a lower bound.
        """
        return math.sqrt(math.fsum(_whitening_error(values) ** 2 for values in self._completed()) / self.groups)

    def energy(self, directions: int) -> float:
        """Return what part of tr M the leading directions of each group hold; of a sketch, a lower bound.

        Args:
            directions: How many, of each group.

        Returns:
            Between 0 and 1; 0 of a zero matrix.
        """
        total = math.fsum(self.traces)
        held = math.fsum(math.fsum(values[: max(directions, 0)]) for values in self._completed())
        return min(held / total, 1.0) if total > 0 else 0.0

    def directions(self, share: float) -> int:
        """Return how many leading directions of each group hold a share of tr M; of a sketch, an upper bound.

        Args:
            share: Between 0 and 1.

        Returns:
            At most d.

        Raises:
            ValueError: If the share is not between 0 and 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must be between 0 and 1, got {share!r}")
        wanted = share * math.fsum(self.traces)
        held = 0.0
        for count, column in enumerate(zip(*self._completed(), strict=True)):
            # As far as sums of so many numbers can be told apart.
            if held >= wanted * (1 - 1e-12):
                return count
            held += math.fsum(column)
        return self.width

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dictionaries, lists and numbers, for JSON; an infinite condition number is None."""
        return {
            "groups": self.groups,
            "width": self.width,
            "rows": self.rows,
            "exact": self.exact,
            "missing": self.missing,
            "condition": self.condition if math.isfinite(self.condition) else None,
            "effective_rank": self.effective_rank,
            "whitening_error": self.whitening_error,
            "traces": list(self.traces),
            "eigenvalues": [list(values) for values in self.eigenvalues],
        }

    def relative(self) -> tuple[float, ...]:
        """Return λᵢ/λ₁, the mean over groups, of the eigenvalues that are known."""
        leading = [max(values[0], 0.0) or 1.0 for values in self.eigenvalues]
        return tuple(
            math.fsum(value / most for value, most in zip(column, leading, strict=True)) / self.groups
            for column in zip(*self.eigenvalues, strict=True)
        )

    def _missing(self, group: int) -> float:
        return 0.0 if self.exact else max(self.traces[group] - math.fsum(self.eigenvalues[group]), 0.0)

    def _completed(self) -> Iterator[Sequence[float]]:
        """Yield every group's d eigenvalues; of a sketch the flattest that they can be.

        What is missing is spread evenly over the other directions. The true eigenvalues majorize these, as sums of the
        leading ones are at least as large: hence what is more uneven in them is bounded from below.
        """
        for group, values in enumerate(self.eigenvalues):
            if len(values) == self.width:
                yield values
                continue
            known = len(values)
            rest = self._missing(group)
            # As eigenvalues descend, those below the others' mean are taken among these.
            while known and values[known - 1] * (self.width - known) < rest:
                known -= 1
                rest += values[known]
            yield (*values[:known], *([rest / (self.width - known)] * (self.width - known)))

    def _condition(self, group: int, damping: float) -> float:
        values = self.eigenvalues[group]
        others = self.width - len(values)
        # λ_d is at most the mean of the smallest eigenvalues, which together are at most what is missing.
        smallest = self._missing(group) / others if others else values[-1]
        if smallest <= self.resolution * values[0]:
            smallest = 0.0
        below = smallest + damping * values[0]
        return (1 + damping) * values[0] / below if below > 0 else math.inf


@dataclass(frozen=True)
class LayerSpectrum:
    """The spectra of one layer.

    Attributes:
        input: Of the rows that its weight multiplies: patches under the kernel for convolutions.
        output: Of what it returns, a row for each sample and position; figure 5.1's A.
    """

    input: Spectrum
    output: Spectrum

    def of(self, side: Side) -> Spectrum:
        """Return one of the two by its name."""
        return self.input if side == "input" else self.output


@dataclass(frozen=True, repr=False)
class FeatureSpectrum:
    """The result of `feature_spectrum`; printed, it is a table.

    Attributes:
        centred: Whether the spectra are of covariances, or of raw second moments E[x xᵀ].
        training: Whether the model was in training mode.
        batches: Of the loader.
        max_dim: Matrices up to this order are exact.
        layers: By the layer's qualified name, in the model's order; by its weight's where a layer has several.
    """

    centred: bool
    training: bool
    batches: int
    max_dim: int
    layers: Mapping[str, LayerSpectrum]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dictionaries, lists, strings and numbers, for JSON."""
        layers = {
            name: {"input": layer.input.to_dict(), "output": layer.output.to_dict()}
            for name, layer in self.layers.items()
        }
        return {
            "centred": self.centred,
            "training": self.training,
            "batches": self.batches,
            "max_dim": self.max_dim,
            "layers": layers,
        }

    def plot(
        self,
        ax: Axes | None = None,
        *,
        quantity: SpectrumQuantity = "eigenvalues",
        side: Side = "output",
        layers: Sequence[str] | None = None,
        label: str | None = None,
    ) -> Axes:
        """Plot the eigenvalues relative to the largest, as figure 5.1 does, or a number for each layer.

        Two states of a model are drawn over each other with
        ``after.plot(before.plot(label="before"), label="after")``.

        Args:
            ax: Where to; a new figure by default.
            quantity: ``"eigenvalues"``, ``"condition"``, ``"effective_rank"`` (as a part of d) or
                ``"whitening_error"``. Infinite condition numbers have no point, nor have eigenvalues that are zero.
            side: ``"input"`` or ``"output"``.
            layers: Which, by name; by default all, or six evenly spread ones for eigenvalues.
            label: For the legend.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If there is no such quantity, side or layer.
        """
        check_choice("quantity", quantity, ("eigenvalues", "condition", "effective_rank", "whitening_error"))
        check_choice("side", side, _SIDES)
        names = list(self.layers)
        for name in layers or ():
            check_choice("layers", name, names)
        if quantity == "eigenvalues":
            chosen = _spread(names, _LINES) if layers is None else list(dict.fromkeys(layers))
            return self._plot_eigenvalues(axes_for(ax, "FeatureSpectrum.plot"), side, chosen, label)
        chosen = names if layers is None else list(dict.fromkeys(layers))
        ax = axes_for(ax, "FeatureSpectrum.plot", (max(6.0, 0.25 * len(chosen)), 4.0))
        own = [self.layers[name].of(side) for name in chosen]
        if quantity == "condition":
            values = [spectrum.condition for spectrum in own]
            ax.set_yscale("log")
        elif quantity == "effective_rank":
            values = [spectrum.effective_rank / spectrum.width for spectrum in own]
        else:
            values = [spectrum.whitening_error for spectrum in own]
        points = [(place, value) for place, value in enumerate(values) if math.isfinite(value)]
        ax.plot([place for place, _ in points], [value for _, value in points], "o-", label=label or side)
        ax.set_xlim(-0.5, len(chosen) - 0.5)
        ax.set_xticks(range(len(chosen)), [name or "(model)" for name in chosen], rotation=90, fontsize="small")
        titles = {"condition": "condition number", "effective_rank": "effective rank / d"}
        ax.set_ylabel(titles.get(quantity, "whitening error"))
        ax.legend()
        return ax

    def _plot_eigenvalues(self, ax: Axes, side: Side, chosen: Sequence[str], label: str | None) -> Axes:
        for name in chosen:
            spectrum = self.layers[name].of(side)
            values = spectrum.relative()
            shown = [(i, value) for i, value in enumerate(values, start=1) if value > spectrum.resolution]
            said = (
                f"{label + ': ' if label else ''}{name or '(model)'}, d = {spectrum.width}"
                f"{'' if spectrum.exact else f' (the first {len(values)}, sketched)'}"
            )
            ax.plot([i / spectrum.width for i, _ in shown], [value for _, value in shown], marker=".", label=said)
        ax.set_yscale("log")
        ax.set_xlabel(f"direction of the {side}, as a part of d")
        ax.set_ylabel("λᵢ / λ₁")
        ax.legend(fontsize="small")
        return ax

    def __str__(self) -> str:
        header = ["layer"]
        for side in _SIDES:
            header += [f"{side}'s d", "rank", "condition", "error"]
        rows = [[name or "(model)", *_cells(layer.input), *_cells(layer.output)] for name, layer in self.layers.items()]
        batches = f"{self.batches} {'batch' if self.batches == 1 else 'batches'}"
        mode = "training" if self.training else "evaluation"
        of = "covariances" if self.centred else "second moments"
        title = (
            f"Eigenvalues of feature {of}, over {batches} in {mode} mode (effective rank, condition, whitening error)"
        )
        written = table(title, header, rows)
        if any(not layer.of(side).exact for layer in self.layers.values() for side in _SIDES):
            written += f"\n~ sketched, as d is more than max_dim={self.max_dim}: bounds; see Spectrum"
        return written

    __repr__ = __str__


def _effective_rank(values: Sequence[float]) -> float:
    total = math.fsum(values)
    if total <= 0:
        return 0.0
    shares = [value / total for value in values if value > 0]
    return math.exp(-math.fsum(share * math.log(share) for share in shares if share > 0))


def _whitening_error(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    if mean <= 0:
        return 1.0
    return math.sqrt(math.fsum((value / mean - 1) ** 2 for value in values) / len(values))


def _cells(spectrum: Spectrum) -> list[str]:
    about = "" if spectrum.exact else "~"
    condition = f"{spectrum.condition:.3g}" if math.isfinite(spectrum.condition) else "∞"
    return [
        f"{f'{spectrum.groups} × ' if spectrum.groups > 1 else ''}{spectrum.width}",
        f"{about}{spectrum.effective_rank:.3g}",
        condition if spectrum.exact or math.isinf(spectrum.condition) else f"≥ {condition}",
        f"{about}{spectrum.whitening_error:.3g}",
    ]


def _spread(names: Sequence[str], most: int) -> list[str]:
    """Choose names at even distances, the first and the last among them."""
    if len(names) <= most:
        return list(names)
    return [names[round(place * (len(names) - 1) / (most - 1))] for place in range(most)]
