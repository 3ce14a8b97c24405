"""From a recipe, a scale and a user's data to the settings of each of its panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wellcond.lab.data.named_data import NAMED_DATA
from wellcond.lab.errors import LabError, unknown_name
from wellcond.lab.methods.grammar import frozen
from wellcond.lab.methods.method import Method
from wellcond.lab.reproduction.recipe import EVERY, Change, MethodTable, PanelTable, Recipe, ScaleTable
from wellcond.lab.runs.settings import Scale, Settings


@dataclass(frozen=True)
class ScaledPanel:
    """A panel at a scale.

    Attributes:
        table: What the recipe says of it.
        data: The name of its data set.
        fields: Fields of `Settings`, the scale's sizes in them; data still by name.
        methods: What is compared, in the recipe's order.
        differs: What the scale changed: from a field to the source's own value and the scale's.
    """

    table: PanelTable
    data: str
    fields: dict[str, Any]
    methods: tuple[Method, ...]
    differs: dict[str, tuple[Any, Any]]

    def settings(
        self, paths: Mapping[str, str], jobs: int, seeds: int | None, trial_seeds: int | None = None
    ) -> Settings:
        """Return the settings of its comparison.

        Args:
            paths: Where each data set lies.
            jobs: Runs at the same time.
            seeds: Paired seeds; None for the recipe's.
            trial_seeds: Seeds that every trial is trained with, and chosen by; None: all.

        Raises:
            LabError: If a value is out of its range.
        """
        given = (
            self.fields
            | {field: paths[name] for field, name in self.places.items()}
            | {"jobs": jobs, "trial_seeds": trial_seeds}
            | ({} if seeds is None else {"seeds": seeds})
        )
        sweeps = given.pop("sweeps", {})
        return Settings(
            methods=tuple(method.written() for method in self.methods),
            sweeps=tuple((option, tuple(values)) for option, values in sweeps.items()),
            **given,
        )

    @property
    def places(self) -> dict[str, str]:
        """The names of its data sets, by the field of `Settings` that says where they lie."""
        elsewhere = self.fields.get("test_data")
        return {"data": self.data} | ({} if elsewhere is None else {"test_data": elsewhere})

    def with_weights(self, places: Mapping[str, str | None]) -> ScaledPanel:
        """Return the panel with weights from where they lie.

        Args:
            places: From what panels call weights to a file or ``torchvision:NAME``; None draws them, which is a
                difference to the source.
        """
        asked = self.fields.get("weights")
        if asked is None:
            return self
        place = places[asked]
        drawn = {"weights": (asked, None)} if place is None else {}
        return replace(self, fields=self.fields | {"weights": place}, differs=self.differs | drawn)


def scaled_panels(
    recipe: Recipe, scale: Scale, panels: Sequence[str] | None = None, methods: Sequence[str] | None = None
) -> list[ScaledPanel]:
    """Return the panels that a scale runs.

    Args:
        recipe: The recipe.
        scale: The scale.
        panels: Names of those that are asked for, in place of the scale's.
        methods: Labels that are asked for, in place of the scale's.

    Raises:
        LabError: If the recipe has no such panel or method, or a panel has none of the methods.
    """
    table = recipe.at(scale)
    for kind, asked, known in (
        ("panel", panels, [panel.name for panel in recipe.panels]),
        ("method", methods, [method.label for method in recipe.methods]),
    ):
        for name in asked or ():
            if name not in known:
                raise unknown_name(f"{kind} of {recipe.name}", name, known)
    wanted = panels or table.panels
    labels = methods or table.methods
    return [_scaled(recipe, panel, table, labels) for panel in recipe.panels if wanted is None or panel.name in wanted]


def needed_data(panels: Sequence[ScaledPanel]) -> list[str]:
    """Return the names of the panels' data sets."""
    return list(dict.fromkeys(name for panel in panels for name in panel.places.values()))


def needed_weights(panels: Sequence[ScaledPanel]) -> list[str]:
    """Return what the panels call the weights that they begin with."""
    return list(dict.fromkeys(panel.fields["weights"] for panel in panels if panel.fields.get("weights") is not None))


def _scaled(recipe: Recipe, panel: PanelTable, scale: ScaleTable, labels: Sequence[str] | None) -> ScaledPanel:
    own = _given(recipe.settings) | _given(panel.settings)
    scaled = own | _given(scale.settings)
    scaled = {name: value for name, value in scaled.items() if value != ""}
    if "model" in scaled:
        scaled["model"] = scale.models.get(scaled["model"], scaled["model"])
    compared = [
        method
        for method in recipe.methods
        if (panel.methods is None or method.label in panel.methods) and (labels is None or method.label in labels)
    ]
    if not compared:
        raise LabError(f"panel {panel.name} of {recipe.name} has none of the methods {', '.join(labels or ())}")
    data = scaled.get("data", Settings().data)
    for place in (data, scaled.get("test_data", data)):
        if place not in NAMED_DATA:
            raise unknown_name("data", place, NAMED_DATA)
    names = [name for name in dict.fromkeys([*scaled, *own]) if name != "seeds" and own.get(name) != scaled.get(name)]
    differs = {name: (own.get(name), scaled.get(name)) for name in names}
    methods = [_changed(method, recipe.baseline, panel, scale) for method in compared]
    labels_there = [method.name for method in methods]
    # Where the baseline is not compared, the first method stands in for it.
    methods = [m if m.baseline in labels_there else replace(m, baseline=labels_there[0]) for m in methods]
    return ScaledPanel(panel, data, scaled, tuple(methods), differs)


def _given(settings: Any) -> dict[str, Any]:
    fields: dict[str, Any] = settings.model_dump(exclude_none=True)
    return fields


def _changed(method: MethodTable, baseline: str, panel: PanelTable, scale: ScaleTable) -> Method:
    """Return a method with all that is said of it; the last of these goes before the others.

    Raises:
        LabError: If an option is of nothing that the method has.
    """
    found = method.read()
    changes: list[Change] = [method]
    for table in (panel.change, scale.change):
        changes += [table[key] for key in (EVERY, method.label) if key in table]
    grids = [change.lrs for change in changes if change.lrs is not None]
    grids += [scale.lrs[key] for key in (found.optimizer, method.label) if key in scale.lrs]

    def merged(part: str) -> tuple[tuple[str, object], ...]:
        options: dict[str, object] = {}
        for change in changes:
            options |= getattr(change, part)
        return tuple((key, frozen(value)) for key, value in options.items())

    try:
        return found.changed(
            *(merged(part) for part in ("options", "transform", "norm")),
            name=method.label,
            lrs=tuple(sorted(grids[-1])) if grids else found.lrs,
            baseline=method.baseline or baseline,
        )
    except LabError as error:
        raise LabError(f"method {method.label}: {error}") from error
