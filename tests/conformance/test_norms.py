"""What every normalization layer must do, whatever it computes: follow its formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_formulas import splitting
from norm_kinds import (
    FLOAT64,
    KINDS,
    POSITIONS,
    Kind,
    check_evaluation,
    check_training,
    close,
    draw,
    evaluated,
    reference,
    trained,
    wide,
    with_dimensions,
    with_pairs,
)


@with_dimensions
def test_training_follows_the_formula(kind: Kind, dims: int) -> None:
    layer = kind.make(dims)
    for step in range(4):
        check_training(kind, layer, draw(dims, step))
    assert int(layer.num_batches_tracked) == 4


@with_dimensions
def test_evaluation_follows_the_formula(kind: Kind, dims: int) -> None:
    check_evaluation(kind, trained(kind, dims), draw(dims))


@with_dimensions(only=(1,))
def test_two_dimensional_input(kind: Kind, dims: int) -> None:
    layer = kind.make(dims)
    for step in range(3):
        check_training(kind, layer, draw(1, step, samples=6)[..., 0])
    check_evaluation(kind, layer, draw(1, 9)[..., 0])


@with_dimensions
def test_one_position(kind: Kind, dims: int) -> None:
    layer = kind.make(dims)
    if kind.whole is splitting:
        for training in (True, False):
            with pytest.raises(ValueError, match="expected more than 1 position"):
                layer.train(training)(draw(dims, samples=6)[:, :, :1, :1])
        return
    for step in range(3):
        check_training(kind, layer, draw(dims, step, samples=6).flatten(2)[..., :1].unflatten(2, (1,) * dims))
    check_evaluation(kind, layer, draw(dims, 9).flatten(2)[..., :1].unflatten(2, (1,) * dims))


@with_dimensions
def test_one_instance(kind: Kind, dims: int) -> None:
    layer = kind.make(dims)
    for step in range(3):
        check_training(kind, layer, draw(dims, step, samples=1))
    check_evaluation(kind, layer, draw(dims, 9, samples=1))


@with_pairs(("value", [0.0, 0.1, -3.7]))
def test_constant_input(kind: Kind, dims: int, value: float) -> None:
    """No variance at all: what is left of x − μ is rounding, which 1/√ε magnifies."""
    layer = kind.make(dims, dtype=torch.float32)
    for _ in range(4):
        check_training(kind, layer, torch.full((4, 3, *POSITIONS[dims]), value), 2e-3)
    check_evaluation(kind, layer, torch.full((4, 3, *POSITIONS[dims]), value), 2e-3)
    assert all(buffer.isfinite().all() for buffer in layer.buffers())


@with_dimensions
def test_dead_channel(kind: Kind, dims: int) -> None:
    layer = kind.make(dims)
    for step in range(4):
        x = draw(dims, step)
        x[:, 1] = 0
        check_training(kind, layer, x)
    check_evaluation(kind, layer, x)
    check_evaluation(kind, layer, draw(dims, 9))  # the channel comes alive
    assert all(buffer.isfinite().all() for buffer in layer.buffers())


@with_pairs(("dtype", [torch.float32, FLOAT64]))
def test_mean_far_from_zero(kind: Kind, dims: int, dtype: torch.dtype) -> None:
    """E[x²] − μ² would keep no digit in float32: the squares are 10⁸ times the variance."""
    layer = kind.make(dims, dtype=dtype)
    tolerance = 1e-10 if dtype == FLOAT64 else 1e-2  # the mean's own rounding is 5e-4 of the deviation
    offset = torch.tensor([1e4, -1e4, 0.0], dtype=FLOAT64).view(1, 3, *(1 for _ in POSITIONS[dims]))
    for step in range(4):
        x = (draw(dims, step) + offset).to(dtype)
        expected, _ = reference(kind, layer, x)
        close(layer(x).double(), expected, tolerance)
    state = wide(dict(layer.named_buffers()))
    if kind.family not in (
        "MomentumBatchNorm",
        "MovingAverageBatchNorm",
        "PopulationNorm",
    ):  # whose running_var has much of 1 or of the mean left, or is no variance
        assert (state["running_var"] < 10).all()
    layer.eval()
    close(layer(x).double(), evaluated(kind, layer, x), tolerance)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_format_and_group(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(KINDS.values())), "kind")
    dims = data.draw(st.sampled_from(kind.dims), "dims")
    if kind.group_size:
        kind = Kind(**{**vars(kind), "options": {**kind.options, "group_size": data.draw(st.integers(2, 5), "group")}})
    channels = data.draw(st.integers(1 + (kind.whole is splitting), 4), "channels")  # Some must be of each part.
    layer = kind.make(dims, channels, affine=data.draw(st.booleans(), "affine"))
    for _ in range(2):
        # One position alone leaves nothing but the bias of what is normalized by instance, and is refused.
        least = [1] * (dims - 1) + [2 if kind.whole is splitting else 1]
        sizes = [data.draw(st.integers(size, 3)) for size in least]
        x = torch.randn(data.draw(st.integers(2, 8), "samples"), channels, *sizes, dtype=FLOAT64)
        memory = data.draw(
            st.sampled_from(["contiguous", "channels last", "transposed", "sliced", "flipped"]), "memory"
        )
        if memory == "channels last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        elif memory == "transposed":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        elif memory == "sliced":
            x = torch.cat([x, x], -1)[..., ::2]
        elif memory == "flipped":
            x = x.flip(0)
        check_training(kind, layer, 3 * x - 1, 1e-8)
    check_evaluation(kind, layer, 3 * x - 1, 1e-8)
