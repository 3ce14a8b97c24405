"""A method under another name with other options: how recipes follow their sources."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import wellcond
from wellcond.lab.errors import LabError, unknown_name
from wellcond.lab.methods.method import METHODS, Method, TransformSpec
from wellcond.lab.methods.norms import NormSpec
from wellcond.lab.methods.optimizers import known_options

Options = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class MethodOverride:
    """One of the lab's methods under a label of its own, with what differs.

    Attributes:
        label: What it is called: in `Settings.methods`, tables and reports.
        method: A name in `METHODS`.
        lrs: The lr grid; empty for the method's own.
        options: The optimizer's keyword arguments that differ, as pairs.
        transform: Keyword arguments of the transforms, as pairs; each goes to every transform that knows it.
            ``stats_every`` and ``solve_every`` take the place of the run's.
        norm: Keyword arguments of the normalization layers that differ, as pairs.
        baseline: The label that it is measured against; None for the method's own.
    """

    label: str
    method: str
    lrs: tuple[float, ...] = ()
    options: Options = ()
    transform: Options = ()
    norm: Options = ()
    baseline: str | None = None

    def apply(self) -> Method:
        """Return the method.

        Raises:
            LabError: If the method or an option is unknown, an lr is not positive, or there is nothing to take options.
        """
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        method = METHODS[self.method]
        if not all(lr > 0 for lr in self.lrs) or list(self.lrs) != sorted(set(self.lrs)):
            raise LabError(f"method {self.label}: learning rates must be positive and ascending, got {self.lrs}")
        self._check("optimizer", self.options, known_options(method.optimizer) if self.options else ())
        return replace(
            method,
            name=self.label,
            lrs=self.lrs or method.lrs,
            options=_merged(method.options, self.options),
            baseline=self.baseline or method.baseline,
            transforms=self._transforms(method),
            norm=self._norm(method),
        )

    def _transforms(self, method: Method) -> tuple[TransformSpec, ...]:
        known = {spec.name: inspect.signature(getattr(wellcond, spec.name)).parameters for spec in method.transforms}
        self._check("transform", self.transform, dict.fromkeys(name for names in known.values() for name in names))

        def changed(spec: TransformSpec) -> TransformSpec:
            own = [(name, value) for name, value in self.transform if name in known[spec.name]]
            return replace(spec, options=_merged(spec.options, own))

        return tuple(changed(spec) for spec in method.transforms)

    def _norm(self, method: Method) -> NormSpec | None:
        if not self.norm:
            return method.norm
        if method.norm is None:
            raise LabError(f"method {self.label}: {self.method} keeps batch normalization, so it takes no norm options")
        return replace(method.norm, options=_merged(method.norm.options, self.norm))

    def _check(self, what: str, given: Options, known: Iterable[str]) -> None:
        known = list(known)
        for name, _ in given:
            if name not in known:
                error = unknown_name(f"{what} option", name, known or ["none"])
                raise LabError(f"method {self.label}: {error}")


def _merged(options: Iterable[tuple[str, object]], changed: Iterable[tuple[str, object]]) -> Options:
    merged: Mapping[str, object] = dict(options) | dict(changed)
    return tuple(merged.items())
