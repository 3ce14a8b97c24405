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


def test_the_benchmark_of_layers_steps_finds_what_norms_are_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("timing", "measured"):
        loaded(name, monkeypatch)
    steps = loaded("layer_steps", monkeypatch)
    plain = "SGD() @ 0.01"
    fixed = "SGD() + FeatureWhitening(norm='fixed', solve_warmup=False, solve_every=1, stats_every=1) @ 0.01"
    file = tmp_path / "out.json"
    few = "--image-size 8 --train-images 64 --batch 16 --epochs 2 --seeds 1"
    monkeypatch.setattr(sys, "argv", ["x", plain, fixed, *few.split(), "--json", str(file)])
    steps.main()
    rows = json.loads(file.read_text())["results"]
    # Plain steps are as long as gradients are; fixed ones are all alike, but for what the weights' norms change.
    assert rows[plain]["steps unlike"][0] == pytest.approx(rows[plain]["gradients unlike"][0], rel=0.05)
    assert rows[fixed]["steps unlike"][0] < 0.01 < rows[fixed]["gradients unlike"][0]
    assert rows[fixed]["layers unlike"][0] < rows[plain]["layers unlike"][0]


def test_the_benchmark_of_linear_heads_on_few_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timing", "measured"):
        loaded(name, monkeypatch)
    heads = loaded("linear_head", monkeypatch)
    few = "--train-images 60 --val-images 40 --filters 2 --cells 2 --epochs 2 --batch 20 --seeds 2 --rates 3"
    file = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["x", *few.split(), "--json", str(file)])
    heads.main()
    found = json.loads(file.read_text())
    results = found["results"]
    assert results.keys() == {*heads.METHODS, heads.LBFGS, heads.SCIKIT}
    assert all(len(results[name]) == 3 for name in heads.METHODS)
    runs = [run for rates in results.values() for own in rates.values() for run in own]
    assert len(runs) == 2 * (3 * len(heads.METHODS) + 2)
    assert all(run["excess"] > -1e-4 and 0 <= run["test"] <= 100 for run in runs)  # nothing is below the minimum
    assert all(run["excess"] < 0.01 and 0 < run["epochs"] < 1000 for run in results[heads.LBFGS][""])
    assert all(run["excess"] < 0.01 and 0 < run["epochs"] < 1000 for run in results[heads.SCIKIT][""])
    (table,) = found["tables"]
    assert all(len(row) == len(table["heads"]) for row in table["rows"])


def test_a_minimum_is_where_the_gradient_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timing", "measured"):
        loaded(name, monkeypatch)
    heads = loaded("linear_head", monkeypatch)
    torch.manual_seed(0)
    rows = torch.randn(40, 6), torch.randint(3, (40,))
    problem = heads.Problem(rows, rows, rows, 3, 1e-2)
    weight = problem.head().double().weight
    heads.lbfgs(problem, weight, max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-16)
    (gradient,) = torch.autograd.grad(problem.whole_loss(weight), weight)
    assert gradient.abs().max() < 1e-8
    assert heads.minimum(problem) == pytest.approx(problem.whole_loss(weight).item(), rel=1e-12)


def test_the_benchmark_of_tasks_in_a_row_writes_what_tables_quote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded("timing", monkeypatch)
    loaded("measured", monkeypatch)
    continual = loaded("continual", monkeypatch)
    options = "--data digits --train-images 100 --width 16 --steps 1 --seeds 2"
    file = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/continual.py", *options.split(), "--json", str(file)])
    continual.main()
    found = json.loads(file.read_text())
    assert found["results"].keys() == {*continual.GRID, "projection of gradients alone"}
    assert all(len(values) == 2 for row in found["results"].values() for values in row.values())
    monkeypatch.syspath_prepend(str(FOLDER.parent / "docs"))
    quote = importlib.import_module("quote_results")
    table = quote.measured_table(found)
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    assert rows[2:] == [f"| {name}" for name in found["results"]]


def test_a_benchmarks_command_names_files_without_the_folders_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = loaded("timing", monkeypatch)
    words = ["/home/someone/benchmarks/x.py", "--data", "/data of mine/cifar.parquet", "--json", "docs/results/x.json"]
    monkeypatch.setattr(sys, "argv", words)
    command = timing.setting(argparse.Namespace(), torch.device("cpu"))["command"]
    assert command == "python x.py --data cifar.parquet --json docs/results/x.json"


def test_the_benchmarks_of_stale_statistics_on_tiny_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = loaded("stale_networks", monkeypatch)
    for name, value in {"BATCH": 32, "HIGH_EPOCHS": 2, "KEPT_EPOCHS": 2, "FALLING_EPOCHS": 1}.items():
        monkeypatch.setattr(stale, name, value)
    options = "--data digits --image-size 8 --train-images 96 --test-images 60 --networks resnet8 --seeds 0 1"
    work = ["--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["x", *options.split(), *work])
    stale.main()
    mended = loaded("statistics_repair", monkeypatch)
    corrupted = loaded("test_time", monkeypatch)
    for module, more in ((mended, []), (corrupted, ["--corrupted", "16"])):
        file = tmp_path / f"{module.__name__}.json"
        monkeypatch.setattr(sys, "argv", ["x", *options.split(), *work, *more, "--json", str(file)])
        module.main()
        found = json.loads(file.read_text())
        (table,) = found["tables"]
        assert all(len(row) == len(table["heads"]) for row in table["rows"])
        assert str(tmp_path) not in file.read_text()
        rows = found["results"]["resnet8"]
        assert len(rows) == 2
        if module is mended:
            assert tuple(rows[0]) == mended.DAMAGES
            merged = rows[0][mended.MERGE]
            assert 0 <= merged["damaged"] <= 100
            assert {"calibrate, 64", "calibrate, 512", "update_bn, 512"} <= merged["repairs"].keys()
            assert "bias correction, 512" in rows[0]["W3, per tensor"]["repairs"]
            assert all(own["seconds"] > 0 for own in merged["repairs"].values())
        else:
            assert tuple(rows[0]) == tuple(corrupted.CORRUPTIONS)
            assert rows[0]["noise"]["AlphaBN"].keys() == {"1", "4", "16"}
            assert rows[0]["blur"] != rows[0]["none"]


def test_the_benchmark_of_a_frozen_detector_on_few_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded("stale_networks", monkeypatch)
    loaded("statistics_repair", monkeypatch)
    detector = loaded("frozen_detector", monkeypatch)
    file = tmp_path / "out.json"
    few = "--seeds 1 --pretraining 1 --images 4 --test-images 2 --seen 2"
    monkeypatch.setattr(sys, "argv", ["x", *few.split(), "--json", str(file)])
    detector.main()
    found = json.loads(file.read_text())["results"]
    assert found["0"].keys() == {"frozen", "frozen, calibrated"}
    assert found["1"].keys() == found["2"].keys() == detector.WAYS.keys()


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
