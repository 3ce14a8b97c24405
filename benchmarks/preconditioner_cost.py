"""What feature preconditioning costs, split into product, statistics and solve; each a ratio to SGDM in the same run.

    python benchmarks/preconditioner_cost.py                              # ResNet-18 with a CIFAR stem, batch 32
    python benchmarks/preconditioner_cost.py --batch 128 --variants auto dense
    python benchmarks/preconditioner_cost.py --rounds 7 --json out.json
    python benchmarks/preconditioner_cost.py --model convnet --channels 1 --image-size 8 --steps 20 \
        --variants GC auto "auto, p=1"                                    # the network of the digits
    python benchmarks/preconditioner_cost.py --clock processor            # for a machine that is busy with other things

Every variant trains its own copy of one network with SGD, momentum and weight decay; rounds as in step_time.py.

- product: an ordinary step's extra time in `optimizer.step()`, once a step;
- statistics: the extra time of a step that also observes all layers, once in 50 steps;
- solve: the time to factorize all layers once, once in 500 steps;
- amortised: an ordinary step plus both shares, as a ratio to SGDM's step (median and quartiles over the rounds);
- of a bare product, for the dense forms: ``product`` over the time of G @ T alone for all layers, into memory that is
  there already, in the same rounds;
- state: what the preconditioner keeps, as a share of the parameters; peak: the most memory the process held above the
  plain optimizer's (on a GPU: that torch allocated), measured in a process of its own.

Two formulations are there to compare with, written for this benchmark as their sources write them: the published
W-SGDM (im2col by `unfold`, dense products into fresh memory, `eigh`), and K-FAC in the style of kfac-pytorch (dense
input factor by im2col, and an output-gradient factor; both inverses applied to every gradient).
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import Trainer, arguments, random_batch, setting, write
from torch import Tensor, nn

import wellcond
from wellcond import FeatureDescent, FeatureWhitening, GradientCentralization
from wellcond.lab.benchmark.timing import quartiles, ratio_quartiles, time_rounds

NEVER = 10**9
STATS_EVERY, SOLVE_EVERY = FeatureWhitening().stats_every, FeatureWhitening().solve_every

VARIANTS: dict[str, Callable[..., wellcond.GradientTransform]] = {
    "GC": lambda **_: GradientCentralization(),
    "auto": FeatureWhitening,
    "auto, p=1": FeatureDescent,
    "auto, bfloat16": functools.partial(FeatureWhitening, precision="bfloat16"),
    "auto, tf32": functools.partial(FeatureWhitening, precision="tf32"),
    "blocks": functools.partial(FeatureWhitening, second_moment="blocks"),
    "kronecker": functools.partial(FeatureWhitening, second_moment="kronecker"),
    "low_rank": functools.partial(FeatureWhitening, second_moment="low_rank"),
    "dense": functools.partial(FeatureWhitening, second_moment="dense"),
    "dense, p=1": functools.partial(FeatureDescent, second_moment="dense"),
}
DEFAULT = ("auto", "auto, p=1", "auto, bfloat16", "kronecker", "dense", "dense, p=1", "published W-SGDM", "K-FAC style")


class Published:
    """W-SGDM as published: a matrix M and T a layer, statistics by unfold, no memory used twice."""

    def __init__(self, optimizer: torch.optim.Optimizer, net: nn.Module, *, observe: bool) -> None:
        self.observe, self.first = observe, True
        self.moments: dict[nn.Module, Tensor] = {}
        self.powers: dict[nn.Module, Tensor] = {}
        self.layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        for layer in self.layers:
            layer.register_forward_pre_hook(self.see)
        optimizer.register_step_pre_hook(self.precondition)

    @torch.no_grad()
    def see(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Average the second moment of im2col rows."""
        if not (self.first or self.observe):
            return
        rows = input_rows(layer, inputs[0])
        moment = rows.T @ rows / len(rows)
        self.moments[layer] = moment if self.first else self.moments[layer].lerp(moment, 0.05)

    @torch.no_grad()
    def precondition(self, *_: Any) -> None:
        """Factorize once, then multiply and give the norm back."""
        if self.first:
            self.first = False
            start = time.perf_counter()
            self.solve()
            wait(self.powers[self.layers[0]])
            self.solve_seconds = time.perf_counter() - start
        for layer in self.layers:
            gradient, bias = layer.weight.grad, getattr(layer, "bias", None)
            joint = gradient.flatten(1)
            if bias is not None:
                joint = torch.cat([joint, bias.grad.unsqueeze(1)], 1)
            changed = self.change(layer, joint)
            changed = changed * (joint.norm() / (changed.norm() + 1e-12))
            if bias is not None:
                bias.grad.copy_(changed[:, -1])
                changed = changed[:, :-1]
            gradient.copy_(changed.reshape(gradient.shape))

    def solve(self) -> None:
        """T = (M + ε λ_max I)^(−1/2)."""
        for layer in self.layers:
            values, vectors = torch.linalg.eigh(self.moments[layer])
            self.powers[layer] = (vectors * (values.clamp_min(0) + 1e-3 * values[-1]).rsqrt()) @ vectors.T

    def change(self, layer: nn.Module, joint: Tensor) -> Tensor:
        """Ĝ = G T."""
        return joint @ self.powers[layer]

    def numbers(self) -> int:
        """Count what is kept."""
        return sum(t.numel() for kept in (self.moments, self.powers) for t in kept.values())


class Kfac(Published):
    """K-FAC: T of the inputs as above with p = 1, and the inverse of the output gradients' second moment besides."""

    def __init__(self, optimizer: torch.optim.Optimizer, net: nn.Module, *, observe: bool) -> None:
        super().__init__(optimizer, net, observe=observe)
        self.outer: dict[nn.Module, Tensor] = {}
        self.outer_powers: dict[nn.Module, Tensor] = {}
        for layer in self.layers:
            layer.register_forward_hook(self.watch_output)

    def watch_output(self, layer: nn.Module, _: Any, output: Tensor) -> None:
        """See the output's gradient when it comes."""
        if self.first or self.observe:
            output.register_hook(functools.partial(self.see_gradient, layer))

    @torch.no_grad()
    def see_gradient(self, layer: nn.Module, gradient: Tensor) -> None:
        """Average the second moment of the output gradients."""
        rows = gradient.movedim(1, -1).flatten(0, -2)
        moment = rows.T @ rows * (len(gradient) ** 2 / len(rows))
        self.outer[layer] = moment if layer not in self.outer else self.outer[layer].lerp(moment, 0.05)

    def solve(self) -> None:
        """Invert both factors."""
        for moments, powers in ((self.moments, self.powers), (self.outer, self.outer_powers)):
            for layer in self.layers:
                damped = moments[layer] + 1e-2 * torch.eye(len(moments[layer]), device=moments[layer].device)
                powers[layer] = torch.cholesky_inverse(torch.linalg.cholesky(damped))

    def change(self, layer: nn.Module, joint: Tensor) -> Tensor:
        """Ĝ = B⁻¹ G A⁻¹."""
        return self.outer_powers[layer] @ super().change(layer, joint)

    def numbers(self) -> int:
        """Count what is kept."""
        return super().numbers() + sum(t.numel() for kept in (self.outer, self.outer_powers) for t in kept.values())


def input_rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Lay out a layer's input as rows, with a constant for its bias."""
    if isinstance(layer, nn.Conv2d):
        columns = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        rows = columns.transpose(1, 2).reshape(-1, columns.shape[1])
    else:
        rows = inputs.reshape(-1, inputs.shape[-1])
    return rows if layer.bias is None else F.pad(rows, (0, 1), value=1.0)


def wait(tensor: Tensor) -> None:
    """Wait for the device."""
    if tensor.is_cuda:
        torch.cuda.synchronize()


class BareProducts:
    """The products G @ T of all layers alone, each into memory of its own that is there already."""

    def __init__(self, net: nn.Module, *, processor: bool) -> None:
        self.now = time.process_time if processor else time.perf_counter
        self.parts = []
        for layer in net.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                rows = layer.weight.detach().flatten(1).clone()
                width = rows.shape[1] + (layer.bias is not None)
                rows = F.pad(rows, (0, width - rows.shape[1]))
                self.parts.append((rows, torch.randn(width, width, device=rows.device), torch.empty_like(rows)))

    def seconds(self) -> tuple[float, float]:
        """Time them."""
        wait(self.parts[0][0])
        start = self.now()
        for rows, power, out in self.parts:
            torch.mm(rows, power, out=out)
        wait(self.parts[0][0])
        taken = self.now() - start
        return taken, taken


class Attached:
    """One of this library's transforms: its first step observes and factorizes, later ones observe if asked to."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        net: nn.Module,
        *,
        make: Callable[..., wellcond.GradientTransform],
        observe: bool,
    ) -> None:
        transform = make(stats_every=1 if observe else NEVER, solve_every=NEVER, solve_warmup=False)
        self.handle = wellcond.attach(optimizer, net, transform)
        self.optimizer = optimizer

    def numbers(self) -> int:
        """Count what is kept."""
        values = [v for state in self.optimizer.state.values() for k, v in state.items() if k.startswith("wellcond_")]
        return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor)) // 4


def attachment(name: str, observe: bool) -> Callable[..., Any]:
    """Return what attaches a variant to an optimizer and a network."""
    if name in VARIANTS:
        return functools.partial(Attached, make=VARIANTS[name], observe=observe)
    return functools.partial({"published W-SGDM": Published, "K-FAC style": Kfac}[name], observe=observe)


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, *DEFAULT[-2:]], default=DEFAULT)
    parser.add_argument("--peak-of", choices=["", *VARIANTS, *DEFAULT[-2:]], help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=1, help="steps of which each time is the mean")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--no-peak", action="store_true", help="leave the peak of memory out")
    options = parser.parse_args()
    images, labels = random_batch(options)
    if options.peak_of is not None:
        print(json.dumps(peak_bytes(options, images, labels)))
        return

    train = functools.partial(
        Trainer, options.model, images, labels, steps=options.steps, processor=options.clock == "processor"
    )
    plain_peak = 0.0 if options.no_peak else run_peak(options, "")
    trainers = {"SGDM": train()}
    figures = setting(options, images.device) | {"clock": options.clock, "steps": options.steps}
    parameters = sum(p.numel() for p in trainers["SGDM"].model.parameters())
    print(f"{options.model}, batch {options.batch}, {figures['machine']}, torch {torch.__version__}")
    head = f"{'':22}{'step':>8}{'(quartiles)':>17}{'product':>11}{'statistics':>13}{'solve':>10}{'amortised':>11}"
    print(f"{head}{'state':>9}{'peak':>10}")
    rows: dict[str, dict[str, float]] = {}
    for name in options.variants:
        # Each variant beside the plain optimizer, in rounds of their own: memory then holds three networks, not all.
        own: dict[str, Any] = {
            "SGDM": trainers["SGDM"],
            "ordinary": train(attachment(name, observe=False)),
            "observing": train(attachment(name, observe=True)),
        }
        if name.startswith("dense"):
            own["bare"] = BareProducts(trainers["SGDM"].model, processor=options.clock == "processor")
        own["ordinary"].seconds()
        own["observing"].steps, steps = 1, own["observing"].steps
        first, _ = own["observing"].seconds()
        second, _ = own["observing"].seconds()
        own["observing"].steps = steps
        times, parts = time_rounds(own, options.rounds)
        base = statistics.median(times["SGDM"])
        low, ratio, high = ratio_quartiles(times["ordinary"], times["SGDM"])
        product = statistics.median(differences(parts["ordinary"], parts["SGDM"]))
        observed = max(0.0, statistics.median(differences(times["observing"], times["ordinary"])))
        attached = own["observing"].attached
        solve = getattr(attached, "solve_seconds", max(0.0, first - second))
        extra = [
            d + observed / STATS_EVERY + solve / SOLVE_EVERY for d in differences(parts["ordinary"], parts["SGDM"])
        ]
        amortised = quartiles([1 + e / whole for e, whole in zip(extra, times["SGDM"], strict=True)])
        rows[name] = {
            "ratio": ratio,
            "lower_quartile": low,
            "upper_quartile": high,
            "sgdm_ms": base * 1e3,
            "product_ms": product * 1e3,
            "statistics_ms": observed * 1e3,
            "solve_ms": solve * 1e3,
            "amortised_ratio": amortised.median,
            "amortised_lower_quartile": amortised.low,
            "amortised_upper_quartile": amortised.high,
            "state_share": attached.numbers() / parameters,
        }
        if not options.no_peak:
            rows[name]["peak_mb"] = (run_peak(options, name) - plain_peak) / 1e6
        if "bare" in own:
            rows[name]["of_bare_product"] = product / statistics.median(times["bare"])
        r = rows[name]
        step = f"{name:22}{ratio:8.3f}{f'({low:.3f}-{high:.3f})':>17}{r['product_ms']:8.2f} ms"
        refresh = f"{r['statistics_ms']:10.1f} ms{solve:8.2f} s{amortised.median:8.3f}"
        spread = f"({amortised.low:.3f}-{amortised.high:.3f})"
        peak = f"{r['peak_mb']:+7.0f} MB" if "peak_mb" in r else ""
        bare = f"  product {r['of_bare_product']:.2f} x a bare G @ T" if "bare" in own else ""
        print(f"{step}{refresh} {spread}{r['state_share']:9.2f}{peak}{bare}", flush=True)
        del own, attached
    write(options.json, {**figures, "parameters": parameters, "results": rows})


def differences(own: list[float], base: list[float]) -> list[float]:
    """Return the differences round by round."""
    return [a - b for a, b in zip(own, base, strict=True)]


def run_peak(options: argparse.Namespace, name: str) -> float:
    """Measure a variant's peak memory in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", name, "--model", options.model]
    command += ["--batch", str(options.batch), "--image-size", str(options.image_size)]
    command += ["--channels", str(options.channels)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout))


def peak_bytes(options: argparse.Namespace, images: Tensor, labels: Tensor) -> float:
    """Run three steps, the first of which observes and factorizes, and return the most memory held."""
    attach = attachment(options.peak_of, observe=False) if options.peak_of else None
    trainer = Trainer(options.model, images, labels, attach)
    for _ in range(3):
        trainer.seconds()
    if images.is_cuda:
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` would count what this process's parent held when it was started
        return 1024.0 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


if __name__ == "__main__":
    main()
