"""The GPTs that can be named, without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GptSpec:
    """A GPT by name.

    Attributes:
        name: What it is called on the command line.
        layers: Its blocks of attention and feed-forward net.
        features: Of a position.
        heads: Of attention.
        block: Positions that it sees at once.
    """

    name: str
    layers: int
    features: int
    heads: int
    block: int

    @property
    def description(self) -> str:
        """One line for `wellcond list`."""
        return (
            f"GPT of {self.layers} layers of {self.features} features, {self.heads} heads, on blocks of {self.block}; "
            "for text"
        )


GPTS = {
    spec.name: spec
    for spec in (
        GptSpec("gpt-tiny", layers=2, features=64, heads=2, block=64),
        GptSpec("gpt-small", layers=4, features=128, heads=4, block=128),
        GptSpec("gpt-medium", layers=6, features=384, heads=6, block=256),
    )
}
"""Every GPT, the default first."""
