"""A CNN on the digits: the loop that was there before, as a task."""

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from digits_project.network import Net
from wellcond.lab import Metric, Task


class Digits(Task):
    """Classifies handwritten digits."""

    metric = Metric("accuracy")
    epochs = 2
    samples = "images"

    def __init__(self, width: int = 8, smoothing: float = 0.0, train: int = 320):
        images, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(images / 16).float().view(-1, 1, 8, 8), torch.tensor(labels))
        rest, self.test = random_split(data, [len(data) - 300, 300], torch.Generator().manual_seed(0))
        self.train, self.validation, _ = random_split(
            rest, [train, 200, len(rest) - train - 200], torch.Generator().manual_seed(1)
        )
        self.width, self.smoothing = width, smoothing

    def model(self, seed):
        return Net(self.width)

    def batches(self, seed, epoch):
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def loss(self, model, batch):
        images, labels = batch
        return F.cross_entropy(model(images), labels, label_smoothing=self.smoothing)

    def scores(self, model, split):
        right = loss = 0.0
        part = self.validation if split == "validation" else self.test
        for images, labels in DataLoader(part, batch_size=100):
            logits = model(images)
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
        return {"accuracy": 100 * right / len(part), "loss": loss / len(part)}
