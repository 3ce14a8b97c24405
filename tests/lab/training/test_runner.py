"""One run: repeatable bit for bit, paired across methods, timed without evaluation, honest about divergence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stopped_runs import stop_after, uncounted
from torch import nn

from wellcond.lab.methods.method import METHODS
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.settings import Settings
from wellcond.lab.tasks.in_memory import InMemorySeed
from wellcond.lab.tasks.open import open_task
from wellcond.lab.training.checkpoint import Checkpointing
from wellcond.lab.training.network import initial_network
from wellcond.lab.training.run_memory import RunMemory
from wellcond.lab.training.runner import Runner, Training


@pytest.fixture(autouse=True, scope="module")
def _memory_is_not_counted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunMemory, "of", uncounted)
        yield


@pytest.fixture(scope="module")
def plan():
    return make_plan(Settings(epochs=2, train_images=200, validation_images=64, test_images=64, seeds=1))


@pytest.fixture(scope="module")
def runner(plan):
    return Runner(plan.task, torch.device("cpu"))


def without_seconds(record):
    epochs = tuple(replace(epoch, seconds=0.0) for epoch in record.epochs)
    return replace(record, epochs=epochs, evaluation_seconds=None)


# IBN-a knows the blocks of torchvision's and timm's networks alone.
@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("IBN-")])
def test_the_same_run_twice_is_the_same_bit_for_bit_though_stopped(plan, runner, tmp_path, name):
    """The second one is stopped in its second epoch and goes on in another runner, over the task opened anew."""
    spec = plan.spec(METHODS[name], METHODS[name].lrs[0], seed=0)
    first = runner.run(spec)
    checkpoints = Checkpointing(tmp_path, every=0.0)
    stop_after(runner.task, checkpoints, spec, steps=8)
    assert checkpoints.file(spec).step() == 8
    checkpoints = Checkpointing(tmp_path, every=3600.0)
    again = Runner(open_task(plan.settings), torch.device("cpu"), checkpoints=checkpoints).run(spec)
    assert without_seconds(first) == without_seconds(again)
    assert [epoch.steps for epoch in first.epochs] == [6, 12]
    assert first.epochs[1].seconds > first.epochs[0].seconds > 0
    assert first.evaluation_seconds > 0


def test_methods_of_a_seed_share_weights_and_batches(plan, runner, monkeypatch):
    seen = {}
    original = Training.training_step

    def training_step(self, batch, batch_index):
        weights = torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])
        seen.setdefault(self.spec, []).append((weights, *(part.clone() for part in batch)))
        return original(self, batch, batch_index)

    monkeypatch.setattr(Training, "training_step", training_step)
    for name in ("SGDM", "W-SGDM", "FAdam"):
        runner.run(plan.spec(METHODS[name], METHODS[name].lrs[0], seed=0))
    runner.run(plan.spec(METHODS["SGDM"], METHODS["SGDM"].lrs[0], seed=1))
    *paired, other_seed = seen.values()
    for run in paired:
        assert torch.equal(run[0][0], paired[0][0][0])
        assert len(run) == 12
        for batch, reference in zip(run, paired[0], strict=True):
            assert torch.equal(batch[1], reference[1])
            assert torch.equal(batch[2], reference[2])
    assert not torch.equal(other_seed[0][0], paired[0][0][0])
    assert not torch.equal(paired[0][0][2], paired[0][6][2])  # the second epoch has another order


def test_lr_follows_a_cosine_to_zero_over_the_run(plan, runner, monkeypatch):
    lrs = []
    original = Training.training_step

    def training_step(self, batch, batch_index):
        lrs.append(self.optimizers().param_groups[0]["lr"])
        return original(self, batch, batch_index)

    monkeypatch.setattr(Training, "training_step", training_step)
    runner.run(plan.spec(METHODS["SGDM"], 0.1, seed=0))
    expected = 0.05 * (1 + torch.cos(torch.arange(12) / 12 * torch.pi))
    torch.testing.assert_close(torch.tensor(lrs), expected)


@pytest.mark.parametrize(("steps", "epochs"), [(1, [1]), (5, [5]), (6, [6]), (9, [6, 9]), (14, [6, 12, 14])])
def test_a_budget_of_steps_ends_with_a_measurement(plan, runner, steps, epochs):
    record = runner.run(plan.spec(METHODS["SGDM"], 0.1, seed=0, steps=steps))
    assert [epoch.steps for epoch in record.epochs] == epochs


def test_the_score_of_training_is_that_of_each_batch_as_the_network_trained_on_it(plan, runner, monkeypatch):
    """Counted from the forward passes that training makes: no other is made."""
    passes = []
    original = InMemorySeed.loss

    def loss(self, model, batch):
        def keep(module, inputs, output):
            passes.append((output.argmax(1) == batch[1], module.training))

        with_hook = model.register_forward_hook(keep)
        value = original(self, model, batch)
        with_hook.remove()
        return value

    monkeypatch.setattr(InMemorySeed, "loss", loss)
    record = runner.run(plan.spec(METHODS["SGDM"], 0.1, seed=0))
    assert len(passes) == 12
    assert all(training for _, training in passes)
    for epoch, some in zip(record.epochs, (passes[:6], passes[6:]), strict=True):
        assert epoch.train_score == 100 * sum(int(right.sum()) for right, _ in some) / 192


@pytest.mark.parametrize("name", ["SGDM", "W-SGDM", "FAdam"])
def test_a_diverged_run_is_recorded_and_ends_early(plan, runner, name):
    record = runner.run(plan.spec(METHODS[name], 1e30, seed=0))
    assert record.diverged
    assert len(record.epochs) < 2
    assert (record.evaluation_seconds is None) == (not record.epochs)


def test_transforms_count_what_they_do(plan, runner):
    spec = plan.spec(METHODS["W-SGDM"], 0.1, seed=0)
    assert runner.run(spec).transforms
    assert runner.run(replace(spec, method=METHODS["SGDM"])).transforms == {}


@pytest.mark.parametrize("name", ["SGDM", "KN-fixed"])  # the latter draws noise
def test_training_leaves_torchs_global_generator_alone(plan, runner, name):
    before = torch.random.get_rng_state()
    runner.run(plan.spec(METHODS[name], 0.1, seed=0, steps=1))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [0.1] * 12),
        ("step:1,0.1", 0.0, [0.1] * 6 + [0.01] * 6),
        ("steps:1,0.5", 0.5, [0.1 / 3, 0.2 / 3] + [0.1] * 4 + [0.05] * 6),
    ],
)
def test_lr_follows_the_schedule_asked_for(plan, runner, monkeypatch, schedule, warmup, expected):
    lrs = []
    original = Training.training_step

    def training_step(self, batch, batch_index):
        lrs.append(self.optimizers().param_groups[0]["lr"])
        return original(self, batch, batch_index)

    monkeypatch.setattr(Training, "training_step", training_step)
    runner.run(replace(plan.spec(METHODS["SGDM"], 0.1, seed=0), schedule=schedule, warmup=warmup))
    assert lrs == pytest.approx(expected)


OPTIMIZERS = [
    *("SGDW", "SGDW+GC", "Adam", "Adam+GC", "Adagrad", "Adagrad+GC", "RAdam", "RMSprop", "Adadelta", "AdaBelief"),
    *("AdaHessian", "Apollo", "Ranger", "Lookahead", "Muon", "LN", "IN", "ND", "SGDM+WS", "SGDM+WS+GC", "SGDM+GC-conv"),
    "SGDM+CWN",
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_method_learns(plan, runner, name):
    method = METHODS[name]
    spec = replace(plan.spec(method, method.lrs[1], seed=0, steps=60), epochs=10)
    record = runner.run(spec)
    assert not record.diverged
    assert record.warnings == ()
    assert record.epochs[-1].train_loss < 0.97 * record.epochs[0].train_loss


def test_bfloat16_is_what_the_network_computes_in(plan, runner, monkeypatch):
    kinds = {"training": set(), "evaluation": set()}
    original = torch.nn.functional.linear

    def linear(inputs, weight, bias=None):
        result = original(inputs, weight, bias)
        kinds["training" if torch.is_grad_enabled() else "evaluation"].add((weight.dtype, result.dtype))
        return result

    monkeypatch.setattr("torch.nn.functional.linear", linear)
    spec = plan.spec(METHODS["SGDM"], 0.1, seed=0)
    record = runner.run(replace(spec, precision="bf16-mixed"))
    assert kinds == {part: {(torch.float32, torch.bfloat16)} for part in kinds}
    assert not record.diverged
    assert record.epochs[-1].train_loss != runner.run(spec).epochs[-1].train_loss


@pytest.mark.parametrize("name", ["SGDM", "W-SGDM", "BSR"])
def test_a_network_that_lies_channels_last_computes_so(plan, runner, monkeypatch, name):
    """Every weight of a convolution and every feature map lie so; training is the same but for rounding."""
    kinds = []
    original = torch.nn.functional.conv2d

    def conv2d(images, weight, *rest, **options):
        result = original(images, weight, *rest, **options)
        kinds.append(all(t.is_contiguous(memory_format=torch.channels_last) for t in (weight, result)))
        return result

    spec = plan.spec(METHODS[name], METHODS[name].lrs[0], seed=0)
    usual = runner.run(spec)
    monkeypatch.setattr("torch.nn.functional.conv2d", conv2d)
    record = runner.run(replace(spec, channels_last=True))
    assert kinds
    assert all(kinds)
    assert spec.key() != replace(spec, channels_last=True).key()
    assert record.epochs[0].train_loss == pytest.approx(usual.epochs[0].train_loss, rel=1e-3)


def test_convolutions_of_every_number_of_axes_lie_channels_last(plan):
    class Volumes:
        def initial_model(self, *_):
            return nn.ModuleList(
                [
                    torch.nn.Conv1d(2, 3, 3),
                    torch.nn.Conv2d(2, 3, 3),
                    torch.nn.Conv3d(2, 3, 3),
                    torch.nn.LazyConv2d(3, 3),
                ]
            )

    spec = replace(plan.spec(METHODS["SGDM"], 0.1, seed=0), channels_last=True)
    line, plane, volume, lazy = initial_network(Volumes(), spec)
    assert line.weight.is_contiguous()
    assert plane.weight.is_contiguous(memory_format=torch.channels_last)
    assert volume.weight.is_contiguous(memory_format=torch.channels_last_3d)
    lazy(torch.zeros(1, 2, 4, 4))


def test_deterministic_algorithms_are_asked_for_during_the_run_alone(plan, runner, monkeypatch):
    seen = []
    original = Training.training_step

    def training_step(self, batch, batch_index):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return original(self, batch, batch_index)

    monkeypatch.setattr(Training, "training_step", training_step)
    spec = plan.spec(METHODS["SGDM"], 0.1, seed=0, steps=1)
    for deterministic in (True, False):
        runner.run(replace(spec, deterministic=deterministic))
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_second_order_step_leaves_no_graph_behind(plan, runner, monkeypatch):
    kept = []
    original = Training.on_train_batch_end

    def on_train_batch_end(self, outputs, batch, batch_index):
        kept.append(any(p.grad is not None and p.grad.requires_grad for p in self.model.parameters()))
        original(self, outputs, batch, batch_index)
        kept.append(any(p.grad is not None for p in self.model.parameters()))

    monkeypatch.setattr(Training, "on_train_batch_end", on_train_batch_end)
    runner.run(plan.spec(METHODS["AdaHessian"], 0.1, seed=0, steps=2))
    assert kept == [True, False, True, False]
