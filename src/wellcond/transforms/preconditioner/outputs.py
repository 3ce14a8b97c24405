"""The output side: a preconditioned gradient's rows, whitened by their own second moment.

With P = G T the product of the input side, one row an output unit, L averages P Pᵀ and the gradient becomes
(L + damping)^(−1/2) P: both sides of the weight are whitened. Of one step alone, undamped, that is P's polar factor, as
an orthogonal update is; the average over steps is what one factorization in many steps can follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wellcond.layouts import Layer
from wellcond.transforms.base import Slot, State
from wellcond.transforms.preconditioner.factors import Factor, Power, SketchedFactor, WholeFactor
from wellcond.transforms.preconditioner.form import Form, Scratch, keyed
from wellcond.transforms.preconditioner.forms import DEFAULT_MAX_DIM

# The gradient's scale is nobody's to know: relative to the largest eigenvalue, in every damping mode of the inputs.
OUTPUT_POWER = Power(-0.5, 1e-3, "relative")


class TwoSidedForm(Form):
    """A form of the input's second moment, and one factor over the product's rows.

    Args:
        inner: The form of the input's second moment.
        layer: The layer that stands for all uses of the weight.
        max_dim: The widest matrix over output units that is kept (None: 1024); a wider one is sketched.
    """

    def __init__(self, inner: Form, layer: Layer, max_dim: int | None) -> None:
        super().__init__(layer, inner.bias)
        self.inner = inner
        prefix, limit = "outputs_", max_dim or DEFAULT_MAX_DIM
        self.output: Factor = WholeFactor(self.groups, self.units, prefix)
        if self.units > limit:
            self.output = SketchedFactor(self.groups, self.units, max(1, limit // 8), prefix)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Those of the inputs, and the one of the outputs."""
        return (*self.inner.factors, self.output)

    def start(self, dtype: torch.dtype, product_dtype: torch.dtype, device: torch.device) -> State:
        """Make the state, with a moving average and a count of the outputs' own."""
        return {
            **super().start(dtype, product_dtype, device),
            "outputs_mass": torch.zeros((), dtype=dtype, device=device),
            "outputs_updated_at": -1,
        }

    def observe(self, state: State, layer: Layer, inputs: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
        """Sum what the inputs' factors average."""
        return self.inner.observe(state, layer, inputs, dtype)

    def averaged_keys(self) -> list[str]:
        """Return the keys of what is averaged over inputs."""
        return self.inner.averaged_keys()

    def means(self, sums: Sequence[Tensor], counts: Tensor) -> list[Tensor]:
        """Divide the inputs' sums."""
        return self.inner.means(sums, counts)

    def count_shape(self) -> tuple[int, ...]:
        """Return the shape of the numbers of input rows."""
        return self.inner.count_shape()

    def solve(self, state: State, mass: Tensor, power: Power) -> dict[str, Tensor] | None:
        """Solve the inputs' factors with the power that is asked for, the outputs' with −1/2 once there are some."""
        found, seen = self.inner.solve(state, mass, power), state["outputs_mass"]
        assert isinstance(seen, Tensor)
        if found is None or not bool(seen > 0):
            return found
        solved = keyed(self.output, self.output.solve(state, seen, OUTPUT_POWER))
        return None if solved is None else found | solved

    def apply(
        self, state: State, weight: Tensor, bias: Tensor | None, scratch: Scratch, *, scaled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Multiply on the inputs' side, in the scale that the outputs' average needs."""
        return self.inner.apply(state, weight, bias, scratch, scaled=True)

    def multiply(
        self, state: State, weight: Tensor, bias: Tensor | None, scratch: Scratch, *, scaled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Multiply by factors on the inputs' side, likewise."""
        return self.inner.multiply(state, weight, bias, scratch, scaled=True)

    def describe(self) -> str:
        """Name both sides."""
        return f"{self.inner.describe()}, outputs {self.output.describe()}"


def whiten_outputs(
    slot: Slot, weight: Tensor, bias: Tensor | None, scratch: Scratch, every: int, decay: float
) -> tuple[Tensor, Tensor | None]:
    """Multiply a product of the input side with the power of its rows' second moment, and take it into that, if due.

    Args:
        slot: Whose coverage's plan is a `TwoSidedForm`; its state is changed.
        weight: P, shape [groups, out, *inputs]; may be overwritten.
        bias: Its further column, shape [groups, out], or None.
        scratch: Memory for the result.
        every: Steps between two updates of the average.
        decay: α of the average L ← α L + (1 − α) P Pᵀ.

    Returns:
        Both, of the same shapes; valid until the next call with this scratch.
    """
    form = slot.coverage.plan
    assert isinstance(form, TwoSidedForm)
    groups, units, *inputs = weight.shape
    width = weight[0, 0].numel()
    rows = scratch.take("outputs", (groups, width + (bias is not None), units), weight).mT
    rows[..., :width].unflatten(2, tuple(inputs)).copy_(weight)
    if bias is not None:
        rows[..., width] = bias
    _take_in(slot, form, rows, every, decay)
    product = form.output.multiply(
        slot.state, rows.mT, scratch.take("output product", rows.mT.shape, rows), scaled=True
    ).mT
    return product[..., :width].unflatten(2, tuple(inputs)), None if bias is None else product[..., width]


def _take_in(slot: Slot, form: TwoSidedForm, rows: Tensor, every: int, decay: float) -> None:
    """L ← α L + (1 − α) P Pᵀ, once in a step where it is due; a product that is not finite leaves L as it was."""
    done, step = slot.state["step"], slot.state["outputs_updated_at"]
    assert isinstance(done, int)
    assert isinstance(step, int)
    # The step's refresh has counted it already; a closure may run several times in it.
    now = done - 1
    if step >= 0 and now // every <= step // every:
        return
    slot.state["outputs_updated_at"] = now
    mass = slot.state["outputs_mass"]
    assert isinstance(mass, Tensor)
    scaled = rows.mT.to(mass.dtype)
    if slot.grad_scale is not None:
        scaled = scaled / slot.grad_scale
    sums = form.output.from_rows(slot.state, scaled)
    usable = torch.stack([torch.isfinite(total).all() for total in sums]).all()
    if slot.found_inf is not None:
        usable = usable & (slot.found_inf == 0)
    gain = usable.to(mass.dtype) * (1 - decay)
    for name, total in zip(form.output.averaged, sums, strict=True):
        form.output.tensor(slot.state, name).mul_(1 - gain).add_(gain * total.masked_fill(~usable, 0.0))
    mass.mul_(1 - gain).add_(gain)
