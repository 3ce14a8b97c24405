"""The original authors' numbers, reproduced through `attach` (see tests/golden/README.md for what the files hold)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

import wellcond
from wellcond import FeatureWhitening, GradientCentralization

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("conv", "conv1d", "fc", "bias")
TOLERANCE = {"rtol": 0, "atol": 1e-12}


class Golden:
    """One file of golden vectors as tensors."""

    def __init__(self, name: str) -> None:
        self._arrays = np.load(GOLDEN / f"{name}.npz")
        self.hyper: dict[str, Any] = json.loads(str(self._arrays["hyper"]))

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self._arrays[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays.files)


class FourParameters(nn.Module):
    """A module with the golden files' four parameters: conv, conv1d, fc and its bias."""

    def __init__(self, golden: Golden) -> None:
        super().__init__()
        self.conv, self.conv1d, self.fc = (
            nn.Conv2d(3, 4, 3, bias=False),
            nn.Conv1d(3, 4, 5, bias=False),
            nn.Linear(6, 5),
        )
        self.to(golden["p0_conv"].dtype)
        with torch.no_grad():
            for name, parameter in self.by_name().items():
                parameter.copy_(golden[f"p0_{name}"])

    def by_name(self) -> dict[str, nn.Parameter]:
        return {"conv": self.conv.weight, "conv1d": self.conv1d.weight, "fc": self.fc.weight, "bias": self.fc.bias}


def two_dimensional_conv(name: str, module: nn.Module) -> bool:
    """The authors' "conv" variants centre tensors of more than three dimensions: not Conv1d."""
    return isinstance(module, nn.Conv2d)


def replay(
    golden: Golden, make: Callable[[list[nn.Parameter]], Optimizer], transform: GradientCentralization
) -> dict[str, torch.Tensor]:
    """Step through the file's gradients; return each parameter after each step, and the largest error by name."""
    model = FourParameters(golden)
    parameters = model.by_name()
    optimizer = make(list(parameters.values()))
    wellcond.attach(optimizer, model, transform)
    after: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    for step in range(golden.hyper["steps"]):
        for name, parameter in parameters.items():
            parameter.grad = golden[f"g_{name}"][step].clone()
        optimizer.step()
        for name, parameter in parameters.items():
            after[name].append(parameter.detach().clone())
    return {name: torch.stack(values) for name, values in after.items()}


def assert_replayed(golden: Golden, ours: dict[str, torch.Tensor], **tolerance: float) -> None:
    for name in NAMES:
        torch.testing.assert_close(ours[name], golden[f"p_{name}"], **(tolerance or TOLERANCE))


@pytest.mark.parametrize(("name", "layers"), [("gc_SGD_GC", "all"), ("gc_SGD_GCC", two_dimensional_conv)])
def test_sgd_centres_the_gradient_and_its_coupled_decay(name: str, layers: Any) -> None:
    golden = Golden(name)
    h = golden.hyper

    def sgd(parameters: list[nn.Parameter]) -> Optimizer:
        return torch.optim.SGD(parameters, lr=h["lr"], momentum=h["momentum"], weight_decay=h["weight_decay"])

    assert_replayed(golden, replay(golden, sgd, GradientCentralization(layers)))


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("gc_Adam_GC", GradientCentralization()),
        ("gc_Adam_GCC2", GradientCentralization(two_dimensional_conv, where="update")),
        ("gcadv_Adam_GC_locF", GradientCentralization(where="update")),
    ],
)
def test_adam_with_centred_gradient_or_update(name: str, transform: GradientCentralization) -> None:
    golden = Golden(name)
    h = golden.hyper

    def adam(parameters: list[nn.Parameter]) -> Optimizer:
        return torch.optim.Adam(parameters, h["lr"], tuple(h["betas"]), h["eps"], h["weight_decay"])

    assert_replayed(golden, replay(golden, adam, transform))


def test_adagrad_centres_the_gradient() -> None:
    golden = Golden("gc_Adagrad_GC")
    h = golden.hyper

    def adagrad(parameters: list[nn.Parameter]) -> Optimizer:
        start = h["initial_accumulator_value"]
        return torch.optim.Adagrad(parameters, h["lr"], h["lr_decay"], h["weight_decay"], start, h["eps"])

    assert_replayed(golden, replay(golden, adagrad, GradientCentralization()))


def test_radam_centres_the_gradient() -> None:
    golden = Golden("gcadv_RAdam_GC_locT_wd0")
    h = golden.hyper

    def radam(parameters: list[nn.Parameter]) -> Optimizer:
        return torch.optim.RAdam(parameters, h["lr"], tuple(h["betas"]), h["eps"], h["weight_decay"])

    # The file is float32; its originals keep √v + ε where torch forms the same in another order.
    assert_replayed(golden, replay(golden, radam, GradientCentralization()), rtol=0, atol=1e-6)


class SGDW(Optimizer):
    """SGD with momentum and decoupled weight decay, as the authors' SGDW; torch has none."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "weight_decouple": True}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * buffer)


def test_sgdw_leaves_the_decoupled_decay_uncentred() -> None:
    golden = Golden("gc_SGDW_GC")
    h = golden.hyper

    def sgdw(parameters: list[nn.Parameter]) -> Optimizer:
        return SGDW(parameters, h["lr"], h["momentum"], h["weight_decay"])

    assert_replayed(golden, replay(golden, sgdw, GradientCentralization(decay="outside")))


class AuthorsAdamW(Optimizer):
    """The authors' AdamW: θ −= a·(m/(√v + ε) + λθ), a = η √c₂/c₁, so that ε and the decay differ from torch's."""

    def __init__(self, parameters: list[nn.Parameter], **defaults: Any) -> None:
        super().__init__(parameters, {**defaults, "decoupled_weight_decay": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                s["t"] += 1
                s["m"].lerp_(p.grad, 1 - beta1)
                s["v"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                a = group["lr"] * (1 - beta2 ** s["t"]) ** 0.5 / (1 - beta1 ** s["t"])
                p.sub_(a * (s["m"] / (s["v"].sqrt() + group["eps"]) + group["weight_decay"] * p))


def adamw_options(golden: Golden) -> dict[str, Any]:
    h = golden.hyper
    return {"lr": h["lr"], "betas": tuple(h["betas"]), "eps": h["eps"], "weight_decay": h["weight_decay"]}


def test_adamw_centres_the_whole_update_of_the_authors_adamw() -> None:
    golden = Golden("gc_AdamW_GCC2")
    transform = GradientCentralization(two_dimensional_conv, where="update")
    assert_replayed(golden, replay(golden, lambda p: AuthorsAdamW(p, **adamw_options(golden)), transform))


def test_torchs_adamw_differs_from_the_authors_by_its_decay_and_epsilon_alone() -> None:
    """torch decays by η·λ, the authors by η·λ·√c₂/c₁ (0.32 of it at the first step); ε sits outside the correction."""
    golden = Golden("gc_AdamW_GCC2")
    transform = GradientCentralization(two_dimensional_conv, where="update")
    options = adamw_options(golden)
    torchs = replay(golden, lambda p: torch.optim.AdamW(p, **options), transform)
    difference = (torchs["fc"] - golden["p_fc"]).abs().amax(dim=(1, 2))
    assert difference[0] > 1e-6
    # After one step the difference is the decays' and nothing else: (√c₂/c₁ − 1)·η·λ·θ₀.
    factor = (1 - options["betas"][1]) ** 0.5 / (1 - options["betas"][0])
    decay = options["lr"] * options["weight_decay"] * golden["p0_fc"]
    torch.testing.assert_close(torchs["fc"][0] - golden["p_fc"][0], (factor - 1) * decay, rtol=0, atol=1e-6)
    # Without decay and with the smallest ε both are the same optimizer.
    without = {**options, "weight_decay": 0.0, "eps": 1e-300}
    authors = replay(golden, lambda p: AuthorsAdamW(p, **without), transform)
    torchs = replay(golden, lambda p: torch.optim.AdamW(p, **without), transform)
    for name in NAMES:
        torch.testing.assert_close(torchs[name], authors[name], **TOLERANCE)


class NetA(nn.Module):
    """The net of the golden W-SGDM run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc(F.avg_pool2d(x, 2).flatten(1))


def assert_whitened_training_is_the_authors(
    golden: Golden,
    make: Callable[[nn.Module], Optimizer],
    with_closure: bool,
    before_step: Callable[[Optimizer, int], None] = lambda optimizer, step: None,
    with_matrices: bool = True,
) -> None:
    """Train NetA as the file did; compare loss, gradients before and after, weights, M and T of every step."""
    h = golden.hyper
    model = NetA().double()
    model.load_state_dict({key.removeprefix("init_"): golden[key] for key in golden if key.startswith("init_")})
    optimizer = make(model)
    whitening = FeatureWhitening(
        damping=h["dampening"],
        stats_decay=h["stat_decay"],
        stats_every=h["Txx"],
        solve_every=h["Tsvd"],
        solve_warmup=False,
        second_moment="dense",
    )
    wellcond.attach(optimizer, model, whitening)
    weights = {name: dict(model.named_parameters())[f"{name}.weight"] for name in ("conv1", "conv2", "fc")}
    close = {"rtol": 1e-8, "atol": 1e-12}
    for step in range(h["steps"]):
        inputs, labels = golden["inputs"][step], golden["labels"][step]

        def closure(inputs: torch.Tensor = inputs, labels: torch.Tensor = labels, step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.grad, golden[f"graw_{name}"][step], **close)
            return loss

        before_step(optimizer, step)
        if with_closure:
            loss = optimizer.step(closure)
        else:
            loss = closure()
            optimizer.step()
        torch.testing.assert_close(loss.detach(), golden["loss"][step], **close)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, golden[f"gpre_{name}"][step], **close)
            torch.testing.assert_close(parameter.detach(), golden[f"p_{name}"][step], **close)
        for name, weight in weights.items() if with_matrices else ():
            state = optimizer.state[weight]
            torch.testing.assert_close(
                state["wellcond_whitening_second_moment"][0], golden[f"mxx_{name}"][step], **close
            )
            if step in h["T_steps"]:
                # T of the zero-started average is larger by √(1/(1 − αⁿ)) than that of the debiased one; the norm
                # recovery takes any factor out again.
                mass = 1 - h["stat_decay"] ** (step // h["Txx"] + 1)
                authors = golden[f"T_{name}"][h["T_steps"].index(step)] * mass**0.5
                torch.testing.assert_close(state["wellcond_whitening_preconditioner"][0], authors, **close)


@pytest.mark.parametrize("with_closure", [False, True])
def test_w_sgdm_reproduces_every_number_of_the_authors_run(with_closure: bool) -> None:
    golden = Golden("w_WSGDM_svd")
    h = golden.hyper

    def sgd(model: nn.Module) -> Optimizer:
        return torch.optim.SGD(model.parameters(), h["lr"], h["momentum"], weight_decay=h["weight_decay"])

    assert_whitened_training_is_the_authors(golden, sgd, with_closure)


@pytest.mark.parametrize("with_closure", [False, True])
def test_w_adam_with_its_hidden_warm_up_reproduces_every_number_of_the_authors_run(with_closure: bool) -> None:
    """θ −= f·η/c₁·(m/(√v/√c₂ + ε) + λθ), f = 1 − α^(⌊s/T_xx⌋ + 1): torch's AdamW with lr = f·η and decay λ/c₁."""
    golden = Golden("w_WAdam_svd")
    h = golden.hyper

    def adamw(model: nn.Module) -> Optimizer:
        return torch.optim.AdamW(model.parameters(), h["lr"], tuple(h["betas"]), h["eps"], h["weight_decay"])

    def warm_up(optimizer: Optimizer, step: int) -> None:
        (group,) = optimizer.param_groups
        group["lr"] = h["lr"] * (1 - h["stat_decay"] ** (step // h["Txx"] + 1))
        group["weight_decay"] = h["weight_decay"] / (1 - h["betas"][0] ** (step + 1))

    assert_whitened_training_is_the_authors(golden, adamw, with_closure, warm_up, with_matrices=False)


def test_the_committed_golden_files_stay_small() -> None:
    assert sum(file.stat().st_size for file in GOLDEN.iterdir()) < 2_000_000
