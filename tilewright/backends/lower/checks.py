"""Lowering of `tile.print`, `tile.assert` and `tile.assume`."""

from __future__ import annotations

from functools import reduce

from tilewright.backends.lower.context import Lowering, lowers
from tilewright.backends.lower.coordinates import TileCoordinates, sole_holder
from tilewright.backends.lower.memory import run_if
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir import check_ops
from tilewright.ir.async_ops import Role
from tilewright.ir.core import Operation, Region
from tilewright.ir.tile_ops import For
from tilewright.ir.types import DType, TileType, element_type, f32, f64, i1, i32, i64

_CONVERSION = {"i64": "%lld", "f64": "%g", "f32": "%g"}


@lowers(check_ops.Print)
def lower_print(lw: Lowering, op: check_ops.Print) -> None:
    parts = [part.replace("%", "%%") for part in check_ops.text_parts(op.text)]
    dtypes = [element_type(value.type) for value in op.values]
    conversions = [_CONVERSION.get(dtype.name, "%d") for dtype in dtypes]
    text = parts[0] + "".join(c + part for c, part in zip(conversions, parts[1:], strict=True)) + "\n"
    tiles = [value for value in op.values if isinstance(value.type, TileType)]
    if not tiles:
        scalars = [_promoted(lw, lw.scalar(v), d) for v, d in zip(op.values, dtypes, strict=True)]
        first = lw.fb.icmp("eq", lw.scope.thread, 0)
        run_if(lw, first, lambda: lw.ops.print_line(lw, text, scalars))
        return
    layout = lw.layout(tiles[0])
    groups = [lw.registers(value) for value in op.values]
    holder = sole_holder(lw, layout)
    coordinates = TileCoordinates(lw, layout)
    text = f"[{', '.join(['%d'] * layout.rank)}] {text}"

    def lines() -> None:
        own, seen = coordinates.fresh(), set()
        for register, place in enumerate(layout.table("register").tolist()):
            if tuple(place) not in seen:
                seen.add(tuple(place))
                where = [lw.index.value(own.of(register, axis)) for axis in range(layout.rank)]
                values = [_promoted(lw, g[register], d) for g, d in zip(groups, dtypes, strict=True)]
                lw.ops.print_line(lw, text, [*where, *values])

    run_if(lw, holder, lines)


def _promoted(lw: Lowering, value: mlir.Value, dtype: DType) -> mlir.Value:
    """As C passes it to a function of any arguments: i32, i64 or double."""
    fb, types = lw.fb, lw.fb.types
    if dtype in (f64, i64, i32):
        return value
    if dtype == f32:
        return fb.fpext(value, types.f64)
    if dtype.is_float:
        raise lw.error(f"print of {dtype}: cast to f32 first")
    return fb.zext(value, types.i32) if dtype == i1 else fb.sext(value, types.i32)


@lowers(check_ops.Assert)
def lower_assert(lw: Lowering, op: check_ops.Assert) -> None:
    distinct = list(dict.fromkeys(lw.registers(op.condition)))
    holds = reduce(lw.fb.and_, distinct)
    file, line = op.loc.file, op.loc.line
    text = "assertion failed" + (f": {op.text}" if op.text else "")
    run_if(lw, lw.fb.not_(holds), lambda: lw.ops.fail(lw, text, file, line))


@lowers(check_ops.Assume)
def lower_assume(lw: Lowering, op: check_ops.Assume) -> None:
    condition = lw.scalar(op.condition)
    lw.fb.intrinsic("llvm.assume", None, [condition])
    fact = check_ops.promised_multiple(op.condition)
    if fact is not None and _always_runs(lw, op):
        value, divisor = fact
        lw.assume_multiple(lw.scalar(value), divisor)


def _always_runs(lw: Lowering, op: Operation) -> bool:
    """Whether the operation stands outside conditionals and loops, the one over a persistent block's programs apart."""
    block = op.parent
    while block is not None and block is not lw.function.body.block:
        region = block.parent
        owner = region.parent if isinstance(region, Region) else None
        persistent = isinstance(owner, For) and bool(lw.function.attributes.get("persistent")) and _outermost(lw, owner)
        if not isinstance(owner, Operation) or not (isinstance(owner, Role) or persistent):
            return False
        block = owner.parent
    return True


def _outermost(lw: Lowering, loop: For) -> bool:
    block = loop.parent
    if block is None or block is lw.function.body.block:
        return True
    region = block.parent
    return isinstance(region, Region) and isinstance(region.parent, Role)
