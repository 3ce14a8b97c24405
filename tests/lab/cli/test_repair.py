"""`wellcond repair`: what it writes is what `wellcond.repair` makes, calibrated, and mistakes are one line."""

from __future__ import annotations

import pytest
import torch

import wellcond
from wellcond import repair
from wellcond.__main__ import main
from wellcond.lab.networks.registry import initial_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("networks")
    for seed in range(3):
        torch.save(initial_model("convnet", 1, 10, seed).state_dict(), found / f"{seed}.pt")
    return found


def repaired(folder, tmp_path, what, files, *options):
    arguments = ["--model", "convnet", "--train-images", "300", "--out", str(tmp_path / "out.pt"), *options]
    return main(["repair", what, *(str(folder / file) for file in files), *arguments])


def network(seed):
    return initial_model("convnet", 1, 10, seed)


WEIGHTS = {
    "average": (3, [], lambda: repair.average([network(seed) for seed in range(3)])),
    "round": (1, ["--bits", "3", "--per", "tensor"], lambda: repair.round_weights(network(0), 3, per="tensor")),
    "prune": (1, ["--share", "0.5"], lambda: repair.prune_channels(network(0), 0.5, remove=False)),
    "merge": (2, ["--share", "1"], lambda: network(0)),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_the_file_holds_the_new_weights_with_their_statistics(folder, tmp_path, capsys, what):
    count, options, make = WEIGHTS[what]
    files = [f"{seed}.pt" for seed in range(count)]
    assert repaired(folder, tmp_path, what, files, "--samples", "200", *options) == 0
    out = capsys.readouterr().out
    assert f"{what}: convnet on digits, new statistics from 200 training images" in out
    assert "399 test" in out
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    expected = make()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(written[name], parameter.detach())
    expected.load_state_dict(written)
    assert int(written["0.1.num_batches_tracked"]) == 2
    again = wellcond.calibrate(network(0), [torch.randn(9, 1, 8, 8)])
    assert not torch.allclose(written["0.1.running_mean"], again[0][1].running_mean)
    assert not torch.equal(written["0.1.running_var"], torch.ones(16))


@pytest.mark.parametrize(
    ("what", "files", "options", "message"),
    [
        ("average", ["0.pt"], [], "average takes at least 2 checkpoints, got 1"),
        ("merge", ["0.pt"], [], "merge takes 2 checkpoints, got 1"),
        ("round", ["0.pt", "1.pt"], ["--bits", "4"], "round takes 1 checkpoint, got 2"),
        ("round", ["0.pt"], [], "round needs --bits"),
        ("round", ["0.pt"], ["--bits", "1"], "bits must be between 2 and 16, got 1"),
        ("prune", ["0.pt"], [], "prune needs --share"),
        ("prune", ["0.pt"], ["--share", "1.5"], "share must lie between 0 and 1, got 1.5"),
        ("average", ["0.pt", "1.pt"], ["--bits", "4"], "--bits is for round, not for average"),
        ("round", ["gone.pt"], ["--bits", "4"], "there is no checkpoint"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, capsys, what, files, options, message):
    assert repaired(folder, tmp_path, what, files, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("wellcond: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.pt").exists()
