"""EigenNet: linear layers that are whitened in their inputs and in the errors that come back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from wellcond.nn.whitened.linear_maps import AmortizedConv2d, AmortizedLinear
from wellcond.nn.whitened.plain_layers import check_convolution, check_linear
from wellcond.nn.whitened.running_covariance import RunningCovariance
from wellcond.nn.whitened.wnn import WhitenedLayer, Whitening, WhiteningOptions
from wellcond.numerics.linalg import check_damping, damped_eigenvalues, try_eigh
from wellcond.runtime.checks import checked

if TYPE_CHECKING:
    from typing_extensions import Unpack


class EigenOptions(WhiteningOptions, total=False):
    """Options of the whitening of inputs and errors; see `EigenLinear`."""

    error_damping: float | None


class EigenLayer(WhitenedLayer):
    """h = Q (V P (o − μ) + d): what `EigenLinear` and `EigenConv2d` share."""

    error_transform: Tensor

    @checked
    def configure(
        self,
        whitening: Whitening = "zca",
        components: int | None = None,
        error_damping: float | None = None,
        **schedule: Any,
    ) -> None:
        """Check and keep the options, and start as the plain layer."""
        if error_damping is not None:
            try:
                check_damping(error_damping, "relative")
            except ValueError as error:
                raise ValueError(f"error_{error}") from None
        self.error_damping = error_damping
        super().configure(whitening, components, **schedule)

    def start(self) -> None:
        """Forget all statistics and make the constants P = I, μ = 0, Q = I."""
        super().start()
        groups, outputs, _ = self.layout.matrix(self, self.weight).flatten(2).shape
        device, dtype = self.weight.device, self.statistics_dtype
        # Errors of different times have different scales, and under a GradScaler any scale.
        self.errors = RunningCovariance(
            groups, outputs, False, self.stats_decay, scale_free=True, device=device, dtype=dtype
        )
        self.register_buffer("error_transform", torch.eye(outputs, device=device, dtype=dtype).repeat(groups, 1, 1))

    def watch(self, output: Tensor) -> None:
        """Ask for the errors ∂L/∂h of an observed pass."""
        if output.requires_grad:
            output.register_hook(self._observe_errors)

    def _observe_errors(self, grad: Tensor) -> None:
        self.errors.observe(self.output_rows(grad.detach()))

    def folded_matrices(self) -> tuple[Tensor, Tensor | None]:
        """Return W = Q V P [groups, out, d] and b = Q d − W μ [groups, out]."""
        weight, bias = self.matrices()
        weight = self.error_transform @ weight @ self.transform
        if bias is None:
            return weight, None
        outer = self.error_transform @ bias.unsqueeze(-1) - weight @ self.center.unsqueeze(-1)
        return weight, outer.squeeze(-1)

    def solve(self) -> bool:
        """Renew P, μ and Q, and re-project V and d so that the layer's function stays as it is."""
        whitener, coloring = self.whitener(), self.error_whitener()
        if whitener is None or coloring is None:
            return False
        transform, inverse = whitener
        error_transform, error_inverse = coloring
        weight, bias = self.matrices()
        weight = self.error_transform @ weight @ self.transform
        if bias is not None:
            # Q d is what the layer gives for o = μ: the new one gives for μ_new what the old one gave.
            outer = self.error_transform @ bias.unsqueeze(-1)
            outer = outer + weight @ (self.inputs.mean - self.center).unsqueeze(-1)
            bias = (error_inverse @ outer).squeeze(-1)
        self.write(error_inverse @ weight @ inverse, bias)
        self.transform.copy_(transform)
        self.center.copy_(self.inputs.mean)
        self.error_transform.copy_(error_transform)
        return True

    def error_whitener(self) -> tuple[Tensor, Tensor] | None:
        """Return Q = c (Σ_δ + ε)^(−1/2) and its inverse; None if the factorization fails.

        c is such that Q leaves the errors' mean square as it is: E‖Qᵀδ‖² = E‖δ‖².
        """
        found = try_eigh(self.errors.covariance)
        if found is None:
            return None
        values, vectors = found
        damping = self.damping if self.error_damping is None else self.error_damping
        gains = damped_eigenvalues(values, damping, self.damping_mode).rsqrt()
        before, after = values.sum(-1, keepdim=True), (values * gains.square()).sum(-1, keepdim=True)
        gains = torch.where(before > 0, gains * (before / after).sqrt(), 1.0).unsqueeze(-2)
        transform, inverse = (vectors * gains) @ vectors.mT, (vectors / gains) @ vectors.mT
        if not bool(torch.isfinite(transform).all() & torch.isfinite(inverse).all()):
            return None
        return transform, inverse

    def described(self) -> dict[str, object]:
        """Return the options that `repr` shows."""
        own: dict[str, object] = {} if self.error_damping is None else {"error_damping": self.error_damping}
        return super().described() | own


class EigenLinear(EigenLayer, AmortizedLinear):
    """A linear layer whose inputs and errors are whitened: h = Q (V õ + d), õ = P(o − μ).

    P = (Σ_o + ε)^(−1/2) as in `WhitenedLinear`. With z = V õ + d the error at z is δz = Qᵀ δh, and Q is a multiple of
    (Σ_δ + ε)^(−1/2), Σ_δ = E[δh δhᵀ]. So both Kronecker factors of this layer's block of the Fisher matrix,
    E[δz δzᵀ] ⊗ E[õ õᵀ], are near multiples of I, and plain gradient descent on V and d is natural gradient descent.

    Errors have no scale of their own: a mean over the batch divides them, a GradScaler multiplies them. Every update
    of Σ_δ is divided by its mean variance, and Q is scaled so that E‖δz‖² = E‖δh‖²: it evens out the errors'
    directions and leaves the size of gradients, and with it the learning rate, alone.

    Errors are seen by a hook on the output of the passes whose inputs are observed. A refresh leaves the layer's
    function as it is: V ← Q_new⁻¹ Q_old V P_old P_new⁻¹ and d ← Q_new⁻¹ (Q_old d + Q_old V P_old (μ_new − μ_old)).
    What to know before use is said at `WhitenedLinear`.

    Args:
        in_features: As for `nn.Linear`.
        out_features: See there.
        bias: Whether there is d, and with it μ.
        device: Of parameters and statistics.
        dtype: Of the parameters.
        options: ``error_damping``: ε for the errors, None for that of the inputs (``damping``); its mode is the same
            (``damping_mode``). ``whitening`` … ``synchronize``: of `WhitenedLinear`.

    Raises:
        ValueError: If an option is outside its range.

    Source:
        Luo, EigenNet: Towards Fast and Structural Learning of Deep Neural Networks, IJCAI 2017.

    Example:
        >>> layer = EigenLinear(2, 2, bias=False, refresh_every=None, stats_every=1, damping=0.0)
        >>> layer(torch.eye(2)).backward(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        >>> layer.refresh()
        True
        >>> layer.transform, layer.error_transform  # Σ_o = I/2, Σ_δ ∝ diag(1, 9)
        (tensor([[[1.4142, 0.0000],
                 [0.0000, 1.4142]]]), tensor([[[2.2361, 0.0000],
                 [0.0000, 0.7454]]]))
    """

    @checked
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[EigenOptions],
    ) -> None:
        check_linear(in_features, out_features)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.configure(**options)


class EigenConv2d(EigenLayer, AmortizedConv2d):
    """A convolution whose input patches and errors are whitened; see `EigenLinear`.

    Both second moments are taken over samples and positions, for each group of channels its own.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: As for `nn.Conv2d`, like the following.
        stride: See there.
        padding: See there.
        dilation: See there.
        groups: See there.
        bias: Whether there is d, and with it μ.
        padding_mode: See there.
        device: Of parameters and statistics.
        dtype: Of the parameters.
        options: As for `EigenLinear`.

    Raises:
        ValueError: If an option is outside its range.

    Source:
        Luo, EigenNet: Towards Fast and Structural Learning of Deep Neural Networks, IJCAI 2017.

    Example:
        >>> layer = EigenConv2d(3, 8, 3, padding=1, refresh_every=100)
        >>> layer(torch.zeros(2, 3, 5, 5)).shape, layer.error_transform.shape
        (torch.Size([2, 8, 5, 5]), torch.Size([1, 8, 8]))
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
        **options: Unpack[EigenOptions],
    ) -> None:
        check_convolution(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        geometry = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(in_channels, out_channels, *geometry, device, dtype)
        self.configure(**options)
