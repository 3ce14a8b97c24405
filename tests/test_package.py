"""The wheel and the source distribution hold what they should; said by the build backend, without building."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from trove_classifiers import classifiers

import wellcond

ROOT = Path(__file__).parents[1]


def files_in(folder: Path) -> set[str]:
    """Return the files below a folder, by their path from the project's root, but for what Python makes itself."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in found}


@pytest.fixture(scope="module")
def wheel() -> set[str]:
    return {str(file.distribution_path) for file in WheelBuilder(str(ROOT)).recurse_included_files()}


@pytest.fixture(scope="module")
def sdist() -> set[str]:
    return {str(file.distribution_path) for file in SdistBuilder(str(ROOT)).recurse_included_files()}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: set[str]) -> None:
    assert wheel == {name.removeprefix("src/") for name in files_in(ROOT / "src")}


def test_the_wheel_holds_what_is_not_python(wheel: set[str]) -> None:
    data = {name for name in wheel if not name.endswith(".py")}
    assert {"wellcond/py.typed", "wellcond/lab/report/templates/report.html.j2"} <= data


@pytest.mark.parametrize("folder", ["src", "tests", "docs", "benchmarks"])
def test_the_source_distribution_holds_whole_folders(sdist: set[str], folder: str) -> None:
    assert files_in(ROOT / folder) <= sdist


def test_the_source_distribution_holds_what_its_checks_need_and_no_results_of_runs(sdist: set[str]) -> None:
    top = {"README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "mkdocs.yml"}
    # pyproject.toml is always there.
    assert top <= sdist
    folders = {name.partition("/")[0] for name in sdist if "/" in name}
    assert folders <= {"src", "tests", "docs", "benchmarks", "examples", "recipes", "tools"}


def test_the_metadata_say_what_the_package_says() -> None:
    core = WheelBuilder(str(ROOT)).metadata.core
    assert WheelBuilder(str(ROOT)).metadata.version == wellcond.__version__
    assert core.dependencies == ["torch>=2.11"]
    assert core.license_expression == "Apache-2.0"
    assert set(core.classifiers) <= classifiers


def test_the_citation_names_the_sources() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == "Apache-2.0"
    assert {reference["type"]: reference["year"] for reference in citation["references"]} == {
        "thesis": 2022,
        "conference-paper": 2020,
    }
    # The version stands in one place, which this is not.
    assert "version" not in citation
