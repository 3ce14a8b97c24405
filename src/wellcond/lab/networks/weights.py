"""Weights that a network begins with: a file of the user's, or those that torchvision publishes."""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from wellcond.lab.errors import LabError, unknown_name
from wellcond.lab.given_paths import check_input_file, is_there
from wellcond.nn.norm.switchable import SwitchableNorm, rename_authors

_logger = logging.getLogger(__name__)
_PUBLISHED = "torchvision:"
# What checkpoints call the weights beside the optimizer's state and the like.
_INSIDE = ("state_dict", "model", "model_state_dict")
# What wrappers put before each name: DataParallel and DistributedDataParallel, torch.compile, Lightning modules.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
# DenseNets of old torchvision versions, which its published weights still are, write norm.1 for norm1.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")
# Residual networks of MMDetection call their group normalization gn1, those of Switchable Normalization's authors sn1;
# torchvision's norm_layer is bn1 whatever it is.
_OTHER_NORM = re.compile(r"(^|\.)[gs]n(?=\d\.)")


def load_weights(model: nn.Module, name: str, weights: str) -> str:
    """Give a network other weights, in place.

    A classifier of another number of classes, and one that is missing, is left as it was drawn; this is logged.

    Args:
        model: The network.
        name: What it is called.
        weights: The path of a state dict, by itself or in a checkpoint under ``state_dict`` or ``model``, as torch or
            safetensors saves it; or ``torchvision:IMAGENET1K_V1``, which torchvision downloads for its own networks.

    Returns:
        What was left as it was drawn, as a line to show; empty if all weights were taken.

    Raises:
        LabError: If there are no such weights, or they are of another network.
    """
    given = _published(name, weights) if weights.startswith(_PUBLISHED) else _read(weights)
    wanted = model.state_dict()
    given = _unwrapped(given, wanted)
    for prefix, layer in model.named_modules():
        if isinstance(layer, SwitchableNorm):
            rename_authors(given, f"{prefix}.", layer.num_features)
    classifier = _classifier(model)
    dropped = {
        key: value
        for key, value in given.items()
        if key in wanted and key.rpartition(".")[0] == classifier and value.shape[1:] == wanted[key].shape[1:]
        if value.shape != wanted[key].shape
    }
    kept = {key: value for key, value in given.items() if key not in dropped}
    headless = {key for key in wanted if key.rpartition(".")[0] == classifier and key not in given}
    # Saved before torch counted batches: its own loader puts up with that.
    missing = [
        key for key in wanted if key not in given and key not in headless and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in kept if key not in wanted]
    if missing or unexpected:
        raise LabError(f"--weights {weights}: is of another network than {name}: {_keys(missing, unexpected)}")
    shapes = [key for key, value in kept.items() if value.shape != wanted[key].shape]
    if shapes:
        first = shapes[0]
        raise LabError(
            f"--weights {weights}: {first} must be {list(wanted[first].shape)} in model {name}, "
            f"got {list(kept[first].shape)}"
        )
    whole = [key for key, value in kept.items() if wanted[key].is_floating_point() and not value.is_floating_point()]
    if whole:
        raise LabError(f"--weights {weights}: {whole[0]} must be of floating-point numbers, got {kept[whole[0]].dtype}")
    model.load_state_dict(kept, strict=False)
    return _note(weights, dropped, headless)


def check_weights(option: str, weights: str) -> None:
    """Check that weights are there and are a state dict, before anything that takes longer.

    Args:
        option: What named them.
        weights: As for `load_weights`; published ones are not looked for.

    Raises:
        LabError: If they are not.
    """
    if not weights.startswith(_PUBLISHED):
        _read(weights, option)


def digest_of(weights: str) -> str:
    """Return a digest of a file, so that other weights under the same name are told apart; of no file, of the name."""
    path = Path(weights)
    return hashlib.sha256(path.read_bytes() if path.is_file() else weights.encode()).hexdigest()


def _note(weights: str, dropped: Mapping[str, Tensor], headless: set[str]) -> str:
    if dropped:
        listed = ", ".join(f"{key} {list(value.shape)}" for key, value in dropped.items())
        note = f"--weights {weights}: left out {listed}, a classifier of other classes; it begins at random"
    elif headless:
        note = f"--weights {weights}: no {', '.join(sorted(headless))} in there; the classifier begins at random"
    else:
        return ""
    _say_once(note)
    return note


@cache
def _say_once(note: str) -> None:
    """Log a line the first time: every run of a comparison loads the same weights."""
    _logger.warning(note)


def _classifier(model: nn.Module) -> str:
    """Return the qualified name of the last layer with weights that is linear or a convolution."""
    names: list[str] = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return names[-1]


def _unwrapped(given: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without the names of wrappers around the network."""
    given = {_OLD_DENSENET.sub(r"\1", key): value for key, value in given.items()}
    if not any(_OTHER_NORM.search(key) for key in wanted):
        given = {_OTHER_NORM.sub(r"\1bn", key): value for key, value in given.items()}
    while not wanted.keys() & given.keys():
        wrapper = next((prefix for prefix in _WRAPPERS if any(key.startswith(prefix) for key in given)), None)
        if wrapper is None:
            break
        # What lies beside the network in its wrapper (a loss's buffers, say) is not the network's.
        given = {key.removeprefix(wrapper): value for key, value in given.items() if key.startswith(wrapper)}
    return given


def _read(weights: str, option: str = "--weights") -> dict[str, Tensor]:
    path = Path(weights)
    if option == "--weights" and not is_there(path):
        raise LabError(f"--weights must be a file or torchvision:NAME (as torchvision:IMAGENET1K_V1), got {weights}")
    check_input_file(option, path)
    content = _read_safetensors(path, option) if path.suffix == ".safetensors" else _read_torch(path, option)
    for key in _INSIDE:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise LabError(
            f"{option} {weights}: must hold a state dict, by itself or under {', '.join(_INSIDE)}, "
            f"got {type(content).__name__}"
        )
    for key, value in content.items():
        odd = _odd_kind(value)
        if odd is not None:
            raise LabError(f"{option} {weights}: {key} must be a dense tensor of real numbers, got {odd}")
    return {str(key): value for key, value in content.items()}


def _odd_kind(value: Tensor) -> str | None:
    """Return what keeps a tensor from being copied into a weight of a network; None if nothing does."""
    kinds = {
        "one without values (on the meta device)": value.is_meta,
        "a nested tensor": value.is_nested,
        "a quantized tensor": value.is_quantized,
        "a sparse tensor": value.layout != torch.strided,
        f"{value.dtype}": value.is_complex(),
    }
    return next((kind for kind, is_it in kinds.items() if is_it), None)


def _read_torch(path: Path, option: str) -> Any:
    try:
        with warnings.catch_warnings():
            # What else the file might have been.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch passes on whatever its readers of zip, tar and pickle files raise
        raise LabError(
            f"{option} {path}: cannot be read as a state dict by torch.load(weights_only=True); save it alone"
        ) from error


def _read_safetensors(path: Path, option: str) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise LabError(f"{option} {path}: needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise LabError(f"{option} {path}: not a safetensors file ({error})") from error


def _published(name: str, weights: str) -> dict[str, Tensor]:
    library, _, within = name.partition(":")
    if library != "torchvision":
        raise LabError(f"--weights {weights}: only models called torchvision:NAME have these, got --model {name}")
    from torchvision import models

    published = models.get_model_weights(within)
    wanted = weights.removeprefix(_PUBLISHED)
    if wanted not in published.__members__:
        raise unknown_name(f"weights of {name}", wanted, published.__members__)
    try:
        state: Mapping[str, Tensor] = published[wanted].get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError) as error:
        raise LabError(f"--weights {weights}: cannot be downloaded ({error})") from error
    return dict(state)


def _keys(missing: list[str], unexpected: list[str]) -> str:
    parts = [
        f"{kind} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    return "; ".join(parts)
