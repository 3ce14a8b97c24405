"""Gradients' norms and weights' row means against 4.1 and 4.2, written out row by row; and that the model stays."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import wellcond
from wellcond.diagnostics.gradients import GradientRecorder, GradientStatistics, gradient_statistics
from wellcond.diagnostics.passes import left_as_found
from wellcond.diagnostics.weights import LayerWeightMeans, WeightMeans, weight_means
from wellcond.nn import BatchRenorm2d, KalmanBatchNorm2d, MomentumBatchNorm2d, WhitenedLinear
from wellcond.runtime.checks import WellcondWarning

QUANTITIES = ("norm", "centred_norm", "largest", "centred_largest", "mean_share")
Loader = list[tuple[Tensor, Tensor]]


class Small(nn.Module):
    """Convolutions with groups, plain and transposed, a batch normalization, dropout and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.drop = nn.Dropout(0.3)
        self.plain_up = nn.ConvTranspose2d(4, 3, 2)
        self.last = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.relu(self.norm(self.first(x))))
        return self.last(self.plain_up(self.drop(x)).mean((2, 3)))


def small() -> Small:
    torch.manual_seed(1)
    return Small().double()


def images(batches: int = 3, samples: int = 6) -> Loader:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(samples, 4, 6, 6, generator=generator, dtype=torch.float64) + 0.5,
            torch.randint(5, (samples,), generator=generator),
        )
        for _ in range(batches)
    ]


def cross_entropy(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])


def rows_of(name: str, tensor: Tensor) -> list[Tensor]:
    """Return the vectors that belong to each output unit, by hand for `Small`."""
    if name == "up.weight":  # (in, out/groups, *kernel): each group has its own three inputs and two outputs
        return [tensor[3 * group : 3 * group + 3, out].flatten() for group in range(2) for out in range(2)]
    if name == "plain_up.weight":
        return [tensor[:, out].flatten() for out in range(3)]
    return [row.flatten() for row in tensor]


def written_out(rows: list[Tensor]) -> dict[str, float]:
    square = centred_square = mean_square = largest = centred_largest = 0.0
    for row in rows:
        values = row.tolist()
        mean = sum(values) / len(values)
        square += sum(value**2 for value in values)
        centred_square += sum((value - mean) ** 2 for value in values)
        mean_square += len(values) * mean**2
        largest = max([largest, *(abs(value) for value in values)])
        centred_largest = max([centred_largest, *(abs(value - mean) for value in values)])
    share = mean_square / square if square else 0.0
    found = [math.sqrt(square), math.sqrt(centred_square), largest, centred_largest, share]
    return dict(zip(QUANTITIES, found, strict=True))


def close(value: Any) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-12)


WEIGHTS = ["first.weight", "up.weight", "plain_up.weight", "last.weight"]


@pytest.mark.parametrize("training", [True, False])
def test_every_batch_equals_the_loop(training: bool) -> None:
    model, loader = small().train(training), images()
    model.drop.p = 0.0
    expected: dict[str, list[dict[str, float]]] = {name: [] for name in WEIGHTS}
    for x, y in loader:
        twin = copy.deepcopy(model)
        F.cross_entropy(twin(x), y).backward()
        for name in WEIGHTS:
            expected[name].append(written_out(rows_of(name, twin.get_parameter(name).grad)))
    found = gradient_statistics(model, loader, cross_entropy)
    assert list(found.layers) == WEIGHTS
    assert (found.over, found.training) == ("batch", training)
    for name, layer in found.layers.items():
        assert layer.batches == (0, 1, 2)
        rows = rows_of(name, model.get_parameter(name))
        assert (layer.units, layer.inputs) == (len(rows), len(rows[0]))
        for quantity in QUANTITIES:
            values = [own[quantity] for own in expected[name]]
            mean = sum(values) / 3
            assert layer.of(quantity) == getattr(layer, quantity) == close(tuple(values))
            assert layer.mean[quantity] == close(mean)
            assert layer.std[quantity] == close(math.sqrt(sum((value - mean) ** 2 for value in values) / 3))
        for norm, centred, share in zip(layer.norm, layer.centred_norm, layer.mean_share, strict=True):
            assert centred**2 + share * norm**2 == close(norm**2)


def test_a_linear_map_of_constant_inputs_has_nothing_but_the_mean() -> None:
    model = nn.Linear(7, 3, bias=False).double()
    [layer] = gradient_statistics(
        model, [torch.ones(4, 7, dtype=torch.float64)], lambda output, batch: output.square().sum()
    ).layers.values()
    assert layer.mean_share[0] == close(1.0)
    assert layer.centred_norm[0] == pytest.approx(0.0, abs=1e-12)


def test_a_zero_gradient_has_no_share_and_a_broken_one_is_seen() -> None:
    model = nn.Linear(3, 2)
    found = gradient_statistics(
        model, [torch.zeros(4, 3), torch.full((4, 3), math.inf)], lambda output, batch: output.sum()
    ).layers["weight"]
    assert found.mean_share[0] == found.norm[0] == 0.0
    assert not math.isfinite(found.norm[1])
    assert math.isnan(found.mean_share[1])
    assert not math.isfinite(found.mean["norm"])


def test_independent_entries_have_a_share_of_one_over_d() -> None:
    torch.manual_seed(0)
    model = nn.Linear(50, 2000, bias=False)
    noise = torch.randn(2000, 50)
    found = gradient_statistics(
        model,
        [torch.zeros(1, 50)],
        lambda output, batch: (model.weight * noise).sum(),
    ).layers["weight"]
    assert found.mean_share[0] == pytest.approx(1 / 50, rel=5 * math.sqrt(2 / 2000))


# which weights --------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.inner, self.again = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again.weight = self.inner.weight
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.single = nn.Linear(1, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.again(F.relu(self.inner(self.table(tokens))))
        return self.head(x + self.single(x[..., :1]))


def test_each_weight_once_and_none_that_centralization_leaves() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return output.square().sum()

    assert list(gradient_statistics(Tied(), [tokens], loss).layers) == ["inner.weight"]

    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body, self.table = nn.Linear(4, 7, bias=False), nn.Linear(4, 4), nn.Embedding(7, 4)
            self.table.weight = self.head.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.body(self.table(tokens)))

    assert list(gradient_statistics(HeadFirst(), [tokens], loss).layers) == ["body.weight"]

    class Unwanted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.table(tokens))

    model = Unwanted()
    assert list(gradient_statistics(model, [tokens], loss).layers) == ["head.weight"]
    chosen = gradient_statistics(model, [tokens], loss, where=lambda name, module: name == "table")
    assert list(chosen.layers) == ["table.weight"]
    # A column of the table's gradient is one output unit.
    model(tokens).square().sum().backward()
    columns = [column.double() for column in model.table.weight.grad.T]
    assert chosen.layers["table.weight"].norm[0] == pytest.approx(written_out(columns)["norm"], rel=1e-5)
    assert chosen.layers["table.weight"].mean_share[0] == pytest.approx(written_out(columns)["mean_share"], rel=1e-5)


def test_parametrized_and_frozen_weights() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2), nn.Linear(2, 2))
    model[1].weight.requires_grad_(False)
    found = gradient_statistics(model, [torch.randn(5, 4)], lambda output, batch: output.square().sum())
    assert list(found.layers) == ["0.parametrizations.weight.original1", "2.weight"]
    assert list(weight_means(model).layers) == ["0.parametrizations.weight.original1", "1.weight", "2.weight"]
    assert not model[1].weight.requires_grad


def test_what_is_not_used_is_named_and_left_out() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "spare": nn.Linear(3, 2)})

    def call(model: Any, batch: Tensor) -> Tensor:
        return model["used"](batch)

    def loss(output: Tensor, batch: Any) -> Tensor:
        return output.sum()

    with pytest.warns(WellcondWarning, match=r"no batch gave 'spare\.weight' a gradient"):
        found = gradient_statistics(model, [torch.ones(2, 3)], loss, call=call)
    assert list(found.layers) == ["used.weight"]
    with pytest.raises(ValueError, match=r"does not depend on any of the weights 'spare\.weight'"):
        gradient_statistics(model, [torch.ones(2, 3)], loss, call=call, where=lambda name, module: name == "spare")


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"max_batches": 0}, ValueError, "max_batches must be a positive integer, got 0"),
        ({"loader": []}, ValueError, "the loader gave no batch"),
        ({"where": "first"}, TypeError, "where must be a predicate of .*, got 'first'"),
        ({"where": lambda name, module: False}, ValueError, "where selects none of the .* of Small"),
        ({"model": nn.LayerNorm(6)}, ValueError, "LayerNorm has no linear map or convolution"),
        ({"model": nn.Linear(3, 2).requires_grad_(False)}, ValueError, "requires a gradient: all are frozen"),
        ({"model": nn.Sequential(nn.LazyLinear(2))}, ValueError, "'0' is known only after its first forward pass"),
        ({"loss": lambda output, batch: 1.0}, TypeError, "loss must return a scalar tensor, got float"),
        ({"loss": lambda output, batch: output}, ValueError, r"a scalar tensor, got the shape \[6, 5\]"),
        ({"loss": lambda output, batch: output.detach().sum()}, ValueError, "has no gradient"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        gradient_statistics(**({"model": small(), "loader": images(), "loss": cross_entropy} | arguments))


# how models are run ---------------------------------------------------------------------------------------------------


def test_calls_wrappers_and_kinds_of_batches() -> None:
    model, loader = small().eval(), images()
    expected = gradient_statistics(model, loader, cross_entropy).to_dict()

    def call(model: Any, batch: Any) -> Tensor:
        return model(batch["x"])

    def by_key(output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output, batch["y"])

    mappings = [{"x": x, "y": y} for x, y in loader]
    assert gradient_statistics(nn.DataParallel(model), loader, cross_entropy).to_dict() == expected
    assert gradient_statistics(torch.compile(model), loader, cross_entropy).to_dict() == expected
    assert gradient_statistics(model, mappings, by_key, call=call).to_dict() == expected
    with torch.no_grad():
        assert gradient_statistics(model, loader, cross_entropy).to_dict() == expected
    with torch.inference_mode():
        assert gradient_statistics(model, loader, cross_entropy).to_dict() == expected
    assert gradient_statistics(model, loader, cross_entropy, max_batches=1).layers["first.weight"].batches == (0,)

    class Keyed(nn.Linear):
        def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(input) * scale

    keyed = Keyed(3, 2)
    found = gradient_statistics(keyed, [{"input": torch.ones(1, 3), "scale": 2.0}], lambda output, batch: output.sum())
    assert found.layers["weight"].norm == pytest.approx((math.sqrt(6) * 2,))


def resnet() -> tuple[nn.Module, Tensor]:
    torchvision = pytest.importorskip("torchvision")
    block = torchvision.models.resnet.BasicBlock
    torch.manual_seed(0)
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5), torch.randn(4, 3, 32, 32)


def vit() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5, drop_rate=0.1
    )
    return model, torch.randn(4, 3, 16, 16)


def encoder() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(4, 6, 8)


MODELS = pytest.mark.parametrize("make", [resnet, vit, encoder])


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "identities": {name: (id(value), value.data_ptr()) for name, value in model.named_buffers()}
        | {name: (id(value), value.data_ptr()) for name, value in model.named_parameters()},
        "versions": {name: value._version for name, value in model.state_dict(keep_vars=True).items()},
        "gradients": {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None},
        "requires": {name: value.requires_grad for name, value in model.named_parameters()},
        "attributes": [
            {k: v for k, v in vars(module).items() if not isinstance(v, dict)} for module in model.modules()
        ],
        "hooks": [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()],
    }


def assert_same_state(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    for kind in ("values", "buffers", "gradients"):
        assert after[kind].keys() == before[kind].keys()
        for name, value in after[kind].items():
            assert torch.equal(value, before[kind][name]), name
    for kind in ("identities", "versions", "requires", "attributes", "hooks"):
        assert after[kind] == before[kind]


@MODELS
def test_models_of_all_kinds(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    model, x = make()
    model(x).square().mean().backward()
    before = state_of(model)
    random = torch.get_rng_state()
    found = gradient_statistics(model, [x, x], lambda output, batch: output.square().mean())
    assert torch.equal(torch.get_rng_state(), random)
    assert_same_state(model, before)
    wide = [name for name, p in model.named_parameters() if p.dim() >= 2 and "pos_embed" not in name]
    assert list(found.layers) == [name for name in wide if "cls" not in name]
    for layer in found.layers.values():
        assert all(a <= b * (1 + 1e-12) for a, b in zip(layer.centred_norm, layer.norm, strict=True))
        assert layer.norm[0] > 0
    assert weight_means(model).layers.keys() == found.layers.keys()


def test_models_of_few_digits_are_measured_in_many() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 4).bfloat16()
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    found = gradient_statistics(model, [x], lambda output, batch: output.square().sum()).layers["weight"]
    model(x).square().sum().backward()
    expected = written_out([row.double() for row in model.weight.grad])
    assert {quantity: found.of(quantity)[0] for quantity in QUANTITIES} == close(expected)


# what is left ---------------------------------------------------------------------------------------------------------


class LoaderError(Exception):
    pass


def failing(batch: Any) -> Iterator[Any]:
    yield batch
    raise LoaderError


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, MomentumBatchNorm2d, BatchRenorm2d, KalmanBatchNorm2d])
def test_the_model_is_left_as_it_is_found(raises: bool, norm: Callable[[int], nn.Module]) -> None:
    model = small()
    model.norm = norm(6).double()
    model.first.register_forward_hook(lambda module, args, output: None)
    x, y = images()[0]
    F.cross_entropy(model(x), y).backward()
    model.drop.eval()
    model.up.bias.requires_grad_(False)
    before = state_of(model)
    random = torch.get_rng_state()
    if raises:
        with pytest.raises(LoaderError):
            gradient_statistics(model, failing((x, y)), cross_entropy)
    else:
        shuffled = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=3, shuffle=True)
        gradient_statistics(model, shuffled, cross_entropy)
    assert torch.equal(torch.get_rng_state(), random)
    assert_same_state(model, before)


def test_layers_that_count_steps_go_on_as_if_nothing_had_been() -> None:
    def train(probe: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(WhitenedLinear(5, 4), nn.ReLU(), CountingNorm(4), nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            x = torch.randn(16, 5)
            if probe:
                gradient_statistics(model, [x, 2 * x], lambda output, batch: output.square().mean())
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if probe:
                gradient_statistics(model, [x], lambda output, batch: output.square().mean())
            optimizer.step()
        return dict(model.state_dict())

    torch.testing.assert_close(train(True), train(False), rtol=0, atol=0)


class CountingNorm(nn.BatchNorm1d):
    """Counts its calls in an attribute."""

    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input) / self.calls


def test_attached_transforms_do_not_see_the_probe() -> None:
    def train(probe: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"stats_every": 1, "solve_every": 1}
        handle = wellcond.attach(optimizer, model, wellcond.FeatureWhitening(**options))
        for _ in range(3):
            x = torch.randn(16, 5)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if probe:
                gradient_statistics(model, [x.exp()], lambda output, batch: output.square().mean())
            optimizer.step()
        handle.remove()
        return [parameter.detach() for parameter in model.parameters()]

    for first, second in zip(train(False), train(True), strict=True):
        assert torch.equal(first, second)


def test_the_history_that_checkpointing_repeats_from_is_not_touched() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 3, 3), MomentumBatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.norm, self.conv(x), use_reentrant=False)

    model = Checkpointed()
    x = torch.randn(4, 4, 5, 5)
    model(x).square().mean().backward()
    past = list(model.norm._past._past)
    assert len(past) == 1
    gradient_statistics(model, [x, 2 * x], lambda output, batch: (output - 1).square().mean())
    assert len(model.norm._past._past) == 1
    assert model.norm._past._past[0][0] is past[0][0]


def test_shared_buffers_stay_shared_in_the_pass() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[1].running_mean = model[0].running_mean
    with left_as_found(model):
        assert model[1].running_mean is model[0].running_mean
    assert model[1].running_mean is model[0].running_mean


# training -------------------------------------------------------------------------------------------------------------


def test_the_recorder_sees_what_a_measurement_sees() -> None:
    model = small()
    model.drop.p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wellcond.attach(optimizer, model, wellcond.GradientCentralization())
    recorder = GradientRecorder(nn.DataParallel(model), where=lambda name, module: name in ("first", "last"))
    before = weight_means(model)
    measured = []
    for batch in images():
        measured.append(gradient_statistics(model, [batch], cross_entropy))
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        recorder.record()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, gradients[name])
        optimizer.step()
    found = recorder.result()
    assert (found.over, found.training) == ("iteration", True)
    assert list(found.layers) == ["first.weight", "last.weight"]
    for name, layer in found.layers.items():
        assert layer.batches == (0, 1, 2)
        for quantity in QUANTITIES:
            assert layer.of(quantity) == close(tuple(own.layers[name].of(quantity)[0] for own in measured))
    # What centralization promises (4.4–4.7): row means stay.
    for name, after in weight_means(model).layers.items():
        assert after.means == close(before.layers[name].means)
        assert after.norm != close(before.layers[name].norm)


def test_the_recorder_over_many_iterations_with_gaps() -> None:
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False)])
    recorder = GradientRecorder(model)
    with pytest.raises(ValueError, match="nothing is recorded"):
        recorder.result()
    with pytest.raises(ValueError, match="no weight has a gradient"):
        recorder.record()
    for step in range(600):
        model[0].weight.grad = torch.full((2, 2), float(step)) if step % 3 else None
        model[1].weight.grad = torch.full((3, 2), 1.0)
        recorder.record()
        if step == 299:
            assert len(recorder.result().layers["1.weight"].norm) == 300
    found = recorder.result().layers
    steps = tuple(step for step in range(600) if step % 3)
    assert found["0.weight"].batches == steps
    assert found["0.weight"].largest == tuple(map(float, steps))
    assert found["1.weight"].batches == tuple(range(600))
    assert found["1.weight"].norm == close((math.sqrt(6),) * 600)


# weights --------------------------------------------------------------------------------------------------------------


def test_weight_means_equal_the_loop() -> None:
    model = small()
    found = weight_means(model)
    assert list(found.layers) == WEIGHTS
    for name, layer in found.layers.items():
        rows = [row.tolist() for row in rows_of(name, model.get_parameter(name).detach())]
        means = [sum(row) / len(row) for row in rows]
        centre = sum(means) / len(means)
        assert (layer.units, layer.inputs) == (len(rows), len(rows[0]))
        assert layer.means == close(tuple(means))
        assert layer.mean == close(centre)
        assert layer.std == close(math.sqrt(sum((mean - centre) ** 2 for mean in means) / len(means)))
        assert layer.largest == close(max(map(abs, means)))
        share = len(rows[0]) * sum(mean**2 for mean in means) / sum(value**2 for row in rows for value in row)
        assert layer.mean_share == close(share)
    chosen = weight_means(model, where=lambda name, module: name == "up")
    assert chosen.layers == {"up.weight": found.layers["up.weight"]}
    with pytest.raises(ValueError, match="where selects none"):
        weight_means(model, where=lambda name, module: False)


def test_the_histogram_counts_powers_of_ten() -> None:
    means = (0.0, 1e-20, 2e-12, -1.1e-3, 1.1e-3, 0.5, 1.1, 5e7)
    found = WeightMeans({"a": LayerWeightMeans(8, 4, means, 1.0), "b": LayerWeightMeans(1, 4, (0.5,), 1.0)})
    edges, counts = found.histogram("a")
    assert len(edges) == len(counts) + 1
    assert (edges[0], edges[-1]) == pytest.approx((1e-12, 1e2))
    inside = [abs(mean) for mean in means if edges[0] <= abs(mean) < edges[-1]]
    expected = [sum(low <= mean < high for mean in inside) for low, high in itertools.pairwise(edges)]
    expected[0] += 2
    expected[-1] += 1
    assert list(counts) == expected
    assert sum(found.histogram()[1]) == 9
    with pytest.raises(ValueError, match="layer must be one of 'a', 'b', got 'c'"):
        found.histogram("c")
    assert LayerWeightMeans(2, 4, (0.0, 0.0), 0.0).mean_share == 0.0


# results --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def found() -> GradientStatistics:
    return gradient_statistics(small(), images(), cross_entropy)


def test_the_tables(found: GradientStatistics) -> None:
    lines = str(found).splitlines()
    assert repr(found) == str(found)
    assert lines[0] == "Gradients with and without their row means, over 3 batches in training mode (mean ± std)"
    assert [line.split()[0] for line in lines[2:]] == WEIGHTS
    assert f"{found.layers['first.weight'].mean['norm']:.3g} ± " in lines[2]
    with pytest.raises(AttributeError):
        found.training = False  # type: ignore[misc]
    means = weight_means(small())
    lines = repr(means).splitlines()
    assert lines[0] == "Means of weight vectors"
    assert [line.split()[0] for line in lines[2:]] == WEIGHTS
    assert lines[2].split()[1:3] == ["6", "18"]
    assert lines[2].split()[-2] == f"{means.layers['first.weight'].mean_share:.3g}"


def test_the_dictionaries_are_for_json(found: GradientStatistics) -> None:
    read = json.loads(json.dumps(found.to_dict()))
    assert read == found.to_dict()
    assert read["layers"]["up.weight"]["norm"] == list(found.layers["up.weight"].norm)
    assert read["layers"]["up.weight"]["mean"]["mean_share"] == found.layers["up.weight"].mean["mean_share"]
    means = weight_means(small())
    read = json.loads(json.dumps(means.to_dict()))
    assert read == means.to_dict()
    assert sum(read["layers"]["up.weight"]["counts"]) == 4
    assert len(read["edges"]) == len(read["counts"]) + 1


def test_the_plots(found: GradientStatistics, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ax = found.plot()
    labels = ["first.weight", "first.weight, centred", "last.weight", "last.weight, centred"]
    assert [line.get_label() for line in ax.lines] == labels
    assert tuple(ax.lines[1].get_ydata()) == found.layers["first.weight"].centred_norm
    assert found.plot(ax) is ax
    share = found.plot(quantity="mean_share", layers=["up.weight"])
    assert [tuple(line.get_ydata()) for line in share.lines] == [found.layers["up.weight"].mean_share]
    with pytest.raises(ValueError, match="quantity must be one of"):
        found.plot(quantity="l2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers must be one of .*, got 'head'"):
        found.plot(layers=["head"])

    means = weight_means(small())
    rows = means.plot(label="before")
    assert means.plot(rows, label="after") is rows
    assert [line.get_label() for line in rows.lines] == ["before", "after"]
    assert len(rows.lines[0].get_ydata()) == sum(layer.units for layer in means.layers.values())
    histogram = means.plot(kind="histogram", label="before")
    assert tuple(histogram.patches[0].get_data().values) == means.histogram()[1]
    with pytest.raises(ValueError, match="kind must be one of"):
        means.plot(kind="bars")  # type: ignore[arg-type]
    for own in (ax, share, rows, histogram):
        plt.close(own.figure)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"GradientStatistics\.plot needs matplotlib"):
        found.plot()
    with pytest.raises(ImportError, match=r"WeightMeans\.plot needs matplotlib"):
        means.plot()
