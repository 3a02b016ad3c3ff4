"""``tilewright check`` and ``tilewright bench``."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tilewright.compiler.cli_arguments import load_kernel, parse_arguments
from tilewright.compiler.cli_options import ARGUMENTS, GRID, JSON, compile_options, reports_errors
from tilewright.compiler.options import CompileOptions
from tilewright.compiler.user_program import load_program

if TYPE_CHECKING:
    from tilewright.compiler.checking import Case, Difference
    from tilewright.compiler.kernel import Kernel
    from tilewright.runtime.bench import Comparison


@click.command()
@click.argument("kernel", metavar="FILE.py:NAME")
@ARGUMENTS
@GRID
@click.option("--device", "device_name", default="cpu", show_default=True, help="a name that `devices` lists")
@click.option(
    "--reference",
    metavar="FILE.py:NAME",
    help="a function of the kernel's arguments by name that returns what is written  "
    "[default: `reference` beside the kernel; without one, the interpreter]",
)
@click.option("--size", "sizes", multiple=True, metavar="NAME=N", help="fix a named dimension")
@click.option("--limit", default=300, show_default=True, type=click.IntRange(min=1), help="largest random size")
@click.option("--trials", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="of the first trial")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="largest error relative to the largest exact value  [default: by dtype, bf16 2e-2, f16 4e-3, f32 1e-3]",
)
@compile_options
@JSON
@reports_errors
def check(
    kernel: str,
    arguments: tuple[str, ...],
    grid: str,
    device_name: str,
    reference: str | None,
    sizes: tuple[str, ...],
    limit: int,
    trials: int,
    seed: int,
    tolerance: float | None,
    options: CompileOptions,
    as_json: bool,
) -> None:
    """Compare a kernel with a reference on random sizes and values. Exit code 1 where they differ."""
    from tilewright.compiler.api import device
    from tilewright.compiler.checking import Checker, make_case, parse_grid_expression

    parse_grid_expression(grid)
    loaded = load_kernel(kernel)
    given = parse_arguments(loaded.definition, arguments, chosen=loaded.chosen_names)
    function = _reference(loaded, reference)
    if function is None and device_name == "cpu":
        raise click.UsageError("nothing to compare with: define `reference` beside the kernel, or name a --device")
    device(device_name)
    checker = Checker(loaded, given, grid, device_name, function, asdict(options), tolerance)
    rows, failed = [], False
    for number in range(seed, seed + trials):
        case = make_case(loaded, given, number, limit, _fixed(sizes))
        found = checker.run(case)
        failed |= not all(d.ok for d in found.values())
        rows.append({"seed": number, "sizes": case.sizes, "tensors": {n: d.to_json() for n, d in found.items()}})
        if not as_json:
            click.echo(_line(case, found))
    if as_json:
        against = "reference" if function is not None else "interpreter"
        report = {"kernel": loaded.__name__, "device": device_name, "against": against, "ok": not failed}
        click.echo(json.dumps({**report, "trials": rows}))
    sys.exit(1 if failed else 0)


def _line(case: Case, found: Mapping[str, Difference]) -> str:
    sizes = ", ".join(f"{name}={size}" for name, size in case.sizes.items())
    parts = []
    for name, d in found.items():
        text = f"{name} error {d.error:.2g} (at most {d.tolerance:g})"
        parts.append(text if d.ok else f"{text}: {name}{list(d.index or ())} is {d.got:.6g}, expected {d.expected:.6g}")
    verdict = "ok    " if all(d.ok for d in found.values()) else "DIFFER"
    return (
        f"{verdict} seed {case.seed}  {sizes}{'  ' if sizes else ''}{'; '.join(parts) or 'the kernel writes nothing'}"
    )


def _fixed(texts: tuple[str, ...]) -> dict[str, int]:
    fixed = {}
    for text in texts:
        name, _, number = text.partition("=")
        if not name.isidentifier() or not number.isdecimal() or int(number) < 1:
            raise click.UsageError(f"--size {text}: expected NAME=N")
        fixed[name] = int(number)
    return fixed


def _reference(kernel: Kernel, text: str | None) -> Callable[..., Any] | None:
    if text is not None:
        return load_function(text, "--reference")
    found = kernel.definition.globals.get("reference")
    return found if inspect.isfunction(found) else None


def load_function(text: str, option: str) -> Callable[..., Any]:
    """The function that ``FILE.py:NAME`` names."""
    path, _, name = text.rpartition(":")
    if not Path(path).is_file():
        raise click.UsageError(f"{option} {text}: expected FILE.py:NAME of an existing file")
    found = getattr(load_program(Path(path)), name, None)
    if not callable(found):
        raise click.UsageError(f"{option} {text}: {path} has no function {name!r}")
    return found


@click.command()
@click.argument("kernel", metavar="FILE.py:NAME")
@ARGUMENTS
@GRID
@click.option("--device", "device_name", default="cuda:0", show_default=True, help="a name that `devices` lists")
@click.option("--rival", "rivals", multiple=True, metavar="FILE.py:NAME", help="a function of the arguments by name")
@click.option("--repeats", default=50, show_default=True, type=click.IntRange(min=1))
@click.option("--warmup", default=10, show_default=True, type=click.IntRange(min=0))
@click.option("--flush", is_flag=True, help="overwrite the GPU's cache before each run")
@click.option(
    "--flops", metavar="EXPRESSION", help="operations of a call, for TFLOP/s: 2*M*N*K with --size, or a number"
)
@click.option("--size", "sizes", multiple=True, metavar="NAME=N", help="the size of a named dimension")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@compile_options
@JSON
@reports_errors
def bench(
    kernel: str,
    arguments: tuple[str, ...],
    grid: str,
    device_name: str,
    rivals: tuple[str, ...],
    repeats: int,
    warmup: int,
    flush: bool,
    flops: str | None,
    sizes: tuple[str, ...],
    seed: int,
    options: CompileOptions,
    as_json: bool,
) -> None:
    """Time a kernel, in turns with rivals: medians, and bytes per second if each tensor moves once."""
    from tilewright.compiler.benching import Benchmark

    loaded = load_kernel(kernel)
    given = parse_arguments(loaded.definition, arguments, chosen=loaded.chosen_names)
    benchmark = Benchmark(loaded, given, grid, device_name, _fixed(sizes), seed)
    operations = None if flops is None else benchmark.number(flops)
    functions = {text.rpartition(":")[2]: load_function(text, "--rival") for text in rivals}
    result = benchmark.run(functions, repeats, warmup, flush, asdict(options))
    rows = _rows(result, loaded.__name__, benchmark.bytes_moved, operations)
    if as_json:
        report = {"kernel": loaded.__name__, "device": device_name, "bytes": benchmark.bytes_moved, "flops": operations}
        click.echo(json.dumps({**report, "results": rows}))
        return
    width = max(len(str(row["name"])) for row in rows)
    for row in rows:
        line = f"{row['name']:<{width}}  {row['median_us']:10.1f} us  ({row['p20_us']:.1f} to {row['p80_us']:.1f})"
        line += f"  {row['tb_per_s']:.3g} TB/s"
        line += f"  {row['tflops']:.4g} TFLOP/s" if row["tflops"] is not None else ""
        click.echo(line + (f"  ours is {row['speedup']:.2f} times as fast" if row["speedup"] is not None else ""))


def _rows(result: Comparison, ours: str, moved: int, operations: float | None) -> list[dict[str, Any]]:
    rows = []
    for name, measured in result.measurements.items():
        rows.append(
            {
                **measured.to_json(),
                "tb_per_s": measured.terabytes_per_second(moved),
                "tflops": None if operations is None else measured.tflops(operations),
                "speedup": None if name == ours else result.speedup(ours, name),
            }
        )
    return rows
