"""The tables of a comparison in words, the same ones for the terminal, for pages and for documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from wellcond.lab.comparison.summary import LEVEL, AtShare, GridPoint, MethodSummary, Summary
from wellcond.lab.report.formats import (
    Columns,
    SummaryColumn,
    difference_cell,
    memory_text,
    number_text,
    one,
    plain,
    point_text,
    probability_text,
    quantity_text,
    ratio_text,
    score_cell,
    score_digits,
    seconds_text,
    share_text,
    state_text,
    target_score,
)
from wellcond.lab.report.shares import SharesSummary
from wellcond.lab.report.table import NOTHING, Cell, ReportTable, Row
from wellcond.runtime.texts import bytes_text


def _table(summary: Summary, title: str, caption: str, columns: Sequence[SummaryColumn]) -> ReportTable:
    rows = tuple(
        Row(method.name, tuple(cell(method) for _, cell in columns), method.is_baseline) for method in summary.methods
    )
    return ReportTable(title, caption, ("method", *(head for head, _ in columns)), rows).without_empty()


def tables(summary: Summary) -> list[ReportTable]:
    """Return the tables that the terminal shows; a page shows these and more."""
    made = [_scores(summary), _differences(summary), *share_tables(summary)]
    if summary.mode == "target":
        made.insert(1, target_table(summary))
    return [*made, _costs(summary)]


def _seeds(summary: Summary, text: str) -> str:
    return text if summary.seeds > 1 else ""


def _compares_evaluation(summary: Summary) -> bool:
    """Return whether some method evaluates with other layers than its baseline."""
    return any(method.evaluation_ratio is not None for method in summary.methods)


def _scores(summary: Summary) -> ReportTable:
    evaluation = (
        f", and the time to evaluate {one(summary.sample)} as a ratio to the baseline's"
        if _compares_evaluation(summary)
        else ""
    )
    columns = Columns(summary)
    deviation = f", mean ± standard deviation over {summary.seeds} seeds" if summary.seeds > 1 else ", one seed"
    name = quantity_text(summary.score, summary.metric)
    edge = any(method.lr_edge or method.edges for method in summary.methods)
    star = "; * at the edge of its grid" if edge else ""
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


def _differences(summary: Summary) -> ReportTable:
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


def share_tables(summary: Summary) -> list[ReportTable]:
    """Return a table for each fraction of the baseline's time in which methods were trained."""
    shares = dict.fromkeys(shorter.share for method in summary.methods for shorter in method.shares)
    return [_in_share(summary, share) for share in shares]


def _in_share(summary: Summary, share: float) -> ReportTable:
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


def target_table(summary: Summary) -> ReportTable:
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
            ("p", plain(lambda method: probability_text(method.to_target))),
            ("x baseline's seconds", ratio),
        ],
    )


def _costs(summary: Summary) -> ReportTable:
    return _table(
        summary,
        "What training costs",
        "What training costs: peak memory as a ratio to the baseline's, the optimizer's state to the parameters",
        [
            Columns(summary).time,
            ("time/epoch", plain(lambda method: seconds_text(method.seconds_per_epoch))),
            ("peak memory", plain(memory_text)),
            ("optimizer state", plain(state_text)),
        ],
    )


def training_table(summary: Summary) -> ReportTable:
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


def quoted_table(summary: Summary) -> ReportTable:
    """Return one table with what documents quote of a comparison."""
    columns = Columns(summary)
    epochs = columns.compared_epochs
    made: list[SummaryColumn] = [
        *(columns.score(epoch) for epoch in epochs),
        *(columns.difference(epoch) for epoch in epochs),
        columns.time,
        columns.equal_difference,
    ]
    if _compares_evaluation(summary):
        made += [columns.evaluation, columns.last("training loss", lambda curve: curve.train_loss, 3)]
    return _table(summary, "", "", made)


def grid_tables(summary: Summary) -> list[ReportTable]:
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


def _grid(summary: Summary, caption: str, pick: Callable[[GridPoint], float | None], digits: int) -> ReportTable:
    longest = max(len(method.lr_grid) for method in summary.methods)
    rows = []
    for method in summary.methods:
        cells = []
        for point in method.lr_grid:
            value = pick(point)
            name = point_text(point) if point.swept else f"{point.lr:g}"
            text = f"{name}: {'diverged' if value is None else number_text(value, digits)}"
            cells.append(Cell(text, "chosen" if point.chosen else ""))
        cells += [Cell(NOTHING)] * (longest - len(cells))
        rows.append(Row(method.name, tuple(cells), method.is_baseline))
    heads = ("method", *(str(place) for place in range(1, longest + 1)))
    return ReportTable("Learning rates", caption, heads, tuple(rows))


def coverage_tables(method: MethodSummary) -> list[ReportTable]:
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
        made.append(ReportTable(title, "", ("parameter", "shape", "what is done", "kept"), lines))
    return made


def shares_table(shares: SharesSummary) -> ReportTable:
    """Return each layer's shares and their average."""
    columns = [(part, kind) for part in shares.parts for kind in shares.kinds]
    rows = [
        Row(f"{index}: {layer}", tuple(Cell(share_text(shares.of_layer(layer, *column))) for column in columns))
        for index, layer in enumerate(shares.layers, start=1)
    ]
    rows.append(Row("average over layers", tuple(Cell(share_text(shares.average(*column))) for column in columns)))
    heads = ("layer", *(f"{kind.upper()}, {shares.parts[part]}" for part, kind in columns))
    return ReportTable("", "", heads, tuple(rows))
