"""Every optimizer over every form equals that optimizer, plain, on gradients that were preconditioned by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_optimizer import AdaBelief, Lion
from torch import Tensor, nn
from torch.optim import Optimizer

import wellcond
from wellcond import FeatureDescent, FeatureWhitening
from wellcond.optim import FSGD, WSGDM, FAdam, WAdam

STATS_EVERY, SOLVE_EVERY, DECAY = 2, 4, 0.8
STEPS = 11
POWERS = {"whitening": -0.5, "descent": -1.0}


class Net(nn.Module):
    """A convolution (3 taps), an embedding, a norm layer and two linear layers, one of them without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 5, 3)
        self.fc = nn.Linear(15, 6)
        self.out = nn.Linear(6, 3, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.fc(self.conv(self.norm(self.embed(tokens)).mT).tanh().flatten(1)).tanh())


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(step)) % (2 + step)
    return nn.functional.cross_entropy(model(tokens % 7), tokens.sum(dim=1) % 3)


# by hand ------------------------------------------------------------------------------------------------------------


def power(matrix: Tensor, name: str, damping: float) -> Tensor:
    """(M + ε λ_max I)^(−1/2) or (M + ε I)^(−1), by eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix.double())
    damped = values.clamp_min(0) + damping * (values[-1] if name == "whitening" else 1.0)
    return (vectors * damped ** POWERS[name]) @ vectors.T


class ByHand:
    """The technique beside a plain loop, from the formulas: dense, or for the convolution its two margins.

    Q[c, k, c', k'] is the second moment of a patch, R_C = mean_k Q[:, k, :, k], R_K = mean_c Q[c, :, c, :]; the bias is
    one more channel of 1/√K at every tap. Ĝ = G times the power of R_C ⊗ R_K / m, m the mean of either diagonal.
    """

    def __init__(self, model: Net, name: str, damping: float, kronecker: bool) -> None:
        self.model, self.name, self.damping, self.kronecker = model, name, damping, kronecker
        self.inputs: dict[nn.Module, Tensor] = {}
        self.averages: dict[nn.Module, list[Tensor]] = {}
        self.powers: dict[nn.Module, Tensor] = {}
        self.step = self.updates = 0
        for layer in (model.embed, model.conv, model.fc, model.out):
            layer.register_forward_pre_hook(lambda module, args: self.inputs.update({module: args[0].detach()}))

    def moments(self, layer: nn.Module) -> list[Tensor]:
        x = self.inputs[layer]
        if isinstance(layer, nn.Embedding):
            rows = torch.eye(7, dtype=torch.float64)[x.flatten()]
        elif isinstance(layer, nn.Conv1d):
            patches = x.double().unfold(2, 3, 1).transpose(1, 2).flatten(0, 1)  # [positions, channels, taps]
            if self.kronecker:
                patches = torch.cat([patches, patches.new_full((len(patches), 1, 3), 3**-0.5)], dim=1)
                q = torch.einsum("nck,ndl->ckdl", patches, patches) / len(patches)
                return [torch.einsum("ckdk->cd", q) / 3, torch.einsum("ckcl->kl", q) / 5]  # linear in q, as averages
            rows = patches.flatten(1)
        else:
            rows = x.double()
        if getattr(layer, "bias", None) is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        return [rows.T @ rows / len(rows)]

    def change_gradients(self) -> None:
        if self.step % STATS_EVERY == 0:
            self.updates += 1
            for layer in self.inputs:
                new = self.moments(layer)
                old = self.averages.get(layer, [torch.zeros_like(m) for m in new])
                self.averages[layer] = [DECAY * m + (1 - DECAY) * n for m, n in zip(old, new, strict=True)]
        if self.step in (0, 2, 4, 8):
            mass = 1 - DECAY**self.updates
            for layer, averages in self.averages.items():
                moment = averages[0]
                if len(averages) == 2:
                    moment = torch.kron(*averages) / averages[0].diagonal().mean()
                self.powers[layer] = power(moment / mass, self.name, self.damping)
        for layer in self.inputs:
            self._change(layer)
        self.step += 1

    def _change(self, layer: nn.Module) -> None:
        weight, bias = layer.weight.grad, layer.bias.grad if getattr(layer, "bias", None) is not None else None
        g = weight.double().T if isinstance(layer, nn.Embedding) else weight.double()
        if len(self.averages[layer]) == 2:
            g = torch.cat([g, bias.double().view(-1, 1, 1).expand(-1, 1, 3) * 3**-0.5], dim=1)
            changed = (g.flatten(1) @ self.powers[layer]).view_as(g)
            parts = [changed[:, :-1], changed[:, -1].sum(dim=1) * 3**-0.5]
        else:
            g = g.flatten(1) if bias is None else torch.cat([g.flatten(1), bias.double().unsqueeze(1)], dim=1)
            changed = g @ self.powers[layer]
            parts = [changed] if bias is None else [changed[:, :-1], changed[:, -1]]
        if isinstance(layer, nn.Embedding):
            parts = [parts[0].T]
        before = torch.cat([t.double().flatten() for t in (weight, bias) if t is not None]).norm()
        ratio = before / torch.cat([t.flatten() for t in parts]).norm()
        # In place: torch's fused optimizers on a CPU read a gradient's memory whatever its strides.
        weight.copy_(parts[0].reshape(weight.shape) * ratio)
        if bias is not None:
            bias.copy_(parts[1] * ratio)


def transform_of(name: str, form: str) -> Any:
    options: dict[str, Any] = {"stats_every": STATS_EVERY, "solve_every": SOLVE_EVERY, "stats_decay": DECAY}
    kind = FeatureWhitening if name == "whitening" else FeatureDescent
    return kind(damping=0.05, second_moment=form, **options)


class Several:
    """Several optimizers stepped as one, as for Muon, which takes matrices alone."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def muon(model: nn.Module) -> Several:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return Several(
        torch.optim.Muon(matrices, lr=0.05, momentum=0.9, weight_decay=0.05),
        torch.optim.AdamW(others, lr=0.01, weight_decay=0.05),
    )


def one(optimizer_type: Any, **options: Any) -> Callable[[nn.Module], Several]:
    return lambda model: Several(optimizer_type(model.parameters(), **options))


OPTIMIZERS: dict[str, Callable[[nn.Module], Several]] = {
    "SGD": one(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "SGD for-loop": one(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2, foreach=False),
    "SGD foreach": one(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2, foreach=True),
    "SGD fused": one(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2, fused=True),
    "SGD maximize": one(torch.optim.SGD, lr=0.02, weight_decay=1e-2, maximize=True),
    "Adam for-loop": one(torch.optim.Adam, lr=1e-2, weight_decay=1e-2, foreach=False),
    "Adam foreach": one(torch.optim.Adam, lr=1e-2, weight_decay=1e-2, foreach=True),
    "Adam fused": one(torch.optim.Adam, lr=1e-2, weight_decay=1e-2, fused=True),
    "AdamW for-loop": one(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, foreach=False),
    "AdamW foreach": one(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, foreach=True),
    "AdamW fused": one(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=True),
    "AdamW amsgrad, tensor lr": one(torch.optim.AdamW, lr=torch.tensor(1e-2), amsgrad=True, foreach=False),
    "RAdam foreach": one(torch.optim.RAdam, lr=1e-2, weight_decay=1e-2, foreach=True),
    "RAdam decoupled": one(torch.optim.RAdam, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "Adagrad foreach": one(torch.optim.Adagrad, lr=1e-2, weight_decay=1e-2, foreach=True),
    "Adagrad fused": one(torch.optim.Adagrad, lr=1e-2, weight_decay=1e-2, fused=True),
    "AdaBelief": one(AdaBelief, lr=1e-2, weight_decay=1e-2),
    "Lion": one(Lion, lr=1e-3, weight_decay=1e-2),
    "Muon": muon,
}


@pytest.mark.parametrize("form", ["dense", "kronecker"])
@pytest.mark.parametrize("name", POWERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_equals_the_plain_optimizer_on_gradients_preconditioned_by_hand(
    optimizer: str, name: str, form: str
) -> None:
    if optimizer == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    if name == "descent" and form == "kronecker":
        form = "dense"  # absolute damping of two factors: tests of the forms
    ours, plain = net(), net()
    our_optimizer, plain_optimizer = OPTIMIZERS[optimizer](ours), OPTIMIZERS[optimizer](plain)
    for each in our_optimizer.optimizers:
        wellcond.attach(each, ours, transform_of(name, form))
    by_hand = ByHand(plain, name, 0.05, form == "kronecker")
    if len(our_optimizer.optimizers) > 1:
        # The biases of the matrices are with another optimizer: the weights go alone, the biases as they are.
        by_hand = ByHandWithoutBias(plain, name, 0.05, form == "kronecker")
    untouched = net()
    untouched_optimizer = OPTIMIZERS[optimizer](untouched)
    for step in range(STEPS):
        for model in (ours, plain, untouched):
            model.zero_grad()
            loss_of(model, step).backward()
        our_optimizer.step()
        by_hand.change_gradients()
        plain_optimizer.step()
        untouched_optimizer.step()
    for (key, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")
    assert not torch.allclose(ours.fc.weight, untouched.fc.weight, rtol=1e-3, atol=1e-4)


class ByHandWithoutBias(ByHand):
    """As under Muon: of fc's two parameters the weight alone is preconditioned by the matrix optimizer."""

    def moments(self, layer: nn.Module) -> list[Tensor]:
        if layer is self.model.fc:
            x = self.inputs[layer].double()
            return [x.T @ x / len(x)]
        return super().moments(layer)

    def _change(self, layer: nn.Module) -> None:
        if layer is not self.model.fc:
            super()._change(layer)
            return
        g = layer.weight.grad
        changed = g @ self.powers[layer]
        layer.weight.grad = changed * (g.norm() / changed.norm())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_under_muon_the_report_says_which_parameters_are_held_by_another_optimizer() -> None:
    model = net()
    optimizer = torch.optim.Muon([model.fc.weight, model.out.weight], lr=0.05)
    handle = wellcond.attach(optimizer, model, FeatureWhitening(second_moment="dense"))
    lines = {line.split()[0]: line for line in handle.report().splitlines()[1:]}
    assert "preconditioned, dense 15 × 15" in lines["fc.weight"]
    for name in ("fc.bias", "conv.weight", "embed.weight"):
        assert "not held by this optimizer" in lines[name]


@pytest.mark.parametrize("optimizer_type", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam])
def test_capturable_is_torchs_to_refuse_on_a_cpu_and_its_states_to_keep(optimizer_type: Any) -> None:
    """``capturable`` is for accelerators; on a CPU torch itself refuses the step, with or without a transform."""
    messages = []
    for attached in (False, True):
        model = net()
        optimizer = optimizer_type(model.parameters(), lr=1e-2, capturable=True, foreach=False)
        if attached:
            wellcond.attach(optimizer, model, transform_of("whitening", "dense"))
        loss_of(model, 0).backward()
        try:
            optimizer.step()
            messages.append("")
        except (AssertionError, RuntimeError) as error:
            messages.append(str(error))
    assert messages[0] == messages[1]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer_type", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam])
@pytest.mark.parametrize("option", ["capturable", "fused"])
def test_capturable_and_fused_on_a_gpu_equal_the_ordinary_one(optimizer_type: Any, option: str) -> None:
    if option == "fused" and optimizer_type is torch.optim.RAdam:
        pytest.skip("torch's RAdam has no fused form")
    models = [net(torch.float32).cuda() for _ in range(2)]
    optimizers = [
        optimizer_type(m.parameters(), lr=1e-2, **o) for m, o in zip(models, ({}, {option: True}), strict=True)
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        wellcond.attach(optimizer, model, transform_of("whitening", "dense"))
        for step in range(STEPS):
            optimizer.zero_grad()
            tokens = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(step)).cuda()
            nn.functional.cross_entropy(model(tokens), tokens.sum(dim=1) % 3).backward()
            optimizer.step()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# closures, schedules, groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "kronecker", "low_rank"])
@pytest.mark.parametrize("call", ["positional", "keyword"])
@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, lr=1e-2), lambda p: AdaBelief(p, lr=1e-2)])
def test_a_closure_trains_as_gradients_that_are_there(make: Any, call: str, form: str) -> None:
    ours, theirs = net(), net()
    optimizer, other = make(ours.parameters()), make(theirs.parameters())
    wellcond.attach(optimizer, ours, transform_of("whitening", form))
    wellcond.attach(other, theirs, transform_of("whitening", form))
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(ours, step)
            loss.backward()
            return loss

        returned = optimizer.step(closure) if call == "positional" else optimizer.step(closure=closure)
        other.zero_grad()
        loss = loss_of(theirs, step)
        loss.backward()
        other.step()
        assert torch.equal(returned, loss)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_closure_that_is_called_several_times_is_observed_once_and_always_preconditioned() -> None:
    """LBFGS calls its closure again and again: each gradient is preconditioned, the first pass alone is observed."""
    model = nn.Linear(4, 3, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    wellcond.attach(optimizer, model, FeatureWhitening(stats_decay=0.0, stats_every=1, solve_every=1, damping=0.05))
    x = torch.randn(8, 4, dtype=torch.float64)
    rows = torch.cat([x, torch.ones(8, 1, dtype=torch.float64)], dim=1)
    t = power(rows.T @ rows / 8, "whitening", 0.05)
    seen = []

    def closure() -> Tensor:
        if seen:
            g = torch.cat([seen[-1][0], seen[-1][1].unsqueeze(1)], dim=1)
            expected = g @ t * (g.norm() / (g @ t).norm())
            actual = torch.cat([model.weight.grad, model.bias.grad.unsqueeze(1)], dim=1)
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
        optimizer.zero_grad()
        loss = model(x if not seen else 3 * x).sin().sum()
        loss.backward()
        seen.append((model.weight.grad.clone(), model.bias.grad.clone()))
        return loss

    optimizer.step(closure)
    assert len(seen) > 2
    moment = optimizer.state[model.weight]["wellcond_whitening_second_moment"][0]
    torch.testing.assert_close(moment, rows.T @ rows / 8, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clear", ["to none", "to zero", "not at all"])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_a_closures_later_passes_count_in_no_step(clear: str, search: str | None) -> None:
    """Each step's M is over the rows of its first pass, however often others follow, and whatever is in ``.grad``."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5, line_search_fn=search)
    wellcond.attach(optimizer, model, FeatureWhitening(stats_decay=0.0, stats_every=1, solve_every=1, damping=0.05))
    hooks, first = [], []

    def closure() -> Tensor:
        hooks.append(len(model._forward_hooks))
        if clear != "not at all":
            optimizer.zero_grad(set_to_none=clear == "to none")
        x = torch.randn(6, 4, dtype=torch.float64)
        if not first:
            first.append(x)
        loss = model(x).square().sum() * 1e-3
        loss.backward()
        return loss

    for _ in range(3):
        hooks.clear()
        first.clear()
        optimizer.step(closure)
        assert len(hooks) > 2
        assert hooks == [1] + [0] * (len(hooks) - 1)
        moment = optimizer.state[model.weight]["wellcond_whitening_second_moment"][0]
        torch.testing.assert_close(moment, first[0].T @ first[0] / 6, rtol=1e-12, atol=1e-12)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS),
    "warm-up": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: (step + 1) / STEPS),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("named", [FSGD, WSGDM, FAdam, WAdam])
def test_schedulers_over_named_optimizers_equal_those_over_the_plain_one(named: Any, scheduler: str) -> None:
    """OneCycleLR cycles momentum (or betas) too."""
    ours, plain = net(), net()
    options = {"stats_every": STATS_EVERY, "solve_every": SOLVE_EVERY, "stats_decay": DECAY, "damping": 0.05}
    lr = 0.05 if named in (FSGD, WSGDM) else 0.01
    optimizer = named(ours, lr=lr, weight_decay=0.01, second_moment="dense", **options)
    base = torch.optim.SGD if named in (FSGD, WSGDM) else torch.optim.AdamW
    plain_optimizer = base(
        plain.parameters(), lr=lr, weight_decay=0.01, **({"momentum": 0.9} if base is torch.optim.SGD else {})
    )
    by_hand = ByHand(plain, "descent" if named in (FSGD, FAdam) else "whitening", 0.05, False)
    schedules = [SCHEDULERS[scheduler](o) for o in (optimizer, plain_optimizer)]
    rates = set()
    for step in range(STEPS):
        for model in (ours, plain):
            model.zero_grad()
            loss_of(model, step).backward()
        by_hand.change_gradients()
        rates.add(optimizer.param_groups[0]["lr"])
        for o, schedule in zip((optimizer, plain_optimizer), schedules, strict=True):
            o.step()
            schedule.step()
    assert len(rates) > 3
    for (key, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("later", [False, True])
def test_parameter_groups_have_their_own_rates_decays_and_switches(later: bool) -> None:
    """Also a switch that is thrown during training: from then on the plain gradient."""
    ours, plain = net(), net()

    def grouped(model: Net) -> Optimizer:
        groups = [
            {"params": [*model.embed.parameters(), *model.norm.parameters()], "lr": 0.01},
            {"params": model.conv.parameters(), "weight_decay": 0.1},
            {"params": [*model.fc.parameters(), *model.out.parameters()], "wellcond_whitening": later},
        ]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    optimizer, plain_optimizer = grouped(ours), grouped(plain)
    handle = wellcond.attach(optimizer, ours, transform_of("whitening", "dense"))
    assert handle.stats()["whitening"]["weights"] == (4 if later else 2)
    by_hand = ByHand(plain, "whitening", 0.05, False)
    for step in range(STEPS):
        if later and step == 5:
            optimizer.param_groups[2]["wellcond_whitening"] = False
        for model in (ours, plain):
            model.zero_grad()
            loss_of(model, step).backward()
        kept = {p: p.grad.clone() for layer in (plain.fc, plain.out) for p in layer.parameters()}
        by_hand.change_gradients()
        if not later or step >= 5:
            for parameter, gradient in kept.items():
                parameter.grad = gradient
        optimizer.step()
        plain_optimizer.step()
    assert handle.stats()["whitening"]["weights"] == 2
    assert "switched off by its parameter group" in handle.report()
    for (key, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")


def test_a_group_switched_off_and_on_again_goes_on_with_its_own_statistics() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = wellcond.attach(optimizer, model, transform_of("whitening", "dense"))
    weights = []
    for step in range(12):
        optimizer.param_groups[0]["wellcond_whitening"] = not 4 <= step < 8
        optimizer.zero_grad()
        loss_of(model, step).backward()
        before = model.fc.weight.grad.clone()
        optimizer.step()
        weights.append(torch.equal(before, model.fc.weight.grad))
    assert weights == [4 <= step < 8 for step in range(12)]
    assert handle.stats()["whitening"] == {"weights": 4, "failed_solves": 0, "skipped_updates": 0}


# loss scaling and the moving average before the product -------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("overflow", [False, True])
def test_the_gradients_moving_average_does_not_see_the_loss_scale_nor_its_overflows(
    fused: bool, overflow: bool
) -> None:
    """A fused optimizer is handed scaled gradients, and steps that it must skip; the scale changes meanwhile."""
    models = [net(torch.float32), net(torch.float32)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, fused=fused) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        options = {"stats_every": STATS_EVERY, "solve_every": SOLVE_EVERY, "stats_decay": DECAY, "damping": 0.05}
        wellcond.attach(optimizer, model, FeatureWhitening(gradient_momentum=0.9, restore_norm=True, **options))
    # Either the scale grows every other step, or the last step overflows.
    growth_interval = 1000 if overflow else 2
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_factor=8.0, growth_interval=growth_interval)
    for step in range(8):
        for model, optimizer, scaled in zip(models, optimizers, (True, False), strict=True):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            if not scaled:
                if not (overflow and step == 7):
                    loss.backward()
                    optimizer.step()
                continue
            scaler.scale(loss).backward()
            if overflow and step == 7:
                model.fc.weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
    for (key, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    average = optimizers[0].state[models[0].fc.weight]["wellcond_whitening_gradient_momentum"]
    assert bool(torch.isfinite(average).all())
