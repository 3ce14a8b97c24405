"""What each layer type's parameters mean: which axis is the output unit, and which rows its input offers them.

A layout sees a weight as matrices ``[groups, out, *inputs]`` — one row per output unit — and the layer's input as the
rows ``[groups, n, d]`` which those matrices multiply. Nothing else in the library hard-codes an axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter

Kind = Literal["linear", "conv", "norm", "embedding"]


class Layout:
    """The rule for one layer type; subclass it and `register_layout` it for a layer of your own.

    Attributes:
        kind: What the weight is: a linear map of features (``"linear"``), a convolution (``"conv"``), a norm layer's
            affine parameters (``"norm"``), or a table of vectors (``"embedding"``).
        output_axis: Which axis of the weight counts output units.
        has_rows: Whether `rows` is defined, that is, whether a second moment of the layer's input can be observed.
        missing_rows: Why not, for reports, where ``has_rows`` is False.

    Example:
        >>> layer = nn.ConvTranspose2d(6, 4, 3, groups=2)
        >>> layout_of(layer).matrix(layer, layer.weight).shape  # [groups, out, in, *kernel]
        torch.Size([2, 2, 3, 3, 3])
    """

    kind: Kind = "linear"
    output_axis: int = 0
    has_rows: bool = False
    missing_rows: str = "its input rows are not defined"

    def weights(self, module: nn.Module) -> list[tuple[str, str | None]]:
        """Name the attributes of ``module`` that hold weights, each with the attribute that holds its bias.

        Args:
            module: The layer.

        Returns:
            Pairs of (weight attribute, bias attribute or None).
        """
        return [("weight", "bias")]

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """View a weight-shaped tensor as one matrix per group, a row per output unit.

        Args:
            module: The layer.
            weight: Its weight, that weight's gradient, or anything of that shape.

        Returns:
            A view, shape [groups, out, *inputs]; writing to it writes to ``weight``.
        """
        return weight.unsqueeze(0)

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

    def rows(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Lay out the layer's input as the rows that its weight matrices multiply.

        Args:
            module: The layer.
            inputs: What the layer's forward was given.

        Returns:
            Shape [groups, n, d]: n counts samples × positions, d is the product of the matrix's ``inputs`` axes.

        Raises:
            TypeError: If this layout defines no rows.
        """
        raise TypeError(f"{type(module).__name__}: {self.missing_rows}")


class LinearLayout(Layout):
    """``nn.Linear``: weight (out, in); input (..., in)."""

    has_rows = True

    def rows(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Flatten all axes but the last into rows."""
        return inputs.reshape(1, -1, inputs.shape[-1])


class UncalledLinearLayout(Layout):
    """A Linear whose weight its parent multiplies itself, so that its own forward, and its hooks, never run."""

    missing_rows = "its parent module uses the weight directly, so its input is not seen"


class ConvLayout(Layout):
    """``nn.Conv1d/2d/3d``: weight (out, in/groups, *kernel); rows are the patches under the kernel (im2col)."""

    kind = "conv"
    has_rows = True

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """View as [groups, out/groups, in/groups, *kernel]."""
        return torch.unflatten(weight, 0, (self.groups(module), -1))

    def groups(self, module: nn.Module) -> int:
        """Return the convolution's groups."""
        return cast(nn.Conv2d, module).groups

    def rows(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Lay out the padded input's patches; stride, dilation, padding and its mode are the layer's own.

        Args:
            module: An ``nn.Conv1d/2d/3d``.
            inputs: Shape (N, C, *space), or (C, *space) without a batch axis.

        Returns:
            Shape [groups, N · output positions, C/groups · kernel taps].
        """
        conv = cast(nn.Conv2d, module)
        spatial = len(conv.kernel_size)
        if inputs.dim() == spatial + 1:
            inputs = inputs.unsqueeze(0)
        patches = F.pad(inputs, _padding(conv), mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
        for axis, (size, stride, dilation) in enumerate(
            zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), start=2
        ):
            patches = patches.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        # (N, C, *positions, *kernel) -> (groups, N, *positions, C/groups, *kernel)
        patches = torch.unflatten(patches, 1, (conv.groups, -1)).movedim(1, 0).movedim(2, 2 + spatial)
        return patches.reshape(conv.groups, -1, math.prod(patches.shape[2 + spatial :]))


def _padding(conv: nn.Conv2d) -> list[int]:
    """Return the padding in the order of `F.pad`: last axis first, before and after."""
    if conv.padding == "valid":
        return [0] * (2 * len(conv.kernel_size))
    pads: list[int] = []
    for axis in reversed(range(len(conv.kernel_size))):
        if conv.padding == "same":
            total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [int(conv.padding[axis])] * 2
    return pads


class ConvTransposeLayout(Layout):
    """``nn.ConvTranspose1d/2d/3d``: weight (in, out/groups, *kernel), so the output unit is the *second* axis."""

    kind = "conv"
    output_axis = 1

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """View as [groups, out/groups, in/groups, *kernel]."""
        return torch.unflatten(weight, 0, (self.groups(module), -1)).transpose(1, 2)

    def groups(self, module: nn.Module) -> int:
        """Return the convolution's groups."""
        return cast(nn.ConvTranspose2d, module).groups

    def unit_mean(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Average over the inputs of each unit's own group."""
        if self.groups(module) == 1:
            return super().unit_mean(module, weight)
        rows = self.matrix(module, weight)  # [groups, out, in, *kernel]
        mean = rows.mean(dim=list(range(2, rows.dim())), keepdim=True)
        return mean.expand(*rows.shape[:3], *mean.shape[3:]).transpose(1, 2).flatten(0, 1)


class NormLayout(Layout):
    """Norm layers' affine parameters: every element scales its own normalized feature."""

    kind = "norm"

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """View as one 1 × 1 matrix per element."""
        return weight.flatten().unsqueeze(-1).unsqueeze(-1)


class EmbeddingLayout(Layout):
    """``nn.Embedding``, ``nn.EmbeddingBag``: weight (tokens, out), a linear map of one-hot inputs."""

    kind = "embedding"
    output_axis = 1

    def weights(self, module: nn.Module) -> list[tuple[str, str | None]]:
        """Name the table, which has no bias."""
        return [("weight", None)]

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """View as [1, out, tokens]."""
        return weight.transpose(0, 1).unsqueeze(0)


class AttentionLayout(Layout):
    """``nn.MultiheadAttention``'s input projections; its ``out_proj`` is a Linear of its own."""

    missing_rows = "a packed projection has up to three inputs"

    def weights(self, module: nn.Module) -> list[tuple[str, str | None]]:
        """Name the packed projection, or the three separate ones; their bias is packed in either case."""
        return [
            ("in_proj_weight", "in_proj_bias"),
            ("q_proj_weight", None),
            ("k_proj_weight", None),
            ("v_proj_weight", None),
        ]


class RecurrentLayout(Layout):
    """``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` and their cells: each weight (gates · hidden, in)."""

    missing_rows = "the hidden states inside a recurrent layer are not seen"

    def weights(self, module: nn.Module) -> list[tuple[str, str | None]]:
        """Pair each ``weight_…`` with its ``bias_…``."""
        names = [name for name, _ in module.named_parameters(recurse=False)]
        biases = {name.replace("weight", "bias"): name for name in names if name.startswith("weight")}
        return [(weight, bias if bias in names else None) for bias, weight in biases.items()]


_LAYOUTS: dict[type[nn.Module], Layout] = {
    nn.Linear: LinearLayout(),
    nn.modules.linear.NonDynamicallyQuantizableLinear: UncalledLinearLayout(),
    nn.Bilinear: Layout(),
    nn.MultiheadAttention: AttentionLayout(),
    nn.RNNBase: RecurrentLayout(),
    nn.RNNCellBase: RecurrentLayout(),
    nn.Embedding: EmbeddingLayout(),
    nn.EmbeddingBag: EmbeddingLayout(),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvLayout()),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ConvTransposeLayout()),
    **dict.fromkeys(
        (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
        NormLayout(),
    ),
}


def register_layout(module_type: type[nn.Module], layout: Layout) -> None:
    """Teach the library a layer type (and its subclasses); a later rule for the same type replaces the earlier one.

    Args:
        module_type: A subclass of ``nn.Module``.
        layout: Its rule.

    Raises:
        TypeError: If either argument is of another type.

    Example:
        >>> class Gate(nn.Module):  # y = x * weight: not a linear map over features
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(1, 8, 1, 1))
        >>> register_layout(Gate, NormLayout())
        >>> layout_of(Gate()).kind
        'norm'
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of nn.Module, got {module_type!r}")
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout, got {layout!r}")
    _LAYOUTS[module_type] = layout


def layout_of(module: nn.Module) -> Layout | None:
    """Find the rule for a layer by its class, or by the nearest base class that has one.

    Args:
        module: Any module.

    Returns:
        The rule, or None for a layer type that is not known.

    Example:
        >>> layout_of(nn.Conv2d(3, 8, 3)).kind
        'conv'
        >>> layout_of(nn.ReLU()) is None
        True
    """
    for cls in type(module).__mro__:
        if cls in _LAYOUTS:
            return _LAYOUTS[cls]
    return None


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight of one module, and the bias that is added to its product.

    Attributes:
        name: Qualified name of the weight, as in ``model.named_parameters()``.
        module_name: Qualified name of the module.
        module: The module.
        layout: The rule for it.
        weight: The weight.
        bias: The bias, or None.
        bias_name: Qualified name of the bias, or None.
    """

    name: str
    module_name: str
    module: nn.Module
    layout: Layout
    weight: Parameter
    bias: Parameter | None = None
    bias_name: str | None = None

    @property
    def groups(self) -> int:
        """How many matrices the weight is."""
        return self.layout.groups(self.module)

    @property
    def matrix_shape(self) -> torch.Size:
        """The weight's shape as [groups, out, *inputs]; of the whole weight where it is sharded over ranks."""
        return self.matrix(torch.empty(self.weight.shape, device="meta")).shape

    def matrix(self, tensor: Tensor) -> Tensor:
        """View a tensor of the weight's shape as [groups, out, *inputs]."""
        return self.layout.matrix(self.module, tensor)

    def unit_mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor of the weight's shape over everything but the output unit."""
        return self.layout.unit_mean(self.module, tensor)

    def rows(self, inputs: Tensor) -> Tensor:
        """Lay out the module's input as rows [groups, n, d]."""
        return self.layout.rows(self.module, inputs)


@dataclass
class Layers:
    """What `find_layers` found in a model.

    Attributes:
        known: The weights with a rule. A weight that several modules share appears once for each of them.
        unknown: Qualified parameter name → type name of its module, for parameters no rule speaks of.
    """

    known: list[Layer] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.known)


def find_layers(model: nn.Module) -> Layers:
    """List a model's weights by the layers that own them; what no rule speaks of is named, not guessed.

    Args:
        model: Any module, also wrapped (DDP, ``torch.compile``).

    Returns:
        The known layers, in the order of ``model.named_modules()``, and the unknown parameters by name.

    Raises:
        ValueError: If a layer is lazily initialised and has not seen its first input.

    Example:
        >>> [layer.name for layer in find_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))]
        ['0.weight', '1.weight']
    """
    found = Layers()
    for module_name, module in model.named_modules():
        own: dict[str, Any] = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        prefix = f"{module_name}." if module_name else ""
        if any(nn.parameter.is_lazy(parameter) for parameter in own.values()):
            raise ValueError(
                f"layer '{module_name}' ({type(module).__name__}) is lazily initialised: "
                "run one forward pass before attaching"
            )
        layout = layout_of(module)
        claimed: set[str] = set()
        for weight_name, bias_name in layout.weights(module) if layout is not None else []:
            weight = own.get(weight_name)
            if weight is None or layout is None:
                continue
            bias = own.get(bias_name) if bias_name else None
            claimed |= {weight_name} | ({bias_name} if bias_name and bias is not None else set())
            found.known.append(
                Layer(
                    name=prefix + weight_name,
                    module_name=module_name,
                    module=module,
                    layout=layout,
                    weight=weight,
                    bias=bias,
                    bias_name=f"{prefix}{bias_name}" if bias is not None else None,
                )
            )
        # Vectors that a known layer keeps beside its weights (attention's packed biases) are nothing to wonder about.
        found.unknown |= {
            prefix + name: type(module).__name__
            for name, parameter in own.items()
            if name not in claimed and (layout is None or parameter.dim() > 1)
        }
    return found
