"""Settings of every test."""

import hypothesis
import torch

# The tests' tensors are tiny: threads would only wait for each other.
torch.set_num_threads(1)
# On a busy machine any example may take long.
hypothesis.settings.register_profile("wellcond", deadline=None)
hypothesis.settings.load_profile("wellcond")
