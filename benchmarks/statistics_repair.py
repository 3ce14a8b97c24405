"""Damages trained networks, and repairs nothing but their statistics: how many points come back, in how many seconds.

The damages are rounded weights, pruned channels, the average over epochs at a high learning rate, and an aligned merge
of two seeds. The repairs see training images: 64, 512 or all of them for `wellcond.calibrate`, 512 for the others.
Bias correction (Nagel et al. 2019) takes the mean of each normalization's inputs anew, from the first to the last
layer, and leaves the variances; it asks what the whole network computed, so there is none where there is no such.

    python benchmarks/stale_networks.py --data cifar10-jpeg/ --work runs/
    python benchmarks/statistics_repair.py --data cifar10-jpeg/ --work runs/ --json docs/results/statistics-repair.json

Needs fvcore for its rows, which are left out without it. Each network's and seed's figures are kept in `--work`.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from stale_networks import NETWORKS, Images, arguments, file_of, kept_rows
from timing import setting, write
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

import wellcond
from wellcond import repair

BATCH, SOME, FEW = 64, 512, 64
Damage = Callable[[nn.Module], nn.Module]
ROUNDINGS: dict[str, tuple[int, Any]] = {
    f"W{bits}, per {per}": (bits, per) for bits in (4, 3) for per in ("channel", "tensor")
}
SHARES = {"30 % of channels pruned": 0.3, "50 % of channels pruned": 0.5}
AVERAGE, MERGE = "average over high-lr epochs", "aligned merge of two seeds"
DAMAGES = (*ROUNDINGS, *SHARES, AVERAGE, MERGE)


def accuracy(model: nn.Module, images: Images) -> float:
    """Return the test accuracy in percent."""
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(images.normalized(some)).argmax(1) == labels).sum())
            for some, labels in zip(images.test.split(500), images.test_labels.split(500), strict=True)
        )
    return 100.0 * right / len(images.test_labels)


def network(options: Any, name: str, seed: int, images: Images) -> tuple[nn.Module, list[nn.Module]]:
    """Return a trained network, and what it was at the ends of epochs at a high learning rate."""
    found = torch.load(file_of(options.work, name, seed), weights_only=True)

    def filled(state: dict[str, Tensor]) -> nn.Module:
        model = NETWORKS[name](images.train.shape[1], images.classes)
        model.load_state_dict(state)
        return model.eval()

    return filled(found["final"]), [filled(state) for state in found["high"]]


def damaged(options: Any, name: str, seed: int, images: Images) -> dict[str, tuple[float, nn.Module, nn.Module | None]]:
    """Return for each damage the accuracy before, the damaged network, and the whole one where there is one."""
    model, high = network(options, name, seed, images)
    before = accuracy(model, images)
    found: dict[str, tuple[float, nn.Module, nn.Module | None]] = {}
    for what, (bits, per) in ROUNDINGS.items():
        found[what] = before, repair.round_weights(copy.deepcopy(model), bits, per=per), model
    for what, share in SHARES.items():
        found[what] = before, repair.prune_channels(copy.deepcopy(model), share), None
    found[AVERAGE] = fmean(accuracy(each, images) for each in high), repair.average(high), None
    position = options.seeds.index(seed)
    other, _ = network(options, name, options.seeds[(position + 1) % len(options.seeds)], images)
    ends = (before + accuracy(other, images)) / 2
    repair.align(other, model, batches(images, SOME))
    found[MERGE] = ends, repair.average([model, other]), None
    return found


def batches(images: Images, count: int) -> list[Tensor]:
    """Return the first training images, in batches."""
    return [images.normalized(some) for some in images.train[:count].split(BATCH)]


def bias_corrected(model: nn.Module, whole: nn.Module, loader: Iterable[Tensor]) -> None:
    """Move each normalization's running mean as far as the mean of its inputs has moved, the first layers first."""
    loader = list(loader)
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            assert layer.running_mean is not None
            moved = _mean_input(model, layer, loader) - _mean_input(whole, whole.get_submodule(name), loader)
            layer.running_mean += moved


def _mean_input(model: nn.Module, layer: nn.Module, loader: Iterable[Tensor]) -> Tensor:
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean((0, 2, 3))))
    with torch.no_grad():
        for batch in loader:
            model(batch)
    handle.remove()
    return torch.stack(seen).mean(0)


def by_fvcore(model: nn.Module, loader: list[Tensor]) -> None:
    """Do what fvcore's documentation says."""
    from fvcore.nn.precise_bn import update_bn_stats

    update_bn_stats(model.train(), loader, num_iters=len(loader))


def repairs(images: Images) -> dict[str, Callable[[nn.Module, nn.Module | None], object]]:
    """Return what repairs a network, by name."""
    some, few, everything = (batches(images, count) for count in (SOME, FEW, len(images.train)))
    found: dict[str, Callable[[nn.Module, nn.Module | None], object]] = {
        f"calibrate, {FEW}": lambda model, _: wellcond.calibrate(model, few),
        f"calibrate, {SOME}": lambda model, _: wellcond.calibrate(model, some),
        f"calibrate, all {len(images.train)}": lambda model, _: wellcond.calibrate(model, everything),
        f"update_bn, {SOME}": lambda model, _: update_bn(some, model),
    }
    if importlib.util.find_spec("fvcore") is not None:
        found[f"fvcore, {SOME}"] = lambda model, _: by_fvcore(model, some)
    found[f"bias correction, {SOME}"] = lambda model, whole: whole and bias_corrected(model, whole, some)
    return found


def measured(options: Any, name: str, seed: int, images: Images) -> dict[str, Any]:
    """Return for each damage the accuracies before and after it, and after each repair, with its seconds."""
    found: dict[str, Any] = {}
    for what, (before, model, whole) in damaged(options, name, seed, images).items():
        row: dict[str, Any] = {"before": before, "damaged": accuracy(model, images), "repairs": {}}
        for tool, mend in repairs(images).items():
            if whole is None and tool.startswith("bias"):
                continue
            repaired = copy.deepcopy(model)
            start = time.perf_counter()
            mend(repaired, whole)
            seconds = time.perf_counter() - start
            row["repairs"][tool] = {"accuracy": accuracy(repaired, images), "seconds": seconds}
        found[what] = row
    return found


def spread(values: list[float], form: str = ".1f") -> str:
    """Return a mean and the standard deviation over seeds."""
    deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{deviation}"


def table(name: str, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one network's table."""
    tools = list(dict.fromkeys(tool for row in seeds[0].values() for tool in row["repairs"]))
    rows = []
    for what in seeds[0]:
        own = [seed[what] for seed in seeds]
        cells = [spread([row["before"] for row in own]), spread([row["damaged"] for row in own])]
        for tool in tools:
            back = [row["repairs"][tool]["accuracy"] - row["damaged"] for row in own if tool in row["repairs"]]
            cells.append(spread(back, "+.1f").replace("± +", "± ") if back else "–")
        rows.append([what, *cells])
    seconds = [
        max(row["repairs"][tool]["seconds"] for seed in seeds for row in seed.values() if tool in row["repairs"])
        for tool in tools
    ]
    rows.append(["longest, in seconds", "", "", *(f"{each:.1f}" for each in seconds)])
    return {"title": name, "heads": ["damage", "before", "damaged", *(f"back: {tool}" for tool in tools)], "rows": rows}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for name, seed, row in kept_rows(options, "repaired", measured):
        found.setdefault(name, []).append(row)
        print(f"{name}, seed {seed}:", flush=True)
        for what, each in row.items():
            back = ", ".join(
                f"{tool} {own['accuracy'] - each['damaged']:+.1f}" for tool, own in each["repairs"].items()
            )
            print(f"  {what}: {each['before']:.1f} → {each['damaged']:.1f}; {back}", flush=True)
    about = (
        f"{Path(options.data).name}: {options.train_images} training images and {options.test_images} test images of "
        f"{options.image_size}×{options.image_size}, {len(options.seeds)} seeds, mean ± std. Test accuracy in %; what "
        "comes back is in points above the damaged network. The number is of images that a repair sees; a batch is "
        f"{BATCH} of them."
    )
    figures = {"about": about, "tables": [table(name, rows) for name, rows in found.items()], "results": found}
    write(options.json, setting(options, torch.device("cpu")) | figures)


if __name__ == "__main__":
    main()
