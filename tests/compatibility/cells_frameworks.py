"""Training loops of others: Lightning, Fabric, the HF Trainer, Accelerate, timm."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from by_hand import STEPS, ByHand, assert_equal, batch, check_training, loss_of, net, plain_step, whitening
from cells import attach, cell
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from wellcond.transforms import attachments

AREA = "Frameworks"
SAME = "weights after 3 steps against a plain loop on gradients changed by hand"


class Batches(Dataset[Tensor]):
    """The batches of the plain loop, one an item."""

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> Tensor:
        return batch(index)


def loader() -> DataLoader[Tensor]:
    """Return the batches in order."""
    return DataLoader(Batches(), batch_size=None)


def reference() -> nn.Module:
    """Return the net after the plain loop."""
    model = net()
    hand = ByHand(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        plain_step(model, optimizer, step, hand.change_gradients)
    return model


def lightning_module(configure: Callable[[Any, Any], None] = lambda module, optimizer: None) -> Any:
    """Return a Lightning module that trains the net; `configure` is given it and its optimizer."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, x: Tensor, index: int) -> Tensor:
            return loss_of(self.net(x))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
            configure(self, optimizer)
            return optimizer

    return Module()


def fit(module: Any) -> None:
    """Train a Lightning module for the three steps."""
    import lightning

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, loader())


@cell(AREA, "Lightning Trainer, attached in configure_optimizers", verified=SAME)
def lightning_trainer() -> None:
    module = lightning_module(lambda module, optimizer: attach(optimizer, module, whitening()) and None)
    fit(module)
    assert_equal(module.net.parameters(), reference().parameters(), 1e-7, "Lightning")


@cell(
    AREA,
    "Lightning's optimizer wrapper (self.optimizers())",
    "works",
    verified=SAME + "; attachments() finds the one handle under either name",
)
def lightning_wrapper() -> None:
    module = lightning_module()

    def on_fit_start() -> None:
        wrapper = module.optimizers()
        handle = attach(wrapper, module, whitening())
        assert attachments(wrapper) == attachments(module.trainer.optimizers[0]) == [handle], "found by one name only"

    module.on_fit_start = on_fit_start
    fit(module)
    assert_equal(module.net.parameters(), reference().parameters(), 1e-7, "Lightning")


def fabric(attach_first: bool) -> None:
    """Train under Fabric, attached before or after its setup."""
    import lightning

    launcher = lightning.Fabric(accelerator="cpu", devices=1)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if attach_first:
        attach(optimizer, model, whitening())
    wrapped, wrapper = launcher.setup(model, optimizer)
    if not attach_first:
        attach(wrapper, wrapped, whitening())
    assert len(attachments(optimizer)) == len(attachments(wrapper)) == 1, "found by one name only"
    for step in range(STEPS):
        wrapper.zero_grad()
        launcher.backward(loss_of(wrapped(batch(step))))
        wrapper.step()
    assert_equal(model.parameters(), reference().parameters(), 1e-7, "Fabric")


cell(AREA, "Lightning Fabric, attached before setup", verified=SAME)(lambda: fabric(True))
cell(AREA, "Lightning Fabric, attached to its wrappers", verified=SAME)(lambda: fabric(False))


def accelerate(attach_first: bool) -> None:
    """Train under Accelerate, attached before or after prepare."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if attach_first:
        attach(optimizer, model, whitening())
    wrapped, wrapper, batches = accelerator.prepare(model, optimizer, loader())
    if not attach_first:
        attach(wrapper, wrapped, whitening())
    for x in batches:
        wrapper.zero_grad()
        accelerator.backward(loss_of(wrapped(x)))
        wrapper.step()
    assert_equal(model.parameters(), reference().parameters(), 1e-7, "Accelerate")
    accelerator.free_memory()


cell(AREA, "Accelerate, attached before prepare", verified=SAME)(lambda: accelerate(True))
cell(AREA, "Accelerate, attached to its wrappers", verified=SAME)(lambda: accelerate(False))


@cell(AREA, "HF Trainer, optimizers=(optimizer, None)", verified=SAME)
def hf_trainer() -> None:
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": loss_of(self.net(x))}

    class InOrder(Trainer):
        def get_train_dataloader(self) -> Any:
            return [{"x": batch(step)} for step in range(STEPS)]

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    attach(optimizer, model, whitening())
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            use_cpu=True,
            report_to="none",
            max_grad_norm=0.0,
            save_strategy="no",
            lr_scheduler_type="constant",
            disable_tqdm=True,
            logging_strategy="no",
        )
        InOrder(model, arguments, train_dataset=Batches(), optimizers=(optimizer, None)).train()
    assert_equal(model.net.parameters(), reference().parameters(), 1e-7, "HF Trainer")


@cell(AREA, "timm create_optimizer_v2", verified=SAME)
def timm_optimizer() -> None:
    from timm.optim import create_optimizer_v2

    check_training(lambda model: create_optimizer_v2(model, opt="nadamw", lr=0.01, weight_decay=0.0), tolerance=1e-6)
