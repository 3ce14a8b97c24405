"""Numbers worth logging, read from what transforms keep: no work is done for them unless they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from wellcond.transforms.base import GradientTransform, Slot, TransformSlots
from wellcond.transforms.sharding import local

MetricValue: TypeAlias = "float | Tensor"

_MOMENT = "second_moment"


class GradientMetrics:
    """Compares gradients before and after the transforms, in the step after it was asked to.

    That step keeps a copy of the covered weights' gradients until they are transformed; no other step does anything.
    """

    def __init__(self) -> None:
        self._asked = False
        self._found: dict[str, Tensor] = {}

    def take(self) -> dict[str, Tensor]:
        """Return what the last comparison found, and ask for another in the next step.

        Returns:
            By layer: ⟨g, ĝ⟩, ‖g‖² and ‖ĝ‖², shape [3], on the weight's device.
        """
        self._asked = True
        return self._found

    def before(self, slots: TransformSlots) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the gradients that are about to be transformed, with their weights, if a comparison was asked for."""
        if not self._asked:
            return {}
        weights = {slot.layer.name: slot.layer.weight for _, slot in slots}
        return {
            name: (weight, _flat(weight.grad).clone()) for name, weight in weights.items() if weight.grad is not None
        }

    def after(self, before: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Compare gradients with what they were."""
        if not before:
            return
        self._asked = False
        self._found = {}
        for name, (weight, gradient) in before.items():
            if weight.grad is not None:
                changed = _flat(weight.grad)
                self._found[name] = torch.stack([gradient @ changed, gradient @ gradient, changed @ changed])


def read_metrics(
    slots: TransformSlots, gradients: GradientMetrics, by_layer: bool, spectra: bool, synchronize: bool
) -> dict[str, MetricValue]:
    """Return what is worth logging of transforms; see `Attachment.metrics`."""
    found = _of_gradients(gradients.take(), by_layer)
    of_layers: dict[str, dict[str, MetricValue]] = {}
    for transform, slot in slots:
        for key, value in _of_slot(transform, slot, spectra).items():
            of_layers.setdefault(f"{transform.name}/{key}", {})[slot.layer.name] = value
    for key, values in of_layers.items():
        found[key] = _summed_up(key, list(values.values()))
        if by_layer:
            found |= {f"{key}/{layer}": value for layer, value in values.items()}
    return {key: _number(value, synchronize) for key, value in found.items()}


def _of_gradients(products: dict[str, Tensor], by_layer: bool) -> dict[str, MetricValue]:
    if not products:
        return {}
    first = next(iter(products.values()))
    sums = {"": torch.stack([product.to(first.device) for product in products.values()]).sum(0)}
    if by_layer:
        sums |= {f"/{layer}": product for layer, product in products.items()}
    found: dict[str, MetricValue] = {}
    for suffix, (dot, before, after) in sums.items():
        # Of a gradient of zeros there is no direction: NaN, not a number that looks like one.
        found[f"gradient/cosine{suffix}"] = dot / (before * after).sqrt()
        found[f"gradient/norm_ratio{suffix}"] = (after / before).sqrt()
    return found


def _of_slot(transform: GradientTransform, slot: Slot, spectra: bool) -> dict[str, MetricValue]:
    state = slot.state
    found: dict[str, MetricValue] = {}
    step, solved_at = state.get("step"), state.get("solved_at")
    if isinstance(step, int) and isinstance(solved_at, int) and solved_at >= 0:
        found["age"] = float(step - 1 - solved_at)
    moments = [
        value for key, value in state.items() if key.endswith(_MOMENT) and isinstance(value, Tensor) and value.dim() > 1
    ]
    mass = state.get("mass")
    if not moments or not isinstance(mass, Tensor) or state.get("updated_at") == -1:
        return found
    # A Kronecker product's trace and norm are the products of its factors'.
    ranks = [_effective_rank(moment) for moment in moments]
    found["effective_rank"] = torch.stack(ranks).prod()
    if spectra:
        conditions = [_condition(moment / mass, transform) for moment in moments]
        found["condition"] = torch.stack(conditions).prod()
    return found


def _effective_rank(moment: Tensor) -> Tensor:
    """Return (Σλ)² / Σλ², the mean over groups, without eigenvalues; of a diagonal, shape [groups, n], likewise."""
    if moment.dim() == 2:
        trace, squares = moment.sum(-1), moment.square().sum(-1)
    else:
        trace = moment.diagonal(dim1=-2, dim2=-1).real.sum(-1)
        squares = moment.abs().square().sum((-2, -1))
    return (trace.square() / squares).mean()


def _condition(moment: Tensor, transform: GradientTransform) -> Tensor:
    """Return (λ_max + ε) / (λ_min + ε) with the transform's damping ε, the largest of the groups."""
    values = moment.sort(-1).values if moment.dim() == 2 else torch.linalg.eigvalsh(moment)
    values = values.clamp_min(0)
    damping = float(getattr(transform, "damping", 0.0))
    mode = getattr(transform, "damping_mode", "absolute")
    scales: dict[str, Callable[[], MetricValue]] = {
        "relative": lambda: values[..., -1],
        "mean": lambda: values.mean(-1),
        "absolute": lambda: 1.0,
    }
    added = damping * scales[mode]()
    return ((values[..., -1] + added) / (values[..., 0] + added)).max()


def _summed_up(key: str, values: Sequence[MetricValue]) -> MetricValue:
    """Return the oldest age; of all else the median of the layers."""
    if key.endswith("/age"):
        return max(float(value) for value in values)
    tensors = [torch.as_tensor(value) for value in values]
    return torch.stack([value.to(tensors[0].device) for value in tensors]).median()


def _number(value: MetricValue, synchronize: bool) -> MetricValue:
    waits = isinstance(value, Tensor) and value.device.type != "cpu"
    return value if waits and not synchronize else float(value)


def _flat(gradient: Tensor) -> Tensor:
    flat = local(gradient).flatten()
    return (
        torch.view_as_real(flat).flatten()
        if flat.is_complex()
        else flat.to(torch.promote_types(flat.dtype, torch.float32))
    )
