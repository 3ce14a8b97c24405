"""The figures of a diagnosis, as inline SVG that matplotlib draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wellcond.diagnostics.spectra import SpectrumQuantity
from wellcond.lab.diagnosis.diagnose import Diagnosis, ProbeResult
from wellcond.lab.report.drawing import figure_svg, in_page_colours

_SIZE = (5.6, 3.6)
# More points than this are drawn as one picture, more names than this along an axis are thinned.
_POINTS = 400
_NAMES = 16

Draw = Callable[[Axes], object]


@dataclass(frozen=True)
class Drawn:
    """One figure of the page.

    Attributes:
        title: Above it.
        svg: The picture; None if there is nothing to draw.
        text: The numbers as a table, or why there is nothing.
    """

    title: str
    svg: Markup | None
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        lead: What is shown, in a sentence or two.
        drawn: The figures.
    """

    title: str
    lead: str
    drawn: tuple[Drawn, ...]


def draw(plot: Draw, title: str = "a figure") -> Markup:
    """Return what a function draws on axes as an SVG element.

    Args:
        plot: Is called with the axes.
        title: What the figure shows.

    Returns:
        The element, with text as text and without a size of its own.
    """

    def on_figure(figure: Figure) -> None:
        ax = figure.add_subplot()
        plot(ax)
        _make_small(ax)

    return Markup(in_page_colours(figure_svg(on_figure, title, _SIZE)))


def sections(diagnosis: Diagnosis) -> Iterator[Section]:
    """Yield the page's sections, one for each group of probes."""
    yield _features(diagnosis)
    yield _gradients(diagnosis)
    yield _weights(diagnosis)
    yield _smoothness(diagnosis)
    yield _batches(diagnosis)


def _features(diagnosis: Diagnosis) -> Section:
    probe = diagnosis.spectrum
    own = probe.found
    drawn = [_drawn("Eigenvalues of the inputs' second moments", probe, lambda ax: own and own.plot(ax, side="input"))]
    if own is not None:
        found = own

        def both_sides(ax: Axes, quantity: SpectrumQuantity) -> None:
            found.plot(found.plot(ax, quantity=quantity, side="input"), quantity=quantity, side="output")

        drawn += [
            _figure(
                "Eigenvalues of the outputs' second moments (figure 5.1)", lambda ax: found.plot(ax, side="output")
            ),
            _figure("Effective rank, as a part of the dimensions", lambda ax: both_sides(ax, "effective_rank")),
            _figure("Condition number, where it is finite", lambda ax: both_sides(ax, "condition")),
        ]
    lead = (
        "How many directions a layer's features use. A spectrum that falls steeply is badly conditioned: gradient "
        "descent hardly moves what lies along its small eigenvalues."
    )
    return Section("Features", lead, tuple(drawn))


def _gradients(diagnosis: Diagnosis) -> Section:
    training = diagnosis.training
    probe = diagnosis.gradients if training is None else training.gradients
    own = probe.found
    drawn = [
        _drawn(
            "Norm of the gradient, with and without its row means (figure 4.5)", probe, lambda ax: own and own.plot(ax)
        )
    ]
    if own is not None:
        found = own
        drawn.append(_figure("Its largest entry (figure 4.5)", lambda ax: found.plot(ax, quantity="largest")))
    over = "batches of the model as it is" if training is None else f"the {training.steps} steps of training"
    lead = f"What gradient centralization takes out, in the first and the last layer, over {over}."
    return Section("Gradients", lead, tuple(drawn))


def _weights(diagnosis: Diagnosis) -> Section:
    probe = diagnosis.weights
    after = probe.found
    before = None if diagnosis.training is None else diagnosis.training.weights_before.found

    def plot(ax: Axes) -> None:
        assert after is not None
        if before is not None:
            before.plot(ax, label="before training")
        after.plot(ax, label=None if before is None else "after training")

    lead = (
        "Means of weight vectors. Training with gradient centralization leaves them as they are; "
        "large ones make an output follow a common shift of its inputs."
    )
    return Section("Weights", lead, (_drawn("Size of each weight vector's mean (figure 4.4)", probe, plot),))


def _smoothness(diagnosis: Diagnosis) -> Section:
    first, second = diagnosis.landscape, diagnosis.landscape_centred

    def along(ax: Axes) -> None:
        for probe, label in ((first, "gradient"), (second, "centred gradient")):
            if probe.found is not None:
                probe.found.plot(ax, label=label)
        ax.set_ylabel("loss")

    own = diagnosis.lipschitz.found
    drawn = (
        _drawn("Loss along a step", first, along),
        _drawn("What centralization leaves (inequality 4.8)", diagnosis.lipschitz, lambda ax: own and own.plot(ax)),
    )
    lead = "How far the gradient can be relied on, on one batch: the loss along it, and the norm of its derivative."
    return Section("Smoothness", lead, drawn)


def _batches(diagnosis: Diagnosis) -> Section:
    noise, disparity = diagnosis.noise.found, diagnosis.disparity.found
    drawn = (
        _drawn(
            "Noise of batch statistics, first layer (figure 2.1)", diagnosis.noise, lambda ax: noise and noise.plot(ax)
        ),
        _drawn(
            "Evaluation's distance from training (figure 3.3)",
            diagnosis.disparity,
            lambda ax: disparity and disparity.plot(ax),
        ),
    )
    lead = f"What batches of {diagnosis.batch_size} do to batch normalization, in training and in evaluation."
    return Section("Batch statistics", lead, drawn)


def _figure(title: str, plot: Draw) -> Drawn:
    return Drawn(title, draw(plot, title), "")


def _drawn(title: str, probe: ProbeResult[object], plot: Draw) -> Drawn:
    if probe.found is None:
        return Drawn(title, None, f"Not measured: {probe.reason}.")
    return Drawn(title, draw(plot, title), str(probe.found))


def _make_small(ax: Axes) -> None:
    """Keep a figure readable and light, however many layers or points it has."""
    for line in ax.get_lines():
        points = np.size(line.get_xdata())
        if points > _POINTS:
            line.set_rasterized(True)
        elif points > 60 and line.get_linestyle() not in ("None", "none", ""):
            line.set_marker("")
    ticks, labels = ax.get_xticks(), [label.get_text() for label in ax.get_xticklabels()]
    named = [label for label in labels if label and any(character.isalpha() for character in label)]
    if named and len(ticks) > _NAMES:
        every = -(-len(ticks) // _NAMES)
        ax.set_xticks(ticks[::every], labels[::every], rotation=90, fontsize="small")
    legend = ax.get_legend()
    if legend is not None:
        for text in legend.get_texts():
            text.set_fontsize("small" if len(legend.get_texts()) <= 4 else "x-small")
    ax.set_title("")
