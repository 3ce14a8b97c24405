"""Network Deconvolution: a convolution that whitens the patches it reads."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from wellcond.layouts import ConvLayout, WhitenedConvLayout, register_layout
from wellcond.nn.norm.buffers import KeptStatistics
from wellcond.nn.whitened.plain_layers import arguments_of, check_convolution, geometry_of, with_parameters
from wellcond.numerics.moments import statistics_dtype
from wellcond.numerics.newton_schulz import newton_schulz_root
from wellcond.numerics.windows import Window, patch_rows
from wellcond.runtime.autocast import without_autocast
from wellcond.runtime.checks import check_positive_integer, checked, checks_itself, is_finite_number, shown

_LAYOUT = ConvLayout()


class NetworkDeconvolution2d(KeptStatistics, nn.Conv2d):
    """A 2d convolution of whitened patches (Ye et al., "Network Deconvolution", ICLR 2020).

    Every patch x under the kernel is replaced by D(x − μ) with D ≈ (Cov + εI)^(−1/2), so that neither its channels nor
    its pixels are correlated any more. That is itself a convolution, with w' = wD and b' = b − w'μ. It stands in for a
    convolution and the batch normalization beside it.

    In training μ and the covariance are the batch's own, from patches `sampling_stride` outputs apart (padding
    included), and gradients flow through both. For 1 × 1 kernels every `sampling_stride`²-th of the pixels that the
    kernel reads is taken, in the order of the batch (with a stride, the authors count those that it skips, too).
    Evaluation uses running averages of μ and D, which begin at 0 and at the identity and are not debiased: with the
    default momentum they need some 30 batches.

    D comes from a fixed number of Newton-Schulz steps, which leave small eigenvalues below 1: after the default five,
    one that is 1/1000 of the covariance's norm has a variance of about 0.06. `newton_schulz_root` says more.

    Wide layers are whitened in blocks of channels, each with its own μ and D, groups of the convolution never mixing.
    With five steps D costs some 36 · (block · taps)³ multiplications for each block, forward and backward, whatever the
    batch: in wide layers of small maps, where that dwarfs the convolution, take smaller blocks.

    The authors' blocks differ (`interleaved=True`): all blocks are whitened by *one* μ and D, from the patches of all
    of them, and a block is not a run of channels but every (C/block)-th of a patch's numbers in the order (channel,
    tap), a mix of channels and taps. That is cheaper, one D of (block · taps)² instead of one for each block, but
    decorrelates only what the blocks have in common. With one block both are the same.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: As for `nn.Conv2d`, like all arguments up to `padding_mode`.
        stride: Steps between outputs.
        padding: Zeros (or what `padding_mode` says) around the input; or "same" or "valid".
        dilation: Steps between taps.
        groups: Parts that the channels are cut into.
        bias: Learn a bias. Without, the output still has the whitening's own shift −w'μ.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        eps: ε, added to the covariance's diagonal.
        momentum: Weight of a new batch in the running statistics, in [0, 1]; None for equal weights of all batches.
        steps: Newton-Schulz steps.
        block: Channels whitened together. One that does not divide a group's channels is replaced by the greatest
            common divisor.
        sampling_stride: Take statistics from patches so many outputs apart, along both axes.
        interleaved: Use the authors' blocks.
        device: Of the parameters and statistics.
        dtype: Of the parameters; statistics are float32 or wider.

    Shape:
        Input [N, in_channels, H, W] or [in_channels, H, W], output as that of `nn.Conv2d`. The buffers `running_mean`
        [blocks, d] and `running_deconv` [blocks, d, d] have d = block · taps and a row for each D.

    Raises:
        ValueError: If an argument is out of its range; in forward, if the shape does not fit, or a training batch
            offers a single patch.

    Example:
        >>> layer = NetworkDeconvolution2d(3, 8, 3, padding=1)
        >>> layer(torch.randn(4, 3, 9, 9)).shape
        torch.Size([4, 8, 9, 9])
        >>> layer
        NetworkDeconvolution2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), eps=1e-05, momentum=0.1, \
steps=5, block=3, sampling_stride=3)
    """

    running_mean: Tensor
    running_deconv: Tensor
    num_batches_tracked: Tensor

    @checked
    @checks_itself("eps")
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        steps: int = 5,
        block: int = 64,
        sampling_stride: int = 3,
        interleaved: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_convolution(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        for argument, value in (("steps", steps), ("block", block), ("sampling_stride", sampling_stride)):
            check_positive_integer(argument, value)
        if not is_finite_number(eps) or eps <= 0:
            raise ValueError(f"eps must be positive, got {shown(eps)}")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1] or be None, got {momentum!r}")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self.eps = eps
        self.momentum = momentum
        self.steps = steps
        self.block = math.gcd(block, in_channels // groups) if block < in_channels // groups else in_channels // groups
        self.sampling_stride = sampling_stride
        self.interleaved = interleaved
        # As on `nn.BatchNorm2d`: False freezes the running statistics in training.
        self.track_running_stats = True
        self._blocks = in_channels // groups // self.block
        self._width = self.block * math.prod(self.kernel_size)
        self._register_statistics(self.weight.device)

    @classmethod
    def from_layer(cls, layer: nn.Conv2d, **options: Any) -> NetworkDeconvolution2d:
        """Make the layer of a convolution's geometry and of its very parameters.

        Args:
            layer: An `nn.Conv2d`.
            options: Arguments from `eps` on: `eps`, `momentum`, `steps`, `block`, `sampling_stride`, `interleaved`.

        Returns:
            The layer, in the convolution's training mode, on its device. An optimizer of the convolution's parameters
            goes on with them; hooks of the convolution stay behind.

        Raises:
            TypeError: If it is of another type.
            ValueError: If its parameters are computed by parametrizations.

        Example:
            >>> conv = nn.Conv2d(3, 8, 3, bias=False)
            >>> NetworkDeconvolution2d.from_layer(conv, block=1).weight is conv.weight
            True
        """
        # Made on no device: its own parameters are thrown away, so that no random numbers are drawn for them.
        new = cls(**arguments_of(layer, nn.Conv2d), **options)
        new.weight, new.bias = layer.weight, layer.bias
        new._register_statistics(layer.weight.device)
        return new.train(layer.training)

    @torch.no_grad()
    def to_plain(self) -> nn.Conv2d:
        """Return the plain convolution, w' and b', that this layer is in evaluation.

        Returns:
            An `nn.Conv2d` with parameters of its own, and a bias.

        Example:
            >>> layer = NetworkDeconvolution2d(3, 8, 3).eval()
            >>> x = torch.randn(2, 3, 5, 5)
            >>> torch.allclose(layer.to_plain()(x), layer(x))
            True
        """
        plain = nn.Conv2d(**geometry_of(self) | {"bias": True})
        with_parameters(plain, *self.whitened_weight(self.running_mean, self.running_deconv), self.training)
        return plain

    def forward(self, input: Tensor) -> Tensor:
        """Whiten and convolve.

        Args:
            input: Shape [N, in_channels, H, W], or [in_channels, H, W].

        Returns:
            Shape [N, out_channels, H', W'], or [out_channels, H', W'].

        Raises:
            ValueError: If the shape does not fit, or a training batch offers a single patch.
        """
        if isinstance(input, Proxy):
            # A leaf of symbolic traces, as the convolution that it stands in for is.
            path = input.tracer.path_of_module(self)
            return cast(Tensor, input.tracer.create_proxy("call_module", path, (input,), {}))
        if input.dim() not in (3, 4) or input.shape[-3] != self.in_channels:
            raise ValueError(
                f"expected input of size [N, {self.in_channels}, H, W] or [{self.in_channels}, H, W], "
                f"got {list(input.shape)}"
            )
        with without_autocast(input.device):
            if self.training and input.numel() > 0:
                mean, deconv = self.whitening(input)
                self._track(mean, deconv)
            else:
                mean, deconv = self.running_mean, self.running_deconv
            weight, bias = self.whitened_weight(mean, deconv)
        return cast(Tensor, self._conv_forward(input, weight, bias))

    def sampled_patches(self, input: Tensor) -> Tensor:
        """Lay out the patches that statistics are taken from, block by block.

        Args:
            input: Shape [N, in_channels, H, W], or [in_channels, H, W].

        Returns:
            Shape [blocks, n, d], float32 or wider; with `interleaved`, [groups, n, d] with all blocks' patches as rows.
        """
        padded = _LAYOUT.padded(self, input)
        pixels = math.prod(self.kernel_size) == 1
        apart = 1 if pixels else self.sampling_stride
        window = Window(
            tuple(self.kernel_size), tuple(apart * step for step in self.stride), tuple(self.dilation), self.groups
        )
        rows = patch_rows(padded, window)
        if pixels:
            rows = rows[:, :: self.sampling_stride**2]
        return self._split(rows.to(statistics_dtype(input.dtype)))

    def whitening(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return μ and D of a batch, differentiably.

        Args:
            input: Shape [N, in_channels, H, W], or [in_channels, H, W].

        Returns:
            μ, shape [blocks, d], and D, shape [blocks, d, d]; see the class.

        Raises:
            ValueError: If there is one patch only.
        """
        rows = self.sampled_patches(input)
        samples = rows.shape[1]
        if samples == 1:
            raise ValueError(
                f"expected more than 1 patch when training, got input size {list(input.shape)} "
                f"with sampling_stride={self.sampling_stride}"
            )
        mean = rows.mean(dim=1, keepdim=True)
        centred = rows - mean
        identity = torch.eye(self._width, dtype=rows.dtype, device=rows.device)
        covariance = centred.mT @ centred / samples + self.eps * identity
        return mean.squeeze(1), newton_schulz_root(covariance, self.steps)

    def whitened_weight(self, mean: Tensor, deconv: Tensor) -> tuple[Tensor, Tensor]:
        """Return w' = wD and b' = b − w'μ, the convolution of whitened patches as one of patches.

        Args:
            mean: μ, shape [blocks, d].
            deconv: D, shape [blocks, d, d].

        Returns:
            w' of the shape of the weight, and b', shape [out_channels]; both of the weight's dtype.
        """
        wide = deconv.dtype
        matrix = _LAYOUT.matrix(self, self.weight).flatten(2).to(wide)  # [groups, out, in]
        whitened = self._join(self._split(matrix) @ deconv)
        shared = mean.unsqueeze(1).expand(-1, self._blocks if self.interleaved else 1, -1)
        shift = (whitened @ self._join(shared).mT).flatten()
        bias = -shift if self.bias is None else self.bias.to(wide) - shift
        return whitened.reshape(self.weight.shape).to(self.weight.dtype), bias.to(self.weight.dtype)

    def reset_running_stats(self) -> None:
        """Reset the running statistics to μ = 0 and D = I."""
        self.running_mean.zero_()
        self.running_deconv.copy_(torch.eye(self._width, device=self.running_deconv.device))
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Draw the weight and the bias anew, and reset the running statistics."""
        super().reset_parameters()
        if "running_mean" in self._buffers:
            self.reset_running_stats()

    def extra_repr(self) -> str:
        """Say what the layer was made with."""
        shown: list[str] = [super().extra_repr()]  # type: ignore[no-untyped-call]
        shown += [f"{name}={getattr(self, name)}" for name in ("eps", "momentum", "steps", "block", "sampling_stride")]
        return ", ".join([*shown, "interleaved=True"] if self.interleaved else shown)

    def _register_statistics(self, device: torch.device) -> None:
        count = self.groups * (1 if self.interleaved else self._blocks)
        factory: dict[str, Any] = {"device": device, "dtype": statistics_dtype(self.weight.dtype)}
        identity = torch.eye(self._width, **factory).repeat(count, 1, 1)
        self.register_buffer("running_mean", torch.zeros(count, self._width, **factory))
        self.register_buffer("running_deconv", identity)
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device=device))

    def _track(self, mean: Tensor, deconv: Tensor) -> None:
        """Take a batch's μ and D into the running ones."""
        if self.recomputing or not self.track_running_stats:
            return
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            factor: float | Tensor
            if self.momentum is None:
                factor = self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()
            else:
                factor = self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
            self.running_deconv.lerp_(deconv.to(self.running_deconv.dtype), factor)

    def _split(self, rows: Tensor) -> Tensor:
        """Cut rows [groups, n, channels · taps] into blocks [groups · blocks, n, d], or [groups, n · blocks, d]."""
        if self.interleaved:
            return torch.unflatten(rows, -1, (self._width, self._blocks)).mT.flatten(1, 2)
        return torch.unflatten(rows, -1, (self._blocks, self._width)).transpose(1, 2).flatten(0, 1)

    def _join(self, parts: Tensor) -> Tensor:
        """Undo `_split`."""
        if self.interleaved:
            return torch.unflatten(parts, 1, (-1, self._blocks)).mT.flatten(2)
        return torch.unflatten(parts, 0, (-1, self._blocks)).transpose(1, 2).flatten(2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # The authors' checkpoints have no axis of blocks, and do not count batches.
        for name in ("running_mean", "running_deconv"):
            found, own = state_dict.get(prefix + name), self._buffers[name]
            if isinstance(found, Tensor) and own is not None and found.dim() < own.dim():
                if found.numel() == own.numel():
                    state_dict[prefix + name] = found.reshape(own.shape)
                state_dict.setdefault(prefix + "num_batches_tracked", self.own_or("num_batches_tracked", 0, found))
        super()._load_from_state_dict(state_dict, prefix, *rest)


register_layout(NetworkDeconvolution2d, WhitenedConvLayout())
