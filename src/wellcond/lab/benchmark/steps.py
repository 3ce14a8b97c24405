"""Times a training step of each method on a network, beside the first method's in the same rounds."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from wellcond.lab.benchmark.timing import Quartiles, StepTimer, quartiles, ratio_quartiles, time_rounds
from wellcond.lab.methods.method import Method, Refresh
from wellcond.lab.networks.registry import initial_model, select_model
from wellcond.lab.runs.memory import Memory, Step, measure_memory
from wellcond.lab.tasks.base import Task, TaskSeed
from wellcond.lab.training.progress import StepProgress

_CHANNELS, _CLASSES = 3, 10
_LR = 1e-3
_NEVER = 10**9
# Solves may take seconds each.
_MOST_SOLVES = 3
_WARM_UP, _WARM_UP_OF_SOLVES, _MEMORY_STEPS = 2, 1, 2


@dataclass(frozen=True)
class RefreshCost:
    """The time that the refreshes of a preconditioner add to its ordinary steps.

    Attributes:
        statistics_ms: Milliseconds that a step takes longer when it gathers second moments of all layers.
        solve_ms: Milliseconds that solving for all layers takes.
        amortised_ratio: An ordinary step with its share of both, over the first method's step.
    """

    statistics_ms: float
    solve_ms: float
    amortised_ratio: float


@dataclass(frozen=True)
class StepCost:
    """The cost of a method's training step.

    Attributes:
        method: The method.
        milliseconds: Of a whole step. A preconditioner's is an ordinary one, without refreshes.
        ratio: Of a whole step to the first method's in the same round.
        forward_backward_ms: Median milliseconds of the forward and backward pass.
        optimizer_ms: Median milliseconds of ``optimizer.step()``.
        refresh: What refreshes add; None for a method without any.
        memory: The bytes that training takes, a refresh included.
        memory_ratio: The peak over the first method's.
    """

    method: str
    milliseconds: Quartiles
    ratio: Quartiles
    forward_backward_ms: float
    optimizer_ms: float
    refresh: RefreshCost | None
    memory: Memory
    memory_ratio: float


class Workload(ABC):
    """The step that is timed.

    Attributes:
        refresh: The intervals that a preconditioner's refreshes are spread over.
        device: Where.
    """

    refresh: Refresh
    device: torch.device

    @abstractmethod
    def network(self) -> nn.Module:
        """Return a network, the same each time."""

    @abstractmethod
    def loss(self) -> Callable[[nn.Module], Tensor]:
        """Return the loss of one batch as a function of the network."""

    def build(self, method: Method, refresh: Refresh) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return a network, the same for every method up to its layers, and its optimizer."""
        model = method.with_layers(self.network()).to(self.device).train()
        optimizer, _ = method.build(model, _LR, refresh)
        return model, optimizer

    def timer(self, method: Method, refresh: Refresh) -> StepTimer:
        """Return what times the method's steps with these intervals."""
        return StepTimer(*self.build(method, refresh), self.loss(), method.second_order, method.clipping)


@dataclass(frozen=True)
class TaskWorkload(Workload):
    """A step on the first batch of a task.

    Attributes:
        task: The task.
        refresh: The intervals that a preconditioner's refreshes are spread over.
        device: Where.
    """

    task: Task
    refresh: Refresh
    device: torch.device

    def network(self) -> nn.Module:
        """Return the task's network."""
        return self.task.initial_model("", 0, None)

    def loss(self) -> Callable[[nn.Module], Tensor]:
        """Return the task's loss of its first batch."""
        data = TaskSeed(self.task, 0, self.device)
        batch = next(iter(data.batches()))
        return lambda model: data.loss(model, batch)


@dataclass(frozen=True)
class NoiseWorkload(Workload):
    """A step of a named network on noise for images.

    Attributes:
        model: The network's name.
        batch_size: Images of a batch.
        image_size: Their height and width.
        refresh: The intervals that a preconditioner's refreshes are spread over.
        device: Where.

    Raises:
        LabError: If the network is unknown or the images are too small for it.
    """

    model: str
    batch_size: int
    image_size: int
    refresh: Refresh
    device: torch.device

    def __post_init__(self) -> None:
        select_model(self.model, self.image_size)

    def network(self) -> nn.Module:
        """Return the network."""
        return initial_model(self.model, _CHANNELS, _CLASSES, seed=0)

    def loss(self) -> Callable[[nn.Module], Tensor]:
        """Return the cross-entropy of a batch of noise."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, _CHANNELS, self.image_size, self.image_size)
        images = torch.randn(shape, generator=generator).to(self.device)
        labels = torch.arange(self.batch_size, device=self.device) % _CLASSES
        return lambda model: F.cross_entropy(model(images), labels)


def measure_steps(
    methods: Sequence[Method], workload: Workload, rounds: int, progress: StepProgress | None = None
) -> list[StepCost]:
    """Time a training step of each method, all methods in turn, and count its memory.

    Args:
        methods: The methods; the others are compared with the first.
        workload: The step.
        rounds: How often each is timed.
        progress: Told how many steps there will be, and of each that is done; None: nobody is.

    Returns:
        One cost for each method, in their order.
    """
    with warnings.catch_warnings():
        # Second-order optimizers keep the graph of a gradient, which each step here forgets.
        warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
        return _measure(methods, workload, rounds, progress or StepProgress(Console(), "", quiet=True))


def _measure(methods: Sequence[Method], workload: Workload, rounds: int, progress: StepProgress) -> list[StepCost]:
    refreshing = [method for method in methods if any(spec.refreshed for spec in method.transforms)]
    solves = min(rounds, _MOST_SOLVES)
    turning = len(methods) + len(refreshing)
    progress.expect(
        turning * (_WARM_UP + rounds) + len(refreshing) * (_WARM_UP_OF_SOLVES + solves) + len(methods) * _MEMORY_STEPS
    )
    timers = {method.name: workload.timer(method, Refresh(_NEVER, _NEVER)) for method in methods}
    observing = {_observing(method): workload.timer(method, Refresh(1, _NEVER)) for method in refreshing}
    times, parts = time_rounds(timers | observing, rounds, _WARM_UP, progress.advance)
    refresh = {
        method.name: _refresh_cost(method, methods[0], workload, times, solves, progress) for method in refreshing
    }
    del timers, observing
    memory = {}
    for method in methods:
        memory[method.name] = _memory(method, workload)
        progress.advance(f"{method.name}, counting memory", _MEMORY_STEPS)
    first = methods[0].name
    return [
        StepCost(
            method=name,
            milliseconds=quartiles([1000 * time for time in times[name]]),
            ratio=ratio_quartiles(times[name], times[first]),
            forward_backward_ms=1000 * median(a - b for a, b in zip(times[name], parts[name], strict=True)),
            optimizer_ms=1000 * median(parts[name]),
            refresh=refresh.get(name),
            memory=memory[name],
            memory_ratio=memory[name].peak / memory[first].peak,
        )
        for name in (method.name for method in methods)
    ]


def _observing(method: Method) -> str:
    return f"{method.name}, gathering second moments"


def _refresh_cost(
    method: Method,
    first: Method,
    workload: Workload,
    times: dict[str, list[float]],
    solves: int,
    progress: StepProgress,
) -> RefreshCost:
    ordinary, observing = times[method.name], times[_observing(method)]
    statistics = max(0.0, median(a - b for a, b in zip(observing, ordinary, strict=True)))
    solving = f"{method.name}, solving"
    times_of_solves, _ = time_rounds(
        {solving: workload.timer(method, Refresh(1, 1))}, solves, _WARM_UP_OF_SOLVES, progress.advance
    )
    solve = max(0.0, median(times_of_solves[solving]) - median(observing))
    shares = statistics / workload.refresh.stats_every + solve / workload.refresh.solve_every
    ratio = ratio_quartiles(ordinary, times[first.name]).median
    return RefreshCost(1000 * statistics, 1000 * solve, ratio + shares / median(times[first.name]))


def _memory(method: Method, workload: Workload) -> Memory:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, Step]:
        timer = workload.timer(method, Refresh(1, 1))
        return timer.model, timer.optimizer, timer.seconds

    return measure_memory(build, workload.device, _MEMORY_STEPS)
