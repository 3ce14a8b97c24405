"""Momentum of batch statistics against the batch size: how much noise averaging leaves."""

from __future__ import annotations

import math

from wellcond.theory.checks import Formula, check_formula, check_integer, check_within, is_number


def noise_matching_momentum(batch_size: int, base_batch_size: int = 32, *, target: Formula = "thesis") -> float:
    """Return the momentum λ at which the mean of MBN is as noisy as that of BN with the base batch size.

    With the thesis's variance (1−λ)/m it is 1 − m/m₀ (2.11), with the derived one (1−λ)/((1+λ) m) it is
    (m₀−m)/(m₀+m), which is smaller: at 1 − m/m₀ the noise is that of the batch size 2m₀ − m. The thesis's is the
    default because its experiments used it.

    Args:
        batch_size: m, the actual batch size.
        base_batch_size: m₀, the batch size whose noise is wanted.
        target: ``"thesis"`` or ``"derived"``: which of the two variances is to become 1/m₀.

    Returns:
        λ, at least 0 and less than 1; 0 where m is at least m₀, as momentum cannot add noise.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> noise_matching_momentum(4, 16), noise_matching_momentum(4, 16, target="derived")
        (0.75, 0.6)
    """
    return 1 - _end_ratio(batch_size, base_batch_size, target)


def stat_momentum(
    epoch: float, total_epochs: int, batch_size: int, base_batch_size: int = 32, *, target: Formula = "thesis"
) -> float:
    """Return the momentum λ(t) of MBN's training statistics in an epoch (thesis 2.12).

    It rises from 0 in the first epoch, where the statistics still move and MBN is BN, to `noise_matching_momentum` in
    epoch T, and stays there:

        λ(t) = ρ^(T/(T−1) · max(T−t, 0)) − ρ^T,    ρ^T = min(m/m₀, 1),

    where the derived target has 2m/(m₀+m) in place of m/m₀. With T = 1 the end value holds from the first epoch on.

    Args:
        epoch: t, from 1; it may be fractional, and is taken as 1 where it is less.
        total_epochs: T, the number of epochs over which λ rises.
        batch_size: m, the actual batch size.
        base_batch_size: m₀, the batch size whose noise is wanted in the end; 32 in the thesis's experiments.
        target: ``"thesis"`` or ``"derived"``: see `noise_matching_momentum`.

    Returns:
        λ(t), at least 0 and less than 1; 0 for all t where m is at least m₀.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> [round(stat_momentum(epoch, 3, batch_size=8), 4) for epoch in (1, 2, 3, 4)]
        [0.0, 0.25, 0.75, 0.75]
        >>> stat_momentum(3, 3, batch_size=8, target="derived")
        0.6
    """
    check_within("epoch", epoch, -math.inf, math.inf)
    check_integer("total_epochs", total_epochs)
    ratio = _end_ratio(batch_size, base_batch_size, target)
    # (2.12), with ρ^T written as the ratio: then the two ends are exact.
    remaining = max(total_epochs - max(epoch, 1), 0) / (total_epochs - 1) if total_epochs > 1 else 0.0
    return math.pow(ratio, remaining) - ratio


def inference_decay(batch_size: int, base_batch_size: int = 32, base_inference_decay: float = 0.85) -> float:
    """Return the decay τ = τ₀^(m/m₀) of the running statistics that inference uses (thesis 2.13).

    The running average then forgets a sample at the same rate per sample, whatever the batch size. The decay is the
    weight of the old value: torch's ``momentum`` is 1 − τ. The defaults are those of the thesis's experiments; its text
    at 2.13 also names m₀ = 64 with τ₀ = 0.9.

    Args:
        batch_size: m, the actual batch size.
        base_batch_size: m₀, the batch size that the base decay belongs to.
        base_inference_decay: τ₀, at least 0 and less than 1.

    Returns:
        τ, at least 0 and less than 1; not more than τ₀ where m is more than m₀.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> inference_decay(32), round(inference_decay(2), 3)
        (0.85, 0.99)
    """
    check_integer("batch_size", batch_size)
    check_integer("base_batch_size", base_batch_size)
    if not (is_number(base_inference_decay) and 0 <= base_inference_decay < 1):
        raise ValueError(
            f"base_inference_decay must be a number of at least 0 and less than 1, got {base_inference_decay!r}"
        )
    return float(base_inference_decay ** (batch_size / base_batch_size))


def _end_ratio(batch_size: int, base_batch_size: int, target: str) -> float:
    """Return 1 − λ(T), which is the ρ^T of 2.12 for the thesis's target."""
    check_integer("batch_size", batch_size)
    check_integer("base_batch_size", base_batch_size)
    check_formula("target", target)
    if batch_size >= base_batch_size:
        return 1.0
    if target == "thesis":
        return batch_size / base_batch_size
    return 2 * batch_size / (base_batch_size + batch_size)
