"""Canonicalise, CSE, DCE and LICM: one small IR for each rewrite, compared as IR."""

from __future__ import annotations

import numpy as np
import pytest

from tilewright.ir.core import Location, Module, Region
from tilewright.ir.interpreter_numerics import NUMPY, cast
from tilewright.ir.parser import parse_module
from tilewright.ir.printer import print_module
from tilewright.ir.target import get_target
from tilewright.ir.types import DTYPES
from tilewright.passes import canonicalize, cse, dce, licm  # noqa: F401  (importing them registers the passes)
from tilewright.passes.constant_folding import converts_exactly
from tilewright.passes.manager import PassContext, PassManager

CONTEXT = PassContext(get_target("sm_90a"))

#: values that the bodies below may use
PARAMS = (
    "%x: i32, %y: i32, %p: i1, %q: i1, %f: f32, %g: f32, %h: bf16, %s: i8, %w: i64, "
    "%t: tile<4x8xf32>, %r: tile<8xf32>, %it: tile<8xi32>, "
    "%v: view<?x?x16xf32, strides=[?, ?, 1], align=16>, %o: view<?xf32, strides=[1], align=16>"
)


def function(body: str) -> Module:
    """A function of `PARAMS`. Its closing ``tile.yield`` stands for what the program needs."""
    return parse_module(f"module {{ func @k({PARAMS}) {{\n{body}\n}} }}")


def without_hints(module: Module) -> Module:
    """Number the values, so that texts compare up to names."""

    def clear(region: Region) -> None:
        for arg in region.block.args:
            arg.hint = ""
        for op in region.block.ops:
            for result in op.results:
                result.hint = ""
            for nested in op.regions:
                clear(nested)

    for f in module.functions:
        clear(f.body)
    return module


def check(passes: str, before: str, after: str) -> None:
    """``passes`` turn ``before`` into ``after``."""
    module = PassManager(passes, CONTEXT, verify=False).run(function(before))
    assert print_module(without_hints(module)) == print_module(without_hints(function(after)))


def operations(module: Module) -> list[str]:
    return [op.name for op in module.walk()]


# --- expressions --------------------------------------------------------------------------------

#: name: (expression in terms of the parameters, what it becomes). Several lines: the last one is %e.
EXPRESSIONS = {
    # arithmetic on constants, in the dtype
    "fold_add": ("tile.add i32 2 3", "5 : i32"),
    "fold_wraps": ("tile.add i32 2147483647 1", "-2147483648 : i32"),
    "fold_wraps_i8": ("tile.mul i8 100 3", "44 : i8"),
    "fold_floordiv": ("tile.floordiv i32 -7 2", "-4 : i32"),
    "fold_mod": ("tile.mod i32 -7 4", "1 : i32"),
    "fold_shr_is_arithmetic": ("tile.shr i32 -8 1", "-4 : i32"),
    "fold_shl_wraps": ("tile.shl i8 96 1", "-64 : i8"),
    "fold_f32": ("tile.add f32 0.1 0.2", "0.30000001192092896 : f32"),
    "fold_bf16_rounds": ("tile.add bf16 256.0 1.0", "256.0 : bf16"),
    "fold_f16_overflows": ("tile.mul f16 65504.0 2.0", "inf : f16"),
    "fold_div": ("tile.div f32 1.0 4.0", "0.25 : f32"),
    "fold_and_bool": ("tile.and i1 true false", "false : i1"),
    "fold_tile": ("tile.mul tile<4xi32> 6 7", "42 : tile<4xi32>"),
    "fold_compare": ("tile.lt i32 2 3", "true : i1"),
    "fold_compare_nan": ("tile.ne f32 nan nan", "true : i1"),
    "fold_max": ("tile.max i32 2 3", "3 : i32"),
    "no_fold_division_by_zero": ("tile.floordiv i32 1 0", None),
    "no_fold_wide_shift": ("tile.shl i32 1 32", None),
    "no_fold_nan": ("tile.sub f32 inf inf", None),
    "no_fold_float_division_by_zero": ("tile.div f32 1.0 0.0", None),
    "no_fold_max_of_zeros": ("tile.max f32 0.0 -0.0", None),
    "fold_neg": ("tile.neg i8 -128", "-128 : i8"),
    "fold_not": ("tile.not i32 5", "-6 : i32"),
    "fold_floor": ("tile.floor f32 -1.5", "-2.0 : f32"),
    "no_fold_exp": ("tile.exp f32 1.0", None),
    # identities
    "add_zero": ("tile.add %x 0", "%x"),
    "zero_add": ("tile.add 0 %x", "%x"),
    "sub_zero": ("tile.sub %x 0", "%x"),
    "mul_one": ("tile.mul %x 1", "%x"),
    "mul_zero": ("tile.mul %x 0", "0 : i32"),
    "sub_self": ("tile.sub %x %x", "0 : i32"),
    "xor_self": ("tile.xor %p %p", "false : i1"),
    "and_self": ("tile.and %x %x", "%x"),
    "and_minus_one": ("tile.and %x -1", "%x"),
    "and_true": ("tile.and %p true", "%p"),
    "or_true": ("tile.or %p true", "true : i1"),
    "floordiv_one": ("tile.floordiv %x 1", "%x"),
    "mod_one": ("tile.mod %x 1", "0 : i32"),
    "shift_zero": ("tile.shl %x 0", "%x"),
    "max_self": ("tile.max %f %f", "%f"),
    "float_mul_one": ("tile.mul %f 1.0", "%f"),
    "float_div_one": ("tile.div %f 1.0", "%f"),
    "float_add_minus_zero": ("tile.add %f -0.0", "%f"),
    "float_sub_zero": ("tile.sub %f 0.0", "%f"),
    "no_float_add_zero": ("tile.add %f 0.0", None),
    "no_float_sub_minus_zero": ("tile.sub %f -0.0", None),
    "no_float_mul_zero": ("tile.mul %f 0.0", None),
    "no_float_sub_self": ("tile.sub %f %f", None),
    "tile_mul_one": ("tile.mul %r 1.0", "%r"),
    "compare_self": ("tile.le %x %x", "true : i1"),
    "no_float_compare_self": ("tile.eq %f %f", None),
    "cast_to_itself": ("tile.cast %x : i32", "%x"),
    "cast_of_int": ("tile.cast 3 : f32", "3.0 : f32"),
    "cast_truncates": ("tile.cast 300 : i8", "44 : i8"),
    "cast_of_float": ("tile.cast f32 -2.75 : i32", "-2 : i32"),
    "cast_rounds": ("tile.cast f32 1.00390625 : bf16", "1.0 : bf16"),
    "cast_to_bool": ("tile.cast 3 : i1", "true : i1"),
    "no_cast_out_of_range": ("tile.cast f32 1e10 : i32", None),
    "no_inexact_cast_of_int": ("tile.cast 16777217 : f32", None),
    "bitcast": ("tile.bitcast f32 1.0 : i32", "1065353216 : i32"),
    # selects
    "select_true": ("tile.select true %x %y", "%x"),
    "select_false": ("tile.select false %x %y", "%y"),
    "select_same": ("tile.select %p %x %x", "%x"),
    "select_bool": ("tile.select %p true false", "%p"),
}


def _expression(text: str) -> str:
    """``tile.add i32 2 3`` -> IR: literals become constants of the dtype named before or of the parameters'."""
    types = {"%x": "i32", "%y": "i32", "%p": "i1", "%q": "i1", "%f": "f32", "%g": "f32", "%r": "tile<8xf32>"}
    head, _, cast = text.partition(" : ")
    name, *words = head.split()
    named = [w for w in words if w[0] in "tfib" and w not in ("true", "false", "inf")]
    operands = [w for w in words if w not in named]
    type_ = (named or [types[w] for w in operands[::-1] if w in types] or ["i32"])[0]
    lines, names = [], []
    for i, word in enumerate(operands):
        if word.startswith("%"):
            names.append(word)
            continue
        literal_type = "i1" if word in ("true", "false") else type_
        lines.append(f"%c{i} = tile.constant {{value = {word}}} : {literal_type}")
        names.append(f"%c{i}")
    compares = name.split(".")[1] in ("eq", "ne", "lt", "le", "gt", "ge")
    if name == "tile.select" and "true" in operands[1:]:
        type_ = "i1"
    result = cast or ("i1" if compares else type_)
    return "\n".join([*lines, f"%e = {name} {', '.join(names)} : {result}", "tile.yield [%e]"])


@pytest.mark.parametrize("case", EXPRESSIONS)
def test_expression(case):
    before, after = EXPRESSIONS[case]
    body = _expression(before)
    if after is None:
        expected = body
    elif after.startswith("%"):
        expected = f"tile.yield [{after}]"
    else:
        value, type_ = after.split(" : ")
        expected = f"%e = tile.constant {{value = {value}}} : {type_}\ntile.yield [%e]"
    check("canonicalize", body, expected)


REWRITES = {
    "constants_go_right": (
        "%c = tile.constant {value = 3} : i32  %e = tile.mul %c, %x : i32  tile.yield [%e]",
        "%c = tile.constant {value = 3} : i32  %e = tile.mul %x, %c : i32  tile.yield [%e]",
    ),
    "compared_constants_go_right": (
        "%c = tile.constant {value = 3} : i32  %e = tile.lt %c, %x : i1  tile.yield [%e]",
        "%c = tile.constant {value = 3} : i32  %e = tile.gt %x, %c : i1  tile.yield [%e]",
    ),
    "sums_of_constants_regroup": (
        """%c = tile.constant {value = 3} : i32  %d = tile.constant {value = 4} : i32
           %a = tile.add %x, %c : i32  %e = tile.add %d, %a : i32  tile.yield [%e]""",
        "%c = tile.constant {value = 7} : i32  %e = tile.add %x, %c : i32  tile.yield [%e]",
    ),
    "float_sums_do_not_regroup": (
        """%c = tile.constant {value = 3.0} : f32
           %a = tile.add %f, %c : f32  %e = tile.add %a, %c : f32  tile.yield [%e]""",
        None,
    ),
    "neg_of_neg": ("%a = tile.neg %f : f32  %e = tile.neg %a : f32  tile.yield [%e]", "tile.yield [%f]"),
    "not_of_compare": (
        "%a = tile.lt %x, %y : i1  %e = tile.not %a : i1  tile.yield [%e]",
        "%e = tile.ge %x, %y : i1  tile.yield [%e]",
    ),
    "not_of_float_compare_stays": ("%a = tile.lt %f, %g : i1  %e = tile.not %a : i1  tile.yield [%e]", None),
    "not_of_float_equality": (
        "%a = tile.eq %f, %g : i1  %e = tile.not %a : i1  tile.yield [%e]",
        "%e = tile.ne %f, %g : i1  tile.yield [%e]",
    ),
    "select_on_not": (
        "%a = tile.not %p : i1  %e = tile.select %a, %x, %y : i32  tile.yield [%e]",
        "%e = tile.select %p, %y, %x : i32  tile.yield [%e]",
    ),
    "exact_round_trip_of_casts": (
        "%a = tile.cast %h : f32  %e = tile.cast %a : bf16  tile.yield [%e]",
        "tile.yield [%h]",
    ),
    "widening_casts": (
        "%a = tile.cast %s : i32  %e = tile.cast %a : f32  tile.yield [%e]",
        "%e = tile.cast %s : f32  tile.yield [%e]",
    ),
    "bitcasts_meet": (
        "%a = tile.bitcast %f : i32  %e = tile.bitcast %a : f32  tile.yield [%e]",
        "tile.yield [%f]",
    ),
    "constants_take_the_kind_of_their_dtype": (
        "%e = tile.constant {value = 2} : f32  tile.yield [%e]",
        "%e = tile.constant {value = 2.0} : f32  tile.yield [%e]",
    ),
    "truncating_casts": (
        "%a = tile.cast %w : i32  %e = tile.cast %a : i8  tile.yield [%e]",
        "%e = tile.cast %w : i8  tile.yield [%e]",
    ),
    "rounding_casts_stay": ("%a = tile.cast %f : bf16  %e = tile.cast %a : f32  tile.yield [%e]", None),
    "inexact_int_casts_stay": ("%a = tile.cast %x : f32  %e = tile.cast %a : i32  tile.yield [%e]", None),
    "wrapping_casts_stay": ("%a = tile.cast %x : i8  %e = tile.cast %a : i32  tile.yield [%e]", None),
    "splat_of_constant": (
        "%c = tile.constant {value = 2.0} : f32  %e = tile.splat %c : tile<8xf32>  tile.yield [%e]",
        "%e = tile.constant {value = 2.0} : tile<8xf32>  tile.yield [%e]",
    ),
    "moves_of_constants": (
        """%c = tile.constant {value = 2} : tile<8xi32>  %a = tile.expand_dims %c {axis = 0} : tile<1x8xi32>
           %b = tile.broadcast %a : tile<4x8xi32>  %d = tile.transpose %b {perm = [1, 0]} : tile<8x4xi32>
           %e = tile.reshape %d : tile<32xi32>  tile.yield [%e]""",
        "%e = tile.constant {value = 2} : tile<32xi32>  tile.yield [%e]",
    ),
    "moves_of_splats": (
        """%c = tile.splat %f : tile<8xf32>  %a = tile.expand_dims %c {axis = 0} : tile<1x8xf32>
           %e = tile.broadcast %a : tile<4x8xf32>  tile.yield [%e]""",
        "%e = tile.splat %f : tile<4x8xf32>  tile.yield [%e]",
    ),
    "broadcast_of_broadcast": (
        """%a = tile.reshape %r : tile<1x8x1xf32>  %b = tile.broadcast %a : tile<4x8x1xf32>
           %e = tile.broadcast %b : tile<4x8x2xf32>  tile.yield [%e]""",
        "%a = tile.reshape %r : tile<1x8x1xf32>  %e = tile.broadcast %a : tile<4x8x2xf32>  tile.yield [%e]",
    ),
    "broadcast_to_the_same_shape": ("%e = tile.broadcast %t : tile<4x8xf32>  tile.yield [%e]", "tile.yield [%t]"),
    "transpose_of_transpose": (
        """%a = tile.transpose %t {perm = [1, 0]} : tile<8x4xf32>
           %e = tile.transpose %a {perm = [1, 0]} : tile<4x8xf32>  tile.yield [%e]""",
        "tile.yield [%t]",
    ),
    "transposes_compose": (
        """%z = tile.reshape %t : tile<2x4x4xf32>  %a = tile.transpose %z {perm = [1, 2, 0]} : tile<4x4x2xf32>
           %e = tile.transpose %a {perm = [0, 2, 1]} : tile<4x2x4xf32>  tile.yield [%e]""",
        """%z = tile.reshape %t : tile<2x4x4xf32>
           %e = tile.transpose %z {perm = [1, 0, 2]} : tile<4x2x4xf32>  tile.yield [%e]""",
    ),
    "reshape_of_reshape": (
        "%a = tile.reshape %t : tile<32xf32>  %e = tile.reshape %a : tile<2x16xf32>  tile.yield [%e]",
        "%e = tile.reshape %t : tile<2x16xf32>  tile.yield [%e]",
    ),
    "extract_of_extract": (
        """%a = tile.extract %t {offsets = [2, 4]} : tile<2x4xf32>
           %e = tile.extract %a {offsets = [1, 2]} : tile<1x2xf32>  tile.yield [%e]""",
        "%e = tile.extract %t {offsets = [3, 6]} : tile<1x2xf32>  tile.yield [%e]",
    ),
    "sum_of_equal_ints": (
        "%c = tile.constant {value = 5} : tile<8xi32>  %e = tile.reduce.sum %c {axis = 0} : i32  tile.yield [%e]",
        "%e = tile.constant {value = 40} : i32  tile.yield [%e]",
    ),
    "maximum_of_equal_floats": (
        """%c = tile.constant {value = 5.0} : tile<2x8xf32>
           %e = tile.reduce.max %c {axis = 0} : tile<8xf32>  tile.yield [%e]""",
        "%e = tile.constant {value = 5.0} : tile<8xf32>  tile.yield [%e]",
    ),
    "static_dim": (
        "%e = tile.dim %v {axis = 2} : i32  tile.yield [%e]",
        "%e = tile.constant {value = 16} : i32  tile.yield [%e]",
    ),
    "dim_of_permuted_view": (
        """%a = tile.permute_view %v {perm = [1, 0, 2]} : view<?x?x16xf32, strides=[?, ?, 1], align=16>
           %e = tile.dim %a {axis = 0} : i32  tile.yield [%e]""",
        "%e = tile.dim %v {axis = 1} : i32  tile.yield [%e]",
    ),
    "dim_of_subview": (
        """%a = tile.subview %v, [%x] : view<?x16xf32, strides=[?, 1], align=16>
           %e = tile.dim %a {axis = 0} : i32  tile.yield [%e]""",
        "%e = tile.dim %v {axis = 1} : i32  tile.yield [%e]",
    ),
    "permute_of_permute": (
        """%a = tile.permute_view %v {perm = [1, 0, 2]} : view<?x?x16xf32, strides=[?, ?, 1], align=16>
           %e = tile.permute_view %a {perm = [1, 0, 2]} : view<?x?x16xf32, strides=[?, ?, 1], align=16>
           tile.yield [%e]""",
        "tile.yield [%v]",
    ),
    "subview_of_subview": (
        """%a = tile.subview %v, [%x] : view<?x16xf32, strides=[?, 1], align=16>
           %e = tile.subview %a, [%y] : view<16xf32, strides=[1], align=16>  tile.yield [%e]""",
        "%e = tile.subview %v, [%x, %y] : view<16xf32, strides=[1], align=16>  tile.yield [%e]",
    ),
    # control flow
    "constant_condition": (
        """%c = tile.constant {value = true} : i1
           %e = tile.if %c : i32 { %a = tile.add %x, %y : i32  tile.yield [%a] } else { tile.yield [%x] }
           tile.yield [%e]""",
        "%a = tile.add %x, %y : i32  tile.yield [%a]",
    ),
    "equal_yields": (
        """%e, %d = tile.if %p : i32, i32 { %a = tile.add %x, %y : i32  tile.yield [%x, %a] }
                     else { tile.yield [%x, %x] }
           tile.yield [%e, %d]""",
        """%d = tile.if %p : i32 { %a = tile.add %x, %y : i32  tile.yield [%a] } else { tile.yield [%x] }
           tile.yield [%x, %d]""",
    ),
    "choice_of_scalars": (
        "%e = tile.if %p : i32 { tile.yield [%x] } else { tile.yield [%y] }  tile.yield [%e]",
        "%e = tile.select %p, %x, %y : i32  tile.yield [%e]",
    ),
    "no_iteration": (
        """%a = tile.constant {value = 4} : i32  %b = tile.constant {value = 2} : i32
           %e = tile.for %i = %a to %b step %b iter(%acc = %x) : i32 { %n = tile.add %acc, %i : i32  tile.yield [%n] }
           tile.yield [%e]""",
        "tile.yield [%x]",
    ),
    "one_iteration": (
        """%a = tile.constant {value = 4} : i32  %b = tile.constant {value = 8} : i32
           %e = tile.for %i = %a to %b step %b iter(%acc = %x) : i32 { %n = tile.add %acc, %i : i32  tile.yield [%n] }
           tile.yield [%e]""",
        "%a = tile.constant {value = 4} : i32  %e = tile.add %x, %a : i32  tile.yield [%e]",
    ),
    "two_iterations_stay": (
        """%a = tile.constant {value = 0} : i32  %b = tile.constant {value = 5} : i32
           %s4 = tile.constant {value = 4} : i32
           %e = tile.for %i = %a to %b step %s4 iter(%acc = %x) : i32 { %n = tile.add %acc, %i : i32  tile.yield [%n] }
           tile.yield [%e]""",
        None,
    ),
    "invariant_carried_value": (
        """%a = tile.constant {value = 1} : i32
           %e, %d = tile.for %i = %x to %y step %a iter(%acc = %x, %same = %y) : i32, i32 {
             %n = tile.mul %acc, %same : i32  tile.yield [%n, %same] }
           tile.yield [%e, %d]""",
        """%a = tile.constant {value = 1} : i32
           %e = tile.for %i = %x to %y step %a iter(%acc = %x) : i32 { %n = tile.mul %acc, %y : i32  tile.yield [%n] }
           tile.yield [%e, %y]""",
    ),
    "unused_carried_value": (
        """%a = tile.constant {value = 1} : i32
           %e, %d = tile.for %i = %x to %y step %a iter(%acc = %x, %self = %y) : i32, i32 {
             %n = tile.mul %acc, %i : i32  %m = tile.add %self, %i : i32  tile.yield [%n, %m] }
           tile.yield [%e]""",
        """%a = tile.constant {value = 1} : i32
           %e = tile.for %i = %x to %y step %a iter(%acc = %x) : i32 { %n = tile.mul %acc, %i : i32  tile.yield [%n] }
           tile.yield [%e]""",
    ),
    "false_while": (
        """%e = tile.while iter(%a = %x) : i32 { %c = tile.constant {value = false} : i1  tile.yield [%c] }
             do(%b) { %n = tile.add %b, %y : i32  tile.yield [%n] }
           tile.yield [%e]""",
        "tile.yield [%x]",
    ),
    "invariant_value_of_while": (
        """%e, %d = tile.while iter(%a = %x, %k = %y) : i32, i32 { %c = tile.lt %a, %k : i1  tile.yield [%c] }
             do(%b, %l) { %n = tile.add %b, %l : i32  tile.yield [%n, %l] }
           tile.yield [%e, %d]""",
        """%e = tile.while iter(%a = %x) : i32 { %c = tile.lt %a, %y : i1  tile.yield [%c] }
             do(%b) { %n = tile.add %b, %y : i32  tile.yield [%n] }
           tile.yield [%e, %y]""",
    ),
}


@pytest.mark.parametrize("case", REWRITES)
def test_rewrite(case):
    before, after = REWRITES[case]
    check("canonicalize", before, before if after is None else after)


@pytest.mark.parametrize("source", [d for d in DTYPES.values() if d.bits <= 16], ids=str)
@pytest.mark.parametrize("result", DTYPES.values(), ids=str)
def test_exact_conversions_keep_every_value(source, result):
    if result.kind == "bool" and source.kind != "bool":
        return
    bits = np.arange(1 << source.bits, dtype=f"u{source.bytes}")
    values = bits.view(NUMPY[source]) if source.bits > 1 else bits.astype(np.bool_)
    with np.errstate(all="ignore"):
        there = cast(values, result)
        if result.bits <= 8 and source == result:  # the last cast of a chain comes from something wider
            there = cast(cast(values, DTYPES["f32"]), result)
        same = np.array_equal(values.astype(np.float64), there.astype(np.float64), equal_nan=source.is_float)
    assert converts_exactly(source, result) == same


def test_hints_and_locations_survive():
    body = """%c = tile.constant {value = 3} : i32 loc("k.py":1:1)
              %sum = tile.mul %c, %x : i32 loc("k.py":2:5)
              %a = tile.constant {value = 1} : i32
              %e = tile.if %p : i32 loc("k.py":4:1) { tile.yield [%x] } else { tile.yield [%y] }
              tile.yield [%sum, %e]"""
    module = PassManager("canonicalize,cse,licm,dce", CONTEXT, verify=False).run(function(body))
    ops = {op.name: op for op in module.walk()}
    assert ops["tile.mul"].loc == Location("k.py", 2, 5) and ops["tile.mul"].result.hint == "sum"
    assert ops["tile.select"].loc == Location("k.py", 4, 1) and ops["tile.select"].result.hint == "e"


def test_the_number_of_sweeps_is_bounded():
    body = "".join(f"%a{i + 1} = tile.add %a{i}, %zero : i32\n" for i in range(50))
    body = "%zero = tile.constant {value = 0} : i32  %a0 = tile.add %x, %zero : i32\n" + body + "tile.yield [%a50]"
    module = PassManager("canonicalize{max-sweeps=1}", CONTEXT, verify=False).run(function(body))
    assert operations(module) == ["tile.yield"]


# --- CSE ------------------------------------------------------------------------------------------


def test_equal_operations_merge_also_from_inner_regions():
    check(
        "cse",
        """%a = tile.add %x, %y : i32  %b = tile.add %y, %x : i32  %d = tile.dim %v {axis = 0} : i32
           %c = tile.if %p : i32 { %m = tile.add %x, %y : i32  %n = tile.dim %v {axis = 0} : i32
                                   %o2 = tile.sub %m, %n : i32  tile.yield [%o2] } else { tile.yield [%b] }
           tile.yield [%a, %b, %c, %d]""",
        """%a = tile.add %x, %y : i32  %d = tile.dim %v {axis = 0} : i32
           %c = tile.if %p : i32 { %o2 = tile.sub %a, %d : i32  tile.yield [%o2] } else { tile.yield [%a] }
           tile.yield [%a, %a, %c, %d]""",
    )


@pytest.mark.parametrize(
    "body",
    [
        # siblings do not dominate each other
        """%e = tile.if %p : i32 { %m = tile.add %x, %y : i32  tile.yield [%m] }
                      else { %n = tile.add %x, %y : i32  tile.yield [%n] }
           tile.yield [%e]""",
        "%a = tile.sub %x, %y : i32  %b = tile.sub %y, %x : i32  tile.yield [%a, %b]",
        "%a = tile.constant {value = 0.0} : f32  %b = tile.constant {value = -0.0} : f32  tile.yield [%a, %b]",
        "%a = tile.constant {value = 1} : i32  %b = tile.constant {value = true} : i1  tile.yield [%a, %b]",
        "%a = tile.cast %x : i64  %b = tile.cast %x : f32  tile.yield [%a, %b]",
        # a store may lie between two loads
        "%a = tile.load %o, [%x] : tile<8xf32>  %b = tile.load %o, [%x] : tile<8xf32>  tile.yield [%a, %b]",
    ],
)
def test_different_operations_stay_apart(body):
    check("cse", body, body)


def test_default_attributes_count_as_written():
    check(
        "cse",
        "%a = tile.iota {start = 0} : tile<8xi32>  %b = tile.iota : tile<8xi32>  tile.yield [%a, %b]",
        "%a = tile.iota : tile<8xi32>  tile.yield [%a, %a]",
    )


# --- DCE ------------------------------------------------------------------------------------------


def test_unused_operations_reads_and_loops_go():
    check(
        "dce",
        """%a = tile.load %o, [%x] : tile<8xf32>  %b = tile.exp %a : tile<8xf32>
           %c = tile.constant {value = 1} : i32
           %e = tile.for %i = %x to %y step %c iter(%acc = %r) : tile<8xf32> {
             %l = tile.load %o, [%i] : tile<8xf32>  %n = tile.add %acc, %l : tile<8xf32>  tile.yield [%n] }
           tile.if %p { %u = tile.add %x, %y : i32  tile.yield [] } else { tile.yield [] }
           tile.yield [%x]""",
        "tile.yield [%x]",
    )


def test_stores_keep_what_they_need():
    body = """%c = tile.constant {value = 1} : i32
              %e, %d = tile.for %i = %x to %y step %c iter(%acc = %r, %k = %x) : tile<8xf32>, i32 {
                %l = tile.load %o, [%k] : tile<8xf32>
                tile.if %p { tile.store %o, [%i], %l  tile.yield [] } else { tile.yield [] }
                %n = tile.add %acc, %l : tile<8xf32>  %m = tile.add %k, %i : i32
                tile.yield [%n, %m] }"""
    check(
        "dce",
        body,
        """%c = tile.constant {value = 1} : i32
           %d = tile.for %i = %x to %y step %c iter(%k = %x) : i32 {
             %l = tile.load %o, [%k] : tile<8xf32>
             tile.if %p { tile.store %o, [%i], %l  tile.yield [] } else { tile.yield [] }
             %m = tile.add %k, %i : i32
             tile.yield [%m] }""",
    )


def test_values_that_feed_each_other_go_together():
    check(
        "dce",
        """%c = tile.constant {value = 1} : i32
           %e, %d, %h2 = tile.for %i = %x to %y step %c iter(%a = %x, %b = %y, %n = %x) : i32, i32, i32 {
             %s2 = tile.add %n, %i : i32  tile.yield [%b, %a, %s2] }
           tile.yield [%h2]""",
        """%c = tile.constant {value = 1} : i32
           %h2 = tile.for %i = %x to %y step %c iter(%n = %x) : i32 { %s2 = tile.add %n, %i : i32  tile.yield [%s2] }
           tile.yield [%h2]""",
    )


def test_the_condition_of_a_while_is_needed():
    body = """%e, %d = tile.while iter(%a = %x, %b = %y) : i32, i32 { %c = tile.lt %b, %y : i1  tile.yield [%c] }
                do(%m, %n) { %o2 = tile.add %m, %x : i32  %p2 = tile.add %n, %x : i32  tile.yield [%o2, %p2] }
              tile.yield [%e]"""
    check("dce", body, body)


# --- LICM -----------------------------------------------------------------------------------------


def test_invariants_leave_nested_loops():
    check(
        "licm",
        """%c = tile.constant {value = 1} : i32
           tile.for %i = %x to %y step %c {
             tile.for %j = %x to %y step %c {
               %a = tile.add %x, %y : i32  %b = tile.mul %a, %i : i32  %d = tile.add %b, %j : i32
               tile.store %o, [%d], %r
               tile.yield [] }
             tile.yield [] }""",
        """%c = tile.constant {value = 1} : i32  %a = tile.add %x, %y : i32
           tile.for %i = %x to %y step %c {
             %b = tile.mul %a, %i : i32
             tile.for %j = %x to %y step %c {
               %d = tile.add %b, %j : i32
               tile.store %o, [%d], %r
               tile.yield [] }
             tile.yield [] }""",
    )


@pytest.mark.parametrize(
    "inside",
    [
        "%a = tile.load %o, [%x] : tile<8xf32>  tile.store %o, [%i], %a",  # the store may change what is loaded
        "%a = tile.floordiv %x, %y : i32  tile.store %o, [%a], %r",  # %y may be zero and the loop may not run
    ],
)
def test_what_may_change_or_fail_stays(inside):
    body = f"%c = tile.constant {{value = 1}} : i32  tile.for %i = %x to %y step %c {{ {inside}  tile.yield [] }}"
    check("licm", body, body)


def test_invariants_leave_whiles():
    check(
        "licm",
        """%e = tile.while iter(%a = %x) : i32 { %l = tile.mul %y, %y : i32  %c = tile.lt %a, %l : i1  tile.yield [%c] }
             do(%b) { %m = tile.add %x, %y : i32  %n = tile.add %b, %m : i32  tile.yield [%n] }
           tile.yield [%e]""",
        """%l = tile.mul %y, %y : i32  %m = tile.add %x, %y : i32
           %e = tile.while iter(%a = %x) : i32 { %c = tile.lt %a, %l : i1  tile.yield [%c] }
             do(%b) { %n = tile.add %b, %m : i32  tile.yield [%n] }
           tile.yield [%e]""",
    )
