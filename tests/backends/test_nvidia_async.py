"""Asynchronous code on sm_90a: descriptors, boxes and addresses against what the hardware does, and whole kernels
through ptxas. PTX cannot run here, so the first half replays the hardware's address arithmetic (PTX ISA) instead."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import tilewright.passes  # noqa: F401  (registers the passes)
from tilewright.backends.errors import BackendError
from tilewright.backends.llvm import unmarked_calls
from tilewright.backends.lower.context import SlotRef
from tilewright.backends.nvidia import ptxas
from tilewright.backends.nvidia.compile import compile_function, lower_function
from tilewright.backends.nvidia.descriptors import INSTRUCTION_K, matrix_descriptor
from tilewright.backends.nvidia.local import matrix_rows, stores_matrices
from tilewright.backends.nvidia.roles import check_registers, launch_registers
from tilewright.backends.nvidia.thread_copies import lines_per_chunk
from tilewright.backends.nvidia.tma import MOST_BOX, cut
from tilewright.backends.nvidia.wgmma import Shape
from tilewright.backends.result import BackendResult
from tilewright.ir.abi import TensorMapParam
from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, IRError, Module, Region, Value
from tilewright.ir.layout import SharedLayout, blocked, wgmma_accumulator, wgmma_operand_a
from tilewright.ir.parser import parse_module
from tilewright.ir.target import get_target
from tilewright.ir.types import DType, SlotType, TileType, ViewType, bf16, f16, f32
from tilewright.ir.verifier import verify_function
from tilewright.passes.manager import PassContext, PassOptions, parse_pipeline
from tilewright.passes.pipelines import default_pipeline

TARGET = get_target("sm_90a")
ROWS, COLUMNS = (1, 0), (0, 1)  # orders of shared layouts: lines along dim 1 or dim 0


def ptxas_missing() -> str:
    try:
        ptxas.find_ptxas()
    except BackendError as error:
        return error.message
    return ""


needs_ptxas = pytest.mark.skipif(bool(ptxas_missing()), reason=ptxas_missing())


# --- what the hardware does -----------------------------------------------------------------------


def swizzled(address: Any, swizzle: int) -> Any:
    """The engines XOR the 16-byte chunk index of an address with the line index."""
    mask = {128: 7, 64: 3, 32: 1, 0: 0}[swizzle]
    return address ^ ((address >> 7 & mask) << 4)


def operand_addresses(bits: int, start: int, transposed: bool, positions: int) -> np.ndarray:
    """[position, k] byte address of each element that one wgmma instruction reads (canonical layouts)."""
    swizzle = {1: 128, 2: 64, 3: 32}[bits >> 62]
    leading, stride = (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4
    position, k = np.ix_(np.arange(positions), np.arange(INSTRUCTION_K))
    if transposed:
        chunk = swizzle // 2
        linear = position // chunk * leading + position % chunk * 2 + k // 8 * stride + k % 8 * swizzle
    else:
        linear = position // 8 * stride + position % 8 * swizzle + k * 2
    return swizzled(start + linear, swizzle)


@pytest.mark.parametrize("order", [ROWS, COLUMNS])
@pytest.mark.parametrize("swizzle", [128, 64, 32])
@pytest.mark.parametrize(("axis", "shape"), [(0, (128, 64)), (1, (64, 256)), (1, (128, 192)), (0, (256, 128))])
def test_descriptors_reach_the_elements_of_the_layout(order, swizzle, axis, shape):
    layout = SharedLayout(shape, 16, order, swizzle)
    descriptor = matrix_descriptor(layout, axis)
    positions = 64 if axis == 0 else min(128, shape[1] // 2 // 64 * 64)
    for first in range(0, shape[axis], positions):
        for k0 in range(0, shape[1 - axis], INSTRUCTION_K):
            start = descriptor.start(first, k0)
            assert start % 16 == 0
            found = operand_addresses(descriptor.bits, start, descriptor.transposed, positions)
            position, k = np.ix_(first + np.arange(positions), k0 + np.arange(INSTRUCTION_K))
            coordinates = (position, k) if axis == 0 else (k, position)
            np.testing.assert_array_equal(found, layout.offset_of(*coordinates) * 2)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (SharedLayout((64, 64), 16, ROWS), "swizzled"),
        (SharedLayout((64, 64), 8, COLUMNS, 64), "only 16-bit elements across"),
        (SharedLayout((64, 64), 64, ROWS, 128), "8-, 16- or 32-bit"),
        (SharedLayout((64, 24), 16, COLUMNS, 128), "multiples"),
    ],
)
def test_layouts_that_the_matrix_unit_cannot_read(layout, message):
    with pytest.raises(ValueError, match=message):
        matrix_descriptor(layout, 0)


def test_how_a_warpgroup_covers_a_dot():
    assert Shape.of(128, 256, 64, 2) == Shape(1, 1, 256, 4, 64, 0)
    assert Shape.of(256, 128, 32, 2) == Shape(2, 1, 128, 2, 128, 0)
    assert Shape.of(64, 256, 64, 2) == Shape(1, 1, 128, 4, 0, 128)
    assert Shape.of(64, 320, 16, 1) == Shape(1, 2, 160, 1, 0, 320)
    assert Shape.of(64, 320, 16, 1, grain=64) == Shape(1, 5, 64, 1, 0, 320)
    with pytest.raises(ValueError, match="multiples of 64"):
        Shape.of(64, 272, 16, 1, grain=64)
    with pytest.raises(ValueError, match="does not split"):
        Shape.of(192, 64, 64, 2)


# --- boxes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "order", "swizzle"),
    [
        ((128, 64), ROWS, 128),
        ((64, 256), ROWS, 128),
        ((64, 256), COLUMNS, 128),
        ((512, 64), ROWS, 64),
        ((384, 32), ROWS, 64),
        ((2, 16, 64), (2, 1, 0), 32),
        ((16, 3, 64), (2, 0, 1), 128),
    ],
)
def test_boxes_write_the_slot_as_its_layout_says(shape, order, swizzle):
    """A box's elements lie one after the other, contiguous dim first, then the order of the slot; then swizzled."""
    layout = SharedLayout(tuple(shape), 16, tuple(order), swizzle)
    boxes = cut(layout, shape)
    assert max(boxes.box) <= MOST_BOX
    seen = np.zeros(shape, int)
    for start in boxes.starts:
        inside = np.ix_(*(np.arange(n) for n in boxes.box))
        linear, size = 0, 1
        for axis in order:
            linear, size = linear + inside[axis] * size, size * boxes.box[axis]
        found = swizzled(boxes.offset(start) + linear * 2, swizzle)
        at = tuple(s + i for s, i in zip(start, inside, strict=True))
        np.testing.assert_array_equal(found, layout.offset_of(*at) * 2)
        seen[at] += 1
    assert (seen == 1).all()


def test_a_layout_that_the_copy_engine_cannot_write():
    with pytest.raises(ValueError, match="does not write"):
        cut(SharedLayout((64, 64), 16, ROWS, vec=8, max_phase=8), (64, 64))


# --- matrices from registers ------------------------------------------------------------------------


@pytest.mark.parametrize("order", [ROWS, COLUMNS])
@pytest.mark.parametrize(
    ("registers", "swizzle"),
    [
        (wgmma_accumulator((128, 128), 2), 128),
        (wgmma_accumulator((64, 64), 1), 64),
        (wgmma_accumulator((128, 192), 2), 128),
        (wgmma_accumulator((256, 64), 2), 32),
        (wgmma_operand_a((128, 64), 16, 2), 128),
    ],
)
def test_stmatrix_puts_every_element_in_its_place(order, registers, swizzle):
    shared = SharedLayout(registers.tile_shape, 16, order, swizzle)
    assert stores_matrices(SlotRef(0, SlotType(shared.shape, bf16, shared)), registers)
    rows = matrix_rows(registers, order[0])
    words = registers.num_registers // 2
    count = words // rows.num_registers
    warps = np.arange(registers.num_warps)
    for word in range(words):
        instruction, matrix = divmod(word, count)
        for lane in range(32):
            for half in range(2):
                row, column = lane // 4, lane % 4 * 2 + half
                row, column = (row, column) if order == ROWS else (column, row)
                start = rows.coords(register=instruction, lane=8 * matrix + row, warp=warps)
                address = shared.offset_of(*start) * 2
                assert (address % 16 == 0).all()
                wanted = registers.coords(register=2 * word + half, lane=lane, warp=warps)
                np.testing.assert_array_equal(address + 2 * column, shared.offset_of(*wanted) * 2)


def test_stmatrix_is_for_fragments_only():
    slot = SlotRef(0, SlotType((64, 64), bf16, SharedLayout((64, 64), 16, ROWS, 128)))
    assert not stores_matrices(slot, blocked((64, 64), 16, 4, 32, ROWS))
    wide = SlotRef(0, SlotType((64, 64), f32, SharedLayout((64, 64), 32, ROWS, 128)))
    assert not stores_matrices(wide, wgmma_accumulator((64, 64), 1))


# --- copies by threads --------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 4, 16])
@pytest.mark.parametrize("chunk", [8, 32, 64])
@pytest.mark.parametrize("shape", [(128, 64), (64, 256), (96, 64), (192, 128)])
@pytest.mark.parametrize("order", [ROWS, COLUMNS])
def test_chunks_of_lines_repeat_their_addresses(width, chunk, shape, order):
    registers = blocked(shape, 16, 4, 32, order, width)
    shared = SharedLayout(shape, 16, order, 32)
    lines = lines_per_chunk(registers, shared, chunk)
    if not lines:
        return
    axis, warps, lanes = order[1], 4, 32
    every = {"lane": np.arange(lanes)[None, :, None], "warp": np.arange(warps)[None, None, :]}
    first = [c.copy() for c in registers.coords(register=np.arange(chunk)[:, None, None], **every)]
    for number in range(registers.num_registers // chunk):
        numbers = number * chunk + np.arange(chunk)[:, None, None]
        coordinates = registers.coords(register=numbers, **every)
        moved = [c + (number * lines if d == axis else 0) for d, c in enumerate(first)]
        np.testing.assert_array_equal(coordinates, moved)
        step = number * lines * shared.block_size
        np.testing.assert_array_equal(shared.offset_of(*coordinates), shared.offset_of(*first) + step)


def test_large_copies_loop_over_lines():
    assert lines_per_chunk(blocked((128, 64), 16, 4, 32, ROWS, 2), SharedLayout((128, 64), 16, ROWS, 128), 32) == 64


# --- kernels ------------------------------------------------------------------------------------------


def gemm(
    tile: tuple[int, int, int] = (128, 256, 64),
    dtype: DType = bf16,
    align: int = 16,
    transposed: str = "",
    batched: bool = False,
) -> Module:
    """C = A @ B over tiles (M, N, K); ``transposed`` names operands that are stored column-major."""
    m_size, n_size, k_size = tile

    def view(name: str) -> tuple[str, ViewType]:
        strides: tuple[int | None, ...] = (1, None) if name in transposed else (None, 1)
        shape: tuple[None, ...] = (None, None)
        if batched:
            strides, shape = (None, *strides), (None, None, None)
        return name, ViewType(shape, dtype, strides, align)

    block = Block([view("A"), view("B"), view("C")])
    function = Function("gemm", Region(block))
    b, (a_view, b_view, c_view) = Builder(block), function.params
    m, n = b.program_id(0), b.program_id(1)
    if batched:
        batch = b.program_id(2)
        a_view, b_view, c_view = (b.subview(v, [batch]) for v in (a_view, b_view, c_view))
    steps = b.binary("floordiv", b.add(b.dim(a_view, 1), b.index(k_size - 1)), b.index(k_size))
    zero = b.constant(0.0, TileType((m_size, n_size), f32))
    loop = b.for_loop(b.index(0), steps, b.index(1), [zero], ["k", "acc"])
    with b.at(loop.body.block):
        left = b.load(a_view, [m, loop.index], (m_size, k_size))
        right = b.load(b_view, [loop.index, n], (k_size, n_size))
        b.yield_([b.dot(left, right, loop.carried[0])])
    b.store(c_view, [m, n], b.cast(loop.results[0], dtype))
    return Module([function], {"target": TARGET.name})


def attention(rows: int = 128, keys: int = 128, depth: int = 128) -> Module:
    """Attention forward: two dots, the second with its left operand in registers."""
    view = ViewType((None, depth), bf16, (None, 1), 16)
    block = Block([(name, view) for name in "QKVO"])
    function = Function("attention", Region(block))
    b, (q_view, k_view, v_view, o_view) = Builder(block), function.params
    m, zero = b.program_id(0), b.index(0)
    query = b.load(q_view, [m, zero], (rows, depth))
    steps = b.binary("floordiv", b.dim(k_view, 0), b.index(keys))
    acc = b.constant(0.0, TileType((rows, depth), f32))
    top, total = (b.constant(x, TileType((rows,), f32)) for x in (float("-inf"), 0.0))
    loop = b.for_loop(zero, steps, b.index(1), [acc, top, total])
    with b.at(loop.body.block):
        acc, top, total = loop.carried
        key = b.load(k_view, [loop.index, zero], (keys, depth))
        value = b.load(v_view, [loop.index, zero], (keys, depth))
        scores = b.dot(query, b.transpose(key, (1, 0)), b.constant(0.0, TileType((rows, keys), f32)))
        new_top = b.binary("max", top, b.reduce("max", scores, 1))
        weights = b.unary("exp2", b.sub(scores, b.broadcast(b.expand_dims(new_top, 1), (rows, keys))))
        shrink = b.unary("exp2", b.sub(top, new_top))
        new_total = b.add(b.mul(total, shrink), b.reduce("sum", weights, 1))
        acc = b.mul(acc, b.broadcast(b.expand_dims(shrink, 1), (rows, depth)))
        acc = b.dot(b.cast(weights, bf16), value, acc)
        b.yield_([acc, new_top, new_total])
    acc, _, total = loop.results
    result = b.binary("div", acc, b.broadcast(b.expand_dims(total, 1), (rows, depth)))
    b.store(o_view, [m, zero], b.cast(result, bf16))
    return Module([function], {"target": TARGET.name})


def retype(view: Value, **changes: Any) -> None:
    """Change fields of a view's type."""
    assert isinstance(view.type, ViewType)
    view.type = replace(view.type, **changes)


def scheduled(module: Module, **options: Any) -> Function:
    for pass_ in parse_pipeline(default_pipeline(TARGET)):
        pass_.run(module, PassContext(TARGET, PassOptions(**options)))
    (function,) = module.functions
    verify_function(function)
    return function


def compiled(module: Module, **options: Any) -> BackendResult:
    """Compile; every kernel must be free of spills and of inline assembly that LLVM may duplicate."""
    result = compile_function(scheduled(module, **options), TARGET)
    assert unmarked_calls(result.asm["llvm"]) == []
    assert (result.resources.spill_stores, result.resources.spill_loads, result.resources.stack_bytes) == (0, 0, 0)
    return result


def count(result: BackendResult, pattern: str) -> int:
    return len(re.findall(pattern, result.asm["ptx"]))


LOADS, STORES = r"cp\.async\.bulk\.tensor[^;]*mbarrier::complete_tx", r"global\.shared::cta\.bulk_group "
WGMMA = r"wgmma\.mma_async"


@needs_ptxas
def test_the_gemm_of_the_recipe():
    """facts/hopper.md: 128 x 256 x 64, 4 stages, two consumer warpgroups of 232 registers."""
    result = compiled(gemm(), num_stages=4)
    assert result.resources.registers == 168
    assert result.abi.threads == 384 and result.abi.persistent
    # the loop, and no copy of it: 4 steps of K; LLVM may peel the first iteration, whose release is conditional
    assert count(result, WGMMA + r"\S*m64n256k16\.f32\.bf16\.bf16") in (4, 8)
    assert count(result, LOADS) == 1 + 4 and count(result, STORES) == 2 * 2
    assert count(result, r"setmaxnreg\.dec\S* 40;") == count(result, r"setmaxnreg\.inc\S* 232;") == 1
    assert count(result, r"expect_tx\S* _, \[%r\d+\], 49152;") == 1
    assert count(result, r"mbarrier\.init") == 8
    assert count(result, "stmatrix") == 16
    assert count(result, r"cvt\.rn\.bf16x2\.f32") == 64 and count(result, "prmt|st.shared") == 0
    assert result.abi.tensor_maps == (
        TensorMapParam("A", (128, 64), (1, 0), 128),
        TensorMapParam("B", (64, 64), (1, 0), 128),
        TensorMapParam("C", (64, 64), (1, 0), 128),
    )


@needs_ptxas
@pytest.mark.parametrize("transposed", ["A", "B", "AB"])
def test_operands_in_either_order(transposed):
    result = compiled(gemm(transposed=transposed))
    flags = {m[1:] for m in re.findall(r"(, 1, 1, 1), (\d), (\d);", result.asm["ptx"])}
    assert flags == {(str(int("A" in transposed)), str(int("B" not in transposed)))}


@needs_ptxas
@pytest.mark.parametrize(
    ("tile", "instruction", "steps"),
    [
        ((64, 128, 64), "m64n128k16", 4),
        ((256, 128, 64), "m64n128k16", 8),
        ((128, 192, 64), "m64n192k16", 4),
        ((128, 96, 32), "m64n96k16", 2),
        ((192, 128, 64), "m64n128k16", 12),
        ((128, 128, 128), "m64n128k16", 8),
        ((64, 320, 64), "m64n64k16", 20),
    ],
)
def test_other_tiles(tile, instruction, steps):
    assert count(compiled(gemm(tile), schedule="roles"), WGMMA + rf"\S*{instruction}\S*") in (steps, 2 * steps)


@needs_ptxas
def test_half_precision_and_batches():
    result = compiled(gemm(dtype=f16, batched=True))
    assert count(result, r"k16\.f32\.f16\.f16") and count(result, r"cvt\.rn\.f16x2\.f32") == 64
    assert count(result, r"cp\.async\.bulk\.tensor\.3d") == 5 + 4
    assert result.abi.tensor_maps[0] == TensorMapParam("A", (1, 128, 64), (2, 1, 0), 128)


@needs_ptxas
@pytest.mark.parametrize("align", [2, 8])
def test_views_that_the_copy_engine_cannot_address_are_copied_by_threads(align):
    result = compiled(gemm(align=align))
    assert count(result, LOADS) == 0 and result.abi.tensor_maps == ()
    assert count(result, r"mbarrier\.init\S* \[%r\d+\], 128;") > 0
    assert count(result, "ld.global") > 0 and count(result, "st.shared") > 0
    if align == 8:
        assert count(result, r"ld\.global\S*v2\.b32") > 0
    # writes of threads are made visible to the matrix unit before the stage is announced
    assert count(result, "fence.proxy.async") == 2  # the other one is for the barriers


@needs_ptxas
def test_threads_and_copy_engine_fill_one_stage_together():
    """The engine's bytes are expected without an arrival: its thread arrives with all others behind the fence."""
    module = gemm()
    retype(module.functions[0].params[1], align=2)
    result = compiled(module)
    assert count(result, LOADS) == 1 and count(result, "st.shared") > 0
    assert count(result, r"mbarrier\.expect_tx\S* \[%r\d+\], 16384;") == 1 and count(result, "arrive.expect_tx") == 0
    assert count(result, r"mbarrier\.init\S* \[%r\d+\], 128;") > 0


@needs_ptxas
@pytest.mark.parametrize("depth", [64, 128])
def test_attention_takes_weights_from_registers(depth):
    result = compiled(attention(depth=depth))
    words = r"\{(%r\d+, ){3}%r\d+\}, part\d+, 1, 1, 1, 1;"
    assert count(result, words) == 2 * 128 // 16  # in the loop, and behind it: the product lags by one iteration
    # the scores start from nothing instead of from zeros: in the first iteration, which runs alone, and in the loop
    assert count(result, r"\}, part\d+, part\d+, 0, 1, 1, 0, 0;") == 2


@needs_ptxas
def test_one_thread_of_the_whole_role_produces():
    """A thread elected in each of the role's warps would announce every stage four times."""
    ptx = compiled(gemm()).asm["ptx"]
    entry = ptx[ptx.index("setmaxnreg.dec") : ptx.index("elect.sync")]
    assert re.search(r"setp\.\w+\.[bsu]32", entry), "the other warps of the role must leave before the election"
    assert re.search(r"@%p\d+ bra", entry)


@needs_ptxas
def test_code_of_one_thread_asks_nothing_of_its_warp():
    ptx = compiled(gemm()).asm["ptx"]
    producer = ptx[ptx.index("elect.sync") : ptx.index("setmaxnreg.inc")]
    assert "cp.async.bulk.tensor" in producer
    assert not re.search(r"shfl|bar\.sync|stmatrix|wgmma", producer)


# --- single operations --------------------------------------------------------------------------------

SLOT = "slot<64x64xbf16, shared<128B, order=[1,0], shape=[64,64], bits=16>>"


def roles(producer: str, consumer: str, consumers: int = 2, head: str = "", registers: str = "") -> Function:
    """A kernel with one ring of 3 stages, a producer warpgroup of one thread and consumer warpgroups."""
    text = f"""module {{target = "sm_90a"}} {{
  func @k(%A: view<?x?xbf16, strides=[?, 1], align=16>) {{threads = {128 + 128 * consumers}, shared_bytes = 40000}} {{
    %ring = async.ring {{consumers = {consumers}, offset = 32768}} : ring<3>
    %a = async.alloc ring(%ring) {{offset = 0}} : buffer<3 x {SLOT}>
    {head}
    async.role @producer {{warps = 4{registers}, single_thread = true}} {{
      %n = tile.constant {{value = 5}} : i32
      {producer}
    }}
    async.role @consumer {{warps = {4 * consumers}}} {{
      %n_1 = tile.constant {{value = 5}} : i32
      {consumer}
    }}
  }}
}}"""
    return parse_module(text).functions[0]


PRODUCE = f"""async.acquire %ring, %n
      %s = async.slot %a, %n : {SLOT}
      %t = async.copy %A, [%n, %n], %s : token<tma>
      async.publish %ring, %n, [%t]"""


def mlir(function: Function) -> str:
    return lower_function(function, TARGET).module.text()


def test_release_behind_reads_of_threads_waits_for_the_warpgroup():
    layout = blocked((64, 64), 16, 8, 32, ROWS)
    read = f"""%s_1 = async.slot %a, %n_1 : {SLOT}
      async.await %ring, %n_1
      %v = async.local_load %s_1 : tile<64x64xbf16, {layout}>
      async.release %ring, %n_1"""
    text = mlir(roles(PRODUCE, read))
    load, barrier = text.rindex("llvm.load"), text.index("bar.sync $0, 128;")
    assert load < barrier < text.index("mbarrier.arrive.shared::cta.b64 _")
    assert load < text.rindex("fence.proxy.async.shared::cta;", 0, barrier)  # the copy engine may write at once
    # the matrix unit's reads are over with its wait: no barrier
    plain = mlir(roles(PRODUCE, "async.await %ring, %n_1\n      async.release %ring, %n_1"))
    assert "bar.sync $0, 128;" not in plain
    assert plain.count("fence.proxy.async.shared::cta;") == 1  # of the initialisation


def test_barriers_of_every_scope_and_fences():
    lines = [f'async.barrier {{scope = "{scope}"}}' for scope in ("block", "role", "warpgroup")]
    text = mlir(roles(PRODUCE, "\n      ".join([*lines, "async.fence"])))
    assert text.count('"bar.sync 0;"') == 2  # one behind the initialisation of the ring
    assert "bar.sync $0, 256;" in text and "bar.sync $0, 128;" in text
    assert text.count("fence.proxy.async.shared::cta;") == 2


def test_bulk_stores_of_warpgroups_move_their_own_rows():
    store = f"""%s_1 = async.slot %a, %n_1 : {SLOT}
      async.bulk_store %s_1, %A, [%n_1, %n_1] {{scope = "SCOPE"}}
      async.bulk_wait {{pending = 1, read = false}}"""
    whole = lower_function(roles(PRODUCE, store.replace("SCOPE", "role")), TARGET)
    assert whole.abi.tensor_maps == (TensorMapParam("A", (64, 64), (1, 0), 128),)  # shared with the load
    own = lower_function(roles(PRODUCE, store.replace("SCOPE", "warpgroup")), TARGET)
    assert own.abi.tensor_maps[1] == TensorMapParam("A", (32, 64), (1, 0), 128)
    assert "cp.async.bulk.wait_group 1;" in own.module.text()
    with pytest.raises(IRError, match="no 2 parts along dim 1"):  # a line holds all columns
        lower_function(roles(PRODUCE, store.replace('"SCOPE"', '"warpgroup", axis = 1')), TARGET)


def test_operands_of_a_second_group_are_computed_before_the_first():
    """LLVM must not compute the second group's operand between the groups; a wait passes any tile through."""
    acc, left = wgmma_accumulator((64, 64), 1), wgmma_operand_a((64, 64), 16, 1)
    dots = f"""%s_1 = async.slot %a, %n_1 : {SLOT}
      %zero = tile.constant {{value = 0.0}} : tile<64x64xf32, {acc}>
      %x = tile.constant {{value = 1.0}} : tile<64x64xbf16, {left}>
      %p = tile.add %x, %x : tile<64x64xbf16, {left}>
      %r, %g = async.dot %s_1, %s_1, %zero : tile<64x64xf32, {acc}>, token<mma>
      %q, %h = async.dot %p, %s_1, %zero : tile<64x64xf32, {acc}>, token<mma>
      %rr = async.wait [%r] {{pending = 1}} : tile<64x64xf32, {acc}>
      %qq, %pp = async.wait [%q, %p] : tile<64x64xf32, {acc}>, tile<64x64xbf16, {left}>"""
    text = mlir(roles(PRODUCE, dots, consumers=1))
    words = 64 * 64 // 128 // 2
    pin = f'"", "{",".join(["=r"] * words + [str(i) for i in range(words)])}"'
    assert text.count('has_side_effects "", ') == 1 and text.index(pin) < text.index("wgmma.mma_async")
    assert text.index("wait_group.sync.aligned 1") < text.index("wait_group.sync.aligned 0")


@pytest.mark.parametrize(
    ("producer", "message"),
    [
        (PRODUCE.replace("publish %ring, %n, [%t]", "publish %ring, %n, []"), "nothing publishes"),
        (PRODUCE.replace("token<tma>", "token<threads>"), "one thread"),
        (PRODUCE.replace("%s : token", "%s {pad = 1.0} : token"), "pads with zeros"),
    ],
)
def test_copies_that_cannot_be_lowered(producer, message):
    with pytest.raises(IRError, match=message):
        mlir(roles(producer, ""))


def test_a_plan_must_have_placed_rings_and_the_view_must_run_along_the_slot():
    function = roles(PRODUCE, "")
    function.body.block.ops[0].attributes["offset"] = None
    with pytest.raises(IRError, match="shared-memory plan"):
        mlir(function)
    function = roles(PRODUCE, "")
    retype(function.params[0], strides=(1, None))
    with pytest.raises(IRError, match="lines run along"):
        mlir(function)


def test_registers_that_a_block_does_not_have_would_never_come():
    function = roles(PRODUCE, "", registers=", registers = 168")
    assert launch_registers(384) == 168 and launch_registers(256) == 248
    check_registers(function, 168)
    with pytest.raises(BackendError, match="roles ask for"):
        check_registers(function, 40)
