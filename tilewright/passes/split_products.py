"""split-products: float32 products of float32 accuracy on the asynchronous matrix unit, as three tf32 products.

With a = a1 + a2 and b = b1 + b2, where a1 and b1 are rounded to tf32, ``a b = a2 b1 + a1 b2 + a1 b1`` but for a2 b2,
which is below float32's precision. The unit reads b from shared memory along K, so the warps write both parts of it
there; the parts of a stay in registers. The unit truncates its sums: the product of two steps is summed up from zero
and added to the accumulator by the vector unit, which rounds. Where a loop only accumulates, its steps go in pairs,
and what the next product needs is made while the unit works on this one::

    async.wait pending = 3                    // the last even product; the last odd one still runs
    async.barrier                             // everybody's has read %parts[0]
    %b1, %b2 -> %parts[0]
    %t1, ... = async.wait [%t, %a1, %a2]      // the last odd product
    async.barrier                             // everybody has written %parts[0], and nobody reads %parts[1] any more
    %acc1 = tile.add %acc, %t1
    %t2 = a2 b1 + a1 b2 + a1 b1               // even: issued
    %b1', %b2' -> %parts[1]
    async.barrier                             // everybody has written
    %t3 = %t2 + a2' b1' + a1' b2' + a1' b1'   // odd: issued behind it
"""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.ir.async_ops import Alloc, Barrier, LocalStore, Release, Role, buffer_of
from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, IRError, Value, replace_uses, uses_of
from tilewright.ir.layout import LinearLayout, SharedLayout
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Dot, For, Yield
from tilewright.ir.types import BufferType, RingType, SlotType, TileType, f32, i32
from tilewright.passes.copy_layouts import turning_layouts
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import MatrixUnit, matrix_unit, operand_shape, result_type
from tilewright.passes.prefetch import carry
from tilewright.passes.unroll import Copy, in_pairs

#: how many products make up one of float32
PRODUCTS = 3
#: tf32 has 10 of float32's 23 bits of mantissa: half of the last one, and the bits that stay
HALF, KEPT = 1 << 12, -(1 << 13)


@register_pass("split-products")
class SplitProducts(FunctionPass):
    """Rewrites dots of precision ``3xtf32`` of functions that are scheduled with roles."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        dots = [op for op in function.walk() if isinstance(op, Dot) and op.precision == "3xtf32"]
        if not dots or not any(isinstance(op, Role) for op in function.walk()):
            return
        unit = matrix_unit(context.target, function)
        if not unit.asynchronous:
            return
        for dot in dots:
            _Split(function, dot, unit, context.target).run()


@dataclass
class _Split:
    """One dot."""

    function: Function
    dot: Dot
    unit: MatrixUnit
    target: Target

    def run(self) -> None:
        loop = self._accumulating_loop()
        first, second = (self._buffer(2 if loop is not None else 1) for _ in range(2))
        if loop is None:
            self._at_once(self.dot, first, second)
            return
        even, odd, rest = (_dot_of(copy, self.dot) for copy in in_pairs(self.function, loop))
        self._in_turn(even, odd, first, second)
        self._at_once(rest, first, second)

    def _accumulating_loop(self) -> For | None:
        """The loop around the dot if it carries the accumulator, untouched, to the next iteration."""
        dot, block = self.dot, self.dot.parent
        loop = block.parent.parent if block is not None and block.parent is not None else None
        if block is None or not isinstance(loop, For) or dot.acc not in loop.carried:
            return None
        uses, terminator = uses_of(self.function.body), block.terminator
        assert isinstance(terminator, Yield)
        position = loop.carried.index(dot.acc)
        alone = uses[dot.acc] == [dot] and uses[dot.result] == [terminator]
        return loop if alone and terminator.values[position] is dot.result else None

    def _buffer(self, stages: int) -> Value:
        layout = self.unit.shared("b", self.dot, 0, int(self.function.attributes["num_warps"]))
        if layout is None:
            raise IRError("operand b is too narrow for shared memory", self.dot.loc, "make K a multiple of 8")
        slot = SlotType(operand_shape(self.dot, "b"), f32, layout)
        top = Builder(self.function.body.block, self.dot.loc)
        with top.at(self.function.body.block, 0):
            return top.insert(Alloc(None, types=[BufferType(stages, slot)], hints=["parts"])).result

    # --- the two forms ------------------------------------------------------------------------------

    def _at_once(self, dot: Dot, first: Value, second: Value) -> None:
        block = dot.parent
        assert block is not None
        b = Builder(block, dot.loc)
        with b.at(block, block.ops.index(dot)):
            zero = b.index(0)
            parts = b.slot(first, zero), b.slot(second, zero)
            b.insert(Barrier(scope="role"))  # the parts of the last time have been read
            self._write_right(b, dot, *parts)
            b.insert(Barrier(scope="role"))
            left = split(b, self._left(b, dot))
            (waited,) = b.wait([_issue(b, left, parts, _zeros(b, dot))])
            result = b.add(dot.acc, waited)
        block.ops.remove(dot)
        replace_uses(self.function.body, {dot.result: result})

    def _in_turn(self, even: Dot, odd: Dot, first: Value, second: Value) -> None:
        """The two dots of a loop over pairs: ``even`` adds to the accumulator, ``odd`` to the result of ``even``."""
        block = even.parent
        assert block is not None and block is odd.parent and odd.acc is even.result and block.parent is not None
        loop = block.parent.parent
        assert isinstance(loop, For) and loop.parent is not None
        outer, position = loop.parent, loop.carried.index(even.acc)
        b = Builder(block, even.loc)
        with b.at(outer, outer.ops.index(loop)):
            nothing = _zeros(b, even)
            b.insert(Barrier(scope="role"))  # the parts of the last time have been read
        flying = carry(loop, nothing, "product")
        with b.at(block, block.ops.index(even)):
            parts = b.slot(first, b.index(0)), b.slot(second, b.index(0))
            total, product = self._even(b, even, parts, flying)
        with b.at(block, block.ops.index(odd)):
            parts = b.slot(first, b.index(1)), b.slot(second, b.index(1))
            product = self._odd(b, odd, parts, product)
        for dot in (even, odd):
            block.ops.remove(dot)
        _release_early(block)
        terminator = block.terminator
        assert isinstance(terminator, Yield)
        values = list(terminator.values)
        values[position] = total
        terminator.values = [*values, product]
        with b.at(outer, outer.ops.index(loop) + 1):
            (waited,) = b.wait([loop.results[-1]])
            result = b.add(loop.results[position], waited)
        for op in self.function.walk():
            if op is not result.op:
                op.replace_operands({loop.results[position]: result})

    def _even(self, b: Builder, dot: Dot, parts: tuple[Value, Value], flying: Value) -> tuple[Value, Value]:
        """The accumulator with the product of the last pair, which is ``flying``; the product of this step, issued."""
        left = self._left(b, dot)
        b.wait(pending=PRODUCTS)  # the last even product has read its registers
        b.insert(Barrier(scope="role"))  # and its parts, everybody's
        self._write_right(b, dot, *parts)
        big, small = split(b, left)
        waited, big, small = b.wait([flying, big, small])
        b.insert(Barrier(scope="role"))
        return b.add(dot.acc, waited), _issue(b, (big, small), parts, _zeros(b, dot))

    def _odd(self, b: Builder, dot: Dot, parts: tuple[Value, Value], product: Value) -> Value:
        """The product of this step, issued behind that of the even step, which goes on."""
        left = self._left(b, dot)
        self._write_right(b, dot, *parts)
        big, small = b.wait(split(b, left), pending=PRODUCTS)  # pinned: made before they are issued
        b.insert(Barrier(scope="role"))
        return _issue(b, (big, small), parts, product)

    # --- operands -----------------------------------------------------------------------------------

    @property
    def warps(self) -> int:
        return int(self.function.attributes["num_warps"])

    def _left(self, b: Builder, dot: Dot) -> Value:
        """Operand a in registers."""
        if isinstance(dot.a.type, TileType):
            return dot.a
        return b.local_load(dot.a, self.unit.operand("a", dot, self.warps))

    def _write_right(self, b: Builder, dot: Dot, first: Value, second: Value) -> None:
        """Both parts of operand b into shared memory, along K."""
        value, layout = dot.b, None
        if isinstance(value.type, SlotType):
            source, target = value.type.layout, _slot_layout(first)
            layouts = turning_layouts(source, target, self.warps, self.target.warp_size, self.target.banks)
            value, layout = b.local_load(value, layouts.load), layouts.store
        for part, slot in zip(split(b, value), (first, second), strict=True):
            b.insert(LocalStore(_in_layout(b, part, layout), slot))


def _dot_of(copy: Copy, dot: Dot) -> Dot:
    found = copy[dot.result].op
    assert isinstance(found, Dot)
    return found


def _slot_layout(slot: Value) -> SharedLayout:
    assert isinstance(slot.type, SlotType)
    return slot.type.layout


def _zeros(b: Builder, dot: Dot) -> Value:
    return b.constant(0.0, result_type(dot))


def _issue(b: Builder, left: tuple[Value, Value], right: tuple[Value, Value], product: Value) -> Value:
    """The products of one step added to ``product``, smallest first."""
    (big, small), (first, second) = left, right
    for a, part in ((small, first), (big, second), (big, first)):
        product, _ = b.async_dot(a, part, product)
    return product


def _release_early(block: Block) -> None:
    """Give stages back once they are in registers: the warps meet there while products still run."""
    for release in [op for op in block.ops if isinstance(op, Release)]:
        before = block.ops[: block.ops.index(release)]
        reads = [n for n, op in enumerate(before) if any(_ring_of(v) is release.ring for v in op.operands)]
        block.ops.remove(release)
        block.ops.insert(reads[-1] + 1, release)


def _ring_of(value: Value) -> Value | None:
    """The ring whose stage a slot is; that of an await itself."""
    if isinstance(value.type, RingType):
        return value
    buffer = buffer_of(value) if isinstance(value.type, SlotType) else None
    return buffer.op.ring if buffer is not None and isinstance(buffer.op, Alloc) else None


def _in_layout(b: Builder, value: Value, layout: LinearLayout | None) -> Value:
    assert isinstance(value.type, TileType)
    return value if layout is None or value.type.layout == layout else b.convert(value, layout)


def split(b: Builder, value: Value) -> tuple[Value, Value]:
    """A tf32 value and what is left of the float32 value, exactly.

    The unit ignores the low 13 bits of the rest. Its sign is random, as the first value is rounded to nearest, so
    this adds no bias; it is below 2^-21 of the value.
    """
    big = rounded(b, value)
    return big, b.sub(value, big)


def rounded(b: Builder, value: Value) -> Value:
    """The nearest tf32 value, ties away from zero (what ``cvt.rna.tf32.f32`` does)."""
    bits = b.bitcast(value, i32)
    half, kept = b.constant(HALF, bits.type), b.constant(KEPT, bits.type)
    return b.bitcast(b.binary("and", b.add(bits, half), kept), f32)
