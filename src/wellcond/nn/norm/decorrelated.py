"""Decorrelated Batch Normalization whitens the channels of a batch, by eigendecomposition."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wellcond.nn.functional.fusion import Unfusible
from wellcond.nn.functional.group_whitening import group_covariance, group_width, in_format_of, map_groups
from wellcond.nn.norm.base import StatisticsNorm
from wellcond.numerics.differentiable_root import zca
from wellcond.numerics.moments import Moments, ghost_sizes, positions, statistics_dtype
from wellcond.runtime.autocast import without_autocast
from wellcond.runtime.checks import check_positive_integer, checked
from wellcond.runtime.ranks import Ranks


class _Statistics(NamedTuple):
    """What groups of samples are whitened with: moments [groups, C], and W [groups, C/d, d, d]."""

    moments: Moments
    whitening: Tensor


class BatchWhitening(Unfusible, StatisticsNorm):
    """Base of the layers that whiten groups of channels with the batch's covariance: y = γ·W(x − μ) + β.

    Subclasses say what W is (`whitening`). Beside the running mean and variance, whose names and meaning are those of
    `nn.BatchNorm*`, the layer keeps `running_whitening`, the average of the batches' W, shape [C/d, d, d]; evaluation
    uses it and the running mean. A plain BatchNorm's state dict gives it the diagonal 1/√(σ² + ε), so that evaluation
    is as that one's.

    Inputs of half precision are computed with in float32, and the output is rounded once: with W rounded, too, it is
    less white by an order of magnitude.

    Its arguments are those of `DecorrelatedBatchNorm2d`.
    """

    tracks_batch_moments = False
    running_whitening: Tensor | None

    @checked
    def __init__(
        self,
        num_features: int,
        channels_per_group: int = 16,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        group_size: int | None = None,
        synchronize: bool | dist.ProcessGroup = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_integer("channels_per_group", channels_per_group)
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            group_size=group_size,
            synchronize=synchronize,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.channels_per_group = group_width(num_features, channels_per_group)
        whitening = None
        if self.running_mean is not None:
            width = self.channels_per_group
            whitening = torch.empty(
                num_features // width, width, width, device=self.running_mean.device, dtype=self.running_mean.dtype
            )
        self.register_buffer("running_whitening", whitening)
        self.reset_running_stats()

    @abstractmethod
    def whitening(self, covariance: Tensor) -> Tensor:
        """Return W of Σ, both [C/d, d, d], with its graph."""

    def normalize_batch(self, input: Tensor) -> Tensor:
        """Whiten a training batch with its own mean and covariance, and take these into the running ones."""
        self._check_enough(input)
        with without_autocast(input.device):
            wide = input.to(statistics_dtype(input.dtype))
            parts = [self._groups(part, count) for part, count in _equal_parts(wide, self.group_size)]
            self._track_groups([statistics for _, statistics in parts])
            outputs = [output for output, _ in parts]
            output = outputs[0] if len(parts) == 1 else torch.cat(outputs)
            return in_format_of(output, input).to(input.dtype)

    def _groups(self, wide: Tensor, count: int) -> tuple[Tensor, _Statistics]:
        """Whiten each of so many equal groups of samples with its own mean and covariance; return these, too."""
        samples = wide.shape[0] // max(count, 1)
        # The groups are taken for channels of their own: [count·n, C] to [n, count·C].
        folded = wide if count == 1 else wide.unflatten(0, (count, samples)).transpose(0, 1).flatten(1, 2)
        mean, covariance = group_covariance(folded, self.channels_per_group)
        elements: int | Tensor = samples * positions(wide)
        if self.synchronize is not False:
            mean, covariance, elements = _over_ranks(mean, covariance, elements, Ranks(self.synchronize))
        whitening = self.whitening(covariance)
        output = self._whitened(folded, mean, whitening)
        if count > 1:
            output = output.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1)
        var = covariance.diagonal(dim1=-2, dim2=-1).reshape(count, -1)
        statistics = _Statistics(Moments(mean.view(count, -1), var, elements), whitening.unflatten(0, (count, -1)))
        return output, statistics

    def normalize_with_estimates(self, input: Tensor) -> Tensor:
        """Whiten with the running mean and the running W."""
        assert self.running_mean is not None
        assert self.running_whitening is not None
        with without_autocast(input.device):
            wide = input.to(statistics_dtype(input.dtype))
            mean, whitening = self.running_mean.to(wide.dtype), self.running_whitening.to(wide.dtype)
            return self._whitened(wide, mean, whitening).to(input.dtype)

    def _whitened(self, wide: Tensor, mean: Tensor, whitening: Tensor) -> Tensor:
        """Return γ·W(x − μ) + β as one map, (γW)x + (β − γWμ)."""
        groups = mean.numel() // self.num_features
        if self.weight is not None:
            whitening = whitening * self.weight.to(wide.dtype).repeat(groups).view(*whitening.shape[:2], 1)
        offset = -(whitening @ mean.view(*whitening.shape[:2], 1)).flatten()
        if self.bias is not None:
            offset = offset + self.bias.to(wide.dtype).repeat(groups)
        return map_groups(wide, whitening, offset)

    def _track_groups(self, parts: Sequence[_Statistics]) -> None:
        """Take a batch's mean, variances and W into the running ones, those of ghost groups as their average."""
        with torch.no_grad():
            elements = parts[0].moments.elements
            if len(parts) > 1:
                rows = [[float(part.moments.elements)] for part in parts for _ in part.moments.mean]
                elements = parts[0].moments.mean.new_tensor(rows)
            means = torch.cat([part.moments.mean for part in parts])
            variances = torch.cat([part.moments.var for part in parts])
            self.track(Moments(means, variances, elements))
            empty = not isinstance(elements, Tensor) and elements == 0
            if self.updates and self.running_whitening is not None and not empty:
                whitening = torch.cat([part.whitening for part in parts]).mean(0)
                self.running_whitening.lerp_(whitening.to(self.running_whitening.dtype), self.factor())

    def reset_running_stats(self) -> None:
        """Reset the running mean to 0, the running variance to 1, the running W to I and the number of batches to 0."""
        super().reset_running_stats()
        if self._buffers.get("running_whitening") is not None:
            assert self.running_whitening is not None
            self.running_whitening.zero_().diagonal(dim1=-2, dim2=-1).fill_(1.0)

    def statistics(self) -> Iterator[tuple[str, torch.dtype]]:
        """Name the buffers that hold statistics."""
        yield from super().statistics()
        yield "running_whitening", torch.float32

    def described(self) -> dict[str, object]:
        """Return the arguments that `repr` shows."""
        return {"channels_per_group": self.channels_per_group, **super().described()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        key, source = prefix + "running_whitening", prefix + "running_var"
        if self.running_whitening is not None and key not in state_dict and source in state_dict:
            # A plain BatchNorm's checkpoint: it standardizes, which is a diagonal W.
            scale = (state_dict[source].to(self.running_whitening.dtype) + self.eps).rsqrt()
            if scale.shape == (self.num_features,):  # Another shape is torch's error to raise.
                state_dict[key] = torch.diag_embed(scale.view(self.running_whitening.shape[:2]))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class DecorrelatedBatchNorm(BatchWhitening):
    """Decorrelated Batch Normalization of inputs of any number of dimensions; use `DecorrelatedBatchNorm2d`."""

    def whitening(self, covariance: Tensor) -> Tensor:
        """Return (Σ + εI)^(−1/2)."""
        return zca(covariance, self.eps)


class DecorrelatedBatchNorm2d(DecorrelatedBatchNorm, nn.BatchNorm2d):
    """Whitening of groups of channels of [N, C, H, W] by each batch's covariance (Huang et al., 2018; slides, part 3).

    y = γ·(Σ + εI)^(−1/2)(x − μ) + β, with the mean and the biased covariance of a group's channels over samples and
    positions. The inverse root is the symmetric one (ZCA), so that a channel stays the one that it was, and is
    differentiated through, exactly also where eigenvalues are equal. Evaluation uses the running mean and the running
    average of the batches' inverse roots. Groups of one channel are batch normalization.

    A group should see many more values (N·H·W) than it has channels: with as many or fewer the covariance is singular,
    ε alone keeps the inverse root finite, and the batch's noise is whitened with the batch. ε is batch normalization's:
    below it lies what rounds in features of unit scale, also in bfloat16; a larger one (1e-3) magnifies small
    directions less.

    Inputs of half precision are computed with in float32, which takes its memory; the output is rounded once.

    Args:
        num_features: C.
        channels_per_group: The most channels that are whitened together. The width of the groups is the largest divisor
            of C not above it (of 24 channels at 16: 12; of 17: 1), and then the attribute of this name.
        eps: ε, added to the covariance's diagonal.
        momentum: Weight of a new batch in the running statistics; None for equal weights of all batches.
        affine: Learn γ and β.
        track_running_stats: Keep running statistics; without, evaluation uses the batch's own.
        group_size: Whiten ghost groups of so many samples, in the batch's order; None for the batch as a whole.
        synchronize: Take the batch over all ranks (True), over a process group, or over this process alone (False).
        bias: Learn β where γ is learned, as of `nn.BatchNorm*`.
        device: Of the parameters and statistics.
        dtype: Of the parameters; statistics are float32 or wider.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> layer = DecorrelatedBatchNorm2d(4, affine=False)
        >>> mixed = torch.einsum("ij,njhw->nihw", torch.randn(4, 4), torch.randn(8, 4, 6, 6))
        >>> white = layer(mixed).transpose(0, 1).flatten(1)
        >>> (white.cov(correction=0) - torch.eye(4)).abs().max() < 0.05
        tensor(True)
    """


def _equal_parts(x: Tensor, group_size: int | None) -> list[tuple[Tensor, int]]:
    """Return consecutive samples, and into how many ghost groups of equal size they are divided."""
    sizes = ghost_sizes(x.shape[0], group_size)
    if sizes is None:
        return [(x, 1)]
    if sizes[-1] == sizes[0]:
        return [(x, len(sizes))]
    last = x.shape[0] - sizes[-1]
    return [(x[:last], len(sizes) - 1), (x[last:], 1)]


def _over_ranks(
    mean: Tensor, covariance: Tensor, count: int | Tensor, ranks: Ranks
) -> tuple[Tensor, Tensor, int | Tensor]:
    """Return the mean and covariance of all ranks' batches together, with their graph, and the number of values."""
    if ranks.size == 1:
        return mean, covariance, count
    own = torch.full((1,), float(count), dtype=mean.dtype, device=mean.device)
    rows = ranks.differentiable_gather(torch.cat([mean, covariance.flatten(), own]))
    means, covariances = rows[:, :-1].split([mean.numel(), covariance.numel()], dim=1)
    counts = rows[:, -1:].detach()
    total = counts.sum()
    share = counts / total.clamp_min(1)
    together = (share * means).sum(0)
    apart = (means - together).view(-1, *covariance.shape[:2])
    between = (apart.unsqueeze(-1) * apart.unsqueeze(-2)).flatten(1)
    return together, (share * (covariances + between)).sum(0).view_as(covariance), total
