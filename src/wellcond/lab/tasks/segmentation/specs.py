"""Networks for segmentation by name, to be listed without being built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wellcond.lab.errors import unknown_name

Head = Literal["fcn", "deeplabv3"]
"""What stands on the trunk, as torchvision has it."""


@dataclass(frozen=True)
class SegmentationSpec:
    """A network for segmentation by name.

    Attributes:
        name: What it is called on the command line.
        description: One line for `wellcond list`.
        trunk: A name in `TRUNKS`; None for the small residual net of the lab.
        head: What tells the classes from its features.
    """

    name: str
    description: str
    trunk: str | None
    head: Head


SEGMENTERS = {
    spec.name: spec
    for spec in (
        SegmentationSpec("fcn-tiny", "FCN on a residual net of 3 blocks (16-32-64), for small images", None, "fcn"),
        SegmentationSpec("fcn-r18", "FCN on ResNet-18, its last two stages dilated", "r18", "fcn"),
        SegmentationSpec("fcn-r50", "FCN on ResNet-50, its last two stages dilated", "r50", "fcn"),
        SegmentationSpec("fcn-r101", "FCN on ResNet-101, its last two stages dilated", "r101", "fcn"),
        SegmentationSpec("deeplabv3-r50", "DeepLabV3 on ResNet-50, its last two stages dilated", "r50", "deeplabv3"),
        SegmentationSpec("deeplabv3-r101", "DeepLabV3 on ResNet-101, its last two stages dilated", "r101", "deeplabv3"),
    )
}
"""Every network, in the order in which they are listed."""


def select_segmenter(name: str) -> SegmentationSpec:
    """Return the network of this name.

    Raises:
        LabError: If none has it.

    >>> select_segmenter("deeplabv3-r50").trunk
    'r50'
    """
    if name not in SEGMENTERS:
        raise unknown_name("model", name, SEGMENTERS)
    return SEGMENTERS[name]
