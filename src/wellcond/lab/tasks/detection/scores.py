"""Average precision as COCO measures it, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from wellcond.lab.tasks.detection.coco import index_objects

if TYPE_CHECKING:
    from pycocotools.coco import COCO

# Places of pycocotools' figures in its summary.
_FIGURES = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5}


def as_results(image_id: int, prediction: dict[str, Tensor], categories: Sequence[int]) -> list[dict[str, Any]]:
    """Return what a detector found in an image in COCO's form of results.

    Args:
        image_id: The image's number.
        prediction: ``boxes`` [n, 4] (left, top, right, bottom), ``scores`` [n], ``labels`` [n] from 1 on, and, of Mask
            R-CNN, ``masks`` [n, 1, height, width]: the probability of each pixel.
        categories: The category's number of each label.

    Returns:
        One dictionary an object; masks are run-length encoded where the probability is above a half.
    """
    boxes = prediction["boxes"].double().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    scores, labels = prediction["scores"].tolist(), prediction["labels"].tolist()
    results: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": categories[label - 1], "bbox": box, "score": score}
        for box, score, label in zip(boxes.tolist(), scores, labels, strict=True)
    ]
    if "masks" in prediction:
        from pycocotools import mask

        for result, drawn in zip(results, (prediction["masks"][:, 0] > 0.5).cpu().numpy(), strict=True):
            result["segmentation"] = mask.encode(np.asfortranarray(drawn.astype(np.uint8)))
    return results


def average_precision(
    truth: COCO, image_ids: Sequence[int], results: Sequence[dict[str, Any]], masks: bool = False
) -> dict[str, float]:
    """Return average precision over IoU thresholds from 0.5 to 0.95, at 0.5, at 0.75, and by size, in percent.

    Args:
        truth: The objects.
        image_ids: Which images count.
        results: What was found, as `as_results` gives it; of one image best first or not.
        masks: Whether masks are measured, too.

    Returns:
        ``AP``, ``AP50``, ``AP75``, ``APs``, ``APm`` and ``APl``, those of masks as ``mask AP`` and so on. A size of
        which the images have no object is left out.
    """
    scores: dict[str, float] = {}
    for kind, prefix in (("bbox", ""), ("segm", "mask "))[: 1 + masks]:
        # Each kind its own: the area of a result is its box's or its mask's.
        found = _index_results(truth, results, kind)
        with contextlib.redirect_stdout(io.StringIO()):
            figures = _evaluate(truth, found, sorted(image_ids), kind)
        scores |= {prefix + name: 100.0 * figures[place] for name, place in _FIGURES.items() if figures[place] >= 0}
    return scores


def _evaluate(truth: COCO, found: COCO, image_ids: list[int], kind: str) -> list[float]:
    from pycocotools.cocoeval import COCOeval

    evaluation = COCOeval(truth, found, kind)
    evaluation.params.imgIds = image_ids
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [float(figure) for figure in evaluation.stats]


def _index_results(truth: COCO, results: Sequence[dict[str, Any]], kind: str) -> COCO:
    from pycocotools import mask
    from pycocotools.coco import COCO

    # Its own `loadRes` fails where nothing was found.
    annotations = []
    for number, result in enumerate(results, start=1):
        width, height = result["bbox"][2:]
        area = float(mask.area(result["segmentation"])) if kind == "segm" else width * height
        annotations.append(result | {"id": number, "area": area, "iscrowd": 0})
    content = {
        "images": truth.dataset["images"],
        "categories": truth.dataset["categories"],
        "annotations": annotations,
    }
    return index_objects(COCO(), content)
