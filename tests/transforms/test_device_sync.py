"""An ordinary step never waits for the device: nothing reads a value, or a size that depends on values, on the host.

On the CPU nothing can wait, so a test double stands in for the device: it sees every operator that runs and raises
where a GPU would have to be waited for. The same steps run on a GPU, where there is one, under torch's own check.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import wellcond
from wellcond import FeatureDescent, FeatureWhitening, GradientCentralization

# Operators that hand a value, or a shape made of values, to the host.
WAITING = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "histc",
    "repeat_interleave",
    "_linalg_check_errors",
    # A tensor made of numbers of the host: on a GPU a copy from memory that is not pinned, which waits.
    "lift_fresh",
}
# The host reads a CPU tensor's memory without any operator.
READING = ("tolist", "numpy", "cpu", "__array__")


class HostWaitError(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    """Raise at the first operator for which the host would wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING:
            raise HostWaitError(str(func))
        if name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
            for i in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else [])
        ):
            raise HostWaitError(f"{func} with a mask")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    def refuse(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise HostWaitError("a tensor's memory is read")

    with pytest.MonkeyPatch.context() as patch, NoWaiting():
        for name in READING:
            patch.setattr(Tensor, name, refuse)
        yield


@contextlib.contextmanager
def no_waiting_on_gpu() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# the double catches what it should ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: int(x.sum()),
        lambda x: bool(x.sum() > 0),
        lambda x: 1 if x.sum() > 0 else 0,
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: torch.bincount(x.long().abs()),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: torch.zeros(5).index_put_((x > 0,), x.new_zeros(())),
    ],
)
def test_the_double_catches_what_would_wait(wait: Callable[[Tensor], object]) -> None:
    x = torch.linspace(-1, 1, 5)
    wait(x)
    with no_waiting(), pytest.raises(HostWaitError):
        wait(x)


class Careless(GradientCentralization):
    """A transform that looks at the gradient's norm."""

    def update(self, slots: Any) -> None:
        if any(float(slot.layer.weight.grad.norm()) > 0 for slot in slots):
            super().update(slots)


def test_the_double_catches_a_transform_that_waits_in_its_update() -> None:
    layer = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    wellcond.attach(optimizer, layer, Careless())
    layer(torch.randn(5, 4)).sum().backward()
    with no_waiting(), pytest.raises(HostWaitError):
        optimizer.step()


@pytest.mark.parametrize("observing", [False, True])
def test_the_double_catches_a_hook_that_waits(observing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FeatureWhitening.observe

    def careless(self: Any, slot: Any, layer: Any, inputs: Any) -> Any:
        assert bool(torch.isfinite(inputs[0]).all())
        return real(self, slot, layer, inputs)

    monkeypatch.setattr(FeatureWhitening, "observe", careless)
    layer = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    wellcond.attach(optimizer, layer, FeatureWhitening(stats_every=2, solve_every=100, solve_warmup=False))
    for _ in range(2 if observing else 1):
        layer(torch.randn(5, 4)).sum().backward()
        optimizer.step()
    x = torch.randn(5, 4)
    # What an observation raises is said at the step.
    told = pytest.warns(wellcond.WellcondWarning, match="HostWaitError") if observing else contextlib.nullcontext()
    with no_waiting(), told:
        layer(x).sum().backward()
        optimizer.step()


# ordinary steps -----------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1, **options)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attention(x, memory, memory, need_weights=False)[0]


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(x)))


TOKENS = torch.tensor([[1, 2, 2, 10], [0, 3, 3, 3]])
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "linear": (lambda: nn.Linear(80, 5), lambda: (torch.randn(3, 7, 80),)),
    "conv": (lambda: nn.Conv2d(70, 6, 3, stride=2, padding=1), lambda: (torch.randn(3, 70, 6, 6),)),
    "grouped conv": (
        lambda: nn.Conv1d(6, 4, 3, groups=2, padding="same", padding_mode="reflect"),
        lambda: (torch.randn(3, 6, 9),),
    ),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), lambda: (torch.randn(3, 4, 5, 5),)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 3)), lambda: (TOKENS,)),
    "tied embedding": (Tied, lambda: (TOKENS,)),
    "self-attention": (SelfAttention, lambda: (torch.randn(3, 5, 8),)),
    "cross-attention": (CrossAttention, lambda: (torch.randn(3, 5, 8), torch.randn(3, 9, 8))),
    "separate projections": (
        lambda: CrossAttention(kdim=7, vdim=7),
        lambda: (torch.randn(3, 5, 8), torch.randn(3, 9, 7)),
    ),
    "norm layers": (
        lambda: nn.Sequential(
            nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 6), nn.GroupNorm(2, 6)
        ),
        lambda: (torch.randn(9, 8),),
    ),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), lambda: (torch.randn(6, 3), torch.randn(6, 4))),
}
TRANSFORMS: dict[str, tuple[type, dict[str, Any]]] = {
    "whitening": (FeatureWhitening, {}),
    "whitening dense": (FeatureWhitening, {"second_moment": "dense", "gradient_momentum": 0.9}),
    "whitening kronecker": (FeatureWhitening, {"second_moment": "kronecker", "precision": "bfloat16"}),
    "whitening low rank": (FeatureWhitening, {"second_moment": "low_rank"}),
    "whitening sketched": (FeatureWhitening, {"max_dim": 64, "rank": 4}),
    "whitening blocks": (FeatureWhitening, {"second_moment": "blocks", "norm": "fixed", "damping_mode": "mean"}),
    "descent": (FeatureDescent, {"restore_norm": False, "precision": "tf32"}),
    "descent kronecker": (FeatureDescent, {"second_moment": "kronecker"}),
}


def assert_ordinary_steps_do_not_wait(model_name: str, transform_name: str, device: str, guard: Any) -> None:
    """Of six steps the first factorizes, the second and fourth only apply, the third and fifth also observe."""
    torch.manual_seed(0)
    build, draw = MODELS[model_name]
    transform_type, options = TRANSFORMS[transform_name]
    model = build().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    transform = transform_type(stats_every=2, solve_every=100, solve_warmup=False, norm_layers=True, **options)
    handle = wellcond.attach(optimizer, model, GradientCentralization(), transform)
    batches = [tuple(x.to(device) for x in draw()) for _ in range(6)]

    def step(inputs: tuple[Tensor, ...]) -> None:
        optimizer.zero_grad()
        model(*inputs).sin().sum().backward()
        optimizer.step()

    step(batches[0])
    weights = [slot.layer.weight for slot in handle._covered(transform)]
    assert weights
    moments = [dict(optimizer.state[weight]) for weight in weights]
    for inputs in batches[1:]:
        with guard():
            step(inputs)
    for weight, first in zip(weights, moments, strict=True):
        state, prefix = optimizer.state[weight], f"wellcond_{transform.name}_"
        assert state[prefix + "step"] == 6
        assert state[prefix + "updated_at"] == 4, "the guarded steps must observe"
        assert state[prefix + "solved_at"] == 0, "the guarded steps must not factorize"
        assert first[prefix + "updated_at"] == 0
    assert handle.stats()[transform.name]["skipped_updates"] == 0


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("model", MODELS)
def test_no_ordinary_step_waits_for_the_device(model: str, transform: str) -> None:
    assert_ordinary_steps_do_not_wait(model, transform, "cpu", no_waiting)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("model", MODELS)
def test_no_ordinary_step_waits_for_the_gpu(model: str, transform: str) -> None:
    assert_ordinary_steps_do_not_wait(model, transform, "cuda", no_waiting_on_gpu)


def test_a_batch_that_is_not_finite_is_skipped_without_waiting() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    handle = wellcond.attach(optimizer, layer, FeatureWhitening(stats_every=1, solve_every=100, solve_warmup=False))
    F.mse_loss(layer(torch.randn(5, 4)), torch.zeros(5, 3)).backward()
    optimizer.step()
    bad = torch.randn(5, 4)
    bad[2, 1] = torch.nan
    with no_waiting():
        layer(bad).sum().backward()
        optimizer.step()
    assert handle.stats()["whitening"]["skipped_updates"] == 1
