"""Calibrates a trained model: one pass over data gives its norms statistics at the training batch size."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from wellcond.calibration.estimates import ESTIMATORS, Average, estimator_for
from wellcond.calibration.feeding import ELSEWHERE, Limits
from wellcond.calibration.progress import CalibrationProgress, Show
from wellcond.calibration.replay import Passed, Seen, named_batch_norms, training_pass
from wellcond.calibration.undoing import Snapshot, thawed_meanwhile, undone_on_error
from wellcond.calibration.watching import CalibrationWatch
from wellcond.nn.convert.frozen import frozen_norms, lookalikes
from wellcond.nn.convert.norms import convert_norm
from wellcond.nn.convert.report import is_other_norm, keep_report
from wellcond.runtime.checks import Predicate, WellcondWarning, check_choice, check_positive_integer, checked
from wellcond.runtime.models import Call, device_of, unwrapped
from wellcond.runtime.ranks import Ranks
from wellcond.runtime.texts import quoted_names


@checked
def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    batch_size: int | None = None,
    what: str | None = None,
    *,
    call: Call | None = None,
    momentum: float | None = None,
    where: Predicate | None = None,
    max_batches: int | None = None,
    max_samples: int | None = None,
    until: float | None = None,
    progress: bool | Show = False,
    **options: Any,
) -> nn.Module:
    """Take a trained model's normalization statistics anew, in one pass over data.

    - ``"bn"``: the running mean and (unbiased) variance of the batch normalizations of all kinds, each of which
      normalizes as it does in training; frozen ones (`nn.convert_norm`) stay frozen. `num_batches_tracked` becomes
      the number of batches, of all ranks; with a momentum it goes up by that.
    - ``"bsr"``: the sums of Batch Statistics Regression (3.12). Batch normalizations that are not `BSRBatchNorm*` yet
      become such (`nn.convert_norm`), and from then on evaluate each instance with statistics that are predicted for
      it. Running statistics stay: the regression's feature (μ_s − μ)² refers to them. To take both anew, calibrate
      ``"bn"`` first.
    - ``"evalnorm"``: likewise α and β of `EvalNorm*`, here not learned step by step but the exact minimum, over [0, 1],
      of the squared differences to the batches' statistics that its training descends. With ``learn=False``: 1/m.

    *Without a batch size* the running statistics are those of all samples together, as if every layer's input had lain
    in one tensor: each of the loader's batches is normalized with its own statistics, and counts as its samples do,
    also a last one that is smaller. So it is right after the weights have changed: by averaging, merging, pruning,
    rounding (`wellcond.repair`). *With a batch size m* they are the average over batches of m consecutive samples, as
    training takes it: for a model that was trained with small batches, and for ``"bsr"`` and ``"evalnorm"``, which ask
    how such batches differ. A batch of the loader may then have any number of samples: it is divided into batches of m,
    and what is left over is not counted. Larger ones only make the pass faster. Where a layer's input has k rows per
    sample (frames of a video), a batch has k·m rows.

    In the pass the selected normalizations are in training mode; all other modules, dropout and the normalizations that
    are not selected among them, are in evaluation mode. Nothing else changes: parameters, gradients, other buffers,
    modes, hooks, torch's random state. If the pass raises or is interrupted, nothing has changed at all.

    With `torch.distributed` initialized every rank must call this, each with its part of the data, of any size; all of
    them get the statistics of the whole. A `DistributedDataParallel` model is run without its wrapper. What was
    synchronized over ranks in training is here taken from each rank's groups of m samples, so m is then the number of
    samples on all ranks together. A model whose parameters are sharded over ranks (FSDP2), whose forward pass needs all
    of them, is run on all as often as the rank with the most batches asks; what is run for the others' sake alone is
    not counted.

    Args:
        model: Any model with batch normalizations, or one of them; may be wrapped for DDP or compiled.
        loader: Gives batches: a tensor; a tuple or list, whose first element is the input (a detector's list of images,
            too); or a mapping, for ``model(**batch)``. They are moved to the model's device.
        batch_size: None: the statistics of all samples together. Or m, the samples behind one set of statistics in
            training: of one device, or of a ghost group.
        what: ``"bn"``, ``"bsr"`` or ``"evalnorm"``; the latter two need a batch size. None: ``"bn"`` without a batch
            size, ``"bsr"`` with one.
        call: ``call(model, batch)``, for a model that is run otherwise; it gets the model without its wrapper. Each row
            of a layer's input is then taken for a sample.
        momentum: None: all batches weigh equally, or as their samples. A number: the moving average of training, from
            the present statistics on, in which a batch has this weight; of ranks, the average.
        where: Which normalizations: a predicate of (qualified name, module). All of them by default.
        max_batches: Stop after so many of the loader's batches (of each rank).
        max_samples: Stop after so many samples (of each rank); those of the last batch that are too many do not count.
        until: Stop once no layer's statistics have a standard error above this, found from how much batches differ: of
            the means in standard deviations, of the variances as a share of them, each the root mean square over
            channels. So 0.01 is one in a hundred. At least four batches are taken. Each rank stops by itself.
        progress: True to show a line on the standard error stream (of the first rank), or a function to call with a
            `CalibrationProgress` after each batch.
        **options: For `nn.convert_norm`, such as ``nonneg="nnls"``; none for ``"bn"``.

    Returns:
        `model`. `nn.conversion_report(model)` says what was changed, what was left, and why.

    Raises:
        TypeError: If an option is not one of the layers', or a layer cannot be converted, or keeps running statistics
            but is of no known type.
        ValueError: If an argument is out of its range or a batch size is missing, there is no such layer, the loader is
            empty, no batch has m samples, a layer has one value per channel in a batch of m, or features are not
            finite.
        RuntimeError: If the pass failed on another rank.

    Warns:
        WellcondWarning: About layers that the pass did not reach, by name; their statistics stay. And if the loader
            ended before `until` was reached.

    Source: thesis ch. 3, 3.5–3.13.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval()
        >>> loader = [(torch.randn(8, 1, 6, 6), None) for _ in range(10)]
        >>> print(calibrate(model, loader)[1].num_batches_tracked)
        tensor(10)
        >>> calibrate(model, loader, batch_size=2, nonneg="nnls")[1]
        BSRBatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, nonneg=nnls)
    """
    if batch_size is not None:
        check_positive_integer("batch_size", batch_size)
    what = ("bn" if batch_size is None else "bsr") if what is None else what
    check_choice("what", what, ESTIMATORS)
    if momentum is not None and not 0 < momentum <= 1:
        raise ValueError(f"momentum must lie in (0, 1] or be None, got {momentum!r}")
    for name, most in (("max_batches", max_batches), ("max_samples", max_samples)):
        if most is not None:
            check_positive_integer(name, most)
    if until is not None and until <= 0:
        raise ValueError(f"until must be positive, such as 0.01, or None, got {until!r}")
    if what == "bn" and options:
        raise TypeError(f"what='bn' converts nothing and takes no options, got {quoted_names(options)}")
    if what != "bn" and batch_size is None:
        raise ValueError(
            f"batch_size must be given for what={what!r}, which asks how batches of that size differ: the samples of "
            "one device in training"
        )
    inner = unwrapped(model)
    layers, frozen = _selected(inner, where)
    were = {name: type(layer).__name__ for name, layer in layers.items()}
    with undone_on_error(layers.values()), thawed_meanwhile(frozen, again=what == "bn"):
        if what != "bn":
            chosen = set(layers.values())
            convert_norm(inner, what, lambda name, module: module in chosen, **options)
        norms = {name: cast(_BatchNorm, layer) for name, layer in layers.items()}
        estimators = {name: estimator_for(what, layer, batch_size is None, momentum) for name, layer in norms.items()}
        averages = {name: estimators[name].average(layer, momentum) for name, layer in norms.items()}
        watch = CalibrationWatch(norms, until, progress)

        def observe(name: str, seen: Seen) -> None:
            weight = 1.0 if batch_size is not None else float(seen.batches.elements)
            averages[name].add(estimators[name].values(norms[name], seen), weight)
            watch.observe(name, seen, weight)

        passed, error = Passed(0, 0, batch_size, 0), None
        limits = Limits(max_batches, max_samples, watch.is_enough)
        try:
            passed = training_pass(
                inner, loader, batch_size or "whole", norms, observe, call=call, limits=limits, after=watch.after
            )
        except Exception as raised:  # The other ranks, which would wait for this one, are told first.
            error = raised
        finally:
            watch.end()
        _join_ranks(averages, passed, error, device_of(inner))
        missed = [name for name, average in averages.items() if average.batches == 0]
        with torch.no_grad():
            for name in layers.keys() - missed:
                estimators[name].replace(norms[name], averages[name])
    _report(model, inner, what, were, layers, missed, watch.last)
    if missed:
        batch = "batch" if batch_size is None else f"batch of {batch_size} samples"
        warnings.warn(
            f"calibrate: no {batch} reached {quoted_names(missed)}, which keep their statistics",
            WellcondWarning,
            stacklevel=3,
        )
    watch.warn()
    return model


@checked
@contextmanager
def calibrated(
    model: nn.Module, loader: Iterable[Any], batch_size: int | None = None, what: str | None = None, **options: Any
) -> Iterator[nn.Module]:
    """Have a model calibrated for as long as a ``with`` block lasts, such as a validation in the midst of training.

    Afterwards its batch normalizations are what they were, of their own kind and with the statistics that they had, so
    training goes on, and checkpoints are written, as if there had been no calibration.

    Args:
        model: As in `calibrate`.
        loader: As in `calibrate`; not the one that trains, whose workers and shuffling a further pass would disturb.
        batch_size: As in `calibrate`.
        what: As in `calibrate`.
        **options: All further ones of `calibrate`.

    Yields:
        `model`, calibrated.

    Raises:
        Exception: Whatever `calibrate` raises.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval()
        >>> loader = [torch.randn(8, 1, 6, 6) for _ in range(10)]
        >>> with calibrated(model, loader, batch_size=2):
        ...     print(type(model[1]).__name__)
        BSRBatchNorm2d
        >>> print(type(model[1]).__name__, int(model[1].num_batches_tracked))
        BatchNorm2d 0
    """
    inner = unwrapped(model)
    before = Snapshot([*named_batch_norms(inner)[0].values(), *frozen_norms(inner)])
    try:
        yield calibrate(model, loader, batch_size, what, **options)
    finally:
        before.keep_modes()  # They are not the calibration's.
        before.put_back()


def _selected(model: nn.Module, where: Predicate | None) -> tuple[dict[str, nn.Module], list[nn.Module]]:
    """Return the normalizations that are to be calibrated, by name, and which of them are frozen."""

    def chosen(found: dict[nn.Module, list[str]]) -> dict[str, nn.Module]:
        return {
            names[0]: layer
            for layer, names in found.items()
            if where is None or any(where(name, layer) for name in names)
        }

    unknown = chosen(lookalikes(model))
    if unknown:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in unknown.values()}))
        raise TypeError(
            f"calibrate cannot calibrate {quoted_names(unknown)} ({kinds}): they keep running statistics, but are no "
            "batch normalizations that are known. Leave them out with `where`"
        )
    layers, of_any_kind = named_batch_norms(model, where)
    lazy = {name: layer for name, layer in layers.items() if isinstance(layer, _LazyNormBase)}
    if lazy:
        raise TypeError(
            f"calibrate cannot calibrate {quoted_names(lazy)}, which have no parameters yet: run the model once first"
        )
    of_frozen = frozen_norms(model)
    frozen = chosen(of_frozen)
    if layers or frozen:
        return {**layers, **frozen}, list(frozen.values())
    if of_any_kind + len(of_frozen) == 0:
        raise ValueError(f"{type(model).__name__} has no batch normalization to calibrate")
    selected = "" if where is None else " that `where` selects"
    raise ValueError(f"{type(model).__name__} has no batch normalization with running statistics{selected}")


def _report(
    model: nn.Module,
    inner: nn.Module,
    what: str,
    were: dict[str, str],
    layers: dict[str, nn.Module],
    missed: list[str],
    passed: CalibrationProgress,
) -> None:
    """Keep what was done to which layer."""
    new = {"bn": "new running statistics", "bsr": "new regression sums", "evalnorm": "a new mixture"}[what]
    changed, left = {}, {name: f"{kind}: no whole batch reached it" for name, kind in were.items() if name in missed}
    for name, kind in were.items():
        now = type(layers[name]).__name__
        if name not in missed:
            changed[name] = f"{kind}: {new}" if kind == now else f"{kind} → {now}: {new}"
    chosen = set(layers.values())
    for name, module in inner.named_modules():
        if module in chosen:
            continue
        if isinstance(module, _BatchNorm):
            kept = module.running_mean is not None
            left[name] = f"{type(module).__name__}: {'not selected by `where`' if kept else 'no running statistics'}"
        elif is_other_norm(module):
            left[name] = f"{type(module).__name__}: no batch normalization"
    for reported in {inner, model}:
        keep_report(reported, f"calibrate(what={what!r})", changed, left, f"of {passed}")


def _join_ranks(
    averages: dict[str, Average], passed: Passed, error: Exception | None, device: torch.device | None
) -> None:
    """Finish the averages over the batches of all ranks; raise on all of them if there is nothing to average."""
    ranks = Ranks(True)
    said = torch.tensor([error is not None, passed.batches, passed.largest], dtype=torch.int64, device=device)
    failed, batches, largest = ranks.gather(said).unbind(1)
    if error is not None:
        raise error
    if failed.any():
        raise RuntimeError(ELSEWHERE)
    if not batches.any():
        raise ValueError("the loader gave no batch")
    ranks.add([tensor for average in averages.values() for tensor in average.summed()])
    reached = {name: average for name, average in averages.items() if average.batches}
    if not reached and passed.batch_size is not None and 0 < largest.max() < passed.batch_size:
        raise ValueError(f"no batch has batch_size={passed.batch_size} samples: the largest has {int(largest.max())}")
    if not reached:
        raise ValueError(f"no batch reached any of the batch normalizations {quoted_names(averages)}")
    for average in reached.values():
        average.finish()
    ranks.add([tensor for average in reached.values() for tensor in average.summed_around_means()])
    for average in reached.values():
        average.finish_around_means()
    spoilt = [name for name, average in reached.items() if not average.is_finite]
    if spoilt:
        raise ValueError(f"features that are not finite reached {quoted_names(spoilt)}; nothing has changed")
