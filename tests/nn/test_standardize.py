"""Weight standardization, against loops over output units, and timm's layer."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize

from wellcond.layouts import ConvLayout, NormLayout, find_layers, register_layout
from wellcond.nn.standardize import WeightStandardization, weight_standardize

FLOAT64 = torch.float64
EPS = 1e-3  # large enough to be seen


def close(actual: object, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def standardized(values: Tensor, eps: float) -> Tensor:
    """One unit's inputs, by the formula."""
    flat = [float(value) for value in values.flatten()]
    mean = sum(flat) / len(flat)
    var = sum((value - mean) ** 2 for value in flat) / len(flat)
    result = torch.tensor([(value - mean) / math.sqrt(var + eps) for value in flat], dtype=FLOAT64)
    return result.view(values.shape)


def units_first(weight: Tensor) -> Tensor:
    return torch.stack([standardized(unit, EPS) for unit in weight])


def units_second(weight: Tensor, groups: int) -> Tensor:
    """ConvTranspose: (in, out/groups, *kernel); a unit's inputs are those of its own group."""
    result, each = torch.empty_like(weight), weight.shape[0] // groups
    for group in range(groups):
        rows = slice(group * each, (group + 1) * each)
        for unit in range(weight.shape[1]):
            result[rows, unit] = standardized(weight[rows, unit], EPS)
    return result


LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), "weight", units_first),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), "weight", units_first),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2)), "weight", units_first),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), "weight", units_first),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), "weight", units_first),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), "weight", units_first),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 2), "weight", lambda w: units_second(w, 1)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), "weight", lambda w: units_second(w, 2)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 2, 1, groups=2), "weight", lambda w: units_second(w, 2)),
    "embedding": (lambda: nn.Embedding(7, 3), "weight", lambda w: units_first(w.T).T),
    "bilinear": (lambda: nn.Bilinear(2, 3, 4), "weight", units_first),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", units_first),
    "attention, apart": (lambda: nn.MultiheadAttention(4, 2, kdim=3), "k_proj_weight", units_first),
    "recurrent": (lambda: nn.GRUCell(3, 2), "weight_ih", units_first),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_unit_has_mean_zero_and_variance_one(name: str) -> None:
    make, attribute, reference = LAYERS[name]
    layer = make().double()
    before = getattr(layer, attribute)
    assert weight_standardize(layer, attribute, EPS) is layer
    after = getattr(layer, attribute)
    close(after, reference(before.detach()))
    assert after.shape == before.shape
    assert getattr(layer.parametrizations, attribute).original is before  # what an optimizer holds
    assert [name for name, _ in layer.named_parameters() if "original" in name] == [
        f"parametrizations.{attribute}.original"
    ]


def test_the_layer_computes_with_it() -> None:
    layer = weight_standardize(nn.Conv2d(3, 4, 3, stride=2, padding=1, dtype=FLOAT64), eps=EPS)
    x = torch.randn(2, 3, 7, 7, dtype=FLOAT64)
    original = layer.parametrizations.weight.original
    close(layer(x), F.conv2d(x, units_first(original.detach()), layer.bias, 2, 1))
    layer(x).square().sum().backward()
    # ŵ depends neither on the mean of w nor, but for ε, on its scale.
    close(original.grad.sum((1, 2, 3)), torch.zeros(4), 1e-10)


@pytest.mark.parametrize("name", ["conv2d grouped", "transposed grouped", "embedding"])
def test_gradients(name: str) -> None:
    make, attribute, _ = LAYERS[name]
    layer = weight_standardize(make().double(), attribute, EPS)
    (step,) = layer.parametrizations[attribute]
    weight = layer.parametrizations[attribute].original.detach().requires_grad_()
    assert torch.autograd.gradcheck(step, weight)
    assert torch.autograd.gradgradcheck(step, weight)


def test_as_timm() -> None:
    """timm: biased variance, ε inside the root, 1e-6."""
    std_conv = pytest.importorskip("timm.layers.std_conv")
    theirs = std_conv.StdConv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=True).double()
    ours = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2).double()
    ours.load_state_dict(theirs.state_dict())
    weight_standardize(ours, eps=1e-6)
    x = torch.randn(2, 4, 6, 6, dtype=FLOAT64)
    close(ours(x), theirs(x))
    ours(x).sin().sum().backward()
    theirs(x).sin().sum().backward()
    close(ours.parametrizations.weight.original.grad, theirs.weight.grad, 1e-10)
    close(ours.bias.grad, theirs.bias.grad, 1e-10)


def test_the_papers_code_differs_by_a_factor() -> None:
    """Its standard deviation is unbiased, and ε outside; as ε goes to 0, ŵ is smaller by √((n − 1)/n)."""
    layer = nn.Conv2d(3, 4, 3, dtype=FLOAT64)
    weight = layer.weight.detach().clone()
    weight_standardize(layer, eps=1e-14)
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    theirs = centred / weight.flatten(1).std(1).view(-1, 1, 1, 1)
    close(theirs, layer.weight * math.sqrt(26 / 27), 1e-10)


@pytest.mark.parametrize("leave", [True, False])
def test_can_be_removed(leave: bool) -> None:
    layer = nn.Linear(4, 3, dtype=FLOAT64)
    plain = layer.weight.detach().clone()
    weight_standardize(layer)
    standardized_weight = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=leave)
    assert type(layer) is nn.Linear
    close(layer.weight, standardized_weight if leave else plain)
    assert isinstance(layer.weight, nn.Parameter)


def test_state_copies_and_assignment() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3, groups=2))
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            weight_standardize(module)
    x = torch.randn(2, 3, 5, 5)
    expected = net(x)
    other = copy.deepcopy(net)
    close(other(x), expected)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    close(other(x), expected)  # a copy of its own
    net.load_state_dict(other.state_dict())
    close(net(x), expected)
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(net)  # torch's rule for all parametrized modules
    pickle.loads(pickle.dumps(net[0].parametrizations.weight[0]))
    value = torch.randn(4, 3, 3, 3)
    net[0].weight = value
    close(net[0].parametrizations.weight.original, value)
    assert "WeightStandardization(eps=1e-05)" in repr(net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_float32_statistics(dtype: torch.dtype) -> None:
    """Of 1 + a few rounding errors, a mean rounded to half precision would be far off."""
    torch.manual_seed(0)
    spread = 4 * torch.finfo(dtype).eps
    layer = nn.Linear(16, 3)
    with torch.no_grad():
        layer.weight.copy_(1 + spread * torch.randn(3, 16))
    layer = layer.to(dtype)
    stored = layer.weight.detach()
    expected = torch.stack([standardized(unit, 1e-9) for unit in stored.double()])
    weight_standardize(layer, eps=1e-9)
    assert layer.weight.dtype == dtype
    close(layer.weight, expected.to(dtype), torch.finfo(dtype).eps)
    in_half = (stored - stored.mean(1, keepdim=True)) / stored.std(1, correction=0, keepdim=True)
    assert (in_half - expected).abs().max() > 5 * torch.finfo(dtype).eps


def test_casts_with_the_model() -> None:
    layer = weight_standardize(nn.Linear(4, 3))
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert layer.double()(torch.randn(2, 4, dtype=FLOAT64)).dtype == FLOAT64
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(torch.randn(2, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["conv2d grouped", "transposed grouped"])
def test_compiles(name: str) -> None:
    torch._dynamo.reset()
    make, _, _ = LAYERS[name]
    layer = weight_standardize(make())
    x = torch.randn(2, layer.in_channels, 6, 6)
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(3):
        close(compiled(x), layer(x), 1e-6)
        with torch.no_grad():
            layer.parametrizations.weight.original.normal_()
    assert counter.frame_count == 1


def test_exports() -> None:
    layer = weight_standardize(nn.Conv2d(4, 6, 3, groups=2)).eval()
    x = torch.randn(2, 4, 6, 6)
    close(torch.export.export(layer, (x,)).module()(x), layer(x), 1e-6)


def test_the_library_still_knows_the_layer() -> None:
    layer = weight_standardize(nn.Conv2d(3, 4, 3))
    (known,) = find_layers(layer).known
    assert known.weight is layer.parametrizations.weight.original
    assert not find_layers(layer).unknown
    assert isinstance(known.layout, ConvLayout)


def test_beside_another_parametrization() -> None:
    layer = nn.Linear(4, 3, dtype=FLOAT64)
    nn.utils.parametrizations.orthogonal(layer)
    orthogonal = layer.weight.detach().clone()
    weight_standardize(layer, eps=EPS)
    close(layer.weight, units_first(orthogonal))


def test_mistakes_are_named() -> None:
    with pytest.raises(TypeError, match="no layout is known for ReLU: see wellcond.layouts.register_layout"):
        weight_standardize(nn.ReLU())
    with pytest.raises(ValueError, match=r"name must be one of the weights \['weight'\] of Linear, got 'bias'"):
        weight_standardize(nn.Linear(3, 2), "bias")
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        weight_standardize(nn.Linear(3, 2), eps=0)
    with pytest.raises(ValueError, match="eps must be positive, got nan"):
        weight_standardize(nn.Linear(3, 2), eps=math.nan)
    for layer in (nn.Conv2d(4, 4, 1, groups=4), nn.Linear(1, 3), nn.BatchNorm2d(3), nn.LayerNorm(3)):
        with pytest.raises(ValueError, match="each output unit of weight must have at least 2 inputs, got 1: "):
            weight_standardize(layer)
        assert not parametrize.is_parametrized(layer)
    with pytest.raises(ValueError, match=r"name must be one of the weights \[\] of BatchNorm2d, got 'weight'"):
        weight_standardize(nn.BatchNorm2d(3, affine=False))
    with pytest.raises(ValueError, match="weight is not initialized yet"):
        weight_standardize(nn.LazyLinear(3))
    twice = weight_standardize(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="weight is standardized already"):
        weight_standardize(twice)
    assert len(twice.parametrizations.weight) == 1
    with pytest.raises(ValueError, match=r"of Linear, got 'wieght'"):
        weight_standardize(twice, "wieght")


def test_a_registered_layout_is_asked() -> None:
    """A layer whose output units lie along its last axis."""

    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3, dtype=FLOAT64))

    class ReversedLayout(NormLayout):
        output_axis = 1

        def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
            return weight.mT.unsqueeze(0)

    register_layout(Reversed, ReversedLayout())
    layer = Reversed()
    before = layer.weight.detach().clone()
    weight_standardize(layer, eps=EPS)
    close(layer.weight, units_first(before.T).T)
    assert isinstance(layer.parametrizations.weight[0], WeightStandardization)
