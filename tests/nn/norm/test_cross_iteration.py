"""Cross-Iteration Batch Normalization against the paper's formulas, its derivatives taken by autograd."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import wellcond
from wellcond.nn import (
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    CrossIterationBatchNorm3d,
    connect_cross_iteration,
    conversion_report,
    convert_norm,
    weight_standardize,
)

FLOAT64 = torch.float64
LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), CrossIterationBatchNorm1d, (4,)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), CrossIterationBatchNorm1d, (4,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), CrossIterationBatchNorm1d, (4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), CrossIterationBatchNorm2d, (4, 5, 4)),
    "1x1": (lambda: nn.Conv2d(4, 6, 1), CrossIterationBatchNorm2d, (4, 5, 4)),
    "groups": (lambda: nn.Conv2d(4, 6, (2, 3), dilation=2, groups=2), CrossIterationBatchNorm2d, (4, 6, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), CrossIterationBatchNorm2d, (4, 5, 5)),
    "same": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same"), CrossIterationBatchNorm2d, (4, 5, 5)),
    "reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), CrossIterationBatchNorm2d, (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), CrossIterationBatchNorm3d, (4, 3, 3, 2)),
    "standardized": (lambda: weight_standardize(nn.Conv2d(4, 6, 3)), CrossIterationBatchNorm2d, (4, 5, 5)),
    "normed": (lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), CrossIterationBatchNorm2d, (4, 5, 5)),
}
every_layer = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)


def close(actual: object, expected: object, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def draw(shape: tuple[int, ...], step: int, samples: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(samples, *shape, generator=generator, dtype=FLOAT64) + 0.3 * step


def made(case: tuple, **options) -> nn.Sequential:
    torch.manual_seed(0)
    before, norm, _ = case
    layer = before()
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    model = nn.Sequential(layer, norm(outputs, **{"window": 3, **options})).to(FLOAT64)
    connect_cross_iteration(model)
    return model


def move(model: nn.Sequential, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=FLOAT64))


class ByTheFormula:
    """The paper's layer: μ, q and their derivatives of each batch are kept, and moved along the weights."""

    def __init__(self, model: nn.Sequential) -> None:
        self.layer, self.norm = model
        self.past: list[tuple[Tensor, ...]] = []

    def __call__(self, x: Tensor) -> Tensor:
        norm, y = self.norm, self.layer(x)
        axes = (0, *range(2, y.dim()))
        mu, nu = self.moments(y)
        # ∂μ/∂θ and ∂q/∂θ: a channel's depend on its own unit of the weight alone.
        theta = [self.layer.weight.detach().clone().requires_grad_()]
        bias = self.layer.bias
        theta += [] if bias is None else [bias.detach().clone().requires_grad_()]
        if isinstance(self.layer, nn.Linear):
            z = nn.functional.linear(x.detach(), *theta)
        else:
            z = self.layer._conv_forward(x.detach(), theta[0], None if bias is None else theta[1])
        slopes = [torch.autograd.grad(each.sum(), theta, retain_graph=True) for each in self.moments(z)]
        means, squares = [mu], [torch.maximum(nu, mu.square())]
        for old_mu, old_nu, mu_slope, nu_slope, old in self.past[::-1][: norm.window - 1]:
            moved = [now.detach() - then for now, then in zip(theta, old, strict=True)]
            new_mu = old_mu + sum(self.along(*pair) for pair in zip(mu_slope, moved, strict=True))
            new_nu = old_nu + sum(self.along(*pair) for pair in zip(nu_slope, moved, strict=True))
            means.append(new_mu)
            squares.append(torch.maximum(new_nu, new_mu.square()))
        self.past.append((mu.detach(), nu.detach(), *slopes, [each.detach() for each in theta]))
        mean = sum(means) / len(means)
        var = sum(squares) / len(squares) - mean.square()
        shape = (-1, *(1 for _ in axes[1:]))
        y_hat = (y - mean.view(shape)) / (var + norm.eps).sqrt().view(shape)
        return y_hat * norm.weight.view(shape) + norm.bias.view(shape)

    @staticmethod
    def along(slope: Tensor, moved: Tensor) -> Tensor:
        """Σ slope·moved over a channel's own unit."""
        return (slope * moved).reshape(len(slope), -1).sum(1)

    @staticmethod
    def moments(y: Tensor) -> tuple[Tensor, Tensor]:
        axes = (0, *range(2, y.dim()))
        return y.mean(axes), y.square().mean(axes)


@every_layer
def test_the_papers_formula(case: tuple) -> None:
    model = made(case)
    reference = ByTheFormula(model)
    for step in range(5):
        x = draw(case[2], step)
        first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = model(first), reference(second)
        close(y, expected)
        upstream = torch.sin(torch.arange(y.numel(), dtype=FLOAT64)).view(y.shape)
        parameters = list(model.parameters())
        close(
            torch.autograd.grad(y, [first, *parameters], upstream),
            torch.autograd.grad(expected, [second, *parameters], upstream),
        )
        move(model, step)


def test_compensation_is_exact_for_means() -> None:
    """A batch of the past has the mean that it would have now; without compensation, the one that it had."""
    case = LAYERS["conv2d"]
    model, other = made(case, window=2), made(case, window=2, compensate=True)
    other[1].compensate = False
    seen, x = draw(case[2], 1), draw(case[2], 2)
    then = model[0](seen).mean((0, 2, 3))
    for each, taken in ((model, None), (other, then)):
        each(seen)
        move(each, 0)
        mean = each[0](seen).mean((0, 2, 3)) if taken is None else taken
        y, now = each(x), each[0](x)
        own = now.mean((0, 2, 3))
        close(y.mean((0, 2, 3)).sign(), (own - (own + mean) / 2).sign())
        ratio = y.mean((0, 2, 3)) / y.std((0, 2, 3), correction=0)
        close(ratio, (own - mean) / 2 / now.std((0, 2, 3), correction=0))


def test_groups_of_the_batch_have_the_first_ones_past() -> None:
    """As data parallelism keeps rank 0's buffers: each group is joined with the past of the first one."""
    case = LAYERS["conv2d"]
    model, first = made(case, group_size=2), made(case)
    for step in range(4):
        x = draw(case[2], step, samples=6)
        before = copy.deepcopy(first)
        y = model(x)
        for start in (0, 2, 4):
            own = first if start == 0 else copy.deepcopy(before)
            close(y[start : start + 2], own(x[start : start + 2]))
        move(model, step)
        move(first, step)
    for name in ("past_mean", "past_var_slope", "batches_seen"):
        close(getattr(model[1], name), getattr(first[1], name))


def test_state_goes_on_elsewhere() -> None:
    case = LAYERS["conv2d"]
    model = made(case)
    for step in range(3):
        model(draw(case[2], step))
        move(model, step)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = made(case)
    other.load_state_dict(torch.load(file))
    copies = [other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for each in copies:
        assert torch.equal(each(draw(case[2], 7)), copy.deepcopy(model)(draw(case[2], 7)))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("both", [True, False], ids=["with the layer before", "the normalization alone"])
def test_activation_checkpointing_changes_nothing(use_reentrant: bool, both: bool) -> None:
    case = LAYERS["conv2d"]
    model, other = made(case), made(case)
    for step in range(4):
        x, again = draw(case[2], step).requires_grad_(), draw(case[2], step).requires_grad_()
        (model(x) ** 3).sum().backward()
        if both:
            y = checkpoint(other, again, use_reentrant=use_reentrant)
        else:
            y = checkpoint(other[1], other[0](again), use_reentrant=use_reentrant)
        (y**3).sum().backward()
        close(again.grad, x.grad)
        move(model, step)
        move(other, step)
    close(dict(other.named_buffers()), dict(model.named_buffers()))
    close([p.grad for p in other.parameters()], [p.grad for p in model.parameters()])


def test_compiles() -> None:
    torch._dynamo.reset()
    case = LAYERS["conv2d"]
    model, other = made(case), made(case)
    compiled = torch.compile(model, backend="aot_eager_decomp_partition")
    for step in range(4):
        x, again = draw(case[2], step).requires_grad_(), draw(case[2], step).requires_grad_()
        (other(x) ** 3).sum().backward()
        (compiled(again) ** 3).sum().backward()
        close(again.grad, x.grad, 1e-9)
        move(model, step)
        move(other, step)
    close(dict(model.named_buffers()), dict(other.named_buffers()), 1e-9)
    assert model[1]._handover._taken is None


def test_nothing_is_kept_in_evaluation() -> None:
    case = LAYERS["conv2d"]
    model = made(case)
    model(draw(case[2], 0))
    model.eval()
    model(draw(case[2], 1))
    assert model[1]._handover._taken is None


def test_untold_it_refuses() -> None:
    layer = CrossIterationBatchNorm2d(3)
    with pytest.raises(RuntimeError, match=r"does not know the layer before it.*connect_cross_iteration.*compensate"):
        layer(torch.randn(4, 3, 5, 5))
    model = made(LAYERS["conv2d"])
    with pytest.raises(RuntimeError, match=r"'1': the layer before it has not run"):
        model[1](draw((6, 3, 3), 0))


class Branches(nn.Module):
    """Normalizations after all that is no layer of theirs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.twice = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.up = nn.ConvTranspose2d(4, 4, 3)
        for name in ("good", "input", "sum", "again", "second", "transposed", "shared"):
            setattr(self, name, nn.BatchNorm2d(3 if name == "input" else 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.good(self.conv(self.input(x)))
        h = self.sum(h + 1)
        h = self.again(self.twice(h))
        h = self.second(self.twice(h))
        h = self.shared(self.shared(h))
        return self.transposed(self.up(h))


REASONS = {
    "input": "comes after the model's input, not right after",
    "sum": "comes after 'add', not right after",
    "again": "comes after 'twice', which is called 2 times",
    "second": "comes after 'twice', which is called 2 times",
    "transposed": "comes after 'up', a ConvTranspose2d, not right after",
    "shared": "is called 2 times in a forward pass, not once",
}


@pytest.mark.parametrize("to", ["cbn", "mabn"])
def test_conversion_leaves_what_comes_after_something_else(to: str) -> None:
    model = convert_norm(Branches(), to=to)
    report = conversion_report(model)
    assert set(report.changed) == {"good"}
    for name, reason in REASONS.items():
        assert type(getattr(model, name)) is nn.BatchNorm2d
        assert reason in report.left[name]
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    with pytest.raises(ValueError, match=r"none of the selected layers:\n  'sum' comes after 'add'"):
        convert_norm(Branches(), to=to, where=lambda name, module: name == "sum")


@pytest.mark.parametrize("to", ["cbn", "mabn"])
def test_conversion_of_what_cannot_be_traced(to: str) -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) if x.sum() > 0 else x

    with pytest.raises(TypeError, match="changed nothing: the order of Asking's layers cannot be told"):
        convert_norm(Asking(), to=to)
    model = Asking()
    model.norm = CrossIterationBatchNorm2d(4)
    assert connect_cross_iteration(model, {"norm": "conv"}) == {"norm": "conv"}
    assert model(torch.ones(2, 3, 6, 6) + torch.randn(2, 3, 6, 6)).shape == (2, 4, 4, 4)
    for wrong, message in (({}, "must name a layer for each"), ({"norm": "no"}, "must be modules of the model")):
        with pytest.raises(ValueError, match=message):
            connect_cross_iteration(model, wrong)
    with pytest.raises(ValueError, match="comes after 'norm'"):
        connect_cross_iteration(model, {"norm": "norm"})


def test_conversion_there_and_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model(torch.randn(4, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    expected, state = model.eval()(x), copy.deepcopy(model.state_dict())
    convert_norm(model.train(), "cbn", window=4)
    assert model[1].connected
    for _ in range(3):
        model(torch.randn(2, 3, 8, 8))
    assert int(model[1].batches_seen) == 3
    convert_norm(model, "cbn", where=lambda name, module: name == "1", window=2)  # what the other has seen stays
    assert (int(model[1].batches_seen), int(model[4].batches_seen)) == (0, 3)
    convert_norm(model, "bn")
    assert not model[0]._forward_hooks
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    assert torch.equal(model.eval()(x), expected)


def test_nothing_changes_if_another_kind_is_refused() -> None:
    """Layers that were connected stay so, and no hook is left of a refusal."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(TypeError, match="takes the options"):
        convert_norm(model, "cbn", windows=2)
    with pytest.raises(ValueError, match="window"):
        convert_norm(model, "cbn", window=0)
    assert not model[0]._forward_hooks
    convert_norm(model, "cbn", compensate=False)
    assert not model[0]._forward_hooks
    with pytest.raises(ValueError, match="no CrossIterationBatchNorm1d, 2d or 3d that compensates"):
        connect_cross_iteration(model)


@pytest.mark.parametrize("to", ["cbn", "mabn"])
def test_calibration_replays_what_training_does(to: str) -> None:
    """By layers of the same kind, fed by the layers before; nothing of it stays but running statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    convert_norm(model, to, window=2)
    before = copy.deepcopy(model.state_dict())
    data = [torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    wellcond.calibrate(model, data, batch_size=2, what="bn")
    after = model.state_dict()
    changed = {name.rpartition(".")[2] for name in after if not torch.equal(after[name], before[name])}
    assert changed - {"num_batches_tracked"} == ({"running_mean", "running_var"} if to == "cbn" else {"running_var"})
