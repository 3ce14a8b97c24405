"""The lr is chosen by validation figures: the best at the end, and the quickest of those that cannot be told apart."""

from __future__ import annotations

import pytest

from wellcond.lab.comparison.choice import choose, epochs_to
from wellcond.lab.runs.metric import ACCURACY, Metric
from wellcond.lab.runs.records import EpochRecord, RunRecord


def run(*validation: float, loss: float | None = 0.5, test: float = 0.0, diverged: bool = False) -> RunRecord:
    """A run with these validation accuracies after its epochs."""
    epochs = tuple(
        EpochRecord(steps, 1.0, 0.1, accuracy, loss, test, loss) for steps, accuracy in enumerate(validation, start=1)
    )
    return RunRecord(epochs=epochs, diverged=diverged, threads=1, transforms={}, warnings=())


def test_the_best_final_accuracy_wins_over_a_quicker_start():
    slow = [run(20, 90), run(20, 91), run(20, 92)]
    quick = [run(80, 85), run(80, 86), run(80, 87)]
    assert choose({0.1: quick, 0.3: slow}) == 0.3


def test_of_lrs_within_one_standard_error_the_quickest_wins():
    """Differences of +1, -1 and +0.6 have the mean 0.2 and the standard error 0.61."""
    slow = [run(20, 91), run(20, 91), run(20, 91)]
    quick = [run(80, 90), run(80, 92), run(80, 90.4)]
    assert choose({0.1: quick, 0.3: slow}) == 0.1
    assert choose({0.1: slow, 0.3: quick}) == 0.3


def test_beyond_one_standard_error_the_final_accuracy_decides():
    """Differences of 1, 1.2 and 0.8 have the mean 1 and the standard error 0.12."""
    slow = [run(20, 91), run(20, 91), run(20, 91)]
    quick = [run(80, 90), run(80, 89.8), run(80, 90.2)]
    assert choose({0.1: quick, 0.3: slow}) == 0.3


def test_one_seed_has_no_standard_error_only_ties():
    assert choose({0.1: [run(80, 90)], 0.3: [run(20, 90.1)]}) == 0.3
    assert choose({0.1: [run(20, 90)], 0.3: [run(80, 90)]}) == 0.3


def test_a_tie_goes_to_the_lower_loss_and_then_to_the_first_of_the_grid():
    assert choose({0.1: [run(90, loss=0.5)], 0.3: [run(90, loss=0.4)]}) == 0.3
    assert choose({0.1: [run(90)], 0.3: [run(90)]}) == 0.1


def test_without_a_loss_a_tie_goes_to_the_first_of_the_grid():
    assert choose({0.1: [run(90, loss=None)], 0.3: [run(90, loss=None)]}) == 0.1
    assert choose({0.1: [run(80, loss=None)], 0.3: [run(90, loss=None)]}) == 0.3


def test_an_lr_with_diverged_runs_comes_last():
    assert choose({0.03: [run(20), run(20)], 0.1: [run(99), run(diverged=True)]}) == 0.03
    assert choose({0.1: [run(diverged=True), run(diverged=True)], 0.3: [run(99), run(diverged=True)]}) == 0.3


def test_test_figures_choose_nothing():
    assert choose({0.1: [run(90, test=0)], 0.3: [run(80, test=100)]}) == 0.1


LOSS = Metric("loss", unit="", higher_is_better=False)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_score_of_which_less_is_better_is_chosen_the_other_way_round(sign):
    metric = Metric("score", unit="", higher_is_better=sign > 0)
    slow = [run(sign * 20, sign * 91) for _ in range(3)]
    quick = [run(sign * 80, sign * score) for score in (90, 92, 90.4)]
    worse = [run(sign * 90, sign * 80) for _ in range(3)]
    assert choose({0.1: worse, 0.3: slow}, metric) == 0.3
    assert choose({0.1: quick, 0.3: slow}, metric) == 0.1


def test_epochs_to_counts_from_one_and_includes_equality():
    assert epochs_to(run(94.9, 95.0), ACCURACY, 95.0, "validation_score") == 2
    assert epochs_to(run(94.9), ACCURACY, 95.0, "validation_score") is None
    assert epochs_to(run(2.0, 1.5, 1.0), LOSS, 1.5, "validation_score") == 2
    assert epochs_to(run(50.0, test=95.0), ACCURACY, 95.0, "test_score") == 1


def test_for_a_target_the_quickest_to_it_wins_and_every_seed_counts():
    early = [run(96, 96), run(95, 96)]
    better = [run(90, 99), run(94, 99)]
    unsteady = [run(99, 99), run(80, 90)]
    assert choose({0.1: early, 0.3: better, 1.0: unsteady}, ACCURACY, 95.0) == 0.1
    assert choose({0.1: early, 0.3: better}, ACCURACY) == 0.3
    # Where nothing reaches it, the score at the end decides as ever.
    assert choose({0.1: early, 0.3: better}, ACCURACY, 99.5) == 0.3
