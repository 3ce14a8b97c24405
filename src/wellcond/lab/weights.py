"""Weights that a run begins with, from a file."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from wellcond.lab.errors import LabError


def load_weights(model: nn.Module, file: str) -> None:
    """Give a network the weights of a file.

    Args:
        model: The network.
        file: A state dict as ``torch.save`` writes it, or a dictionary that has one under ``state_dict`` or ``model``.

    Raises:
        LabError: If the file cannot be read, or is of another network.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise LabError(f"--weights {file}: cannot be read as a state dict ({_line(error)})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise LabError(f"--weights {file}: must hold a state dict, got {type(content).__name__}")
    try:
        model.load_state_dict(content)
    except RuntimeError as error:
        raise LabError(f"--weights {file}: is of another network: {_line(error)}") from error


def digest_of(file: str) -> str:
    """Return a digest of a file, so that other weights under the same name are told apart; of no file, of the name."""
    path = Path(file)
    return hashlib.sha256(path.read_bytes() if path.is_file() else file.encode()).hexdigest()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
