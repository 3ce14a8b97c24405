"""Spectra of features: equal to loops over samples and positions in float64, whole, streamed, and sketched."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.diagnostics import FeatureSpectrum, Spectrum, feature_spectrum
from wellcond.nn import WhitenedLinear
from wellcond.optim import FSGD
from wellcond.runtime.checks import WellcondWarning


def eigenvalues(rows: Tensor, *, centred: bool = False) -> np.ndarray:
    """Those of 1/n Σ x xᵀ, or of the covariance, by a loop over rows; descending."""
    x = rows.double().numpy()
    mean = x.mean(axis=0) if centred else np.zeros(x.shape[1])
    moment = np.zeros((x.shape[1], x.shape[1]))
    for row in x:
        moment += np.outer(row - mean, row - mean) / len(x)
    return np.linalg.eigvalsh(moment)[::-1]


def patches(x: Tensor, conv: nn.Conv2d) -> list[Tensor]:
    """Each group's rows, by torch's own im2col."""
    found = []
    for part in x.chunk(conv.groups, dim=1):
        columns = F.unfold(part, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # type: ignore[arg-type]
        found.append(columns.transpose(1, 2).flatten(0, 1))
    return found


def close(expected: Any, rel: float = 1e-9) -> Any:
    expected = np.asarray(expected)
    return pytest.approx(expected, rel=rel, abs=rel * float(np.abs(expected).max()))


def correlated(samples: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, width)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return (torch.randn(samples, width, generator=generator) * scales) @ turn + 0.3


# Against loops --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_and_linear_maps_equal_the_loop(centred: bool, stride: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=stride, padding=1, groups=2)
    linear = nn.Linear(6, 3)
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    x = torch.randn(12, 4, 7, 6) + 1.0
    found = feature_spectrum(model, [x], centred=centred)
    assert list(found.layers) == ["0", "4"]
    assert found.centred is centred
    with torch.no_grad():
        out = conv(x)
        flat = out.relu().mean(dim=(2, 3))
        logits = linear(flat)
    first = found.layers["0"]
    assert (first.input.groups, first.input.width) == (2, 18)
    assert first.input.rows == out.shape[0] * out.shape[2] * out.shape[3]
    for values, rows in zip(first.input.eigenvalues, patches(x, conv), strict=True):
        assert values == close(eigenvalues(rows, centred=centred))
    # All output channels together, whatever the groups.
    assert first.output.groups == 1
    assert first.output.eigenvalues[0] == close(eigenvalues(out.permute(0, 2, 3, 1).flatten(0, 2), centred=centred))
    last = found.layers["4"]
    assert last.input.eigenvalues[0] == close(eigenvalues(flat, centred=centred))
    assert last.output.eigenvalues[0] == close(eigenvalues(logits, centred=centred))


def test_transposed_and_three_dimensional_convolutions() -> None:
    torch.manual_seed(0)
    up = nn.ConvTranspose1d(2, 3, 3, stride=2, bias=False)
    x = torch.randn(5, 2, 6)
    found = feature_spectrum(up, [x]).layers[""]
    with torch.no_grad():
        out = up(x)
    assert found.output.eigenvalues[0] == close(eigenvalues(out.transpose(1, 2).flatten(0, 1)))
    # What an output position sums over, written out: tap k of output p reads input (p − k)/2 where that is whole.
    rows = torch.zeros(5, out.shape[2], 2, 3)
    for p in range(out.shape[2]):
        for k in range(3):
            if (p - k) % 2 == 0 and 0 <= (p - k) // 2 < 6:
                rows[:, p, :, k] = x[:, :, (p - k) // 2]
    assert found.input.eigenvalues[0] == close(eigenvalues(rows.flatten(2).flatten(0, 1)))
    cube = nn.Conv3d(2, 4, (1, 2, 1))
    voxels = torch.randn(3, 2, 3, 4, 2)
    pairs = torch.stack([voxels[:, :, :, :-1], voxels[:, :, :, 1:]], dim=2).flatten(1, 2)
    assert feature_spectrum(cube, [voxels]).layers[""].input.eigenvalues[0] == close(
        eigenvalues(pairs.movedim(1, -1).flatten(0, 3))
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 3}])
def test_attention_equals_the_formula(training: bool, sizes: dict[str, int]) -> None:
    torch.manual_seed(0)
    heads, width = 2, 8
    attention = nn.MultiheadAttention(width, heads, batch_first=True, **sizes).train(training)
    nn.init.normal_(attention.in_proj_bias)
    query = torch.randn(6, 4, width)
    key = torch.randn(6, 5, sizes["kdim"]) if sizes else query
    value = torch.randn(6, 5, sizes["vdim"]) if sizes else query

    found = feature_spectrum(attention, [None], call=lambda model, batch: model(query, key, value))
    with torch.no_grad():
        weights = (
            [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
            if sizes
            else list(attention.in_proj_weight.chunk(3))
        )
        projected = [
            x @ w.T + b for x, w, b in zip((query, key, value), weights, attention.in_proj_bias.chunk(3), strict=True)
        ]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected)
        joined = ((q @ k.mT / math.sqrt(width / heads)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        out = joined @ attention.out_proj.weight.T + attention.out_proj.bias
    if sizes:
        names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        inputs = [found.layers[name].input.eigenvalues[0] for name in names]
        outputs = [found.layers[name].output.eigenvalues[0] for name in names]
    else:
        names = [""]
        inputs, outputs = list(found.layers[""].input.eigenvalues), list(found.layers[""].output.eigenvalues)
    assert list(found.layers) == [*names, "out_proj"]
    for own, x in zip(inputs, (query, key, value), strict=True):
        assert own == close(eigenvalues(x.flatten(0, 1)))
    for own, x in zip(outputs, projected, strict=True):
        assert own == close(eigenvalues(x.flatten(0, 1)), rel=1e-6)
    assert found.layers["out_proj"].input.eigenvalues[0] == close(eigenvalues(joined.flatten(0, 1)), rel=1e-5)
    assert found.layers["out_proj"].output.eigenvalues[0] == close(eigenvalues(out.flatten(0, 1)), rel=1e-5)


def test_layers_that_whiten_are_measured_before_they_do() -> None:
    torch.manual_seed(0)
    layer = WhitenedLinear(6, 4)
    x = correlated(64, 6)
    layer(x)
    layer.eval()
    found = feature_spectrum(layer, [x]).layers[""]
    assert found.input.eigenvalues[0] == close(eigenvalues(x))
    assert found.output.eigenvalues[0] == close(eigenvalues(layer(x).detach()))


# Streaming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("max_dim", [64, 20])
def test_streaming_equals_one_batch(centred: bool, max_dim: int) -> None:
    torch.manual_seed(0)
    # In float64 the features themselves do not depend on the batch that they are computed in.
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 2)).double()
    x = torch.randn(30, 3, 8, 8).double() + torch.linspace(0, 4, 30).view(-1, 1, 1, 1)
    options = {"centred": centred, "max_dim": max_dim, "sketch": 12}
    whole = feature_spectrum(model, [x], **options)
    pieces = feature_spectrum(model, x.split([1, 16, 13]), **options)
    assert (whole.batches, pieces.batches) == (1, 3)
    for name, layer in whole.layers.items():
        for side in ("input", "output"):
            one, other = layer.of(side), pieces.layers[name].of(side)
            assert one.rows == other.rows
            assert one.exact == other.exact == (one.width <= max_dim)
            assert other.traces == close(one.traces, rel=1e-12)
            for own, streamed in zip(one.eigenvalues, other.eigenvalues, strict=True):
                assert streamed == close(own, rel=1e-11)


def test_rows_are_laid_out_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(180, 2))
    x = torch.randn(9, 3, 8, 8)
    whole = feature_spectrum(model, [x])
    longest = 0
    module = sys.modules["wellcond.numerics.row_moments"]
    add = module.SecondMoment.add

    def watched(self: Any, rows: Tensor, first: int = 0) -> None:
        nonlocal longest
        longest = max(longest, rows.numel())
        add(self, rows, first)

    monkeypatch.setattr("wellcond.layouts.rows._CHUNK", 4000)
    monkeypatch.setattr(module.SecondMoment, "add", watched)
    pieces = feature_spectrum(model, [x])
    assert longest <= 4000 < 9 * 36 * 27
    assert pieces.layers["0"].input.eigenvalues[0] == close(whole.layers["0"].input.eigenvalues[0], rel=1e-12)


@pytest.mark.parametrize(("precision", "rel"), [("float64", 1e-8), ("float32", 1e-3)])
def test_large_means_cost_no_digits(precision: str, rel: float) -> None:
    # The mean is 10⁴ deviations: a float32 sum of squares would have nothing of the covariance.
    x = (correlated(256, 4) + 1e4).split(64)
    found = feature_spectrum(nn.Linear(4, 2), x, centred=True, precision=precision)
    assert found.layers[""].input.eigenvalues[0] == close(eigenvalues(torch.cat(x), centred=True), rel=rel)


def test_float32_is_close_and_says_how_far_it_sees() -> None:
    x = correlated(200, 16)
    model = nn.Linear(16, 4)
    exact, fast = (feature_spectrum(model, [x], precision=p).layers[""].input for p in ("float64", "float32"))
    assert fast.eigenvalues[0] == close(exact.eigenvalues[0], rel=1e-6)
    assert fast.resolution == pytest.approx(16 * 2**-23)
    assert exact.resolution == pytest.approx(2**-46)


# Sketches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
def test_a_sketch_bounds_what_it_does_not_know(centred: bool) -> None:
    x = correlated(300, 60, seed=1)
    model = nn.Linear(60, 2)
    exact = feature_spectrum(model, [x], centred=centred).layers[""].input
    rough = feature_spectrum(model, [x], centred=centred, max_dim=32, sketch=20).layers[""].input
    assert exact.exact
    assert not rough.exact
    assert len(rough.eigenvalues[0]) == 20
    assert rough.traces == close(exact.traces, rel=1e-12)
    assert rough.missing == pytest.approx(exact.traces[0] - sum(rough.eigenvalues[0]))
    for own, value in zip(rough.eigenvalues[0], exact.eigenvalues[0], strict=False):
        assert own <= value * (1 + 1e-12)
        assert value <= own + rough.missing * (1 + 1e-12)
    assert rough.eigenvalues[0][0] == pytest.approx(exact.eigenvalues[0][0], rel=0.02)
    assert 1 < rough.condition <= exact.condition
    assert rough.damped_condition(1e-3) <= exact.damped_condition(1e-3)
    assert rough.whitening_error <= exact.whitening_error
    assert rough.directions(0.9) >= exact.directions(0.9)
    for k in (1, 5, 30):
        assert rough.energy(k) <= exact.energy(k) + 1e-12
    assert exact.effective_rank <= rough.effective_rank <= 1.4 * exact.effective_rank


def test_a_wide_moment_is_never_laid_out() -> None:
    torch.manual_seed(0)
    # The moment itself would be 20 GB.
    width, x = 50_000, torch.randn(20, 50_000)
    found = feature_spectrum(nn.Linear(width, 1), [x], sketch=8).layers[""].input
    assert found.traces[0] == pytest.approx(float(x.double().square().sum() / 20), rel=1e-12)
    exact = torch.linalg.svdvals(x.double()).square() / 20
    for own, value in zip(found.eigenvalues[0], exact.tolist(), strict=False):
        assert own <= value * (1 + 1e-9)
        assert value <= own + found.missing


def test_a_sketch_is_completed_by_the_flattest_spectrum() -> None:
    # 1 of the trace is in the 2 directions beyond the sketch: the third eigenvalue cannot be below their mean.
    found = Spectrum(1, 5, 10, ((4.0, 2.0, 0.4),), (7.4,), exact=False)
    assert found.missing == pytest.approx(1.0)
    shares = [4 / 7.4, 2 / 7.4, *[1.4 / 3 / 7.4] * 3]
    assert found.effective_rank == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert found.condition == pytest.approx(4 / 0.5)
    assert found.directions(0.9) == 4


def test_a_sketch_of_few_directions_is_exact() -> None:
    x = torch.randn(200, 5) @ torch.randn(5, 60)
    model = nn.Linear(60, 2)
    rough = feature_spectrum(model, [x], max_dim=32, sketch=12).layers[""].input
    assert rough.eigenvalues[0][:5] == close(eigenvalues(x)[:5], rel=1e-6)
    assert rough.missing <= 1e-6 * rough.traces[0]
    assert rough.condition == math.inf
    assert rough.effective_rank == pytest.approx(feature_spectrum(model, [x]).layers[""].input.effective_rank, rel=1e-4)


# What is derived from eigenvalues -------------------------------------------------------------------------------------


def test_the_figures_of_a_spectrum() -> None:
    found = Spectrum(1, 4, 10, ((4.0, 2.0, 1.0, 1.0),), (8.0,))
    assert found.condition == 4.0
    assert found.damped_condition(0.5) == (4 + 2) / (1 + 2)
    shares = [0.5, 0.25, 0.125, 0.125]
    assert found.effective_rank == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert found.whitening_error == pytest.approx(math.sqrt(((2 - 1) ** 2 + 0 + 2 * 0.5**2) / 4))
    assert [found.energy(k) for k in range(6)] == pytest.approx([0, 0.5, 0.75, 0.875, 1, 1])
    assert [found.directions(p) for p in (0.0, 0.5, 0.51, 0.875, 1.0)] == [0, 1, 2, 3, 4]
    assert found.relative() == (1.0, 0.5, 0.25, 0.25)


def test_white_singular_and_zero_features() -> None:
    white = Spectrum(1, 3, 10, ((2.0, 2.0, 2.0),), (6.0,))
    assert (white.condition, white.whitening_error) == (1.0, 0.0)
    assert white.effective_rank == pytest.approx(3)
    line = Spectrum(1, 5, 10, ((2.0, 0.0, 0.0, 0.0, 0.0),), (2.0,))
    assert (line.condition, line.effective_rank, line.directions(1.0)) == (math.inf, 1.0, 1)
    assert line.whitening_error == pytest.approx(math.sqrt(5 - 1))
    assert line.to_dict()["condition"] is None
    none = feature_spectrum(nn.Linear(3, 2, bias=False), [torch.zeros(4, 3)]).layers[""].input
    assert (none.condition, none.effective_rank, none.whitening_error) == (math.inf, 0.0, 1.0)
    assert (none.energy(2), none.directions(0.9)) == (0.0, 0)


def test_groups_are_taken_together() -> None:
    found = Spectrum(2, 2, 10, ((3.0, 1.0), (8.0, 1.0)), (4.0, 9.0))
    assert found.condition == 8.0
    one, other = (Spectrum(1, 2, 10, (values,), (sum(values),)) for values in ((3.0, 1.0), (8.0, 1.0)))
    assert found.effective_rank == pytest.approx((one.effective_rank + other.effective_rank) / 2)
    assert found.whitening_error**2 == pytest.approx((one.whitening_error**2 + other.whitening_error**2) / 2)
    assert found.energy(1) == pytest.approx(11 / 13)
    assert found.relative() == pytest.approx((1, (1 / 3 + 1 / 8) / 2))


def test_rounding_is_no_eigenvalue() -> None:
    torch.manual_seed(0)
    # Layer normalization leaves nothing in the direction of ones, but for rounding in float32.
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    found = feature_spectrum(model, [torch.randn(100, 8)]).layers["1"].input
    assert 0 < found.eigenvalues[0][-1] < 1e-13
    assert found.condition == math.inf


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda found: found.damped_condition(-1.0), "damping must be at least 0, got -1.0"),
        (lambda found: found.directions(1.5), "share must be between 0 and 1, got 1.5"),
    ],
)
def test_bad_questions_are_named(act: Callable[[Spectrum], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        act(Spectrum(1, 2, 1, ((1.0, 1.0),), (2.0,)))


# Models, modes, errors ------------------------------------------------------------------------------------------------


def resnet() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    return model, torch.randn(4, 3, 32, 32)


def vit() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, num_classes=5)
    return model, torch.randn(4, 3, 16, 16)


def encoder() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(4, 6, 8)


def state_of(model: nn.Module) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers()]
    return [
        [value.clone() for value in tensors],
        [(id(value), value._version, value.grad is None) for value in tensors],
        [{k: v for k, v in vars(module).items() if not isinstance(v, dict)} for module in model.modules()],
        [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()],
        torch.backends.mha.get_fastpath_enabled(),
        torch.get_rng_state().tolist(),
    ]


def assert_same(model: nn.Module, before: list[Any]) -> None:
    values, *rest = state_of(model)
    assert all(torch.equal(a, b) for a, b in zip(values, before[0], strict=True))
    assert rest == before[1:]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [resnet, vit, encoder])
def test_models_of_all_kinds_are_left_as_they_are_found(
    make: Callable[[], tuple[nn.Module, Tensor]], training: bool
) -> None:
    model, x = make()
    model.train(training)
    before = state_of(model)
    found = feature_spectrum(model, [x, x], max_dim=256, sketch=32, precision="float32")
    assert_same(model, before)
    assert found.training is training
    expected = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.MultiheadAttention))
    ]
    assert list(found.layers) == expected
    json.dumps(found.to_dict(), allow_nan=False)

    def failing() -> Iterator[Tensor]:
        yield x
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        feature_spectrum(model, failing(), max_dim=256, sketch=32)
    assert_same(model, before)


def test_layers_that_are_called_twice_wrapped_or_compiled_or_half() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    x = torch.randn(20, 4)
    found = feature_spectrum(nn.DataParallel(nn.Sequential(shared, nn.ReLU(), shared)), [(x, "label")])
    assert list(found.layers) == ["0"]
    with torch.no_grad():
        both = torch.cat([x, shared(x).relu()])
    assert found.layers["0"].input.eigenvalues[0] == close(eigenvalues(both))
    half = feature_spectrum(nn.Sequential(shared).bfloat16(), [{"input": x.bfloat16()}]).layers["0"].input
    assert half.eigenvalues[0] == close(eigenvalues(x.bfloat16()))
    assert half.resolution == 2**-14


def test_attached_transforms_do_not_see_the_probe() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = FSGD(model, lr=0.1, stats_every=1, solve_every=1)
    before = {key: value.clone() for key, value in optimizer.state[model[0].weight].items() if torch.is_tensor(value)}
    feature_spectrum(model, [torch.randn(8, 4)])
    after = optimizer.state[model[0].weight]
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_selected_missed_and_unknown_layers() -> None:
    torch.manual_seed(0)

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)
            self.table = nn.Embedding(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.table(x))

    x = torch.tensor([[0, 1], [2, 3]])
    with pytest.warns(WellcondWarning, match="feature_spectrum: no batch reached 'idle'"):
        assert list(feature_spectrum(Part(), [x]).layers) == ["used"]
    found = feature_spectrum(Part(), [x], where=lambda name, module: name == "used")
    assert list(found.layers) == ["used"]
    with pytest.raises(ValueError, match="no batch reached any of the layers 'idle'"):
        feature_spectrum(Part(), [x], where=lambda name, module: name == "idle")


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"max_dim": 0}, ValueError, "max_dim must be a positive integer, got 0"),
        ({"sketch": 0}, ValueError, "sketch must be a positive integer, got 0"),
        ({"max_dim": 10, "sketch": 11}, ValueError, "sketch must be at most max_dim=10, got 11"),
        ({"max_batches": 0}, ValueError, "max_batches must be a positive integer, got 0"),
        ({"precision": "half"}, ValueError, "precision must be .*'float32'.*'float64', got 'half'"),
        ({"where": "all"}, TypeError, r"where must be a predicate of .*, got 'all'"),
        ({"where": lambda name, module: False}, ValueError, "where selects none of the linear maps"),
        ({"model": nn.LayerNorm(3)}, ValueError, "LayerNorm has no linear map or convolution whose features"),
        ({"model": nn.LazyLinear(3)}, ValueError, "'' is known only after its first forward pass"),
        ({"loader": []}, ValueError, "the loader gave no batch"),
        ({"loader": [torch.full((2, 3), math.nan)]}, ValueError, "features that are not finite reached ''"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        feature_spectrum(**({"model": nn.Linear(3, 2), "loader": [torch.ones(2, 3)]} | arguments))


# The result -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def found() -> FeatureSpectrum:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, groups=1), nn.Flatten(), nn.Linear(32, 3)).eval()
    return feature_spectrum(model, [torch.randn(50, 1, 6, 6)], max_dim=16, sketch=8)


def test_the_table(found: FeatureSpectrum) -> None:
    title, header, *rows, note = str(found).splitlines()
    assert title.startswith("Eigenvalues of feature second moments, over 1 batch in evaluation mode")
    numbers = ["rank", "condition", "error"]
    assert header.split() == ["layer", "input's", "d", *numbers, "output's", "d", *numbers]
    first, last = found.layers["0"], found.layers["2"]
    cells = rows[0].split()
    assert cells[:2] == ["0", "9"]
    assert cells[3] == f"{first.input.condition:.3g}"
    assert rows[1].split()[1:4] == ["32", f"~{last.input.effective_rank:.3g}", "≥"]
    assert note == "~ sketched, as d is more than max_dim=16: bounds; see Spectrum"
    assert repr(found) == str(found)


def test_the_dictionary_is_for_json(found: FeatureSpectrum) -> None:
    entry = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert entry["max_dim"] == 16
    assert entry["layers"]["0"]["input"]["eigenvalues"] == [list(found.layers["0"].input.eigenvalues[0])]
    assert entry["layers"]["2"]["input"]["exact"] is False
    assert entry["layers"]["2"]["input"]["missing"] == found.layers["2"].input.missing > 0


def test_the_plots(found: FeatureSpectrum, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    ax = found.plot(side="input")
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines) == ["0, d = 9", "2, d = 32 (the first 8, sketched)"]
    assert list(lines["0, d = 9"].get_ydata()) == pytest.approx(found.layers["0"].input.relative())
    assert list(lines["0, d = 9"].get_xdata()) == pytest.approx([i / 9 for i in range(1, 10)])
    assert found.plot(ax, side="input", layers=["0"], label="after") is ax
    assert ax.get_lines()[-1].get_label() == "after: 0, d = 9"
    for quantity in ("condition", "effective_rank", "whitening_error"):
        [line] = found.plot(quantity=quantity).get_lines()
        expected = [layer.output for layer in found.layers.values()]
        values = [
            own.effective_rank / own.width if quantity == "effective_rank" else getattr(own, quantity)
            for own in expected
        ]
        assert list(line.get_ydata()) == pytest.approx(values)
    with pytest.raises(ValueError, match="layers must be one of '0', '2', got 'x'"):
        found.plot(layers=["x"])
    with pytest.raises(ValueError, match="side must be"):
        found.plot(side="both")
    with pytest.raises(ValueError, match="quantity must be"):
        found.plot(quantity="rank")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="FeatureSpectrum.plot needs matplotlib"):
        found.plot()
