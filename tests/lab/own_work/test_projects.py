"""Three complete projects of users, written against the docs alone: compared, killed, resumed, reported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stopped_runs import stop_at

from wellcond.lab.cli.main import main
from wellcond.lab.training.run_memory import RunMemory

PROJECTS = Path(__file__).parent / "projects"
COMMANDS = {
    "digits": "--task digits_project.training:Digits --task-args width=6 smoothing=0.1 --methods SGDM,W-SGDM",
    "lightning": "--task lit_project.module:LitModel --data-module lit_project.data:LitData --data-args batch_size=40 "
    "--methods SGDM,SGDM+GC",
    "gpt": "--task gpt_project/gpt.py:Characters --methods AdamW,W-Adam",
}
SMALL = "--seeds 1 --quiet"
GRID = {"digits": "--lrs SGD=0.1,0.3", "lightning": "--lrs SGD=0.1", "gpt": "--lrs AdamW=0.01"}
KILLED = f"--task digits_project.training:Digits --methods SGDM --lrs SGD=0.1 {SMALL}"
DIRECTIONS = {"digits": ("accuracy", 1), "lightning": ("acc", 1), "gpt": ("bits per character", -1)}


@pytest.fixture
def project(tmp_path, monkeypatch):
    shutil.copytree(PROJECTS, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(RunMemory, "of", lambda self, spec, data: None)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("digits_project", "lit_project", "gpt")]:
        del sys.modules[name]


def scores_in(folder):
    """Return every run's measured numbers, by its file's name without the digest."""
    return {
        path.name.rpartition("-")[0]: [
            {key: value for key, value in epoch.items() if key != "seconds"}
            for epoch in json.loads(path.read_text())["result"]["epochs"]
        ]
        for path in (folder / "runs").glob("*.json")
    }


@pytest.mark.usefixtures("quick_collections")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_project_is_compared_stopped_and_continued(name, project, capsys):
    command = ["compare", *f"{COMMANDS[name]} {GRID[name]} {SMALL}".split()]
    with stop_at(13):
        assert main([*command, "--checkpoint-every", "0", "--out", "stopped"]) == 1
    assert main([*command, "--out", "stopped"]) == 0
    assert main([*command, "--out", "whole"]) == 0
    whole = scores_in(project / "whole")
    continued = scores_in(project / "stopped")
    # Runs at equal wall time hang on times.
    both = [key for key in whole if key in continued]
    assert len(both) >= 2
    assert all(whole[key] == continued[key] for key in both)
    results = json.loads((project / "whole" / "results.json").read_text())
    metric, sign = DIRECTIONS[name]
    assert results["score"] == metric
    assert any(sign * run[-1]["test_score"] > sign * run[0]["test_score"] for run in whole.values())
    assert metric in (project / "whole" / "report.html").read_text()
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (project / "whole" / "runs").iterdir()}
    assert main([*command, "--out", "whole"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (project / "whole" / "runs").iterdir()} == before


def test_a_killed_comparison_of_a_project_goes_on(project):
    command = [sys.executable, "-m", "wellcond", "compare", *KILLED.split()]
    process = subprocess.Popen([*command, "--checkpoint-every", "0", "--out", "killed"])
    while not list((project / "killed").glob("runs/*.ckpt")):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert main([*command[3:], "--out", "killed"]) == 0
    assert not list((project / "killed").glob("runs/*.ckpt"))
