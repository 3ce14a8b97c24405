"""The rule for one layer type: subclass it to teach the library a layer of your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from wellcond.numerics.windows import Window

WeightKind = Literal["linear", "conv", "norm", "embedding"]

Rows: TypeAlias = "Tensor | Sequence[Tensor]"
"""Rows [groups, n, d]; or, where the groups have different numbers of rows, one [n, d] for each of them."""


class Layout:
    """The rule for one layer type; subclass it and `register_layout` it for a layer of your own.

    Attributes:
        kind: What the weight is: a linear map of features (``"linear"``), a convolution (``"conv"``), a norm layer's
            affine parameters (``"norm"``), or a table of vectors (``"embedding"``).
        output_axis: Which axis of the weight counts output units.
        has_rows: Whether `rows` is defined, that is, whether a second moment of the layer's input can be observed.
        missing_rows: Why not, for reports, where ``has_rows`` is False.
        reruns: Whether `inputs` runs the forward once more, which should then draw the same random numbers.
        one_hot: Whether every row has a single 1, so that the second moment is diagonal (`counts`).
        forward_uses: Methods that the layer's forward calls, beside which a subclass may put its own.
        family: The class of the rule, also where the rule is a variant for layers with a forward of their own.

    Example:
        >>> from wellcond.layouts import layout_of
        >>> layer = nn.ConvTranspose2d(6, 4, 3, groups=2)
        >>> layout_of(layer).matrix(layer, layer.weight).shape  # [groups, out, in, *kernel]
        torch.Size([2, 2, 3, 3, 3])
    """

    kind: WeightKind = "linear"
    output_axis: int = 0
    has_rows: bool = False
    missing_rows: str = "its input rows are not defined"
    reruns: bool = False
    one_hot: bool = False
    forward_uses: tuple[str, ...] = ()
    family: ClassVar[type[Layout]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.family = cls.__dict__.get("family", cls)

    def weights(self, module: nn.Module) -> list[tuple[str, str | None]]:
        """Name the attributes of ``module`` that hold weights, each with the attribute that holds its bias.

        Args:
            module: The layer.

        Returns:
            Pairs of (weight attribute, bias attribute or None).
        """
        return [("weight", "bias")]

    def of_weight(self, name: str) -> Layout:
        """Return the rule for one of `weights`, for layers whose weights differ in what they multiply.

        Args:
            name: The weight's attribute.

        Returns:
            The rule; this one unless a subclass says otherwise.
        """
        return self

    def adopted(self, module: nn.Module) -> Mapping[str, Layout]:
        """Name child modules that are never called because ``module`` uses their weights itself, with their rules.

        Args:
            module: The layer; its own forward is watched in the place of theirs.

        Returns:
            Child's attribute → its rule, whose `inputs` is asked about the parent's call.
        """
        return {}

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """View a weight-shaped tensor as one matrix per group, a row per output unit.

        Args:
            module: The layer.
            weight: Its weight, that weight's gradient, or anything of that shape.

        Returns:
            A view, shape [groups, out, *inputs]; writing to it writes to ``weight``.
        """
        return weight.unsqueeze(0)

    def bias_matrix(self, module: nn.Module, bias: Tensor) -> Tensor:
        """View a bias-shaped tensor as one column per group, to stand beside `matrix`.

        Args:
            module: The layer.
            bias: Its bias, that bias's gradient, or anything of that shape.

        Returns:
            A view, shape [groups, out].
        """
        groups = self.groups(module)
        return bias.unsqueeze(0) if groups == 1 else torch.unflatten(bias, 0, (groups, -1))

    def groups(self, module: nn.Module) -> int:
        """Return how many matrices the weight is: more than one for grouped convolutions."""
        return 1

    def unit_mean(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Average a weight-shaped tensor over everything but the output unit.

        Args:
            module: The layer.
            weight: Its weight, that weight's gradient, or anything of that shape.

        Returns:
            A tensor that broadcasts to the shape of ``weight``.
        """
        return weight.mean(dim=[axis for axis in range(weight.dim()) if axis != self.output_axis], keepdim=True)

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Pick from a call of the layer what its `rows` are made of.

        Args:
            module: The module that is called (the parent of an adopted one).
            args: Positional arguments of its forward.
            kwargs: Keyword arguments of its forward.

        Returns:
            The arguments of `rows` after the module, the first of them a tensor; None if the call has no such thing.
        """
        first = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
        return (first,) if isinstance(first, Tensor) else None

    def trailing(self, module: nn.Module) -> int | None:
        """Say how many of an input's last axes make up one row, for layers that treat every row by itself.

        Args:
            module: The layer.

        Returns:
            The number; None where rows are made of several positions.
        """
        return None

    def rows(self, module: nn.Module, inputs: Tensor) -> Rows:
        """Lay out the layer's input as the rows that its weight matrices multiply.

        Args:
            module: The layer.
            inputs: What the layer's forward was given.

        Returns:
            Shape [groups, n, d]: n counts samples × positions, d is the product of the matrix's ``inputs`` axes. Where
            groups have different numbers of rows: one [n, d] for each.

        Raises:
            TypeError: If this layout defines no rows.
        """
        raise TypeError(f"{type(module).__name__}: {self.missing_rows}")

    def output_rows(self, module: nn.Module, output: Any) -> Tensor | None:
        """Lay out what the layer's forward returned as rows.

        Args:
            module: The layer.
            output: What it returned.

        Returns:
            Shape [1, n, out] of all output units; None where a call does not return the weight's products: these are
            then those of `rows` and `matrix`.
        """
        return None

    def counts(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Count, where rows are ``one_hot``, how often each input occurs.

        Args:
            module: The layer.
            inputs: What the layer's forward was given.

        Returns:
            Shape [d], integers.
        """
        raise TypeError(f"{type(module).__name__}: its rows are not one-hot")

    def window(self, module: nn.Module) -> Window | None:
        """Return the window whose patches are the rows, for convolutions; None for all others."""
        return None

    def padded(self, module: nn.Module, *inputs: Any) -> Tensor:
        """Return the input over which `window` slides, shape (N, channels, *space)."""
        raise TypeError(f"{type(module).__name__}: not a convolution")


Layout.family = Layout
