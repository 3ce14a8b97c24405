"""Measures the smoothness of the loss in the weights, with and without centralization (thesis 4.8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wellcond.diagnostics.passes import Loss, centred_layers, left_as_found, loss_of, norm_of, widened
from wellcond.diagnostics.tables import axes_for, table
from wellcond.layouts import Layer
from wellcond.numerics.moments import statistics_dtype
from wellcond.runtime.checks import AnyInteger, Predicate, check_positive_integer, checked
from wellcond.runtime.models import Call, device_of, moved, unwrapped
from wellcond.runtime.texts import quoted_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Smoothness:
    """Both sides of 4.8 for some weights w; H is the Hessian of the loss in them, P the projection of 4.2.

    Attributes:
        gradient_norm: ‖∇L‖.
        centred_gradient_norm: ‖P∇L‖.
        hessian_eigenvalue: That of H with the largest magnitude, with its sign.
        projected_eigenvalue: That of P H P, the Hessian of the constrained loss (4.4).
        centred_hessian_norm: ‖P H‖₂, how fast the centred gradient changes (the thesis's ∇Φ(∇L)).
        residual: How far the three above may be from eigenvalues of H, P H P and (P H)ᵀ(P H), relative to these.
        products: Hessian-vector products that were taken.
        tolerance: What `residual` was to reach.
    """

    gradient_norm: float
    centred_gradient_norm: float
    hessian_eigenvalue: float
    projected_eigenvalue: float
    centred_hessian_norm: float
    residual: float
    products: int
    tolerance: float

    @property
    def hessian_norm(self) -> float:
        """‖H‖₂."""
        return abs(self.hessian_eigenvalue)

    @property
    def projected_hessian_norm(self) -> float:
        """‖P H P‖₂."""
        return abs(self.projected_eigenvalue)

    @property
    def converged(self) -> bool:
        """Whether the residual is within its tolerance."""
        return self.residual <= self.tolerance

    @property
    def holds(self) -> bool:
        """Whether 4.8 holds of what was found: ‖P∇L‖ ≤ ‖∇L‖ and ‖P H P‖ ≤ ‖P H‖ ≤ ‖H‖, up to the residual.

        It says something if the norms have `converged`, as each is approached from below.
        """
        slack = 1 + 2 * max(self.residual, 1e-6)
        return (
            self.centred_gradient_norm <= self.gradient_norm * (1 + 1e-6)
            and self.projected_hessian_norm <= self.centred_hessian_norm * slack
            and self.centred_hessian_norm <= self.hessian_norm * slack
        )

    @property
    def gradient_ratio(self) -> float:
        """‖P∇L‖/‖∇L‖; 1 where both are zero."""
        return _ratio(self.centred_gradient_norm, self.gradient_norm)

    @property
    def hessian_ratio(self) -> float:
        """‖P H P‖/‖H‖; 1 where both are zero."""
        return _ratio(self.projected_hessian_norm, self.hessian_norm)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as numbers and booleans, for JSON."""
        return {
            **vars(self),
            "hessian_norm": self.hessian_norm,
            "projected_hessian_norm": self.projected_hessian_norm,
            "gradient_ratio": self.gradient_ratio,
            "hessian_ratio": self.hessian_ratio,
            "converged": self.converged,
            "holds": self.holds,
        }


@dataclass(frozen=True, repr=False)
class Lipschitz:
    """The result of `lipschitz`; printed, it is a table.

    Attributes:
        loss: Of the batch.
        whole: For all selected weights together.
        layers: For each weight alone, the others held, by qualified name; empty unless asked for.
    """

    loss: float
    whole: Smoothness
    layers: Mapping[str, Smoothness]

    @property
    def holds(self) -> bool:
        """Whether 4.8 holds for all of them."""
        return all(own.holds for own in (self.whole, *self.layers.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dictionaries, strings, numbers and booleans, for JSON."""
        layers = {name: own.to_dict() for name, own in self.layers.items()}
        return {"loss": self.loss, "holds": self.holds, "whole": self.whole.to_dict(), "layers": layers}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot, for all weights and for each, what centralization leaves of the gradient's and the Hessian's norm.

        Args:
            ax: Where to; a new figure by default.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        found = {"all weights": self.whole, **self.layers}
        ax = axes_for(ax, "Lipschitz.plot", (max(6.0, 0.25 * len(found)), 4.0))
        ax.plot([own.gradient_ratio for own in found.values()], "o", label="‖P∇L‖ / ‖∇L‖")
        ax.plot([own.hessian_ratio for own in found.values()], "s", label="‖P∇²L P‖ / ‖∇²L‖")
        ax.axhline(1.0, color="grey", linewidth=0.8)
        ax.set_xticks(range(len(found)), list(found), rotation=90, fontsize="small")
        ax.set_ylabel("with centralization / without")
        ax.set_ylim(bottom=0.0)
        ax.legend()
        return ax

    def __str__(self) -> str:
        header = ["weights", "‖∇L‖", "‖P∇L‖", "‖H‖", "‖PH‖", "‖PHP‖", "(4.8)", "residual"]
        rows = []
        for name, own in {"(all)": self.whole, **self.layers}.items():
            norms = [own.gradient_norm, own.centred_gradient_norm, own.hessian_norm, own.centred_hessian_norm]
            cells = [f"{norm:.4g}" for norm in [*norms, own.projected_hessian_norm]]
            rows.append([name, *cells, _verdict(own), f"{own.residual:.1g}"])
        return table(f"Lipschitzness with and without centralization, at a loss of {self.loss:.4g}", header, rows)

    __repr__ = __str__


@checked
def lipschitz(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    *,
    call: Call | None = None,
    where: Predicate | None = None,
    per_layer: bool = False,
    iterations: int = 50,
    tolerance: float = 1e-2,
    seed: AnyInteger = 0,
) -> Lipschitz:
    """Check on a model that centralization makes the loss and its gradient more Lipschitz, inequality 4.8.

        ‖Φ(∇_w L)‖₂ ≤ ‖∇_w L‖₂,   ‖∇_w Φ(∇_w L)‖₂ = ‖P H‖₂ ≤ ‖H‖₂,  and so ‖P H P‖₂ ≤ ‖H‖₂

    at the present weights, for the loss of one batch. Norms of Hessians are their largest singular values, by the
    Lanczos method, which is power iteration that keeps what it has seen: each iteration costs a Hessian-vector
    product, that is, a backward pass through the backward pass (two for P H). They approach the norms from below.

    The model runs once, in the modes that it is in, with the attention kernels that can be differentiated twice; so
    dropout is one fixed mask, and with normalizations in training mode the loss is a function of the batch as a whole.
    The model is left as it is found, as by `gradient_statistics`.

    Args:
        model: Any model with linear maps or convolutions; may be wrapped for DDP or compiled.
        batch: A tensor; a tuple or list, whose first element is the input; or a mapping, for ``model(**batch)``. It is
            moved to the model's device.
        loss: ``loss(output, batch)`` gives the scalar.
        call: ``call(model, batch)`` gives the output of a model that is run otherwise.
        where: A predicate of (module name, module) that says which layers' weights w is; all that
            `GradientCentralization` centres by default.
        per_layer: Also for each weight alone, at the cost of as many products for each.
        iterations: At most so many for each Hessian norm.
        tolerance: Stop when the residual of the eigenvalue, relative to it, is as small.
        seed: Of the first vector.

    Returns:
        Both sides of the inequalities.

    Raises:
        TypeError: If `where` is not callable or the loss is no tensor.
        ValueError: If an argument is out of its range, there is no such weight, or the loss does not depend on it.
        RuntimeError: If an operation of the model or the loss cannot be differentiated twice.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> found = lipschitz(model, torch.rand(16, 4), lambda output, batch: output.square().mean())
        >>> found.holds, found.whole.projected_hessian_norm < found.whole.hessian_norm
        (True, True)
    """
    check_positive_integer("iterations", iterations)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance!r}")
    inner = unwrapped(model)
    layers = centred_layers(inner, where)
    with left_as_found(inner), sdpa_kernel(SDPBackend.MATH):
        value = loss_of(inner, moved(batch, device_of(inner)), loss, call)
        with _second_derivatives():
            _check_twice_differentiable(value)
            gradients = torch.autograd.grad(
                value, [layer.weight for layer in layers], create_graph=True, allow_unused=True
            )
            used = [(layer, own) for layer, own in zip(layers, gradients, strict=True) if own is not None]
            if not used:
                names = quoted_names(layer.name for layer in layers)
                raise ValueError(f"the loss does not depend on any of the weights {names}")

            def smoothness(*own: tuple[Layer, Tensor]) -> Smoothness:
                return _smoothness(_Block(own), iterations, tolerance, seed)

            whole = smoothness(*used)
            found = {own[0].name: smoothness(own) for own in used} if per_layer else {}
    return Lipschitz(float(value.detach()), whole, found)


def _verdict(found: Smoothness) -> str:
    if not found.converged:
        return "open"
    return "holds" if found.holds else "fails"


class _Block:
    """The Hessian in some weights, and the projection P, as maps of one vector for all of these weights.

    Args:
        used: The layers with their gradients, which can be differentiated again.
    """

    def __init__(self, used: Sequence[tuple[Layer, Tensor]]) -> None:
        self._layers = [layer for layer, _ in used]
        self._weights = [layer.weight for layer in self._layers]
        self._sizes = [weight.numel() for weight in self._weights]
        self._gradients = [gradient for _, gradient in used]
        self.gradient = self._joined(self._gradients)
        self.products = 0

    def hessian(self, vector: Tensor) -> Tensor:
        """Return H v."""
        self.products += 1
        # A gradient that does not depend on any weight has no second derivative to ask for.
        pairs = [
            (gradient, part.to(gradient))
            for gradient, part in zip(self._gradients, self._parts(vector), strict=True)
            if gradient.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(vector)
        gradients, parts = zip(*pairs, strict=True)
        return self._joined(
            torch.autograd.grad(
                gradients, self._weights, parts, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )

    def project(self, vector: Tensor) -> Tensor:
        """Return P v."""
        pairs = zip(self._layers, self._parts(vector), strict=True)
        return self._joined([part - layer.unit_mean(part) for layer, part in pairs])

    def start(self, seed: int) -> Tensor:
        """Return a random vector of the weights' size."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.gradient.shape, generator=generator).to(self.gradient)

    def _joined(self, tensors: Sequence[Tensor]) -> Tensor:
        dtype = statistics_dtype(tensors[0].dtype)
        return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])

    def _parts(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split(self._sizes)
        return [part.view(weight.shape) for part, weight in zip(parts, self._weights, strict=True)]


def _smoothness(block: _Block, iterations: int, tolerance: float, seed: int) -> Smoothness:
    """Measure both sides of 4.8 for some weights."""
    start, project, hessian = block.start(seed), block.project, block.hessian
    whole, first = dominant_eigenvalue(hessian, start, iterations, tolerance)
    projected, second = dominant_eigenvalue(lambda v: project(hessian(v)), project(start), iterations, tolerance)
    squared, third = dominant_eigenvalue(lambda v: hessian(project(hessian(v))), start, iterations, tolerance)
    return Smoothness(
        gradient_norm=norm_of([widened(block.gradient)]),
        centred_gradient_norm=norm_of([widened(project(block.gradient))]),
        hessian_eigenvalue=whole,
        projected_eigenvalue=projected,
        centred_hessian_norm=math.sqrt(max(squared, 0.0)),
        residual=max(first, second, third),
        products=block.products,
        tolerance=tolerance,
    )


def dominant_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int, tolerance: float
) -> tuple[float, float]:
    """Find a symmetric matrix's eigenvalue of the largest magnitude from products with vectors, by Lanczos.

    Three vectors are kept. The basis is not orthogonalized again: what rounding brings back are copies of eigenvalues
    that are found already.

    Args:
        product: v ↦ A v, v of shape [n].
        start: The first vector; only what it has a part in is found.
        iterations: At most so many products.
        tolerance: Stop when the residual is at most this part of the eigenvalue.

    Returns:
        The eigenvalue, and its residual ‖A y − θ y‖/|θ| for the unit vector y that it belongs to: there is an
        eigenvalue at most so far away, relative to it.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 2.0, -5.0]))
        >>> eigenvalue, residual = dominant_eigenvalue(matrix.mv, torch.ones(3), 10, 1e-3)
        >>> round(eigenvalue, 4)
        -5.0
    """
    length = float(torch.linalg.vector_norm(start))
    if length == 0:
        return 0.0, 0.0
    vector, before = start / length, torch.zeros_like(start)
    diagonal: list[float] = []
    beside: list[float] = []
    eigenvalue = residual = 0.0
    for _ in range(min(iterations, len(start))):
        image = product(vector)
        diagonal.append(float(vector @ image))
        image = image - diagonal[-1] * vector - (beside[-1] * before if beside else 0.0)
        left = float(torch.linalg.vector_norm(image))
        if not math.isfinite(diagonal[-1] + left):
            return math.nan, math.nan
        small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside:
            off = torch.tensor(beside, dtype=torch.float64)
            small += torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(small)
        place = int(values.abs().argmax())
        eigenvalue = float(values[place])
        error = left * abs(float(vectors[-1, place]))
        residual = error / abs(eigenvalue) if eigenvalue else (math.inf if error else 0.0)
        scale = float(values.abs().max())
        # What is left below rounding is no direction.
        if residual <= tolerance or left <= torch.finfo(start.dtype).eps * scale:
            break
        beside.append(left)
        before, vector = vector, image / left
    return eigenvalue, residual


def _check_twice_differentiable(value: Tensor) -> None:
    """Refuse operations that are differentiable once.

    Torch does not, where the gradient that comes in is a constant: then such an operation's gradient silently is one.
    """
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function: Any = getattr(node, "_forward_cls", None)
        backward = getattr(function, "backward", None)
        # `once_differentiable` wraps it in a function of its own module.
        if backward is not None and backward.__globals__ is vars(torch.autograd.function):
            raise RuntimeError(f"the backward of {function.__name__} is marked with @once_differentiable")
        nodes += [own for own, _ in node.next_functions]


@contextmanager
def _second_derivatives() -> Iterator[None]:
    """Say what the matter is where an operation has no second derivative."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            "lipschitz needs second derivatives, and an operation of the model or the loss cannot be differentiated "
            f"twice: {error}"
        ) from error


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
