"""Batch Statistics Regression (thesis ch. 3): evaluation predicts, for each instance, the statistics of its batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.nn.functional.batch_statistics_regression import (
    NormalEquations,
    check_nonneg,
    normal_equations,
    solve_mean,
    solve_var,
)
from wellcond.nn.functional.normalize import normalize
from wellcond.nn.norm.base import BatchStatistics
from wellcond.nn.norm.instance import InstanceInference
from wellcond.runtime.checks import checked
from wellcond.runtime.ranks import Ranks
from wellcond.runtime.tracing import is_script_traced, is_transformed

# In `var_weights`, which are never negative: not solved yet. Any average with it is negative, too.
_UNSOLVED = torch.finfo(torch.float32).min
REGRESSION_SUMS = ("mean_gram", "mean_target", "var_gram", "var_target")
"""The buffers of the regressions' sums, in the order of `NormalEquations`."""


class _Solved(NamedTuple):
    """What the regressions were last solved from: copies of the values."""

    nonneg: str
    buffers: list[Tensor]


class BSRBatchNorm(InstanceInference):
    """Batch Statistics Regression of inputs of any number of dimensions; use `BSRBatchNorm1d`, `2d` or `3d`."""

    transient = ("mean_weights", "var_weights")
    mean_gram: Tensor
    mean_target: Tensor
    var_gram: Tensor
    var_target: Tensor
    mean_weights: Tensor
    var_weights: Tensor

    @checked
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        nonneg: str = "clamp",
        *,
        exact: bool = True,
        group_size: int | None = None,
        synchronize: bool | dist.ProcessGroup = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_nonneg(nonneg)
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            group_size=group_size,
            synchronize=synchronize,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.nonneg = nonneg
        self.exact = exact
        assert self.running_mean is not None
        sums = torch.float32 if self.running_mean.device.type == "mps" else torch.float64
        for name, shape in zip(REGRESSION_SUMS, ((2, 2), (2,), (3, 3), (3,)), strict=True):
            zeros = torch.zeros(num_features, *shape, dtype=sums, device=self.running_mean.device)
            self.register_buffer(name, zeros)
        # Solved from the sums, so they need no place in a checkpoint.
        for name, width in (("mean_weights", 2), ("var_weights", 3)):
            zeros = torch.zeros(num_features, width, dtype=torch.float32, device=self.running_mean.device)
            self.register_buffer(name, zeros, persistent=False)
        self._solved: _Solved | None = None
        self.var_weights.fill_(_UNSOLVED)

    def normalize_batch(self, input: Tensor) -> Tensor:
        """Normalize as batch normalization, and take the batch into the regression's sums."""
        if self.updates and self._solved is not None:
            self._unsolve()
        batch = self.observe(input, with_instances=True)
        if not self._can_be_exact():
            self.track(batch.moments)
            self._regress(batch)
            own = batch.moments
            return normalize(
                input, own.mean, own.var, self.weight, self.bias, self.eps, own, 1.0, batch.sizes, batch.all_reduce
            )
        factor = 0.0
        if self.updates:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        mean, var = self.running_mean, self.running_var
        assert mean is not None
        assert var is not None
        if not self.updates:
            # What is saved must look as it did the first time, so there are statistics to update, but not these.
            mean, var = mean.clone(), var.clone()
        # Torch's own kernel, so that training is what it was, bit for bit.
        output = F.batch_norm(
            input,
            mean,
            var,
            self._weight(),
            self._bias(),
            True,
            factor,
            self.eps,
        )
        self._regress(batch)
        return output

    def _can_be_exact(self) -> bool:
        """Whether torch's kernel does what is asked for; the factor of equal weights must be looked at for that."""
        if self.momentum is None and (torch.compiler.is_compiling() or self.mean_gram.is_meta):
            return False
        # Torch's kernel takes no ε of 0, as old checkpoints of frozen layers have it.
        return self.exact and self.group_size is None and self.synchronize is False and self.eps > 0

    def _regress(self, batch: BatchStatistics) -> None:
        """Add a batch to the sums (3.13)."""
        if not self.updates:
            return
        assert batch.instances is not None
        assert self.running_mean is not None
        with torch.no_grad():
            new = normal_equations(batch.instances, batch.moments, batch.sizes, self.running_mean, self.mean_gram.dtype)
            if batch.all_reduce is not None:
                Ranks(self.synchronize).add(list(new))
            factor = self.factor()
            for name, value in zip(REGRESSION_SUMS, new, strict=True):
                buffer = getattr(self, name)
                buffer.lerp_(value, factor.to(buffer.dtype) if isinstance(factor, Tensor) else factor)

    def solve(self) -> None:
        """Solve the regressions; done by itself wherever the layer evaluates with other sums than it has solved."""
        for name, value in zip(self.transient, self._solution(), strict=True):
            buffer = self._buffers[name]
            assert buffer is not None
            if buffer.device == value.device and not buffer.is_inference():
                buffer.copy_(value)
            else:
                self._buffers[name] = value.to(buffer.dtype)
        self._solved = _Solved(self.nonneg, [buffer.detach().clone() for buffer in self._solved_from()])

    def _solution(self) -> tuple[Tensor, Tensor]:
        """Return α and β."""
        assert self.running_mean is not None
        assert self.running_var is not None
        with torch.no_grad():
            sums = NormalEquations(*(getattr(self, name) for name in REGRESSION_SUMS))
            mean, var = (part.to(sums.mean_gram.dtype) for part in (self.running_mean, self.running_var))
            alpha = solve_mean(sums.mean_gram, sums.mean_target, mean)
            return alpha, solve_var(sums.var_gram, sums.var_target, var, self.nonneg)

    def _solved_from(self) -> list[Tensor]:
        """Return all buffers that a solution depends on: each may have been written to from outside."""
        return [getattr(self, name) for name in (*REGRESSION_SUMS, "running_mean", "running_var")]

    def _unsolve(self) -> None:
        """Mark the solution as one of other sums; whoever copies all buffers copies the mark."""
        self._solved = None
        with torch.no_grad():
            self.var_weights.fill_(_UNSOLVED)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """Return α and β, solved anew if any of the buffers has changed since they were solved.

        Averaged models, loaded checkpoints and swapped parameters write into buffers in place, also through `.data`,
        which leaves no trace but the values: so these are compared. It costs some 30 µs, and a wait for the device.
        """
        kept = self.mean_weights, self.var_weights
        if torch.compiler.is_compiling():
            # An exported program takes the solution of the change to evaluation for constants.
            return kept if torch.compiler.is_exporting() else self._solution()
        if is_script_traced() or self._is_captured():
            return kept
        if is_transformed() or not self._has_values():
            return self._solution()
        if not self._is_solved():
            self.solve()
        return self.mean_weights, self.var_weights

    def _is_solved(self) -> bool:
        if self._solved is None or self._solved.nonneg != self.nonneg:
            return False
        pairs = list(zip(self._solved.buffers, self._solved_from(), strict=True))
        if any(kept.device != now.device or kept.dtype != now.dtype for kept, now in pairs):
            return False
        return bool((self.var_weights >= 0).all()) and all(torch.equal(kept, now) for kept, now in pairs)

    def _has_values(self) -> bool:
        """Whether there is something to look at: not on the meta device, nor in a tensor that stands for another."""
        return type(self.mean_gram) is Tensor and not self.mean_gram.is_meta

    def _is_captured(self) -> bool:
        """Whether a CUDA graph is being captured, in which nothing can be looked at."""
        return self.mean_gram.is_cuda and torch.cuda.is_current_stream_capturing()

    def predict(self, mean: Tensor, var: Tensor, elements: int = 1) -> tuple[Tensor, Tensor]:
        """Predict the batch's statistics: f_μ = φᵀα, f_σ = ϕᵀβ (3.9)."""
        assert self.running_mean is not None
        alpha, beta = self._weights()
        # Rounded to what is kept of them.
        slope, intercept = alpha.to(self.mean_weights.dtype).to(mean.dtype).unbind(-1)
        of_var, of_distance, constant = beta.to(self.var_weights.dtype).to(mean.dtype).unbind(-1)
        distance = (mean - self.running_mean.to(mean.dtype)).square()
        return slope * mean + intercept, of_var * var + of_distance * distance + constant

    def train(self, mode: bool = True) -> BSRBatchNorm:
        """Set the mode; going to evaluation solves the regressions."""
        super().train(mode)
        if not mode and self._has_values() and not self._is_solved():
            self.solve()
        return self

    def reset_running_stats(self) -> None:
        """Forget all statistics."""
        super().reset_running_stats()
        for name in REGRESSION_SUMS:
            if name in self._buffers:
                getattr(self, name).zero_()
        if "var_weights" in self._buffers:
            self._unsolve()

    def statistics(self) -> Iterator[tuple[str, torch.dtype]]:
        """Name the buffers that hold statistics."""
        yield from super().statistics()
        for name in REGRESSION_SUMS:
            yield name, torch.float64
        for name in ("mean_weights", "var_weights"):
            yield name, torch.float32

    def described(self) -> dict[str, object]:
        """Return the arguments that `repr` shows."""
        return super().described() | {"nonneg": self.nonneg} | ({} if self.exact else {"exact": False})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A plain BatchNorm's checkpoint has no sums: then evaluation is batch normalization's, until there are some.
        if prefix + "running_mean" in state_dict and not any(prefix + name in state_dict for name in REGRESSION_SUMS):
            for name in REGRESSION_SUMS:
                like = state_dict[prefix + "running_mean"]
                state_dict[prefix + name] = torch.zeros_like(getattr(self, name), device=like.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._unsolve()
        if not self.training and self._has_values():
            self.solve()


class BSRBatchNorm1d(BSRBatchNorm, nn.BatchNorm1d):
    """Batch normalization of [N, C] or [N, C, L] whose evaluation fits small training batches (thesis ch. 3).

    Training is that of `nn.BatchNorm1d`. Beside it, two small regressions for each channel learn, from each instance's
    mean μ_s and variance σ²_s, the statistics of the batch that the instance was in:

        f_μ = α₁μ_s + α₂,    f_σ = β₁σ²_s + β₂(μ_s − μ)² + β₃,    β ≥ 0        (3.9)

    Evaluation normalizes each instance with its own prediction (3.21). 18 numbers a channel are kept, with the decay of
    the running statistics; they are solved on the change from training to evaluation. Channels that a regression has
    nothing to say about (constant, no data yet) are evaluated as by `nn.BatchNorm1d`. For a model that is trained
    already: `wellcond.calibrate`.

    Args:
        num_features: C.
        eps: ε, added to the variance.
        momentum: Weight of a new batch in the running statistics and in the sums; None for equal weights.
        affine: Learn γ and β.
        nonneg: How the weights of f_σ are kept from being negative: ``"clamp"`` them as the thesis does, or ``"nnls"``,
            the exact non-negative least squares.
        exact: Train with torch's own kernel, bit for bit as `nn.BatchNorm1d`. False trains from the statistics that the
            regressions need anyway: the same up to rounding, and faster on a CPU. Groups and ranks always do.
        group_size: Train in ghost groups of so many samples, and predict their statistics.
        synchronize: Take the batch over all ranks (True), over a process group, or over this process alone (False).
        bias: Learn β where γ is learned, as of `nn.BatchNorm*`.
        device: Of the parameters and statistics.
        dtype: Of the parameters; running statistics are float32 or wider, the sums float64.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> layer = BSRBatchNorm1d(3)
        >>> for _ in range(20):
        ...     _ = layer(torch.randn(2, 3, 8))
        >>> layer.eval()(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """


class BSRBatchNorm2d(BSRBatchNorm, nn.BatchNorm2d):
    """`BSRBatchNorm1d` of [N, C, H, W].

    Example:
        >>> BSRBatchNorm2d(8)
        BSRBatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, nonneg=clamp)
    """


class BSRBatchNorm3d(BSRBatchNorm, nn.BatchNorm3d):
    """`BSRBatchNorm1d` of [N, C, D, H, W]."""
