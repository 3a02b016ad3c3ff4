"""Small launches of the library's kernels, the same on any device: ragged shapes, random normal inputs, NaN outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from kernel_checks import NUMPY, Array, normal, poisoned

import tilewright as tw
from tilewright.kernels.activations import activation, gelu
from tilewright.kernels.attention import LOG2E, attention, reference
from tilewright.kernels.attention_backward import ROWS, TILE, attention_dq, attention_gradients, attention_rows
from tilewright.kernels.attention_decode import attention_decode
from tilewright.kernels.column_sum import column_sum
from tilewright.kernels.cross_entropy import cross_entropy
from tilewright.kernels.gemm import gemm, gemm_partial
from tilewright.kernels.gemm_epilogue import add_bias, gate_up, gemm_epilogue, relu
from tilewright.kernels.gemm_grouped import gemm_grouped
from tilewright.kernels.gemm_scaled import gemm_promoted, gemm_scaled
from tilewright.kernels.layernorm import layernorm
from tilewright.kernels.norm_backward import norm_backward
from tilewright.kernels.precise_gemm import precise_gemm
from tilewright.kernels.quantize import quantize_rows
from tilewright.kernels.rmsnorm import rmsnorm
from tilewright.kernels.softmax import softmax
from tilewright.kernels.transpose import transpose

E4M3 = ml_dtypes.float8_e4m3fn


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments. ``exact``: it uses no function that the GPU only approximates."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: list[Any]
    meta: dict[str, Any] = field(default_factory=dict)
    exact: bool = True

    def arrays(self) -> list[tuple[int, Array]]:
        """The arrays among the arguments, with their positions."""
        return [(i, x) for i, x in enumerate(self.arguments) if isinstance(x, np.ndarray)]

    def run(self, device: str, arguments: list[Any]) -> None:
        tw.device(device).launch(self.kernel, self.grid, *arguments, **self.meta)


def launches() -> Iterator[Launch]:
    yield from _products()
    yield from _attention()
    yield from _rows()


def _products() -> Iterator[Launch]:
    a, b = normal(300, 200, dtype="bf16"), normal(200, 264, dtype="bf16", seed=1)
    for schedule in ("roles", "alternate"):
        c = poisoned(300, 264, dtype="bf16")
        meta = {"BM": 64, "BN": 128, "schedule": schedule}
        yield Launch(f"gemm bf16, {schedule}", gemm, (5, 3), [a, b, c], meta)
    c, meta = poisoned(300, 264, dtype="bf16"), {"BM": 64, "BN": 128, "num_ctas": 2}
    yield Launch("gemm bf16, clusters", gemm, (5, 3), [a, b, c], meta)
    left, right = normal(299, 199, dtype="bf16"), normal(199, 261, dtype="bf16", seed=1)
    yield Launch("gemm bf16, odd", gemm, (3, 2), [left, right, poisoned(299, 261, dtype="bf16")])
    half = [x.astype(np.float16) for x in (a, b)]
    yield Launch("gemm f16", gemm, (3, 3), [*half, poisoned(300, 264, dtype="f16")], {"BM": 128, "BN": 128})
    single = [normal(256, 192), normal(192, 128, seed=1), poisoned(256, 128)]
    yield Launch("gemm f32", gemm, (2, 1), single, {"BM": 128, "BN": 128, "BK": 32})
    partials = poisoned(2, 300, 264)
    yield Launch("gemm bf16, K split", gemm_partial, (5, 3, 2), [a, b, partials], {"BM": 64, "BN": 128, "BK": 64})
    bias, meta = normal(264, dtype="bf16", seed=2), {"STEPS": (add_bias, relu), "BN": 128}
    epilogue = [a, b, poisoned(300, 264, dtype="bf16"), bias, None, 0.5]
    yield Launch("gemm with bias and relu", gemm_epilogue, (3, 3), epilogue, meta)
    gated = [a, b, normal(200, 264, dtype="bf16", seed=3), poisoned(300, 264, dtype="bf16")]
    yield Launch("gate and up", gate_up, (3, 3), gated, exact=False)
    small = [normal(200, 400).astype(E4M3), normal(136, 400, seed=1).astype(E4M3).T]
    scales = [np.full(1, 0.5, np.float32), np.full(1, 3, np.float32)]
    for name, kernel in (("scaled gemm e4m3", gemm_scaled), ("promoted gemm e4m3", gemm_promoted)):
        arguments = [*small, *scales, poisoned(200, 136, dtype="bf16"), None]
        yield Launch(name, kernel, (2, 2), arguments, {"BN": 128})
    # of each tile its group, first row and the group's end, and how many tiles there are
    table = np.array([(0, 0, 130, 4), (0, 128, 130, 4), (1, 130, 131, 4), (2, 131, 200, 4)], np.int32)
    experts = [a[:200], normal(3, 200, 264, dtype="bf16", seed=4), table, poisoned(200, 264, dtype="bf16")]
    yield Launch("grouped gemm", gemm_grouped, (12,), experts, {"BN": 128})
    for dtype, precision in ((np.float64, "default"), (np.float32, "3xtf32")):
        wide = [normal(130, 75).astype(dtype), normal(75, 70, seed=1).astype(dtype), np.full((130, 70), np.nan, dtype)]
        meta = {"BM": 64, "BN": 64, "BK": 32, "PRECISION": precision}
        yield Launch(f"precise gemm {np.dtype(dtype).name}", precise_gemm, (3, 2), wide, meta)


def _attention() -> Iterator[Launch]:
    b, h, g, m, n, d = 1, 2, 1, 200, 264, 64
    shapes = ((b, h, m, d), (b, g, n, d), (b, g, n, d), (b, h, m, d))
    q, k, v, do = (normal(*shape, dtype="bf16", seed=i) for i, shape in enumerate(shapes))
    for schedule in ("roles", "turns"):
        o, lse = poisoned(b, h, m, d, dtype="bf16"), poisoned(b, h, m)
        meta = {"D": d, "DV": d, "CAUSAL": True, "schedule": schedule}
        arguments = [q, k, v, o, d**-0.5 * LOG2E, lse]
        yield Launch(f"attention, {schedule}", attention, (2, h, b), arguments, meta, exact=False)
    yield from _gradients(q, k, v, do)
    parts, logarithms, lengths = poisoned(b, h, 3, d), poisoned(b, h, 3), np.array([250], np.int32)
    arguments = [q[:, :, 0].copy(), k, v, parts, logarithms, lengths, d**-0.5 * LOG2E, None]
    yield Launch("attention decode", attention_decode, (3, g, b), arguments, {"D": d, "DV": d}, exact=False)


def _gradients(q: Array, k: Array, v: Array, do: Array) -> Iterator[Launch]:
    (b, h, m, d), (_, g, n, _) = q.shape, k.shape
    exact, logarithm = reference(q, k, v, True)
    o, lse, tiles = exact.astype(NUMPY["bf16"]), logarithm.astype(np.float32), tw.cdiv(m, TILE)
    bound = np.full((b, g), 20, np.float32)
    shape, sizes = (ROWS, b, h, tiles * TILE), {"D": d, "DV": d}
    arguments = [o, do, lse, poisoned(*shape), np.zeros(q.shape, np.int32), bound]
    yield Launch("attention rows", attention_rows, (tiles, h, b), arguments, sizes, exact=False)
    rows = np.zeros(shape, np.float32)
    most = np.sqrt((do.astype(np.float32) ** 2).sum(-1)) * 20
    rows[0, ..., m:], rows[0, ..., :m] = np.inf, lse * np.float32(LOG2E)
    rows[1, ..., :m] = (exact * do.astype(np.float64)).sum(-1)
    rows[2, ..., :m], rows[3, ..., :m] = 2.0**29 / most, most * 2.0**-29
    sums = np.zeros(q.shape, np.int32)
    arguments = [q, k, v, do, rows, sums, *(poisoned(*k.shape, dtype="bf16") for _ in range(2)), d**-0.5, None]
    meta = {**sizes, "CAUSAL": True}
    yield Launch("attention gradients", attention_gradients, (tw.cdiv(n, 128), g, b), arguments, meta, exact=False)
    steps = np.random.default_rng(8).integers(-(1 << 20), 1 << 20, q.shape).astype(np.int32)
    arguments = [steps, rows, poisoned(*q.shape, dtype="bf16"), d**-0.5]
    yield Launch("attention dq", attention_dq, (tiles, h, b), arguments, {"D": d})


def _rows() -> Iterator[Launch]:
    m, n, eps = 64, 1000, 1e-5
    x, dy, weight, bias = normal(m, n), normal(m, n, seed=1), normal(n, seed=2), normal(n, seed=3)
    tiles, grid = {"BM": 2, "BN": 1024}, (m // 2,)
    mean = x.astype(np.float64).mean(1)
    inverse = (1 / np.sqrt(x.astype(np.float64).var(1) + eps)).astype(np.float32)
    yield Launch("rmsnorm", rmsnorm, grid, [x, weight, poisoned(m, n), eps], tiles, exact=False)
    arguments = [x, weight, poisoned(m, n), eps, None, None, bias]
    yield Launch("layernorm", layernorm, grid, arguments, tiles, exact=False)
    arguments = [dy, x, weight, inverse, poisoned(m, n), poisoned(8, 1, n)]
    yield Launch("rmsnorm backward", norm_backward, (8,), arguments, tiles, exact=False)
    arguments = [dy, x, weight, inverse, poisoned(m, n), poisoned(8, 1, n), None, mean.astype(np.float32)]
    yield Launch("layernorm backward", norm_backward, (8,), arguments, tiles, exact=False)
    yield Launch("softmax", softmax, (m,), [x, poisoned(m, n)], {"BN": 1024}, exact=False)
    yield Launch("gelu", activation, (m // 2,), [x, poisoned(m, n)], {"FN": gelu, **tiles}, exact=False)
    target, meta = np.arange(m, dtype=np.int32) * 7, {"BN": 512, "LANES": 512}
    arguments = [x, target, poisoned(m), poisoned(m), -100]
    yield Launch("cross entropy", cross_entropy, (m,), arguments, meta, exact=False)
    arguments = [x, poisoned(3, n), np.zeros(8, np.int32), poisoned(1, n)]
    yield Launch("column sum", column_sum, (8, 3), arguments, {"BM": 32, "BN": 128})
    yield Launch("transpose", transpose, (1, 16), [x, poisoned(n, m)], {"BM": 64, "BN": 64})
    arguments = [x, np.zeros((m, n), E4M3), poisoned(m)]
    yield Launch("quantize", quantize_rows, grid, arguments, tiles, exact=False)
