"""The text form: printing and parsing are inverse, and bad text gives errors that show the place."""

from __future__ import annotations

import contextlib
import math
import re
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tilewright.ir.builder import Builder
from tilewright.ir.core import REGISTRY, UNKNOWN, Block, Function, IRError, Location, Module, Operation, Region, Value
from tilewright.ir.layout import LinearLayout, SharedLayout
from tilewright.ir.parser import ParseError, parse_module, parse_type
from tilewright.ir.printer import print_module
from tilewright.ir.tile_ops import For, Unary, While
from tilewright.ir.types import (
    DTYPES,
    BufferType,
    RingType,
    ScalarType,
    SlotType,
    TileType,
    TokenType,
    ViewType,
    bf16,
    f32,
    i1,
    i32,
)
from tilewright.ir.verifier import verify

LAYOUT = LinearLayout.make({"register": [(0, 1), (0, 2)], "lane": [(1, 0), (2, 0), (4, 0), (8, 0), (0, 4)]}, (16, 8))
OTHER = LinearLayout.make({"register": [(1, 0)], "lane": [(0, 1)], "warp": [(2, 0)]}, (4, 2), (3, 1))
SHARED = SharedLayout((16, 64), 16, (1, 0), swizzle=128)
TILE = TileType((16, 8), f32, LAYOUT)
SLOT = SlotType((16, 64), bf16, SHARED)
PLACE = Location('dir "x"\\a.py', 3, 7, Location("b.py", 12, 1))

GEMM = (
    """#l0 = linear<register=[[0,1],[0,2]],lane=[[1,0],[2,0],[4,0],[8,0],[0,4]],warp=[],shape=[16,8]>
module {target = "sm_90a", list = [1, 2.5, "x\\"\\n", true], kind = f32, nothing = none, empty = [], low = -inf} {
  func @gemm(%A: view<?x8xbf16, strides=[?, 1], align=16>, %n: i32) {num_warps = 4} {
    %0 = tile.constant {value = 0} : i32
    %acc = tile.constant {value = 0.0} : tile<16x8xf32, #l0>
    %acc_1 = tile.for %k = %0 to %n step %n iter(%acc_2 = %acc) : tile<16x8xf32, #l0> {
      async.barrier
      %1 = tile.exp %acc_2 : tile<16x8xf32, #l0>
      tile.yield [%1]
    }
    %2 = tile.lt %0, %n : i1
    %3 = tile.if %2 : i32 {
      tile.yield [%n]
    } else {
      tile.yield [%0]
    }
    %4 = tile.while iter(%x = %n) : i32 {
      tile.yield [%2]
    } do(%x_1) {
      tile.yield [%x_1]
    }
    %ring = async.ring {consumers = 2} : ring<4>
    %buffer = async.alloc ring(%ring) : buffer<4 x slot<16x64xbf16, shared<128B, order=[1,0], shape=[16,64], bits=16>>>
    async.role @producer {warps = 1, single_thread = true} {
      async.acquire %ring, %0
    }
  }
}
""".replace("],lane", "], lane")
    .replace("],warp", "], warp")
    .replace("],shape", "], shape")
)


def check_round_trip(module: Module) -> None:
    for locations in (False, True):
        text = print_module(module, locations)
        again = parse_module(text)
        assert print_module(again, locations) == text


# --- round trips ------------------------------------------------------------------------------


def test_text_of_every_construct() -> None:
    module = parse_module(GEMM)
    assert print_module(module) == GEMM
    assert module.attributes["low"] == -math.inf
    assert module.attributes["kind"] is f32
    assert module.attributes["list"] == (1, 2.5, 'x"\n', True)
    assert [f.name for f in module.functions] == ["gemm"]
    verify(module)


SAMPLES: dict[Any, list[Any]] = {
    int: [0, -3, 17],
    float: [0.5, -1e-30, math.inf, math.nan, 1e16, 2],
    bool: [True, False],
    str: ["default", 'quote " back \\ line \n tab \t'],
    type(None): [None],
    tuple: [(1, 0), ()],
}


def sample_values(kind: Any) -> list[Any]:
    """Values of an annotated attribute type."""
    if kind in SAMPLES:
        return SAMPLES[kind]
    args = [a for a in typing.get_args(kind) if a is not Ellipsis]
    if typing.get_origin(kind) is tuple:
        return SAMPLES[tuple]
    return [v for a in args for v in sample_values(a)]


def sample_region(cls: type[Operation], position: int, carried: list[Value]) -> Region:
    args = [("c", v.type) for v in carried] if cls in (For, While) else []
    if cls is For:
        args.insert(0, ("i", ScalarType(i32)))
    block = Block(args)
    builder = Builder(block)
    builder.yield_([builder.constant(1, i32), *block.args])
    return Region(block)


def sample_operation(mnemonic: str, params: list[Value], variant: int) -> Operation:
    """An instance of an operation with operands, attributes and regions of every declared kind."""
    cls, fn = REGISTRY[mnemonic]
    x, y = params
    several = [y, x][: variant % 3]
    forms = {"operand": [x], "operands": several, "named": several, "optional": [y] if variant % 2 else []}
    groups = [forms[f.kind] for f in cls.operand_fields]
    hints = typing.get_type_hints(cls)
    attributes: dict[str, Any] = {} if fn is None else {"fn": fn}
    for f in cls.attribute_fields:
        values = sample_values(hints[f.name])
        if f.required or variant:
            attributes[f.name] = values[variant % len(values)]
    if "kind" in attributes:
        attributes["kind"] = "producer"
    carried = forms["operands"]
    regions = [sample_region(cls, n, carried) for n in range(len(cls.region_fields))]
    types = [TILE, ScalarType(i1), TokenType("tma")][: variant % 4]
    return cls(*groups, types=types, regions=regions, loc=[UNKNOWN, PLACE][variant % 2], **attributes)


@pytest.mark.parametrize("mnemonic", sorted(REGISTRY))
def test_every_operation_round_trips(mnemonic: str) -> None:
    block = Block([("x", ScalarType(i32)), ("", TILE)])
    for variant in range(7):
        block.append(sample_operation(mnemonic, block.args, variant))
    check_round_trip(Module([Function("f", Region(block), {"persistent": True}, PLACE)]))


@pytest.mark.parametrize(
    "type_",
    [
        *map(ScalarType, DTYPES.values()),
        TileType((), f32),
        TileType((4,), bf16),
        TILE,
        TileType((12, 2), f32, OTHER),
        ViewType((), f32, ()),
        ViewType((None, 8), bf16, (None, 1), 16),
        ViewType((3, None, 8), i32, (0, -4, None)),
        SLOT,
        BufferType(4, SLOT),
        SlotType((6, 64), bf16, SharedLayout((6, 64), 16, (1, 0), vec=8, per_phase=1, max_phase=2)),
        RingType(3),
        TokenType("bulk_store"),
    ],
    ids=str,
)
def test_types_round_trip(type_: Any) -> None:
    assert parse_type(str(type_)) == type_


def test_locations() -> None:
    block = Block([("x", ScalarType(i32))])
    block.append(Unary(block.args[0], types=[ScalarType(i32)], fn="neg", loc=PLACE))
    text = print_module(Module([Function("f", Region(block))]), locations=True)
    assert parse_module(text).functions[0].body.block.ops[0].loc == PLACE
    plain = print_module(Module([Function("f", Region(block))]))
    (op,) = parse_module(plain).functions[0].body.block.ops
    assert op.loc == UNKNOWN
    (op,) = parse_module(plain, "f.tw", text_locations=True).functions[0].body.block.ops
    assert op.loc == Location("f.tw", 3, 10)


def test_the_example_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "ir.md").read_text()
    text = page.split("```\n")[1]
    module = parse_module(text, "docs/ir.md")
    verify(module)
    assert print_module(module, locations=True) == text.replace("   // a layout's alias", "")


def test_free_form_text() -> None:
    """Line ends, comments and bare functions."""
    module = parse_module(
        """func @f(%x: i32) { %a = tile.neg %x : i32 async.barrier %b = tile.add %a,
          %x  // a comment
          : i32 async.fence }
          func @g() {}"""
    )
    assert [op.name for op in module.functions[0].body.block.ops] == [
        "tile.neg", "async.barrier", "tile.add", "async.fence",
    ]  # fmt: skip
    check_round_trip(module)


def test_sibling_regions_may_use_one_name() -> None:
    text = (
        "func @f(%x: i32, %c: i1) { tile.if %c { %a = tile.neg %x : i32 tile.yield [] } else { %a = tile.neg %x : i32 "
    )
    check_round_trip(parse_module(text + "tile.yield [] } }"))


# --- random modules ------------------------------------------------------------------------------

HINTS = st.sampled_from(["", "x", "x_1", "0", "12", "acc", "a b", "é", "1x"])
PLACES = st.sampled_from([UNKNOWN, PLACE, Location("k.py", 4, 2)])
LEAVES = st.sampled_from([None, True, False, f32, bf16, LAYOUT, SHARED, SLOT])
ATTRIBUTES = st.recursive(
    LEAVES | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


@st.composite
def modules(draw: st.DrawFn) -> Module:
    functions = [Function(f"f{n}", Region(draw(blocks())), {}, draw(PLACES)) for n in range(draw(st.integers(0, 2)))]
    names = st.from_regex(r"[a-z_]\w{0,5}", fullmatch=True)
    return Module(functions, draw(st.dictionaries(names, ATTRIBUTES, max_size=3)))


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    block = Block([(draw(HINTS), ScalarType(i32)), (draw(HINTS), ScalarType(i1)), (draw(HINTS), TILE)])
    fill(draw, Builder(block), list(block.args), depth=2)
    return block


def fill(draw: st.DrawFn, builder: Builder, scope: list[Value], depth: int) -> None:
    """Random operations on the values in ``scope``, which grows."""
    for _ in range(draw(st.integers(0, 4))):
        builder.loc = draw(PLACES)
        kind = draw(st.integers(0, 7 if depth else 4))
        new = [operation(draw, builder, scope, kind)] if kind < 5 else control(draw, builder, scope, kind, depth - 1)
        for value in new:
            value.hint = draw(HINTS)
        scope += new


def operation(draw: st.DrawFn, builder: Builder, scope: list[Value], kind: int) -> Value:
    tile = draw(st.sampled_from([v for v in scope if v.type == TILE]))
    scalar = draw(st.sampled_from([v for v in scope if v.type == ScalarType(i32)]))
    if kind == 0:
        return builder.constant(draw(st.floats(allow_nan=False)), TILE)
    if kind == 1:
        return builder.binary(draw(st.sampled_from(["add", "max"])), tile, tile)
    if kind == 2:
        return builder.constant(draw(st.integers(-5, 5)), i32)
    if kind == 3:
        return builder.convert(tile, LAYOUT)
    return builder.binary("mod", scalar, scalar)


def control(draw: st.DrawFn, builder: Builder, scope: list[Value], kind: int, depth: int) -> list[Value]:
    scalars = [v for v in scope if v.type == ScalarType(i32)]
    inits = draw(st.lists(st.sampled_from(scope), max_size=2))
    flag = next(v for v in scope if v.type == ScalarType(i1))
    op: Any
    if kind == 5:
        op = builder.for_loop(scalars[0], scalars[-1], scalars[0], inits, ["i"])
        inside(draw, builder, op.body.block, scope, depth, inits)
    elif kind == 6:
        op = builder.if_else(flag, [v.type for v in inits])
        for region in op.regions:
            inside(draw, builder, region.block, scope, depth, inits)
    else:
        op = builder.while_loop(inits)
        inside(draw, builder, op.condition.block, scope, depth, [flag])
        inside(draw, builder, op.body.block, scope, depth, inits)
    return op.results


def inside(draw: st.DrawFn, builder: Builder, block: Block, scope: list[Value], depth: int, like: list[Value]) -> None:
    inner = [*scope, *block.args]
    with builder.at(block):
        fill(draw, builder, inner, depth)
        builder.yield_([draw(st.sampled_from([v for v in inner if v.type == x.type])) for x in like])


QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(modules())
def test_random_modules_round_trip(module: Module) -> None:
    verify(module)
    check_round_trip(module)
    again = parse_module(print_module(module, True))
    verify(again)
    assert [(op.name, op.loc) for op in again.walk()] == [(op.name, op.loc) for op in module.walk()]


PIECES = re.findall(r"\w+(?:\.\w+)*|\s+|.", GEMM)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_mutated_text_gives_only_parse_errors(data: st.DataObject) -> None:
    pieces = list(PIECES)
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(pieces) - 1))
        pieces[where] = data.draw(st.just("") | st.sampled_from(PIECES) | st.text(max_size=3))
    with contextlib.suppress(IRError):
        module = parse_module("".join(pieces))
        verify(module)
        print_module(module)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='%@#{}[]()<>=:,."x1 \n-?', max_size=30))
def test_noise_gives_only_parse_errors(text: str) -> None:
    for source in (text, f"func @f() {{ {text} }}", f"func @f(%x: {text}) {{}}"):
        with contextlib.suppress(ParseError):
            parse_module(source)


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "place", "message"),
    [
        ("%a = tile.addd %x, %x : i32", (2, 8), "unknown operation 'tile.addd'.*\n.*\n.*\n.*did you mean tile.add"),
        ("%a = tile.add %x, %yy : i32", (2, 21), "unknown value %yy"),
        ("%x = tile.neg %x : i32", (2, 3), "%x is already defined"),
        ("%a,\n %a = tile.neg %x : i32, i32", (3, 2), "%a is already defined"),
        ("%a = tile.add %x : i32", (2, 8), "wrong operands: expected 'tile.add %lhs, %rhs'"),
        ("tile.store %x, %x, %x", (2, 3), r"expected 'tile.store %view, \[%index, ...\], %value'"),
        ("async.alloc ringg(%x)", (2, 3), r"expected 'async.alloc ring\(%...\)'"),
        ("%a = tile.neg %x", (2, 8), "the type of %a is missing"),
        ("%a = tile.neg %x : i32, i32", (2, 22), "1 results but 2 types"),
        ("%a = tile.neg %x : i33", (2, 22), "unknown element type i33"),
        ("%a = tile.neg %x : tile<4x4xf32, #l7>", (2, 22), "unknown layout #l7"),
        ("%a = tile.neg %x : tile<4x4xf32, linear<shape=[4>>", (2, 22), "bad type"),
        ("%a = tile.neg %x : tile<4x4xf32 16>", (2, 35), "unexpected"),
        ("%a = tile.constant {vlaue = 3} : i32", (2, 23), "no attribute 'vlaue'.*\n.*\n.*\n.*did you mean value"),
        ("%a = tile.constant : i32", (2, 8), "needs the attribute 'value'"),
        ("%a = tile.constant {value = 1, value = 2} : i32", (2, 34), "given twice"),
        ("%a = tile.constant {value = yes} : i32", (2, 31), "unknown attribute value 'yes'"),
        ("tile.yield [] {", (2, 18), "the text ends too early"),
        ("tile.neg %x {}", (2, 3), "takes no region"),
        ("tile.if %x { }", (2, 3), r"takes {...} else {...}"),
        ("tile.for %i = %x to %x step %x { } else { }", (2, 3), r"takes {...}"),
        ("tile.while iter(%i = %x) { } do() { }", (2, 3), "0 names for 1 carried values"),
        ("tile.for %i = %x to %x step %x { %y = tile.neg %x : i32 }\n tile.neg %y", (3, 11), "region that has ended"),
        ("$", (2, 3), r"unexpected '\$'"),
    ],
)
def test_errors_show_the_place(body: str, place: tuple[int, int], message: str) -> None:
    text = f"func @f(%x: i32) {{\n  {body}" + ("" if "early" in message else "\n}")
    with pytest.raises(ParseError, match=message) as caught:
        parse_module(text, "k.tw")
    error = caught.value
    assert (error.loc.file, error.loc.line, error.loc.column) == ("k.tw", *place)
    shown = str(error).split("\n")
    assert shown[0].startswith(f"k.tw:{place[0]}:{place[1]}: ")
    assert shown[1] == "  " + text.split("\n")[place[0] - 1] == "  " + error.source_line
    assert shown[2] == " " * (place[1] + 1) + "^"


@pytest.mark.parametrize("text", ["", "module", "module {}}", "func @f() {} func @f() {}", "#l0 = linear<shape=[3]>"])
def test_files_that_are_none(text: str) -> None:
    with pytest.raises(ParseError):
        parse_module(text)


def test_deep_nesting_is_an_error() -> None:
    with pytest.raises(ParseError, match="nested too deeply"):
        parse_module("func @f(%c: i1) {" + "tile.if %c {" * 2000 + "} else {}" * 2000 + "}")
