"""Generalized whitened networks: linear layers whose output is whitened, and cut to its leading directions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from wellcond.nn.whitened.amortized import AmortizedLayer, ScheduleOptions
from wellcond.nn.whitened.linear_maps import AmortizedConv2d, AmortizedLinear, take_over
from wellcond.nn.whitened.plain_layers import arguments_of, check_convolution, check_linear
from wellcond.nn.whitened.running_covariance import RunningCovariance
from wellcond.numerics.linalg import damped_eigenvalues, try_eigh
from wellcond.runtime.autocast import without_autocast
from wellcond.runtime.checks import check_choice, check_positive_integer, checked

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

Directions = Literal["nearest", "pca"]


class GeneralizedOptions(ScheduleOptions, total=False):
    """Options of the output's whitening; see `GeneralizedWhitenedLinear`."""

    directions: Directions


class GeneralizedWhitenedLayer(AmortizedLayer):
    """h = P (h̃ − m), h̃ = W o + b: what `GeneralizedWhitenedLinear` and `GeneralizedWhitenedConv2d` share."""

    transform: Tensor
    center: Tensor

    @checked
    def configure(self, outputs: int, directions: Directions = "nearest", **schedule: Any) -> None:
        """Check and keep the options, and start with the first outputs of the plain layer."""
        self.set_schedule(**schedule)
        check_choice("directions", directions, get_args(Directions))
        self.directions = directions
        self._outputs = outputs
        self.start()

    def start(self) -> None:
        """Forget all statistics and make the constants P = the first rows of I, m = 0."""
        super().start()
        groups, hidden, _ = self.layout.matrix(self, self.weight).flatten(2).shape
        device, dtype = self.weight.device, self.statistics_dtype
        self.hidden = RunningCovariance(groups, hidden, True, self.stats_decay, device=device, dtype=dtype)
        first = torch.eye(self._outputs // groups, hidden, device=device, dtype=dtype)
        self.register_buffer("transform", first.repeat(groups, 1, 1))
        self.register_buffer("center", torch.zeros(groups, hidden, device=device, dtype=dtype))

    @torch.no_grad()
    def observe(self, input: Tensor) -> None:
        """Take the covariance of h̃, which the pass itself does not compute."""
        with without_autocast(input.device):
            hidden = self.map(input.detach().to(self.weight.dtype), self.weight, self.bias)
        self.hidden.observe(self.output_rows(hidden))

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return P W and P (b − m)."""
        dtype = self.transform.dtype
        with without_autocast(self.weight.device):
            weight = self.transform @ self.layout.matrix(self, self.weight).flatten(2).to(dtype)
            shift = -self.center
            if self.bias is not None:
                shift = shift + self.layout.bias_matrix(self, self.bias).to(dtype)
            bias = (self.transform @ shift.unsqueeze(-1)).flatten()
            weight = weight.reshape(-1, *self.weight.shape[1:])
            return weight.to(self.weight.dtype), bias.to(self.weight.dtype)

    def solve(self) -> bool:
        """Renew P and m."""
        transform = self.whitener()
        if transform is None or not bool(torch.isfinite(transform).all()):
            return False
        self.transform.copy_(transform)
        self.center.copy_(self.hidden.mean)
        return True

    def whitener(self) -> Tensor | None:
        """Return P [groups, d', D] with P Σ Pᵀ = I, of the leading directions of Σ; None if that fails."""
        found = try_eigh(self.hidden.covariance)
        if found is None:
            return None
        leading = self.transform.shape[1]
        values = damped_eigenvalues(found[0], self.damping, self.damping_mode)[..., -leading:].flip(-1)
        vectors = found[1][..., -leading:].flip(-1)
        values = values.unsqueeze(-2)
        transform = (vectors * values.rsqrt()).mT
        if self.directions == "pca":
            return transform
        # All R·P with orthogonal R whiten as well. E‖R P x − P_old x‖² is least for the orthogonal polar factor of
        # P_old (Σ + ε) Pᵀ (Procrustes).
        try:
            left, _, right = torch.linalg.svd(self.transform @ (vectors * values.sqrt()))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return None
        nearest: Tensor = left @ right @ transform
        return nearest

    def described(self) -> dict[str, object]:
        """Return the options that `repr` shows."""
        return {"directions": self.directions} | super().described()


class GeneralizedWhitenedLinear(GeneralizedWhitenedLayer, AmortizedLinear):
    """A linear layer whose output is whitened: h = P (h̃ − m), h̃ = W o + b, E[h hᵀ] = I.

    W has D rows (``hidden_features``), and P keeps the d' leading directions of Σ = E[(h̃ − m)(h̃ − m)ᵀ], scaled by
    (λ + ε)^(−1/2). P and m are constants between refreshes, so that a forward pass is a plain layer of d' outputs plus
    one product P W, and evaluation does not depend on the batch. Beside `WhitenedLinear` it is the cheaper one for
    convolutions: Σ is as wide as the channels, not as the patches.

    **A refresh changes the layer's function**: to whiten the output is to change it, and what follows, usually a
    nonlinearity, cannot make up for it. What is left free, the rotation of h, is chosen such that h changes least
    (``directions="nearest"``; with D = d' the first refresh is ZCA). The source's ``"pca"`` orders h by variance,
    and at each refresh may turn and swap its components. Follow the layer by batch normalization, as the source does
    (φ = h/√Var h, γ, β): between refreshes W moves, and E[h hᵀ] with it. b shifts h only until the next refresh takes
    that out. The layer begins with the first d' outputs of its plain layer: P = the first rows of I, m = 0.

    Statistics of h̃ are taken as the layer trains; the older of them are of earlier W. ``stats_decay=0`` uses the
    latest alone. What else to know before use is said at `WhitenedLinear`.

    Args:
        in_features: As for `nn.Linear`.
        out_features: d'.
        hidden_features: D, at least d'; None for d'.
        bias: Whether there is b.
        device: Of parameters and statistics.
        dtype: Of the parameters.
        options: ``directions``: ``"nearest"`` or ``"pca"``. ``damping`` … ``synchronize``: of `WhitenedLinear`.

    Raises:
        ValueError: If an option is outside its range.

    Source:
        Luo, Learning Deep Architectures via Generalized Whitened Neural Networks, ICML 2017.

    Example:
        >>> layer = GeneralizedWhitenedLinear(4, 2, hidden_features=3, refresh_every=None, stats_every=1, damping=0.0)
        >>> inputs = torch.randn(100, 4)
        >>> layer(inputs).shape, layer.refresh()
        (torch.Size([100, 2]), True)
        >>> torch.allclose(layer(inputs).T @ layer(inputs) / 100, torch.eye(2), atol=1e-4)
        True
    """

    @checked
    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[GeneralizedOptions],
    ) -> None:
        check_linear(in_features, out_features)
        hidden = _hidden("features", out_features, hidden_features)
        super().__init__(in_features, hidden, bias, device, dtype)
        self.out_features, self.hidden_features = out_features, hidden
        self.configure(out_features, **options)

    @classmethod
    def from_layer(cls, layer: nn.Linear, out_features: int | None = None, **options: Any) -> Self:
        """Make a layer that takes over a plain layer's parameters as W and b.

        Args:
            layer: An `nn.Linear`; its outputs are h̃.
            out_features: d'; None for the layer's own.
            options: As for the constructor.

        Raises:
            TypeError: If the layer is of another type.
        """
        arguments = arguments_of(layer, nn.Linear)
        hidden = arguments["out_features"]
        widths = {"out_features": hidden if out_features is None else out_features, "hidden_features": hidden}
        new = cls(**arguments | widths, **options)
        take_over(new, layer)
        return new


class GeneralizedWhitenedConv2d(GeneralizedWhitenedLayer, AmortizedConv2d):
    """A convolution whose output channels are whitened over samples and positions; see `GeneralizedWhitenedLinear`.

    Groups of channels are whitened each on its own.

    Args:
        in_channels: Channels of the input.
        out_channels: d', a multiple of the groups.
        kernel_size: As for `nn.Conv2d`, like the following.
        stride: See there.
        padding: See there.
        dilation: See there.
        groups: See there.
        bias: Whether there is b.
        padding_mode: See there.
        device: Of parameters and statistics.
        dtype: Of the parameters.
        hidden_channels: D, at least d' and a multiple of the groups; None for d'.
        options: As for `GeneralizedWhitenedLinear`.

    Raises:
        ValueError: If an option is outside its range.

    Source:
        Luo, Learning Deep Architectures via Generalized Whitened Neural Networks, ICML 2017.

    Example:
        >>> layer = GeneralizedWhitenedConv2d(3, 4, 3, hidden_channels=8, refresh_every=100)
        >>> layer(torch.zeros(2, 3, 5, 5)).shape, layer.transform.shape
        (torch.Size([2, 4, 3, 3]), torch.Size([1, 4, 8]))
    """

    @checked
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        hidden_channels: int | None = None,
        **options: Unpack[GeneralizedOptions],
    ) -> None:
        check_convolution(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        hidden = _hidden("channels", out_channels, hidden_channels)
        if out_channels % groups:
            raise ValueError(f"out_channels must be a multiple of the {groups} groups, got {out_channels}")
        geometry = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(in_channels, hidden, *geometry, device, dtype)
        self.out_channels, self.hidden_channels = out_channels, hidden
        self.configure(out_channels, **options)

    @classmethod
    def from_layer(cls, layer: nn.Conv2d, out_channels: int | None = None, **options: Any) -> Self:
        """Make a layer that takes over a plain layer's parameters as W and b.

        Args:
            layer: An `nn.Conv2d`; its outputs are h̃.
            out_channels: d'; None for the layer's own.
            options: As for the constructor.

        Raises:
            TypeError: If the layer is of another type.
        """
        arguments = arguments_of(layer, nn.Conv2d)
        hidden = arguments["out_channels"]
        widths = {"out_channels": hidden if out_channels is None else out_channels, "hidden_channels": hidden}
        new = cls(**arguments | widths, **options)
        take_over(new, layer)
        return new


def _hidden(what: str, outputs: int, hidden: int | None) -> int:
    """Return D, checked."""
    check_positive_integer(f"out_{what}", outputs)
    if hidden is None:
        return outputs
    check_positive_integer(f"hidden_{what}", hidden)
    if hidden < outputs:
        raise ValueError(f"hidden_{what} must be at least the {outputs} out_{what}, got {hidden}")
    return hidden
