"""What limits each kernel, by Nsight Compute: python -m benchmarks.limiters [WORD ...] [--out FILE] [--list].

A word picks the cases whose names contain it. Each case is a process of its own under `ncu`, which profiles one
launch, warmed up, at the clocks that the GPU has (`--clock-control none`) and with what earlier launches left in the
cache. Shares are of the hardware's peak; a stall's share is of the time that a warp spends between two instructions.
The verdict is the unit that is nearest to, and above, its bound of `BOUNDS`, else "latency" and the largest stall.
`--run` makes the same launches without a profiler: it shows whether they run, and fills the cache of kernels.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEAK = "pct_of_peak_sustained"
#: what a column shows: the first of these metrics that `ncu` has
COLUMNS: dict[str, tuple[str, ...]] = {
    "us": ("gpu__time_duration.sum",),
    "dram": (f"gpu__dram_throughput.avg.{PEAK}_elapsed", f"dram__throughput.avg.{PEAK}_elapsed"),
    "issue": (f"smsp__issue_active.avg.{PEAK}_active",),
    "tensor": (f"sm__pipe_tensor_cycles_active.avg.{PEAK}_active",),
    "L2": (f"lts__throughput.avg.{PEAK}_elapsed",),
    "shared": (f"l1tex__data_pipe_lsu_wavefronts_mem_shared.sum.{PEAK}_elapsed",),
    "occupancy": (f"sm__warps_active.avg.{PEAK}_active",),
}
#: kept in the JSON beside them
FURTHER = (
    "dram__bytes_read.sum", "dram__bytes_write.sum", f"sm__throughput.avg.{PEAK}_elapsed",
    f"sm__cycles_active.avg.{PEAK}_elapsed", f"l1tex__throughput.avg.{PEAK}_active",
    f"sm__inst_executed_pipe_alu.avg.{PEAK}_active", f"sm__inst_executed_pipe_fma.avg.{PEAK}_active",
    f"sm__inst_executed_pipe_xu.avg.{PEAK}_active", f"sm__inst_executed_pipe_lsu.avg.{PEAK}_active",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum", "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "launch__registers_per_thread", "launch__grid_size", "launch__block_size", "launch__waves_per_multiprocessor",
    "launch__occupancy_limit_registers", "launch__occupancy_limit_shared_mem",
)  # fmt: skip
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
REASONS = (
    "barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle", "long_scoreboard",
    "math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction", "not_selected", "selected",
    "short_scoreboard", "sleeping", "tex_throttle", "wait",
)  # fmt: skip
METRICS = (*(x for names in COLUMNS.values() for x in names), *FURTHER, *map(STALLED.format, REASONS))
#: verdict -> column and its share from which on the unit is the limiter: what is left above it is seldom reached
BOUNDS = {
    "memory bandwidth": ("dram", 75.0), "tensor pipe": ("tensor", 75.0), "issue slots": ("issue", 70.0),
    "L2 bandwidth": ("L2", 75.0), "shared memory": ("shared", 75.0),
}  # fmt: skip
#: units of `ncu` in microseconds and bytes
SCALES = {
    "ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6,
    "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9,
}  # fmt: skip

Row = dict[str, Any]


# --- the launches ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """``prepare`` makes tensors and gives a call, which launches the kernel of that name once, perhaps among others."""

    kernel: str
    prepare: Callable[[], Callable[[], object]]


def _norms(name: str, rows: int, columns: int) -> Callable[[], object]:
    import torch

    from benchmarks import norms

    return norms.CASES[name](rows, columns, torch.bfloat16).ours


def _column_sums(size: int) -> Callable[[], object]:
    import torch

    from benchmarks import rows

    return rows.CASES["column_sum"](torch.randn(size, size, device="cuda", dtype=torch.bfloat16)).ours


def _attention(shape: tuple[int, int, int, int, int], causal: bool) -> Callable[[], object]:
    from benchmarks import attention

    tensors = attention.inputs(shape)
    return lambda: attention.sdpa(*tensors, causal)


def _attention_backward(shape: tuple[int, ...], causal: bool, deterministic: bool) -> Callable[[], object]:
    from benchmarks import attention_backward

    (q, k, v, _), ours = attention_backward.forward_done(shape, causal)
    results = [x.clone() for x in (q, k, v)]
    return lambda: ours(deterministic, results)


def _fp8(size: int, blocks: bool) -> Callable[[], object]:
    from benchmarks import gemm_family

    operands, per_row, per_block = gemm_family.fp8_inputs(size)
    c = gemm_family.poisoned(size, size)
    if blocks:
        return lambda: gemm_family.block_scaled(*operands, *per_block, c)
    return lambda: gemm_family.scaled(*operands, *per_row, c)


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}

    def add(name: str, kernel: str, prepare: Callable[..., Callable[[], object]], *arguments: Any) -> None:
        found[name] = Case(kernel, lambda: prepare(*arguments))

    for shape in (8, 16, 16, 4096, 128), (8, 32, 32, 4096, 64), (4, 32, 32, 8192, 64):
        for causal in (False, True):
            for exact in (True, False):
                mask, mode = "causal" if causal else "full", "exact" if exact else "any order"
                name = f"attention backward D{shape[4]} S{shape[3]} {mask} {mode}"
                add(name, "attention_gradients", _attention_backward, shape, causal, exact)
    for exact in (True, False):
        name = f"attention backward D128 S8192 grouped {'exact' if exact else 'any order'}"
        add(name, "attention_gradients", _attention_backward, (2, 64, 8, 8192, 128), False, exact)
    for rows in (4096, 8192):
        shape = (32768 // rows, 16, 16, rows, 128)
        add(f"attention D128 S{rows} causal", "attention", _attention, shape, True)
    kernels = {
        "layernorm": "layernorm", "layernorm backward": "norm_backward", "rmsnorm": "rmsnorm",
        "rmsnorm+residual": "rmsnorm", "softmax backward": "softmax_backward",
    }  # fmt: skip
    for name, kernel in kernels.items():
        for size in (16384, 1024), (4096, 8192):
            add(f"{name} {size[0]}x{size[1]}", kernel, _norms, name, *size)
    for name, kernel in {**kernels, "layernorm": "layernorm_long", "softmax": "softmax"}.items():
        add(f"{name} 4096x32768", kernel, _norms, name, 4096, 32768)
    for name in "cross-entropy", "cross-entropy backward":
        add(f"{name} 4096x131072", name.replace("-", "_").replace(" ", "_"), _norms, name, 4096, 131072)
    add("swiglu 16384x4096", "activation", _norms, "swiglu", 16384, 4096)
    add("swiglu backward 16384x4096", "activation_backward", _norms, "swiglu backward", 16384, 4096)
    add("embedding backward 16384x4096", "embedding_backward", _norms, "embedding backward", 16384, 4096)
    add("column sums 4096x4096", "column_sum", _column_sums, 4096)
    for size in 4096, 8192:
        add(f"fp8 per row {size}^3", "gemm_scaled", _fp8, size, False)
        add(f"fp8 per block {size}^3", "gemm_block_scaled", _fp8, size, True)
    return found


def chosen(words: Sequence[str]) -> list[str]:
    """The cases whose names contain one of the words, or all; a name in full is that case alone."""
    every = cases()
    return [x for x in every if not words or any(word == x or (word not in every and word in x) for word in words)]


@contextmanager
def around(name: str, before: Callable[[], object], after: Callable[[], object]) -> Iterator[list[str]]:
    """Within, launches of the kernel ``name`` have these calls around them, and are counted in the list."""
    from tilewright.compiler.kernel import Kernel

    bind, seen = Kernel.__getitem__, list[str]()

    def bind_watched(kernel: Kernel, grid: Any) -> Any:
        launch = bind(kernel, grid)
        if kernel.__name__ != name:
            return launch

        def watched(*arguments: Any, **options: Any) -> None:
            before()
            launch(*arguments, **options)
            after()
            seen.append(name)

        return watched

    Kernel.__getitem__ = bind_watched  # type: ignore[method-assign, assignment]
    try:
        yield seen
    finally:
        Kernel.__getitem__ = bind  # type: ignore[method-assign]


def run(name: str) -> None:
    """Warm a case up, then launch its kernel where a profiler sees it. SystemExit where that is not one launch."""
    import torch

    case, cuda = cases()[name], torch.cuda
    torch.manual_seed(0)
    call = case.prepare()
    for _ in range(2):
        call()
    cuda.synchronize()
    with around(case.kernel, lambda: (cuda.synchronize(), cuda.profiler.start()),
                lambda: (cuda.synchronize(), cuda.profiler.stop())) as seen:  # fmt: skip
        call()
    cuda.synchronize()
    if len(seen) != 1:
        sys.exit(f"{name}: {len(seen)} launches of {case.kernel} instead of one")
    print(f"{name}: ran", flush=True)


# --- the profiler ----------------------------------------------------------------------------------


def find_ncu() -> str | None:
    """On the PATH, or where CUDA's installers put it, the newest."""
    places = ("usr/local/cuda*/bin/ncu", "opt/nvidia/nsight-compute/*/ncu", "usr/local/cuda*/nsight-compute*/ncu")
    found = [str(path) for place in places for path in sorted(Path("/").glob(place), reverse=True)]
    return shutil.which("ncu") or next(iter(found), None)


def profile(name: str, ncu: str, metrics: list[str], limit: float) -> Row:
    """The row of a case; ``failed`` tells what went wrong. What ``ncu`` does not know is taken from ``metrics``."""
    while True:
        with tempfile.TemporaryDirectory(prefix="limiters-", ignore_cleanup_errors=True) as folder:
            log = Path(folder) / "ncu.csv"
            command = [
                ncu, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log),
                "--profile-from-start", "off", "--target-processes", "application-only", "--clock-control", "none",
                "--cache-control", "none", "--metrics", ",".join(metrics),
                sys.executable, "-m", "benchmarks.limiters", "--run", name,
            ]  # fmt: skip
            status, said = call(command, Path(folder), limit)
            profiled = log.read_text(errors="replace") if log.exists() else ""
        ended = f"not done within {limit:g} s" if status is None else f"exit {status}"
        kernels = parse(profiled)
        if kernels:
            row = summary(name, max(kernels, key=lambda kernel: kernel["metrics"].get(COLUMNS["us"][0], 0.0)))
            problems = [f"{len(kernels)} kernels were profiled, the longest is shown"] if len(kernels) > 1 else []
            if status != 0:
                problems.append(f"{ended}: {last_words(said)}")
            return row | ({"note": "; ".join(problems)} if problems else {})
        if status is None:
            return {"case": name, "failed": f"{ended}: {last_words(said)}"}
        warned = [line for line in f"{profiled}\n{said}".splitlines() if line.startswith(("==ERROR", "==WARN"))]
        complaints = "\n".join(warned)
        unknown = [metric for metric in metrics if re.search(rf"\b{metric.partition('.')[0]}\b", complaints)]
        if not unknown or len(unknown) == len(metrics):
            return {"case": name, "failed": "; ".join([f"{ended}: {last_words(said)}", *warned[-1:]])}
        metrics[:] = [metric for metric in metrics if metric not in unknown]


def call(command: list[str], folder: Path, limit: float) -> tuple[int | None, str]:
    """The exit status (None: stopped after ``limit`` seconds) and what was said. All its processes end with it."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # its lock lies in the temporary directory: with one of its own it waits for no other profiler
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": path, "LC_ALL": "C"}
    output = folder / "output.txt"
    with output.open("w") as file:  # no pipe: whoever survives could hold it open
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status, output.read_text(errors="replace")


def last_words(text: str) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    return (telling or lines or ["no output"])[-1][:300]


def parse(text: str) -> list[Row]:
    """The kernels of ``ncu --csv``: their names and metrics, in microseconds, bytes and percent.

    Of `--page raw` (a line for each kernel, behind names and units of metrics), or with a line for each metric.
    """
    lines = [line for line in text.splitlines() if not line.startswith("==")]
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    table = [row for row in csv.reader(lines[start:]) if row]
    if len(table) < 2:
        return []
    header, body = table[0], [dict(zip(table[0], row, strict=False)) for row in table[1:]]
    found: dict[str, Row] = {}
    units: dict[str, str] = {}
    for line in body:
        if not line["ID"]:
            units = line
            continue
        kernel = found.setdefault(line["ID"], {"kernel": line.get("Kernel Name", "?"), "metrics": {}})
        if "Metric Name" in line:
            cells = [(line["Metric Name"], line.get("Metric Value", ""), line.get("Metric Unit", ""))]
        else:
            cells = [(name, line.get(name, ""), units.get(name, "")) for name in header if "__" in name]
        values = ((name, number(value, unit)) for name, value, unit in cells)
        kernel["metrics"] |= {name: value for name, value in values if value is not None}
    return list(found.values())


def number(text: str, unit: str) -> float | None:
    """A cell's number in the units of `SCALES`; None where there is none (``n/a``)."""
    try:
        return float(text.split(";")[0].replace(",", "")) * SCALES.get(unit.partition("/")[0], 1.0)
    except ValueError:
        return None


def summary(name: str, profiled: Row) -> Row:
    """The row of a kernel that was profiled: its columns, stalls by their share, verdict, and metrics."""
    metrics: dict[str, float] = profiled["metrics"]
    row: Row = {"case": name, "kernel": profiled["kernel"]}
    for column, names in COLUMNS.items():
        row[column] = next((metrics[x] for x in names if x in metrics), None)
    waits = {reason: metrics[key] for reason in REASONS if (key := STALLED.format(reason)) in metrics}
    whole = sum(waits.values()) or 1.0
    # selected is work, and a warp that was not selected waits for one that works
    stalls = {reason: 100 * waits[reason] / whole for reason in waits if reason not in ("selected", "not_selected")}
    row["stalls"] = dict(sorted(stalls.items(), key=lambda item: -item[1]))
    # `ncu` adds what it knows of the device
    return row | {"verdict": verdict(row), "metrics": {name: metrics[name] for name in METRICS if name in metrics}}


def verdict(row: Row) -> str:
    over = {name: (row[column] or 0.0) / bound for name, (column, bound) in BOUNDS.items()}
    nearest = max(over, key=lambda name: over[name])
    return nearest if over[nearest] >= 1 else f"latency: {next(iter(row['stalls']), 'unknown')}"


def line(row: Row, width: int) -> str:
    if "failed" in row:
        return f"{row['case']:<{width}}  FAILED: {row['failed']}"
    cells = [f"{'-' if row[column] is None else format(row[column], '.1f'):>{len(column) + 4}}" for column in COLUMNS]
    stalls = ", ".join(f"{reason} {share:.0f}" for reason, share in list(row["stalls"].items())[:3])
    note = f"  ({row['note']})" if "note" in row else ""
    return f"{row['case']:<{width}}{''.join(cells)}  {row['verdict']}  [{stalls}]{note}"


def profile_all(names: Sequence[str], ncu: str, limit: float, out: Path | None) -> int:
    """How many failed."""
    rows, metrics = list[Row](), list(METRICS)
    width = max(map(len, names))
    print(f"{'':<{width}}{''.join(f'{column:>{len(column) + 4}}' for column in COLUMNS)}  verdict  [stalls, %]")
    for name in names:
        rows.append(profile(name, ncu, metrics, limit))
        print(line(rows[-1], width), flush=True)
        if out:  # after each: a run may be cut short
            out.write_text(json.dumps({"left_out": [x for x in METRICS if x not in metrics], "rows": rows}, indent=1))
    return sum("failed" in row for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--run", action="store_true", help="make the launches without a profiler")
    parser.add_argument("--ncu", default=None, help="the profiler, where it is not found by itself")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for a case (default 60)")
    options = parser.parse_args()
    # a caller's signal must reach the profiler's processes too: `call` ends them on the way out
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = chosen(options.words)
    if not names:
        sys.exit(f"No case is named so: {' '.join(options.words)}. --list prints them.")
    if options.list:
        print("\n".join(names))
        return
    if options.run:
        for name in names:
            run(name)
        return
    ncu = options.ncu or find_ncu()
    if ncu is None:
        sys.exit("There is no ncu (Nsight Compute) on the PATH or under /usr/local/cuda*: say --ncu FILE.")
    sys.exit(min(profile_all(names, ncu, options.timeout, options.out), 1))


if __name__ == "__main__":
    main()
