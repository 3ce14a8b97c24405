"""Count the trips between files that a reader makes who follows a command call by call.

The command runs once, in this process, at a smoke scale. A reader who follows it opens each function when it is called
for the first time. A *stay* is a row of such openings in one file; the next opening in another file ends it. Later
calls of the same function are not followed again, so loops count once. Returns to a caller and imports do not count,
nor does what a module calls while it is imported (a table of names that it builds).

    python tools/trips.py compare            # stays and files, in order
    python tools/trips.py reproduce --brief  # the two numbers
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

COMMANDS = {
    "compare": "compare --methods SGDM,W-SGDM --seeds 1 --epochs 1 --train-images 64 --quiet",
    "reproduce": "reproduce 6.3 --scale smoke --quiet",
}
"""What each trip runs, but for ``--out``."""


@dataclass
class Walk:
    """What a reader opens, in order.

    Attributes:
        root: The folder whose files count.
        visits: File and function of each opening.
    """

    root: str
    visits: list[tuple[str, str]] = field(default_factory=list)
    _opened: set[CodeType] = field(default_factory=set)
    _imports: int = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Take in a call or a return, as ``sys.setprofile`` reports it."""
        code = frame.f_code
        if code.co_name == "<module>" and event in ("call", "return"):
            self._imports += 1 if event == "call" else -1
        if event != "call" or self._imports or code in self._opened or not self._counts(code):
            return
        self._opened.add(code)
        self._visit(code)

    def _counts(self, code: CodeType) -> bool:
        # The body of a module or class (not optimized) runs at its import: no step of the command. Nor is a template.
        is_function = bool(code.co_flags & inspect.CO_OPTIMIZED) and not code.co_name.startswith("<")
        return is_function and code.co_filename.startswith(self.root) and code.co_filename.endswith(".py")

    def _visit(self, code: CodeType) -> None:
        place = (code.co_filename[len(self.root) :], code.co_qualname if sys.version_info >= (3, 11) else code.co_name)
        if not self.visits or self.visits[-1] != place:
            self.visits.append(place)

    def stays(self) -> list[tuple[str, list[str]]]:
        """Return each stay in a file with the functions that are read there."""
        stays: list[tuple[str, list[str]]] = []
        for file, function in self.visits:
            if not stays or stays[-1][0] != file:
                stays.append((file, []))
            stays[-1][1].append(function)
        return stays


def follow(command: str) -> Walk:
    """Run a command of `COMMANDS` and return what a reader of it opens."""
    import wellcond
    from wellcond.__main__ import main

    walk = Walk(str(Path(wellcond.__file__).parent) + "/")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = [*COMMANDS[command].split(), "--out", folder]
        sys.setprofile(walk)
        try:
            main(arguments)
        except SystemExit as end:
            if end.code:
                raise
        finally:
            sys.setprofile(None)
    return walk


def main() -> None:
    """Print the trips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=sorted(COMMANDS))
    parser.add_argument("--folder", default="lab", help="count files below this folder of the package ('': all)")
    parser.add_argument("--brief", action="store_true", help="print the numbers alone")
    options = parser.parse_args()
    stays = [stay for stay in follow(options.command).stays() if stay[0].startswith(options.folder)]
    # A stay elsewhere in the package is no trip within the folder: what lies on both sides of it may be one stay.
    merged: list[tuple[str, list[str]]] = []
    for file, functions in stays:
        if merged and merged[-1][0] == file:
            merged[-1][1].extend(functions)
        else:
            merged.append((file, list(functions)))
    if not options.brief:
        for number, (file, functions) in enumerate(merged, 1):
            print(f"{number:4}  {file:45} {', '.join(dict.fromkeys(functions))}")
        print()
        for file, count in Counter(file for file, _ in merged).most_common(8):
            print(f"{count:4} times  {file}")
        print()
    print(f"{options.command}: {len(merged)} stays in {len({file for file, _ in merged})} files")


if __name__ == "__main__":
    main()
