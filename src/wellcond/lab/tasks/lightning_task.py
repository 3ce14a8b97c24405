"""A LightningModule with its loaders as a task: its own steps and logged numbers, and a method's optimizer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from wellcond.lab.data.randomness import seeded
from wellcond.lab.data.splits import derived_seed
from wellcond.lab.errors import DataError, LabError
from wellcond.lab.hardware.machine import training_device
from wellcond.lab.runs.metric import Metric
from wellcond.lab.tasks.base import Task
from wellcond.lab.tasks.batch_parts import on_device, rows_of
from wellcond.lab.tasks.evaluation import Role
from wellcond.lab.tasks.own import parse_score

_PREFIX = re.compile(r"^(validation|valid|val|test)[_/]", re.IGNORECASE)
# Of names whose prefix is gone, what says which way is better.
_HIGHER = re.compile(r"acc|f1|auroc|auc\b|iou|dice|precision|recall|bleu|r2|score|(^|_)map", re.IGNORECASE)
_LOWER = re.compile(r"loss|err|mse|mae|rmse|perplexity|ppl|nll|wer|cer|bits", re.IGNORECASE)
_USUAL = ("acc", "accuracy")


class NumberedBatch(NamedTuple):
    """A batch and its number within the epoch, which steps are called with."""

    number: int
    batch: Any


class LightningTask(Task):
    """Trains and evaluates a LightningModule by its own steps; its `configure_optimizers` is not used.

    Args:
        module: The module's class, or a function that builds one.
        data: A LightningDataModule; None where the module has loaders of its own, or loaders are given.
        train: Training loader, in the place of the data's.
        validation: Validation loader.
        test: Test loader.
        score: The logged number that counts, such as ``"val_acc:max"``; None: the one logged ``val_*`` that is called
            as an accuracy is, or else ``val_loss``.
        epochs: Epochs of a run.
        source: The class, where `module` is a function that builds one.

    Raises:
        LabError: If the module cannot be trained so, or there is no training loader.
    """

    def __init__(
        self,
        module: Callable[[], pl.LightningModule],
        data: pl.LightningDataModule | None = None,
        *,
        train: Iterable[Any] | None = None,
        validation: Iterable[Any] | None = None,
        test: Iterable[Any] | None = None,
        score: str | None = None,
        epochs: int = 10,
        source: Any = None,
    ) -> None:
        if isinstance(module, pl.LightningModule):
            raise LabError(
                f"module must be a class or a function that builds the network, got a {type(module).__name__}: each "
                "seed begins with weights of its own"
            )
        self.module, self.data = module, data
        self.given = {"train": train, "validation": validation, "test": test}
        self.wanted, self.epochs = score, epochs
        self.source = source or module
        self.name = getattr(self.source, "__name__", "LightningModule")
        if score is not None:
            parse_score(score)

    @property
    def sources(self) -> tuple[Any, ...]:
        """The module and what holds its data."""
        return tuple(source for source in (self.source, None if self.data is None else type(self.data)) if source)

    def describe(self) -> dict[str, Any]:
        """Return where the data come from, and whose optimizer is not used."""
        data = {} if self.data is None else {"data module": type(self.data).__name__}
        return {**data, "configure_optimizers": f"that of {self.name} is not used: each method brings its optimizer"}

    def model(self, seed: int) -> nn.Module:
        """Return a new module."""
        module = self.module()
        if not isinstance(module, pl.LightningModule):
            raise DataError(f"{self.name} must build a LightningModule, got {type(module).__name__}")
        if not module.automatic_optimization:
            raise DataError(
                f"{self.name} optimizes by itself (automatic_optimization = False): a method cannot train it"
            )
        module.configure_model()
        return module

    def batches(self, seed: int, epoch: int) -> Iterable[Any]:
        """Return the training batches with their numbers."""
        return _Numbered(self.loaders["train"][0], derived_seed(f"order of epoch {epoch}", seed))

    def loss(self, model: nn.Module, batch: NumberedBatch) -> Tensor:
        """Return what the module's training_step does."""
        assert isinstance(model, pl.LightningModule)
        shown = self._transferred(model, batch.batch)
        with _logging(model, Logged()):
            found = _step(model.training_step, shown, batch.number)
        if isinstance(found, Mapping):
            found = found.get("loss")
        if not isinstance(found, Tensor):
            raise DataError(f"training_step of {self.name} must return the loss, got {type(found).__name__}")
        return found

    def scores(self, model: nn.Module, split: Role) -> dict[str, float]:
        """Return what the module's steps log, without the prefix ``val_`` or ``test_``."""
        found = self._logged(model, self.split_names[split], None)
        return {_PREFIX.sub("", name): value for name, value in found.items()}

    @cached_property
    def splits(self) -> tuple[Role, ...]:  # type: ignore[override]
        """``("test",)`` where there is one loader beside the training's."""
        return ("validation", "test") if len(self.split_names) == 2 else ("test",)

    @cached_property
    def split_names(self) -> dict[Role, str]:
        """From a role to the loader that it is measured on."""
        there = [name for name in ("validation", "test") if self.loaders[name]]
        if not there:
            raise DataError(f"{self.name} must have validation or test data: give a val_dataloader")
        return {"validation": "validation", "test": "test"} if len(there) == 2 else {"test": there[0]}

    @cached_property
    def metric(self) -> Metric:
        """The score that counts."""
        if self.wanted is not None:
            asked = parse_score(self.wanted)
            return Metric(_PREFIX.sub("", asked.name), unit="", higher_is_better=asked.higher_is_better)
        device = training_device()
        model = self.initial_model("", 0, None).to(device).eval()
        split = next(iter(self.split_names.values()))
        with torch.no_grad(), seeded("scores", 0, device):
            logged = [_PREFIX.sub("", name) for name in self._logged(model, split, 1) if _PREFIX.match(name)]
        return default_metric(logged, self.name)

    @cached_property
    def loaders(self) -> dict[str, list[Any]]:
        """The loaders of each split, perhaps none."""
        # What is drawn in setup, such as a random split, is the same for every seed.
        with seeded("data", 0):
            source: Any = self.data
            if source is None and not self.given["train"]:
                source = self.model(0)
            if source is not None:
                source.prepare_data()
                source.setup("fit")
                source.setup("test")
            found = {
                split: _listed(given if given is not None else _loader(source, name))
                for (split, given), name in zip(
                    self.given.items(), ("train_dataloader", "val_dataloader", "test_dataloader"), strict=True
                )
            }
        if len(found["train"]) != 1:
            raise DataError(
                f"{self.name} must have one training loader, got {len(found['train'])}: give --data-module, or "
                "LightningTask(..., train=loader)"
            )
        return found

    def _logged(self, model: nn.Module, split: str, limit: int | None) -> dict[str, float]:
        """Return what the module logs over a split's batches, or the first of them."""
        assert isinstance(model, pl.LightningModule)
        kind = "test" if split == "test" and _is_written(model, "test_step") else "validation"
        if not _is_written(model, f"{kind}_step"):
            raise DataError(f"{self.name} must have a validation_step, whose logged numbers are its scores")
        logged = Logged()
        step, loaders = getattr(model, f"{kind}_step"), self.loaders[split]
        with _logging(model, logged):
            getattr(model, f"on_{kind}_epoch_start")()
            for place, loader in enumerate(loaders):
                logged.suffix = f"/dataloader_idx_{place}" if len(loaders) > 1 else ""
                for number, batch in enumerate(loader):
                    if number == limit:
                        break
                    shown = self._transferred(model, on_device(batch, model.device))
                    logged.rows = rows_of(shown)
                    _step(step, shown, number, place)
            logged.suffix, logged.rows = "", 1
            getattr(model, f"on_{kind}_epoch_end")()
        return logged.means()

    def _transferred(self, model: pl.LightningModule, batch: Any) -> Any:
        """Return the batch after the hook that Lightning calls once it is on the device."""
        for source in (self.data, model):
            if source is not None and _is_written(source, "on_after_batch_transfer"):
                return source.on_after_batch_transfer(batch, 0)
        return batch


class _Numbered:
    """Numbers a loader's batches; a generator of the loader's own is seeded first."""

    def __init__(self, loader: Any, seed: int) -> None:
        self.loader, self.seed = loader, seed

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[NumberedBatch]:
        for holder in (self.loader, getattr(self.loader, "sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(self.seed)
        for number, batch in enumerate(self.loader):
            yield NumberedBatch(number, batch)


class Logged:
    """Means of what a module logs, weighted by the samples of its batches, as Lightning takes them.

    Attributes:
        rows: Samples of the batch that is at work.
        suffix: What is added to names, where there are several loaders.
    """

    def __init__(self) -> None:
        self.rows, self.suffix = 1, ""
        self._sums: dict[str, Any] = {}
        self._weights: dict[str, float] = {}
        self._metrics: dict[str, Any] = {}

    def log(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:
        """Take a number, or a metric of torchmetrics, which takes its mean itself."""
        name += self.suffix
        if callable(getattr(value, "compute", None)):
            self._metrics[name] = value
            return
        weight = batch_size or max(1, self.rows)
        number = value.detach().double() if isinstance(value, Tensor) else float(value)
        self._sums[name] = self._sums.get(name, 0.0) + number * weight
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def log_dict(self, dictionary: Mapping[str, Any], *_: Any, batch_size: int | None = None, **__: Any) -> None:
        """Take several."""
        for name, value in dictionary.items():
            self.log(name, value, batch_size=batch_size)

    def means(self) -> dict[str, float]:
        """Return the mean of each name; metrics begin anew."""
        found = {name: float(total / self._weights[name]) for name, total in self._sums.items()}
        found |= {name: float(metric.compute()) for name, metric in self._metrics.items()}
        for metric in self._metrics.values():
            metric.reset()
        return found


@contextmanager
def _logging(model: pl.LightningModule, logged: Logged) -> Iterator[None]:
    """Let a module log there in the block."""
    held = model.__dict__
    held["log"], held["log_dict"] = logged.log, logged.log_dict
    try:
        yield
    finally:
        del held["log"], held["log_dict"]


def default_metric(names: Iterable[str], module: str) -> Metric:
    """Return the score that counts among those that a module logs, where nobody named one.

    Args:
        names: What it logs in validation, without the prefix.
        module: What the module is called.

    Raises:
        DataError: If none is known to be one, or several might be.

    >>> default_metric(["loss", "acc"], "LitModel").name
    'acc'
    >>> default_metric(["loss"], "LitModel").higher_is_better
    False
    """
    names = list(dict.fromkeys(names))
    usual = [name for name in names if name.lower() in _USUAL]
    higher = usual or [name for name in names if _HIGHER.search(name)]
    lower = [name for name in names if name.lower() == "loss"] or [name for name in names if _LOWER.search(name)]
    for found, way in ((higher, True), (lower, False)):
        if len(found) == 1:
            return Metric(found[0], unit="", higher_is_better=way)
        if found:
            break
    logged = ", ".join(f"val_{name}" for name in names) or "no val_* at all"
    raise DataError(f"--score must say which number counts, such as --score val_acc:max; {module} logs {logged}")


def _is_written(source: Any, name: str) -> bool:
    """Return whether a class has its own method, and not only Lightning's."""
    method = getattr(type(source), name, None)
    return method is not None and not getattr(method, "__module__", "").startswith(("lightning.", "pytorch_lightning."))


def _step(step: Callable[..., Any], batch: Any, number: int, place: int = 0) -> Any:
    """Call a step with as many of batch, its number and its loader's number as it takes."""
    taken = inspect.signature(step).parameters
    free = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in taken.values())
    return step(*(batch, number, place)[: 3 if free else max(1, len(taken))])


def _loader(source: Any, name: str) -> Any:
    return getattr(source, name)() if source is not None and _is_written(source, name) else None


def _listed(loaders: Any) -> list[Any]:
    if loaders is None:
        return []
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]
