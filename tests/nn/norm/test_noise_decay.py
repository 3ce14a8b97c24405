"""The strength of gamma decay is what the slides' formula gives for each image's own gradients, written out."""

import pytest
import torch
from torch import Tensor, nn

from wellcond.lab.methods.method import METHODS
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.records import RunRecord
from wellcond.lab.runs.settings import Settings
from wellcond.lab.training.runner import Runner
from wellcond.nn import PopulationNorm1d, PopulationNorm2d
from wellcond.nn.norm.noise_decay import BatchNoiseDecay


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), PopulationNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4), PopulationNorm1d(4)
    )
    for layer in model:
        if isinstance(layer, (PopulationNorm1d, PopulationNorm2d)):
            layer.running_mean.uniform_(-0.5, 0.5)
            layer.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    # As in evaluation an image is normalized without the others, so its loss has a gradient of its own.
    return model.double().eval()


def images(count: int = 7) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 4)


def written_out(model: nn.Sequential, name: str, m: int) -> Tensor:
    """ζ of each channel, from one backward pass for each image."""
    layer, x = model.get_submodule(name), images()
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    shifts, scales = [], []
    for index in range(len(x)):
        model.zero_grad()
        output = model(x[index : index + 1])
        torch.nn.functional.cross_entropy(output, torch.tensor([index % 4])).backward()
        shifts.append(layer.bias.grad.clone())
        scales.append(layer.weight.grad.clone())
    handle.remove()
    features = torch.cat(seen)
    zeta = []
    for c in range(features.shape[1]):
        normalized = (features[:, c].flatten(1) if features.dim() > 2 else features[:, c : c + 1]).clone()
        normalized = (normalized - layer.running_mean[c]) / torch.sqrt(layer.running_var[c] + layer.eps)
        of_mean = torch.stack([row.mean() for row in normalized]).var()
        of_square = torch.stack([row.square().mean() for row in normalized]).var()
        curvature = sum(own[c] ** 2 for own in shifts) / len(x)
        fisher = sum(own[c] ** 2 for own in scales) / len(x)
        zeta.append(of_mean * curvature / (2 * m) + of_square * fisher / (8 * m))
    model.zero_grad()
    return torch.stack(zeta)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_strength_equals_the_loop(scale: float) -> None:
    model = network()
    expected = {name: written_out(model, name, m=5) for name in ("1", "5")}
    decay = BatchNoiseDecay(model, members=5, every=1)
    with decay.observing():
        loss = loss_of(model, images())
    # The first step has no penalty yet; a gradient scaler multiplies the loss before it goes backward.
    (scale * decay.added_to(loss)).backward()
    assert decay.coefficients.keys() == expected.keys()
    for name, zeta in expected.items():
        torch.testing.assert_close(decay.coefficients[name], zeta)


def test_the_penalty_is_zeta_gamma_squared() -> None:
    model = network()
    decay = BatchNoiseDecay(model, members=5, every=1)
    with decay.observing():
        loss = loss_of(model, images())
    assert decay.added_to(loss) is loss
    loss.backward()
    with decay.observing():
        loss = loss_of(model, images())
    expected = loss + sum(
        (zeta * model.get_submodule(name).weight ** 2).sum() for name, zeta in decay.coefficients.items()
    )
    torch.testing.assert_close(decay.added_to(loss), expected)


def test_it_is_measured_in_its_turn_and_averaged() -> None:
    model = network()
    decay = BatchNoiseDecay(model, members=5, every=2)
    found = []
    for step in range(4):
        with decay.observing():
            loss = (1 + step) * loss_of(model, images())
        decay.added_to(loss).backward()
        found.append(decay.coefficients["1"].clone())
    # Measured in steps 0 and 2; with three times the loss the information is nine times as large.
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], 0.9 * found[0] + 0.1 * 9 * found[0])
    torch.testing.assert_close(found[3], found[2])
    assert not model[1]._forward_hooks


def test_a_step_that_overflowed_changes_nothing() -> None:
    model = network()
    decay = BatchNoiseDecay(model, members=5, every=1)
    for factor in (1.0, float("inf")):
        with decay.observing():
            loss = loss_of(model, images())
        (factor * decay.added_to(loss)).backward()
    torch.testing.assert_close(decay.coefficients["1"], written_out(model, "1", m=5))


def test_a_network_without_population_normalization_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no population normalization to add gamma decay to"):
        BatchNoiseDecay(nn.Linear(2, 2), members=4, every=1)


def trained(method: str) -> RunRecord:
    plan = make_plan(
        Settings(methods=(method,), seeds=1, epochs=1, train_images=96, batch_size=16, ghost_batch=4, image_size=8)
    )
    return Runner(plan.task, torch.device("cpu")).run(plan.spec(plan.methods[0], 0.1, 0))


def test_the_method_trains_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert METHODS["PN+gamma-decay"].norm.text == "norm=pn(momentum=0.01, gamma_decay=True)"
    added = []

    def watched(self: BatchNoiseDecay, loss: Tensor) -> Tensor:
        found = added_to(self, loss)
        added.append(float(found - loss))
        return found

    added_to = BatchNoiseDecay.added_to
    monkeypatch.setattr(BatchNoiseDecay, "added_to", watched)
    trained("PN+gamma-decay")
    # Six steps; before the first there is no strength yet.
    assert len(added) == 6
    assert added[0] == 0
    assert all(penalty > 0 for penalty in added[1:])
    trained("PN")
    assert len(added) == 6


def test_the_training_loss_is_reported_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained("PN").epochs[-1].train_loss
    # A constant changes no gradient.
    monkeypatch.setattr(BatchNoiseDecay, "added_to", lambda self, loss: loss + 1000.0)
    assert trained("PN+gamma-decay").epochs[-1].train_loss == pytest.approx(plain, rel=1e-6)
