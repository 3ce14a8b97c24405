"""Converting a model's linear layers and convolutions, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import wellcond
from wellcond.nn import (
    EigenConv2d,
    GeneralizedWhitenedLinear,
    NetworkDeconvolution2d,
    WhitenedConv2d,
    WhitenedLinear,
    convert_layers,
)

FLOAT64 = torch.float64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.rest = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, groups=2))
        self.head = nn.Linear(6, 3)
        self.again = self.head  # under two names

    def forward(self, x: Tensor) -> Tensor:
        features = self.rest(self.first(x)).mean((2, 3))
        return self.head(features) + self.again(features)


def batch(seed: int = 0) -> Tensor:
    return torch.randn(8, 2, 7, 7, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


@pytest.mark.parametrize("kind", ["wnn", "eigen", "gwnn"])
def test_the_function_and_the_parameters_stay(kind: str) -> None:
    model = Net().double().eval()
    parameters = dict(model.named_parameters())
    expected = model(batch())
    assert convert_layers(model, kind) is model
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    torch.testing.assert_close(model(batch()), expected, rtol=1e-12, atol=1e-12)
    assert model.head is model.again
    assert not model.first.training


def tied(layer: nn.Linear) -> nn.Embedding:
    words = nn.Embedding(*layer.weight.shape)
    words.weight = layer.weight
    return words


def test_types() -> None:
    model = convert_layers(Net(), "wnn")
    assert [type(model.first), type(model.rest[2]), type(model.head)] == [
        WhitenedConv2d,
        WhitenedConv2d,
        WhitenedLinear,
    ]
    assert type(convert_layers(Net(), "eigen").first) is EigenConv2d
    assert type(convert_layers(Net(), "gwnn").head) is GeneralizedWhitenedLinear
    model = convert_layers(Net(), "nd", block=2)
    assert type(model.first) is NetworkDeconvolution2d
    assert model.first.block == 2
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize("kind", ["wnn", "eigen", "gwnn", "nd"])
def test_back_to_plain_layers_after_training(kind: str) -> None:
    options = {} if kind == "nd" else {"refresh_every": 1, "stats_every": 1}
    model = convert_layers(Net().double(), kind, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
    model.eval()
    expected = model(batch(9))
    convert_layers(model, "plain")
    assert {type(module) for module in (model.first, model.rest[2])} == {nn.Conv2d}
    assert type(model.head) is nn.Linear
    torch.testing.assert_close(model(batch(9)), expected, rtol=1e-10, atol=1e-10)


def test_where() -> None:
    model = convert_layers(Net(), "wnn", where=lambda name, module: name == "rest.2")
    assert [type(model.first), type(model.rest[2]), type(model.head)] == [nn.Conv2d, WhitenedConv2d, nn.Linear]
    with pytest.raises(ValueError, match=r"has no nn.Linear or nn.Conv2d to convert that `where` selects"):
        convert_layers(model, "wnn", where=lambda name, module: False)
    with pytest.raises(ValueError, match="Net has no layer of this library to convert"):
        convert_layers(Net(), "plain")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda model: model.head.register_forward_hook(lambda *_: None), TypeError, "'head' has hooks"),
        (lambda model: setattr(model.head, "forward", lambda x: x), TypeError, "'head' has hooks or a forward"),
        (
            lambda model: setattr(model, "encoder", nn.TransformerEncoderLayer(4, 2, 4)),
            TypeError,
            r"'encoder.linear1' belongs to an nn.TransformerEncoderLayer",
        ),
        (
            lambda model: setattr(model, "words", tied(model.head)),
            TypeError,
            "'head' shares its weight with 'words', which a refresh would change",
        ),
        (lambda model: nn.utils.parametrizations.weight_norm(model.rest[2]), None, ""),
    ],
    ids=["hook", "forward", "encoder", "tied", "parametrized"],
)
def test_what_would_be_lost_is_refused_and_nothing_changes(
    spoil: Callable[[Net], object], error: type[Exception] | None, message: str
) -> None:
    model = Net()
    spoil(model)
    if error is None:  # a subclass of torch's making: left alone
        convert_layers(model, "wnn")
        assert nn.utils.parametrize.is_parametrized(model.rest[2])
        return
    types = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        convert_layers(model, "wnn")
    assert [type(module) for module in model.modules()] == types


def test_errors() -> None:
    with pytest.raises(ValueError, match="to must be one of 'wnn', 'eigen', 'gwnn', 'nd', 'plain', got 'zca'"):
        convert_layers(Net(), "zca")
    with pytest.raises(TypeError, match="takes no options, got 'refresh_every'"):
        convert_layers(convert_layers(Net(), "wnn"), "plain", refresh_every=3)
    with pytest.raises(TypeError, match="the model is a Linear itself: use from_layer"):
        convert_layers(nn.Linear(2, 2), "wnn")
    model = Net()
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        convert_layers(model, "wnn", refresh=3)
    assert type(model.first) is nn.Conv2d


@pytest.mark.parametrize("transform", [wellcond.FeatureWhitening, wellcond.FeatureDescent])
def test_gradients_of_whitened_layers_are_not_preconditioned_too(transform: type) -> None:
    """Their weight does not multiply what they are given, but white features."""
    model = Net().double()
    convert_layers(model, "wnn", where=lambda name, module: name == "first")
    convert_layers(model, "nd", where=lambda name, module: name == "rest.2")
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, transform(stats_every=1, solve_every=1))
    for run, steps in ((model, optimizer), (other, plain)):
        run(batch()).square().mean().backward()
        steps.step()
    assert torch.equal(model.first.weight, other.first.weight)
    assert torch.equal(model.rest[2].weight, other.rest[2].weight)
    assert not torch.allclose(model.head.weight, other.head.weight)
    assert "the layer whitens its features itself" in str(handle.report())
