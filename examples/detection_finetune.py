"""torchvision's Faster R-CNN with two images a batch: normalization comes frozen and leaves as BSR; W-SGDM with GC."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, box_iou

import wellcond

SIZE = 96  # pixels


def scene(number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw bright (class 1) and dark (class 2) boxes on noise."""
    draw = torch.Generator().manual_seed(number)
    image = 0.5 + 0.1 * torch.randn(3, SIZE, SIZE, generator=draw)
    count = int(torch.randint(1, 4, (), generator=draw))
    corners = torch.randint(0, SIZE // 2, (count, 2), generator=draw)
    boxes = torch.cat([corners, corners + torch.randint(24, SIZE // 2, (count, 2), generator=draw)], dim=1)
    labels = torch.randint(1, 3, (count,), generator=draw)
    for (left, top, right, bottom), label in zip(boxes.tolist(), labels.tolist(), strict=True):
        image[:, top:bottom, left:right] = 2.0 - label
    return image, {"boxes": boxes.float(), "labels": labels}


def detector() -> FasterRCNN:
    """Make a small Faster R-CNN, frozen as fasterrcnn_resnet50_fpn(weights="DEFAULT") comes (all of it trainable)."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        layers += [convolution, FrozenBatchNorm2d(outputs), nn.ReLU()]
    backbone = nn.Sequential(*layers)
    backbone.out_channels = 64  # As torchvision asks for.
    rpn = {"rpn_anchor_generator": AnchorGenerator(((24, 40),), ((0.5, 1.0, 2.0),)), "rpn_post_nms_top_n_train": 200}
    pool = MultiScaleRoIAlign(["0"], output_size=4, sampling_ratio=2)
    return FasterRCNN(backbone, 3, min_size=SIZE, max_size=SIZE, box_roi_pool=pool, **rpn)


def main(steps: int = 60, checkpoint: Path | None = None) -> list[float]:
    """Train until so many steps are done; from the checkpoint on, if there is one."""
    torch.manual_seed(0)
    model = detector()
    # The lines that wellcond adds. Statistics of these images; then BSR, with γ and β to train, in place of freezing.
    wellcond.calibrate(model, [tuple(zip(scene(2 * step), scene(2 * step + 1), strict=True)) for step in range(8)])
    wellcond.nn.convert_norm(model, to="bsr").requires_grad_(True)
    optimizer = wellcond.optim.WSGDM(model, lr=0.01, weight_decay=1e-4, stats_every=5, solve_every=10)
    wellcond.attach(optimizer, model, wellcond.GradientCentralization())

    losses, done = [], 0
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])  # Proposals are drawn from it.
        done = saved["step"]
    for step in range(done, steps):
        images, targets = zip(scene(2 * step), scene(2 * step + 1), strict=True)
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    if checkpoint is not None:
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        torch.save(saved | {"step": steps}, checkpoint)
    image, target = scene(10_000)
    with torch.no_grad():
        overlaps = box_iou(target["boxes"], model.eval()([image])[0]["boxes"])
    best = ", ".join(f"{float(row.max()):.2f}" if len(row) else "none" for row in overlaps)
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}; best overlap with each box of a new image: {best}")
    return losses


if __name__ == "__main__":
    main()
