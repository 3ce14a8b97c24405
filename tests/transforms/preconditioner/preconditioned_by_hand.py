"""The preconditioners written out patch by patch in float64 beside a plain training loop, for tests to compare with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import wellcond
from wellcond import FeatureDescent, FeatureWhitening
from wellcond.transforms.preconditioner.transform import FeaturePreconditioner

BOTH = pytest.mark.parametrize("transform_type", [FeatureWhitening, FeatureDescent])
NAMES = {FeatureWhitening: "whitening", FeatureDescent: "descent"}
DAMPING = {FeatureWhitening: 1e-2, FeatureDescent: 0.1}


def input_rows(layer: nn.Module, x: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (group, x) for every sample and output position, the patch laid out as the weight's row is."""
    if isinstance(layer, nn.Linear):
        for row in x.reshape(-1, x.shape[-1]):
            yield 0, row.numpy()
        return
    assert isinstance(layer, nn.Conv2d)
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = layer.kernel_size, layer.stride, layer.dilation, layer.padding
    samples, channels, height, width = x.shape
    padded = np.zeros((samples, channels, height + 2 * ph, width + 2 * pw))
    padded[:, :, ph : ph + height, pw : pw + width] = x.numpy()
    per_group = channels // layer.groups
    tops = range(0, height + 2 * ph - dh * (kh - 1), sh)
    lefts = range(0, width + 2 * pw - dw * (kw - 1), sw)
    for n, group, top, left in itertools.product(range(samples), range(layer.groups), tops, lefts):
        patch = padded[
            n,
            group * per_group : (group + 1) * per_group,
            top : top + dh * (kh - 1) + 1 : dh,
            left : left + dw * (kw - 1) + 1 : dw,
        ]
        yield group, patch.reshape(-1)


def second_moment(layer: nn.Module, inputs: list[Tensor], bias: bool) -> np.ndarray:
    """X Xᵀ/N over all rows of all the given inputs, a constant 1 appended for the bias."""
    groups = getattr(layer, "groups", 1)
    width = layer.weight[0].numel() + bias
    total, count = np.zeros((groups, width, width)), np.zeros(groups)
    for x in inputs:
        for group, row in input_rows(layer, x.detach().double()):
            full = np.append(row, 1.0) if bias else row
            total[group] += np.outer(full, full)
            count[group] += 1
    return total / count[:, None, None]


def inverse_power(matrix: np.ndarray, transform_type: type, damping: float) -> np.ndarray:
    """(M + εI)⁻¹, or (M + ελ_max I)^(−1/2), group by group."""
    result = np.zeros_like(matrix)
    for g, m in enumerate(matrix):
        if transform_type is FeatureDescent:
            result[g] = np.linalg.inv(m + damping * np.eye(len(m)))
        else:
            values, vectors = np.linalg.eigh(m)
            for value, vector in zip(np.maximum(values, 0), vectors.T, strict=True):
                result[g] += np.outer(vector, vector) / math.sqrt(value + damping * values[-1])
    return result


def preconditioned(
    layer: nn.Module, t: np.ndarray, weight_grad: Tensor, bias_grad: Tensor | None, restore: bool = True
) -> tuple[Tensor, Tensor | None]:
    """G̃ = (G T)·‖G‖/‖G T‖ over all groups together, the bias gradient as G's last column."""
    groups = t.shape[0]
    g = weight_grad.detach().double().reshape(groups, weight_grad.shape[0] // groups, -1)
    if bias_grad is not None:
        g = torch.cat([g, bias_grad.detach().double().reshape(groups, -1, 1)], dim=2)
    changed = torch.stack([g[i] @ torch.from_numpy(t[i]) for i in range(groups)])
    if restore and float(changed.norm()) > 0:
        changed = changed * (g.norm() / changed.norm())
    if bias_grad is None:
        return changed.reshape(weight_grad.shape), None
    return changed[..., :-1].reshape(weight_grad.shape), changed[..., -1].reshape(bias_grad.shape)


class Reference:
    """The technique, written beside a plain training loop: it changes ``.grad`` before the plain optimizer's step."""

    def __init__(
        self,
        model: nn.Module,
        transform_type: type,
        damping: float,
        *,
        decay: float,
        stats_every: int,
        solve_every: int,
        warmup: bool,
        restore: bool = True,
    ) -> None:
        self.transform_type, self.damping, self.decay, self.restore = transform_type, damping, decay, restore
        self.stats_every, self.solve_every, self.warmup = stats_every, solve_every, warmup
        self.layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        self.inputs: dict[nn.Module, list[Tensor]] = {layer: [] for layer in self.layers}
        self.moments: dict[nn.Module, Any] = dict.fromkeys(self.layers, 0.0)
        self.powers: dict[nn.Module, np.ndarray] = {}
        self.updates = self.step = 0
        self.solved_at: list[int] = []
        for layer in self.layers:
            layer.register_forward_pre_hook(lambda module, args: self.inputs[module].append(args[0].detach()))

    def solve_is_due(self) -> bool:
        doubling = [self.stats_every * 2**k for k in range(20)]
        early = self.warmup and self.step in [s for s in doubling if s < self.solve_every]
        return early or self.step % self.solve_every == 0

    def change_gradients(self) -> None:
        if self.step % self.stats_every == 0:
            self.updates += 1
            for layer in self.layers:
                observed = second_moment(layer, self.inputs[layer], layer.bias is not None)
                self.moments[layer] = self.decay * self.moments[layer] + (1 - self.decay) * observed
        if self.solve_is_due():
            self.solved_at.append(self.step)
            for layer in self.layers:
                debiased = self.moments[layer] / (1 - self.decay**self.updates)
                self.powers[layer] = inverse_power(debiased, self.transform_type, self.damping)
        for layer in self.layers:
            bias_grad = None if layer.bias is None else layer.bias.grad
            weight_grad, bias_grad = preconditioned(
                layer, self.powers[layer], layer.weight.grad, bias_grad, self.restore
            )
            layer.weight.grad = weight_grad
            if bias_grad is not None:
                layer.bias.grad = bias_grad
            self.inputs[layer].clear()
        self.step += 1


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 6, 2, groups=2, dilation=(1, 2), bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.Tanh(),
        nn.Linear(5, 3, bias=False),
    ).double()


def batch(step: int, size: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs whose scale drifts from step to step, so that an old second moment is a wrong one."""
    generator = torch.Generator().manual_seed(77 + step)
    x = torch.randn(size, 2, 6, 7, generator=generator, dtype=torch.float64)
    x = x * (1 + 0.3 * step) + torch.linspace(-1, 1, 2, dtype=torch.float64).view(2, 1, 1)
    return x[..., :6], torch.randint(3, (size,), generator=generator)


def loss_of(model: nn.Module, step: int, **options: Any) -> Tensor:
    x, y = batch(step, **options)
    return nn.functional.cross_entropy(model(x), y)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2, weight_decay=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=1e-2),
}


def run_both(
    transform_type: type,
    make: Callable[[Any], torch.optim.Optimizer],
    *,
    steps: int = 13,
    stats_every: int = 2,
    solve_every: int = 4,
    warmup: bool = True,
    restore: bool = True,
    change_groups: Callable[[dict[str, Any], int], None] = lambda group, step: None,
) -> tuple[nn.Module, nn.Module, Reference]:
    ours, plain = small_net(), small_net()
    our_optimizer, plain_optimizer = make(ours.parameters()), make(plain.parameters())
    wellcond.attach(
        our_optimizer,
        ours,
        transform_type(
            damping=DAMPING[transform_type],
            stats_decay=0.9,
            stats_every=stats_every,
            solve_every=solve_every,
            solve_warmup=warmup,
            restore_norm=restore,
        ),
    )
    reference = Reference(
        plain,
        transform_type,
        DAMPING[transform_type],
        decay=0.9,
        stats_every=stats_every,
        solve_every=solve_every,
        warmup=warmup,
        restore=restore,
    )
    for step in range(steps):
        for optimizer in (our_optimizer, plain_optimizer):
            change_groups(optimizer.param_groups[0], step)
            optimizer.zero_grad()
        loss_of(ours, step).backward()
        our_optimizer.step()
        loss_of(plain, step).backward()
        reference.change_gradients()
        plain_optimizer.step()
    return ours, plain, reference


def assert_same_weights(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-9) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


IMMEDIATE: dict[str, Any] = {"stats_decay": 0.0, "stats_every": 1, "solve_every": 1}


def attached(
    model: nn.Module, transform: FeaturePreconditioner, lr: float = 0.1, params: Any = None
) -> tuple[torch.optim.Optimizer, wellcond.Attachment]:
    optimizer = torch.optim.SGD(model.parameters() if params is None else params, lr=lr)
    return optimizer, wellcond.attach(optimizer, model, transform)


def state_of(optimizer: torch.optim.Optimizer, weight: Tensor, key: str) -> Any:
    found = [value for name, value in optimizer.state[weight].items() if name.endswith(f"_{key}")]
    assert len(found) == 1, f"{key} in {list(optimizer.state[weight])}"
    return found[0]


def moment_of(optimizer: torch.optim.Optimizer, weight: Tensor) -> Tensor:
    return state_of(optimizer, weight, "second_moment").clone()
