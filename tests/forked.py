"""Processes that need not import what takes seconds: forked from one that has imported it."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

# Others' packages alone, so that a process must import of wellcond all that it uses. `torch._dynamo` comes with the
# first step of an optimizer.
IMPORTED = ["torch", "torch._dynamo", "torchvision", "lightning.pytorch", "sklearn.datasets"]


def forking() -> ForkServerContext:
    """Return the context of `multiprocessing` whose processes begin with `IMPORTED`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context
