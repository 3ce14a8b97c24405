"""The strong baseline's network for re-identification, and its three losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wellcond.lab.networks.trunks import build_trunk, keep_last_size
from wellcond.lab.tasks.reid.specs import ReidSpec
from wellcond.runtime.ranks import Ranks

_SMOOTHING = 0.1
_MARGIN = 0.3
_CENTER_WEIGHT = 5e-4
_CENTER_LR = 0.5


class Judged(NamedTuple):
    """The network's outputs for training images.

    Attributes:
        features: Before the neck, [n, d]: what distances are learned of.
        logits: Of the training identities, [n, classes].
    """

    features: Tensor
    logits: Tensor


class ReidNetwork(nn.Module):
    """A trunk, global average pooling, the batch-normalization neck and a classifier (Luo et al. 2019).

    In training it returns `Judged`, in evaluation the features after the neck, [n, d].

    Args:
        trunk: From `build_trunk`; its last stage's stride becomes 1.
        width: Channels of its last stage.
        classes: Identities that train.
    """

    def __init__(self, trunk: nn.Sequential, width: int, classes: int) -> None:
        super().__init__()
        keep_last_size(trunk)
        self.trunk = trunk
        self.neck = nn.BatchNorm1d(width)
        # The classifier has no bias either: its planes go through the origin, as the cosine's do.
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(width, classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)
        self.centers: Tensor
        # Of the center loss, which moves them itself: the optimizer that is compared does not.
        self.register_buffer("centers", torch.randn(classes, width))

    def forward(self, images: Tensor) -> Judged | Tensor:
        """Return what the images [n, 3, height, width] are judged to be, or their features."""
        features = self.trunk(images).mean(dim=(2, 3))
        normalized: Tensor = self.neck(features)
        return Judged(features, self.classifier(normalized)) if self.training else normalized


def build_reid(spec: ReidSpec, classes: int, weights: str | None) -> ReidNetwork:
    """Return a network, its weights drawn from torch's global generator.

    Args:
        spec: Which.
        classes: Identities that train.
        weights: Of the trunk: what `load_weights` takes for a classifier with this trunk; None draws all.
    """
    trunk = build_trunk(spec.trunk, nn.BatchNorm2d, weights)
    return ReidNetwork(trunk, spec.trunk.channels[-1], classes)


def reid_loss(judged: Judged, labels: Tensor, centers: Tensor, ranks: Ranks) -> Tensor:
    """Return the strong baseline's loss: smoothed cross-entropy + triplet loss + 0.0005 · center loss.

    Args:
        judged: What the network says of this rank's images.
        labels: Their identities, [n].
        centers: The centers, [classes, d]; moved in place towards their identities' features.
        ranks: The processes that train together. Triplets and centers are of the whole batch; the mean of the ranks'
            gradients is the whole batch's.
    """
    features = ranks.differentiable_gather(judged.features.float()).flatten(0, 1)
    everyone = ranks.gather(labels).flatten()
    identity = F.cross_entropy(judged.logits.float(), labels, label_smoothing=_SMOOTHING)
    triplet = hardest_triplets(features, everyone)
    center = (features - centers[everyone]).square().sum(dim=1).mean()
    move_centers(centers, features.detach(), everyone)
    return identity + triplet + _CENTER_WEIGHT * center


def hardest_triplets(features: Tensor, labels: Tensor) -> Tensor:
    """Return the triplet loss of each image with its farthest image of the same person and its nearest of another.

    Args:
        features: [n, d].
        labels: Who is seen, [n]; at least two persons.

    Returns:
        The mean of max(0, 0.3 + d(farthest same) − d(nearest other)), d the Euclidean distance.

    >>> hardest_triplets(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 1]))
    tensor(0.)
    """
    squares = features.square().sum(dim=1)
    # Squared distances of 0 have a gradient only with a floor under the root.
    distances = (squares[:, None] + squares - 2 * features @ features.T).clamp(min=1e-12).sqrt()
    same = labels[:, None] == labels
    farthest = distances.masked_fill(~same, -torch.inf).amax(dim=1)
    nearest = distances.masked_fill(same, torch.inf).amin(dim=1)
    return (_MARGIN + farthest - nearest).clamp(min=0).mean()


@torch.no_grad()
def move_centers(centers: Tensor, features: Tensor, labels: Tensor) -> None:
    """Take a gradient step of the centers, in place, on the mean squared distance of features to them.

    Args:
        centers: [classes, d].
        features: [n, d].
        labels: Whose center each is near to, [n].
    """
    gradient = 2 / len(labels) * (centers[labels] - features)
    centers.index_add_(0, labels, gradient, alpha=-_CENTER_LR)
