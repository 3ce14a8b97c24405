"""Which layers of a model predict one another's statistics, and what passes between them in a forward pass."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wellcond.lab.networks.registry import MODELS
from wellcond.nn.norm.kalman.graph import Filtered, Summed
from wellcond.nn.norm.kalman.layer import KalmanBatchNorm2d, filter_moments
from wellcond.nn.norm.kalman.trace import connect_kalman

FLOAT64 = torch.float64
BOTH = pytest.mark.parametrize("learned", [True, False], ids=["learned", "sampled"])


def close(actual: object, expected: object, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def kalman(model: nn.Module, **options: object) -> nn.Module:
    """Put the layer in the place of every nn.BatchNorm2d."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, KalmanBatchNorm2d(module.num_features, **options))
    return model


def layers_of(model: nn.Module) -> dict[str, KalmanBatchNorm2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, KalmanBatchNorm2d)}


def nothing_is_left(model: nn.Module) -> bool:
    return not any(layer._graph._live for layer in layers_of(model).values())


def chain(learned: bool = True, group_size: int | None = 2, gain: float | None = None) -> nn.Sequential:
    """Three layers of 4, 6 and 6 channels."""
    torch.manual_seed(0)
    options = {"learned": learned, "group_size": group_size, "gain": gain}
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        KalmanBatchNorm2d(4, **options),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        KalmanBatchNorm2d(6, **options),
        nn.GELU(),
        nn.Dropout(0.0),
        nn.Conv2d(6, 6, 1),
        KalmanBatchNorm2d(6, **options),
    )
    connect_kalman(model)
    with torch.no_grad():
        for layer in layers_of(model).values():
            if layer.transition is not None:
                layer.transition.normal_(0, 0.3)
                layer.transition_bias.normal_(0, 0.3)
    return model.double()


def images(samples: int = 4, size: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


# who comes before whom ----------------------------------------------------------------------------------------------


@BOTH
def test_resnet18(learned: bool) -> None:
    model = kalman(torchvision.models.resnet18(num_classes=10), learned=learned, group_size=2)
    found = connect_kalman(model)
    expected: dict[str, tuple[str, ...]] = {"bn1": ()}
    stream: tuple[str, ...] = ("bn1",)
    for stage in range(1, 5):
        for block in range(2):
            name = f"layer{stage}.{block}"
            expected[f"{name}.bn1"] = stream
            expected[f"{name}.bn2"] = (f"{name}.bn1",)
            if stage > 1 and block == 0:
                expected[f"{name}.downsample.1"] = stream
                stream = (f"{name}.bn2", f"{name}.downsample.1")
            else:
                stream = (*stream, f"{name}.bn2")
    assert found == expected
    assert list(found) == list(expected)
    y = model(torch.randn(4, 3, 32, 32))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert nothing_is_left(model)
    if learned:
        assert model.layer2[0].bn1.transition.shape == (128, 64)
        assert model.layer2[0].downsample[1].transition.shape == (128, 64)
        # Deeper, with one or four positions, two samples may have too little variance for the prediction to be used.
        layers = [layer for name, layer in layers_of(model).items() if name.startswith("layer1")]
        assert all(layer.transition.grad.abs().max() > 0 for layer in layers)


@BOTH
def test_vgg11(learned: bool) -> None:
    model = kalman(torchvision.models.vgg11_bn(init_weights=False), learned=learned)
    found = connect_kalman(model.features)
    names = ["1", "5", "9", "12", "16", "19", "23", "26"]
    assert found == dict(zip(names, [(), *((name,) for name in names)], strict=False))


@BOTH
def test_resnet8_of_the_lab(learned: bool) -> None:
    found = connect_kalman(kalman(MODELS["resnet8"].build(3, 10), learned=learned))
    assert found == {
        "0.1": (),
        "1.first.1": ("0.1",),
        "1.second.1": ("1.first.1",),
        "2.first.1": ("0.1", "1.second.1"),
        "2.second.1": ("2.first.1",),
        "2.shortcut.1": ("0.1", "1.second.1"),
        "3.first.1": ("2.second.1", "2.shortcut.1"),
        "3.second.1": ("3.first.1",),
        "3.shortcut.1": ("2.second.1", "2.shortcut.1"),
    }


@BOTH
def test_densenet_concatenates(learned: bool) -> None:
    model = torchvision.models.DenseNet(4, (2, 1), num_init_features=8, bn_size=2, num_classes=5)
    found = connect_kalman(kalman(model, learned=learned))
    before = ("features.norm0", "features.denseblock1.denselayer1.norm2")
    assert found["features.denseblock1.denselayer2.norm1"] == before
    if learned:
        assert model.features.denseblock1.denselayer2.norm1.transition.shape == (12, 16)
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()
    assert nothing_is_left(model)


class PreActivation(nn.Module):
    """Two blocks whose sums have convolutions in front, which no normalization follows before the sum."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.norms = nn.ModuleList(KalmanBatchNorm2d(4, **options) for _ in range(5))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in range(2):
            y = self.convs[2 * block](F.relu(self.norms[2 * block](x)))
            y = self.convs[2 * block + 1](self.norms[2 * block + 1](y).relu())
            x = y + x
        return self.norms[4](x)


def test_pre_activation() -> None:
    """Learned, a stream is known as the layer that normalized it says; otherwise, as the sum of its branches."""
    model = PreActivation()
    assert connect_kalman(model) == {
        "norms.0": (),
        "norms.1": ("norms.0",),
        "norms.2": ("norms.0", "norms.1"),
        "norms.3": ("norms.2",),
        "norms.4": ("norms.2", "norms.3"),
    }
    assert model.norms[4].transition.shape == (4, 8)
    model(images().float()).sum().backward()
    assert nothing_is_left(model)
    # The authors' stream begins with what the stem's features are, which no layer has predicted.
    model = PreActivation(learned=False)
    assert connect_kalman(model) == {
        "norms.0": (),
        "norms.1": ("norms.0",),
        "norms.2": (),
        "norms.3": ("norms.2",),
        "norms.4": (),
    }


def test_model_of_one_layer_alone() -> None:
    layer = KalmanBatchNorm2d(3, group_size=2)
    assert connect_kalman(layer) == {"": ()}
    assert layer(images().float()).isfinite().all()


def test_normalizations_of_other_kinds_are_left_out() -> None:
    model = nn.Sequential(
        KalmanBatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1), KalmanBatchNorm2d(4)
    )
    assert connect_kalman(model) == {"0": (), "5": ("0",)}


class Scaled(nn.Module):
    """Something that is taken whole: a gate, and a normalization and dropout within."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1), nn.Sigmoid())
        self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(x * self.gate(x) if x.sum() > -1e9 else x))


@BOTH
def test_modules_without_a_layer_need_not_be_traceable(learned: bool) -> None:
    options = {"learned": learned, "group_size": 2}
    model = nn.Sequential(KalmanBatchNorm2d(3, **options), Scaled(), KalmanBatchNorm2d(3, **options))
    assert connect_kalman(model) == {"0": (), "2": ("0",)}
    reference = copy.deepcopy(model[1])
    model(images().float())
    # Its statistics are of data, not of a sample that stands in for data.
    assert model[1].norm.num_batches_tracked == 1
    assert all(module.training for module in model.modules())
    assert reference.norm.num_batches_tracked == 0


class WithOptions(nn.Module):
    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.first, self.second = (KalmanBatchNorm2d(width, learned=learned, group_size=2) for width in (3, 6))

    def forward(self, x: Tensor, mask: Tensor | None = None, halve: bool = True) -> Tensor:
        if mask is not None:
            x = x * mask
        x = self.first(x)
        x = x + x
        if halve:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2))
        return self.second(x.relu_())


@BOTH
def test_options_of_the_forward_and_a_shortcut_without_weights(learned: bool) -> None:
    model = WithOptions(learned)
    assert connect_kalman(model) == {"first": (), "second": ("first",)}
    model = pickle.loads(pickle.dumps(model))
    assert model(images().float()).isfinite().all()
    assert nothing_is_left(model)


def test_samples_are_not_shown_to_hooks() -> None:
    model = chain(learned=False)
    seen: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: seen.append(name))
    model(images())
    assert sorted(seen) == sorted(name for name, _ in model.named_modules())


def test_a_layer_of_another_kind_since_then_is_missing() -> None:
    model = chain()
    model[1] = nn.BatchNorm2d(4).double()
    with pytest.raises(RuntimeError, match="'5' predicts its statistics from those of '1', which has not run"):
        model(images())
    assert connect_kalman(model) == {"5": (), "9": ("5",)}
    assert model[5].transition is None
    assert model(images()).isfinite().all()


class Multiplied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (KalmanBatchNorm2d(3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.first(x) * self.second(x))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = KalmanBatchNorm2d(3), KalmanBatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) if x.mean() > 0 else x)


def test_what_cannot_be_told_is_named() -> None:
    with pytest.raises(ValueError, match=r"'third' follow from: mul \(node 'mul'\) combines several tensors"):
        connect_kalman(Multiplied())
    with pytest.raises(TypeError, match=r"order of Branching's layers cannot be told.*control flow.*predecessors="):
        connect_kalman(Branching())
    layer = KalmanBatchNorm2d(3)
    with pytest.raises(ValueError, match="'0': a KalmanBatchNorm2d must be used once"):
        connect_kalman(nn.Sequential(layer, nn.ReLU(), layer))
    with pytest.raises(ValueError, match="Sequential has no KalmanBatchNorm2d"):
        connect_kalman(nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got 3"):
        connect_kalman(3)


def test_nothing_changes_where_something_is_refused() -> None:
    model = Multiplied()
    with pytest.raises(ValueError, match="'third'"):
        connect_kalman(model)
    assert not any(layer.connected or layer.transition is not None for layer in layers_of(model).values())


def test_given_predecessors() -> None:
    model = Branching()
    assert connect_kalman(model, predecessors={"second": "first"}) == {"first": (), "second": ("first",)}
    model(images().float() + 1).sum().backward()
    assert model.second.transition.grad.abs().max() > 0
    for given, message in {
        ("second", "third"): "must name the model's 2 KalmanBatchNorm2d, got 'third'",
        ("second", "second"): "'second' must not be its own predecessor",
    }.items():
        with pytest.raises(ValueError, match=message):
            connect_kalman(model, predecessors=dict([given]))
    with pytest.raises(ValueError, match="its own predecessor"):
        connect_kalman(model, predecessors={"first": "second", "second": ["first"]})
    model.second = KalmanBatchNorm2d(3, learned=False)
    with pytest.raises(ValueError, match="'second' has learned=False"):
        connect_kalman(model, predecessors={"second": "first"})
    two = nn.ModuleList([KalmanBatchNorm2d(3), KalmanBatchNorm2d(4), KalmanBatchNorm2d(5)])
    with pytest.raises(ValueError, match=r"equally many channels to be added, got '0' 3, '1' 4"):
        connect_kalman(two, predecessors={"2": ["0", "1"]})


def test_widths_that_were_given_are_checked() -> None:
    model = nn.Sequential(KalmanBatchNorm2d(3), nn.Conv2d(3, 4, 1), KalmanBatchNorm2d(4, predecessor_features=3))
    connect_kalman(model)
    model[2] = KalmanBatchNorm2d(4, predecessor_features=5)
    with pytest.raises(ValueError, match="'2' was made with predecessor_features=5, but its predecessors have 3"):
        connect_kalman(model)


def test_connecting_again_keeps_what_was_learned() -> None:
    model = chain()
    before = model[5].transition
    connect_kalman(model)
    assert model[5].transition is before


# what passes between them -------------------------------------------------------------------------------------------


def moments(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    parts = [part.transpose(0, 1).flatten(1) for part in x.split(size)]
    return torch.stack([p.mean(1) for p in parts]), torch.stack([p.var(1, correction=0) for p in parts])


def normalized(layer: KalmanBatchNorm2d, x: Tensor, mean: Tensor, var: Tensor, size: int) -> Tensor:
    mean, var = (each.repeat_interleave(size, 0)[:, :, None, None] for each in (mean, var))
    return (x - mean) / (var + layer.eps).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]


def chain_by_hand(model: nn.Sequential, x: Tensor, size: int) -> Tensor:
    """The chain, with statistics that go through it by the formulas."""
    before: tuple[Tensor, Tensor] | None = None
    spatial: tuple[int, ...] = ()
    since: list[nn.Module] = []
    for module in model:
        if not isinstance(module, KalmanBatchNorm2d):
            x = module(x)
            since.append(module)
            continue
        mean, var = moments(x, size)
        if before is not None and module.learned:
            e = module.transition
            predicted = before[0] @ e.t() + module.transition_bias, before[1] @ (e * e).t() + module.log_noise.exp()
            mean, var = filter_moments(mean, var, *predicted, module.gain_logit.sigmoid())
        elif before is not None:
            sample = torch.randn(*before[0].shape, *spatial, dtype=FLOAT64)
            sample = sample * before[1].sqrt()[:, :, None, None] + before[0][:, :, None, None]
            for each in since:
                sample = each(sample)
            mean, var = filter_moments(mean, var, sample.mean((2, 3)), sample.var((2, 3), correction=0), module.gain)
        before, spatial, since = (mean, var), x.shape[2:], []
        x = normalized(module, x, mean, var, size)
    return x


@BOTH
def test_a_chain_by_the_formulas(learned: bool) -> None:
    model = chain(learned, gain=0.4)
    x, other = images().requires_grad_(), images().requires_grad_()
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    expected = chain_by_hand(model, other, 2)
    close(y, expected)
    upstream = torch.sin(torch.arange(y.numel(), dtype=FLOAT64)).view(y.shape)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(y, [x, *parameters], upstream, retain_graph=True)
    theirs = torch.autograd.grad(expected, [other, *parameters], upstream)
    close(ours, theirs, 1e-8)
    assert nothing_is_left(model)


class Block(nn.Module):
    def __init__(self, learned: bool) -> None:
        super().__init__()
        options = {"learned": learned, "group_size": 2, "gain": 0.5}
        self.first, self.second, self.third = (KalmanBatchNorm2d(3, **options) for _ in range(3))
        self.inner, self.outer = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        return self.third(self.outer(F.relu(self.second(self.inner(x)) + x)))


@BOTH
def test_shortcuts_add_what_they_began_with(learned: bool) -> None:
    model = Block(learned)
    assert connect_kalman(model)["third"] == ("first", "second")
    model = pickle.loads(pickle.dumps(model)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("transition"):
                parameter.normal_(0, 0.5)
    x = images()
    torch.manual_seed(1)
    y = model(x)

    torch.manual_seed(1)
    first = moments(x, 2)
    x = F.max_pool2d(normalized(model.first, x, *first, 2).relu(), 2)

    def filtered(layer: KalmanBatchNorm2d, before: tuple[Tensor, Tensor], spatial: tuple[int, ...], *since: Callable):
        if learned:
            e = layer.transition
            predicted = before[0] @ e.t() + layer.transition_bias, before[1] @ (e * e).t() + layer.log_noise.exp()
        else:
            sample = torch.randn(2, 3, *spatial, dtype=FLOAT64) * before[1].sqrt()[..., None, None]
            sample = sample + before[0][..., None, None]
            for each in since:
                sample = each(sample)
            predicted = sample.mean((2, 3)), sample.var((2, 3), correction=0)
        own = moments(here, 2)
        mean, var = filter_moments(*own, *predicted, 0.5)
        return (mean, var), normalized(layer, here, mean, var, 2)

    here = model.inner(x)
    second, inner = filtered(model.second, first, (6, 6), F.relu, lambda s: F.max_pool2d(s, 2), model.inner)
    here = model.outer(F.relu(inner + x))
    summed = (first[0] + second[0], first[1] + second[1])
    _, expected = filtered(model.third, summed, (3, 3), F.relu, model.outer)
    close(y, expected)


@BOTH
def test_one_model_several_passes(learned: bool) -> None:
    """A pass that broke off leaves nothing to the next; two passes may be differentiated together."""
    model = chain(learned)
    torch.manual_seed(0)
    expected = [model(images(seed=1)), model(images(6, seed=2))]
    with pytest.raises(RuntimeError, match="Given groups"):
        nn.Sequential(*model[:4], nn.Conv2d(5, 6, 1).double())(images())
    torch.manual_seed(0)
    again = [model(images(seed=1)), model(images(6, seed=2))]
    close(again, expected)
    sum(y.square().sum() for y in again).backward()
    assert nothing_is_left(model)


def test_a_new_pass_forgets_one_that_broke_off() -> None:
    model = chain()
    graph = model[1]._graph
    first, second = (graph._filtered[name] for name in ("1", "5"))
    model[:6](images())
    assert set(graph._live) == {second}
    model[:2](images())
    assert set(graph._live) == {first}
    # The second has not run in this pass: the third must not take what it said in the last.
    with pytest.raises(RuntimeError, match="'9' predicts its statistics from those of '5', which has not run"):
        model[9](torch.randn(4, 6, 3, 3, dtype=FLOAT64))
    # Nor does a whole pass leave anything for parts of the next.
    model(images())
    model[:2](images())
    assert set(graph._live) == {first}


class Doubled(nn.Module):
    """A sum of which a layer reads twice, with a chain of modules in a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (KalmanBatchNorm2d(3, group_size=2) for _ in range(3))
        self.branch = nn.Sequential(nn.ReLU(), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        x = self.branch(self.first(x)) + self.second(x)
        return self.third(x + x.relu())


def test_a_sum_that_is_read_twice() -> None:
    model = Doubled()
    # The first layer has seen what the second normalizes.
    assert connect_kalman(model) == {"first": (), "second": ("first",), "third": ("first", "second")}
    nodes = [Filtered("first"), Filtered("second"), Summed((0, 1)), Summed((2, 2))]
    assert model.third._graph.nodes == tuple(nodes)
    model(images().float())
    assert nothing_is_left(model)


def test_frozen_readers_of_sums_leave_nothing() -> None:
    for learned in (True, False):
        model = Block(learned)
        connect_kalman(model)
        model.third.eval()
        model(images().float())
        assert nothing_is_left(model)


def test_a_part_of_a_model_is_refused() -> None:
    model = chain()
    model(images())
    with pytest.raises(RuntimeError, match="'5' predicts its statistics from those of '1', which has not run"):
        model[4:](torch.randn(4, 4, 3, 3, dtype=FLOAT64))


@BOTH
def test_frozen_layers_hand_on_their_running_statistics(learned: bool) -> None:
    model = chain(learned)
    model(images())
    model[1].eval()
    y = model(images(seed=1))
    y.sum().backward()
    if learned:
        e, layer = model[5].transition, model[5]
        x = model[:5](images(seed=1))
        mean = model[1].running_mean @ e.t() + layer.transition_bias
        var = model[1].running_var @ (e * e).t() + layer.log_noise.exp()
        z, c = moments(x, 2)
        filtered = filter_moments(z, c, mean.expand_as(z), var.expand_as(c), layer.gain_logit.sigmoid())
        layer._graph._ran.clear()
        close(layer(x), normalized(layer, x, *filtered, 2))
    # A frozen reader does not read; nothing waits for it.
    model.train()
    model[5].eval()
    model(images())
    assert nothing_is_left(model)
    model.eval()
    close(model(images(1, seed=4)), model(images(1, seed=4)), 0)


@BOTH
def test_copies_and_pickles_are_models_of_their_own(learned: bool) -> None:
    model = chain(learned)
    torch.manual_seed(0)
    expected = model(images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(other.state_dict()) == list(model.state_dict())
        graph = other[5]._graph
        assert graph is other[1]._graph is not model[5]._graph
        assert all(graph.layers[name] is layer for name, layer in layers_of(other).items())
        if not learned:
            through = graph.nodes[graph.priors["5"]]
            assert [operation.function for operation in through.operations] == [other[2], other[3], other[4]]
        torch.manual_seed(0)
        close(other(images()), expected)
    # In the middle of a pass, too: what is under way is not copied.
    model[:2](images())
    assert model[1]._graph._live
    other = copy.deepcopy(model)
    assert not other[1]._graph._live
    assert pickle.loads(pickle.dumps(model))[5]._graph._live == {}


def test_modules_and_parameters_are_registered_once() -> None:
    model = chain()
    assert len(list(model.named_modules(remove_duplicate=False))) == 11
    own = {"transition", "transition_bias", "log_noise", "gain_logit", "weight", "bias"}
    assert {name.partition(".")[2] for name, _ in model.named_parameters() if name.startswith("5.")} == own
    seen: list[nn.Module] = []
    model.apply(seen.append)
    assert len(seen) == 11


def test_state_dict_of_a_connected_model() -> None:
    model, other = chain(), chain()
    model(images())
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    other.load_state_dict(model.state_dict())
    close(other(images()), model(images()))
    plain = nn.Sequential(*(nn.BatchNorm2d(m.num_features) if isinstance(m, KalmanBatchNorm2d) else m for m in chain()))
    before = other[5].transition.clone()
    other.load_state_dict(plain.state_dict())
    close(other[5].transition, before, 0)


# where a forward pass is repeated, compiled, or wrapped ---------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("pieces", [[(0, 10)], [(0, 4), (4, 10)], [(0, 2), (2, 5), (5, 8), (8, 10)]], ids=str)
def test_checkpointed_segments(learned: bool, pieces: list[tuple[int, int]]) -> None:
    model = chain(learned)
    reference = copy.deepcopy(model)
    x, other = images().requires_grad_(), images().requires_grad_()
    torch.manual_seed(0)
    expected = reference(other)
    expected.square().sum().backward()
    torch.manual_seed(0)
    y = x
    for start, end in pieces:
        y = checkpoint(model[start:end], y, use_reentrant=False)
    y.square().sum().backward()
    close(y, expected)
    close(x.grad, other.grad)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for ours, theirs in zip(model.buffers(), reference.buffers(), strict=True):
        close(ours, theirs)
    assert nothing_is_left(model)


def test_checkpointed_blocks_of_a_residual_net() -> None:
    model = kalman(MODELS["resnet8"].build(3, 10), learned=True, group_size=2)
    connect_kalman(model)
    model.double()
    reference = copy.deepcopy(model)
    x = images(size=8)
    reference(x).square().sum().backward()
    y = x.requires_grad_()
    for module in model:
        y = checkpoint(module, y, use_reentrant=False)
    y.square().sum().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        close(ours.grad, theirs.grad, 1e-9)


def test_reentrant_checkpoints_are_refused() -> None:
    model = chain()
    y = checkpoint(model[:4], images().requires_grad_(), use_reentrant=True)
    y = checkpoint(model[4:], y, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        y.sum().backward()


def test_data_parallel_replicas_are_refused() -> None:
    layer = KalmanBatchNorm2d(3)
    connect_kalman(layer)
    replica = layer._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="does not run in nn.DataParallel"):
        replica(images().float())


@BOTH
def test_compiled(learned: bool) -> None:
    model = chain(learned)
    reference = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for step in range(3):
        x, other = images(seed=step).requires_grad_(), images(seed=step).requires_grad_()
        torch.manual_seed(step)
        y = compiled(x)
        torch.manual_seed(step)
        expected = reference(other)
        if learned:  # The compiler has random numbers of its own.
            close(y, expected, 1e-9)
            close(torch.autograd.grad(y.sin().sum(), x), torch.autograd.grad(expected.sin().sum(), other), 1e-9)
        else:
            y.sum().backward()
    assert nothing_is_left(model)


# training -----------------------------------------------------------------------------------------------------------


@BOTH
def test_training_with_micro_batches_of_two(learned: bool) -> None:
    torch.manual_seed(0)
    model = kalman(MODELS["resnet8"].build(3, 4), learned=learned, group_size=2)
    connect_kalman(model)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, target = torch.randn(16, 3, 12, 12), torch.arange(16) % 4
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[3] < losses[0]
    assert losses[-1] < 0.8 * losses[0]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])}
    assert moved == set(start)
    assert model.eval()(x).isfinite().all()
