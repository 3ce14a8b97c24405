"""What is asked of a comparison beside the final score: a target, shares of the time, sweeps, losses as the score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from wellcond.lab.comparison.compare import Comparison, compared, run_comparison
from wellcond.lab.comparison.summary import read_summary
from wellcond.lab.comparison.summing_up import summarize
from wellcond.lab.errors import LabError
from wellcond.lab.plan import Plan, make_plan
from wellcond.lab.report.charts import timed
from wellcond.lab.report.findings import describe_comparison, notes
from wellcond.lab.report.formats import point_text
from wellcond.lab.report.results import collect_results, results_json, write_results
from wellcond.lab.report.tables import quoted_table, tables, target_table, training_table
from wellcond.lab.runs.metric import Metric
from wellcond.lab.runs.records import EpochRecord, RunRecord, RunSpec, RunStore
from wellcond.lab.runs.settings import Settings
from wellcond.lab.training.progress import RunProgress

BITS = Metric("bits per character", unit="bits", higher_is_better=False, worst=8.0)
SMALL = Settings(methods=("SGDM", "W-SGDM"), seeds=3, epochs=4, train_images=320)


class Measured:
    """A task whose images are read, but whose metric is another."""

    def __init__(self, task, metric: Metric) -> None:
        self._task, self.metric, self.chance = task, metric, metric.end

    def __getattr__(self, name: str):
        return getattr(self._task, name)


def record(spec: RunSpec, scores: list[float], cost: float = 0.01) -> RunRecord:
    """Return a run with these scores after its epochs."""
    per_epoch = spec.steps // len(scores)
    epochs = tuple(
        EpochRecord(step, cost * step, 0.5, score, None, score, None, train_score=score + 0.5)
        for score, step in zip(scores, range(per_epoch, spec.steps + 1, per_epoch), strict=True)
    )
    return RunRecord(epochs, diverged=False, threads=1, transforms={}, warnings=())


def plan_of(metric: Metric | None = None, **changes) -> Plan:
    plan = make_plan(replace(SMALL, **changes))
    # The digits' own target is of accuracies.
    return plan if metric is None else replace(plan, task=Measured(plan.task, metric), target=changes.get("target"))


def comparison(plan: Plan, curves: dict[str, list[float]], drift: float = 0.1) -> Comparison:
    """Return a comparison in which each method has a curve, a little other for each seed and worse at other lrs."""
    sign = plan.task.metric.sign
    records = {
        spec: record(
            spec,
            [
                score + drift * spec.seed - sign * drift * (trial.lr != plan.trials[name][1].lr)
                for score in curves[name]
            ],
        )
        for name, grid in plan.trials.items()
        for trial in grid
        for spec in plan.table[trial]
    }
    return compared(plan, records)


def test_less_is_better_from_the_choice_to_the_last_table(tmp_path: Path) -> None:
    plan = plan_of(BITS, target=1.5)
    made = comparison(plan, {"SGDM": [3.0, 2.0, 1.8, 1.7], "W-SGDM": [2.5, 1.6, 1.45, 1.4]}, drift=0.01)
    assert {name: found.chosen.lr for name, found in made.methods.items()} == {"SGDM": 0.1, "W-SGDM": 0.1}
    summary = summarize(made)
    baseline, whitened = summary.methods
    assert (baseline.epochs_to_target, whitened.epochs_to_target) == (None, 3.0)
    assert whitened.final_difference.mean == pytest.approx(-0.3)
    assert describe_comparison(summary)[1] == (
        "After 4 epochs W-SGDM is 0.300 bits better than SGDM (95 % interval 0.300 to 0.300)."
    )
    difference = next(table for table in tables(summary) if table.title == "Against the baseline")
    assert difference.rows[1].cells[1].kind == "up"
    assert "lower is better" in difference.caption
    assert difference.rows[1].cells[1].text == "-0.300 [-0.300, -0.300]"
    results = collect_results(made, summary, "a command")
    files = write_results(results, made.records, tmp_path)
    page = files[0].read_text()
    assert "Bits per character" in page
    assert "points" not in page
    assert "epochs to 1.5 bits" in page
    assert "W-SGDM, 1.410 bits at 4" in page
    assert '"higher_is_better": false' in results_json(results)


def test_worse_is_said_of_a_higher_loss() -> None:
    made = comparison(plan_of(BITS), {"SGDM": [3.0, 2.0, 1.8, 1.7], "W-SGDM": [3.5, 2.6, 2.45, 2.4]}, drift=0.01)
    summary = summarize(made)
    assert "W-SGDM is 0.700 bits worse than SGDM" in describe_comparison(summary)[1]
    # Nothing is known of the data beforehand: two digits of what the baseline reaches.
    assert summary.target == pytest.approx(1.8)
    assert summary.methods[0].reached_target == 3


@pytest.mark.parametrize(("level", "target"), [(1.71, 1.8), (0.0123, 0.013), (250.0, 250.0), (-3.14, -3.1), (0.0, 0.0)])
def test_the_target_of_unknown_data_is_what_the_baseline_reaches(level: float, target: float) -> None:
    made = comparison(plan_of(BITS), {"SGDM": [9.0, 9.0, 9.0, level], "W-SGDM": [9.0] * 4}, drift=0.0)
    summary = summarize(made)
    assert summary.target == pytest.approx(target)
    assert summary.methods[0].reached_target == 3


def test_a_mean_is_beyond_a_target_only_by_more_than_chance() -> None:
    plan = plan_of(mode="target", target=90.0)
    made = comparison(plan, {"SGDM": [80.0, 89.95, 91.0, 91.0], "W-SGDM": [89.0, 92.0, 92.0, 92.0]})
    summary = summarize(made)
    baseline, whitened = summary.methods
    # In epoch 2 SGDM's seeds are 89.95, 90.05 and 90.15: a mean of 90.05 that chance explains.
    assert baseline.epochs_to_target == pytest.approx((3 + 2 + 2) / 3, abs=1e-4)
    assert (baseline.to_target.epoch, whitened.to_target.epoch) == (3, 2)
    assert (whitened.to_target.steps, whitened.to_target.seconds) == (20, pytest.approx(0.2))
    assert whitened.to_target.p_value < 0.01
    said = describe_comparison(summary)[0]
    assert said.startswith("Beyond 90 % with p < 0.01: W-SGDM after 20 steps in 0.2 s")
    row = dict(zip(target_table(summary).heads[1:], target_table(summary).rows[1].cells, strict=True))
    assert (row["steps"].text, row["x baseline's seconds"].text) == ("20", "x 0.67")
    assert target_table(summary) in tables(summary)


def test_one_seed_cannot_show_a_target() -> None:
    plan = plan_of(mode="target", target=90.0, seeds=1)
    summary = summarize(comparison(plan, {"SGDM": [80.0, 89.0, 91.0, 91.0], "W-SGDM": [95.0] * 4}))
    assert describe_comparison(summary)[0].startswith("One seed cannot show that a mean is beyond 90 %")
    assert summary.methods[1].to_target.epoch is None


def test_the_mode_decides_which_trial_is_chosen() -> None:
    curves = {"SGDM": [80.0, 89.0, 91.0, 91.0], "W-SGDM": [95.0] * 4}

    def chosen(**changes) -> float:
        plan = plan_of(target=90.0, **changes)
        slow, quick, _ = plan.trials["SGDM"]
        records = comparison(plan, curves).records
        records |= {spec: record(spec, [91.0, 91.0, 91.0, 91.0]) for spec in plan.table[quick]}
        records |= {spec: record(spec, [20.0, 30.0, 40.0, 99.0]) for spec in plan.table[slow]}
        return compared(plan, records).methods["SGDM"].chosen.lr

    assert (chosen(), chosen(mode="target")) == (0.03, 0.1)


def run_all(plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Comparison, list[RunSpec]]:
    """Run a comparison in which a step of W-SGDM takes twice as long, and return it with what was run."""
    asked: list[RunSpec] = []

    def execute(plan, specs, store):
        for spec in specs:
            asked.append(spec)
            cost = 0.02 if spec.method.name == "W-SGDM" else 0.01
            epochs = -(-spec.steps // spec.steps_per_epoch)
            cost *= spec.batch_size / plan.template.batch_size
            yield spec, record(spec, [90.0 + spec.steps / 100] * epochs, cost)

    monkeypatch.setattr("wellcond.lab.comparison.compare.execute", execute)
    return run_comparison(plan, RunStore(folder), RunProgress(Console(), quiet=True)), asked


def test_methods_train_in_shares_of_the_baselines_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(time_shares=(0.5, 0.75, 1.0))
    made, asked = run_all(plan, tmp_path, monkeypatch)
    steps = {name: {share: found.steps for share, found in each.timed.items()} for name, each in made.methods.items()}
    assert steps == {"SGDM": {0.5: 20, 0.75: 30}, "W-SGDM": {0.5: 10, 0.75: 15, 1.0: 20}}
    # Each with a schedule of its own, and what two shares have in common only once.
    assert len(asked) == len(set(asked)) == 2 * 3 * 3 + 5 * 3
    summary = summarize(made)
    baseline, whitened = summary.methods
    assert [shorter.share for shorter in whitened.shares] == [0.5, 0.75]
    assert whitened.equal_time.steps == 20
    half = whitened.shares[0]
    assert (half.difference.mean, half.same_time.mean) == (pytest.approx(-0.3), pytest.approx(-0.1))
    assert baseline.shares[0].same_time is None
    assert [table.title for table in tables(summary)][2:4] == [
        "In 50 % of the baseline's time",
        "In 75 % of the baseline's time",
    ]
    assert any(
        line.startswith("In 50 % of the time W-SGDM is 0.3 points below SGDM's full run")
        for line in describe_comparison(summary)
    )
    (chart,) = timed(summary)
    assert [series.x for series in chart.series] == [(0.5, 0.75, 1.0)] * 2
    assert read_summary({**summary_content(made), "format": 2}) == summary


def summary_content(made: Comparison) -> dict:
    import json

    return json.loads(results_json(collect_results(made, summarize(made), "")))


def test_swept_options_reach_the_runs_and_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(sweeps=(("damping", (0.01, 0.1)),), lrs=(("SGD", (0.1, 0.3)),))
    made, asked = run_all(plan, tmp_path, monkeypatch)
    full = [spec for spec in asked if spec.steps == plan.steps]
    assert len(full) == 2 * 4 * 3
    dampings = {dict(spec.method.transforms[0].options).get("damping") for spec in full if spec.method.transforms}
    assert dampings == {0.01, 0.1}
    summary = summarize(made)
    plain, whitened = summary.methods
    assert [point.lr for point in plain.lr_grid] == pytest.approx([0.1, 0.144225, 0.208008, 0.3])
    assert [point_text(point) for point in whitened.lr_grid][:2] == ["lr 0.1, damping 0.01", "lr 0.3, damping 0.01"]
    assert whitened.swept.keys() == whitened.edges.keys() == {"damping"}
    said = notes(summary)
    assert any(line.startswith("The chosen damping is the lowest of its grid for W-SGDM") for line in said)
    assert any(line.startswith("damping was not swept for SGDM") for line in said)
    assert "damping=0.01" in whitened.recipe
    assert read_summary(summary_content(made)).methods[1].swept == {"damping": 0.01}


def test_batches_of_another_size_have_as_many_epochs_and_count_by_the_chosen_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(sweeps=(("batch_size", (16, 32)),), lrs=(("SGD", (0.1,)),), seeds=2)
    specs = {(spec.method.name, spec.batch_size): spec for row in plan.table.values() for spec in row}
    assert {key: spec.steps for key, spec in specs.items()} == {
        ("SGDM", 16): 80,
        ("SGDM", 32): 40,
        ("W-SGDM", 16): 80,
        ("W-SGDM", 32): 40,
    }
    made, _ = run_all(plan, tmp_path, monkeypatch)
    whitened = made.methods["W-SGDM"]
    assert dict(whitened.chosen.swept) == {"batch_size": 16}
    assert whitened.time_ratio == pytest.approx(2.0)
    assert whitened.timed[1.0].steps == 40
    assert made.plan.row(whitened.chosen, 40)[0].batch_size == 16


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sweeps": (("dampign", (0.1, 1)),)}, "unknown option to sweep 'dampign': did you mean 'damping'?"),
        ({"sweeps": (("damping", (-1.0, 1)),)}, "method W-SGDM: damping must be"),
        (
            {"sweeps": (("batch_size", (16, 10_000)),)},
            "--sweep batch_size must be at most the number of training images",
        ),
        ({"sweeps": (("batch_size", (0.5, 16)),)}, "--sweep batch_size must be whole numbers of at least 2"),
        ({"sweeps": (("ghost_batch", (2, 64)),)}, "--sweep: ghost_batch must be at most batch_size (32), got 64"),
    ],
)
def test_mistakes_in_sweeps_show_before_any_run(changes, line) -> None:
    with pytest.raises(LabError) as told:
        plan_of(**changes)
    assert str(told.value).startswith(line)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"mode": "targt"}, "unknown mode 'targt': did you mean 'target'? Known: final, target"),
        ({"search": "grit"}, "unknown search 'grit': did you mean 'grid'? Known: grid, random"),
        ({"time_shares": (0.5, 1.5)}, "--time-fractions must be above 0 and at most 1, got 0.5,1.5"),
        ({"time_shares": (0.5, 0.5)}, "--time-fractions must name each fraction once, got 0.5,0.5"),
        ({"trials": 4}, "--trials is for --search random; a grid has all combinations"),
    ],
)
def test_mistakes_in_modes(changes, line) -> None:
    with pytest.raises(LabError) as told:
        Settings(**changes)
    assert str(told.value) == line


def test_training_scores_are_shown_where_there_are_any(tmp_path: Path) -> None:
    made = comparison(plan_of(), {"SGDM": [80.0, 89.0, 91.0, 91.0], "W-SGDM": [95.0] * 4})
    summary = summarize(made)
    heads = training_table(summary).heads
    assert "training accuracy in %" in heads
    assert training_table(summary).rows[0].cells[heads.index("training accuracy in %") - 1].text == "91.6"
    page = write_results(collect_results(made, summary, ""), made.records, tmp_path)[0].read_text()
    assert "training accuracy over epochs</figcaption>" in page
    assert "train_score" in (tmp_path / "epochs.csv").read_text().splitlines()[0]
    without = replace(
        summary,
        methods=tuple(
            replace(method, curves=tuple(replace(curve, train_score=(None,) * 4) for curve in method.curves))
            for method in summary.methods
        ),
    )
    assert "training accuracy in %" not in training_table(without).heads


def test_a_quoted_table_is_markdown() -> None:
    summary = summarize(comparison(plan_of(), {"SGDM": [80.0, 89.0, 91.0, 91.0], "W-SGDM": [95.0] * 4}))
    lines = quoted_table(summary).to_markdown().splitlines()
    assert lines[0] == "| method | epoch 2 | epoch 4 | difference, epoch 2 | difference, epoch 4 | time/step |"
    assert lines[1] == "| --- | --- | --- | --- | --- | --- |"
    assert lines[3].startswith("| W-SGDM | 95.1 ± 0.1 | 95.1 ± 0.1 | +6.0 [")
