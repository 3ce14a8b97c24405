"""Sums over patches equal those over the patches laid out one by one, for every window."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wellcond.numerics import patches
from wellcond.numerics.patches import PatchMargins, Window, patch_margins, patch_moment, patch_rows


def draw(seed: int) -> tuple[Tensor, Window]:
    rng = random.Random(seed)
    axes = rng.randint(1, 3)
    size = tuple(rng.randint(1, 4 if axes < 3 else 3) for _ in range(axes))
    stride = tuple(rng.randint(1, 3) for _ in range(axes))
    dilation = tuple(rng.randint(1, 3) for _ in range(axes))
    groups = rng.choice([1, 1, 2, 3])
    room = rng.choice([0, 2, 8 if axes == 3 else 18])
    space = tuple(d * (k - 1) + 1 + rng.randint(0, room) for k, d in zip(size, dilation, strict=True))
    shape = (rng.choice([1, 2, 5]), groups * rng.choice([1, 2, 3]), *space)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    layout = rng.randrange(4)
    if layout == 1:  # channels last
        inputs = inputs.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == 2:  # every other number of a larger tensor
        inputs = torch.stack([inputs, torch.full_like(inputs, torch.nan)], dim=-1)[..., 0]
    elif layout == 3:  # axes in reverse
        inputs = inputs.permute(*reversed(range(axes + 2))).contiguous().permute(*reversed(range(axes + 2)))
    return inputs, Window(size, stride, dilation, groups)


def looped_rows(inputs: Tensor, window: Window) -> Tensor:
    c = inputs.shape[1] // window.groups
    positions = window.positions(tuple(inputs.shape[2:]))
    groups = []
    for group in range(window.groups):
        rows = []
        for sample in inputs[:, group * c : (group + 1) * c]:
            for position in itertools.product(*map(range, positions)):
                row = []
                for channel in sample:
                    for tap in itertools.product(*map(range, window.size)):
                        axes = zip(window.stride, position, window.dilation, tap, strict=True)
                        at = (s * p + d * t for s, p, d, t in axes)
                        row.append(channel[tuple(at)])
                rows.append(torch.stack(row))
        groups.append(torch.stack(rows))
    return torch.stack(groups)


def moment_of(rows: Tensor) -> Tensor:
    return rows.mT @ rows


def margins_of(rows: Tensor, window: Window) -> PatchMargins:
    groups, count, width = rows.shape
    c = width // window.taps
    moment = moment_of(rows).view(groups, c, window.taps, c, window.taps)
    return PatchMargins(
        moment.diagonal(dim1=2, dim2=4).sum(dim=-1),
        moment.diagonal(dim1=1, dim2=3).sum(dim=-1),
        rows.sum(dim=1).view(groups, c, window.taps).sum(dim=2),
        count,
    )


def assert_same(actual: Tensor, expected: Tensor, relative: float = 1e-12) -> None:
    assert actual.dtype == expected.dtype
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * max(scale, 1e-300))


def assert_same_margins(actual: PatchMargins, expected: PatchMargins, relative: float = 1e-12) -> None:
    assert actual.positions == expected.positions
    # A sum may cancel: what it is off by is measured against the numbers summed.
    assert_same(actual.channels, expected.channels, relative)
    assert_same(actual.taps, expected.taps, relative)
    size = max(1.0, float(expected.taps.abs().max())) if expected.taps.numel() else 1.0
    torch.testing.assert_close(actual.sums, expected.sums, rtol=0, atol=relative * size)


@pytest.mark.parametrize("seed", range(25))
def test_rows_are_what_a_loop_reads(seed: int) -> None:
    inputs, window = draw(seed)
    inputs = inputs[:1, :, : window.dilation[0] * (window.size[0] - 1) + 1 + window.stride[0]]
    if inputs[0].numel() > 400:
        inputs = inputs[(slice(None), slice(None), *(slice(0, 8) for _ in window.size))]
        window = Window((1,) * len(window.size), window.stride, window.dilation, window.groups)
    assert torch.equal(patch_rows(inputs, window), looped_rows(inputs, window))


@pytest.mark.parametrize("seed", range(200))
def test_sums_equal_those_of_the_rows(seed: int) -> None:
    inputs, window = draw(seed)
    before = inputs.clone()
    rows = patch_rows(inputs, window)
    expected = moment_of(rows)
    assert_same(patch_moment(inputs, window), expected)
    assert_same(patches._moment_by_rows(inputs, window), expected)
    assert_same(patches._moment_by_autocorrelation(inputs, window), expected)
    if inputs.shape[1] == window.groups:
        assert_same(patches._tap_moment(inputs, window), expected)
    cropped = patches.crop(inputs, window)
    assert torch.equal(patch_rows(*cropped), rows)
    assert_same(patches._moment_by_autocorrelation(*cropped), expected)
    assert_same_margins(patch_margins(inputs, window), margins_of(rows, window))
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("seed", range(40))
def test_chunks_add_up(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, window = draw(seed)
    rows = patch_rows(inputs, window)
    monkeypatch.setattr(patches, "CHUNK", 2 * inputs[0].numel())
    assert len(patches.chunks(inputs, inputs[0].numel())) == -(-len(inputs) // 2)
    assert_same(patch_moment(inputs, window), moment_of(rows))
    assert_same(patches._moment_by_rows(inputs, window), moment_of(rows))
    assert_same(patches._moment_by_autocorrelation(inputs, window), moment_of(rows))
    assert_same_margins(patch_margins(inputs, window), margins_of(rows, window))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", [(1, 1), (3, 2)])
def test_an_empty_batch_sums_to_zero(groups: int, size: tuple[int, ...]) -> None:
    inputs = torch.randn(0, 4, 6, 6)
    window = Window(size, (2, 1), (1, 1), groups)
    width = 4 // groups * window.taps
    assert patch_rows(inputs, window).shape == (groups, 0, width)
    for moment in (patch_moment, patches._moment_by_rows, patches._moment_by_autocorrelation):
        assert torch.equal(moment(inputs, window), torch.zeros(groups, width, width))
    channels, taps, sums, positions = patch_margins(inputs, window)
    assert torch.equal(channels, torch.zeros(groups, 4 // groups, 4 // groups))
    assert torch.equal(taps, torch.zeros(groups, window.taps, window.taps))
    assert torch.equal(sums, torch.zeros(groups, 4 // groups))
    assert positions == 0


@pytest.mark.parametrize(
    ("channels", "space", "window"),
    [
        (64, (18, 18), Window((3, 3), (1, 1), (1, 1))),
        (64, (18, 18), Window((3, 3), (2, 2), (1, 1))),
        (64, (10, 10), Window((3, 3), (1, 1), (1, 1), 4)),
        (16, (40, 36), Window((5, 5), (1, 1), (2, 2))),
        (6, (40, 50), Window((7, 7), (2, 2), (1, 1))),
        (32, (16, 16), Window((1, 1), (2, 2), (1, 1))),
        (24, (30, 30), Window((3, 3), (1, 1), (1, 1), 24)),
        (8, (6, 12, 12), Window((3, 3, 3), (1, 1, 1), (1, 1, 1))),
        (96, (200,), Window((9,), (1,), (1,))),
    ],
)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_layers_of_usual_sizes(
    channels: int, space: tuple[int, ...], window: Window, dtype: torch.dtype, relative: float
) -> None:
    inputs = torch.randn(6, channels, *space, generator=torch.Generator().manual_seed(0), dtype=dtype)
    rows = patch_rows(inputs, window)
    assert_same(patch_moment(inputs, window), moment_of(rows), relative)
    assert_same(patches._moment_by_rows(inputs, window), moment_of(rows), relative)
    assert_same(patches._moment_by_autocorrelation(inputs, window), moment_of(rows), relative)
    assert_same_margins(patch_margins(inputs, window), margins_of(rows, window), relative)


def test_the_estimate_prefers_the_rows_where_channels_or_batches_are_few() -> None:
    def prefers_rows(*shape: int) -> bool:
        window = Window((3, 3), (1, 1), (1, 1))
        size = torch.Size(shape)
        return patches._rows_cost(size, window) < patches.autocorrelation_cost(size, window)

    assert not prefers_rows(32, 64, 34, 34)
    assert not prefers_rows(32, 256, 10, 10)
    assert prefers_rows(32, 3, 34, 34)
    assert prefers_rows(1, 512, 6, 6)


def test_the_sums_are_of_what_the_convolution_reads() -> None:
    conv = torch.nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=2, bias=False).double()
    inputs = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    window = Window((3, 2), (2, 1), (1, 2), 2)
    weight = conv.weight.detach().view(2, 3, -1)
    outputs = conv(inputs).detach().unflatten(1, (2, 3)).movedim(0, 2).flatten(2)  # (groups, out, N · positions)
    moment = patch_moment(F.pad(inputs, [1, 1, 1, 1]), window)
    assert_same(weight @ moment @ weight.mT, outputs @ outputs.mT)


def test_autocast_and_gradients_change_nothing() -> None:
    inputs = torch.randn(2, 8, 9, 9)
    window = Window((3, 3), (1, 1), (1, 1))
    moment, margins = patch_moment(inputs, window), patch_margins(inputs, window)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, other = patch_moment(inputs.requires_grad_(), window), patch_margins(inputs, window)
    assert not again.requires_grad
    assert not other.taps.requires_grad
    assert torch.equal(again, moment)
    assert torch.equal(other.channels, margins.channels)
    assert torch.equal(other.taps, margins.taps)


def test_what_does_not_fit_is_refused() -> None:
    window = Window((3, 3), (1, 1), (2, 2), 2)
    for inputs, message in [
        (torch.ones(1, 2, 4, 9), "does not fit"),
        (torch.ones(1, 2, 9), "2 axes"),
        (torch.ones(1, 3, 9, 9), "3 channels do not divide into 2 groups"),
    ]:
        for function in (patch_rows, patch_moment, patch_margins):
            with pytest.raises(ValueError, match=message):
                function(inputs, window)
    with pytest.raises(ValueError, match="one number per axis"):
        Window((3, 3), (1,), (1, 1))
    with pytest.raises(ValueError, match="at least 1"):
        Window((3,), (0,), (1,))
