"""The networks on rows of numbers that can be named, without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MlpSpec:
    """A network by name.

    Attributes:
        name: What it is called on the command line.
        hidden: Features of each hidden layer; none is a linear model.
        batch_norm: Whether each hidden layer is followed by batch normalization.
    """

    name: str
    hidden: tuple[int, ...]
    batch_norm: bool = False

    @property
    def description(self) -> str:
        """One line for `wellcond list`."""
        if not self.hidden:
            return "a linear layer alone; for tables and frozen features"
        norm = ", batch normalization" if self.batch_norm else ""
        widths = " and ".join(map(str, self.hidden))
        return f"hidden layers of {widths}{norm} and ReLU; for tables and frozen features"


MLPS = {
    spec.name: spec
    for spec in (
        MlpSpec("mlp-bn", (128, 128), batch_norm=True),
        MlpSpec("mlp", (128, 128)),
        MlpSpec("linear", ()),
    )
}
"""Every one of them."""
