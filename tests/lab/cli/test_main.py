"""Every mistake is one clear line and exit code 2, before anything is trained."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from wellcond.__main__ import main, missing_packages
from wellcond.lab.cli.main import COMMANDS
from wellcond.lab.methods.method import METHODS
from wellcond.lab.networks.registry import MODELS

pytestmark = pytest.mark.usefixtures("quick_collections")

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    def refuse(*_):
        raise AssertionError("a run was started")

    # In this order: compare takes its own from workers when it is first imported.
    monkeypatch.setattr("wellcond.lab.comparison.compare.execute", refuse)
    monkeypatch.setattr("wellcond.lab.comparison.compare.execute", refuse)


def error(capsys, *arguments: str) -> str:
    """Return the one line that the command says, without its prefix."""
    assert main(["compare", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("wellcond: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("wellcond: error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--methods", "SGDM,W-SDGM"], f"unknown method 'W-SDGM': did you mean 'W-SGDM'? Known: {', '.join(METHODS)}"),
        (["--methods", "sgdm"], f"unknown method 'sgdm': did you mean 'SGDM'? Known: {', '.join(METHODS)}"),
        (["--methods", "qqq"], f"unknown method 'qqq': Known: {', '.join(METHODS)}"),
        (["--methods", "SGDM,FSGD,SGDM"], "--methods must name each method once, got 'SGDM' twice"),
        (["--methods", ""], f"--methods must name at least one method. Known: {', '.join(METHODS)}"),
        (["--methods", " , "], f"--methods must name at least one method. Known: {', '.join(METHODS)}"),
        (["--seeds", "0"], "--seeds must be a positive integer, got 0"),
        (["--seeds", "-1"], "--seeds must be a positive integer, got -1"),
        (["--seeds", "two"], "argument --seeds: invalid int value: 'two'"),
        (["--epochs", "0"], "--epochs must be a positive integer, got 0"),
        (["--jobs", "-2"], "--jobs must be a positive integer, got -2"),
        (["--batch-size", "0"], "--batch-size must be a positive integer, got 0"),
        (["--batch-size", "1"], "--batch-size must be at least 2, because the networks use batch normalization, got 1"),
        (
            ["--batch-size", "64", "--train-images", "50"],
            "--batch-size must be at most the number of training images (50), got 64",
        ),
        (["--ghost-batch", "0"], "--ghost-batch must be a positive integer, got 0"),
        (["--ghost-batch", "two"], "argument --ghost-batch: invalid int value: 'two'"),
        (["--ghost-batch", "33"], "--ghost-batch must be at most the batch size (32), got 33"),
        (["--ghost-batch", "9", "--batch-size", "8"], "--ghost-batch must be at most the batch size (8), got 9"),
        (["--stats-every", "0"], "--stats-every must be a positive integer, got 0"),
        (["--val-images", "0"], "--val-images must be a positive integer, got 0"),
        (["--target", "101"], "--target must be a percentage above 0 and at most 100, got 101"),
        (
            ["--train-images", "1398"],
            "--train-images 1398: there are 1398 images besides the test images, and 1 of them validate",
        ),
        (
            ["--train-images", "1000", "--val-images", "500"],
            "--train-images 1000: there are 1398 images besides the test images, and 500 of them validate",
        ),
        (["--test-images", "1796"], "--test-images 1796: digits has 1797 images, of which at most 1795 can test"),
        (
            ["--model", "reznet8"],
            f"unknown model 'reznet8': did you mean 'resnet8'? Known: {', '.join(MODELS)}, torchvision:NAME, timm:NAME",
        ),
        (["--model", "resnet18"], "model resnet18 needs images of at least 16x16, got 8x8"),
        (
            ["--augment", "flop"],
            "unknown augmentation 'flop': did you mean 'flip'? Known: none, flip, crop-flip",
        ),
        (
            ["--data", "nowhere.parquet"],
            "--data must be 'digits', a parquet file or a folder of data (see `wellcond list data`); "
            "there is no nowhere.parquet",
        ),
        (
            ["--image-size", "3"],
            "--image-size must divide the images' height and width (averaging whole pixels), got 3 for images of 8x8",
        ),
        (
            ["--schedule", "step:5"],
            "--schedule must be cosine, constant, step:EVERY,FACTOR or steps:EPOCH,...,FACTOR, got 'step:5'",
        ),
        (["--warmup", "-1"], "--warmup must be 0 or more epochs, got -1"),
        (["--warmup", "6"], "--warmup must be shorter than the run (6 epochs), got 6"),
        (
            ["--precision", "bf16"],
            "unknown precision 'bf16': did you mean 'bf16-mixed'? Known: 32-true, bf16-mixed, 16-mixed",
        ),
        (["--precision", "16-mixed"], "--precision 16-mixed needs a CUDA device; bf16-mixed works without"),
        (["--label-smoothing", "1"], "--label-smoothing must be at least 0 and below 1, got 1"),
        (
            ["--weights", "gone.pt"],
            "--weights must be a file or torchvision:NAME (as torchvision:IMAGENET1K_V1), got gone.pt",
        ),
        (["--lr", "1"], "unrecognized arguments: --lr"),
        (["--lrs", "0.1,0.2"], "--lrs must look like SGD=0.02,0.06,0.2, got '0.1,0.2'"),
        (
            ["--lrs", "Adan=0.1"],
            "unknown optimizer 'Adan': did you mean 'Adam'? Known: "
            + ", ".join(dict.fromkeys(method.optimizer for method in METHODS.values())),
        ),
        (["--lrs", "SGD=0.1,x"], "--lrs SGD=0.1,x: learning rates must be numbers"),
        (["--lrs", "SGD=0.1,-1"], "--lrs SGD=0.1,-1: learning rates must be positive"),
        (
            ["--lrs", "SGD=0.1,0.2"],
            "--lrs must give every method the same number of learning rates to try, got SGD 2, AdamW 3",
        ),
    ],
)
def test_mistakes(capsys, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert error(capsys, *arguments) == line
    assert list(tmp_path.iterdir()) == []  # nothing was made


def test_a_file_that_is_not_parquet(capsys, tmp_path):
    file = tmp_path / "text.parquet"
    file.write_text("hello " * 100)
    assert error(capsys, "--data", str(file)).endswith("but this is not a parquet file")
    file.write_text("")
    assert error(capsys, "--data", str(file)).endswith("but this is not a parquet file")


def test_a_folder_without_a_test_file(capsys, tmp_path, write_images):
    write_images(tmp_path / "train.parquet", count=3)
    expected = f"--data {tmp_path}: a folder must hold *train*.parquet and *test*.parquet files, found train.parquet"
    assert error(capsys, "--data", str(tmp_path)) == expected


def test_train_and_test_files_that_do_not_agree(capsys, tmp_path, write_images):
    write_images(tmp_path / "train.parquet", count=30)
    write_images(tmp_path / "test.parquet", count=30, size=16)
    assert "must agree in classes and image shape, got 3 classes of 3x8x8 and 3 classes of 3x16x16" in error(
        capsys, "--data", str(tmp_path)
    )


def test_more_images_than_a_file_has(capsys, tmp_path, write_images):
    write_images(tmp_path / "images.parquet", count=100)
    line = error(capsys, "--data", str(tmp_path / "images.parquet"), "--train-images", "90", "--batch-size", "8")
    assert line == "--train-images 90: there are 80 images besides the test images, and 8 of them validate"


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_way_of_the_output(capsys, tmp_path, below):
    (tmp_path / "taken").write_text("mine")
    out = tmp_path / "taken" / below
    assert error(capsys, "--out", str(out)).startswith(f"--out {out}: cannot write there (")
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_option_that_a_transform_refuses(capsys, monkeypatch):
    from dataclasses import replace

    from wellcond.lab.methods.method import TransformSpec

    broken = replace(METHODS["FSGD"], transforms=(TransformSpec("FeatureDescent", (("damping", -1.0),)),))
    monkeypatch.setitem(METHODS, "FSGD", broken)
    assert error(capsys, "--methods", "FSGD").startswith("method FSGD: damping must be")


def test_an_option_that_a_layer_refuses(capsys, monkeypatch):
    from dataclasses import replace

    from wellcond.lab.methods.norms import NormSpec

    broken = replace(METHODS["BSR"], norm=NormSpec("bsr", (("nonneg", "perhaps"),)))
    monkeypatch.setitem(METHODS, "BSR", broken)
    assert main(["compare", "--methods", "BSR", "--ghost-batch", "2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("wellcond: error: method BSR: ")
    assert "nonneg must be" in said


def test_no_command_is_a_mistake_too(capsys):
    assert main([]) == 2
    names = ",".join(COMMANDS)
    assert capsys.readouterr().err == f"wellcond: error: the following arguments are required: {{{names}}}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["list", "--help"], ["--version"]])
def test_help_is_there(capsys, arguments):
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert "wellcond" in capsys.readouterr().out


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    output = capsys.readouterr().out
    written = (method.written() for method in METHODS.values())
    for name in (*written, *MODELS, "torchvision:NAME", "timm:NAME", "digits", "FILE.parquet", "train/CLASS/*"):
        assert f"  {name}" in output
    assert main(["list", "models"]) == 0
    assert "SGDM" not in capsys.readouterr().out
    assert main(["list", "nothing"]) == 2


def test_without_the_lab_extra_one_line_says_what_to_install():
    # As if rich and lightning were not installed.
    code = (
        "import importlib.metadata as metadata, sys; find = metadata.distribution\n"
        "def distribution(name):\n"
        "    if name in ('rich', 'lightning'): raise metadata.PackageNotFoundError(name)\n"
        "    return find(name)\n"
        "metadata.distribution = distribution\n"
        "metadata.requires = lambda name: find(name).requires\n"
        "from wellcond.__main__ import main; sys.exit(main(['list']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == (
        'wellcond: error: the command line needs the lab extra: pip install "wellcond[lab]" '
        "(not found: lightning, rich)\n"
    )
    assert result.stdout == ""


def test_the_check_reads_the_list_of_the_extra(monkeypatch):
    listed = [
        "torch>=2.11",
        'gone>=1; extra == "lab"',
        'Gone.Too>=1,<2; python_version < "3.999" and extra == "lab"',
        "gone-on-old>=1; (python_version < '3.1') and extra == 'lab'",
        'rich>=13; extra == "lab"',
        'gone-elsewhere; extra == "docs"',
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: listed)
    assert missing_packages() == ["gone", "Gone.Too"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: None)
    assert missing_packages() == []


def test_what_the_lab_imports_is_in_its_extra():
    """Each package that a file of the lab imports is one of the extra's, and each of those is imported."""
    project = Path(__file__).parents[3]
    extras = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    listed = {re.match(r"[\w.-]+", requirement)[0] for requirement in extras["lab"]}
    trees = [
        ast.parse(file.read_text(encoding="utf-8")) for file in sorted((project / "src/wellcond/lab").rglob("*.py"))
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imported = {name.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    called = {"PIL": "pillow", "sklearn": "scikit-learn", "tomllib": "tomli", "pydantic_core": "pydantic"}
    imported = {called.get(name, name) for name in imported} - set(sys.stdlib_module_names) | {"tomli"}
    # The first is wellcond's own; the others are asked for where they are used, with a line of their own.
    assert imported - listed == {"torch", "wellcond", "pandas", "pytorch_optimizer", "ray", "safetensors", "timm"}
    # TensorBoard is what writes the logs, by torch's name for it.
    assert listed - imported == {"tensorboard"}


def test_the_module_runs_as_the_command_does():
    command = [sys.executable, "-m", "wellcond", "compare", "--seeds", "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "wellcond: error: --seeds must be a positive integer, got 0\n"


def test_images_of_another_kind_are_refused_by_a_network(capsys, tmp_path, write_images):
    write_images(tmp_path / "images.parquet", count=100, size=4)
    line = error(capsys, "--data", str(tmp_path / "images.parquet"))
    assert line == "model resnet8 needs images of at least 8x8, got 4x4"


def test_output_that_nobody_reads_on_ends_quietly():
    unread, written = os.pipe()
    os.close(unread)
    command = [sys.executable, "-m", "wellcond", "list", "methods"]
    done = subprocess.run(command, stdout=written, stderr=subprocess.PIPE, text=True, check=False)
    os.close(written)
    assert (done.returncode, done.stderr) == (141, "")
