"""Settings of every test."""

import signal
import threading

import hypothesis
import torch

# The tests' tensors are tiny: threads would only wait for each other.
torch.set_num_threads(1)
# On a busy machine any example may take long.
hypothesis.settings.register_profile("wellcond", deadline=None)
hypothesis.settings.load_profile("wellcond")
# A runner without a terminal (nohup) ignores SIGHUP, and so would every process that a test starts.
if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
