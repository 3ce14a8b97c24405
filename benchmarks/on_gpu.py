"""Everything that only a GPU can say, in one run: started by on_gpu.sh, which says how.

Parts, each with its seconds in the JSON; once the time of the whole run is used up, those left over are named there.

- steps: of a ResNet-50 (224 × 224 images, bfloat16 autocast, channels last) over SGD, and of a GPT of 124 million
  parameters (context 1024, bfloat16 autocast) over AdamW: time of an ordinary step, statistics, solve, all amortised
  over the default intervals, each as a ratio to the plain optimizer's step in the same rounds; memory beside it; and
  how often the host waited for the device in an ordinary step.
- solvers: matrix powers by width, with the residual of the result.
- norms: normalization layers against nn.BatchNorm2d, eager and compiled.
- tests: those that are marked ``cuda``.
- training: a ResNet-18 on CIFAR-10, SGDM against W-SGDM with GC, each for the same seconds.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_models import Gpt, GptSize, large_resnet
from norm_layers import BASE, LAYERS, table, time_calls, train_once
from preconditioner_cost import SOLVE_EVERY, STATS_EVERY, attachment, differences
from timing import setting, write
from torch import Tensor, nn

import wellcond
from wellcond.lab.benchmark.timing import StepTimer, quartiles, time_rounds
from wellcond.lab.data.batches import channel_moments
from wellcond.lab.data.load import load_data
from wellcond.lab.networks.registry import MODELS
from wellcond.numerics.linalg import symmetric_power

SECONDS = 440.0  # of the whole run
STEPS = {
    "resnet50": ("GC", "auto", "auto, p=1", "auto, bfloat16", "blocks", "kronecker"),
    "gpt": ("GC", "auto", "auto, p=1", "auto, bfloat16"),
}
NORMS = (BASE, "MBN", "BSR", "Ghost, 8 groups", "SwitchableNorm", "nn.BatchNorm2d, compiled", "MBN, compiled")
Maker = Callable[[], tuple[nn.Module, torch.optim.Optimizer, Callable[[nn.Module], Tensor]]]


class Run:
    """The device, the size, and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.toy: bool = options.toy
        self.device = torch.device("cpu" if options.toy or not torch.cuda.is_available() else "cuda")
        self.ends = time.monotonic() + SECONDS
        self.rounds = 2 if self.toy else 12

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.ends - time.monotonic()

    def autocast(self) -> torch.autocast:
        """Let products round to bfloat16."""
        return torch.autocast(self.device.type, torch.bfloat16)

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def resnet_maker(run: Run) -> Maker:
    """Return what makes a ResNet-50, SGD, and its loss on a batch."""
    size, batch = (32, 4) if run.toy else (224, 128)
    images = torch.randn(batch, 3, size, size, device=run.device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=run.device)

    def loss(net: nn.Module) -> Tensor:
        with run.autocast():
            return F.cross_entropy(net(images), labels)

    def make() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[nn.Module], Tensor]]:
        torch.manual_seed(0)
        net = large_resnet(run.toy).to(run.device, memory_format=torch.channels_last)
        return net, torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4), loss

    return make


def gpt_maker(run: Run) -> Maker:
    """Return what makes a GPT, AdamW, and its loss on a batch."""
    size = GptSize(64, 16, 32, 2, 2) if run.toy else GptSize(50304, 1024, 768, 12, 12)
    tokens = torch.randint(size.tokens, (2 if run.toy else 8, size.context + 1), device=run.device)

    def loss(net: nn.Module) -> Tensor:
        with run.autocast():
            scores = net(tokens[:, :-1])
        return F.cross_entropy(scores.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def make() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[nn.Module], Tensor]]:
        torch.manual_seed(0)
        net = Gpt(size).to(run.device)
        return net, torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.1), loss

    return make


class Trained(StepTimer):
    """A network in training, with a variant attached or nothing."""

    def __init__(self, make: Maker, name: str | None, observe: bool = False) -> None:
        net, optimizer, loss = make()
        super().__init__(net, optimizer, loss)
        self.attached: Any = attachment(name, observe)(optimizer, net) if name else None


def steps(run: Run, maker: Callable[[Run], Maker], names: tuple[str, ...]) -> dict[str, Any]:
    """Measure what variants cost beside the plain optimizer."""
    make = maker(run)
    plain = Trained(make, None)
    parameters = sum(p.numel() for p in plain.model.parameters())
    base_memory = peak(run, plain)
    rows: dict[str, Any] = {"parameters": parameters, "plain": {"peak_mb": base_memory / 1e6}}
    for name in names:
        if run.left < 30:
            rows.setdefault("left_out", []).append(name)
            continue
        before = allocated(run)
        ordinary = Trained(make, name)
        ordinary.seconds()
        memory = peak(run, ordinary) - (allocated(run) - before - held_by(ordinary))
        observing = Trained(make, name, observe=True)
        first, _ = observing.seconds()
        second, _ = observing.seconds()
        own = {"plain": plain, "ordinary": ordinary, "observing": observing}
        times, parts = time_rounds(own, run.rounds)
        solve = max(0.0, first - second)
        observed = max(0.0, statistics.median(differences(times["observing"], times["ordinary"])))
        more = observed / STATS_EVERY + solve / SOLVE_EVERY
        extra = differences(parts["ordinary"], parts["plain"])
        ratio = quartiles([1 + (e + more) / whole for e, whole in zip(extra, times["plain"], strict=True)])
        step = quartiles([a / b for a, b in zip(times["ordinary"], times["plain"], strict=True)])
        rows["plain"]["ms"] = 1e3 * statistics.median(times["plain"])
        rows[name] = {
            "ordinary_ratio": list(step),
            "amortised_ratio": list(ratio),
            "product_ms": 1e3 * statistics.median(extra),
            "statistics_ms": 1e3 * observed,
            "solve_ms": 1e3 * solve,
            "state_share": ordinary.attached.numbers() / parameters,
            "peak_mb": memory / 1e6,
            "host_waits": host_waits(run, ordinary),
        }
        r = rows[name]
        print(
            f"  {name:18} x {ratio.median:.3f} amortised ({ratio.low:.3f} to {ratio.high:.3f}), ordinary x "
            f"{step.median:.3f}, state {r['state_share']:.2f}, host waits {r['host_waits']}",
            flush=True,
        )
        del ordinary, observing, own
    return rows


def held_by(timer: StepTimer) -> int:
    """Count the bytes of a network, its gradients and its optimizer's state."""
    tensors = [*timer.model.parameters(), *timer.model.buffers()]
    tensors += [p.grad for p in timer.model.parameters() if p.grad is not None]
    tensors += [v for state in timer.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.device.type == "cuda")


def allocated(run: Run) -> int:
    """Return the bytes that are allocated on the device."""
    return torch.cuda.memory_allocated() if run.device.type == "cuda" else 0


def peak(run: Run, timer: StepTimer) -> int:
    """Return the most bytes that are allocated in a step."""
    if run.device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    timer.seconds()
    return torch.cuda.max_memory_allocated()


def host_waits(run: Run, timer: StepTimer) -> int | None:
    """Count how often the host waits for the device in an ordinary step; None without a GPU."""
    timer.model.zero_grad()
    timer.loss(timer.model).backward()
    if run.device.type != "cuda":
        timer.optimizer.step()
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            timer.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def solvers(run: Run) -> dict[str, Any]:
    """Time matrix powers by width: milliseconds, and ‖T^(1/p) (M + δ I) − I‖ / √width."""
    rows: dict[str, Any] = {}
    for width in (16, 32) if run.toy else (256, 512, 1024, 2048, 4096):
        generator = torch.Generator(run.device).manual_seed(width)
        samples = torch.randn(width, 2 * width, device=run.device, generator=generator)
        matrix = samples @ samples.mT / (2 * width)
        damped = matrix + 0.1 * torch.eye(width, device=run.device)
        for solver, exponent in (("eigh", -0.5), ("newton_schulz", -0.5), ("eigh", -1.0), ("cholesky", -1.0)):
            power = functools.partial(symmetric_power, matrix, exponent, 0.1, damping_mode="absolute", solver=solver)
            found = power()
            taken = []
            for _ in range(3):
                run.wait()
                start = time.perf_counter()
                power()
                run.wait()
                taken.append(time.perf_counter() - start)
            whole = found @ found if exponent == -0.5 else found
            identity = torch.eye(width, device=run.device)
            residual = float((whole @ damped - identity).norm()) / math.sqrt(width)
            rows[f"{width}, {solver}, p={-exponent:g}"] = {"ms": 1e3 * statistics.median(taken), "residual": residual}
    for name, row in rows.items():
        print(f"  {name:30} {row['ms']:10.2f} ms   residual {row['residual']:.1e}")
    return rows


def norms(run: Run) -> dict[str, Any]:
    """Time normalization layers against nn.BatchNorm2d."""
    shape = (4, 8, 6, 6) if run.toy else (128, 64, 56, 56)
    names = [name for name in NORMS if not (run.toy and "compiled" in name)]
    x = torch.randn(shape, device=run.device, requires_grad=True)
    grad = torch.randn(shape, device=run.device)
    layers = {name: LAYERS[name](shape[1], shape).to(run.device) for name in names}
    calls = {name: functools.partial(train_once, layer, x, grad) for name, layer in layers.items()}
    return {"shape": list(shape), "training": table(time_calls(calls, run.rounds, run.device.type == "cuda"), BASE)}


def marked_tests(run: Run) -> dict[str, Any]:
    """Run the tests that are marked for a GPU."""
    if run.device.type != "cuda":
        return {"skipped": "no GPU"}
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=max(30.0, run.left), check=False)
    last = done.stdout.strip().splitlines()[-1:] or [""]
    print("  " + last[0])
    return {"exit_code": done.returncode, "summary": last[0]}


def training(run: Run, data: str | None) -> dict[str, Any]:
    """Train a ResNet-18 with SGDM, and with W-SGDM and GC, for the same seconds."""
    if data is None:
        return {"skipped": "no --data"}
    if data != "digits" and not Path(data).exists():
        return {"skipped": "--data is not there"}
    found = load_data(data, 8 if run.toy else None, None, 256 if run.toy else None)
    seconds = 0.5 if run.toy else min(80.0, (run.left - 20) / 2)
    rows: dict[str, Any] = {"data": found.name, "seconds": seconds}
    mean, std = (part.to(run.device) for part in channel_moments(found.pool.images))
    images, test = ((part.images.to(run.device)) for part in (found.pool, found.test))
    labels, answers = (torch.from_numpy(part.labels).to(run.device).long() for part in (found.pool, found.test))

    def normalized(batch: Tensor) -> Tensor:
        scaled = (batch.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        return scaled.to(memory_format=torch.channels_last)

    for name, transforms in (
        ("SGDM", ()),
        ("W-SGDM+GC", (wellcond.GradientCentralization(), wellcond.FeatureWhitening())),
    ):
        torch.manual_seed(0)
        net = MODELS["convnet" if run.toy else "resnet18"].build(images.shape[1], len(found.pool.classes))
        net = net.to(run.device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        if transforms:
            wellcond.attach(optimizer, net, *transforms)
        seen, start = 0, time.monotonic()
        for batch in batches(len(images), 32 if run.toy else 128, run):
            # A warm-up, then a cosine, over the seconds that there are.
            done = (time.monotonic() - start) / seconds
            if done >= 1:
                break
            optimizer.param_groups[0]["lr"] = 0.1 * min(done / 0.05, 0.5 * (1 + math.cos(math.pi * done)))
            optimizer.zero_grad()
            moved = images[batch] if run.toy else shifted(images[batch])
            with run.autocast():
                loss = F.cross_entropy(net(normalized(moved)), labels[batch])
            loss.backward()
            optimizer.step()
            seen += len(batch)
        run.wait()
        net.eval()
        with torch.no_grad(), run.autocast():
            right = sum(
                int((net(normalized(x)).argmax(1) == y).sum())
                for x, y in zip(test.split(500), answers.split(500), strict=True)
            )
        rows[name] = {
            "epochs": seen / len(images),
            "test_accuracy": 100 * right / len(test),
            "last_loss": float(loss.detach()),
        }
        print(f"  {name:12} {rows[name]['test_accuracy']:.2f} % after {rows[name]['epochs']:.1f} epochs")
    return rows


def batches(count: int, size: int, run: Run) -> Iterator[Tensor]:
    """Yield the positions of batches, epoch after epoch, without end."""
    while True:
        yield from torch.randperm(count, device=run.device).split(size)


def shifted(images: Tensor) -> Tensor:
    """Shift a batch by up to four pixels, and mirror half of it."""
    padded = F.pad(images, (4, 4, 4, 4))
    row, column = (int(n) for n in torch.randint(0, 9, (2,)))
    height, width = images.shape[2:]
    cropped = padded[:, :, row : row + height, column : column + width]
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, cropped.flip(3), cropped)


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="at toy size, on the CPU")
    parser.add_argument("--data", help="a folder with CIFAR-10, or a parquet file; without it that part is left out")
    parser.add_argument("--json", type=Path, default=Path("on_gpu.json"))
    options = parser.parse_args()
    if not (options.toy or torch.cuda.is_available()):
        parser.error("there is no GPU here: --toy runs the same at toy size on the CPU")
    run = Run(options)
    figures = setting(options, run.device) | {"toy": run.toy, "parts": {}}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "resnet50": lambda: steps(run, resnet_maker, STEPS["resnet50"]),
        "gpt": lambda: steps(run, gpt_maker, STEPS["gpt"]),
        "solvers": lambda: solvers(run),
        "norms": lambda: norms(run),
        "training": lambda: training(run, options.data),
        "tests": lambda: marked_tests(run),
    }
    for name, part in parts.items():
        print(name, flush=True)
        start = time.monotonic()
        found = part() if run.left > 20 else {"skipped": "no time left"}
        if "skipped" in found:
            print(f"  skipped: {found['skipped']}")
        figures["parts"][name] = found | {"took_seconds": time.monotonic() - start}
        write(options.json, figures)  # what there is, should a later part fail
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
