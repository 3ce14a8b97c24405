"""Whitened neural networks: linear layers whose input is centred and whitened by constants, renewed now and then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from wellcond.nn.whitened.amortized import AmortizedLayer, ScheduleOptions
from wellcond.nn.whitened.linear_maps import AmortizedConv2d, AmortizedLinear
from wellcond.nn.whitened.plain_layers import check_convolution, check_linear
from wellcond.nn.whitened.running_covariance import RunningCovariance
from wellcond.numerics.linalg import damped_eigenvalues, try_eigh
from wellcond.runtime.autocast import without_autocast
from wellcond.runtime.checks import check_choice, check_positive_integer, checked

if TYPE_CHECKING:
    from typing_extensions import Unpack

Whitening = Literal["zca", "pca"]


class WhiteningOptions(ScheduleOptions, total=False):
    """Options of the input's whitening; see `WhitenedLinear`."""

    whitening: Whitening
    components: int | None


class WhitenedLayer(AmortizedLayer):
    """h = V P (o − μ) + d: what `WhitenedLinear` and `WhitenedConv2d` share."""

    transform: Tensor
    center: Tensor

    @checked
    def configure(self, whitening: Whitening = "zca", components: int | None = None, **schedule: Any) -> None:
        """Check and keep the options, and start as the plain layer."""
        self.set_schedule(**schedule)
        check_choice("whitening", whitening, get_args(Whitening))
        self.whitening = whitening
        width = self.layout.matrix(self, self.weight).flatten(2).shape[2]
        if components is not None:
            check_positive_integer("components", components)
            if components > width:
                raise ValueError(f"components must be at most the {width} inputs of an output, got {components}")
        self.components = components
        self.start()

    def start(self) -> None:
        """Forget all statistics and make the constants P = I, μ = 0."""
        super().start()
        groups, _, width = self.layout.matrix(self, self.weight).flatten(2).shape
        device, dtype = self.weight.device, self.statistics_dtype
        # Without d, nothing could make up for μ: the second moment takes the covariance's place.
        self.inputs = RunningCovariance(
            groups, width, self.bias is not None, self.stats_decay, device=device, dtype=dtype
        )
        self.register_buffer("transform", torch.eye(width, device=device, dtype=dtype).repeat(groups, 1, 1))
        self.register_buffer("center", torch.zeros(groups, width, device=device, dtype=dtype))

    def observe(self, input: Tensor) -> None:
        """Take the input's covariance."""
        for rows in self.input_rows(input.detach()):
            self.inputs.observe(rows)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return W = V P and b = d − V P μ."""
        with without_autocast(self.weight.device):
            weight, bias = self.folded_matrices()
            weight = weight.reshape(self.weight.shape).to(self.weight.dtype)
            return weight, None if bias is None else bias.flatten().to(self.weight.dtype)

    def folded_matrices(self) -> tuple[Tensor, Tensor | None]:
        """Return W [groups, out, d] and b [groups, out] in the dtype of the statistics."""
        weight, bias = self.matrices()
        weight = weight @ self.transform
        return weight, None if bias is None else bias - (weight @ self.center.unsqueeze(-1)).squeeze(-1)

    def matrices(self) -> tuple[Tensor, Tensor | None]:
        """Return V [groups, out, d] and d [groups, out] in the dtype of the statistics."""
        dtype = self.transform.dtype
        weight = self.layout.matrix(self, self.weight).flatten(2).to(dtype)
        return weight, None if self.bias is None else self.layout.bias_matrix(self, self.bias).to(dtype)

    def solve(self) -> bool:
        """Renew P and μ, and re-project V and d so that the layer's function stays as it is."""
        found = self.whitener()
        if found is None:
            return False
        transform, inverse = found
        weight, bias = self.matrices()
        weight = weight @ self.transform
        if bias is not None:
            # What the layer gives for o = μ_new, whose whitened value will be 0.
            bias = bias + (weight @ (self.inputs.mean - self.center).unsqueeze(-1)).squeeze(-1)
        self.write(weight @ inverse, bias)
        self.transform.copy_(transform)
        self.center.copy_(self.inputs.mean)
        return True

    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Make matrices [groups, out, d] and [groups, out] the parameters."""
        self.weight.copy_(weight.reshape(self.weight.shape))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias.flatten())

    def whitener(self) -> tuple[Tensor, Tensor] | None:
        """Return P = (Σ + ε)^(−1/2) and its (pseudo-)inverse from one eigendecomposition; None if that fails."""
        found = try_eigh(self.inputs.covariance)
        if found is None:
            return None
        values = damped_eigenvalues(found[0], self.damping, self.damping_mode).unsqueeze(-2)
        # Ascending: the last ones lead.
        first = 0 if self.components is None else values.shape[-1] - self.components
        values, vectors = values[..., first:].flip(-1), found[1][..., first:].flip(-1)
        transform, inverse = (vectors * values.rsqrt()).mT, vectors * values.sqrt()
        if self.whitening == "zca":
            transform, inverse = vectors @ transform, inverse @ vectors.mT
        else:
            # Directions that are left out are zeros at the end.
            transform, inverse = F.pad(transform, (0, 0, 0, first)), F.pad(inverse, (0, first))
        if not bool(torch.isfinite(transform).all() & torch.isfinite(inverse).all()):
            return None
        return transform, inverse

    def described(self) -> dict[str, object]:
        """Return the options that `repr` shows."""
        chosen: dict[str, object] = {"whitening": self.whitening}
        if self.components is not None:
            chosen["components"] = self.components
        return chosen | super().described()


class WhitenedLinear(WhitenedLayer, AmortizedLinear):
    """A linear layer whose input is whitened: h = V õ + d, õ = P(o − μ), P = (Σ_o + ε)^(−1/2).

    P and μ are constants between refreshes, so that a forward pass costs one product V P beside the plain layer's, and
    evaluation does not depend on the batch. At a refresh V and d (``weight`` and ``bias``) are re-projected,
    V ← V P_old P_new⁻¹ and d ← d + V_old P_old (μ_new − μ_old): the layer's function stays what it was, only the
    coordinates in which it is trained change. The layer begins as the plain layer of its parameters: P = I, μ = 0.

    Plain gradient descent on V is natural gradient descent in the input's half of the Fisher matrix: one step on V
    with fixed P is a step on W = V P whose gradient is multiplied by PᵀP = (Σ_o + ε)⁻¹.

    What to know before use:

    - Without a bias nothing could make up for μ: then μ stays 0 and Σ is the second moment E[o oᵀ].
    - An optimizer's state (momentum) is not re-projected; it fades over the steps after a refresh. Weight decay acts
      on V. What keeps copies of weights over several steps (averaged weights, Lookahead) mixes coordinates: average
      `to_plain` layers.
    - Steps are those of a `torch.optim.Optimizer` that holds the weight. Whatever else updates weights several times
      before a step is complete should have ``refresh_every=None`` and call `refresh` between steps.
    - The weight must be a whole parameter that no other module uses: not tied, parametrized or sharded.
    - Statistics and P are d × d matrices, in float32 or wider. In half precision a refresh rounds V anew.
    - `FeatureWhitening` and `FeatureDescent` leave its gradient as it is: V's input is white already.

    Args:
        in_features: d.
        out_features: Rows of V.
        bias: Whether there is d, and with it μ.
        device: Of parameters and statistics.
        dtype: Of the parameters.
        whitening: ``"zca"``: the symmetric P, closest to the input; ``"pca"``: leading directions first.
        components: d', how many leading directions are kept; None for all. The others are dropped at the first
            refresh, and a refresh is exact only on what is kept.
        damping: ε, added to Σ's eigenvalues.
        damping_mode: ``"relative"``: ε is multiplied by Σ's largest eigenvalue; ``"mean"``: by its mean eigenvalue;
            ``"absolute"``: it is not.
        refresh_every: τ, steps between two refreshes; None for calls of `refresh` alone.
        refresh_warmup: Refresh early too, after 1, 2, 4, … times ``stats_every`` steps until ``refresh_every``.
        stats_every: Steps between two that are observed.
        stats_decay: α of the moving average of statistics; 0 uses the last observed step alone.
        synchronize: Take statistics over all ranks (True), over a process group, or over this process alone (False),
            where ranks then drift apart.

    Raises:
        ValueError: If an option is outside its range.

    Source:
        Desjardins, Simonyan, Pascanu and Kavukcuoglu, Natural Neural Networks, NIPS 2015.

    Example:
        >>> layer = WhitenedLinear(2, 1, refresh_every=None, stats_every=1)
        >>> inputs = torch.tensor([[0.0, 5.0], [2.0, 5.0], [0.0, 7.0], [2.0, 7.0]])
        >>> before = layer(inputs)
        >>> layer.refresh()
        True
        >>> torch.allclose(layer(inputs), before, atol=1e-5)
        True
        >>> (inputs - layer.center) @ layer.transform[0].mT  # damped by 1e-3
        tensor([[-0.9995, -0.9995],
                [ 0.9995, -0.9995],
                [-0.9995,  0.9995],
                [ 0.9995,  0.9995]])
    """

    @checked
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[WhiteningOptions],
    ) -> None:
        check_linear(in_features, out_features)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.configure(**options)


class WhitenedConv2d(WhitenedLayer, AmortizedConv2d):
    """A convolution whose input patches are whitened: h = V P (o − μ) + d for every patch o of the padded input.

    All is linear in the patch, so that the layer is one convolution with the kernel V P, at the borders too. Groups
    have each their own P and μ. See `WhitenedLinear` for what it does and what to know before use; d is
    in_channels/groups · kernel taps here.

    Args:
        in_channels: Channels of the input.
        out_channels: Rows of V.
        kernel_size: As for `nn.Conv2d`, like the following.
        stride: See there.
        padding: See there.
        dilation: See there.
        groups: See there.
        bias: Whether there is d, and with it μ.
        padding_mode: See there.
        device: Of parameters and statistics.
        dtype: Of the parameters.
        options: ``whitening`` … ``synchronize`` of `WhitenedLinear`.

    Raises:
        ValueError: If an option is outside its range.

    Source:
        Desjardins, Simonyan, Pascanu and Kavukcuoglu, Natural Neural Networks, NIPS 2015.

    Example:
        >>> layer = WhitenedConv2d(3, 8, 3, padding=1, refresh_every=100)
        >>> layer(torch.zeros(2, 3, 5, 5)).shape, layer.transform.shape
        (torch.Size([2, 8, 5, 5]), torch.Size([1, 27, 27]))
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
        **options: Unpack[WhiteningOptions],
    ) -> None:
        check_convolution(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
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
            device,
            dtype,
        )
        self.configure(**options)
