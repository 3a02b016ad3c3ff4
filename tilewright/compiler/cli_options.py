"""Options that commands share, and how errors are shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from tilewright.compiler.options import CLUSTERS, SCHEDULES, CompileOptions
from tilewright.compiler.user_program import UserProgramError
from tilewright.ir.target import TARGETS

DEFAULT_TARGET = "sm_90a"
TARGET = click.option(
    "--target", default=None, help=f"{', '.join(TARGETS)}  [default: what a .tw file names, else {DEFAULT_TARGET}]"
)
ARGUMENTS = click.option(
    "--arg",
    "arguments",
    multiple=True,
    metavar="NAME=SPEC",
    help="a tensor as dtype[dims] (a=bf16[M,64]), a run-time scalar as its dtype (scale=f32) or, with run, its "
    "value, a constexpr as its value (BM=128)",
)
GRID = click.option(
    "--grid",
    required=True,
    help="programs along each axis: 8,5, or expressions of named dimensions and constexprs: cdiv(M,BM),cdiv(N,BN)",
)
WARPS = click.option("--num-warps", type=click.IntRange(min=1), default=None, help="warps that compute")
STAGES = click.option("--num-stages", type=click.IntRange(min=1), default=None, help="depth of the rings")
CTAS = click.option(
    "--num-ctas", type=click.Choice([str(n) for n in CLUSTERS]), default=None, help="blocks of a cluster"
)
SCHEDULE = click.option("--schedule", type=click.Choice(SCHEDULES), default=None, help="how copies are arranged")
PERSISTENT = click.option(
    "--persistent", type=click.BOOL, default=None, help="whether blocks walk over programs (true or false)"
)
REGISTERS = click.option("--maxnreg", type=click.IntRange(min=1), default=None, help="most registers of a thread")
JSON = click.option("--json", "as_json", is_flag=True, help="machine-readable output")


def compile_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take the compile options, as one argument ``options`` (`CompileOptions`)."""

    @wraps(command)
    def wrapped(
        num_warps: int | None,
        num_stages: int | None,
        num_ctas: str | None,
        schedule: str | None,
        persistent: bool | None,
        maxnreg: int | None,
        **kwargs: Any,
    ) -> None:
        ctas = None if num_ctas is None else int(num_ctas)
        command(**kwargs, options=CompileOptions(num_warps, num_stages, ctas, schedule, persistent, maxnreg))

    with_options: Callable[..., None] = WARPS(STAGES(CTAS(SCHEDULE(PERSISTENT(REGISTERS(wrapped))))))
    return with_options


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors of the user's program into a message (with ``--json`` also an object) and exit code 1."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from tilewright.compiler.environment import VariableError
        from tilewright.frontend.errors import CompileError
        from tilewright.ir.core import IRError
        from tilewright.runtime.errors import DeviceError

        try:
            command(*args, **kwargs)
        except VariableError as error:
            raise click.UsageError(str(error)) from None
        except (IRError, CompileError, DeviceError, UserProgramError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise  # click ends quietly
            click.echo(_message(error), err=True)
            if kwargs.get("as_json"):
                click.echo(json.dumps({"error": _error_object(error)}))
            sys.exit(1)

    return wrapped


def _message(error: Exception) -> str:
    """The text of an error, with the source line where the location says which."""
    from tilewright.frontend.errors import CompileError
    from tilewright.ir.core import IRError
    from tilewright.runtime.errors import DeviceError

    if isinstance(error, IRError) and not hasattr(error, "source_line"):
        return str(CompileError(error.message, error.loc, error.hint))
    if isinstance(error, DeviceError | OSError):
        return f"error: {error}"
    return str(error)


def _error_object(error: Exception) -> dict[str, Any]:
    from tilewright.ir.core import UNKNOWN

    loc = getattr(error, "loc", UNKNOWN)
    known = loc != UNKNOWN
    reproducer = getattr(error, "reproducer", None)
    return {
        "type": type(error).__name__,
        "message": getattr(error, "message", str(error)),
        "file": loc.file if known else None,
        "line": loc.line if known else None,
        "column": loc.column if known else None,
        "hint": getattr(error, "hint", "") or None,
        "stage": getattr(error, "stage", "") or None,
        "reproducer": str(reproducer) if isinstance(reproducer, Path) else None,
    }
