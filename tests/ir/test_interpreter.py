"""The interpreter: NumPy references for tiles, memory and control flow."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.ir.core import REGISTRY, Function, IRError
from tilewright.ir.interpreter import run
from tilewright.ir.interpreter_machine import RULES
from tilewright.ir.interpreter_numerics import NUMPY
from tilewright.ir.parser import parse_module
from tilewright.ir.tile_ops import Yield
from tilewright.ir.types import DTYPES
from tilewright.ir.verifier import verify

BF16 = ml_dtypes.bfloat16
RANDOM = np.random.default_rng(0)


def parse(text: str) -> Function:
    module = parse_module(text, "k.tw", text_locations=True)
    verify(module)
    return module.functions[0]


def dtype(name: str) -> np.dtype[Any]:
    return NUMPY[DTYPES[name]]


def apply(body: str, source: np.ndarray, name: str, result: str, shape: tuple[int, ...]) -> np.ndarray:
    """Run ``body``, which turns tile %x into tile %r, on one tile."""

    def dims(shape: tuple[int, ...], name: str) -> str:
        return "x".join([*map(str, shape), name])

    def view(shape: tuple[int, ...], name: str) -> str:
        strides = ", ".join(str(math.prod(shape[i + 1 :])) for i in range(len(shape)))
        return f"view<{dims(shape, name)}, strides=[{strides}], align=1>"

    zeros, ends = ", ".join(["%0"] * source.ndim), ", ".join(["%0"] * len(shape))
    text = f"""func @f(%s: {view(source.shape, name)}, %d: {view(shape, result)}) {{
      %0 = tile.constant {{value = 0}} : i32
      %x = tile.load %s, [{zeros}] : tile<{dims(source.shape, name)}>
      {body}
      tile.store %d, [{ends}], %r
    }}"""
    out = np.zeros(shape, dtype(result))
    run(parse(text), [source, out])
    return out


def numbers(shape: tuple[int, ...], name: str) -> np.ndarray:
    if name.startswith("i"):
        return RANDOM.integers(-100, 100, shape).astype(dtype(name))
    return RANDOM.standard_normal(shape).astype(dtype(name))


def test_every_operation_has_a_rule() -> None:
    assert {cls for cls, _ in REGISTRY.values()} - set(RULES) <= {Yield}


# --- arithmetic -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "f64", "f8e4m3", "f8e5m2"])
@pytest.mark.parametrize(
    ("fn", "reference"),
    [
        ("neg", np.negative), ("abs", np.abs), ("exp", np.exp), ("exp2", np.exp2), ("sin", np.sin), ("cos", np.cos),
        ("tanh", np.tanh), ("floor", np.floor), ("ceil", np.ceil), ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
        ("erf", np.vectorize(math.erf)), ("sqrt", np.sqrt), ("log", np.log), ("log2", np.log2),
        ("rsqrt", lambda x: x**-0.5),
    ],
)  # fmt: skip
def test_float_functions(name: str, fn: str, reference: Any) -> None:
    x = numbers((5, 7), name)
    x = np.abs(x) + x.dtype.type(0.25) if fn in ("sqrt", "log", "log2", "rsqrt") else x
    got = apply(f"%r = tile.{fn} %x : tile<5x7x{name}>", x, name, name, (5, 7))
    want = reference(x.astype(np.float64))
    tolerance = {"f64": 1e-12, "f32": 1e-5, "f16": 1e-3, "bf16": 8e-3, "f8e4m3": 7e-2, "f8e5m2": 0.13}[name]
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=tolerance, atol=tolerance / 30)
    assert np.any(got.astype(np.float64))


PYTHON = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b if b else 0, "mod": lambda a, b: a % b if b else 0, "max": max, "min": min,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << (b & 7), "shr": lambda a, b: a >> (b & 7),
}  # fmt: skip


@pytest.mark.parametrize("name", ["i8", "i16", "i32", "i64"])
@pytest.mark.parametrize("fn", PYTHON)
def test_integers_wrap(name: str, fn: str) -> None:
    info = np.iinfo(dtype(name))
    a = RANDOM.integers(info.min, info.max, 60, dtype(name), endpoint=True)
    b = RANDOM.integers(info.min, info.max, 60, dtype(name), endpoint=True)
    a[:2], b[:3] = info.min, [-1, 0, 1]
    if fn in ("shl", "shr"):
        b &= 7
    both = "%e = tile.extract %x {offsets = [0]} : tile<60x{0}> %h = tile.extract %x {offsets = [60]} : tile<60x{0}>"
    body = both.replace("{0}", name) + f" %r = tile.{fn} %e, %h : tile<60x{name}>"
    got = apply(body, np.concatenate([a, b]), name, name, (60,))
    want = [(PYTHON[fn](int(p), int(q)) - info.min) % (1 << info.bits) + info.min for p, q in zip(a, b, strict=True)]
    assert got.tolist() == want


def test_small_floats_compute_in_float32_and_round_once() -> None:
    x = numbers((64,), "bf16")
    got = apply("%y = tile.mul %x, %x : tile<64xbf16> %r = tile.div %y, %x : tile<64xbf16>", x, "bf16", "bf16", (64,))
    square = (x.astype(np.float32) ** 2).astype(BF16)
    assert np.array_equal(got, (square.astype(np.float32) / x.astype(np.float32)).astype(BF16))


@pytest.mark.parametrize("fn", ["max", "min"])
@pytest.mark.parametrize("name", ["bf16", "f32"])
def test_nan_propagates(fn: str, name: str) -> None:
    x = np.array([1, np.nan, -2, 3], dtype(name))
    got = apply(
        f"%z = tile.constant {{value = 0.0}} : tile<4x{name}> %r = tile.{fn} %z, %x : tile<4x{name}>",
        x,
        name,
        name,
        (4,),
    )
    assert np.isnan(got[1].astype(float)) and not np.isnan(got[0].astype(float))
    total = apply(
        f"%y = tile.reduce.{fn} %x {{axis = 0}} : {name} %r = tile.splat %y : tile<4x{name}>", x, name, name, (4,)
    )
    assert np.isnan(total.astype(float)).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32), min_size=8, max_size=8), st.sampled_from(["i8", "i32", "i64"]))
def test_float_to_int_truncates_and_saturates(values: list[float], name: str) -> None:
    x, info = np.array(values, np.float32), np.iinfo(dtype(name))
    got = apply(f"%r = tile.cast %x : tile<8x{name}>", x, "f32", name, (8,))
    bounded = [0.0 if math.isnan(v) else min(max(v, -1e30), 1e30) for v in x.tolist()]
    assert got.tolist() == [min(max(int(v), info.min), info.max) for v in bounded]


@pytest.mark.parametrize(("name", "limit"), [("f8e4m3", 448.0), ("f8e5m2", 57344.0)])
def test_float_to_fp8_saturates(name: str, limit: float) -> None:
    x = np.array([1e9, -1e9, np.inf, np.nan, 0.3, limit, 1.0625, -0.0], np.float32)
    got = apply(f"%r = tile.cast %x : tile<8x{name}>", x, "f32", name, (8,)).astype(np.float64)
    assert got[[0, 1, 2, 5]].tolist() == [limit, -limit, limit, limit]
    assert np.isnan(got[3]) and got[6] == 1.0 and abs(got[4] - 0.3) < 0.03


@pytest.mark.parametrize("source", ["i8", "i64", "f16", "bf16", "f32", "f64", "f8e4m3"])
@pytest.mark.parametrize("target", ["i1", "i16", "f16", "bf16", "f64", "f8e5m2"])
def test_casts(source: str, target: str) -> None:
    x = (RANDOM.integers(-8, 8, 40) / (1 if source.startswith("i") else 2)).astype(dtype(source))
    got = apply(f"%r = tile.cast %x : tile<40x{target}>", x, source, target, (40,))
    wide = x.astype(np.float64)
    want = wide != 0 if target == "i1" else np.trunc(wide) if target == "i16" else wide
    assert np.array_equal(got.astype(np.float64), want.astype(np.float64))


def test_bitcast_compare_select() -> None:
    x = numbers((6, 4), "f32")
    got = apply("%r = tile.bitcast %x : tile<6x4xi32>", x, "f32", "i32", (6, 4))
    assert np.array_equal(got, x.view(np.int32))
    body = """%z = tile.constant {value = 0.0} : tile<6x4xf32> %p = tile.gt %x, %z : tile<6x4xi1>
      %q = tile.not %p : tile<6x4xi1> %n = tile.neg %x : tile<6x4xf32> %r = tile.select %q, %n, %x : tile<6x4xf32>"""
    assert np.array_equal(apply(body, x, "f32", "f32", (6, 4)), np.abs(x))


@pytest.mark.parametrize("name", ["bf16", "f16", "f32", "i32"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("fn", ["sum", "max", "min", "prod"])
def test_reductions(name: str, axis: int, fn: str) -> None:
    x = numbers((16, 32), name)
    left = (16, 32)[1 - axis]
    got = apply(f"%r = tile.reduce.{fn} %x {{axis = {axis}}} : tile<{left}x{name}>", x, name, name, (left,))
    kind = np.int64 if name == "i32" else np.float64
    want = getattr(np, fn)(x.astype(kind), axis=axis)
    if name == "i32":
        assert np.array_equal(got, want.astype(np.int32))
    else:
        np.testing.assert_allclose(got.astype(kind), want, rtol=1e-2, atol=1e-6)


def test_a_bf16_sum_is_rounded_once() -> None:
    x = np.ones((512,), BF16)
    got = apply(
        "%s0 = tile.reduce.sum %x {axis = 0} : bf16 %r = tile.splat %s0 : tile<1xbf16>", x, "bf16", "bf16", (1,)
    )
    assert float(got[0]) == 512.0  # a running bf16 sum would stop at 256


def test_shapes() -> None:
    x = numbers((4, 6), "f32")
    body = """%a = tile.transpose %x {perm = [1, 0]} : tile<6x4xf32>
      %b = tile.extract %a {offsets = [2, 0]} : tile<3x4xf32>
      %c = tile.reshape %b : tile<12xf32> %e = tile.expand_dims %c {axis = 0} : tile<1x12xf32>
      %r = tile.broadcast %e : tile<5x12xf32>"""
    got = apply(body, x, "f32", "f32", (5, 12))
    assert np.array_equal(got, np.broadcast_to(x.T[2:5].reshape(12), (5, 12)))
    got = apply("%r = tile.iota {start = 3} : tile<4xi32>", np.zeros(4, np.int32), "i32", "i32", (4,))
    assert got.tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("a", "acc"), [("bf16", "f32"), ("f16", "f16"), ("f8e4m3", "f32"), ("f64", "f64"), ("i8", "i32"), ("i32", "i32")]
)
def test_dot(a: str, acc: str) -> None:
    x = numbers((8, 24), a)
    body = f"""%a = tile.extract %x {{offsets = [0, 0]}} : tile<8x16x{a}>
      %b = tile.extract %x {{offsets = [0, 16]}} : tile<8x8x{a}>
      %t = tile.transpose %a {{perm = [1, 0]}} : tile<16x8x{a}> %c = tile.constant {{value = 2}} : tile<16x8x{acc}>
      %r = tile.dot %t, %b, %c : tile<16x8x{acc}>"""
    got = apply(body, x, a, acc, (16, 8)).astype(np.float64)
    want = x[:, :16].T.astype(np.float64) @ x[:, 16:].astype(np.float64) + 2
    np.testing.assert_allclose(got, want, rtol=2e-3 if acc == "f16" else 1e-5, atol=1e-3)


# --- memory -----------------------------------------------------------------------------------

COPY = """func @copy(%s: view<?x?xf32, strides=[?, ?], align=4>, %d: view<?x?xf32, strides=[?, ?], align=4>) {
  %m = tile.program_id {axis = 0} : i32
  %n = tile.program_id {axis = 1} : i32
  %t = tile.load %s, [%m, %n] {pad = 7.0} : tile<4x8xf32>
  tile.store %d, [%m, %n], %t
}"""


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 3), st.integers(0, 3))
def test_loads_pad_and_stores_clip(rows: int, columns: int, more: int, turn: int) -> None:
    source = RANDOM.standard_normal((rows, columns)).astype(np.float32)
    base = np.zeros((48, 48), np.float32)
    target = [base, base.T, base[::2, ::2], base[::-1]][turn][: rows + more, : columns + more]
    run(parse(COPY), {"s": source, "d": target}, grid=(-(-rows // 4), -(-columns // 8)))
    want = np.zeros_like(target)
    want[: -(-rows // 4) * 4, : -(-columns // 8) * 8] = 7.0
    want[:rows, :columns] = source
    assert np.array_equal(target, want)
    assert np.count_nonzero(base) == np.count_nonzero(want)


def test_views() -> None:
    text = """func @f(%s: view<?x?x?xf32, strides=[?, ?, 1], align=4>,
             %d: view<?x?xf32, strides=[?, 1], align=4>, %i: i32, %o: i32) {
      %0 = tile.constant {value = 0} : i32
      %a = tile.subview %s, [%i] : view<?x?xf32, strides=[?, 1], align=4>
      %b = tile.permute_view %a {perm = [1, 0]} : view<?x?xf32, strides=[1, ?], align=4>
      %c = tile.offset_view %b, [%o, %0] : view<?x?xf32, strides=[1, ?], align=4>
      %t = tile.load %c, [%0, %0] : tile<4x4xf32>
      %w = tile.dim %c {axis = 0} : i32
      %u = tile.cast %w : f32
      %v = tile.splat %u : tile<4x4xf32>
      %r = tile.add %t, %v : tile<4x4xf32>
      tile.store %d, [%0, %0], %r
    }"""
    s, d = numbers((3, 5, 6), "f32"), np.zeros((4, 4), np.float32)
    run(parse(text), [s, d, 2, 3])
    want = np.zeros((4, 4), np.float32)
    want[:3] = s[2].T[3:, :4]
    assert np.array_equal(d, want + 6)
    run(parse(text), [s, d, 2, -1])
    want = np.zeros((4, 4), np.float32)
    want[1:] = s[2].T[:3, :4]
    assert np.array_equal(d, want + 6)
    with pytest.raises(IRError, match="'tile.subview': index 3 is outside a dimension of size 3") as caught:
        run(parse(text), [s, d, 3, 0])
    assert (caught.value.loc.file, caught.value.loc.line) == ("k.tw", 4)


def test_a_loaded_tile_does_not_see_later_stores() -> None:
    text = """func @f(%s: view<4xf32, strides=[1], align=4>) {
      %0 = tile.constant {value = 0} : i32
      %t = tile.load %s, [%0] : tile<4xf32>
      %z = tile.constant {value = 0.0} : tile<4xf32>
      tile.store %s, [%0], %z
      tile.store %s, [%0], %t
    }"""
    s = numbers((4,), "f32")
    want = s.copy()
    run(parse(text), [s])
    assert np.array_equal(s, want)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4), np.float64), "expected an array of float32, got float64"),
        (np.zeros((4,), np.float32), "is no view"),
        (np.zeros((5, 4), np.float32), "is no view"),
        (np.zeros((4, 8), np.float32)[:, ::2], "strides of"),
        (3.0, "expected an array"),
    ],
)
def test_arguments_that_do_not_fit(array: Any, message: str) -> None:
    kernel = parse("func @f(%s: view<4x?xf32, strides=[?, 1], align=4>) {}")
    with pytest.raises(IRError, match=message):
        run(kernel, [array])
    with pytest.raises(IRError, match="takes 1 arguments, got 0"):
        run(kernel, [])
    with pytest.raises(IRError, match="takes s; got t"):
        run(kernel, {"t": array})


# --- control flow and the grid --------------------------------------------------------------------


def test_control_flow() -> None:
    text = """func @collatz(%d: view<2xi32, strides=[1], align=4>, %n: i32) {
      %0 = tile.constant {value = 0} : i32
      %1 = tile.constant {value = 1} : i32
      %2 = tile.constant {value = 2} : i32
      %3 = tile.constant {value = 3} : i32
      %last, %steps = tile.while iter(%x = %n, %s = %0) : i32, i32 {
        %go = tile.ne %x, %1 : i1
        tile.yield [%go]
      } do(%x, %s) {
        %odd = tile.mod %x, %2 : i32
        %even = tile.eq %odd, %0 : i1
        %next = tile.if %even : i32 {
          %h = tile.floordiv %x, %2 : i32
          tile.yield [%h]
        } else {
          %t = tile.mul %x, %3 : i32
          %u = tile.add %t, %1 : i32
          tile.yield [%u]
        }
        %s1 = tile.add %s, %1 : i32
        tile.yield [%next, %s1]
      }
      %sum = tile.for %i = %1 to %n step %2 iter(%a = %0) : i32 {
        %b = tile.add %a, %i : i32
        tile.yield [%b]
      }
      %v = tile.splat %steps : tile<1xi32>
      %w = tile.splat %sum : tile<1xi32>
      tile.store %d, [%0], %v
      tile.store %d, [%1], %w
    }"""
    d = np.zeros(2, np.int32)
    run(parse(text), {"d": d, "n": 27})
    assert d.tolist() == [111, sum(range(1, 27, 2))]


GRID = """func @grid(%d: view<?xi32, strides=[1], align=4>, %at: view<1xi32, strides=[1], align=4>) {
  %0 = tile.constant {value = 0} : i32
  %1 = tile.constant {value = 1} : tile<1xi32>
  %x = tile.ID
  %n = tile.COUNT
  %t = tile.load %at, [%0] : tile<1xi32>
  %u = tile.add %t, %1 : tile<1xi32>
  tile.store %at, [%0], %u
  %hundred = tile.constant {value = 100} : i32
  %h = tile.mul %n, %hundred : i32
  %s = tile.add %x, %h : i32
  %v = tile.splat %s : tile<1xi32>
  %r = tile.reduce.sum %t {axis = 0} : i32
  tile.store %d, [%r], %v
}"""


def test_programs_run_x_first() -> None:
    text = GRID.replace("ID", "program_id {axis = 0} : i32").replace("COUNT", "num_programs {axis = 1} : i32")
    d, at = np.zeros(6, np.int32), np.zeros(1, np.int32)
    run(parse(text), [d, at], grid=(3, 2))
    assert d.tolist() == [200, 201, 202, 200, 201, 202]


def test_blocks_of_a_persistent_kernel() -> None:
    text = GRID.replace("ID", "block_id : i32").replace("COUNT", "num_blocks : i32")
    d, at = np.zeros(6, np.int32), np.zeros(1, np.int32)
    run(parse(text), [d, at], grid=(3, 2), blocks=3)
    assert d.tolist() == [300, 301, 302, 0, 0, 0]
    persistent = parse(GRID.replace("ID", "program_id {axis = 0} : i32").replace("COUNT", "num_blocks : i32"))
    persistent.attributes["persistent"] = True
    with pytest.raises(IRError, match="a persistent kernel has no program_id"):
        run(persistent, [d, at], grid=(3, 2))


def test_faults_carry_the_place() -> None:
    text = "func @f(%x: i32) {\n  tile.for %i = %x to %x step %x {\n    tile.yield []\n  }\n}"
    with pytest.raises(IRError, match="'tile.for': step 0 is not positive") as caught:
        run(parse(text), [0])
    assert caught.value.loc.line == 2
