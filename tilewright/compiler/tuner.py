"""Measuring configurations: compile all at once, time them in turns, keep the tensors' contents."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tilewright.compiler.arrays import view_type
from tilewright.compiler.config import Config
from tilewright.compiler.environment import PRINT_AUTOTUNING
from tilewright.compiler.launch import Grid, Plan, make_plan
from tilewright.compiler.options import CompileOptions
from tilewright.compiler.pool import default_workers
from tilewright.frontend.arguments import BoundArguments, bind_arguments
from tilewright.frontend.errors import ArgumentError, CompileError
from tilewright.ir.core import Effect, Value
from tilewright.ir.types import ViewType
from tilewright.runtime.bench import Clock, compare, on_device, pick_clock
from tilewright.runtime.device import Device
from tilewright.runtime.errors import DeviceError
from tilewright.runtime.snapshot import save

if TYPE_CHECKING:
    from tilewright.compiler.kernel import Kernel

#: a first look at all configurations, and a longer one at the best (repeats)
_FIRST_REPEATS, _FINAL_REPEATS = 5, 30
_FINALISTS = 4
#: driver errors that mean "this configuration does not fit"; after others the context may be lost
_TOO_LARGE = {
    None,
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
    "CUDA_ERROR_INVALID_VALUE",
    "hipErrorLaunchOutOfResources",
    "hipErrorInvalidValue",
}


@dataclass
class Outcome:
    """What tuning found: the choice, the median time of each configuration measured, why others were left out."""

    best: Config
    times_us: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def report(self, title: str) -> str:
        """A table, fastest first."""
        rows = [f"{time:10.1f} us  {name}" for name, time in sorted(self.times_us.items(), key=lambda item: item[1])]
        rows += [f"   skipped     {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([f"tilewright: tuned {title}: {self.best}", *rows])


@dataclass(frozen=True)
class Trial:
    """A launch to be tuned, on an open device."""

    kernel: Kernel
    device: Device
    grid: Grid
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    #: tensors to protect besides those that the kernel writes
    protect: Sequence[str] = ()


def tune(trial: Trial, configs: Sequence[Config], title: str, clock: Clock | None = None) -> Outcome:
    """The fastest configuration. One that does not compile or fit is left out; if none does, the first's error.

    Tensors hold afterwards what they held before.
    """
    outcome = Outcome(configs[0])
    with on_device(trial.device), _progress(title, len(configs)) as advance:
        plans, errors = _compile(trial, configs, advance)
        trial.device.synchronize()  # earlier work may be on another stream than ours
        restores = _save(trial, list(plans)) if plans else []
        try:
            runnable = {c: p for c, p in plans.items() if _runs(trial, c, p, errors)}
            times = _measure(trial, runnable, pick_clock(trial.device) if clock is None else clock) if runnable else {}
        finally:
            trial.device.synchronize()
            for restore in restores:
                restore()
    outcome.skipped = {str(config): _first_line(error) for config, error in errors.items()}
    if not times:
        raise next(iter(errors.values()))
    outcome.best = min(times, key=lambda config: times[config])
    outcome.times_us = {str(config): time for config, time in times.items()}
    if PRINT_AUTOTUNING.get():
        print(outcome.report(title), file=sys.stderr)
    return outcome


def _compile(
    trial: Trial, configs: Sequence[Config], advance: Callable[[], None]
) -> tuple[dict[Config, Plan], dict[Config, Exception]]:
    """A plan for each configuration that compiles, and the others' errors, in the order of ``configs``."""
    found: dict[Config, Plan | Exception] = {}

    def attempt(config: Config) -> Plan | Exception:
        try:
            return make_plan(trial.kernel, trial.device.name, trial.args, {**trial.kwargs, **config.arguments()})
        except ArgumentError:
            raise  # the launch is wrong, whatever the configuration
        except (CompileError, DeviceError) as error:
            return error

    with ThreadPoolExecutor(default_workers()) as pool:
        tasks = {pool.submit(attempt, config): config for config in configs}
        for task in as_completed(tasks):
            found[tasks[task]] = task.result()
            advance()
    plans = {config: found[config] for config in configs if isinstance(found[config], Plan)}
    errors = {config: found[config] for config in configs if isinstance(found[config], Exception)}
    return plans, errors  # type: ignore[return-value]  # split by type


def _runs(trial: Trial, config: Config, plan: Plan, errors: dict[Config, Exception]) -> bool:
    """Launch once. A configuration that the device has no room for is noted."""
    try:
        plan.run(trial.grid, trial.args, trial.kwargs, None)
        trial.device.synchronize()
    except DeviceError as error:
        if error.code not in _TOO_LARGE or isinstance(error, ArgumentError):
            raise
        errors[config] = error
        return False
    return True


def _measure(trial: Trial, plans: Mapping[Config, Plan], clock: Clock) -> dict[Config, float]:
    """Median microseconds of each configuration; the best few are measured longer."""
    by_name = {str(number): config for number, config in enumerate(plans)}
    calls = {name: _call(trial, plans[config]) for name, config in by_name.items()}
    first = compare(calls, _FIRST_REPEATS, warmup=1, clock=clock)
    times = {name: first[name].median_us for name in calls}
    finalists = sorted(times, key=lambda name: times[name])[:_FINALISTS]
    if len(finalists) > 1:
        final = compare({name: calls[name] for name in finalists}, _FINAL_REPEATS, warmup=2, clock=clock)
        slowest = max(final[name].median_us for name in finalists)
        times = {name: max(time, slowest) for name, time in times.items()}  # clocks drift: finalists stay ahead
        times.update({name: final[name].median_us for name in finalists})
    return {by_name[name]: time for name, time in times.items()}


def _call(trial: Trial, plan: Plan) -> Callable[[], None]:
    return lambda: plan.run(trial.grid, trial.args, trial.kwargs, None)


def _save(trial: Trial, configs: Sequence[Config]) -> list[Callable[[], None]]:
    """Save what the kernel writes under any of these configurations."""
    names, tensors = set(trial.protect), {}
    for config in configs:
        given = CompileOptions.split({**trial.kwargs, **config.meta})[1]
        bound = bind_arguments(trial.kernel.definition, trial.args, given)
        tensors = bound.tensors
        names |= written_tensors(trial.kernel, bound)
    return [save(trial.device, tensor, name) for name, tensor in tensors.items() if name in names]


def written_tensors(kernel: Kernel, bound: BoundArguments) -> set[str]:
    """The tensor parameters that the program stores to, from its IR; all where that does not tell."""
    types = bound.types({name: view_type(value, name) for name, value in bound.tensors.items()})
    function = kernel.function(types)
    run_time = [p.name for p in kernel.definition.parameters if p.name in bound.tensors or p.name in bound.scalars]
    names = dict(zip(function.params, run_time, strict=True))
    written = set()
    for operation in function.walk():
        if operation.effect & Effect.WRITE:
            for value in operation.operands:
                if isinstance(value.type, ViewType):
                    root = _root(value)
                    if root not in names:  # a view that an `if` or a loop chose
                        return set(bound.tensors)
                    written.add(names[root])
    return written


def _root(view: Value) -> Value:
    """The view that this one was derived from by subview, permute and offset operations."""
    while view.op is not None:
        sources = [value for value in view.op.operands if isinstance(value.type, ViewType)]
        if len(sources) != 1 or view.op.regions:
            return view
        view = sources[0]
    return view


def _first_line(error: Exception) -> str:
    message: str = getattr(error, "message", None) or str(error)
    return message.splitlines()[0]


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Counts compiled configurations on a terminal."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("tuning {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)
