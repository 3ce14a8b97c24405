"""Linear maps of features: Linear, Bilinear, embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.layouts.layout import Layout, Rows


class LinearLayout(Layout):
    """``nn.Linear``: weight (out, in); input (..., in)."""

    has_rows = True

    def trailing(self, module: nn.Module) -> int | None:
        """Return one."""
        return 1

    def rows(self, module: nn.Module, inputs: Tensor) -> Rows:
        """Flatten all axes but the last into rows."""
        return inputs.reshape(1, -1, inputs.shape[-1])

    def output_rows(self, module: nn.Module, output: Any) -> Tensor | None:
        """Flatten all axes but the last into rows."""
        return _last_axis_rows(output)


class TransposedLinearLayout(LinearLayout):
    """A linear map that keeps its weight as (in, out), as Hugging Face's ``Conv1D`` in GPT-2 does."""

    output_axis = 1

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """View as [1, out, in]."""
        return weight.transpose(0, 1).unsqueeze(0)


class WhitenedLinearLayout(LinearLayout):
    """A linear map that whitens its input itself: its gradient is not to be preconditioned by their second moment.

    `rows` are what the layer is given, before it whitens that.
    """

    has_rows = False
    missing_rows = "the layer whitens its features itself"


class BilinearLayout(Layout):
    """``nn.Bilinear``: weight (out, in1, in2); its rows are the products of the two inputs' features."""

    has_rows = True

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Pick both inputs."""
        both = (*args, *(kwargs[name] for name in ("input1", "input2") if name in kwargs))
        return both if len(both) == 2 and all(isinstance(value, Tensor) for value in both) else None

    def trailing(self, module: nn.Module) -> int | None:
        """Return one, of either input."""
        return 1

    def rows(self, module: nn.Module, inputs: Tensor, second: Tensor | None = None) -> Rows:
        """Multiply every feature of the first input by every feature of the second.

        Args:
            module: An ``nn.Bilinear``.
            inputs: Shape (..., in1).
            second: Shape (..., in2).

        Returns:
            Shape [1, n, in1 · in2].
        """
        assert second is not None
        return (inputs.unsqueeze(-1) * second.unsqueeze(-2)).reshape(1, -1, inputs.shape[-1] * second.shape[-1])

    def output_rows(self, module: nn.Module, output: Any) -> Tensor | None:
        """Flatten all axes but the last into rows."""
        return _last_axis_rows(output)


class EmbeddingLayout(Layout):
    """``nn.Embedding``: weight (tokens, out), a linear map of one-hot inputs.

    The padding index selects a vector that is never trained: it counts as an input of zero.
    """

    kind = "embedding"
    output_axis = 1
    has_rows = True
    one_hot = True

    def weights(self, module: nn.Module) -> list[tuple[str, str | None]]:
        """Name the table, which has no bias."""
        return [("weight", None)]

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """View as [1, out, tokens]."""
        return weight.transpose(0, 1).unsqueeze(0)

    def trailing(self, module: nn.Module) -> int | None:
        """Return none: each token is a row."""
        return 0

    def rows(self, module: nn.Module, inputs: Tensor) -> Rows:
        """Write the tokens as one-hot rows (`counts` holds their second moment at a fraction of the cost)."""
        table = cast(nn.Embedding, module)
        rows = F.one_hot(inputs.reshape(1, -1), table.num_embeddings).to(torch.get_default_dtype())
        if table.padding_idx is not None:
            rows[..., table.padding_idx].zero_()
        return rows

    def counts(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Count how often each token occurs; padding never does."""
        table = cast(nn.Embedding, module)
        # A scatter, since `bincount` waits for the device to learn how long its result is.
        tokens = inputs.reshape(-1)
        counts = torch.zeros(table.num_embeddings, dtype=torch.int64, device=inputs.device)
        counts.scatter_add_(0, tokens.to(torch.int64), torch.ones_like(tokens, dtype=torch.int64))
        if table.padding_idx is not None:
            counts[table.padding_idx].zero_()
        return counts


class EmbeddingBagLayout(Layout):
    """``nn.EmbeddingBag``: weight (tokens, out), a linear map of sums of one-hot inputs."""

    kind = "embedding"
    output_axis = 1
    missing_rows = "a bag mixes its tokens, so their second moment is a tokens × tokens matrix"

    def weights(self, module: nn.Module) -> list[tuple[str, str | None]]:
        """Name the table, which has no bias."""
        return [("weight", None)]

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """View as [1, out, tokens]."""
        return weight.transpose(0, 1).unsqueeze(0)


def _last_axis_rows(output: Any) -> Tensor | None:
    return output.reshape(1, -1, output.shape[-1]) if isinstance(output, Tensor) else None
