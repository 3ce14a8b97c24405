"""Its data."""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split


class LitData(pl.LightningDataModule):
    """The digits as rows of pixels."""

    def __init__(self, batch_size: int = 32):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        pixels, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(pixels / 16).float(), torch.tensor(labels))
        self.train, self.val, self.test, _ = random_split(data, [320, 150, 150, len(data) - 620])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=64)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=64)
