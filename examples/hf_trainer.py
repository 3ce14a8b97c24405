"""Hugging Face's Trainer and a tiny GPT-2 that learns text letter by letter: the optimizer is passed in."""

import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

import wellcond
from wellcond.integrations.transformers import WellcondTrainerCallback

LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"


def sentences(number: int) -> str:
    """Make text in which there is something to learn: grammar, agreement, and who does what."""
    draw = torch.Generator().manual_seed(0)

    def one(*words: str) -> str:
        return words[int(torch.randint(len(words), (), generator=draw))]

    return "".join(
        f"the {one('king', 'queen', 'fool')} {one('hears', 'sees', 'loves')} {one('a', 'the')} "
        f"{one('song', 'sword', 'storm')}{one(',', '.')}\n"
        for _ in range(number)
    )


def blocks(text: str, length: int) -> list[dict[str, torch.Tensor]]:
    tokens = torch.tensor([LETTERS.index(letter) for letter in text])
    whole = tokens[: len(tokens) // length * length].view(-1, length)
    return [{"input_ids": block, "labels": block} for block in whole]


def main(steps: int = 100, folder: str | None = None, resume: str | None = None) -> GPT2LMHeadModel:
    logging.disable_progress_bar()
    set_seed(0)
    sizes = {"vocab_size": len(LETTERS), "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    # The line that wellcond adds: feature descent over your own optimizer.
    wellcond.attach(optimizer, model, wellcond.FeatureDescent(stats_every=5, solve_every=25))

    with tempfile.TemporaryDirectory() as temporary:
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=folder or temporary,
                max_steps=steps,
                per_device_train_batch_size=16,
                logging_steps=20,
                save_steps=10,
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
                disable_tqdm=True,
            ),
            train_dataset=blocks(sentences(300), 32),
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 100))),
            callbacks=[WellcondTrainerCallback()],  # The log also says what wellcond counts.
        )
        trainer.train(resume_from_checkpoint=resume)
        saved = sorted(int(path.name.partition("-")[2]) for path in Path(folder or temporary).glob("checkpoint-*"))
    print("checkpoints after", *saved, "steps")
    return model


if __name__ == "__main__":
    main()
