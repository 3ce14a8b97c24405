"""Faster R-CNN and Mask R-CNN with feature pyramids, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from wellcond.lab.errors import unknown_name
from wellcond.lab.networks.swin import SWIN_TRUNKS, SwinTrunk, build_swin
from wellcond.lab.networks.trunks import TRUNKS, NormLayer, Trunk, build_trunk, freeze_first, frozen_batch_norms

# torchvision's detectors take seconds to import: they wait for a build.
if TYPE_CHECKING:
    from torch import nn
    from torchvision.models.detection.anchor_utils import AnchorGenerator

DetectorNorm = Literal["bn", "frozenbn", "gn", "sn", "ln"]
HeadNorm = Literal["gn", "sn"]

# Shorter side 800 and at most 1333: the sources' images.
_FULL_SIZE, _LONGEST = 800, 1333
_TINY_SIZE = 128
# Anchors of a pyramid's levels on images of the full size.
_ANCHORS = (32, 64, 128, 256, 512)
_ASPECTS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Width:
    """The sizes of a detector beside its trunk.

    Attributes:
        pyramid: Channels of the feature pyramid, and of the convolutions of the heads.
        representation: Features of the box head's linear layers.
        proposals: Boxes that the first stage proposes of each image.
        sampled: Boxes of each image that train the second stage.
        groups: Of group normalization.
    """

    pyramid: int = 256
    representation: int = 1024
    proposals: int = 1000
    sampled: int = 512
    groups: int = 32


_TINY = Width(pyramid=32, representation=64, proposals=100, sampled=64, groups=8)


@dataclass(frozen=True)
class DetectorSpec:
    """A detector by name.

    Attributes:
        name: What it is called on the command line.
        description: One line for `wellcond list`.
        trunk: The network that makes its features.
        masks: Whether it segments the objects, too.
        norm: Of the trunk: ``"bn"``; ``"frozenbn"``, batch normalization that stays as it is given; ``"gn"``, group
            normalization; ``"sn"``, Switchable Normalization; or ``"ln"``, layer normalization, of a Swin trunk.
        head_norm: Of the pyramid, the box head and the mask head; None for none, as the sources have it beside batch
            normalization.
        convolutional_head: Whether the box head is four convolutions and one linear layer, not two linear layers.
        width: Its size beside the trunk.
        image_size: Shorter side of the images, where nothing else is asked for.
    """

    name: str
    description: str
    trunk: Trunk | SwinTrunk
    masks: bool
    norm: DetectorNorm
    head_norm: HeadNorm | None = None
    convolutional_head: bool = False
    width: Width = Width()
    image_size: int = _FULL_SIZE


_CALLED = {
    "bn": "batch normalization",
    "frozenbn": "frozen batch normalization",
    "gn": "group normalization",
    "sn": "Switchable Normalization",
    "ln": "layer normalization",
}
# As names say it: the trunk's, then that of pyramid and heads where it is another.
_NORMS: dict[str, tuple[DetectorNorm, HeadNorm | None]] = {
    "": ("bn", None),
    "-frozenbn": ("frozenbn", None),
    "-gn": ("gn", "gn"),
    "-sn": ("sn", "sn"),
    "-frozenbn-gn": ("frozenbn", "gn"),
    "-frozenbn-sn": ("frozenbn", "sn"),
    "-gn-sn": ("gn", "sn"),
}
_PLAIN = ("", "-frozenbn")
_SUFFIXES: dict[str, tuple[str, ...]] = {
    "r50": (*_NORMS, "-frozenbn-4c1f"),
    "r101": (*_PLAIN, "-gn"),
    "x101-32x4d": _PLAIN,
    "x101-64x4d": _PLAIN,
    "tiny": tuple(_NORMS),
}


def _specs() -> list[DetectorSpec]:
    specs = []
    for kind, masks in (("fasterrcnn", False), ("maskrcnn", True)):
        specs += [_residual(kind, masks, trunk, suffix) for trunk, names in _SUFFIXES.items() for suffix in names]
        specs += [_swin(kind, masks, trunk) for trunk in SWIN_TRUNKS.values()]
    return specs


def _residual(kind: str, masks: bool, trunk: str, suffix: str) -> DetectorSpec:
    norm, head_norm = _NORMS[suffix.removesuffix("-4c1f")]
    convolutional = head_norm is not None or suffix.endswith("-4c1f")
    text = f"{_title(masks)} on {'a thin residual net' if trunk == 'tiny' else trunk}, {_CALLED[norm]}"
    if head_norm is not None and head_norm != norm:
        text += f", {_CALLED[head_norm]} in pyramid and heads"
    text += ", box head of 4 convolutions" if convolutional else ""
    return _sized(kind, DetectorSpec(f"{trunk}{suffix}", text, TRUNKS[trunk], masks, norm, head_norm, convolutional))


def _swin(kind: str, masks: bool, trunk: SwinTrunk) -> DetectorSpec:
    text = f"{_title(masks)} on {'a thin Swin transformer' if trunk.name == 'swin-tiny' else 'Swin-T'}"
    return _sized(kind, DetectorSpec(trunk.name, text, trunk, masks, "ln"))


def _title(masks: bool) -> str:
    return f"{'Mask' if masks else 'Faster'} R-CNN with FPN"


def _sized(kind: str, spec: DetectorSpec) -> DetectorSpec:
    spec = replace(spec, name=f"{kind}-{spec.name}")
    if "tiny" not in spec.name:
        return spec
    return replace(spec, description=f"{spec.description}, for small images", width=_TINY, image_size=_TINY_SIZE)


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
        weights: Of the trunk: what `load_weights` takes for a classifier with this trunk. The stem and the first stage
            of a residual one then stay as they are, with the statistics of batch normalization; of a Swin transformer
            all is trained. None draws all, and all is trained.

    Returns:
        The detector: in training from images and targets to a dictionary of losses, otherwise from images to
        predictions, as torchvision's.
    """
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    width = spec.width
    head_norm = None if spec.head_norm is None else _norm_layer(spec.head_norm, width.groups)
    backbone = _pyramid(spec, head_norm, weights)
    options: dict[str, Any] = {
        "min_size": image_size,
        "max_size": round(image_size * _LONGEST / _FULL_SIZE),
        "rpn_anchor_generator": _anchors(spec, image_size),
        "box_head": _box_head(spec, head_norm),
        "box_predictor": FastRCNNPredictor(width.representation, classes + 1),
        "rpn_pre_nms_top_n_train": 2 * width.proposals,
        "rpn_pre_nms_top_n_test": width.proposals,
        "rpn_post_nms_top_n_train": 2 * width.proposals,
        "rpn_post_nms_top_n_test": width.proposals,
        "box_batch_size_per_image": width.sampled,
    }
    detector: nn.Module
    if spec.masks:
        options["mask_head"] = MaskRCNNHeads(width.pyramid, [width.pyramid] * 4, 1, norm_layer=head_norm)
        options["mask_predictor"] = MaskRCNNPredictor(width.pyramid, width.pyramid, classes + 1)
        detector = MaskRCNN(backbone, **options)
    else:
        detector = FasterRCNN(backbone, **options)
    return detector


def _norm_layer(norm: DetectorNorm, groups: int) -> NormLayer:
    from torch import nn

    from wellcond.nn import SwitchableNorm2d

    layers: dict[DetectorNorm, NormLayer] = {"gn": partial(nn.GroupNorm, groups), "sn": SwitchableNorm2d}
    return layers.get(norm, nn.BatchNorm2d)


def _pyramid(spec: DetectorSpec, head_norm: NormLayer | None, weights: str | None) -> nn.Module:
    """Return trunk and feature pyramid, whose parts are called as torchvision's: ``body`` and ``fpn``."""
    from torch import nn
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    width = spec.width
    if isinstance(spec.trunk, SwinTrunk):
        body = build_swin(spec.trunk, weights)
        # Its own body would take the trunk's layers apart; ours makes the maps itself.
        channels = list(spec.trunk.channels)
        pyramid: nn.Module = BackboneWithFPN(nn.Sequential(), {}, channels, width.pyramid, norm_layer=head_norm)
        pyramid.body = body
        return pyramid
    trunk = build_trunk(spec.trunk, _norm_layer(spec.norm, width.groups), weights)
    if spec.norm == "frozenbn":
        frozen_batch_norms(trunk)
    if weights is not None:
        freeze_first(trunk)
    backbone: nn.Module = BackboneWithFPN(
        trunk,
        return_layers={f"layer{stage + 1}": str(stage) for stage in range(4)},
        in_channels_list=list(spec.trunk.channels),
        out_channels=width.pyramid,
        norm_layer=head_norm,
    )
    return backbone


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
