"""A name means one thing: no public function or class is called as a module of the library is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import wellcond

SOURCE = Path(wellcond.__file__).parent
PACKAGES = ["wellcond"] + [
    f"wellcond.{path.relative_to(SOURCE).parent.as_posix().replace('/', '.')}"
    for path in sorted(SOURCE.rglob("__init__.py"))
    if path.parent != SOURCE and "lab" not in path.relative_to(SOURCE).parts
]
MODULES = {
    path.stem for path in SOURCE.rglob("*.py") if "lab" not in path.relative_to(SOURCE).parts and path.stem[0] != "_"
}


@pytest.mark.parametrize("package", [*PACKAGES, "wellcond.optim"])
def test_no_public_name_is_a_module_too(package: str) -> None:
    loaded = importlib.import_module(package)
    public = getattr(loaded, "__all__", [name for name in vars(loaded) if not name.startswith("_")])
    named = {name for name in public if inspect.isroutine(getattr(loaded, name)) or inspect.isclass(vars(loaded)[name])}
    assert not named & MODULES


@pytest.mark.parametrize("package", PACKAGES)
def test_a_submodules_name_is_not_taken(package: str) -> None:
    loaded = importlib.import_module(package)
    for module in pkgutil.iter_modules(loaded.__path__):
        assert inspect.ismodule(getattr(loaded, module.name, loaded)), f"{package}.{module.name} is no module"
