"""A LightningModule as its author trains it: nothing in it knows of wellcond."""

import lightning.pytorch as pl
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F


class LitModel(pl.LightningModule):
    """A small classifier."""

    def __init__(self, hidden: int = 32, lr: float = 1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 10))
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=10)

    def training_step(self, batch, batch_idx):
        pixels, labels = batch
        loss = F.cross_entropy(self.net(pixels), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self._evaluate(batch, "val")

    def test_step(self, batch, batch_idx):
        self._evaluate(batch, "test")

    def _evaluate(self, batch, stage):
        pixels, labels = batch
        logits = self.net(pixels)
        self.accuracy(logits, labels)
        self.log(f"{stage}_acc", self.accuracy)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
