"""Normalization layers as methods: which layers train, on the same weights, in which groups, on which schedule."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import wellcond.nn as layers
from wellcond.__main__ import main
from wellcond.lab.methods.method import METHODS, method
from wellcond.lab.methods.norms import NormSpec, trained_norm
from wellcond.lab.networks.registry import initial_model
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.settings import Settings
from wellcond.lab.training.runner import Runner, Training

OF_METHOD = {
    "MBN": "MomentumBatchNorm2d",
    "MBN-derived": "MomentumBatchNorm2d",
    "BSR": "BSRBatchNorm2d",
    "BSR-nnls": "BSRBatchNorm2d",
    "EvalNorm": "EvalNorm2d",
    "EvalNorm-fixed": "EvalNorm2d",
    "BRN": "BatchRenorm2d",
    "MABN": "MovingAverageBatchNorm2d",
    "CBN": "CrossIterationBatchNorm2d",
    "EvalNorm-chosen": "EvalNorm2d",
    "PN": "PopulationNorm2d",
    "PN+gamma-decay": "PopulationNorm2d",
    "GN": "GroupNorm",
    "GN+GC-conv": "GroupNorm",
    "SN": "SwitchableNorm2d",
    "SSN": "SparseSwitchableNorm2d",
    "IBN": "InstanceBatchNorm2d",
    "KN": "KalmanBatchNorm2d",
    "KN-fixed": "KalmanBatchNorm2d",
    "IterNorm": "IterNorm2d",
    "DBN": "DecorrelatedBatchNorm2d",
    "LN": "GroupNorm",
    "IN": "InstanceNorm2d",
}
# Parameters that layers have beside γ and β, by their names in the layer.
ADDED = {
    "SN": {"mean_logits", "var_logits"},
    "SSN": {"mean_logits"},
    "KN": {"transition", "transition_bias", "log_noise", "gain_logit"},
}
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.InstanceNorm2d)


def norms_of(name: str, ghost_batch: int | None = None, model: str = "resnet8") -> list[nn.Module]:
    """Return the normalization layers that a method trains with."""
    network = METHODS[name].with_layers(initial_model(model, 3, 10, seed=0), ghost_batch)
    return [module for module in network.modules() if isinstance(module, NORMS)]


def test_every_method_with_layers_is_known_here():
    assert set(OF_METHOD) == {name for name, method in METHODS.items() if method.norm is not None}
    assert all(METHODS[name].baseline == "SGDM" for name in OF_METHOD)


@pytest.mark.parametrize("ghost_batch", [None, 2])
@pytest.mark.parametrize("name", list(OF_METHOD))
def test_every_batch_normalization_is_replaced(name, ghost_batch):
    found = norms_of(name, ghost_batch)
    assert len(found) == 9
    assert {type(module).__name__ for module in found} == {OF_METHOD[name]}
    if OF_METHOD[name] == "GroupNorm":
        assert {module.num_groups for module in found} == {1 if name == "LN" else 8}
    elif name != "IN":
        assert {module.group_size for module in found} == {ghost_batch}


@pytest.mark.parametrize("name", ["SGDM", "W-SGDM", "AdamW"])
def test_plain_methods_take_ghost_groups_only_when_asked_to(name):
    assert {type(module) for module in norms_of(name)} == {nn.BatchNorm2d}
    found = norms_of(name, 4)
    assert {type(module) for module in found} == {layers.GhostBatchNorm2d}
    assert {module.group_size for module in found} == {4}


def test_options_reach_the_layers():
    assert {module.nonneg for module in norms_of("BSR-nnls")} == {"nnls"}
    assert {module.nonneg for module in norms_of("BSR")} == {"clamp"}
    assert {module.learn for module in norms_of("EvalNorm-fixed")} == {False}
    assert {module.learn for module in norms_of("EvalNorm")} == {True}
    assert {module.momentum for module in norms_of("PN")} == {0.01}  # not that of the batch normalization it replaces
    assert {module.shared_logits for module in norms_of("SSN")} == {True}
    assert {module.shared_logits for module in norms_of("SN")} == {False}
    assert {module.learned for module in norms_of("KN")} == {True}
    assert {module.learned for module in norms_of("KN-fixed")} == {False}


@pytest.mark.parametrize("name", list(OF_METHOD))
def test_layers_keep_the_weights_that_the_seed_gives(name):
    plain = initial_model("resnet8", 3, 10, seed=3)
    converted = METHODS[name].with_layers(initial_model("resnet8", 3, 10, seed=3), 2)
    expected = dict(plain.named_parameters())
    added = set()
    for key, parameter in converted.named_parameters():
        key = key.replace(".parametrizations.weight.original", ".weight")  # what MABN centralizes
        if key in expected:
            assert torch.equal(parameter, expected.pop(key))
        else:
            added.add(key.rpartition(".")[2])
    assert not expected
    assert added == ADDED.get(name, set())


def test_group_normalization_has_no_groups_of_the_batch():
    norm = METHODS["GN"].norm
    assert not norm.has_batch_statistics
    assert trained_norm(norm, 2) == norm
    assert "no batch statistics" in METHODS["GN"].description


@pytest.fixture(scope="module")
def plan():
    return make_plan(Settings(epochs=2, train_images=200, seeds=1, ghost_batch=2))


@pytest.fixture(scope="module")
def runner(plan):
    return Runner(plan.task, torch.device("cpu"))


def test_inference_methods_train_exactly_as_their_baseline_does(plan, runner):
    records = {
        name: runner.run(plan.spec(METHODS[name], 0.1, seed=0))
        for name in ("SGDM", "EvalNorm", "EvalNorm-fixed", "BSR", "BSR-nnls")
    }
    losses = {name: [epoch.train_loss for epoch in record.epochs] for name, record in records.items()}
    for name, loss in losses.items():
        assert loss == pytest.approx(losses["SGDM"], rel=1e-6), name
    tested = {name: record.epochs[0].test_loss for name, record in records.items()}
    assert len(set(tested.values())) == len(tested)  # but each infers in its own way


def test_methods_that_train_otherwise_do_so(plan, runner):
    losses = {
        name: runner.run(plan.spec(METHODS[name], 0.1, seed=0)).epochs[-1].train_loss
        for name in ("SGDM", *OF_METHOD)
        if not name.startswith(("BSR", "EvalNorm"))  # these infer otherwise
    }
    assert len(set(losses.values())) == len(losses)


def test_ghost_groups_change_training_but_for_group_normalization(plan, runner):
    for name in ("SGDM", "MBN", "GN"):
        spec = plan.spec(METHODS[name], 0.1, seed=0)
        grouped, whole = (runner.run(replace(spec, ghost_batch=members)).epochs[-1] for members in (2, None))
        assert (grouped.train_loss == whole.train_loss) == (name == "GN")


def seen_in_training(runner, monkeypatch, spec, read) -> list[float]:
    """Return what `read` finds in the first layer at the beginning of every step."""
    seen = []
    original = Training.training_step

    def training_step(self, batch, batch_index):
        seen.append(read(next(module for module in self.model.modules() if isinstance(module, NORMS))))
        return original(self, batch, batch_index)

    monkeypatch.setattr(Training, "training_step", training_step)
    runner.run(spec)
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize(("name", "end"), [("MBN", 1 - 2 / 32), ("MBN-derived", 30 / 34)])
def test_the_momentum_rises_after_each_epoch(plan, runner, monkeypatch, name, end):
    spec = plan.spec(METHODS[name], 0.1, seed=0, steps=5 * plan.steps_per_epoch)
    seen = seen_in_training(runner, monkeypatch, spec, lambda layer: layer.stat_momentum)
    by_epoch = [seen[step : step + 6] for step in range(0, 30, 6)]
    assert all(len(set(epoch)) == 1 for epoch in by_epoch)
    rising = [epoch[0] for epoch in by_epoch]
    assert rising[0] == 0
    assert rising[:4] == sorted(set(rising[:4]))
    # 0.9 of 5 epochs, rounded: the end value comes in the fourth and stays.
    assert rising[3:] == pytest.approx([end, end])


def test_the_momentum_follows_the_batch_where_there_are_no_groups(plan, runner, monkeypatch):
    spec = replace(
        plan.spec(METHODS["MBN"], 0.1, seed=0, steps=24), ghost_batch=None, batch_size=16, steps_per_epoch=12
    )
    seen = seen_in_training(runner, monkeypatch, spec, lambda layer: layer.stat_momentum)
    assert (seen[0], seen[-1]) == (0, pytest.approx(0.5))
    whole = replace(spec, batch_size=32, steps_per_epoch=6)
    assert set(seen_in_training(runner, monkeypatch, whole, lambda layer: layer.stat_momentum)) == {0}


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_the_bounds_of_renormalization_open_within_any_run(plan, runner, monkeypatch, steps):
    spec = plan.spec(METHODS["BRN"], 0.1, seed=0, steps=steps)
    seen = seen_in_training(runner, monkeypatch, spec, lambda layer: (layer.r_max, layer.d_max))
    assert len(seen) == steps
    assert seen[0] == (1, 0)
    if steps == 12:
        assert seen == sorted(seen)
        assert seen[4:] == [(3, 5)] * 8  # the paper's shares: r_max is open after 40/130 of the run


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_the_switches_close_with_the_last_step(plan, runner, monkeypatch, steps):
    spec = plan.spec(METHODS["SSN"], 0.1, seed=0, steps=steps)
    seen = seen_in_training(runner, monkeypatch, spec, lambda layer: layer.radius)
    assert seen == pytest.approx([step / steps for step in range(steps)])
    for layer in runner.run(spec).extras["shares"].values():
        assert sorted(layer["mean"].values()) == [0, 0, 1]
        assert layer["mean"] == layer["var"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SGDM + norm=mabn", {(20, 50)}),
        ("SGDM + norm=mabn(warmup_steps=3)", {(3, 50)}),
        ("SGDM + norm=cbn", {50}),
        ("SGDM + norm=cbn(burn_in=0)", {0}),
    ],
)
def test_averages_over_batches_begin_within_any_run(text, expected):
    found = method(text)
    model = found.with_layers(initial_model("convnet", 1, 10, seed=0))
    found.norm.fit_to_run(model, 200)
    layer_type = layers.CrossIterationBatchNorm2d if "cbn" in text else layers.MovingAverageBatchNorm2d
    of_model = [module for module in model.modules() if isinstance(module, layer_type)]
    seen = {layer.burn_in if "cbn" in text else (layer.warmup_steps, layer.scale_after) for layer in of_model}
    assert seen == expected


def test_a_method_without_batch_statistics_is_the_same_run_in_any_groups(plan):
    assert plan.settings.ghost_batch == 2
    assert plan.spec(METHODS["GN"], 0.1, seed=0).ghost_batch is None
    assert {plan.spec(METHODS[name], 0.1, seed=0).ghost_batch for name in ("SGDM", "SN", "FSGD")} == {2}


@pytest.mark.parametrize(
    ("steps", "epochs", "rising"), [(1, 1, 1), (6, 1, 1), (7, 2, 2), (60, 10, 9), (59, 10, 9), (1200, 200, 180)]
)
def test_a_schedule_is_complete_within_its_run(steps, epochs, rising):
    model = METHODS["MBN"].with_layers(initial_model("convnet", 1, 10, seed=0))
    schedule = METHODS["MBN"].norm.make_schedule(model, steps, 6, members=2)
    assert schedule.scheduler.total_epochs == rising
    assert not schedule.every_step
    assert NormSpec("bsr").make_schedule(model, steps, 6, members=2) is None


@pytest.fixture(scope="module")
def compared(tmp_path_factory, quick_collections):
    """The folder of a small comparison in ghost groups, and what it printed."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("norms")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        arguments = ["--methods", "SGDM,EvalNorm-fixed,BSR,BSR-nnls,GN,SGDM+GC", "--ghost-batch", "2", "--seeds", "2"]
        arguments += ["--epochs", "2", "--train-images", "96", "--lrs", "SGD=0.1"]
        arguments += ["--val-images", "100", "--test-images", "100"]
        assert main(["compare", *arguments, "--out", str(folder)]) == 0
    return folder, printed.getvalue()


def test_results_say_what_was_grouped(compared):
    folder, printed = compared
    content = json.loads((folder / "results.json").read_text())
    assert content["settings"]["ghost_batch"] == 2
    assert content["title"].endswith("2 epochs of 3 steps, ghost groups of 2")
    assert content["title"] in printed
    page = (folder / "report.html").read_text()
    assert content["title"] in page
    assert "<dt>ghost batch</dt><dd>2</dd>" in page
    assert "norm=ghost(group_size=2)" in page
    assert "norm=bsr(nonneg=&#39;nnls&#39;, group_size=2)" in page
    assert "norm=gn(num_groups=8)</code>" in page
    assert any("groups of 2" in note for note in content["notes"])
    assert "which has no batch statistics" in page


def test_evaluation_is_timed_where_layers_differ(compared):
    folder, printed = compared
    content = json.loads((folder / "results.json").read_text())
    ratios = {method["name"]: method["evaluation_ratio"] for method in content["methods"]}
    assert {name for name, ratio in ratios.items() if ratio is None} == {"SGDM", "SGDM+GC"}
    assert all(0.1 < ratio < 100 for ratio in ratios.values() if ratio is not None)
    assert "time/image" in printed
    assert f"{ratios['BSR']:.2f} times (BSR)" in next(line for line in content["findings"] if "Evaluating" in line)
    assert "time/image" in (folder / "report.html").read_text()


def test_a_page_quotes_groups_and_evaluation(compared):
    folder, _ = compared
    file = Path(__file__).parents[3] / "docs" / "quote_results.py"
    module = importlib.util.spec_from_file_location("quote_results", file)
    quotes = importlib.util.module_from_spec(module)
    module.loader.exec_module(quotes)
    table = quotes.comparison_table(json.loads((folder / "results.json").read_text()))
    assert "ghost groups of 2; 2 paired seeds" in table
    heading = next(line for line in table.splitlines() if line.startswith("| method"))
    assert heading.endswith("| time/image | training loss |")
    rows = [line for line in table.splitlines() if line.startswith(("| SGDM", "| BSR", "| GN"))]
    assert [row.count("|") for row in rows] == [heading.count("|")] * len(rows)
    assert len(rows) == 5


def test_tables_fit_a_page_with_the_longest_names(compared):
    _, printed = compared
    lines = [line.rstrip() for line in printed.splitlines() if not line.startswith("Written")]
    assert max(map(len, lines)) <= 120
    assert "…" not in printed
