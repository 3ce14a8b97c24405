"""Declares how every run trains, whatever its method and its lr."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

from wellcond.lab.errors import LabError
from wellcond.lab.methods.schedule import parse_schedule
from wellcond.lab.networks.registry import MODELS
from wellcond.lab.runs.option import MOST, number, one_of, option, whole_number

TrainingPrecision = Literal["32-true", "bf16-mixed", "16-mixed"]
"""How training computes, in Lightning's names; the mixed ones keep the weights in float32."""

PRECISIONS: tuple[TrainingPrecision, ...] = get_args(TrainingPrecision)

PROBES = ("disparity", "condition")
"""What can be measured of a trained network beyond its scores; `lab/training/probes.py` does."""

_network = partial(option, "network")
_training = partial(option, "training")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The training of every run; None is what the data or the length of the run decide.

    A new option is one field here, which says everything about it, and its use, as a field of the run's `RunSpec` (or
    of the `SeedSpec`, in a task). The commands, the files of comparisons, recipes, `wellcond.lab.compare`, results and
    the keys of kept runs go through the fields.
    """

    model: str | None = _network(
        None,
        f"{', '.join(MODELS)}, torchvision:NAME, timm:NAME (default: by data, convnet for digits)",
        "NAME",
        by_task=True,
    )
    weights: str | None = _network(
        None,
        "state dict that every run begins with, or torchvision:IMAGENET1K_V1 and the like for the models of "
        "torchvision; a classifier of other classes is left out (default: drawn from the seed)",
        "FILE",
    )
    epochs: int | None = _training(None, "epochs of a run (default: by data)", "N", check=whole_number(MOST))
    batch_size: int | None = _training(
        None, "images, rows or blocks of a batch (default: by data)", "N", check=whole_number(), by_task=True
    )
    ghost_batch: int | None = _training(
        None,
        "take batch statistics in training over groups of M images, as if each were on a device of its own; methods "
        "without batch statistics (GN) stay as they are (default: over the whole batch)",
        "M",
        check=whole_number(),
    )
    stats_every: int | None = _training(
        None, "steps between statistics of a preconditioner (default: by run length)", "N", check=whole_number()
    )
    solve_every: int | None = _training(
        None, "steps between its solves (default: by run length)", "N", check=whole_number()
    )
    schedule: str = _training(
        "cosine",
        "cosine (to 0), constant, step:EVERY,FACTOR or steps:EPOCH,...,FACTOR, which multiply the lr by FACTOR every "
        "EVERY epochs or at these (default: %(default)s)",
        "NAME",
        check=lambda _, text: parse_schedule(text),
    )
    warmup: float = _training(
        0.0,
        "let the lr rise over the first epochs (default: not)",
        "EPOCHS",
        check=number("0 or more epochs", 0),
    )
    precision: TrainingPrecision = _training(  # noqa: RUF009  # a field
        "32-true", f"{', '.join(PRECISIONS)} (default: %(default)s)", "NAME", check=one_of(PRECISIONS)
    )
    channels_last: bool = _training(
        False,
        "keep networks of images in memory channels last, which many convolutions compute faster "
        "(default: %(default)s)",
    )
    deterministic: bool = _training(
        False, "use deterministic algorithms only, and fail where there is none (default: %(default)s)"
    )
    label_smoothing: float = _training(
        0.0,
        "share of the target that is spread over all classes in training (default: 0)",
        "SHARE",
        check=number("at least 0 and below 1", 0, 1),
        by_task=True,
        only_for="classification",
    )
    probe: str | None = _training(
        None,
        f"what is measured of each trained network: {', '.join(PROBES)} (default: nothing)",
        check=one_of(PROBES),
        by_task=True,
        offered=False,
    )

    @property
    def scales_gradients(self) -> bool:
        """Whether training multiplies losses, and so gradients, lest small ones vanish."""
        return self.precision == "16-mixed"

    def check_together(self, epochs: int, batch_size: int, steps: int) -> None:
        """Check what options say of each other.

        Args:
            epochs: Epochs of a run.
            batch_size: Samples of a batch.
            steps: Steps of a run.

        Raises:
            LabError: If two do not fit together.
        """
        if self.ghost_batch is not None and self.ghost_batch > batch_size:
            raise LabError(f"--ghost-batch must be at most the batch size ({batch_size}), got {self.ghost_batch}")
        schedule = parse_schedule(self.schedule)
        if schedule.kind == "step" and schedule.milestones[0] * steps < epochs:
            raise LabError(f"--schedule {self.schedule}: changes the lr more often than once a step")
        if self.warmup >= epochs:
            raise LabError(f"--warmup must be shorter than the run ({epochs} epochs), got {self.warmup:g}")


@dataclass(frozen=True, kw_only=True)
class SeedSpec(TrainingOptions):
    """One seed of a task: what its data, its network and its loss are made from, whatever the method.

    Attributes:
        model: The network's name.
        batch_size: Samples of a batch, those of all ranks together.
        seed: Weights, split, order and augmentation follow from it, the same for every method.
        augmentation: What training samples go through.
        train_images: Samples that train.
        validation_images: Samples that validate.
    """

    # Of what the options may leave open, the task has decided these.
    model: str = field()
    batch_size: int = field()
    seed: int
    augmentation: str
    train_images: int
    validation_images: int
