"""The techniques beside a plain loop, from the formulas, in float64: what "works" is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from cells import attach
from torch import Tensor, nn

import wellcond

STEPS = 3
DAMPING = 0.05


def whitening(**options: Any) -> wellcond.FeatureWhitening:
    """Return a whitening whose every step depends on that step's inputs alone."""
    settings: dict[str, Any] = {"stats_decay": 0.0, "stats_every": 1, "solve_every": 1, "second_moment": "dense"}
    return wellcond.FeatureWhitening(**settings | {"damping": DAMPING} | options)


def net(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Return two linear layers, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a step's eight inputs, of unequal variances and a mean."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float64)
    return (x * torch.tensor([1.0, 3.0, 0.3, 1.0]) + 0.5).to(dtype)


def loss_of(output: Tensor) -> Tensor:
    """Return a loss whose gradient is of no particular form."""
    return (output.sin() * torch.linspace(-1, 2, output.shape[-1], dtype=output.dtype)).sum()


def power(moment: Tensor) -> Tensor:
    """(M + ε λ_max I)^(−1/2), by eigenvalues."""
    values, vectors = torch.linalg.eigh(moment.double())
    return (vectors * (values.clamp_min(0) + DAMPING * values[-1]).rsqrt()) @ vectors.mT


def whitened(gradient: Tensor, rows: Tensor) -> Tensor:
    """Ĝ = G T with the norm of G.

    Args:
        gradient: Shape [groups, out, in].
        rows: Shape [groups, n, in].
    """
    changed = torch.stack([g @ power(x.mT @ x / len(x)) for g, x in zip(gradient.double(), rows.double(), strict=True)])
    return changed * gradient.double().norm() / changed.norm()


def with_one(rows: Tensor) -> Tensor:
    """Append the constant 1, for the bias."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)


class ByHand:
    """Changes the gradients of a model's linear layers as a transform would.

    Args:
        model: Its linear layers are watched.
        technique: "whitening", "centralization" (of weights alone), or "none".
        pool: Returns the rows of all ranks, given this rank's.
    """

    def __init__(self, model: nn.Module, technique: str = "whitening", pool: Callable[[Tensor], Tensor] | None = None):
        self.technique, self._pool = technique, pool or (lambda rows: rows)
        self.closures = False
        self.layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.rows: dict[nn.Module, list[Tensor]] = {layer: [] for layer in self.layers}
        self._of_step: dict[nn.Module, Tensor] = {}
        for layer in self.layers:
            layer.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self.rows[module].append(args[0].detach().reshape(-1, args[0].shape[-1]).double())

    def begin_step(self) -> None:
        """Forget the step before: its rows, and passes after its first change."""
        self._of_step = {}
        self.rows = {layer: [] for layer in self.layers}

    def change_gradients(self) -> None:
        """Change the gradients in place; called several times within a step, the rows before the first call count."""
        for layer in self.layers:
            noted, self.rows[layer] = self.rows[layer], []
            if layer.weight.grad is None or not (noted or layer in self._of_step):
                continue
            if layer not in self._of_step or not self.closures:
                self._of_step[layer] = self._pool(torch.cat(noted))
            rows, weight, bias = self._of_step[layer], layer.weight, layer.bias
            if self.technique == "centralization":
                weight.grad.sub_(weight.grad.mean(dim=1, keepdim=True))
            elif self.technique == "whitening" and bias is None:
                weight.grad.copy_(whitened(weight.grad[None], rows[None])[0])
            elif self.technique == "whitening":
                joint = torch.cat([weight.grad, bias.grad[:, None]], dim=1)
                changed = whitened(joint[None], with_one(rows)[None])[0]
                weight.grad.copy_(changed[:, :-1])
                bias.grad.copy_(changed[:, -1])


Step = Callable[[nn.Module, Any, int, Callable[[], None]], None]


def plain_step(model: nn.Module, optimizer: Any, step: int, change: Callable[[], None]) -> None:
    """Do one step as most loops do; `change` stands where a transform would act."""
    optimizer.zero_grad()
    model.zero_grad()
    loss_of(model(batch(step))).backward()
    change()
    optimizer.step()


def closure_step(model: nn.Module, optimizer: Any, step: int, change: Callable[[], None]) -> None:
    """Do one step with a closure."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(batch(step)))
        loss.backward()
        change()
        return loss

    optimizer.step(closure)


def check_training(
    make: Callable[[nn.Module], Any],
    step: Step = plain_step,
    *,
    bias: bool = True,
    steps: int = STEPS,
    tolerance: float = 1e-7,
    techniques: Sequence[str] = ("whitening", "centralization"),
    attach_to: Callable[[Any], Any] = lambda optimizer: optimizer,
    after: Callable[[nn.Module, Any], nn.Module] = lambda model, optimizer: model,
    **options: Any,
) -> None:
    """Train with transforms, and the plain optimizer on gradients changed by hand: the weights must be equal.

    Args:
        make: Makes the optimizer of a model.
        step: One step.
        bias: Of the layers.
        steps: How many.
        tolerance: Relative, of what the steps have changed of a weight.
        techniques: Each is tried on its own.
        attach_to: What of an optimizer to attach to.
        after: Makes of the model and optimizer what is compared; a model.
        **options: Of `attach`.
    """
    transforms = {"whitening": whitening, "centralization": lambda: wellcond.GradientCentralization(decay="outside")}
    for technique in techniques:
        results = []
        for kind in ("ours", technique, "none"):
            torch.manual_seed(0)
            model = net(bias)
            optimizer = make(model)
            hand = None
            if kind == "ours":
                attach(attach_to(optimizer), model, transforms[technique](), **options)
            else:
                hand = ByHand(model, kind)
                hand.closures = step is closure_step
            for index in range(steps):
                if hand is not None:
                    hand.begin_step()
                step(model, optimizer, index, hand.change_gradients if hand else lambda: None)
            pairs = zip(after(model, optimizer).parameters(), net(bias).parameters(), strict=True)
            results.append([parameter.detach() - start.detach() for parameter, start in pairs])
        ours, theirs, untouched = results
        assert_equal(ours, theirs, tolerance, technique)
        scale = max(float(moved.abs().max()) for moved in untouched)
        differs = max(float((a - b).abs().max()) for a, b in zip(ours, untouched, strict=True))
        assert differs > 1e-4 * scale > 0, f"{technique} changed nothing"


def assert_equal(ours: Iterable[Tensor], theirs: Iterable[Tensor], tolerance: float, what: str) -> None:
    """Raise unless all are equal up to a relative tolerance, saying by how much they are off."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        off = float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
        assert off <= tolerance, f"{what}: parameter {index} is off by {off:.1g} of its largest number"
