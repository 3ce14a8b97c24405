"""Whatever is wrong in a command line is said in one line with exit code 2, before anything is trained or written."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from wellcond.__main__ import main
from wellcond.lab.cli import main as cli
from wellcond.lab.cli.options import _pair
from wellcond.lab.cli.paths import OutputFile, OutputFolder


@pytest.fixture(autouse=True)
def no_work(monkeypatch, tmp_path):
    """Let whatever would take long fail, and begin in an empty folder."""

    def refuse(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setattr("wellcond.lab.comparison.compare.execute", refuse)
    monkeypatch.setattr("wellcond.lab.training.runner.Runner.run", refuse)
    monkeypatch.setattr("wellcond.lab.benchmark.steps._measure", refuse)
    monkeypatch.setattr("wellcond.lab.diagnosis.diagnose.diagnose", refuse)
    monkeypatch.setattr("wellcond.lab.diagnosis.diagnose.trained_briefly", refuse)
    monkeypatch.setattr("wellcond.calibrate", refuse)
    monkeypatch.setattr("wellcond.lab.cli.processes.launch", refuse)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def one_line(capsys, *arguments: str) -> str:
    """Return what the command says, having found that it is one line with exit code 2 and nothing was made."""
    before = {file: file.lstat().st_mtime_ns for file in Path("..").rglob("*")}
    assert main(arguments) == 2, arguments
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(r"wellcond: error: \S[^\n]*\n", said.err), said.err
    assert {file: file.lstat().st_mtime_ns for file in Path("..").rglob("*")} == before
    return said.err.removeprefix("wellcond: error: ").rstrip("\n")


def options(command: str) -> list[argparse.Action]:
    """Return what a command takes, as it declares it."""
    (commands,) = (each for each in cli._parser()._actions if isinstance(each, argparse._SubParsersAction))
    return [each for each in commands.choices[command]._actions if not isinstance(each, argparse._HelpAction)]


def given(command: str) -> list[str]:
    """Return what a command needs to be given, all of it right."""
    return {
        "calibrate": ["calibrate", "weights.pt", "--model=convnet", "--what=bn", "--batch-size=4", "--out=new.pt"],
        "reproduce": ["reproduce", "6.3", "--scale", "smoke"],
        "diagnose": ["diagnose", "convnet", "digits"],
    }.get(command, [command])


HUGE = "1" + "0" * 24
WRONG = {
    int: ["nan", "inf", "0x10", "1.5", "", "two\nlines", "-1", "-" + HUGE, HUGE, "9" * 5000],
    float: ["nan", "inf", "-inf", "one", "", "two\nlines", "-1", "-1e400", "1e400"],
    str: [
        "",
        "\n",
        "no\nsuch",
        "Ünbekannt 😀",
        "x" * 5000,
        "a\x00b",
        "--",
        "%s %(prog)s {0}",
        "\udcff",
        "../missing/it",
    ],
    _pair: ["", "=", "=1", "1=2", "a b=1", "no\nsuch", "x" * 5000, "a.b=1"],
    OutputFile: ["", "x" * 5000, "a\x00b", "..", "../missing/it", "/dev/null", "/proc/it", "y" * 250, "taken/it"],
    OutputFolder: [
        "",
        "x" * 5000,
        "a\x00b",
        "/dev/null",
        "/proc/it",
        "/dev/null/it",
        "taken",
        "taken/it",
        "full",
    ],
}


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A state dict of the convnet for the digits."""
    from wellcond.lab.networks.registry import initial_model

    file = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(initial_model("convnet", 1, 10, seed=0).state_dict(), file)
    return file


def with_values() -> list:
    found = [(command, option) for command in cli.COMMANDS for option in options(command)]
    return [
        pytest.param(command, option, id=f"{command} {option.dest}")
        for command, option in found
        if not isinstance(option, argparse._StoreTrueAction)
    ]


@pytest.mark.parametrize(("command", "option"), with_values())
def test_wrong_values_of_every_option(capsys, weights, command, option):
    os.link(weights, "weights.pt")
    Path("taken").write_text("mine")
    Path("full/report.html").mkdir(parents=True)
    kind = type(option) if isinstance(option, (OutputFile, OutputFolder)) else option.type or str
    for value in WRONG[kind]:
        if value == "--" and not option.option_strings:
            continue  # it says that no more options follow
        arguments = given(command)
        if option.option_strings:
            # The last of several counts; joined, so that no value is taken for an option.
            arguments += [f"{option.option_strings[0]}={value}"]
        else:
            at = 1 + [each.dest for each in options(command) if not each.option_strings].index(option.dest)
            arguments[at : at + 1] = [value]
        assert len(one_line(capsys, *arguments)) < 20000


def test_epochs_and_lists_without_an_end(capsys):
    assert one_line(capsys, "compare", "--schedule", "step:1e-300,0.5").endswith("more often than once a step")
    assert one_line(capsys, "compare", "--jobs", "1000").startswith("--jobs must be at most ")
    assert one_line(capsys, "train", "--devices", "1000").startswith("--devices must be at most ")
    said = one_line(capsys, "bench", "--batch-size", "65536", "--image-size", "4096")
    assert said.startswith("--batch-size 65536 and --image-size 4096 must give a batch of at most")


STATE = {"convolution.weight": torch.zeros(2, 2)}


def no_weights(folder: Path) -> dict[str, Path]:
    """Make files that are no weights of the convnet."""
    files = {kind: folder / f"{kind}.pt" for kind in ("empty", "text", "cut", "list", "other", "code", "zip", "tar")}
    files["empty"].write_bytes(b"")
    files["text"].write_text("weights\n" * 100)
    torch.save(STATE, folder / "whole.pt")
    files["cut"].write_bytes((folder / "whole.pt").read_bytes()[:-200])
    torch.save([torch.zeros(2)], files["list"])
    torch.save(STATE, files["other"])
    files["code"].write_bytes(pickle.dumps({"a": Path("b")}, 2))
    with zipfile.ZipFile(files["zip"], "w") as archive:
        archive.writestr("archive/data.pkl", b"no pickle")
    with tarfile.open(files["tar"], "w") as tar:
        tar.add(files["text"], "sys_info")
    files["safetensors"] = folder / "no.safetensors"
    files["safetensors"].write_bytes(b"\xff" * 8)
    files["folder"] = folder
    files["missing"] = folder / "missing.pt"
    files["device"] = Path("/dev/null")
    files["pipe"] = folder / "pipe"
    os.mkfifo(files["pipe"])
    return files


@pytest.mark.parametrize("command", ["compare", "train", "calibrate", "diagnose"])
def test_files_that_are_no_weights(capsys, no_work, command):
    for file in no_weights(no_work).values():
        arguments = {
            "calibrate": ["calibrate", str(file), *given("calibrate")[2:]],
            "diagnose": ["diagnose", "convnet", "--checkpoint", str(file)],
        }.get(command, [command, "--model", "convnet", "--weights", str(file)])
        assert str(file) in one_line(capsys, *arguments)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[", b"a = 1\n", b"names = 3\n", b"a = " + b"[" * 20_000])
def test_files_that_are_no_recipe(capsys, content):
    Path("mine.toml").write_bytes(content)
    one_line(capsys, "reproduce", "mine.toml")


def test_recipes_that_are_no_files(capsys):
    Path("mine.toml").mkdir()
    os.mkfifo("pipe.toml")
    for file in ("mine.toml", "pipe.toml", "missing.toml", "a\x00.toml", "x" * 5000 + ".toml"):
        one_line(capsys, "reproduce", file)


NUMBERS = ["", "two", "-1", "1.5", "9" * 5000, "0x2"]
LAUNCHES = {
    "torchrun": {
        "TORCHELASTIC_RUN_ID": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
    },
    "slurm": {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
}


@pytest.mark.parametrize(("by", "name"), [(by, name) for by, names in LAUNCHES.items() for name in names])
def test_launches_that_cannot_be(capsys, monkeypatch, by, name):
    if name == "TORCHELASTIC_RUN_ID":
        monkeypatch.setenv(name, "1")  # and nothing else
        assert "WORLD_SIZE must be a whole number" in one_line(capsys, "list")
        return
    for other, value in LAUNCHES[by].items():
        monkeypatch.setenv(other, value)
    for value in [*NUMBERS, "2" if "NTASKS" not in name and "SIZE" not in name and "NNODES" not in name else "0"]:
        monkeypatch.setenv(name, value)
        assert f"variable {name} must be a whole number from " in one_line(capsys, "train")
