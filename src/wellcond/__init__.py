"""Make neural networks train better from the statistics of their features and gradients."""

from wellcond.version import __version__

__all__ = ["__version__"]
