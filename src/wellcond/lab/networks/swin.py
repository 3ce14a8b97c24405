"""Swin transformers up to the feature maps of their four stages, for detectors in place of residual trunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

# `wellcond list` names the networks on these trunks; torchvision waits for a build.
if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class SwinTrunk:
    """A Swin transformer by name, without its classifier.

    Attributes:
        name: As part of the names of the networks that stand on it.
        source: What `load_weights` calls the network; published weights are of the networks of torchvision.
        width: Channels of the first stage's feature map; each further stage has twice those of the one before.
        depths: Blocks of the stages.
        heads: Heads of the stages' attention.
        window: Height and width of the windows that attention is within.
        stochastic_depth: Chance that the last block is left out of a training step; earlier ones have less.
    """

    name: str
    source: str
    width: int
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    window: int
    stochastic_depth: float

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the stages' feature maps."""
        return tuple(self.width * 2**stage for stage in range(len(self.depths)))

    def build(self) -> nn.Module:
        """Return the network with its classifier, its weights drawn from torch's global generator."""
        from torchvision.models.swin_transformer import SwinTransformer

        network: nn.Module = SwinTransformer(
            patch_size=[4, 4],
            embed_dim=self.width,
            depths=list(self.depths),
            num_heads=list(self.heads),
            window_size=[self.window, self.window],
            stochastic_depth_prob=self.stochastic_depth,
        )
        return network


SWIN_TRUNKS = {
    trunk.name: trunk
    for trunk in (
        SwinTrunk("swin-tiny", "swin-tiny", 16, (1, 1, 1, 1), (2, 2, 4, 4), window=4, stochastic_depth=0.0),
        SwinTrunk("swin-t", "torchvision:swin_t", 96, (2, 2, 6, 2), (3, 6, 12, 24), window=7, stochastic_depth=0.2),
    )
}
"""Every Swin trunk; ``swin-t`` is the published one, ``swin-tiny`` is for small images."""


def build_swin(trunk: SwinTrunk, weights: str | None) -> nn.Module:
    """Return a trunk: from images [N, 3, H, W] to a dictionary of four feature maps, named ``"0"`` to ``"3"``.

    Each map is [N, C, H/s, W/s] with the stage's channels and s = 4, 8, 16, 32, after a layer normalization of its own,
    which is drawn also where weights are given: a classifier has one alone.

    Args:
        trunk: Which.
        weights: What `load_weights` takes, for the network that the trunk is of; None keeps what is drawn from torch's
            global generator.
    """
    network = trunk.build()
    if weights is not None:
        from wellcond.lab.networks.weights import load_weights

        load_weights(network, trunk.source, weights)
    from wellcond.lab.networks.swin_stages import SwinStages

    return SwinStages(network.get_submodule("features"), trunk.channels)
