"""The relatives of the matrix product, on the interpreter and on emulated GPUs, against float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from tilewright.kernels import gemm_batched as batched_module
from tilewright.kernels import gemm_epilogue as epilogue_module
from tilewright.kernels import gemm_grouped as grouped_module
from tilewright.kernels import gemm_scaled as scaled_module
from tilewright.kernels.gemm_batched import batched_configuration, gemm_batched
from tilewright.kernels.gemm_epilogue import (
    add_bias,
    add_residual,
    gate_up,
    gelu,
    gelu_tanh,
    gemm_epilogue,
    multiply,
    relu,
    silu,
)
from tilewright.kernels.gemm_grouped import (
    gemm_grouped,
    gemm_grouped_weights,
    grouped,
    grouped_weights,
    list_tiles,
    most_tiles,
)
from tilewright.kernels.gemm_scaled import (
    configuration,
    gemm_block_scaled,
    gemm_promoted,
    gemm_scaled,
    promoted_configuration,
)

BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
DEVICES = ["cpu", "emulate:sm_90a", "emulate:gfx942", "emulate:gfx950"]
#: the last one differs in 8-bit formats and the depth of products
FEW_DEVICES = [*DEVICES[:-1], pytest.param(DEVICES[-1], marks=pytest.mark.exhaustive)]
#: rounding the result to bfloat16 costs 1.7e-3
ROUNDED = 2e-3


def random(*shape: int, dtype: Any = BF16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, *shape])
    return (rng.integers(-128, 128, shape) if dtype is np.int8 else rng.standard_normal(shape)).astype(dtype)


def positive(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).uniform(0.5, 2, shape).astype(np.float32)


def poisoned(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, BF16)


def relative(actual: np.ndarray, exact: np.ndarray) -> float:
    assert not np.isnan(actual.astype(np.float64)).any()
    return float(np.linalg.norm(actual.astype(np.float64) - exact) / np.linalg.norm(exact))


def tiles(shape: tuple[int, int], bm: int = 128, bn: int = 128) -> tuple[int, int]:
    return tw.cdiv(shape[0], bm), tw.cdiv(shape[1], bn)


# --- epilogues -------------------------------------------------------------------------------------

CHAINS = [(), (add_bias, gelu), (add_bias, silu, add_residual), (multiply, relu), (add_residual, gelu_tanh)]


@pytest.mark.parametrize("device", FEW_DEVICES)
@pytest.mark.parametrize("steps", CHAINS, ids=lambda steps: "-".join(step.name for step in steps))
def test_steps(steps: tuple[Any, ...], device: str) -> None:
    m, n, k = 136, 136, 72
    a, b, vector, matrix = random(m, k), random(k, n), random(n), random(m, n, seed=1)
    out = poisoned(m, n)
    vector_used, matrix_used = add_bias in steps, add_residual in steps
    tw.device(device).launch(
        gemm_epilogue, tiles((m, n)), a, b, out, vector if vector_used else None, matrix if matrix_used else None,
        0.5, STEPS=steps, BN=128,
    )  # fmt: skip
    assert relative(out, epilogue_module.reference(a, b, steps, vector, matrix, 0.5)) < ROUNDED


def test_a_step_of_ones_own() -> None:
    a, b, out = random(64, 64), random(64, 64), poisoned(64, 64)
    gemm_epilogue[1, 1](a, b, out, STEPS=(squared, relu), BM=64, BN=64)
    assert relative(out, np.square(a.astype(np.float64) @ b.astype(np.float64))) < ROUNDED


@tw.function
def squared(x, m, n, vector, matrix, factor):
    return x * x


@pytest.mark.parametrize("device", FEW_DEVICES)
@pytest.mark.parametrize("merged", [False, True])
def test_gate_up(merged: bool, device: str) -> None:
    m, n, k = 66, 136, 136
    x, weights, out = random(m, k), random(k, 2 * n), poisoned(m, n)
    gate, up = weights[:, :n], weights[:, n:]
    if not merged:
        gate, up = np.asfortranarray(gate), np.asfortranarray(up)
    tw.device(device).launch(gate_up, tiles((m, n)), x, gate, up, out)
    assert relative(out, epilogue_module.gate_up_reference(x, gate, up)) < ROUNDED
    again, left, right = (poisoned(m, n) for _ in range(3))
    tw.device(device).launch(gate_up, tiles((m, n)), x, gate, up, again, left, right)
    np.testing.assert_array_equal(again, out)
    for kept, weight in ((left, gate), (right, up)):
        assert relative(kept, x.astype(np.float64) @ weight.astype(np.float64)) < ROUNDED


def test_both_products_of_gate_up_stay_in_flight() -> None:
    """Neighbouring dots share a ring, so that its stage is released once, an iteration later."""
    spec = tw.spec("bf16", ("M", "N"), align=16)
    text = tw.compile(gate_up, "sm_90a", dict.fromkeys(("x", "gate", "up", "y"), spec)).ir["fences"]
    assert str(text).count("async.ring") == 1
    assert "async.wait [] {pending = 2}" in str(text)


# --- scaled ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("left", "right", "parts", "per_row", "bias"),
    [
        (E4M3, E4M3, None, True, False),
        (E4M3, E4M3, 1, True, True),
        (E4M3, E4M3, 2, False, False),
        (E5M2, E4M3, None, False, True),
        (E5M2, E4M3, 1, False, False),
        (np.int8, np.int8, None, True, True),
        (np.int8, np.int8, 2, False, False),
    ],
)
def test_scaled(left: Any, right: Any, parts: int | None, per_row: bool, bias: bool, device: str) -> None:
    """``parts``: with sums in float32, of so many tiles a program."""
    m, n, k = 72, 136, 272
    a, b, out = random(m, k, dtype=left), random(n, k, dtype=right).T, poisoned(m, n)
    scale_a, scale_b = positive(m if per_row else 1), positive(n if per_row else 1)
    added = random(n, seed=5) if bias else None
    kernel, meta = (gemm_promoted, {"PARTS": parts, "BK": 128}) if parts else (gemm_scaled, {})
    tw.device(device).launch(
        kernel,
        tiles((m, n), bn=128 * (parts or 1)),
        a,
        b,
        scale_a,
        scale_b,
        out,
        added,
        PER_ROW=per_row,
        BN=128,
        **meta,
    )
    assert relative(out, scaled_module.reference(a, b, scale_a, scale_b, added)) < ROUNDED


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "shape", "parts"),
    [
        (E4M3, (136, 264, 272), 1), (E4M3, (64, 96, 128), 1), (E4M3, (19, 21, 7), 1), (E4M3, (4, 256, 384), 1),
        (E4M3, (72, 392, 272), 2), (np.int8, (72, 136, 272), 1), (np.int8, (72, 264, 272), 2),
    ],
)  # fmt: skip
def test_block_scaled(dtype: Any, shape: tuple[int, int, int], parts: int, device: str) -> None:
    m, n, k = shape
    a, b, out = random(m, k, dtype=dtype), random(n, k, dtype=dtype).T, poisoned(m, n)
    scale_a, scale_b = positive(tw.cdiv(k, 128), m).T, positive(tw.cdiv(k, 128), tw.cdiv(n, 128))
    grid = tiles((m, n), bn=128 * parts)
    tw.device(device).launch(gemm_block_scaled, grid, a, b, scale_a, scale_b, out, PARTS=parts)
    assert relative(out, scaled_module.block_reference(a, b, scale_a, scale_b)) < ROUNDED


def test_promoted_sums_keep_more_digits() -> None:
    """Hopper's unit alone loses some at each step; so does the emulator."""
    m, n, k = 64, 64, 1024
    a, b = random(m, k, dtype=E4M3), random(n, k, dtype=E4M3).T
    one, errors = np.ones(1, np.float32), []
    for kernel, meta in ((gemm_scaled, {}), (gemm_promoted, {"BK": 256}), (gemm_promoted, {"BK": 128})):
        out = np.full((m, n), np.nan, np.float32)
        tw.device("emulate:sm_90a").launch(kernel, (1, 1), a, b, one, one, out, BM=64, BN=64, **meta)
        errors.append(relative(out, scaled_module.reference(a, b, one, one)))
    assert errors[2] < 1e-3 < errors[1] < 2e-3 < 5e-3 < errors[0], errors


def test_scaled_products_run_on_the_asynchronous_unit() -> None:
    matrix = tw.spec("float8_e4m3", ("M", "K"), align=16)
    turned = tw.spec("float8_e4m3", ("K", "N"), strides=(1, None), align=16)
    scale, out = tw.spec("float32", ("K", "N")), tw.spec("bf16", ("M", "N"), align=16)
    args = {"a": matrix, "b": turned, "scale_a": scale, "scale_b": scale, "c": out}
    artifact = tw.compile(gemm_block_scaled, "sm_90a", args)
    assert "m64n128k32.f32.e4m3.e4m3" in artifact.asm["ptx"] and artifact.resources.spill_stores == 0


# --- groups and batches ------------------------------------------------------------------------------

#: sizes of groups: empty ones at both ends and between, whole tiles, single rows
GROUPS = [[0, 130, 1, 0, 128, 64, 33, 0], [5], [0, 0, 300], [128, 256]]


@pytest.mark.parametrize("device", FEW_DEVICES)
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_grouped(sizes: list[int], device: str) -> None:
    k, n = 72, 200
    offsets = np.cumsum([0, *sizes]).astype(np.int32)
    a, b = random(int(offsets[-1]), k), random(len(sizes), k, n)
    most = most_tiles(len(a), len(sizes), 128)
    out, table = poisoned(len(a), n), np.full((most, 4), -1, np.int32)
    place = tw.device(device)
    place.launch(list_tiles, (tw.cdiv(most, 4),), offsets, table, GROUPS=8, TILES=4)
    tiles_of = [(g, row, end) for g, (start, end) in enumerate(pairwise(offsets)) for row in range(start, end, 128)]
    np.testing.assert_array_equal(table[: len(tiles_of), :3], tiles_of)
    assert not table[len(tiles_of) :, :3].any() and (table[:, 3] == len(tiles_of)).all()
    place.launch(gemm_grouped, (most * tw.cdiv(n, 128),), a, b, table, out, BN=128, WINDOW=2)
    assert relative(out, grouped_module.reference(a, b, offsets)) < ROUNDED


@pytest.mark.parametrize("device", FEW_DEVICES)
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_gradient_of_grouped_matrices(sizes: list[int], device: str) -> None:
    k, n = 72, 136
    offsets = np.cumsum([0, *sizes]).astype(np.int32)
    a, dy, db = random(int(offsets[-1]), k), random(int(offsets[-1]), n, seed=1), poisoned(len(sizes), k, n)
    tw.device(device).launch(gemm_grouped_weights, (*tiles((k, n)), len(sizes)), a, dy, offsets, db)
    assert relative(db, grouped_module.reference_weights(a, dy, offsets)) < ROUNDED
    assert all((db[g] == 0).all() for g, size in enumerate(sizes) if size == 0)


def test_what_follows_a_group_is_of_no_account() -> None:
    offsets = np.array([0, 70], np.int32)
    a, dy, db = random(128, 64), random(128, 64, seed=1), poisoned(1, 64, 64)
    a[70:], dy[70:] = np.nan, np.inf
    grouped_weights(a, dy, offsets, db, BM=64, BN=64)
    assert relative(db, grouped_module.reference_weights(a[:70], dy[:70], offsets)) < ROUNDED


def test_rows_outside_all_groups_stay() -> None:
    offsets = np.array([10, 40, 50], np.int32)
    a, b, out = random(60, 64), random(2, 64, 64), poisoned(60, 64)
    grouped(a, b, offsets, out, BM=64, BN=64)
    exact = grouped_module.reference(a, b, offsets)
    assert np.isnan(out[:10].astype(np.float32)).all() and np.isnan(out[50:].astype(np.float32)).all()
    assert relative(out[10:50], exact[10:50]) < ROUNDED


@pytest.mark.parametrize("bm", [64, 128])
def test_the_grid_has_a_program_for_every_tile(bm: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(0, 3 * bm, rng.integers(1, 20)) * rng.integers(0, 2)
        assert sum(-(-sizes // bm)) <= most_tiles(int(sum(sizes)), len(sizes), bm)


@pytest.mark.parametrize("device", FEW_DEVICES)
def test_batched(device: str) -> None:
    """Two axes of batches that are no single one, with a transposed operand and one that half of the products share."""
    a = random(2, 200, 3, 72).transpose(0, 2, 1, 3)
    b, out = np.broadcast_to(random(136, 72, 3).transpose(2, 1, 0), (2, 3, 72, 136)), poisoned(2, 3, 200, 136)
    tw.device(device).launch(gemm_batched, (2, 2, 6), a, b, out, BN=128)
    assert relative(out, batched_module.reference(a, b)) < ROUNDED


# --- configurations ----------------------------------------------------------------------------------


def test_configurations() -> None:
    assert configuration(8192, 8192) == {"BM": 128, "BN": 256}
    assert promoted_configuration(8192, 8192) == {"BM": 128, "BN": 128, "PARTS": 2}
    assert promoted_configuration(128, 128) == {"BM": 64, "BN": 64, "PARTS": 1}
    assert configuration(64, 1024)["BM"] == 64
    assert batched_configuration(64, 512, 512)["BN"] == 256
    assert batched_configuration(1, 128, 128) == {"BM": 64, "BN": 64, "BK": 128}


def test_launches_where_the_arrays_live() -> None:
    """NumPy arrays run in the interpreter, with the tiles that each launch chooses."""
    m, n, k = 96, 80, 160
    a, b, bias, out = random(m, k), random(k, n), random(n), poisoned(m, n)
    epilogue_module.linear(a, b, out, (add_bias, gelu), vector=bias)
    assert relative(out, epilogue_module.reference(a, b, (add_bias, gelu), bias)) < ROUNDED
    epilogue_module.gated(a, b, b[:, ::-1], out)
    assert relative(out, epilogue_module.gate_up_reference(a, b, b[:, ::-1])) < ROUNDED
    batched_module.batched(a[None], b[None], out[None])
    assert relative(out, epilogue_module.reference(a, b)) < ROUNDED
    x, y = random(m, k, dtype=E4M3), random(n, k, dtype=E5M2).T
    for promote, scales in ((False, (positive(1), positive(1))), (True, (positive(m), positive(n)))):
        scaled_module.scaled(x, y, *scales, out, bias, promote=promote)
        assert relative(out, scaled_module.reference(x, y, *scales, bias)) < ROUNDED
    blocks = positive(m, 2), positive(2, 1)
    scaled_module.block_scaled(x, y, *blocks, out)
    assert relative(out, scaled_module.block_reference(x, y, *blocks)) < ROUNDED
