"""Trains the small networks on scikit-learn's digits that the figures of docs/diagnostics.md are of."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wellcond
from wellcond import diagnostics
from wellcond.lab.data.batches import TrainingBatches, channel_moments
from wellcond.lab.data.load import load_data
from wellcond.lab.data.splits import draw_split
from wellcond.lab.networks.registry import initial_model

LR = 0.1


def digits(batch_size: int, seed: int) -> TrainingBatches:
    """Return shuffled batches of 1000 digits."""
    data = load_data("digits", None, None, None)
    labels = torch.from_numpy(data.pool.labels)
    part = torch.from_numpy(draw_split(data.pool.labels, 1000, 1, seed).train)
    images = data.pool.images[part]
    return TrainingBatches(images, labels[part], channel_moments(images), batch_size, "none", seed)


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(output, batch[1])


def sgdm(model: nn.Module) -> torch.optim.Optimizer:
    """Return plain SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def centred(model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with momentum and gradient centralization."""
    optimizer = sgdm(model)
    wellcond.attach(optimizer, model, wellcond.GradientCentralization())
    return optimizer


def fsgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return feature descent."""
    return wellcond.optim.FSGD(model, lr=LR, momentum=0.9, stats_every=1, solve_every=5)


def train(
    model: nn.Module,
    batches: TrainingBatches,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    epochs: int = 1,
) -> diagnostics.GradientStatistics:
    """Train, and return the gradients on the way, before they are centred."""
    optimizer = make(model)
    recorder = diagnostics.GradientRecorder(model)
    model.train()
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            loss(model(batch[0]), batch).backward()
            recorder.record()
            optimizer.step()
    optimizer.zero_grad()
    return recorder.result()


def convnet(seed: int = 0) -> nn.Module:
    """Return the network of nearly all figures."""
    return initial_model("convnet", 1, 10, seed)
