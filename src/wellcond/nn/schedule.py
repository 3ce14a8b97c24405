"""Schedules of normalization layers' training settings; a training loop steps them like learning rate schedulers."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from wellcond import theory
from wellcond.nn.norm.momentum import MomentumBatchNorm
from wellcond.nn.norm.renorm import BatchRenorm
from wellcond.nn.norm.sparse_switchable import SparseSwitchableNorm
from wellcond.runtime.checks import AnyInteger, check_positive_integer, checked


class _LayerScheduler:
    """Counts calls of `step`, and sets the layers to what that count says."""

    def __init__(self) -> None:
        self.count = 0

    def step(self) -> None:
        """Go on by one epoch or one step, whichever the schedule counts."""
        self.count += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, and set the layers to it.

        Raises:
            KeyError: If it is not one of this schedule.
        """
        self.count = int(state_dict["count"])
        self._set()

    def _set(self) -> None:
        raise NotImplementedError


class MomentumScheduler(_LayerScheduler):
    """Raises λ of Momentum Batch Normalization, from 0 in the first epoch to its end value in epoch T (thesis 2.12).

    λ(t) = ρ^(T/(T−1)·max(T−t, 0)) − ρ^T with ρ = min(m/m₀, 1)^(1/T), m the training batch, m₀ each layer's
    `base_batch_size`: 0 for m ≥ m₀, else ending at 1 − m/m₀. Call `step()` after each epoch, as with torch's learning
    rate schedulers, or after each step if `steps_per_epoch` is given.

    Args:
        model: With `MomentumBatchNorm*` layers.
        total_epochs: T, over how many epochs λ rises (the thesis: 180 of 200).
        batch_size: m, samples behind one set of statistics: of a device, or of a ghost group. None takes what the
            layers see (the largest training batch of the epoch); with gradient accumulation that is rightly the
            micro-batch.
        steps_per_epoch: If given, `step()` counts steps, and λ rises with every one.
        target: ``"thesis"`` ends at λ = 1 − m/m₀; ``"derived"`` at (m₀ − m)/(m₀ + m), where the noise, with the
            averaging of past batches counted, is that of a batch of m₀ (`theory.noise_matching_momentum`).

    Raises:
        ValueError: If an argument is out of its range, or the model has no such layer.

    Example:
        >>> from wellcond.nn import MomentumBatchNorm1d
        >>> layer = MomentumBatchNorm1d(3)
        >>> scheduler = MomentumScheduler(layer, total_epochs=3, batch_size=2)
        >>> for epoch in range(3):  # after training each epoch
        ...     scheduler.step()
        >>> layer.stat_momentum
        0.9375
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        total_epochs: int,
        batch_size: int | None = None,
        *,
        steps_per_epoch: int | None = None,
        target: Literal["thesis", "derived"] = "thesis",
    ) -> None:
        super().__init__()
        check_positive_integer("total_epochs", total_epochs)
        if batch_size is not None:
            check_positive_integer("batch_size", batch_size)
        if steps_per_epoch is not None:
            check_positive_integer("steps_per_epoch", steps_per_epoch)
        # Refuses an unknown target here rather than in the first step.
        theory.stat_momentum(1, total_epochs, 1, target=target)
        self.layers = [module for module in model.modules() if isinstance(module, MomentumBatchNorm)]
        if not self.layers:
            raise ValueError(
                "MomentumScheduler found no MomentumBatchNorm1d, 2d or 3d in the model: "
                "convert_norm(model, to='mbn') makes them"
            )
        self.total_epochs = total_epochs
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.target: Literal["thesis", "derived"] = target
        self._seen: int | None = None
        self._set()

    @property
    def epoch(self) -> float:
        """t, counted from 1."""
        return 1.0 + self.count / (self.steps_per_epoch or 1)

    def _set(self) -> None:
        if self.count == 0 and self.batch_size is None:
            for layer in self.layers:  # λ(1) = 0 whatever the batch; without data it cannot be told yet.
                layer.stat_momentum = 0.0
            return
        samples = self.batch_size if self.batch_size is not None else self._largest_seen()
        for layer in self.layers:
            layer.stat_momentum = theory.stat_momentum(
                self.epoch, self.total_epochs, samples, layer.base_batch_size, target=self.target
            )

    def _largest_seen(self) -> int:
        self._seen = self._seen_so_far()
        if self._seen is None:
            raise RuntimeError(
                "MomentumScheduler.step() was called before any training batch, so the batch size is not known: "
                "give batch_size, or call step() after training"
            )
        samples = self._seen
        if self.count % (self.steps_per_epoch or 1) == 0:
            # The next epoch may come with other batches; a short last batch must not decide.
            for layer in self.layers:
                layer.seen_batch_size = None
            self._seen = None if self.steps_per_epoch is None else self._seen
        return samples

    def _seen_so_far(self) -> int | None:
        seen = [self._seen, *(layer.seen_batch_size for layer in self.layers)]
        return max((samples for samples in seen if samples is not None), default=None)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return super().state_dict() | {
            # Also of the epoch so far: some save before its `step()`, which the resumed run then makes.
            "seen_batch_size": self._seen_so_far(),
            "stat_momentum": [x.stat_momentum for x in self.layers],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, and set the layers to it.

        Raises:
            KeyError: If it is not one of this schedule.
            ValueError: If it is of a model with another number of layers.
        """
        momenta = state_dict["stat_momentum"]
        if len(momenta) != len(self.layers):
            raise ValueError(f"the state is of {len(momenta)} Momentum Batch Norms, the model has {len(self.layers)}")
        self.count = int(state_dict["count"])
        self._seen = state_dict["seen_batch_size"]
        for layer, momentum in zip(self.layers, momenta, strict=True):
            layer.stat_momentum = momentum
            layer.seen_batch_size = None


class BatchRenormScheduler(_LayerScheduler):
    """Opens the bounds of Batch Renormalization (Ioffe, 2017, section 4): first batch normalization, then ever freer.

    For `warmup_steps` r_max = 1 and d_max = 0; then both grow linearly, r_max to its end at step `r_steps`, d_max to
    its at `d_steps`. Call `step()` after each optimizer step.

    Args:
        model: With `BatchRenorm*` layers; their own r_max and d_max are where the schedule ends.
        warmup_steps: Steps of plain batch normalization.
        r_steps: Step at which r_max is fully open.
        d_steps: Step at which d_max is fully open.

    Raises:
        ValueError: If an argument is out of its range, or the model has no such layer.

    Example:
        >>> from wellcond.nn import BatchRenorm1d
        >>> layer = BatchRenorm1d(3)
        >>> scheduler = BatchRenormScheduler(layer, warmup_steps=1, r_steps=3, d_steps=2)
        >>> bounds = [(layer.r_max, layer.d_max)]
        >>> for step in range(3):
        ...     scheduler.step()
        ...     bounds.append((layer.r_max, layer.d_max))
        >>> bounds
        [(1.0, 0.0), (1.0, 0.0), (2.0, 5.0), (3.0, 5.0)]
    """

    @checked
    def __init__(
        self, model: nn.Module, *, warmup_steps: AnyInteger = 5_000, r_steps: int = 40_000, d_steps: int = 25_000
    ) -> None:
        super().__init__()
        if not isinstance(warmup_steps, int) or warmup_steps < 0:
            raise ValueError(f"warmup_steps must be a non-negative integer, got {warmup_steps!r}")
        for name, value in (("r_steps", r_steps), ("d_steps", d_steps)):
            check_positive_integer(name, value)
            if value <= warmup_steps:
                raise ValueError(f"{name} must be larger than warmup_steps ({warmup_steps}), got {value}")
        self.layers = [module for module in model.modules() if isinstance(module, BatchRenorm)]
        if not self.layers:
            raise ValueError(
                "BatchRenormScheduler found no BatchRenorm1d, 2d or 3d in the model: "
                "convert_norm(model, to='brn') makes them"
            )
        self.warmup_steps, self.r_steps, self.d_steps = warmup_steps, r_steps, d_steps
        self.ends = [(layer.r_max, layer.d_max) for layer in self.layers]
        self._set()

    def _set(self) -> None:
        since = max(self.count - self.warmup_steps, 0)
        r_share = min(since / (self.r_steps - self.warmup_steps), 1.0)
        d_share = min(since / (self.d_steps - self.warmup_steps), 1.0)
        for layer, (r_max, d_max) in zip(self.layers, self.ends, strict=True):
            layer.r_max = 1.0 + r_share * (r_max - 1.0)
            layer.d_max = d_share * d_max

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return super().state_dict() | {"ends": self.ends}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, and set the layers to it.

        Raises:
            KeyError: If it is not one of this schedule.
            ValueError: If it is of a model with another number of layers.
        """
        ends = [(float(r_max), float(d_max)) for r_max, d_max in state_dict["ends"]]
        if len(ends) != len(self.layers):
            raise ValueError(f"the state is of {len(ends)} Batch Renorms, the model has {len(self.layers)}")
        self.ends = ends
        super().load_state_dict(state_dict)


class SparsityScheduler(_LayerScheduler):
    """Closes the switches of Sparse Switchable Normalization: the radius grows from 0 to 1 (Shao et al., 2019).

    Call `step()` after each optimizer step (or each epoch, if `total_steps` counts those).

    Args:
        model: With `SparseSwitchableNorm*` layers.
        total_steps: After how many the radius is 1, so that every layer has one normalizer left.

    Raises:
        ValueError: If an argument is out of its range, or the model has no such layer.

    Example:
        >>> from wellcond.nn import SparseSwitchableNorm1d
        >>> layer = SparseSwitchableNorm1d(3)
        >>> scheduler = SparsityScheduler(layer, total_steps=4)
        >>> scheduler.step()
        >>> layer.radius
        0.25
    """

    @checked
    def __init__(self, model: nn.Module, total_steps: int) -> None:
        super().__init__()
        check_positive_integer("total_steps", total_steps)
        self.layers = [module for module in model.modules() if isinstance(module, SparseSwitchableNorm)]
        if not self.layers:
            raise ValueError(
                "SparsityScheduler found no SparseSwitchableNorm1d, 2d or 3d in the model: "
                "convert_norm(model, to='ssn') makes them"
            )
        self.total_steps = total_steps
        self._set()

    def _set(self) -> None:
        for layer in self.layers:
            layer.radius = min(self.count / self.total_steps, 1.0)
