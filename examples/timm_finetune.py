"""timm: fine-tune a pre-trained ResNet at a batch of 4, in the manner of timm's train script, with MBN or BSR."""

import argparse
import tempfile

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver
from torch import Tensor, nn

import wellcond

MODEL = {"model_name": "resnet10t", "pretrained": False, "num_classes": 5, "in_chans": 1}


def digits(chosen: range) -> tuple[Tensor, Tensor]:
    """Return the images of five digits, 32 × 32."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    kept = torch.isin(labels, torch.tensor(chosen))
    return F.interpolate(images[kept], (32, 32)), labels[kept] - chosen[0]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    batch: int,
    epochs: int,
    folder: str | None = None,
    resume: str | None = None,
) -> None:
    images, labels = data
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=folder) if folder else None
    start = resume_checkpoint(model, resume, optimizer) if resume else 0
    for epoch in range(start, epochs):
        scheduler.step(epoch)
        for step in range(10 * epoch, 10 * epoch + 10):
            chosen = torch.randint(len(images), (batch,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
        if saver is not None:
            saver.save_checkpoint(epoch)


def main(epochs: int = 6, norm: str = "bsr", folder: str | None = None, resume: str | None = None) -> nn.Module:
    """Fine-tune for so many epochs of 10 batches; checkpoints go to the folder, and from one of them it resumes."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        # A stand-in for published weights: the digits 0 to 4, batch normalization, batches of 32.
        model = timm.create_model(**MODEL)
        train(model, create_optimizer_v2(model, opt="sgd", lr=0.05), digits(range(5)), 32, 3, temporary)
        model = timm.create_model(**MODEL, checkpoint_path=f"{temporary}/last.pth.tar")
    model.reset_classifier(5)

    # The lines that wellcond adds: a norm for batches of 4, and Gradient Centralization over timm's optimizer.
    wellcond.nn.convert_norm(model, to=norm)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.02, weight_decay=1e-4, momentum=0.9)
    wellcond.attach(optimizer, model, wellcond.GradientCentralization())

    images, labels = digits(range(5, 10))
    train(model, optimizer, (images[:700], labels[:700]), 4, epochs, folder, resume)
    with torch.no_grad():
        right = float((model.eval()(images[700:]).argmax(1) == labels[700:]).float().mean())
    print(f"{norm}: {right:.1%} of {len(images) - 700} test images of the digits 5 to 9 right")
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--norm", default="bsr", choices=["bn", "bsr", "mbn", "evalnorm"])
    main(norm=parser.parse_args().norm)
