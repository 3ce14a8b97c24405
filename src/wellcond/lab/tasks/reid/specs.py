"""Networks for re-identification by name, to be listed without being built."""

from __future__ import annotations

from dataclasses import dataclass

from wellcond.lab.errors import unknown_name
from wellcond.lab.networks.trunks import TRUNKS, Trunk


@dataclass(frozen=True)
class ReidSpec:
    """A network for re-identification by name.

    Attributes:
        name: What it is called on the command line.
        description: One line for `wellcond list`.
        trunk: What makes its features.
    """

    name: str
    description: str
    trunk: Trunk


REID_NETWORKS = {
    f"reid-{trunk}": ReidSpec(f"reid-{trunk}", f"{title}, last stride 1, batch-normalization neck", TRUNKS[trunk])
    for trunk, title in (
        ("tiny", "thin residual net"),
        ("r18", "ResNet-18"),
        ("r50", "ResNet-50"),
        ("r101", "ResNet-101"),
    )
}
"""Every network, in the order in which they are listed."""


def select_reid(name: str) -> ReidSpec:
    """Return the network of this name.

    Raises:
        LabError: If none has it.

    >>> select_reid("reid-r50").trunk.source
    'torchvision:resnet50'
    """
    if name not in REID_NETWORKS:
        raise unknown_name("model", name, REID_NETWORKS)
    return REID_NETWORKS[name]
