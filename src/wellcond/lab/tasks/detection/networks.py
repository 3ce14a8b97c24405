"""Faster R-CNN and Mask R-CNN with feature pyramids, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from wellcond.lab.errors import unknown_name
from wellcond.lab.networks.trunks import TRUNKS, NormLayer, Trunk, build_trunk, freeze_first, frozen_batch_norms

# torchvision's detectors take seconds to import: they wait for a build.
if TYPE_CHECKING:
    from torch import nn
    from torchvision.models.detection.anchor_utils import AnchorGenerator

Norm = Literal["bn", "frozenbn", "gn"]

# Shorter side 800 and at most 1333: the sources' images.
_FULL_SIZE, _LONGEST = 800, 1333
_TINY_SIZE = 128
# Anchors of a pyramid's levels on images of the full size.
_ANCHORS = (32, 64, 128, 256, 512)
_ASPECTS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Width:
    """How large a detector is beside its trunk.

    Attributes:
        pyramid: Channels of the feature pyramid, and of the convolutions of the heads.
        representation: Features of the box head's linear layers.
        proposals: Boxes that the first stage proposes of each image.
        sampled: Boxes of each image that train the second stage.
    """

    pyramid: int = 256
    representation: int = 1024
    proposals: int = 1000
    sampled: int = 512


_TINY = Width(pyramid=32, representation=64, proposals=100, sampled=64)


@dataclass(frozen=True)
class DetectorSpec:
    """A detector by name.

    Attributes:
        name: What it is called on the command line.
        description: One line for `wellcond list`.
        trunk: The network that makes its features.
        masks: Whether it segments the objects, too.
        norm: ``"bn"``; ``"frozenbn"``, batch normalization that stays as it is given; or ``"gn"``, group normalization
            of 32 groups in trunk, pyramid and heads.
        convolutional_head: Whether the box head is four convolutions and one linear layer, not two linear layers.
        width: Its size beside the trunk.
        image_size: Shorter side of the images, where nothing else is asked for.
    """

    name: str
    description: str
    trunk: Trunk
    masks: bool
    norm: Norm
    convolutional_head: bool = False
    width: Width = Width()
    image_size: int = _FULL_SIZE


def _specs() -> list[DetectorSpec]:
    kinds = (("fasterrcnn", False), ("maskrcnn", True))
    norms: tuple[tuple[str, Norm], ...] = (("", "bn"), ("-frozenbn", "frozenbn"))
    names = {"bn": "batch normalization", "frozenbn": "frozen batch normalization", "gn": "group normalization"}
    specs = []
    for kind, masks in kinds:
        title = "Mask R-CNN" if masks else "Faster R-CNN"
        for trunk in ("r50", "r101", "x101-32x4d", "x101-64x4d"):
            for suffix, norm in norms:
                text = f"{title} with FPN on {trunk}, {names[norm]}"
                specs.append(DetectorSpec(f"{kind}-{trunk}{suffix}", text, TRUNKS[trunk], masks, norm))
        for trunk in ("r50", "r101"):
            text = f"{title} with FPN on {trunk}, {names['gn']}, box head of 4 convolutions"
            specs.append(DetectorSpec(f"{kind}-{trunk}-gn", text, TRUNKS[trunk], masks, "gn", True))
        text = f"{title} with FPN on r50, {names['frozenbn']}, box head of 4 convolutions"
        specs.append(DetectorSpec(f"{kind}-r50-frozenbn-4c1f", text, TRUNKS["r50"], masks, "frozenbn", True))
        for suffix, norm in norms:
            text = f"{title} with FPN on a thin residual net, {names[norm]}, for small images"
            specs.append(
                DetectorSpec(
                    f"{kind}-tiny{suffix}", text, TRUNKS["tiny"], masks, norm, width=_TINY, image_size=_TINY_SIZE
                )
            )
    return specs


DETECTORS = {spec.name: spec for spec in _specs()}
"""Every detector, in the order in which they are listed."""


def select_detector(name: str) -> DetectorSpec:
    """Return the detector of this name.

    Raises:
        LabError: If none has it.

    >>> select_detector("maskrcnn-r50").masks
    True
    """
    if name not in DETECTORS:
        raise unknown_name("model", name, DETECTORS)
    return DETECTORS[name]


def build_detector(spec: DetectorSpec, classes: int, image_size: int, weights: str | None) -> nn.Module:
    """Return a detector, its weights drawn from torch's global generator.

    Args:
        spec: Which.
        classes: How many classes of objects there are.
        image_size: Shorter side that images are brought to; the longer side is at most 5/3 of it.
        weights: Of the trunk: what `load_weights` takes for a classifier with this trunk. Its stem and its first stage
            then stay as they are, statistics included. None draws all, and all is trained.

    Returns:
        The detector: in training from images and targets to a dictionary of losses, otherwise from images to
        predictions, as torchvision's.
    """
    from torch import nn
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    norm_layer: NormLayer = partial(nn.GroupNorm, 32) if spec.norm == "gn" else nn.BatchNorm2d
    trunk = build_trunk(spec.trunk, norm_layer, weights)
    if spec.norm == "frozenbn":
        frozen_batch_norms(trunk)
    if weights is not None:
        freeze_first(trunk)
    width = spec.width
    inner_norm = norm_layer if spec.norm == "gn" else None
    backbone = BackboneWithFPN(
        trunk,
        return_layers={f"layer{stage + 1}": str(stage) for stage in range(4)},
        in_channels_list=list(spec.trunk.channels),
        out_channels=width.pyramid,
        norm_layer=inner_norm,
    )
    options: dict[str, Any] = {
        "min_size": image_size,
        "max_size": round(image_size * _LONGEST / _FULL_SIZE),
        "rpn_anchor_generator": _anchors(spec, image_size),
        "box_head": _box_head(spec, inner_norm),
        "box_predictor": FastRCNNPredictor(width.representation, classes + 1),
        "rpn_pre_nms_top_n_train": 2 * width.proposals,
        "rpn_pre_nms_top_n_test": width.proposals,
        "rpn_post_nms_top_n_train": 2 * width.proposals,
        "rpn_post_nms_top_n_test": width.proposals,
        "box_batch_size_per_image": width.sampled,
    }
    detector: nn.Module
    if spec.masks:
        options["mask_head"] = MaskRCNNHeads(width.pyramid, [width.pyramid] * 4, 1, norm_layer=inner_norm)
        options["mask_predictor"] = MaskRCNNPredictor(width.pyramid, width.pyramid, classes + 1)
        detector = MaskRCNN(backbone, **options)
    else:
        detector = FasterRCNN(backbone, **options)
    return detector


def _anchors(spec: DetectorSpec, image_size: int) -> AnchorGenerator:
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    # The sources' detectors keep their anchors; the small ones see the same objects on smaller images.
    scale = 1.0 if spec.image_size == _FULL_SIZE else image_size / _FULL_SIZE
    return AnchorGenerator(tuple((side * scale,) for side in _ANCHORS), (_ASPECTS,) * len(_ANCHORS))


def _box_head(spec: DetectorSpec, norm_layer: Callable[[int], nn.Module] | None) -> nn.Module:
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead

    channels, features = spec.width.pyramid, spec.width.representation
    head: nn.Module
    if spec.convolutional_head:
        head = FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [features], norm_layer=norm_layer)
    else:
        head = TwoMLPHead(channels * 7**2, features)
    return head
