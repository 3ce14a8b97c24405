"""The comparison in plain sentences, made from its numbers alone: gains and losses are said in the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from wellcond.lab.comparison.statistics import Difference
from wellcond.lab.comparison.summary import MethodSummary, Summary
from wellcond.lab.report.formats import share_text
from wellcond.lab.report.shares import method_shares

Pick = Callable[[MethodSummary], Difference | None]
Compared = list[tuple[MethodSummary, Difference]]


def findings(summary: Summary) -> list[str]:
    """Return what the numbers say: early, at the end, at equal wall time and in evaluation, each against the baselines.

    Args:
        summary: The comparison in numbers.

    Returns:
        A few findings for each baseline; one that says so if there is nothing to compare; and what layers learned.
    """
    if all(method.is_baseline for method in summary.methods):
        said = ["Only baselines were run, so there is nothing to compare them with."]
        return said + _learned(summary)
    said = []
    if summary.early_epoch is not None:
        said += _at_epoch(summary, summary.early_epoch, lambda method: method.early_difference)
    said += _at_epoch(summary, summary.epochs, lambda method: method.final_difference)
    return said + _at_equal_time(summary) + _in_memory(summary) + _in_evaluation(summary) + _learned(summary)


def _chosen_on_test(summary: Summary) -> list[str]:
    if summary.chosen_on != "test" or all(len(method.lr_grid) == 1 for method in summary.methods):
        return []
    return [
        "The lr was chosen on the test split, because the task has no validation split: every method's score is too "
        "good by as much as the choice gains."
    ]


def notes(summary: Summary) -> list[str]:
    """Return what a reader must know before relying on the numbers."""
    said = _chosen_on_test(summary)
    for edge in ("lowest", "highest"):
        names = [method.name for method in summary.methods if method.lr_edge == edge]
        if names:
            said.append(f"The chosen lr is the {edge} of its grid for {_join(names)}: a better one may lie beyond.")
    diverged = [f"{method.name} ({method.diverged_runs})" for method in summary.methods if method.diverged_runs]
    if diverged:
        said.append(
            f"Runs that ended early with a NaN or infinite loss: {_join(diverged)}. From there on they count as "
            f"guessing ({summary.chance:.1f} %), and an lr where one diverged is chosen last."
        )
    for method in summary.methods:
        said += [f"{method.name} warned: {warning}" for warning in method.warnings]
    if summary.seeds == 1:
        said.append("One seed: no standard deviation, no interval; a difference may be chance.")
    if summary.ghost_batch is not None:
        said.append(
            f"Batch statistics in training are those of groups of {summary.ghost_batch}, as if each group were on a "
            "device of its own; times are those of one device that does so for all groups."
        )
    if len(summary.machines) > 1:
        said.append(
            f"Runs were executed on {_join(summary.machines)}: times, and what is made of them, mix these machines."
        )
    if summary.jobs > 1:
        said.append(
            f"Times were measured with {summary.jobs} runs at once, which share the machine's memory bandwidth: "
            "run with --jobs 1 for times to rely on."
        )
    return said


def _families(summary: Summary, pick: Pick) -> dict[str, Compared]:
    """Return each baseline's methods that have the difference asked for; baselines without any are left out."""
    families = {
        baseline: [(method, difference) for method in methods if (difference := pick(method)) is not None]
        for baseline, methods in summary.families().items()
    }
    return {baseline: compared for baseline, compared in families.items() if compared}


def _at_epoch(summary: Summary, epoch: int, pick: Pick) -> list[str]:
    when = f"After {epoch} epoch{'s' if epoch > 1 else ''}"
    families = _families(summary, pick)
    if summary.seeds > 1 and not any(d.beyond_chance for compared in families.values() for _, d in compared):
        names = _join(list(families), "or")
        against = f"its baseline, {names}," if len(families) > 1 else names
        return [f"{when} no method differs from {against} by more than chance."] if families else []
    return [f"{when} {_said(baseline, compared)}" for baseline, compared in families.items()]


def _at_equal_time(summary: Summary) -> list[str]:
    families = _families(summary, lambda method: method.equal_time.difference if method.equal_time else None)
    lines = []
    for baseline, compared in families.items():
        ratios = [f"{method.time_ratio:.2f} times ({method.name})" for method, _ in compared if method.time_ratio]
        lines.append(f"A step takes {_join(ratios)} as long as {baseline}'s; in equal time {_said(baseline, compared)}")
        rival = f"{baseline}+GC"  # the technique that costs next to nothing: what the others must beat
        against = [
            (method, method.equal_time.others[rival])
            for method, _ in compared
            if method.equal_time is not None and rival in method.equal_time.others
        ]
        if against:
            lines.append(f"In equal time, beside {rival}: {_said(rival, against)}")
    return lines


def _in_memory(summary: Summary) -> list[str]:
    lines = []
    for baseline, methods in summary.families().items():
        ratios = [
            f"{method.memory_ratio:.2f} times ({method.name})"
            for method in methods
            if method.memory_ratio is not None and not method.is_baseline
        ]
        if ratios:
            lines.append(f"At its peak a step holds {_join(ratios)} as much memory as with {baseline}.")
    return lines


def _in_evaluation(summary: Summary) -> list[str]:
    lines = []
    for baseline, methods in summary.families().items():
        ratios = [
            f"{method.evaluation_ratio:.2f} times ({method.name})"
            for method in methods
            if method.evaluation_ratio is not None
        ]
        if ratios:
            lines.append(f"Evaluating an image takes {_join(ratios)} as long as with {baseline}.")
    return lines


def _learned(summary: Summary) -> list[str]:
    lines = []
    for method in summary.methods:
        shares = method_shares(method)
        if shares is None:
            continue
        layers = f"{len(shares.layers)} layers" if len(shares.layers) > 1 else "its layer"
        said = []
        for part, called in shares.parts.items():
            each = [f"{share_text(shares.average(part, kind))} ({kind.upper()})" for kind in shares.kinds]
            said.append(f"{_join(each)} of the {called}")
        lines.append(f"{method.name} learned these shares, on average over {layers}: {'; '.join(said)}.")
    return lines


def _said(baseline: str, compared: Compared) -> str:
    """Return the clear differences, largest first, then the methods without one, as the end of a sentence."""
    one_seed = compared[0][1].low is None
    clear = [pair for pair in compared if pair[1].beyond_chance or one_seed]
    unclear = [method.name for method, difference in compared if not (difference.beyond_chance or one_seed)]
    above = sorted((pair for pair in clear if pair[1].mean >= 0), key=lambda pair: -pair[1].mean)
    below = sorted((pair for pair in clear if pair[1].mean < 0), key=lambda pair: pair[1].mean)
    clauses = [_clause(pairs, side, baseline) for pairs, side in ((above, "above"), (below, "below")) if pairs]
    if not clauses:
        return f"no method differs from {baseline} by more than chance."
    if unclear:
        verb = "do" if len(unclear) > 1 else "does"
        clauses.append(f"{_join(unclear)} {verb} not differ from it by more than chance")
    return "; ".join(clauses) + "."


def _clause(pairs: Compared, side: str, baseline: str) -> str:
    (first, difference), *others = pairs
    sign = 1 if side == "above" else -1
    leading = f"{first.name} is {abs(difference.mean):.1f} points {side} {baseline}"
    parts = [leading + _interval(difference, sign, "95 % interval ")]
    parts += [f"{method.name} {abs(other.mean):.1f}{_interval(other, sign)}" for method, other in others]
    return _join(parts)


def _interval(difference: Difference, sign: int, label: str = "") -> str:
    if difference.low is None or difference.high is None:
        return ""
    low, high = sorted((sign * difference.low, sign * difference.high))
    return f" ({label}{low:.1f} to {high:.1f})"


def _join(parts: Sequence[str], word: str = "and") -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"
