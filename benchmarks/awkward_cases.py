"""Twelve awkward cases of taking a network's statistics anew: `wellcond.calibrate` beside two other tools.

Each case makes a model and a loader. What is right is found in float64, from the definition: each of the loader's
batches goes through a copy whose batch normalizations alone are in training mode, and the inputs of each layer, of all
batches and of all its uses, are put together; their mean and unbiased variance are what `running_mean` and
`running_var` should be. The figure is the largest difference of a channel, of the mean in standard deviations, of the
variance as a share of it. It is right up to 0.02, which leaves room for tools that average batches' variances.

Beside it, `torch.optim.swa_utils.update_bn` and, where it is installed, fvcore's `update_bn_stats`, each called as its
documentation says.

    python benchmarks/awkward_cases.py --json docs/results/awkward-cases.json
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.util
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timing import setting, write
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from torchvision.ops import StochasticDepth

import wellcond
from wellcond.runtime.models import Call, run_on, unwrapped

RIGHT = 0.02
Tool = Callable[[nn.Module, "Case"], Any]


def images(batches: int = 6, samples: int = 16, last: int | None = None) -> list[Tensor]:
    """Return batches [n, 3, 8, 8]; a smaller last one is of other, brighter images, as at the end of a sorted set."""
    draw = torch.Generator().manual_seed(0)
    found = [torch.randn(samples, 3, 8, 8, generator=draw) for _ in range(batches)]
    return found if last is None else [*found, 3 + 2 * torch.randn(last, 3, 8, 8, generator=draw)]


class Net(nn.Module):
    """Two convolutions with batch normalization, whatever is between them, and a linear layer."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.between = between or nn.Identity()
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.second(self.between(self.first(x))).mean((2, 3)))


class Residual(nn.Module):
    """A branch that stochastic depth drops."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.depth = nn.Dropout(0.5), StochasticDepth(0.5, "row")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.depth(self.drop(x))


class Keywords(Net):
    """Takes keywords, and returns a mapping, as Hugging Face's models do."""

    def forward(self, *, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = super().forward(pixel_values)
        return {"logits": logits} if labels is None else {"logits": logits, "loss": F.cross_entropy(logits, labels)}


class TwoInputs(Net):
    """Is trained by a method of its own, on two views."""

    def forward(self, x: Tensor) -> Any:
        raise NotImplementedError("call training_step")

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        one, other = (super(TwoInputs, self).forward(batch[name]) for name in ("view", "other_view"))
        return F.mse_loss(one, other)


class Reused(Net):
    """Uses one normalization for two scales."""

    def forward(self, x: Tensor) -> Any:
        scales = [self.second(self.first(x)), self.second(self.first(2 * x + 1))]
        return self.head(sum(scales).mean((2, 3)))


class KeptInEvaluation(nn.Sequential):
    """A block of a pretrained network, whose normalization training leaves alone."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> KeptInEvaluation:
        super().train(mode)
        self[1].train(False)
        return self


class Detector(Net):
    """Takes a list of images of several sizes, and in training mode their targets, as torchvision's detectors do."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        if self.training and targets is None:
            raise ValueError("targets should not be none when in training mode")
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        padded = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
        return super().forward(torch.stack(padded))


class InterruptedError(Exception):
    """What ends the loader of one case."""


@dataclass
class Case:
    """A model and its loader.

    Attributes:
        name: In the table.
        model: Makes the model.
        loader: Makes the loader.
        call: How a batch is run, where that is not as usual.
        within: What the tools run within.
        interrupted: Whether the loader fails half way: then the statistics should be what they were.
        ranks: Processes; with two, the second one has no batch.
    """

    name: str
    model: Callable[[], nn.Module] = Net
    loader: Callable[[], Any] = images
    call: Call | None = None
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    interrupted: bool = False
    ranks: int = 1


def keyword_batches() -> list[dict[str, Tensor]]:
    return [{"pixel_values": x, "labels": torch.zeros(len(x), dtype=torch.long)} for x in images()]


def detection_batches() -> list[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    return [([image[:, : 8 - i % 3] for i, image in enumerate(x)], [{} for _ in x]) for x in images()]


def interrupted_batches() -> Iterator[Tensor]:
    yield from images(3)
    raise InterruptedError


CASES = (
    Case("dropout and stochastic depth", lambda: Net(Residual())),
    Case("batches are mappings of keywords", Keywords, keyword_batches),
    Case(
        "a call of the model's own",
        TwoInputs,
        lambda: [{"view": x, "other_view": x.flip(3)} for x in images()],
        lambda model, batch: model.training_step(batch),
    ),
    Case("a smaller last batch", loader=lambda: images(3, last=3)),
    Case("a layer that is used twice", Reused),
    Case("a block that keeps its normalization in evaluation mode", lambda: Net(KeptInEvaluation())),
    Case("mixed precision", within=lambda: torch.autocast("cpu", torch.bfloat16)),
    Case("a half-precision model", lambda: Net().bfloat16(), lambda: [x.bfloat16() for x in images()]),
    Case("a compiled model", lambda: torch.compile(Net(nn.Dropout(0.5)), backend="eager")),  # type: ignore[arg-type,return-value]
    Case("two ranks, one without a batch", ranks=2),
    Case("a detector, whose inputs are lists", Detector, detection_batches),
    Case("interrupted half way", loader=interrupted_batches, interrupted=True),
)


def prepared(case: Case) -> nn.Module:
    """Return the case's model, trained long ago: its statistics are of something else."""
    torch.manual_seed(0)
    model = case.model()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.running_mean.fill_(0.5)  # type: ignore[union-attr]
            layer.running_var.fill_(4.0)  # type: ignore[union-attr]
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0.0, 0.2)
    return model.eval()


def statistics_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each layer's running mean and variance, in float64."""
    return {
        name: (layer.running_mean.double().clone(), layer.running_var.double().clone())  # type: ignore[union-attr]
        for name, layer in unwrapped(model).named_modules()
        if isinstance(layer, _BatchNorm)
    }


def right_statistics(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what each layer's statistics should be, from the definition."""
    model = unwrapped(prepared(case))
    if case.interrupted:
        return statistics_of(model)
    model = copy.deepcopy(model).double()
    seen: dict[str, list[Tensor]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            layer.training = True
            inputs = seen.setdefault(name, [])
            layer.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, dict):
            return {key: wide(each) for key, each in value.items()}
        return type(value)(wide(each) for each in value) if isinstance(value, (list, tuple)) else value

    with torch.no_grad():
        for batch in case.loader():
            run_on(model, wide(batch), case.call)
    values = {name: torch.cat([x.transpose(0, 1).flatten(1) for x in own], dim=1) for name, own in seen.items()}
    return {name: (value.mean(1), value.var(1, correction=1)) for name, value in values.items()}


def difference(found: dict[str, tuple[Tensor, Tensor]], right: dict[str, tuple[Tensor, Tensor]]) -> float:
    """Return the largest difference of a channel's statistics."""
    worst = 0.0
    for name, (mean, var) in right.items():
        of_mean = (found[name][0] - mean).abs() / var.sqrt()
        of_var = (found[name][1] - var).abs() / var
        worst = max(worst, float(of_mean.max()), float(of_var.max()))
    return worst


def by_wellcond(model: nn.Module, case: Case, rank: int = 0) -> None:
    wellcond.calibrate(model, case.loader() if rank == 0 else [], call=case.call)


def by_update_bn(model: nn.Module, case: Case, rank: int = 0) -> None:
    update_bn(case.loader() if rank == 0 else [], model)


def by_fvcore(model: nn.Module, case: Case, rank: int = 0) -> None:
    update_bn_stats = importlib.import_module("fvcore.nn.precise_bn").update_bn_stats
    batches = case.loader() if rank == 0 else []
    inputs = (batch[0] if isinstance(batch, (tuple, list)) else batch for batch in batches)
    length = 6 if case.interrupted else len(batches)
    model.train()  # As it asks for.
    update_bn_stats(model, inputs, num_iters=length)


TOOLS: dict[str, Any] = {"wellcond": by_wellcond, "update_bn": by_update_bn, "fvcore": by_fvcore}


def measured(case: Case, tool: str, rank: int = 0) -> float | str:
    """Let a tool loose on a case; return its difference, or what it raised."""
    model = prepared(case)
    try:
        with warnings.catch_warnings(), case.within():
            warnings.simplefilter("ignore")
            TOOLS[tool](model, case, rank)
    except InterruptedError:
        pass
    except Exception as error:
        return f"raises {type(error).__name__}"
    return difference(statistics_of(model), right_statistics(case))


def _of_rank(rank: int, name: str, tool: str, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    case = next(case for case in CASES if case.name == name)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=case.ranks, rank=rank)
    results[rank] = measured(case, tool, rank)
    dist.destroy_process_group()


def measured_on_ranks(case: Case, tool: str) -> float | str:
    """Return the worst that a rank finds."""
    if case.ranks == 1:
        return measured(case, tool)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_of_rank, (case.name, tool, port, results), nprocs=case.ranks)
        return max(results.values(), key=lambda found: (isinstance(found, str), found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    tools = [tool for tool in TOOLS if tool != "fvcore" or importlib.util.find_spec("fvcore") is not None]
    found: dict[str, dict[str, float | str]] = {}
    for case in CASES:
        found[case.name] = {tool: measured_on_ranks(case, tool) for tool in tools}
        cells = (f"{each:12.1e}" if isinstance(each, float) else f"{each:>28}" for each in found[case.name].values())
        print(f"{case.name:58} {' '.join(cells)}", flush=True)
    right = {tool: sum(isinstance(row[tool], float) and row[tool] <= RIGHT for row in found.values()) for tool in tools}
    for tool, count in right.items():
        print(f"{tool}: {count} of {len(CASES)} right")
    about = (
        "Twelve awkward cases: the largest difference of a channel's statistics to those of all samples together, "
        f"found in float64; up to {RIGHT} is right."
    )
    rows = [
        [name, *(each if isinstance(each, str) else f"{each:.1g}" for each in row.values())]
        for name, row in found.items()
    ]
    rows.append(["right", *(f"{count} of {len(CASES)}" for count in right.values())])
    table = {"title": "", "heads": ["case", *tools], "rows": rows}
    figures = {"about": about, "tables": [table], "results": found, "right": right}
    write(options.json, setting(options, torch.device("cpu")) | figures)


if __name__ == "__main__":
    main()
