"""Finds frozen batch normalizations of other libraries, and layers that only look like one."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from wellcond.nn.convert.then_activation import timm_class

_FROZEN_BUFFERS = ("weight", "bias", "running_mean", "running_var")
# Whose classes of this name compute (x − μ)/√(σ² + ε)·γ + β; some of them have ε as a constant of their forward.
_SOURCES = ("torchvision.ops.", "transformers.models.", "detectron2.layers.")
_EPS_OF_OTHERS = 1e-5
# Torch's types that fuse a convolution with its batch normalization compute with its tensors by themselves.
_FUSING = ("torch.ao.nn.intrinsic", "torch.nn.intrinsic", "torch.ao.nn.intrinsic.qat")


def is_frozen(module: nn.Module) -> bool:
    """Whether a module is a known frozen batch normalization: torchvision's, timm's, detectron2's or transformers'.

    >>> from torchvision.ops import FrozenBatchNorm2d
    >>> is_frozen(FrozenBatchNorm2d(3)), is_frozen(nn.BatchNorm2d(3))
    (True, False)
    """
    kind = type(module)
    if not all(isinstance(module._buffers.get(name), Tensor) for name in _FROZEN_BUFFERS):
        return False
    if kind is timm_class("FrozenBatchNormAct2d"):
        return True
    return kind.__name__.endswith("FrozenBatchNorm2d") and kind.__module__.startswith(_SOURCES)


def frozen_norms(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return the known frozen batch normalizations of a model, with all their names."""
    return _named(model, is_frozen)


def lookalikes(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return what keeps running statistics as batch normalization does but is of no known type: `InPlaceABN`."""

    def is_one(module: nn.Module) -> bool:
        if isinstance(module, (_BatchNorm, _InstanceNorm)) or is_frozen(module):
            return False
        return all(isinstance(module._buffers.get(name), Tensor) for name in ("running_mean", "running_var"))

    return _named(model, is_one)


def fused_norms(model: nn.Module) -> dict[nn.Module, str]:
    """Return the batch normalizations that belong to a fused layer of torch's, such as `qat.ConvBn2d`, and its name."""
    return {
        child: f"{name!r}, a {type(module).__name__}"
        for name, module in model.named_modules()
        if type(module).__module__.startswith(_FUSING)
        for child in module.children()
        if isinstance(child, _BatchNorm)
    }


def thawed(frozen: nn.Module) -> _BatchNorm:
    """Return a batch normalization that evaluates as a frozen one, of the same tensors, with all else that it has.

    γ and β are parameters, and as constant as they were: they do not require gradients.

    Args:
        frozen: `is_frozen`; is not changed.

    Example:
        >>> from torchvision.ops import FrozenBatchNorm2d
        >>> thawed(FrozenBatchNorm2d(3, eps=0.0)).eps
        0.0
    """
    assert isinstance(frozen.running_mean, Tensor)
    kind: type[Any] = nn.BatchNorm2d
    if type(frozen) is timm_class("FrozenBatchNormAct2d"):
        kind = timm_class("BatchNormAct2d")
    eps = getattr(frozen, "eps", _EPS_OF_OTHERS)
    plain = nn.BatchNorm2d(frozen.running_mean.numel(), eps=eps, device="meta")
    of_module = vars(nn.Module())
    state = dict(vars(frozen)) | {name: value for name, value in vars(plain).items() if name not in of_module}
    buffers = dict(frozen._buffers)
    affine = {name: nn.Parameter(buffers.pop(name), requires_grad=False) for name in ("weight", "bias")}  # type: ignore[arg-type]
    state["_parameters"] = affine | dict(frozen._parameters)
    counter = torch.zeros((), dtype=torch.int64, device=frozen.running_mean.device)
    statistics = {name: buffers.pop(name) for name in ("running_mean", "running_var")}
    state["_buffers"] = statistics | {"num_batches_tracked": counter} | buffers
    state["_modules"] = dict(frozen._modules)
    new = cast(_BatchNorm, object.__new__(kind))
    new.__dict__.update(state)
    return new


def _named(model: nn.Module, wanted: Any) -> dict[nn.Module, list[str]]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if wanted(module):
            names.setdefault(module, []).append(name)
    return names
