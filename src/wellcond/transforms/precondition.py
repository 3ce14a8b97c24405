"""Feature preconditioning: multiply a layer's gradient by a negative power of its input's second moment.

One transform serves both published families: feature descent (FSGD, FAdam: thesis chapter 5, p = 1) and embedded
feature whitening (W-SGDM, W-Adam: chapter 6, p = 1/2).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wellcond.layouts import Layer
from wellcond.linalg import DAMPING_MODES, DampingMode, Solver, choose_solver, try_symmetric_power
from wellcond.transforms.base import (
    Coverage,
    GradientTransform,
    Predicate,
    Slot,
    State,
    WellcondWarning,
    check_choice,
    check_positive_integer,
)
from wellcond.transforms.second_moment import raw_second_moment, second_moment_shape, statistics_dtype
from wellcond.transforms.sharding import is_sharded, local, rows_are_whole, sum_over_shards


def joint_gradient(slot: Slot) -> Tensor:
    """Return a layer's weight and bias gradient as one matrix per group.

    Args:
        slot: The layer's slot; its weight has a gradient, its bias may lack one (then zeros stand for it).

    Returns:
        Shape [groups, out, d], in the precision of the statistics; the rows of this rank if the weight is sharded.
    """
    weight = slot.layer.weight
    assert weight.grad is not None
    matrix = slot.layer.matrix(local(weight.grad)).flatten(2).to(statistics_dtype(slot.layer))
    if slot.bias is None:
        return matrix
    bias = torch.zeros_like(slot.bias) if slot.bias.grad is None else slot.bias.grad
    return torch.cat([matrix, local(bias).to(matrix.dtype).reshape(*matrix.shape[:2], 1)], dim=2)


def write_joint_gradient(slot: Slot, matrix: Tensor) -> None:
    """Write what `joint_gradient` returned, changed, back into the gradients.

    Args:
        slot: The layer's slot.
        matrix: Shape [groups, out, d].
    """
    weight = slot.layer.weight
    assert weight.grad is not None
    target = slot.layer.matrix(local(weight.grad))
    if slot.bias is not None:
        if slot.bias.grad is not None:
            bias = local(slot.bias.grad)
            bias.copy_(matrix[..., -1].reshape_as(bias))
        matrix = matrix[..., :-1]
    target.copy_(matrix.reshape(target.shape))


def norm_ratios(slots: Sequence[Slot], originals: Sequence[Tensor], changed: Sequence[Tensor]) -> list[Tensor]:
    """Return ‖original‖ / ‖changed‖ of each layer, by which norm recovery multiplies (thesis 5.16, 6.7).

    Args:
        slots: The layers; where weights are sharded (FSDP2) their ranks' norms are added in one collective per mesh.
        originals: Their gradients, of this rank.
        changed: Their preconditioned gradients, of this rank.

    Returns:
        A scalar tensor per layer; finite where ``changed`` is zero.
    """
    norms = list(zip(torch._foreach_norm(list(originals)), torch._foreach_norm(list(changed)), strict=True))
    if any(is_sharded(slot.layer.weight) for slot in slots):
        squares = [torch.stack(pair).square() for pair in norms]
        sums = sum_over_shards(squares, [slot.layer.weight for slot in slots])
        norms = [(total[0].sqrt(), total[1].sqrt()) for total in sums]
    return [original / new.clamp_min(torch.finfo(new.dtype).tiny) for original, new in norms]


@dataclass(frozen=True)
class FeaturePreconditioner(GradientTransform):
    """What `FeatureDescent` and `FeatureWhitening` share: Ĝ = G · (M + damping)^(−p), M = E[x xᵀ] of the layer's input.

    Args:
        damping: ε, added to M's eigenvalues.
        stats_decay: α of the moving average M ← α M + (1 − α) X Xᵀ/N.
        stats_every: Steps between two updates of M (T_xx in the source).
        solve_every: Steps between two factorizations of M (T_inv, T_svd in the source).
        damping_mode: ``"relative"``: ε is multiplied by M's largest eigenvalue; ``"absolute"``: it is not.
        restore_norm: Scale each layer's gradient back to the norm it had (thesis 5.16, 6.7).
        solve_warmup: Factorize early too, after 1, 2, 4, … times ``stats_every`` steps until ``solve_every`` is
            reached. False is the source's: its first ``solve_every`` steps use the first batch alone.
        solver: ``"eigh"``, ``"cholesky"`` (p = 1 with absolute damping), or ``"auto"``.
        where: Which layers: a predicate of (module name, module); None is every layer that has rows.

    Raises:
        ValueError: If an argument is outside its range; the message names it.
    """

    exponent: ClassVar[float]

    damping: float = 0.0
    stats_decay: float = 0.95
    stats_every: int = 50
    solve_every: int = 500
    damping_mode: DampingMode = "relative"
    restore_norm: bool = True
    solve_warmup: bool = True
    solver: Solver = "auto"
    where: Predicate | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.damping, (int, float)) and 0 < self.damping < math.inf):
            raise ValueError(f"damping must be a positive number, got {self.damping!r}")
        if not (isinstance(self.stats_decay, (int, float)) and 0 <= self.stats_decay < 1):
            raise ValueError(f"stats_decay must be in [0, 1), got {self.stats_decay!r}")
        check_choice("damping_mode", self.damping_mode, DAMPING_MODES)
        check_positive_integer("stats_every", self.stats_every)
        check_positive_integer("solve_every", self.solve_every)
        choose_solver(-self.exponent, self.damping_mode, self.solver)
        for option in ("solve_warmup", "restore_norm"):
            if not isinstance(getattr(self, option), bool):
                raise ValueError(f"{option} must be True or False, got {getattr(self, option)!r}")
        if self.where is not None and not callable(self.where):
            raise ValueError(f"where must be a predicate of (name, module) or None, got {self.where!r}")

    def cover(self, layer: Layer) -> Coverage:
        """Decide whether a layer's gradient is preconditioned."""
        if not layer.layout.has_rows:
            return Coverage(False, f"plain gradient: {layer.layout.missing_rows}")
        if self.where is not None and not self.where(layer.module_name, layer.module):
            return Coverage(False, "plain gradient: not chosen by `where`")
        if not rows_are_whole(layer):
            return Coverage(False, "plain gradient: its weight is sharded otherwise than by output units")
        bias = layer.bias is not None and layer.bias.requires_grad
        groups, width = second_moment_shape(layer, bias)
        shape = f"{groups} × {width} × {width}" if groups > 1 else f"{width} × {width}"
        size = 2 * groups * width * width * statistics_dtype(layer).itemsize
        return Coverage(True, f"preconditioned, dense {shape}", bias=bias, state_bytes=size)

    def init(self, slot: Slot) -> State:
        """Start from M = 0 and no preconditioner."""
        groups, width = second_moment_shape(slot.layer, slot.coverage.bias)
        weight = slot.layer.weight
        dtype = statistics_dtype(slot.layer)
        return {
            "second_moment": torch.zeros(groups, width, width, dtype=dtype, device=weight.device),
            # 1 − αⁿ after n updates: the moving average's share that is not its zero start.
            "mass": torch.zeros((), dtype=dtype, device=weight.device),
            "preconditioner": torch.eye(width, dtype=dtype, device=weight.device).repeat(groups, 1, 1),
            "skipped": torch.zeros((), dtype=torch.int64, device=weight.device),
            "step": 0,
            "updated_at": -1,
            "solved_at": -1,
            "failed": 0,
        }

    def wants_inputs(self, slot: Slot) -> bool:
        """Ask for inputs from the step at which an update of M is due until one has come."""
        step, updated_at = _count(slot, "step"), _count(slot, "updated_at")
        return updated_at < 0 or step // self.stats_every > updated_at // self.stats_every

    def observe(self, slot: Slot, layer: Layer, inputs: Tensor) -> list[Tensor]:
        """Sum x xᵀ over the input's rows."""
        return raw_second_moment(layer, inputs, slot.coverage.bias, statistics_dtype(slot.layer))

    def pending_like(self, slot: Slot) -> list[Tensor]:
        """Return a sum over no rows."""
        moment = _tensor(slot, "second_moment")
        return [torch.zeros_like(moment), *(torch.zeros_like(_tensor(slot, "mass")) for _ in range(2))]

    def refresh(self, slots: Sequence[Slot]) -> None:
        """Take observations into M, and factorize the M of the layers whose turn it is."""
        unseen: list[str] = []
        for slot in slots:
            if slot.pending is not None:
                self._update_moment(slot, *slot.pending)
                slot.state["updated_at"] = _count(slot, "step")
            step, solved_at = _count(slot, "step"), _count(slot, "solved_at")
            if _count(slot, "updated_at") >= 0 and self._solves_until(step) > self._solves_until(solved_at):
                self._solve(slot, step)
            if step == 1 and _count(slot, "updated_at") < 0 and slot.layer.weight.grad is not None:
                unseen.append(slot.layer.module_name)
            slot.state["step"] = step + 1
        if unseen:
            warnings.warn(
                f"{len(unseen)} layers have gradients but their inputs were not seen, so these stay as they are "
                f"({', '.join(unseen[:3])}{', …' if len(unseen) > 3 else ''}): was the model compiled and run before "
                "attaching, or is it called without its modules' forward?",
                WellcondWarning,
                stacklevel=2,
            )

    def update(self, slots: Sequence[Slot]) -> None:
        """Multiply each gradient by its preconditioner and give it its norm back."""
        if not slots:
            return
        originals = [joint_gradient(slot) for slot in slots]
        changed = [g @ _tensor(slot, "preconditioner") for g, slot in zip(originals, slots, strict=True)]
        if self.restore_norm:
            ratios = norm_ratios(slots, originals, changed)
            torch._foreach_mul_(changed, ratios)
        for slot, gradient in zip(slots, changed, strict=True):
            write_joint_gradient(slot, gradient)

    def stats(self, slots: Sequence[Slot]) -> dict[str, int]:
        """Count the layers, failed factorizations, and updates skipped for inputs that were not finite."""
        return {
            "weights": len(slots),
            "failed_solves": sum(_count(slot, "failed") for slot in slots),
            "skipped_updates": sum(int(_tensor(slot, "skipped")) for slot in slots),
        }

    def _update_moment(self, slot: Slot, total: Tensor, count: Tensor, not_finite: Tensor) -> None:
        """M ← α M + (1 − α) X Xᵀ/N, without waiting for the device to say whether N is zero."""
        seen = count > 0
        gain = seen.to(total.dtype) * (1 - self.stats_decay)
        mean = total / count.clamp_min(1)
        _tensor(slot, "second_moment").mul_(1 - gain).add_(gain * mean)
        _tensor(slot, "mass").mul_(1 - gain).add_(gain)
        _tensor(slot, "skipped").add_(not_finite.to(torch.int64))

    def _solve(self, slot: Slot, step: int) -> None:
        """T ← (M + damping)^(−p); the last good T stays if that fails."""
        mass = _tensor(slot, "mass")
        if not bool(mass > 0):
            return  # nothing seen yet (every input so far was not finite): this solve stays due
        slot.state["solved_at"] = step
        moment = _tensor(slot, "second_moment") / mass
        power = try_symmetric_power(
            moment, -self.exponent, self.damping, damping_mode=self.damping_mode, solver=self.solver
        )
        if power is None:
            if _count(slot, "failed") == 0:
                warnings.warn(
                    f"the second moment of layer '{slot.layer.module_name}' could not be factorized: "
                    "its last good preconditioner stays in use (counted in handle.stats())",
                    WellcondWarning,
                    stacklevel=2,
                )
            slot.state["failed"] = _count(slot, "failed") + 1
        else:
            # In one memory layout, whatever the solver returned: products after a resume then agree bit for bit.
            slot.state["preconditioner"] = power.contiguous()

    def _solves_until(self, step: int) -> int:
        """Count the scheduled factorizations at steps 0 … step: it grows exactly where one is due."""
        if step < 0:
            return 0
        regular = step // self.solve_every + 1
        if not self.solve_warmup:
            return regular
        # stats_every · 2^k for k = 0, 1, … below solve_every, as far as they have been reached.
        reached = min(step, self.solve_every - 1) // self.stats_every
        return regular + reached.bit_length()


def _tensor(slot: Slot, key: str) -> Tensor:
    value = slot.state[key]
    assert isinstance(value, Tensor)
    return value


def _count(slot: Slot, key: str) -> int:
    value = slot.state[key]
    assert isinstance(value, int)
    return value


@dataclass(frozen=True)
class FeatureDescent(FeaturePreconditioner):
    """Feature descent: the steepest descent step on a layer's *outputs*, T = (M + ε I)^(−1) (thesis 5.7–5.16).

    Over SGD this is FSGD, over AdamW FAdam. M is the input's second moment per row, debiased; ε is absolute.

    Args:
        damping: ε; 0.1 was best of 1e-3 … 1 in the source (table 5.8).
        stats_decay: α; see `FeaturePreconditioner`, as for all further arguments.
        stats_every: T_xx.
        solve_every: T_inv.
        damping_mode: What ε is relative to.
        restore_norm: Whether each layer's gradient gets its norm back.
        solve_warmup: Whether to factorize early too.
        solver: How to invert.
        where: Which layers.

    Example:
        >>> import wellcond
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        >>> handle = wellcond.attach(optimizer, model, wellcond.FeatureDescent())
        >>> print(handle.report())
        descent over SGD
        weight  (2, 4)  preconditioned, dense 5 × 5  200 B
        bias    (2,)    together with weight
    """

    name: ClassVar[str] = "descent"
    exponent: ClassVar[float] = 1.0

    damping: float = 0.1
    damping_mode: DampingMode = "absolute"


@dataclass(frozen=True)
class FeatureWhitening(FeaturePreconditioner):
    """Embedded feature whitening: T = (M + ε λ_max(M) I)^(−1/2) (thesis 6.5–6.7).

    Over SGD this is W-SGDM, over AdamW W-Adam. It is gradient descent as if the layer's input had been whitened.

    Args:
        damping: ε, relative to M's largest eigenvalue.
        stats_decay: α; see `FeaturePreconditioner`, as for all further arguments.
        stats_every: T_xx.
        solve_every: T_svd.
        damping_mode: What ε is relative to.
        restore_norm: Whether each layer's gradient gets its norm back.
        solve_warmup: Whether to factorize early too.
        solver: How to compute the power.
        where: Which layers.

    Example:
        >>> import wellcond
        >>> model = torch.nn.Conv2d(3, 8, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        >>> handle = wellcond.attach(optimizer, model, wellcond.FeatureWhitening(where=lambda name, module: True))
        >>> handle.stats()
        {'whitening': {'weights': 1, 'failed_solves': 0, 'skipped_updates': 0}}
    """

    name: ClassVar[str] = "whitening"
    exponent: ClassVar[float] = 0.5

    damping: float = 1e-3
    damping_mode: DampingMode = "relative"
