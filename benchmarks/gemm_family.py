"""The relatives of the matrix product against torch in the same run, interleaved, random normal inputs.

python benchmarks/gemm_family.py [--only fp8,epilogue,grouped,others] [--json FILE]: fp8 with scales per tensor, per row
and per block (torch._scaled_mm), epilogues and gate * up (torch.compile), groups (torch._grouped_mm and a loop of
torch.mm), batches (torch.bmm), int8 (torch._int_mm). Outputs are poisoned with NaN; errors are against float64.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from tilewright.kernels.gemm_batched import batched
from tilewright.kernels.gemm_epilogue import add_bias, gated, gelu, linear
from tilewright.kernels.gemm_grouped import grouped
from tilewright.kernels.gemm_scaled import block_scaled, scaled
from tilewright.runtime.bench import compare

CUDA = "cuda"
BF16, E4M3, F32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
PICKED = 256  # rows whose error is measured

Row = dict[str, Any]
Rivals = dict[str, Callable[[], Any]]


def randn(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, device=CUDA, dtype=BF16 if dtype.itemsize == 1 else dtype).to(dtype)


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, device=CUDA, dtype=F32) + 0.5


def poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"), device=CUDA, dtype=BF16)


def picked(rows: int) -> torch.Tensor:
    """The first and the last rows, and some between."""
    return torch.unique(torch.linspace(0, rows - 1, PICKED, device=CUDA).long())


def relative(c: torch.Tensor, exact: torch.Tensor) -> float:
    return float((c.double() - exact).norm() / exact.norm())


def measure(
    work: str, flops: float, ours: Callable[[], Any], out: torch.Tensor, rivals: Rivals, exact: Callable, repeats: int
) -> Row:
    """One row. ``exact``: rows -> their results in float64; ``rivals`` that torch does not have here are left out."""
    out.fill_(float("nan"))
    ours()
    rows = picked(out.shape[-2])
    row: Row = {"work": work, "error": relative(out[..., rows, :], exact(rows))}
    usable: Rivals = {}
    for name, call in rivals.items():
        try:
            result = call()
        except (RuntimeError, ValueError, AttributeError, NotImplementedError, TypeError) as error:
            row[f"{name}_missing"] = str(error).splitlines()[0][:120]
            continue
        usable[name] = call
        row[f"{name}_error"] = relative(result[..., rows, :], exact(rows))
    times = compare({"ours": ours, **usable}, repeats=repeats)
    for name in ("ours", *usable):
        row[f"{name}_us"], row[f"{name}_tflops"] = times[name].median_us, flops / times[name].median_us / 1e6
    if usable:
        row["ratio"] = min(times[name].median_us for name in usable) / times["ours"].median_us
    print(line(row), flush=True)
    return row


def line(row: Row) -> str:
    speeds = [f"{key.removesuffix('_tflops')} {row[key]:.1f}" for key in row if key.endswith("_tflops")]
    errors = [f"{row[key]:.1e}" for key in row if key.endswith("error")]
    missing = [f"no {key.removesuffix('_missing')}: {row[key]}" for key in row if key.endswith("_missing")]
    ratio = f"{row['ratio']:.3f}" if "ratio" in row else "-"
    return (
        f"{row['work']:<44} ratio {ratio}  TFLOP/s {', '.join(speeds)}  errors {' '.join(errors)}  {' '.join(missing)}"
    )


# --- fp8 -------------------------------------------------------------------------------------------


def fp8(sizes: Sequence[int], repeats: int) -> list[Row]:
    return [row for size in sizes for row in fp8_of(size, repeats)]


def fp8_inputs(size: int) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Both operands, contiguous along K, which is what torch takes; their scales per row and per block of 128."""
    operands = randn(size, size, dtype=E4M3), randn(size, size, dtype=E4M3).T
    per_block = positive(size // 128, size).T, positive(size // 128, size // 128)
    return operands, (positive(size), positive(size)), per_block


def fp8_of(size: int, repeats: int) -> list[Row]:
    (a, b), (row_a, row_b), (block_a, block_b) = fp8_inputs(size)
    one, c, flops, rows = torch.ones(1, device=CUDA), poisoned(size, size), 2.0 * size**3, []
    wide = b.double()

    def torch_mm(x: torch.Tensor, y: torch.Tensor, fast: bool) -> Callable[[], torch.Tensor]:
        return lambda: torch._scaled_mm(a, b, x, y, out_dtype=BF16, use_fast_accum=fast)

    def run(work: str, ours: Callable[[], Any], rival: Callable[[], Any], exact: Callable) -> None:
        rows.append(measure(f"{work} {size}^3", flops, ours, c, {"scaled_mm": rival}, exact, repeats))

    def per_row(picks: torch.Tensor) -> torch.Tensor:
        return (a[picks].double() @ wide) * row_a[picks, None].double() * row_b.double()

    for promote, name in ((False, "fast sums"), (True, "float32 sums")):
        run(
            f"fp8 per tensor, {name}",
            lambda promote=promote: scaled(a, b, one, one, c, promote=promote),
            torch_mm(one, one, not promote),
            lambda picks: a[picks].double() @ wide,
        )
        run(
            f"fp8 per row, {name}",
            lambda promote=promote: scaled(a, b, row_a, row_b, c, promote=promote),
            torch_mm(row_a[:, None], row_b[None, :], not promote),
            per_row,
        )

    def per_block(picks: torch.Tensor) -> torch.Tensor:
        left = a[picks].double() * block_a[picks].double().repeat_interleave(128, 1)
        return left @ (wide * block_b.double().repeat_interleave(128, 0).repeat_interleave(128, 1))

    run(
        "fp8 per block of 128",
        lambda: block_scaled(a, b, block_a, block_b, c),
        torch_mm(block_a, block_b.T.contiguous().T, False),
        per_block,
    )
    return rows


# --- epilogues ---------------------------------------------------------------------------------------


def epilogue(sizes: Sequence[int], repeats: int) -> list[Row]:
    return [row for size in sizes for row in epilogue_of(size, repeats)]


def epilogue_of(size: int, repeats: int) -> list[Row]:
    x, w, bias, y = randn(size, size), randn(size, size).T / size**0.5, randn(size), poisoned(size, size)
    up = randn(size, size).T / size**0.5
    flops = 2.0 * size**3
    compiled = torch.compile(lambda x, w, bias: torch.nn.functional.gelu(x @ w + bias))
    both = torch.compile(lambda x, gate, up: torch.nn.functional.silu(x @ gate) * (x @ up))

    def one(picks: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x[picks].double() @ w.double() + bias.double())

    def two(picks: torch.Tensor) -> torch.Tensor:
        left = x[picks].double()
        return torch.nn.functional.silu(left @ w.double()) * (left @ up.double())

    rivals: Rivals = {"compiled": lambda: compiled(x, w, bias)}
    first = measure(
        f"bias + gelu {size}^3", flops, lambda: linear(x, w, y, (add_bias, gelu), vector=bias), y, rivals, one, repeats
    )
    rivals = {"compiled": lambda: both(x, w, up)}
    second = measure(f"gate * up {size}^3", 2 * flops, lambda: gated(x, w, up, y), y, rivals, two, repeats)
    return [first, second]


# --- groups ------------------------------------------------------------------------------------------


def uneven(rows: int, groups: int) -> torch.Tensor:
    """Ends of groups of very different sizes, one of them empty."""
    weights = torch.rand(groups, generator=torch.Generator().manual_seed(1)) ** 2
    weights[groups // 2] = 0
    ends = (weights.cumsum(0) / weights.sum() * rows).round().int()
    return ends.to(CUDA)


def groups(sizes: Sequence[int], repeats: int) -> list[Row]:
    """``sizes`` do not matter here."""
    shapes = ((8, 8192, 4096, 4096), (64, 8192, 4096, 2048), (64, 16384, 2048, 4096))
    return [grouped_of(*shape, repeats) for shape in shapes]


def grouped_of(count: int, tokens: int, k: int, n: int, repeats: int) -> Row:
    a, b, c = randn(tokens, k), randn(count, n, k).transpose(1, 2), poisoned(tokens, n)
    ends = uneven(tokens, count)
    offsets = torch.cat([torch.zeros(1, device=CUDA, dtype=torch.int32), ends])
    bounds = offsets.tolist()
    out = torch.empty_like(c)

    def loop() -> torch.Tensor:
        for g, (start, end) in enumerate(pairwise(bounds)):
            if end > start:
                torch.mm(a[start:end], b[g], out=out[start:end])
        return out

    def exact(picks: torch.Tensor) -> torch.Tensor:
        owner = torch.searchsorted(ends, picks.int(), right=True)
        return torch.stack([a[row].double() @ b[g].double() for row, g in zip(picks, owner, strict=True)])

    rivals: Rivals = {"grouped_mm": lambda: torch._grouped_mm(a, b, offs=ends), "loop": loop}
    work = f"{count} groups, {tokens} x {n} x {k}"
    return measure(work, 2.0 * tokens * n * k, lambda: grouped(a, b, offsets, c), c, rivals, exact, repeats)


# --- batches and integers ------------------------------------------------------------------------------


def others(sizes: Sequence[int], repeats: int) -> list[Row]:
    """``sizes`` do not matter here."""
    a, b, c = randn(32, 1024, 1024), randn(32, 1024, 1024).transpose(1, 2), poisoned(32, 1024, 1024)
    first = measure(
        "32 x 1024^3", 2.0 * 32 * 1024**3, lambda: batched(a, b, c), c, {"bmm": lambda: torch.bmm(a, b)},
        lambda picks: a[:, picks].double() @ b.double(), repeats,
    )  # fmt: skip
    size = 4096
    x, w = (torch.randint(-128, 128, (size, size), device=CUDA, dtype=torch.int8) for _ in range(2))
    y, row_a, row_b = poisoned(size, size), positive(size), positive(size)
    scaling = torch.compile(lambda p: (p.float() * row_a[:, None] * row_b).to(BF16))
    second = measure(
        f"int8 per row {size}^3", 2.0 * size**3, lambda: scaled(x, w.T, row_a, row_b, y), y,
        {"int_mm": lambda: scaling(torch._int_mm(x, w.T))},
        lambda picks: (x[picks].double() @ w.T.double()) * row_a[picks, None].double() * row_b.double(), repeats,
    )  # fmt: skip
    return [first, second]


SECTIONS = {"fp8": fp8, "epilogue": epilogue, "grouped": groups, "others": others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192], help="of fp8 and epilogues")
    parser.add_argument("--only", default=",".join(SECTIONS))
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, medians, random normal inputs")
    result: dict[str, Any] = {}
    for name in options.only.split(","):
        rows = SECTIONS[name](options.sizes, options.repeats)
        ratios = [row["ratio"] for row in rows if "ratio" in row]
        result[name] = {"rows": rows, "geometric_mean": geometric_mean(ratios) if ratios else None}
        print(f"{name}: geometric mean of ratios {result[name]['geometric_mean']}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
