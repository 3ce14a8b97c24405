"""COCO's average precision on cases that can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from coco_files import CATEGORIES, rectangle
from pycocotools.coco import COCO

from wellcond.lab.tasks.detection.coco import index_objects
from wellcond.lab.tasks.detection.scores import as_results, average_precision

PERFECT = [(1, 3, [10.0, 10.0, 20.0, 20.0]), (2, 3, [30.0, 8.0, 20.0, 20.0])]


def truth(*things):
    """Two images of 100x80 with the things, (image, category, box)."""
    content = {
        "images": [{"id": number, "width": 100, "height": 80, "file_name": f"{number}.jpg"} for number in (1, 2)],
        "categories": CATEGORIES,
        "annotations": [rectangle(number, *thing) for number, thing in enumerate(things, start=1)],
    }
    return index_objects(COCO(), content)


def found(*things, masks=False):
    """Results as a detector gives them, the first the surest."""
    results = []
    for place, (image, category, (left, top, width, height)) in enumerate(things):
        prediction = {
            "boxes": torch.tensor([[left, top, left + width, top + height]]),
            "scores": torch.tensor([0.9 - 0.1 * place]),
            "labels": torch.tensor([[3, 7].index(category) + 1]),
        }
        if masks:
            drawn = torch.zeros(1, 1, 80, 100)
            drawn[..., int(top) : int(top + height), int(left) : int(left + width)] = 0.9
            prediction["masks"] = drawn
        results += as_results(image, prediction, (3, 7))
    return results


def test_perfect_boxes_and_masks_have_100():
    scores = average_precision(truth(*PERFECT), [1, 2], found(*PERFECT, masks=True), masks=True)
    # 400 pixels: both objects are small, so no others are counted.
    assert scores == pytest.approx(
        dict.fromkeys(("AP", "AP50", "AP75", "APs", "mask AP", "mask AP50", "mask AP75", "mask APs"), 100.0)
    )


def test_one_of_two_found_has_precision_1_up_to_recall_one_half():
    scores = average_precision(truth(*PERFECT), [1, 2], found(PERFECT[0]))
    # COCO averages precision over the 101 recalls 0, 0.01, ..., 1; 51 of them are at most 0.5.
    assert scores["AP"] == pytest.approx(100 * 51 / 101)


def test_a_wrong_box_that_is_surer_costs_precision():
    wrong = (1, 3, [60.0, 50.0, 20.0, 20.0])
    scores = average_precision(truth(*PERFECT), [1, 2], found(wrong, *PERFECT))
    # Precisions 0/1, 1/2, 2/3; interpolated from the right: 2/3 at every recall.
    assert scores["AP"] == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize(("shift", "overlap"), [(5.0, 0.6), (2.0, 18 / 22)])
def test_shifted_boxes_count_up_to_their_iou(shift, overlap):
    shifted = [(image, category, [left + shift, *rest]) for image, category, (left, *rest) in PERFECT]
    scores = average_precision(truth(*PERFECT), [1, 2], found(*shifted))
    passed = sum(0.5 + 0.05 * step <= overlap + 1e-9 for step in range(10))
    assert scores["AP50"] == pytest.approx(100.0)
    assert scores["AP75"] == pytest.approx(100.0 if overlap > 0.75 else 0.0)
    assert scores["AP"] == pytest.approx(10.0 * passed)


def test_another_class_is_not_found():
    scores = average_precision(truth(*PERFECT), [1, 2], found((1, 7, PERFECT[0][2]), (2, 7, PERFECT[1][2])))
    assert scores["AP"] == 0.0


def test_nothing_found_has_0():
    assert average_precision(truth(*PERFECT), [1, 2], []) == {"AP": 0.0, "AP50": 0.0, "AP75": 0.0, "APs": 0.0}


def test_sizes_are_measured_apart():
    large = (1, 7, [0.0, 0.0, 99.0, 79.0])  # medium: between 32² and 96² pixels
    scores = average_precision(truth(PERFECT[0], large), [1, 2], found(PERFECT[0]))
    assert scores["APs"] == pytest.approx(100.0)
    assert scores["APm"] == 0.0
    assert "APl" not in scores
    assert scores["AP"] == pytest.approx(50.0)  # the mean of the two classes


def test_other_images_do_not_count():
    scores = average_precision(truth(*PERFECT), [1], found(PERFECT[0], (2, 3, [0.0, 0.0, 5.0, 5.0])))
    assert scores["AP"] == pytest.approx(100.0)


def test_the_order_of_results_does_not_matter():
    results = found((1, 3, [60.0, 50.0, 20.0, 20.0]), *PERFECT)
    assert average_precision(truth(*PERFECT), [1, 2], results[::-1]) == average_precision(
        truth(*PERFECT), [1, 2], results
    )
