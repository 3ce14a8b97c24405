"""Scores of a search's ranking: mean average precision and cumulative matching characteristics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_RANKS = (1, 5, 10)
# Rows of distances at a time: those of Market-1501's gallery take 8 MB.
_ROWS = 128


def search_scores(
    query: tuple[Tensor, Tensor, Tensor], gallery: tuple[Tensor, Tensor, Tensor], ranks: Sequence[int] = _RANKS
) -> dict[str, float]:
    """Return how well images are found by the distance of their features, in percent.

    Images of the same person by the same camera count neither as right nor as wrong. The average precision of a query
    is the mean, over the right images, of the share of right ones among those ranked up to there.

    Args:
        query: Features [n, d], identities [n] and cameras [n].
        gallery: The same of the images that are searched in. Distances are Euclidean between features of length 1.
        ranks: Up to which ranks a first right image counts.

    Returns:
        ``mAP``, and ``rank-k``: the share of queries with a right image among the first k. Queries without any right
        image are left out.

    Raises:
        ValueError: If no query has a right image.
    """
    features, identities, cameras = gallery
    directions = torch.nn.functional.normalize(features.float(), dim=1)
    precisions, firsts = [], []
    for some, own, camera in zip(*(part.split(_ROWS) for part in query), strict=True):
        # The nearest are those of the largest cosine.
        similarity = torch.nn.functional.normalize(some.float(), dim=1) @ directions.T
        same = own[:, None] == identities
        counted = ~(same & (camera[:, None] == cameras))
        order = similarity.masked_fill(~counted, -torch.inf).argsort(dim=1, descending=True, stable=True)
        right = (same & counted).gather(1, order)
        found = right.any(dim=1)
        right = right[found]
        hits = right.cumsum(dim=1)
        places = torch.arange(1, right.shape[1] + 1, device=right.device)
        share = hits.double() / places
        precisions.append((share * right).sum(dim=1) / hits[:, -1])
        firsts.append(right.byte().argmax(dim=1))
    precision, first = torch.cat(precisions), torch.cat(firsts)
    if not len(precision):
        raise ValueError("at least one query must have an image of the same person by another camera in the gallery")
    scores = {"mAP": 100.0 * float(precision.mean())}
    return scores | {f"rank-{rank}": 100.0 * float((first < rank).double().mean()) for rank in ranks}


def guessing_precision(query: tuple[Tensor, Tensor], gallery: tuple[Tensor, Tensor]) -> float:
    """Return the expected mAP of a random order of the gallery, in percent.

    With R right images among N the image at place k is right with probability R / N, and each of those before it, given
    that, with (R - 1) / (N - 1); the sum over k of the expected precision there, divided by R, is

        (H + (N - H) (R - 1) / (N - 1)) / N,  H = 1 + 1/2 + ... + 1/N.

    Args:
        query: Identities [n] and cameras [n].
        gallery: The same of the images that are searched in.
    """
    identities, cameras = gallery
    harmonic = torch.arange(1, len(identities) + 1, dtype=torch.float64).reciprocal().cumsum(0)
    total = counted = 0.0
    for own, camera in zip(*(part.split(_ROWS) for part in query), strict=True):
        same = own[:, None] == identities
        left_out = same & (camera[:, None] == cameras)
        right = (same & ~left_out).sum(dim=1)
        kept = len(identities) - left_out.sum(dim=1)
        kept, right = kept[right > 0].double(), right[right > 0].double()
        sums = harmonic[kept.long() - 1]
        # One image in all: it is right.
        share = torch.where(kept > 1, (right - 1) / (kept - 1).clamp(min=1), torch.zeros_like(kept))
        total += float(((sums + (kept - sums) * share) / kept).sum())
        counted += len(kept)
    return 100.0 * total / counted
