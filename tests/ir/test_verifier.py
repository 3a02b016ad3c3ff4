"""The verifier: each rule of the IR, broken once."""

from __future__ import annotations

from typing import Any

import pytest

from tilewright.ir.async_ops import Role
from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, IRError, Location, Module, Operation, Region, Value
from tilewright.ir.layout import LinearLayout
from tilewright.ir.parser import parse_module
from tilewright.ir.tile_ops import Binary, Constant, For, Iota, Unary, Yield
from tilewright.ir.types import ScalarType, TileType, f32, i1, i32
from tilewright.ir.verifier import verify

HERE = Location("kernel.py", 7, 3)
I32 = ScalarType(i32)


def kernel() -> tuple[Builder, Value, Value]:
    """A builder in an empty function with an i32 and an i1 parameter."""
    block = Block([("x", I32), ("c", ScalarType(i1))])
    Function("f", Region(block))
    return Builder(block, HERE), block.args[0], block.args[1]


def broken(builder: Builder, message: str) -> IRError:
    function = builder.block.parent.parent if builder.block.parent else None
    assert isinstance(function, Function)
    with pytest.raises(IRError, match=message) as caught:
        verify(Module([function]))
    return caught.value


def put(builder: Builder, op: Operation) -> Operation:
    return builder.insert(op)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("%a = tile.exp %x : i32", "needs a float"),
        ("%a = tile.add %x, %c : i32", "operand types differ"),
        ("%t = tile.constant {value = 1} : tile<4xf32> %a = tile.reduce.sum %t {axis = 1} : f32", "out of range"),
        ("tile.yield [] %a = tile.neg %x : i32", "not the last operation"),
        ("tile.yield []", "passes no values on, but ends in 'tile.yield'"),
        ("tile.if %c { } else { tile.yield [] }", "a region of 'tile.if' does not end in 'tile.yield'"),
        ("tile.if %c { %a = tile.neg %x : i32 } else { tile.yield [] }", "does not end in 'tile.yield'"),
        ("%a = tile.if %c : i32 { tile.yield [] } else { tile.yield [%x] }", "both branches yield"),
        ("%a = tile.for %i = %x to %x step %x iter(%y = %x) : i32 { tile.yield [%c] }", "yielded values"),
        ("tile.for %i = %x to %c step %x { tile.yield [] }", "bounds have the index's type"),
        ("tile.while iter(%i = %x) { tile.yield [%c] } do(%j) { tile.yield [%j] }", "results have"),
        ("%a = tile.while iter(%i = %x) : i32 { tile.yield [%x] } do(%j) { tile.yield [%j] }", "yields i1"),
        ("async.role @a {warps = 4} { tile.yield [] }", "passes no values on"),
        ("async.role @a {warps = 4} { async.role @b {warps = 4} { } }", "@b stands inside another role"),
        ("tile.if %c { async.role @a {warps = 4} { } tile.yield [] } else { tile.yield [] }", "inside control flow"),
        ("async.role @a {warps = 0} { }", "0 warps"),
        ("%a = tile.constant {value = \"1\"} : i32", "attribute 'value' cannot be '1'"),
        ("%t = tile.constant {value = 1} : tile<4x2xf32> %u = tile.transpose %t {perm = 1} : tile<2x4xf32>", "'perm'"),
        ("%a = tile.program_id {axis = true} : i32", "attribute 'axis' cannot be True"),
        ("tile.neg %x", "has 0 results, not 1"),
        ("%a, %b = tile.neg %x : i32, i32", "has 2 results, not 1"),
        ("%a = tile.splat %x : i32", "gives a tile"),
        ("%a = tile.constant {value = 1} : tile<0xf32>", "empty dimension"),
        ("%a = async.alloc : buffer<1 x slot<8x64xbf16, shared<none, order=[1,0], shape=[16,64], bits=16>>>", "layout"),
        ("%a = async.alloc : buffer<1 x slot<8x64xf32, shared<none, order=[1,0], shape=[8,64], bits=16>>>", "16 bits"),
    ],
)  # fmt: skip
def test_rules_on_text(body: str, message: str) -> None:
    module = parse_module(f"func @f(%x: i32, %c: i1) {{\n{body}\n}}", "k.tw", text_locations=True)
    with pytest.raises(IRError, match=message) as caught:
        verify(module)
    assert caught.value.loc.file == "k.tw" and caught.value.loc.line == 2


def test_use_before_definition() -> None:
    b, x, _ = kernel()
    op = Unary(x, types=[I32], fn="neg", loc=HERE, hints=["late"])
    put(b, Unary(op.result, types=[I32], fn="neg", loc=HERE))
    put(b, op)
    assert broken(b, "'tile.neg': uses %late before it is defined").loc == HERE


def test_use_out_of_a_region() -> None:
    b, x, c = kernel()
    branch = b.if_else(c)
    with b.at(branch.then_body.block):
        inner = b.unary("neg", x)
        b.yield_()
    with b.at(branch.else_body.block):
        b.yield_()
    b.unary("neg", inner)
    broken(b, "whose region of 'tile.if' has ended")


def test_use_out_of_a_role() -> None:
    b, x, _ = kernel()
    role = put(b, Role(kind="producer", warps=1, regions=[Region()], loc=HERE))
    with b.at(role.regions[0].block):
        inner = b.unary("neg", x)
    other = put(b, Role(kind="consumer", warps=4, regions=[Region()], loc=HERE))
    with b.at(other.regions[0].block):
        b.unary("neg", inner)
    broken(b, "of async.role @producer; what a role computes stays inside it")


def test_use_of_another_functions_value() -> None:
    b, _, _ = kernel()
    other, y, _ = kernel()
    b.unary("neg", y)
    broken(b, "before it is defined")
    verify(Module([other.block.parent.parent]))  # type: ignore[union-attr, list-item]


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (lambda x: Unary(None, types=[I32], fn="neg"), "operand 'source' stands for 0 values"),
        (lambda x: Unary([x, x], types=[I32], fn="neg"), "operand 'source' stands for 2 values"),
        (lambda x: Unary(x, x, types=[I32], fn="neg"), "has 2 operand groups"),
        (lambda x: Unary(x, types=[I32], fn="negate"), "none of neg, abs"),
        (lambda x: Binary(x, x, types=[], fn="add"), "has 0 results"),
        (lambda x: Constant(types=[I32]), "needs the attribute 'value'"),
        (lambda x: Constant(types=[I32], value=1, colour="red"), "has no attribute 'colour'"),
        (lambda x: For(x, x, x, []), "has 0 regions"),
        (lambda x: For(x, x, x, [], regions=[Region(Block([]))]), "body takes 0 arguments"),
        (lambda x: Unary(x, types=[I32], regions=[Region()], fn="neg"), "has 1 regions, not 0"),
        (lambda x: Iota(types=[I32]), "makes a rank-1 int tile"),
        (lambda x: Iota(types=["i32"]), "is not a type"),
    ],
)
def test_declarations(op: Any, message: str) -> None:
    b, x, _ = kernel()
    put(b, op(x)).loc = HERE
    error = broken(b, message)
    assert error.loc == HERE


def test_links() -> None:
    b, x, _ = kernel()
    op = put(b, Unary(x, types=[I32], fn="neg"))
    b.block.ops.append(op)
    broken(b, "twice")
    b, x, _ = kernel()
    put(b, Unary(x, types=[I32], fn="neg")).parent = None
    broken(b, "its parent is another block")
    b, x, _ = kernel()
    put(b, Unary(x, types=[I32], fn="neg")).results = [x]
    broken(b, "a result belongs to another operation")


def test_layout_of_another_shape() -> None:
    layout = LinearLayout.make({"register": [(1,)], "lane": []}, (2,))
    b, _, _ = kernel()
    put(b, Constant(types=[TileType((4,), f32, layout)], value=0.0))
    broken(b, r"has a layout for shape \[2\]")


def test_malformed_operations_give_ir_errors() -> None:
    """Checks of an operation that trip over what they check are still errors of the IR."""
    b, x, _ = kernel()
    put(b, Yield([x]))
    b.block.ops.clear()
    b.load(parse_module("func @f(%v: view<4xf32, strides=[1], align=4>) {}").functions[0].params[0], [x], (4,))
    broken(b, "before it is defined")
    module = parse_module("func @f(%x: i32) { %t = tile.load %x, [%x] : tile<4xf32> }")
    with pytest.raises(IRError, match="'tile.load': expected a view, got i32"):
        verify(module)


def test_two_functions_of_one_name() -> None:
    module = parse_module("func @f() {} func @g() {}")
    module.functions[1].name = "f"
    with pytest.raises(IRError, match="two functions are named @f"):
        verify(module)
