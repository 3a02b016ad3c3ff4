"""Small launches of the library's kernels, the same on any device: ragged shapes, random normal inputs, NaN outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from kernel_checks import NUMPY, Array, normal, poisoned

import tilewright as tw
from tilewright.kernels.activations import activation, activation_backward, gelu
from tilewright.kernels.attention import LOG2E, attention, attention_varlen, reference
from tilewright.kernels.attention_backward import (
    ROWS,
    attention_dq,
    attention_gradients,
    attention_rows,
    attention_sum_heads,
)
from tilewright.kernels.attention_bias_gradient import TILE, attention_bias_gradient
from tilewright.kernels.attention_decode import attention_decode, attention_merge
from tilewright.kernels.attention_exact import (
    attention_bound,
    attention_dq_again,
    attention_guess,
    attention_largest,
)
from tilewright.kernels.column_sum import column_sum, column_sum_at_once
from tilewright.kernels.cross_entropy import cross_entropy, cross_entropy_backward
from tilewright.kernels.dropout import dropout
from tilewright.kernels.embedding import (
    embedding,
    embedding_backward,
    embedding_backward_atomic,
    order_places,
    share_places,
    take_places,
    take_tickets,
)
from tilewright.kernels.gemm import add_partials, gemm, gemm_partial
from tilewright.kernels.gemm_batched import gemm_batched
from tilewright.kernels.gemm_cast import gemm_cast
from tilewright.kernels.gemm_epilogue import add_bias, gate_up, gemm_epilogue, relu
from tilewright.kernels.gemm_grouped import gemm_grouped, gemm_grouped_weights, list_tiles
from tilewright.kernels.gemm_scaled import gemm_block_scaled, gemm_promoted, gemm_scaled
from tilewright.kernels.layernorm import layernorm, layernorm_long
from tilewright.kernels.mlp import mlp
from tilewright.kernels.norm_backward import norm_backward, norm_backward_sums
from tilewright.kernels.precise_gemm import precise_gemm
from tilewright.kernels.quantize import quantize_blocks, quantize_rows
from tilewright.kernels.rmsnorm import rmsnorm, rmsnorm_long
from tilewright.kernels.rotary import rotary
from tilewright.kernels.softmax import (
    softmax,
    softmax_backward,
    softmax_backward_long,
    softmax_long,
)
from tilewright.kernels.transpose import transpose

E4M3 = ml_dtypes.float8_e4m3fn


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments. ``exact``: it uses no function that the GPU only approximates.

    ``tolerance``: else the largest relative difference. ``unordered``: positions of arrays that hold the same values
    after every run, in any order.
    """

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: list[Any]
    meta: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    tolerance: float = 2e-2
    unordered: tuple[int, ...] = ()

    def arrays(self) -> list[tuple[int, Array]]:
        """The arrays among the arguments, with their positions."""
        return [(i, x) for i, x in enumerate(self.arguments) if isinstance(x, np.ndarray)]

    def run(self, device: str, arguments: list[Any]) -> None:
        tw.device(device).launch(self.kernel, self.grid, *arguments, **self.meta)


def launches() -> Iterator[Launch]:
    yield from _products()
    yield from _eight_bits()
    yield from _groups()
    yield from _attention()
    yield from _norms()
    yield from _rows()
    yield from _tables()


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
    arguments = [normal(2, 300, 264), poisoned(300, 264, dtype="bf16")]
    yield Launch("gemm, partial sums", add_partials, (38, 3), arguments, {"RUNS": 2})
    bias, meta = normal(264, dtype="bf16", seed=2), {"STEPS": (add_bias, relu), "BN": 128}
    epilogue = [a, b, poisoned(300, 264, dtype="bf16"), bias, None, 0.5]
    yield Launch("gemm with bias and relu", gemm_epilogue, (3, 3), epilogue, meta)
    gated = [a, b, normal(200, 264, dtype="bf16", seed=3), poisoned(300, 264, dtype="bf16")]
    yield Launch("gate and up", gate_up, (3, 3), gated, exact=False)
    for dtype, precision in ((np.float64, "default"), (np.float32, "3xtf32")):
        wide = [normal(130, 75).astype(dtype), normal(75, 70, seed=1).astype(dtype), np.full((130, 70), np.nan, dtype)]
        meta = {"BM": 64, "BN": 64, "BK": 32, "PRECISION": precision}
        yield Launch(f"precise gemm {np.dtype(dtype).name}", precise_gemm, (3, 2), wide, meta)
    vectors = [np.abs(normal(300, seed=n)) for n in (3, 4)]
    arguments = [normal(300, 200), b, poisoned(300, 264, dtype="bf16"), *vectors, normal(264, seed=5)]
    yield Launch("gemm of a cast operand", gemm_cast, (3, 3), arguments)
    arguments = [normal(1, 3, 130, 72, dtype="bf16"), normal(1, 3, 72, 200, dtype="bf16", seed=1)]
    arguments.append(poisoned(1, 3, 130, 200, dtype="bf16"))
    yield Launch("batched gemm", gemm_batched, (2, 2, 3), arguments, {"BN": 128})
    arguments = [a, normal(200, 120, dtype="bf16", seed=5), normal(120, 264, dtype="bf16", seed=6), c.copy()]
    yield Launch("mlp", mlp, (3,), arguments)


def _eight_bits() -> Iterator[Launch]:
    small = [normal(200, 400).astype(E4M3), normal(136, 400, seed=1).astype(E4M3).T]
    scales = [np.full(1, 0.5, np.float32), np.full(1, 3, np.float32)]
    for name, kernel in (("scaled gemm e4m3", gemm_scaled), ("promoted gemm e4m3", gemm_promoted)):
        arguments = [*small, *scales, poisoned(200, 136, dtype="bf16"), None]
        yield Launch(name, kernel, (2, 2), arguments, {"BN": 128})
    # scales that travel with the operands, and some that the copy engine cannot read
    for name, rows, parts in (("", 200, 1), (", two tiles", 200, 2), (", odd", 199, 1)):
        blocks = [np.abs(normal(4, rows, seed=2)).T, np.abs(normal(4, 4, seed=3))]
        arguments = [small[0][:rows], small[1], *blocks, poisoned(rows, 136, dtype="bf16")]
        yield Launch(f"block scaled gemm e4m3{name}", gemm_block_scaled, (2, 2 // parts), arguments, {"PARTS": parts})
    x = normal(200, 400, dtype="bf16")
    arguments = [x, np.zeros(x.shape, E4M3), poisoned(200)]
    # a quotient in the middle between two numbers may be rounded to either: one in the last place
    last_place = 2.0**-3
    yield Launch("quantize", quantize_rows, (100,), arguments, {"BM": 2, "BN": 512}, False, last_place)
    arguments = [x, np.zeros(x.shape, E4M3), poisoned(200, 4)]
    yield Launch("quantize blocks", quantize_blocks, (26,), arguments, exact=False, tolerance=last_place)


def _groups() -> Iterator[Launch]:
    a, b = normal(200, 200, dtype="bf16"), normal(3, 200, 264, dtype="bf16", seed=4)
    offsets = np.array([0, 130, 131, 200], np.int32)
    yield Launch("list of tiles", list_tiles, (1,), [offsets, np.full((4, 4), -1, np.int32)], {"GROUPS": 4, "TILES": 4})
    # of each tile its group, first row and the group's end, and how many tiles there are
    table = np.array([(0, 0, 130, 4), (0, 128, 130, 4), (1, 130, 131, 4), (2, 131, 200, 4)], np.int32)
    yield Launch("grouped gemm", gemm_grouped, (12,), [a, b, table, poisoned(200, 264, dtype="bf16")], {"BN": 128})
    arguments = [a, normal(200, 264, dtype="bf16", seed=5), offsets, poisoned(3, 200, 264, dtype="bf16")]
    yield Launch("grouped gemm, weights", gemm_grouped_weights, (2, 3, 3), arguments)


def _attention() -> Iterator[Launch]:
    b, h, g, m, n, d = 1, 2, 1, 200, 264, 64
    shapes = ((b, h, m, d), (b, g, n, d), (b, g, n, d), (b, h, m, d))
    q, k, v, do = (normal(*shape, dtype="bf16", seed=i) for i, shape in enumerate(shapes))
    for schedule in ("roles", "turns"):
        o, lse = poisoned(b, h, m, d, dtype="bf16"), poisoned(b, h, m)
        meta = {"D": d, "DV": d, "CAUSAL": True, "schedule": schedule}
        arguments = [q, k, v, o, d**-0.5 * LOG2E, lse]
        yield Launch(f"attention, {schedule}", attention, (2, h, b), arguments, meta, exact=False)
    bias, lengths = normal(b, h, m, n, dtype="bf16", seed=7), np.array([250], np.int32)
    o, lse = poisoned(b, h, m, d, dtype="bf16"), poisoned(b, h, m)
    arguments = [q, k, v, o, d**-0.5 * LOG2E, lse, bias, lengths, 100]
    meta = {"D": d, "CAP": 20.0}
    yield Launch("attention, bias, window, cap", attention, (2, h, b), arguments, meta, exact=False)
    yield from _packed(d)
    yield from _gradients(q, k, v, do)
    parts, logarithms = poisoned(b, h, 3, d), poisoned(b, h, 3)
    arguments = [q[:, :, 0].copy(), k, v, parts, logarithms, lengths, d**-0.5 * LOG2E, None]
    yield Launch("attention decode", attention_decode, (3, g, b), arguments, {"D": d, "DV": d}, exact=False)
    keys = [normal(6, g, 64, d, dtype="bf16", seed=i) for i in (8, 9)]
    pages = np.array([[3, 0, 5, 1]], np.int32)
    arguments = [q[:, :, 0].copy(), *keys, parts.copy(), logarithms.copy(), lengths, d**-0.5 * LOG2E, pages]
    yield Launch("attention decode, pages", attention_decode, (3, g, b), arguments, {"D": d, "DV": d}, exact=False)
    arguments = [normal(b, h, 3, d), normal(b, h, 3, seed=1), poisoned(b, h, d, dtype="bf16"), poisoned(b, h)]
    yield Launch("attention merge", attention_merge, (h, b), arguments, {"SPLITS": 16, "DV": d}, exact=False)


def _packed(d: int) -> Iterator[Launch]:
    rows, keys = np.array([0, 70, 200], np.int32), np.array([0, 130, 264], np.int32)
    q, k, v = (normal(*shape, d, dtype="bf16", seed=n) for n, shape in enumerate(((200, 2), (264, 1), (264, 1))))
    arguments = [q, k, v, poisoned(*q.shape, dtype="bf16"), rows, keys, d**-0.5 * LOG2E, poisoned(2, 200)]
    yield Launch("attention varlen", attention_varlen, (2, 2, 2), arguments, {"D": d, "CAUSAL": True}, exact=False)


def _gradients(q: Array, k: Array, v: Array, do: Array) -> Iterator[Launch]:
    (b, h, m, d), (_, g, n, _) = q.shape, k.shape
    exact, logarithm = reference(q, k, v, True)
    o, lse, tiles = exact.astype(NUMPY["bf16"]), logarithm.astype(np.float32), tw.cdiv(m, TILE)
    bound = np.full((b, g), 20, np.float32)
    shape, sizes = (ROWS, b, h, tiles * TILE), {"D": d, "DV": d}
    largest = poisoned(2, b, g, tw.cdiv(n, TILE))
    yield Launch("attention largest", attention_largest, (tw.cdiv(n, TILE), g, b), [k, v, largest], sizes)
    arguments = [np.abs(normal(2, b, g, tw.cdiv(n, TILE))), poisoned(b, g)]
    yield Launch("attention bound", attention_bound, (g, b), arguments, exact=False)
    flags = np.full((b + 1, g), 7, np.int32)
    yield Launch("attention guess", attention_guess, (g, b), [k, v, poisoned(b, g), flags], sizes, exact=False)
    arguments = [o, do, lse, poisoned(*shape), np.zeros(q.shape, np.int32), bound]
    yield Launch("attention rows", attention_rows, (tiles, h, b), arguments, sizes, exact=False)
    rows = np.zeros(shape, np.float32)
    most = np.sqrt((do.astype(np.float32) ** 2).sum(-1)) * 20
    rows[0, ..., m:], rows[0, ..., :m] = np.inf, lse * np.float32(LOG2E)
    rows[1, ..., :m] = (exact * do.astype(np.float64)).sum(-1)
    rows[2, ..., :m], rows[3, ..., :m] = 2.0**29 / most, most * 2.0**-29
    sums = np.zeros(q.shape, np.int32)
    for name, meta in (("", {"CAUSAL": True}), (", any order", {"EXACT": False})):
        gradients = [poisoned(*k.shape, dtype="bf16") for _ in range(2)]
        added = sums.copy() if meta.get("EXACT", True) else np.zeros(q.shape, np.float32)
        arguments = [q, k, v, do, rows, added, *gradients, d**-0.5, None]
        place = (tw.cdiv(n, 128), g, b)
        yield Launch(f"attention gradients{name}", attention_gradients, place, arguments, sizes | meta, exact=False)
    bias, dbias = normal(b, h, m, n, dtype="bf16", seed=7), poisoned(b, h, m, n)
    arguments = [q, k, v, do, rows, bias, dbias, d**-0.5, None, None]
    place = (tw.cdiv(n, 64), tw.cdiv(m, 128), b * h)
    yield Launch("attention bias gradient", attention_bias_gradient, place, arguments, sizes, exact=False)
    steps = np.random.default_rng(8).integers(-(1 << 20), 1 << 20, q.shape).astype(np.int32)
    arguments = [steps, rows, poisoned(*q.shape, dtype="bf16"), d**-0.5]
    yield Launch("attention dq", attention_dq, (tiles, h, b), arguments, {"D": d})
    arguments = [q, k, v, do, rows, np.ones((b + 1, g), np.int32), poisoned(*q.shape, dtype="bf16"), d**-0.5]
    meta = sizes | {"CAUSAL": True}
    yield Launch("attention dq again", attention_dq_again, (2,), arguments, meta, exact=False)
    arguments = [normal(b, h, n, d, dtype="bf16"), poisoned(b, g, n, d, dtype="bf16")]
    yield Launch("attention sum of heads", attention_sum_heads, (tw.cdiv(n, TILE), g, b), arguments, {"D": d})


def _norms() -> Iterator[Launch]:
    m, n, eps = 64, 1000, 1e-5
    x, dy, weight, bias = normal(m, n), normal(m, n, seed=1), normal(n, seed=2), normal(n, seed=3)
    tiles, grid = {"BM": 2, "BN": 1024}, (m // 2,)
    mean = x.astype(np.float64).mean(1).astype(np.float32)
    inverse = (1 / np.sqrt(x.astype(np.float64).var(1) + eps)).astype(np.float32)
    yield Launch("rmsnorm", rmsnorm, grid, [x, weight, poisoned(m, n), eps], tiles, exact=False)
    residual = [normal(m, n, seed=4), poisoned(m, n), bias, poisoned(m)]
    arguments = [x, weight, poisoned(m, n), eps, *(v.copy() for v in residual)]
    yield Launch("rmsnorm, rows read again", rmsnorm, grid, arguments, {**tiles, "AGAIN": True}, exact=False)
    arguments = [x, weight, poisoned(m, n), eps, *residual]
    yield Launch("rmsnorm, long rows", rmsnorm_long, (m,), arguments, {"BN": 512}, exact=False)
    arguments = [x, weight, poisoned(m, n), eps, None, None, bias]
    yield Launch("layernorm", layernorm, grid, arguments, {**tiles, "EARLY": True}, exact=False)
    arguments = [x, weight, poisoned(m, n), eps, *(v.copy() for v in residual), poisoned(m)]
    yield Launch("layernorm, long rows", layernorm_long, (m,), arguments, {"BN": 512}, exact=False)
    arguments = [dy, x, weight, inverse, poisoned(m, n), poisoned(8, 1, n)]
    yield Launch("rmsnorm backward", norm_backward, (8,), arguments, tiles, exact=False)
    arguments = [dy, x, weight, inverse, poisoned(m, n), poisoned(8, 2, n), normal(m, n, seed=5), mean]
    yield Launch("layernorm backward", norm_backward, (8,), arguments, {**tiles, "BIAS": True}, exact=False)
    arguments = [dy, x, weight, inverse, poisoned(m, n), poisoned(8, 2, n), None, mean]
    meta = {"BN": 1024, "BIAS": True, "AGAIN": True}
    yield Launch("layernorm backward, rows read again", norm_backward, (8,), arguments, meta, exact=False)
    arguments = [dy, x, weight, inverse, poisoned(2, m), mean]
    yield Launch("layernorm backward, sums", norm_backward_sums, (m,), arguments, {"BN": 512}, exact=False)
    arguments = [dy, x, weight, inverse, poisoned(m, n), poisoned(8, 1, n), None, mean, normal(2, m)]
    meta = {"BM": 2, "BN": 512}
    yield Launch("layernorm backward, long rows", norm_backward, (8, 2), arguments, meta, exact=False)


def _rows() -> Iterator[Launch]:
    m, n = 64, 1000
    x, dy, tiles = normal(m, n), normal(m, n, seed=1), {"BM": 2, "BN": 1024}
    grid = (m // 2,)
    yield Launch("softmax", softmax, (m,), [x, poisoned(m, n)], {"BN": 1024}, exact=False)
    yield Launch("softmax, long rows", softmax_long, (m,), [x, poisoned(m, n)], {"BN": 512}, exact=False)
    y = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    yield Launch("softmax backward", softmax_backward, (m,), [dy, y, poisoned(m, n)], {"BN": 1024}, exact=False)
    arguments = [dy, y, poisoned(m, n)]
    yield Launch("softmax backward, long rows", softmax_backward_long, (m,), arguments, {"BN": 512}, exact=False)
    yield Launch("gelu", activation, grid, [x, poisoned(m, n)], {"FN": gelu, **tiles}, exact=False)
    arguments = [dy, x, poisoned(m, n), normal(m, n, seed=2), poisoned(m, n)]
    yield Launch("silu backward, gated", activation_backward, grid, arguments, tiles, exact=False)
    target, meta = np.arange(m, dtype=np.int32) * 7, {"BN": 512, "LANES": 512, "SMOOTHING": 0.1}
    arguments = [x, target, poisoned(m), poisoned(m), -100]
    yield Launch("cross entropy", cross_entropy, (m,), arguments, meta, exact=False)
    lse = np.log(np.exp(x.astype(np.float64)).sum(1)).astype(np.float32)
    arguments = [x, target, lse, normal(m), poisoned(m, n), -100]
    meta = {"BN": 512, "SMOOTHING": 0.1}
    yield Launch("cross entropy backward", cross_entropy_backward, (2 * m,), arguments, meta, exact=False)
    arguments = [x, poisoned(3, n), np.zeros(8, np.int32), poisoned(1, n)]
    yield Launch("column sum", column_sum, (8, 3), arguments, {"BM": 32, "BN": 128})
    yield Launch("column sum, at once", column_sum_at_once, (32,), [x, poisoned(1, n)], {"BM": 64})
    yield Launch("transpose", transpose, (1, 16), [x, poisoned(n, m)], {"BM": 64, "BN": 64})
    arguments = [x, poisoned(m, n), 0.25, 1234567890123, 3]
    yield Launch("dropout", dropout, grid, arguments, tiles, exact=False)
    places, angles = (2, 40, 6, 64), normal(40, 32, seed=1)
    for name, interleaved in (("rotary", False), ("rotary, interleaved", True)):
        arguments = [normal(*places, dtype="bf16"), np.cos(angles), np.sin(angles), poisoned(*places, dtype="bf16")]
        meta = {"D": 64, "BH": 8, "INTERLEAVED": interleaved}
        yield Launch(name, rotary, (40, 1, 2), arguments, meta)


def _tables() -> Iterator[Launch]:
    tokens = (np.arange(100, dtype=np.int32) * 7) % 33
    tokens[::10] = 5
    tiles = {"BM": 4, "BN": 256}
    table, dy = normal(40, 264), normal(100, 264, seed=1)
    yield Launch("embedding", embedding, (50,), [table, tokens, poisoned(100, 264)], tiles)
    # one value of tokens: in whichever order threads come, they take the same tickets
    same, empty = np.full(100, 5, np.int32), np.zeros(40, np.int32)
    arguments = [same, empty.copy(), np.zeros(100, np.int32)]
    yield Launch("tickets", take_tickets, (1,), arguments, unordered=(2,))
    counts, order = np.bincount(tokens, minlength=40).astype(np.int32), np.argsort(tokens, kind="stable")
    first, order = (np.cumsum(counts) - counts).astype(np.int32), order.astype(np.int32)
    yield Launch("places", share_places, (1,), [counts, np.zeros(1, np.int32), empty.copy()], {"BV": 64})
    tickets = np.array([(tokens[:i] == token).sum() for i, token in enumerate(tokens)], np.int32)
    arguments = [tokens, tickets, first, np.zeros(100, np.int32)]
    yield Launch("places taken", take_places, (1,), arguments)
    arguments = [tokens, counts, first, order, np.zeros(100, np.int32)]
    yield Launch("places in order", order_places, (1,), arguments)
    arguments = [dy, order, first, counts, poisoned(40, 264)]
    yield Launch("embedding backward", embedding_backward, (80,), arguments, {"BN": 256})
    # sums of whole numbers, which no order changes
    arguments = [np.round(dy), tokens, np.zeros((40, 264), np.float32)]
    yield Launch("embedding backward, any order", embedding_backward_atomic, (50,), arguments, tiles)
