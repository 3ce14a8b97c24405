"""Recipes: a table or figure of a source as data, with its settings, its figures, and smaller versions of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from wellcond.lab.errors import LabError, unknown_name
from wellcond.lab.given_paths import check_input_file
from wellcond.lab.methods.method import Method
from wellcond.lab.methods.method import method as read_method
from wellcond.lab.runs.settings import Scale, Settings
from wellcond.lab.runs.training_options import PROBES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Score = Literal["accuracy", "error", "AP", "mAP", "mIoU", "disparity", "condition"]

EVERY = "*"
"""In a table of changes: all methods that it does not name."""

_FOLDER = Path(__file__).parent / "recipes"
# What a command says rather than a recipe, or what a recipe says for each method.
_NOT_SETTINGS = {
    *("methods", "lrs", "jobs", "target"),
    *("mode", "time_shares", "search", "trials", "trial_seeds"),
}


class RecipeTable(BaseModel):
    """A table of a recipe, whose keys are all known."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, given: Any) -> Any:
        known = [info.alias or name for name, info in cls.model_fields.items()]
        for key in given if isinstance(given, dict) else ():
            if key not in known:
                raise _refusal(unknown_name("key", key, known))
        return given


def _settings_fields() -> dict[str, Any]:
    hints = get_type_hints(Settings)
    names = [field.name for field in fields(Settings) if field.name not in _NOT_SETTINGS]
    # What is swept is a table in a recipe: from an option to its values.
    hints["sweeps"] = dict[str, list[Any]]
    return {name: (hints[name] | None, None) for name in names}


SettingsTable: type[RecipeTable] = create_model("SettingsTable", __base__=RecipeTable, **_settings_fields())
"""Fields of `Settings`; those that are absent are left to another table or to the default.

``sweeps = { weight_decay = [1e-4, 5e-4] }`` tries these values with every lr, as ``--sweep`` of `wellcond compare`.
"""


def _paper_value(given: Any) -> Any:
    """Take ``[mean, std]``, ``[mean]`` and a bare mean alike."""
    return (float(given), None) if isinstance(given, (int, float)) else _padded(given)


def _padded(given: Any) -> Any:
    if isinstance(given, list) and 1 <= len(given) <= 2 and all(isinstance(part, (int, float)) for part in given):
        return (float(given[0]), float(given[1]) if len(given) == 2 else None)
    raise ValueError("a figure of the source must be [mean, std], [mean] or a number")


PaperValue = Annotated[tuple[float, float | None], BeforeValidator(_paper_value)]
"""A figure of the source: its mean, and its standard deviation if it gives one."""


class Change(RecipeTable):
    """The settings that a method is trained with beyond what the lab's method says.

    Attributes:
        lrs: The lr grid.
        options: The optimizer's options.
        transform: Options of its gradient transforms.
        norm: Options of its normalization layers.
    """

    lrs: list[PositiveFloat] | None = Field(default=None, min_length=1)
    options: dict[str, Any] = {}
    transform: dict[str, Any] = {}
    norm: dict[str, Any] = {}


class MethodTable(Change):
    """A method of a recipe.

    Attributes:
        label: How the source calls it.
        method: A name of `wellcond list methods`, or a method as it is written.
        baseline: The label that it is measured against; None: the recipe's.
    """

    label: str
    method: str
    baseline: str | None = None

    def read(self) -> Method:
        """Return the method, without what is special to the recipe.

        Raises:
            PydanticCustomError: If it cannot be read.
        """
        try:
            return read_method(self.method)
        except LabError as error:
            raise _refusal(error) from error


class PanelTable(RecipeTable):
    """A part of a table that is one comparison: one data set, one network.

    Attributes:
        name: What it is called.
        settings: What is special to it.
        methods: Labels that it compares; None for all.
        change: What is special to a method in it, by label or `EVERY`.
        figure: Which of the probe's figures it shows, if the score is a probe's.
        paper: The source's figures, by label.
        metrics: The source's further figures, by the metric's name and the label.
    """

    name: str
    settings: SettingsTable = SettingsTable()  # type: ignore[valid-type]  # made from the fields of Settings
    methods: list[str] | None = None
    change: dict[str, Change] = {}
    figure: str | None = None
    paper: dict[str, PaperValue] = {}
    metrics: dict[str, dict[str, PaperValue]] = {}


class ClaimTable(RecipeTable):
    """A source's statement of learned shares that it does not print: one is larger in the second of two panels.

    Attributes:
        statement: What the source says.
        method: The label of a method that learns shares of the statistics that it normalizes with.
        share: Whose share.
        panels: Names of the two panels.
    """

    statement: str
    method: str
    share: Literal["in", "ln", "bn"]
    panels: list[str] = Field(min_length=2, max_length=2)


class ScaleTable(RecipeTable):
    """A smaller version: it changes sizes, never what is compared.

    Attributes:
        settings: Take the place of the recipe's and of the panels'; an empty string takes a setting away.
        models: From a network of the source to a smaller one.
        lrs: lr grids, by label or by the optimizer's name.
        panels: Names of those that are run; None for all.
        methods: Labels that are compared; None for all.
        change: What is special to a method at this scale, by label or `EVERY`.
    """

    settings: SettingsTable = SettingsTable()  # type: ignore[valid-type]  # made from the fields of Settings
    models: dict[str, str] = {}
    lrs: dict[str, list[PositiveFloat]] = {}
    panels: list[str] | None = None
    methods: list[str] | None = None
    change: dict[str, Change] = {}


class Scales(RecipeTable):
    """The smaller versions; the full one is the recipe itself."""

    smoke: ScaleTable
    small: ScaleTable


class Recipe(RecipeTable):
    """A table or figure of a source.

    Attributes:
        title: What is compared, in one line.
        source: Which document, which table.
        names: What `wellcond reproduce` calls it, the first one first.
        score: What its figures are.
        baseline: The label that methods are measured against.
        equal_time: Whether methods are also compared at equal wall time.
        settings: Of every panel: the source's own.
        methods: What is compared.
        panels: Its parts.
        claims: What the source says of learned shares.
        scale: Its smaller versions.
    """

    title: str
    source: str
    names: list[str] = Field(min_length=1)
    score: Score
    baseline: str
    equal_time: bool = True
    settings: SettingsTable  # type: ignore[valid-type]  # made from the fields of Settings
    methods: list[MethodTable] = Field(alias="method", min_length=1)
    panels: list[PanelTable] = Field(alias="panel", min_length=1)
    claims: list[ClaimTable] = Field(default=[], alias="claim")
    scale: Scales

    @model_validator(mode="after")
    def _check_names(self) -> Recipe:
        labels = _distinct("method", [method.label for method in self.methods])
        panels = _distinct("panel", [panel.name for panel in self.panels])
        methods = [method.read() for method in self.methods]
        _check("label", [self.baseline, *(m.baseline for m in self.methods if m.baseline is not None)], labels)
        for panel in self.panels:
            figures = [*panel.paper, *(label for metric in panel.metrics.values() for label in metric)]
            _check("label", [*(panel.methods or ()), *figures], labels)
            _check("label", panel.change, [*labels, EVERY])
            if (panel.figure is not None) != (self.score in PROBES):
                raise _refusal(f"panel {panel.name} must have a figure if, and only if, the score is a probe's")
        for claim in self.claims:
            _check("label", [claim.method], labels)
            _check("panel", claim.panels, panels)
        settings: RecipeTable = self.settings
        probe = settings.model_dump().get("probe")
        if (self.score if self.score in PROBES else None) != probe:
            raise _refusal(f"a score that a probe measures needs settings.probe to name it, got {self.score}, {probe}")
        optimizers = [method.optimizer for method in methods]
        for scale in (self.scale.smoke, self.scale.small):
            _check("panel", scale.panels or (), panels)
            _check("label", scale.methods or (), labels)
            _check("label", scale.change, [*labels, EVERY])
            _check("label or optimizer", scale.lrs, [*labels, *dict.fromkeys(optimizers)])
        return self

    @property
    def name(self) -> str:
        """What it is called first."""
        return self.names[0]

    def at(self, scale: Scale) -> ScaleTable:
        """Return what a scale changes; nothing at the full one."""
        return ScaleTable() if scale == "full" else getattr(self.scale, scale)


def _distinct(kind: str, names: list[str]) -> list[str]:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise _refusal(f"each {kind} must have a name of its own, got {name!r} twice")
        if "," in name:
            raise _refusal(
                f"a name of a {kind} must have no comma, since commands list names with commas, got {name!r}"
            )
    return names


def _check(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise _refusal(unknown_name(kind, name, known))


def _refusal(message: object) -> PydanticCustomError:
    # Not a format string: names may hold braces.
    return PydanticCustomError("recipe", "{message}", {"message": str(message)})


def load_recipe(file: Path) -> Recipe:
    """Read a recipe.

    Args:
        file: A TOML file.

    Returns:
        The recipe, checked as far as it can be without its data.

    Raises:
        LabError: If there is no such file, it is not TOML, or a key or a value is wrong.
    """
    check_input_file("recipe", file)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LabError(f"recipe {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise LabError(f"recipe {file.name}: not TOML: {error}") from error
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise LabError(f"recipe {file.name}: {place + ': ' if place else ''}{said}") from None


class Heading(NamedTuple):
    """The name of a recipe that comes with the lab, read without checking what it holds.

    Attributes:
        names: What it is called, the first first.
        title: What is reproduced.
        source: Where it stands.
        file: The recipe.
    """

    names: list[str]
    title: str
    source: str
    file: Path


def bundled_headings() -> Iterator[Heading]:
    """Yield the heading of every recipe of the lab, in the order of their files' names, 6-3 before 6-10."""
    for file in sorted(_FOLDER.glob("*.toml"), key=_natural):
        content = tomllib.loads(file.read_text(encoding="utf-8"))
        yield Heading(content["names"], content["title"], content["source"], file)


def bundled_recipes() -> Iterator[Recipe]:
    """Yield every recipe that comes with the lab, in the same order."""
    for heading in bundled_headings():
        yield load_recipe(heading.file)


def _natural(file: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", file.stem)]


def find_recipe(name: str) -> Recipe:
    """Return a recipe by what a reader would call it.

    Args:
        name: One of its names, with or without "table" or "figure" before it; or a TOML file.

    Returns:
        The recipe.

    Raises:
        LabError: If there is none of that name, or the file is no recipe.
    """
    if name.endswith(".toml"):
        return load_recipe(Path(name))
    headings = list(bundled_headings())
    by_name = {_dashed(called): heading.file for heading in headings for called in heading.names}
    for called in (_dashed(name), _plain(name)):
        if called in by_name:
            return load_recipe(by_name[called])
    raise unknown_name("table", name, [heading.names[0] for heading in headings])


def _dashed(name: str) -> str:
    """Return a name in one spelling.

    >>> _dashed("Fig. 3.3"), _dashed("slides IBN-Net")
    ('figure-3.3', 'slides-ibn-net')
    """
    dashed = re.sub(r"[\s_-]+", "-", name.strip().casefold())
    return re.sub(r"^(figure|fig\.?)-?(?=\d)", "figure-", dashed)


def _plain(name: str) -> str:
    """Return a name without its kind: few tables and figures of the sources share a number.

    >>> _plain("Table 4.1"), _plain("figure-2.4")
    ('4.1', '2.4')
    """
    return re.sub(r"^(table|figure)-?(?=\d)", "", _dashed(name))
