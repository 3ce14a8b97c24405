"""Train every architecture family of torchvision, timm and transformers with every transform and conversion.

    python tools/zoo.py                                      # all of it: hours
    python tools/zoo.py --library timm --only 'resnet'       # families whose name the pattern finds
    python tools/zoo.py --action FeatureWhitening --jobs 4 --json zoo.json

Each family is built at its smallest, with random weights, on one thread, in a process of its own. Each action trains
it for three steps and checks more than that nothing is raised; see `zoo_trials`. One line is printed for each. The
exit code is 1 if anything failed. A family that cannot be built here is named and counted, and is no failure.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch
from zoo_architectures import LIBRARIES, Architecture, NotBuiltError, architectures
from zoo_trials import ACTIONS, Outcome, Trial


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--library", action="append", choices=LIBRARIES, help="may be repeated; default: all three")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="a regular expression searched in 'library/family'"
    )
    parser.add_argument("--action", action="append", choices=ACTIONS, help="may be repeated; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once, each on one thread")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one family")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all outcomes there, after each family")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="a random order: for a part of the night")
    parser.add_argument("--list", action="store_true", help="only say which families there are")
    chosen = parser.parse_args(arguments)
    if chosen.jobs < 1 or chosen.timeout <= 0:
        parser.error("--jobs and --timeout must be positive")
    families = [
        each
        for library in chosen.library or LIBRARIES
        for each in architectures(library)
        if re.search(chosen.only, each.title)
    ]
    if not families:
        parser.error(f"no family matches {chosen.only!r}")
    if chosen.shuffle is not None:
        random.Random(chosen.shuffle).shuffle(families)
    if chosen.list:
        print("\n".join(f"{each.title}: {', '.join(each.names[:3])}" for each in families))
        return 0
    outcomes = run_all(families, chosen.action or ACTIONS, chosen.jobs, chosen.timeout, chosen.json)
    print(summary(outcomes))
    return int(any(outcome.result == "FAIL" for outcome in outcomes))


def run_all(
    families: Sequence[Architecture], actions: Sequence[str], jobs: int, timeout: float, file: Path | None
) -> list[Outcome]:
    """Run the actions on each family in a process of its own, and print each outcome as it comes."""
    waiting, running, outcomes = list(families), {}, []
    while waiting or running:
        while waiting and len(running) < jobs:
            family = waiting.pop(0)
            receiver, process = _start(family, actions)
            running[receiver] = (family, process, time.monotonic() + timeout, list(actions))
        ready = set(wait(list(running), timeout=1.0))
        for receiver, (family, process, deadline, left) in list(running.items()):
            problem = None
            if receiver in ready:
                try:
                    outcome = receiver.recv()
                except EOFError:
                    process.join()
                    # Between the last outcome and the end there is nothing left to do.
                    problem = f"the process ended with code {process.exitcode}" if left else ""
                else:
                    if outcome.action in left:
                        left.remove(outcome.action)
                    if outcome.action == "build":
                        left.clear()
                    outcomes.append(outcome)
                    print(outcome.line(), flush=True)
            elif time.monotonic() > deadline:
                problem = f"no end within {timeout:g} s"
            if problem is None:
                continue
            process.kill()
            process.join()
            del running[receiver]
            if problem:
                outcomes.append(Outcome(family.title, left[0], "FAIL", problem))
                print(outcomes[-1].line(), flush=True)
            if file is not None:
                file.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return outcomes


def _start(family: Architecture, actions: Sequence[str]) -> tuple[Connection, ForkProcess]:
    """Start a process; a fork has the libraries imported already."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(family, actions, sender), daemon=True)
    process.start()
    sender.close()
    return receiver, process


def _work(family: Architecture, actions: Sequence[str], sender: Connection) -> None:
    """Send one outcome for each action, or one that says why the family was not built."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    # What libraries print stays out of the lines.
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - no path of a file
        sys.stdout = sys.stderr = nowhere
        try:
            trial = Trial(family.title, *family.build())
        except NotBuiltError as error:
            sender.send(Outcome(family.title, "build", "not built", str(error)))
            return
        except Exception as error:
            sender.send(Outcome(family.title, "build", "not built", f"{type(error).__name__}: {error}"[:300]))
            return
        for action in actions:
            sender.send(trial.run(action))


def summary(outcomes: Sequence[Outcome]) -> str:
    """Count the outcomes, and group the failures by what was wrong, most frequent first."""
    counts = Counter(outcome.result for outcome in outcomes)
    lines = ["", ", ".join(f"{count} {result}" for result, count in counts.most_common())]
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.result == "FAIL":
            groups.setdefault(_cause(outcome), []).append(outcome)
    for cause, found in sorted(groups.items(), key=lambda item: -len(item[1])):
        names = sorted({outcome.architecture for outcome in found})
        actions = ", ".join(sorted({outcome.action for outcome in found}))
        shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        lines.append(f"{len(found):4} in {len(names)} families: {cause}  ({actions}; {shown})")
    return "\n".join(lines)


def _cause(outcome: Outcome) -> str:
    """Return a failure's text without what differs between architectures: names of parameters, and numbers."""
    text = re.sub(r"[\w]+(\.[\w]+)+(?!\w*\])", "…", outcome.detail)
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", text)[:220]


if __name__ == "__main__":
    sys.exit(main())
