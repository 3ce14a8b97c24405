"""Hugging Face Accelerate: a loop with a prepared model, gradient accumulation, and the state saved and loaded."""

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import wellcond

EPOCH = 44  # batches


def main(steps: int = 4 * EPOCH, folder: str | None = None, resume: int = 0) -> nn.Module:
    """Train until so many batches are done; after a resume at a batch, from the state saved in the folder on."""
    # Without a seedable sampler a resumed run would see the images in another order.
    ordered = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(gradient_accumulation_steps=2, dataloader_config=ordered)
    set_seed(0)
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    model = nn.Sequential(
        nn.Linear(64, 128),
        nn.LayerNorm(128),
        nn.GELU(),
        nn.Linear(128, 128),
        nn.GELU(),
        nn.Linear(128, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(TensorDataset(images[:1408], labels[:1408]), 32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    # The line that wellcond adds, before or after prepare(): feature descent over your own optimizer.
    handle = wellcond.attach(optimizer, model, wellcond.FeatureDescent(stats_every=5, solve_every=25))

    if folder is not None and resume:
        accelerator.load_state(folder)
    done = resume
    while done < steps:
        loader.set_epoch(done // EPOCH)
        batches = accelerator.skip_first_batches(loader, done % EPOCH) if done % EPOCH else loader
        for inputs, targets in batches:
            if done == steps:
                break
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            done += 1

    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        accelerator.save_state(folder)
    model.eval()
    with torch.no_grad():
        right = (model(images[1408:].to(accelerator.device)).argmax(1).cpu() == labels[1408:]).float().mean()
    accelerator.print(f"after {steps} batches: {right:.1%} of 389 test images right; {handle.stats()['descent']}")
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
