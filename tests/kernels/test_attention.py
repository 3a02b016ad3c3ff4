"""Attention forward, backward and decode against float64, in the interpreter and on the emulated GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_checks import DEVICES, check, errors, launch, normal, poisoned, strided

import tilewright as tw
from tilewright.kernels.attention import LOG2E, attention, attention_varlen, configuration, reference
from tilewright.kernels.attention_backward import (
    ROWS,
    TILE,
    attention_dq,
    attention_gradients,
    attention_rows,
    attention_sum_heads,
    sdpa_backward,
)
from tilewright.kernels.attention_backward import configuration as backward_configuration
from tilewright.kernels.attention_backward import reference as gradients
from tilewright.kernels.attention_decode import attention_decode, attention_merge, splits
from tilewright.kernels.attention_decode import reference as decoded
from tilewright.kernels.attention_exact import attention_bound, attention_largest, nearest_integer

#: tiles that fit into 64 KiB
SMALL = {"BM": 64, "BN": 32}
AMD = ("emulate:gfx942", "emulate:gfx950")


def inputs(shape: tuple[int, ...], dtype: str = "bf16") -> list[np.ndarray]:
    """q, k, v of (B, H, G, M, N, D, DV)."""
    b, h, g, m, n, d, dv = shape
    return [normal(*s, dtype=dtype, seed=i) for i, s in enumerate(((b, h, m, d), (b, g, n, d), (b, g, n, dv)))]


def forward(
    device: str,
    shape: tuple[int, ...],
    causal: bool = False,
    bias: bool = False,
    lengths: list[int] | None = None,
    tiles: dict[str, int] | None = None,
    **options: Any,
) -> None:
    b, h, _, m, n, d, dv = shape
    q, k, v = inputs(shape)
    o, lse = poisoned(b, h, m, dv, dtype="bf16"), poisoned(b, h, m)
    pairs = normal(b, 1, m, n, seed=9) if bias else None
    pairs = None if pairs is None else np.broadcast_to(pairs, (b, h, m, n))
    exist = None if lengths is None else np.array(lengths, np.int32)
    meta = {"D": d, "DV": dv, "CAUSAL": causal, "CAP": options.get("cap"), **(tiles or configuration(m, max(d, dv)))}
    grid = (tw.cdiv(m, meta["BM"]), h, b)
    launch(device, attention, grid, q, k, v, o, d**-0.5 * LOG2E, lse, pairs, exist, options.get("left"), **meta)
    wanted, logarithm = reference(q, k, v, causal, bias=pairs, lengths=exist, **options)
    check(o, wanted, "bf16")
    np.testing.assert_allclose(lse, logarithm, rtol=1e-5, atol=1e-5)


FORWARD: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((1, 2, 1, 70, 150, 64, 64), {"causal": True}),
    ((2, 2, 1, 70, 150, 64, 64), {"bias": True, "lengths": [100, 0]}),
    ((1, 1, 1, 150, 150, 64, 64), {"causal": True, "left": 20, "cap": 5.0}),
    ((1, 1, 1, 150, 90, 64, 64), {"left": 30}),
    ((1, 2, 2, 200, 100, 96, 96), {"causal": True}),  # the first rows see no key
    ((1, 1, 1, 100, 200, 192, 128), {"causal": True}),
    ((1, 1, 1, 70, 100, 256, 256), {}),
]


@pytest.mark.parametrize(("shape", "options"), FORWARD)
def test_forward(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    forward("cpu", shape, **options)


@pytest.mark.parametrize(("shape", "options"), FORWARD[:3] + FORWARD[-1:])
def test_forward_on_emulated_hopper(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    forward("emulate:sm_90a", shape, **options)


@pytest.mark.parametrize("device", AMD)
def test_forward_on_emulated_amd(device: str) -> None:
    forward(device, (1, 2, 1, 70, 50, 64, 64), causal=True, tiles=SMALL)


@pytest.mark.parametrize("device", ["cpu", "emulate:sm_90a", *AMD])
def test_sequences_one_after_the_other(device: str) -> None:
    rows, keys, heads, groups, d = [30, 0, 150, 7], [40, 5, 150, 3], 2, 1, 64
    q_starts, k_starts = (np.cumsum([0, *n]).astype(np.int32) for n in (rows, keys))
    q = normal(q_starts[-1], heads, d, dtype="bf16")
    k, v = (normal(k_starts[-1], groups, d, dtype="bf16", seed=s) for s in (1, 2))
    o, lse = poisoned(*q.shape, dtype="bf16"), poisoned(heads, q_starts[-1])
    tiles = SMALL if device in AMD else {"BM": 128, "BN": 128}
    grid = (tw.cdiv(max(rows), tiles["BM"]), heads, len(rows))
    meta = {"D": d, "DV": d, "CAUSAL": True, **tiles}
    launch(device, attention_varlen, grid, q, k, v, o, q_starts, k_starts, d**-0.5 * LOG2E, lse, **meta)
    for i in (0, 2, 3):
        mine, theirs = slice(*q_starts[i : i + 2]), slice(*k_starts[i : i + 2])
        wanted, logarithm = reference(*(x.transpose(1, 0, 2)[None] for x in (q[mine], k[theirs], v[theirs])), True)
        check(o[mine].transpose(1, 0, 2)[None], wanted, "bf16")
        np.testing.assert_allclose(lse[:, mine], logarithm[0], rtol=1e-5, atol=1e-5)


def run(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool = True) -> np.ndarray:
    o = poisoned(*q.shape, dtype="bf16")
    b, h, m, d = q.shape
    meta = {"D": d, "DV": d, "CAUSAL": causal, **configuration(m, d)}
    launch("cpu", attention, (tw.cdiv(m, meta["BM"]), h, b), q, k, v, o, d**-0.5 * LOG2E, **meta)
    return o


def test_later_keys_change_no_bit_of_earlier_rows() -> None:
    q, k, v = inputs((1, 1, 1, 200, 200, 64, 64))
    before = run(q, k, v)
    k[:, :, 130:] *= 3
    v[:, :, 130:] = 7
    after = run(q, k, v)
    assert before[:, :, :130].tobytes() == after[:, :, :130].tobytes()
    assert before[:, :, 130:].tobytes() != after[:, :, 130:].tobytes()


@pytest.mark.parametrize("growing", [False, True])
def test_large_scores(growing: bool) -> None:
    """Up to 1e4, or growing from block to block so that every block moves the maximum."""
    q, k, v = inputs((1, 1, 1, 64, 300, 64, 64))
    if growing:
        k = (k * np.linspace(1, 60, 300)[:, None]).astype(k.dtype)
    else:
        q = (q * 1000).astype(q.dtype)
    check(run(q, k, v, causal=False), reference(q, k, v)[0], "bf16")


def test_nan_and_infinity_stay_in_their_rows() -> None:
    q, k, v = inputs((1, 1, 1, 64, 64, 64, 64))
    q[0, 0, 3] = np.nan
    got = run(q, k, v, causal=False)
    assert np.isnan(got[0, 0, 3].astype(np.float32)).all()
    assert np.isfinite(np.delete(got[0, 0], 3, axis=0).astype(np.float32)).all()


BACKWARD: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((1, 2, 1, 70, 150, 64, 64), {}),
    ((1, 2, 2, 100, 130, 128, 128), {"causal": True}),
    ((1, 1, 1, 130, 130, 64, 64), {"causal": True, "left": 20}),
    ((1, 1, 1, 130, 100, 64, 64), {"causal": True}),
    ((2, 4, 2, 100, 70, 64, 64), {"causal": True, "exact": False}),
    ((1, 1, 1, 70, 100, 96, 32), {"causal": True}),
    ((1, 1, 1, 70, 100, 192, 128), {}),
    ((1, 2, 1, 100, 200, 64, 64), {"causal": True, "BN": 128, "num_warps": 8}),
    ((1, 2, 1, 100, 200, 64, 64), {"causal": True, "BN": 64, "num_warps": 4, "persistent": False}),
    ((1, 1, 1, 100, 300, 128, 128), {"causal": True, "persistent": False}),
]


def backward_inputs(shape: tuple[int, ...], causal: bool, left: int | None) -> list[np.ndarray]:
    """q, k, v, o, do, lse."""
    q, k, v = inputs(shape)
    do = normal(shape[0], shape[1], shape[3], shape[6], dtype="bf16", seed=5)
    o, lse = reference(q, k, v, causal, left=left)
    return [q, k, v, o.astype(q.dtype), do, lse.astype(np.float32)]


def backward(
    device: str, arrays: list[np.ndarray], causal: bool, left: int | None = None, exact: bool = True, **tiles: int
) -> list[np.ndarray]:
    """dq, dk and dv of the kernels, and the sums that became dq."""
    q, k, v, o, do, lse = arrays
    (b, h, m, depth), (g, n) = q.shape, k.shape[1:3]
    meta = {"CAUSAL": causal, "EXACT": exact, **backward_configuration(depth, v.shape[3]), **tiles}
    d, dv = meta["D"], meta["DV"]
    blocks = tw.cdiv(m, TILE)
    rows, sums = poisoned(ROWS, b, h, blocks * TILE), np.full(q.shape, 123, np.int32 if exact else np.float32)
    results, bound = [poisoned(*x.shape, dtype="bf16") for x in (q, k, v)], None
    if exact:
        largest, bound = poisoned(2, b, g, tw.cdiv(n, TILE)), poisoned(b, g)
        launch(device, attention_largest, (tw.cdiv(n, TILE), g, b), k, v, largest, D=d, DV=dv)
        launch(device, attention_bound, (g, b), largest, bound)
    launch(device, attention_rows, (blocks, h, b), o, do, lse, rows, sums, bound, D=d, DV=dv)
    grid = (tw.cdiv(n, meta["BN"]), g, b)
    launch(device, attention_gradients, grid, q, k, v, do, rows, sums, *results[1:], depth**-0.5, left, **meta)
    launch(device, attention_dq, (blocks, h, b), sums, rows, results[0], depth**-0.5, D=d)
    return [*results, sums]


def check_backward(
    device: str, shape: tuple[int, ...], causal: bool = False, left: int | None = None, **options: Any
) -> None:
    arrays = backward_inputs(shape, causal, left)
    q, k, v, _, do, _ = arrays
    results = backward(device, arrays, causal, left, **options)
    for actual, wanted in zip(results[:3], gradients(q, k, v, do, causal, left=left), strict=True):
        check(actual, wanted, "bf16")


def test_backward_tiles_by_size() -> None:
    """Two blocks share a multiprocessor where rows are short; causal programs are handed out by the hardware."""
    pairs = [backward_configuration(64, 64, causal=c) for c in (False, True)]
    assert [(x["BN"], x["num_warps"], x.get("persistent")) for x in pairs] == [(64, 4, None), (64, 4, False)]
    assert "num_warps" not in backward_configuration(64, 64, causal=True, plain=False)
    assert "num_warps" not in backward_configuration(64, 64, aligned=False)
    assert [backward_configuration(128, 128, causal=c).get("persistent") for c in (False, True)] == [None, False]


@pytest.mark.parametrize(("shape", "options"), BACKWARD)
def test_backward(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    check_backward("cpu", shape, **options)


@pytest.mark.parametrize(("shape", "options"), BACKWARD)
def test_backward_on_emulated_hopper(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    check_backward("emulate:sm_90a,races", shape, **options)


@pytest.mark.parametrize("device", AMD)
def test_backward_on_emulated_amd(device: str) -> None:
    check_backward(device, (1, 2, 1, 40, 50, 64, 64), causal=True, BM=32, BN=64)


@pytest.mark.parametrize("causal", [False, True])
def test_backward_of_arrays(causal: bool) -> None:
    arrays = backward_inputs((1, 4, 2, 70, 150, 64, 64), causal, None)
    q, k, v, _, do, _ = arrays
    for deterministic in (True, False):
        results = [poisoned(*x.shape, dtype="bf16") for x in (q, k, v)]
        sdpa_backward(*arrays, *results, causal=causal, deterministic=deterministic)
        for actual, wanted in zip(results, gradients(q, k, v, do, causal), strict=True):
            check(actual, wanted, "bf16")


def test_backward_of_rows_that_are_not_aligned() -> None:
    """Threads copy instead of the engine, and leave registers for smaller tiles only."""
    q, do, k, v = (strided(1, 1, n, 128, dtype="bf16", seed=s) for s, n in enumerate((70, 70, 90, 90)))
    o, lse = reference(q, k, v)
    arrays, wanted = [q, k, v, o.astype(q.dtype), do, lse.astype(np.float32)], gradients(q, k, v, do)
    results = [poisoned(*x.shape, dtype="bf16") for x in (q, k, v)]
    sdpa_backward(*arrays, *results)
    smaller = backward_configuration(128, 128, aligned=False)
    assert smaller != backward_configuration(128, 128)
    emulated = backward("emulate:sm_90a", arrays, False, **smaller)[:3]
    for got in (results, emulated):
        for actual, exact in zip(got, wanted, strict=True):
            check(actual, exact, "bf16")


@pytest.mark.parametrize("device", DEVICES)
def test_parts_of_a_group_are_added(device: str) -> None:
    parts, total = normal(2, 6, 70, 64, dtype="bf16"), poisoned(2, 2, 70, 64, dtype="bf16")
    launch(device, attention_sum_heads, (tw.cdiv(70, TILE), 2, 2), parts, total, D=64)
    check(total, parts.astype(np.float64).reshape(2, 2, 3, 70, 64).sum(2), "bf16")


def test_integer_sums_do_not_depend_on_their_order() -> None:
    """Blocks that run in different orders give the same bits, which sums of float32 do not."""
    arrays = backward_inputs((1, 1, 1, 64, 512, 64, 64), False, None)
    orders = [f"emulate:sm_90a,seed={seed}" for seed in (1, 8)]  # whose blocks add in different orders
    exact, loose = ([backward(device, arrays, False, exact=e) for device in orders] for e in (True, False))
    assert [x.tobytes() for x in exact[0]] == [x.tobytes() for x in exact[1]]
    assert loose[0][3].tobytes() != loose[1][3].tobytes(), "these runs do not differ in order"


@tw.kernel
def round_all(x: tw.Tensor, y: tw.Tensor) -> None:
    tw.store(y, 0, nearest_integer(tw.load(x, 0, (1024,))))


@pytest.mark.parametrize("device", DEVICES)
def test_integers_are_the_nearest(device: str) -> None:
    x = (normal(1024) * 2.0 ** np.linspace(-3, 28, 1024)).astype(np.float32)
    x[:8] = [0, 0.25, -0.25, 1, -1, 2.0**23 + 1, 2.0**30, -(2.0**30)]
    y = np.zeros(1024, np.int32)
    launch(device, round_all, (1,), x, y)
    np.testing.assert_array_equal(y, np.rint(x.astype(np.float64)))


@pytest.mark.parametrize("factor", [0.0, 1e-4, 1e4])
def test_integer_sums_of_any_size(factor: float) -> None:
    q, k, v, o, do, lse = backward_inputs((1, 1, 1, 70, 200, 64, 64), True, None)
    scaled = (do * do.dtype.type(factor)).astype(do.dtype)
    results = backward("cpu", [q, k, v, o, scaled, lse], True)
    for actual, wanted in zip(results[:3], gradients(q, k, v, scaled, True), strict=True):
        if factor:
            check(actual, wanted, "bf16")
        else:
            assert not actual.any()


def test_integer_sums_beside_large_elements() -> None:
    """A key and a value that are much larger than the others make all steps coarser, but not as coarse as bfloat16."""
    q, k, v, _, do, _ = backward_inputs((1, 1, 1, 70, 200, 64, 64), False, None)
    k[..., 7, 3] = 100
    v[..., 9, :] *= v.dtype.type(30)
    o, lse = reference(q, k, v)
    arrays, wanted = [q, k, v, o.astype(q.dtype), do, lse.astype(np.float32)], gradients(q, k, v, do)[0]
    exact, loose = (errors(backward("cpu", arrays, False, exact=e)[0], wanted, "bf16")[0] for e in (True, False))
    assert exact < 1.01 * loose


@pytest.mark.parametrize("spoiled", ["q", "do"])
def test_not_a_number_spoils_the_gradient_of_its_query_alone(spoiled: str) -> None:
    arrays = backward_inputs((1, 1, 1, 64, 100, 64, 64), False, None)
    arrays[0 if spoiled == "q" else 4][0, 0, 3] = np.nan
    if spoiled == "q":
        o, lse = reference(*arrays[:3])
        arrays[3], arrays[5] = o.astype(arrays[0].dtype), lse.astype(np.float32)
    dq = backward("cpu", arrays, False)[0][0, 0].astype(np.float32)
    assert np.isnan(dq[3]).all() and np.isfinite(np.delete(dq, 3, axis=0)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("paged", [False, True])
def test_decode(device: str, paged: bool) -> None:
    b, h, g, n, d, count = 2, 8, 2, 320, 64, 3
    q = normal(b, h, d, dtype="bf16")
    k, v = (normal(b, g, n, d, dtype="bf16", seed=s) for s in (1, 2))
    lengths = np.array([300, 0 if paged else 100], np.int32)
    stored, pages = [k, v], None
    if paged:
        order = np.random.default_rng(3).permutation(b * n // 64)
        pages = order.reshape(b, -1).astype(np.int32)
        stored = [np.zeros((len(order), g, 64, d), k.dtype) for _ in range(2)]
        for target, source in zip(stored, (k, v), strict=True):
            target[order] = source.reshape(b, g, n // 64, 64, d).transpose(0, 2, 1, 3, 4).reshape(-1, g, 64, d)
    parts, logarithms = poisoned(b, h, count, d), poisoned(b, h, count)
    o, lse = poisoned(b, h, d, dtype="bf16"), poisoned(b, h)
    scale = d**-0.5 * LOG2E
    launch(device, attention_decode, (count, g, b), q, *stored, parts, logarithms, lengths, scale, pages, D=d, DV=d)
    launch(device, attention_merge, (h, b), parts, logarithms, o, lse, DV=d)
    check(o, decoded(q, k, v, lengths), "bf16")
    wanted = reference(q[:, :, None], k, v, lengths=lengths)[1][:, :, 0]
    np.testing.assert_allclose(lse, wanted, rtol=1e-5, atol=1e-5)


def test_splits_fill_the_gpu_but_stay_long() -> None:
    assert splits(1, 8, 65536) == 16
    assert splits(16, 8, 16384) == 2
    assert splits(128, 8, 65536) == 1
    assert splits(1, 1, 300) == 1
