"""A diagnosis in plain sentences, made from its numbers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

from wellcond.diagnostics import GradientStatistics, Spectrum
from wellcond.lab.diagnosis.diagnose import PROBES, Diagnosis

# Feature energy that few directions hold where a layer is worth a sentence, and which part of d "few" is.
_ENERGY = 0.9
_FEW = 0.1
# How many layers are named.
_NAMED = 3
# Row means are worth a sentence where they are so much more of a gradient than those of independent entries.
_NOTABLE = 0.05


def describe_diagnosis(diagnosis: Diagnosis) -> list[str]:
    """Return what the probes found, a sentence or two for each that had something to measure.

    Args:
        diagnosis: All probes.

    Returns:
        The sentences; at least one.
    """
    parts = (_features, _gradients, _weights, _smoothness, _step, _noise, _disparity, _left_out)
    return [sentence for part in parts for sentence in part(diagnosis)]


def concentration(name: str, spectrum: Spectrum) -> str:
    """Say how few directions hold a layer's feature energy.

    >>> concentration("layer3.0.conv1", Spectrum(1, 4, 100, ((9.0, 0.5, 0.4, 0.1),), (10.0,)))
    'layer3.0.conv1: 90 % of the feature energy in 1 of 4 directions'
    """
    count = spectrum.directions(_ENERGY)
    energy = "at least " if not spectrum.exact else ""
    energy += f"{100 * spectrum.energy(count):.0f} %"
    return f"{name or '(model)'}: {energy} of the feature energy in {count} of {spectrum.width} directions"


def _features(diagnosis: Diagnosis) -> Iterator[str]:
    found = diagnosis.spectrum.found
    if found is None:
        return
    inputs = {name: layer.input for name, layer in found.layers.items()}
    # One direction of few is no concentration.
    few = [
        (own.directions(_ENERGY) / own.width, name)
        for name, own in inputs.items()
        if own.width > 1 / _FEW and own.directions(_ENERGY) <= max(1, _FEW * own.width)
    ]
    for _, name in sorted(few)[:_NAMED]:
        yield concentration(name, inputs[name]) + "."
    if len(few) > _NAMED:
        yield f"As concentrated, within a tenth of their directions, are the inputs of {len(few) - _NAMED} more layers."
    if not few:
        name = min(inputs, key=lambda name: inputs[name].effective_rank / inputs[name].width)
        own = inputs[name]
        yield (
            f"No layer's input has {100 * _ENERGY:.0f} % of its energy within a tenth of its directions; the most "
            f"uneven, of {_layer(name)}, has an effective rank of {own.effective_rank:.0f} of {own.width}."
        )
    singular = [name for name, own in inputs.items() if math.isinf(own.condition)]
    rows = [name for name in singular if inputs[name].rows < inputs[name].width]
    if singular:
        text = f"The input's second moment is singular in {_some(singular)} of {len(inputs)} layers"
        text += f"; {len(rows)} of them saw fewer samples than dimensions" if rows else ""
        yield text + ": a preconditioner needs its damping there."
    finite = {name: own.condition for name, own in inputs.items() if math.isfinite(own.condition)}
    if finite:
        worst = max(finite, key=lambda name: finite[name])
        yield f"The largest finite condition number of an input is {finite[worst]:.2g}, in {_layer(worst)}."


def _layer(name: str) -> str:
    """Name a layer in a sentence: in a `Sequential` its name is a number."""
    return f"layer {name}" if name else "the model"


def _gradients(diagnosis: Diagnosis) -> Iterator[str]:
    found = diagnosis.gradients.found
    if found is not None:
        yield _centring(found)
    training = diagnosis.training
    if training is not None and training.gradients.found is not None:
        said = _centring(training.gradients.found)
        yield f"Over the {training.steps} steps of training before: {said[0].lower()}{said[1:]}"


def _centring(found: GradientStatistics) -> str:
    shares = {name: layer.mean["mean_share"] for name, layer in found.layers.items()}
    excess = {name: share - 1 / found.layers[name].inputs for name, share in shares.items()}
    notable = sorted((name for name in excess if excess[name] > _NOTABLE), key=lambda name: -excess[name])
    if not notable:
        most = max(shares, key=lambda name: shares[name])
        return (
            f"Gradient centralization would take little out: row means are at most {100 * shares[most]:.1f} % of the "
            f"squared gradient ({most})."
        )
    listed = ", ".join(
        f"{100 * shares[name]:.0f} % in {name} (by chance {100 / found.layers[name].inputs:.2g} %)"
        for name in notable[:_NAMED]
    )
    return f"Gradient centralization would take row means out of the squared gradient: {listed}."


def _weights(diagnosis: Diagnosis) -> Iterator[str]:
    found = diagnosis.weights.found
    before = None if diagnosis.training is None else diagnosis.training.weights_before.found
    if found is None:
        return

    def middle(means: list[float]) -> float:
        return sorted(map(abs, means))[len(means) // 2]

    now = middle([mean for layer in found.layers.values() for mean in layer.means])
    if before is None:
        yield f"The mean of a weight vector is {now:.2g} in size (median over {_units(diagnosis)} output units)."
    else:
        start = middle([mean for layer in before.layers.values() for mean in layer.means])
        yield (
            f"Training moved the mean of a weight vector from {start:.2g} to {now:.2g} in size (median over "
            f"{_units(diagnosis)} output units)."
        )


def _units(diagnosis: Diagnosis) -> int:
    assert diagnosis.weights.found is not None
    return sum(layer.units for layer in diagnosis.weights.found.layers.values())


def _smoothness(diagnosis: Diagnosis) -> Iterator[str]:
    found = diagnosis.lipschitz.found
    if found is None:
        return
    whole = found.whole
    if not whole.converged:
        yield f"Inequality 4.8 is left open: the Hessian's norm had not converged after {whole.products} products."
        return
    verdict = "holds" if found.holds else "does not hold"
    yield (
        f"Inequality 4.8 {verdict} here: centralization leaves {100 * whole.gradient_ratio:.1f} % of the gradient's "
        f"norm and {100 * whole.hessian_ratio:.1f} % of the Hessian's."
    )


def _step(diagnosis: Diagnosis) -> Iterator[str]:
    found, centred = diagnosis.landscape.found, diagnosis.landscape_centred.found
    if found is None:
        return
    best = min(zip(found.losses, found.step_sizes, strict=True))
    text = (
        f"Along the gradient the loss goes from {found.loss:.3g} to {best[0]:.3g} at the step size {best[1]:g}"
        if best[0] < found.loss
        else f"No step along the gradient from {found.step_sizes[0]:g} on lowers the loss of {found.loss:.3g}"
    )
    text += f"; the effective smoothness is {found.effective_smoothness:.3g}"
    yield text + (f", centred {centred.effective_smoothness:.3g}." if centred is not None else ".")


def _noise(diagnosis: Diagnosis) -> Iterator[str]:
    found = diagnosis.noise.found
    if found is None:
        return
    name, own = next(iter(found.layers.items()))
    yield (
        f"In {_layer(name)} the mean of a batch of {found.batch_size} is as noisy as that of {own.effective:,.0f} "
        f"independent values, of {own.elements:,.0f} that it is taken over; its distance from the normal law is "
        f"{own.mean.distance:.2f}, the variance's from the chi-square law {own.variance.distance:.2f}."
    )


def _disparity(diagnosis: Diagnosis) -> Iterator[str]:
    found = diagnosis.disparity.found
    if found is None:
        return
    worst = max(found.layers, key=lambda name: found.layers[name].rms["ema"])
    yield (
        f"With running statistics a feature is normalized {found.mean['ema']:.2g} standard deviations away from where "
        f"batches of {found.batch_size} put it in training (RMS, mean over layers; worst: {worst or '(model)'}, "
        f"{found.layers[worst].rms['ema']:.2g})."
    )
    others = {"evalnorm": "EvalNorm", "bsr": "Batch Statistics Regression"}
    listed = " and ".join(
        f"{found.mean[kind]:.2g} with {called}" for kind, called in others.items() if kind in found.kinds
    )
    if listed:
        yield f"That would be {listed}."


def _left_out(diagnosis: Diagnosis) -> Iterator[str]:
    reasons = [getattr(diagnosis, name).reason for name in PROBES]
    for reason in dict.fromkeys(filter(None, reasons)):
        yield f"Not measured: {reason.rstrip('.')}."


def _some(names: list[str]) -> str:
    if len(names) > _NAMED:
        return str(len(names))
    return f"{len(names)} ({', '.join(name or '(model)' for name in names)})"
