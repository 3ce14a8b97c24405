"""The tables of a comparison in words, the same ones for the terminal, for pages and for documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from wellcond.lab.comparison.statistics import Difference, Spread
from wellcond.lab.comparison.summary import LEVEL, AtShare, GridPoint, MethodSummary, Summary
from wellcond.lab.report.formats import (
    NOTHING,
    bytes_text,
    difference_text,
    lr_text,
    memory_text,
    number_text,
    one,
    probability_text,
    quantity_text,
    ratio_text,
    score_digits,
    seconds_text,
    share_text,
    spread_text,
    state_text,
    target_score,
    target_text,
    time_text,
)
from wellcond.lab.report.shares import SharesSummary
from wellcond.lab.report.table import Cell, Row, Table

Column: TypeAlias = tuple[str, Callable[[MethodSummary], Cell]]
"""What stands above a column, and its cell for a method."""


def _table(summary: Summary, title: str, caption: str, columns: Sequence[Column]) -> Table:
    rows = tuple(
        Row(method.name, tuple(cell(method) for _, cell in columns), method.is_baseline) for method in summary.methods
    )
    return Table(title, caption, ("method", *(head for head, _ in columns)), rows).without_empty()


def _plain(text: Callable[[MethodSummary], str]) -> Callable[[MethodSummary], Cell]:
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
        self.chosen: Column = ("lr" if not summary.sweeps else "chosen", _plain(lr_text))
        self.target: Column = (
            f"epochs to {target_score(summary)}",
            _plain(lambda method: target_text(method, summary)),
        )
        self.evaluation: Column = (f"time/{summary.sample}", _plain(lambda method: ratio_text(method.evaluation_ratio)))
        self.time: Column = ("time/step", _plain(time_text))
        self.equal_difference: Column = (
            "difference at equal time",
            lambda method: difference_cell(method.equal_time.difference if method.equal_time else None, summary),
        )

    def score(self, epoch: int) -> Column:
        """Return the score after an epoch."""
        return f"epoch {epoch}", lambda method: score_cell(method.scores[epoch], self.summary)

    def difference(self, epoch: int) -> Column:
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

    def last(self, head: str, pick: Callable[[Any], Sequence[float | None]], digits: int) -> Column:
        """Return the mean over the seeds of what an epoch's record holds, after the last epoch that each has."""

        def cell(method: MethodSummary) -> Cell:
            ends = [values[-1] for curve in method.curves if (values := pick(curve))]
            known = [end for end in ends if end is not None]
            return Cell(number_text(sum(known) / len(known), digits) if known else NOTHING)

        return head, cell


def tables(summary: Summary) -> list[Table]:
    """Return the tables that the terminal shows; a page shows these and more."""
    made = [_scores(summary), _differences(summary), *_shares_of_time(summary)]
    if summary.mode == "target":
        made.insert(1, target_table(summary))
    return [*made, _costs(summary)]


def _seeds(summary: Summary, text: str) -> str:
    return text if summary.seeds > 1 else ""


def _scores(summary: Summary) -> Table:
    columns = Columns(summary)
    deviation = f", mean ± standard deviation over {summary.seeds} seeds" if summary.seeds > 1 else ", one seed"
    name = quantity_text(summary.score, summary.metric)
    edge = any(method.lr_edge or method.edges for method in summary.methods)
    star = "; * at the edge of its grid" if edge else ""
    evaluation = (
        f", and the time to evaluate {one(summary.sample)} as a ratio to the baseline's"
        if summary.compares_evaluation
        else ""
    )
    return _table(
        summary,
        f"{summary.score[0].upper()}{summary.score[1:]}",
        f"Test {name} after each epoch{deviation}{star}{evaluation}",
        [
            columns.chosen,
            *(columns.score(epoch) for epoch in summary.shown_epochs),
            columns.target,
            columns.evaluation,
        ],
    )


def _differences(summary: Summary) -> Table:
    columns = Columns(summary)
    of = (
        f"points of test {summary.score}"
        if summary.metric.is_percentage
        else quantity_text(f"test {summary.score}", summary.metric)
    )
    interval = _seeds(summary, ", paired, with its 95 % interval")
    lower = "" if summary.metric.higher_is_better else "; lower is better"
    steps, last = summary.steps, summary.epochs

    def equal_steps(method: MethodSummary) -> Cell:
        return Cell(
            str(method.equal_time.steps) if method.equal_time else str(steps) if method.is_baseline else NOTHING
        )

    def equal_score(method: MethodSummary) -> Cell:
        score = method.equal_time.score if method.equal_time else method.scores[last] if method.is_baseline else None
        return score_cell(score, summary)

    return _table(
        summary,
        "Against the baseline",
        f"Difference to the baseline in {of}{interval}{lower}; and what a step costs, as a ratio to the baseline's",
        [
            *((f"epoch {epoch}", columns.difference(epoch)[1]) for epoch in columns.compared_epochs),
            columns.time,
            ("steps in equal time", equal_steps),
            (f"{summary.score} at equal time", equal_score),
            columns.equal_difference,
        ],
    )


def _shares_of_time(summary: Summary) -> list[Table]:
    shares = dict.fromkeys(shorter.share for method in summary.methods for shorter in method.shares)
    return [_in_share(summary, share) for share in shares]


def _in_share(summary: Summary, share: float) -> Table:
    shown: dict[str, Callable[[AtShare], Cell]] = {
        "steps": lambda shorter: Cell(str(shorter.steps)),
        summary.score: lambda shorter: score_cell(shorter.score, summary),
        "difference to the full run": lambda shorter: difference_cell(shorter.difference, summary),
        "difference in the same time": lambda shorter: difference_cell(shorter.same_time, summary),
    }

    def column(pick: Callable[[AtShare], Cell]) -> Callable[[MethodSummary], Cell]:
        def cell(method: MethodSummary) -> Cell:
            found = [shorter for shorter in method.shares if shorter.share == share]
            return pick(found[0]) if found else Cell(NOTHING)

        return cell

    return _table(
        summary,
        f"In {100 * share:g} % of the baseline's time",
        f"Test {quantity_text(summary.score, summary.metric)} in {100 * share:g} % of the time of the baseline's full "
        "run, each method with a complete schedule of the steps that fit in it",
        [(head, column(pick)) for head, pick in shown.items()],
    )


def target_table(summary: Summary) -> Table:
    """Return when each method's mean over the seeds is beyond the target by more than chance."""
    baselines = {method.name: method for method in summary.methods}

    def reached(text: Callable[[Any], str]) -> Callable[[MethodSummary], Cell]:
        return lambda method: Cell(
            NOTHING if method.to_target is None or method.to_target.epoch is None else text(method.to_target)
        )

    def ratio(method: MethodSummary) -> Cell:
        mine, base = method.to_target, baselines[method.baseline].to_target
        if method.is_baseline or mine is None or base is None or mine.seconds is None or not base.seconds:
            return Cell(NOTHING)
        return Cell(ratio_text(mine.seconds / base.seconds))

    return _table(
        summary,
        f"To {target_score(summary)}",
        f"The first epoch after which the mean test {summary.score} is beyond {target_score(summary)} with "
        f"p < {LEVEL:g} (one-sided t-test over the seeds; a dash: in none, with the p of the last)",
        [
            Columns(summary).target,
            ("epoch", reached(lambda found: str(found.epoch))),
            ("steps", reached(lambda found: str(found.steps))),
            ("seconds", reached(lambda found: seconds_text(found.seconds))),
            ("p", _plain(lambda method: probability_text(method.to_target))),
            ("x baseline's seconds", ratio),
        ],
    )


def _costs(summary: Summary) -> Table:
    return _table(
        summary,
        "What training costs",
        "What training costs: peak memory as a ratio to the baseline's, the optimizer's state to the parameters",
        [
            Columns(summary).time,
            ("time/epoch", _plain(lambda method: seconds_text(method.seconds_per_epoch))),
            ("peak memory", _plain(memory_text)),
            ("optimizer state", _plain(state_text)),
        ],
    )


def training_table(summary: Summary) -> Table:
    """Return the mean losses and scores of training and evaluation after the last epoch."""
    columns, digits = Columns(summary), score_digits(summary.metric)
    score = quantity_text(summary.score, summary.metric)
    return _table(
        summary,
        "Training and evaluation",
        "Means over the seeds after the last epoch; the training score is that of the epoch's batches as they trained",
        [
            columns.last("training loss", lambda curve: curve.train_loss, 4),
            columns.last("test loss", lambda curve: curve.test_loss, 4),
            columns.last(f"training {score}", lambda curve: curve.train_score, digits),
            columns.last(f"validation {score}", lambda curve: curve.validation_score, digits),
            columns.last(f"test {score}", lambda curve: curve.test_score, digits),
        ],
    )


def quoted_table(summary: Summary) -> Table:
    """Return one table with what documents quote of a comparison."""
    columns = Columns(summary)
    epochs = columns.compared_epochs
    made: list[Column] = [
        *(columns.score(epoch) for epoch in epochs),
        *(columns.difference(epoch) for epoch in epochs),
        columns.time,
        columns.equal_difference,
    ]
    if summary.compares_evaluation:
        made += [columns.evaluation, columns.last("training loss", lambda curve: curve.train_loss, 3)]
    return _table(summary, "", "", made)


def grid_tables(summary: Summary) -> list[Table]:
    """Return what each trial scored on validation, and early on the test images."""
    what = "trial" if summary.sweeps else "lr"
    score = quantity_text(summary.score, summary.metric)
    made = [
        _grid(
            summary,
            f"Mean validation {score} after the last epoch. Bold is the chosen {what}",
            lambda point: point.validation_score,
            score_digits(summary.metric) + 1,
        )
    ]
    if summary.early_epoch is not None:
        made.append(
            _grid(
                summary,
                f"Mean test {score} after epoch {summary.early_epoch}: whether an early gain hangs on the choice",
                lambda point: point.early_test_score,
                score_digits(summary.metric),
            )
        )
    return made


def _grid(summary: Summary, caption: str, pick: Callable[[GridPoint], float | None], digits: int) -> Table:
    longest = max(len(method.lr_grid) for method in summary.methods)
    rows = []
    for method in summary.methods:
        cells = []
        for point in method.lr_grid:
            value = pick(point)
            name = point.text if point.swept else f"{point.lr:g}"
            text = f"{name}: {'diverged' if value is None else number_text(value, digits)}"
            cells.append(Cell(text, "chosen" if method.is_chosen(point) else ""))
        cells += [Cell(NOTHING)] * (longest - len(cells))
        rows.append(Row(method.name, tuple(cells), method.is_baseline))
    heads = ("method", *(str(place) for place in range(1, longest + 1)))
    return Table("Learning rates", caption, heads, tuple(rows))


def coverage_tables(method: MethodSummary) -> list[Table]:
    """Return what each transform does with each parameter's gradient and keeps for it."""
    made = []
    for transform, rows in method.coverage.items():
        total = sum(row["state_bytes"] or 0 for row in rows)
        lines = tuple(
            Row(
                row["name"],
                (
                    Cell(" x ".join(map(str, row["shape"]))),
                    Cell(row["how"], "text"),
                    Cell(NOTHING if row["state_bytes"] is None else bytes_text(row["state_bytes"])),
                ),
            )
            for row in rows
        )
        title = f"{method.name}: {transform}, {bytes_text(total)}"
        made.append(Table(title, "", ("parameter", "shape", "what is done", "kept"), lines))
    return made


def shares_table(shares: SharesSummary) -> Table:
    """Return each layer's shares and their average."""
    columns = [(part, kind) for part in shares.parts for kind in shares.kinds]
    rows = [
        Row(f"{index}: {layer}", tuple(Cell(share_text(shares.of_layer(layer, *column))) for column in columns))
        for index, layer in enumerate(shares.layers, start=1)
    ]
    rows.append(Row("average over layers", tuple(Cell(share_text(shares.average(*column))) for column in columns)))
    heads = ("layer", *(f"{kind.upper()}, {shares.parts[part]}" for part, kind in columns))
    return Table("", "", heads, tuple(rows))
