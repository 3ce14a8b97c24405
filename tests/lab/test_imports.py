"""What the command line says without computing needs no torch; what is imported for it can be interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

import wellcond
from wellcond.lab.cli.main import COMMANDS

HEAVY = ("torch", "numpy", "scipy", "lightning", "torchvision", "sklearn", "matplotlib", "pyarrow", "jinja2", "PIL")

# Runs a command, then says with which exit code and which packages it came to its end.
PROGRAM = """
import json, sys
from wellcond.__main__ import main
try:
    code = main(json.loads(sys.argv[1]))
except SystemExit as ended:
    code = ended.code
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def imported(*arguments: str) -> tuple[int, set[str]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments)], capture_output=True, text=True, check=True
    )
    code, names = json.loads(done.stdout.splitlines()[-1])
    return code, set(names)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--version",),
        ("--help",),
        *((name, "--help") for name in COMMANDS),
        ("list",),
        ("list", "recipes"),
        ("compare", "--no-such-option"),
        ("train", "--lr", "high"),
    ],
    ids=" ".join,
)
def test_what_computes_nothing_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    code, names = imported(*arguments)
    assert code == (2 if arguments[-1] in ("--no-such-option", "high") else 0)
    assert not names & set(HEAVY)


def test_a_name_of_the_library_is_imported_when_it_is_used() -> None:
    code = (
        "import sys, wellcond\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(wellcond.__all__) <= set(dir(wellcond))\n"
        "import wellcond.calibration.models\n"
        "assert callable(wellcond.calibrate), wellcond.calibrate\n"
        "for name in wellcond.__all__:\n"
        "    assert getattr(wellcond, name) is not None\n"
        "assert callable(wellcond.calibrate)\n"
        "assert wellcond.nn.convert_norm and wellcond.optim.WSGDM and wellcond.theory.Noise\n"
        "from wellcond import *\n"
        "assert attach is wellcond.attach\n"
        "assert not {'lightning', 'torchvision', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_no_other() -> None:
    for name in wellcond.__all__:
        assert hasattr(wellcond, name)
    with pytest.raises(AttributeError, match="module 'wellcond' has no attribute 'attatch'"):
        wellcond.attatch  # noqa: B018  # what is tested


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("arguments", [("compare",), ("bench",), ("diagnose",)], ids=" ".join)
def test_a_signal_while_it_imports_is_one_line(number: signal.Signals, arguments: tuple[str, ...]) -> None:
    # An importer that sends the signal as soon as torch is asked for: it comes within the import, whatever the machine.
    code = (
        "import os, sys\n"
        "class Sends:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        f"            os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Sends())\n"
        "from wellcond.__main__ import main\n"
        f"sys.exit(main({list(arguments)!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + number
    assert done.stderr.startswith("wellcond: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_command_under_nohup_outlives_its_terminal() -> None:
    code = (
        "import os, signal, sys\n"
        "from wellcond.__main__ import main\n"
        "from wellcond.lab.cli import list as listing\n"
        "listing.run = lambda *_: os.kill(os.getpid(), signal.SIGHUP) or 0\n"
        "sys.exit(main(['list']))\n"
    )

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    done = subprocess.run([sys.executable, "-c", code], preexec_fn=ignore, env=dict(os.environ), check=False)
    assert done.returncode == 0
