"""An option of training is one field: commands, files, results and kept runs go through it, and few files name it."""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import wellcond
from wellcond.lab.cli.main import _parser
from wellcond.lab.reproduction.recipe import SettingsTable
from wellcond.lab.runs.option import options_of
from wellcond.lab.runs.records import RunSpec
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.training_options import TrainingOptions

PACKAGE = Path(wellcond.__file__).parent
LAB = PACKAGE / "lab"
OPTIONS = options_of(TrainingOptions)
WORDS = {"model", "weights", "epochs", "batch_size", "schedule"}
"""Options that other things have too, such as a method's schedule."""
MOST = {"deterministic": 2, "channels_last": 2, "ghost_batch": 10, "stats_every": 8, "solve_every": 7}
"""Files of the lab that write an option's name, its field's among them; of the others there are at most three."""
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in LAB.rglob("*.py")}


def writes(tree: ast.AST, name: str) -> bool:
    """Whether a file declares, reads, hands on or lists what is called so; torch's own arguments do not count."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=found) if found == name:
                return True
            case ast.AnnAssign(target=ast.Name(id=found)) if found == name:
                return True
            case ast.Subscript(slice=ast.Constant(value=found)) if found == name:
                return True
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
                if any(isinstance(part, ast.Constant) and part.value == name for part in parts):
                    return True
            case ast.Call(func=ast.Attribute(value=ast.Name(id="F"))):
                continue
            case ast.Call(keywords=given) if any(argument.arg == name for argument in given):
                return True
    return False


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - WORDS))
def test_few_files_know_an_option(name: str) -> None:
    found = {file.relative_to(LAB).as_posix() for file, tree in TREES.items() if writes(tree, name)}
    assert "runs/training_options.py" in found
    assert len(found) > 1, "nothing uses it"
    assert len(found) <= MOST.get(name, 3), sorted(found)


def test_every_option_is_a_setting_a_key_of_recipes_and_a_field_of_runs() -> None:
    for holds in (Settings, RunSpec):
        assert set(OPTIONS) <= {field.name for field in fields(holds)}
    assert set(OPTIONS) <= set(SettingsTable.model_fields)
    assert set(OPTIONS) == {field.name for field in fields(TrainingOptions)}
    assert all(option.help for option in options_of(Settings).values())


@pytest.mark.parametrize("command", ["train", "compare"])
def test_commands_offer_every_option_as_its_field_says(command: str) -> None:
    parser = _parser([command])
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    actions = {action.dest: action for action in commands.choices[command]._actions}
    offered = {name: option for name, option in OPTIONS.items() if option.offered}
    assert "probe" not in actions
    for name, option in offered.items():
        assert f"--{option.flag}" in actions[name].option_strings
        assert actions[name].help
        wanted = argparse.SUPPRESS if command == "compare" else getattr(Settings(), name)
        assert actions[name].default == wanted
    if command == "compare":
        assert {name for name, option in options_of(Settings).items() if option.offered} <= set(actions)


NEW = '    invented: int = _training(7, "an option that a test invents", "N", check=whole_number(), by_task=True)\n'
PROGRAM = """
import contextlib, io
from pathlib import Path
import wellcond
from wellcond.lab.cli.main import _parser, main
from wellcond.lab.cli.options import given_settings
from wellcond.lab.plan import make_plan
from wellcond.lab.reproduction.recipe import SettingsTable
from wellcond.lab.report.results import _settings
from wellcond.lab.runs.comparison_file import read_comparison, write_comparison
from wellcond.lab.runs.settings import Settings

for command in ("train", "compare"):
    arguments = _parser([command]).parse_args([command, "--invented", "3"])
    assert given_settings(arguments, methods=("SGDM",)).invented == 3
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main([command, "--invented", "0"]) == 2
    assert "--invented must be a positive integer, got 0" in said.getvalue()
with contextlib.redirect_stderr(io.StringIO()) as said:
    assert main(["compare", "--task", "a:B", "--invented", "2"]) == 2
assert "--invented is for --data" in said.getvalue()
Path("compare.toml").write_text(write_comparison(Settings(invented=4), "wellcond compare"))
assert read_comparison("compare.toml")["invented"] == 4
assert SettingsTable(invented=5).invented == 5
small = {"methods": ("SGDM",), "seeds": 1, "epochs": 1, "train_images": 64}
plan, usual = (make_plan(Settings(**small, **more)) for more in ({"invented": 6}, {}))
(run,), (other,) = plan.specs()[:1], usual.specs()[:1]
assert (run.invented, other.invented) == (6, 7)
assert run.key() != other.key()
assert _settings(plan)["invented"] == 6
print(wellcond.__file__)
"""


def test_a_new_field_is_all_that_an_option_takes(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(PACKAGE, tmp_path / "wellcond", ignore=shutil.ignore_patterns("__pycache__")))
    file = copy / "lab" / "runs" / "training_options.py"
    before = "    deterministic: bool = "
    text = file.read_text(encoding="utf-8")
    assert text.count(before) == 1
    file.write_text(text.replace(before, NEW + before), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(copy / "__init__.py")
