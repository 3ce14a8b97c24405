"""Orthogonal updates: each layer's gradient, or its momentum, becomes its polar factor, as Muon's updates are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from wellcond.layouts import Layer
from wellcond.layouts.unusual import is_sharded
from wellcond.numerics.polar import QUINTIC, Coefficients, newton_schulz_polar
from wellcond.runtime.checks import Predicate, check_choice, check_fields, check_positive_integer
from wellcond.transforms.base import Coverage, GradientTransform, Slot, State
from wellcond.transforms.hidden_weights import HiddenWeights, split
from wellcond.transforms.preconditioner.precision import (
    PRECISIONS,
    Precision,
    layer_dtype,
    product_dtype,
    tensor_cores,
)
from wellcond.transforms.sharding import local, whole, write_whole

UpdateScale = Literal["original", "match_rms_adamw", "spectral_unclamped", "none"]

CountParts: TypeAlias = "Callable[[str, nn.Module], int]"


@dataclass(frozen=True)
class Orthogonalize(GradientTransform):
    """Give every layer's matrix an orthogonal update: O = U Vᵀ of its gradient's momentum U Σ Vᵀ.

    Over ``torch.optim.SGD`` without momentum this is Muon (Jordan et al., 2024), for every layer whose layout is known:
    a convolution's filters as rows, one matrix a group and a packed projection, a transposed layer the right way round.
    It is meant for the weights inside a network: `split` says which these are. Embedding tables are left alone.

    Args:
        momentum: β of B ← β B + (1 − β) G, whose polar factor is taken; 0: of the gradient itself.
        nesterov: Whether to look ahead: the polar factor of (1 − β) G + β B.
        steps: Newton-Schulz steps (`wellcond.numerics.polar`).
        coefficients: a, b, c of the iteration.
        scale: By what O is multiplied, in torch.optim.Muon's words: ``"original"``: √max(1, out/inputs);
            ``"match_rms_adamw"``: 0.2 √max(out, inputs); ``"spectral_unclamped"``: √(out/inputs); ``"none"``: 1.
        precision: Of the products: ``"float32"`` (float64 for float64 weights), ``"tf32"``, or ``"bfloat16"``, which
            torch.optim.Muon always takes.
        where: Which layers: a predicate of (module name, module).
        parts: In how many blocks of output units each matrix is cut, each of which gets a polar factor of its own: a
            function of (module name, module). 3 for a linear layer that computes query, key and value at once, the
            number of heads to treat every head by itself. ``nn.MultiheadAttention`` packs three matrices already.

    Raises:
        ValueError: If an argument is outside its range; on attaching, if ``parts`` does not divide a layer's units.

    Example:
        >>> import wellcond
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 10))
        >>> weights = wellcond.Orthogonalize().split(model)
        >>> print(weights)
        hidden  0.weight  (8, 3, 3, 3)  orthogonal 8 × 27
        rest    0.bias    (8,)          not a matrix
        rest    2.weight  (10, 32)      the last layer
        rest    2.bias    (10,)         not a matrix
        >>> muon = torch.optim.SGD(weights.hidden, lr=0.02)
        >>> handle = wellcond.attach(muon, model, wellcond.Orthogonalize())
        >>> adamw = torch.optim.AdamW(weights.rest, lr=1e-3)
    """

    name: ClassVar[str] = "orthogonalization"

    momentum: float = 0.95
    nesterov: bool = True
    steps: int = 5
    coefficients: Coefficients = QUINTIC
    scale: UpdateScale = "original"
    precision: Precision = "float32"
    where: Predicate | None = None
    parts: CountParts | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.momentum, (int, float)) and 0 <= self.momentum < 1):
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum!r}")
        if not isinstance(self.nesterov, bool):
            raise ValueError(f"nesterov must be True or False, got {self.nesterov!r}")
        check_positive_integer("steps", self.steps)
        given: Any = self.coefficients
        if not (isinstance(given, (tuple, list)) and len(given) == 3 and all(map(_is_finite, given))):
            raise ValueError(f"coefficients must be three numbers, got {given!r}")
        check_choice("scale", self.scale, get_args(UpdateScale))
        check_choice("precision", self.precision, PRECISIONS)
        for option in ("where", "parts"):
            if getattr(self, option) is not None and not callable(getattr(self, option)):
                raise ValueError(
                    f"{option} must be a function of (name, module) or None, got {getattr(self, option)!r}"
                )
        check_fields(self)

    def split(self, model: nn.Module, outputs: Sequence[str] | None = None) -> HiddenWeights:
        """Divide a model's parameters: the weights inside it for orthogonal updates, the rest for AdamW.

        Args:
            model: The model.
            outputs: Names of the modules that make the model's output, which stay with the rest; None: the last layer,
                in the order of ``model.named_modules()``.

        Returns:
            Both lists, and a table with the reason for each parameter when printed.

        Raises:
            ValueError: If no weight is inside the model, or ``outputs`` names what is no layer.
        """
        return split(self, model, outputs)

    def cover(self, layer: Layer) -> Coverage:
        """Decide whether a weight gets orthogonal updates."""
        kind = layer.layout.kind
        refusal = {"norm": "a norm layer's scale", "embedding": "an embedding table"}.get(kind)
        if layer.unfit or layer.weight.is_complex():
            refusal = layer.unfit or f"its weight is complex ({layer.weight.dtype})"
        elif refusal is None and self.where is not None and not self.where(layer.module_name, layer.module):
            refusal = "not chosen by `where`"
        if refusal:
            return Coverage(False, f"unchanged: {refusal}")
        groups, units, *inputs = layer.matrix_shape
        parts = 1 if self.parts is None else self.parts(layer.module_name, layer.module)
        if not isinstance(parts, int) or parts < 1 or units % parts:
            raise ValueError(
                f"parts must divide the output units of every matrix: '{layer.name}' has {units}, parts is {parts!r}"
            )
        count = f"{groups * parts} of " if groups * parts > 1 else ""
        size = layer.weight.numel() * layer_dtype(layer).itemsize if self.momentum else 0
        return Coverage(True, f"orthogonal {count}{units // parts} × {math.prod(inputs)}", state_bytes=size, plan=parts)

    def init(self, slot: Slot) -> State:
        """Start from B = 0."""
        if not self.momentum:
            return {}
        weight = slot.layer.weight
        return {"momentum": torch.zeros_like(weight, dtype=layer_dtype(slot.layer), requires_grad=False)}

    def update(self, slots: Sequence[Slot]) -> None:
        """Put the scaled polar factors in the gradients' place."""
        with tensor_cores(self.precision):
            for slot in slots:
                self._orthogonalize(slot)

    def _orthogonalize(self, slot: Slot) -> None:
        layer, gradient = slot.layer, slot.layer.weight.grad
        assert gradient is not None
        used = gradient.to(layer_dtype(layer), copy=True)
        self._average(slot, local(used))
        # Every rank that has a part of the weight computes the whole.
        gathered = whole(used)
        matrix = layer.matrix(gathered)
        groups, units, *inputs = matrix.shape
        rows = matrix.reshape(groups * slot.coverage.plan, units // slot.coverage.plan, -1)
        factor = newton_schulz_polar(rows.to(product_dtype(layer, self.precision)), self.steps, self.coefficients)
        matrix.copy_(factor.reshape(groups, units, *inputs))
        gathered.mul_(self._scale_of(*rows.shape[1:]))
        if slot.grad_scale is not None:
            gathered.mul_(slot.grad_scale)
        if is_sharded(gradient):
            write_whole(gradient, gathered.to(gradient.dtype))
        else:
            gradient.copy_(gathered)

    def _average(self, slot: Slot, gradient: Tensor) -> None:
        """Put B, or what looks ahead of it, in a gradient's place; a step that will be skipped leaves B alone."""
        if slot.grad_scale is not None:
            gradient.div_(slot.grad_scale)
        if not self.momentum:
            return
        average = slot.state["momentum"]
        assert isinstance(average, Tensor)
        average = local(average)
        latest = average.lerp(gradient, 1 - self.momentum)
        if slot.found_inf is not None:
            latest = torch.where(slot.found_inf > 0, average, latest)
        average.copy_(latest)
        gradient.copy_(gradient.lerp(latest, self.momentum) if self.nesterov else latest)

    def _scale_of(self, units: int, inputs: int) -> float:
        if self.scale == "original":
            return math.sqrt(max(1, units / inputs))
        if self.scale == "match_rms_adamw":
            return 0.2 * math.sqrt(max(units, inputs))
        return math.sqrt(units / inputs) if self.scale == "spectral_unclamped" else 1.0


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
