"""From a method as it is written to the method: what its words stand for, and which options these take."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from wellcond.lab.errors import LabError, unknown_name
from wellcond.lab.importing import is_import_path
from wellcond.lab.methods.grammar import SETTINGS, MethodText, Part, Times, parse
from wellcond.lab.methods.layers import LAYERS
from wellcond.lab.methods.norms import NormSpec
from wellcond.lab.methods.optimizers import (
    default_lr,
    find_optimizer,
    has_peers,
    known_options,
    optimizer_names,
    takes_any_option,
)
from wellcond.lab.methods.schedule import parse_schedule
from wellcond.lab.methods.spec import GroupSpec, Method, Options, TransformSpec, find_transform

_SCHEDULE = "schedule."
_GAMMA_DECAY = "gamma_decay"
_LONGEST_GIVEN = 60  # of a method without a name, what becomes its name


def read_method(text: str, known: Mapping[str, Method], check: bool = True) -> Method:
    """Read a method as it is written (see `wellcond.lab.methods.grammar`).

    Args:
        text: The method; or a name of the list.
        known: The methods of the list, by name.
        check: Whether to look at the options, which needs torch.

    Returns:
        The method. Without a name, the text is its name, or of a long one the words.

    Raises:
        LabError: If the text has another form, or a word or an option is unknown; it names the token and its place.
    """
    if text.strip() in known:
        return known[text.strip()]
    formula = parse(text, known)
    return _Meaning(formula, known, check).method()


class _Meaning:
    """Finds out what the words of a formula stand for."""

    def __init__(self, formula: MethodText, known: Mapping[str, Method], check: bool) -> None:
        self.formula, self.known, self.check = formula, known, check
        self.codes: list[str] = []

    def method(self) -> Method:
        first, *rest = self.formula.parts
        if first.setting is not None:
            raise self.formula.error(first.position, f"a method begins with its optimizer, not with {first.setting}=")
        method = self._base(first, alone=not rest and self.formula.name is None)
        for part in rest:
            method = self._with(method, part)
        if method.layers == "nd" and method.norm is not None:
            raise self.formula.error(first.position, "layers=nd takes batch normalization out, so there is no norm=")
        name = self.formula.name or self._short()
        if not method.lrs:
            method = replace(method, lrs=self._lrs_of(method.optimizer, first))
        method = replace(method, name=name, code=method.code + "".join(self.codes))
        return replace(method, description=self._description(method))

    def _base(self, part: Part, alone: bool) -> Method:
        """Return the method that the first part stands for: the class, or a method of the list.

        ``AdamW(...)`` is the class with just these options, ``AdamW`` the method of the list.
        """
        listed = self.known.get(part.word)
        of_class = listed is not None and listed.optimizer == part.word and part.arguments is not None
        if listed is not None and not of_class:
            return self._changed(listed, part)
        if self.check:
            self._check_optimizer(part, alone)
        lrs = next((method.lrs for method in self.known.values() if method.optimizer == _called(part.word)), ())
        options = self._options(part, lambda: _options_of(part.word), f"option of {part.word}")
        return Method(self.formula.name or "", "", part.word, options, lrs)

    def _check_optimizer(self, part: Part, alone: bool) -> None:
        if is_import_path(part.word):
            self._imported(part, lambda: find_optimizer(part.word))
            return
        import torch

        # Without a look at pytorch_optimizer, which takes seconds to import.
        if isinstance(getattr(torch.optim, part.word, None), type):
            return
        known = [*self.known, *(name for name in optimizer_names() if name not in self.known)]
        if part.word in known:
            return
        if alone and part.arguments is None:
            error = unknown_name("method", part.word, self.known)
            if not has_peers():
                raise LabError(f"{error} (more of them with pip install 'wellcond[peers]')")
            raise error
        allowed = [*known, "module:Class"]
        raise self.formula.error(part.position, unknown_name("optimizer or method", part.word, allowed))

    def _imported(self, part: Part, find: Callable[[], Any]) -> Any:
        try:
            found = find()
        except (LabError, TypeError) as error:
            raise self.formula.error(part.position, error) from error
        if is_import_path(part.word):
            from wellcond.lab.own_digest import source_digest  # it needs torch

            self.codes.append(source_digest([found])[:16])
        return found

    def _changed(self, method: Method, part: Part) -> Method:
        """Return a method of the list with a part's options: each is the optimizer's, a transform's or a norm's."""
        given = self._options(part, None, "")
        if not given:
            return method
        of_optimizer = known_options(method.optimizer)
        takes_any = takes_any_option(method.optimizer)
        of_transforms = [
            name for spec in method.transforms for name in inspect.signature(find_transform(spec.name)).parameters
        ]
        split: dict[str, list[tuple[str, object]]] = {"options": [], "transform": [], "norm": []}
        for argument, pair in zip(part.arguments or (), given, strict=True):
            if pair[0] in of_optimizer:
                split["options"].append(pair)
            elif pair[0] in of_transforms:
                split["transform"].append(pair)
            elif takes_any:
                split["options"].append(pair)
            elif method.norm is not None:
                split["norm"].append(pair)
            else:
                allowed = list(dict.fromkeys([*of_optimizer, *of_transforms]))
                error = unknown_name(f"option of {part.word}", pair[0], allowed)
                raise self.formula.error(argument.position, error)
        parts = {key: tuple(pairs) for key, pairs in split.items()}
        return method.changed(**parts)

    def _with(self, method: Method, part: Part) -> Method:
        if part.setting is not None:
            return self._with_setting(method, part)
        if part.word == "group":
            return replace(method, groups=(*method.groups, self._group(part, method.optimizer)))
        if self.check:
            self._check_transform(part)
        options = self._options(
            part,
            lambda: list(inspect.signature(find_transform(part.word)).parameters),
            f"option of {part.word}",
        )
        return replace(method, transforms=(*method.transforms, TransformSpec(part.word, options)))

    def _check_transform(self, part: Part) -> None:
        names = transform_names()
        if not is_import_path(part.word) and part.word not in names:
            allowed = [*names, "group", *(f"{name}=" for name in SETTINGS), "module:Class"]
            raise self.formula.error(part.position, unknown_name("transform", part.word, allowed))
        self._imported(part, lambda: find_transform(part.word))

    def _group(self, part: Part, optimizer: str) -> GroupSpec:
        selectors = tuple(str(each.value) for each in part.arguments or () if each.key is None)
        if not selectors or not any(each.key for each in part.arguments or ()):
            rule = "a group has selectors and options: group(norms, biases, weight_decay=0)"
            raise self.formula.error(part.position, rule)
        known = _options_of(optimizer) if self.check else None
        options = self._options(part, lambda: None if known is None else ["lr", *known], f"option of {optimizer}", True)
        return GroupSpec(selectors, options)

    def _with_setting(self, method: Method, part: Part) -> Method:
        setting = str(part.setting)
        earlier = [each for each in self.formula.parts if each.setting == setting and each.position < part.position]
        if earlier:
            raise self.formula.error(part.position, f"{setting}= is given twice")
        if setting == "norm":
            return replace(method, norm=self._norm(part))
        if setting == "layers":
            self._one_of(part, "layers", LAYERS)
            options = self._options(part, None, "")
            return replace(method, layers=part.word, layer_options=options)
        if setting == "lrs":
            return replace(method, lrs=self._lrs(part))
        if setting == "schedule":
            try:
                parse_schedule(str(part.value))
            except LabError as error:
                raise self.formula.error(part.position, str(error).replace("--schedule", "schedule")) from error
            return replace(method, schedule=str(part.value))
        if setting == "create_graph":
            if not isinstance(part.value, bool):
                raise self.formula.error(part.position, f"create_graph must be True or False, got {part.value!r}")
            return replace(method, create_graph=part.value)
        if setting in ("clip_norm", "clip_value"):
            clipping = replace(method.clipping, **{setting.removeprefix("clip_"): self._limit(part)})
            return replace(method, clipping=clipping)
        return replace(method, baseline=str(part.value))

    def _limit(self, part: Part) -> float:
        value = part.value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.formula.error(part.position, f"{part.setting} must be a positive number, got {value!r}")
        return float(value)

    def _norm(self, part: Part) -> NormSpec:
        if self.check:
            from wellcond.nn.convert.kinds import KINDS

            self._one_of(part, "norm", KINDS)
        given = self._options(part, None, "")
        decay = dict(given).get(_GAMMA_DECAY, False)
        if not isinstance(decay, bool) or (decay and part.word != "pn"):
            raise self.formula.error(part.position, f"{_GAMMA_DECAY} is True or False, and for norm=pn alone")
        return NormSpec(
            part.word,
            tuple(pair for pair in given if not pair[0].startswith(_SCHEDULE) and pair[0] != _GAMMA_DECAY),
            tuple((name.removeprefix(_SCHEDULE), value) for name, value in given if name.startswith(_SCHEDULE)),
            decay,
        )

    def _one_of(self, part: Part, setting: str, known: Mapping[str, Any]) -> None:
        if part.word not in known:
            raise self.formula.error(part.position, unknown_name(setting, part.word, known))

    def _options(
        self, part: Part, known: Callable[[], list[str] | None] | None, called: str, in_group: bool = False
    ) -> Options:
        """Return a part's options as pairs, checked if it is known which it takes."""
        allowed = known() if known is not None and self.check and part.arguments else None
        pairs = []
        for argument in part.arguments or ():
            if argument.key is None:
                continue
            if isinstance(argument.value, Times) and not in_group:
                raise self.formula.error(argument.position, "only in a group(...) is a value a multiple, as 0.1x")
            if argument.key in ("lr", "lrs") and not in_group:
                raise self.formula.error(argument.position, "learning rates are a part of their own: + lrs=[0.01, 0.1]")
            if allowed is not None and argument.key not in allowed:
                raise self.formula.error(argument.position, unknown_name(called, argument.key, allowed or ["none"]))
            pairs.append((argument.key, argument.value))
        return tuple(pairs)

    def _lrs(self, part: Part) -> tuple[float, ...]:
        values: Any = part.value if isinstance(part.value, tuple) else (part.value,)
        numbers = [float(value) for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if not values or len(numbers) != len(values) or not all(0 < value < math.inf for value in numbers):
            raise self.formula.error(part.position, f"learning rates must be positive numbers, got {part.value!r}")
        if len(set(numbers)) != len(numbers):
            raise self.formula.error(part.position, f"learning rates must differ, got {part.value!r}")
        return tuple(sorted(numbers))

    def _lrs_of(self, optimizer: str, part: Part) -> tuple[float, ...]:
        """Return the lrs of an optimizer without a grid of ours: its own default, a third and three times it."""
        lr = default_lr(optimizer) if self.check else None
        if lr is None:
            raise self.formula.error(part.position, f"{optimizer} has no default lr: add + lrs=[...]")
        return tuple(float(f"{lr * factor:.3g}") for factor in (1 / 3, 1.0, 3.0))

    def _description(self, method: Method) -> str:
        """Return what the list says of such a method, or else its parts."""
        for listed in self.known.values():
            if replace(method, name=listed.name, lrs=listed.lrs, baseline=listed.baseline) == listed:
                return listed.description
        more = [spec.name for spec in method.transforms]
        more += [f"{kind} in place of batch normalization" for kind in [method.norm and method.norm.kind] if kind]
        more += [f"layers {kind}" for kind in [method.layers] if kind]
        more += ["parameter groups"] if method.groups else []
        more += [
            f"gradients of a {name.removeprefix('clip_')} up to {limit:g}" for name, limit in method.clipping.settings
        ]
        return f"{method.optimizer} with {', '.join(more)}" if more else method.optimizer

    def _short(self) -> str:
        text = " ".join(self.formula.text.split())
        if len(text) <= _LONGEST_GIVEN:
            return text
        words = "+".join(part.word for part in self.formula.parts if part.word not in ("", "group"))
        return words if len(words) <= _LONGEST_GIVEN else f"{words[: _LONGEST_GIVEN - 1]}…"


def transform_names() -> list[str]:
    """Return the names of wellcond's transforms."""
    import wellcond

    found = {name: getattr(wellcond, name) for name in wellcond.__all__}
    base = wellcond.GradientTransform
    return [
        name for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, base) and kind is not base
    ]


def _options_of(optimizer: str) -> list[str] | None:
    return None if takes_any_option(optimizer) else known_options(optimizer)


def _called(word: str) -> str:
    return word.rpartition(":")[2]
