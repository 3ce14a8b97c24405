"""The benchmark of fidelity on tiny data, and that no benchmark tells where a machine keeps its files."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


def loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_of_fidelity_compares_every_form_with_the_dense_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fidelity = loaded("fidelity", monkeypatch)
    options = "--data digits --image-size 8 --train-images 64 --batch 16 --steps 2 --observed 2 --seeds 1"
    file = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/fidelity.py", *options.split(), "--json", str(file)])
    fidelity.main()
    found = json.loads(file.read_text())
    rows = found["results"]
    assert rows.keys() == fidelity.FORMS.keys()
    for power in ("1/2", "1"):
        assert rows["dense"]["mean_cosine"][power] == pytest.approx(1, abs=1e-9)
        plain, blocks = (rows[name]["mean_cosine"][power] for name in ("plain gradient", "blocks"))
        assert 0 < plain < blocks < 1
        assert len(rows["blocks"]["cosine"][power]) == 6
    kept = {name: row["kept"] for name, row in rows.items()}
    assert kept["plain gradient"] == 0
    assert 0 < kept["kronecker"] < kept["blocks, rank 8"] < kept["blocks"] < kept["dense"]
    assert found["command"] == f"python benchmarks/fidelity.py {options} --json out.json"
    assert str(tmp_path) not in file.read_text()


def test_a_benchmarks_command_names_files_without_the_folders_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = loaded("timing", monkeypatch)
    words = ["/home/someone/benchmarks/x.py", "--data", "/data of mine/cifar.parquet", "--json", "docs/results/x.json"]
    monkeypatch.setattr(sys, "argv", words)
    command = timing.setting(argparse.Namespace(), torch.device("cpu"))["command"]
    assert command == "python x.py --data cifar.parquet --json docs/results/x.json"


def test_the_run_on_a_gpu_runs_at_toy_size_without_one(tmp_path: Path) -> None:
    file = tmp_path / "on_gpu.json"
    command = [str(FOLDER / "on_gpu.sh"), "--toy", "--data", "digits", "--json", str(file)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"})
    parts = json.loads(file.read_text())["parts"]
    assert list(parts) == ["resnet50", "gpt", "solvers", "norms", "training", "tests"]
    for model in ("resnet50", "gpt"):
        rows = {name: row for name, row in parts[model].items() if isinstance(row, dict) and name != "plain"}
        assert {"GC", "auto", "auto, p=1"} <= rows.keys()
        assert all(row["amortised_ratio"][0] > 0 for row in rows.values())
        assert rows["GC"]["state_share"] == 0 < rows["auto"]["state_share"]
    assert all(row["residual"] < 1e-4 for name, row in parts["solvers"].items() if name != "took_seconds")
    assert parts["norms"]["training"]["nn.BatchNorm2d"]["ratio"] == 1
    assert parts["training"].keys() >= {"SGDM", "W-SGDM+GC"}
    assert parts["tests"]["skipped"] == "no GPU"
