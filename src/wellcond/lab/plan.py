"""From what was asked for to the runs that answer it; every mistake in the settings shows here, before any training."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from wellcond.lab.errors import LabError
from wellcond.lab.given_paths import check_output_folder
from wellcond.lab.hardware.launch import from_first, launched
from wellcond.lab.hardware.machine import environment, training_device
from wellcond.lab.methods.method import Method, Refresh, baselines, given_grids, select_methods, with_lrs
from wellcond.lab.networks.weights import digest_of
from wellcond.lab.opened_task import opened_task
from wellcond.lab.runs.option import options_of
from wellcond.lab.runs.records import RunSpec
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.training_options import TrainingOptions
from wellcond.lab.tasks.base import Task
from wellcond.lab.trials import RUN_OPTIONS, Trial, make_trials


@dataclass(frozen=True)
class Plan:
    """A comparison, ready to run.

    Attributes:
        settings: What was asked for, with the methods that are compared.
        task: The data and what one does with it.
        methods: What is compared.
        baselines: From a method's name to its baseline's.
        target: Test score to count epochs to; None: the first baseline's final score decides.
        threads: Torch's threads in each job.
        template: What all runs share.
    """

    settings: Settings
    task: Task
    methods: tuple[Method, ...]
    baselines: dict[str, str]
    target: float | None
    threads: int
    template: RunSpec

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return self.template.steps_per_epoch

    @property
    def steps(self) -> int:
        """Steps of a run of all epochs."""
        return self.template.epochs * self.steps_per_epoch

    def spec(self, method: Method, lr: float, seed: int, steps: int | None = None) -> RunSpec:
        """Return one run of the comparison, of all epochs unless it says how many steps."""
        return replace(
            self.template,
            method=method,
            lr=lr,
            seed=seed,
            steps=self.steps if steps is None else steps,
            schedule=method.schedule or self.template.schedule,
            # Without batch statistics it is the same run whatever the groups: comparisons can share it.
            ghost_batch=self.template.ghost_batch if method.has_batch_statistics else None,
        )

    @cached_property
    def trials(self) -> dict[str, tuple[Trial, ...]]:
        """The grid of each method, by the method's name; all are equally long."""
        return make_trials(self.methods, self.settings.sweeps, self.settings.search, self.settings.trials)

    @cached_property
    def table(self) -> dict[Trial, tuple[RunSpec, ...]]:
        """Every run of all epochs, made once: the trials of all methods, one run a seed each."""
        return {trial: self.row(trial) for trials in self.trials.values() for trial in trials}

    def row(self, trial: Trial, steps: int | None = None) -> tuple[RunSpec, ...]:
        """Return a trial's runs, one a seed, of all epochs unless it says how many steps."""
        specs = [self.spec(trial.method, trial.lr, seed, steps) for seed in range(self.settings.seeds)]
        options = trial.run_options | {"swept": trial.swept}
        if "ghost_batch" in options and not trial.method.has_batch_statistics:
            options["ghost_batch"] = None
        if steps is None and "batch_size" in options:
            per_epoch = self.task.steps_with(int(str(options["batch_size"])))
            options |= {"steps_per_epoch": per_epoch, "steps": self.template.epochs * per_epoch}
        return tuple(replace(spec, **options) for spec in specs)  # type: ignore[arg-type]

    @property
    def trial_seeds(self) -> int:
        """How many seeds every trial is trained with; the others train the chosen trials alone."""
        return self.settings.trial_seeds or self.settings.seeds

    def specs(self) -> list[RunSpec]:
        """Return the runs of all epochs that the trials are chosen by.

        Methods come innermost, so that a machine that slows down or speeds up meets all of them alike.
        """
        return [
            self.table[trial][seed]
            for seed in range(self.trial_seeds)
            for place in zip(*self.trials.values(), strict=True)
            for trial in place
        ]


def make_plan(
    settings: Settings,
    task: Task | None = None,
    lrs: Mapping[str, Sequence[float]] | Sequence[float] | None = None,
    more: Mapping[str, Method] | None = None,
) -> Plan:
    """Check the settings against the data and fill in what they leave open.

    Args:
        settings: What was asked for.
        task: Its task if it is open already; None opens it.
        lrs: lr grids by optimizer, or one for all, beside those of the settings.
        more: Further methods by name, which the settings may name.

    Returns:
        The plan.

    Raises:
        LabError: If a name is unknown, the data cannot be read, or the numbers do not fit together.
    """
    # What is named is read before any data is: to find a name misspelt must not take a minute.
    methods = None if settings.methods is None else _methods(settings.methods, settings, lrs, more)
    opened = opened_task(settings, task)
    task, defaults, batch_size = opened.task, opened.defaults, opened.batch_size
    if methods is None:
        settings = replace(settings, methods=defaults.methods)
        methods = _methods(defaults.methods, settings, lrs, more)
    epochs = settings.epochs or defaults.epochs
    steps_per_epoch = task.steps_with(batch_size)
    steps = epochs * steps_per_epoch
    settings.check_together(epochs, batch_size, steps)
    _check_kind(settings, task)
    _check_ranks(settings, methods, batch_size, defaults.smallest_batch)
    _check_scaling(settings, methods)
    refresh = Refresh.for_run_of(steps)
    threads = max(1, torch.get_num_threads() // settings.jobs)
    decided = {
        "epochs": epochs,
        "stats_every": settings.stats_every or refresh.stats_every,
        "solve_every": settings.solve_every or refresh.solve_every,
    }
    template = RunSpec(
        **vars(opened.spec(seed=0)) | decided,
        method=methods[0],
        lr=methods[0].lrs[0],
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        metric=opened.metric,
        data=opened.digest,
        weights_digest=None if settings.weights is None else digest_of(settings.weights),
        # Of the first rank's machine: all have to agree on what is kept.
        environment=from_first(lambda: environment(settings.jobs, threads, *_training_place(settings))),
    )
    _check_methods(methods, task, template)
    target = defaults.target if settings.target is None else settings.target
    plan = Plan(settings, task, methods, baselines(methods), target, threads, template)
    _check_trials(plan)
    return plan


def _methods(
    names: Sequence[str],
    settings: Settings,
    lrs: Mapping[str, Sequence[float]] | Sequence[float] | None,
    more: Mapping[str, Method] | None,
) -> tuple[Method, ...]:
    methods = select_methods(names, more)
    return with_lrs(methods, dict(settings.lrs) | given_grids(lrs, methods))


def regrouped(plan: Plan, ghost_batch: int | None) -> Plan:
    """Return the same comparison with batch statistics over other groups; it shares the task.

    Args:
        plan: The comparison.
        ghost_batch: Images of the groups; None for the whole batch.

    Raises:
        LabError: If the groups are larger than the batch, or a method cannot take them.
    """
    settings, template = (
        replace(plan.settings, ghost_batch=ghost_batch),
        replace(plan.template, ghost_batch=ghost_batch),
    )
    template.check_together(template.epochs, template.batch_size, template.steps)
    _check_methods(plan.methods, plan.task, template)
    return replace(plan, settings=settings, template=template)


def output_folder(plan: Plan, out: str | None) -> Path:
    """Return the folder that a comparison writes to, made and found writable.

    Args:
        plan: The comparison; its data names the folder if `out` does not.
        out: The folder that was asked for; None: ``runs/compare-<data>``.

    Returns:
        The folder, with its subfolder ``runs``.

    Raises:
        LabError: If it cannot be made or written to.
    """
    return writable_folder(Path(out) if out is not None else Path("runs") / f"compare-{plan.task.name}")


def writable_folder(folder: Path) -> Path:
    """Return a folder for results, made and found writable.

    Args:
        folder: The folder.

    Returns:
        The folder, with its subfolder ``runs``.

    Raises:
        LabError: If it cannot be made or written to.
    """
    from_first(lambda: _make_writable(folder))
    return folder


def _make_writable(folder: Path) -> None:
    check_output_folder("--out", folder)
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"--out {folder}: cannot write there ({error.strerror or error})") from error


def _training_place(settings: Settings) -> tuple[object, ...]:
    """Return what of the processes and devices decides a run's numbers, beside the machine."""
    here = launched()
    device = training_device(settings.accelerator).type
    strategy = "fsdp" if settings.strategy == "fsdp" else "ddp"
    return (device,) if here.size == 1 else (device, here.size, here.nodes, strategy)


def _check_ranks(settings: Settings, methods: Sequence[Method], batch_size: int, smallest_batch: int) -> None:
    ranks = launched().size
    if ranks == 1:
        if settings.strategy != "auto":
            raise LabError(
                f"--strategy {settings.strategy} is for several processes: start them with --devices N or torchrun"
            )
        return
    if batch_size % ranks:
        raise LabError(
            f"--batch-size is shared equally: it must be divisible by the {ranks} processes, got {batch_size}"
        )
    share = batch_size // ranks
    if share < smallest_batch:
        raise LabError(f"--batch-size must leave each of the {ranks} processes {smallest_batch}, got {batch_size}")
    if settings.ghost_batch is not None and settings.ghost_batch > share:
        raise LabError(f"--ghost-batch must be at most a process's share of a batch ({share})")
    if settings.jobs > 1 or settings.engine != "local":
        raise LabError("--jobs and --engine ray are for runs of one process each")
    if settings.strategy == "fsdp" and settings.scales_gradients:
        raise LabError("--precision 16-mixed scales gradients, which --strategy fsdp does not; bf16-mixed works")
    for method in methods:
        if method.second_order:
            raise LabError(f"method {method.name} differentiates its gradients, which cannot be done on several ranks")


def _check_kind(settings: Settings, task: Task) -> None:
    for name, option in options_of(TrainingOptions).items():
        value = getattr(settings, name)
        if option.only_for not in (None, task.kind) and value != option.default:
            raise LabError(f"--{option.flag} is for {option.only_for}, got {value} for {task.kind}")


def _check_scaling(settings: Settings, methods: Sequence[Method]) -> None:
    if not settings.scales_gradients:
        return
    if training_device(settings.accelerator).type != "cuda":
        raise LabError("--precision 16-mixed needs a CUDA device; bf16-mixed works without")
    for method in methods:
        if method.second_order:
            raise LabError(f"method {method.name} cannot train with --precision 16-mixed, which scales gradients")


def _check_methods(methods: Iterable[Method], task: Task, spec: RunSpec) -> None:
    """Build every method once, so that options that a transform or a layer refuses are told now."""
    network = task.initial_model(spec.model, 0, spec.weights)
    for method in methods:
        try:
            layers = method.with_layers(copy.deepcopy(network), spec.ghost_batch)
            method.build(layers, method.lrs[0], spec.refresh)
        except LabError:
            raise
        except Exception as error:  # of a user's own optimizer, whatever it raises
            raise LabError(f"method {method.name}: {error or type(error).__name__}") from error


def _check_trials(plan: Plan) -> None:
    """Look at every swept value, so that one that a run, a transform or a layer refuses is told now."""
    settings, task = plan.settings, plan.task
    if settings.target is not None and task.metric.is_percentage and not 0 < settings.target <= 100:
        raise LabError(f"--target must be a percentage above 0 and at most 100, got {settings.target:g}")
    if settings.mode == "target" and plan.target is None:
        raise LabError("--mode target needs the score to reach: --target")
    if not settings.sweeps:
        return
    for name, values in settings.sweeps:
        least = task.defaults.smallest_batch if name == "batch_size" else 1
        whole = all(isinstance(value, int) and not isinstance(value, bool) and value >= least for value in values)
        if name in RUN_OPTIONS and not whole:
            raise LabError(f"--sweep {name} must be whole numbers of at least {least}, got {_listed(values)}")
        if name == "batch_size" and type(task).steps_with is Task.steps_with:
            raise LabError(f"--sweep batch_size is not for {task.name}, which makes its own batches")
    for row in plan.table.values():
        spec = row[0]
        if spec.batch_size > task.train_images:
            raise LabError(
                f"--sweep batch_size must be at most the number of training {task.samples} ({task.train_images}), got "
                f"{spec.batch_size}"
            )
        if spec.ghost_batch is not None and spec.ghost_batch > spec.batch_size:
            raise LabError(
                f"--sweep: ghost_batch must be at most batch_size ({spec.batch_size}), got {spec.ghost_batch}"
            )
    swept = dict.fromkeys(trial.method for trials in plan.trials.values() for trial in trials)
    _check_methods(swept, task, plan.template)


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))
