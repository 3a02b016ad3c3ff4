"""The ``tilewright`` command. Exit codes: 0 ok, 1 the program is wrong, 2 usage.

With ``--json`` the result is one JSON object (or list) on standard output; an error is
``{"error": {"message", "file", "line", "column", "hint", ...}}`` there, besides its text on standard error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from tilewright.compiler.cli_arguments import (
    describe,
    load_kernel,
    parse_arguments,
    parse_grid,
    random_arrays,
    snapshot,
    summarize,
)
from tilewright.compiler.cli_check import bench, check
from tilewright.compiler.cli_options import ARGUMENTS, DEFAULT_TARGET, JSON, TARGET, compile_options, reports_errors
from tilewright.compiler.options import CompileOptions

if TYPE_CHECKING:
    from tilewright.compiler.artifact import Artifact


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tilewright")
def main() -> None:
    """Compile, run and inspect tile programs."""


@main.command()
@click.argument("kernel", metavar="FILE.py:NAME | FILE.tw")
@TARGET
@ARGUMENTS
@compile_options
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="binary  [default: NAME.cubin or .hsaco]"
)
@JSON
@reports_errors
def compile(
    kernel: str,
    target: str | None,
    arguments: tuple[str, ...],
    options: CompileOptions,
    output: Path | None,
    as_json: bool,
) -> None:
    """Compile a kernel, or scheduled IR text, to a binary."""
    artifact = _artifact(kernel, target, arguments, options)
    suffix = ".cubin" if "ptx" in artifact.asm else ".hsaco"
    path = artifact.save(output or Path(artifact.name + suffix))
    report = {
        "kernel": artifact.name,
        "target": artifact.target,
        "binary": str(path),
        "bytes": len(artifact.binary),
        "seconds": round(artifact.seconds, 3),
        "cached": artifact.cached,
        "entries": [
            {**asdict(e.resources), "name": e.abi.name, "threads": e.abi.threads, "shared_bytes": e.abi.shared_bytes}
            for e in artifact.entries
        ],
    }
    if as_json:
        click.echo(json.dumps(report))
        return
    how = "from the cache" if artifact.cached else f"in {artifact.seconds:.2f} s"
    click.echo(f"{path}: {len(artifact.binary):,} bytes for {artifact.target} {how}")
    for entry in artifact.entries:
        used = entry.resources
        click.echo(
            f"  {entry.abi.name}: {entry.abi.threads} threads, {used.registers} registers, "
            f"{entry.abi.shared_bytes:,} bytes of shared memory, {used.spills} spills"
        )


def _artifact(
    kernel: str,
    target: str | None,
    arguments: tuple[str, ...],
    options: CompileOptions,
) -> Artifact:
    from tilewright.compiler.api import compile as compile_kernel

    target = None if target is None else _known_target(target)
    if kernel.endswith(".tw"):
        from tilewright.compiler.driver import compile_text

        if arguments or options != CompileOptions():
            raise click.UsageError("a .tw file is scheduled already: it takes no arguments and no options of passes")
        return compile_text(_read(Path(kernel)), target, kernel)
    loaded = load_kernel(kernel)
    types = parse_arguments(loaded.definition, arguments).types(loaded.definition)
    return compile_kernel(loaded, target or DEFAULT_TARGET, types, **asdict(options))


def _known_target(name: str) -> str:
    from tilewright.ir.target import get_target

    try:
        return get_target(name).name
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"cannot read {path}: {error}") from None


@main.command()
@click.argument("kernel", metavar="FILE.py:NAME")
@ARGUMENTS
@click.option("--grid", required=True, help="programs along each axis: 8 or 8,5")
@click.option("--device", "device_name", default="cpu", show_default=True, help="a name that `devices` lists")
@click.option("--seed", default=0, show_default=True, help="of the normally distributed inputs")
@compile_options
@JSON
@reports_errors
def run(
    kernel: str,
    arguments: tuple[str, ...],
    grid: str,
    device_name: str,
    seed: int,
    options: CompileOptions,
    as_json: bool,
) -> None:
    """Run a kernel once on random tensors and summarise every tensor that it wrote."""
    from tilewright.compiler.api import device

    sizes = parse_grid(grid)
    loaded = load_kernel(kernel)
    given = parse_arguments(loaded.definition, arguments, to_run=True, chosen=loaded.chosen_names)
    where = device(device_name)  # before the tensors: its errors say more than those of moving them there
    arrays = random_arrays(given, seed, device_name)
    before = {name: snapshot(value) for name, value in arrays.items()}
    start = perf_counter()
    where.launch(loaded, sizes, **asdict(options), **arrays, **given.values)
    where.synchronize()
    seconds = perf_counter() - start
    written = {name: summarize(value) for name, value in arrays.items() if snapshot(value) != before[name]}
    if as_json:
        report = {"kernel": loaded.__name__, "device": device_name, "grid": sizes, "seconds": round(seconds, 4)}
        click.echo(json.dumps({**report, "written": written}))
        return
    click.echo(f"{loaded.__name__} on {device_name}, grid {grid}: {seconds:.3f} s with compilation")
    for name, summary in written.items():
        click.echo(f"  {name} {describe(summary)}")
    if not written:
        click.echo("  no tensor changed: does the grid cover the output?")


@main.command()
@click.argument("file", type=click.File("r"), default="-")
@click.option(
    "-p", "--pipeline", default=None, help="passes, as in canonicalize,pipeline{num-stages=4}  [default: the target's]"
)
@TARGET
@compile_options
@click.option("--locations", is_flag=True, help="print source locations")
@reports_errors
def opt(
    file: Any,
    pipeline: str | None,
    target: str | None,
    options: CompileOptions,
    locations: bool,
) -> None:
    """Run passes on IR text and print the result."""
    from tilewright.ir.parser import parse_module
    from tilewright.ir.printer import print_module
    from tilewright.ir.target import get_target
    from tilewright.ir.verifier import verify
    from tilewright.passes.manager import PassContext, PassManager, PipelineError, parse_pipeline
    from tilewright.passes.pipelines import default_pipeline

    try:
        passes = None if pipeline is None else parse_pipeline(pipeline)
    except PipelineError as error:
        raise click.UsageError(str(error)) from None
    try:
        text = file.read()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"cannot read {file.name}: {error}") from None
    module = parse_module(text, file.name, text_locations=not locations)
    machine = get_target(_known_target(target or module.attributes.get("target") or DEFAULT_TARGET))
    verify(module)
    context = PassContext(machine, options.pass_options())
    manager = PassManager(default_pipeline(machine) if passes is None else passes, context)
    click.echo(print_module(manager.run(module), locations), nl=False)


@main.command()
@click.argument("kernel", metavar="FILE.py:NAME")
@TARGET
@ARGUMENTS
@compile_options
@click.option("--after", default=None, help="IR after this pass (input: before all)  [default: the last]")
@click.option("--asm", default=None, help="assembly instead of IR: llvm, ptx or amdgcn")
@click.option("--list", "list_only", is_flag=True, help="list the passes and kinds of assembly that there are")
@JSON
@reports_errors
def dump(
    kernel: str,
    target: str | None,
    arguments: tuple[str, ...],
    options: CompileOptions,
    after: str | None,
    asm: str | None,
    list_only: bool,
    as_json: bool,
) -> None:
    """Print a kernel's IR after a pass, or its assembly."""
    if asm and after:
        raise click.UsageError("--after and --asm exclude each other")
    target = _known_target(target or DEFAULT_TARGET)
    texts = _artifact(kernel, target, arguments, options).asm if asm else _passes(kernel, target, arguments, options)
    if list_only:
        kinds = _assembly_kinds(target)
        listing = "\n".join([*texts, *(f"--asm {kind}" for kind in kinds)])
        click.echo(json.dumps({"passes": list(texts), "asm": kinds}) if as_json else listing)
        return
    name = asm or after or list(texts)[-1]
    if name not in texts:
        raise click.UsageError(f"there is no {name!r} for {target}; there are: {', '.join(texts)}")
    click.echo(json.dumps({"name": name, "text": texts[name]}) if as_json else texts[name].rstrip("\n"))


def _assembly_kinds(target: str) -> list[str]:
    from tilewright.ir.target import get_target

    return ["llvm", "ptx" if get_target(target).vendor == "nvidia" else "amdgcn"]


def _passes(
    kernel: str,
    target: str,
    arguments: tuple[str, ...],
    options: CompileOptions,
) -> Mapping[str, str]:
    """The IR after each pass, for which no backend needs to run."""
    from tilewright.compiler.driver import run_passes

    definition = load_kernel(kernel).definition
    types = parse_arguments(definition, arguments).types(definition)
    return run_passes(definition, target, types, options)


@main.command()
@JSON
@reports_errors
def devices(as_json: bool) -> None:
    """List the devices that kernels can run on here."""
    from tilewright.runtime.device import devices as list_devices

    found = list_devices()
    if as_json:
        click.echo(json.dumps([asdict(d) for d in found]))
        return
    width = max(len(d.name) for d in found)
    for d in found:
        extra = f", {d.units} units, {d.memory / 2**30:.0f} GiB" if d.units else ""
        click.echo(f"{d.name:<{width}}  {d.target:<8} {d.description}{extra}")


@main.command()
@JSON
@reports_errors
def env(as_json: bool) -> None:
    """List the environment variables that tilewright reads, with their values."""
    from tilewright.compiler.environment import VARIABLES

    rows = [{"name": v.full_name, "value": _shown(v.get()), "help": v.help} for v in VARIABLES]
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        value = "" if row["value"] is None else row["value"]
        click.echo(f"{row['name']}={int(value) if isinstance(value, bool) else value}\n    {row['help']}")


main.add_command(bench)
main.add_command(check)


def _shown(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    main()
