"""A whole comparison in one TOML file: the fields of `Settings`, by their names."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from wellcond.lab.errors import LabError, unknown_name
from wellcond.lab.given_paths import check_input_file
from wellcond.lab.runs.settings import Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE_NAME = "compare.toml"
"""What it is called where the lab writes it."""


def read_comparison(file: str | Path) -> dict[str, Any]:
    """Return the settings that a file holds, by their names.

    Args:
        file: A TOML file. Its keys are the fields of `Settings`; a list of pairs is a table.

    Raises:
        LabError: If it cannot be read, a key is unknown, or a value is of another type.
    """
    path = check_input_file("comparison", file)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LabError(f"comparison {path}: not TOML: {error}") from error
    hints = get_type_hints(Settings)
    names = [field.name for field in fields(Settings)]
    found = {}
    for key, value in content.items():
        if key not in names:
            raise LabError(f"comparison {path}: {unknown_name('key', key, names)}")
        try:
            found[key] = _as(hints[key], value)
        except TypeError:
            raise LabError(f"comparison {path}: {key} must be {_described(hints[key])}, got {value!r}") from None
    return found


def write_comparison(settings: Settings, command: str) -> str:
    """Return the text of a file that repeats a comparison.

    Args:
        settings: The comparison's. What has its default is written, too: a later version may have another. What is left
            open is a comment.
        command: The command line that made it.
    """
    lines = [f"# Repeats: {' '.join(command.split())}"]
    if settings.task_is_given:
        lines += ["# The task was handed over as an object: give it to wellcond.lab.compare again, with these.", ""]
    else:
        lines += [f"# wellcond compare {FILE_NAME}", ""]
    tables = []
    for field in fields(Settings):
        value = getattr(settings, field.name)
        if value is None:
            lines.append(f"# {field.name} is left open")
        elif value and _is_pairs(value):
            tables += ["", f"[{field.name}]", *(f"{_text(key)} = {_written(item)}" for key, item in value)]
        else:
            lines.append(f"{field.name} = {_written(value)}")
    return "\n".join([*lines, *tables, ""])


def _as(hint: Any, value: Any) -> Any:
    """Return a value of TOML as a field's type has it.

    Raises:
        TypeError: If it has none.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        for each in inner:
            try:
                return _as(each, value)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if value in inner:
            return value
        # What is no such text is told by name when the settings are made.
        return _as(str, value)
    if origin is tuple and isinstance(value, dict):
        texts = get_args(inner[0])[1:] == (str,)
        # Where texts are asked for, a number is its text.
        pairs = ((key, _written(item) if texts and not isinstance(item, str) else item) for key, item in value.items())
        return tuple(_as(inner[0], list(pair)) for pair in pairs)
    if origin in (tuple, list) and isinstance(value, list):
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_as(inner[0], item) for item in value)
        if len(inner) != len(value):
            raise TypeError
        return tuple(_as(each, item) for each, item in zip(inner, value, strict=True))
    if origin is not None and isinstance(value, dict) and issubclass(origin, Mapping):
        return {key: _as(inner[1], item) for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is object and isinstance(value, list):
        return tuple(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint in (bool, object) or not isinstance(value, bool)):
        return value
    raise TypeError


def _described(hint: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
    if hint in names:
        return names[hint]
    inner = [each for each in get_args(hint) if each is not type(None)]
    if get_origin(hint) is tuple:
        pairs = get_origin(inner[0]) is tuple and len(get_args(inner[0])) == 2
        return "a table" if pairs else "a list"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, inner))}"
    return " or ".join(_described(each) for each in inner) or "another"


def _is_pairs(value: object) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in value
    )


def _written(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        items = [_written(item) for item in value]
        line = f"[{', '.join(items)}]"
        # Methods are long: one a line.
        return line if len(line) <= 100 else "[\n" + "".join(f"    {item},\n" for item in items) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)} = {_written(item)}" for key, item in value.items()) + "}"
    return _text(value) if isinstance(value, str) else repr(value)


def _text(value: object) -> str:
    # A text of JSON is one of TOML, but for DEL.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
