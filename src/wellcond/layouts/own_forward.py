"""Rules for layers whose class overrides its base class's forward: look at what the weight multiplies, each time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.layouts.attention import AttentionLayout
from wellcond.layouts.conv import ConvLayout, ConvTransposeLayout, pads_of, spread_out, with_batch_axis
from wellcond.layouts.layout import Layout, Rows
from wellcond.layouts.linear import BilinearLayout, EmbeddingLayout, LinearLayout, TransposedLinearLayout
from wellcond.layouts.norm import GroupNormLayout, LayerNormLayout
from wellcond.layouts.twin import can_be_moved, compute_parametrizations, run_twin, twin_of
from wellcond.layouts.watching import MATMULS, Product, UnknownInputError, Watch
from wellcond.numerics.windows import Window, patch_rows

Inputs = tuple[Any, ...]
Reader = Callable[[Layout, nn.Module, list[Product]], Inputs]

_Rule = TypeVar("_Rule", bound=Layout)


def without_rows(layout: _Rule, reason: str) -> _Rule:
    """Return a rule that knows the weight alone: which axis is what, but not what it multiplies.

    Args:
        layout: A rule.
        reason: Why, for reports.

    Returns:
        A rule of a subclass of the same type.
    """
    cls = _OwnAttention if isinstance(layout, AttentionLayout) else _Rowless
    return cast(_Rule, _derived(type(layout), cls, vars(layout) | {"missing_rows": reason}))


def watched(layout: _Rule, child: str | None = None) -> _Rule:
    """Return a rule that finds the rows in the layer's own forward, by running it once more under a `Watch`.

    Args:
        layout: The rule of the base class, or of a child.
        child: The attribute of the child whose weight the module's forward uses; None for the module's own.

    Returns:
        A rule of a subclass of the same type; one without rows if it is not known how to read the calls that multiply
        such a weight.
    """
    if not layout.has_rows:
        return layout
    if _reader_of(type(layout)) is not None:
        mixin = _WatchedConv if isinstance(layout, (ConvLayout, ConvTransposeLayout)) else Watched
        return cast(_Rule, _derived(type(layout), mixin, vars(layout) | {"child": child}))
    return without_rows(layout, "its class overrides the forward that its rule is for (see register_layout)")


_CLASSES: dict[tuple[type[Layout], type[Layout]], type[Layout]] = {}


def _class_of(kind: type[Layout], mixin: type[_Variant]) -> type[Layout]:
    if (kind, mixin) not in _CLASSES:
        name = f"{mixin.__name__.strip('_')}{kind.__name__}"
        _CLASSES[kind, mixin] = type(name, (mixin, kind), {"family": kind.family, "kept": (kind, mixin)})
    return _CLASSES[kind, mixin]


def _derived(kind: type[Layout], mixin: type[_Variant], attributes: dict[str, Any]) -> Layout:
    made = object.__new__(_class_of(kind, mixin))
    made.__dict__.update(attributes)
    return made


class _Variant(Layout):
    """A rule of another class with some methods replaced; made by `_derived`, also out of a pickle."""

    kept: ClassVar[tuple[type[Layout], type[_Variant]]]

    def __reduce__(self) -> tuple[Any, ...]:
        return _derived, (*self.kept, vars(self))


class _Rowless(_Variant):
    """Knows no rows."""

    has_rows = False
    rows = Layout.rows


class _OwnAttention(_Rowless, AttentionLayout):
    """Attention whose class does something of its own: none of its weights' inputs are known."""

    has_rows = False

    def of_weight(self, name: str) -> Layout:
        """Return a rule without rows."""
        return without_rows(super().of_weight(name), self.missing_rows)

    def adopted(self, module: nn.Module) -> Mapping[str, Layout]:
        """Adopt the output projection, likewise."""
        return {name: without_rows(rule, self.missing_rows) for name, rule in super().adopted(module).items()}


class Watched(_Variant):
    """Finds its inputs in what the forward multiplies the weight with."""

    child: str | None
    reruns = True
    output_rows = Layout.output_rows  # what the layer returns need not be the product

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs | None:
        """Run the forward once more, and take what the weight is multiplied with.

        This costs one forward on the steps that take statistics. Buffers, attributes and random numbers are afterwards
        as before.

        Raises:
            UnknownInputError: If the forward uses the weight otherwise.
        """
        seen = self.seen(module, args, kwargs)
        return None if seen is None else seen[0]

    def seen(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Inputs, Tensor] | None:
        """Return `inputs`, and the weight that is multiplied with them, as the forward made it from the layer's."""
        if not can_be_moved(module):
            raise UnknownInputError("its forward was replaced by a function")
        twin = twin_of(module)
        layer = twin if self.child is None else getattr(twin, self.child)
        compute_parametrizations(layer)
        (name, bias_name), *_ = self.weights(layer)
        weight = nn.Parameter(cast(Tensor, layer._parameters[name]).detach())
        layer._parameters[name] = weight
        bias = layer._parameters.get(bias_name) if bias_name else None
        if bias_name and bias is not None and bias.requires_grad:
            bias = layer._parameters[bias_name] = nn.Parameter(bias.detach())
        else:
            bias = None
        reading = _reader_of(type(self))
        assert reading is not None
        functions, read = reading
        axis = -1 if self.kind == "norm" else (0 if self.one_hot else self.output_axis)
        watch = Watch(weight, bias, axis, functions, by_elements=self.one_hot)
        try:
            outputs = run_twin(twin, args, kwargs, weight.device, watch)
        except UnknownInputError:
            raise
        except Exception as error:
            found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UnknownInputError(f"its forward does not run a second time ({found})") from error
        products = watch.trained(outputs)
        if products is None or not watch.products:
            called = " or ".join(dict.fromkeys(_name(function) for function in functions))
            what = "weight or bias" if bias is not None else "weight"
            raise UnknownInputError(f"its forward uses its {what} otherwise than in {called}")
        if not products:
            return None
        used = products[0]
        return read(self, layer, products), used.copy.detach().mT if used.transposed else used.copy.detach()


class _WatchedConv(Watched):
    """A convolution whose inputs come padded, and for a transposed one spread out."""

    def padded(self, module: nn.Module, *inputs: Any) -> Tensor:
        """Return what `inputs` found."""
        return cast(Tensor, inputs[0])

    def rows(self, module: nn.Module, inputs: Tensor, *further: Any) -> Rows:
        """Lay out the patches."""
        return patch_rows(inputs, cast(Window, self.window(module)))


def _name(function: Any) -> str:
    name: str = function.__name__
    return {"__getitem__": "an index", "__matmul__": "matmul"}.get(name, name)


# readers: from the calls of a function to the arguments of `rows` -----------------------------------------------------


def _read_linear(layout: Layout, module: nn.Module, products: list[Product]) -> Inputs:
    for product in products:
        transposed = product.transposed
        if product.function is F.linear:
            transposed = not transposed
        # `input @ weight` has inputs on the weight's first axis.
        if transposed == isinstance(layout, TransposedLinearLayout):
            raise UnknownInputError("its forward multiplies the weight from the other side")
    return (_joined([product.given["input"] for product in products], 1),)


def _read_conv(layout: Layout, module: nn.Module, products: list[Product]) -> Inputs:
    window = layout.window(module)
    assert window is not None
    found = []
    for product in products:
        given, axes = product.given, len(window.size)
        stride, dilation = (_each(given.get(name, 1), axes) for name in ("stride", "dilation"))
        if (stride, dilation, given.get("groups", 1)) != (window.stride, window.dilation, window.groups):
            raise UnknownInputError("its forward convolves with another stride, dilation or groups than the layer has")
        padding = given.get("padding", 0)
        batch = with_batch_axis(given["input"], axes)
        padding = padding if isinstance(padding, str) else _each(padding, axes)
        found.append(F.pad(batch, pads_of(window.size, dilation, padding)))
    return (_stacked(found),)


def _read_conv_transpose(layout: Layout, module: nn.Module, products: list[Product]) -> Inputs:
    window = layout.window(module)
    assert window is not None
    found = []
    for product in products:
        given, axes = product.given, len(window.size)
        stride, padding, extra, dilation = (
            _each(given.get(name, default), axes)
            for name, default in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))
        )
        if (dilation, given.get("groups", 1)) != (window.dilation, window.groups):
            raise UnknownInputError("its forward convolves with another dilation or groups than the layer has")
        batch = with_batch_axis(given["input"], axes)
        found.append(spread_out(batch, window.size, stride, padding, extra, dilation))
    return (_stacked(found),)


def _read_bilinear(layout: Layout, module: nn.Module, products: list[Product]) -> Inputs:
    pairs = [(product.given["input1"], product.given["input2"]) for product in products]
    return _joined([first for first, _ in pairs], 1), _joined([second for _, second in pairs], 1)


def _read_embedding(layout: Layout, module: nn.Module, products: list[Product]) -> Inputs:
    table = cast(nn.Embedding, module)
    found = []
    for product in products:
        given = product.given
        if product.function is F.embedding:
            tokens, padding = given["input"], given.get("padding_idx")
            padding = padding % table.num_embeddings if padding is not None else None
        else:
            tokens, padding = _indexed(given["index"], table), None
        if padding != table.padding_idx:
            raise UnknownInputError(f"its forward takes {padding} for its padding, the layer {table.padding_idx}")
        found.append(tokens)
    return (found[0] if len(found) == 1 else torch.cat([tokens.reshape(-1) for tokens in found]),)


def _indexed(index: Any, table: nn.Embedding) -> Tensor:
    """Return the tokens whose vectors an index takes out of a table."""
    if isinstance(index, tuple):
        index, *rest = index
        if any(part is not Ellipsis and part != slice(None) for part in rest) or index is Ellipsis:
            raise UnknownInputError("its forward takes parts of vectors out of its table")
    return torch.arange(table.num_embeddings, device=table.weight.device)[index]


def _read_layer_norm(layout: Layout, module: nn.Module, products: list[Product]) -> Inputs:
    norm = cast(nn.LayerNorm, module)
    root = isinstance(module, nn.RMSNorm)
    shape = tuple(norm.normalized_shape)
    for product in products:
        eps = product.given.get("eps", None if root else 1e-5)
        if (product.function is F.layer_norm) == root or tuple(product.given["normalized_shape"]) != shape:
            raise UnknownInputError("its forward normalizes something else than the layer says")
        if eps != norm.eps:
            raise UnknownInputError(f"its forward normalizes with eps={eps}, the layer has {norm.eps}")
    return (_joined([product.given["input"] for product in products], len(shape)),)


def _read_group_norm(layout: Layout, module: nn.Module, products: list[Product]) -> Inputs:
    norm = cast(nn.GroupNorm, module)
    for product in products:
        given = product.given
        if (given["num_groups"], given.get("eps", 1e-5)) != (norm.num_groups, norm.eps):
            raise UnknownInputError("its forward normalizes with other groups or another eps than the layer has")
    return (_stacked([product.given["input"] for product in products]),)


def _joined(inputs: list[Tensor], axes: int) -> Tensor:
    """Join rows of several calls: their last axes are a row's."""
    if len(inputs) == 1:
        return inputs[0]
    return torch.cat([value.reshape(-1, *value.shape[value.dim() - axes :]) for value in inputs])


def _stacked(inputs: list[Tensor]) -> Tensor:
    """Join the samples of several calls."""
    if len({value.shape[1:] for value in inputs}) > 1:
        raise UnknownInputError("its forward uses its weight several times, on inputs of different sizes")
    return inputs[0] if len(inputs) == 1 else torch.cat(inputs)


def _each(value: Any, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes if len(value) == 1 else 1)


_READERS: tuple[tuple[type[Layout], tuple[Any, ...], Reader], ...] = (
    (TransposedLinearLayout, (F.linear, torch.addmm, *MATMULS), _read_linear),
    (LinearLayout, (F.linear, torch.addmm, *MATMULS), _read_linear),
    (ConvLayout, (F.conv1d, F.conv2d, F.conv3d), _read_conv),
    (ConvTransposeLayout, (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _read_conv_transpose),
    (BilinearLayout, (F.bilinear,), _read_bilinear),
    (EmbeddingLayout, (F.embedding, Tensor.__getitem__), _read_embedding),
    (LayerNormLayout, (F.layer_norm, F.rms_norm, torch.rms_norm), _read_layer_norm),
    (GroupNormLayout, (F.group_norm,), _read_group_norm),
)


def _reader_of(kind: type[Layout]) -> tuple[tuple[Any, ...], Reader] | None:
    """Return the functions that multiply such a rule's weight, and what reads their calls; None if not known."""
    for known, functions, reader in _READERS:
        if issubclass(kind, known) and kind.family.rows is known.rows:
            return functions, reader
    return None
