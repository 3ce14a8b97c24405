"""Settings of every test."""

import gc
import signal
import threading
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# The tests' tensors are tiny: threads would only wait for each other.
torch.set_num_threads(1)
# On a busy machine any example may take long. `--hypothesis-profile=thorough` tries many more of them.
hypothesis.settings.register_profile("wellcond", deadline=None, max_examples=40)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("wellcond")
# A runner without a terminal (nohup) ignores SIGHUP, and so would every process that a test starts.
if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Let collections of garbage pass over the tests and what they import: millions of objects, and none goes away."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
