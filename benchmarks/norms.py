"""Row and elementwise kernels, forward and backward, against torch.compile of the same mathematics in the same run.

`of copy`: bytes per second of ours over those of torch's copy of one matrix (bytes read plus bytes written, each
operand counted once). `over torch`: the compiled function's time over ours.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import tilewright as tw
from tilewright.kernels import activations, cross_entropy, dropout, embedding, quantize, rotary
from tilewright.kernels.column_sum import column_sums, workspace_shapes
from tilewright.kernels.layernorm import layer_rows
from tilewright.kernels.norm_backward import gradient_programs, norm_gradients
from tilewright.kernels.rmsnorm import rms_rows
from tilewright.kernels.rows import activation_tiles, block_tiles, row_major_grid, row_tiles
from tilewright.kernels.softmax import softmax_rows, softmax_rows_backward
from tilewright.runtime.bench import compare

EPS = 1e-5
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
Tensor = torch.Tensor


@dataclass
class Case:
    """Ours fills ``outputs``; ``math`` computes the same from ``inputs``, in float64 if they are."""

    ours: Callable[[], object]
    outputs: list[Tensor]
    math: Callable[..., Any]
    inputs: list[Tensor]
    bytes: int
    #: whether the exact result is that of the formulas on float64 (random and 8-bit results are checked in tests)
    exact: bool = True


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), device="cuda", dtype=dtype)


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def wide(x: Tensor) -> Tensor:
    """What the mathematics is done in."""
    return x if x.dtype == torch.float64 else x.float()


# --- norms ----------------------------------------------------------------------------------------


def rms_math(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    r = torch.rsqrt(wide(x).square().mean(1, keepdim=True) + EPS)
    return (wide(x) * r * wide(w)).to(x.dtype), r[:, 0]


def rms_residual_math(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = wide(x) + wide(residual)
    r = torch.rsqrt(t.square().mean(1, keepdim=True) + EPS)
    return (t * r * wide(w)).to(x.dtype), t.to(x.dtype), r[:, 0]


def rms_backward_math(dy: Tensor, x: Tensor, w: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    normal_, g = wide(x) * r[:, None], wide(dy)
    along = (g * wide(w) * normal_).mean(1, keepdim=True)
    return ((g * wide(w) - normal_ * along) * r[:, None]).to(x.dtype), (g * normal_).sum(0)


def layer_math(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = wide(x).mean(1, keepdim=True)
    r = torch.rsqrt((wide(x) - mean).square().mean(1, keepdim=True) + EPS)
    return ((wide(x) - mean) * r * wide(w) + wide(b)).to(x.dtype), mean[:, 0], r[:, 0]


def layer_backward_math(dy: Tensor, x: Tensor, w: Tensor, mean: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    normal_, g = (wide(x) - mean[:, None]) * r[:, None], wide(dy)
    s = g * wide(w)
    dx = (s - normal_ * (s * normal_).mean(1, keepdim=True) - s.mean(1, keepdim=True)) * r[:, None]
    return dx.to(x.dtype), (g * normal_).sum(0), g.sum(0)


def rms_case(m: int, n: int, dtype: torch.dtype) -> Case:
    x, w, y, r = normal(m, n, dtype=dtype), normal(n, dtype=dtype), poisoned(m, n, dtype=dtype), poisoned(m)
    return Case(lambda: rms_rows(x, w, y, EPS, inverse=r), [y, r], rms_math, [x, w], 2 * x.nbytes)


def rms_residual_case(m: int, n: int, dtype: torch.dtype) -> Case:
    x, residual, w = normal(m, n, dtype=dtype), normal(m, n, dtype=dtype), normal(n, dtype=dtype)
    y, t, r = poisoned(m, n, dtype=dtype), poisoned(m, n, dtype=dtype), poisoned(m)
    ours = lambda: rms_rows(x, w, y, EPS, residual=residual, total=t, inverse=r)  # noqa: E731
    return Case(ours, [y, t, r], rms_residual_math, [x, residual, w], 4 * x.nbytes)


def layer_case(m: int, n: int, dtype: torch.dtype) -> Case:
    x, w, b, y = normal(m, n, dtype=dtype), normal(n, dtype=dtype), normal(n, dtype=dtype), poisoned(m, n, dtype=dtype)
    mean, r = poisoned(m), poisoned(m)
    ours = lambda: layer_rows(x, w, y, EPS, bias=b, mean=mean, inverse=r)  # noqa: E731
    return Case(ours, [y, mean, r], layer_math, [x, w, b], 2 * x.nbytes)


def gradient_sums(m: int, n: int, parts: int) -> tuple[Tensor, Tensor, Callable[[], None]]:
    """The partial sums of a norm's backward pass, their total, and what adds them up."""
    programs = gradient_programs(m, n)
    partial, total = poisoned(programs, parts, n), poisoned(1, parts * n)
    flat = partial.view(programs, parts * n)
    shape, arrived = workspace_shapes(*flat.shape, flat.itemsize)
    workspace = poisoned(*shape), torch.zeros(arrived, device="cuda", dtype=torch.int32)
    return partial, total, lambda: column_sums(flat, total, *workspace)


def rms_backward_case(m: int, n: int, dtype: torch.dtype) -> Case:
    dy, x, w = normal(m, n, dtype=dtype), normal(m, n, dtype=dtype), normal(n, dtype=dtype)
    dx, r = poisoned(m, n, dtype=dtype), rms_math(x, w)[1]
    partial, total, add_up = gradient_sums(m, n, 1)

    def ours() -> None:
        norm_gradients(dy, x, w, r, dx, partial)
        add_up()

    return Case(ours, [dx, total[0]], rms_backward_math, [dy, x, w, r], 3 * x.nbytes)


def layer_backward_case(m: int, n: int, dtype: torch.dtype) -> Case:
    dy, x, w = normal(m, n, dtype=dtype), normal(m, n, dtype=dtype), normal(n, dtype=dtype)
    dx, (_, mean, r) = poisoned(m, n, dtype=dtype), layer_math(x, w, w)
    partial, total, add_up = gradient_sums(m, n, 2)

    def ours() -> None:
        norm_gradients(dy, x, w, r, dx, partial, mean=mean)
        add_up()

    return Case(ours, [dx, total[0, :n], total[0, n:]], layer_backward_math, [dy, x, w, mean, r], 3 * x.nbytes)


# --- softmax and cross-entropy ----------------------------------------------------------------------


def softmax_case(m: int, n: int, dtype: torch.dtype) -> Case:
    x, y = normal(m, n, dtype=dtype), poisoned(m, n, dtype=dtype)
    return Case(lambda: softmax_rows(x, y), [y], lambda x: torch.softmax(x, 1), [x], 2 * x.nbytes)


def softmax_backward_math(dy: Tensor, y: Tensor) -> Tensor:
    return (wide(y) * (wide(dy) - (wide(y) * wide(dy)).sum(1, keepdim=True))).to(y.dtype)


def softmax_backward_case(m: int, n: int, dtype: torch.dtype) -> Case:
    dy, y, dx = normal(m, n, dtype=dtype), torch.softmax(normal(m, n, dtype=dtype), 1), poisoned(m, n, dtype=dtype)
    return Case(lambda: softmax_rows_backward(dy, y, dx), [dx], softmax_backward_math, [dy, y], 3 * y.nbytes)


IGNORED = -100


def targets(m: int, n: int) -> Tensor:
    target = torch.randint(n, (m,), device="cuda")
    target[::17] = IGNORED
    return target


def entropy_math(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return functional.cross_entropy(wide(x), target, ignore_index=IGNORED, reduction="none"), torch.logsumexp(
        wide(x), 1
    )


def entropy_backward_math(x: Tensor, target: Tensor, lse: Tensor, dloss: Tensor) -> Tensor:
    hit = torch.arange(x.shape[1], device=x.device)[None, :] == target[:, None]
    g = torch.where(target == IGNORED, torch.zeros_like(dloss), dloss)
    return ((torch.exp(wide(x) - lse[:, None]) - hit.to(lse.dtype)) * g[:, None]).to(x.dtype)


def entropy_case(m: int, n: int, dtype: torch.dtype) -> Case:
    x, target, loss, lse = normal(m, n, dtype=dtype), targets(m, n), poisoned(m), poisoned(m)
    meta = cross_entropy.blocks(x.itemsize)

    def ours() -> None:
        cross_entropy.cross_entropy[(m,)](x, target, loss, lse, IGNORED, num_warps=4, **meta)

    return Case(ours, [loss, lse], entropy_math, [x, target], x.nbytes)


def entropy_backward_case(m: int, n: int, dtype: torch.dtype) -> Case:
    x, target, dx = normal(m, n, dtype=dtype), targets(m, n), poisoned(m, n, dtype=dtype)
    lse, dloss = torch.logsumexp(x.float(), 1), torch.rand(m, device="cuda")

    def ours() -> None:
        cross_entropy.cross_entropy_backward[row_major_grid(m, n, 1, 4096)](x, target, lse, dloss, dx, IGNORED)

    return Case(ours, [dx], entropy_backward_math, [x, target, lse, dloss], 2 * x.nbytes)


# --- positions, embedding, dropout --------------------------------------------------------------------


def rotary_math(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    first, second = wide(x).chunk(2, -1)
    c, s = c[:, None, :], s[:, None, :]
    return torch.cat([first * c - second * s, second * c + first * s], -1).to(x.dtype)


def interleaved_math(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    first, second = wide(x).unflatten(-1, (-1, 2)).unbind(-1)
    c, s = c[:, None, :], s[:, None, :]
    return torch.stack([first * c - second * s, second * c + first * s], -1).flatten(-2).to(x.dtype)


def rotary_case(m: int, n: int, dtype: torch.dtype, interleaved: bool = False, inverse: bool = False) -> Case:
    """Heads of 128, sequences of 4096 or all rows."""
    depth, length = 128, min(m, 4096)
    x, y = (f(m // length, length, n // depth, depth, dtype=dtype) for f in (normal, poisoned))
    angle = torch.rand(length, depth // 2, device="cuda") * 6
    c, s = angle.cos(), angle.sin()
    meta = {"D": depth, "INTERLEAVED": interleaved, "INVERSE": inverse, **rotary.tiles(n // depth)}
    grid = (tw.cdiv(length, meta["BS"]), tw.cdiv(n // depth, meta["BH"]), m // length)
    plain = interleaved_math if interleaved else rotary_math

    def turned(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        return plain(x, c, -s if inverse else s)

    return Case(lambda: rotary.rotary[grid](x, c, s, y, **meta), [y], turned, [x, c, s], 2 * x.nbytes)


def dropout_case(m: int, n: int, dtype: torch.dtype) -> Case:
    x, y = normal(m, n, dtype=dtype), poisoned(m, n, dtype=dtype)
    meta = block_tiles(n)
    grid = row_major_grid(m, n, **meta)
    return Case(
        lambda: dropout.dropout[grid](x, y, 0.1, 1234567, 0, **meta),
        [y],
        lambda x: functional.dropout(x, 0.1),
        [x],
        2 * x.nbytes,
        False,
    )


def embedding_case(m: int, n: int, dtype: torch.dtype) -> Case:
    table, y, tokens = normal(50304, n, dtype=dtype), poisoned(m, n, dtype=dtype), torch.randint(50304, (m,)).cuda()
    grid = row_major_grid(m, n, 4, 1024)
    ours = lambda: embedding.embedding[grid](table, tokens, y)  # noqa: E731
    return Case(ours, [y], lambda t, i: functional.embedding(i, t), [table, tokens], 2 * y.nbytes)


def embedding_backward_case(m: int, n: int, dtype: torch.dtype) -> Case:
    """With what puts the tokens in order, on both sides."""
    dy, tokens = normal(m, n, dtype=dtype), torch.randint(50304, (m,)).cuda()
    out = poisoned(50304, n, dtype=dtype)

    def plain(dy: Tensor, tokens: Tensor) -> Tensor:
        return torch.ops.aten.embedding_dense_backward(dy, tokens, 50304, -1, False)

    ours = lambda: embedding.embedding_gradient(dy, tokens, out)  # noqa: E731
    return Case(ours, [out], plain, [dy, tokens], 2 * dy.nbytes + out.nbytes)


# --- elementwise and 8 bits -----------------------------------------------------------------------------


def swiglu_math(x: Tensor, up: Tensor) -> Tensor:
    return (functional.silu(wide(x)) * wide(up)).to(x.dtype)


def swiglu_backward_math(dy: Tensor, x: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    s, g = torch.sigmoid(wide(x)), wide(dy)
    return (g * wide(up) * s * (1 + wide(x) * (1 - s))).to(x.dtype), (g * wide(x) * s).to(x.dtype)


def gelu_math(x: Tensor) -> Tensor:
    return functional.gelu(wide(x)).to(x.dtype)


def gelu_case(m: int, n: int, dtype: torch.dtype) -> Case:
    x, y, meta = normal(m, n, dtype=dtype), poisoned(m, n, dtype=dtype), activation_tiles(m, n)
    grid = row_major_grid(m, n, meta["BM"], meta["BN"])
    ours = lambda: activations.activation[grid](x, y, FN=activations.gelu, **meta)  # noqa: E731
    return Case(ours, [y], gelu_math, [x], 2 * x.nbytes)


def swiglu_case(m: int, n: int, dtype: torch.dtype) -> Case:
    x, up, y = normal(m, n, dtype=dtype), normal(m, n, dtype=dtype), poisoned(m, n, dtype=dtype)
    meta = activation_tiles(m, n)
    grid = row_major_grid(m, n, meta["BM"], meta["BN"])
    return Case(lambda: activations.activation[grid](x, y, up, **meta), [y], swiglu_math, [x, up], 3 * x.nbytes)


def swiglu_backward_case(m: int, n: int, dtype: torch.dtype) -> Case:
    dy, x, up = (normal(m, n, dtype=dtype) for _ in range(3))
    dx, dup = poisoned(m, n, dtype=dtype), poisoned(m, n, dtype=dtype)
    meta = block_tiles(n, 1024)
    grid = row_major_grid(m, n, **meta)
    ours = lambda: activations.activation_backward[grid](dy, x, dx, up, dup, **meta)  # noqa: E731
    return Case(ours, [dx, dup], swiglu_backward_math, [dy, x, up], 5 * x.nbytes)


def quantize_case(m: int, n: int, dtype: torch.dtype) -> Case:
    x, q, scale = normal(m, n, dtype=dtype), torch.empty(m, n, device="cuda", dtype=torch.float8_e4m3fn), poisoned(m)
    meta = row_tiles(m, n)
    grid = (tw.cdiv(m, meta["BM"]),)

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        s = wide(x).abs().amax(1) / quantize.E4M3_MAX
        return (wide(x) / s[:, None]).to(torch.float8_e4m3fn), s

    ours = lambda: quantize.quantize_rows[grid](x, q, scale, **meta)  # noqa: E731
    return Case(ours, [q, scale], plain, [x], x.nbytes + q.nbytes, False)


def quantize_blocks_case(m: int, n: int, dtype: torch.dtype) -> Case:
    x, q = normal(m, n, dtype=dtype), torch.empty(m, n, device="cuda", dtype=torch.float8_e4m3fn)
    scale, grid = poisoned(m, n // 128), row_major_grid(m, n, 16, 256)

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        blocks = wide(x).unflatten(1, (-1, 128))
        s = blocks.abs().amax(2) / quantize.E4M3_MAX
        return (blocks / s[:, :, None]).flatten(1).to(torch.float8_e4m3fn), s

    ours = lambda: quantize.quantize_blocks[grid](x, q, scale)  # noqa: E731
    return Case(ours, [q, scale], plain, [x], x.nbytes + q.nbytes, False)


CASES: dict[str, Callable[[int, int, torch.dtype], Case]] = {
    "rmsnorm": rms_case, "rmsnorm+residual": rms_residual_case, "rmsnorm backward": rms_backward_case,
    "layernorm": layer_case, "layernorm backward": layer_backward_case,
    "softmax": softmax_case, "softmax backward": softmax_backward_case,
    "cross-entropy": entropy_case, "cross-entropy backward": entropy_backward_case,
    "rotary": rotary_case, "rotary backward": lambda *a: rotary_case(*a, inverse=True),
    "rotary interleaved": lambda *a: rotary_case(*a, interleaved=True),
    "dropout": dropout_case, "embedding": embedding_case, "embedding backward": embedding_backward_case,
    "gelu": gelu_case, "swiglu": swiglu_case, "swiglu backward": swiglu_backward_case,
    "quantize rows": quantize_case, "quantize 1x128": quantize_blocks_case,
}  # fmt: skip
SHAPES = [(16384, 1024), (16384, 4096), (8192, 8192)]
#: rows that no program holds, of the kernels that work on whole rows
LONG = [(4096, 32768), (1024, 131072)]
WHOLE_ROWS = ("rmsnorm", "layernorm", "softmax")
VOCABULARY = [(4096, 131072)]


def relative_error(case: Case) -> float:
    """The largest relative error of the outputs against the mathematics in float64."""
    if not case.exact:
        return float("nan")
    exact = case.math(*(x.double() if x.is_floating_point() else x for x in case.inputs))
    exact = exact if isinstance(exact, tuple) else (exact,)
    pairs = zip(case.outputs, exact, strict=True)
    return max(float((ours.double() - want).norm() / want.norm()) for ours, want in pairs)


def measure(name: str, shape: tuple[int, int], dtype: str, repeats: int, rival: bool) -> dict[str, Any]:
    case = CASES[name](*shape, DTYPES[dtype])
    case.ours()
    torch.cuda.synchronize()
    error = relative_error(case)
    source = torch.empty(*shape, device="cuda", dtype=DTYPES[dtype])
    copy = torch.empty_like(source)
    run: dict[str, Callable[[], object]] = {"ours": case.ours, "copy": lambda: copy.copy_(source)}
    if rival:
        compiled = torch.compile(case.math, dynamic=False)
        run["torch"] = lambda: compiled(*case.inputs)
    result = compare(run, repeats=repeats)
    ours, speed = result["ours"].median_us, 2 * copy.nbytes / result["copy"].median_us
    return {
        "kernel": name, "shape": "x".join(map(str, shape)), "dtype": dtype, "error": error, "ours_us": ours,
        "of_copy": case.bytes / ours / speed, "copy_tb_s": speed / 1e6, "ours_tb_s": case.bytes / ours / 1e6,
        "torch_us": result["torch"].median_us if rival else None,
        "over_torch": result["torch"].median_us / ours if rival else None,
    }  # fmt: skip


def chosen(options: argparse.Namespace) -> Iterator[tuple[str, tuple[int, int], str]]:
    for dtype in options.dtypes:
        for name in options.kernels:
            shapes = VOCABULARY if name.startswith("cross-entropy") else options.shapes
            if options.long and name.startswith(WHOLE_ROWS):
                shapes = [*shapes, *LONG]
            for shape in shapes:
                yield name, shape, dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--kernels", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["bf16"])
    parser.add_argument("--shapes", nargs="+", type=lambda s: tuple(map(int, s.split("x"))), default=SHAPES)
    parser.add_argument("--long", action="store_true", help="rows of more than 16384 elements as well")
    parser.add_argument("--alone", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, medians, random normal inputs")
    found = []
    for name, shape, dtype in chosen(options):
        r = measure(name, shape, dtype, options.repeats, not options.alone)
        found.append(r)
        over = "" if r["over_torch"] is None else f"over torch {r['over_torch']:.2f}  "
        print(
            f"{name:>22} {dtype} {r['shape']:>11}  {r['ours_us']:7.1f} us {r['ours_tb_s']:.2f} TB/s  "
            f"of copy {r['of_copy']:.2f}  {over}error {r['error']:.1e}",
            flush=True,
        )
        if options.json:  # after each: a run may be cut short
            options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
