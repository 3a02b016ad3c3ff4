"""prefetch: placed loads run one iteration ahead through registers and shared memory; and the MFMA unit's choices."""

from __future__ import annotations

import numpy as np
import pytest
from amd_programs import COLUMN_MAJOR, ROW_MAJOR, matrix, module_of, normal, scheduled
from conversion_kinds import conversion_kind

import tilewright as tw
from tilewright.ir.async_ops import Alloc, Barrier, LocalLoad, LocalStore
from tilewright.ir.core import Function, IRError, Value
from tilewright.ir.interpreter import run
from tilewright.ir.layout import bank_conflicts, shared_vector_bytes
from tilewright.ir.target import get_target
from tilewright.ir.tile_ops import Convert, Dot, For, Load
from tilewright.ir.types import BufferType, TileType, bf16, f32, i32
from tilewright.kernels.gemm import gemm
from tilewright.kernels.mlp import mlp
from tilewright.passes.copy_layouts import copy_layouts
from tilewright.passes.manager import PassContext, parse_pipeline
from tilewright.passes.matrix_mfma import Mfma
from tilewright.passes.pipelines import default_pipeline

TARGETS = ["gfx942", "gfx950"]
TILES = [(128, 256, 64), (256, 256, 64), (128, 128, 32), (64, 64, 128), (96, 96, 32), (48, 64, 48), (32, 32, 16)]


def dot_of(m: int, n: int, k: int, dtype=bf16) -> Dot:
    acc = Value(TileType((m, n), f32))
    return Dot(Value(TileType((m, k), dtype)), Value(TileType((k, n), dtype)), acc, types=[acc.type])


def first(function: Function, kind: type) -> list:
    return [op for op in function.walk() if isinstance(op, kind)]


def prefetched(target: str, bm: int = 64, bn: int = 64, bk: int = 32, b=ROW_MAJOR, **options: int) -> Function:
    module = module_of(gemm, a=matrix(), b=matrix(strides=b), c=matrix(), BM=bm, BN=bn, BK=bk)
    return scheduled(module, target, **options)


# --- the unit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("contiguous", [0, 1, None])
@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("target", TARGETS)
def test_operand_reads_are_wide_and_meet_no_bank_twice(target: str, tile: tuple[int, int, int], which: str, contiguous):
    dot, unit = dot_of(*tile), Mfma(get_target(target))
    warps = unit.warps([dot])
    shared, operand = unit.shared(which, dot, contiguous, warps), unit.operand(which, dot, warps)
    assert shared is not None
    width = min(16, 2 * unit.instruction(dot, warps).run)
    assert shared_vector_bytes(operand, shared) >= width
    assert bank_conflicts(operand, shared, width, unit.target.banks) == 0


@pytest.mark.parametrize("tile", [(128, 256, 64), (256, 256, 64), (128, 128, 32), (128, 128, 64)])
@pytest.mark.parametrize("target", TARGETS)
def test_straight_copies_write_without_conflicts(target: str, tile: tuple[int, int, int]):
    dot, unit = dot_of(*tile), Mfma(get_target(target))
    warps = unit.warps([dot])
    for which, depth in (("a", 1), ("b", 0)):
        shared = unit.shared(which, dot, depth, warps)
        assert shared is not None
        store = copy_layouts(shared.shape, 16, depth, depth, warps, 64).store
        assert bank_conflicts(store, shared, shared_vector_bytes(store, shared), unit.target.banks, "write") == 0


@pytest.mark.parametrize("warps", [1, 4, 8])
@pytest.mark.parametrize("shape", [(64, 256), (32, 64), (128, 128), (16, 16), (48, 64), (96, 32), (64, 8)])
def test_turning_a_tile_renames_registers_only(shape: tuple[int, int], warps: int):
    for contiguous, fastest in ((0, 1), (1, 0)):
        layouts = copy_layouts(shape, 16, contiguous, fastest, warps, 64)
        assert conversion_kind(layouts.load, layouts.store) in ("identity", "registers")
        assert layouts.load.is_surjective


def test_a_big_tile_is_read_and_written_in_wide_vectors():
    layouts = copy_layouts((64, 256), 16, 1, 0, 4, 64)
    assert layouts.load.contiguity(1) == layouts.store.contiguity(0) == 8


def test_the_unit_prefers_large_instructions_and_four_waves():
    unit = Mfma(get_target("gfx950"))
    dot = dot_of(128, 256, 64)
    assert unit.warps([dot]) == 4 and unit.instruction(dot, 4).mnk == (32, 32, 16)
    assert unit.accumulator((128, 256), 4).num_registers == 128
    assert unit.warps([dot_of(256, 256, 64)]) == 8
    assert unit.instruction(dot_of(48, 64, 48), 4).mnk == (16, 16, 16)
    assert Mfma(get_target("gfx942")).instruction(dot, 4).steps == 2


@pytest.mark.parametrize(
    ("dot", "message"), [(dot_of(24, 32, 16), "multiples of 16"), (dot_of(32, 32, 16, i32), "no dot of i32")]
)
def test_dots_that_do_not_fit_are_refused(dot: Dot, message: str):
    with pytest.raises(IRError, match=message):
        Mfma(get_target("gfx942")).check(dot)


# --- the pass -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "stages", "barriers"), [("gfx942", 1, 2), ("gfx950", 2, 1)])
def test_stages_follow_shared_memory(target: str, stages: int, barriers: int):
    function = prefetched(target, 128, 256, 64)
    assert [a.result.type.stages for a in first(function, Alloc)] == [stages, stages]
    (loop,) = first(function, For)
    kinds = [type(op) for op in loop.body.block.ops]
    assert kinds.count(Barrier) == barriers
    assert max(i for i, k in enumerate(kinds) if k is Load) < kinds.index(LocalLoad) < kinds.index(Dot)
    assert kinds.index(Dot) < kinds.index(LocalStore)
    assert function.attributes["shared_bytes"] == 49152 * stages


@pytest.mark.parametrize("stages", [1, 2])
def test_stages_can_be_fixed(stages: int):
    function = prefetched("gfx950", num_stages=stages)
    for alloc in first(function, Alloc):
        assert isinstance(alloc.result.type, BufferType) and alloc.result.type.stages == stages


def test_more_shared_memory_than_there_is_names_the_buffers():
    with pytest.raises(Exception, match=r"a: 32768 bytes \(2 x 128x64 bf16\)"):
        prefetched("gfx942", 128, 256, 64, num_stages=2)


def test_only_operands_that_run_across_are_turned():
    def turns(function):
        """Conversions of operands, not of the result on its way to memory."""
        stored = [op.value for op in function.walk() if isinstance(op, LocalStore)]
        return [op for op in first(function, Convert) if op.result in stored]

    assert turns(prefetched("gfx950", b=COLUMN_MAJOR)) == []
    turned = turns(prefetched("gfx950", b=ROW_MAJOR))
    assert len(turned) == 2  # before the loop and in it
    for op in turned:
        assert conversion_kind(op.source.type.layout, op.result.type.layout) == "registers"


@tw.kernel
def carried_address(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor, n: tw.int32):
    """The address of a depends on a carried value: that load cannot run ahead."""
    acc = tw.zeros((32, 32), tw.float32)
    place = 0
    for k in tw.range(n):
        acc = tw.dot(tw.load(a, (0, place), (32, 32)), tw.load(b, (k, 0), (32, 32)), acc)
        place = (place * 2 + 1) % 3
    tw.store(c, (0, 0), acc)


@tw.kernel
def nested(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor, n: tw.int32):
    """A load outside the loops, one in the outer and one in the inner loop, one under a condition."""
    acc = tw.zeros((32, 32), tw.float32)
    left = tw.load(a, (0, 0), (32, 32))
    for i in tw.range(n):
        right = tw.load(b, (i, 0), (32, 32))
        for j in tw.range(i + 1):
            acc = tw.dot(left, tw.load(a, (j, 0), (32, 32)).T, acc)
            acc = tw.dot(tw.load(a, (0, j), (32, 32)), right, acc)
        if i > 0:
            acc = tw.dot(tw.load(a, (i, i), (32, 32)), right, acc)
    tw.store(c, (0, 0), acc)


@pytest.mark.parametrize("kernel", [carried_address, nested])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stages", [None, 1])
def test_programs_of_other_forms_keep_their_bits(kernel, target: str, stages: int | None):
    module = module_of(kernel, a=matrix(), b=matrix(), c=matrix("f32"), n=i32)
    before = module.functions[0].clone()
    after = scheduled(module, target, **({} if stages is None else {"num_stages": stages}))
    assert not any(op.shared for op in first(after, Load))
    a, b = normal(90, 90), normal(90, 32, seed=1)
    for n in (0, 1, 3):
        results = []
        for function in (before, after):
            c = np.full((32, 32), np.nan, np.float32)
            run(function, [a, b, c, n], (1,))
            results.append(c)
        np.testing.assert_array_equal(results[0].view(np.uint32), results[1].view(np.uint32))
        assert n == 0 or np.abs(results[0]).max() > 0


def test_without_its_barriers_the_order_is_visible():
    """Every write to a slot lies between barriers, or before the first reader's barrier (mutation: none is spare)."""
    function = prefetched("gfx942", 128, 256, 64)
    (loop,) = first(function, For)
    marks = "".join({LocalLoad: "r", LocalStore: "w", Barrier: "b"}.get(type(op), "") for op in loop.body.block.ops)
    assert marks == "rrbwwb"


def test_targets_with_roles_are_left_alone():
    module = module_of(gemm, a=matrix(), b=matrix(), c=matrix(), BM=128, BN=128, BK=64)
    context = PassContext(get_target("sm_90a"))
    for pass_ in parse_pipeline("placement,prefetch"):
        pass_.run(module, context)
    assert all(op.shared for op in first(module.functions[0], Load))
    assert "prefetch" in default_pipeline(get_target("gfx950"))


# --- stages ---------------------------------------------------------------------------------------


def test_loops_that_follow_each_other_share_memory():
    module = module_of(mlp, x=matrix(), w1=matrix(), w2=matrix(), y=matrix())
    function = scheduled(module, "gfx942")
    buffers = [op.result.type for op in first(function, Alloc)]
    assert [b.stages for b in buffers] == [2, 2, 1], (
        "the first loop fills the memory; the second's operand may need some"
    )
    assert sum(b.bytes for b in buffers) > get_target("gfx942").shared_bytes >= function.attributes["shared_bytes"]
