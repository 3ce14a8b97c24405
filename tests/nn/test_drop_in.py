"""Layers as others use them: states written from outside, frozen statistics, meta device, neighbours, fusion."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import wellcond.nn as W
from pairs import parametrize_pairs

NORMS: dict[str, Callable[..., nn.Module]] = {
    "bn": nn.BatchNorm2d,
    "mbn": W.MomentumBatchNorm2d,
    "bsr": W.BSRBatchNorm2d,
    "bsr nnls": lambda *args, **options: W.BSRBatchNorm2d(*args, nonneg="nnls", exact=False, **options),
    "bsr equal weights": lambda *args, **options: W.BSRBatchNorm2d(*args, momentum=None, **options),
    "ghost": lambda *args, **options: W.GhostBatchNorm2d(*args, group_size=2, **options),
    "brn": W.BatchRenorm2d,
    "mabn": lambda *args, **options: W.MovingAverageBatchNorm2d(*args, window=2, warmup_steps=0, **options),
    "cbn": lambda *args, **options: W.CrossIterationBatchNorm2d(*args, compensate=False, **options),
    "evalnorm": W.EvalNorm2d,
    "pn": W.PopulationNorm2d,
    "sn": W.SwitchableNorm2d,
    "ssn": W.SparseSwitchableNorm2d,
    "ibn": W.InstanceBatchNorm2d,
    "kn": W.KalmanBatchNorm2d,
    "dbn": W.DecorrelatedBatchNorm2d,
    "iternorm": W.IterNorm2d,
}
MAPS: dict[str, Callable[..., nn.Module]] = {
    "wnn linear": W.WhitenedLinear,
    "eigen linear": W.EigenLinear,
    "gwnn linear": W.GeneralizedWhitenedLinear,
    "wnn": lambda *args, **options: W.WhitenedConv2d(*args, 1, **options),
    "eigen": lambda *args, **options: W.EigenConv2d(*args, 1, **options),
    "gwnn": lambda *args, **options: W.GeneralizedWhitenedConv2d(*args, 1, **options),
    "nd": lambda *args, **options: W.NetworkDeconvolution2d(*args, 1, **options),
}
# Those that evaluate as a batch normalization of their running statistics.
FUSIBLE = {"bn", "mbn", "ghost", "brn", "mabn", "cbn", "pn", "kn"}
every_norm = pytest.mark.parametrize("name", NORMS)
every_layer = pytest.mark.parametrize("name", [*NORMS, *MAPS])


def make(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    if name in NORMS:
        return NORMS[name](4, **options)
    if name != "nd":
        options = {"stats_every": 1, "refresh_every": 2, **options}
    return MAPS[name](4, 4, **options)


def batch(name: str, seed: int = 0, samples: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, 4, 3, generator=generator) * 2 + 1
    x = x + torch.randn(samples, 4, 1, 1, generator=generator)
    return x[:, :, 0, 0] if name.endswith("linear") else x


def train(name: str, layer: nn.Module, steps: int = 4, seed: int = 0) -> nn.Module:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    layer.train()
    for step in range(steps):
        optimizer.zero_grad()
        layer(batch(name, 10 * seed + step)).square().mean().backward()
        optimizer.step()
    return layer


def right(name: str, layer: nn.Module) -> Tensor:
    """What the layer's state gives in a layer that has never seen anything else."""
    fresh = make(name)
    fresh.load_state_dict(copy.deepcopy(layer.state_dict()))
    return fresh.eval()(batch(name, 99))


# states that are written from outside ---------------------------------------------------------------------------------


def by_state_dict(mine: nn.Module, theirs: nn.Module) -> None:
    for own, other in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
        own.lerp_(other, 0.5) if own.is_floating_point() else own.copy_(other)


def by_data(mine: nn.Module, theirs: nn.Module) -> None:
    """Leaves the version counters as they are."""
    for own, other in zip(mine.state_dict(keep_vars=True).values(), theirs.state_dict().values(), strict=True):
        own.data.copy_(other)


def by_numpy(mine: nn.Module, theirs: nn.Module) -> None:
    for own, other in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
        own.numpy()[...] = other.numpy()


def by_swapping(mine: nn.Module, theirs: nn.Module) -> None:
    for (_, module), (_, other) in zip(mine.named_modules(), theirs.named_modules(), strict=True):
        for key, buffer in other._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.clone()
        for key, parameter in other._parameters.items():
            if parameter is not None:
                setattr(module, key, nn.Parameter(parameter.detach().clone()))


def by_loading(mine: nn.Module, theirs: nn.Module) -> None:
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()), assign=True)


def by_buffers(mine: nn.Module, theirs: nn.Module) -> None:
    """As `AveragedModel(use_buffers=True)` and DDP do: what no state dict holds, too."""
    own, other = ([*module.parameters(), *module.buffers()] for module in (mine, theirs))
    with torch.no_grad():
        for one, value in zip(own, other, strict=True):
            one.copy_(value)


WAYS = (by_state_dict, by_data, by_numpy, by_swapping, by_loading, by_buffers)


@every_layer
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_evaluation_notices_what_is_written_from_outside(name: str, way: Callable[..., None]) -> None:
    layer = make(name)
    average = copy.deepcopy(layer).eval()
    average(batch(name))  # nothing seen yet
    for step in range(3):
        train(name, layer, seed=step)
        with torch.no_grad():
            way(average, layer)
            torch.testing.assert_close(average(batch(name, 99)), right(name, average))
    # And once more with nothing new: what is copied may be no more than an unsolved layer's.
    way(average, layer)
    torch.testing.assert_close(average(batch(name, 99)), right(name, average))


@every_layer
@pytest.mark.parametrize("first", [0, 2], ids=["unseen", "trained"])
def test_averaged_models(name: str, first: int) -> None:
    layer = train(name, make(name), first)
    wrapper = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True).eval()
    wrapper(batch(name))
    for step in range(3):
        wrapper.update_parameters(layer)
        torch.testing.assert_close(wrapper(batch(name, 99)), right(name, wrapper.module))
        train(name, layer, 1, seed=step + 1)


def test_compiled_evaluation_notices_it_too() -> None:
    layer, other = make("bsr").eval(), train("bsr", make("bsr"))
    compiled = torch.compile(layer, backend="eager")
    compiled(batch("bsr"))
    by_data(layer, other)
    torch.testing.assert_close(compiled(batch("bsr", 99)), right("bsr", other))


@every_layer
def test_state_dicts_hold_tensors_alone_of_shapes_that_stay(name: str) -> None:
    layer = make(name)
    before = {key: value.shape for key, value in layer.state_dict().items()}
    for step in range(3):
        train(name, layer, 1, seed=step)
        layer(batch(name)).sum().backward()
        assert {key: value.shape for key, value in layer.state_dict().items()} == before


@pytest.mark.parametrize("name", [name for name in MAPS if name != "nd"])
def test_states_that_held_dicts_still_load(name: str) -> None:
    layer = train(name, make(name), 3)
    layer(batch(name, 50)).sum().backward()  # something waits now
    state = layer.state_dict()
    old = dict(state)
    counts = ("steps", "failed_refreshes", "recomputes")
    old["_extra_state"] = dict(zip(counts, state["_extra_state"].tolist(), strict=True))
    for child, module in layer.named_children():
        old[f"{child}._extra_state"] = {"pending": None if module.pending is None else tuple(module.pending)}
    one, other = make(name), make(name)
    one.load_state_dict(copy.deepcopy(old))
    other.load_state_dict(copy.deepcopy(state))
    for reloaded in (one, other):
        assert reloaded.steps == layer.steps == 4
        for key, value in reloaded.state_dict().items():
            assert torch.equal(value, state[key]), key
    empty = {key: {"pending": None} if key.endswith("s._extra_state") else value for key, value in old.items()}
    one.load_state_dict(empty)
    average = {key: (value.double() + state[key]) / 2 for key, value in state.items()}  # integers, too
    one.load_state_dict(average)
    assert one.steps == 4


# statistics that are frozen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NORMS, "nd"])
@pytest.mark.parametrize("grad", [True, False])
def test_frozen_statistics_stay(name: str, grad: bool) -> None:
    """`track_running_stats = False` after construction: training normalizes as before, and keeps nothing of it."""
    layer = train(name, make(name))
    free = copy.deepcopy(layer)
    layer.track_running_stats = False
    before = copy.deepcopy(layer.state_dict())
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(batch(name, 7)), free(batch(name, 7)))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key
    torch.testing.assert_close(layer.eval()(batch(name, 99)), right(name, layer))
    layer.train().track_running_stats = True
    layer(batch(name, 7))
    torch.testing.assert_close(dict(layer.state_dict()), dict(free.state_dict()))


# the meta device ------------------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("source", ["itself", "half", "plain"])
def test_made_on_the_meta_device_and_filled(name: str, source: str) -> None:
    if (source == "plain" and name in MAPS) or (source == "half" and name == "bn"):
        pytest.skip("stands in for no batch normalization, or is torch's own")
    layer = train(name, nn.BatchNorm2d(4) if source == "plain" else make(name))
    state = copy.deepcopy(layer.state_dict())
    if source == "half":
        state = {key: value.bfloat16() if key.startswith("running") else value for key, value in state.items()}
    fresh = make(name)
    fresh.load_state_dict(copy.deepcopy(state))
    filled = make(name, device="meta")
    assert filled.load_state_dict(copy.deepcopy(state), assign=True) == ([], [])
    tensors = dict(filled.named_parameters()) | dict(filled.named_buffers())
    assert not [key for key, tensor in tensors.items() if tensor.is_meta]
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)  # none is another's memory
    for key, value in dict(fresh.named_buffers()).items():
        assert tensors[key].dtype == value.dtype, key
    torch.testing.assert_close(filled.eval()(batch(name, 99)), fresh.eval()(batch(name, 99)))
    train(name, filled, 2), train(name, fresh, 2)
    torch.testing.assert_close(dict(filled.state_dict()), dict(fresh.state_dict()))


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_runs_on_the_meta_device(name: str, training: bool) -> None:
    layer = make(name, device="meta").train(training)
    for _ in range(3):
        x = batch(name).to("meta").requires_grad_()
        y = layer(x)
        assert y.is_meta
        assert y.shape == x.shape
        y.sum().backward()
        layer(x.detach())


# neighbours -----------------------------------------------------------------------------------------------------------


@parametrize_pairs(
    ("name", [name for name in (*NORMS, *MAPS) if not name.endswith("linear")]),
    ("shape", ["usual", "channels last", "one position", "one sample", "groups"]),
    ("training", [True, False]),
    allowed=lambda name, shape, training: shape != "one position" or name not in ("ibn", "nd"),
)
def test_what_comes_next_may_work_in_place(name: str, training: bool, shape: str) -> None:
    options = {"group_size": 2} if shape == "groups" and name in NORMS and name not in ("bn", "ghost") else {}
    layer = make(name) if not options or name == "bsr nnls" else make(name, **options)
    train(name, layer, 1)
    layer.train(training)
    x = batch(name)
    x = x[:, :, :1, :1] if shape == "one position" else x[:1] if shape == "one sample" else x
    x = x.to(memory_format=torch.channels_last) if shape == "channels last" else x
    gradients = []
    for in_place in (True, False):
        own = x.clone().requires_grad_()
        y = copy.deepcopy(layer)(own * 1)
        y = y.add_(0.5).relu_() if in_place else (y + 0.5).relu()
        y.square().sum().backward()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients)


# γ alone --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NORMS if name != "bn"])
def test_without_a_bias(name: str) -> None:
    layer = make(name, bias=False)
    assert layer.weight is not None
    assert layer.bias is None
    train(name, layer).eval()(batch(name))
    assert "bias=False" in repr(layer)
    with_zero = make(name)
    with_zero.load_state_dict({**layer.state_dict(), "bias": torch.zeros(4)})
    torch.testing.assert_close(layer(batch(name)), with_zero.eval()(batch(name)))
    if not name.startswith("bsr ") and name != "mabn":  # which is refused where no layer comes before
        options = {"ghost": {"group_size": 2}, "cbn": {"compensate": False}}.get(name, {})
        back = W.convert_norm(W.convert_norm(layer, "bn"), name, **options)
        assert back.bias is None
        assert back.weight is not None
    assert make(name, affine=False, bias=False).weight is None


# fusion ---------------------------------------------------------------------------------------------------------------


@every_norm
def test_fusion_is_right_or_refused(name: str) -> None:
    convolution, linear = nn.Conv2d(4, 4, 1).eval(), nn.Linear(4, 4).eval()
    layer = train(name, make(name)).eval()
    x = batch(name, 5)
    model = nn.Sequential(convolution, layer)
    if name in FUSIBLE:
        torch.testing.assert_close(fuse_conv_bn_eval(convolution, layer)(x), model(x))
        fuse_linear_bn_eval(linear, layer)
    else:
        for call in (lambda: fuse_conv_bn_eval(convolution, layer), lambda: fuse_linear_bn_eval(linear, layer)):
            with pytest.raises(TypeError, match=f"cannot fuse {type(layer).__name__}, .*convert_norm"):
                call()
        assert layer.eps == 1e-5
    torch.testing.assert_close(fuse(model)(x), model(x))
    if name != "bn":
        with pytest.raises((NotImplementedError, AssertionError), match=type(layer).__name__):
            fuse_modules(model, [["0", "1"]])
    plain = W.convert_norm(copy.deepcopy(model), "bn")
    torch.testing.assert_close(fuse_conv_bn_eval(plain[0], plain[1])(x), plain(x))


# second derivatives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MAPS))
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_of_maps(name: str, training: bool) -> None:
    layer = train(name, make(name)).double().train(training)
    state = copy.deepcopy(layer.state_dict())

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own = {key: value.clone() for key, value in state.items() if "extra_state" not in key}
        return torch.func.functional_call(layer, own | {"weight": weight, "bias": bias}, x)

    x = batch(name, 5)[:3, ..., :2] if not name.endswith("linear") else batch(name, 5)[:3]
    arguments = [tensor.detach().double().requires_grad_() for tensor in (x, layer.weight, layer.bias)]
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("name", ["sn", "ssn", "kn", "dbn", "iternorm"])
def test_second_derivatives_of_a_sum(name: str) -> None:
    """The incoming gradient is then constant, and all comes from what the forward pass saved."""
    layer = make(name).double()
    x = batch(name).double()[:, :, :2, :2].requires_grad_()
    weights = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)

    def slope(inputs: Tensor) -> Tensor:
        own = copy.deepcopy(layer)
        return torch.autograd.grad((own(inputs) * weights).sum(), inputs, create_graph=True)[0]

    assert torch.autograd.gradcheck(slope, (x,))


def test_what_has_no_second_derivative_says_so() -> None:
    from wellcond.nn.functional.normalize import normalize
    from wellcond.numerics.moments import batch_moments

    x, weight = torch.randn(4, 3, 2, requires_grad=True), torch.ones(3, requires_grad=True)
    own = batch_moments(x)
    y = normalize(x, own.mean, own.var, weight, None, 1e-5, batch=own, all_reduce=lambda sums: sums)
    first = torch.autograd.grad(y.sum(), [x, weight], create_graph=True)
    plain = normalize(x, own.mean, own.var, weight, None, 1e-5, batch=own)
    torch.testing.assert_close(first, torch.autograd.grad(plain.sum(), [x, weight]))
    with pytest.raises(RuntimeError, match="synchronized over ranks has no second derivative"):
        first[0].square().sum().backward()
