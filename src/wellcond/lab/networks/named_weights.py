"""Weights that recipes begin with: which a panel names, and where a user's copy of them lies."""

from __future__ import annotations

from collections.abc import Sequence

from wellcond.lab.errors import LabError, unknown_name

NONE = "none"
"""What `--weights` calls weights that are drawn."""

_ZOO = "download.openmmlab.com/pretrain/third_party"
# What detectors of Caffe's line were trained on; the lab's images are RGB between 0 and 1, less torchvision's mean.
_CAFFE = (
    "they take BGR images of 0 to 255 less the mean: turn conv1.weight's channels around and multiply them by "
    "255 times torchvision's deviation (0.229, 0.224, 0.225)"
)

NAMED_WEIGHTS = {
    "resnext101-32x4d": f"ResNeXt-101 32x4d of ImageNet, as resnext101_32x4d-a5af3160.pth of {_ZOO}",
    "resnet50-gn": "ResNet-50 with group normalization of ImageNet, as resnet50_gn_thangvubk-ad1730dd.pth of "
    f"{_ZOO}; or resnet50_gn-9186a21c.pth, but {_CAFFE}",
    "resnet101-gn": "ResNet-101 with group normalization of ImageNet, as resnet101_gn-cac0ab98.pth of "
    f"{_ZOO}; {_CAFFE}",
    "resnet50-gn-ws": "ResNet-50 with group normalization and standardized weights of ImageNet, as "
    f"resnet50_gn_ws-15beedd8.pth of {_ZOO}",
    "resnet50-sn": "ResNet-50 with Switchable Normalization of ImageNet, trained on 8 GPUs with 2 images each, of "
    "github.com/switchablenorms/Switchable-Normalization",
}
"""From a name to what the file must be; torchvision has none of these."""


def bind_weights(given: Sequence[str], needed: Sequence[str]) -> dict[str, str | None]:
    """Return where the weights that panels begin with come from.

    Args:
        given: Of each ``NAME=WHERE``, a file, ``torchvision:NAME`` or ``none``; ``none`` alone draws all of them.
        needed: What the panels say: names in `NAMED_WEIGHTS`, ``torchvision:NAME`` or files.

    Returns:
        From each of `needed` to its place; None draws.

    Raises:
        LabError: If a name is unknown or given twice, or named weights have no place.

    >>> bind_weights(["resnet50-gn=gn.pth"], ["resnet50-gn", "torchvision:IMAGENET1K_V1"])
    {'resnet50-gn': 'gn.pth', 'torchvision:IMAGENET1K_V1': 'torchvision:IMAGENET1K_V1'}
    >>> bind_weights(["none"], ["resnet50-gn"])
    {'resnet50-gn': None}
    """
    needed = list(dict.fromkeys(needed))
    bound: dict[str, str | None] = {}
    for text in given:
        if text == NONE:
            bound |= {name: None for name in needed if name not in bound}
            continue
        name, _, place = text.partition("=")
        if not place:
            raise LabError(f"--weights must be NAME=FILE, NAME=torchvision:NAME, NAME=none or none, got {text!r}")
        if name not in needed and name not in NAMED_WEIGHTS:
            raise unknown_name("weights", name, [*NAMED_WEIGHTS, *needed])
        if bound.get(name) is not None:
            raise LabError(f"--weights must give each of them once, got {name} twice")
        bound[name] = None if place == NONE else place
    missing = [name for name in needed if name in NAMED_WEIGHTS and name not in bound]
    if missing:
        asked = ", ".join(f"{name}=FILE" for name in missing)
        what = "; ".join(f"{name}: {NAMED_WEIGHTS[name]}" for name in missing)
        raise LabError(f"--weights {asked} must say where weights lie, or =none to draw them. {what}")
    return {name: bound.get(name, name) for name in needed}
