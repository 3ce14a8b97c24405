"""A detector whose batch normalization comes frozen, fine-tuned with 1 or 2 images a batch: frozen, BSR or GN.

A small Faster R-CNN of torchvision's is trained on drawn scenes with batches of 8 and then frozen
(`torchvision.ops.FrozenBatchNorm2d`), as published detectors come. It is fine-tuned on a small set of other scenes, in
COCO's format: darker, noisier, with lower contrast.

- frozen: statistics of the scenes that it was trained on;
- frozen, calibrated: `wellcond.calibrate` takes them of the new scenes first; they stay frozen;
- BN: unfrozen, normalizes with each batch, evaluates with running statistics;
- BSR: unfrozen (`convert_norm`), evaluates each image with statistics that are predicted for it;
- GN: groups of 8 channels (`convert_norm`).

    python benchmarks/frozen_detector.py --json docs/results/frozen-detector.json
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from statistics_repair import spread
from timing import setting, write
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

import wellcond
from wellcond.lab.tasks.detection.coco import index_objects
from wellcond.lab.tasks.detection.scores import as_results, average_precision
from wellcond.nn import convert_norm

SIZE = 96
Scene = tuple[Tensor, dict[str, Tensor]]


def scene(number: int, new: bool) -> Scene:
    """Draw bright (class 1) and dark (class 2) boxes on noise; new ones in the dusk."""
    draw = torch.Generator().manual_seed(number)
    image = 0.5 + 0.1 * torch.randn(3, SIZE, SIZE, generator=draw)
    count = int(torch.randint(1, 4, (), generator=draw))
    corners = torch.randint(0, SIZE // 2, (count, 2), generator=draw)
    boxes = torch.cat([corners, corners + torch.randint(24, SIZE // 2, (count, 2), generator=draw)], dim=1)
    labels = torch.randint(1, 3, (count,), generator=draw)
    for (left, top, right, bottom), label in zip(boxes.tolist(), labels.tolist(), strict=True):
        image[:, top:bottom, left:right] = 1.0 if label == 1 else 0.0
    if new:
        light = 0.1 + 0.3 * torch.rand((), generator=draw)
        image = light * image + 0.05 * torch.randn(3, SIZE, SIZE, generator=draw)
    return image.clamp(0, 1), {"boxes": boxes.float(), "labels": labels}


def detector() -> FasterRCNN:
    """Return a small Faster R-CNN with batch normalization in its trunk."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    backbone = nn.Sequential(*layers)
    backbone.out_channels = 64  # type: ignore[assignment]  # As torchvision asks for.
    rpn = {"rpn_anchor_generator": AnchorGenerator(((24, 40),), ((0.5, 1.0, 2.0),)), "rpn_post_nms_top_n_train": 200}
    pool = MultiScaleRoIAlign(["0"], output_size=4, sampling_ratio=2)
    return FasterRCNN(backbone, 3, min_size=SIZE, max_size=SIZE, box_roi_pool=pool, rpn_post_nms_top_n_test=100, **rpn)


def train(model: nn.Module, scenes: list[Scene], batch: int, steps: int, lr: float, seed: int) -> None:
    """Train with SGD."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        chosen = [scenes[int(each)] for each in torch.randint(len(scenes), (batch,), generator=draw)]
        loss = sum(model(*map(list, zip(*chosen, strict=True))).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        schedule.step()


def frozen(model: nn.Module) -> nn.Module:
    """Freeze the normalizations, as torchvision does before it publishes a detector."""
    for position, layer in enumerate(model.backbone):  # type: ignore[arg-type]
        if isinstance(layer, nn.BatchNorm2d):
            other = FrozenBatchNorm2d(layer.num_features, layer.eps)
            state = {name: value for name, value in layer.state_dict().items() if name != "num_batches_tracked"}
            other.load_state_dict(state)
            model.backbone[position] = other  # type: ignore[index]
    return model


def unfrozen(to: str, **options: Any) -> Callable[[nn.Module, list[Scene]], object]:
    """Return what unfreezes a detector as another kind."""

    def change(model: nn.Module, scenes: list[Scene]) -> None:
        convert_norm(model, to, **options)
        model.backbone.requires_grad_(True)  # type: ignore[union-attr]

    return change


def calibrated(model: nn.Module, scenes: list[Scene]) -> None:
    """Take the statistics of the new scenes; they stay frozen."""
    wellcond.calibrate(model, [tuple(map(list, zip(*scenes, strict=True)))])


WAYS: dict[str, Callable[[nn.Module, list[Scene]], object]] = {
    "frozen": lambda model, scenes: None,
    "frozen, calibrated": calibrated,
    "BN": unfrozen("bn"),
    "BSR": unfrozen("bsr"),
    "GN": unfrozen("gn", num_groups=8),
}


def precision(model: nn.Module, scenes: list[Scene]) -> dict[str, float]:
    """Return COCO's average precision in percent."""
    from pycocotools.coco import COCO

    annotations = []
    for number, (_, target) in enumerate(scenes, 1):
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            left, top, right, bottom = box
            size = {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
            own = {"id": len(annotations) + 1, "image_id": number, "category_id": label, "iscrowd": 0}
            annotations.append(own | size)
    content = {
        "images": [{"id": number, "width": SIZE, "height": SIZE} for number in range(1, len(scenes) + 1)],
        "categories": [{"id": 1, "name": "bright"}, {"id": 2, "name": "dark"}],
        "annotations": annotations,
    }
    model.eval()
    results = []
    with torch.no_grad():
        for number, (image, _) in enumerate(scenes, 1):
            results += as_results(number, model([image])[0], [1, 2])
    truth = index_objects(COCO(), content)
    found = average_precision(truth, list(range(1, len(scenes) + 1)), results)
    return {name: found[name] for name in ("AP", "AP50")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretraining", type=int, default=150, help="steps with 8 scenes")
    parser.add_argument("--images", type=int, default=64, help="scenes to fine-tune on")
    parser.add_argument("--test-images", type=int, default=100)
    parser.add_argument("--seen", type=int, default=160, help="scenes that a fine-tuning goes over")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    old = [scene(number, new=False) for number in range(256)]
    new = [scene(1000 + number, new=True) for number in range(options.images)]
    test = [scene(9000 + number, new=True) for number in range(options.test_images)]
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        published = detector()
        train(published, old, 8, options.pretraining, 0.02, seed)
        published = frozen(published)
        for batch in (0, 1, 2):
            for way, change in WAYS.items():
                if batch == 0 and not way.startswith("frozen"):
                    continue
                model = copy.deepcopy(published)
                change(model, new)
                if batch:
                    train(model, new, batch, options.seen // batch, options.lr, seed)
                for figure, value in precision(model, test).items():
                    found.setdefault(str(batch), {}).setdefault(way, {}).setdefault(figure, []).append(value)
                print(f"seed {seed}, batch {batch}, {way}: AP {found[str(batch)][way]['AP'][-1]:.1f}", flush=True)
    names = {"0": "not fine-tuned", "1": "1 image a batch", "2": "2 images a batch"}
    rows = [
        [
            way,
            *(
                spread(found[batch][way][figure]) if way in found[batch] else "–"
                for batch in names
                for figure in ("AP", "AP50")
            ),
        ]
        for way in WAYS
    ]
    heads = ["normalization", *(f"{figure}, {name}" for name in names.values() for figure in ("AP", "AP50"))]
    best = {batch: max(own, key=lambda way: fmean(own[way]["AP"])) for batch, own in found.items()}
    about = (
        f"Drawn scenes of {SIZE}×{SIZE} in COCO's format: {options.images} to fine-tune on, {options.seen} seen, "
        f"{options.test_images} to test; {options.seeds} seeds, COCO's average precision in %, mean ± std. Highest "
        f"mean with 1 image: {best['1']}; with 2: {best['2']}."
    )
    figures = {"about": about, "tables": [{"title": "", "heads": heads, "rows": rows}], "results": found}
    write(options.json, setting(options, torch.device("cpu")) | figures)


if __name__ == "__main__":
    main()
