"""Every probe of `wellcond.diagnostics` on one model: what each found, or why it has nothing to say."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import nn

import wellcond
from wellcond import diagnostics
from wellcond.diagnostics import (
    BatchNoise,
    Disparity,
    FeatureSpectrum,
    GradientStatistics,
    Landscape,
    LayerDisparity,
    Lipschitz,
    WeightMeans,
)
from wellcond.diagnostics.passes import Loss, loss_of
from wellcond.runtime.models import Call

# Where a model has more weights than this, 4.8 is checked for all of them together alone: each costs as much as all.
_WEIGHTS_ALONE = 12
# Lanczos iterations for a norm of the Hessian.
_ITERATIONS = 30
# From this width on, second moments are sketched: 8 MB and a second's eigendecomposition for each.
_MAX_DIM = 1024

Told = Callable[[str, int], object]
"""Is told what is at work, and how much of it is done."""

_Result = TypeVar("_Result")
_Found_co = TypeVar("_Found_co", covariant=True)


@dataclass(frozen=True)
class ProbeResult(Generic[_Found_co]):
    """The result of one probe, or the reason why there is none.

    Attributes:
        found: The result; None if there is none.
        reason: Why not.
    """

    found: _Found_co | None
    reason: str = ""


@dataclass(frozen=True)
class RecordedTraining:
    """Records of the training that came before the probes.

    Attributes:
        steps: Of training.
        lr: Of SGD with momentum 0.9.
        losses: After each step, on its batch.
        gradients: Of every step.
        weights_before: Before the first.
    """

    steps: int
    lr: float
    losses: tuple[float, ...]
    gradients: ProbeResult[GradientStatistics]
    weights_before: ProbeResult[WeightMeans]


@dataclass(frozen=True)
class Diagnosis:
    """All probes of one model.

    Attributes:
        batch_size: m, samples behind one set of batch statistics.
        batches: That the probes saw.
        spectrum: Of features, in training mode.
        gradients: With and without their row means, batch by batch.
        weights: Means of weight vectors.
        lipschitz: Inequality 4.8 on one batch.
        landscape: Along a step against the gradient.
        landscape_centred: Along a step against the centred gradient.
        noise: Of batch statistics.
        disparity: Of running statistics, EvalNorm and BSR; the latter two are fitted to every other batch, and all are
            measured on the rest.
        training: None if the model was not trained before.
    """

    batch_size: int
    batches: int
    spectrum: ProbeResult[FeatureSpectrum]
    gradients: ProbeResult[GradientStatistics]
    weights: ProbeResult[WeightMeans]
    lipschitz: ProbeResult[Lipschitz]
    landscape: ProbeResult[Landscape]
    landscape_centred: ProbeResult[Landscape]
    noise: ProbeResult[BatchNoise]
    disparity: ProbeResult[Disparity]
    training: RecordedTraining | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dictionaries, lists, strings and numbers, for JSON."""
        found: dict[str, Any] = {"batch_size": self.batch_size, "batches": self.batches}
        for name in PROBES:
            found[name] = _entry(getattr(self, name))
        if self.training is not None:
            found["training"] = {
                "steps": self.training.steps,
                "lr": self.training.lr,
                "losses": list(self.training.losses),
                "gradients": _entry(self.training.gradients),
                "weights_before": _entry(self.training.weights_before),
            }
        return found


PROBES = (
    "spectrum",
    "gradients",
    "weights",
    "lipschitz",
    "landscape",
    "landscape_centred",
    "noise",
    "disparity",
)
"""The probes of a `Diagnosis`, by their attributes."""


def _no_one(what: str, done: int) -> None:
    """Tell no one."""


def diagnose(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    *,
    batch_size: int,
    call: Call | None = None,
    training: RecordedTraining | None = None,
    told: Told = _no_one,
) -> Diagnosis:
    """Run every probe on a model, and leave it as it is found.

    Features, gradients and losses are those of training mode.

    Args:
        model: Any model with linear maps or convolutions.
        batches: Of training data; several times ``batch_size`` samples for the probes of batch normalization.
        loss: ``loss(output, batch)`` gives the scalar.
        batch_size: m, samples behind one set of batch statistics in training.
        call: ``call(model, batch)`` gives the output of a model that is run otherwise than by its first element.
        training: What was recorded before.
        told: Is told each probe as it begins, with 0, and when it is done, with 1.

    Returns:
        What each probe found, or why it cannot be used on this model.

    Raises:
        ValueError: If there is no batch.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [(torch.randn(16, 4), torch.randint(2, (16,))) for _ in range(3)]
        >>> def loss(output, batch):
        ...     return nn.functional.cross_entropy(output, batch[1])
        >>> found = diagnose(model, batches, loss, batch_size=16)
        >>> found.gradients.found is not None, found.noise.reason
        (True, 'Sequential has no batch normalization, whose noise is measured; its normalizations: none')
    """
    if not batches:
        raise ValueError("there is no batch to diagnose the model with")
    modes = {module: module.training for module in model.modules()}

    def probed(name: str, probe: Callable[..., _Result], *arguments: Any, **options: Any) -> ProbeResult[_Result]:
        told(name, 0)
        found = tried(probe, *arguments, **options)
        told(name, 1)
        return found

    try:
        for module in modes:
            module.training = True
        weights = probed("weights", diagnostics.weight_means, model)
        alone = weights.found is not None and len(weights.found.layers) <= _WEIGHTS_ALONE
        first, one = batches[0], {"call": call}
        wide = {"max_dim": _MAX_DIM, "precision": "float32"}
        return Diagnosis(
            batch_size=batch_size,
            batches=len(batches),
            spectrum=probed("spectrum", diagnostics.feature_spectrum, model, batches, **one, **wide),
            gradients=probed("gradients", diagnostics.gradient_statistics, model, batches, loss, **one),
            weights=weights,
            lipschitz=probed(
                "lipschitz", diagnostics.lipschitz, model, first, loss, per_layer=alone, iterations=_ITERATIONS, **one
            ),
            landscape=probed("landscape", diagnostics.landscape, model, first, loss, **one),
            landscape_centred=probed(
                "landscape, centred", diagnostics.landscape, model, first, loss, centralize=True, **one
            ),
            noise=probed("noise", diagnostics.batch_noise, model, batches, batch_size, **one),
            disparity=probed("disparity", measured_disparity, model, batches, batch_size, call),
            training=training,
        )
    finally:
        for module, mode in modes.items():
            module.training = mode


def trained_briefly(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    steps: int,
    lr: float,
    call: Call | None = None,
    told: Told = _no_one,
) -> RecordedTraining:
    """Train a model by SGD with momentum 0.9, and record its gradients.

    Args:
        model: Is trained, in training mode, and left in it.
        batches: One for each step.
        loss: ``loss(output, batch)`` gives the scalar.
        steps: How many, at least one.
        lr: The learning rate.
        call: As of `diagnose`.
        told: Is told of each step.

    Returns:
        What was recorded.

    Raises:
        ValueError: If the loss does not stay finite, or there is no batch.
    """
    model.train()
    before = tried(diagnostics.weight_means, model)
    recorder = tried(diagnostics.GradientRecorder, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for step, batch in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        value = loss_of(model, batch, loss, call)
        value.backward()
        if recorder.found is not None:
            recorder.found.record()
        optimizer.step()
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} after {step + 1} steps at lr {lr:g}: train with a smaller one")
        told("training", 1)
    if not losses:
        raise ValueError("there is no batch to train the model with")
    optimizer.zero_grad()
    gradients = ProbeResult[GradientStatistics](None, recorder.reason)
    if recorder.found is not None:
        gradients = ProbeResult(recorder.found.result())
    return RecordedTraining(len(losses), lr, tuple(losses), gradients, before)


def tried(probe: Callable[..., _Result], *arguments: Any, **options: Any) -> ProbeResult[_Result]:
    """Call a probe; if the model or the data is not for it, keep what it says.

    >>> tried(diagnostics.weight_means, nn.ReLU())
    ProbeResult(found=None, reason='ReLU has no linear map or convolution whose gradient could be centred')
    """
    try:
        return ProbeResult(probe(*arguments, **options))
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return ProbeResult(None, " ".join(str(error).split()))


def measured_disparity(
    model: nn.Module, batches: Sequence[Any], batch_size: int, call: Call | None = None
) -> Disparity:
    """Measure the running statistics, and EvalNorm and BSR fitted to other batches, as far as there are any."""
    measured = batches[1::2] or batches
    own = diagnostics.disparity(model, measured, batch_size=batch_size, call=call)

    def fitted(what: str) -> Disparity:
        # The features are the same: in training these layers are batch normalizations.
        changed = wellcond.calibrate(copy.deepcopy(model), batches[::2], batch_size, what, call=call)
        return diagnostics.disparity(changed, measured, batch_size=batch_size, call=call)

    for what in ("evalnorm", "bsr"):
        other = tried(fitted, what)
        if other.found is not None and other.found.layers.keys() == own.layers.keys():
            layers = {name: _joined(layer, other.found.layers[name]) for name, layer in own.layers.items()}
            own = replace(own, layers=layers)
    return own


def _joined(first: LayerDisparity, second: LayerDisparity) -> LayerDisparity:
    return replace(first, norm={**second.norm, **first.norm}, rms={**second.rms, **first.rms})


def _entry(probe: ProbeResult[Any]) -> dict[str, Any]:
    return {"reason": probe.reason} if probe.found is None else {"found": probe.found.to_dict()}
