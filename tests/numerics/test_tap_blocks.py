"""Second moments by tap frequency against sums over patches laid out one by one."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from wellcond.numerics import tap_blocks
from wellcond.numerics.tap_blocks import cosine_basis, patch_blocks
from wellcond.numerics.windows import Window, crop, patch_rows


def draw(seed: int) -> tuple[Tensor, Window]:
    rng = random.Random(seed)
    axes = rng.randint(1, 3)
    size = tuple(rng.randint(1, 4 if axes < 3 else 3) for _ in range(axes))
    stride, dilation = (tuple(rng.randint(1, 3) for _ in range(axes)) for _ in range(2))
    groups = rng.choice([1, 2, 3])
    space = tuple(d * (k - 1) + 1 + rng.randint(0, 6) for k, d in zip(size, dilation, strict=True))
    generator = torch.Generator().manual_seed(seed)
    shape = (rng.choice([1, 2, 5]), groups * rng.choice([1, 2, 3]), *space)
    return torch.randn(shape, generator=generator, dtype=torch.float64), Window(size, stride, dilation, groups)


@pytest.mark.parametrize("seed", range(40))
def test_both_ways_are_the_explicit_sum(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """M_f[c, d] = Σ_kl U_fk U_fl Q[c, k, d, l], one frequency, tap and tap at a time."""
    inputs, window = draw(seed)
    rows = patch_rows(inputs, window).unflatten(2, (-1, window.taps))
    q = torch.einsum("gnck,gndl->gckdl", rows, rows)
    basis = cosine_basis(window.size)
    expected = torch.zeros(window.groups, window.taps, q.shape[1], q.shape[1], dtype=torch.float64)
    for f in range(window.taps):
        for k in range(window.taps):
            for other in range(window.taps):
                expected[:, f] += basis[f, k] * basis[f, other] * q[:, :, k, :, other]
    scale = float(expected.abs().max())
    cropped = crop(inputs, window)
    monkeypatch.setattr("wellcond.numerics.pieces.CHUNK", 4 * inputs[0].numel() * window.taps)
    found = [patch_blocks(inputs, window), tap_blocks.blocks_by_rows(inputs, window)]
    found += [tap_blocks.blocks_by_rows(*cropped), tap_blocks.blocks_by_autocorrelation(*cropped)]
    for blocks in found:
        torch.testing.assert_close(blocks, expected, rtol=1e-10, atol=1e-10 * scale)


@pytest.mark.parametrize("size", [(1,), (2,), (5,), (3, 3), (2, 3), (3, 1), (2, 2, 3)])
def test_the_basis_is_orthonormal_and_begins_with_the_mean(size: tuple[int, ...]) -> None:
    basis = cosine_basis(size)
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(basis[0], torch.full_like(basis[0], len(basis) ** -0.5))


def test_a_window_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        patch_blocks(torch.zeros(1, 2, 3), Window((4,), (1,), (1,)))
