"""The methods that can be compared, named as data: an optimizer, its transforms, normalization layers, an lr grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import wellcond
from wellcond.lab.errors import LabError, unknown_name
from wellcond.lab.methods.layers import LAYERS, change_layers
from wellcond.lab.methods.norms import NormSpec, trained_norm
from wellcond.lab.methods.optimizers import SECOND_ORDER, attached_to, build_optimizer

# `wellcond list` shows the methods without waiting for torch.
if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Refresh:
    """How often a preconditioner gathers its second moments and solves for a new matrix, in steps."""

    stats_every: int
    solve_every: int

    @classmethod
    def for_run_of(cls, steps: int) -> Refresh:
        """Return the intervals that suit a run of this many steps.

        The library's defaults (50 and 500) are for long runs; a run of 200 steps would never refresh with them.

        >>> Refresh.for_run_of(186)
        Refresh(stats_every=5, solve_every=25)
        >>> Refresh.for_run_of(40_000)
        Refresh(stats_every=50, solve_every=500)
        """
        if steps >= 2000:
            return cls(50, 500)
        stats_every = max(1, round(steps / 40))
        return cls(stats_every, 5 * stats_every)


@dataclass(frozen=True)
class TransformSpec:
    """A gradient transform by its public name in `wellcond`, with its options.

    Attributes:
        name: The class, as in ``wellcond.<name>``.
        options: Keyword arguments, as pairs.
        refreshed: Whether it also takes the run's refresh intervals.
    """

    name: str
    options: tuple[tuple[str, object], ...] = ()
    refreshed: bool = False

    def build(self, refresh: Refresh) -> wellcond.GradientTransform:
        """Return the transform, with the run's intervals if it takes any."""
        options = dict(self.options)
        if self.refreshed:
            # Those of its own, if it has any, go before the run's.
            options = {"stats_every": refresh.stats_every, "solve_every": refresh.solve_every, **options}
        transform: wellcond.GradientTransform = getattr(wellcond, self.name)(**options)
        return transform


@dataclass(frozen=True)
class Method:
    """One way to train: an optimizer, the transforms attached to it from left to right, layers, and an lr grid.

    Attributes:
        name: What it is called on the command line and in the report.
        description: One line for `wellcond list`.
        optimizer: Its name (see `build_optimizer`).
        options: The optimizer's keyword arguments beside lr, as pairs.
        lrs: The lr grid, ascending; every method tries the same number.
        baseline: The method that its gains and costs are measured against.
        transforms: What is attached.
        norm: The layers that take the place of batch normalization; None leaves it.
        layers: What is done to convolutions, a key of `LAYERS`; None leaves them.
    """

    name: str
    description: str
    optimizer: str
    options: tuple[tuple[str, object], ...]
    lrs: tuple[float, ...]
    baseline: str
    transforms: tuple[TransformSpec, ...] = ()
    norm: NormSpec | None = None
    layers: str | None = None

    @property
    def second_order(self) -> bool:
        """Whether backward has to keep its graph, because the optimizer differentiates the gradient."""
        return self.optimizer in SECOND_ORDER

    @property
    def has_batch_statistics(self) -> bool:
        """Whether training normalizes an image with statistics of the batch that it is in."""
        return self.layers != "nd" and (self.norm is None or self.norm.has_batch_statistics)

    def with_layers(self, model: torch.nn.Module, ghost_batch: int | None = None) -> torch.nn.Module:
        """Return the network with the layers that this method trains with.

        Args:
            model: A network with batch normalization.
            ghost_batch: Images of the groups that batch statistics are taken over; None for the whole batch.
        """
        norm = trained_norm(self.norm, ghost_batch) if self.layers != "nd" else None
        if norm is not None:
            model = norm.convert(model)
        return model if self.layers is None else change_layers(model, self.layers)

    def text(self, ghost_batch: int | None = None) -> str:
        """Return what it trains with, as it would be written.

        >>> METHODS["SGDM+GC"].text()
        'SGD(momentum=0.9, weight_decay=0.0005) + GradientCentralization'
        """
        parts = [f"{self.optimizer}({_written(self.options)})"]
        for transform in self.transforms:
            parts.append(f"{transform.name}({_written(transform.options)})" if transform.options else transform.name)
        norm = trained_norm(self.norm, ghost_batch) if self.layers != "nd" else None
        if norm is not None:
            parts.append(norm.text)
        if self.layers is not None:
            parts.append(LAYERS[self.layers])
        return " + ".join(parts)

    def build(
        self, model: torch.nn.Module, lr: float, refresh: Refresh
    ) -> tuple[torch.optim.Optimizer, wellcond.Attachment | None]:
        """Return the optimizer of the model's parameters, and the handle of its transforms (None: it has none)."""
        optimizer = build_optimizer(self.optimizer, model, lr, dict(self.options))
        if not self.transforms:
            return optimizer, None
        transforms = (spec.build(refresh) for spec in self.transforms)
        return optimizer, wellcond.attach(attached_to(optimizer), model, *transforms)


def _written(options: Sequence[tuple[str, object]]) -> str:
    return ", ".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value!r}" for key, value in options)


_GC = TransformSpec("GradientCentralization")
_GC_CONV = TransformSpec("GradientCentralization", (("layers", "conv"),))
_WHITEN = TransformSpec("FeatureWhitening", refreshed=True)
_DESCEND = TransformSpec("FeatureDescent", refreshed=True)


def _form(spec: TransformSpec, **options: object) -> TransformSpec:
    """Return a preconditioner with another form of its second moment."""
    return replace(spec, options=tuple(options.items()))


def _sgdm(name: str, description: str, *transforms: TransformSpec) -> Method:
    options = (("momentum", 0.9), ("weight_decay", 5e-4))
    return Method(name, description, "SGD", options, (0.03, 0.1, 0.3), "SGDM", transforms)


def _norm(name: str, description: str, norm: NormSpec) -> Method:
    return replace(_sgdm(name, description), norm=norm)


def _adamw(name: str, description: str, *transforms: TransformSpec) -> Method:
    return Method(name, description, "AdamW", (("weight_decay", 0.05),), (3e-3, 1e-2, 3e-2), "AdamW", transforms)


def _other(
    optimizer: str,
    description: str,
    lrs: tuple[float, float, float],
    options: tuple[tuple[str, object], ...] = (),
    *transforms: TransformSpec,
) -> Method:
    """Return a method over another optimizer, a baseline of its own: its lrs are not comparable to another's."""
    name = "+".join([optimizer, *("GC" for _ in transforms)])
    return Method(name, description, optimizer, options, lrs, optimizer, transforms)


_ADAM = ((1e-3, 3e-3, 1e-2), (("weight_decay", 5e-4),))
_ADAGRAD = ((0.003, 0.01, 0.03), (("weight_decay", 5e-4),))
_SGDW = ((0.03, 0.1, 0.3), (("momentum", 0.9), ("weight_decay", 5e-4)))

METHODS = {
    method.name: method
    for method in (
        _sgdm("SGDM", "SGD with momentum 0.9"),
        _sgdm("SGDM+GC", "SGDM with Gradient Centralization", _GC),
        _sgdm("W-SGDM", "SGDM with feature whitening", _WHITEN),
        _sgdm("FSGD", "SGDM with feature descent", _DESCEND),
        _adamw("AdamW", "Adam with decoupled weight decay"),
        _adamw("AdamW+GC", "AdamW with Gradient Centralization", _GC),
        _adamw("W-Adam", "AdamW with feature whitening", _WHITEN),
        _adamw("FAdam", "AdamW with feature descent", _DESCEND),
        _sgdm("W-SGDM+GC", "SGDM with Gradient Centralization, then feature whitening", _GC, _WHITEN),
        _sgdm("FSGD+GC", "SGDM with Gradient Centralization, then feature descent", _GC, _DESCEND),
        _sgdm("W-SGDM-dense", "W-SGDM with whole second moments", _form(_WHITEN, second_moment="dense")),
        _sgdm("W-SGDM-kron", "W-SGDM with Kronecker factors of full rank", _form(_WHITEN, second_moment="kronecker")),
        _sgdm("W-SGDM-rank4", "W-SGDM with factors of rank 4", _form(_WHITEN, rank=4)),
        _sgdm("W-SGDM-bf16", "W-SGDM with products in bfloat16", _form(_WHITEN, precision="bfloat16")),
        _sgdm("FSGD-dense", "FSGD with whole second moments", _form(_DESCEND, second_moment="dense")),
        _norm("MBN", "SGDM with Momentum Batch Normalization", NormSpec("mbn")),
        _norm(
            "MBN-derived",
            "MBN whose momentum ends at (32 - m) / (32 + m), m the batch, not at 1 - m / 32",
            NormSpec("mbn", schedule=(("target", "derived"),)),
        ),
        _norm("BSR", "SGDM's training, inference by Batch Statistics Regression", NormSpec("bsr")),
        _norm("BSR-nnls", "BSR by exact non-negative least squares", NormSpec("bsr", (("nonneg", "nnls"),))),
        _norm("EvalNorm", "SGDM's training, inference by EvalNorm with learned weights", NormSpec("evalnorm")),
        _norm(
            "EvalNorm-fixed",
            "SGDM's training, inference by EvalNorm with weights of 1 / batch size",
            NormSpec("evalnorm", (("learn", False),)),
        ),
        _norm("BRN", "SGDM with Batch Renormalization", NormSpec("brn")),
        _norm("PN", "SGDM with population normalization", NormSpec("pn", (("momentum", 0.01),))),
        _norm(
            "PN+gamma-decay",
            "PN with the gamma decay that batch normalization's noise amounts to",
            NormSpec("pn", (("momentum", 0.01),), noise_decay=True),
        ),
        _norm(
            "GN",
            "SGDM with group normalization (8 groups), which has no batch statistics",
            NormSpec("gn", (("num_groups", 8),)),
        ),
        _norm("SN", "SGDM with Switchable Normalization", NormSpec("sn")),
        _norm(
            "SSN",
            "SGDM with Sparse Switchable Normalization: each layer ends with IN, LN or BN alone",
            NormSpec("ssn", (("shared_logits", True),)),
        ),
        _norm(
            "IBN",
            "SGDM with instance normalization of half of each layer's channels, batch normalization of the rest",
            NormSpec("ibn"),
        ),
        _norm("KN", "SGDM with Kalman Normalization, transitions and gains learned", NormSpec("kn")),
        _norm(
            "KN-fixed",
            "SGDM with Kalman Normalization of constant gain, predictions pushed through the network",
            NormSpec("kn", (("learned", False),)),
        ),
        _norm("IterNorm", "SGDM with batch whitening by Newton iterations", NormSpec("iternorm")),
        _norm("DBN", "SGDM with decorrelated batch normalization: whitening by ZCA", NormSpec("dbn")),
        _norm("LN", "SGDM with layer normalization, over all channels of an image", NormSpec("ln")),
        _norm("IN", "SGDM with instance normalization, over each channel of an image", NormSpec("in")),
        replace(_sgdm("ND", "SGDM with network deconvolution in place of batch normalization"), layers="nd"),
        replace(_sgdm("SGDM+WS", "SGDM with weight standardization of convolutions"), layers="ws"),
        replace(_sgdm("SGDM+WS+GC", "SGDM with weight standardization and Gradient Centralization", _GC), layers="ws"),
        replace(
            _sgdm(
                "IBN-a", "SGDM with instance normalization of half the channels early in the blocks of a residual net"
            ),
            layers="ibn-a",
        ),
        replace(
            _norm(
                "GN+GC-conv",
                "GN with Gradient Centralization of convolutions alone",
                NormSpec("gn", (("num_groups", 8),)),
            ),
            transforms=(_GC_CONV,),
        ),
        _sgdm("SGDM+GC-conv", "SGDM with Gradient Centralization of convolutions alone", _GC_CONV),
        _other("SGDW", "SGD with momentum 0.9 and decoupled weight decay", *_SGDW),
        _other("SGDW", "SGDW with Gradient Centralization", *_SGDW, _GC),
        _other("Adam", "Adam with weight decay in the gradient", *_ADAM),
        _other("Adam", "Adam with Gradient Centralization", *_ADAM, _GC),
        replace(_other("Adam", "Adam with feature whitening", *_ADAM, _WHITEN), name="Adam+W"),
        _other("Adagrad", "Adagrad with weight decay in the gradient", *_ADAGRAD),
        _other("Adagrad", "Adagrad with Gradient Centralization", *_ADAGRAD, _GC),
        _other("RAdam", "Adam with a rectified step size", *_ADAM),
        _other("RMSprop", "RMSprop with momentum 0.9", (1e-4, 3e-4, 1e-3), (("momentum", 0.9), ("weight_decay", 5e-4))),
        _other("Adadelta", "Adadelta with weight decay in the gradient", (0.3, 1.0, 3.0), (("weight_decay", 5e-4),)),
        _other(
            "AdaBelief", "steps by how far gradients are from their mean", (1e-3, 3e-3, 1e-2), (("weight_decay", 0.05),)
        ),
        _other(
            "AdaHessian", "steps by an estimate of the Hessian's diagonal", (0.03, 0.1, 0.3), (("weight_decay", 5e-4),)
        ),
        replace(
            _other(
                "ApolloDQN",
                "a diagonal quasi-Newton method, Apollo",
                (0.003, 0.01, 0.03),
                # Its own warm-up would hold the lr against the schedule; --warmup is there for every method.
                (("warmup_steps", 0), ("weight_decay", 5e-4)),
            ),
            name="Apollo",
            baseline="Apollo",
        ),
        _other(
            "Ranger",
            "RAdam with slow weights; its own Gradient Centralization is off",
            (1e-3, 3e-3, 1e-2),
            (("use_gc", False), ("weight_decay", 0.05)),
        ),
        replace(
            _other(
                "Lookahead",
                "SGDM with slow weights: 5 steps ahead, half of the way kept",
                (0.03, 0.1, 0.3),
                (("momentum", 0.9), ("weight_decay", 5e-4)),
            ),
            baseline="SGDM",
        ),
        _other(
            "Muon",
            "orthogonal updates of hidden weights, AdamW for the rest",
            (0.005, 0.015, 0.05),
            (("weight_decay", 0.05), ("adamw_lr", 0.01), ("adamw_wd", 0.05)),
        ),
    )
}
"""Every method, in the order in which reports list them."""

DEFAULT_METHODS = ("SGDM", "SGDM+GC", "W-SGDM", "FSGD", "AdamW", "AdamW+GC", "W-Adam", "FAdam")


def parse_lrs(text: str) -> tuple[str, tuple[float, ...]]:
    """Read an lr grid from the command line.

    Args:
        text: ``OPTIMIZER=LR,LR,...``, the optimizer as `Method.optimizer` has it.

    Returns:
        The optimizer and its grid, ascending.

    Raises:
        LabError: If the text has another form, the optimizer is of no method, or an lr is not a positive number.

    >>> parse_lrs("SGD=0.2,0.02,0.06")
    ('SGD', (0.02, 0.06, 0.2))
    """
    optimizer, separator, values = text.partition("=")
    known = list(dict.fromkeys(method.optimizer for method in METHODS.values()))
    if not separator:
        raise LabError(f"--lrs must look like SGD=0.02,0.06,0.2, got {text!r}")
    if optimizer not in known:
        raise unknown_name("optimizer", optimizer, known)
    try:
        lrs = tuple(sorted({float(value) for value in values.split(",")}))
    except ValueError:
        raise LabError(f"--lrs {text}: learning rates must be numbers") from None
    if not all(0 < lr < math.inf for lr in lrs):
        raise LabError(f"--lrs {text}: learning rates must be positive")
    return optimizer, lrs


def given_grids(
    lrs: Mapping[str, Sequence[float]] | Sequence[float] | None, methods: Sequence[Method]
) -> dict[str, tuple[float, ...]]:
    """Return lr grids by optimizer from what was given in Python.

    Args:
        lrs: By optimizer, one for all, or None for none.
        methods: The methods.

    Raises:
        LabError: If an lr is not a positive number, or an optimizer is of no method.

    >>> given_grids([0.1, 0.03], select_methods(["SGDM", "AdamW"]))
    {'SGD': (0.03, 0.1), 'AdamW': (0.03, 0.1)}
    """
    optimizers = list(dict.fromkeys(method.optimizer for method in methods))
    grids = {} if lrs is None else lrs if isinstance(lrs, Mapping) else dict.fromkeys(optimizers, lrs)
    for optimizer, values in grids.items():
        if optimizer not in optimizers:
            raise unknown_name("optimizer", optimizer, optimizers)
        if isinstance(values, (str, float, int)) or not len(values):
            raise LabError(f"lrs must be lists of learning rates, got {values!r} for {optimizer}")
        if not all(isinstance(lr, (int, float)) and 0 < lr < math.inf for lr in values):
            raise LabError(f"lrs must be positive numbers, got {list(values)} for {optimizer}")
    return {optimizer: tuple(sorted({float(lr) for lr in values})) for optimizer, values in grids.items()}


def with_lrs(methods: Sequence[Method], grids: Mapping[str, tuple[float, ...]]) -> tuple[Method, ...]:
    """Return the methods with other lr grids.

    Args:
        methods: The methods.
        grids: From an optimizer's name to the grid of all methods that use it; the others keep theirs.

    Returns:
        The methods, in the same order.

    Raises:
        LabError: If the methods would try different numbers of lrs: that would not be equal tuning effort.
    """
    changed = tuple(replace(method, lrs=grids.get(method.optimizer, method.lrs)) for method in methods)
    counts = {method.optimizer: len(method.lrs) for method in changed}
    if len(set(counts.values())) > 1:
        given = ", ".join(f"{optimizer} {count}" for optimizer, count in counts.items())
        raise LabError(f"--lrs must give every method the same number of learning rates to try, got {given}")
    return changed


def select_methods(names: Sequence[str], more: Mapping[str, Method] | None = None) -> tuple[Method, ...]:
    """Return the methods of these names, in the order given.

    Args:
        names: Names in `METHODS` or `more`, exactly as spelled there.
        more: Further methods by name; they go before those of `METHODS`.

    Returns:
        The methods.

    Raises:
        LabError: If there is no name, a name twice, or a name that no method has.

    >>> [method.baseline for method in select_methods(["W-SGDM", "AdamW"])]
    ['SGDM', 'AdamW']
    """
    known = METHODS | dict(more or {})
    if not names:
        raise LabError(f"--methods must name at least one method. Known: {', '.join(known)}")
    for index, name in enumerate(names):
        if name not in known:
            raise unknown_name("method", name, known)
        if name in names[:index]:
            raise LabError(f"--methods must name each method once, got {name!r} twice")
    return tuple(known[name] for name in names)


def baselines(methods: Sequence[Method]) -> dict[str, str]:
    """Return each method's baseline among these methods.

    Args:
        methods: The methods of one comparison; at least one.

    Returns:
        From each method's name to its baseline's name: its own, or the first method's if its own is not compared.

    >>> baselines(select_methods(["FSGD", "SGDM+GC"]))
    {'FSGD': 'FSGD', 'SGDM+GC': 'FSGD'}
    """
    names = {method.name for method in methods}
    return {method.name: method.baseline if method.baseline in names else methods[0].name for method in methods}
