"""mAP and CMC against a search counted one image at a time, and against torchmetrics."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torchmetrics.retrieval import RetrievalMAP

from wellcond.lab.tasks.reid.scores import guessing_precision, search_scores


def by_definition(query, gallery, ranks=(1, 5, 10)):
    """Return mAP and CMC in float64, written from the definition, a query and a gallery image at a time."""
    precisions, firsts = [], []
    for feature, identity, camera in zip(*query, strict=True):
        ranked = []
        for other, who, where in zip(*gallery, strict=True):
            if who == identity and where == camera:
                continue
            ranked.append(
                (math.dist(feature / np.linalg.norm(feature), other / np.linalg.norm(other)), who == identity)
            )
        ranked.sort(key=lambda pair: pair[0])
        right, sums = 0, []
        for place, (_, matches) in enumerate(ranked, start=1):
            if matches:
                right += 1
                sums.append(right / place)
        if right:
            precisions.append(sum(sums) / right)
            firsts.append(next(place for place, (_, matches) in enumerate(ranked, start=1) if matches))
    scores = {"mAP": 100 * float(np.mean(precisions))}
    return scores | {f"rank-{rank}": 100 * float(np.mean([first <= rank for first in firsts])) for rank in ranks}


def on_a_line(places, identities, cameras):
    """Return images at these angles: their distances from the first axis grow with the angle."""
    angles = torch.tensor(places, dtype=torch.float64)
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    return features, torch.tensor(identities), torch.tensor(cameras)


def test_a_ranking_by_hand():
    query = on_a_line([0.0], [1], [1])
    # Nearest first: the same camera's (not counted), another person, a right one, a distractor, a right one.
    gallery = on_a_line([0.1, 0.2, 0.3, 0.4, 0.5], [1, 2, 1, 0, 1], [1, 2, 2, 3, 3])
    scores = search_scores(query, gallery, ranks=(1, 2))
    assert scores["mAP"] == pytest.approx(100 * (1 / 2 + 2 / 4) / 2)
    assert scores["rank-1"] == 0.0
    assert scores["rank-2"] == 100.0


def test_another_person_by_the_same_camera_counts_as_wrong():
    scores = search_scores(on_a_line([0.0], [1], [1]), on_a_line([0.1, 0.2], [2, 1], [1, 2]), ranks=(1,))
    assert scores == {"mAP": pytest.approx(50.0), "rank-1": 0.0}


def test_queries_without_a_match_are_left_out():
    query = on_a_line([0.0, 0.0], [1, 3], [1, 1])
    scores = search_scores(query, on_a_line([0.1, 0.2], [1, 3], [2, 1]), ranks=(1,))
    assert scores == {"mAP": pytest.approx(100.0), "rank-1": 100.0}
    with pytest.raises(ValueError, match="at least one query"):
        search_scores(on_a_line([0.0], [3], [1]), on_a_line([0.1], [3], [1]))


def test_the_length_of_features_does_not_matter():
    query, gallery = on_a_line([0.0], [1], [1]), on_a_line([0.1, 0.2], [1, 2], [2, 2])
    longer = (gallery[0] * torch.tensor([[100.0], [1.0]]), *gallery[1:])
    assert search_scores(query, longer)["mAP"] == search_scores(query, gallery)["mAP"] == 100.0


@pytest.fixture
def random_search():
    generator = torch.Generator().manual_seed(0)

    def images(count):
        features = torch.randn(count, 6, generator=generator)
        identities = torch.randint(0, 12, (count,), generator=generator)
        return features + identities[:, None] / 6, identities, torch.randint(1, 4, (count,), generator=generator)

    query = images(140)  # more than are ranked at a time
    return tuple(part[query[1] > 0] for part in query), images(90)


def test_random_rankings_agree_with_the_definition(random_search):
    query, gallery = random_search
    expected = by_definition(
        *([features.double().numpy(), *map(np.asarray, rest)] for features, *rest in random_search)
    )
    assert search_scores(query, gallery) == pytest.approx(expected, abs=1e-9)


def test_map_is_torchmetrics_map_of_the_images_that_count(random_search):
    query, gallery = random_search
    directions = torch.nn.functional.normalize(gallery[0], dim=1)
    metric = RetrievalMAP(empty_target_action="skip")
    for number, (feature, identity, camera) in enumerate(zip(*query, strict=True)):
        counted = (gallery[1] != identity) | (gallery[2] != camera)
        # Of numbers that are not positive torchmetrics takes the image as not found at all.
        similarity = 2 + directions[counted] @ torch.nn.functional.normalize(feature, dim=0)
        metric.update(similarity, gallery[1][counted] == identity, torch.full((int(counted.sum()),), number))
    assert search_scores(query, gallery)["mAP"] == pytest.approx(100 * float(metric.compute()), rel=1e-5)


@pytest.mark.parametrize(("right", "wrong", "left_out"), [(1, 0, 0), (1, 4, 1), (2, 3, 0), (3, 3, 2), (2, 0, 1)])
def test_guessing_is_the_mean_over_all_orders(right, wrong, left_out):
    precisions = []
    for order in set(itertools.permutations([True] * right + [False] * wrong)):
        hits = np.cumsum(order)
        precisions.append(np.mean([hits[place] / (place + 1) for place, match in enumerate(order) if match]))
    identities = torch.tensor([1] * right + [2] * wrong + [1] * left_out)
    cameras = torch.tensor([2] * right + [1] * wrong + [1] * left_out)
    guessed = guessing_precision((torch.tensor([1]), torch.tensor([1])), (identities, cameras))
    assert guessed == pytest.approx(100 * np.mean(precisions))
