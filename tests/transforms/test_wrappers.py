"""Optimizers inside optimizers: attached to through the innermost, or refused by name with nothing left behind."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import torch
from timm.optim import create_optimizer_v2
from timm.optim.lookahead import Lookahead as TimmLookahead
from torch import Tensor, nn
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.optim import Optimizer

import wellcond
from wellcond import FeatureWhitening, GradientCentralization
from wellcond.transforms import WellcondWarning, attachments

OBSERVING: dict[str, Any] = {"stats_every": 1, "solve_every": 1}


def net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return model(x * torch.tensor([1.0, 5.0, 1.0, 0.2], dtype=torch.float64) + 1).square().mean()


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


class WithoutInit(Optimizer):
    """As the many copies of Lookahead that do not call torch's constructor."""

    def __init__(self, base: Optimizer) -> None:
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.base, self.param_groups, self.defaults = base, base.param_groups, base.defaults
        self.state = defaultdict(dict)

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()


class WithInit(Optimizer):
    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.param_groups, self.state, self.fast = inner.param_groups, inner.state, inner

    def step(self, closure: Any = None) -> Any:
        return self.fast.step(closure)


class NoOptimizer:
    def __init__(self, optimizer: Any) -> None:
        self.wrapped = optimizer

    def step(self, closure: Any = None) -> Any:
        return self.wrapped.step(closure)

    def zero_grad(self) -> None:
        self.wrapped.zero_grad()


class Imitating:
    """As Lightning's and Fabric's: an object of a class made on the spot, to pass for the optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Imitating" + type(optimizer).__name__, (Imitating, type(optimizer)), {})

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure) if closure is not None else self._optimizer.step()

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def __getattr__(self, name: str) -> Any:
        if name == "_optimizer":
            raise AttributeError(name)
        return getattr(self._optimizer, name)


class NoAverager:
    """An averager that never averages; torch's own need a process group."""

    step = 0

    def average_parameters(self, params: Any) -> None:
        return None


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "without torch's init": WithoutInit,
    "with torch's init": WithInit,
    "no optimizer": NoOptimizer,
    "imitating": Imitating,
    "timm's Lookahead": lambda inner: TimmLookahead(inner, alpha=1.0),
    "pytorch_optimizer's Lookahead": lambda inner: pytorch_optimizer.Lookahead(inner, alpha=1.0),
    "PostLocalSGDOptimizer": lambda inner: PostLocalSGDOptimizer(inner, NoAverager()),
}


def snapshot(model: nn.Module, optimizer: Any) -> Any:
    return (
        [(list(m._forward_pre_hooks), list(m._forward_hooks), sorted(vars(m))) for m in model.modules()],
        sorted(vars(optimizer)),
        {key: list(value) for key, value in vars(optimizer).items() if "hooks" in key},
        {id(key): dict(value) for key, value in getattr(optimizer, "state", {}).items()},
    )


@pytest.mark.filterwarnings("ignore:.*leaves out the state")
@pytest.mark.parametrize("seed", range(12))
def test_a_stack_of_wrappers_is_one_optimizer(seed: int) -> None:
    draw = random.Random(seed)
    stack = [draw.choice(list(WRAPPERS)) for _ in range(draw.randint(1, 3))]
    trained = []
    for wrap in (True, False):
        model = net()
        inner = sgd(model)
        outer: Any = inner
        chain = [inner]
        for name in stack if wrap else ():
            if not isinstance(outer, Optimizer):
                break
            try:
                chain.append(WRAPPERS[name](outer))
            except (AttributeError, TypeError):
                continue  # these two do not go together, whatever is attached
            outer = chain[-1]
        given = draw.choice(chain)
        handle = wellcond.attach(given, model, GradientCentralization(), FeatureWhitening(**OBSERVING))
        for each in chain:
            assert attachments(each) == [handle]
            with pytest.raises(ValueError, match="is attached to this SGD already"):
                wellcond.attach(each, model, FeatureWhitening())
        for step in range(4):
            outer.zero_grad()
            loss_of(model, step).backward()
            outer.step()
        trained.append(model.weight.detach())
        handle.remove()
        assert all(attachments(each) == [] for each in chain)
    assert torch.equal(*trained), stack


def test_timms_lookahead_by_name() -> None:
    model = net()
    optimizer = create_optimizer_v2(model, opt="lookahead_sgd", lr=0.1, weight_decay=0.0)
    wellcond.attach(optimizer, model, FeatureWhitening(**OBSERVING))
    for step in range(7):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    assert optimizer.state_dict()["state"][0]["wellcond_whitening_step"] == 7


class Sam(Optimizer):
    """Sharpness-aware minimization as it is copied around: two steps, and a state apart from its base's."""

    def __init__(self, params: Any, base_optimizer: Any, rho: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad * (self.defaults["rho"] / norm))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()


@pytest.mark.filterwarnings("ignore:.*leaves out the state")
@pytest.mark.parametrize("call", ["step", "two steps"])
@pytest.mark.parametrize("kind", [Sam, pytorch_optimizer.SAM])
def test_sam_is_attached_to_through_its_base(kind: Any, call: str) -> None:
    """The gradient that the weights are moved by is centred; the one that they are disturbed by is not."""
    models = [net(), net()]
    optimizers = [kind(m.parameters(), base_optimizer=torch.optim.SGD, lr=0.05, rho=0.1) for m in models]
    wellcond.attach(optimizers[0], models[0], GradientCentralization())
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):

            def closure(model: nn.Module = model, step: int = step) -> Tensor:
                loss = loss_of(model, step)
                loss.backward()
                if model is models[1]:
                    model.weight.grad -= model.weight.grad.mean(dim=1, keepdim=True)
                return loss

            optimizer.zero_grad()
            loss_of(model, step).backward()
            if call == "step":
                optimizer.step(closure)
                continue
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step()
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-12, atol=1e-12)
    assert not torch.equal(models[0].weight, net().weight)


def test_a_wrapper_whose_checkpoint_lacks_what_it_steps_is_told_of() -> None:
    model = net()
    with pytest.warns(WellcondWarning, match=r"Sam.state_dict\(\) leaves out the state of the SGD"):
        wellcond.attach(Sam(model.parameters(), torch.optim.SGD, lr=0.1), model, GradientCentralization())


def test_a_wrapper_that_loads_the_state_of_what_it_steps_resumes_exactly() -> None:
    """pytorch_optimizer's SAM loads into its base without the base's hooks."""

    def made() -> tuple[nn.Module, Any]:
        model = net()
        optimizer = pytorch_optimizer.SAM(model.parameters(), base_optimizer=torch.optim.AdamW, lr=0.05)
        wellcond.attach(optimizer, model, FeatureWhitening(stats_every=2, solve_every=3))
        return model, optimizer

    def go_on(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            for half in (optimizer.first_step, optimizer.second_step):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                half()

    model, optimizer = made()
    go_on(model, optimizer, range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    go_on(model, optimizer, range(4, 9))
    resumed, theirs = made()
    resumed.load_state_dict(saved[0])
    theirs.load_state_dict(saved[1])
    go_on(resumed, theirs, range(4, 9))
    assert torch.equal(model.weight, resumed.weight)


class Unhooked(Optimizer):
    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": list(params)}]
        self.state, self.defaults = defaultdict(dict), {}

    def step(self, closure: Any = None) -> Any:
        return None


class Several(NoOptimizer):
    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = list(optimizers)


class Halves(Optimizer):
    """Gives one half of its parameters to each of two others, as ZeroRedundancyOptimizer gives each rank a part."""

    def __init__(self, params: Any, parts: int) -> None:
        params = list(params)
        super().__init__(params, {})
        self.one = torch.optim.SGD(params[:1], lr=0.1)
        if parts == 2:
            self.two = torch.optim.AdamW(params[1:], lr=0.1)


def replaced_step(model: nn.Module) -> Optimizer:
    class Mine(torch.optim.SGD):
        pass

    optimizer = Mine(model.parameters(), lr=0.1)
    Mine.step = lambda self, closure=None: None  # type: ignore[method-assign, assignment]
    return optimizer


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "bSAM": (
        lambda m: pytorch_optimizer.BSAM(m.parameters(), num_data=10),
        r"BSAM changes weights in first_step\(\) and second_step\(\), .* attach to an optimizer that updates in step",
    ),
    "LOMO": (lambda m: pytorch_optimizer.LOMO(m), r"LOMO changes weights in fused_backward\(\)"),
    "no constructor": (lambda m: Unhooked(m.parameters()), "Unhooked was made without torch.optim.Optimizer.__init__"),
    "several": (
        lambda m: Several(sgd(m), torch.optim.AdamW(m.parameters())),
        r"Several holds several .*\(SGD, AdamW\)",
    ),
    "halves": (lambda m: Halves(m.parameters(), 2), r"Halves holds several optimizers \(SGD, AdamW\): attach to each"),
    "a part": (lambda m: Halves(m.parameters(), 1), "Halves gives the SGD in it only some of its parameters"),
    "step replaced": (replaced_step, "Mine.step was replaced after an optimizer of that class was made"),
    "a function": (lambda m: len, "optimizer must be a torch.optim.Optimizer, got builtin_function_or_method"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(name: str) -> None:
    make, message = REFUSED[name]
    model = net()
    optimizer = make(model)
    before = snapshot(model, optimizer) if hasattr(optimizer, "__dict__") else None
    with pytest.raises(TypeError, match=message):
        wellcond.attach(optimizer, model, GradientCentralization(), FeatureWhitening())
    if before is not None:
        assert snapshot(model, optimizer) == before


def test_an_optimizer_that_keeps_another_for_purposes_of_its_own() -> None:
    model = net()
    optimizer = sgd(model)
    optimizer.for_the_discriminator = sgd(net())  # type: ignore[attr-defined]
    handle = wellcond.attach(optimizer, model, GradientCentralization())
    assert attachments(optimizer) == [handle]
