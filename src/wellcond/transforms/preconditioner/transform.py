"""Feature preconditioning: multiply a layer's gradient by a negative power of its input's second moment.

One transform serves both published families: feature descent (FSGD, FAdam: thesis chapter 5, p = 1) and embedded
feature whitening (W-SGDM, W-Adam: chapter 6, p = 1/2).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from wellcond.layouts import Layer
from wellcond.moments.layer_moment import LayerMoment
from wellcond.numerics.linalg import DAMPING_MODES, DampingMode, Solver, choose_solver
from wellcond.runtime.checks import Predicate, WellcondWarning, check_choice, check_fields, check_positive_integer
from wellcond.runtime.ranks import Ranks
from wellcond.transforms.base import Coverage, GradientTransform, Slot, State
from wellcond.transforms.preconditioner.factors import Power
from wellcond.transforms.preconditioner.form import Scratch
from wellcond.transforms.preconditioner.forms import MomentForm, choose_form
from wellcond.transforms.preconditioner.multiplier import Multiplier, Rule, by_rows
from wellcond.transforms.preconditioner.norm_recovery import NormRecovery
from wellcond.transforms.preconditioner.outputs import TwoSidedForm
from wellcond.transforms.preconditioner.precision import PRECISIONS, Precision, layer_dtype, product_dtype
from wellcond.transforms.preconditioner.records import averages_of, layer_moment
from wellcond.transforms.preconditioner.solves import SolveSchedule, count_of, form_of, solve, tensor_of
from wellcond.transforms.preconditioner.tied import is_embedding_and_linear
from wellcond.transforms.sharding import is_sharded_by_first_axis


@dataclass(frozen=True)
class FeaturePreconditioner(GradientTransform):
    """The base of `FeatureDescent` and `FeatureWhitening`: Ĝ = G · (M + damping)^(−p), M = E[x xᵀ] of a layer's input.

    Args:
        damping: ε, added to M's eigenvalues.
        stats_decay: α of the moving average M ← α M + (1 − α) X Xᵀ/N. 0 uses the last observed step alone (the
            thesis's momentum variant II).
        stats_every: Steps between two updates of M (T_xx in the source).
        solve_every: Steps between two factorizations of M (T_inv, T_svd in the source). Where they are expensive they
            are spread: each step takes the layers that have waited longest, until all that are due have had their turn.
        damping_mode: ``"relative"``: ε is multiplied by M's largest eigenvalue; ``"mean"``: by its mean eigenvalue,
            trace / n; ``"absolute"``: it is not.
        restore_norm: The older name of ``norm``: True is ``"restore"``, False is ``"none"``.
        norm_layers: Precondition the scale and shift of LayerNorm, GroupNorm and RMSNorm too, each channel with the
            2 × 2 second moment of (x̂, 1) (thesis 5.13).
        solve_warmup: Factorize early too, after 1, 2, 4, … times ``stats_every`` steps until ``solve_every`` is
            reached. False is the source's: its first ``solve_every`` steps use the first batch alone.
        second_moment: ``"dense"``: the formula as it stands; ``"kronecker"``: convolutions by their margins over
            channels and over kernel taps; ``"blocks"``: convolutions by one matrix over channels for each frequency of
            the taps, closer to the formula than Kronecker factors and as many times larger as there are taps;
            ``"low_rank"``: the leading directions of M and a flat tail; ``"auto"``: dense up to a width of 128, beyond
            it Kronecker factors for convolutions, of low rank from a width of 256.
        max_dim: The widest matrix that is kept and factorized; wider ones are sketched at low rank. None: no bound,
            under ``"auto"`` 1024. A table tied to a linear layer with more features than this keeps its plain gradient;
            kernel taps are not bounded.
        solver: ``"eigh"``, ``"newton_schulz"``, ``"cholesky"`` (p = 1), or ``"auto"``: by device and width. Of whole
            matrices: all other forms need eigenvectors, and take them by eigh.
        precision: Of the products with gradients: ``"float32"`` (float64 for float64 weights), ``"tf32"`` (on GPUs that
            have it; elsewhere float32), or ``"bfloat16"`` (slow on CPUs without bfloat16 instructions). Statistics and
            factorizations are float32 or wider in any case.
        where: Which layers: a predicate of (module name, module); None is every layer that has rows.
        rank: Of low-rank forms; None: an eighth of the width, at most an eighth of ``max_dim`` (or of 1024).
        gradient_momentum: β of a moving average m ← β m + G that is taken before the product (the thesis's momentum
            variant I; for an optimizer without momentum of its own). 0: none.
        norm: What norm each layer's product gets, weight and bias together. ``"restore"``: the one that its gradient
            had (thesis 5.16, 6.7), the default; ``"fixed"``: √min(out, inputs), as an orthogonal update has, whatever
            the gradient's was: it wants a lower learning rate, and decoupled weight decay; ``"none"``: its own.
        outputs: Whiten the product's rows too by their own second moment, averaged and solved at the same intervals:
            (L + 1e-3 λ_max(L) I)^(−1/2) G T, L = E[(G T)(G T)ᵀ]; beyond ``max_dim`` units (None: 1024) sketched.

    Raises:
        ValueError: If an argument is outside its range; the message names it.
    """

    exponent: ClassVar[float]

    damping: float = 0.0
    stats_decay: float = 0.95
    stats_every: int = 50
    solve_every: int = 500
    damping_mode: DampingMode = "relative"
    restore_norm: bool | None = None
    norm_layers: bool = False
    solve_warmup: bool = True
    second_moment: MomentForm = "auto"
    max_dim: int | None = None
    solver: Solver = "auto"
    precision: Precision = "float32"
    where: Predicate | None = None
    rank: int | None = None
    gradient_momentum: float = 0.0
    norm: NormRecovery | None = None
    outputs: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.damping, (int, float)) and 0 < self.damping < math.inf):
            raise ValueError(f"damping must be a positive number, got {self.damping!r}")
        for share in ("stats_decay", "gradient_momentum"):
            value = getattr(self, share)
            if not (isinstance(value, (int, float)) and 0 <= value < 1):
                raise ValueError(f"{share} must be in [0, 1), got {value!r}")
        check_choice("damping_mode", self.damping_mode, DAMPING_MODES)
        check_choice("second_moment", self.second_moment, get_args(MomentForm))
        check_choice("precision", self.precision, PRECISIONS)
        check_positive_integer("stats_every", self.stats_every)
        check_positive_integer("solve_every", self.solve_every)
        for option in ("max_dim", "rank"):
            if getattr(self, option) is not None:
                check_positive_integer(option, getattr(self, option))
        choose_solver(-self.exponent, self.damping_mode, self.solver)
        for option in ("solve_warmup", "norm_layers", "outputs"):
            if not isinstance(getattr(self, option), bool):
                raise ValueError(f"{option} must be True or False, got {getattr(self, option)!r}")
        self._choose_norm()
        if self.where is not None and not callable(self.where):
            raise ValueError(f"where must be a predicate of (name, module) or None, got {self.where!r}")
        check_fields(self)

    def _choose_norm(self) -> None:
        """Set ``norm`` from either of its names."""
        older: dict[bool | None, NormRecovery] = {None: "restore", True: "restore", False: "none"}
        if not (self.restore_norm is None or isinstance(self.restore_norm, bool)):
            raise ValueError(f"restore_norm must be True, False or None, got {self.restore_norm!r}")
        if self.norm is None:
            object.__setattr__(self, "norm", older[self.restore_norm])
        check_choice("norm", self.norm, get_args(NormRecovery))
        if self.restore_norm is not None and self.norm != older[self.restore_norm]:
            raise ValueError(
                f"norm={self.norm!r} and restore_norm={self.restore_norm} contradict each other: give norm alone"
            )

    def cover(self, layer: Layer) -> Coverage:
        """Decide whether a layer's gradient is preconditioned."""
        return self.cover_shared([layer])

    def cover_shared(self, uses: Sequence[Layer]) -> Coverage:
        """Decide about a weight by all layers that use it: their rows add up to one second moment."""
        for use in uses:
            if reason := self._refusal(use):
                shared = f" (shared with {use.name})" if use is not uses[0] else ""
                return Coverage(False, f"plain gradient: {reason}{shared}")
        layer = uses[0]
        kinds = {use.layout.family for use in uses}
        if len(kinds) > 1 and not is_embedding_and_linear(uses):
            other = next(use for use in uses if use.layout.family is not layer.layout.family)
            return Coverage(False, f"plain gradient: shared with {other.name}, a layer of another kind")
        if len(kinds) > 1 and self.max_dim is not None and layer.weight.shape[1] > self.max_dim:
            features = layer.weight.shape[1]
            return Coverage(False, f"plain gradient: a tied table of {features} features (max_dim={self.max_dim})")
        bias = len(kinds) == 1 and layer.bias is not None and layer.bias.requires_grad
        form = choose_form(uses, bias, self.second_moment, self.max_dim, self.rank, -self.exponent)
        if self.outputs:
            form = TwoSidedForm(form, layer, self.max_dim)
        size = form.state_bytes(layer_dtype(layer), product_dtype(layer, self.precision))
        if self.gradient_momentum:
            averaged = layer.weight.numel() + (layer.bias.numel() if bias and layer.bias is not None else 0)
            size += averaged * layer_dtype(layer).itemsize
        start = ", before its parametrization" if "parametrizations." in layer.name else ""
        return Coverage(True, f"preconditioned, {form.describe()}{start}", bias=bias, state_bytes=size, plan=form)

    def _refusal(self, layer: Layer) -> str | None:
        """Say why a layer's gradient stays as it is, or return None."""
        if layer.unfit or layer.weight.is_complex():
            return layer.unfit or f"its weight is complex ({layer.weight.dtype})"
        if layer.layout.kind == "norm" and not self.norm_layers:
            return "a norm layer (norm_layers=False)"
        if not layer.layout.has_rows:
            return layer.layout.missing_rows
        if self.where is not None and not self.where(layer.module_name, layer.module):
            return "not chosen by `where`"
        if not is_sharded_by_first_axis(layer.weight):
            return "its weight is sharded otherwise than along its first axis"
        return None

    def init(self, slot: Slot) -> State:
        """Start from M = 0 and no preconditioner."""
        weight = slot.layer.weight
        dtype = layer_dtype(slot.layer)
        state: State = {
            **form_of(slot).start(dtype, product_dtype(slot.layer, self.precision), weight.device),
            # 1 − αⁿ after n updates: the moving average's share that is not its zero start.
            "mass": torch.zeros((), dtype=dtype, device=weight.device),
            "skipped": torch.zeros((), dtype=torch.int64, device=weight.device),
            "step": 0,
            "updated_at": -1,
            "solved_at": -1,
            "failed": 0,
        }
        if self.gradient_momentum:
            for key, parameter in (("gradient_momentum", weight), ("gradient_momentum_of_bias", slot.bias)):
                if parameter is not None:
                    own = by_rows(slot.layer, self.outputs)
                    part = parameter if own else torch.empty(parameter.shape, device=weight.device)
                    state[key] = torch.zeros_like(part, dtype=dtype, requires_grad=False)
        return state

    # statistics -----------------------------------------------------------------------------------------------------

    def wants_inputs(self, slot: Slot) -> bool:
        """Ask for inputs from the step at which an update of M is due until one has come."""
        if not slot.state:
            return False
        step, updated_at = count_of(slot, "step"), count_of(slot, "updated_at")
        return updated_at < 0 or step // self.stats_every > updated_at // self.stats_every

    def waited(self, slot: Slot) -> int:
        """Count the steps since an update of M was last due: from 0 again every ``stats_every`` steps."""
        return count_of(slot, "step") % self.stats_every

    def observe(self, slot: Slot, layer: Layer, inputs: tuple[Any, ...]) -> list[Tensor]:
        """Sum x xᵀ over the input's rows; an input that is not finite leaves zeros and is counted.

        The device decides that; nobody waits for it.
        """
        device_type = layer.weight.device.type
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            seen = tuple(value.detach() if isinstance(value, Tensor) else value for value in inputs)
            sums = form_of(slot).observe(slot.state, layer, seen, layer_dtype(slot.layer))
            finite = torch.stack([torch.isfinite(total).all() for total in sums]).all()
            return [*(total.masked_fill_(~finite, 0.0) for total in sums), (~finite).to(sums[0].dtype)]

    def pending_like(self, slot: Slot) -> list[Tensor]:
        """Return a sum over no rows."""
        form, mass = form_of(slot), tensor_of(slot, "mass")
        sums = [torch.zeros_like(tensor_of(slot, key)) for key in form.averaged_keys()]
        return [*sums, mass.new_zeros(form.count_shape()), mass.new_zeros(())]

    def refresh(self, slots: Sequence[Slot], ranks: Ranks) -> None:
        """Take observations into M, and factorize the M of the layers whose turn it is."""
        unseen: list[str] = []
        for slot in slots:
            step = count_of(slot, "step")
            if slot.taken is not None:
                self._update_moment(slot, slot.taken)
                slot.state["updated_at"] = step
            if step == 1 and slot.unseen is not None and count_of(slot, "updated_at") < 0:
                unseen.append(slot.layer.module_name)
        schedule = SolveSchedule(self.stats_every, self.solve_every, self.solve_warmup)
        solve(schedule.whose_turn(slots), Power(-self.exponent, self.damping, self.damping_mode, self.solver), ranks)
        for slot in slots:
            slot.state["step"] = count_of(slot, "step") + 1
        if unseen:
            warnings.warn(
                f"for {len(unseen)} of {len(slots)} weights inputs were not seen, so their gradients stay as they are "
                f"({', '.join(unseen[:3])}{', …' if len(unseen) > 3 else ''}): was the model compiled and run before "
                "attaching, or is it called without its modules' forward?",
                WellcondWarning,
                stacklevel=2,
            )

    def _update_moment(self, slot: Slot, pending: Sequence[Tensor]) -> None:
        """M ← α M + (1 − α) X Xᵀ/N, without waiting for the device to say whether N is zero."""
        *sums, counts, not_finite = pending
        gain = (counts.sum() > 0).to(counts.dtype) * (1 - self.stats_decay)
        form = form_of(slot)
        for key, mean in zip(form.averaged_keys(), form.means(sums, counts), strict=True):
            tensor_of(slot, key).mul_(1 - gain).add_(gain * mean)
        tensor_of(slot, "mass").mul_(1 - gain).add_(gain)
        tensor_of(slot, "skipped").add_(not_finite.to(torch.int64))

    # gradients ------------------------------------------------------------------------------------------------------

    def update(self, slots: Sequence[Slot]) -> None:
        """Multiply each gradient by its preconditioner and give it the norm that it is to have."""
        if not slots:
            return
        shared = slots[0].shared
        multiplier: Multiplier | None = shared.get("multiplier")
        if multiplier is None or multiplier.slots is not slots:
            scratch = shared.setdefault("scratch", Scratch())
            multiplier = shared["multiplier"] = Multiplier(self._rule(), slots, scratch)
        multiplier.run()

    def _rule(self) -> Rule:
        assert self.norm is not None
        return Rule(self.norm, self.precision, self.outputs, self.stats_every, self.stats_decay, self.gradient_momentum)

    def second_moments(self, slot: Slot) -> dict[str, LayerMoment]:
        """Return M without its bias's constant, debiased; nothing before it was first updated."""
        mass = float(tensor_of(slot, "mass")) if slot.state else 0.0
        if mass == 0:
            return {}
        form = form_of(slot)
        averages = averages_of(form, slot.state, mass)
        return {use.name: layer_moment(form, use, averages) for use in slot.uses}

    def stats(self, slots: Sequence[Slot]) -> dict[str, int]:
        """Count the layers, failed factorizations, and updates skipped for inputs that were not finite.

        ``"unseen"`` counts those of whose inputs nothing was seen when it was last due, if there are any.
        """
        counts = {
            "weights": len(slots),
            "failed_solves": sum(count_of(slot, "failed") for slot in slots),
            "skipped_updates": sum(int(tensor_of(slot, "skipped")) for slot in slots),
        }
        if unseen := sum(slot.unseen is not None for slot in slots):
            counts["unseen"] = unseen
        return counts


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
        restore_norm: The older name of ``norm``.
        norm_layers: Whether LayerNorm, GroupNorm and RMSNorm are preconditioned too.
        solve_warmup: Whether to factorize early too.
        second_moment: Which form of M.
        max_dim: The widest matrix that is kept.
        solver: How to compute the power.
        precision: Of the products.
        where: Which layers.
        rank: Of low-rank forms.
        gradient_momentum: Of a moving average before the product.
        norm: Whether each layer's product gets the norm of its gradient, a fixed one, or keeps its own.
        outputs: Whether the product's rows are whitened too.

    Example:
        >>> import wellcond
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        >>> handle = wellcond.attach(optimizer, model, wellcond.FeatureDescent())
        >>> print(handle.report())
        descent over SGD
        weight  (2, 4)  preconditioned, dense 5 × 5  200 B
        bias    (2,)    together with weight
        in all: 2 of 2 parameters, 200 B kept
    """

    name: ClassVar[str] = "descent"
    exponent: ClassVar[float] = 1.0

    damping: float = 0.1
    damping_mode: DampingMode = "absolute"


@dataclass(frozen=True)
class FeatureWhitening(FeaturePreconditioner):
    """Embedded feature whitening: T = (M + ε λ_max(M) I)^(−1/2) (thesis 6.5–6.7).

    Over SGD this is W-SGDM, over AdamW W-Adam. T whitens the input, and it multiplies the gradient once. Descent as if
    the input had been whitened takes T twice: that is `FeatureDescent` (p = 1), and this is half the way to it.

    Args:
        damping: ε, relative to M's largest eigenvalue.
        stats_decay: α; see `FeaturePreconditioner`, as for all further arguments.
        stats_every: T_xx.
        solve_every: T_svd.
        damping_mode: What ε is relative to.
        restore_norm: The older name of ``norm``.
        norm_layers: Whether LayerNorm, GroupNorm and RMSNorm are preconditioned too.
        solve_warmup: Whether to factorize early too.
        second_moment: Which form of M.
        max_dim: The widest matrix that is kept.
        solver: How to compute the power.
        precision: Of the products.
        where: Which layers.
        rank: Of low-rank forms.
        gradient_momentum: Of a moving average before the product.
        norm: Whether each layer's product gets the norm of its gradient, a fixed one, or keeps its own.
        outputs: Whether the product's rows are whitened too.

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
