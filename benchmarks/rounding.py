"""A depthwise network rounded to few bits: GPTQ with a second moment for each group, beside what knows less.

    python benchmarks/rounding.py --data FOLDER --image-size 16 --json docs/results/rounding-cifar10-jpeg.json

Every convolution and the classifier are rounded, layer by layer, to equal steps for each output unit. "mean Hessian"
gives all groups of a layer the mean of their second moments.
"""

from __future__ import annotations

import copy

import torch
from measured import Scores, note, options, report, title_of
from rounded_depthwise import network, round_weights, train
from torch import Tensor, nn

import wellcond
from wellcond.lab.data.load import LabelledImages, load_data

ROWS = {"to the nearest": "none", "GPTQ, mean Hessian": "mean", "GPTQ, a Hessian for each group": "groups"}


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that are told right, in evaluation."""
    right = [model.eval()(x).argmax(1) == y for x, y in zip(images.split(500), labels.split(500), strict=True)]
    return torch.cat(right).double().mean().item()


def main() -> None:
    """Measure."""
    parser = options(__doc__)
    parser.add_argument("--data", required=True, help="digits, or a folder of parquet files as wellcond compare takes")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--train-images", type=int, default=20000)
    parser.add_argument("--test-images", type=int, default=4000)
    parser.add_argument("--rounding-images", type=int, default=1024, help="of the training images")
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--bits", type=int, default=3)
    given = parser.parse_args()
    data = load_data(given.data, given.image_size, None if given.data == "digits" else given.test_images)

    def tensors(images: LabelledImages) -> tuple[Tensor, Tensor]:
        return images.images.float() / 127.5 - 1, torch.from_numpy(images.labels).long()

    pool, test = tensors(data.pool), tensors(data.test)
    scores: Scores = {}
    for seed in range(given.seeds):
        order = torch.randperm(len(pool[0]), generator=torch.Generator().manual_seed(seed))[: given.train_images]
        images, labels = pool[0][order], pool[1][order]
        torch.manual_seed(seed)
        model = network(images.shape[1], given.width)
        train(model, images, labels, given.steps, seed)
        note(scores, "not rounded", accuracy=accuracy(model, *test))
        some = images[: given.rounding_images]
        for row, moments in ROWS.items():
            own = copy.deepcopy(model)
            round_weights(own, some, given.bits, moments)
            note(scores, row, accuracy=accuracy(own, *test))
            wellcond.calibrate(own, some.split(64), batch_size=64, what="bn")
            note(scores, f"{row}, then calibrated", accuracy=accuracy(own, *test))
    about = f"{title_of(given.data, data)} at {images.shape[-1]} × {images.shape[-1]}, weights of {given.bits} bits"
    report(given, about, scores, True)


if __name__ == "__main__":
    main()
