"""Digests a user's own thing, to tell it from another: the code of its modules, and what its object holds."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wellcond.lab.source_text import code_of

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def source_digest(sources: Iterable[Any]) -> str:
    """Return a digest of the code of classes and functions, and of their project's modules that it imports.

    Docstrings and comments do not count, nor does what is installed. Of a script or a notebook only what the classes
    and functions name counts. Empty where all of it is wellcond's own.

    Args:
        sources: Classes and functions.
    """
    parts = list(_code(sources))
    return hashlib.sha256(b"".join(parts)).hexdigest() if parts else ""


def state_digest(task: Any) -> str:
    """Return a digest of a dictionary, or of an object's attributes without what it has worked out from them."""
    digest = hashlib.sha256()
    _State(digest).add(task if isinstance(task, dict) else held(task))
    return digest.hexdigest()


def _code(sources: Iterable[Any]) -> Iterator[bytes]:
    """Yield the code that classes and functions hang on, wellcond's own aside."""
    kinds = [kind for source in sources for kind in (source.__mro__ if isinstance(source, type) else (source,))]
    seen: set[int] = set()
    for kind in kinds:
        if getattr(kind, "__module__", None) == "__main__":
            yield from _code_by_names(kind, seen) if isinstance(kind, type) else _function(kind, seen)
    files: dict[str, str] = {}
    for kind in kinds:
        _gather(str(getattr(kind, "__module__", "")), files)
    for name, text in sorted(files.items()):
        if name != "__main__":
            yield code_of(text)


def _gather(name: str, into: dict[str, str]) -> None:
    """Add the text of a module, and of those of the same project that it imports, to those found."""
    file = None if name in into else _own_file(name)
    if file is None:
        return
    into[name] = file.read_text(encoding="utf-8")
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(into[name])):
        if isinstance(node, ast.Import):
            for alias in node.names:
                _gather(alias.name, into)
        elif isinstance(node, ast.ImportFrom):
            with contextlib.suppress(ImportError):  # beyond the package: Python would refuse it too
                source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                for other in (source, *(f"{source}.{alias.name}" for alias in node.names)):
                    _gather(other, into)


def _own_file(name: str) -> Path | None:
    """Return the file of a module of the user's project; None of one that is installed, or has no text."""
    if name.partition(".")[0] == "wellcond":
        return None
    module = sys.modules.get(name)
    try:
        spec = None if module is not None else importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # no module, but something in one
        return None
    given = getattr(module, "__file__", None) if spec is None else spec.origin
    if not given or not str(given).endswith(".py"):
        return None
    path = Path(given).resolve()
    return None if is_installed(path) else path


def is_installed(path: Path) -> bool:
    """Return whether a file lies among Python's own or the installed packages."""
    return any(path.resolve().is_relative_to(folder) for folder in _installed())


@cache
def _installed() -> set[Path]:
    folders = [sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return {Path(folder).resolve() for folder in (*folders, *site.getsitepackages(), site.getusersitepackages())}


def _code_by_names(kind: type, seen: set[int]) -> Iterator[bytes]:
    """Yield the code of a class of a script or a notebook, and of what it names there, whatever else stands there."""
    if id(kind) in seen or kind.__module__ != "__main__":
        return
    seen.add(id(kind))
    for name, value in sorted(vars(kind).items()):
        function = getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", value)
        if isinstance(function, FunctionType):
            yield name.encode()
            yield from _function(function, seen)
        elif isinstance(value, _PLAIN) and not name.startswith("__"):
            yield f"{name}={value!r}".encode()
    for other in kind.__mro__[1:]:
        yield from _code_by_names(other, seen)


def _function(function: Any, seen: set[int]) -> Iterator[bytes]:
    if id(function) in seen or not isinstance(function, FunctionType):
        return
    seen.add(id(function))
    yield from _instructions(function.__code__, function.__doc__)
    for name in sorted(_names(function.__code__)):
        value = function.__globals__.get(name)
        if isinstance(value, FunctionType) and value.__module__ == "__main__":
            yield from _function(value, seen)
        elif isinstance(value, type):
            yield from _code_by_names(value, seen)
        elif isinstance(value, (*_PLAIN, list, tuple, dict, set, Tensor, np.ndarray)):
            yield f"{name}={state_digest({name: value})}".encode()


def _instructions(code: CodeType, text: str | None) -> Iterator[bytes]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant, None)
        elif constant != text or text is None:
            yield repr(constant).encode()


def _names(code: CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names(constant)
    return found


def held(task: Any) -> dict[str, Any]:
    """Return an object's attributes, without what it has worked out from them."""
    kind = type(task)
    return {
        name: value
        for name, value in sorted(vars(task).items())
        if not isinstance(getattr(kind, name, None), cached_property)
    }


class _State:
    """Adds whatever an object holds to a digest; of what it cannot look into, the type alone.

    Args:
        digest: Where to.
    """

    def __init__(self, digest: Any) -> None:
        self.digest = digest
        self.seen: set[int] = set()

    def add(self, value: Any) -> None:
        """Add a value."""
        self.digest.update(f"{type(value).__module__}.{type(value).__qualname__}:".encode())
        if isinstance(value, (*_PLAIN, Path, np.generic, torch.dtype, torch.device)):
            self.digest.update(repr(value).encode())
            return
        if id(value) in self.seen:
            return
        self.seen.add(id(value))
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray):
            self._array(value)
        elif isinstance(value, nn.Module):
            self.add(dict(value.state_dict()))
        elif isinstance(value, dict):
            for key, item in value.items():
                self.add(key)
                self.add(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.add(item)
        elif isinstance(value, (set, frozenset)):
            self.digest.update(repr(sorted(map(repr, value))).encode())
        elif isinstance(value, (FunctionType, MethodType)):
            for part in _instructions(value.__code__, value.__doc__):
                self.digest.update(part)
        elif isinstance(value, type):
            self.digest.update(f"{value.__module__}.{value.__qualname__}".encode())
        elif hasattr(value, "__dict__"):
            self.add(held(value))

    def _tensor(self, value: Tensor) -> None:
        self.digest.update(repr((value.dtype, tuple(value.shape))).encode())
        dense = value.detach().cpu().contiguous().flatten()
        self.digest.update(dense.view(torch.uint8).numpy().tobytes() if dense.numel() else b"")

    def _array(self, value: np.ndarray[Any, Any]) -> None:
        self.digest.update(repr((value.dtype, value.shape)).encode())
        if value.dtype.hasobject:
            self.digest.update(repr(value.tolist()).encode())
        else:
            self.digest.update(np.ascontiguousarray(value).tobytes())
