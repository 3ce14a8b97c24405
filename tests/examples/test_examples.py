"""The examples run, and a run that is resumed from its framework's own checkpoint equals one that was not stopped."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

each_example = pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frameworks take a GPU that they see, on which sums differ from run to run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def assert_identical(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, Mapping):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert_identical(found[name], value)
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_identical(one, other)
    elif isinstance(wanted, Tensor):
        assert torch.equal(found, wanted)
    else:
        assert found == wanted


# as texts -----------------------------------------------------------------------------------------------------------


@each_example
def test_it_is_short_and_shows_the_line_that_wellcond_adds(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 80
    marked = [number for number, line in enumerate(lines) if re.search(r"# The lines? that wellcond adds", line)]
    assert len(marked) == 1
    assert "wellcond." in "".join(lines[marked[0] + 1 : marked[0] + 3])


@each_example
def test_it_uses_the_public_interface_alone(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    imported = re.findall(r"^(?:from|import) (wellcond[\w.]*)", text, re.MULTILINE)
    assert {name for name in imported if not name.startswith("wellcond.integrations.")} == {"wellcond"}
    assert "sys.path" not in text
    assert not re.search(r"wellcond[\w.]*\._|handle\._", text)


# they run -----------------------------------------------------------------------------------------------------------


def test_an_example_runs_as_a_script() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "muon_feature_descent.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Muon over feature descent: loss" in done.stdout


def test_an_example_for_several_processes_says_how_it_is_started() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "fsdp2_torchrun.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "start it with torchrun" in done.stderr
    assert "Traceback" not in done.stderr


def test_muon_over_feature_descent_differs_from_muon() -> None:
    module = example("muon_feature_descent")
    newton, plain = module.main(20), module.main(20, plain=True)
    assert newton[0] == plain[0]
    assert newton[-1] != plain[-1]
    assert newton[-1] < newton[0]


def test_calibrating_a_checkpoint_changes_what_it_says_of_the_images() -> None:
    found = example("calibrate_checkpoint").main(steps=200)
    assert all(math.isfinite(loss) for _, loss in found.values())
    assert found["calibrated"] != found["as published"]


def assert_fine_tuned(model: torch.nn.Module, norm: str, printed: str) -> None:
    assert re.search(rf"{norm}: \d+\.\d% of \d+ test images", printed)
    assert not any(type(module) is torch.nn.BatchNorm2d for module in model.modules())


def test_timm_fine_tunes(capsys: pytest.CaptureFixture[str]) -> None:
    model = example("timm_finetune").main(epochs=1, norm="mbn")
    assert_fine_tuned(model, "mbn", capsys.readouterr().out)


def test_detection_learns() -> None:
    losses = example("detection_finetune").main(steps=8)
    assert sum(losses[-3:]) < sum(losses[:3])


def test_merged_and_rounded_networks_are_repaired() -> None:
    found = example("repair_networks").main(steps=40)
    assert found["average, channels matched, calibrated"] > found["average"] + 0.2
    assert found["rounded to 3 bits, calibrated"] > found["rounded to 3 bits"] - 0.02


def test_compiled_training_learns() -> None:
    losses = example("compile_model").main(steps=24, backend="aot_eager")
    assert losses[-1] < 0.5 * losses[0]


def test_exports_give_the_same_numbers() -> None:
    differences = example("export_onnx").main()
    assert differences.keys() == {"torch.export", "ONNX"}
    assert max(differences.values()) < 1e-5


def test_rounding_by_groups_keeps_more_than_chance() -> None:
    scores = example("rounded_depthwise").main(steps=20)
    assert scores.keys() == {"float", "none", "mean", "groups"}
    assert scores["groups"] > 0.2


def test_rounding_with_moments_comes_nearer_to_the_outputs_than_to_the_nearest() -> None:
    rounded = example("rounded_depthwise").rounded
    torch.manual_seed(0)
    x = torch.randn(4, 200, 9).double() @ torch.randn(4, 9, 9).double()
    weight = torch.randn(4, 3, 9)
    errors = {}
    for name, moment in (("none", torch.eye(9).double().expand(4, -1, -1)), ("groups", x.mT @ x / 200)):
        found = rounded(weight, moment, 3)
        assert all(len(row.unique()) <= 8 for row in found.flatten(0, 1))
        errors[name] = (x @ (found - weight).double().mT).square().sum()
    assert errors["groups"] < 0.8 * errors["none"]


def test_projection_forgets_less_than_training_on() -> None:
    main = example("continual_digits").main
    held, plain = main(steps=30), main(steps=30, energy=None)
    lost = [sum(history[task][task] - history[-1][task] for task in range(4)) for history in (held, plain)]
    assert lost[0] < lost[1]


def test_lora_starts_where_the_model_is_and_learns() -> None:
    losses = example("lora_from_moments").main(steps=12)
    assert losses["random"][0] == pytest.approx(losses["aligned"][0], abs=1e-5)
    assert losses["random"][-1] != losses["aligned"][-1]


# they resume --------------------------------------------------------------------------------------------------------


def test_plain_pytorch_resumes_exactly(tmp_path: Path) -> None:
    main = example("plain_pytorch").main
    whole = main(40)
    main(27, tmp_path / "run.pt")
    assert_holds_statistics(torch.load(tmp_path / "run.pt")["optimizer"], "whitening")
    assert_identical(main(40, tmp_path / "run.pt").state_dict(), whole.state_dict())


def test_lightning_resumes_exactly(tmp_path: Path) -> None:
    main = example("lightning_digits").main
    whole = main(3, str(tmp_path / "whole"))
    main(2, str(tmp_path / "stopped"))
    (stopped,) = tmp_path.glob("stopped/checkpoints/*.ckpt")
    saved = torch.load(stopped, weights_only=False)
    assert_holds_statistics(saved["optimizer_states"][0], "whitening")
    resumed = main(3, str(tmp_path / "resumed"), resume=str(stopped))
    assert_identical(resumed.state_dict(), whole.state_dict())
    # λ was not where it began: the schedule took part.
    assert resumed.network[1].stat_momentum > 0
    last = [
        torch.load(next(tmp_path.glob(f"{run}/checkpoints/*.ckpt")), weights_only=False) for run in ("whole", "resumed")
    ]
    assert_identical(last[1]["optimizer_states"][0], last[0]["optimizer_states"][0])


def test_hugging_face_trainer_resumes_exactly(tmp_path: Path) -> None:
    main = example("hf_trainer").main
    whole = main(18, str(tmp_path / "whole"))
    stopped = tmp_path / "whole" / "checkpoint-10"
    assert_holds_statistics(torch.load(stopped / "optimizer.pt"), "descent")
    resumed = main(18, str(tmp_path / "resumed"), resume=str(stopped))
    assert_identical(resumed.state_dict(), whole.state_dict())


def test_accelerate_resumes_exactly(tmp_path: Path) -> None:
    main = example("accelerate_loop").main
    whole = main(60)
    main(26, str(tmp_path))
    assert_holds_statistics(torch.load(tmp_path / "optimizer.bin"), "descent")
    assert_identical(main(60, str(tmp_path), resume=26).state_dict(), whole.state_dict())


def test_timm_fine_tunes_and_resumes_exactly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = example("timm_finetune").main
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
    assert_fine_tuned(main(epochs=2, folder=str(whole)), "bsr", capsys.readouterr().out)
    main(epochs=2, folder=str(resumed), resume=str(whole / "checkpoint-0.pth.tar"))
    wanted = torch.load(whole / "last.pth.tar")
    assert any("momentum_buffer" in entry for entry in wanted["optimizer"]["state"].values())
    assert [path.name for path in resumed.glob("checkpoint-*")] == ["checkpoint-1.pth.tar"]
    found = torch.load(resumed / "last.pth.tar")
    for part in ("state_dict", "optimizer"):
        assert_identical(found[part], wanted[part])


# The name, the steps before the stop and in all, and what to look for in which optimizer's state.
STATE_DICTS = [
    ("muon_feature_descent", 12, 20, {"muon": "descent"}, {}),
    ("compile_model", 11, 23, {"optimizer": "whitening"}, {"backend": "aot_eager"}),
    ("detection_finetune", 6, 12, {"optimizer": "whitening"}, {}),
]


@pytest.mark.parametrize(("name", "stop", "steps", "kept", "options"), STATE_DICTS, ids=[row[0] for row in STATE_DICTS])
def test_saved_state_dicts_resume_exactly(
    name: str, stop: int, steps: int, kept: dict[str, str], options: dict[str, Any], tmp_path: Path
) -> None:
    main = example(name).main
    whole, stopped = tmp_path / "whole.pt", tmp_path / "stopped.pt"
    losses = main(steps, checkpoint=whole, **options)
    main(stop, checkpoint=stopped, **options)
    for part, transform in kept.items():
        assert_holds_statistics(torch.load(stopped)[part], transform)
    assert main(steps, checkpoint=stopped, **options) == losses[stop:]
    assert_identical(torch.load(stopped), torch.load(whole))


def test_fsdp2_and_lightnings_ddp_resume_exactly(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    script = Path(__file__).with_name("run_on_ranks.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(script), str(ROOT / "examples"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # Of what users would see, nothing is for the library to mend.
    assert "all_gather" not in done.stderr
    assert "sync_dist" not in done.stderr
    for run in ("whole", "stopped"):
        dcp_to_torch_save(str(tmp_path / run), str(tmp_path / f"{run}.pt"))
    whole, resumed = (torch.load(tmp_path / f"{run}.pt") for run in ("whole", "stopped"))
    assert any("wellcond_whitening" in key for entry in whole["optimizer"]["state"].values() for key in entry)
    assert_identical(resumed, whole)
    ranks = [torch.load(tmp_path / f"lightning{rank}.pt") for rank in range(2)]
    for states in ranks:
        assert_identical(states["resumed"], states["whole"])
    whole, resumed = (
        torch.load(next(tmp_path.glob(f"{run}/checkpoints/*.ckpt")), weights_only=False)
        for run in ("lightning", "lightning-resumed")
    )
    assert_holds_statistics(whole["optimizer_states"][0], "whitening")
    assert_identical(resumed["optimizer_states"], whole["optimizer_states"])
    # Ranks average gradients, so they step alike; only their running statistics are their own.
    parameters = [name for name in ranks[0]["whole"] if name.endswith(("weight", "bias"))]
    assert parameters
    for name in parameters:
        assert_identical(ranks[1]["whole"][name], ranks[0]["whole"][name])


def assert_holds_statistics(state_dict: dict[str, Any], transform: str) -> None:
    assert any(key.startswith(f"wellcond_{transform}_") for entry in state_dict["state"].values() for key in entry)
