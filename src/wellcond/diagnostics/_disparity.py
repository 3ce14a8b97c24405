"""Measures the distance between training's and evaluation's normalization (thesis 3.23)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wellcond.calibration.replay import Seen, double_of, named_batch_norms
from wellcond.diagnostics.passes import check_reached, observed_pass
from wellcond.diagnostics.tables import axes_for, table
from wellcond.nn.norm.bsr import BSRBatchNorm
from wellcond.nn.norm.evalnorm import mixed_moments
from wellcond.nn.norm.instance import InstanceInference
from wellcond.runtime.checks import WellcondWarning, check_positive_integer, checked
from wellcond.runtime.models import Call, unwrapped
from wellcond.runtime.texts import quoted_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of evaluation, in the order of tables and legends.
_KINDS = ("ema", "evalnorm_fixed", "evalnorm", "bsr")


@dataclass(frozen=True)
class LayerDisparity:
    """The disparity of one layer.

    Attributes:
        norm: Δ (3.23) by the kind of evaluation: the 2-norm over the positions of one channel of one instance, averaged
            over channels, instances and batches.
        rms: The same, each norm divided by √positions: how far a value is off, in standard deviations.
        positions: Per channel of an instance, on average over the layer's calls.
        batches: Of m samples that were measured.
    """

    norm: Mapping[str, float]
    rms: Mapping[str, float]
    positions: float
    batches: int


@dataclass(frozen=True, repr=False)
class Disparity:
    """The result of `disparity`; printed, it is a table.

    Kinds of evaluation: ``"ema"``, running statistics; ``"evalnorm_fixed"``, EvalNorm with α = β = 1/m, which every
    layer could use; ``"evalnorm"``, the mixture of `EvalNorm*` layers; ``"bsr"``, the predictions of `BSRBatchNorm*`
    layers.

    Attributes:
        batch_size: m.
        layers: By qualified name, in the model's order.
    """

    batch_size: int
    layers: Mapping[str, LayerDisparity]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which kinds of evaluation some layer has."""
        return tuple(kind for kind in _KINDS if any(kind in layer.rms for layer in self.layers.values()))

    @property
    def mean(self) -> dict[str, float]:
        """The average over layers of `rms`, which layers of all resolutions enter alike.

        Each kind's is over the layers that have it: two kinds can be compared if they are of the same layers.
        """
        return self._average([layer.rms for layer in self.layers.values()])

    @property
    def mean_norm(self) -> dict[str, float]:
        """The average over layers of `norm`, as in the thesis, which layers of high resolution dominate."""
        return self._average([layer.norm for layer in self.layers.values()])

    def _average(self, found: list[Mapping[str, float]]) -> dict[str, float]:
        own = {kind: [each[kind] for each in found if kind in each] for kind in self.kinds}
        return {kind: sum(values) / len(values) for kind, values in own.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dictionaries, lists, strings and numbers, for JSON."""
        layers = {
            name: {
                "norm": dict(layer.norm),
                "rms": dict(layer.rms),
                "positions": layer.positions,
                "batches": layer.batches,
            }
            for name, layer in self.layers.items()
        }
        return {"batch_size": self.batch_size, "mean": self.mean, "mean_norm": self.mean_norm, "layers": layers}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot `rms` over the layers, a line for each kind of evaluation.

        Args:
            ax: Where to; a new figure by default.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        ax = axes_for(ax, "Disparity.plot", (max(6.0, 0.25 * len(self.layers)), 4.0))
        names = list(self.layers)
        for kind in self.kinds:
            own = [
                (index, self.layers[name].rms[kind])
                for index, name in enumerate(names)
                if kind in self.layers[name].rms
            ]
            ax.plot(*zip(*own, strict=True), marker=".", label=f"{kind} (mean {self.mean[kind]:.3g})")
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
        ax.set_ylabel(f"disparity of batches of {self.batch_size} (RMS)")
        ax.set_ylim(bottom=0.0)
        ax.legend()
        return ax

    def __str__(self) -> str:
        header = ["layer", "positions", *self.kinds]
        rows = [
            [name or "(model)", f"{layer.positions:g}", *self._cells(layer.rms)] for name, layer in self.layers.items()
        ]
        rows.append(["mean", "", *self._cells(self.mean)])
        title = f"Disparity of training and evaluation at batches of {self.batch_size} (RMS over positions)"
        return table(title, header, rows)

    __repr__ = __str__

    def _cells(self, found: Mapping[str, float]) -> list[str]:
        return [f"{found[kind]:.4f}" if kind in found else "-" for kind in self.kinds]


@checked
def disparity(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    batch_size: int | None = None,
    call: Call | None = None,
    max_batches: int | None = None,
) -> Disparity:
    """Measure, for each batch normalization, how far evaluation's normalization is from that of training batches of m.

        Δ = E_B[1/m Σ_s ‖(x_s − μ_B)/√(σ²_B + ε) − (x_s − f_μ(x_s))/√(f_σ(x_s) + ε)‖₂]        (3.23)

    x_s is one channel of one instance, the norm is over its positions, and Δ is averaged over channels, too. f_μ and
    f_σ are what evaluation takes for the statistics of the batch; γ and β are left out. One pass measures all kinds
    of evaluation that a layer has (`Disparity`), on the same features: those of training, where every layer before
    normalizes with its batch. The training side is the batch's own statistics in layers of all kinds.

    As the norm grows with √positions, `LayerDisparity` has it divided by that as well, and `Disparity.mean` averages
    the latter over layers.

    The model is left as it is found, as by `calibrate`: parameters, buffers, gradients, modes, torch's random state.
    With several processes, each measures its own data.

    Args:
        model: Any model with batch normalizations that have running statistics; may be wrapped for DDP or compiled.
        loader: Gives batches: a tensor; a tuple or list, whose first element is the input; or a mapping, for
            ``model(**batch)``. They are moved to the model's device.
        batch_size: m. The loader's batches are divided into groups of m, and what is left over is not measured. None
            takes the size of its first batch, which must be given where that cannot be told, as with `call`.
        call: ``call(model, batch)``, for a model that is run otherwise.
        max_batches: Stop after so many of the loader's batches.

    Returns:
        The disparity of each layer and their averages.

    Raises:
        ValueError: If an argument is out of its range, there is no such layer, the loader is empty, no batch has m
            samples, or a layer has one value per channel in a batch.

    Warns:
        WellcondWarning: About layers that the pass did not reach, by name; they are left out.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval()
        >>> found = disparity(model, [torch.randn(8, 1, 6, 6) for _ in range(4)], batch_size=2)
        >>> found.kinds
        ('ema', 'evalnorm_fixed')
        >>> found.layers["1"].positions, found.layers["1"].batches
        (16.0, 16)
    """
    if batch_size is not None:
        check_positive_integer("batch_size", batch_size)
    if max_batches is not None:
        check_positive_integer("max_batches", max_batches)
    inner = unwrapped(model)
    layers, of_any_kind = named_batch_norms(inner)
    if not layers:
        statistics = " with running statistics" if of_any_kind else ""
        raise ValueError(f"{type(inner).__name__} has no batch normalization{statistics} to measure")
    sums = {name: _Sums(layer) for name, layer in layers.items()}

    def observe(name: str, seen: Seen) -> None:
        sums[name].add(seen)

    passed = observed_pass(inner, loader, batch_size, layers, observe, call, max_batches)
    found = {name: own.averages() for name, own in sums.items() if own.batches}
    check_reached(passed, sums, found)
    if missed := quoted_names(name for name in sums if name not in found):
        warnings.warn(
            f"disparity: no batch of {passed.batch_size} samples reached {missed}", WellcondWarning, stacklevel=3
        )
    return Disparity(passed.batch_size or 0, found)


class _Sums:
    """Sums of one layer's disparity over instances and channels, of each kind of evaluation.

    Args:
        layer: Is read only.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        # Its own buffers: to predict may mean to solve first.
        self._layer = double_of(layer)
        self._norm: dict[str, Tensor] = {}
        self._rms: dict[str, Tensor] = {}
        self._terms = 0
        self._calls = 0
        self._positions = 0
        self.batches = 0

    def add(self, seen: Seen) -> None:
        """Add what a call of the layer saw."""
        mean, var, positions = seen.instances
        assert isinstance(positions, int)
        wide = torch.float32 if mean.device.type == "mps" else torch.float64
        mean, var = mean.to(wide), var.to(wide)
        own_mean, own_var = (part.to(wide).repeat_interleave(seen.rows, 0) for part in seen.batches[:2])
        scale = torch.rsqrt(own_var + self._layer.eps)
        for kind, (predicted_mean, predicted_var) in self._predictions(mean, var, positions, seen.rows).items():
            predicted_scale = torch.rsqrt(predicted_var + self._layer.eps)
            # The difference is affine in x, so its mean and variance over the positions follow from those of x.
            shift = scale * (mean - own_mean) - predicted_scale * (mean - predicted_mean)
            rms = (shift.square() + (scale - predicted_scale).square() * var).sqrt().sum()
            self._rms[kind] = self._rms.get(kind, 0.0) + rms
            self._norm[kind] = self._norm.get(kind, 0.0) + positions**0.5 * rms
        self._terms += mean.numel()
        self._calls += 1
        self._positions += positions
        self.batches += len(seen.batches.mean)

    def averages(self) -> LayerDisparity:
        """Return the averages."""
        norm, rms = (
            {kind: float(total) / self._terms for kind, total in own.items()} for own in (self._norm, self._rms)
        )
        return LayerDisparity(norm, rms, self._positions / self._calls, self.batches)

    def _predictions(self, mean: Tensor, var: Tensor, positions: int, rows: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return f_μ and f_σ, [N, C], of each kind of evaluation that the layer has."""
        layer = self._layer
        assert layer.running_mean is not None
        assert layer.running_var is not None
        long_mean, long_var = layer.running_mean.to(mean.dtype), layer.running_var.to(mean.dtype)
        running, share = (long_mean, long_var), 1.0 / rows
        found = {
            "ema": running,
            # (3.6, 3.7) with α = β = 1/m.
            "evalnorm_fixed": mixed_moments((mean, var), running, (share, share), positions),
        }
        if isinstance(layer, InstanceInference):
            kind = "bsr" if isinstance(layer, BSRBatchNorm) else "evalnorm"
            found[kind] = layer.predict(mean, var, positions)
        return found
