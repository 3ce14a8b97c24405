"""The sentences say what the numbers say, gains and losses alike."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wellcond.lab.comparison.statistics import Difference, Spread
from wellcond.lab.comparison.summary import Curve, EqualTime, GridPoint, MethodSummary, Summary
from wellcond.lab.report.findings import describe_comparison, notes
from wellcond.lab.report.formats import (
    difference_text,
    lr_text,
    memory_text,
    ratio_text,
    seconds_text,
    spread_text,
    state_text,
    target_text,
    time_text,
)
from wellcond.lab.report.tables import tables
from wellcond.lab.runs.memory import Memory

UNCLEAR = Difference(0.1, -0.5, 0.7, 5)


def method(name: str, baseline: str, early=UNCLEAR, final=UNCLEAR, equal=UNCLEAR, ratio=1.5) -> MethodSummary:
    own = name == baseline
    return MethodSummary(
        name=name,
        description="a method",
        baseline=baseline,
        lr=0.1,
        lr_edge=None,
        lr_grid=(GridPoint(0.1, 98.0, 0.1, 90.0, 0),),
        scores={1: Spread(80.0, 1.0, 5), 2: Spread(90.0, 1.0, 5), 6: Spread(99.0, 0.5, 5)},
        epochs_to_target=2.4,
        reached_target=5,
        early_difference=None if own else early,
        final_difference=None if own else final,
        milliseconds_per_step=3.0,
        time_ratio=1.0 if own else ratio,
        evaluation_ratio=None,
        equal_time=None if own else EqualTime(124, Spread(98.0, 0.5, 5), equal),
        diverged_runs=0,
        warnings=(),
        curves=tuple(Curve(seed, *((1.0, 2.0),) * 6) for seed in range(5)),
    )


def summary(*methods: MethodSummary, **changes) -> Summary:
    whole = Summary(
        score="accuracy",
        seeds=5,
        epochs=6,
        steps=186,
        shown_epochs=(1, 2, 6),
        early_epoch=2,
        target=95.0,
        chance=10.0,
        jobs=1,
        ghost_batch=None,
        methods=methods,
    )
    return replace(whole, **changes)


def test_gains_losses_and_chance_are_said_in_the_same_way():
    early = describe_comparison(
        summary(
            method("SGDM", "SGDM"),
            method("FSGD", "SGDM", early=Difference(7.41, 5.93, 8.89, 5)),
            method("W-SGDM", "SGDM", early=Difference(6.0, 4.0, 8.0, 5)),
            method("SGDM+GC", "SGDM", early=Difference(-2.0, -3.0, -1.0, 5)),
            method("FSGD+GC", "SGDM"),
        )
    )[0]
    assert early == (
        "After 2 epochs FSGD is 7.4 points above SGDM (95 % interval 5.9 to 8.9) and W-SGDM 6.0 (4.0 to 8.0); "
        "SGDM+GC is 2.0 points below SGDM (95 % interval 1.0 to 3.0); "
        "FSGD+GC does not differ from it by more than chance."
    )


def test_families_without_a_difference_share_a_sentence():
    said = describe_comparison(
        summary(method("SGDM", "SGDM"), method("FSGD", "SGDM"), method("AdamW", "AdamW"), method("FAdam", "AdamW"))
    )
    assert said == [
        "After 2 epochs no method differs from its baseline, SGDM or AdamW, by more than chance.",
        "After 6 epochs no method differs from its baseline, SGDM or AdamW, by more than chance.",
        "A step takes 1.50 times (FSGD) as long as SGDM's; in equal time no method differs from SGDM by more than "
        "chance.",
        "A step takes 1.50 times (FAdam) as long as AdamW's; in equal time no method differs from AdamW by more than "
        "chance.",
    ]


def test_one_seed_gives_differences_without_intervals_and_says_so():
    bare = Difference(-0.5, None, None, 1)
    one = summary(method("SGDM", "SGDM"), method("FSGD", "SGDM", bare, bare, bare), seeds=1)
    assert describe_comparison(one)[0] == "After 2 epochs FSGD is 0.5 points below SGDM."
    assert "One seed" in notes(one)[0]


def test_baselines_alone_have_nothing_to_compare():
    assert describe_comparison(summary(method("SGDM", "SGDM"))) == [
        "Only baselines were run, so there is nothing to compare them with."
    ]


def test_notes_say_what_weakens_the_numbers():
    lines = notes(
        summary(
            method("SGDM", "SGDM"),
            replace(method("FSGD", "SGDM"), lr_edge="highest", diverged_runs=2, warnings=("a solve failed",)),
            jobs=2,
        )
    )
    assert lines[0].startswith("The chosen lr is the highest of its grid for FSGD")
    assert lines[1].startswith("Runs that ended early with a NaN or infinite loss: FSGD (2).")
    assert lines[2] == "FSGD warned: a solve failed"
    assert lines[3].startswith("Times were measured with 2 runs at once")
    assert len(lines) == 4
    assert notes(summary(method("SGDM", "SGDM"))) == []
    assert notes(summary(method("SGDM", "SGDM"), ghost_batch=2)) == [
        "Batch statistics in training are those of groups of 2, as if each group were on a device of its own; "
        "times are those of one device that does so for all groups."
    ]


def test_in_equal_time_methods_are_also_held_against_gradient_centralization():
    def in_equal_time(name: str, others: dict[str, Difference]) -> MethodSummary:
        plain = method(name, "SGDM")
        return replace(plain, equal_time=replace(plain.equal_time, others=others))

    lines = describe_comparison(
        summary(
            method("SGDM", "SGDM"),
            in_equal_time("SGDM+GC", {"W-SGDM": UNCLEAR, "FSGD": UNCLEAR}),
            in_equal_time("W-SGDM", {"SGDM+GC": Difference(-1.5, -2.0, -1.0, 5), "FSGD": UNCLEAR}),
            in_equal_time("FSGD", {"SGDM+GC": UNCLEAR, "W-SGDM": UNCLEAR}),
        )
    )
    assert lines[-1] == (
        "In equal time, beside SGDM+GC: W-SGDM is 1.5 points below SGDM+GC (95 % interval 1.0 to 2.0); "
        "FSGD does not differ from it by more than chance."
    )


@pytest.mark.parametrize(
    ("samples", "one"),
    [("images", "an image"), ("rows", "a row"), ("blocks", "a block"), ("utterances", "an utterance")],
)
def test_samples_are_called_what_they_are(samples, one):
    slower = replace(method("BSR", "SGDM"), evaluation_ratio=1.31)
    compared = summary(method("SGDM", "SGDM"), slower, samples=samples)
    assert describe_comparison(compared)[-1] == f"Evaluating {one} takes 1.31 times (BSR) as long as with SGDM."
    heads = [head for table in tables(compared) for head in table.heads]
    assert f"time/{one.rpartition(' ')[2]}" in heads


def test_what_evaluation_costs_is_said_of_methods_with_other_layers():
    slower, as_fast = (replace(method(name, "SGDM"), evaluation_ratio=x) for name, x in (("BSR", 1.31), ("MBN", 1.0)))
    assert describe_comparison(summary(method("SGDM", "SGDM"), method("FSGD", "SGDM"), slower, as_fast))[-1] == (
        "Evaluating an image takes 1.31 times (BSR) and 1.00 times (MBN) as long as with SGDM."
    )
    assert not any(
        "Evaluating" in line for line in describe_comparison(summary(method("SGDM", "SGDM"), method("FSGD", "SGDM")))
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (spread_text(Spread(98.65, 0.04, 5)), "98.7 ± 0.0"),
        (difference_text(Difference(-0.04, -0.54, 0.46, 5)), "+0.0 [-0.5, +0.5]"),
        (difference_text(Difference(-1.25, None, None, 1)), "-1.2"),
        (lr_text(replace(method("FSGD", "SGDM"), lr_edge="lowest")), "0.1*"),
        (target_text(method("FSGD", "SGDM"), summary()), "2.4"),
        (target_text(replace(method("FSGD", "SGDM"), reached_target=3), summary()), "2.4 (3 of 5)"),
        (target_text(replace(method("FSGD", "SGDM"), reached_target=0, epochs_to_target=None), summary()), "never"),
        (time_text(method("SGDM", "SGDM")), "3.00 ms"),
        (time_text(method("FSGD", "SGDM")), "x 1.50"),
        (ratio_text(None), "–"),
        (ratio_text(1.314), "x 1.31"),
    ],
)
def test_numbers_are_written_with_one_digit_that_matters(text, expected):
    assert text == expected


def test_memory_is_said_beside_the_baselines():
    lighter, heavier = (
        replace(method(name, "SGDM"), memory_ratio=ratio) for name, ratio in (("Lion", 0.9), ("W-SGDM", 1.204))
    )
    said = describe_comparison(summary(replace(method("SGDM", "SGDM"), memory_ratio=1.0), lighter, heavier))
    assert "At its peak a step holds 0.90 times (Lion) and 1.20 times (W-SGDM) as much memory as with SGDM." in said
    assert not any(
        "memory" in line for line in describe_comparison(summary(method("SGDM", "SGDM"), method("W-SGDM", "SGDM")))
    )


def test_costs_are_written_with_what_they_are_a_ratio_to():
    memory = Memory(parameters=2_000_000, buffers=0, optimizer_state=3_000_000, peak=34_560_000)
    plain = replace(method("SGDM", "SGDM"), memory=memory, memory_ratio=1.0, seconds_per_epoch=0.12345)
    whitened = replace(method("W-SGDM", "SGDM"), memory=memory, memory_ratio=1.204, seconds_per_epoch=123.45)
    assert (memory_text(plain), memory_text(whitened)) == ("34.6 MB", "34.6 MB, x 1.20")
    assert state_text(whitened) == "3.0 MB, x 1.50"
    assert (seconds_text(plain.seconds_per_epoch), seconds_text(whitened.seconds_per_epoch)) == ("0.123 s", "123 s")
    unknown = method("FSGD", "SGDM")
    assert [text(unknown) for text in (memory_text, state_text)] == ["–"] * 2


def test_runs_of_several_machines_are_noted():
    one = notes(summary(method("SGDM", "SGDM"), machines=("A (2 cores)",)))
    assert one == []
    (several,) = notes(summary(method("SGDM", "SGDM"), machines=("A (2 cores)", "B (64 cores)")))
    assert several.startswith("Runs were executed on A (2 cores) and B (64 cores): times")
