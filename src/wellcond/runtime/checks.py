"""Checks of arguments, by their annotations and by the ranges that several parts share; the category of warnings."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any, Literal, NamedTuple, ParamSpec, TypeAlias, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

P = ParamSpec("P")
R = TypeVar("R")

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
"""``where(qualified name, module)``: whether a module is selected."""

AnyInteger = Annotated[int, "an integer"]
"""An integer that may be zero or negative, where others count something."""

LARGEST_SIZE = 2**31 - 1
"""What the size of a layer may be at most: anything larger is a mistake that would ask for all memory."""

_LARGEST_INTEGER = 2**63 - 1
_TORCH_ORDER = ("num_features", "eps", "momentum", "affine", "track_running_stats")


class ArgumentError(TypeError, ValueError):
    """An argument that is none of what its parameter takes; both of Python's errors for that."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check a function's arguments against its annotations, at each call.

    Checked are booleans, integers, finite numbers, strings, `Literal`s, functions, iterables, classes, devices and
    floating-point dtypes, and unions of these; what is annotated otherwise is let through. True is no number, 1 is no
    boolean. Ranges are the function's own to check.

    Args:
        function: Or a method, such as a constructor.

    Returns:
        The function; it raises an `ArgumentError` that names the argument, what is allowed, and what was given.

    Example:
        >>> @checked
        ... def scale(value: float, twice: bool = False, unit: Literal["m", "km"] = "m") -> float:
        ...     return value * (2 if twice else 1)
        >>> scale(1, twice="no")
        Traceback (most recent call last):
            ...
        wellcond.runtime.checks.ArgumentError: twice must be True or False, got 'no'
    """
    signature = inspect.signature(function)
    own = getattr(function, "own_checks", ())
    parameters = {name: parameter for name, parameter in signature.parameters.items() if name not in own}

    @functools.cache
    def rules() -> dict[str, _Rule]:
        # At the first call, when all names of the annotations are known.
        found = {name: _rule(_evaluated(p.annotation, function)) for name, p in parameters.items() if _is_single(p)}
        return {name: rule for name, rule in found.items() if rule is not None}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            given = {}  # Python's own error follows.
        for name, rule in rules().items():
            if name in given and not rule.admits(given[name]):
                place = "" if name in kwargs else _place(list(signature.parameters), name, args)
                raise ArgumentError(f"{name} must be {rule.words}, got {shown(given[name])}{place}")
        return function(*args, **kwargs)

    return call


def checks_itself(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Say which arguments a function checks by itself, types and all, with words of its own; below `checked`."""

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        function.own_checks = names  # type: ignore[attr-defined]
        return function

    return mark


def check_fields(instance: object) -> None:
    """Check the fields of a dataclass against its annotations, as `checked` does the arguments of a function.

    Args:
        instance: Of a dataclass; to be called from its `__post_init__`.

    Raises:
        ArgumentError: Naming the field.
    """
    for field in dataclasses.fields(instance):  # type: ignore[arg-type]
        owner = next(kind for kind in type(instance).__mro__ if field.name in vars(kind).get("__annotations__", {}))
        rule = _field_rule(owner, field.name)
        value = getattr(instance, field.name)
        if rule is not None and not rule.admits(value):
            raise ArgumentError(f"{field.name} must be {rule.words}, got {shown(value)}")


def check_positive_integer(argument: str, value: object, at_most: int = _LARGEST_INTEGER) -> None:
    """Raise a ValueError naming the argument unless ``value`` is an integer of at least 1.

    >>> check_positive_integer("stats_every", -3)
    Traceback (most recent call last):
        ...
    ValueError: stats_every must be a positive integer, got -3
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{argument} must be a positive integer, got {shown(value)}")
    if value > at_most:
        raise ValueError(f"{argument} must be at most {at_most}, got {shown(value)}")


def check_choice(argument: str, value: object, allowed: Collection[str]) -> None:
    """Raise a ValueError naming the argument unless ``value`` is one of ``allowed``.

    >>> check_choice("to", "fast", ("plain", "nd"))
    Traceback (most recent call last):
        ...
    ValueError: to must be one of 'plain', 'nd', got 'fast'
    """
    if not isinstance(value, str) or value not in allowed:
        given = repr(value) if isinstance(value, list) else shown(value)
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, allowed))}, got {given}")


def shown(value: object) -> str:
    """Return how an error shows a value: as it is written, or, of larger things, its type.

    >>> shown("no"), shown([1, 2])
    ("'no'", 'list')
    """
    if not isinstance(value, (str, int, float, type(None), torch.dtype, torch.device)):
        return type(value).__name__
    if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:  # Python refuses to write some of these.
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


class _Rule(NamedTuple):
    """What a parameter takes: a test, and words for it."""

    admits: Callable[[Any], bool]
    words: str


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST_INTEGER


def is_finite_number(value: object) -> bool:
    """Whether a value is a number, finite, and no boolean.

    >>> is_finite_number(0.5), is_finite_number(True), is_finite_number(10**400)
    (True, False, False)
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_device(value: object) -> bool:
    if isinstance(value, torch.device) or _is_integer(value):
        return True
    try:
        return isinstance(value, str) and bool(torch.device(value))
    except RuntimeError:
        return False


def _is_floating_dtype(value: object) -> bool:
    return isinstance(value, torch.dtype) and value.is_floating_point


def _is_iterable(value: object) -> bool:
    if isinstance(value, (str, bytes)):
        return False
    return isinstance(value, collections.abc.Iterable) or hasattr(value, "__getitem__")


_PLAIN: dict[Any, _Rule] = {
    bool: _Rule(lambda value: isinstance(value, bool), "True or False"),
    int: _Rule(_is_integer, "a positive integer"),
    float: _Rule(is_finite_number, "a finite number"),
    str: _Rule(lambda value: isinstance(value, str), "a string"),
    type(None): _Rule(lambda value: value is None, "None"),
    torch.device: _Rule(_is_device, "a device"),
    torch.dtype: _Rule(_is_floating_dtype, "a floating-point torch.dtype"),
    nn.Module: _Rule(lambda value: isinstance(value, nn.Module), "a torch.nn.Module"),
}


def _rule(annotation: Any) -> _Rule | None:
    """Return what an annotation admits; None if that is not known."""
    if annotation is Any:
        return None
    if annotation is None:
        annotation = type(None)
    if isinstance(annotation, typing.TypeVar):
        annotation = annotation.__bound__
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if torch.device in arguments:  # A device's name is no string like others.
            arguments = tuple(each for each in arguments if each is not str)
        return _union([_rule(each) for each in arguments])
    if origin is Annotated:
        rule = _rule(arguments[0])
        return rule and rule._replace(words=annotation.__metadata__[0])
    if origin is Literal:
        words = ", ".join(map(repr, arguments))
        return _Rule(
            lambda value: any(type(value) is type(each) and value == each for each in arguments), f"one of {words}"
        )
    if origin is collections.abc.Callable:
        decides = bool(arguments) and arguments[-1] is bool
        return _Rule(callable, "a predicate of (name, module)" if decides else "a function")
    if origin is tuple:
        return _tuple(arguments)
    if origin in (collections.abc.Iterable, collections.abc.Sequence, list):
        return _Rule(_is_iterable, "an iterable" if origin is collections.abc.Iterable else "a sequence")
    kind = annotation if origin is None else origin
    if isinstance(kind, type) and kind is not object and not getattr(kind, "_is_protocol", False):
        return _Rule(lambda value: isinstance(value, kind), f"a {kind.__module__.partition('.')[0]} {kind.__name__}")
    return None


def _union(rules: Sequence[_Rule | None]) -> _Rule | None:
    known = [rule for rule in rules if rule is not None]
    if len(known) < len(rules):
        return None
    words = list(dict.fromkeys(rule.words for rule in known))
    return _Rule(lambda value: any(rule.admits(value) for rule in known), " or ".join(words))


def _tuple(arguments: Sequence[Any]) -> _Rule | None:
    """Return the rule of a tuple of fixed length; a list of it is taken, too."""
    rules = [_rule(each) for each in arguments]
    if Ellipsis in arguments or any(rule is None for rule in rules):
        return None

    def admits(value: Any) -> bool:
        if not isinstance(value, (tuple, list)) or len(value) != len(rules):
            return False
        return all(rule is not None and rule.admits(each) for rule, each in zip(rules, value, strict=True))

    return _Rule(admits, f"{len(rules)} of them")


def _evaluated(annotation: Any, function: Callable[..., Any]) -> Any:
    """Return an annotation as an object; one that only type checkers can read is taken for Any."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, inspect.unwrap(function).__globals__)
    except (NameError, AttributeError, TypeError):
        return Any


@functools.cache
def _field_rule(owner: type, name: str) -> _Rule | None:
    annotation = vars(owner)["__annotations__"][name]
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, vars(__import__("sys").modules[owner.__module__]))
        except (NameError, AttributeError, TypeError):
            return None
    return _rule(annotation)


def _is_single(parameter: inspect.Parameter) -> bool:
    """Whether a parameter takes one argument, whose annotation says what it is."""
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.kind not in many and parameter.annotation is not inspect.Parameter.empty


def _place(names: Sequence[str], name: str, args: Sequence[object]) -> str:
    """Return which argument that was, if it was given by its place in a constructor."""
    if names[0] != "self" or len(args) < 2:
        return ""
    index = names.index(name) - 1
    if index == 0:
        return ""
    order = ", ".join(names[1 : len(args) + 1])
    text = f", as argument {index + 1} of {type(args[0]).__name__}({order}, …)"
    if isinstance(args[0], _BatchNorm) and index < len(_TORCH_ORDER) and _TORCH_ORDER[index] != name:
        text += f"; in nn.BatchNorm that is {_TORCH_ORDER[index]}: give it by its name"
    return text


class WellcondWarning(UserWarning):
    """Something that does not stop training but that a user should know.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", WellcondWarning)  # stop at the first one instead
    """
