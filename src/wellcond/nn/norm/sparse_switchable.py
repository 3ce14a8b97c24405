"""Sparse Switchable Normalization: training drives each layer's shares to a single normalizer."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.nn.functional.sparse_simplex import sparsestmax
from wellcond.nn.norm.switchable import SwitchableNorm


class SparseSwitchableNorm(SwitchableNorm):
    """Sparse Switchable Normalization of any number of dimensions; use `SparseSwitchableNorm1d`, `2d` or `3d`."""

    circle: Tensor
    mean_chosen: Tensor
    var_chosen: Tensor | None

    def _add_state(self) -> None:
        device = self.mean_logits.device
        # A tensor, so that compiled code does not depend on its value.
        self.register_buffer("circle", torch.zeros((), dtype=torch.float32, device=device))
        chosen = torch.full((), -1, dtype=torch.int64, device=device)
        self.register_buffer("mean_chosen", chosen)
        self.register_buffer("var_chosen", None if self.shared_logits else chosen.clone())

    @property
    def radius(self) -> float:
        """r, of the circle around equal shares that the shares must be outside of: 0 none, 1 leaves the corners."""
        return float(self.circle)

    @radius.setter
    def radius(self, value: float) -> None:
        if not isinstance(value, Real) or not 0 <= value <= 1:
            raise ValueError(f"radius must lie in [0, 1], got {value!r}")
        self.circle.fill_(value)

    @property
    def chosen(self) -> tuple[str | None, str | None]:
        """The normalizer that is left for the means, and for the variances; None while there are several."""
        mean = int(self.mean_chosen)
        var = mean if self.var_chosen is None else int(self.var_chosen)
        names = [self.normalizers[index] if index >= 0 else None for index in (mean, var)]
        return names[0], names[1]

    def _shares(self, logits: Tensor) -> Tensor:
        """Return SparsestMax of rows of logits; once that is a single normalizer, it stays so."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = torch.stack([choice for choice in (self.mean_chosen, self.var_chosen) if choice is not None])
        kinds = torch.arange(logits.shape[-1], device=logits.device)
        only = (kinds == chosen.unsqueeze(-1)).to(wide.dtype)
        return torch.where((chosen >= 0).unsqueeze(-1), only, sparsestmax(wide, self.circle))

    def _used(self, shares: tuple[Tensor, Tensor]) -> None:
        """Choose for good what is left alone in a training pass."""
        if not self.training or self.recomputing:
            return
        with torch.no_grad():
            for chosen, weights in zip((self.mean_chosen, self.var_chosen), shares, strict=True):
                if chosen is not None:
                    closed = (chosen < 0) & ((weights > 0).sum() == 1)
                    chosen.copy_(torch.where(closed, weights.argmax(), chosen))

    def reset_parameters(self) -> None:
        """Reset γ, β, running statistics, the shares to equal ones, and the radius to 0."""
        super().reset_parameters()
        if "circle" in self._buffers:
            self.circle.zero_()
            self.mean_chosen.fill_(-1)
            if self.var_chosen is not None:
                self.var_chosen.fill_(-1)

    def statistics(self) -> Iterator[tuple[str, torch.dtype]]:
        """Name the buffers that keep their precision."""
        yield from super().statistics()
        yield "circle", torch.float32

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _rename_authors(state_dict, prefix)
        of_layer = ("weight", "running_mean", "mean_logits")
        known = [state_dict[prefix + name] for name in of_layer if prefix + name in state_dict]
        if known:
            for name, start in (("circle", 0.0), ("mean_chosen", -1), ("var_chosen", -1)):
                if self._buffers.get(name) is not None and prefix + name not in state_dict:
                    state_dict[prefix + name] = self.own_or(name, start, known[0])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _rename_authors(state_dict: dict[str, Any], prefix: str) -> None:
    """Take the radius and the choices from a checkpoint of the authors' code."""
    if prefix + "mean_weight" not in state_dict or prefix + "mean_fixed" not in state_dict:
        return
    radius = state_dict.pop(prefix + "radius").reshape(()).float()
    state_dict[prefix + "circle"] = radius
    for name in ("mean", "var"):
        fixed = bool(state_dict.pop(f"{prefix}{name}_fixed"))
        weights = sparsestmax(state_dict[f"{prefix}{name}_weight"].float(), radius)
        state_dict[f"{prefix}{name}_chosen"] = weights.argmax() if fixed else torch.full((), -1)


class SparseSwitchableNorm1d(SparseSwitchableNorm, nn.BatchNorm1d):
    """Sparse Switchable Normalization of [N, C] or [N, C, L] (Shao et al., CVPR 2019).

    `SwitchableNorm1d` with `sparsestmax` in place of softmax: a circle around equal shares grows with `radius`, from 0
    to 1 over training (`SparsityScheduler`), and pushes the shares outwards until a single normalizer is left. It then
    is chosen for good, and `fold_switchable` makes the layer a plain IN, LN or BN, which costs no more than that.

    The authors train the logits (`switch_logits`) with a tenth of the learning rate, without weight decay, and with
    their gradient's norm clipped to 1. Equal logits, for which their code gives shares that do not sum to 1, or NaN,
    are handled (`sparsestmax`). `load_state_dict` takes their checkpoints, as `SwitchableNorm1d` does.

    Args:
        num_features: C.
        eps: ε, added to the variance.
        momentum: Weight of a new batch in the running statistics; None for equal weights of all batches.
        affine: Learn γ and β.
        track_running_stats: Keep running statistics; without, evaluation uses the batch's own.
        normalizers: Which of ``"in"``, ``"ln"``, ``"bn"`` to choose from, at least two.
        shared_logits: Choose one normalizer for means and variances together. Without it a layer may end with, say,
            LN's mean and BN's variance, as in the authors' code: no plain layer does that, so it cannot be folded.
        unbiased: Take the instances' unbiased variances, as the authors' code.
        group_size: Take the batch statistics over ghost groups of so many samples.
        synchronize: Take them over all ranks (True), over a process group, or over this process alone (False).
        device: Of the parameters and statistics.
        dtype: Of the parameters; statistics are float32 or wider.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> layer = SparseSwitchableNorm1d(3, shared_logits=True)
        >>> with torch.no_grad():
        ...     _ = layer.mean_logits.copy_(torch.tensor([0.2, 0.4, 0.9]))
        >>> layer.radius = 1.0
        >>> _ = layer(torch.randn(4, 3, 5))
        >>> layer.mean_ratios, layer.chosen
        ({'in': 0.0, 'ln': 0.0, 'bn': 1.0}, ('bn', 'bn'))
    """


class SparseSwitchableNorm2d(SparseSwitchableNorm, nn.BatchNorm2d):
    """`SparseSwitchableNorm1d` of [N, C, H, W].

    Example:
        >>> SparseSwitchableNorm2d(8)
        SparseSwitchableNorm2d(8, eps=1e-05, momentum=0.1, affine=True)
    """


class SparseSwitchableNorm3d(SparseSwitchableNorm, nn.BatchNorm3d):
    """`SparseSwitchableNorm1d` of [N, C, D, H, W]."""
