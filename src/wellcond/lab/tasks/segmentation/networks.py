"""Networks for segmentation: a trunk, a head, and its logits brought to the image's size."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from wellcond.lab.errors import LabError
from wellcond.lab.networks.residual import residual_layers
from wellcond.lab.networks.trunks import TRUNKS, build_network, dilate_last, trunk_features
from wellcond.lab.tasks.segmentation.specs import SegmentationSpec

_SMALL = (16, 32, 64)


class Segmenter(nn.Module):
    """A trunk and a head (Long et al. 2015; Chen et al. 2017).

    Args:
        trunk: From images to feature maps; or a network from `build_network`, applied up to its last feature map.
        head: From feature maps to logits of each place.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of each pixel of images [n, 3, height, width]: [n, classes, height, width]."""
        small = isinstance(self.trunk, nn.Sequential)
        logits = self.head(self.trunk(images) if small else trunk_features(self.trunk, images))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


def build_segmenter(spec: SegmentationSpec, classes: int, weights: str | None) -> Segmenter:
    """Return a network, its weights drawn from torch's global generator.

    Args:
        spec: Which.
        classes: How many there are to tell apart.
        weights: Of the trunk: what `load_weights` takes for a classifier with this trunk; None draws all.

    Raises:
        LabError: If weights are given for the small network, which has no classifier.
    """
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead
    from torchvision.models.segmentation.fcn import FCNHead

    heads = {"fcn": FCNHead, "deeplabv3": DeepLabHead}
    if spec.trunk is None:
        if weights is not None:
            raise LabError(f"--weights are of a trunk, and that of {spec.name} is always drawn")
        return Segmenter(nn.Sequential(*residual_layers(3, _SMALL, (1, 1, 1))), heads[spec.head](_SMALL[-1], classes))
    trunk = build_network(TRUNKS[spec.trunk], nn.BatchNorm2d, weights)
    dilate_last(trunk)
    return Segmenter(trunk, heads[spec.head](TRUNKS[spec.trunk].channels[-1], classes))
