"""Lightning: automatic optimization, bfloat16, DDP, checkpoint and resume; Momentum Batch Normalization by a callback.

With DDP: ``torchrun --nproc-per-node 2 examples/lightning_digits.py``.
"""

import os

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import wellcond
from wellcond.integrations.lightning import WellcondCallback

data = load_digits()
images, labels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
TRAIN, VALIDATION = TensorDataset(images[:1400], labels[:1400]), TensorDataset(images[1400:], labels[1400:])


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
        )
        wellcond.nn.convert_norm(self, to="mbn")

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        # The line that wellcond adds: feature whitening over your own optimizer.
        wellcond.attach(optimizer, self, wellcond.FeatureWhitening(stats_every=10, solve_every=50))
        return optimizer

    def train_dataloader(self) -> DataLoader:
        # Its order is a function of the epoch, so a resumed run has the same.
        return DataLoader(
            TRAIN, 8, sampler=DistributedSampler(TRAIN, self.trainer.world_size, self.trainer.global_rank)
        )


def main(epochs: int = 3, folder: str | None = None, resume: str | None = None) -> Digits:
    L.seed_everything(0, verbose=False)
    model = Digits()
    # The momentum of MBN rises for two thirds of the epochs; each validation sees running statistics taken anew.
    callback = WellcondCallback(
        wellcond.nn.MomentumScheduler(model, total_epochs=2),
        calibration_loader=DataLoader(TRAIN, 200),
        calibration_batch_size=8,
        calibrate="bn",
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        precision="bf16-mixed",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        callbacks=callback,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
    )
    trainer.fit(model, val_dataloaders=DataLoader(VALIDATION, 200), ckpt_path=resume)
    print(trainer.callback_metrics)
    return model


if __name__ == "__main__":
    main()
