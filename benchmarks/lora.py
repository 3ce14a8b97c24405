"""LoRA on a small GPT: A started in the leading directions of its input's second moment, beside the usual start.

    python benchmarks/lora.py --text tinyshakespeare.txt --other docs --json docs/results/lora.json

The model learns characters of one text, then of another: all Markdown files of a folder. The learning rate of each
start is chosen by the loss on text that does not train, of a seed of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from measured import Scores, note, options, report
from torch import Tensor, nn

# isort: split
from lora_from_moments import adapt, gpt, train, windows

LRS = (1e-3, 3e-3, 1e-2, 3e-2)


def read(path: Path) -> Tensor:
    """Return a text's bytes, or those of all Markdown files of a folder."""
    files = sorted(path.rglob("*.md")) if path.is_dir() else [path]
    return torch.tensor(list(b"\n".join(file.read_bytes() for file in files)))


@torch.no_grad()
def loss_on(model: nn.Module, text: Tensor) -> float:
    """Return the loss of a character, on windows that are always the same."""
    batches = [windows(text, 64, torch.Generator().manual_seed(i)) for i in range(8)]
    losses = [F.cross_entropy(model(b[:, :-1]).flatten(0, 1), b[:, 1:].flatten()) for b in batches]
    return torch.stack(losses).mean().item()


def adapted(
    base: nn.Module, text: Tensor, start: str, rank: int, stops: Sequence[int], lr: float, seed: int
) -> list[float]:
    """Adapt a copy of a model, and return its loss on text that does not train, at several numbers of steps."""
    model = copy.deepcopy(base)
    cut = len(text) * 9 // 10
    torch.manual_seed(seed)
    batches = [windows(text[:cut], 64, torch.Generator().manual_seed(100 + i))[:, :-1] for i in range(8)]
    if start != "all weights":
        adapt(model, rank, batches if "aligned" in start else None)
    losses, done = [], 0
    for stop in stops:
        train(model, text[:cut], stop - done, lr, 1000 * seed + stop)
        losses.append(loss_on(model, text[cut:]))
        done = stop
    return losses


def main() -> None:
    """Measure."""
    parser = options(__doc__)
    parser.add_argument("--text", type=Path, required=True, help="what the model learns first")
    parser.add_argument("--other", type=Path, required=True, help="what it is adapted to: a file or a folder")
    parser.add_argument("--first-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=4)
    given = parser.parse_args()
    text, other = read(given.text), read(given.other)
    stops = (max(1, given.steps // 4), given.steps)
    starts = ("LoRA, random start", "LoRA, aligned start", "all weights")
    scores: Scores = {}
    chosen: dict[str, float] = {}
    for seed in (1000, *range(given.seeds)):
        torch.manual_seed(seed)
        base = gpt()
        train(base, text, given.first_steps, 3e-3, seed)
        if seed == 1000:
            for start in starts:
                found = {lr: adapted(base, other, start, given.rank, stops, lr, seed)[-1] for lr in LRS}
                chosen[start] = min(found, key=lambda lr: found[lr])
                print(start, found, flush=True)
            continue
        note(
            scores,
            "not adapted",
            **dict.fromkeys((f"step_{stop}" for stop in stops), loss_on(base, other[len(other) * 9 // 10 :])),
        )
        for start in starts:
            losses = adapted(base, other, start, given.rank, stops, chosen[start], seed)
            note(scores, start, **{f"step_{stop}": loss for stop, loss in zip(stops, losses, strict=True)})
    about = f"cross entropy of a character, rank {given.rank}"
    report(given, about, scores, False, chosen=chosen)


if __name__ == "__main__":
    main()
