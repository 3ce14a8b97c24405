"""The inputs that enter a second moment: of several passes, of tied weights, under activation checkpointing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from preconditioned_by_hand import (
    BOTH,
    IMMEDIATE,
    NAMES,
    assert_same_weights,
    attached,
    batch,
    inverse_power,
    loss_of,
    moment_of,
    preconditioned,
    second_moment,
    small_net,
    state_of,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wellcond
from wellcond import FeatureDescent, FeatureWhitening


@BOTH
@pytest.mark.parametrize("sizes", [(1, 3, 4), (2, 2, 2, 2), (8,), (7, 1)])
def test_micro_batches_equal_one_big_batch(transform_type: type, sizes: tuple[int, ...]) -> None:
    """Statistics are averaged weighted by N: a micro-batch of 7 counts seven times one of 1."""
    results = []
    for parts in (sizes, (sum(sizes),)):
        model = small_net()
        optimizer, _ = attached(model, transform_type(stats_decay=0.5, stats_every=2, solve_every=2))
        for step in range(4):
            x, y = batch(step, size=sum(sizes))
            optimizer.zero_grad()
            for xs, ys in zip(x.split(list(parts)), y.split(list(parts)), strict=True):
                nn.functional.cross_entropy(model(xs), ys, reduction="sum").backward()
            optimizer.step()
        results.append((model, [moment_of(optimizer, model[i].weight) for i in (0, 2, 5, 7)]))
    assert_same_weights(results[0][0], results[1][0], 1e-10)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@BOTH
def test_several_forwards_and_a_module_called_twice_are_all_seen(transform_type: type) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, dtype=torch.float64)
    optimizer, _ = attached(layer, transform_type(**IMMEDIATE), lr=0.0)
    x, z = torch.randn(3, 4, dtype=torch.float64), torch.randn(7, 2, 4, dtype=torch.float64)
    hidden = layer(x)
    (layer(hidden).square().sum() + layer(z).sum()).backward()
    optimizer.step()
    expected = second_moment(layer, [x, hidden, z], True)
    torch.testing.assert_close(moment_of(optimizer, layer.weight).numpy(), expected, rtol=1e-12, atol=1e-12)


@BOTH
@pytest.mark.parametrize("biases", ["none", "own", "shared", "one"])
def test_a_tied_weight_sees_the_inputs_of_all_its_layers(transform_type: type, biases: str) -> None:
    """The bias goes along only where all uses share it; otherwise each bias has its plain gradient."""
    torch.manual_seed(0)
    first = nn.Linear(4, 4, bias=biases != "none", dtype=torch.float64)
    second = nn.Linear(4, 4, bias=biases in ("own", "shared"), dtype=torch.float64)
    second.weight = first.weight
    if biases == "shared":
        second.bias = first.bias
    model = nn.Sequential(first, nn.Tanh(), second)
    optimizer, handle = attached(model, transform_type(damping=0.05, **IMMEDIATE), lr=0.0)
    x = torch.randn(6, 4, dtype=torch.float64)
    hidden = first(x).tanh().detach()
    optimizer.zero_grad()
    # The line above was a forward of its own, in train mode: take its observation out of this step.
    handle.remove()
    handle = wellcond.attach(optimizer, model, transform_type(damping=0.05, **IMMEDIATE))
    model(x).sin().sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    together = biases == "shared"
    m = second_moment(first, [x, hidden], together)
    torch.testing.assert_close(moment_of(optimizer, first.weight).numpy(), m, rtol=1e-12, atol=1e-12)
    t = inverse_power(m, transform_type, 0.05)
    weight_grad, bias_grad = preconditioned(first, t, before["0.weight"], before["0.bias"] if together else None)
    torch.testing.assert_close(first.weight.grad, weight_grad, rtol=1e-9, atol=1e-11)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.testing.assert_close(parameter.grad, bias_grad if together else before[name], rtol=1e-9, atol=1e-11)
    assert handle.stats()[NAMES[transform_type]]["weights"] == 1


@BOTH
@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_weight_tied_to_an_embedding_sees_the_inputs_of_both(transform_type: type, embedding_first: bool) -> None:
    """Either use's second moment is kept; which one the model lists first makes no difference."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head) if embedding_first else nn.ModuleList([head, embedding])
    optimizer, handle = attached(model, transform_type(**IMMEDIATE), lr=0.0)
    tokens = torch.tensor([1, 2, 3, 1])
    head(embedding(tokens)).square().sum().backward()
    before = head.weight.grad.clone()
    optimizer.step()
    assert not torch.allclose(head.weight.grad, before, rtol=1e-2)
    assert float(head.weight.grad.norm()) == pytest.approx(float(before.norm()), rel=1e-5)
    assert handle.stats()[NAMES[transform_type]]["weights"] == 1
    hidden = embedding(tokens).detach()
    torch.testing.assert_close(
        state_of(optimizer, head.weight, "token_moment")[0], torch.tensor([0, 2, 1, 1, 0, 0, 0]) / 4
    )
    moment = optimizer.state[head.weight][f"wellcond_{NAMES[transform_type]}_second_moment"]
    torch.testing.assert_close(moment[0], hidden.mT @ hidden / 4)


@BOTH
def test_inputs_given_by_keyword_are_seen(transform_type: type) -> None:
    torch.manual_seed(0)
    moments = []
    x = torch.randn(5, 4)
    for call in (lambda layer: layer(x), lambda layer: layer(input=x)):
        torch.manual_seed(1)
        layer = nn.Linear(4, 3)
        optimizer, _ = attached(layer, transform_type(**IMMEDIATE))
        call(layer).sum().backward()
        optimizer.step()
        moments.append(moment_of(optimizer, layer.weight))
    assert torch.equal(*moments)
    assert float(moments[0].abs().sum()) > 0


@BOTH
def test_eval_and_no_grad_passes_do_not_count(transform_type: type) -> None:
    results = []
    for disturbed in (False, True):
        model = small_net()
        optimizer, _ = attached(model, transform_type(stats_every=1, solve_every=2))
        for step in range(4):
            optimizer.zero_grad()
            if disturbed:
                with torch.no_grad():
                    model(100 * batch(50 + step)[0])
                with torch.inference_mode():
                    model(100 * batch(55 + step)[0])
                model.eval()
                model(100 * batch(60 + step)[0])
                model.train()
            loss_of(model, step).backward()
            optimizer.step()
        results.append((model, moment_of(optimizer, model[0].weight)))
    assert torch.equal(results[0][1], results[1][1])
    for a, b in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
        assert torch.equal(a, b)


@BOTH
def test_an_unbatched_convolution_is_seen_like_a_batch_of_one(transform_type: type) -> None:
    moments = []
    x = torch.linspace(-1, 2, 2 * 5 * 6, dtype=torch.float64).reshape(1, 2, 5, 6)
    for inputs in (x, x[0]):
        torch.manual_seed(0)
        layer = nn.Conv2d(2, 3, 3, dtype=torch.float64)
        optimizer, _ = attached(layer, transform_type(**IMMEDIATE))
        layer(inputs).sum().backward()
        optimizer.step()
        moments.append(moment_of(optimizer, layer.weight))
    torch.testing.assert_close(*moments, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(moments[0].numpy(), second_moment(layer, [x], True), rtol=1e-12)


@pytest.mark.parametrize("numbers", [1, 400, 10**9])
def test_laying_rows_out_in_pieces_changes_nothing(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one sample, of a few, and of the whole batch; the batch is no multiple of the few."""
    monkeypatch.setattr("wellcond.numerics.pieces.CHUNK", numbers)
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 4, 2, groups=2, dtype=torch.float64)
    optimizer, _ = attached(layer, FeatureWhitening(**IMMEDIATE))
    x = torch.randn(7, 2, 4, 5, dtype=torch.float64)
    layer(x).sum().backward()
    optimizer.step()
    expected = second_moment(layer, [x], True)
    np.testing.assert_allclose(moment_of(optimizer, layer.weight).numpy(), expected, rtol=1e-12, atol=1e-14)


# activation checkpointing -------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.net = small_net()
        self.use_reentrant = use_reentrant

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return module(x)
        return checkpoint(module, x, use_reentrant=self.use_reentrant)

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(self.net[:4], x.requires_grad_())
        return self.run(self.net[4:7], x) @ self.net[7].weight.mT


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_checkpointed_samples_count_once(use_reentrant: bool, parts: int) -> None:
    results = []
    for setting in (None, use_reentrant):
        model = Checkpointed(setting)
        chosen = FeatureDescent(stats_every=2, solve_every=2, stats_decay=0.5, where=lambda name, _: name != "net.7")
        optimizer, _ = attached(model, chosen)
        for step in range(5):
            optimizer.zero_grad()
            for i, (x, y) in enumerate(
                zip(*(t.split([3, 1] if parts == 2 else [4]) for t in batch(step)), strict=True)
            ):
                # One micro-batch checkpointed, the other not: were a recomputation counted, M would differ.
                model.use_reentrant = setting if i == 0 else None
                nn.functional.cross_entropy(model(x.clone()), y).backward()
            optimizer.step()
        results.append((model, [moment_of(optimizer, model.net[i].weight) for i in (0, 2, 5)]))
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert_same_weights(results[0][0], results[1][0], 1e-11)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("checkpointed_first", [False, True])
def test_a_layer_called_inside_and_outside_a_checkpoint_counts_both(
    use_reentrant: bool, checkpointed_first: bool
) -> None:
    moments = []
    for checkpoint_it in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(3, 3, dtype=torch.float64)
        optimizer, _ = attached(layer, FeatureDescent(**IMMEDIATE))
        x = torch.randn(4, 3, dtype=torch.float64).requires_grad_()

        def inside(h: Tensor, layer: nn.Module = layer, checkpoint_it: bool = checkpoint_it) -> Tensor:
            return checkpoint(layer, h, use_reentrant=use_reentrant) if checkpoint_it else layer(h)

        order = (inside, layer) if checkpointed_first else (layer, inside)
        order[1](order[0](x).sin()).sum().backward()
        optimizer.step()
        moments.append(moment_of(optimizer, layer.weight))
    torch.testing.assert_close(*moments, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_discarded_forward_does_not_disturb_a_later_checkpoint(use_reentrant: bool) -> None:
    """Step 0 looks at an output without a backward pass; step 1 must still be seen, once."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 3, dtype=torch.float64)
    optimizer, _ = attached(layer, FeatureDescent(**IMMEDIATE), lr=0.0)
    layer(torch.randn(2, 3, dtype=torch.float64))
    layer(torch.randn(4, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    x = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    optimizer.step()
    expected = second_moment(layer, [x], True)
    torch.testing.assert_close(moment_of(optimizer, layer.weight).numpy(), expected, rtol=1e-12, atol=1e-12)
