"""Replays data through a trained model: its norms compute their training output and leave their buffers alone."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from wellcond.calibration.feeding import Limits, Run, communicates, fed
from wellcond.nn.functional.normalize import normalize
from wellcond.nn.norm.base import StatisticsNorm
from wellcond.nn.norm.history import PastStatistics
from wellcond.nn.norm.instance import InstanceInference
from wellcond.numerics.moments import (
    Moments,
    instance_and_ghost_moments,
    merge_unequal,
    positions,
    statistics_dtype,
)
from wellcond.runtime.models import Call, device_of, kept_random_state, moved, run_on

_ALL = Limits()


class Seen(NamedTuple):
    """The moments that one call of a layer saw: of whole batches of m samples.

    Attributes:
        instances: Moments of each instance, shape [batches·rows, C].
        batches: Moments of each batch of m samples, or of the loader's whole batch, shape [batches, C].
        rows: Of the layer's input, per batch: m, or a multiple where the model folds other dimensions into the samples.
        tracked: What the layer's running statistics take in, by buffer, averaged over the batches; None where that is
            `batches`' means and unbiased variances.
    """

    instances: Moments
    batches: Moments
    rows: int
    tracked: dict[str, Tensor] | None


class StandIn:
    """Stands in for a layer's forward: normalizes groups of m samples as the layer does in training, and reports them.

    Args:
        run: The pass.
        name: Of the layer.
        layer: Is read only.
        observe: Where to report; None for nowhere.
    """

    def __init__(self, run: Run, name: str, layer: _BatchNorm, observe: Callable[[str, Seen], None] | None) -> None:
        self.name = name
        self._run, self._layer, self._observe = run, layer, observe
        self._double = None if _is_batch_normalization(layer) else double_of(layer)
        self._so_far: Moments | None = None

    def __call__(self, input: Tensor) -> Tensor:
        """Normalize, and report.

        Args:
            input: Shape [N, C, *positions].

        Returns:
            The same shape; what fills no group of m samples is there, too, and the groups do not depend on it.

        Raises:
            ValueError: If there is one value per channel in a group.
        """
        self._layer._check_input_dim(input)
        rows, batches = self._run.group(input.shape[0])
        if batches == 0:
            return self._with_estimates(input)
        single = rows * positions(input) == 1
        if single and self._run.batch_size is not None:
            raise ValueError(
                f"{self.name!r} has 1 value per channel in a batch of {self._run.batch_size} sample, which has no "
                f"variance: got input size {list(input.shape)}"
            )
        counted = input[: batches * rows]
        instances, own = instance_and_ghost_moments(counted, (rows,) * batches if batches > 1 else None)
        own = Moments(own.mean.view(batches, -1), own.var.view(batches, -1), own.elements)
        if self._run.batch_size is None:
            # A lone value tells the mean something, but would be normalized to 0.
            self._keep(own)
            if single:
                if self._double is None:
                    self._report(Seen(instances, own, rows, None))
                return self._with_estimates(input)
        if self._double is None:
            self._report(Seen(instances, own, rows, None))
            # What is left over joins the last group, as something that none of the others depends on.
            sizes = (*(rows,) * (batches - 1), input.shape[0] - (batches - 1) * rows)
            return self._normalize(input, own.mean, own.var, sizes)
        follows = not isinstance(self._double, StatisticsNorm) or self._double.tracks_batch_moments
        if follows:
            self._report(Seen(instances, own, rows, None))
            outputs = [_train(self._double, counted, rows)]
        else:
            tracked, output = _tracked(self._double, counted, rows)
            self._report(Seen(instances, own, rows, tracked))
            outputs = [output]
        if len(counted) < len(input):
            outputs.append(self._with_estimates(input[len(counted) :]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _report(self, seen: Seen) -> None:
        if self._observe is not None and not self._run.spare:
            self._observe(self.name, seen)

    def _keep(self, own: Moments) -> None:
        """Merge what this pass has seen, of whole batches."""
        if self._run.spare:
            return
        new = Moments(own.mean[0], own.var[0], own.mean.new_tensor(float(own.elements)))
        if self._so_far is not None:
            both = (torch.stack(pair) for pair in zip(self._so_far, new, strict=True))  # type: ignore[arg-type]
            mean, var, elements = both
            new = merge_unequal(Moments(mean, var, elements[:, None]))
            new = new._replace(elements=torch.as_tensor(new.elements).reshape(()))
        self._so_far = new

    def _with_estimates(self, input: Tensor) -> Tensor:
        """Normalize what is less than a batch."""
        if self._double is not None:
            self._double.training = False
            output: Tensor = self._double.forward(input)
            return output
        mean, var = self._layer.running_mean, self._layer.running_var
        if self._so_far is not None:
            mean, var, _ = self._so_far
        if mean is None or var is None:
            mean, var, _ = instance_and_ghost_moments(input, None)[1]
        dtype = statistics_dtype(input.dtype)
        return self._normalize(input, mean.to(dtype)[None], var.to(dtype)[None], (input.shape[0],))

    def _normalize(self, input: Tensor, mean: Tensor, var: Tensor, sizes: tuple[int, ...]) -> Tensor:
        layer = self._layer
        if len(sizes) == 1:
            return normalize(input, mean[0], var[0], layer.weight, layer.bias, layer.eps)
        return normalize(input, mean, var, layer.weight, layer.bias, layer.eps, sizes=sizes)


def _is_batch_normalization(layer: _BatchNorm) -> bool:
    """Whether a layer does nothing in training but to normalize with its batch's statistics."""
    forward = type(layer).forward
    if forward is StatisticsNorm.forward:
        assert isinstance(layer, StatisticsNorm)
        own = type(layer).normalize_batch is StatisticsNorm.normalize_batch
        return own or isinstance(layer, InstanceInference)
    return forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def double_of(layer: _BatchNorm) -> _BatchNorm:
    """Return a layer with the same parameters and submodules, but buffers of its own.

    Called by its `forward`, it leaves the original as it is, in training, too; it has a process's batch for its own.

    >>> layer = nn.BatchNorm1d(2)
    >>> _ = double_of(layer).forward(torch.randn(4, 2))
    >>> int(layer.num_batches_tracked)
    0
    """
    double = type(layer).__new__(type(layer))
    # Shallow, so that what an attribute refers to is not copied.
    double.__dict__.update(vars(layer))
    for name, value in vars(layer).items():
        if isinstance(value, PastStatistics):
            double.__dict__[name] = copy.copy(value)
    double.__dict__["_buffers"] = {
        name: value if value is None else value.detach().clone() for name, value in layer._buffers.items()
    }
    if isinstance(double, StatisticsNorm):
        double.synchronize = False
    return double


def _train(double: _BatchNorm, input: Tensor, rows: int) -> Tensor:
    """Normalize whole groups as a layer of any kind does in training."""
    double.training = True
    if isinstance(double, StatisticsNorm):
        double.group_size = rows
        output: Tensor = double.forward(input)
        return output
    return torch.cat([double.forward(group) for group in input.split(rows)])


def _tracked(double: _BatchNorm, input: Tensor, rows: int) -> tuple[dict[str, Tensor], Tensor]:
    """As `_train`, for layers that do not train with running statistics; also return what these took in."""
    present = {name: buffer.clone() for name, buffer in running_buffers(double).items()}
    momentum, double.momentum = double.momentum, 1.0
    tracks, double.track_running_stats = double.track_running_stats, True
    try:
        output = _train(double, input, rows)
        tracked = {name: buffer.clone() for name, buffer in running_buffers(double).items()}
    finally:
        double.momentum, double.track_running_stats = momentum, tracks
        for name, buffer in running_buffers(double).items():
            buffer.copy_(present[name])
    return tracked, output


def running_buffers(layer: _BatchNorm) -> dict[str, Tensor]:
    """Return the running statistics by name: mean, variance, and what else a layer evaluates with.

    >>> list(running_buffers(nn.BatchNorm1d(2)))
    ['running_mean', 'running_var']
    """
    buffers = layer._buffers.items()
    return {name: buffer for name, buffer in buffers if name.startswith("running_") and buffer is not None}


@contextlib.contextmanager
def replaced(layer: nn.Module, stand: StandIn) -> Iterator[None]:
    """Put a layer in training mode, and let a stand-in do its forward; the layer's hooks run as always."""
    if "forward" in vars(layer):
        raise TypeError(f"{stand.name!r} has its own 'forward', set on this one object: what it does is not known")
    layer.forward = stand
    layer.training = True
    try:
        yield
    finally:
        del layer.__dict__["forward"]


class Passed(NamedTuple):
    """The batches and samples that a pass went over.

    Attributes:
        batches: That the loader gave.
        largest: Samples of the largest of them, as far as that can be told.
        batch_size: m; None where each batch was one group.
        samples: That were counted, as far as they are known.
    """

    batches: int
    largest: int
    batch_size: int | None
    samples: int


def training_pass(
    model: nn.Module,
    loader: Iterable[Any],
    batch_size: int | Literal["first", "whole"],
    layers: Mapping[str, _BatchNorm],
    observe: Callable[[str, Seen], None],
    *,
    call: Call | None = None,
    limits: Limits = _ALL,
    after: Callable[[Passed], None] | None = None,
) -> Passed:
    """Run a model over data with some batch normalizations in training mode, and report what these see.

    They normalize consecutive samples in groups of m, whatever the loader's batches are; other modules are in
    evaluation mode. Samples that fill no group go through the model uncounted. Nothing is learned and nothing remains:
    parameters, gradients, buffers, modes and torch's random state are afterwards as before, also when the pass raises.
    Nor does it communicate (`fed` says what does): synchronized normalizations use this process's batch.

    Args:
        model: Without a wrapper (`unwrapped`).
        loader: Gives batches: a tensor; a tuple or list, whose first element is the input; or a mapping, for
            ``model(**batch)``. They are moved to the model's device.
        batch_size: m; ``"first"``: the size of the loader's first batch; ``"whole"``: each batch is one group.
        layers: The normalizations by name.
        observe: Called with the layer's name and what it saw, at each of its calls with at least one whole batch.
        call: ``call(model, batch)`` runs a model that is run otherwise. The layers' input is then taken to have one row
            per sample.
        limits: How much of the loader is taken.
        after: Called after each batch.

    Returns:
        How much there was.

    Raises:
        TypeError: If a layer object has its own `forward`.
        ValueError: If m is to be found and cannot be, or a layer has one value per channel in a batch of m samples.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1)).eval()
        >>> means = []
        >>> loader = [torch.tensor([[1.0], [3.0], [5.0], [5.0], [9.0]])]
        >>> training_pass(model, loader, 2, {"0": model[0]}, lambda name, seen: means.append(seen.batches.mean))
        Passed(batches=1, largest=5, batch_size=2, samples=4)
        >>> means[0].flatten().tolist()
        [2.0, 5.0]
    """
    run = Run(batch_size if isinstance(batch_size, int) else None, limits)
    device = device_of(model)

    def passed() -> Passed:
        return Passed(run.batches, run.largest, run.batch_size, run.counted)

    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_random_state(model))
        stack.enter_context(_evaluating(model))
        if "torch._dynamo" in sys.modules:  # Compiled code knows nothing of the layers' stand-ins.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        named = {layer: name for name, layer in layers.items()}
        for name, layer in model.named_modules():
            # Without running statistics a layer always takes the batch's, and these should be of m samples, too.
            if layer in named or (isinstance(layer, _BatchNorm) and layer.running_mean is None):
                stack.enter_context(replaced(layer, StandIn(run, name, layer, observe if layer in named else None)))
        for batch in fed(loader, run, model, knows_samples=call is None):
            if batch_size == "first" and run.batch_size is None:
                run.batch_size = run.samples
                if not run.batch_size:
                    raise ValueError("batch_size must be given: the first batch does not say how many samples it has")
            enough = run.samples is None or run.samples >= (run.batch_size or 1)
            if enough or communicates(model):
                run_on(model, moved(batch, device), call)
            run.end()
            if after is not None:
                after(passed())
    return passed()


def named_batch_norms(
    model: nn.Module, where: Callable[[str, nn.Module], bool] | None = None
) -> tuple[dict[str, _BatchNorm], int]:
    """Return the batch normalizations with running statistics, by their first name, and how many there are of any kind.

    Args:
        model: Without a wrapper.
        where: A predicate of (qualified name, layer); a layer with several names is taken if it holds for one.

    Returns:
        The selected ones with running statistics, and the number of all.
    """
    names: dict[_BatchNorm, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm):
            names.setdefault(module, []).append(name)
    selected = {
        own[0]: layer
        for layer, own in names.items()
        if layer.running_mean is not None and (where is None or any(where(name, layer) for name in own))
    }
    return selected, len(names)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules in evaluation mode, by the flag alone: `eval()` may do more. Let none share its buffers."""
    modes = [(module, module.training) for module in model.modules()]
    wrappers = [
        (module, module.require_forward_param_sync)
        for module in model.modules()
        if isinstance(module, DistributedDataParallel)
    ]
    try:
        for module, _ in modes:
            module.training = False
        for wrapper, _ in wrappers:
            # Ranks may have different numbers of batches.
            wrapper.require_forward_param_sync = False
        yield
    finally:
        for module, training in modes:
            module.training = training
        for wrapper, shares in wrappers:
            wrapper.require_forward_param_sync = shares
