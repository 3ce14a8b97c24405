"""The base of WNN, GWNN and EigenNet: a linear map between constants that are renewed from statistics.

Such a layer multiplies its weight by matrices that are constants to the gradient. Statistics for them are taken every
few steps, the matrices renewed more rarely, and the whole is one linear map: a forward pass costs a plain layer's and
one product of parameters and constants.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, TypedDict, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Proxy

from wellcond.layouts import Layout, layout_of
from wellcond.nn.norm.buffers import KeptStatistics
from wellcond.nn.whitened.optimizer_steps import OPTIMIZER_STEPS
from wellcond.nn.whitened.running_covariance import RunningCovariance
from wellcond.numerics.linalg import DampingMode, check_damping
from wellcond.runtime.autocast import without_autocast
from wellcond.runtime.checks import WellcondWarning, check_positive_integer, checked
from wellcond.runtime.tracing import has_saved_tensor_hooks, is_repeated, is_transformed

_COUNTS = ("steps", "failed_refreshes", "recomputes")


class ScheduleOptions(TypedDict, total=False):
    """The steps at which statistics are taken and constants renewed; see `WhitenedLinear`."""

    damping: float
    damping_mode: DampingMode
    refresh_every: int | None
    refresh_warmup: bool
    stats_every: int
    stats_decay: float
    synchronize: bool | dist.ProcessGroup


class AmortizedLayer(KeptStatistics):
    """Base of the layers whose weight is multiplied by constants that are renewed from statistics.

    Subclasses say what the layer is as one linear map (`folded`), what they observe (`observe`) and how they renew
    their constants (`solve`).

    A *step* is one of the optimizer that holds the weight (or, before there was any, a change of the weight). The first
    training pass after one is where constants are renewed, so that all passes whose gradients are added up see the
    same. Passes in evaluation mode or without gradients count for
    nothing, and of a pass that activation checkpointing repeats one is counted.

    Attributes:
        steps: Steps that were counted.
        failed_refreshes: Times when constants could not be renewed and the earlier ones were kept.
    """

    weight: Tensor
    bias: Any

    @checked
    def set_schedule(
        self,
        damping: float = 1e-3,
        damping_mode: DampingMode = "relative",
        refresh_every: int | None = 500,
        refresh_warmup: bool = True,
        stats_every: int = 50,
        stats_decay: float = 0.95,
        synchronize: bool | dist.ProcessGroup = True,
    ) -> None:
        """Check and keep the options that all such layers have."""
        check_damping(damping, damping_mode)
        check_positive_integer("stats_every", stats_every)
        if refresh_every is not None:
            check_positive_integer("refresh_every", refresh_every)
        if not (isinstance(stats_decay, (int, float)) and 0 <= stats_decay < 1):
            raise ValueError(f"stats_decay must be in [0, 1), got {stats_decay!r}")
        if not isinstance(refresh_warmup, bool):
            raise ValueError(f"refresh_warmup must be True or False, got {refresh_warmup!r}")
        self.damping, self.damping_mode = damping, damping_mode
        self.refresh_every, self.refresh_warmup = refresh_every, refresh_warmup
        self.stats_every, self.stats_decay = stats_every, stats_decay
        self.synchronize = synchronize

    def start(self) -> None:
        """Forget all statistics and make the constants those of the plain layer, on the weight's device."""
        self.steps = 0
        self.failed_refreshes = 0
        # Whether the next pass is the first of a step; the weight's version at the last pass that was, which tells of
        # steps that no optimizer makes; whether there is an optimizer.
        self._begins = True
        self._seen_version: int | None = None
        self._optimized = False
        self._recomputes = False

    # what subclasses say --------------------------------------------------------------------------------------------

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the plain layer that computes the same."""
        raise NotImplementedError

    def observe(self, input: Tensor) -> None:
        """Take statistics of a training pass."""
        raise NotImplementedError

    def solve(self) -> bool:
        """Renew the constants from the statistics; return whether that succeeded."""
        raise NotImplementedError

    def map(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply a plain layer with this layer's geometry."""
        raise NotImplementedError

    def input_rows(self, input: Tensor) -> Iterator[Tensor]:
        """Lay the input out as rows [groups, n, d], possibly in pieces."""
        raise NotImplementedError

    def output_rows(self, output: Tensor) -> Tensor:
        """Lay an output, or the gradient by it, out as rows [groups, n, out/groups]."""
        raise NotImplementedError

    # the pass -------------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            input: As for the plain layer.

        Returns:
            As of the plain layer.
        """
        if isinstance(input, Proxy):
            # A leaf of symbolic traces, as the plain layer is.
            path = input.tracer.path_of_module(self)
            return cast(Tensor, input.tracer.create_proxy("call_module", path, (input,), {}))
        if not self.training:
            return self.map(input, *self.folded())
        # Compiled code steps out for the book-keeping. (As decorators these would import the compiler with this file.)
        compiling = torch.compiler.is_compiling()
        watching = (torch.compiler.disable(self._attend) if compiling else self._attend)(input)
        output = self.map(input, *self.folded())
        if watching:
            (torch.compiler.disable(self.watch) if compiling else self.watch)(output)
        return output

    def watch(self, output: Tensor) -> None:
        """See the output of a pass whose input is observed."""

    def refresh(self) -> bool:
        """Renew the constants now, from the statistics so far; on all ranks, if they are synchronized.

        To be called between an optimizer's step and the next forward pass, where ``refresh_every`` is None.

        Returns:
            Whether they were renewed: not before anything was observed, nor if a factorization failed; then all stays
            as it was.

        Raises:
            RuntimeError: If the weight is no parameter, as with a parametrization.
        """
        self._check_weight()
        for statistics in self._all_statistics():
            statistics.update(self.synchronize)
        return self._renew()

    def _attend(self, input: Tensor) -> bool:
        """Count the step, renew the constants if that is due, and observe; return whether this pass is observed."""
        if is_transformed():
            return False
        self._check_weight()
        if not isinstance(self.weight, nn.Parameter):  # `functional_call` with other tensors
            return False
        repeated = is_repeated()
        if repeated:
            # Activation checkpointing repeats a pass. Without reentrance its first run was seen, and this one runs
            # under hooks on what autograd saves; with reentrance the first run had no gradients, and this one counts.
            if has_saved_tensor_hooks():
                return False
            self._recomputes = True
        OPTIMIZER_STEPS.tell(self)
        changed = not self._optimized and self.weight._version != self._seen_version
        if (torch.is_grad_enabled() or self._recomputes) and (self._begins or changed):
            # Constants change in first runs only, or a repeated one would compute something else.
            self._next_step(may_renew=not repeated)
            self._begins = False
            self._seen_version = self.weight._version
        if not torch.is_grad_enabled() or (self.steps - 1) % self.stats_every:
            return False
        self.observe(input)
        return True

    def stepped(self) -> None:
        """Learn that an optimizer has updated the weight."""
        self._begins = self._optimized = True

    def _check_weight(self) -> None:
        if "weight" not in self._parameters:
            raise RuntimeError(
                f"{type(self).__name__}: its weight must be a parameter, not computed by a parametrization, "
                "and the layer no replica of nn.DataParallel"
            )

    def _next_step(self, may_renew: bool) -> None:
        """Count a step; take in what the one before observed; renew the constants if that is due."""
        elapsed = self.steps
        self.steps += 1
        # Known from the count alone, so that all ranks do it at the same step.
        if elapsed > 0 and (elapsed - 1) % self.stats_every == 0:
            for statistics in self._all_statistics():
                statistics.update(self.synchronize)
        if may_renew and self._is_due(elapsed):
            self._renew()

    def _is_due(self, elapsed: int) -> bool:
        """Whether constants are renewed after so many steps."""
        if self.refresh_every is None or elapsed == 0:
            return False
        if elapsed % self.refresh_every == 0:
            return True
        times, left_over = divmod(elapsed, self.stats_every)
        is_power_of_two = times > 0 and times & (times - 1) == 0
        return self.refresh_warmup and elapsed < self.refresh_every and left_over == 0 and is_power_of_two

    def _renew(self) -> bool:
        if self.weight.is_meta or not any(bool(statistics.count > 0) for statistics in self._all_statistics()):
            return False
        with torch.no_grad(), without_autocast(self.weight.device):
            solved = self.solve()
        if not solved:
            self.failed_refreshes += 1
            if self.failed_refreshes == 1:
                warnings.warn(
                    f"{type(self).__name__}: no finite power of the covariance was found; the earlier one is kept "
                    "(failed_refreshes counts how often; a larger damping helps)",
                    WellcondWarning,
                    stacklevel=2,
                )
        return solved

    def _all_statistics(self) -> Iterator[RunningCovariance]:
        return (child for child in self.children() if isinstance(child, RunningCovariance))

    # state ----------------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """The rule for the plain layer's rows and matrices."""
        layout = layout_of(self)
        assert layout is not None
        return layout

    @property
    def statistics_dtype(self) -> torch.dtype:
        """The dtype of statistics and constants."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def get_extra_state(self) -> Tensor:
        """Return the counts, and whether reentrant checkpointing was seen: a tensor, as all else in a state dict."""
        return torch.tensor([self.steps, self.failed_refreshes, int(self._recomputes)])

    def set_extra_state(self, state: Tensor | dict[str, int]) -> None:
        """Restore them, also from checkpoints that held a dict."""
        counts = [state[name] for name in _COUNTS] if isinstance(state, dict) else state.tolist()
        # An average of checkpoints, as some make it of all tensors, has no whole numbers.
        self.steps, self.failed_refreshes = round(counts[0]), round(counts[1])
        self._recomputes = bool(counts[2])
        self._begins = True

    def reset_parameters(self) -> None:
        """Draw new parameters, and begin again as a plain layer."""
        super().reset_parameters()  # type: ignore[misc]
        if "steps" in self.__dict__:
            self.start()

    def described(self) -> dict[str, object]:
        """Return the options that `repr` shows."""
        shown = ("damping", "damping_mode", "refresh_every", "refresh_warmup", "stats_every", "stats_decay")
        options: dict[str, object] = {name: getattr(self, name) for name in shown}
        if self.synchronize is not True:
            options["synchronize"] = False if self.synchronize is False else "<process group>"
        return options

    def extra_repr(self) -> str:
        """Say what the layer was made with."""
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in self.described().items())])
