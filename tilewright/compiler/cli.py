"""The ``tilewright`` command. Exit codes: 0 ok, 1 the program is wrong, 2 usage."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

import click

from tilewright.compiler.cli_arguments import (
    ArgumentText,
    load_kernel,
    parse_arguments,
    random_arrays,
    summarize,
)

TARGET = click.option("--target", default="sm_90a", show_default=True, help="sm_90a, gfx942 or gfx950")
ARGUMENTS = click.option(
    "--arg",
    "arguments",
    multiple=True,
    metavar="NAME=SPEC",
    help="a tensor as dtype[dims] (a=bf16[M,64]), a run-time scalar as its dtype (scale=f32) or, with run, its "
    "value, a constexpr as its value (BM=128)",
)
WARPS = click.option("--num-warps", type=int, default=None)
STAGES = click.option("--num-stages", type=int, default=None)
JSON = click.option("--json", "as_json", is_flag=True, help="machine-readable output")


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors of the user's program into a message and exit code 1."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from tilewright.compiler.errors import CompilerCrash
        from tilewright.frontend.errors import CompileError
        from tilewright.ir.core import IRError
        from tilewright.runtime.errors import DeviceError

        try:
            command(*args, **kwargs)
        except (IRError, CompileError, CompilerCrash, DeviceError) as error:
            click.echo(str(error), err=True)
            sys.exit(1)
        except ValueError as error:
            from tilewright.passes.manager import PipelineError  # here alone: a cache hit imports no pass

            if isinstance(error, PipelineError):
                raise click.UsageError(str(error)) from None
            raise

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tilewright")
def main() -> None:
    """Compile, run and inspect tile programs."""


@main.command()
@click.argument("kernel", metavar="FILE.py:NAME | FILE.tw")
@TARGET
@ARGUMENTS
@WARPS
@STAGES
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="binary (default: NAME.cubin or .hsaco)")
@JSON
@reports_errors
def compile(
    kernel: str,
    target: str,
    arguments: tuple[str, ...],
    num_warps: int | None,
    num_stages: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Compile a kernel, or scheduled IR text, to a binary."""
    artifact = _artifact(kernel, target, arguments, num_warps, num_stages)
    suffix = ".cubin" if target.startswith("sm_") else ".hsaco"
    path = artifact.save(output or Path(artifact.name + suffix))
    report = {
        "kernel": artifact.name,
        "target": target,
        "binary": str(path),
        "bytes": len(artifact.binary),
        "seconds": round(artifact.seconds, 3),
        "cached": artifact.cached,
        "entries": [
            {"name": e.abi.name, "threads": e.abi.threads, "shared_bytes": e.abi.shared_bytes, **asdict(e.resources)}
            for e in artifact.entries
        ],
    }
    if as_json:
        click.echo(json.dumps(report))
        return
    how = "from the cache" if artifact.cached else f"in {artifact.seconds:.2f} s"
    click.echo(f"{path}: {len(artifact.binary)} bytes for {target} {how}")
    for entry in artifact.entries:
        used = entry.resources
        click.echo(
            f"  {entry.abi.name}: {entry.abi.threads} threads, {used.registers} registers, "
            f"{entry.abi.shared_bytes} bytes of shared memory, {used.spills} spills"
        )


def _artifact(kernel: str, target: str, arguments: tuple[str, ...], num_warps: int | None, num_stages: int | None) -> Any:
    from tilewright.compiler.api import compile as compile_kernel
    from tilewright.ir.target import get_target

    try:
        get_target(target)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if kernel.endswith(".tw"):
        from tilewright.compiler.driver import compile_text

        return compile_text(Path(kernel).read_text(), target)
    definition = load_kernel(kernel)
    types = parse_arguments(definition.definition, arguments).types()
    return compile_kernel(definition, target, types, num_warps=num_warps, num_stages=num_stages)


@main.command()
@click.argument("kernel", metavar="FILE.py:NAME")
@ARGUMENTS
@click.option("--grid", required=True, help="programs along each axis: 8 or 8,5")
@click.option("--device", "device_name", default="cpu", show_default=True)
@click.option("--seed", default=0, show_default=True, help="of the normally distributed inputs")
@WARPS
@STAGES
@JSON
@reports_errors
def run(
    kernel: str,
    arguments: tuple[str, ...],
    grid: str,
    device_name: str,
    seed: int,
    num_warps: int | None,
    num_stages: int | None,
    as_json: bool,
) -> None:
    """Run a kernel once on random tensors and summarise every tensor that it wrote."""
    from tilewright.compiler.api import device

    loaded = load_kernel(kernel)
    given = parse_arguments(loaded.definition, arguments)
    arrays = random_arrays(given, seed, device_name)
    before = {name: summarize(value) for name, value in arrays.items()}
    values: dict[str, ArgumentText] = {**arrays, **given.values}
    device(device_name).launch(loaded, _grid(grid), num_warps=num_warps, num_stages=num_stages, **values)
    device(device_name).synchronize()
    after = {name: summarize(value) for name, value in arrays.items()}
    written = {name: summary for name, summary in after.items() if summary != before[name]}
    if as_json:
        click.echo(json.dumps(written))
        return
    for name, summary in written.items():
        click.echo(f"{name}: " + ", ".join(f"{key} {value}" for key, value in summary.items()))
    if not written:
        click.echo("no tensor changed")


def _grid(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(f"--grid {text}: expected integers separated by commas") from None


@main.command()
@click.argument("file", type=click.File("r"), default="-")
@click.option("-p", "--pipeline", default=None, help="passes, as in canonicalize,pipeline{num-stages=4}; default: the target's")
@TARGET
@click.option("--locations", is_flag=True, help="print source locations")
@reports_errors
def opt(file: Any, pipeline: str | None, target: str, locations: bool) -> None:
    """Run passes on IR text and print the result."""
    from tilewright.ir.parser import parse_module
    from tilewright.ir.printer import print_module
    from tilewright.ir.target import get_target
    from tilewright.ir.verifier import verify
    from tilewright.passes.manager import PassContext, PassManager
    from tilewright.passes.pipelines import default_pipeline

    try:
        machine = get_target(target)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    module = parse_module(file.read(), file.name)
    verify(module)
    passes = default_pipeline(machine) if pipeline is None else pipeline
    PassManager(passes, PassContext(machine)).run(module)
    click.echo(print_module(module, locations), nl=False)


@main.command()
@click.argument("kernel", metavar="FILE.py:NAME")
@TARGET
@ARGUMENTS
@WARPS
@STAGES
@click.option("--after", default=None, help="IR after this pass (input: before all); default: the last")
@click.option("--asm", default=None, help="assembly instead of IR: llvm, ptx or amdgcn")
@click.option("--list", "list_only", is_flag=True, help="list the passes and assembly kinds there are")
@reports_errors
def dump(
    kernel: str,
    target: str,
    arguments: tuple[str, ...],
    num_warps: int | None,
    num_stages: int | None,
    after: str | None,
    asm: str | None,
    list_only: bool,
) -> None:
    """Print a kernel's IR after a pass, or its assembly."""
    artifact = _artifact(kernel, target, arguments, num_warps, num_stages)
    if list_only:
        click.echo("\n".join([*artifact.ir, *(f"--asm {kind}" for kind in artifact.asm)]))
        return
    texts, key = (artifact.asm, asm) if asm else (artifact.ir, after or list(artifact.ir)[-1])
    if key not in texts:
        raise click.UsageError(f"there is no {key!r}; there are: {', '.join(texts)}")
    click.echo(texts[key], nl=False)


@main.command()
@JSON
def devices(as_json: bool) -> None:
    """List the devices that kernels can run on here."""
    from tilewright.runtime.device import devices as list_devices

    found = list_devices()
    if as_json:
        click.echo(json.dumps([asdict(d) for d in found]))
        return
    for d in found:
        extra = f", {d.units} units, {d.memory / 2**30:.0f} GiB" if d.units else ""
        click.echo(f"{d.name:<12} {d.target:<8} {d.description}{extra}")


@main.command()
@JSON
def env(as_json: bool) -> None:
    """List the environment variables that tilewright reads, with their values."""
    from tilewright.compiler.environment import VARIABLES

    rows = [{"name": v.full_name, "value": _shown(v.get()), "help": v.help} for v in VARIABLES]
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        click.echo(f"{row['name']}={row['value'] or ''}\n    {row['help']}")


def _shown(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    main()
