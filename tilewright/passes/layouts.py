"""layouts: give every tile a layout, and insert conversions where neighbours disagree.

Values that elementwise operations, loops and conditionals tie together form a class with one layout.
Layouts that an earlier pass has set stand, and matrix accumulators and operands fix theirs; each choice spreads
through reductions, broadcasts and transpositions. What is left and meets memory is decided by cost: among the
layouts that one of the loads and stores in reach would like, the one with the fewest cycles for all of them,
conversions included (`layout_costs`). The rest gets a plain blocked layout.

Then every load and store goes its cheapest way: in the layout of its class, or in a coalesced one with a conversion.
"""

from __future__ import annotations

from collections.abc import Callable

from tilewright.ir.async_ops import Alloc, AsyncDot, Copy, LocalLoad, MakeRing, Role, Wait
from tilewright.ir.builder import Builder
from tilewright.ir.check_ops import Print
from tilewright.ir.cluster_ops import ClusterReduce
from tilewright.ir.comm_ops import Put, ReducePut
from tilewright.ir.core import Function, Operation, Value, uses_of
from tilewright.ir.indexed_ops import Atomic, Gather, Scatter
from tilewright.ir.layout import LinearLayout, blocked, conversion_cost
from tilewright.ir.packet_ops import Receive, Send, packed
from tilewright.ir.scratch import scan_bits
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import (
    Binary,
    Bitcast,
    Broadcast,
    Cast,
    Cat,
    Compare,
    Dot,
    ExpandDims,
    Extract,
    For,
    If,
    Iota,
    Load,
    Reduce,
    Reshape,
    Scan,
    Select,
    Store,
    Transpose,
    Unary,
    While,
    tile_of,
    yielded,
)
from tilewright.ir.types import BufferType, TileType, ViewType
from tilewright.passes.analysis import enclosing_operations
from tilewright.passes.cat_layouts import CatLayouts, cat_layouts, joined, part_layouts, part_of
from tilewright.passes.layout_costs import Access, best_access, reduction_cost
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import MatrixUnit, matrix_unit
from tilewright.passes.staging import may_stage
from tilewright.passes.warp_count import default_warps, values_of

#: how many times the body of a loop is thought to run
LOOP_WEIGHT = 8


@register_pass("layouts")
class Layouts(FunctionPass):
    """Sets the layout of every tile type and, where it is still open, ``num_warps``."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        _separate_indices(function)
        if "num_warps" not in function.attributes:
            function.attributes["num_warps"] = context.options.num_warps or default_warps(function, context.target)
        warps = int(function.attributes["num_warps"])
        function.attributes.setdefault("threads", warps * context.target.warp_size)
        if any(isinstance(v.type, TileType) for v in values_of(function.body)):
            _Assignment(function, context.target, warps).run()


def _separate_indices(function: Function) -> None:
    """Each use of `tile.iota` gets its own: it costs nothing in any layout, and the same numbers may count the rows
    of a tile here and its columns there."""
    uses = uses_of(function.body)
    for op in [op for op in function.walk() if isinstance(op, Iota)]:
        for user in list(dict.fromkeys(uses.get(op.result, [])))[1:]:
            copy = op.clone({})
            assert op.parent is not None
            op.parent.insert(op.parent.ops.index(op) + 1, copy)
            user.replace_operands({op.result: copy.results[0]})


class _Assignment:
    """Classes of values, their layouts, and the rules that spread layouts between classes."""

    def __init__(self, function: Function, target: Target, warps: int):
        self.function, self.target, self.warps = function, target, warps
        self.parent: dict[Value, Value] = {}
        self.layout: dict[Value, LinearLayout] = {}
        self.ops = [op for op in function.walk() if not isinstance(op, Role)]
        has_dots = any(isinstance(op, Dot | AsyncDot) for op in self.ops)
        self.unit: MatrixUnit | None = matrix_unit(target, function) if has_dots else None
        self.loops = enclosing_operations(function)
        self.accesses: list[Access] = []

    def _is_open(self, access: Access) -> bool:
        """Whether the layout of a load or store is to be decided here: not by earlier passes, nor by `staging`.

        Staging takes results of the matrix unit, whose layouts are known by now; a tile from memory has none.
        """
        if isinstance(access.op, Load):
            return access.tile.layout is None
        in_role = any(isinstance(op, Role) for op in self.loops.values())
        staged = in_role and isinstance(access.op, Store | Put) and may_stage(access.op, self.target)
        return not (staged and self.known(access.value))

    def run(self) -> None:
        for op in self.ops:
            self._tie(op)
        for value in values_of(self.function.body):
            if isinstance(value.type, TileType) and value.type.layout is not None:
                self._assign(value, value.type.layout)  # fixed by an earlier pass
        for op in self.ops:
            self._matrix_anchor(op)
        self._spread()
        found = (Access.of(op, self.warps, self.target) for op in self.ops)
        self.accesses = [access for access in found if access and self._is_open(access)]
        anchors = (
            self._operand_anchor,
            self._cat_anchor,
            self._cheapest_anchor,
            self._memory_anchor,
            self._default_anchor,
        )
        for anchor in anchors:
            for op in self.ops:
                anchor(op)
                self._spread()
        for value in values_of(self.function.body):
            if isinstance(value.type, TileType):
                value.type = value.type.with_layout(self.of(value))
        for op in list(self.function.walk()):
            self._convert(op)
        for access in self.accesses:
            self._route(access)

    # --- classes --------------------------------------------------------------------------------

    def find(self, value: Value) -> Value:
        """The representative of a value's class."""
        root = value
        while root in self.parent:
            root = self.parent[root]
        while value is not root:
            self.parent[value], value = root, self.parent[value]
        return root

    def _union(self, *values: Value) -> None:
        tiles = [v for v in values if isinstance(v.type, TileType)]
        for other in tiles[1:]:
            a, b = self.find(tiles[0]), self.find(other)
            if a is not b:
                self.parent[b] = a

    def _tie(self, op: Operation) -> None:
        if isinstance(op, Unary | Binary | Compare | Select | Cast | Bitcast):
            self._union(op.result, *op.operands)
        elif isinstance(op, ClusterReduce):
            self._union(op.result, op.source)
        elif isinstance(op, For):
            for result, arg, init, value in zip(op.results, op.carried, op.inits, yielded(op.body), strict=True):
                self._union(result, arg, init, value)
        elif isinstance(op, While):
            carried = zip(op.results, op.inits, op.condition.block.args, op.body.block.args, strict=True)
            for group, value in zip(carried, yielded(op.body), strict=True):
                self._union(*group, value)
        elif isinstance(op, If):
            for choice in zip(op.results, yielded(op.then_body), yielded(op.else_body), strict=True):
                self._union(*choice)
        elif isinstance(op, Dot | AsyncDot):
            self._union(op.results[0], op.acc)
        elif isinstance(op, Scan | Gather | Scatter | Atomic | Print):  # views are no tiles and stay out
            self._union(*op.results, *op.operands)
        elif isinstance(op, Wait):
            for value, result in zip(op.values, op.results, strict=True):
                self._union(value, result)

    def of(self, value: Value) -> LinearLayout:
        """The layout of a value's class."""
        return self.layout[self.find(value)]

    def known(self, value: Value) -> bool:
        return self.find(value) in self.layout

    def _assign(self, value: Value, layout: LinearLayout) -> None:
        if not self.known(value):
            self.layout[self.find(value)] = layout

    # --- anchors ----------------------------------------------------------------------------------

    def _matrix_anchor(self, op: Operation) -> None:
        if isinstance(op, Dot | AsyncDot) and self.unit is not None:
            self._assign(op.acc, self.unit.result(op, self.warps))

    def _operand_anchor(self, op: Operation) -> None:
        """Tiles read from shared memory for a matrix operand, cast or not, arrive in the operand's layout."""
        if isinstance(op, Dot | AsyncDot):
            for which in ("a", "b"):
                value = source = op.a if which == "a" else op.b
                while isinstance(source.op, Cast | Transpose):
                    source = source.op.source
                if isinstance(source.op, LocalLoad):
                    self._assign(value, self._operand_layout(op, which))

    def _cat_anchor(self, op: Operation) -> None:
        """Unequal parts have a layout of their greatest common part; through equal ones layouts spread."""
        if isinstance(op, Cat) and not _has_equal_parts(op):
            layouts = self._cat_layouts(op)
            self._assign(op.result, layouts.result)
            for value, layout in zip(op.sources, layouts.sources, strict=True):
                self._assign(value, layout)

    def _cat_layouts(self, op: Cat) -> CatLayouts:
        """Layouts of parts and whole between which joining moves nothing: the whole's, the first part's, or plain."""
        count = len(op.sources)
        held = [tile_of(value).layout for value in (op.result, op.sources[0])]
        if _has_equal_parts(op) and held[0] is not None and held[1] is not None:
            for part in (part_of(held[0], op.axis, count), held[1]):
                whole = joined(part, op.axis, count) if part is not None else None
                if part is not None and whole is not None:
                    return CatLayouts((part,) * count, whole)
        result = tile_of(op.result)
        sizes = [tile_of(value).shape[op.axis] for value in op.sources]
        return cat_layouts(result.shape, op.axis, sizes, result.dtype.bits, self.warps, self.target.warp_size)

    def _memory_anchor(self, op: Operation) -> None:
        if isinstance(op, Store | Put | ReducePut):
            self._assign(op.value, self._coalesced(op.value, op.view))
        elif isinstance(op, Send | Receive):
            tile = op.value if isinstance(op, Send) else op.result
            self._assign(tile, packed(tile_of(tile), self.warps, self.target.warp_size))
        elif isinstance(op, Gather):
            self._assign(op.result, self._scattered(op.result, op.view, op.axes))
        elif isinstance(op, Scatter | Atomic):
            self._assign(op.value, self._scattered(op.value, op.view, op.axes))

    def _default_anchor(self, op: Operation) -> None:
        for value in [*op.results, *(a for r in op.regions for a in r.block.args)]:
            if isinstance(value.type, TileType) and not self.known(value):
                self._assign(value, self._blocked(value, value.type.rank - 1))

    def _operand_layout(self, op: Dot | AsyncDot, which: str) -> LinearLayout:
        assert self.unit is not None
        return self.unit.operand(which, op, self.warps)

    def _coalesced(self, value: Value, view: Value) -> LinearLayout:
        assert isinstance(view.type, ViewType)
        axis = view.type.contiguous_axis
        return self._blocked(value, tile_of(value).rank - 1 if axis is None else axis)

    def _scattered(self, value: Value, view: Value, axes: tuple[int, ...]) -> LinearLayout:
        """As a load or store where neighbours along the contiguous axis are neighbours in memory."""
        assert isinstance(view.type, ViewType)
        axis, last = view.type.contiguous_axis, tile_of(value).rank - 1
        apart = axis is None or axis in axes or tile_of(value).rank != view.type.rank
        return self._blocked(value, last if apart or axis is None else axis)

    def _blocked(self, value: Value, fastest: int) -> LinearLayout:
        tile = tile_of(value)
        order = (fastest, *(a for a in reversed(range(tile.rank)) if a != fastest))
        return blocked(tile.shape, tile.dtype.bits, self.warps, self.target.warp_size, order)

    # --- rules between classes ----------------------------------------------------------------------

    def _spread(self) -> None:
        changed = True
        while changed:
            changed = False
            for op in self.ops:
                if isinstance(op, Cat):
                    changed |= self._spread_cat(op)
                rule = RULES.get(type(op))
                if rule is None or not all(isinstance(v.type, TileType) for v in (op.operands[0], op.result)):
                    continue
                source, result = op.operands[0], op.result
                forward, backward = rule
                if self.known(result) and not self.known(source):
                    layout = backward(op, self.of(result))
                    changed |= layout is not None
                    if layout is not None:
                        self._assign(source, layout)
                elif self.known(source) and not self.known(result):
                    layout = forward(op, self.of(source))
                    if layout is not None and not self._repeats_work(op, layout):
                        changed = True
                        self._assign(result, layout)

    def _repeats_work(self, op: Operation, layout: LinearLayout) -> bool:
        """Whether a broadcast tile would have threads hold more than their share, since its source is in all of them.

        A row's sum is in every thread, the row must not be: it is laid out by what else is done with it.
        """
        share = self._blocked(op.result, tile_of(op.result).rank - 1).num_registers
        return isinstance(op, Broadcast) and layout.num_registers > share

    def _spread_cat(self, op: Cat) -> bool:
        """Between equal parts and their whole."""
        values, count = [op.result, *op.sources], len(op.sources)
        if not _has_equal_parts(op) or all(map(self.known, values)):
            return False
        source = next(filter(self.known, op.sources), None)
        part = self.of(source) if source is not None else None
        if part is None and self.known(op.result):
            part = part_of(self.of(op.result), op.axis, count)
        whole = joined(part, op.axis, count) if part is not None else None
        if part is None or whole is None:
            return False
        open_values = [value for value in values if not self.known(value)]
        self._assign(op.result, whole)
        for value in op.sources:
            self._assign(value, part)
        return bool(open_values)

    # --- choices by cost ----------------------------------------------------------------------------

    def _cheapest_anchor(self, op: Operation) -> None:
        """The cheapest layout for a load or store and all that it decides by spreading."""
        access = next((a for a in self.accesses if a.op is op), None)
        if access is None or self.known(access.value):
            return
        decided = set(self.layout)
        members, best = self._trial(access, access.coalesced(), decided, [])
        if best[0] > sum(self._weight(m) * m.ideal() for m in members):
            options = [(m, layout) for m in members for layout in (m.coalesced(), *m.turning(), m.coalesced(True))]
            for member, layout in options:
                _, found = self._trial(member, layout, decided, members)
                best = min(best, found, key=lambda trial: trial[0])
        self.layout = best[1]

    def _trial(
        self, access: Access, layout: LinearLayout, decided: set[Value], members: list[Access]
    ) -> tuple[list[Access], tuple[float, dict[Value, LinearLayout]]]:
        """The accesses whose layout this one decides; (cycles, all layouts with it).

        ``members``: accesses that count though they may not be reached; they then get what suits them.
        """
        before = dict(self.layout)
        self._assign(access.value, layout)
        self._spread()
        for member in members:
            self._assign(member.value, member.coalesced())
            self._spread()
        members = members or [a for a in self.accesses if self.find(a.value) not in decided and self.known(a.value)]
        cost = sum(self._weight(m) * best_access(m, self.of(m.value), self._borrowable(m))[0] for m in members)
        cost += sum(self._seam(op) for op in self.ops if type(op) in RULES)
        cost += sum(self._reduction(op) for op in self.ops if isinstance(op, Reduce))
        chosen, self.layout = self.layout, before
        return members, (cost, chosen)

    def _reduction(self, op: Reduce) -> float:
        return self._repeats(op) * reduction_cost(self.of(op.source), op.axis) if self.known(op.source) else 0.0

    def _seam(self, op: Operation) -> float:
        """Cycles of the conversion beside an operation whose source and result have layouts of their own."""
        source, result = op.operands[0], op.result
        if not (isinstance(source.type, TileType) and isinstance(result.type, TileType)):
            return 0.0
        if not (self.known(source) and self.known(result)):
            return 0.0
        derived, wanted = RULES[type(op)][0](op, self.of(source)), self.of(result)
        if derived is None or derived == wanted:
            return 0.0
        if isinstance(op, Broadcast):  # its source is converted, if threads do not hold what they repeat
            derived, wanted = self.of(source), _collapse(op, wanted)
            if derived == wanted:
                return 0.0
        return conversion_cost(derived, wanted, max(8, result.type.dtype.bits), self.target.banks)

    def _borrowable(self, access: Access) -> int:
        """Bytes of shared memory that a conversion beside a load or store may take.

        Rings take all that is left, and what copies are in flight to is taken. Outside of loops the memory of
        buffers is free again (`shared_plan`); inside, only what they leave.
        """
        if any(isinstance(op, MakeRing | Copy) for op in self.ops):
            return 0
        if self._weight(access) == 1:
            return self.target.shared_bytes
        buffers = [op.result.type for op in self.ops if isinstance(op, Alloc)]
        return self.target.shared_bytes - sum(b.bytes for b in buffers if isinstance(b, BufferType))

    def _weight(self, access: Access) -> int:
        return self._repeats(access.op)

    def _repeats(self, op: Operation) -> int:
        """How often an operation runs, by the loops around it."""
        depth, block = 0, op.parent
        while block in self.loops:
            depth += isinstance(self.loops[block], For | While)
            block = self.loops[block].parent
        return LOOP_WEIGHT ** int(depth)

    def _route(self, access: Access) -> None:
        """Let a load or store go its cheapest way."""
        op, held = (
            access.op,
            tile_of(access.value).layout if isinstance(access.op, Load) else tile_of(access.op.value).layout,
        )
        assert held is not None
        _, layout = best_access(access, held, self._borrowable(access))
        if layout == held:
            return
        if isinstance(op, Load):
            self._convert_result(op, layout, held)
        else:
            op.value = self._converted(op, op.value, layout)

    # --- conversions --------------------------------------------------------------------------------

    def _convert(self, op: Operation) -> None:
        rule = RULES.get(type(op))
        if rule is not None and all(isinstance(v.type, TileType) for v in (op.operands[0], op.result)):
            self._convert_derived(op)
        elif isinstance(op, Cat):
            layouts = self._cat_layouts(op)
            op.sources = [self._converted(op, v, at) for v, at in zip(op.sources, layouts.sources, strict=True)]
            self._result_from(op, layouts.result)
        elif isinstance(op, Scan):
            layout = self._scannable(op)
            op.source = self._converted(op, op.source, layout)
            self._result_from(op, layout)
        elif isinstance(op, Send):
            layout = packed(tile_of(op.value), self.warps, self.target.warp_size)
            op.value = self._converted(op, op.value, layout)
        elif isinstance(op, Receive):
            self._result_from(op, packed(tile_of(op.result), self.warps, self.target.warp_size))
        elif isinstance(op, Dot | AsyncDot):
            for f, which in zip(op.operand_fields[:2], "ab", strict=True):
                value = op.groups[f.position][0]
                if isinstance(value.type, TileType):
                    op.groups[f.position] = [self._converted(op, value, self._operand_layout(op, which))]
            self._convert_accumulator(op)

    def _convert_accumulator(self, op: Dot | AsyncDot) -> None:
        """Where another dot has given the accumulator's class its layout, turn it into this one's and back."""
        assert self.unit is not None
        held, wanted = tile_of(op.acc).layout, self.unit.result(op, self.warps)
        if held != wanted and held is not None:
            op.acc = self._converted(op, op.acc, wanted)
            self._convert_result(op, wanted, held)

    def _convert_derived(self, op: Operation) -> None:
        """Make the result's layout what the operation derives from its source's."""
        source, result = op.operands[0], op.result
        forward, backward = RULES[type(op)]
        wanted, held = tile_of(result).layout, tile_of(source).layout
        assert wanted is not None and held is not None
        if forward(op, held) == wanted:
            return
        needed = backward(op, wanted)
        # a broadcast gives any layout whose threads hold the repeated elements already
        if needed is not None and (isinstance(op, Broadcast) or forward(op, needed) == wanted):
            op.groups[0] = [self._converted(op, source, needed)]
            return
        derived = forward(op, held)
        if derived is None:
            plain = self._plain_layouts(op)
            if plain is None:
                return  # a reshape that passes elements between threads, whatever the layouts are
            source_layout, derived = plain
            op.groups[0] = [self._converted(op, source, source_layout)]
        self._result_from(op, derived)

    def _plain_layouts(self, op: Operation) -> tuple[LinearLayout, LinearLayout] | None:
        """Layouts of source and result between which the operation moves nothing, whatever theirs are, if there are."""
        source, result = op.operands[0], op.result
        tile = tile_of(source)
        if isinstance(op, Extract):
            sizes = tile_of(result).shape
            return part_layouts(tile.shape, op.offsets, sizes, tile.dtype.bits, self.warps, self.target.warp_size)
        forward, backward = RULES[type(op)]
        candidates: list[LinearLayout | None] = [self._blocked(source, axis) for axis in reversed(range(tile.rank))]
        candidates += [backward(op, self._blocked(result, axis)) for axis in reversed(range(tile_of(result).rank))]
        for candidate in candidates:
            derived = forward(op, candidate) if candidate is not None else None
            if candidate is not None and derived is not None:
                return candidate, derived
        return None

    def _scannable(self, op: Scan) -> LinearLayout:
        """The source's layout, or a plain one where threads share coordinates along the axis."""
        layout = tile_of(op.source).layout
        assert layout is not None
        try:
            scan_bits(layout, op.axis)
        except ValueError:
            return self._blocked(op.source, op.axis)
        return layout

    def _result_from(self, op: Operation, derived: LinearLayout) -> None:
        wanted = tile_of(op.results[0]).layout
        assert wanted is not None
        if derived != wanted:
            self._convert_result(op, derived, wanted)

    def _convert_result(self, op: Operation, derived: LinearLayout, wanted: LinearLayout) -> None:
        result, block = op.results[0], op.parent
        assert block is not None
        b = Builder(block, op.loc)
        with b.at(block, block.ops.index(op) + 1):
            converted = b.convert(result, wanted)
        result.type = tile_of(result).with_layout(derived)
        for user in self.function.walk():
            if user is not converted.op:
                user.replace_operands({result: converted})

    def _converted(self, op: Operation, value: Value, layout: LinearLayout) -> Value:
        if tile_of(value).layout == layout:
            return value
        place = self._place(op, value)
        assert place.parent is not None
        b = Builder(place.parent, op.loc)
        with b.at(place.parent, place.parent.ops.index(place)):
            return b.convert(value, layout)

    def _place(self, op: Operation, value: Value) -> Operation:
        """Where to convert a value for an operation: outside the loops that it comes from outside of."""
        home = value.op.parent if value.op is not None else value.owner
        while op.parent is not home:
            around = self.loops.get(op.parent) if op.parent is not None else None
            if not isinstance(around, For | While):
                break
            op = around
        return op


def _has_equal_parts(op: Cat) -> bool:
    return len({tile_of(value).shape for value in op.sources}) == 1


Rule = Callable[[Operation, LinearLayout], LinearLayout | None]


def _collapse(op: Operation, layout: LinearLayout) -> LinearLayout:
    """The layout of a broadcast's source: size one along the repeated dimensions."""
    for axis, (size, full) in enumerate(zip(tile_of(op.operands[0]).shape, tile_of(op.result).shape, strict=True)):
        if size != full:
            layout = layout.slice_dim(axis).expand_dim(axis)
    return layout


def _unreduced(op: Operation, layout: LinearLayout) -> LinearLayout | None:
    return None  # a reduction's source is never laid out by its result


def _transposed(op: Operation, layout: LinearLayout) -> LinearLayout:
    return layout.transpose(op.attributes["perm"])


def _untransposed(op: Operation, layout: LinearLayout) -> LinearLayout:
    perm = op.attributes["perm"]
    return layout.transpose([perm.index(axis) for axis in range(len(perm))])


def _reshaped(shape_of: Callable[[Operation], Value]) -> Rule:
    def rule(op: Operation, layout: LinearLayout) -> LinearLayout | None:
        try:
            return layout.reshape(tile_of(shape_of(op)).shape)
        except ValueError:
            return None

    return rule


def _extracted(op: Operation, layout: LinearLayout) -> LinearLayout | None:
    try:
        return layout.extract(op.attributes["offsets"], tile_of(op.result).shape)[0]
    except ValueError:
        return None


#: operation -> (layout of the result from the source's, layout of the source from the result's)
RULES: dict[type[Operation], tuple[Rule, Rule]] = {
    Reduce: (lambda op, layout: layout.slice_dim(op.attributes["axis"]), _unreduced),
    ExpandDims: (
        lambda op, layout: layout.expand_dim(op.attributes["axis"]),
        lambda op, layout: layout.slice_dim(op.attributes["axis"]),
    ),
    Broadcast: (lambda op, layout: layout.broadcast(tile_of(op.result).shape), _collapse),
    Transpose: (_transposed, _untransposed),
    Reshape: (_reshaped(lambda op: op.result), _reshaped(lambda op: op.operands[0])),
    Extract: (_extracted, _unreduced),
}
