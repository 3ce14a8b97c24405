"""Reading pickles that hold arrays, texts, bytes, numbers, lists and dicts alone: none of them can run code."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from wellcond.lab.errors import LabError


def read_plain_pickle(file: Path) -> Any:
    """Read a pickle.

    `pickle.load` calls whatever function a file names. Here the few that pickled arrays name are replaced by others,
    which only put numbers together, and every other one is refused.

    Args:
        file: The file; texts of Python 2 are read as Latin-1.

    Returns:
        What it holds; arrays are copies.

    Raises:
        LabError: If it cannot be read, is no pickle, or holds anything else.
    """
    try:
        with file.open("rb") as opened:
            content = _Reader(opened).load()
        return _plain(content, {})
    except _RefusedError as error:
        raise LabError(f"{file}: {error}, which is not read from a file of data") from error
    except Exception as error:  # whatever the stack machine of a pickle does with bytes that are none
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LabError(f"{file}: damaged or no pickle of arrays, texts, numbers, lists and dicts ({reason})") from error


class _RefusedError(Exception):
    """The pickle names something that is not admitted."""


class _Kind:
    """The kind of an array's numbers, as ``numpy.dtype`` is pickled."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name, self.order = str(name), "="

    def __setstate__(self, state: Any) -> None:
        self.order = {"|": "=", "<": "<", ">": ">", "=": "="}[state[1]]

    def dtype(self) -> np.dtype[Any]:
        found: np.dtype[Any] = np.dtype(self.name).newbyteorder(self.order)  # type: ignore[arg-type]  # one of the four above
        if found.kind not in "biufc":
            raise _RefusedError(f"it holds an array of {self.name}")
        return found


class _Array:
    """An array to be, as ``numpy.ndarray`` is pickled."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state[-4:]

    def array(self) -> np.ndarray[Any, Any]:
        shape, kind, by_columns, raw = self.state
        return _shaped(raw, kind, shape, "F" if by_columns else "C")


def _shaped(raw: Any, kind: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    if not isinstance(kind, _Kind):
        raise _RefusedError("it holds an array of no kind of numbers")
    content = raw.encode("latin-1") if isinstance(raw, str) else bytes(raw)
    count = math.prod(int(side) for side in shape)
    numbers = np.frombuffer(content, dtype=kind.dtype())
    if numbers.size != count:
        raise ValueError(f"an array of {count} numbers has {numbers.size}")
    shaped: np.ndarray[Any, Any] = numbers.reshape(shape, order="F" if order == "F" else "C").copy()
    return shaped


def _scalar(kind: Any, raw: Any) -> Any:
    return _shaped(raw, kind, (), "C").item()


def _latin1(text: Any, encoding: Any) -> bytes:
    """Stand in for `codecs.encode`, by which Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise _RefusedError(f"it names the encoding {encoding}")
    return str(text).encode("latin-1")


def _no_bytes() -> bytes:
    return b""


class _Function:
    """A function that a pickle may call, and cannot change: of a bare one it could set the attributes."""

    __slots__ = ("_does",)

    def __init__(self, does: Callable[..., Any]) -> None:
        self._does = does

    def __call__(self, *arguments: Any) -> Any:
        return self._does(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("it changes a function")


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Kind,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _Function(_latin1),
    # Empty bytes and complex numbers, in the protocols up to 2 and from 3 on.
    **{
        (module, name): _Function(stand_in)
        for module in ("__builtin__", "builtins")
        for name, stand_in in (("bytes", _no_bytes), ("complex", complex))
    },
    # numpy 2 moved them.
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", _Function(_scalar)),
            ("numeric", "_frombuffer", _Function(_shaped)),
        )
    },
}


class _Reader(pickle.Unpickler):
    def __init__(self, opened: IO[bytes]) -> None:
        super().__init__(opened, encoding="latin1")

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _STAND_INS:
            raise _RefusedError(f"it names {module}.{name}")
        return _STAND_INS[module, name]

    def persistent_load(self, pid: Any, /) -> Any:
        raise _RefusedError("it names something outside itself")


def _plain(value: Any, made: dict[int, Any]) -> Any:
    """Return the content with its arrays made.

    Args:
        value: A part of it.
        made: What was made of parts that are lists and the like, by their identity: files may name one part often.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, bytearray, np.ndarray)):
        return value
    if id(value) not in made:
        made[id(value)] = _UNFINISHED
        made[id(value)] = _made(value, made)
    if made[id(value)] is _UNFINISHED:
        raise _RefusedError("it holds itself")
    return made[id(value)]


_UNFINISHED = object()


def _made(value: Any, made: dict[int, Any]) -> Any:
    if isinstance(value, _Array):
        return value.array()
    if isinstance(value, dict):
        return {_plain(key, made): _plain(item, made) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item, made) for item in value)
    raise _RefusedError(f"it holds a {type(value).__name__}")
