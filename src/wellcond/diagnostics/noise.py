"""Measures the noise of batch statistics and compares it with the laws of the theory (thesis 2.2, figure 2.1)."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wellcond.calibration.replay import Seen
from wellcond.diagnostics.laws import (
    Distribution,
    Histogram,
    NoiseDistribution,
    chi_square_cdf,
    chi_square_density,
    chi_square_freedom,
    distribution_entry,
    ks_distance,
    normal_cdf,
    normal_density,
    plot_density,
    plot_distribution,
)
from wellcond.diagnostics.passes import check_reached, observed_pass
from wellcond.diagnostics.tables import axes_for, table
from wellcond.nn.norm.momentum import MomentumBatchNorm
from wellcond.runtime.checks import Predicate, WellcondWarning, check_choice, check_positive_integer, checked
from wellcond.runtime.models import Call, unwrapped
from wellcond.runtime.texts import quoted_names
from wellcond.theory import Formula, Noise, batch_mean_noise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Which = Literal["both", "mean", "variance"]

_BINS = 40
# A moving average counts once its beginning has less than this weight: its variance is then right to 1e-4.
_BEGINNING = 0.01
# Below this share of σ² the values within batches, or their means, differ by rounding alone.
_NO_NOISE = 1e-12
_STILL = "features do not vary, or only within batches, or only between them"


@dataclass(frozen=True)
class LayerNoise:
    """The noise in the statistics of one layer's batches.

    Attributes:
        mean: ξ_μ = (μ − μ_B)/σ beside N(0, 1/M).
        variance: ξ_σ = σ²_B/σ² beside χ²(M−1)/M.
        effective: M, the number of independent values whose mean is as noisy as a batch's.
        elements: m·H·W, the values behind each channel's statistics, on average over the layer's calls.
        freedom: Degrees of freedom of the chi-square distribution that has ξ_σ's mean and variance, up to scale:
            2 E[ξ_σ]²/Var[ξ_σ]. By the law M − 1, times (1+λ)/(1−λ); fewer where the feature's tails are heavier than
            the normal distribution's.
        freedom_distance: As `NoiseDistribution.distance`, of ξ_σ from that distribution: of its shape alone.
        momentum: λ, where both noises are those of the moving averages of statistics; 0 for single batches.
        batches: Of m samples.
        channels: That vary; constant ones have no noise.
        population_mean: μ, shape [C] with constant channels, over all that the layer saw.
        population_var: σ², likewise.
    """

    mean: NoiseDistribution
    variance: NoiseDistribution
    effective: float
    elements: float
    freedom: float
    freedom_distance: float
    momentum: float
    batches: int
    channels: int
    population_mean: Tensor = field(compare=False, repr=False)
    population_var: Tensor = field(compare=False, repr=False)

    def predicted_variance(self, formula: Formula = "derived", elements: float | None = None) -> float:
        """Return Var ξ_μ as `wellcond.theory.batch_mean_noise` predicts it.

        Args:
            formula: ``"derived"``, (1−λ)/((1+λ) M), or ``"thesis"``, the (1−λ)/M of 2.11.
            elements: The number of independent values: `effective` by default; the theory's plain form has m.
        """
        return batch_mean_noise(1, self.momentum, formula=formula).variance / (elements or self.effective)


@dataclass(frozen=True, repr=False)
class BatchNoise:
    """The result of `batch_noise`; printed, it is a table.

    Attributes:
        batch_size: m.
        layers: By qualified name, in the model's order.
    """

    batch_size: int
    layers: Mapping[str, LayerNoise]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the population's statistics as dictionaries, lists, strings and numbers, for JSON."""
        return {"batch_size": self.batch_size, "layers": {name: self._entry(own) for name, own in self.layers.items()}}

    def _entry(self, layer: LayerNoise) -> dict[str, Any]:
        formulas: tuple[Formula, ...] = get_args(Formula)
        behind = {"effective": layer.effective, "batch_size": float(self.batch_size), "elements": layer.elements}
        return {
            "effective": layer.effective,
            "elements": layer.elements,
            "freedom": layer.freedom,
            "freedom_distance": layer.freedom_distance,
            "momentum": layer.momentum,
            "batches": layer.batches,
            "channels": layer.channels,
            "mean": distribution_entry(layer.mean),
            "variance": distribution_entry(layer.variance),
            "predicted_variance": {
                name: {formula: layer.predicted_variance(formula, elements) for formula in formulas}
                for name, elements in behind.items()
            },
        }

    def plot(self, ax: Axes | None = None, *, layer: str | None = None, noise: Which = "both") -> Axes:
        """Plot the histograms of a layer's noises and their laws, as the thesis does in figure 2.1.

        Args:
            ax: Where to; a new figure by default.
            layer: Its name; the first one by default.
            noise: ``"mean"`` for ξ_μ, ``"variance"`` for ξ_σ, or ``"both"``, which lie around 0 and 1.

        Returns:
            The axes.

        Raises:
            ValueError: If there is no such layer or noise.
            ImportError: If matplotlib is not installed.
        """
        name = next(iter(self.layers)) if layer is None else layer
        check_choice("layer", name, self.layers)
        check_choice("noise", noise, get_args(Which))
        ax = axes_for(ax, "BatchNoise.plot", (8.0, 4.0))
        own = self.layers[name]
        said = f"M = {own.effective:.3g}"
        if noise != "variance":
            law = f"normal law, {said}"
            plot_distribution(ax, own.mean, normal_density(own.mean.law), "mean", law, "tab:green")
        if noise != "mean":
            law = f"chi-square law, {said}"
            plot_distribution(ax, own.variance, chi_square_density(own.variance.law), "variance", law, "tab:blue")
            found = f"chi-square fitted to the variance, distance {own.freedom_distance:.3f}"
            plot_density(
                ax, own.variance.histogram.edges, chi_square_density(own.variance.found), found, "tab:blue", "--"
            )
        averaged = f", averaged with momentum {own.momentum:g}" if own.momentum else ""
        ax.set_title(f"{name or 'model'}: statistics of batches of {self.batch_size}{averaged}", fontsize="medium")
        ax.set_xlabel("(μ − mean)/σ and variance/σ²" if noise == "both" else f"noise of the {noise}")
        ax.set_ylabel("density")
        ax.legend(fontsize="small")
        return ax

    def __str__(self) -> str:
        averaged = any(layer.momentum for layer in self.layers.values())
        header = ["layer", "m·H·W", "effective", "batches", *(["λ"] if averaged else [])]
        header += ["Var ξ_μ", "law", *(["thesis"] if averaged else []), "distance"]
        header += ["E ξ_σ", "Var ξ_σ", "law", "distance", "freedom"]
        rows = [self._row(name, layer, averaged) for name, layer in self.layers.items()]
        title = f"Noise of the statistics of batches of {self.batch_size}, and its law at the effective size"
        return table(title, header, rows)

    __repr__ = __str__

    def _row(self, name: str, layer: LayerNoise, averaged: bool) -> list[str]:
        mean, variance = layer.mean, layer.variance
        cells = [name or "(model)", f"{layer.elements:g}", f"{layer.effective:.4g}", str(layer.batches)]
        cells += [f"{layer.momentum:g}"] if averaged else []
        cells += [f"{mean.found.variance:.3g}", f"{mean.law.variance:.3g}"]
        cells += [f"{layer.predicted_variance('thesis'):.3g}"] if averaged else []
        cells += [f"{mean.distance:.3f}", f"{variance.found.mean:.3f}", f"{variance.found.variance:.3g}"]
        return [*cells, f"{variance.law.variance:.3g}", f"{variance.distance:.3f}", f"{layer.freedom:.4g}"]


@checked
def batch_noise(
    model: nn.Module,
    loader: Iterable[Any],
    batch_size: int,
    *,
    momentum: float | None = None,
    call: Call | None = None,
    where: Predicate | None = None,
    max_batches: int | None = None,
) -> BatchNoise:
    """Measure how noisy the batch statistics of each batch normalization are, and compare it with the noise's laws.

    With μ and σ² of the population, here all that the layer sees in the pass, the statistics of a batch are off by

        ξ_μ = (μ − μ_B)/σ ~ N(0, 1/M)    and    ξ_σ = σ²_B/σ² ~ χ²(M−1)/M        (2.2; figure 2.1)

    if they are taken from M independent normal values. A batch of m images has m·H·W values per channel, which are not
    independent:

    - positions of an image are alike, which makes M less; samples of a batch that are alike, as of data that is not
      shuffled, make it even less than m;
    - behind another batch normalization the batch already has a mean of 0 and a variance of 1. What is left of the
      noise of the mean is little, and M may be far above m·H·W. The noise of the variance remains: there the law of
      ξ_σ with this M does not hold.

    M is therefore measured, as the number of independent values whose mean is as noisy: Var ξ_μ = 1/M. As
    σ² = E[σ²_B] + Var[μ_B] holds whatever the dependence within a batch,

        M = σ²/Var[μ_B] = 1 + E[σ²_B]/Var[μ_B],

    where Var[μ_B] is the unbiased variance over K batches. The same estimate is right for the batches of an epoch,
    drawn without replacement: the mean of the data is then known too well by just what the K−1 makes up for. Each
    layer has one M, of the average of Var ξ_μ over channels; each channel has its own μ and σ².

    So of single batches the variance of ξ_μ and the mean of ξ_σ, (M−1)/M, fit by construction. What can fail is their
    shapes (`NoiseDistribution.distance`) and the variance of ξ_σ, 2(M−1)/M² by the law; see also `LayerNoise.freedom`.
    Channels whose M differ count as misfit, too.

    With a momentum λ the noises are those of the moving averages with which `MomentumBatchNorm*` normalizes, over the
    batches in their order: Var ξ_μ = (1−λ)/((1+λ) M) if batches are independent, while the thesis's 2.11 has (1−λ)/M
    (`LayerNoise.predicted_variance`). Both variances of the averages are then put to the test. The law of ξ_σ is here
    the scaled chi-square of the right mean and variance.

    All batch normalizations normalize groups of m consecutive samples as in training, other modules are in evaluation
    mode, and the model is left as it is found: parameters, buffers, gradients, modes, torch's random state. ε is left
    out. Of each batch and channel two numbers are kept until the end. With several processes, each measures its own
    data.

    Args:
        model: Any model with batch normalizations; may be wrapped for DDP or compiled.
        loader: Gives batches, shuffled as in training: a tensor; a tuple or list, whose first element is the input; or
            a mapping, for ``model(**batch)``. They are moved to the model's device.
        batch_size: m. The loader's batches are divided into groups of m, and what is left over is not measured.
        momentum: λ, at least 0 and less than 1, for all layers. None: of `MomentumBatchNorm*` layers their
            `stat_momentum`, of others 0.
        call: ``call(model, batch)``, for a model that is run otherwise.
        where: Which layers to measure: a predicate of (qualified name, module). All of them by default.
        max_batches: Stop after so many of the loader's batches.

    Returns:
        The noise of each layer.

    Raises:
        ValueError: If an argument is out of its range, there is no such layer, there are too few batches of m samples,
            features are not finite or do not differ between batches, or a layer has one value per channel in a batch.

    Warns:
        WellcondWarning: About layers that the pass did not reach or that have no noise; they are left out.

    Source: thesis 2.2, theorem 1, figure 2.1, 2.11.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4))
        >>> images = torch.randn(2000, 1, 1, 1) + 0.1 * torch.randn(2000, 1, 6, 6)
        >>> layer = batch_noise(model, images.split(100), batch_size=10).layers["1"]
        >>> layer.batches, layer.elements, 7 < layer.effective < 14  # positions of an image are nearly the same
        (200, 360.0, True)
    """
    check_positive_integer("batch_size", batch_size)
    if max_batches is not None:
        check_positive_integer("max_batches", max_batches)
    if momentum is not None and not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1) or be None, got {momentum!r}")
    inner = unwrapped(model)
    layers, selected = _batch_norms(inner, where)
    momenta = {name: _momentum_of(name, layers[name]) if momentum is None else momentum for name in selected}
    batches = {name: _Batches() for name in selected}

    def observe(name: str, seen: Seen) -> None:
        if name in batches:
            batches[name].add(seen)

    # The noise of all of them is in the features, as in training.
    passed = observed_pass(inner, loader, batch_size, layers, observe, call, max_batches)
    reached = {name: own for name, own in batches.items() if own.count}
    check_reached(passed, batches, reached)
    measured = {name: own.noise(name, batch_size, momenta[name]) for name, own in reached.items()}
    found = {name: noise for name, noise in measured.items() if noise is not None}
    if not found:
        raise ValueError(f"there is no noise to measure in {quoted_names(measured)}: {_STILL}")
    problems = []
    if missed := batches.keys() - reached.keys():
        problems.append(f"no batch of {batch_size} samples reached {quoted_names(sorted(missed))}")
    if still := measured.keys() - found.keys():
        problems.append(f"{quoted_names(sorted(still))} has no noise: {_STILL}")
    if problems:
        warnings.warn(f"batch_noise: {'; '.join(problems)}", WellcondWarning, stacklevel=3)
    return BatchNoise(batch_size, found)


class _Batches:
    """The statistics of a layer's batches, in their order."""

    def __init__(self) -> None:
        self._means: list[Tensor] = []
        self._vars: list[Tensor] = []
        self._elements = 0
        self.count = 0

    def add(self, seen: Seen) -> None:
        """Keep what a call of the layer saw."""
        batches = len(seen.batches.mean)
        # On the CPU, where they can be many, and where float64 exists.
        self._means.append(seen.batches.mean.detach().cpu())
        self._vars.append(seen.batches.var.detach().cpu())
        assert isinstance(seen.instances.elements, int)
        self._elements += batches * seen.rows * seen.instances.elements
        self.count += batches

    def noise(self, name: str, batch_size: int, momentum: float) -> LayerNoise | None:
        """Return the noise; None if there is none.

        Raises:
            ValueError: If the batches are too few or not finite.
        """
        kept = _forgetting(momentum)
        needed = max(2, kept)
        if self.count < needed:
            why = f"as it takes momentum {momentum:g} to forget its beginning, " if momentum else ""
            raise ValueError(f"{name!r} needs at least {needed} batches of {batch_size} samples, {why}got {self.count}")
        precision = torch.finfo(self._means[0].dtype).eps
        means, variances = torch.cat(self._means).double(), torch.cat(self._vars).double()
        if not (means.isfinite().all() and variances.isfinite().all()):
            raise ValueError(f"features that are not finite reached {name!r}")
        mu, within = means.mean(0), variances.mean(0)
        between = means.var(0)
        # The law of total variance, with unbiased estimates of both parts.
        sigma2 = within + between
        varying = sigma2 > (4 * precision * mu).square()
        if not varying.any():
            return None
        share = float((between[varying] / sigma2[varying]).mean())
        if not _NO_NOISE < share < 1 - _NO_NOISE:
            return None
        effective = 1 / share
        scale2 = sigma2[varying]
        xi_mean = _averaged((mu - means)[:, varying] / scale2.sqrt(), momentum)
        xi_var = _averaged(variances[:, varying] / scale2, momentum)
        mean_law = Noise(0.0, batch_mean_noise(1, momentum).variance / effective)
        # χ²(M−1)/M, averaged: (1−λ)/(1+λ) of its variance.
        var_law = Noise(1 - share, batch_mean_noise(1, momentum).variance * 2 * (1 - share) * share)
        variance, found = _distribution(xi_var, kept, var_law, chi_square_cdf(var_law), at_least=0.0)
        own_shape = chi_square_cdf(found)
        return LayerNoise(
            mean=_distribution(xi_mean, kept, mean_law, normal_cdf(mean_law))[0],
            variance=variance,
            effective=effective,
            elements=self._elements / self.count,
            freedom=chi_square_freedom(found),
            freedom_distance=ks_distance(xi_var.averages[kept - 1 :], own_shape),
            momentum=momentum,
            batches=self.count,
            channels=int(varying.sum()),
            population_mean=mu,
            population_var=sigma2,
        )


class _Averages(NamedTuple):
    """Moving averages over batches, and the error that the population's own mean adds to their variance."""

    averages: Tensor
    center: Tensor
    correction: Tensor


def _averaged(values: Tensor, momentum: float) -> _Averages:
    """Return the moving averages of a series [K, C], from its mean on.

    Deviations from the mean of K batches are too small: the average a_t and the mean share their noise, so that
    E[(a_t − mean)²] = Var a_t − Var[batch]/K once a_t has forgotten its beginning. Without momentum that is the
    (K−1)/K of every sample variance.
    """
    center, correction = values.mean(0), values.var(0) / len(values)
    if momentum == 0:
        return _Averages(values, center, correction)
    averages = torch.empty_like(values)
    average = center
    for index, value in enumerate(values):
        average = torch.lerp(value, average, momentum)  # (2.9)
        averages[index] = average
    return _Averages(averages, center, correction)


def _forgetting(momentum: float) -> int:
    """Return after how many batches a moving average no longer depends on its beginning; 1 without momentum."""
    return 1 if momentum == 0 else max(1, math.ceil(math.log(_BEGINNING) / math.log(momentum)))


def _distribution(
    series: _Averages, kept: int, law: Noise, cdf: Distribution, at_least: float = -math.inf
) -> tuple[NoiseDistribution, Noise]:
    values = series.averages[kept - 1 :]
    variance = float(((values - series.center).square().mean(0) + series.correction).mean())
    found = Noise(float(values.mean()), variance)
    reach = 4 * math.sqrt(max(law.variance, variance))
    low, high = max(law.mean - reach, at_least), law.mean + reach
    counts = torch.histc(values, _BINS, low, high)
    histogram = Histogram(
        edges=tuple(torch.linspace(low, high, _BINS + 1, dtype=torch.float64).tolist()),
        counts=tuple(int(count) for count in counts.tolist()),
        outside=values.numel() - int(counts.sum()),
    )
    return NoiseDistribution(found, law, ks_distance(values, cdf), histogram), found


def _batch_norms(model: nn.Module, where: Predicate | None) -> tuple[dict[str, _BatchNorm], list[str]]:
    """Return all batch normalizations by their first name, and the names of those that are selected."""
    names: dict[_BatchNorm, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm):
            names.setdefault(module, []).append(name)
    if not names:
        # By their names, as those of other libraries share no base.
        others = Counter(type(module).__name__ for module in model.modules() if "norm" in type(module).__name__.lower())
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.items()) or "none"
        raise ValueError(
            f"{type(model).__name__} has no batch normalization, whose noise is measured; its normalizations: {kinds}"
        )
    selected = [own[0] for layer, own in names.items() if where is None or any(where(name, layer) for name in own)]
    if not selected:
        raise ValueError(f"{type(model).__name__} has no batch normalization that `where` selects")
    return {own[0]: layer for layer, own in names.items()}, selected


def _momentum_of(name: str, layer: _BatchNorm) -> float:
    if not isinstance(layer, MomentumBatchNorm):
        return 0.0
    if layer.stat_momentum >= 1:
        raise ValueError(f"{name!r} has stat_momentum 1, with which it takes nothing from batches: give a momentum")
    return layer.stat_momentum
