"""A method as data: an optimizer, what is attached to it, layers, parameter groups, an lr grid."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import wellcond
from wellcond.lab.errors import LabError, unknown_name
from wellcond.lab.importing import import_path, is_import_path
from wellcond.lab.methods.clipping import Clipping
from wellcond.lab.methods.grammar import Times, write_call, write_name, write_value
from wellcond.lab.methods.layers import change_layers
from wellcond.lab.methods.norms import NormSpec, trained_norm
from wellcond.lab.methods.optimizers import (
    SECOND_ORDER,
    attached_to,
    build_optimizer,
    find_optimizer,
    known_options,
    takes_any_option,
)

# `wellcond list` shows the methods without waiting for torch.
if TYPE_CHECKING:
    import torch

Options = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Refresh:
    """The intervals in which a preconditioner gathers its second moments and solves for a new matrix, in steps."""

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
        return cls(**wellcond.optim.intervals(max(1, steps)))


def find_transform(name: str) -> type[wellcond.GradientTransform]:
    """Return a transform's class.

    Args:
        name: A name in `wellcond`, or an import path.

    Raises:
        LabError: If the path cannot be imported.
        TypeError: If it is no transform.
    """
    kind = getattr(wellcond, name, None)
    if kind is None and is_import_path(name):
        kind = import_path(name)
    if not (isinstance(kind, type) and issubclass(kind, wellcond.GradientTransform)):
        raise TypeError(f"{name} is no wellcond.GradientTransform")
    return kind


@dataclass(frozen=True)
class TransformSpec:
    """A gradient transform with its options.

    Attributes:
        name: The class, as in ``wellcond.<name>``, or its import path.
        options: Keyword arguments, as pairs.
    """

    name: str
    options: Options = ()

    @property
    def refreshed(self) -> bool:
        """Whether it also takes the run's refresh intervals."""
        return "stats_every" in inspect.signature(find_transform(self.name)).parameters

    def build(self, refresh: Refresh) -> wellcond.GradientTransform:
        """Return the transform, with the run's intervals if it takes any."""
        kind = find_transform(self.name)
        known = inspect.signature(kind).parameters
        intervals = {"stats_every": refresh.stats_every, "solve_every": refresh.solve_every}
        given: dict[str, Any] = {name: value for name, value in intervals.items() if name in known}
        # Those of its own, if it has any, go before the run's.
        return kind(**(given | dict(self.options)))


@dataclass(frozen=True)
class GroupSpec:
    """Parameters that take options of their own; see `wellcond.optim.Group`.

    Attributes:
        selectors: What selects them.
        options: The optimizer's options for them, as pairs; a value may be `Times` of the method's.
    """

    selectors: tuple[str, ...]
    options: Options


@dataclass(frozen=True)
class Method:
    """One way to train: an optimizer, the transforms attached to it from left to right, layers, and an lr grid.

    Attributes:
        name: What it is called on the command line and in the report.
        description: One line for `wellcond list` and the report; methods that differ in it alone are equal.
        optimizer: Its name (see `find_optimizer`).
        options: The optimizer's keyword arguments beside lr, as pairs.
        lrs: The lr grid, ascending; every method of a comparison tries the same number.
        baseline: The method that its gains and costs are measured against; None: see `baselines`.
        transforms: What is attached.
        norm: The layers that take the place of batch normalization; None leaves it.
        layers: What is done to other layers, a key of `LAYERS`; None leaves them.
        layer_options: Keyword arguments of that, as pairs.
        groups: Parameters that take options of their own.
        schedule: How its lr goes, in the form that `parse_schedule` reads; None: as the comparison says.
        create_graph: Whether the optimizer differentiates the gradient, where it is none of `SECOND_ORDER`.
        clipping: What gradients are limited to between backward and step.
        code: Digest of the user's own code that the method imports, so that runs of other code are not taken for its.
    """

    name: str
    description: str = field(compare=False)
    optimizer: str
    options: Options
    lrs: tuple[float, ...]
    baseline: str | None = None
    transforms: tuple[TransformSpec, ...] = ()
    norm: NormSpec | None = None
    layers: str | None = None
    layer_options: Options = ()
    groups: tuple[GroupSpec, ...] = ()
    schedule: str | None = None
    create_graph: bool = False
    clipping: Clipping = field(default_factory=Clipping)
    code: str = ""

    @property
    def second_order(self) -> bool:
        """Whether backward has to keep its graph, because the optimizer differentiates the gradient."""
        return self.create_graph or self.optimizer.rpartition(":")[2] in SECOND_ORDER

    @property
    def has_batch_statistics(self) -> bool:
        """Whether training normalizes an image with statistics of the batch that it is in."""
        return self.layers != "nd" and (self.norm is None or self.norm.has_batch_statistics)

    @property
    def is_plain(self) -> bool:
        """Whether it is an optimizer alone."""
        return not (self.transforms or self.norm or self.layers or self.groups or self.clipping)

    def with_layers(self, model: torch.nn.Module, ghost_batch: int | None = None) -> torch.nn.Module:
        """Return the network with the layers that this method trains with.

        Args:
            model: A network with batch normalization.
            ghost_batch: Images of the groups that batch statistics are taken over; None for the whole batch.
        """
        norm = trained_norm(self.norm, ghost_batch) if self.layers != "nd" else None
        if norm is not None:
            model = norm.convert(model)
        return model if self.layers is None else change_layers(model, self.layers, dict(self.layer_options))

    def text(self, ghost_batch: int | None = None) -> str:
        """Return what it trains with, as it is written.

        >>> Method("mine", "", "SGD", (("momentum", 0.9),), (0.1,), norm=NormSpec("gn")).text()
        'SGD(momentum=0.9) + norm=gn'
        """
        parts = [write_call(self.optimizer, self.options)]
        parts += [write_call(each.name, each.options) if each.options else each.name for each in self.transforms]
        norm = trained_norm(self.norm, ghost_batch) if self.layers != "nd" else None
        if norm is not None:
            parts.append(norm.text)
        if self.layers is not None:
            parts.append(f"layers={_called(self.layers, self.layer_options)}")
        parts += [write_call("group", group.options, group.selectors) for group in self.groups]
        if self.schedule is not None:
            parts.append(f"schedule={write_value(self.schedule)}")
        if self.create_graph:
            parts.append("create_graph=True")
        parts += [f"{name}={write_value(limit)}" for name, limit in self.clipping.settings]
        return " + ".join(parts)

    def written(self) -> str:
        """Return all of it as it is written; reading that gives the same method.

        >>> Method("mine", "", "SGD", (("momentum", 0.9),), (0.1, 0.3)).written()
        'mine = SGD(momentum=0.9) + lrs=[0.1, 0.3]'
        """
        text = f"{write_name(self.name)} = {self.text()} + lrs={write_value(self.lrs)}"
        return text if self.baseline is None else f"{text} + baseline={write_name(self.baseline)}"

    def changed(self, options: Options = (), transform: Options = (), norm: Options = (), **fields: Any) -> Method:
        """Return the method with other options.

        Args:
            options: Of the optimizer.
            transform: Of the transforms; each goes to every one that knows it.
            norm: Of the normalization layers.
            **fields: Fields of the method that differ.

        Raises:
            LabError: If an option is unknown, or of nothing that the method has.
        """
        known_of = {
            spec.name: inspect.signature(find_transform(spec.name)).parameters for spec in self.transforms if transform
        }
        if options and not takes_any_option(self.optimizer):
            _check_known("optimizer option", options, known_options(self.optimizer))
        _check_known("transform option", transform, [name for known in known_of.values() for name in known])
        if norm and self.norm is None:
            raise LabError(f"{self.text()} keeps batch normalization, so it takes no norm options")

        def with_its_own(spec: TransformSpec) -> TransformSpec:
            own = [pair for pair in transform if pair[0] in known_of[spec.name]]
            return replace(spec, options=merged(spec.options, own))

        layers = self.norm
        if norm and layers is not None:
            layers = replace(layers, options=merged(layers.options, norm))
        transforms = tuple(with_its_own(spec) for spec in self.transforms) if transform else self.transforms
        parts = {"options": merged(self.options, options), "transforms": transforms, "norm": layers}
        return replace(self, **(parts | fields))

    def build(
        self, model: torch.nn.Module, lr: float, refresh: Refresh
    ) -> tuple[torch.optim.Optimizer, wellcond.Attachment | None]:
        """Return the optimizer of the model's parameters, and the handle of its transforms (None: it has none)."""
        optimizer = build_optimizer(self.optimizer, model, lr, dict(self.options), self._groups(model, lr))
        if not self.transforms:
            return optimizer, None
        transforms = [spec.build(refresh) for spec in self.transforms]
        for group in optimizer.param_groups:
            # AdamW trains these beside Muon, as it would without the transforms of what Muon gets.
            if group.get("use_muon") is False:
                group |= {f"wellcond_{transform.name}": False for transform in transforms}
        return optimizer, wellcond.attach(attached_to(optimizer), model, *transforms)

    def _groups(self, model: torch.nn.Module, lr: float) -> list[dict[str, Any]] | None:
        if not self.groups:
            return None
        from wellcond.grouping import Group, parameter_groups

        def value(key: str, given: object) -> object:
            if not isinstance(given, Times):
                return given
            own: Any = lr if key == "lr" else dict(self.options).get(key, self._default(key))
            return cast(float, own) * given.factor

        made = [
            Group(*group.selectors, **{key: value(key, given) for key, given in group.options}) for group in self.groups
        ]
        return parameter_groups(model, *made)

    def _default(self, key: str) -> object:
        known = inspect.signature(find_optimizer(self.optimizer)).parameters
        default = known[key].default if key in known else None
        if isinstance(default, bool) or not isinstance(default, (int, float)):
            raise ValueError(f"{self.optimizer} has no {key} to multiply")
        return default


def merged(options: Iterable[tuple[str, object]], changed: Iterable[tuple[str, object]]) -> Options:
    """Return options with others in the place of those of the same name."""
    both: Mapping[str, object] = dict(options) | dict(changed)
    return tuple(both.items())


def _check_known(kind: str, given: Options, known: Iterable[str]) -> None:
    known = list(dict.fromkeys(known))
    for name, _ in given:
        if name not in known:
            raise unknown_name(kind, name, known or ["none"])


def _called(word: str, options: Options) -> str:
    return write_call(word, options) if options else word
