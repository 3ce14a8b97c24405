"""See what a forward of unknown code does with a weight: which inputs it multiplies, and with what of the weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class UnknownInputError(Exception):
    """Raised by a rule's `inputs` where a call does not tell what a weight multiplies; the message says why.

    Nothing is raised in the forward pass: the layer keeps its plain gradient, and the report quotes the message.
    """


class Mark(Enum):
    """The relation of a tensor to the weight.

    SAME: the weight, plus something that does not depend on it, in whatever dtype and view. SCALED: each output unit's
    row of it times and plus a number (standardized, normalized). TRANSPOSED: one of both, with its two axes exchanged.
    ELEMENT: something else that each of its elements depends on by the weight's element there, and by its unit's row.
    UNIT: a number for each output unit, or a single one.
    """

    SAME = auto()
    SCALED = auto()
    TRANSPOSED = auto()
    ELEMENT = auto()
    UNIT = auto()


@dataclass(frozen=True)
class Product:
    """One call of a function that multiplies the weight with something.

    Attributes:
        function: The function.
        given: Its arguments by name.
        copy: What it was given in the place of the weight.
        transposed: Whether the weight was handed over with its axes exchanged.
    """

    function: Callable[..., Any]
    given: Mapping[str, Any]
    copy: Tensor
    transposed: bool = False


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_MATMUL = ("input", "weight")
MATMULS: tuple[Any, ...] = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)

PRODUCTS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONV),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _CONV_TRANSPOSE),
    F.bilinear: ("input1", "input2", "weight", "bias"),
    F.embedding: ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    torch.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    **dict.fromkeys(MATMULS, _MATMUL),
    torch.addmm: ("bias", "input", "weight"),
    Tensor.__getitem__: ("weight", "index"),
}
"""Functions that multiply a weight, with the names of their arguments."""

# By name, since each is a function and a method, and some are operators.
_CASTS = frozenset(("to", "type", "type_as", "float", "half", "bfloat16", "double", "clone", "contiguous"))
_VIEWS = frozenset(("view", "reshape", "reshape_as", "view_as", "flatten", "unflatten", "squeeze", "unsqueeze"))
_EXPANSIONS = frozenset(("expand", "expand_as", "broadcast_to"))
_TRANSPOSITIONS = frozenset(("t", "T", "mT", "H", "mH", "transpose", "swapaxes", "permute"))
_FACTORS = frozenset(("mul", "multiply", "div", "divide", "true_divide"))
_SUMS = frozenset(("add", "sub", "subtract", "rsub"))
_REDUCTIONS = {"mean": 1, "sum": 1, "std": 1, "var": 1, "amax": 1, "amin": 1, "norm": 2, "vector_norm": 2}
_PAIRED_REDUCTIONS = {"var_mean": 1, "std_mean": 1}
_OF_ELEMENTS = frozenset(
    (
        *("abs", "square", "pow", "sqrt", "rsqrt", "reciprocal", "exp", "log", "tanh", "sigmoid", "sign"),
        *("clamp", "clamp_min", "clamp_max", "round", "relu", "neg"),
    )
)
_WRITING = frozenset(
    (
        *("__setitem__", "data.set", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__"),
        *("__iand__", "__ior__", "__ixor__", "__imod__", "__ifloordiv__", "__ilshift__", "__irshift__"),
    )
)
_FAKE_QUANTIZATIONS = frozenset(
    ("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine", "fused_moving_avg_obs_fake_quant")
)


class Watch(TorchFunctionMode):
    """While it is entered: note the products of a weight, and keep track of what is made from it.

    The weight, and the bias, of a product are replaced by copies outside of the graph: what still depends on the
    weight then uses it otherwise (`used_otherwise`).

    Args:
        weight: A leaf that requires a gradient.
        bias: The bias, likewise; None if there is none, or it is of no interest.
        output_axis: Of the weight, or -1 where each of its elements is a unit.
        functions: Those of `PRODUCTS` whose calls are understood.
        by_elements: Whether what is multiplied may depend on the weight element by element in any way: the rows of a
            table, each looked up by itself.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        output_axis: int,
        functions: Iterable[Any],
        *,
        by_elements: bool = False,
    ) -> None:
        super().__init__()
        self._functions = frozenset(functions)
        self.products: list[Product] = []
        self.wrote = False
        self._weight, self._bias = weight, bias
        self._units = weight.shape[output_axis] if output_axis >= 0 else weight.numel()
        self._output_axis = output_axis
        usable = (Mark.SAME, Mark.SCALED, Mark.TRANSPOSED)
        self._usable = (*usable, Mark.ELEMENT) if by_elements else usable
        self._guarded = {_storage(tensor) for tensor in (weight, bias) if tensor is not None}
        self._marks: dict[int, tuple[Tensor, Mark]] = {}  # the tensor is kept, so that its `id` stays its own
        self._set(weight, Mark.SAME)
        self._biases: dict[int, Tensor] = {} if bias is None else {id(bias): bias}

    def trained(self, outputs: Any) -> list[Product] | None:
        """Return the products through which outputs depend on the weight.

        Args:
            outputs: What the forward returned.

        Returns:
            The products whose gradient can arrive; None if outputs depend on the weight, or the bias, otherwise too.
        """
        leaves = [leaf for leaf in (self._weight, self._bias) if leaf is not None]
        if self.wrote:
            return None
        reached = _leaves_behind([leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)])
        if any(id(leaf) in reached for leaf in leaves):
            return None
        return [product for product in self.products if id(product.copy) in reached]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do what was called; note products, and what is made from the weight."""
        kwargs = dict(kwargs or {})
        if func in self._functions:
            given = dict(zip(PRODUCTS[func], args, strict=False)) | kwargs
            mark = self._mark_of(given.get("weight"))
            if mark in self._usable and self._is_product(func, given):
                return self._multiply(func, given, mark)
        name = _name_of(func)
        written = _written(name, args, kwargs)
        if written is not None:
            self._forbid_writing(written)
        result = func(*args, **kwargs)
        of_weight = any(self._mark_of(value) for value in (*args, *kwargs.values()))
        made = self._marks_of_results(name.removesuffix("_"), args, kwargs, result) if of_weight else []
        if written is not None:
            self._forget_views_of(written)
        for tensor, mark in made:
            self._set(tensor, mark)
        if name in _CASTS and isinstance(result, Tensor) and args and id(args[0]) in self._biases:
            self._biases[id(result)] = result
        return result

    # products -------------------------------------------------------------------------------------------------------

    def _is_product(self, func: Any, given: Mapping[str, Any]) -> bool:
        weight = given["weight"]
        gets_gradient = weight.requires_grad and torch.is_grad_enabled()
        shape = self._weight.shape
        if self._mark_of(weight) is Mark.TRANSPOSED:
            shape = shape[::-1]
        # A weight that stands on the left is not multiplied with rows.
        apart = self._mark_of(given.get("input")) is None
        return gets_gradient and weight.shape == shape and apart

    def _multiply(self, func: Any, given: dict[str, Any], mark: Mark | None) -> Any:
        weight = given["weight"].detach().requires_grad_()
        self.products.append(Product(func, given, weight, mark is Mark.TRANSPOSED))
        given = {**given, "weight": weight}
        bias = given.get("bias")
        if isinstance(bias, Tensor) and id(bias) in self._biases and bias.requires_grad:
            given["bias"] = bias.detach().requires_grad_()
        if func is F.embedding:
            given |= {"sparse": False, "max_norm": None}  # a norm's bound would be written into the weight
        names = PRODUCTS[func]
        first = names[: next((i for i, name in enumerate(names) if name not in given), len(names))]
        return func(*(given[name] for name in first), **{k: v for k, v in given.items() if k not in first})

    # what is made from the weight -----------------------------------------------------------------------------------

    def _mark_of(self, value: Any) -> Mark | None:
        found = self._marks.get(id(value)) if isinstance(value, Tensor) else None
        return None if found is None else found[1]

    def _set(self, tensor: Tensor, mark: Mark | None) -> None:
        if mark is None:
            self._marks.pop(id(tensor), None)
        else:
            self._marks[id(tensor)] = tensor, mark

    def _marks_of_results(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> list[tuple[Tensor, Mark | None]]:
        """Say what the results of a call have to do with the weight; what has no gradient is a constant."""
        parts = [part for part in (result if isinstance(result, tuple) else (result,)) if isinstance(part, Tensor)]
        others = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if any(self._mark_of(value) is None and self._depends_on_weight(value) for value in others):
            return [(part, None) for part in parts]
        if name in _PAIRED_REDUCTIONS:
            return [(part, self._reduced(_PAIRED_REDUCTIONS[name], args, kwargs, part)) for part in parts]
        return [(part, self._mark_made(name, args, kwargs, part) if part.requires_grad else None) for part in parts]

    def _depends_on_weight(self, tensor: Tensor) -> bool:
        return id(self._weight) in _leaves_behind([tensor])

    def _mark_made(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> Mark | None:
        """Say what a function's result has to do with the weight; None: nothing that is understood."""
        first = args[0] if args else kwargs.get("input")
        mark = self._mark_of(first)
        if name in _FACTORS or name in _SUMS:
            return self._combined(name, args, result)
        if mark is None:
            return None
        assert isinstance(first, Tensor)
        if name in _CASTS:
            return mark
        if name in _VIEWS:
            return None if mark is Mark.TRANSPOSED else mark
        if name in _EXPANSIONS:
            return mark if mark is Mark.UNIT else None
        if name in _TRANSPOSITIONS:
            plain = mark in (Mark.SAME, Mark.SCALED) and first.dim() == 2 and first.shape == self._weight.shape
            exchanged = result.stride() == first.stride()[::-1] and result.shape == first.shape[::-1]
            return Mark.TRANSPOSED if plain and exchanged and first.stride(0) != first.stride(1) else None
        if name in _OF_ELEMENTS:
            return Mark.UNIT if mark is Mark.UNIT else Mark.ELEMENT
        if name in _REDUCTIONS:
            return self._reduced(_REDUCTIONS[name], args, kwargs, result)
        if mark in (Mark.SAME, Mark.SCALED):
            return self._normalized(name, args, kwargs, first)
        return None

    def _combined(self, name: str, args: Sequence[Any], result: Tensor) -> Mark | None:
        """Say what a sum, difference, product or quotient is."""
        first, second = (*args, None, None)[:2]
        marks = {self._mark_of(first), self._mark_of(second)} - {None}
        if Mark.TRANSPOSED in marks:
            return None
        if marks == {Mark.UNIT}:
            return Mark.UNIT if result.numel() in (1, self._units) else None
        kept = first if self._mark_of(first) not in (None, Mark.UNIT) else second
        other = second if kept is first else first
        if not isinstance(kept, Tensor) or result.shape != kept.shape:
            return None
        mark, theirs = self._mark_of(kept), self._mark_of(other)
        if mark is Mark.ELEMENT or theirs is Mark.ELEMENT:
            return Mark.ELEMENT
        if theirs in (Mark.SAME, Mark.SCALED):
            return Mark.SCALED if name in _SUMS else Mark.ELEMENT
        if name in _SUMS:
            if theirs is None:
                return mark if name != "rsub" and kept is first else Mark.SCALED
            return Mark.SCALED if self._is_uniform(other, kept) else Mark.ELEMENT
        if name not in ("mul", "multiply") and kept is not first:
            return Mark.ELEMENT  # something divided by the weight
        return Mark.SCALED if self._is_uniform(other, kept) else Mark.ELEMENT

    def _input_axes(self, tensor: Tensor) -> list[int] | None:
        """Return the axes that count inputs of a tensor of the weight's shape, or of a view; None if not known."""
        if tensor.shape == self._weight.shape:
            return [axis for axis in range(tensor.dim()) if axis != self._output_axis and self._output_axis >= 0]
        if self._output_axis == 0 and tensor.dim() > 0 and tensor.shape[0] == self._units:
            return list(range(1, tensor.dim()))
        return None

    def _is_uniform(self, other: Any, kept: Tensor) -> bool:
        """Whether a factor or summand is one number for all inputs of a unit."""
        if not isinstance(other, Tensor) or other.numel() == 1:
            return True
        axes = self._input_axes(kept)
        if axes is None:
            return False
        offset = kept.dim() - other.dim()
        along = [axis - offset for axis in axes if axis >= offset]
        return all(other.shape[axis] == 1 or other.stride(axis) == 0 for axis in along)

    def _reduced(self, place: int, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> Mark | None:
        """Say what a mean, norm, … is: a number for each unit if it goes over all of its inputs."""
        tensor = args[0] if args else kwargs.get("input")
        if not isinstance(tensor, Tensor):
            return None
        if result.numel() == 1:
            return Mark.UNIT
        if self._mark_of(tensor) is Mark.UNIT:
            return None
        dims = kwargs.get("dim", kwargs.get("axis", args[place] if len(args) > place else None))
        axes = self._input_axes(tensor)
        if axes is None and tensor.dim() > 0 and tensor.shape[0] == self._units and self._output_axis == 0:
            axes = list(range(1, tensor.dim()))
        if dims is None or isinstance(dims, bool) or axes is None:
            return None
        over = {dim % tensor.dim() for dim in ([dims] if isinstance(dims, int) else dims)}
        if not over <= set(axes):
            return None
        rest = [axis for axis in axes if axis not in over and tensor.shape[axis] > 1]
        # What still varies along some inputs can be reduced further, if no axis was dropped.
        return Mark.UNIT if not rest else (Mark.ELEMENT if result.dim() == tensor.dim() else None)

    def _normalized(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], first: Tensor) -> Mark | None:
        """Say what functions make of the weight that normalize each unit's row."""
        axes = self._input_axes(first)
        if name == "normalize":
            dims = kwargs.get("dim", args[2] if len(args) > 2 else 1)
            over = {dim % first.dim() for dim in ([dims] if isinstance(dims, int) else dims)}
            if axes is None:
                return None
            return Mark.SCALED if over == set(axes) else Mark.ELEMENT
        if name == "batch_norm":
            by_unit = self._output_axis == 0 and first.dim() > 1 and tuple(first.shape[:2]) == (1, self._units)
            running = (*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var"))
            return Mark.SCALED if by_unit and not any(isinstance(value, Tensor) for value in running) else None
        if name == "_weight_norm":
            return Mark.SCALED if kwargs.get("dim", (*args, 0)[2]) == self._output_axis else None
        if name in _FAKE_QUANTIZATIONS:
            return Mark.SCALED
        return None

    # writing --------------------------------------------------------------------------------------------------------

    def _forbid_writing(self, target: Tensor) -> None:
        if _storage(target) in self._guarded:
            self.wrote = True
            raise UnknownInputError("its forward writes to its weight")

    def _forget_views_of(self, target: Tensor) -> None:
        place = _storage(target)
        for tensor, _ in list(self._marks.values()):
            if _storage(tensor) == place:
                self._set(tensor, None)


def _leaves_behind(tensors: Sequence[Tensor]) -> set[int]:
    """Return the ``id`` of each tensor given, and of each leaf that one of them depends on."""
    reached = {id(tensor) for tensor in tensors}
    nodes = [tensor.grad_fn for tensor in tensors]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reached.add(id(getattr(node, "variable", None)))
        nodes += [following for following, _ in node.next_functions]
    return reached


def _name_of(func: Any) -> str:
    """Return a function's name; of a property that is read, the property's."""
    name: str = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return getattr(getattr(func, "__self__", None), "__name__", "") + ("" if name == "__get__" else ".set")
    return name.split(".")[0]


def _written(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor that a call writes to, or None."""
    out = kwargs.get("out")
    if isinstance(out, Tensor):
        return out
    method = name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "retain_grad_")
    if not (method or name in _WRITING):
        return None
    target = args[0] if args else next(iter(kwargs.values()), None)
    return target if isinstance(target, Tensor) else None


def _storage(tensor: Tensor) -> Any:
    """Return what tells one storage from another."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # without storage of its own: nested, DTensor, sparse
        return id(tensor)
