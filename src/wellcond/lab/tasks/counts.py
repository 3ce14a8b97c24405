"""How many images train and how many validate."""

from __future__ import annotations

from wellcond.lab.errors import LabError
from wellcond.lab.runs.settings import Settings


def count_images(settings: Settings, pool: int, samples: str = "images") -> tuple[int, int]:
    """Return how many images of the pool train and how many validate.

    Args:
        settings: What was asked for.
        pool: How many images do not test.
        samples: What is counted, in the plural.

    Returns:
        The two numbers; where nothing was asked for a tenth validates, at most 5,000 and no more than half as many as
        train, and the rest trains.

    Raises:
        LabError: If there are not so many.
    """
    train, validation = settings.train_images, settings.validation_images
    validation = validation or max(1, min(pool // 10, 5000, (train or pool) // 2))
    return checked_counts(train or pool - validation, validation, pool, samples)


def checked_counts(train: int, validation: int, pool: int, samples: str = "images") -> tuple[int, int]:
    """Return the numbers of images that train and that validate.

    Raises:
        LabError: If the pool has not so many.
    """
    if train < 1 or validation < 1 or train + validation > pool:
        raise LabError(
            f"--train-images {train}: there are {pool} {samples} besides the test {samples}, "
            f"and {max(1, validation)} of them validate"
        )
    return train, validation
