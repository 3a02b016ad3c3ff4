"""Layouts by cost: which way loads and stores beside matrix products and transpositions go."""

from __future__ import annotations

import amd_programs as amd
import pytest

import tilewright as tw
from tilewright.ir.core import Function
from tilewright.ir.layout import (
    access_cost,
    blocked,
    conversion_cost,
    mfma_accumulator,
    near_coalesced,
    plan_conversion,
    wgmma_accumulator,
)
from tilewright.ir.layout_access import pieces
from tilewright.ir.tile_ops import Convert, For, Load, Store
from tilewright.ir.types import DTYPES, TileType, ViewType
from tilewright.kernels.softmax import softmax
from tilewright.kernels.transpose import transpose
from tilewright.passes.layout_costs import MEETING_CYCLES, SHUFFLE_CYCLES, reduction_cost


@tw.kernel
def residual(a: tw.Tensor, b: tw.Tensor, r: tw.Tensor, c: tw.Tensor):
    """A product plus a matrix that is added in the end."""
    m, n = tw.program_id(0), tw.program_id(1)
    acc = tw.zeros((128, 256), tw.float32)
    for k in tw.range(tw.cdiv(a.shape[1], 64)):
        acc = tw.dot(tw.load(a, (m, k), (128, 64)), tw.load(b, (k, n), (64, 256)), acc)
    acc = acc + tw.load(r, (m, n), (128, 256)).to(tw.float32)
    tw.store(c, (m, n), acc.to(c.dtype))


@tw.kernel
def scaled(x: tw.Tensor, s: tw.Tensor, y: tw.Tensor):
    """A matrix and its transposed neighbour."""
    m, n = tw.program_id(0), tw.program_id(1)
    tw.store(y, (m, n), tw.load(x, (m, n), (64, 64)) + tw.load(s, (n, m), (64, 64)).T)


def find(function: Function, kind: type) -> list:
    return [op for op in function.walk() if isinstance(op, kind)]


def layout_of(value):
    assert isinstance(value.type, TileType)
    return value.type.layout


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_a_residual_goes_in_full_sectors_and_is_shuffled_into_the_accumulator(dtype):
    views = {"a": amd.matrix(), "b": amd.matrix(), "r": amd.matrix(dtype), "c": amd.matrix()}
    function = amd.scheduled(amd.module_of(residual, **views), "sm_90a")
    (load,) = find(function, Load)
    direct, bits = wgmma_accumulator((128, 256), 2), 16 if dtype == "bf16" else 32
    held = layout_of(load.result)
    if dtype == "f32":  # eight bytes of four lanes are a sector already
        assert held == direct
        return
    assert access_cost(held, 1, bits) < 1.05 * access_cost(blocked((128, 256), bits, 8, 32, (1, 0)), 1, bits)
    assert plan_conversion(held, direct, bits, "nvidia").scratch_bytes == 0  # the rings have the shared memory
    assert access_cost(held, 1, bits) + conversion_cost(held, direct, bits, "nvidia") < access_cost(direct, 1, bits)


def test_an_accumulator_is_stored_coalesced_where_that_is_cheaper():
    views = {name: amd.matrix() for name in "abrc"}
    function = amd.scheduled(amd.module_of(residual, **views), "gfx942")
    (store,) = find(function, Store)
    accumulator = layout_of(find(function, For)[-1].results[0])
    held = layout_of(store.value)
    cost = access_cost(held, 1, 16) + conversion_cost(accumulator, held, 16, "cdna3")
    assert cost <= access_cost(accumulator, 1, 16)
    assert function.attributes["shared_bytes"] <= 65536


@pytest.mark.parametrize("target", ["sm_90a", "gfx942", "gfx950"])
def test_a_transposition_reads_and_writes_at_full_speed(target):
    meta = {"BM": 128, "BN": 128}
    views = {"x": amd.matrix(), "y": amd.matrix()}
    function = amd.scheduled(amd.module_of(transpose, **views, **meta), target)
    for op in (*find(function, Load), *find(function, Store)):
        layout = layout_of(op.result if isinstance(op, Load) else op.value)
        assert layout.contiguity(1) * 2 == (16 if layout.num_lanes == 32 or isinstance(op, Load) else 8)
        assert (
            pieces(layout, 1, 2) * 32 == 2 * layout.contiguity(1) * layout.num_lanes
        )  # every sector is used to the full


def test_the_layout_serves_all_accesses_of_a_class():
    views = {name: amd.matrix("f32") for name in "xsy"}
    function = amd.scheduled(amd.module_of(scaled, **views), "sm_90a")
    for op in (*find(function, Load), *find(function, Store)):
        layout = layout_of(op.result if isinstance(op, Load) else op.value)
        assert access_cost(layout, 1, 32) <= 1.1 * access_cost(blocked((64, 64), 32, 4, 32, (1, 0)), 1, 32)


def test_conversions_leave_loops_that_do_not_change_their_source():
    @tw.kernel
    def looped(x: tw.Tensor, y: tw.Tensor):
        tile = tw.load(x, (0, 0), (64, 64))
        for i in tw.range(y.shape[0]):
            tw.store(y[i], (0, 0), (tile.T).reshape(64, 64))

    views = {"x": amd.matrix("f32"), "y": ViewType((None, None, None), DTYPES["f32"], (None, None, 1), 16)}
    function = amd.scheduled(amd.module_of(looped, **views), "sm_90a")
    (loop,) = find(function, For)
    assert not any(isinstance(op, Convert) for op in loop.body.walk())


def test_sectors():
    row = blocked((64, 64), 16, 4, 32, (1, 0))
    assert pieces(row, 1, 2) == 16  # 32 lanes of 16 bytes
    assert pieces(row, 0, 2) == 8  # four rows of a column are one sector, eight columns apart
    assert pieces(wgmma_accumulator((64, 64), 1), 1, 2) == 8  # half of each sector
    assert pieces(wgmma_accumulator((64, 64), 1), 1, 4) == 8
    assert pieces(row, None, 2) == 32


def test_near_layouts_stay_inside_their_warps():
    for layout in (wgmma_accumulator((128, 256), 2), mfma_accumulator((128, 128), (32, 32), (2, 2))):
        near = near_coalesced(layout, 1, 16)
        assert near is not None and near.contiguity(1) == 8
        assert near.basis("warp") == layout.basis("warp")
        assert sorted([*near.basis("register"), *near.basis("lane")]) == sorted(
            [*layout.basis("register"), *layout.basis("lane")]
        )


@tw.kernel
def normalised(x: tw.Tensor, y: tw.Tensor):
    """Rows in blocks, whose sums travel through a loop as tiles of one element."""
    m, columns = tw.program_id(0), x.shape[1]
    mean, spread = tw.zeros((1,), tw.float32), tw.zeros((1,), tw.float32)
    for j in tw.range(tw.cdiv(columns, 4096)):
        row = tw.load(x, (m, j), (1, 4096)).to(tw.float32)
        own = tw.sum(row, axis=1) / 4096
        apart = row - own[:, None]
        mean, spread = mean + own, spread + tw.sum(apart * apart, axis=1)
    for j in tw.range(tw.cdiv(columns, 4096)):
        row = tw.load(x, (m, j), (1, 4096)).to(tw.float32)
        tw.store(y, (m, j), ((row - mean[:, None]) * spread[:, None]).to(y.dtype))


@pytest.mark.parametrize("target", ["sm_90a", "gfx942"])
def test_a_sum_that_every_thread_has_does_not_give_every_thread_the_row(target):
    function = amd.scheduled(amd.module_of(normalised, x=amd.matrix(), y=amd.matrix()), target)
    threads = function.attributes["threads"]
    tiles = [v for op in function.walk() for v in op.results if isinstance(v.type, TileType)]
    rows = [v.type for v in tiles if v.type.size == 4096]
    assert rows and all(t.layout.num_registers == 4096 // threads for t in rows)
    assert not find(function, Convert)


@pytest.mark.parametrize(("rows", "columns", "meet"), [(4, 1024, False), (16, 256, False), (1, 4096, True)])
def test_each_warp_reduces_rows_of_its_own_where_there_are_enough(rows, columns, meet):
    views = {"x": amd.matrix("bf16"), "y": amd.matrix("bf16")}
    function = amd.scheduled(amd.module_of(softmax, **views, BM=rows, BN=columns), "sm_90a")
    (load,), (store,) = find(function, Load), find(function, Store)
    for held in (layout_of(load.result), layout_of(store.value)):
        assert held.contiguity(1) == 8
        assert any(vector[1] for vector in held.basis("warp")) == meet
    assert bool(function.attributes["shared_bytes"]) == meet
    assert not find(function, Convert)


def test_reductions_cost_what_threads_exchange():
    across, apart = (blocked((4, 1024), 16, 4, 32, (1, 0), warps_apart=apart) for apart in (False, True))
    assert reduction_cost(apart, 1) == SHUFFLE_CYCLES * 5
    assert reduction_cost(across, 1) == SHUFFLE_CYCLES * 5 * 4 + MEETING_CYCLES + 4 * 4
    assert reduction_cost(across, 0) == 0
