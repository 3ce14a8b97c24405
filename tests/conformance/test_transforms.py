"""What every gradient transform must do, whatever it computes. A new transform joins by a line in TRANSFORMS."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_optimizer import AdaBelief
from torch import Tensor, nn
from torch.optim import Optimizer

import wellcond
from pairs import parametrize_pairs
from wellcond import (
    FeatureDescent,
    FeatureWhitening,
    GradientCentralization,
    GradientProjection,
    GradientTransform,
    NormClipping,
    Orthogonalize,
    SecondMoments,
    ZScore,
)
from wellcond.moments.layer_moment import LayerMoment

FAST: dict[str, Any] = {"stats_every": 2, "solve_every": 4}

PAGE = Path(__file__).parents[2] / "docs" / "write-your-own-constraint.md"


def from_the_docs() -> GradientTransform:
    """Return the transform that the page's first program defines."""
    (program, *_) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    defined: dict[str, Any] = {"__name__": "a program of the docs"}
    exec(compile(program, str(PAGE), "exec", dont_inherit=True), defined)
    transform: GradientTransform = defined["AdaptiveClipping"](0.05)
    return transform


# Of both layers of `Net`, on three directions each.
PROTECTED = SecondMoments(
    {
        name: LayerMoment("dense", 1, channels, kernel, {"matrix": (rows.T @ rows).double().unsqueeze(0)})
        for name, channels, kernel, rows in (
            ("conv", 2, (3, 3), torch.randn(3, 18, generator=torch.Generator().manual_seed(0))),
            ("fc", 4, (), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))),
        )
    }
)

TRANSFORMS: dict[str, tuple[GradientTransform, ...]] = {
    "centralize gradient": (GradientCentralization(),),
    "centralize update": (GradientCentralization(where="update"),),
    "descent": (FeatureDescent(**FAST),),
    "whitening": (FeatureWhitening(**FAST),),
    "factored": (FeatureWhitening(second_moment="kronecker", norm_layers=True, gradient_momentum=0.5, **FAST),),
    "blocks": (FeatureWhitening(second_moment="blocks", damping_mode="mean", **FAST),),
    "fixed norm": (FeatureDescent(second_moment="blocks", rank=2, norm="fixed", gradient_momentum=0.5, **FAST),),
    "both sides": (FeatureWhitening(outputs=True, norm="fixed", **FAST),),
    "both sides, sketched": (FeatureDescent(outputs=True, max_dim=3, norm="none", gradient_momentum=0.5, **FAST),),
    "orthogonal": (Orthogonalize(momentum=0.5),),
    "Newton-Muon": (FeatureDescent(damping=0.2, damping_mode="mean", norm="none", **FAST), Orthogonalize(steps=3)),
    "from the docs": (from_the_docs(),),
    "clipped z-scores": (ZScore(), NormClipping(0.7)),
    "projection": (GradientProjection(PROTECTED, energy=1.0),),
    "chain": (GradientCentralization(), FeatureWhitening(**FAST), GradientProjection(PROTECTED, 0.9, "gradient")),
}

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "SGD for-loop": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, foreach=False),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2, weight_decay=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "AdaBelief": lambda p: AdaBelief(p, lr=1e-2, weight_decay=1e-2),
}

transforms = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
optimizers = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Net(nn.Module):
    """A convolution, a norm layer and a linear layer, each with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def batch(step: int, size: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 2, 5, 5, generator=generator, dtype=dtype), torch.arange(size) % 3


def backward(model: nn.Module, step: int) -> Tensor:
    inputs, labels = batch(step, dtype=next(model.parameters()).dtype)
    loss = F.cross_entropy(model(inputs), labels)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{name} differs by {(a - b).abs().max():.2e}"


def differs(ours: nn.Module, theirs: nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@transforms
@optimizers
def test_changes_training_until_removed(transform: Any, make_optimizer: Any) -> None:
    plain, model = net(), net()
    plain_optimizer, optimizer = make_optimizer(plain.parameters()), make_optimizer(model.parameters())
    handle = wellcond.attach(optimizer, model, *transform)
    train(plain, plain_optimizer, range(3))
    train(model, optimizer, range(3))
    assert differs(plain, model)

    handle.remove()
    handle.remove()
    assert not any("wellcond" in str(key) for state in optimizer.state.values() for key in state)
    model.load_state_dict(plain.state_dict())
    optimizer.load_state_dict(copy.deepcopy(plain_optimizer.state_dict()))
    train(plain, plain_optimizer, range(3, 6))
    train(model, optimizer, range(3, 6))
    assert_same(plain, model)


@parametrize_pairs(("transform", TRANSFORMS), ("make_optimizer", OPTIMIZERS), ("form", ["positional", "keyword"]))
def test_a_closure_is_as_good_as_gradients_that_are_there(transform: Any, make_optimizer: Any, form: str) -> None:
    """Trap 1: pre-step hooks run before the closure, so the gradient is not there yet."""
    model, other = net(), net()
    optimizer, theirs = make_optimizer(model.parameters()), make_optimizer(other.parameters())
    wellcond.attach(optimizer, model, *transform)
    wellcond.attach(theirs, other, *transform)
    train(model, optimizer, range(5))
    for step in range(5):

        def closure(step: int = step) -> Tensor:
            theirs.zero_grad()
            return backward(other, step)

        loss = theirs.step(closure) if form == "positional" else theirs.step(closure=closure)
        assert isinstance(loss, Tensor)
    assert_same(model, other)


@parametrize_pairs(("transform", TRANSFORMS), ("stopped_at", range(10)), ("make_optimizer", OPTIMIZERS))
def test_resumes_exactly_at_every_step(transform: Any, stopped_at: int, make_optimizer: Any) -> None:
    """Also between two refreshes; through a file, with weights_only=True."""
    model = net()
    optimizer = make_optimizer(model.parameters())
    wellcond.attach(optimizer, model, *transform)
    train(model, optimizer, range(stopped_at))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(stopped_at, 10))
    resumed = net()
    theirs = make_optimizer(resumed.parameters())
    wellcond.attach(theirs, resumed, *transform)
    train(resumed, theirs, range(50, 53))  # whatever it did before must not show
    file.seek(0)
    checkpoint = torch.load(file, weights_only=make_optimizer is not OPTIMIZERS["AdaBelief"])
    resumed.load_state_dict(checkpoint["model"])
    theirs.load_state_dict(checkpoint["optimizer"])
    if stopped_at > 0:  # or it is a state dict without any state: the optimizer itself starts anew
        train(resumed, theirs, range(stopped_at, 10))
        assert_same(model, resumed)


@transforms
def test_state_loaded_before_attaching_is_taken_up(transform: Any) -> None:
    model = net()
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    wellcond.attach(optimizer, model, *transform)
    train(model, optimizer, range(3))
    checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3, 7))

    resumed = net()
    theirs = OPTIMIZERS["Adam"](resumed.parameters())
    resumed.load_state_dict(checkpoint[0])
    theirs.load_state_dict(checkpoint[1])
    wellcond.attach(theirs, resumed, *transform)
    train(resumed, theirs, range(3, 7))
    assert_same(model, resumed)


@transforms
def test_copies_and_pickles_of_the_model_live_on_their_own(transform: Any) -> None:
    """Trap 3: a copy's forward must not feed the original's statistics, and a hooked model can be pickled."""
    model, reference = net(), net()
    optimizer, theirs = OPTIMIZERS["SGD"](model.parameters()), OPTIMIZERS["SGD"](reference.parameters())
    wellcond.attach(optimizer, model, *transform)
    wellcond.attach(theirs, reference, *transform)
    for step in range(5):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other.train()
            backward(other, 100 + step)
        train(model, optimizer, range(step, step + 1))
        train(reference, theirs, range(step, step + 1))
    assert_same(model, reference)


@transforms
def test_passes_in_eval_mode_or_without_gradients_do_not_count(transform: Any) -> None:
    """Trap 4."""
    model, reference = net(), net()
    optimizer, theirs = OPTIMIZERS["SGD"](model.parameters()), OPTIMIZERS["SGD"](reference.parameters())
    wellcond.attach(optimizer, model, *transform)
    wellcond.attach(theirs, reference, *transform)
    model.norm.momentum = reference.norm.momentum = 0.0  # running statistics are not what is tested
    for step in range(5):
        model.eval()
        model(batch(100 + step)[0])
        model.train()
        with torch.no_grad():
            model(batch(200 + step)[0])
        train(model, optimizer, range(step, step + 1))
        train(reference, theirs, range(step, step + 1))
    for ours, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, other)


@transforms
@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_changes_nothing_and_an_overflow_skips_the_step(transform: Any, fused: bool) -> None:
    """Trap 5: fused optimizers are handed scaled gradients, and a step with infinities is no step."""
    model, reference = net(torch.float32), net(torch.float32)

    def adamw(net: nn.Module) -> Optimizer:
        return torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1, fused=fused)

    optimizer, theirs = adamw(model), adamw(reference)
    wellcond.attach(optimizer, model, *transform)
    wellcond.attach(theirs, reference, *transform)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        optimizer.zero_grad()
        inputs, labels = batch(step, dtype=torch.float32)
        scaler.scale(F.cross_entropy(model(inputs), labels)).backward()
        if step == 3:
            before = copy.deepcopy(model.state_dict())
            assert model.fc.weight.grad is not None
            model.fc.weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, before[name]), name
            break
        scaler.step(optimizer)
        scaler.update()
        train(reference, theirs, range(step, step + 1))
        for ours, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


@transforms
def test_coupled_decay_under_a_fused_optimizer_and_a_loss_scale(transform: Any) -> None:
    model, reference = net(torch.float32), net(torch.float32)

    def adam(net: nn.Module, fused: bool) -> Optimizer:
        return torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=0.1, fused=fused)

    optimizer, theirs = adam(model, True), adam(reference, False)
    wellcond.attach(optimizer, model, *transform)
    wellcond.attach(theirs, reference, *transform)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    for step in range(4):
        optimizer.zero_grad()
        inputs, labels = batch(step, dtype=torch.float32)
        scaler.scale(F.cross_entropy(model(inputs), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
    train(reference, theirs, range(4))
    for ours, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-4)


@transforms
@pytest.mark.parametrize("order", ["compile, attach", "attach, compile"])
def test_compiled_models_get_at_most_two_variants_and_the_same_numbers(transform: Any, order: str) -> None:
    """Trap 6."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, reference = net(), net()
    optimizer, theirs = OPTIMIZERS["SGD"](model.parameters()), OPTIMIZERS["SGD"](reference.parameters())
    wellcond.attach(theirs, reference, *transform)
    if order == "compile, attach":
        compiled: nn.Module = torch.compile(model, backend=backend)
        wellcond.attach(optimizer, compiled, *transform)
    else:
        wellcond.attach(optimizer, model, *transform)
        compiled = torch.compile(model, backend=backend)
    compilations = []
    for step in range(8):
        train(compiled, optimizer, range(step, step + 1))
        compilations.append(len(graphs))
    train(reference, theirs, range(8))
    for ours, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)
    # With stats_every=2 both variants have been met after two steps: nothing is compiled again.
    assert compilations[-1] == compilations[1] > 0


@transforms
def test_parameters_without_gradient_frozen_or_added_later(transform: Any) -> None:
    """Trap 8."""
    model = net()
    optimizer = torch.optim.SGD([*model.conv.parameters(), *model.norm.parameters()], lr=0.05, momentum=0.9)
    handle = wellcond.attach(optimizer, model, *transform)
    weights = handle.stats()[transform[0].name]["weights"]
    model.conv.bias.requires_grad_(False)
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": model.fc.parameters(), "lr": 0.01})
    train(model, optimizer, range(2, 4))
    assert handle.stats()[transform[0].name]["weights"] == weights + 1
    optimizer.zero_grad()
    backward(model, 4)
    model.fc.weight.grad = None
    before = model.fc.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.fc.weight, before)
    model.conv.weight.requires_grad_(False)
    train(model, optimizer, range(5, 8))
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


@transforms
def test_memory_format_changes_nothing(transform: Any) -> None:
    model, reference = net().to(memory_format=torch.channels_last), net()
    optimizer, theirs = OPTIMIZERS["SGD"](model.parameters()), OPTIMIZERS["SGD"](reference.parameters())
    wellcond.attach(optimizer, model, *transform)
    wellcond.attach(theirs, reference, *transform)
    for step in range(4):
        optimizer.zero_grad()
        inputs, labels = batch(step)
        F.cross_entropy(model(inputs.to(memory_format=torch.channels_last)), labels).backward()
        optimizer.step()
    train(reference, theirs, range(4))
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    for ours, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-11)


@transforms
def test_gradients_stay_where_they_are_in_memory(transform: Any) -> None:
    """DDP's buckets and fused optimizers keep views of the gradients: they are changed in place."""
    model = net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    wellcond.attach(optimizer, model, *transform)
    backward(model, 0)
    addresses = [parameter.grad.data_ptr() for parameter in model.parameters() if parameter.grad is not None]
    optimizer.step()
    assert addresses == [parameter.grad.data_ptr() for parameter in model.parameters() if parameter.grad is not None]


@transforms
def test_the_report_has_a_line_for_every_parameter_before_training(transform: Any) -> None:
    model = net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    handle = wellcond.attach(optimizer, model, *transform)
    for block in handle.report().split("\n\n"):
        names = [line.split()[0] for line in block.splitlines()[1:-1]]
        assert block.splitlines()[-1].startswith("in all: ")
        assert names == [name for name, _ in model.named_parameters()]
