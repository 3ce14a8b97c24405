"""Writes numbers in words, and the cells and columns that hold them: on the terminal, in pages, in quoted tables."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

from wellcond.lab.comparison.statistics import Difference, Spread
from wellcond.lab.comparison.summary import GridPoint, MethodSummary, Summary, ToTarget
from wellcond.lab.report.table import NOTHING, Cell
from wellcond.lab.runs.metric import ACCURACY, Metric
from wellcond.runtime.texts import bytes_text

_LARGE = 1000.0


def quantity_text(name: str, metric: Metric) -> str:
    """Return what a score is called at the head of a table, with its unit.

    >>> quantity_text("accuracy", ACCURACY), quantity_text("loss", Metric("loss", unit=""))
    ('accuracy in %', 'loss')
    >>> quantity_text("bits per character", Metric("bits per character", unit="bits"))
    'bits per character'
    """
    return name if not metric.unit or metric.unit in name else f"{name} in {metric.unit}"


def one(noun: str) -> str:
    """Return a noun with its article.

    >>> one("image"), one("row")
    ('an image', 'a row')
    """
    return f"{'an' if noun[:1].lower() in tuple('aeiou') else 'a'} {noun}"


def number_text(value: float, digits: int) -> str:
    """Return a number with so many digits after the point; three digits in all of a large one.

    >>> number_text(23.71, 2), number_text(1.7e6, 2)
    ('23.71', '1.7e+06')
    """
    return f"{value:.3g}" if abs(value) >= _LARGE else f"{value:.{digits}f}"


def score_digits(metric: Metric) -> int:
    """Return how many digits of a score matter: one of a percentage, three of a loss or of bits per character."""
    return 1 if metric.is_percentage else 3


def score_text(value: float, metric: Metric) -> str:
    """Return a score with its unit.

    >>> score_text(97.123, ACCURACY), score_text(1.2345, Metric("bits per character", unit="bits"))
    ('97.1 %', '1.234 bits')
    """
    return f"{number_text(value, score_digits(metric))} {metric.unit}".rstrip()


def exact_text(value: float, metric: Metric) -> str:
    """Return a single score with its unit, more exactly than a mean is written.

    >>> exact_text(97.123, ACCURACY), exact_text(0.0312345, Metric("loss", unit=""))
    ('97.12 %', '0.03123')
    """
    number = f"{value:.2f}" if metric.is_percentage else f"{value:.4g}"
    return f"{number} {metric.unit}".rstrip()


def points_text(metric: Metric) -> str:
    """Return what differences of a score are counted in."""
    return "points" if metric.is_percentage else metric.unit


def target_score(summary: Summary) -> str:
    """Return the target with its unit, as short as it is given."""
    return f"{summary.target:g} {summary.metric.unit}".rstrip()


def spread_text(spread: Spread, metric: Metric = ACCURACY, digits: int | None = None) -> str:
    """Return a mean with its standard deviation, if it has one.

    Args:
        spread: The mean.
        metric: What it is of.
        digits: After the point; None for those that matter.

    >>> spread_text(Spread(90.66, 3.98, 5)), spread_text(Spread(90.66, None, 1))
    ('90.7 ± 4.0', '90.7')
    >>> spread_text(Spread(76.87, 0.26, 3), digits=2)
    '76.87 ± 0.26'
    """
    digits = score_digits(metric) if digits is None else digits
    mean = number_text(spread.mean, digits)
    if spread.std is None:
        return mean
    return f"{mean} ± {spread.std:.2g}" if abs(spread.mean) >= _LARGE else f"{mean} ± {spread.std:.{digits}f}"


def difference_text(difference: Difference | None, metric: Metric = ACCURACY, digits: int | None = None) -> str:
    """Return a signed difference with its interval, if it has one.

    >>> difference_text(Difference(7.41, 5.93, 8.89, 5)), difference_text(None)
    ('+7.4 [+5.9, +8.9]', '–')
    """
    if difference is None:
        return NOTHING
    digits = score_digits(metric) if digits is None else digits
    mean = signed_text(difference.mean, digits)
    if difference.low is None or difference.high is None:
        return mean
    # The interval's ends keep their sign, also of zero: it decides.
    ends = (f"{end:+.3g}" if abs(end) >= _LARGE else f"{end:+.{digits}f}" for end in (difference.low, difference.high))
    return f"{mean} [{', '.join(ends)}]"


def signed_text(value: float, digits: int) -> str:
    """Return a number with its sign.

    >>> signed_text(-0.04, 1), signed_text(1.954, 2), signed_text(-12345.0, 2)
    ('+0.0', '+1.95', '-1.23e+04')
    """
    # Rounded first: a mean of -0.04 would be written as -0.0.
    return f"{value:+.3g}" if abs(value) >= _LARGE else f"{round(value, digits) + 0.0:+.{digits}f}"


def share_text(share: Spread) -> str:
    """Return a mean share with its standard deviation, if it has one; to three digits, since shares move slowly.

    >>> share_text(Spread(0.4063, 0.0217, 3)), share_text(Spread(0.4063, None, 1))
    ('0.406 ± 0.022', '0.406')
    """
    return spread_text(share, digits=3)


def lr_text(method: MethodSummary) -> str:
    """Return the chosen lr and the other swept options, each marked with a star at the edge of its grid.

    >>> from types import SimpleNamespace as Method
    >>> lr_text(Method(lr=0.1, lr_edge="lowest", swept={"damping": 0.01}, edges={}))
    '0.1*, damping 0.01'
    """
    return chosen_text(method.lr, method.lr_edge, method.swept, method.edges)


def chosen_text(lr: float, lr_edge: str | None, swept: Mapping[str, object], edges: Collection[str]) -> str:
    """Return a trial's lr and swept options, each marked with a star where it is at the edge of its grid."""
    parts = [f"{lr:g}{'*' if lr_edge else ''}"]
    parts += [f"{name} {value}{'*' if name in edges else ''}" for name, value in swept.items()]
    return ", ".join(parts)


def point_text(point: GridPoint) -> str:
    """Return what a trial sets.

    >>> point_text(GridPoint(0.1, None, None, None, 0, swept={"damping": 0.01}))
    'lr 0.1, damping 0.01'
    """
    return ", ".join([f"lr {point.lr:g}", *(f"{name} {value}" for name, value in point.swept.items())])


def target_text(method: MethodSummary, summary: Summary) -> str:
    """Return the mean epochs to the target, and how many seeds reached it if not all did."""
    if method.epochs_to_target is None:
        return "never"
    share = "" if method.reached_target == summary.seeds else f" ({method.reached_target} of {summary.seeds})"
    return f"{method.epochs_to_target:.1f}{share}"


def probability_text(reached: ToTarget | None) -> str:
    """Return how likely a mean beyond the target would be by chance."""
    if reached is None or reached.p_value is None:
        return NOTHING
    return "< 0.001" if reached.p_value < 0.001 else f"{reached.p_value:.3f}"


def time_text(method: MethodSummary) -> str:
    """Return a baseline's milliseconds per step, or another method's ratio to its baseline's."""
    if method.is_baseline and method.milliseconds_per_step is not None:
        return f"{method.milliseconds_per_step:.2f} ms"
    return NOTHING if method.is_baseline else ratio_text(method.time_ratio)


def ratio_text(ratio: float | None) -> str:
    """Return a ratio to a baseline.

    >>> ratio_text(1.204), ratio_text(None)
    ('x 1.20', '–')
    """
    return NOTHING if ratio is None else f"x {ratio:.2f}"


def seconds_text(seconds: float | None) -> str:
    """Return seconds to three digits.

    >>> seconds_text(0.12345), seconds_text(123.45), seconds_text(None)
    ('0.123 s', '123 s', '–')
    """
    if seconds is None:
        return NOTHING
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def memory_text(method: MethodSummary) -> str:
    """Return the peak memory of a step, and but for a baseline its ratio to the baseline's."""
    if method.memory is None:
        return NOTHING
    peak = bytes_text(method.memory.peak)
    return peak if method.is_baseline or method.memory_ratio is None else f"{peak}, x {method.memory_ratio:.2f}"


def state_text(method: MethodSummary) -> str:
    """Return the size of the optimizer's state, that of the transforms included, and its ratio to the parameters."""
    if method.memory is None:
        return NOTHING
    ratio = method.memory.optimizer_state / method.memory.parameters
    return f"{bytes_text(method.memory.optimizer_state)}, x {ratio:.2f}"


SummaryColumn: TypeAlias = tuple[str, Callable[[MethodSummary], Cell]]
"""What stands above a column, and its cell for a method."""


def plain(text: Callable[[MethodSummary], str]) -> Callable[[MethodSummary], Cell]:
    """Return the cells that hold a text of each method."""
    return lambda method: Cell(text(method))


def score_cell(score: Spread | None, summary: Summary) -> Cell:
    """Return a mean score."""
    return Cell(NOTHING if score is None else spread_text(score, summary.metric))


def difference_cell(difference: Difference | None, summary: Summary) -> Cell:
    """Return a difference, coloured where it is beyond chance: by what is better, not by what is more."""
    text = difference_text(difference, summary.metric)
    if difference is None or not difference.beyond_chance:
        return Cell(text)
    return Cell(text, "up" if summary.metric.sign * difference.mean > 0 else "down")


class Columns:
    """The columns that tables of a comparison are put together from.

    Args:
        summary: The comparison in numbers.
    """

    def __init__(self, summary: Summary) -> None:
        self.summary = summary
        self.chosen: SummaryColumn = ("lr" if not summary.sweeps else "chosen", plain(lr_text))
        self.target: SummaryColumn = (
            f"epochs to {target_score(summary)}",
            plain(lambda method: target_text(method, summary)),
        )
        self.evaluation: SummaryColumn = (
            f"time/{summary.sample}",
            plain(lambda method: ratio_text(method.evaluation_ratio)),
        )
        self.time: SummaryColumn = ("time/step", plain(time_text))
        self.equal_difference: SummaryColumn = (
            "difference at equal time",
            lambda method: difference_cell(method.equal_time.difference if method.equal_time else None, summary),
        )

    def score(self, epoch: int) -> SummaryColumn:
        """Return the score after an epoch."""
        return f"epoch {epoch}", lambda method: score_cell(method.scores[epoch], self.summary)

    def difference(self, epoch: int) -> SummaryColumn:
        """Return the difference to the baseline after the early or the last epoch."""

        def cell(method: MethodSummary) -> Cell:
            found = method.final_difference if epoch == self.summary.epochs else method.early_difference
            return difference_cell(found, self.summary)

        return f"difference, epoch {epoch}", cell

    @property
    def compared_epochs(self) -> list[int]:
        """The epochs whose differences are shown."""
        early = self.summary.early_epoch
        return [*([] if early is None else [early]), self.summary.epochs]

    def last(self, head: str, pick: Callable[[Any], Sequence[float | None]], digits: int) -> SummaryColumn:
        """Return the mean over the seeds of what an epoch's record holds, after the last epoch that each has."""

        def cell(method: MethodSummary) -> Cell:
            ends = [values[-1] for curve in method.curves if (values := pick(curve))]
            known = [end for end in ends if end is not None]
            return Cell(number_text(sum(known) / len(known), digits) if known else NOTHING)

        return head, cell
