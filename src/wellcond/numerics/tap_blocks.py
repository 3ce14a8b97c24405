"""Second moments of patches in a basis of the kernel's taps: one matrix over channels for each basis vector.

The patches of a stationary image are uncorrelated between the frequencies of the kernel, but for its borders: of the
whole second moment Q[c, k, d, l] then only M_f[c, d] = Σ_kl U_fk U_fl Q[c, k, d, l] is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from wellcond.numerics.autocorrelation import CALL_COST, COPY_COST, autocorrelation_cost, pair_products
from wellcond.numerics.pieces import samples_in_pieces
from wellcond.numerics.taps import constant
from wellcond.numerics.windows import Window, check_window, crop, patch_rows
from wellcond.runtime.autocast import without_autocast


def cosine_basis(size: tuple[int, ...]) -> Tensor:
    """Return the orthonormal discrete cosine transform (DCT-II) of a kernel's taps.

    Args:
        size: Taps per axis.

    Returns:
        Shape [taps, taps], float64, on the CPU; rows are frequencies, the first of them constant, columns are taps in
        the order of a convolution's weight.

    Example:
        >>> cosine_basis((2,))
        tensor([[ 0.7071,  0.7071],
                [ 0.7071, -0.7071]], dtype=torch.float64)
    """
    basis = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for taps in size:
        places = torch.arange(taps, dtype=torch.float64, device="cpu")
        axis = torch.cos(math.pi / taps * places.unsqueeze(1) * (places + 0.5)) * math.sqrt(2 / taps)
        axis[0] = 1 / math.sqrt(taps)
        basis = torch.kron(basis, axis)
    return basis


@lru_cache(maxsize=64)
def _numbers(size: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, cosine_basis(size).tolist()))


def cosine_basis_like(size: tuple[int, ...], like: Tensor) -> Tensor:
    """Return `cosine_basis` in the dtype and on the device of ``like``, where it is put only once."""
    return constant(_numbers(size), like.dtype, like.device)


@torch.no_grad()
def patch_blocks(padded: Tensor, window: Window) -> Tensor:
    """Sum the products of two channels over patches, at each frequency of the taps.

    Of two ways to the same sum, the one with the lower estimate of work is taken: the products of shifted inputs, each
    serving all pairs of taps that lie equally far apart; or the patches, laid out in pieces and turned to frequencies.

    Args:
        padded: The padded input, shape (N, C, *space).
        window: The sliding window.

    Returns:
        Shape [groups, taps, c, c], c = C/groups, in the order of `cosine_basis`, in the input's dtype. A value that is
        not finite may reach any entry.

    Raises:
        ValueError: If the window does not fit the input.

    Example:
        >>> patch_blocks(torch.arange(4.0).reshape(1, 1, 4), Window((2,), (1,), (1,))).flatten()
        tensor([17.5000,  1.5000])
    """
    check_window(padded, window)
    padded, window = crop(padded, window)
    by_rows = _rows_cost(padded.shape, window) <= autocorrelation_cost(padded.shape, window)
    with without_autocast(padded.device):
        return blocks_by_rows(padded, window) if by_rows else blocks_by_autocorrelation(padded, window)


def blocks_by_autocorrelation(padded: Tensor, window: Window) -> Tensor:
    """Sum as `patch_blocks` does, of a cropped input, without laying out patches."""
    groups, c = window.groups, padded.shape[1] // window.groups
    basis = cosine_basis_like(window.size, padded)
    total = padded.new_zeros(window.taps, groups * c * c)
    for first, second, sums in pair_products(padded, window):
        left, right = (basis[:, constant(taps, torch.int64, padded.device)] for taps in (first, second))
        weights = left * right
        if first == second:
            total.addmm_(weights, sums.flatten(1))
        else:  # and the same pairs in reverse order
            total.addmm_(weights, (sums + sums.mT).flatten(1))
    return total.view(window.taps, groups, c, c).transpose(0, 1).contiguous()


def blocks_by_rows(padded: Tensor, window: Window) -> Tensor:
    """Sum as `patch_blocks` does, from patches laid out in pieces."""
    groups, c = window.groups, padded.shape[1] // window.groups
    total = padded.new_zeros(groups * window.taps, c, c)
    for rows in frequency_rows(padded, window):
        total.baddbmm_(rows.mT, rows)
    return total.view(groups, window.taps, c, c)


def frequency_rows(padded: Tensor, window: Window) -> Iterator[Tensor]:
    """Lay out patches in pieces, turned to the frequencies of their taps.

    Args:
        padded: The padded input, shape (N, C, *space).
        window: The sliding window.

    Returns:
        An iterator over pieces [groups · taps, n, c], at least one.
    """
    per_sample = 2 * padded.shape[1] * window.taps * math.prod(window.positions(tuple(padded.shape[2:])))

    def turned(chunk: Tensor) -> Tensor:
        patches = torch.unflatten(patch_rows(chunk, window), 2, (-1, window.taps))
        rows = patches @ cosine_basis_like(window.size, chunk).mT
        return torch.flatten(rows.permute(0, 3, 1, 2), 0, 1)

    return map(turned, samples_in_pieces(padded, per_sample) or (padded,))


def _rows_cost(shape: torch.Size, window: Window) -> float:
    """Estimate the work of `blocks_by_rows`, in multiplications."""
    rows = shape[0] * math.prod(window.positions(tuple(shape[2:])))
    return rows * shape[1] * window.taps * (shape[1] // window.groups + window.taps + 3 * COPY_COST) + CALL_COST
