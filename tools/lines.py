"""Count the lines of the package that came, went and stayed since a commit, by what they are for.

    python tools/lines.py 7be0c9b         # from that commit to the newest
    python tools/lines.py 7be0c9b v0.2.0  # to another

A file that was moved or changed counts as kept (git finds it by at least 40 % of equal lines); what is new in it is
counted apart. New files are grouped by what a user can do with them.
"""

from __future__ import annotations

import argparse
import subprocess
from collections import Counter
from pathlib import PurePosixPath

CAPABILITIES = {
    "Any optimizer, wrapper, precision and rank: what attach follows, publishes and refuses": (
        *("transforms/arguments", "transforms/arrivals", "transforms/attaching", "transforms/attachment"),
        *("transforms/by_name", "transforms/eager", "transforms/freezing", "transforms/groups", "transforms/observe"),
        *("transforms/publishing", "transforms/replicas", "transforms/running", "transforms/standing", "deferred"),
        *("transforms/stepping", "transforms/weights", "transforms/wrappers", "grouping", "optim/", "integrations/"),
        "runtime/",
    ),
    "Any layer: own forwards, recurrent layers, tied and unusual weights": ("layouts/",),
    "Forms of the preconditioner: tap blocks, products in groups, outputs, tied weights, metrics": (
        *("transforms/preconditioner/", "transforms/unit_means", "transforms/metrics", "numerics/"),
    ),
    "Further transforms: constraints, orthogonalization, gradient projection": (
        *("transforms/constraints", "transforms/orthogonalize", "transforms/hidden_weights", "transforms/projection"),
    ),
    "Second moments as a library": ("moments/",),
    "Repair and calibration of any model": ("repair/", "calibration/", "lab/cli/repair", "lab/cli/calibrate"),
    "Layers and conversions: CBN, MABN, weight normalization, fusion": ("nn/",),
    "Diagnostics and theory of the sources' remaining items": ("diagnostics/", "theory/", "lab/diagnosis/"),
    "The user's own work in the lab: tasks, tables, texts, features, LightningModules, segmentation": (
        *("lab/tasks/", "lab/data/", "lab/networks/", "lab/opened_task", "lab/importing", "lab/comparing"),
    ),
    "Methods in one grammar, others' optimizers, clipping, searches": ("lab/methods/", "lab/trials"),
    "Comparison, engines, kept runs, reports, commands": ("lab/", ""),
}
"""From what users can do to the beginnings of its files, the first that fits."""


def capability(path: str) -> str:
    """Return what a file of the package is for."""
    return next(name for name, starts in CAPABILITIES.items() if path.startswith(starts))


def git(*arguments: str) -> list[str]:
    """Return the lines that git prints."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.splitlines()


def changes(old: str, new: str, kinds: str) -> list[tuple[int, int, str]]:
    """Return lines added and removed, and the path below the package, of the files that changed in these ways."""
    found = []
    for line in git("diff", "-M40%", "--numstat", f"--diff-filter={kinds}", old, new, "--", "src/wellcond"):
        added, removed, path = line.split("\t")
        # A moved file is written as src/{old => new}/rest.
        name = PurePosixPath(path.replace("{", "").split(" => ")[-1].replace("}", "")).as_posix()
        if name.endswith(".py") and added != "-":
            found.append((int(added), int(removed), name.removeprefix("src/wellcond/").removeprefix("wellcond/")))
    return found


def total(commit: str) -> int:
    """Return the lines of the package's Python files at a commit."""
    files = [f for f in git("ls-tree", "-r", "--name-only", commit, "src/wellcond") if f.endswith(".py")]
    return sum(len(git("show", f"{commit}:{file}")) for file in files)


def main() -> None:
    """Print the account."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new", nargs="?", default="HEAD")
    options = parser.parse_args()
    came, kept, gone = (changes(options.old, options.new, kinds) for kinds in ("A", "MR", "D"))
    print(f"lines at {options.old}: {total(options.old)}, at {options.new}: {total(options.new)}")
    print(f"files that went: {len(gone)}, {sum(removed for _, removed, _ in gone)} lines")
    print(f"files that stayed: {len(kept)}, +{sum(a for a, _, _ in kept)} and -{sum(r for _, r, _ in kept)} lines")
    print(f"files that came: {len(came)}, {sum(added for added, _, _ in came)} lines\n")
    by_use = Counter[str]()
    for added, _, path in came:
        by_use[capability(path)] += added
    print("| what the new files are for | lines |\n| --- | --- |")
    for name in CAPABILITIES:
        print(f"| {name} | {by_use[name]:,} |")


if __name__ == "__main__":
    main()
