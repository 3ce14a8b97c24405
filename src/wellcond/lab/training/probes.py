"""Probes of a trained network on its training images; what they find is kept with each run."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from wellcond.lab.methods.norms import trained_norm

if TYPE_CHECKING:
    import torch
    from torch import nn

    from wellcond.diagnostics.spectra import Spectrum
    from wellcond.lab.runs.records import RunSpec
    from wellcond.lab.tasks.base import SeedData

_BATCHES = 8
# What evaluation goes by in the layers that train with batch statistics; all others go by running ones.
_KINDS = {"bsr": "bsr", "evalnorm": "evalnorm"}


def probe_disparity(model: nn.Module, images: list[torch.Tensor], spec: RunSpec) -> dict[str, float]:
    """Return how far evaluation's normalization is from that of training's batches, averaged over layers.

    Args:
        model: The trained network.
        images: Batches of training images.
        spec: The run; its groups are the batches whose statistics training takes.
    """
    from wellcond.diagnostics import disparity

    norm = trained_norm(spec.method.norm, spec.ghost_batch)
    found = disparity(model, images, batch_size=spec.ghost_batch or spec.batch_size).mean
    kind = "ema" if norm is None else _KINDS.get(norm.kind, "ema")
    # EvalNorm that is not learned has the weights of 1 / m.
    return {"disparity": found.get(kind, found.get(f"{kind}_fixed", found["ema"]))}


def probe_condition(model: nn.Module, images: list[torch.Tensor], spec: RunSpec) -> dict[str, float]:
    """Return the condition of the output's second moment of the first convolution and of the last linear layer.

    Of a layer with more outputs than inputs the moment is singular: what counts is the smallest eigenvalue above
    rounding.

    Args:
        model: The trained network.
        images: Batches of training images.
        spec: The run.
    """
    from torch import nn

    from wellcond.diagnostics import feature_spectrum

    wanted = {
        "first convolution": [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)][:1],
        "last linear layer": [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:],
    }
    names = {name for found in wanted.values() for name in found}
    training = model.training
    model.eval()
    layers = feature_spectrum(model, images, where=lambda name, _: name in names).layers
    model.train(training)
    return {called: _condition(layers[name].output) for called, found in wanted.items() for name in found}


def _condition(spectrum: Spectrum) -> float:
    (values,) = spectrum.eigenvalues
    return values[0] / min(value for value in values if value > spectrum.resolution * values[0])


MEASURES: dict[str, Callable[[nn.Module, list[torch.Tensor], RunSpec], dict[str, float]]] = {
    "disparity": probe_disparity,
    "condition": probe_condition,
}
"""From a name in `PROBES` to what measures it: figures by name."""


def probe_network(model: nn.Module, data: SeedData, spec: RunSpec) -> dict[str, Any]:
    """Return what the run's probe measures of its trained network, under ``"probe"``; nothing without a probe.

    Args:
        model: The network.
        data: The run's data, whose batches are an input and a target each.
        spec: The run.
    """
    if spec.probe is None:
        return {}
    images = [batch[0] for batch in islice(data.batches(), _BATCHES)]
    return {"probe": MEASURES[spec.probe](model, images, spec)}
