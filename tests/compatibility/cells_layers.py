"""Layer types: every torch.nn layer with weights, and what people make of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from by_hand import assert_equal, whitened, whitening
from cells import attach, cell, reason_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import wellcond

AREA = "Layer types"
ROWS = "the gradient against the formula over rows that are found by differentiating the output by the weight"
PLAIN = "the gradient, bit for bit as without transforms"
Matrix = Callable[[Tensor], Tensor]


def as_rows(weight: Tensor) -> Tensor:
    """View a weight whose first axis is the output unit as [1, out, in]."""
    return weight.flatten(1)[None]


def in_groups(groups: int) -> Matrix:
    """Return the view of a convolution's weight as [groups, out, in]."""
    return lambda weight: weight.flatten(1).unflatten(0, (groups, -1))


def transposed(groups: int) -> Matrix:
    """Return the view of a transposed convolution's weight as [groups, out, in · taps]."""
    return lambda weight: weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Kind:
    """A layer whose output is linear in its weight.

    Attributes:
        make: Makes it.
        inputs: Shapes of its inputs; or the tokens.
        matrix: Views its weight as [groups, out, in].
        channels: Which axis of the output counts the output units.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    matrix: Matrix = as_rows
    channels: int = 1


KINDS: dict[str, Kind] = {
    "Linear": Kind(lambda: nn.Linear(4, 3), ((6, 4),)),
    "Linear(bias=False), inputs of 3 axes": Kind(lambda: nn.Linear(4, 3, bias=False), ((2, 3, 4),), channels=2),
    "Bilinear": Kind(lambda: nn.Bilinear(3, 2, 3), ((9, 3), (9, 2))),
    "Conv1d": Kind(lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), ((3, 2, 7),)),
    "Conv2d": Kind(lambda: nn.Conv2d(2, 3, (2, 3), dilation=(1, 2), padding="same"), ((2, 2, 4, 5),)),
    "Conv2d(groups=2)": Kind(lambda: nn.Conv2d(4, 6, 2, groups=2), ((3, 4, 4, 4),), in_groups(2)),
    "Conv2d(padding_mode='circular')": Kind(
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), ((2, 2, 4, 4),)
    ),
    "Conv3d": Kind(lambda: nn.Conv3d(2, 2, 2), ((2, 2, 3, 3, 3),)),
    "ConvTranspose1d": Kind(lambda: nn.ConvTranspose1d(3, 2, 3, stride=2), ((3, 3, 4),), transposed(1)),
    "ConvTranspose2d(groups=2)": Kind(lambda: nn.ConvTranspose2d(4, 4, 2, groups=2), ((2, 4, 3, 3),), transposed(2)),
    "ConvTranspose3d": Kind(lambda: nn.ConvTranspose3d(2, 2, 2), ((2, 2, 2, 2, 3),), transposed(1)),
    "Embedding": Kind(lambda: nn.Embedding(5, 3), (torch.tensor([0, 1, 1, 2, 3, 3, 3, 4]),), lambda w: w.T[None]),
    "Embedding(padding_idx=0)": Kind(
        lambda: nn.Embedding(5, 3, padding_idx=0), (torch.tensor([0, 1, 1, 2, 3, 3, 3, 4]),), lambda w: w.T[None]
    ),
    "LazyLinear": Kind(lambda: nn.LazyLinear(3), ((6, 4),)),
    "LazyConv2d": Kind(lambda: nn.LazyConv2d(3, 2), ((3, 2, 4, 4),)),
    "LazyConv1d": Kind(lambda: nn.LazyConv1d(3, 2), ((3, 2, 5),)),
    "LazyConv3d": Kind(lambda: nn.LazyConv3d(2, 2), ((2, 2, 3, 3, 3),)),
    "LazyConvTranspose1d": Kind(lambda: nn.LazyConvTranspose1d(2, 3), ((3, 3, 4),), transposed(1)),
    "LazyConvTranspose2d": Kind(lambda: nn.LazyConvTranspose2d(2, 2), ((2, 3, 3, 3),), transposed(1)),
    "LazyConvTranspose3d": Kind(lambda: nn.LazyConvTranspose3d(2, 2), ((2, 2, 2, 2, 3),), transposed(1)),
}


def numbers(given: Any, seed: int = 0) -> Tensor:
    """Return inputs of a shape, or tokens as they are."""
    if isinstance(given, Tensor):
        return given
    x = torch.randn(given, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * torch.linspace(0.3, 2.0, given[-1], dtype=torch.float64) + 0.3


def backward(model: nn.Module, *inputs: Tensor) -> None:
    """Make gradients of no particular form."""
    model.zero_grad()
    output = model(*inputs)
    output = output[0] if isinstance(output, tuple) else output
    (output.sin() * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all gradients."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, *inputs: Tensor, **options: Any) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """Attach, do one step, and return the handle and the gradients before and after."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*covers none of the weights", wellcond.WellcondWarning)
        handle = attach(optimizer, model, whitening(**options))
    backward(model, *inputs)
    before = gradients(model)
    optimizer.step()
    return handle, before, gradients(model)


def rows_of(layer: nn.Module, inputs: tuple[Tensor, ...], kind: Kind) -> Tensor:
    """Differentiate the output by the weight: of unit o's outputs by row o of the weight these are the input's rows."""
    weight, bias = layer.weight.detach(), getattr(layer, "bias", None)
    given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias.detach()}
    derivatives = torch.func.jacrev(lambda values: torch.func.functional_call(layer, values, inputs))(given)
    groups, units = kind.matrix(weight).shape[:2]
    # [elements of the output of a unit, …] per group: its first unit stands for all.
    found = []
    for group in range(groups):
        of_unit = derivatives["weight"].movedim(kind.channels, 0)[group * units].flatten(0, -weight.dim() - 1)
        rows = torch.stack([kind.matrix(d)[group, 0] for d in of_unit])
        if bias is not None:
            of_bias = derivatives["bias"].movedim(kind.channels, 0)[group * units].flatten(0, -2)[:, group * units]
            rows = torch.cat([rows, of_bias[:, None]], dim=1)
        found.append(rows)
    return torch.stack(found)


def check_kind(kind: Kind) -> None:
    """Compare a layer's gradient after a step with the formula."""
    layer = kind.make().double()
    inputs = tuple(numbers(given, seed) for seed, given in enumerate(kind.inputs))
    with torch.no_grad():
        layer(*inputs)
    _, before, after = step(layer, *inputs)
    rows = rows_of(layer, inputs, kind)
    joint = {}
    for name, found in (("before", before), ("after", after)):
        matrix = kind.matrix(found["weight"])
        if "bias" in found:
            matrix = torch.cat([matrix, found["bias"].view(*matrix.shape[:2], 1)], dim=2)
        joint[name] = matrix
    assert_equal([joint["after"]], [whitened(joint["before"], rows)], 1e-7, "gradient")
    assert not torch.allclose(joint["after"], joint["before"], rtol=1e-2)


for name, kind in KINDS.items():
    cell(AREA, name, verified=ROWS)(lambda kind=kind: check_kind(kind))


def lazily(kind: Kind) -> None:
    """A lazy layer that is attached before its first pass is whitened from its first training pass on."""
    layer = kind.make().double()
    inputs = tuple(numbers(given) for given in kind.inputs)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    attach(optimizer, layer, whitening())
    backward(layer, *inputs)
    before = gradients(layer)
    optimizer.step()
    rows = rows_of(layer, inputs, kind)
    matrices = [
        torch.cat([kind.matrix(each["weight"]), each["bias"].view(1, -1, 1)], dim=2)
        for each in (before, gradients(layer))
    ]
    assert_equal(matrices[1:], [whitened(matrices[0], rows)], 1e-7, "gradient")


cell(AREA, "LazyLinear, attached before its first pass", verified=ROWS)(lambda: lazily(KINDS["LazyLinear"]))


@cell(
    AREA,
    "MultiheadAttention",
    verified="each projection's gradient against the formula over query, key, value and context",
)
def attention() -> None:
    layer = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
    query, key, value = (numbers((2, 3, 4), seed) for seed in range(3))
    seen: dict[str, Tensor] = {}
    handle, before, after = step(layer, query, key, value)
    with torch.no_grad():
        projections = F.linear
        weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
        q, k, v = (projections(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        heads = [each.unflatten(-1, (2, 2)).transpose(1, 2) for each in (q, k, v)]
        context = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        seen["out_proj"] = context
    flat = [torch.cat([x.flatten(0, 1), x.new_ones(6, 1)], dim=1) for x in (query, key, value, seen["out_proj"])]
    joint = torch.cat([before["in_proj_weight"], before["in_proj_bias"][:, None]], dim=1).unflatten(0, (3, 4))
    changed = whitened(joint, torch.stack(flat[:3])).flatten(0, 1)
    assert_equal([after["in_proj_weight"], after["in_proj_bias"]], [changed[:, :-1], changed[:, -1]], 1e-7, "in_proj")
    joint = torch.cat([before["out_proj.weight"], before["out_proj.bias"][:, None]], dim=1)[None]
    changed = whitened(joint, flat[3][None])[0]
    assert_equal(
        [after["out_proj.weight"], after["out_proj.bias"]], [changed[:, :-1], changed[:, -1]], 1e-7, "out_proj"
    )
    assert handle.stats()["whitening"]["weights"] == 2


def recurrent(kind: Any, of_cells: bool) -> None:
    """Compare a recurrent layer's gradients with the formula over its inputs and its hidden states."""
    layer = kind(3, 4).double()
    inputs = numbers((5, 3) if of_cells else (5, 2, 3))
    _, before, after = step(layer, inputs)
    states = inputs.new_zeros(5, 4)
    if not of_cells:
        with torch.no_grad():
            states = torch.cat([inputs.new_zeros(1, 2, 4), layer(inputs)[0][:-1]])
    suffix = "" if of_cells else "_l0"
    for which, rows in (("ih", inputs), ("hh", states)):
        rows = F.pad(rows.flatten(0, -2), (0, 1), value=1.0)[None]
        weight, bias = f"weight_{which}{suffix}", f"bias_{which}{suffix}"
        joint = torch.cat([before[weight], before[bias][:, None]], dim=1)[None]
        changed = whitened(joint, rows)[0]
        assert_equal([after[weight], after[bias]], [changed[:, :-1], changed[:, -1]], 1e-7, weight)


RECURRENT = (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)

for recurrent_kind in RECURRENT:

    @cell(
        AREA,
        recurrent_kind.__name__,
        verified="each weight's gradient against the formula over inputs, or over hidden states of the step before",
    )
    def recurrent_cell(kind: Any = recurrent_kind) -> None:
        recurrent(kind, "Cell" in kind.__name__)


def plain(layer: nn.Module, *inputs: Tensor, name: str = "", handle_only: bool = False) -> str:
    """Check that a layer's gradients stay as they are, and return the reason that the report gives."""
    handle, before, after = step(layer, *inputs)
    name = name or next(n for n, _ in layer.named_parameters())
    for key, gradient in before.items():
        row = next(row for row in handle.coverage()["whitening"] if row.name == key)
        if row.state_bytes is None and "together with" not in row.how:
            assert torch.equal(gradient, after[key]), f"{key} is reported as '{row.how}', but its gradient was changed"
    return reason_of(handle, name)


def floats(*shape: int) -> Tensor:
    """Return inputs."""
    return numbers(shape)


IMAGES = (4, 6, 3, 3)
PLAIN_LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "EmbeddingBag": (lambda: nn.EmbeddingBag(5, 3), (torch.tensor([[0, 1], [2, 2]]),)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), (floats(4, 6),)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), (floats(*IMAGES),)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(6), (floats(*IMAGES, 2),)),
    "InstanceNorm1d(affine=True)": (lambda: nn.InstanceNorm1d(6, affine=True), (floats(4, 6, 3),)),
    "InstanceNorm2d(affine=True)": (lambda: nn.InstanceNorm2d(6, affine=True), (floats(*IMAGES),)),
    "InstanceNorm3d(affine=True)": (lambda: nn.InstanceNorm3d(6, affine=True), (floats(*IMAGES, 2),)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (floats(*IMAGES),)),
    "LayerNorm": (lambda: nn.LayerNorm(6), (floats(4, 6),)),
    "RMSNorm": (lambda: nn.RMSNorm(6), (floats(4, 6),)),
    "PReLU": (lambda: nn.PReLU(6), (floats(4, 6),)),
    "LazyBatchNorm2d": (lambda: nn.LazyBatchNorm2d(), (floats(*IMAGES),)),
}
for name, (make, inputs) in PLAIN_LAYERS.items():

    def program(make: Callable[[], nn.Module] = make, inputs: tuple[Tensor, ...] = inputs) -> str:
        layer = make().double()
        if "Lazy" in type(layer).__name__:
            layer(*inputs)
        return plain(layer, *inputs)

    cell(AREA, name, "plain gradient", verified=PLAIN)(program)


@cell(
    AREA,
    "LayerNorm, GroupNorm, RMSNorm under norm_layers=True",
    verified="the gradient against the formula over (x̂, 1) of each channel, for LayerNorm and GroupNorm",
)
def norm_layers() -> None:
    for layer, x in ((nn.LayerNorm(6), floats(5, 6)), (nn.GroupNorm(2, 6), floats(*IMAGES))):
        layer = layer.double()
        _, before, after = step(layer, x, norm_layers=True)
        with torch.no_grad():
            layer.weight.fill_(1.0)
            layer.bias.zero_()
            hat = layer(x).movedim(1, 0).flatten(1)
        rows = torch.stack([hat, torch.ones_like(hat)], dim=-1)
        joint = torch.stack([before["weight"], before["bias"]], dim=1)[:, None]
        changed = whitened(joint, rows)[:, 0]
        assert_equal([after["weight"], after["bias"]], list(changed.unbind(1)), 1e-7, type(layer).__name__)
    step(nn.RMSNorm(6).double(), floats(5, 6), norm_layers=True)


# what people make of layers -----------------------------------------------------------------------------------------


class Padded(nn.Conv2d):
    """Pads its input itself, as timm's Conv2dSame."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (1, 1, 1, 1)))


class Positions(nn.Embedding):
    """Makes its own positions, as BART's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.arange(input.shape[-1]) // 2 + 2)


class OnNormalized(nn.Linear):
    """Normalizes its input first."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input, dim=-1), self.weight, self.bias)


class ChannelsFirst(nn.LayerNorm):
    """Normalizes the second axis, as timm's LayerNorm2d."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Renamed(nn.Linear):
    """Only has another name."""


SUBCLASSES: dict[str, Kind] = {
    "a subclass of Conv2d with its own padding": Kind(lambda: Padded(2, 3, 3), ((2, 2, 4, 4),)),
    "a subclass of Embedding with its own positions": Kind(
        lambda: Positions(9, 3), (torch.tensor([50, 60, 70, 80, 90]),), lambda w: w.T[None]
    ),
    "a subclass of Linear that normalizes its input": Kind(lambda: OnNormalized(4, 3), ((5, 4),)),
    "a subclass without a forward of its own": Kind(lambda: Renamed(4, 3), ((6, 4),)),
}
for name, kind in SUBCLASSES.items():
    cell(AREA, name, verified=ROWS)(lambda kind=kind: check_kind(kind))

cell(AREA, "a subclass of LayerNorm over another axis", "plain gradient", verified=PLAIN)(
    lambda: plain(ChannelsFirst(6).double(), floats(*IMAGES))
)


@cell(
    AREA,
    "timm Conv2dSame",
    verified="the gradient against the formula over padded inputs",
)
def conv_same() -> None:
    from timm.layers import Conv2dSame

    layer = Conv2dSame(2, 3, 3, stride=2).double()
    x = floats(2, 2, 5, 5)
    _, before, after = step(layer, x)
    rows = rows_of(layer, (x,), Kind(lambda: layer, ()))
    joint = [torch.cat([as_rows(each["weight"]), each["bias"].view(1, -1, 1)], dim=2) for each in (before, after)]
    assert_equal([joint[1]], [whitened(joint[0], rows)], 1e-7, "gradient")


class Functional(nn.Module):
    """Uses a layer's weight without calling the layer, as Swin's and BEiT's qkv."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.qkv.bias)


@cell(
    AREA,
    "F.linear(x, layer.weight): the layer is never called",
    "plain gradient",
    verified="the gradient, bit for bit as without transforms; the report and a warning say so",
)
def functional() -> str:
    model = Functional().double()
    x = floats(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = attach(optimizer, model, whitening())
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always", wellcond.WellcondWarning)
        for _ in range(2):
            backward(model, x)
            before = gradients(model)
            optimizer.step()
    after = gradients(model)
    assert torch.equal(before["qkv.weight"], after["qkv.weight"])
    row = handle.coverage()["whitening"][0]
    assert row.how.startswith("plain gradient: its module is never called"), f"reported as '{row.how}' all the same"
    return str(record[0].message)


@cell(AREA, "a layer type of your own", "plain gradient", verified=PLAIN)
def unknown() -> str:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    return plain(Own().double(), floats(5, 4))


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@cell(AREA, "a parametrized weight", verified="the original's gradient against the formula")
def parametrized() -> None:
    layer = nn.Linear(4, 3, bias=False).double()
    parametrize.register_parametrization(layer, "weight", Doubled())
    x = floats(6, 4)
    _, before, after = step(layer, x)
    name = "parametrizations.weight.original"
    assert_equal([after[name]], [whitened(before[name][None], x[None])[0]], 1e-7, "gradient")


@cell(AREA, "parametrizations.weight_norm", "plain gradient", verified=PLAIN)
def weight_norm() -> str:
    layer = parametrizations.weight_norm(nn.Linear(4, 3).double())
    return plain(layer, floats(5, 4), name="parametrizations.weight.original0")


@cell(AREA, "prune.l1_unstructured", "plain gradient", verified=PLAIN)
def pruned() -> str:
    layer = nn.Linear(4, 3).double()
    prune.l1_unstructured(layer, "weight", 0.5)
    return plain(layer, floats(5, 4), name="weight_orig")


@cell(AREA, "one weight used by two layers", verified="the gradient against the formula over both layers' rows")
def tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
    model[2].weight = model[0].weight
    x = floats(6, 4)
    _, before, after = step(model, x)
    with torch.no_grad():
        rows = torch.cat([x, model[:2](x)])
    assert_equal([after["0.weight"]], [whitened(before["0.weight"][None], rows[None])[0]], 1e-7, "gradient")


def layers_of_torch() -> set[str]:
    """Return the names of torch.nn's layers that have weights, and whose forward is their own."""
    # Containers of other layers, abstract bases, a loss, and what needs CUDA and several processes.
    others = {"Transformer", "TransformerEncoder", "TransformerDecoder", "TransformerEncoderLayer"}
    others |= {"TransformerDecoderLayer", "AdaptiveLogSoftmaxWithLoss", "RNNBase", "RNNCellBase", "SyncBatchNorm"}
    names = set()
    for name in nn.modules.__all__:
        kind = getattr(nn, name)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)) or name in others:
            continue
        codes = [getattr(vars(base).get("__init__"), "__code__", None) for base in kind.__mro__]
        used = {word for code in codes if code is not None for word in code.co_names}
        if used & {"Parameter", "UninitializedParameter"}:
            names.add(name)
    return names
