"""Measures batch normalization's noise while population norms train, and sets gamma decay to its strength."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.nn.norm.population import PopulationNorm, gamma_decay
from wellcond.theory import gamma_decay_coefficient

# Weight of the old ζ when another step is measured.
_DECAY = 0.9


class BatchNoiseDecay:
    """The penalty Σ ζγ² that makes population normalization stand for batch normalization with batches of m (slides).

    E[L(BN)] ≈ L(PN) + ζγ². With x̂ the normalized feature of a layer, the noise of batches of m shifts and scales all
    positions of all their images alike, hence acts as β and γ do. To the second order, for each channel,

        ζ = 1/(2m) · Var(x̂̄) · ∂²L/∂β² + 1/(8m) · Var(x̂²̄) · ∂²L/∂γ²,

    where the bars are means over an image's positions and the variances are over images: these are what a batch's mean
    and variance vary by, whatever the dependence between positions. With one position per image Var(x̂̄) = 1,
    Var(x̂²̄) = ρ + 2, and it is the slides' ζ (`wellcond.theory.gamma_decay_coefficient`). The second derivatives are
    taken as the Fisher information of training labels, the mean over images of (∂l/∂β)² and (∂l/∂γ)².

    Args:
        model: The network, with `PopulationNorm*` layers.
        members: m, images that batch normalization would take statistics over; at least 2.
        every: Steps between two measurements.

    Example:
        >>> from wellcond.nn import PopulationNorm1d
        >>> model = nn.Sequential(PopulationNorm1d(3), nn.Linear(3, 1))
        >>> decay = BatchNoiseDecay(model, members=4, every=1)
        >>> for _ in range(3):
        ...     with decay.observing():
        ...         loss = nn.functional.softplus(model(torch.randn(32, 3))).mean()
        ...     decay.added_to(loss).backward()
        >>> decay.coefficients["0"].shape, bool((decay.coefficients["0"] > 0).all())
        (torch.Size([3]), True)
    """

    def __init__(self, model: nn.Module, members: int, every: int) -> None:
        self._layers = {name: module for name, module in model.named_modules() if isinstance(module, PopulationNorm)}
        if not self._layers:
            raise ValueError(f"{type(model).__name__} has no population normalization to add gamma decay to")
        self._model, self._members, self._every = model, members, every
        self._step = 0
        # By which the loss is multiplied before backward: a gradient scaler's.
        self._scale: Tensor | float = 1.0
        self.coefficients: dict[str, Tensor] = {}

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Watch the layers while the block computes the loss, on the steps whose turn it is."""
        due = self._step % self._every == 0
        self._step += 1
        handles = [layer.register_forward_hook(self._watch(name)) for name, layer in self._layers.items() if due]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def added_to(self, loss: Tensor) -> Tensor:
        """Return the loss with the penalty; before the first measurement there is none."""
        if loss.requires_grad:
            loss.register_hook(self._keep_scale)
        if not self.coefficients:
            return loss
        return loss + gamma_decay(
            self._model, lambda name, _: self.coefficients.get(name, 0.0), lambda name, _: name in self._layers
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on needs."""
        return {"step": self._step, "coefficients": {name: value.cpu() for name, value in self.coefficients.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._step = state_dict["step"]
        device = next(self._model.parameters()).device
        self.coefficients = {name: value.to(device) for name, value in state_dict["coefficients"].items()}

    def _keep_scale(self, gradient: Tensor) -> None:
        self._scale = gradient.detach()

    def _watch(self, name: str) -> Any:
        def hook(layer: PopulationNorm, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            x = args[0].detach()
            # The gradient comes when the loss goes backward.
            output.register_hook(lambda gradient: self._measure(name, layer, x, gradient.detach()))

        return hook

    @torch.no_grad()
    def _measure(self, name: str, layer: PopulationNorm, x: Tensor, gradient: Tensor) -> None:
        images = len(x)
        if images < 2:
            return
        assert layer.running_mean is not None
        assert layer.running_var is not None
        shape = (1, -1, *[1] * (x.dim() - 2))
        dtype = layer.running_mean.dtype
        scale = torch.rsqrt(layer.running_var + layer.eps).view(shape)
        normalized = ((x.to(dtype) - layer.running_mean.view(shape)) * scale).reshape(images, x.shape[1], -1)
        # Of each image's own loss, not of the mean over images.
        gradient = gradient.to(dtype).reshape(normalized.shape) * (images / self._scale)
        shift = normalized.mean(2).var(0)
        spread = normalized.square().mean(2).var(0)
        curvature = gradient.sum(2).square().mean(0)
        fisher = (gradient * normalized).sum(2).square().mean(0)
        zeta = gamma_decay_coefficient(self._members, fisher, shift * curvature, spread - 2)
        before = self.coefficients.get(name)
        found = zeta if before is None else torch.lerp(zeta, before, _DECAY)
        # A step whose loss overflowed says nothing.
        self.coefficients[name] = torch.where(torch.isfinite(found), found, 0.0 if before is None else before)
