"""Layouts: rows times weights is the layer's own output; rows of `matrix` are output units; unknown types are named."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pairs import parametrize_pairs
from wellcond.layouts import Layout, NormLayout, find_layers, layout_of, register_layout, registry

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@pytest.fixture
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the rules a test registers."""
    monkeypatch.setattr(registry, "_LAYOUTS", dict(registry._LAYOUTS))


def product(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Compute W_g x for every group g and row x, and add the bias: [n, all outputs], group by group."""
    layout = layout_of(layer)
    assert layout is not None
    rows = layout.rows(layer, inputs)
    weights = layout.matrix(layer, layer.weight).flatten(2)
    assert rows.dim() == 3
    assert weights.shape[0] == rows.shape[0]
    assert weights.shape[2] == rows.shape[2]
    out = torch.cat([rows[g] @ weights[g].mT for g in range(rows.shape[0])], dim=1)
    return out if layer.bias is None else out + layer.bias


def as_rows(output: Tensor, channel_axis: int) -> Tensor:
    """Lay an output out as [samples · positions, channels]."""
    return output.movedim(channel_axis, -1).flatten(0, -2)


# rows × weights = outputs -------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    leading=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    bias=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_linear_rows_times_weight_is_the_output(
    seed: int, leading: list[int], sizes: tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(*sizes, bias=bias).double()
    inputs = torch.randn(*leading, sizes[0], dtype=torch.float64)
    expected = layer(inputs).reshape(-1, sizes[1])
    torch.testing.assert_close(product(layer, inputs), expected, rtol=1e-12, atol=1e-12)


@st.composite
def conv_cases(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    spatial = draw(st.integers(1, 3))
    per_axis = {"min_size": spatial, "max_size": spatial}
    kernel = draw(st.lists(st.integers(1, 3 if spatial == 3 else 4), **per_axis))
    dilation = draw(st.lists(st.integers(1, 2 if spatial == 3 else 3), **per_axis))
    stride = draw(st.lists(st.integers(1, 3), **per_axis))
    padding: str | tuple[int, ...] = draw(
        st.one_of(st.sampled_from(["same", "valid"]), st.lists(st.integers(0, 3), **per_axis).map(tuple))
    )
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    if padding == "same":
        stride = [1] * spatial
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    depthwise = draw(st.booleans())
    channels = groups * (1 if depthwise else draw(st.integers(1, 3)))
    outputs = groups * draw(st.integers(1, 3))
    space = draw(st.lists(st.integers(3, 6 if spatial == 3 else 9), **per_axis))
    batch = draw(st.sampled_from([None, 1, 2, 3]))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if padding == "same":
        pads = [(r + 1) // 2 for r in reach]
        total = reach
    elif padding == "valid":
        pads, total = [0] * spatial, [0] * spatial
    else:
        assert isinstance(padding, tuple)
        pads, total = list(padding), [2 * p for p in padding]
    for size, pad, both, r in zip(space, pads, total, reach, strict=True):
        assume(size + both >= r + 1)
        assume(mode == "zeros" or pad < size)
    layer = CONVS[spatial](
        channels,
        outputs,
        tuple(kernel),
        stride=tuple(stride),
        padding=padding,
        dilation=tuple(dilation),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=torch.float64,
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = (channels, *space) if batch is None else (batch, channels, *space)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer, torch.randn(shape, generator=generator, dtype=torch.float64)


@given(conv_cases())
@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
def test_conv_rows_times_weight_is_the_output(case: tuple[nn.Module, Tensor]) -> None:
    layer, inputs = case
    output = layer(inputs)
    expected = as_rows(output, -1 - len(layer.kernel_size))
    torch.testing.assert_close(product(layer, inputs), expected, rtol=1e-11, atol=1e-11)


@parametrize_pairs(
    ("mode", ["zeros", "reflect", "replicate", "circular"]),
    ("spatial", [1, 2, 3]),
    ("kernel, dilation", [(2, 1), (3, 2), (4, 1), (2, 3)]),
)
def test_same_padding_with_even_kernels_and_dilation(spatial: int, mode: str, kernel: int, dilation: int) -> None:
    """An odd total is padded one more on the far side; a mistake there shifts every row."""
    torch.manual_seed(0)
    layer = CONVS[spatial](
        2, 4, kernel, padding="same", dilation=dilation, groups=2, padding_mode=mode, dtype=torch.float64
    )
    inputs = torch.randn(2, 2, *[7] * spatial, dtype=torch.float64)
    torch.testing.assert_close(product(layer, inputs), as_rows(layer(inputs), 1), rtol=1e-12, atol=1e-12)


def test_conv_rows_against_explicit_loops() -> None:
    """Patch by patch: channel outermost, then kernel row, then kernel column; padding counted by hand."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 2, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, dtype=torch.float64)
    inputs = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    rows = layout_of(layer).rows(layer, inputs)
    height, width = (5 + 2 - 1 - 1) // 2 + 1, 6 + 4 - 4 - 1 + 1
    assert rows.shape == (2, 3 * height * width, 2 * 2 * 3)
    for group, sample, top, left in itertools.product(range(2), range(3), range(height), range(width)):
        patch = []
        for channel, i, j in itertools.product(range(2), range(2), range(3)):
            y, x = 2 * top + i - 1, left + 2 * j - 2
            inside = 0 <= y < 5 and 0 <= x < 6
            patch.append(float(inputs[sample, 2 * group + channel, y, x]) if inside else 0.0)
        row = rows[group, (sample * height + top) * width + left]
        assert row.tolist() == patch


@pytest.mark.parametrize("spatial", [2, 3])
def test_channels_last_memory_changes_nothing(spatial: int) -> None:
    torch.manual_seed(0)
    memory_format = {2: torch.channels_last, 3: torch.channels_last_3d}[spatial]
    layer = CONVS[spatial](4, 6, 3, padding=1, groups=2, dtype=torch.float64).to(memory_format=memory_format)
    inputs = torch.randn(2, 4, *[5] * spatial, dtype=torch.float64).to(memory_format=memory_format)
    assert not layer.weight.is_contiguous()
    torch.testing.assert_close(product(layer, inputs), as_rows(layer(inputs), 1), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        layout_of(layer).matrix(layer, layer.weight)[1, 2].fill_(7.0)
    assert bool((layer.weight[5] == 7.0).all())
    assert not bool((layer.weight[:5] == 7.0).any())


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_zero_element_batches_have_no_rows(mode: str) -> None:
    for spatial, make in CONVS.items():
        layer = make(4, 6, 3, padding=1, groups=2, padding_mode=mode)
        rows = layout_of(layer).rows(layer, torch.zeros(0, 4, *[5] * spatial))
        assert rows.shape == (2, 0, 2 * 3**spatial)
    linear = nn.Linear(3, 2)
    assert layout_of(linear).rows(linear, torch.zeros(0, 5, 3)).shape == (1, 0, 3)


# the output axis ----------------------------------------------------------------------------------------------------


def linear_layers() -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Layers that map an input to output channels at axis 1 (or −1): layer, weight name, input."""
    found: dict[str, tuple[nn.Module, str, Tensor]] = {"linear": (nn.Linear(3, 4), "weight", torch.randn(5, 3))}
    for spatial, groups in itertools.product((1, 2, 3), (1, 2)):
        space = [4] * spatial
        conv = CONVS[spatial](4, 6, 3, groups=groups)
        found[f"conv{spatial}d, {groups} groups"] = conv, "weight", torch.randn(2, 4, *space)
        transposed = TRANSPOSED[spatial](4, 6, 3, stride=2, groups=groups)
        found[f"conv_transpose{spatial}d, {groups} groups"] = transposed, "weight", torch.randn(2, 4, *space)
    return found


@pytest.mark.parametrize("name", list(linear_layers()))
def test_a_row_of_the_matrix_belongs_to_exactly_one_output_channel(name: str) -> None:
    torch.manual_seed(0)
    layer, _, inputs = linear_layers()[name]
    layer.double()
    inputs = inputs.double()
    layout = layout_of(layer)
    assert layout is not None
    with torch.no_grad():
        before = layer(inputs)
        groups, out = layout.matrix(layer, layer.weight).shape[:2]
        assert groups * out == before.shape[1]
        for group, unit in itertools.product(range(groups), range(out)):
            layout.matrix(layer, layer.weight)[group, unit] += 1.0
            changed = (layer(inputs) != before).transpose(0, 1).flatten(1).any(dim=1)
            assert changed.nonzero().flatten().tolist() == [group * out + unit]
            layout.matrix(layer, layer.weight)[group, unit] -= 1.0
            before = layer(inputs)


@pytest.mark.parametrize("name", list(linear_layers()))
def test_the_matrix_is_a_view_of_every_weight_element(name: str) -> None:
    layer, attribute, _ = linear_layers()[name]
    weight = getattr(layer, attribute)
    matrix = layout_of(layer).matrix(layer, weight)
    assert matrix.numel() == weight.numel()
    with torch.no_grad():
        matrix.copy_(torch.arange(matrix.numel(), dtype=weight.dtype).view(matrix.shape))
    assert sorted(weight.flatten().tolist()) == list(range(weight.numel()))


def test_bilinear_rows_are_output_units() -> None:
    layer = nn.Bilinear(3, 4, 5, dtype=torch.float64)
    a, b = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    matrix = layout_of(layer).matrix(layer, layer.weight)
    assert matrix.shape == (1, 5, 3, 4)
    before = layer(a, b)
    with torch.no_grad():
        matrix[0, 3] += 1.0
    assert (layer(a, b) != before).any(dim=0).tolist() == [False, False, False, True, False]


def test_embedding_rows_are_the_features_of_every_token() -> None:
    for layer in (nn.Embedding(7, 3), nn.EmbeddingBag(7, 3)):
        matrix = layout_of(layer).matrix(layer, layer.weight)
        assert matrix.shape == (1, 3, 7)
        with torch.no_grad():
            matrix[0, 1] = 9.0
        assert bool((layer.weight[:, 1] == 9.0).all())
        assert not bool((layer.weight[:, [0, 2]] == 9.0).any())
        assert layout_of(layer).kind == "embedding"


@pytest.mark.parametrize("separate", [False, True])
def test_attention_projections_have_one_row_per_projected_feature(separate: bool) -> None:
    torch.manual_seed(0)
    options = {"kdim": 5, "vdim": 3} if separate else {}
    layer = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64, **options)
    found = {found.name: found for found in find_layers(layer)}
    packed = {"in_proj_weight": (3, 4, 4)}
    apart = {"q_proj_weight": (1, 4, 4), "k_proj_weight": (1, 4, 5), "v_proj_weight": (1, 4, 3)}
    assert set(found) == {*(apart if separate else packed), "out_proj.weight"}
    for name, shape in (apart if separate else packed).items():
        matrix = found[name].matrix(found[name].weight)
        assert matrix.shape == shape
        assert matrix.untyped_storage().data_ptr() == found[name].weight.untyped_storage().data_ptr()
        # The last group's unit 1 is row 1 of the last projection.
        unit = 4 * (shape[0] - 1) + 1
        with torch.no_grad():
            matrix[-1, 1] = 3.0
        assert bool((found[name].weight[unit] == 3.0).all())
        assert not bool((found[name].weight[unit - 1] == 3.0).any())
    assert find_layers(layer).unknown == {}


@pytest.mark.parametrize("separate", [False, True])
def test_attention_biases_stand_beside_their_own_projection(separate: bool) -> None:
    """One packed bias for three projections: each sees its third, query first."""
    layer = nn.MultiheadAttention(4, 2, **({"kdim": 5, "vdim": 3} if separate else {}))
    found = {found.name: found for found in find_layers(layer)}
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight") if separate else ("in_proj_weight",)
    thirds = [found[name].bias_matrix(layer.in_proj_bias) for name in names]
    with torch.no_grad():
        for index, third in enumerate(thirds):
            assert third.shape == ((1, 4) if separate else (3, 4))
            third.copy_(torch.arange(third.numel()).view_as(third) + 4 * index)
    assert layer.in_proj_bias.tolist() == list(range(12))
    assert found["out_proj.weight"].bias is layer.out_proj.bias
    assert all(layer.bias is None for layer in find_layers(nn.MultiheadAttention(4, 2, bias=False)))


@pytest.mark.parametrize("name", ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"])
def test_attention_rows_are_query_key_and_value(name: str) -> None:
    torch.manual_seed(0)
    options = {} if name == "in_proj_weight" else {"kdim": 5, "vdim": 3}
    attention = nn.MultiheadAttention(4, 2, **options)
    layer = next(found for found in find_layers(attention) if found.name == name)
    query, key = torch.randn(3, 2, 4), torch.randn(6, 2, attention.kdim)
    value = torch.randn(6, 2, attention.vdim)
    inputs = layer.inputs((query, key), {"value": value, "need_weights": False})
    assert inputs is not None
    rows = layer.rows(*inputs)
    expected = {"q_proj_weight": [query], "k_proj_weight": [key], "v_proj_weight": [value]}.get(
        name, [query, key, value]
    )
    assert len(rows) == len(expected)
    for found, fed in zip(rows, expected, strict=True):
        assert torch.equal(found, fed.reshape(-1, fed.shape[-1]))
    assert layer.inputs((query,), {"key": key}) is None


def test_attention_adopts_its_output_projection() -> None:
    """The output projection's own forward never runs: its parent's is watched in its place."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "apart": nn.Linear(4, 4)})
    found = {layer.name: layer for layer in find_layers(model)}
    adopted = found["attention.out_proj.weight"]
    assert adopted.called is model["attention"]
    assert adopted.module is model["attention"].out_proj
    assert adopted.layout.has_rows
    assert found["apart.weight"].called is model["apart"]
    assert found["attention.in_proj_weight"].called is model["attention"]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_output_projection_rows_times_weight_is_the_attentions_output(batch_first: bool, dropout: float) -> None:
    """Also with dropout: rows are made with the very random numbers that the forward draws after them."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, dropout=dropout, batch_first=batch_first, dtype=torch.float64)
    layer = next(found for found in find_layers(attention) if found.name == "out_proj.weight")
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    torch.manual_seed(1)
    inputs = layer.inputs((x, x, x), {"need_weights": False})
    assert inputs is not None
    output, _ = attention(x, x, x, need_weights=False)
    torch.testing.assert_close(
        (layer.rows(*inputs)[0] @ attention.out_proj.weight.mT + attention.out_proj.bias).view(3, 5, 6),
        output,
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells_have_one_row_per_gate_unit(cell: type[nn.Module]) -> None:
    layer = cell(3, 4)
    found = {found.name: found for found in find_layers(layer)}
    assert {name: layer.bias_name for name, layer in found.items()} == {"weight_ih": "bias_ih", "weight_hh": "bias_hh"}
    gates = layer.weight_ih.shape[0]
    assert found["weight_ih"].matrix(layer.weight_ih).shape == (1, gates, 3)
    assert found["weight_hh"].matrix(layer.weight_hh).shape == (1, gates, 4)
    with torch.no_grad():
        found["weight_ih"].matrix(layer.weight_ih)[0, gates - 1] = 5.0
    assert bool((layer.weight_ih[gates - 1] == 5.0).all())


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_list_every_weight_with_its_own_bias(make: type[nn.Module]) -> None:
    layer = make(3, 4, num_layers=2, bidirectional=True)
    found = {found.name: found.bias_name for found in find_layers(layer)}
    assert len(found) == 8
    for name, bias_name in found.items():
        assert bias_name == name.replace("weight", "bias")
    assert find_layers(layer).unknown == {}
    without = make(3, 4, bias=False)
    assert [found.bias for found in find_layers(without)] == [None, None]


def test_lstm_with_projections_names_every_weight() -> None:
    layer = nn.LSTM(3, 4, proj_size=2)
    assert {found.name for found in find_layers(layer)} == {"weight_ih_l0", "weight_hh_l0", "weight_hr_l0"}
    assert {found.name: found.bias_name for found in find_layers(layer)}["weight_hr_l0"] is None


# norms, subclasses, own rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm1d(4, affine=True),
        nn.InstanceNorm2d(4, affine=True),
        nn.InstanceNorm3d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.LayerNorm([4, 3]),
        nn.RMSNorm(4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_norm_layers_are_norms(layer: nn.Module) -> None:
    (found,) = find_layers(layer)
    assert found.layout.kind == "norm"
    assert found.weight is layer.weight
    assert find_layers(layer).unknown == {}
    matrix = found.matrix(layer.weight)
    assert matrix.numel() == layer.weight.numel()
    assert math.prod(matrix.shape[2:]) == 1


def test_norms_without_affine_have_nothing_to_list() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.LayerNorm(4, elementwise_affine=False))
    assert list(find_layers(model)) == []
    assert find_layers(model).unknown == {}


def test_a_subclass_has_its_nearest_base_classs_rule(clean_registry: None) -> None:
    class Own(nn.Conv2d):
        pass

    class OwnOfOwn(Own):
        pass

    assert layout_of(OwnOfOwn(2, 2, 3)) is layout_of(nn.Conv2d(2, 2, 3))
    rule = NormLayout()
    register_layout(Own, rule)
    assert layout_of(OwnOfOwn(2, 2, 3)) is rule
    assert layout_of(nn.Conv2d(2, 2, 3)) is not rule


def test_a_registered_rule_is_used_and_a_later_one_replaces_it(clean_registry: None) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 8, 1, 1))

    class First(Layout):
        kind = "norm"

    model = nn.Sequential(Scale())
    assert find_layers(model).unknown == {"0.weight": "Scale"}
    register_layout(Scale, First())
    (found,) = find_layers(model)
    assert isinstance(found.layout, First)
    assert find_layers(model).unknown == {}
    register_layout(Scale, NormLayout())
    (found,) = find_layers(model)
    assert isinstance(found.layout, NormLayout)


@pytest.mark.parametrize("module_type", [nn.Linear(2, 2), int, "Linear", None])
def test_registering_something_that_is_no_module_type_is_refused(module_type: object) -> None:
    with pytest.raises(TypeError, match="module_type"):
        register_layout(module_type, NormLayout())


@pytest.mark.parametrize("layout", [NormLayout, None, "norm"])
def test_registering_something_that_is_no_layout_is_refused(layout: object) -> None:
    with pytest.raises(TypeError, match="layout"):
        register_layout(nn.Linear, layout)


# find_layers --------------------------------------------------------------------------------------------------------


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 8, 1, 1))
        self.offset = nn.Parameter(torch.zeros(8))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), Gate(), nn.PReLU(), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 2)


def test_unknown_parameters_are_named_with_their_modules_type() -> None:
    found = find_layers(Net())
    assert [layer.name for layer in found] == ["body.0.weight", "body.3.weight", "head.weight"]
    assert [layer.bias_name for layer in found] == ["body.0.bias", "body.3.bias", "head.bias"]
    assert [layer.module_name for layer in found] == ["body.0", "body.3", "head"]
    assert found.unknown == {
        "token": "Net",
        "body.1.weight": "Gate",
        "body.1.offset": "Gate",
        "body.2.weight": "PReLU",
    }


def test_an_extra_matrix_inside_a_known_layer_is_named_too() -> None:
    class LowRank(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.adapter = nn.Parameter(torch.zeros(4, 2))

    assert find_layers(nn.Sequential(LowRank())).unknown == {"0.adapter": "LowRank"}


def test_a_layer_at_the_root_has_plain_names() -> None:
    (found,) = find_layers(nn.Linear(3, 2, bias=False))
    assert (found.name, found.module_name, found.bias, found.bias_name) == ("weight", "", None, None)


def test_weights_shared_by_two_modules_are_listed_for_each() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    assert [layer.name for layer in find_layers(nn.Sequential(first, second))] == ["0.weight", "1.weight"]


def test_old_weight_norm_is_named_not_guessed() -> None:
    with pytest.warns(FutureWarning):
        layer = torch.nn.utils.weight_norm(nn.Linear(4, 3))
    found = find_layers(nn.Sequential(layer))
    assert list(found) == []
    assert {"0.weight_g", "0.weight_v"} <= set(found.unknown)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class SumOfTwo(nn.Module):
    """A parametrization that starts from two parameters."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first + second

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight / 2, weight / 2


class Masked(nn.Module):
    """A parametrization that has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.ones(3, 4))
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, weight: Tensor) -> Tensor:
        return self.inner(weight * self.mask)


def test_a_parametrized_layers_weight_is_what_its_parametrization_starts_from() -> None:
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    spectral = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 3))
    halved = nn.Linear(4, 3)
    parametrize.register_parametrization(halved, "weight", Half())
    parametrize.register_parametrization(halved, "bias", Half())
    found = find_layers(nn.Sequential(normed, spectral, halved))
    assert [layer.name for layer in found] == [
        "0.parametrizations.weight.original1",
        "1.parametrizations.weight.original",
        "2.parametrizations.weight.original",
    ]
    assert [layer.bias_name for layer in found] == ["0.bias", "1.bias", "2.parametrizations.bias.original"]
    starts = [normed.parametrizations.weight.original1, spectral.parametrizations.weight.original]
    assert [layer.weight for layer in found][:2] == starts
    assert found.known[2].bias is halved.parametrizations.bias.original
    assert [tuple(layer.matrix_shape) for layer in found] == [(1, 3, 4), (1, 3, 3, 3, 3), (1, 3, 4)]
    assert set(found.unknown) == {"0.parametrizations.weight.original0"}
    assert "WeightNorm" in found.unknown["0.parametrizations.weight.original0"]


def test_other_parameters_of_a_parametrization_are_named_not_guessed() -> None:
    summed, masked = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    parametrize.register_parametrization(summed, "weight", SumOfTwo())
    parametrize.register_parametrization(masked, "weight", Masked())
    found = find_layers(nn.Sequential(summed, masked))
    assert [layer.name for layer in found] == ["1.parametrizations.weight.original"]
    assert found.unknown == {
        "0.parametrizations.weight.original0": "SumOfTwo",
        "0.parametrizations.weight.original1": "SumOfTwo",
        "1.parametrizations.weight.0.mask": "Masked",
        "1.parametrizations.weight.0.inner.weight": "Masked",
    }


def test_a_parametrization_that_starts_from_another_shape_is_named_not_guessed() -> None:
    """Rows of an input have nothing to say about a vector that a matrix is made of."""

    class Diagonal(nn.Module):
        def forward(self, vector: Tensor) -> Tensor:
            return torch.diag(vector)

        def right_inverse(self, weight: Tensor) -> Tensor:
            return weight.diagonal()

    layer = nn.Linear(3, 3, bias=False)
    parametrize.register_parametrization(layer, "weight", Diagonal(), unsafe=True)
    found = find_layers(layer)
    assert found.known == []
    assert found.unknown == {"parametrizations.weight.original": "Diagonal"}


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(3), lambda: nn.LazyConv2d(3, 3), nn.LazyBatchNorm2d])
def test_lazy_layers_wait_for_their_first_input(make: Callable[[], nn.Module]) -> None:
    model = nn.ModuleDict({"first": make(), "second": nn.Linear(2, 2)})
    found = find_layers(model)
    assert [layer.name for layer in found] == ["second.weight"]
    assert found.lazy == {"first": model["first"]}
    assert found.unknown == {}


def test_lazy_layers_are_known_after_their_first_input() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    model(torch.randn(2, 5))
    (found,) = find_layers(model)
    assert found.matrix(found.weight).shape == (1, 3, 5)
    assert find_layers(model).lazy == {}


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.EmbeddingBag(5, 3), "bag"),
        (nn.BatchNorm1d(3), "identity"),
        (nn.InstanceNorm2d(3, affine=True), "identity"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_without_rows_say_so(layer: nn.Module, reason: str) -> None:
    layout = layout_of(layer)
    assert layout is not None
    assert not layout.has_rows
    with pytest.raises(TypeError, match=type(layer).__name__) as caught:
        layout.rows(layer, torch.randn(2, 3))
    assert reason in str(caught.value)


@given(
    seed=st.integers(0, 10**6),
    leading=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    bias=st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_bilinear_rows_times_weight_is_the_output(
    seed: int, leading: list[int], sizes: tuple[int, int, int], bias: bool
) -> None:
    torch.manual_seed(seed)
    layer = nn.Bilinear(*sizes, bias=bias).double()
    one, two = (torch.randn(*leading, size, dtype=torch.float64) for size in sizes[:2])
    layout = layout_of(layer)
    assert layout is not None
    for args, kwargs in (((one, two), {}), ((one,), {"input2": two}), ((), {"input2": two, "input1": one})):
        inputs = layout.inputs(layer, args, kwargs)
        assert inputs is not None
        out = layout.rows(layer, *inputs)[0] @ layout.matrix(layer, layer.weight)[0].flatten(1).mT
        out = out if layer.bias is None else out + layer.bias
        torch.testing.assert_close(out, layer(one, two).reshape(-1, sizes[2]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_embedding_rows_and_counts(padding_idx: int | None, dtype: torch.dtype) -> None:
    layer = nn.Embedding(5, 3, padding_idx=padding_idx)
    tokens = torch.tensor([[4, 2, 0], [4, 4, 1]])
    layout = layout_of(layer)
    assert layout is not None
    rows = layout.rows(layer, tokens)
    assert rows.shape == (1, 6, 5)
    assert torch.equal(rows[0] @ layer.weight, layer(tokens).reshape(6, 3))  # the padding's vector is zero
    counts = layout.counts(layer, tokens.to(dtype))
    assert counts.tolist() == [1, 1, 1 if padding_idx is None else 0, 0, 3]
    torch.testing.assert_close(rows[0].mT @ rows[0], torch.diag(counts.float()))


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm([3, 4]), lambda: nn.RMSNorm([3, 4]), lambda: nn.GroupNorm(3, 6)])
def test_norm_rows_times_weight_is_the_output(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    layer = make().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    grouped = isinstance(layer, nn.GroupNorm)
    x = torch.randn(2, 6, 5, 3, dtype=torch.float64) if grouped else torch.randn(2, 5, 3, 4, dtype=torch.float64)
    (found,) = find_layers(layer)
    rows = found.rows(x)
    out = rows @ found.matrix(layer.weight).mT
    if found.bias is not None:
        out = out + found.bias_matrix(layer.bias).unsqueeze(1)
    expected = layer(x).movedim(1, 0).reshape(6, -1) if grouped else layer(x).reshape(-1, 12).mT
    torch.testing.assert_close(out.squeeze(-1), expected, rtol=1e-12, atol=1e-12)


def test_the_layer_of_gpt2_is_a_linear_map_that_keeps_its_weight_transposed() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 4)  # outputs, inputs
    layout = layout_of(layer)
    assert layout is not None
    inputs = torch.randn(2, 3, 4)
    (rows,) = layout.rows(layer, inputs)
    assert isinstance(rows, torch.Tensor)
    (matrix,) = layout.matrix(layer, layer.weight)
    torch.testing.assert_close(rows @ matrix.T + layer.bias, layer(inputs).reshape(6, 6))
    assert layout.unit_mean(layer, layer.weight).shape == (1, 6)
    # Of the same name, but something else.
    assert layout_of(type("Conv1D", (torch.nn.Module,), {})()) is None
