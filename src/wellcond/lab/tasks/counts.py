"""Decides the numbers of samples that train and that validate."""

from __future__ import annotations

from wellcond.lab.errors import LabError
from wellcond.lab.runs.settings import Settings

_MOST_VALIDATION = 5000


def count_images(
    settings: Settings, pool: int, what: str = "images besides the test images", most: int = _MOST_VALIDATION
) -> tuple[int, int]:
    """Return how many samples of the pool train and how many validate.

    Args:
        settings: What was asked for.
        pool: How many samples do not test.
        what: What they are, for the error.
        most: The most that validate where nothing was asked for.

    Returns:
        The two numbers; where nothing was asked for a tenth validates, and no more than half as many as train, and the
        rest trains.

    Raises:
        LabError: If there are not so many.
    """
    train, validation = settings.train_images, settings.validation_images
    validation = validation or max(1, min(pool // 10, most, (train or pool) // 2))
    return checked_counts(train or pool - validation, validation, pool, what)


def checked_counts(
    train: int, validation: int, pool: int, what: str = "images besides the test images"
) -> tuple[int, int]:
    """Return the numbers of samples that train and that validate.

    Raises:
        LabError: If the pool has not so many.
    """
    if train < 1 or validation < 1 or train + validation > pool:
        raise LabError(f"--train-images {train}: there are {pool} {what}, and {max(1, validation)} of them validate")
    return train, validation
