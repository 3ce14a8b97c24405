"""Networks on corrupted images, 1, 4 or 16 at a time: ways to evaluate, side by side.

The networks of `stale_networks.py`, which were trained on clean images, meet six corruptions. Beside what they are:

- EMA: the running statistics move on with the batches (`repair.adapting(model, 0.05, remember=True)`);
- AlphaBN: each batch's own statistics have a share of 0.1 (`repair.adapting(model, 0.1)`);
- batch: its statistics alone (`repair.adapting(model, 1.0)`), as in training;
- EvalNorm and BSR, calibrated on clean training images for batches of 16; they see one image at a time whatever the
  batch.

Nothing is tuned on the test images: shares and sizes were chosen beforehand, and are the same everywhere.

    python benchmarks/test_time.py --data cifar10-jpeg/ --work runs/ --json docs/results/test-time.json
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from stale_networks import Images, arguments, kept_rows
from statistics_repair import batches, network, spread
from timing import setting, write
from torch import Tensor, nn

import wellcond
from wellcond.repair import adapting

SIZES = (1, 4, 16)
EMA, ALPHA, GROUP, SEEN = 0.05, 0.1, 16, 2048


def noise(images: Tensor) -> Tensor:
    return images + 20 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def blur(images: Tensor) -> Tensor:
    line = torch.exp(-torch.arange(-2.0, 3.0).square() / 2)
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    return F.conv2d(padded, kernel.expand(images.shape[1], 1, 5, 5), groups=images.shape[1])


def contrast(images: Tensor) -> Tensor:
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + 0.4 * (images - mean)


def brightness(images: Tensor) -> Tensor:
    return images + 70


def jpeg(images: Tensor) -> Tensor:
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    def again(image: Tensor) -> Tensor:
        from PIL import Image

        file = io.BytesIO()
        to_pil_image(image.byte()).save(file, "JPEG", quality=10)
        return pil_to_tensor(Image.open(file)).float()

    return torch.stack([again(image) for image in images])


def pixelate(images: Tensor) -> Tensor:
    return F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="nearest")


CORRUPTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda images: images,
    **{function.__name__: function for function in (noise, blur, contrast, brightness, jpeg, pixelate)},
}
ADAPTING: dict[str, dict[str, Any]] = {
    "EMA": {"weight": EMA, "remember": True},
    "AlphaBN": {"weight": ALPHA},
    "batch": {"weight": 1.0},
}


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, size: int) -> float:
    """Return the accuracy in percent, so many images at a time."""
    with torch.no_grad():
        found = [model(some).argmax(1) for some in images.split(size)]
    return 100.0 * float((torch.cat(found) == labels).float().mean())


def measured(options: Any, name: str, seed: int, images: Images) -> dict[str, Any]:
    """Return the accuracy by corruption, way and size."""
    model, _ = network(options, name, seed, images)
    clean = batches(images, min(SEEN, len(images.train)))
    whats = {"EvalNorm": "evalnorm", "BSR": "bsr"}
    single = {way: wellcond.calibrate(copy.deepcopy(model), clean, GROUP, what).eval() for way, what in whats.items()}
    # In an order of their own, so that a batch is of several classes.
    order = torch.randperm(len(images.test), generator=torch.Generator().manual_seed(seed))[: options.corrupted]
    labels = images.test_labels[order]
    found: dict[str, Any] = {}
    for corruption, corrupt in CORRUPTIONS.items():
        inputs = images.normalized(corrupt(images.test[order].float()).clamp(0, 255).round())
        row = {"as it is": {"any": accuracy(model, inputs, labels, 500)}}
        for way, options_of in ADAPTING.items():
            row[way] = {}
            for size in SIZES:
                with adapting(model, **options_of) if options_of else contextlib.nullcontext():
                    row[way][str(size)] = accuracy(model, inputs, labels, size)
        for way, other in single.items():
            row[way] = {"any": accuracy(other, inputs, labels, 500)}
        found[corruption] = row
    return found


def table(name: str, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one network's table."""
    first = next(iter(seeds[0].values()))
    ways = [(way, size) for way, own in first.items() for size in own]
    heads = ["corruption", *(way if size == "any" else f"{way}, {size}" for way, size in ways)]
    rows = [
        [corruption, *(spread([seed[corruption][way][size] for seed in seeds]) for way, size in ways)]
        for corruption in seeds[0]
    ]
    return {"title": name, "heads": heads, "rows": rows}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--corrupted", type=int, default=500, help="test images of each corruption")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for name, seed, row in kept_rows(options, "corrupted", measured):
        found.setdefault(name, []).append(row)
        print(f"{name}, seed {seed}: {row['noise']}", flush=True)
    about = (
        f"{Path(options.data).name}: networks of {options.train_images} training images of {options.image_size}×"
        f"{options.image_size}, {options.corrupted} test images, {len(options.seeds)} seeds. Test accuracy in %, mean "
        "± std; the number is of images that are evaluated together."
    )
    figures = {"about": about, "tables": [table(name, rows) for name, rows in found.items()], "results": found}
    write(options.json, setting(options, torch.device("cpu")) | figures)


if __name__ == "__main__":
    main()
