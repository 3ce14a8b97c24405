"""`wellcond bench` on a user's own task."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from wellcond.lab.cli.main import main

PROJECTS = Path(__file__).parent / "projects"


def test_the_cost_of_methods_on_ones_own_network(tmp_path, monkeypatch, capsys):
    shutil.copytree(PROJECTS / "gpt_project", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    task = "--task gpt.py:Characters --task-args width=16"
    assert main(["bench", *task.split(), "--methods", "AdamW,W-Adam", "--rounds", "2", "--json", "cost.json"]) == 0
    sys.modules.pop("gpt", None)
    assert "GPT, batch 16" in capsys.readouterr().out
    found = json.loads(Path("cost.json").read_text())
    assert found["settings"]["task"] == "gpt.py:Characters"
    plain, whitened = found["methods"]
    assert whitened["memory"]["optimizer_state"] > plain["memory"]["optimizer_state"] > 0
    assert whitened["refresh"]["solve_ms"] > 0
