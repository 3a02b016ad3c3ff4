"""The shared lowering: kernels compile for all targets and run on the emulated MI300 against the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lowered_kernels import BF16, check, emulate, layouts, normal, parse

from tilewright.backends.nvidia import compile as nvidia
from tilewright.ir.core import IRError
from tilewright.ir.layout import LinearLayout, SharedLayout, bank_conflicts, blocked, shared_vector_bytes
from tilewright.ir.scratch import convert_plan, scratch_bytes
from tilewright.ir.target import get_target

NUMPY: dict[str, Any] = {
    "f32": np.float32, "f16": np.float16, "bf16": BF16, "i32": np.int32, "i64": np.int64, "i8": np.int8, "i1": np.bool_,
}  # fmt: skip


# --- memory and elementwise -------------------------------------------------------------------------

ADD = """
func @add(%x: view<?x?xDT, strides=[?, 1], align=ALIGN>, %y: view<?x?xDT, strides=[?, 1], align=ALIGN>)
    {num_warps = 4} {
  %i = tile.program_id {axis = 0} : i32
  %j = tile.program_id {axis = 1} : i32
  %a = tile.load %x, [%i, %j] {pad = 1.5} : tile<16x128xDT, #a>
  %e = tile.exp %a : tile<16x128xDT, #a>
  %s = tile.add %e, %a : tile<16x128xDT, #a>
  tile.store %y, [%i, %j], %s
}
"""


@pytest.mark.parametrize("shape", [(32, 256), (31, 250), (5, 300), (17, 1)])
@pytest.mark.parametrize(("name", "bits"), [("f32", 32), ("bf16", 16), ("f16", 16)])
def test_elementwise_with_ragged_edges(shape, name, bits):
    dtype = NUMPY[name]
    x = normal(*shape, dtype=dtype)
    align = 16 if shape[1] * bits // 8 % 16 == 0 else bits // 8
    text = ADD.replace("DT", name).replace("ALIGN", str(align))
    grid = (-(-shape[0] // 16), -(-shape[1] // 128))
    check(text, layouts(a=((16, 128), bits, 4, (1, 0))), {"x": x, "y": np.zeros_like(x)}, grid)


def test_more_programs_than_tiles_touch_nothing():
    text = ADD.replace("DT", "f32").replace("ALIGN", "16").replace("?x?", "16x128").replace("[?, 1]", "[128, 1]")
    x = normal(16, 128)
    check(text, layouts(a=((16, 128), 32, 4, (1, 0))), {"x": x, "y": np.zeros_like(x)}, (3, 2))


def test_full_tiles_take_vectors_without_masks():
    text = ADD.replace("DT", "f32").replace("ALIGN", "16").replace("?x?", "16x128").replace("[?, 1]", "[128, 1]")
    text = text.replace("tile.program_id {axis = 0}", "tile.constant {value = 0}")
    text = text.replace("tile.program_id {axis = 1}", "tile.constant {value = 0}")
    result = nvidia.compile_function(parse(text, layouts(a=((16, 128), 32, 4, (1, 0))), 32), get_target("sm_90a"))
    assert result.asm["ptx"].count("ld.global.v4") == 4
    assert "@%p" not in result.asm["ptx"]


def test_bools_are_bytes_in_memory():
    text = """
    func @k(%x: view<?xi1, strides=[1], align=16>, %y: view<?xi1, strides=[1], align=16>) {num_warps = 1} {
      %z = tile.constant {value = 0} : i32
      %a = tile.load %x, [%z] : tile<256xi1, #a>
      %b = tile.not %a : tile<256xi1, #a>
      tile.store %y, [%z], %b
    }"""
    x = np.arange(200) % 3 == 0
    check(text, layouts(a=((256,), 8, 1, (0,))), {"x": x, "y": np.zeros_like(x)}, (1,))


UNARY_FLOAT = "neg abs exp exp2 sigmoid tanh erf sin cos floor ceil".split()
UNARY_POSITIVE = "log log2 sqrt rsqrt".split()


@pytest.mark.parametrize(("names", "positive"), [(UNARY_FLOAT, False), (UNARY_POSITIVE, True)])
def test_unary_functions(names, positive):
    ops = "".join(
        f"%v{i} = tile.{fn} %a : tile<256xf32, #a>\n %i{i} = tile.constant {{value = {i}}} : i32\n"
        f" %w{i} = tile.subview %y, [%i{i}] : view<?xf32, strides=[1], align=16>\n tile.store %w{i}, [%z], %v{i}\n"
        for i, fn in enumerate(names)
    )
    text = f"""
    func @k(%x: view<?xf32, strides=[1], align=16>, %y: view<?x?xf32, strides=[?, 1], align=16>) {{num_warps = 1}} {{
      %z = tile.constant {{value = 0}} : i32
      %a = tile.load %x, [%z] : tile<256xf32, #a>
      {ops}
    }}"""
    x = np.linspace(-12, 12, 256, dtype=np.float32)
    x[:4] = 0, 1e-20, 1e-5, 80
    x = np.abs(x) + np.float32(1e-3) if positive else x
    arguments = {"x": x, "y": np.zeros((len(names), 256), np.float32)}
    check(text, layouts(a=((256,), 32, 1, (0,))), arguments, (1,), tolerance=2e-6)


def test_exp_of_infinities_and_nan():
    text = ADD.replace("DT", "f32").replace("ALIGN", "4").replace("%s = tile.add %e, %a", "%s = tile.add %e, %e")
    x = np.resize(np.array([np.inf, -np.inf, np.nan, -104, 88.7, 0], np.float32), (16, 128))
    check(text, layouts(a=((16, 128), 32, 4, (1, 0))), {"x": x, "y": np.zeros_like(x)}, (1, 1))


BINARY = {
    "f32": "add sub mul div max min mod floordiv",
    "bf16": "add sub mul div max min",
    "i32": "add sub mul max min and or xor floordiv mod",
    "i64": "add mul floordiv mod",
    "i8": "add mul floordiv mod",
    "i1": "and or xor max min",
}


def operands(name: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    if name == "i1":
        return rng.random(256) < 0.5, rng.random(256) < 0.5
    if name in ("f32", "bf16", "f16"):
        x, y = rng.normal(size=(2, 256)) * 4
        y[:3], x[3], y[4], y[5] = np.nan, np.inf, np.inf, -np.inf
        x[6:40], y[6:40] = 3 * y[6:40], y[6:40].astype(NUMPY[name])  # quotients that are nearly integers
        return x.astype(NUMPY[name]), y.astype(NUMPY[name])
    limit = np.iinfo(NUMPY[name])
    x = rng.integers(limit.min, limit.max, 256).astype(NUMPY[name])
    y = rng.integers(-9, 40, 256).astype(NUMPY[name])
    x[:2], y[0], y[1] = limit.min, -1, 0
    return x, y


@pytest.mark.parametrize("name", list(BINARY))
def test_binary_functions(name):
    names = BINARY[name].split()
    ops = "".join(
        f"%v{i} = tile.{fn} %a, %b : tile<256x{name}, #a>\n %i{i} = tile.constant {{value = {i}}} : i32\n"
        f" %w{i} = tile.subview %o, [%i{i}] : view<?x{name}, strides=[1], align=1>\n tile.store %w{i}, [%z], %v{i}\n"
        for i, fn in enumerate(names)
    )
    one = f"view<?x{name}, strides=[1], align=1>"
    text = f"""
    func @k(%x: {one}, %y: {one}, %o: view<?x?x{name}, strides=[?, 1], align=1>) {{num_warps = 1}} {{
      %z = tile.constant {{value = 0}} : i32
      %a = tile.load %x, [%z] : tile<256x{name}, #a>
      %b = tile.load %y, [%z] : tile<256x{name}, #a>
      {ops}
    }}"""
    x, y = operands(name)
    arguments = {"x": x, "y": y, "o": np.zeros((len(names), 256), NUMPY[name])}
    check(text, layouts(a=((256,), 32, 1, (0,))), arguments, (1,))


def test_shifts_beyond_the_width():
    text = """
    func @k(%x: view<256xi32, strides=[1], align=16>, %l: view<256xi32, strides=[1], align=16>,
            %r: view<256xi32, strides=[1], align=16>) {num_warps = 1} {
      %z = tile.constant {value = 0} : i32
      %a = tile.load %x, [%z] : tile<256xi32, #a>
      %n = tile.iota {start = 0} : tile<256xi32, #a>
      %u = tile.shl %a, %n : tile<256xi32, #a>
      %v = tile.shr %a, %n : tile<256xi32, #a>
      tile.store %l, [%z], %u
      tile.store %r, [%z], %v
    }"""
    x = np.random.default_rng(0).integers(-(2**31), 2**31, 256).astype(np.int32)
    check(text, layouts(a=((256,), 32, 1, (0,))), {"x": x, "l": np.zeros_like(x), "r": np.zeros_like(x)}, (1,))


CASTS = """f32-bf16 bf16-f32 f32-i32 f32-i8 i32-f32 i8-i32 i64-i8 f32-i1 i1-f32 i1-i32 i32-bf16 bf16-i8 i32-i1 f32-i64
    f16-f32 f32-f16 bf16-f16 i64-f32"""


@pytest.mark.parametrize("pair", CASTS.split())
def test_casts(pair):
    source, result = pair.split("-")
    text = f"""
    func @k(%x: view<?x{source}, strides=[1], align=16>, %y: view<?x{result}, strides=[1], align=16>)
        {{num_warps = 1}} {{
      %z = tile.constant {{value = 0}} : i32
      %a = tile.load %x, [%z] : tile<256x{source}, #a>
      %b = tile.cast %a : tile<256x{result}, #a>
      tile.store %y, [%z], %b
    }}"""
    x, _ = operands(source)
    if source in ("f32", "bf16", "f16"):
        x[:5] = np.array([np.nan, np.inf, -np.inf, 1e4, 0.0]).astype(x.dtype)
        x = (x * 50).astype(x.dtype)
    check(text, layouts(a=((256,), 16, 1, (0,))), {"x": x, "y": np.zeros(256, NUMPY[result])}, (1,))


def test_compare_select_and_bitcast():
    text = """
    func @k(%x: view<?xf32, strides=[1], align=16>, %y: view<?xi32, strides=[1], align=16>) {num_warps = 1} {
      %z = tile.constant {value = 0} : i32
      %a = tile.load %x, [%z] : tile<256xf32, #a>
      %h = tile.constant {value = 0.5} : tile<256xf32, #a>
      %c = tile.lt %a, %h : tile<256xi1, #a>
      %b = tile.bitcast %a : tile<256xi32, #a>
      %i = tile.iota {start = 7} : tile<256xi32, #a>
      %s = tile.select %c, %b, %i : tile<256xi32, #a>
      tile.store %y, [%z], %s
    }"""
    x = normal(256)
    x[5] = np.nan
    check(text, layouts(a=((256,), 32, 1, (0,))), {"x": x, "y": np.zeros(256, np.int32)}, (1,))


# --- views ------------------------------------------------------------------------------------------


def test_views_select_permute_and_move_the_origin():
    text = """
    func @k(%x: view<?x?x?xf32, strides=[?, ?, 1], align=4>, %y: view<?x?xf32, strides=[?, 1], align=4>,
            %b: i32, %row: i32) {num_warps = 2} {
      %i = tile.program_id {axis = 0} : i32
      %z = tile.constant {value = 0} : i32
      %m2 = tile.constant {value = -2} : i32
      %s = tile.subview %x, [%b] : view<?x?xf32, strides=[?, 1], align=4>
      %p = tile.permute_view %s {perm = [1, 0]} : view<?x?xf32, strides=[1, ?], align=4>
      %o = tile.offset_view %p, [%row, %m2] : view<?x?xf32, strides=[1, ?], align=4>
      %a = tile.load %o, [%i, %z] {pad = -1.0} : tile<32x16xf32, #a>
      %n = tile.dim %p {axis = 0} : i32
      %f = tile.cast %n : f32
      %t = tile.splat %f : tile<32x16xf32, #a>
      %r = tile.add %a, %t : tile<32x16xf32, #a>
      tile.store %y, [%i, %z], %r
    }"""
    arguments = {"x": normal(3, 13, 50), "y": np.zeros((64, 16), np.float32), "b": np.int32(2), "row": np.int32(3)}
    check(text, layouts(a=((32, 16), 32, 2, (0, 1))), arguments, (2,))


def test_transposed_store_through_a_conversion():
    text = """
    func @k(%x: view<?x?xbf16, strides=[?, 1], align=16>, %y: view<?x?xbf16, strides=[?, 1], align=16>)
        {num_warps = 4} {
      %i = tile.program_id {axis = 0} : i32
      %j = tile.program_id {axis = 1} : i32
      %a = tile.load %x, [%i, %j] : tile<64x32xbf16, #a>
      %t = tile.transpose %a {perm = [1, 0]} : tile<32x64xbf16, #t>
      %c = tile.convert %t : tile<32x64xbf16, #c>
      tile.store %y, [%j, %i], %c
    }"""

    def aliases(warp_size: int) -> str:
        a = blocked((64, 32), 16, 4, warp_size, (1, 0))
        return f"#a = {a}\n#t = {a.transpose((1, 0))}\n#c = {blocked((32, 64), 16, 4, warp_size, (1, 0))}\n"

    x = normal(104, 72, dtype=BF16)
    got = check(text, aliases, {"x": x, "y": np.zeros((72, 104), BF16)}, (2, 3))
    np.testing.assert_array_equal(got["y"], x.T)


# --- reductions -------------------------------------------------------------------------------------

SOFTMAX = """
func @softmax(%x: view<?x?xf32, strides=[?, 1], align=4>, %y: view<?x?xf32, strides=[?, 1], align=4>) {num_warps = 4} {
  %i = tile.program_id {axis = 0} : i32
  %z = tile.constant {value = 0} : i32
  %a = tile.load %x, [%i, %z] {pad = -inf} : tile<ROWSx256xf32, #a>
  %m = tile.reduce.max %a {axis = 1} : tile<ROWSxf32, #r>
  %m1 = tile.expand_dims %m {axis = 1} : tile<ROWSx1xf32, #e>
  %mb = tile.broadcast %m1 : tile<ROWSx256xf32, #a>
  %d = tile.sub %a, %mb : tile<ROWSx256xf32, #a>
  %e = tile.exp %d : tile<ROWSx256xf32, #a>
  %s = tile.reduce.sum %e {axis = 1} : tile<ROWSxf32, #r>
  %s1 = tile.expand_dims %s {axis = 1} : tile<ROWSx1xf32, #e>
  %sb = tile.broadcast %s1 : tile<ROWSx256xf32, #a>
  %o = tile.div %e, %sb : tile<ROWSx256xf32, #a>
  tile.store %y, [%i, %z], %o
}
"""


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("columns", [256, 201])
def test_softmax_rows_inside_a_warp_and_across_warps(rows, columns):
    def aliases(warp_size: int) -> str:
        a = blocked((rows, 256), 32, 4, warp_size, (1, 0))
        r = a.slice_dim(1)
        return f"#a = {a}\n#r = {r}\n#e = {r.expand_dim(1)}\n"

    x = normal(11, columns) * np.float32(4)
    text = SOFTMAX.replace("ROWS", str(rows))
    check(text, aliases, {"x": x, "y": np.zeros_like(x)}, (-(-11 // rows),))


@pytest.mark.parametrize("fn", ["sum", "max", "min", "prod"])
@pytest.mark.parametrize(("name", "dtype"), [("f32", np.float32), ("bf16", BF16), ("i32", np.int32), ("i64", np.int64)])
def test_column_reductions(fn, name, dtype):
    text = f"""
    func @k(%x: view<?x?x{name}, strides=[?, 1], align=16>, %y: view<?x{name}, strides=[1], align=16>)
        {{num_warps = 4}} {{
      %z = tile.constant {{value = 0}} : i32
      %a = tile.load %x, [%z, %z] : tile<48x32x{name}, #a>
      %r = tile.reduce.{fn} %a {{axis = 0}} : tile<32x{name}, #r>
      tile.store %y, [%z], %r
    }}"""

    def aliases(warp_size: int) -> str:
        a = blocked((48, 32), np.dtype(dtype).itemsize * 8, 4, warp_size, (1, 0))
        return f"#a = {a}\n#r = {a.slice_dim(0)}\n"

    x = (normal(48, 32) * 3).astype(dtype)
    x = np.abs(x) + x.dtype.type(1) if fn == "prod" else x
    check(text, aliases, {"x": x, "y": np.zeros(32, dtype)}, (1,), tolerance=1e-2 if dtype == BF16 else 1e-5)


def test_a_rank_one_reduction_gives_a_scalar():
    text = """
    func @k(%x: view<?xf32, strides=[1], align=16>, %y: view<?xf32, strides=[1], align=16>) {num_warps = 4} {
      %z = tile.constant {value = 0} : i32
      %a = tile.load %x, [%z] : tile<1024xf32, #a>
      %s = tile.reduce.sum %a {axis = 0} : f32
      %t = tile.splat %s : tile<1024xf32, #a>
      %u = tile.div %a, %t : tile<1024xf32, #a>
      tile.store %y, [%z], %u
    }"""
    x = np.abs(normal(1000))
    check(text, layouts(a=((1024,), 32, 4, (0,))), {"x": x, "y": np.zeros_like(x)}, (1,))


# --- control flow -----------------------------------------------------------------------------------


def test_loops_carry_tiles_and_scalars():
    text = """
    func @k(%x: view<?x?xf32, strides=[?, 1], align=16>, %y: view<16x64xf32, strides=[64, 1], align=16>)
        {num_warps = 2} {
      %z = tile.constant {value = 0} : i32
      %one = tile.constant {value = 1} : i32
      %w = tile.constant {value = 64} : i32
      %n = tile.dim %x {axis = 1} : i32
      %n1 = tile.add %n, %w : i32
      %n2 = tile.sub %n1, %one : i32
      %hi = tile.floordiv %n2, %w : i32
      %zero = tile.constant {value = 0.0} : tile<16x64xf32, #a>
      %f0 = tile.constant {value = 0.0} : f32
      %acc, %last = tile.for %k = %z to %hi step %one iter(%c = %zero, %f = %f0) : tile<16x64xf32, #a>, f32 {
        %a = tile.load %x, [%z, %k] : tile<16x64xf32, #a>
        %s = tile.add %c, %a : tile<16x64xf32, #a>
        %kf = tile.cast %k : f32
        %g = tile.add %f, %kf : f32
        tile.yield [%s, %g]
      }
      %lt = tile.splat %last : tile<16x64xf32, #a>
      %r = tile.add %acc, %lt : tile<16x64xf32, #a>
      tile.store %y, [%z, %z], %r
    }"""
    arguments = {"x": normal(16, 300), "y": np.zeros((16, 64), np.float32)}
    check(text, layouts(a=((16, 64), 32, 2, (1, 0))), arguments, (1,))


def test_branches_and_while():
    text = """
    func @k(%x: view<256xi32, strides=[1], align=16>, %limit: i32, %flag: i1) {num_warps = 1} {
      %z = tile.constant {value = 0} : i32
      %one = tile.constant {value = 1} : i32
      %a = tile.load %x, [%z] : tile<256xi32, #a>
      %t, %n = tile.while iter(%c = %a, %k = %z) : tile<256xi32, #a>, i32 {
        %go = tile.lt %k, %limit : i1
        tile.yield [%go]
      } do(%d, %l) {
        %d2 = tile.add %d, %d : tile<256xi32, #a>
        %l2 = tile.add %l, %one : i32
        tile.yield [%d2, %l2]
      }
      %r = tile.if %flag : tile<256xi32, #a> {
        %ns = tile.splat %n : tile<256xi32, #a>
        %p = tile.add %t, %ns : tile<256xi32, #a>
        tile.yield [%p]
      } else {
        tile.yield [%t]
      }
      tile.store %x, [%z], %r
    }"""
    for flag in (True, False):
        arguments = {"x": np.arange(256, dtype=np.int32), "limit": np.int32(3), "flag": np.bool_(flag)}
        check(text, layouts(a=((256,), 32, 1, (0,))), arguments, (1,))


def test_program_indices():
    text = """
    func @k(%x: view<?x16xi32, strides=[16, 1], align=4>) {num_warps = 1} {
      %z = tile.constant {value = 0} : i32
      %b = tile.block_id : i32
      %n = tile.num_blocks : i32
      %p = tile.program_id {axis = 2} : i32
      %g = tile.num_programs {axis = 1} : i32
      %h = tile.constant {value = 100} : i32
      %s0 = tile.mul %n, %h : i32
      %s1 = tile.add %s0, %p : i32
      %s2 = tile.mul %s1, %h : i32
      %s = tile.add %s2, %g : i32
      %t = tile.splat %s : tile<1x16xi32, #a>
      tile.store %x, [%b, %z], %t
    }"""
    check(text, layouts(a=((1, 16), 32, 1, (1, 0))), {"x": np.zeros((24, 16), np.int32)}, (2, 3, 4))


def test_persistent_blocks_walk_the_grid():
    text = """
    func @k(%x: view<?x64xi32, strides=[64, 1], align=4>) {num_warps = 4, persistent = true} {
      %z = tile.constant {value = 0} : i32
      %b = tile.block_id : i32
      %n = tile.num_blocks : i32
      %total = tile.num_programs {axis = 0} : i32
      tile.for %p = %b to %total step %n {
        %h = tile.constant {value = 100} : i32
        %bh = tile.mul %b, %h : i32
        %s = tile.add %bh, %p : i32
        %t = tile.splat %s : tile<1x64xi32, #a>
        tile.store %x, [%p, %z], %t
        tile.yield []
      }
    }"""
    aliases, x = layouts(a=((1, 64), 32, 4, (1, 0))), np.zeros((7, 64), np.int32)
    got = emulate(parse(text, aliases, 64), {"x": x}, (7,), blocks=3)["x"]
    np.testing.assert_array_equal(got[:, 0], [p % 3 * 100 + p for p in range(7)])
    nvidia.compile_function(parse(text, aliases, 32), get_target("sm_90a"))


# --- shared memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "swizzle"),
    [
        ((64, 64), {"swizzle": 128}),
        ((64, 32), {"swizzle": 64}),
        ((64, 128), {"swizzle": 128}),
        ((96, 64), {"swizzle": 128}),
        ((48, 64), {}),
        ((64, 96), {"swizzle": 64}),
        ((64, 64), {"vec": 8, "per_phase": 2, "max_phase": 8}),
    ],
)
def test_slots_keep_tiles(shape, swizzle):
    shared = SharedLayout(shape, 16, (1, 0), **swizzle)
    dims, turned = f"{shape[0]}x{shape[1]}", f"{shape[1]}x{shape[0]}"
    size = 2 * shared.bytes
    text = f"""
    func @k(%x: view<?x?xbf16, strides=[?, 1], align=16>, %y: view<?x?xbf16, strides=[?, 1], align=16>)
        {{num_warps = 4, shared_bytes = {size}}} {{
      %z = tile.constant {{value = 0}} : i32
      %three = tile.constant {{value = 3}} : i32
      %a = tile.load %x, [%z, %z] : tile<{dims}xbf16, #a>
      %b = async.alloc {{offset = 0}} : buffer<2 x slot<{dims}xbf16, {shared}>>
      %s = async.slot %b, %three : slot<{dims}xbf16, {shared}>
      async.local_store %a, %s
      async.barrier
      %t = async.transpose_slot %s {{perm = [1, 0]}} : slot<{turned}xbf16, {shared.transpose((1, 0))}>
      %c = async.local_load %t : tile<{turned}xbf16, #c>
      tile.store %y, [%z, %z], %c
    }}"""
    aliases = layouts(a=(shape, 16, 4, (1, 0)), c=(shape[::-1], 16, 4, (1, 0)))
    x = normal(*shape, dtype=BF16)
    y = check(text, aliases, {"x": x, "y": np.zeros(shape[::-1], BF16)}, (1,))["y"]
    np.testing.assert_array_equal(y, x.T)


def test_register_renaming():
    text = """
    func @k(%x: view<16x64xf32, strides=[64, 1], align=16>, %y: view<8x32xf32, strides=[32, 1], align=16>)
        {num_warps = 1} {
      %z = tile.constant {value = 0} : i32
      %a = tile.load %x, [%z, %z] : tile<16x64xf32, #a>
      %e = tile.extract %a {offsets = [8, 0]} : tile<8x64xf32, #e>
      %r = tile.reshape %e : tile<16x32xf32, #r>
      %h = tile.extract %r {offsets = [8, 0]} : tile<8x32xf32, #h>
      tile.store %y, [%z, %z], %h
    }"""

    def aliases(warp_size: int) -> str:
        a = LinearLayout.make(
            {
                "register": [(0, 1), (4, 0), (8, 0), (0, 32)] + ([(2, 0)] if warp_size == 32 else []),
                "lane": [(0, 2), (0, 4), (0, 8), (0, 16), (1, 0)] + ([(2, 0)] if warp_size == 64 else []),
                "warp": [],
            },
            (16, 64),
        )
        e, _ = a.extract((8, 0), (8, 64))
        r = e.reshape((16, 32))
        h, _ = r.extract((8, 0), (8, 32))
        return f"#a = {a}\n#e = {e}\n#r = {r}\n#h = {h}\n"

    x = normal(16, 64)
    got = check(text, aliases, {"x": x, "y": np.zeros((8, 32), np.float32)}, (1,))
    np.testing.assert_array_equal(got["y"], x[8:].reshape(16, 32)[8:])


# --- errors -----------------------------------------------------------------------------------------


def test_errors_name_the_operation_and_its_place():
    text = ADD.replace("DT", "f64").replace("ALIGN", "16")
    text = text.replace("#a>\n  %s", '#a> loc("user.py":7:3)\n  %s')
    function = parse(text, layouts(a=((16, 128), 64, 4, (1, 0))), 32)
    with pytest.raises(IRError, match=r"user\.py:7:3: 'tile\.exp': exp of f64 is not supported on sm_90a yet"):
        nvidia.lower_function(function, get_target("sm_90a"))


def test_missing_conversions_are_errors():
    text = """
    func @k(%x: view<?xf32, strides=[1], align=16>) {num_warps = 1} {
      %z = tile.constant {value = 0} : i32
      %a = tile.load %x, [%z] : tile<256xf32, #a>
      %b = tile.expand_dims %a {axis = 0} : tile<1x256xf32, #b>
    }"""
    aliases = layouts(a=((256,), 32, 1, (0,)), b=((1, 256), 8, 1, (1, 0)))
    with pytest.raises(IRError, match="must insert tile.convert"):
        nvidia.lower_function(parse(text, aliases, 32), get_target("sm_90a"))


def test_conversions_choose_layouts_without_conflicts():
    text = """
    func @k(%x: view<?x?xf32, strides=[?, 1], align=16>) {num_warps = 4} {
      %z = tile.constant {value = 0} : i32
      %a = tile.load %x, [%z, %z] : tile<64x64xf32, #a>
      %b = tile.convert %a : tile<64x64xf32, #b>
    }"""
    aliases = layouts(a=((64, 64), 32, 4, (1, 0)), b=((64, 64), 32, 4, (0, 1)))
    for warp_size in (32, 64):
        (convert,) = [op for op in parse(text, aliases, warp_size).walk() if op.name == "tile.convert"]
        plan = convert_plan(convert).exchange
        assert plan is not None
        assert plan.bytes == scratch_bytes(convert) == 64 * 64 * 4
        banks = "nvidia" if warp_size == 32 else "cdna3"
        for side, op in ((plan.writer, "write"), (plan.reader, "read")):
            assert bank_conflicts(side, plan.memory, shared_vector_bytes(side, plan.memory), banks, op) == 0


CONVERSION = """
func @k(%x: view<?x?xDT, strides=[?, 1], align=16>, %y: view<?x?xDT, strides=[?, 1], align=16>) {num_warps = 4} {
  %z = tile.constant {value = 0} : i32
  %a = tile.load %x, [%z, %z] : tile<ROWSxCOLSxDT, #a>
  %b = tile.convert %a : tile<ROWSxCOLSxDT, #b>
  %s = tile.add %b, %b : tile<ROWSxCOLSxDT, #b>
  %c = tile.convert %s : tile<ROWSxCOLSxDT, #a>
  tile.store %y, [%z, %z], %c
}
"""


def mixed(layout: LinearLayout, seed: int) -> LinearLayout:
    """Registers and lanes of every warp exchanged at random."""
    rng, count = np.random.default_rng(seed), len(layout.basis("register"))
    vectors = [*layout.basis("register"), *layout.basis("lane")]
    vectors = [vectors[i] for i in rng.permutation(len(vectors))]
    bases = {"register": vectors[:count], "lane": vectors[count:], "warp": layout.basis("warp")}
    return LinearLayout.make(bases, layout.shape, layout.repeat)


@pytest.mark.parametrize("name", ["f32", "bf16", "i8", "i64"])
@pytest.mark.parametrize("seed", range(3))
def test_conversions_inside_a_warp(name, seed):
    """Shuffles wherever they are cheapest, else shared memory: on all targets and element sizes."""
    bits = np.dtype(NUMPY[name]).itemsize * 8
    text = CONVERSION.replace("DT", name).replace("ROWS", "32").replace("COLS", "64")

    def aliases(warp_size: int) -> str:
        a = blocked((32, 64), bits, 4, warp_size, (1, 0))
        return f"#a = {a}\n#b = {mixed(a, seed)}\n"

    x = (normal(32, 64, seed=seed) * 20).astype(NUMPY[name])
    check(text, aliases, {"x": x, "y": np.zeros_like(x)}, (1,))


@pytest.mark.parametrize(("name", "bits"), [("f32", 32), ("bf16", 16), ("i8", 8)])
def test_shuffled_conversions_use_no_shared_memory(name, bits):
    """Neighbouring lanes exchange halves of what they hold."""
    text = CONVERSION.replace("DT", name).replace("ROWS", "16").replace("COLS", "64")

    def aliases(warp_size: int) -> str:
        a = blocked((16, 64), bits, 4, warp_size, (1, 0), max_vector_bytes=4 * bits // 8)
        registers, lanes = list(a.basis("register")), list(a.basis("lane"))
        registers[-1], lanes[1] = lanes[1], registers[-1]
        b = LinearLayout.make({"register": registers, "lane": lanes, "warp": a.basis("warp")}, a.shape, a.repeat)
        return f"#a = {a}\n#b = {b}\n"

    x = (normal(16, 64) * 20).astype(NUMPY[name])
    check(text, aliases, {"x": x, "y": np.zeros_like(x)}, (1,))
    function = parse(text, aliases, 32)
    assert [convert_plan(op).kind for op in function.walk() if op.name == "tile.convert"] == ["shuffle"] * 2
    assert function.attributes["shared_bytes"] == 0
    ptx = nvidia.compile_function(function, get_target("sm_90a")).asm["ptx"]
    assert "shfl.sync" in ptx and "st.shared" not in ptx


@pytest.mark.parametrize(("rows", "columns", "name"), [(128, 128, "bf16"), (96, 128, "f32"), (64, 192, "bf16")])
def test_large_conversions_go_in_slices(rows, columns, name):
    bits = np.dtype(NUMPY[name]).itemsize * 8
    text = CONVERSION.replace("DT", name).replace("ROWS", str(rows)).replace("COLS", str(columns))
    aliases = layouts(a=((rows, columns), bits, 4, (1, 0)), b=((rows, columns), bits, 4, (0, 1)))
    x = normal(rows, columns, dtype=NUMPY[name])
    check(text, aliases, {"x": x, "y": np.zeros_like(x)}, (1,))
    assert parse(text, aliases, 64).attributes["shared_bytes"] <= 2 * 32768  # two conversions, each within its limit
