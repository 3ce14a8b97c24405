"""What switchable normalizations learned: read from the trained network, kept with the run, summed up, drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch

import wellcond.nn as layers
from wellcond.__main__ import main
from wellcond.lab.methods.method import METHODS
from wellcond.lab.networks.registry import initial_model
from wellcond.lab.plan import make_plan
from wellcond.lab.report.findings import describe_comparison
from wellcond.lab.report.shares import summarize_shares
from wellcond.lab.report.styles import _BY_LAYERS, _BY_TECHNIQUE
from wellcond.lab.runs.records import RunStore
from wellcond.lab.runs.settings import Settings
from wellcond.lab.training.extras import collect_extras, read_shares
from wellcond.lab.training.runner import Runner

NAMES = ["0.1", "1.first.1", "1.second.1", "2.first.1", "2.second.1", "2.shortcut.1", "3.first.1", "3.second.1"]


def layer(*values: float, var: tuple[float, ...] | None = None) -> dict[str, dict[str, float]]:
    """Return one layer's shares of IN, LN and BN."""
    return {
        part: dict(zip(("in", "ln", "bn"), some, strict=True))
        for part, some in (("mean", values), ("var", var or values))
    }


def test_shares_are_those_of_the_logits_in_the_models_order():
    model = METHODS["SN"].with_layers(initial_model("resnet8", 3, 10, seed=0))
    generator = torch.Generator().manual_seed(1)
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, layers.SwitchableNorm2d):
            with torch.no_grad():
                module.mean_logits.copy_(torch.randn(3, generator=generator))
                module.var_logits.copy_(torch.randn(3, generator=generator))
            expected[name] = [
                [value / sum(weights) for value in weights]
                for weights in (module.mean_logits.double().exp().tolist(), module.var_logits.double().exp().tolist())
            ]
    found = read_shares(model)
    assert list(found) == list(expected)
    assert list(found)[:8] == NAMES
    for name, (mean, var) in expected.items():
        assert list(found[name]["mean"]) == ["in", "ln", "bn"]
        assert list(found[name]["mean"].values()) == pytest.approx(mean, rel=1e-6)
        assert list(found[name]["var"].values()) == pytest.approx(var, rel=1e-6)


def test_a_network_without_switches_has_no_extras():
    assert collect_extras(initial_model("convnet", 1, 10, seed=0)) == {}


@pytest.fixture(scope="module")
def plan():
    return make_plan(Settings(methods=("SGDM", "SN"), epochs=1, train_images=96, seeds=1, ghost_batch=2))


def test_a_run_keeps_its_shares_and_a_diverged_one_none(plan, tmp_path):
    runner, store = Runner(plan.task, torch.device("cpu")), RunStore(tmp_path)
    spec = plan.spec(METHODS["SN"], 0.1, seed=0)
    record = runner.run(spec)
    assert list(record.extras) == ["shares"]
    shares = record.extras["shares"]
    assert list(shares) == ["0.1", "1.1", "3.1"]
    for one in shares.values():
        for part in ("mean", "var"):
            assert sum(one[part].values()) == pytest.approx(1)
            assert len(set(one[part].values())) == 3  # no longer those that it began with
    store.save(spec, record)
    assert store.load(spec) == record
    diverged = runner.run(replace(spec, lr=1e30))
    assert diverged.diverged
    assert diverged.extras == {}


def test_a_run_that_was_kept_before_there_were_extras_is_still_read(plan, tmp_path):
    store, spec = RunStore(tmp_path), plan.spec(METHODS["SGDM"], 0.1, seed=0)
    record = Runner(plan.task, torch.device("cpu")).run(spec)
    store.save(spec, record)
    content = json.loads(store.path(spec).read_text())
    del content["result"]["extras"]
    store.path(spec).write_text(json.dumps(content))
    assert store.load(spec) == record


def test_averages_are_taken_over_layers_first_then_over_seeds():
    seeds = [
        {"a": layer(0.2, 0.3, 0.5), "b": layer(0.4, 0.4, 0.2, var=(0.1, 0.1, 0.8))},
        {"a": layer(0.6, 0.1, 0.3), "b": layer(0.5, 0.5, 0.0, var=(0.3, 0.3, 0.4))},
    ]
    shares = summarize_shares([seeds[0], None, seeds[1]])
    assert shares.layers == ("a", "b")
    assert shares.kinds == ("in", "ln", "bn")
    assert not shares.shared
    ln = shares.average("mean", "ln")
    assert (ln.mean, ln.std, ln.count) == (pytest.approx(0.325), pytest.approx(stdev([0.35, 0.3])), 2)
    bn = shares.of_layer("b", "var", "bn")
    assert (bn.mean, bn.std) == (pytest.approx(fmean([0.8, 0.4])), pytest.approx(stdev([0.8, 0.4])))
    assert summarize_shares([None, None]) is None
    assert summarize_shares([]) is None


def test_methods_of_other_layers_or_transforms_are_drawn_differently():
    styles = [*_BY_LAYERS.values(), *_BY_TECHNIQUE.values()]
    assert len({(style.light, style.marker) for style in styles}) == len(styles)
    assert {method.norm.kind for method in METHODS.values() if method.norm is not None} <= set(_BY_LAYERS)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a small comparison with switchable normalization, and what it printed."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("shares")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        arguments = ["--methods", "SGDM,SN,SSN", "--ghost-batch", "2", "--seeds", "2", "--epochs", "2"]
        arguments += ["--train-images", "96", "--lrs", "SGD=0.1", "--out", str(folder)]
        assert main(["compare", *arguments]) == 0
    return folder, printed.getvalue()


def test_results_have_every_seeds_shares(compared):
    content = json.loads((compared[0] / "results.json").read_text())
    baseline, sn, ssn = content["methods"]
    assert baseline["extras"] == {}
    for method in (sn, ssn):
        assert [list(seed) for seed in method["extras"]["shares"]] == [["0.1", "1.1", "3.1"]] * 2
    first, second = sn["extras"]["shares"]
    assert first != second


def test_a_finding_says_the_average_shares(compared):
    folder, printed = compared
    content = json.loads((folder / "results.json").read_text())
    sn = next(line for line in content["findings"] if line.startswith("SN learned"))
    seeds = content["methods"][1]["extras"]["shares"]
    ln = [fmean(one["mean"]["ln"] for one in seed.values()) for seed in seeds]
    assert "on average over 3 layers" in sn
    assert f"{fmean(ln):.3f} ± {stdev(ln):.3f} (LN)" in sn
    assert sn.endswith("of the variances.")
    ssn = next(line for line in content["findings"] if line.startswith("SSN learned"))
    assert ssn.endswith("of the means and variances.")
    assert "SN learned these shares" in printed
    assert not any("learned" in line for line in content["findings"] if line not in (sn, ssn))


def test_the_report_draws_each_layers_shares(compared):
    page = (compared[0] / "report.html").read_text()
    assert "What SN learned" in page
    assert "What SSN learned" in page
    assert "What SGDM learned" not in page
    # Gain against cost; curves of score and loss over two axes; SN's means and variances; SSN's shares serve both.
    # And the training score, and each seed's final score.
    assert page.count("<figure>") == 1 + 4 + 2 + 1 + 1 + 1
    for title in ("SN, means", "SN, variances", "SSN, means and variances"):
        assert f"<figcaption>{title}</figcaption>" in page
    for kind in ("IN", "LN", "BN"):
        assert f"({kind})</title>" in page
    assert "average over layers" in page
    assert '<th scope="row">2: 1.1</th>' in page
    assert "http" not in page


def test_a_comparison_of_one_method_still_says_what_it_learned():
    from wellcond.lab.comparison.compare import compared
    from wellcond.lab.comparison.summing_up import summarize

    plan = make_plan(Settings(methods=("SN",), epochs=1, train_images=96, seeds=1, lrs=(("SGD", (0.1,)),)))
    method = plan.methods[0]
    spec = plan.spec(method, 0.1, seed=0)
    record = Runner(plan.task, torch.device("cpu")).run(spec)
    said = describe_comparison(summarize(compared(plan, {spec: record})))
    assert len(said) == 2
    assert said[0].startswith("Only baselines")
    assert said[1].startswith("SN learned these shares, on average over 3 layers: 0.3")
    assert "±" not in said[1]
