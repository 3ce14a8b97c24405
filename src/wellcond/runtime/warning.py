"""The category of every warning that the library gives; docs/warnings.md says what each means."""

from __future__ import annotations


class WellcondWarning(UserWarning):
    """Something that does not stop training but that a user should know.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", WellcondWarning)  # stop at the first one instead
    """
