"""Networks with the ImageNet stem, by the names that torchvision and timm give them; never with weights of theirs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from wellcond.lab.errors import LabError, unknown_name

Build = Callable[[int, int], nn.Module]

# In training these return the logits of auxiliary classifiers too, which no task has a loss for.
_AUXILIARY = ("googlenet", "inception_v3")


def find_build(name: str) -> Build:
    """Return what builds a network from (channels, classes).

    Args:
        name: ``torchvision:NAME`` or ``timm:NAME``.

    Raises:
        LabError: If the library has no image classifier of that name, or is not installed.
    """
    library, _, within = name.partition(":")
    if library == "torchvision":
        return _find_torchvision(within)
    if library == "timm":
        return _find_timm(within)
    raise LabError(f"models are called NAME, torchvision:NAME or timm:NAME, got {name!r}")


def _find_torchvision(name: str) -> Build:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise unknown_name("torchvision model", name, known)
    return partial(_build_torchvision, name)


def _build_torchvision(name: str, channels: int, classes: int) -> nn.Module:
    from torchvision import models

    if channels != 3:
        raise LabError(f"model torchvision:{name} needs images of 3 channels, got {channels}")
    more = {"aux_logits": False, "init_weights": True} if name in _AUXILIARY else {}
    network: nn.Module = models.get_model(name, weights=None, num_classes=classes, **more)
    return network


def _find_timm(name: str) -> Build:
    try:
        import timm
    except ImportError as error:
        raise LabError(f"model timm:{name} needs the package timm: pip install timm") from error
    # With and without the tag that names pretrained weights.
    if not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models())
    return partial(_build_timm, name)


def _build_timm(name: str, channels: int, classes: int) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
    return network
