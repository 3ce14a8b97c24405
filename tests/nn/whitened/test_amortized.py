"""What every layer with amortized constants must do: schedule, repeated passes, state, precision, conversion."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from wellcond.nn.whitened.amortized import AmortizedLayer
from wellcond.nn.whitened.eigen import EigenConv2d, EigenLinear
from wellcond.nn.whitened.gwnn import GeneralizedWhitenedConv2d, GeneralizedWhitenedLinear
from wellcond.nn.whitened.wnn import WhitenedConv2d, WhitenedLinear
from wellcond.runtime.checks import WellcondWarning

FLOAT64 = torch.float64
LINEAR = [WhitenedLinear, EigenLinear, GeneralizedWhitenedLinear]
CONV = [WhitenedConv2d, EigenConv2d, GeneralizedWhitenedConv2d]
every_layer = pytest.mark.parametrize("cls", LINEAR + CONV, ids=lambda cls: cls.__name__)
NAMES = ("transform", "center", "error_transform")


def make(cls: Any, seed: int = 0, dtype: torch.dtype = FLOAT64, **options: Any) -> Any:
    """A layer of 4 inputs and 6 outputs."""
    torch.manual_seed(seed)
    options = {"stats_every": 1, "refresh_every": 3, "refresh_warmup": False} | options
    arguments = (4, 6) if cls in LINEAR else (4, 6, 3)
    geometry = {} if cls in LINEAR else {"padding": 1, "groups": 2}
    return cls(*arguments, dtype=dtype, **geometry, **options)


def batch(cls: Any, step: int, samples: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    shape = (samples, 4) if cls in LINEAR else (samples, 4, 5, 4)
    x = torch.randn(shape, generator=generator, dtype=FLOAT64)
    x[:, 1] += 0.7 * x[:, 0] + 2
    return x


def loss_of(output: Tensor) -> Tensor:
    return (output - torch.linspace(-1, 1, output.numel(), dtype=FLOAT64).view(output.shape)).square().mean()


def constants(layer: Any) -> dict[str, Tensor]:
    return {name: getattr(layer, name).clone() for name in NAMES if hasattr(layer, name)}


def changed(layer: Any, before: dict[str, Tensor]) -> bool:
    return not torch.equal(layer.transform, before["transform"])


class Trainer:
    def __init__(self, layer: Any, lr: float = 0.05) -> None:
        self.layer = layer
        self.optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)

    def step(self, step: int, call: Callable[..., Tensor] | None = None, parts: int = 1) -> None:
        self.optimizer.zero_grad()
        for piece in batch(type(self.layer), step).chunk(parts):
            loss = loss_of((self.layer if call is None else call)(piece)) / parts
            loss.backward()
        self.optimizer.step()

    def run(self, steps: range, **kwargs: Any) -> None:
        for step in steps:
            self.step(step, **kwargs)


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


# schedule -----------------------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"refresh_every": 4, "stats_every": 1}, [4, 8, 12]),
        ({"refresh_every": 4, "stats_every": 1, "refresh_warmup": True}, [1, 2, 4, 8, 12]),
        ({"refresh_every": 9, "stats_every": 2, "refresh_warmup": True}, [2, 4, 8, 9]),
        ({"refresh_every": 5, "stats_every": 3}, [5, 10]),
        ({"refresh_every": None, "stats_every": 1}, []),
    ],
    ids=str,
)
def test_when_constants_are_renewed(cls: Any, options: dict[str, Any], expected: list[int]) -> None:
    """In the first pass after so many steps, whatever other passes there are."""
    layer = make(cls, **options)
    trainer = Trainer(layer)
    renewed = []
    for step in range(14):
        before = constants(layer)
        with torch.no_grad():
            layer(batch(cls, 100 + step))
        layer.eval()(batch(cls, 200 + step))
        layer.train()
        assert not changed(layer, before)
        trainer.step(step)
        if changed(layer, before):
            renewed.append(step)
    assert renewed == expected
    assert layer.steps == 14


@every_layer
def test_what_does_not_count(cls: Any) -> None:
    """Evaluation, passes without gradients, and `torch.func` leave everything as it is."""
    layer = make(cls, refresh_every=1)
    trainer = Trainer(layer)
    trainer.run(range(2))
    before = copy.deepcopy(layer)
    x = batch(cls, 9)
    layer.eval()(x)
    layer.train()
    with torch.no_grad():
        layer(x)
    parameters = {name: value.detach().clone() for name, value in layer.named_parameters()}
    torch.func.grad(lambda weights: loss_of(torch.func.functional_call(layer, weights, (x,))))(parameters)
    torch.func.functional_call(layer, parameters, (x,))
    assert_same_state(layer, before)


@every_layer
@pytest.mark.parametrize("parts", [2, 3])
def test_gradient_accumulation(cls: Any, parts: int) -> None:
    """Micro-batches are one step: same constants, same gradients, same parameters as with the batch as a whole."""
    whole, split = Trainer(make(cls)), Trainer(make(cls))
    generic = torch.linspace(-1, 1, 6, dtype=FLOAT64)

    def train(trainer: Trainer, step: int, parts: int) -> None:
        trainer.optimizer.zero_grad()
        for piece in batch(cls, step).chunk(parts):
            output = trainer.layer(piece)
            target = generic if cls in LINEAR else generic.view(6, 1, 1)
            ((output - target).square().sum() / (12 * output[0].numel())).backward()
        trainer.optimizer.step()

    for step in range(8):
        before = constants(split.layer)
        train(whole, step, 1)
        train(split, step, parts)
        assert changed(split.layer, before) == (step in (3, 6))
        for ours, theirs in zip(split.layer.parameters(), whole.layer.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    for name, value in constants(whole.layer).items():
        torch.testing.assert_close(getattr(split.layer, name), value, rtol=1e-9, atol=1e-11)


@every_layer
def test_all_micro_batches_before_their_backward(cls: Any) -> None:
    """A loss of several passes of one layer: none of them changes what another one's backward needs."""
    layer = make(cls, refresh_every=1)
    trainer = Trainer(layer)
    for step in range(4):
        trainer.optimizer.zero_grad()
        pieces = batch(cls, step).chunk(2)
        loss = loss_of(layer(pieces[0])) + loss_of(layer(pieces[1]))
        loss.backward()
        trainer.optimizer.step()
    assert layer.steps == 4


@every_layer
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(cls: Any, use_reentrant: bool) -> None:
    """Constants are renewed in a first pass, never in the one that repeats it; every sample is seen once."""
    plain, repeated = make(cls, seed=1), make(cls, seed=1)
    Trainer(plain).run(range(9))

    def call(x: Tensor) -> Tensor:
        return checkpoint(repeated, x.requires_grad_(), use_reentrant=use_reentrant)

    trainer = Trainer(repeated)
    for step in range(9):
        trainer.step(step, call=call)
    repeated._recomputes = False
    assert_same_state(plain, repeated)


@every_layer
def test_steps_that_a_scaler_skips_are_none(cls: Any) -> None:
    layer = make(cls)
    x = batch(cls, 0)
    for _ in range(5):  # no optimizer step between the passes
        loss_of(layer(x)).backward()
    assert layer.steps == 1


@every_layer
def test_refresh_by_hand(cls: Any) -> None:
    layer = make(cls, refresh_every=None)
    assert not layer.refresh()
    trainer = Trainer(layer)
    trainer.step(0)
    before = constants(layer)
    assert layer.refresh()
    assert changed(layer, before)
    assert layer.failed_refreshes == 0
    trainer.run(range(1, 4))
    assert layer.refresh()


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.01, foreach=True),
        lambda p: torch.optim.SGD(p, 0.01, fused=True),
        lambda p: torch.optim.AdamW(p, 0.01, fused=True),
        lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    ],
    ids=["SGD foreach", "SGD fused", "AdamW fused", "Adam foreach"],
)
def test_steps_of_all_implementations_are_noticed(make_optimizer: Any) -> None:
    layer = make(WhitenedLinear)
    trainer = Trainer(layer)
    trainer.optimizer = make_optimizer(layer.parameters())
    trainer.run(range(5))
    assert layer.steps == 5


def test_other_optimizers_and_changes_of_the_weight_are_no_steps() -> None:
    """Sharpness-aware minimization moves the weight for one pass and back; another network has its own optimizer."""
    layer, other = make(WhitenedLinear), nn.Linear(2, 2)
    trainer, others = Trainer(layer), torch.optim.SGD(other.parameters(), 0.1)
    for step in range(5):
        trainer.step(step)
        loss_of(layer(batch(WhitenedLinear, step))).backward()
        with torch.no_grad():
            layer.weight.add_(0.01)
        before = constants(layer)
        layer(batch(WhitenedLinear, step))
        with torch.no_grad():
            layer.weight.sub_(0.01)
        other(torch.ones(2)).sum().backward()
        others.step()
        layer(batch(WhitenedLinear, step))
        assert not changed(layer, before)
    assert layer.steps == 6  # the pass after the fifth step is the sixth one's


def test_steps_without_an_optimizer() -> None:
    layer = make(WhitenedLinear)
    for step in range(7):
        loss_of(layer(batch(WhitenedLinear, step))).backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
    assert layer.steps == 7
    assert not torch.equal(layer.transform[0], torch.eye(4, dtype=FLOAT64))


# failures -----------------------------------------------------------------------------------------------------------


@every_layer
def test_failed_factorizations_keep_the_last_good_constants(cls: Any) -> None:
    layer = make(cls, damping_mode="absolute", refresh_every=1)
    trainer = Trainer(layer)
    trainer.run(range(3))
    good = copy.deepcopy(layer)
    for child in layer.children():
        child.covariance.fill_(float("nan"))
    with pytest.warns(WellcondWarning, match=r"no finite power .* earlier one is kept"):
        assert not layer.refresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not layer.refresh()
    assert layer.failed_refreshes == 2
    for name, value in constants(good).items():
        assert torch.equal(getattr(layer, name), value)
    assert torch.equal(layer.weight, good.weight)


@every_layer
def test_inputs_that_are_not_finite_do_not_enter(cls: Any) -> None:
    layer = make(cls, refresh_every=1)
    trainer = Trainer(layer)
    trainer.run(range(2))
    bad = batch(cls, 5)
    bad[0, 0] = float("nan")
    layer(bad)
    assert layer.refresh()
    statistics = next(layer.children())
    assert int(statistics.skipped) == 1
    assert torch.isfinite(layer.weight).all()
    assert torch.isfinite(layer.transform).all()


@every_layer
@pytest.mark.parametrize("how", ["parametrized", "pruned"])
def test_computed_weights_are_refused(cls: Any, how: str) -> None:
    layer = make(cls)
    if how == "parametrized":
        nn.utils.parametrizations.weight_norm(layer)
    else:
        prune.identity(layer, "weight")
    with pytest.raises(RuntimeError, match="must be a parameter, not computed by a parametrization"):
        layer(batch(cls, 0))
    with pytest.raises(RuntimeError, match="must be a parameter, not computed by a parametrization"):
        layer.refresh()


@every_layer
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stats_every": 0}, "stats_every must be a positive integer, got 0"),
        ({"refresh_every": -1}, "refresh_every must be a positive integer, got -1"),
        ({"stats_decay": 1.0}, r"stats_decay must be in \[0, 1\), got 1.0"),
        ({"damping": -1.0}, "damping must be a finite number of at least 0, got -1.0"),
        ({"damping_mode": "none"}, "damping_mode must be one of 'relative', 'mean', 'absolute', got 'none'"),
        ({"refresh_warmup": 1}, "refresh_warmup must be True or False, got 1"),
    ],
    ids=str,
)
def test_bad_options_are_refused(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(cls, **options)


# state --------------------------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resume_is_exact(cls: Any, stop: int) -> None:
    options = {"stats_every": 2, "refresh_every": 3}
    straight, first = Trainer(make(cls, **options)), Trainer(make(cls, **options))
    straight.run(range(9))
    first.run(range(stop))
    file = io.BytesIO()
    torch.save((first.layer.state_dict(), first.optimizer.state_dict()), file)
    file.seek(0)
    state, optimizer_state = torch.load(file, weights_only=True)
    second = Trainer(make(cls, seed=9, **options))
    second.layer.load_state_dict(state)
    second.optimizer.load_state_dict(optimizer_state)
    second.run(range(stop, 9))
    assert_same_state(second.layer, straight.layer)


@every_layer
@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_copies_go_on_by_themselves(cls: Any, way: str) -> None:
    trainer = Trainer(make(cls))
    trainer.run(range(4))
    other = Trainer(copy.deepcopy(trainer.layer) if way == "copy" else pickle.loads(pickle.dumps(trainer.layer)))
    before = copy.deepcopy(trainer.layer)
    trainer.optimizer = torch.optim.SGD(trainer.layer.parameters(), lr=0.05, momentum=0.9)
    other.run(range(4, 9))
    assert_same_state(trainer.layer, before)
    trainer.run(range(4, 9))
    assert_same_state(trainer.layer, other.layer)


@every_layer
def test_reset(cls: Any) -> None:
    layer = make(cls)
    Trainer(layer).run(range(5))
    torch.manual_seed(3)
    layer.reset_parameters()
    assert layer.steps == 0
    assert_same_state(layer, make(cls, seed=3))


@every_layer
def test_repr_names_the_options(cls: Any) -> None:
    text = repr(make(cls, damping=0.25, synchronize=False))
    assert "damping=0.25" in text
    assert "refresh_every=3" in text
    assert "synchronize=False" in text


# plain layers -------------------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("bias", [True, False])
def test_from_and_to_plain(cls: Any, bias: bool) -> None:
    plain: nn.Module
    if cls in LINEAR:
        plain = nn.Linear(4, 6, bias=bias, dtype=FLOAT64)
    else:
        plain = nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=2, bias=bias, padding_mode="reflect").double()
    x = batch(cls, 0)
    expected = plain(x)
    layer = cls.from_layer(plain.eval(), stats_every=1, refresh_every=2, damping=0.1)
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert not layer.training
    assert isinstance(layer, type(plain))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    layer.train()
    Trainer(layer).run(range(5))
    back = layer.eval().to_plain()
    assert type(back) is type(plain)
    torch.testing.assert_close(back(x), layer(x), rtol=0, atol=1e-12)
    with pytest.raises(TypeError, match=f"layer must be an nn.{type(plain).__name__}, got {cls.__name__}"):
        cls.from_layer(layer)


@every_layer
def test_starts_as_the_plain_layer(cls: Any) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(4, 6) if cls in LINEAR else nn.Conv2d(4, 6, 3, padding=1, groups=2)
    layer = make(cls, dtype=torch.float32)
    assert torch.equal(layer.weight, plain.weight)
    x = batch(cls, 0).float()
    torch.testing.assert_close(layer(x), plain(x))


# numbers ------------------------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_first_and_second_derivatives(cls: Any, training: bool) -> None:
    layer = make(cls, refresh_every=None)
    Trainer(layer).run(range(2))
    assert layer.refresh()
    layer.train(training)
    x = batch(cls, 7, samples=3)[..., :3, :3] if cls in CONV else batch(cls, 7, samples=3)
    x.requires_grad_()

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(dict(layer.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(layer, named, (x,))

    arguments = (x, *(value.detach().clone().requires_grad_() for value in layer.parameters()))
    assert torch.autograd.gradcheck(call, arguments)
    assert torch.autograd.gradgradcheck(call, arguments)


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_statistics_wide(cls: Any, dtype: torch.dtype) -> None:
    layer = make(cls, dtype=torch.float32)
    trainer = Trainer(layer)
    for step in range(5):
        trainer.optimizer.zero_grad()
        layer(batch(cls, step).float()).square().mean().backward()
        trainer.optimizer.step()
    wide = copy.deepcopy(layer)
    layer.to(dtype)
    for name, value in constants(wide).items():
        assert torch.equal(getattr(layer, name), value)
        assert getattr(layer, name).dtype == torch.float32
    x = batch(cls, 9).float()
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), wide(x), rtol=5e-2, atol=0.1)
    y.float().square().mean().backward()
    assert layer.weight.grad.dtype == dtype
    assert all(child.covariance.dtype == torch.float32 for child in layer.children())
    assert layer.refresh()
    torch.testing.assert_close(layer.to_plain().weight, layer.folded()[0])


@every_layer
def test_made_in_half_precision(cls: Any) -> None:
    layer = make(cls, dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert {layer.transform.dtype, *(child.covariance.dtype for child in layer.children())} == {torch.float32}


@every_layer
def test_autocast(cls: Any) -> None:
    """The product V P and statistics in float32, the layer itself in half precision."""
    layer = make(cls, dtype=torch.float32)
    x = batch(cls, 0).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32
    other = make(cls, dtype=torch.float32)
    other(x).square().mean().backward()
    assert layer.refresh()
    assert other.refresh()
    for ours, theirs in zip(layer.children(), other.children(), strict=True):
        torch.testing.assert_close(ours.covariance, theirs.covariance, rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(next(layer.children()).covariance, next(other.children()).covariance)


@pytest.mark.parametrize("cls", CONV, ids=lambda cls: cls.__name__)
def test_channels_last(cls: Any) -> None:
    layer = make(cls, refresh_every=None)
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    x = batch(cls, 0)
    for _ in range(2):
        y, z = layer(x), other(x.contiguous(memory_format=torch.channels_last))
        assert z.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, z)
        loss_of(y).backward()
        loss_of(z).backward()
        torch.testing.assert_close(layer.weight.grad, other.weight.grad)
        assert layer.refresh()
        assert other.refresh()
        torch.testing.assert_close(layer.weight, other.weight)


@every_layer
def test_no_samples(cls: Any) -> None:
    layer = make(cls)
    layer(batch(cls, 0)).sum().backward()
    layer(batch(cls, 0)[:0]).sum().backward()
    assert layer.refresh()
    assert torch.isfinite(layer.weight).all()


@every_layer
def test_without_a_batch_axis(cls: Any) -> None:
    one, many = make(cls), make(cls)
    x = batch(cls, 0)[:1]
    torch.testing.assert_close(one(x[0]), many(x)[0])
    one(x[0]).sum().backward()
    many(x).sum().backward()
    assert one.refresh() == many.refresh()
    torch.testing.assert_close(one.transform, many.transform)


# compiled and exported ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", LINEAR, ids=lambda cls: cls.__name__)
def test_compiles(cls: Any) -> None:
    torch._dynamo.reset()
    options = {"stats_every": 2, "refresh_every": 3}
    eager, other = make(cls, **options), make(cls, **options)
    compiled = torch.compile(other, backend="aot_eager")
    Trainer(eager).run(range(7))
    torch._dynamo.utils.counters.clear()
    Trainer(other).run(range(7), call=compiled)
    for ours, theirs in zip(other.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert other.steps == 7
    # One variant of the pass whether or not it is observed.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@every_layer
def test_exports(cls: Any) -> None:
    layer = make(cls)
    Trainer(layer).run(range(5))
    x = batch(cls, 0)
    program = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


@every_layer
def test_is_a_leaf_of_symbolic_traces(cls: Any) -> None:
    model = nn.Sequential(make(cls), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = batch(cls, 0)
    torch.testing.assert_close(traced(x), F.relu(model[0](x)))
    assert isinstance(model[0], AmortizedLayer)
