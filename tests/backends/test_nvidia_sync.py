"""Matrix products with operands in registers: fragments against the formulas of the PTX ISA, and all NVIDIA targets
through ptxas. PTX cannot run here, so the first half replays what the hardware does with layouts and addresses."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from products import product

from tilewright.backends.errors import BackendError
from tilewright.backends.nvidia import ptxas
from tilewright.backends.nvidia.compile import compile_function
from tilewright.backends.nvidia.fragments import matrix_read
from tilewright.backends.result import BackendResult
from tilewright.compiler.driver import schedule
from tilewright.compiler.options import CompileOptions
from tilewright.frontend.build import build_module
from tilewright.ir.async_ops import LocalLoad
from tilewright.ir.core import Module
from tilewright.ir.layout import (
    LinearLayout,
    SharedLayout,
    bank_conflicts,
    blocked,
    fma_accumulator,
    fma_operand_a,
    fma_operand_b,
    mma_sync_accumulator,
    mma_sync_operand_a,
    mma_sync_operand_b,
)
from tilewright.ir.target import TARGETS, get_target
from tilewright.ir.types import DTYPES, ViewType
from tilewright.kernels.mlp import mlp
from tilewright.kernels.softmax import softmax
from tilewright.passes.manager import PassError

NVIDIA = [name for name, target in TARGETS.items() if target.vendor == "nvidia"]
ROW_MAJOR, COLUMN_MAJOR = (None, 1), (1, None)


def ptxas_missing() -> str:
    try:
        ptxas.find_ptxas()
    except BackendError as error:
        return error.message
    return ""


needs_ptxas = pytest.mark.skipif(bool(ptxas_missing()), reason=ptxas_missing())


# --- the PTX ISA's fragments ----------------------------------------------------------------------
# "Matrix Fragments for mma.m16n8k8", "... m16n8k16", "... m16n8k32": (row, column) of register i, group g, thread t


def fragment_a(bits: int, i: int, g: Any, t: Any) -> tuple[Any, Any]:
    if bits == 16:
        return g + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)
    if bits == 8:
        return g + 8 * (i // 4 % 2), 4 * t + i % 4 + 16 * (i // 8)
    return g + 8 * (i % 2), t + 4 * (i // 2)  # tf32, and f64's m16n8k8 and m16n8k16


def fragment_b(bits: int, i: int, g: Any, t: Any) -> tuple[Any, Any]:
    if bits == 16:
        return 2 * t + i % 2 + 8 * (i // 2), g
    if bits == 8:
        return 4 * t + i % 4 + 16 * (i // 4), g
    return t + 4 * i, g


def fragment_c(i: int, g: Any, t: Any) -> tuple[Any, Any]:
    return g + 8 * (i // 2), 2 * t + i % 2


def held(tile: np.ndarray, layout: LinearLayout) -> np.ndarray:
    """[register, lane, warp] of a tile."""
    return tile[layout.all_coords()]


DEPTHS = [(16, 16), (8, 32), (32, 8), (64, 8), (64, 16)]


@pytest.mark.parametrize(("bits", "k"), DEPTHS)
@pytest.mark.parametrize(
    ("shape", "warps"),
    [((32, 16), (1, 1)), ((64, 32), (2, 2)), ((16, 24), (1, 2)), ((48, 64), (1, 4)), ((128, 8), (4, 1))],
)
def test_instructions_on_the_registers_of_the_layouts_make_the_product(bits, k, shape, warps):
    """The registers inside each box, in their order, are what the PTX ISA multiplies."""
    (m, n), depth, rng = shape, 2 * k, np.random.default_rng(3)
    if n // 8 % min(n // 8, warps[1]):
        warps = (warps[0], 1)
    left, right = rng.integers(-8, 8, (m, depth)), rng.integers(-8, 8, (depth, n))
    acc = mma_sync_accumulator(shape, warps)
    a, b = mma_sync_operand_a((m, depth), bits, warps), mma_sync_operand_b((depth, n), bits, warps)
    values_a, values_b, result = held(left, a), held(right, b), np.zeros((acc.num_registers, 32, acc.num_warps), int)
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    table = acc.table("register")
    for row in sorted({int(c[0]) for c in table if c[0] % 16 == 0}):
        for column in sorted({int(c[1]) for c in table if c[1] % 8 == 0}):
            box = acc.registers_in((row, column), (16, 8))
            for first in range(0, depth, k):
                in_a, in_b = a.registers_in((row, first), (16, k)), b.registers_in((first, column), (k, 8))
                for warp in range(acc.num_warps):
                    x, y = np.zeros((16, k), int), np.zeros((k, 8), int)
                    for i, register in enumerate(in_a):
                        x[fragment_a(bits, i, g, t)] = values_a[register, :, warp]
                    for i, register in enumerate(in_b):
                        y[fragment_b(bits, i, g, t)] = values_b[register, :, warp]
                    for i, register in enumerate(box):
                        result[register, :, warp] += (x @ y)[fragment_c(i, g, t)]
    np.testing.assert_array_equal(result, held(left @ right, acc))


def test_two_small_f64_instructions_make_a_large_one():
    """m8n8k4: a is (g, t), b (t, g), c (g, 2 t + i); rows g + 8 and k + 4 of m16n8k8 are instructions of their own."""
    g, t = np.arange(32) // 4, np.arange(32) % 4
    for step in range(2):
        for half in range(2):
            row, k = fragment_a(64, 2 * step + half, g, t)
            np.testing.assert_array_equal((row - 8 * half, k - 4 * step), (g, t))
        np.testing.assert_array_equal(fragment_b(64, step, g, t)[0] - 4 * step, t)
    for i in range(4):
        np.testing.assert_array_equal(fragment_c(i, g, t)[0] - 8 * (i // 2), g)


@pytest.mark.parametrize("order", [(1, 0), (0, 1)])
@pytest.mark.parametrize("swizzle", [128, 64, 32, 0])
@pytest.mark.parametrize(("bits", "k"), [(16, 16), (8, 32), (32, 8)])
@pytest.mark.parametrize(
    ("shape", "warps"), [((64, 64), (2, 2)), ((16, 8), (1, 1)), ((48, 24), (1, 1)), ((128, 96), (4, 2))]
)
def test_ldmatrix_reads_the_fragments(order, swizzle, bits, k, shape, warps):
    """Lane l gets word l % 4 of the row that lane 8 i + l // 4 points at; transposed, the words run down the rows."""
    rng = np.random.default_rng(5)
    for axis, layout in (
        (0, mma_sync_operand_a((shape[0], 4 * k), bits, warps)),
        (1, mma_sync_operand_b((4 * k, shape[1]), bits, warps)),
    ):
        tile = rng.integers(0, 1 << bits, layout.tile_shape)
        try:
            shared = SharedLayout(layout.tile_shape, bits, order, swizzle)
        except ValueError:
            continue
        read = matrix_read(layout, shared)
        along_k = order[0] != axis
        if read is None:
            assert (not along_k and bits != 16) or tile.shape[order[0]] * bits % 128 or shared.block_size * bits < 128
            continue
        assert read.transposed is not along_k
        memory = np.zeros(tile.size, int)
        memory[shared.offset_of(*np.indices(tile.shape))] = tile
        packed, lane, expected = 32 // bits, np.arange(32), held(tile, layout)
        for number in range(read.rows.num_registers):
            for warp in range(layout.num_warps):
                for matrix in range(read.matrices):
                    pointing = read.rows.coords(register=number, lane=8 * matrix + np.arange(8), warp=warp)
                    start = shared.offset_of(*pointing)
                    assert (start * bits % 128 == 0).all()
                    rows = memory[start[:, None] + np.arange(128 // bits)]
                    words = rows.T if read.transposed else rows
                    first = number * read.elements + matrix * packed
                    for i in range(packed):
                        np.testing.assert_array_equal(
                            words[lane // 4, lane % 4 * packed + i], expected[first + i, :, warp]
                        )


@pytest.mark.parametrize("along_k", [False, True])
@pytest.mark.parametrize(
    ("shape", "depth", "warps"),
    [((128, 128), 32, (4, 2)), ((16, 8), 3, (1, 1)), ((48, 24), 8, (1, 1)), ((64, 64), 16, (2, 2))],
)
def test_outer_products_find_their_operands_in_the_same_thread(shape, depth, warps, along_k):
    acc = fma_accumulator(shape, warps)
    a = fma_operand_a((shape[0], depth), shape[1], warps, along_k)
    b = fma_operand_b((depth, shape[1]), warps, along_k)
    rows, columns = acc.all_coords()
    rows_a, ks_a = a.all_coords()
    ks_b, columns_b = b.all_coords()
    for lane in range(32):
        for warp in range(acc.num_warps):
            mine = {(int(r), k) for r in rows[:, lane, warp] for k in range(depth)}
            assert mine <= set(zip(rows_a[:, lane, warp].tolist(), ks_a[:, lane, warp].tolist(), strict=True))
            mine = {(k, int(c)) for c in columns[:, lane, warp] for k in range(depth)}
            assert mine <= set(zip(ks_b[:, lane, warp].tolist(), columns_b[:, lane, warp].tolist(), strict=True))


def test_reads_of_outer_products_meet_no_bank_twice():
    for layout, order in ((fma_operand_a((128, 32), 128, (4, 2)), (0, 1)), (fma_operand_b((32, 128), (4, 2)), (1, 0))):
        assert bank_conflicts(layout, SharedLayout(layout.tile_shape, 32, order), 16, "nvidia") == 0


# --- every dtype on every target --------------------------------------------------------------------


def scheduled(
    target: str, kernel: Any, types: dict[str, tuple[str, Any]], align: int = 16, options: Any = None, **meta: Any
) -> Module:
    views = {n: ViewType((None, None), DTYPES[d], s, max(align, DTYPES[d].bytes)) for n, (d, s) in types.items()}
    module = build_module(kernel.definition, {**views, **meta})
    return schedule(module, get_target(target), CompileOptions(**(options or {})))


def compiled(target: str, *args: Any, **keywords: Any) -> BackendResult:
    return compile_function(scheduled(target, *args, **keywords).functions[0], get_target(target))


def operands(dtype: str, acc: str, a: Any = ROW_MAJOR, b: Any = ROW_MAJOR) -> dict[str, tuple[str, Any]]:
    return {"a": (dtype, a), "b": (dtype, b), "c": (acc, ROW_MAJOR)}


#: dtype, accumulator, precision, the instruction
DOTS = [
    ("bf16", "f32", "default", r"m16n8k16\S*bf16"),
    ("f16", "f32", "default", r"m16n8k16\S*f16"),
    ("f32", "f32", "default", r"fma\.rn"),
    ("f32", "f32", "ieee", r"fma\.rn"),
    ("f32", "f32", "tf32", r"m16n8k8\S*tf32"),
    ("f32", "f32", "3xtf32", r"m16n8k8\S*tf32"),
    ("f64", "f64", "default", r"m8n8k4\S*f64|m16n8k16\S*f64"),
    ("i8", "i32", "default", r"m16n8k32\S*s8"),
    ("f8e4m3", "f32", "default", r"m16n8k32\S*e4m3"),
    ("f8e5m2", "f32", "default", r"m16n8k32\S*e5m2"),
]


@needs_ptxas
@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize(("dtype", "acc", "precision", "instruction"), DOTS)
def test_every_dot_assembles(target, dtype, acc, precision, instruction):
    options = {"schedule": "prefetch"}
    arguments = (target, product, operands(dtype, acc))
    if dtype.startswith("f8") and not get_target(target).has("mma_fp8"):
        with pytest.raises(PassError, match="no dot of"):
            compiled(*arguments, options=options, precision=precision)
        return
    result = compiled(*arguments, options=options, precision=precision)
    assert re.search(instruction, result.asm["ptx"]) and "cp.async.cg" in result.asm["ptx"]
    assert result.resources.spill_stores == 0 or precision == "3xtf32"


@needs_ptxas
@pytest.mark.parametrize("align", [16, 1])
@pytest.mark.parametrize(("a", "b"), [(COLUMN_MAJOR, ROW_MAJOR), ((None, None), COLUMN_MAJOR)])
@pytest.mark.parametrize(("dtype", "acc", "precision", "instruction"), DOTS)
def test_every_layout_of_the_operands_assembles(a, b, align, dtype, acc, precision, instruction):
    result = compiled(
        "sm_120a", product, operands(dtype, acc, a, b), align, {"schedule": "prefetch"}, precision=precision
    )
    assert re.search(instruction, result.asm["ptx"])


@needs_ptxas
@pytest.mark.parametrize("shape", [(16, 8, 32), (16, 128, 64), (48, 24, 32), (128, 128, 32)])
@pytest.mark.parametrize(("dtype", "acc"), [("bf16", "f32"), ("f32", "f32"), ("f64", "f64"), ("i8", "i32")])
def test_tiles_of_any_size_assemble(shape, dtype, acc):
    """What does not fit Hopper's asynchronous unit, nor fills a block's registers, takes the other path by itself."""
    sizes = dict(zip(("BM", "BN", "BK"), shape, strict=True))
    module = scheduled("sm_90a", product, operands(dtype, acc), **sizes)
    wanted = "roles" if dtype != "i8" and shape[0] == 128 else "prefetch"
    assert module.functions[0].attributes["schedule"] == wanted
    compile_function(module.functions[0], get_target("sm_90a"))


@needs_ptxas
@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("options", [{}, {"num_stages": 1}, {"num_stages": 3}, {"num_warps": 8}])
def test_chained_dots_and_softmax_assemble(target, options):
    types = dict.fromkeys(("x", "w1", "w2", "y"), ("bf16", ROW_MAJOR))
    compiled(target, mlp, types, options={**options, "schedule": "prefetch"}, BM=64, BH=64, BN=64, BK=32)
    compiled(target, softmax, {"x": ("f32", ROW_MAJOR), "y": ("f32", ROW_MAJOR)}, BN=1024)


@needs_ptxas
def test_copies_run_ahead_in_as_many_stages_as_asked():
    for stages in (2, 3, 5):
        module = scheduled("sm_80", product, operands("bf16", "f32"), options={"num_stages": stages})
        result = compile_function(module.functions[0], get_target("sm_80"))
        assert f"cp.async.wait_group {2 * (stages - 2)};" in result.asm["ptx"]
        assert module.functions[0].attributes["shared_bytes"] == stages * 2 * 64 * 32 * 2


@needs_ptxas
@pytest.mark.parametrize("b", [ROW_MAJOR, COLUMN_MAJOR])
@pytest.mark.parametrize("precision", ["tf32", "3xtf32"])
def test_float32_on_the_asynchronous_unit(precision, b):
    """No C75xx message of ptxas: nothing touches the registers of products in flight."""
    result = compiled("sm_90a", product, operands("f32", "f32", b=b), precision=precision, BM=128, BN=128)
    asynchronous = precision == "3xtf32" or b == COLUMN_MAJOR
    found = len(re.findall(r"wgmma\.mma_async\S*m64n128k8\.f32\.tf32\.tf32", result.asm["ptx"]))
    assert found % (12 if precision == "3xtf32" else 4) == 0 and (found > 0) == asynchronous
    assert result.resources.spill_stores <= (128 if precision == "3xtf32" else 0)  # accumulators of 192 registers


@needs_ptxas
@pytest.mark.parametrize(("dtype", "sizes"), [("f64", (128, 128, 32)), ("f64", (128, 64, 16)), ("f32", (256, 128, 16))])
def test_roles_keep_operands_and_accumulators_in_registers(dtype, sizes):
    """Registers differ in constants from a few addresses, which are part of the loads."""
    meta = dict(zip(("BM", "BN", "BK"), sizes, strict=True))
    result = compiled("sm_90a", product, operands(dtype, dtype), **meta)
    assert result.resources.spill_stores == 0
    bases = re.findall(r"ld\.shared.*\[(%\w+)", result.asm["ptx"])
    assert bases and len(set(bases)) <= len(bases) // 4


@pytest.mark.parametrize("schedule_", ["roles", "prefetch"])
@pytest.mark.parametrize("layout", [ROW_MAJOR, COLUMN_MAJOR])
@pytest.mark.parametrize("sizes", [(128, 128, 16), (128, 64, 32), (64, 64, 8)])
def test_slots_of_f64_meet_no_bank_twice(sizes, layout, schedule_):
    """Neither where fragments are read nor where threads copy; roles have a swizzle of the engine's."""
    meta = dict(zip(("BM", "BN", "BK"), sizes, strict=True))
    types = operands("f64", "f64", layout, layout)
    function = scheduled("sm_90a", product, types, options={"schedule": schedule_}, **meta).functions[0]
    loads = [op for op in function.walk() if isinstance(op, LocalLoad)]
    assert len(loads) == 2
    for op in loads:
        slot, tile = op.slot.type, op.result.type
        assert bank_conflicts(tile.layout, slot.layout, 8, "nvidia") == 0
        copied = blocked(slot.shape, 64, tile.layout.num_warps, 32, slot.layout.order)
        if schedule_ == "roles":
            assert slot.layout.swizzle == 64
        else:
            assert bank_conflicts(copied, slot.layout, 16, "nvidia", "write") == 0


@pytest.mark.parametrize(
    ("dtype", "acc", "meta", "message"),
    [
        ("i16", "i32", {}, "no dot of i16"),
        ("i64", "i64", {}, "no dot of i64"),
        ("bf16", "f32", {"BM": 8}, "M must be a multiple of 16, N of 8 and K of 16"),
        ("f64", "f64", {"BK": 4}, "K of 8"),
        ("f32", "f32", {"BN": 4}, "multiple of 16 and N of 8"),
        ("f32", "f64", {}, "dot of f32 into f64"),
        ("i8", "i64", {}, "accumulates in i32"),
    ],
)
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_dots_that_no_unit_computes_name_their_line(target, dtype, acc, meta, message):
    with pytest.raises(PassError, match=message) as info:
        scheduled(target, product, operands(dtype, acc), **meta)
    assert info.value.loc.file.endswith("products.py") and info.value.hint


def test_schedules_can_be_named():
    function = scheduled("sm_90a", product, operands("bf16", "f32"), options={"schedule": "prefetch"}).functions[0]
    assert function.attributes["schedule"] == "prefetch" and "persistent" not in function.attributes
    with pytest.raises(PassError, match="i8 operands that are contiguous along K"):
        scheduled("sm_90a", product, operands("i8", "i32"), options={"schedule": "roles"})
    with pytest.raises(PassError, match="no hardware for roles"):
        scheduled("sm_80", product, operands("bf16", "f32"), options={"schedule": "roles"})
