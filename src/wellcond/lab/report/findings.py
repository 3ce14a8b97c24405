"""The comparison in plain sentences, made from its numbers alone: gains and losses are said in the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from wellcond.lab.comparison.statistics import Difference
from wellcond.lab.comparison.summary import LEVEL, MethodSummary, Summary, ToTarget
from wellcond.lab.report.formats import (
    number_text,
    one,
    points_text,
    probability_text,
    score_digits,
    score_text,
    seconds_text,
    share_text,
    target_score,
)
from wellcond.lab.report.shares import method_shares

Pick = Callable[[MethodSummary], Difference | None]
Compared = list[tuple[MethodSummary, Difference]]


def describe_comparison(summary: Summary) -> list[str]:
    """Return what the numbers say: early, at the end, at equal wall time and in evaluation, each against the baselines.

    Args:
        summary: The comparison in numbers.

    Returns:
        A few findings for each baseline; one that says so if there is nothing to compare; and what layers learned.
    """
    if all(len(methods) == 1 for methods in summary.families().values()):
        said = ["Only baselines were run, so there is nothing to compare them with."]
        return said + _learned(summary)
    said = []
    if summary.early_epoch is not None:
        said += _at_epoch(summary, summary.early_epoch, lambda method: method.early_difference)
    said += _at_epoch(summary, summary.epochs, lambda method: method.final_difference)
    if summary.mode == "target":
        said = _to_target(summary) + said
    said += _at_equal_time(summary) + _at_shares(summary)
    return said + _in_memory(summary) + _in_evaluation(summary) + _learned(summary)


def _chosen_on_test(summary: Summary) -> list[str]:
    if summary.chosen_on != "test" or all(len(method.lr_grid) == 1 for method in summary.methods):
        return []
    return [
        "The lr was chosen on the test split, because the task has no validation split: every method's score is too "
        "good by as much as the choice gains."
    ]


def notes(summary: Summary) -> list[str]:
    """Return what a reader must know before relying on the numbers."""
    said = [*_chosen_on_test(summary), *_edges(summary)]
    if summary.sweeps:
        said += _fewer_options(summary)
    diverged = [f"{method.name} ({method.diverged_runs})" for method in summary.methods if method.diverged_runs]
    if diverged:
        said.append(
            f"Runs that ended early with a NaN or infinite loss: {_join(diverged)}. From there on they count as "
            f"{_worst(summary)}, and an lr where one diverged is chosen last."
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


def _edges(summary: Summary) -> list[str]:
    """Return what was chosen at the end of its grid, beyond which something better may lie."""
    said = []
    for option in ("lr", *summary.sweeps):
        for edge in ("lowest", "highest"):
            names = [
                method.name
                for method in summary.methods
                if (method.lr_edge if option == "lr" else method.edges.get(option)) == edge
            ]
            if names:
                said.append(
                    f"The chosen {option} is the {edge} of its grid for {_join(names)}: a better one may lie beyond."
                )
    return said


def _fewer_options(summary: Summary) -> list[str]:
    """Return which methods do not have a swept option, and what they tried in its place."""
    said = []
    for option in summary.sweeps:
        names = [method.name for method in summary.methods if option not in method.swept]
        if names:
            said.append(
                f"{option} was not swept for {_join(names)}, without such an option: there more learning rates were "
                "tried, so that every method had the same number of trials."
            )
    return said


def _worst(summary: Summary) -> str:
    """Return what runs that ended early count as."""
    value = score_text(summary.chance, summary.metric)
    return f"guessing ({value})" if summary.metric.is_percentage else value


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
    return [f"{when} {_said(summary, baseline, compared)}" for baseline, compared in families.items()]


def _to_target(summary: Summary) -> list[str]:
    """Return when each method is beyond the target by more than chance, the quickest first."""
    target = target_score(summary)
    if summary.seeds == 1:
        return [f"One seed cannot show that a mean is beyond {target}: run with --seeds 3 or more."]
    found = [(method.name, method.to_target) for method in summary.methods if method.to_target is not None]
    reached = sorted((each for each in found if each[1].seconds is not None), key=lambda each: each[1].seconds or 0.0)
    never = [name for name, each in found if each.seconds is None]
    said = [
        f"{name} after {each.steps} steps in {seconds_text(each.seconds)}, p {_probability(each)}"
        for name, each in reached
    ]
    lines = [f"Beyond {target} with p < {LEVEL:g}: {'; '.join(said)}."] if said else []
    return lines + ([f"Not beyond {target} with p < {LEVEL:g} in any epoch: {_join(never)}."] if never else [])


def _probability(reached: ToTarget) -> str:
    text = probability_text(reached)
    return text if text.startswith("<") else f"= {text}"


def _at_shares(summary: Summary) -> list[str]:
    """Return the differences in shares of the baseline's time: to its full run, and to it in the same share."""
    lines = []
    for share in dict.fromkeys(shorter.share for method in summary.methods for shorter in method.shares):

        def full(method: MethodSummary, share: float = share) -> Difference | None:
            return next((shorter.difference for shorter in method.shares if shorter.share == share), None)

        def same(method: MethodSummary, share: float = share) -> Difference | None:
            return next((shorter.same_time for shorter in method.shares if shorter.share == share), None)

        for baseline, compared in _families(summary, full).items():
            others = [(method, difference) for method, difference in compared if method.name != baseline]
            if others:
                said = _said(summary, f"{baseline}'s full run", others)
                lines.append(f"In {100 * share:g} % of the time {said}")
        for baseline, compared in _families(summary, same).items():
            lines.append(f"In the same {100 * share:g} % of the time {_said(summary, baseline, compared)}")
    return lines


def _at_equal_time(summary: Summary) -> list[str]:
    families = _families(summary, lambda method: method.equal_time.difference if method.equal_time else None)
    lines = []
    for baseline, compared in families.items():
        ratios = [f"{method.time_ratio:.2f} times ({method.name})" for method, _ in compared if method.time_ratio]
        lines.append(
            f"A step takes {_join(ratios)} as long as {baseline}'s; in equal time {_said(summary, baseline, compared)}"
        )
        rival = f"{baseline}+GC"  # the technique that costs next to nothing: what the others must beat
        against = [
            (method, method.equal_time.others[rival])
            for method, _ in compared
            if method.equal_time is not None and rival in method.equal_time.others
        ]
        if against:
            lines.append(f"In equal time, beside {rival}: {_said(summary, rival, against)}")
    return lines


def _in_memory(summary: Summary) -> list[str]:
    lines = []
    for baseline, methods in summary.families().items():
        ratios = [
            f"{method.memory_ratio:.2f} times ({method.name})"
            for method in methods
            if method.memory_ratio is not None and method.name != baseline
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
            lines.append(f"Evaluating {one(summary.sample)} takes {_join(ratios)} as long as with {baseline}.")
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


def _said(summary: Summary, baseline: str, compared: Compared) -> str:
    """Return the clear differences, largest first, then the methods without one, as the end of a sentence."""
    one_seed = compared[0][1].low is None
    clear = [pair for pair in compared if pair[1].beyond_chance or one_seed]
    unclear = [method.name for method, difference in compared if not (difference.beyond_chance or one_seed)]
    sign = summary.metric.sign
    gained = sorted((pair for pair in clear if sign * pair[1].mean >= 0), key=lambda pair: -abs(pair[1].mean))
    lost = sorted((pair for pair in clear if sign * pair[1].mean < 0), key=lambda pair: -abs(pair[1].mean))
    # Of a score of which less is better, "above" would leave open which it is.
    sides = ("above", "below") if summary.metric.higher_is_better else ("better than", "worse than")
    clauses = [
        _clause(summary, pairs, f"{side} {baseline}")
        for pairs, side in zip((gained, lost), sides, strict=True)
        if pairs
    ]
    if not clauses:
        return f"no method differs from {baseline} by more than chance."
    if unclear:
        verb = "do" if len(unclear) > 1 else "does"
        clauses.append(f"{_join(unclear)} {verb} not differ from it by more than chance")
    return "; ".join(clauses) + "."


def _clause(summary: Summary, pairs: Compared, side: str) -> str:
    digits = score_digits(summary.metric)
    (first, difference), *others = pairs
    amount = f"{number_text(abs(difference.mean), digits)} {points_text(summary.metric)}".rstrip()
    parts = [f"{first.name} is {amount} {side}" + _interval(difference, digits, "95 % interval ")]
    parts += [
        f"{method.name} {number_text(abs(other.mean), digits)}{_interval(other, digits)}" for method, other in others
    ]
    return _join(parts)


def _interval(difference: Difference, digits: int, label: str = "") -> str:
    if difference.low is None or difference.high is None:
        return ""
    sign = 1 if difference.mean >= 0 else -1
    low, high = sorted((sign * difference.low, sign * difference.high))
    return f" ({label}{number_text(low, digits)} to {number_text(high, digits)})"


def _join(parts: Sequence[str], word: str = "and") -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"
