"""The file of second moments: safetensors, with the forms in its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wellcond.moments.layer_moment import KINDS, LayerMoment

_FORMAT = "wellcond second moments 1"
_MISSING = 'needs the package safetensors: pip install "wellcond[moments]"'


def write_moments(path: str | os.PathLike[str], layers: Mapping[str, LayerMoment], about: Mapping[str, Any]) -> None:
    """Write layers' moments to a safetensors file.

    Args:
        path: Of the file.
        layers: By name.
        about: What else belongs to them, for JSON.

    Raises:
        ImportError: If ``safetensors`` is missing.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(f"SecondMoments.save {_MISSING}") from error
    tensors: dict[str, Tensor] = {}
    forms: dict[str, Any] = {}
    for name, moment in layers.items():
        kept = dict(moment.tensors) | ({} if moment.mean is None else {"mean": moment.mean})
        # Each tensor has memory of its own there.
        tensors |= {f"{name}/{key}": value.detach().cpu().contiguous().clone() for key, value in kept.items()}
        forms[name] = {
            "kind": moment.kind,
            "groups": moment.groups,
            "channels": moment.channels,
            "kernel": moment.kernel,
            "rows": moment.rows,
            "tensors": list(moment.tensors),
            "mean": moment.mean is not None,
        }
    save_file(tensors, path, {"format": _FORMAT, "forms": json.dumps(forms), "about": json.dumps(dict(about))})


def read_moments(path: str | os.PathLike[str]) -> tuple[dict[str, LayerMoment], dict[str, Any]]:
    """Read what `write_moments` wrote.

    Args:
        path: Of the file.

    Returns:
        The layers' moments, and what else belongs to them.

    Raises:
        ImportError: If ``safetensors`` is missing.
        ValueError: If it is no such file.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"SecondMoments.load {_MISSING}") from error
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT:
                raise ValueError(f"{os.fspath(path)} holds no second moments that SecondMoments.save wrote")
            forms = json.loads(about["forms"])
            layers = {name: _layer(name, form, file.get_tensor) for name, form in forms.items()}
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{os.fspath(path)} is no whole file of second moments ({error})") from error
    return layers, json.loads(about["about"])


def _layer(name: str, form: Mapping[str, Any], tensor: Any) -> LayerMoment:
    if form["kind"] not in KINDS:
        raise KeyError(f"the unknown form {form['kind']!r} of {name!r}")
    return LayerMoment(
        kind=form["kind"],
        groups=form["groups"],
        channels=form["channels"],
        kernel=tuple(form["kernel"]),
        tensors={key: tensor(f"{name}/{key}") for key in form["tensors"]},
        mean=tensor(f"{name}/mean") if form["mean"] else None,
        rows=None if form["rows"] is None else tuple(form["rows"]),
    )
