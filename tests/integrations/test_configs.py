"""What config files can make: named optimizers, transforms by name, callbacks that attach."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import wellcond
from wellcond.integrations.lightning import WellcondCallback
from wellcond.integrations.transformers import WellcondTrainerCallback
from wellcond.transforms import attachments

DATA = TensorDataset(torch.randn(32, 3, generator=torch.Generator().manual_seed(0)))
NAMED = (wellcond.optim.FSGD, wellcond.optim.WSGDM, wellcond.optim.FAdam, wellcond.optim.WAdam)


class Net(L.LightningModule):
    """A module whose optimizer comes from outside: a config's."""

    def __init__(self, make: Callable[[nn.Module], torch.optim.Optimizer] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        self.make = make

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(DATA, 8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.make is not None:
            return self.make(self)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "max_epochs": 2,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def run_cli(folder: Path, config: str) -> LightningCLI:
    file = folder / "config.yaml"
    file.write_text(config, encoding="utf-8")
    return LightningCLI(
        Net,
        trainer_defaults=QUIET,
        save_config_callback=None,
        seed_everything_default=False,
        args=["fit", f"--config={file}"],
    )


CALLBACK = """
trainer:
  callbacks:
    - class_path: wellcond.integrations.lightning.WellcondCallback
      init_args:
        transforms:
          - centralization
          - class_path: wellcond.FeatureWhitening
            init_args: {stats_every: 2, solve_every: 4}
"""
NAMED_OPTIMIZER = """
model:
  make:
    class_path: wellcond.optim.WSGDM
    init_args: {lr: 0.1, stats_every: 2, solve_every: 4, nesterov: true}
"""


def fitted(callbacks: list[L.Callback], make: Any = None, **options: Any) -> L.Trainer:
    trainer = L.Trainer(callbacks=callbacks, **{**QUIET, **options})
    trainer.fit(Net(make))
    return trainer


def test_a_callback_of_a_config_attaches(tmp_path: Path) -> None:
    trainer = run_cli(tmp_path, CALLBACK).trainer
    (handle,) = attachments(trainer.optimizers[0])
    assert handle.transforms == (
        wellcond.GradientCentralization(),
        wellcond.FeatureWhitening(stats_every=2, solve_every=4),
    )
    assert trainer.callback_metrics["wellcond/whitening/weights"] == 2


def test_a_named_optimizer_of_a_config_takes_the_options_of_both(tmp_path: Path) -> None:
    (optimizer,) = run_cli(tmp_path, NAMED_OPTIMIZER).trainer.optimizers
    assert isinstance(optimizer, wellcond.optim.WSGDM)
    assert optimizer.param_groups[0]["nesterov"] is True
    assert optimizer.attachment.transforms == (wellcond.FeatureWhitening(stats_every=2, solve_every=4),)


@pytest.mark.parametrize("wrong", ["stats_evry: 2", "stats_every: often", "damping_mode: sideways"])
def test_a_wrong_option_of_a_config_is_refused(tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_cli(tmp_path, NAMED_OPTIMIZER.replace("stats_every: 2", wrong))
    assert wrong.partition(":")[0] in capsys.readouterr().err


@pytest.mark.parametrize("kind", NAMED)
def test_signatures_show_every_option_of_the_transform_and_of_the_optimizer(kind: Any) -> None:
    shown = inspect.signature(kind).parameters
    base = next(each for each in kind.__mro__ if each.__module__.startswith("torch.optim"))
    assert {*inspect.signature(kind.transform_type).parameters, *inspect.signature(base).parameters} <= set(shown)
    assert list(shown)[:2] == ["model", "lr"]
    assert not [each for each in shown.values() if each.kind is each.VAR_KEYWORD]
    model = nn.Linear(3, 2)
    defaults = {
        name: each.default for name, each in shown.items() if each.default is not each.empty and name != "params"
    }
    # Every option that it shows is taken, and its default is what is taken without it.
    made = kind(model, **{"lr": 0.1, **defaults})
    plain = kind(nn.Linear(3, 2), lr=defaults.get("lr", 0.1))
    assert made.attachment.transforms == plain.attachment.transforms
    assert made.defaults == plain.defaults


def test_a_parser_of_signatures_checks_types() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(wellcond.optim.WAdam, "optimizer", skip={"model", "params", "where"})
    found = parser.parse_args(["--optimizer.lr=0.5", "--optimizer.solve_every=7", "--optimizer.amsgrad=true"])
    assert (found.optimizer.lr, found.optimizer.solve_every, found.optimizer.amsgrad) == (0.5, 7, True)


# callbacks ----------------------------------------------------------------------------------------------------------


def test_a_callback_trains_as_attaching_in_configure_optimizers_does() -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        wellcond.attach(optimizer, model, wellcond.FeatureWhitening(stats_every=2, solve_every=4))
        return optimizer

    whitening = wellcond.FeatureWhitening(stats_every=2, solve_every=4)
    by_callback = fitted([WellcondCallback(transforms=[whitening])]).lightning_module
    by_hand = fitted([WellcondCallback()], make).lightning_module
    plain = fitted([]).lightning_module
    for name, value in by_hand.state_dict().items():
        assert torch.equal(by_callback.state_dict()[name], value)
        assert not torch.equal(plain.state_dict()[name], value)


def test_a_resumed_fit_continues_exactly(tmp_path: Path) -> None:
    def callback() -> WellcondCallback:
        return WellcondCallback(transforms=[wellcond.FeatureWhitening(stats_every=3, solve_every=6)])

    whole = fitted([callback()]).lightning_module
    first = fitted([callback()], max_epochs=1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer = L.Trainer(callbacks=[callback()], **QUIET)
    resumed = Net()
    trainer.fit(resumed, ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_a_second_fit_attaches_nothing_twice() -> None:
    callback = WellcondCallback(transforms="whitening")  # type: ignore[arg-type]  # one name alone is taken, too
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.make = lambda _: optimizer
    for epochs in (1, 2):
        L.Trainer(callbacks=[callback], **{**QUIET, "max_epochs": epochs}).fit(model)
    assert len(attachments(optimizer)) == 1


@pytest.mark.parametrize("options", [{}, {"transforms": []}, {"transforms": None}, {"log_stats": False}])
def test_a_callback_with_nothing_to_do_says_so_before_training(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"WellcondCallback has nothing to do: give it transforms"):
        fitted([WellcondCallback(**options)])


@pytest.mark.parametrize("callback", [WellcondCallback, WellcondTrainerCallback])
def test_what_is_no_transform_is_refused_at_once(callback: Any) -> None:
    with pytest.raises(ValueError, match="did you mean 'whitening'"):
        callback(transforms=["whiting"])
    with pytest.raises(TypeError, match="transforms must be transforms such as"):
        callback(transforms=[wellcond.FeatureWhitening])


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net(x).square().mean()}


def hf_trainer(folder: Path, callbacks: list[TrainerCallback], model: nn.Module, **options: Any) -> Trainer:
    rows = [{"x": row} for row in DATA.tensors[0]]
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=8, logging_steps=2, save_steps=3, report_to="none",
        use_cpu=True, disable_tqdm=True, learning_rate=0.01,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, callbacks=callbacks, **options)


def test_the_trainers_callback_attaches_and_resumes_exactly(tmp_path: Path) -> None:
    def callback() -> WellcondTrainerCallback:
        return WellcondTrainerCallback(transforms=[wellcond.FeatureWhitening(stats_every=2, solve_every=4)])

    whole = Loss()
    trainer = hf_trainer(tmp_path / "whole", [callback()], whole)
    trainer.train()
    assert any("wellcond/whitening/weights" in entry for entry in trainer.state.log_history)
    resumed = Loss()
    hf_trainer(tmp_path / "resumed", [callback()], resumed).train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_the_trainer_makes_a_named_optimizer(tmp_path: Path) -> None:
    model = Loss()
    made = (wellcond.optim.WAdam, {"model": model, "lr": 1e-2, "stats_every": 2})
    trainer = hf_trainer(tmp_path, [WellcondTrainerCallback()], model, optimizer_cls_and_kwargs=made)
    trainer.train()
    (handle,) = attachments(trainer.optimizer)
    assert handle.stats()["whitening"]["weights"] == 2


def test_a_trainers_callback_with_nothing_to_do_says_so_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="WellcondTrainerCallback has nothing to do"):
        hf_trainer(tmp_path, [WellcondTrainerCallback()], Loss()).train()


# named optimizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("spelt", [str, str.casefold, lambda name: f"{name[0]}-{name[1:]}", lambda name: f"{name}_"])
def test_optimizers_are_made_by_name(kind: Any, spelt: Callable[[str], str]) -> None:
    made = wellcond.optim.create(spelt(kind.__name__), nn.Linear(3, 2), lr=0.3, stats_every=7)
    assert type(made) is kind
    assert made.param_groups[0]["lr"] == 0.3
    assert made.attachment.transforms[0].stats_every == 7


def test_other_names_and_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no optimizer is called 'wsgd': did you mean 'wsgdm'\? Known: fsgd, wsgdm"):
        wellcond.optim.create("wsgd", nn.Linear(3, 2), lr=0.1)
    with pytest.raises(TypeError, match="name must be a text"):
        wellcond.optim.create(nn.Linear(3, 2), "wsgdm")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(TypeError, match="attach by a callback"):
        wellcond.optim.WSGDM(nn.Linear(3, 2).parameters(), lr=0.1)  # type: ignore[arg-type]  # what is tested
