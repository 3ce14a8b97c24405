"""Networks on rows of numbers and categories."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wellcond.lab.errors import unknown_name
from wellcond.lab.networks.mlp_specs import MLPS, MlpSpec

_MOST_EMBEDDED = 32


class Mlp(nn.Module):
    """Linear layers with ReLUs, batch normalization before them where it is asked for; categories are embedded.

    Args:
        spec: Its hidden layers.
        numbers: How many numbers a row begins with.
        sizes: Of each category that follows them, as a number: how many there are.
        outputs: Of the last layer.
    """

    def __init__(self, spec: MlpSpec, numbers: int, sizes: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.numbers = numbers
        widths = [min(_MOST_EMBEDDED, round(size**0.5)) for size in sizes]
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size, width in zip(sizes, widths, strict=True))
        layers: list[nn.Module] = []
        features = numbers + sum(widths)
        for width in spec.hidden:
            layers.append(nn.Linear(features, width, bias=not spec.batch_norm))
            layers += [nn.BatchNorm1d(width)] if spec.batch_norm else []
            layers.append(nn.ReLU())
            features = width
        self.layers = nn.Sequential(*layers, nn.Linear(features, outputs))

    def forward(self, rows: Tensor) -> Tensor:
        """Return the outputs, [n, outputs].

        Args:
            rows: [n, numbers + categories]; each category by its number, from 0 on.
        """
        if self.embeddings:
            codes = rows[:, self.numbers :].long().unbind(1)
            embedded = [layer(code) for layer, code in zip(self.embeddings, codes, strict=True)]
            rows = torch.cat([rows[:, : self.numbers], *embedded], dim=1)
        outputs: Tensor = self.layers(rows)
        return outputs


def select_mlp(name: str) -> MlpSpec:
    """Return the network of this name.

    Raises:
        LabError: If none has it.

    >>> select_mlp("mlp").hidden
    (128, 128)
    """
    if name not in MLPS:
        raise unknown_name("model", name, MLPS)
    return MLPS[name]
