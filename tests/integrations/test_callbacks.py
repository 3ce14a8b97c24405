"""The frameworks' callbacks: schedules that follow, calibration that passes, counts in the log."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainerControl, TrainerState, TrainingArguments

import wellcond
from wellcond.integrations.lightning import WellcondCallback
from wellcond.integrations.transformers import WellcondTrainerCallback

M = 4
DATA = TensorDataset(torch.randn(32, 3, generator=torch.Generator().manual_seed(0)) * 2 + 1)


class Net(L.LightningModule):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), norm(5), nn.Tanh(), nn.Linear(5, 1))
        self.validated: list[dict[str, Tensor]] = []
        self.momenta: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.momenta.append(getattr(self.net[1], "stat_momentum", 0.0))
        return self(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.validated.append({name: value.clone() for name, value in self.net[1].state_dict().items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        wellcond.attach(optimizer, self, wellcond.FeatureWhitening(stats_every=2, solve_every=4))
        return optimizer


def fit(model: Net, callback: WellcondCallback | None, epochs: int = 2, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[] if callback is None else [callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )
    trainer.fit(model, DataLoader(DATA, M), DataLoader(DATA, 16))
    return trainer


@pytest.mark.parametrize("what", ["bn", "bsr", "evalnorm"])
def test_training_is_as_without_calibration_before_validation(what: str) -> None:
    plain, model = Net(), Net()
    fit(plain, None)
    fit(
        model,
        WellcondCallback(calibration_loader=DataLoader(DATA, 16), calibration_batch_size=M, calibrate=what),
    )
    assert type(model.net[1]) is nn.BatchNorm1d
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
        assert not model.state_dict()[name].is_inference()


def test_validation_sees_calibrated_statistics_of_the_weights_as_they_are() -> None:
    model = Net()
    fit(
        model,
        WellcondCallback(calibration_loader=DataLoader(DATA, 16), calibration_batch_size=M, calibrate="bn"),
        epochs=1,
    )
    with torch.no_grad():
        features = model.net[0](DATA.tensors[0])
    # The mean of batches' means; the two sanity batches came before.
    torch.testing.assert_close(model.validated[-1]["running_mean"], features.mean(0))
    assert int(model.validated[-1]["num_batches_tracked"]) == len(DATA) // M
    assert not torch.equal(model.validated[-1]["running_mean"], model.net[1].running_mean)


def test_what_a_failing_validation_leaves_is_what_training_made() -> None:
    class Failing(Net):
        def validation_step(self, batch: list[Tensor], index: int) -> None:
            assert isinstance(self.net[1], wellcond.nn.BSRBatchNorm1d)
            raise OverflowError("as a test")

    model = Failing()
    callback = WellcondCallback(calibration_loader=DataLoader(DATA, 16), calibration_batch_size=M)
    with pytest.raises(OverflowError, match="as a test"):
        fit(model, callback, num_sanity_val_steps=0)
    assert type(model.net[1]) is nn.BatchNorm1d
    assert int(model.net[1].num_batches_tracked) == len(DATA) // M


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_the_schedule_is_where_a_step_after_each_would_have_brought_it(interval: Any) -> None:
    model = Net(wellcond.nn.MomentumBatchNorm1d)
    per_epoch = len(DATA) // M
    steps = None if interval == "epoch" else per_epoch
    schedule = wellcond.nn.MomentumScheduler(model, total_epochs=3, steps_per_epoch=steps)
    fit(model, WellcondCallback(schedule, interval), epochs=3)
    reference = wellcond.nn.MomentumBatchNorm1d(5)
    other = wellcond.nn.MomentumScheduler(reference, total_epochs=3, batch_size=M, steps_per_epoch=steps)
    wanted = []
    for step in range(3 * per_epoch):
        wanted.append(reference.stat_momentum)
        if interval == "step" or (step + 1) % per_epoch == 0:
            other.step()
    assert model.momenta == wanted
    assert wanted[-1] > 0


def test_counts_are_logged() -> None:
    trainer = fit(Net(), WellcondCallback(), epochs=1)
    assert trainer.callback_metrics["wellcond/whitening/weights"] == 2
    assert not any(name.startswith("wellcond") for name in fit(Net(), None, 1).callback_metrics)
    assert not any(
        name.startswith("wellcond") for name in fit(Net(), WellcondCallback(log_stats=False), 1).callback_metrics
    )


class FromParameters(Net):
    """Makes its optimizer as a config does that knows no model."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return wellcond.optim.from_parameters(
            self.parameters(), "wsgdm", lr=0.1, momentum=0.0, stats_every=2, solve_every=4
        )


def test_an_optimizer_from_parameters_gets_its_model_from_the_callback() -> None:
    made, attached = FromParameters(), Net()
    trainer = fit(made, WellcondCallback(), epochs=1)
    fit(attached, None, epochs=1)
    for mine, theirs in zip(made.parameters(), attached.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    logged = {name.removeprefix("wellcond/") for name in trainer.callback_metrics}
    assert logged >= {"gradient/cosine", "gradient/norm_ratio", "whitening/age", "whitening/effective_rank"}
    with pytest.raises(RuntimeError, match=r"waits for its model: give the trainer wellcond's callback"):
        fit(FromParameters(), None, epochs=1)


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must be given together"):
        WellcondCallback(calibration_batch_size=2)
    with pytest.raises(ValueError, match="schedule_interval must be one of 'epoch', 'step', got 'batch'"):
        WellcondCallback(None, "batch")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(TypeError, match="schedule must be one of wellcond.nn"):
        WellcondTrainerCallback(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("interval", "epoch", "step", "count"), [("epoch", 2.9999999, 21, 3), ("epoch", 2.4, 17, 2), ("step", 2.4, 17, 17)]
)
def test_the_trainers_schedule_catches_up_after_a_resume(
    interval: Any, epoch: float, step: int, count: int, tmp_path: Path
) -> None:
    layer = wellcond.nn.MomentumBatchNorm1d(3)
    schedule = wellcond.nn.MomentumScheduler(layer, total_epochs=100, batch_size=2)
    callback = WellcondTrainerCallback(schedule, interval)
    arguments, control = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True), TrainerControl()
    state = TrainerState(epoch=epoch, global_step=step)
    callback.on_epoch_begin(arguments, state, control)
    callback.on_step_begin(arguments, state, control)
    assert schedule.count == count


def test_the_trainers_log_has_the_counts(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = wellcond.optim.WSGDM(model, lr=0.1)
    arguments, control = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True), TrainerControl()
    state = TrainerState(log_history=[{"loss": 1.0, "step": 1}])
    logs = {"loss": 1.0}
    optimizer.attachment.metrics()
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    WellcondTrainerCallback().on_log(arguments, state, control, logs=logs, optimizer=optimizer)
    assert logs["wellcond/whitening/weights"] == 1
    assert type(logs["wellcond/gradient/cosine"]) is float  # written as JSON
    assert state.log_history[-1]["wellcond/whitening/weights"] == 1
    evaluated = {"eval_loss": 1.0}
    WellcondTrainerCallback().on_log(arguments, state, control, logs=evaluated, optimizer=optimizer)
    assert evaluated == {"eval_loss": 1.0}


@pytest.mark.parametrize(("module", "needs"), [("lightning", "lightning"), ("transformers", "transformers")])
def test_without_the_framework_an_import_says_what_to_install(module: str, needs: str) -> None:
    code = (
        "import sys, wellcond\n"
        f"assert not any(name.split('.')[0] in ('lightning', 'transformers') for name in sys.modules)\n"
        "assert not any(name.startswith('wellcond.integrations') for name in sys.modules)\n"
        f"sys.modules['{needs}'] = None\n"
        f"import wellcond.integrations.{module}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"pip install {needs}" in done.stderr


def test_without_a_batch_size_validation_sees_the_statistics_of_all_samples() -> None:
    model = Net()
    fit(model, WellcondCallback(calibration_loader=DataLoader(DATA, 10)), epochs=1)
    with torch.no_grad():
        features = model.net[0](DATA.tensors[0])
    torch.testing.assert_close(model.validated[-1]["running_mean"], features.mean(0))
    torch.testing.assert_close(model.validated[-1]["running_var"], features.var(0))


class Regression(nn.Module):
    """Takes keywords and returns a mapping, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)
        self.evaluated: list[Tensor] = []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if not self.training:
            self.evaluated.append(self.norm.running_mean.clone())
        output = self.last(self.norm(self.first(x)).tanh())
        return {"loss": (output - labels).square().mean(), "logits": output}


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_trainers_evaluations_see_calibrated_statistics_and_training_does_not(
    sets: int, strategy: str, tmp_path: Path
) -> None:
    from transformers import Trainer

    rows = [{"x": x, "labels": x[:1]} for x in DATA.tensors[0]]
    loader = [{"x": DATA.tensors[0], "labels": DATA.tensors[0][:, :1]}]

    def trained(callback: WellcondTrainerCallback | None) -> Regression:
        model = Regression()
        arguments = TrainingArguments(
            str(tmp_path),
            **{"max_steps": 4, "eval_strategy": strategy, "eval_steps": 2, "per_device_train_batch_size": 8},
            **{"per_device_eval_batch_size": 32, "report_to": "none", "use_cpu": True, "disable_tqdm": True},
            **{"save_strategy": "no", "learning_rate": 0.1},
        )
        evaluation = rows if sets == 1 else {"one": rows, "other": rows}
        callbacks = [] if callback is None else [callback]
        Trainer(model, arguments, train_dataset=rows, eval_dataset=evaluation, callbacks=callbacks).train()
        return model

    callback = WellcondTrainerCallback(calibration_loader=loader, evaluation_sets=sets, log_stats=False)
    plain, model = trained(None), trained(callback)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    with torch.no_grad():
        expected = model.first(DATA.tensors[0]).mean(0)
    evaluated = [mean for mean in model.evaluated if not torch.equal(mean, model.norm.running_mean)]
    torch.testing.assert_close(evaluated[-sets:], [expected] * sets)
    assert not any(torch.allclose(mean, expected) for mean in plain.evaluated)


def test_more_evaluations_than_said_are_warned_of(tmp_path: Path) -> None:
    model = Regression()
    callback = WellcondTrainerCallback(calibration_loader=[{"x": torch.randn(8, 3), "labels": torch.zeros(8, 1)}])
    arguments, control = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True), TrainerControl()
    state = TrainerState(global_step=3)
    control.should_evaluate = True
    callback.on_step_end(arguments, state, control, model=model)
    callback.on_evaluate(arguments, state, control)
    with pytest.warns(wellcond.WellcondWarning, match="than evaluation_sets=1: only so many were calibrated"):
        callback.on_evaluate(arguments, state, control)
    with pytest.raises(ValueError, match="evaluation_sets must be a positive integer, got 0"):
        WellcondTrainerCallback(calibration_loader=[], evaluation_sets=0)
