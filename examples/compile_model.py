"""torch.compile: attach to the model, compile it, and train; batch normalization of the library compiles as torch's."""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import wellcond


def main(steps: int = 60, backend: str = "inductor", checkpoint: Path | None = None) -> list[float]:
    """Train until so many steps are done; from the checkpoint on, if there is one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(256, 4),
    )
    wellcond.nn.convert_norm(model, to="mbn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    # The line that wellcond adds. Before the first compiled call: what is compiled and run already is not observed.
    handle = wellcond.attach(optimizer, model, wellcond.FeatureWhitening(stats_every=10, solve_every=20))
    compiled = torch.compile(model, backend=backend)

    done = 0
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])  # The compiled model has the same parameters.
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]

    losses, times = [], []
    for step in range(done, steps):
        draw = torch.Generator().manual_seed(step)
        labels = torch.randint(4, (32,), generator=draw)
        images = torch.randn(32, 3, 16, 16, generator=draw)
        images[:, 0] += torch.linspace(-1, 1, 16) * (labels - 1.5)[:, None, None]
        start = time.perf_counter()
        loss = F.cross_entropy(compiled(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    if checkpoint is not None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": steps}, checkpoint)
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}; first step {times[0]:.1f} s, then {min(times) * 1e3:.1f} ms")
    print(handle.stats()["whitening"])
    return losses


if __name__ == "__main__":
    main()
