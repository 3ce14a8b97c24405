"""Text, tables and frozen features as tasks: their parts and batches, their scores, runs that go on, bad files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from row_files import PHRASE, write_array, write_csv, write_features, write_parquet_table, write_text
from stopped_runs import stop_after, uncounted
from torch import nn

from wellcond.__main__ import main
from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import METHODS
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.tasks.open import open_task
from wellcond.lab.training.checkpoint import Checkpointing
from wellcond.lab.training.run_memory import RunMemory
from wellcond.lab.training.runner import Runner

CPU = torch.device("cpu")
WRITERS: dict[str, Callable[[Path], Path]] = {
    "text": write_text,
    "csv": write_csv,
    "parquet": write_parquet_table,
    "npy": write_array,
    "npz": write_features,
}
pytestmark = pytest.mark.usefixtures("quick_collections")


@pytest.fixture(autouse=True)
def _memory_is_not_counted(monkeypatch):
    monkeypatch.setattr(RunMemory, "of", uncounted)


@pytest.fixture(scope="module", params=WRITERS)
def file(request, tmp_path_factory):
    return WRITERS[request.param](tmp_path_factory.mktemp("rows"))


def settings_of(file: Path, **options) -> Settings:
    return Settings(data=str(file), epochs=2, seeds=1, methods=("AdamW", "W-Adam"), **options)


def without_seconds(record):
    epochs = tuple(replace(epoch, seconds=0.0) for epoch in record.epochs)
    return replace(record, epochs=epochs, evaluation_seconds=None)


def test_a_run_is_the_same_though_stopped_and_learns(file, tmp_path):
    plan = make_plan(replace(settings_of(file), batch_size=16))
    spec = plan.spec(METHODS["W-Adam"], 0.01, seed=0)
    first = Runner(plan.task, CPU).run(spec)
    checkpoints = Checkpointing(tmp_path, every=0.0)
    steps = plan.steps_per_epoch + 1
    stop_after(plan.task, checkpoints, spec, steps=steps)
    assert checkpoints.file(spec).step() == steps
    again = Runner(open_task(plan.settings), CPU, checkpoints=checkpoints).run(spec)
    assert without_seconds(first) == without_seconds(again)
    assert not first.diverged
    metric = plan.task.metric
    assert metric.better(first.epochs[-1].test_score, plan.task.chance)
    assert (first.epochs[-1].train_score is not None) == (plan.task.kind == "classification")


def test_ranks_share_each_batch(file):
    plan = make_plan(replace(settings_of(file), batch_size=8))
    spec = plan.spec(METHODS["AdamW"], 0.01, seed=3)
    whole = plan.task.for_seed(spec, CPU, 0, 1).batches()
    shares = [plan.task.for_seed(spec, CPU, rank, 2).batches() for rank in range(2)]
    epochs = [list(whole), list(whole)]
    assert len(epochs[0]) == plan.steps_per_epoch == len(whole)
    for epoch in epochs:
        for batch, *parts in zip(epoch, *shares, strict=True):
            for place in range(2):
                assert torch.equal(torch.cat([part[place] for part in parts]), batch[place])
    assert not torch.equal(epochs[0][0].inputs, epochs[1][0].inputs)
    whole.resume_at(1, 2)
    assert all(torch.equal(*pair) for pair in zip(next(iter(whole)), epochs[1][2], strict=True))


def test_the_parts_of_a_seed_have_no_row_in_common(file):
    plan = make_plan(settings_of(file))
    task = plan.task
    assert task.kind != "language modelling" or task.test_images == task.validation_images
    seeds = [task.for_seed(plan.spec(METHODS["AdamW"], 0.01, seed), CPU, 0, 1) for seed in range(2)]
    for data in seeds:
        assert len(data.held_out["test"].targets) == task.test_images
        assert len(data.held_out["validation"].targets) == task.validation_images
    assert torch.equal(seeds[0].held_out["test"].targets, seeds[1].held_out["test"].targets)


def test_what_the_report_says_is_plain(file):
    task = make_plan(settings_of(file)).task
    assert re.fullmatch(r"[a-z-]+", task.name)
    described = task.describe()
    assert all(isinstance(value, (str, int)) for value in described.values()), described
    assert task.fingerprint() == make_plan(settings_of(file)).task.fingerprint()


def test_a_whole_comparison_from_the_command_line(tmp_path, capsys):
    file = write_csv(tmp_path)
    out = ["--out", str(tmp_path / "out"), "--lrs", "SGD=0.1", "--quiet"]
    assert main(["compare", "--data", str(file), "--methods", "SGDM,MBN", "--seeds", "2", "--epochs", "1", *out]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (tmp_path / "out" / "epochs.csv").read_text().splitlines()[0].endswith("train_score")
    page = re.sub(
        r"(?s)<style.*?</style>|<pre.*?</pre>|<svg.*?</svg>|<[^>]+>",
        " ",
        (tmp_path / "out" / "report.html").read_text(),
    )
    assert "image" not in page
    assert "time/row" in page
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert settings["train_rows"] == 144
    assert not any("image" in name for name in settings)


# text ---------------------------------------------------------------------------------------------------------------


def test_a_text_is_parted_in_its_order(tmp_path):
    plan = make_plan(settings_of(write_text(tmp_path), validation_images=3, test_images=4))
    task, length = plan.task, 40 * len(PHRASE)
    data = task.for_seed(plan.spec(METHODS["AdamW"], 0.01, 0), CPU, 0, 1)
    vocabulary = task.text.vocabulary

    def characters(tokens):
        return "".join(vocabulary[token] for token in tokens.flatten().tolist())

    assert characters(data.held_out["test"].targets) == (PHRASE * 40)[-4 * 64 :]
    assert characters(data.held_out["test"].inputs) == (PHRASE * 40)[-4 * 64 - 1 : -1]
    assert characters(data.held_out["validation"].targets) == (PHRASE * 40)[-7 * 64 - 1 : -4 * 64 - 1]
    assert task.trained_on == length - 7 * 64 - 2
    seen = {characters(row) for batch in data.batches() for row in batch.inputs}
    assert all(row in (PHRASE * 40)[: task.trained_on] for row in seen)
    for batch in data.batches():
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_bits_per_character_of_a_network_that_knows_nothing(tmp_path):
    plan = make_plan(settings_of(write_text(tmp_path)))
    data = plan.task.for_seed(plan.spec(METHODS["AdamW"], 0.01, 0), CPU, 0, 1)
    model = plan.task.initial_model(plan.template.model, 0, None)
    nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        found = data.evaluate(model, "test", Stopwatch(CPU))
    tokens = len(set(PHRASE))
    assert found.score == pytest.approx(math.log2(tokens)) == pytest.approx(plan.task.chance)
    assert found.loss == pytest.approx(math.log(tokens))
    assert found.images == plan.task.test_images
    assert not plan.task.metric.higher_is_better


@pytest.mark.parametrize("length", [10, 64, 200, 257])
def test_a_text_shorter_than_its_blocks(tmp_path, length):
    (tmp_path / "short.txt").write_text((PHRASE * 4)[:length])
    with pytest.raises(LabError, match=rf"{length} characters are too few: .* need 258"):
        open_task(settings_of(tmp_path / "short.txt"))


def test_the_shortest_text(tmp_path):
    (tmp_path / "short.txt").write_text((PHRASE * 4)[:258])
    plan = make_plan(settings_of(tmp_path / "short.txt"))
    assert (plan.task.train_images, plan.template.batch_size, plan.steps) == (1, 1, 2)
    with pytest.raises(LabError, match="2 that train need 322"):
        open_task(settings_of(tmp_path / "short.txt", train_images=2))


# tables -------------------------------------------------------------------------------------------------------------


def test_root_mean_squared_error_is_in_the_targets_unit(tmp_path):
    plan = make_plan(settings_of(write_array(tmp_path)))
    data = plan.task.for_seed(plan.spec(METHODS["AdamW"], 0.01, 0), CPU, 0, 1)
    model = plan.task.initial_model("linear", 0, None)
    with torch.no_grad():
        found = data.evaluate(model, "test", Stopwatch(CPU))
        inputs, targets = data.held_out["test"]
        told = data.objective.mean + data.objective.std * model(inputs)[:, 0].double()
    errors = (told - targets).numpy()
    assert found.score == pytest.approx(np.sqrt(np.square(errors).mean()))
    assert found.metrics["R2"] == pytest.approx(1 - np.square(errors).mean() / targets.numpy().var())
    assert plan.task.chance == pytest.approx(targets.numpy().std(), rel=0.1)
    trained = data.training.rows.targets
    assert (data.objective.mean, data.objective.std) == pytest.approx(
        (float(trained.mean()), float(trained.std(0))), rel=0.01
    )


def test_the_options_of_a_table(tmp_path):
    file = write_csv(tmp_path)
    assert make_plan(settings_of(file)).task.kind == "classification"
    task = make_plan(settings_of(file, target_column="size")).task
    assert (task.kind, task.metric.name, task.describe()["target"]) == ("regression", "RMSE", "size")
    standard, plain = (open_task(settings_of(file, augmentation=name)) for name in ("standardize", "none"))
    spec = make_plan(settings_of(file)).spec(METHODS["AdamW"], 0.01, 0)
    rows = [task.for_seed(spec, CPU, 0, 1).training.rows.inputs for task in (standard, plain)]
    assert float(rows[0][:, 0].mean()) == pytest.approx(0, abs=1e-6)
    assert float(rows[1][:, 1].mean()) == pytest.approx(5, abs=0.3)


BAD_OPTIONS = [
    ("csv", {"target_column": "b"}, "column"),
    ("csv", {"kind": "clustering"}, "kind"),
    ("csv", {"kind": "regression"}, "--kind regression: the target 'kind' is of words"),
    ("csv", {"image_size": 8}, "--image-size is for images"),
    ("csv", {"augmentation": "flip"}, "augmentation"),
    ("csv", {"model": "gpt-tiny"}, "model"),
    ("csv", {"test_images": 199}, "--test-images 199: there are 200 rows, of which at most 198 can test"),
    ("csv", {"train_images": 190}, "--train-images 190"),
    ("npz", {"target_column": "y"}, "--target-column is not for"),
    ("npz", {"test_images": 51}, "--test-images must be at most 50"),
    ("text", {"kind": "regression"}, "--kind is not for"),
    ("text", {"image_size": 8}, "--image-size is for images"),
    ("text", {"augmentation": "flip"}, "--augment is for images"),
    ("text", {"model": "mlp"}, "model"),
    ("text", {"ghost_batch": 8}, "--ghost-batch"),
]


@pytest.mark.parametrize(("kind", "options", "said"), BAD_OPTIONS)
def test_options_that_do_not_fit(tmp_path, kind, options, said):
    with pytest.raises(LabError, match=re.escape(said)):
        make_plan(settings_of(WRITERS[kind](tmp_path), **options))


def test_options_of_tables_are_not_for_other_data():
    with pytest.raises(LabError, match=r"--target-column is not for digits; it is for FILE\.csv"):
        open_task(Settings(target_column="y"))


def test_norm_methods_where_there_is_nothing_to_normalize(tmp_path):
    with pytest.raises(LabError, match="method MBN"):
        make_plan(replace(settings_of(write_text(tmp_path)), methods=("MBN",)))


# bad files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "device", "link"])
@pytest.mark.parametrize("kind", WRITERS)
def test_damaged_files_are_one_line_before_training(tmp_path, capsys, monkeypatch, kind, damage):
    monkeypatch.setattr("wellcond.lab.engines.select._engine", None)
    file = WRITERS[kind](tmp_path)
    content = file.read_bytes()
    if damage in ("device", "link"):
        file.unlink()
        file.symlink_to("/dev/null" if damage == "device" else "nowhere")
    else:
        noise = b"\0" + np.random.default_rng(0).bytes(99)
        file.write_bytes({"empty": b"", "cut": content[: min(99, len(content) // 2)], "noise": noise}[damage])
    assert main(["compare", "--data", str(file), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(
        r"(?m)^wellcond: error: --data [^\n]*\n\Z|^wellcond: error: [^\n]*there is no [^\n]*\n\Z", captured.err
    )
    if damage != "link":
        assert str(file) in captured.err
