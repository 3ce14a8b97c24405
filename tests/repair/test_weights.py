"""Averages, roundings, prunings and merges: what they do to weights, by the definition; and that statistics follow."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import wellcond
from wellcond import repair
from wellcond.repair.channels import find_channels
from wellcond.repair.merging import best_matches


class Block(nn.Module):
    """A residual block with a depthwise convolution inside, as functions and as modules."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.up, self.first = nn.Conv2d(inputs, 6, 1, bias=bias), nn.BatchNorm2d(6)
        self.deep, self.second = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=bias), nn.BatchNorm2d(6)
        self.down, self.third = nn.Conv2d(6, outputs, 1, bias=bias), nn.BatchNorm2d(outputs)
        self.side = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.second(self.deep(self.first(self.up(x)).relu())))
        return (self.third(self.down(y)) + self.side(x)).relu()


class Net(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (4, 4, 5), bias: bool = False, pooled: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, padding=1, bias=bias), nn.BatchNorm2d(widths[0]))
        self.blocks = nn.Sequential(*(Block(a, b, bias) for a, b in itertools.pairwise(widths)))
        self.hidden = nn.Linear(widths[-1] * (1 if pooled else 16), 7)
        self.last, self.head = nn.BatchNorm1d(7), nn.Linear(7, 2)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.stem(x)))
        x = x.mean((2, 3)) if self.pooled else torch.flatten(x, 1)
        return self.head(F.relu(self.last(self.hidden(x))))


def images(seed: int = 0, count: int = 12) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    model = Net(**options).double()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return wellcond.calibrate(model, [images(seed + 50)]).eval()


def is_calibrated(model: nn.Module, x: Tensor) -> bool:
    """Whether evaluation on a batch is what training mode makes of it, but for the unbiased variance."""
    training = copy.deepcopy(model).train()
    return bool(torch.allclose(training(x), model.eval()(x), rtol=0.2, atol=0.1))


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# averages -------------------------------------------------------------------------------------------------------------


def test_averages_are_of_all_weights_and_calibrated() -> None:
    models = [network(seed) for seed in range(3)]
    found = repair.average([models[0], models[1].state_dict(), models[2]], [images()], weights=[0.5, 0.25, 0.25])
    for name, value in found.named_parameters():
        parts = [dict(model.named_parameters())[name] for model in models]
        assert_close(value, 0.5 * parts[0] + 0.25 * parts[1] + 0.25 * parts[2])
    assert is_calibrated(found, images())
    assert not is_calibrated(repair.average(models), images())
    assert_close(models[0].stem[1].running_mean, network(0).stem[1].running_mean)


def test_half_precision_is_averaged_in_single() -> None:
    models = [nn.Linear(1, 1, bias=False).bfloat16() for _ in range(256)]
    for position, model in enumerate(models):
        model.weight.data.fill_(1.0 if position % 2 else 3.0)
    assert float(repair.average(models).weight) == 2.0


@pytest.mark.parametrize(
    ("models", "options", "error", "said"),
    [
        (lambda: [network()], {}, ValueError, "models must be two or more, got 1"),
        (lambda: [network().state_dict(), network()], {}, TypeError, r"models\[0\] must be a torch.nn.Module"),
        (lambda: [network(), 3], {}, TypeError, r"models\[1\] must be a torch.nn.Module or a state dict, got int"),
        (lambda: [network(), network(bias=True)], {}, ValueError, r"models\[1\] is of another architecture"),
        (lambda: [network(), network(widths=(4, 4, 6))], {}, ValueError, "'blocks.1.down.weight' has shape"),
        (lambda: [network()] * 2, {"weights": [0.5, 0.6]}, ValueError, "weights must be 2 numbers whose sum is 1"),
    ],
)
def test_averages_refuse(models: Callable[[], Any], options: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        repair.average(models(), **options)


# rounding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_rounded_weights_are_the_nearest_of_few(bits: int, per: Any) -> None:
    model, before = network(), network()
    assert repair.round_weights(model, bits, [images()], per=per) is model
    largest = 2 ** (bits - 1) - 1
    for name in ("stem.0", "blocks.0.deep", "hidden"):
        old, new = before.get_submodule(name).weight, model.get_submodule(name).weight
        rows = zip(old, new, strict=True) if per == "channel" else [(old, new)]
        for one, other in rows:
            step = one.abs().max() / largest
            assert_close((other / step).round(), other / step)
            assert (one - other).abs().max() <= step / 2 + 1e-12
            assert (other / step).abs().max() <= largest + 1e-9
    assert torch.equal(model.last.weight, before.last.weight)
    assert is_calibrated(model, images())


def test_transposed_convolutions_are_rounded_by_their_own_output_channels() -> None:
    layer = nn.ConvTranspose2d(2, 3, 2)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([1.0, 100.0, 0.01]).view(1, 3, 1, 1))
    old = layer.weight.detach().clone()
    repair.round_weights(nn.Sequential(layer), 8)
    assert ((layer.weight - old).abs().amax((0, 2, 3)) <= old.abs().amax((0, 2, 3)) / 250).all()


def test_rounding_of_chosen_layers_and_of_nothing() -> None:
    model, before = network(), network()
    repair.round_weights(model, 3, where=lambda name, module: name == "hidden")
    assert torch.equal(model.head.weight, before.head.weight)
    assert not torch.equal(model.hidden.weight, before.hidden.weight)
    repair.round_weights(nn.Sequential(nn.Linear(2, 2).requires_grad_(False)), 3)
    for bad, said in ((1, "bits must be between 2 and 16, got 1"), (17, "bits must be between 2 and 16, got 17")):
        with pytest.raises(ValueError, match=said):
            repair.round_weights(model, bad)
    with pytest.raises(ValueError, match="has no linear layer or convolution to round"):
        repair.round_weights(nn.Sequential(nn.BatchNorm1d(2)), 4)


# channels -------------------------------------------------------------------------------------------------------------


@given(
    widths=st.lists(st.integers(3, 6), min_size=2, max_size=4).map(tuple),
    bias=st.booleans(),
    pooled=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=12, deadline=None)
def test_a_permutation_of_channels_changes_nothing_that_is_computed(
    widths: tuple[int, ...], bias: bool, pooled: bool, seed: int
) -> None:
    model = network(seed, widths=widths, bias=bias, pooled=pooled)
    expected, before = model(images()), model.stem[0].weight.clone()
    groups = find_channels(model)
    assert sum(each.fixed is None for each in groups) >= len(widths)
    for channels in groups:
        if channels.fixed is None:
            channels.select(torch.randperm(channels.size).roll(1))
    assert_close(model(images()), expected)
    if groups[0].fixed is None:
        assert model.stem[0].weight.shape == before.shape


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"pooled": True}, {"widths": (3, 6, 6)}])
def test_removed_channels_compute_what_zeros_do_and_the_smallest_go(share: float, options: Any) -> None:
    small = repair.prune_channels(network(**options), share)
    zeros = repair.prune_channels(network(**options), share, remove=False)
    assert_close(small(images()), zeros(images()))
    for name, value in small.state_dict().items():
        assert value.dim() == 0 or value.shape[0] <= zeros.state_dict()[name].shape[0]
    assert small.hidden.out_features == 7 - int(share * 7) == small.last.num_features
    norms = network(**options).hidden.weight.square().sum(1)
    kept = norms.argsort(descending=True)[: small.hidden.out_features].sort().values
    assert_close(small.hidden.bias, network(**options).hidden.bias[kept])
    assert small.blocks[0].deep.groups == 6 - int(share * 6)
    assert is_calibrated(repair.prune_channels(network(**options), share, [images()]), images())
    small.train()(images()).sum().backward()


class Unknown(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.stem(x))).mean((2, 3))
        return self.head(F.relu(self.last(self.hidden(torch.softmax(x, 1)))))


class ByValue(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else self.head(x.new_zeros(len(x), 7))


def test_what_is_not_known_stays_and_is_named() -> None:
    torch.manual_seed(0)
    model = Unknown(pooled=True).double()
    reasons = [each.fixed for each in find_channels(model)]
    assert "goes into softmax" in reasons
    before = model.blocks[1].down.weight.clone()
    repair.prune_channels(model, 0.5)
    assert len(model.blocks[1].down.weight) == len(before)
    assert len(model.blocks[0].up.weight) == 3
    with pytest.raises(TypeError, match=r"ByValue cannot be traced \(torch.fx\)"):
        repair.prune_channels(ByValue(), 0.5)
    with pytest.raises(ValueError, match="no channels that could be taken away: '0' is the output"):
        repair.prune_channels(nn.Sequential(nn.Linear(2, 2)), 0.5)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"share must lie between 0 and 1, got {share}"):
            repair.prune_channels(network(), share)


# merging --------------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_best_matching_is_that_of_all_permutations(size: int, seed: int) -> None:
    gains = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    found = best_matches(gains)
    assert sorted(found.tolist()) == list(range(size))
    best = max(sum(float(gains[i, p[i]]) for i in range(size)) for p in itertools.permutations(range(size)))
    assert float(gains[torch.arange(size), found].sum()) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"bias": True, "pooled": True}, {"widths": (5, 5, 3)}])
def test_a_permuted_copy_is_found_again(options: Any) -> None:
    model = network(**options).train()
    shuffled = copy.deepcopy(model)
    torch.manual_seed(3)
    for channels in find_channels(shuffled):
        if channels.fixed is None:
            channels.select(torch.randperm(channels.size))
    assert not torch.equal(shuffled.hidden.weight, model.hidden.weight)
    assert repair.align(shuffled, model, [images(1, 40), images(2, 40)]) is shuffled
    for name, value in model.state_dict().items():
        assert_close(shuffled.state_dict()[name], value)
    assert model.training
    assert not model.stem[0]._forward_hooks


def test_a_merge_is_the_average_with_the_aligned_one_calibrated() -> None:
    first, second = network(0), network(1)
    before = copy.deepcopy(second.state_dict())
    found = repair.merge(first, second, [images()], share=0.25)
    for name, value in before.items():
        assert torch.equal(second.state_dict()[name], value)
    aligned = repair.align(copy.deepcopy(second), first, [images()])
    assert_close(found.hidden.weight, 0.25 * first.hidden.weight + 0.75 * aligned.hidden.weight)
    assert is_calibrated(found, images())
    unmatched = repair.merge(first, second, [images()], matched=False)
    assert_close(unmatched.hidden.weight, (first.hidden.weight + second.hidden.weight) / 2)


def test_merges_refuse() -> None:
    with pytest.raises(TypeError, match="loader must be something to go through twice"):
        repair.merge(network(), network(1), iter([images()]))
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 1.5"):
        repair.merge(network(), network(1), [images()], share=1.5)
    with pytest.raises(ValueError, match="must be of one architecture"):
        repair.align(network(), network(widths=(4, 4, 6)), [images()])
    with pytest.raises(ValueError, match="the loader gave no batch"):
        repair.align(network(), network(1), [])
