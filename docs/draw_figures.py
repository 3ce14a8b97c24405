"""Draws the figures of docs/diagnostics.md from small networks that it trains on scikit-learn's digits.

    python docs/draw_figures.py        # about a minute

Pictures and their numbers go to docs/results. The curves of "BN = PN + gamma decay" are drawn from
docs/results/pn-gamma-decay.json, which `wellcond compare` wrote.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from closed_form_figures import closed_forms
from figure_networks import centred, convnet, digits, fsgd, loss, sgdm, train
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import wellcond
from wellcond import diagnostics, theory
from wellcond.lab.diagnosis.diagnose import measured_disparity
from wellcond.lab.hardware.machine import machine, versions
from wellcond.lab.networks.registry import initial_model
from wellcond.lab.runs.files import rounded
from wellcond.nn.norm.noise_decay import BatchNoiseDecay

RESULTS = Path(__file__).parent / "results"
SEEDS = 5
# Batches whose effect on the loss is averaged.
DRAWS = 600
BATCH = 32
# Of the network that all figures but 3.3 are of: two convolutions behind batch normalization, and the classifier.
LAYERS = {"1.0": "second convolution", "3.0": "third convolution", "6": "classifier"}


def panels(count: int, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """Return a row of axes."""
    figure = Figure(figsize=(4.2 * count, height), layout="constrained")
    return figure, [figure.add_subplot(1, count, place + 1) for place in range(count)]


def noise(folder: Path) -> dict[str, Any]:
    """Draw figure 2.1, and MBN's noise beside both predictions."""
    model, batches = convnet(), digits(BATCH, 0)
    train(model, batches, sgdm)
    images = torch.cat([own for own, _ in batches])
    # Independent batches, as the laws have them: drawn with replacement.
    generator = torch.Generator().manual_seed(0)
    loader = [images[torch.randint(len(images), (1600,), generator=generator)] for _ in range(30)]
    model = nn.Sequential(model[0])
    plain = diagnostics.batch_noise(model, loader, 16)
    # As in the thesis, of one channel: those of a layer have noises of different strength.
    conv, channel = model[0][0], 0
    single = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1))
    single[0].weight.data.copy_(conv.weight[channel : channel + 1])
    alone = diagnostics.batch_noise(single, loader, 16)
    momenta = [0.0, 0.25, 0.5, 0.75, 0.9]
    averaged = {own: diagnostics.batch_noise(model, loader, 16, momentum=own) for own in momenta}
    figure, axes = panels(3)
    alone.plot(axes[0], noise="mean")
    alone.plot(axes[1], noise="variance")
    rows = {}
    first = averaged[0.0].layers["0.1"]
    for own, found in averaged.items():
        layer = found.layers["0.1"]
        rows[str(own)] = {
            "found": layer.mean.found.variance,
            "derived": theory.batch_mean_noise(1, own).variance / first.effective,
            "thesis": theory.batch_mean_noise(1, own, formula="thesis").variance / first.effective,
        }
    for what, style in (("found", "o"), ("derived", "-"), ("thesis", "--")):
        axes[2].plot(momenta, [row[what] for row in rows.values()], style, label=what)
    axes[2].set_xlabel("momentum λ of MBN")
    axes[2].set_ylabel("variance of the mean's noise")
    axes[2].set_yscale("log")
    axes[2].legend()
    for ax in axes[:2]:
        ax.set_title("")
        ax.legend(fontsize="x-small", loc="upper center")
        ax.set_ylim(top=1.5 * ax.get_ylim()[1])
        ax.locator_params(axis="x", nbins=5)
    save(figure, folder / "figure-noise.png")
    layer, one = plain.layers["0.1"], alone.layers["1"]
    return {
        "batch_size": 16,
        "batches": layer.batches,
        "one_channel": noise_numbers(one),
        "all_channels": noise_numbers(layer),
        "momentum": rows,
    }


def noise_numbers(layer: diagnostics.LayerNoise) -> dict[str, float]:
    """Return how well the laws describe a layer's noise; the last, of as many values of the laws themselves."""
    return {
        "effective": layer.effective,
        "distance_of_means": layer.mean.distance,
        "distance_of_variances": layer.variance.distance,
        "freedom": layer.freedom,
        "distance_of_fitted_variances": layer.freedom_distance,
        "distance_of_the_law_itself": 0.87 / math.sqrt(layer.batches * layer.channels),
    }


def disparity(folder: Path) -> dict[str, Any]:
    """Draw figure 3.3: statistics of two samples in training, and what evaluation takes for them."""
    found = {}
    for seed in range(SEEDS):
        model = initial_model("resnet8", 1, 10, seed)
        batches = digits(BATCH, seed)
        train(wellcond.nn.convert_norm(model, to="ghost", group_size=2), batches, sgdm, epochs=3)
        found[seed] = measured_disparity(wellcond.nn.convert_norm(model, to="bn"), list(batches), 2)
    figure, axes = panels(1, 3.6)
    found[0].plot(axes[0])
    axes[0].set_xlabel("batch normalization, from the first to the last")
    axes[0].set_xticks([])
    axes[0].set_ylim(top=1.5 * axes[0].get_ylim()[1])
    save(figure, folder / "figure-disparity.png")
    inference = json.loads((RESULTS / "norm-inference.json").read_text(encoding="utf-8"))["results"]
    names = {"ema": "EMA", "evalnorm": "EvalNorm, fitted", "bsr": "BSR calibrated, clamp"}
    digits_found = {kind: [own.mean[kind] for own in found.values()] for kind in found[0].kinds}
    measured = {"digits, m = 2": digits_found} | {
        f"CIFAR-10, m = {m}": {kind: rows[name]["disparity"] for kind, name in names.items()}
        for m, rows in inference.items()
    }
    return {
        name: {
            "disparity": kinds,
            # BSR < EvalNorm < EMA
            "in_order": sum(a < b < c for a, b, c in zip(kinds["bsr"], kinds["evalnorm"], kinds["ema"], strict=True)),
        }
        for name, kinds in measured.items()
    }


def weights(folder: Path) -> dict[str, Any]:
    """Draw figure 4.4: means of weight vectors before and after training, without and with centralization."""
    figure, axes = panels(2)
    moved = {}
    for ax, (name, make) in zip(axes, {"SGDM": sgdm, "SGDM+GC": centred}.items(), strict=True):
        model = convnet()
        before = diagnostics.weight_means(model)
        train(model, digits(BATCH, 0), make, epochs=6)
        after = diagnostics.weight_means(model)
        before.plot(ax, label="initial")
        after.plot(ax, label=f"after 6 epochs of {name}")
        pairs = [
            (a, b)
            for own, other in zip(before.layers.values(), after.layers.values(), strict=True)
            for a, b in zip(own.means, other.means, strict=True)
        ]
        moved[name] = max(abs(a - b) for a, b in pairs)
        for line in ax.get_lines():
            line.set_markersize(4)
    save(figure, folder / "figure-weights.png")
    return {"largest_change": moved}


def gradients(folder: Path) -> dict[str, Any]:
    """Draw figure 4.5: norm and largest entry of gradients, trained without and with centralization."""
    figure, axes = panels(4, 3.2)
    rows: dict[str, Any] = {}
    for name, make in {"without GC": sgdm, "with GC": centred}.items():
        found = train(convnet(), digits(BATCH, 0), make, epochs=6)
        for place, (weight, called) in enumerate({"0.0.weight": "first conv", "6.weight": "classifier"}.items()):
            layer = found.layers[weight]
            for offset, quantity in enumerate(("norm", "largest")):
                # What the optimizer is given.
                own = layer.of(quantity if make is sgdm else f"centred_{quantity}")  # type: ignore[arg-type]
                ax = axes[2 * place + offset]
                ax.plot(own, linewidth=0.8, label=name)
                ax.set_title(f"{called}, {'norm' if quantity == 'norm' else 'largest entry'}", fontsize="medium")
                ax.set_yscale("log")
                ax.set_xlabel("iteration")
                rows.setdefault(f"{called}, {quantity}", {})[name] = sum(own) / len(own)
    axes[0].legend(fontsize="small")
    save(figure, folder / "figure-gradients.png")
    return rows


def spectra(folder: Path) -> dict[str, Any]:
    """Draw figure 5.1: spectra of output features after an epoch of SGDM and of FSGD."""
    figure, axes = panels(len(LAYERS))
    rows: dict[str, Any] = {}
    for name, make in {"SGDM": sgdm, "FSGD": fsgd}.items():
        for seed in range(SEEDS):
            model = convnet(seed)
            batches = digits(BATCH, seed)
            train(model, batches, make)
            found = diagnostics.feature_spectrum(model.eval(), list(batches))
            for ax, (layer, called) in zip(axes, LAYERS.items(), strict=True):
                own = found.layers[layer].output
                row = rows.setdefault(called, {}).setdefault(name, {"condition": [], "effective_rank": []})
                row["condition"].append(own.condition)
                row["effective_rank"].append(own.effective_rank)
                if seed == 0:
                    values = own.relative()
                    ax.plot(range(1, len(values) + 1), [math.log10(1 / value) for value in values], ".-", label=name)
                    ax.set_title(f"{called}, {own.width} outputs", fontsize="medium")
    axes[0].set_ylabel("log₁₀(λ₁/λᵢ)")
    for ax in axes:
        ax.set_xlabel("i")
        ax.legend()
    save(figure, folder / "figure-spectra.png")
    return rows


def smoothness(folder: Path) -> dict[str, Any]:
    """Draw the loss along a step, with and without batch normalization and centralization, and inequality 4.8."""
    batch = next(iter(digits(256, 1)))
    figure, axes = panels(3, 3.4)
    rows: dict[str, Any] = {}
    plain = convnet()
    for block in plain:
        if isinstance(block, nn.Sequential):
            block[1] = nn.Identity()
    for ax, (name, model) in zip(axes, {"batch normalization": convnet(), "none": plain}.items(), strict=False):
        train(model, digits(BATCH, 0), sgdm, epochs=4)
        for centralize in (False, True):
            found = diagnostics.landscape(model, batch, loss, centralize=centralize)
            found.plot(ax, label="centred" if centralize else "gradient")
            called = f"{name}, centred" if centralize else name
            rows[called] = {"effective_smoothness": found.effective_smoothness, "losses": list(found.losses)}
        ax.set_ylabel("loss")
        ax.set_title(f"normalization: {name}", fontsize="medium")
        if model is not plain:
            checked = diagnostics.lipschitz(model, batch, loss, per_layer=True)
    checked.plot(axes[2])
    save(figure, folder / "figure-smoothness.png")
    own = checked.whole
    return {
        "landscape": rows,
        "inequality": {
            "holds": checked.holds,
            "gradient_ratio": own.gradient_ratio,
            "hessian_ratio": own.hessian_ratio,
            "residual": own.residual,
        },
    }


def population(folder: Path) -> dict[str, Any]:
    """Draw the curves of BN, PN, and PN with gamma decay, and the formula itself on a trained network."""
    results = json.loads((RESULTS / "pn-gamma-decay.json").read_text(encoding="utf-8"))
    figure, axes = panels(3)
    called = {"SGDM": "BN", "PN": "PN", "PN+gamma-decay": "PN + gamma decay"}
    last: dict[str, Any] = {}
    for method in results["methods"]:
        for ax, quantity in zip(axes, ("train_loss", "test_score"), strict=False):
            curves = torch.tensor([curve[quantity] for curve in method["curves"]], dtype=torch.float64)
            epochs = range(1, curves.shape[1] + 1)
            [line] = ax.plot(epochs, curves.mean(0), marker=".", label=called[method["name"]])
            low, high = curves.mean(0) - curves.std(0), curves.mean(0) + curves.std(0)
            ax.fill_between(epochs, low, high, color=line.get_color(), alpha=0.13, linewidth=0)
            last.setdefault(called[method["name"]], {})[quantity] = curves[:, -1].tolist()
    for ax, label in zip(axes, ("training loss", "test accuracy in %"), strict=False):
        ax.set_xlabel("epoch")
        ax.set_ylabel(label)
        ax.legend()
    gaps = noise_losses()
    sizes = [int(m) for m in gaps]
    for which, color in (("first layer", "tab:blue"), ("all layers", "tab:orange")):
        for key, marker in ((f"{which}, independent", "o"), (which, "x")):
            means, errors = zip(*(gap[key] for gap in gaps.values()), strict=True)
            axes[2].errorbar(sizes, means, yerr=errors, fmt=marker, color=color, label=key)
        axes[2].plot(sizes, [gap[f"penalty, {which}"] for gap in gaps.values()], color=color, label=f"ζγ², {which}")
    axes[2].set_xscale("log", base=2)
    axes[2].set_yscale("symlog", linthresh=1e-3)
    axes[2].set_xlabel("m")
    axes[2].set_ylabel("loss of BN − loss of PN")
    axes[2].axhline(0.0, color="grey", linewidth=0.8)
    axes[2].set_ylim(-2, 3000)
    axes[2].legend(fontsize="x-small", loc="upper center", ncols=2)
    save(figure, folder / "figure-pn.png")
    return {"last_epoch": last, "fixed_weights": gaps}


def noise_losses() -> dict[str, Any]:
    """Return what statistics of batches of m add to the loss of a trained network, and the gamma decay it should be."""
    model, batches = convnet(), digits(BATCH, 0)
    train(model, batches, sgdm)
    images = torch.cat([own for own, _ in batches])
    labels = torch.cat([own for _, own in batches])
    wellcond.calibrate(model, [images], len(images), "bn")
    generator = torch.Generator().manual_seed(0)
    model.eval()
    with torch.no_grad():
        # Labels of the network's own distribution: the Fisher information is then the curvature that autograd has.
        drawn = torch.multinomial(model(images).softmax(1), 1, generator=generator).squeeze(1)
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]

    def above(m: int, by_batch: list[str], *, independent: bool) -> tuple[float, float]:
        """Compare the loss by batch statistics with that by the population's, on the same images."""
        changed = copy.deepcopy(model)
        layers = [changed.get_submodule(name) for name in by_batch]
        for layer in layers:
            layer.momentum = 1.0
        differences = []
        with torch.no_grad():
            for _ in range(DRAWS):
                chosen = torch.randint(len(images), (2, max(m, 100)), generator=generator)
                for layer in layers:
                    layer.train()
                # The layers keep what they normalize with.
                output = changed(images[chosen[0, :m]])
                tested = chosen[0, :m]
                if independent:
                    for layer in layers:
                        layer.eval()
                        # As the batch normalizes: biased.
                        layer.running_var *= 1 - 1 / (m * 64)
                    tested = chosen[1]
                    output = changed(images[tested])
                both = (F.cross_entropy(own, labels[tested]) for own in (output, model(images[tested])))
                differences.append(float(next(both) - next(both)))
        found = torch.tensor(differences, dtype=torch.float64)
        return float(found.mean()), float(found.std() / len(found) ** 0.5)

    found = {}
    for m in (4, 8, 16, 32, 64):
        normalized = wellcond.nn.convert_norm(copy.deepcopy(model), to="pn").eval()
        decay = BatchNoiseDecay(normalized, members=m, every=1)
        with decay.observing():
            F.cross_entropy(normalized(images), drawn).backward()
        penalties = {
            name: float((zeta * normalized.get_submodule(name).weight.detach().square()).sum())
            for name, zeta in decay.coefficients.items()
        }
        found[str(m)] = {
            f"{called}{', independent' if independent else ''}": above(m, names, independent=independent)
            for called, names in (("first layer", norms[:1]), ("all layers", norms))
            for independent in (True, False)
        }
        found[str(m)]["penalty, first layer"] = penalties[norms[0]]
        found[str(m)]["penalty, all layers"] = sum(penalties.values())
    return found


def save(figure: Figure, file: Path) -> None:
    """Write a picture, of few colours: that makes it small."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    Image.open(buffer).convert("RGB").quantize(32).save(file, optimize=True)


def main(arguments: list[str]) -> int:
    """Draw everything; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the pictures and the numbers")
    folder = parser.parse_args(arguments).out
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.use("agg")
    torch.manual_seed(0)
    setting = {
        "command": shlex.join(["python", "docs/draw_figures.py", *arguments]),
        "versions": versions(),
        "machine": machine(),
    }
    for name, make in FIGURES.items():
        content = rounded({"figure": name, **setting, "found": make(folder)})
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (folder / f"figure-{name}.json").write_text(text + "\n", encoding="utf-8")
    return 0


FIGURES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "noise": noise,
    "disparity": disparity,
    "weights": weights,
    "gradients": gradients,
    "spectra": spectra,
    "smoothness": smoothness,
    "closed-forms": closed_forms,
    "pn": population,
}
"""Every figure by its name: from the folder of its picture to what it shows in numbers."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
