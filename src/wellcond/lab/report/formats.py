"""How numbers are written, the same in the terminal and in the report."""

from __future__ import annotations

from wellcond.lab.comparison.statistics import Difference, Spread
from wellcond.lab.comparison.summary import MethodSummary, Summary

NOTHING = "–"


def score_text(score: str) -> str:
    """Return what a score is called at the head of a table, with its unit.

    >>> score_text("accuracy"), score_text("mAP")
    ('accuracy in %', 'mAP')
    """
    return "accuracy in %" if score == "accuracy" else score


def spread_text(spread: Spread) -> str:
    """Return a mean with its standard deviation, if it has one.

    >>> spread_text(Spread(90.66, 3.98, 5)), spread_text(Spread(90.66, None, 1))
    ('90.7 ± 4.0', '90.7')
    """
    return f"{spread.mean:.1f}" if spread.std is None else f"{spread.mean:.1f} ± {spread.std:.1f}"


def difference_text(difference: Difference | None) -> str:
    """Return a signed difference with its interval, if it has one.

    >>> difference_text(Difference(7.41, 5.93, 8.89, 5)), difference_text(None)
    ('+7.4 [+5.9, +8.9]', '–')
    """
    if difference is None:
        return NOTHING
    if difference.low is None or difference.high is None:
        return _signed(difference.mean)
    return f"{_signed(difference.mean)} [{difference.low:+.1f}, {difference.high:+.1f}]"


def share_text(share: Spread) -> str:
    """Return a mean share with its standard deviation, if it has one; to three digits, since shares move slowly.

    >>> share_text(Spread(0.4063, 0.0217, 3)), share_text(Spread(0.4063, None, 1))
    ('0.406 ± 0.022', '0.406')
    """
    return f"{share.mean:.3f}" if share.std is None else f"{share.mean:.3f} ± {share.std:.3f}"


def _signed(points: float) -> str:
    # Rounded first: a mean of -0.04 would be written as -0.0. The interval's ends keep their sign: it decides.
    return f"{round(points, 1) + 0.0:+.1f}"


def lr_text(method: MethodSummary) -> str:
    """Return the chosen lr, marked with a star where it is at the edge of its grid."""
    return f"{method.lr:g}{'*' if method.lr_edge else ''}"


def target_text(method: MethodSummary, summary: Summary) -> str:
    """Return the mean epochs to the target, and how many seeds reached it if not all did."""
    if method.epochs_to_target is None:
        return "never"
    share = "" if method.reached_target == summary.seeds else f" ({method.reached_target} of {summary.seeds})"
    return f"{method.epochs_to_target:.1f}{share}"


def time_text(method: MethodSummary) -> str:
    """Return a baseline's milliseconds per step, or another method's ratio to its baseline's."""
    if method.is_baseline and method.milliseconds_per_step is not None:
        return f"{method.milliseconds_per_step:.2f} ms"
    return NOTHING if method.time_ratio is None or method.is_baseline else f"x {method.time_ratio:.2f}"


def evaluation_text(method: MethodSummary) -> str:
    """Return the time to evaluate an image as a ratio to the baseline's, where that is another network."""
    return NOTHING if method.evaluation_ratio is None else f"x {method.evaluation_ratio:.2f}"


def epoch_text(method: MethodSummary) -> str:
    """Return the seconds of an epoch's steps, to three digits."""
    seconds = method.seconds_per_epoch
    if seconds is None:
        return NOTHING
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def memory_text(method: MethodSummary) -> str:
    """Return the peak memory of a step, and but for a baseline its ratio to the baseline's."""
    if method.memory is None:
        return NOTHING
    peak = bytes_text(method.memory.peak)
    return peak if method.is_baseline or method.memory_ratio is None else f"{peak}, x {method.memory_ratio:.2f}"


def memory_ratio_text(method: MethodSummary) -> str:
    """Return a baseline's peak memory, or another method's ratio to its baseline's."""
    if method.is_baseline and method.memory is not None:
        return bytes_text(method.memory.peak)
    return NOTHING if method.memory_ratio is None or method.is_baseline else f"x {method.memory_ratio:.2f}"


def state_text(method: MethodSummary) -> str:
    """Return the size of the optimizer's state, that of the transforms included, and its ratio to the parameters."""
    if method.memory is None:
        return NOTHING
    ratio = method.memory.optimizer_state / method.memory.parameters
    return f"{bytes_text(method.memory.optimizer_state)}, x {ratio:.2f}"


def bytes_text(count: int) -> str:
    """Return a number of bytes for people.

    >>> bytes_text(512), bytes_text(2_500), bytes_text(134_087_000), bytes_text(12_000_000_000)
    ('512 B', '2.5 kB', '134.1 MB', '12.0 GB')
    """
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
