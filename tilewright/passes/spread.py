"""spread: each program runs in the blocks of a cluster together, which divide the columns of its tiles among them.

For functions without matrix products, whose copies clusters could share (`tilewright.passes.clusters`). With
``num_ctas`` = n the widest dim of the program's tiles is cut in n parts: block r of a cluster holds the r-th of every
tile along that dim, so that rows which are too long for one multiprocessor stay in the registers of several.

Dims of tiles that elementwise operations, loops, transpositions and the like tie together form a class; a class is cut
as a whole. Loads and stores move to the block's part, a reduction along the dim gives a part of the result, which
`cluster_ops.ClusterReduce` combines with the other blocks' parts. What does not have the dim every block computes for
itself, from the same values in the same order, so that the bits are the same; block 0 alone stores it. Control flow
depends on such values only, so that the blocks meet at the same exchanges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tilewright.ir.builder import Builder
from tilewright.ir.check_ops import Assert, Print
from tilewright.ir.cluster_ops import EXCHANGED, ClusterReduce
from tilewright.ir.core import Function, IRError, Operation, Value, uses_of
from tilewright.ir.indexed_ops import Atomic, Gather, Scatter, free_axes
from tilewright.ir.tile_ops import (
    Binary,
    Bitcast,
    BlockId,
    Broadcast,
    Cast,
    Cat,
    Compare,
    Constant,
    Dot,
    Element,
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
    Splat,
    Store,
    Transpose,
    Unary,
    While,
    tile_of,
    view_of,
    yielded,
)
from tilewright.ir.types import ScalarType, TileType, element_type, f32, i1, i32, like
from tilewright.passes.analysis import (
    backward_slice,
    control_values,
    enclosing_operations,
    view_root,
    written_tensors,
)
from tilewright.passes.clusters import cluster_size, guard
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.warp_count import values_of

#: a dim of a tile
Place = tuple[Value, int]

HINT = "leave out num_ctas"


@register_pass("spread")
class Spread(FunctionPass):
    """``num_ctas``: blocks of a cluster; None leaves it to the option of that name."""

    num_ctas: int | None = None

    def run_on_function(self, function: Function, context: PassContext) -> None:
        ctas = self.num_ctas or context.options.num_ctas or 1
        if ctas == 1 or not context.target.has("clusters") or function.attributes.get("communicates"):
            return  # what there is to say of the others, `tile-order` says
        if any(isinstance(op, Dot) for op in function.walk()):
            return
        cuts = _choose(function, ctas)
        function.attributes["num_ctas"], function.attributes["spread"] = ctas, True
        _Rewriter(function, ctas, cuts).run()
        _check_control(function)


def is_spread(function: Function) -> bool:
    """Whether the blocks of a cluster run one program together."""
    return bool(function.attributes.get("spread"))


def program_blocks(function: Function) -> int:
    """Blocks that run one program together."""
    return cluster_size(function) if is_spread(function) else 1


# --- which dims are cut -----------------------------------------------------------------------------


def _choose(function: Function, ctas: int) -> dict[Value, int]:
    """For each tile that is cut, the dim along which it is. Raises IRError where that cannot be done."""
    classes = _Classes(function)
    places = [(v, dim) for v in values_of(function.body) if isinstance(v.type, TileType) for dim in range(v.type.rank)]
    widest = max((tile_of(value).shape[dim] for value, dim in places), default=1)
    if widest % ctas:
        raise IRError(
            f"num_ctas={ctas}: the tiles of '{function.name}' have {widest} elements at most along one dim, which do "
            f"not divide among {ctas} blocks",
            function.loc,
            "use wider tiles, or leave out num_ctas",
        )
    members: dict[Place, list[Place]] = {}
    for place in places:
        if tile_of(place[0]).shape[place[1]] == widest:
            members.setdefault(classes.find(place), []).append(place)
    cuts: dict[Value, int] = {}
    # of square tiles the columns
    for root in sorted(members, key=lambda root: -max(dim for _, dim in members[root])):
        found = dict(members[root])
        if len(found) < len(members[root]):
            op = next(v.op for v, _ in members[root] if v.op is not None)
            raise IRError(f"num_ctas={ctas}: '{op.name}' ties both dims of a tile together", op.loc, HINT)
        if any(value in cuts for value in found):
            continue  # its tiles are cut along another dim already
        if root in classes.whole:
            op, why = classes.whole[root]
            message = f"num_ctas={ctas}: '{op.name}' {why}, so that {widest} elements cannot be spread over blocks"
            raise IRError(message, op.loc, HINT)
        cuts |= found
    return cuts


class _Classes:
    """Classes of dims (union-find), and which of them must stay whole: for an operation, and why."""

    def __init__(self, function: Function):
        self.parent: dict[Place, Place] = {}
        self.whole: dict[Place, tuple[Operation, str]] = {}
        for op in function.walk():
            tie = _TIES.get(type(op))
            if tie is not None:
                tie(self, op)
            elif not op.terminator:
                for value in [*op.operands, *op.results]:
                    self.keep(op, value, "needs whole tiles")

    def find(self, place: Place) -> Place:
        while place in self.parent:
            place = self.parent[place]
        return place

    def tie(self, one: Place, other: Place) -> None:
        """Both dims are cut, or neither."""
        a, b = self.find(one), self.find(other)
        if a != b:
            self.parent[b] = a
            if b in self.whole:
                self.whole.setdefault(a, self.whole.pop(b))

    def tie_all(self, *values: Value) -> None:
        """Tiles of one shape."""
        tiles = [v for v in values if isinstance(v.type, TileType)]
        for other in tiles[1:]:
            for dim in range(tile_of(other).rank):
                self.tie((tiles[0], dim), (other, dim))

    def keep(self, op: Operation, value: Value, why: str, dims: Sequence[int] | None = None) -> None:
        """Dims (None: all) that the operation cannot have cut."""
        if isinstance(value.type, TileType):
            for dim in range(value.type.rank) if dims is None else dims:
                self.whole.setdefault(self.find((value, dim)), (op, why))


def _elementwise(classes: _Classes, op: Operation) -> None:
    classes.tie_all(*op.results, *op.operands)


def _fresh(classes: _Classes, op: Operation) -> None:
    """Nothing is tied: the operation makes a part of its tile as it makes the whole."""


def _carried(classes: _Classes, op: For | While | If) -> None:
    groups: Iterable[tuple[Value, ...]]
    if isinstance(op, If):
        groups = zip(op.results, yielded(op.then_body), yielded(op.else_body), strict=True)
    elif isinstance(op, For):
        groups = zip(op.results, op.inits, op.carried, yielded(op.body), strict=True)
    else:
        tests, arguments = op.condition.block.args, op.body.block.args
        groups = zip(op.results, op.inits, tests, arguments, yielded(op.body), strict=True)
    for group in groups:
        classes.tie_all(*group)


def _mapped(mapping: Callable[[Any], dict[int, int]]) -> Callable[[_Classes, Operation], None]:
    """``mapping``: dim of the source -> dim of the result; the others stay whole."""

    def tie(classes: _Classes, op: Operation) -> None:
        source, result, dims = op.operands[0], op.results[0], mapping(op)
        for one, other in dims.items():
            classes.tie((source, one), (result, other))
        why = "moves elements along a dim"
        for value, kept in ((source, dims.keys()), (result, dims.values())):
            if isinstance(value.type, TileType):
                classes.keep(op, value, why, [dim for dim in range(value.type.rank) if dim not in kept])

    return tie


def _same_sizes(op: Operation) -> dict[int, int]:
    """The dims along which source and result are alike."""
    pairs = zip(tile_of(op.operands[0]).shape, tile_of(op.results[0]).shape, strict=True)
    return {dim: dim for dim, (one, other) in enumerate(pairs) if one == other}


def _reshaped(op: Reshape) -> dict[int, int]:
    """Dims of one size with as many elements before them, and so behind them."""
    places: list[dict[tuple[int, int], int]] = []
    for value in (op.source, op.result):
        before, found = 1, {}
        for dim, size in enumerate(tile_of(value).shape):
            found[before, size] = dim
            before *= size
        places.append(found)
    return {dim: places[1][key] for key, dim in places[0].items() if key in places[1]}


def _inserted(op: ExpandDims) -> dict[int, int]:
    return {dim: dim + (dim >= op.axis) for dim in range(tile_of(op.source).rank)}


def _broadcast(classes: _Classes, op: Broadcast) -> None:
    for dim in _same_sizes(op):
        classes.tie((op.source, dim), (op.result, dim))


def _reduced(classes: _Classes, op: Reduce) -> None:
    if isinstance(op.result.type, TileType):
        for dim in range(op.result.type.rank):
            classes.tie((op.source, dim + (dim >= op.axis)), (op.result, dim))


def _scanned(classes: _Classes, op: Scan) -> None:
    classes.tie_all(op.source, op.result)
    classes.keep(op, op.source, "adds up along a dim", [op.axis])


def _joined(classes: _Classes, op: Cat) -> None:
    for value in op.sources:
        for dim in range(tile_of(value).rank):
            if dim != op.axis:
                classes.tie((op.result, dim), (value, dim))
        classes.keep(op, value, "joins tiles along a dim", [op.axis])
    classes.keep(op, op.result, "joins tiles along a dim", [op.axis])


_TIES: dict[type[Operation], Callable[[_Classes, Any], None]] = {
    **dict.fromkeys((Unary, Binary, Compare, Select, Cast, Bitcast, Gather, Scatter, Atomic), _elementwise),
    **dict.fromkeys((Constant, Splat, Iota, Load, Store, Assert), _fresh),
    **dict.fromkeys((For, While, If), _carried),
    ExpandDims: _mapped(_inserted),
    Transpose: _mapped(lambda op: {p: dim for dim, p in enumerate(op.perm)}),
    Reshape: _mapped(_reshaped),
    Extract: _mapped(_same_sizes),
    Broadcast: _broadcast,
    Reduce: _reduced,
    Scan: _scanned,
    Cat: _joined,
}


# --- the program of one block -------------------------------------------------------------------------


class _Rewriter:
    """Makes the program that of block ``rank`` of a cluster."""

    def __init__(self, function: Function, ctas: int, cuts: dict[Value, int]):
        self.function, self.ctas, self.cuts = function, ctas, cuts
        self.uses = uses_of(function.body)
        b = Builder(function.body.block, function.loc)
        with b.at(function.body.block, 0):
            self.rank = b.binary("mod", b.insert(BlockId(types=[ScalarType(i32)])).result, b.index(ctas))
            self.rank.hint = "member"
            self.first = b.compare("eq", self.rank, b.index(0))

    def run(self) -> None:
        ops = list(self.function.walk())
        for value, dim in self.cuts.items():
            shape = list(tile_of(value).shape)
            shape[dim] //= self.ctas
            value.type = TileType(tuple(shape), tile_of(value).dtype)
        for op in ops:
            rewrite = _REWRITES.get(type(op))
            if rewrite is not None:
                rewrite(self, op)

    def before(self, op: Operation, behind: bool = False) -> Builder:
        """Builds in front of an operation, or right behind it."""
        assert op.parent is not None
        b = Builder(op.parent, op.loc)
        b.position = op.parent.ops.index(op) + behind
        return b

    def replace(self, value: Value, other: Value, makers: Sequence[Operation]) -> None:
        """Let all but ``makers`` use another value."""
        for op in self.uses.get(value, []):
            if op not in makers:
                op.replace_operands({value: other})

    def part(self, op: Operation, index: list[Value], axis: int) -> list[Value]:
        """A tile index whose ``axis`` counts parts: those of this block."""
        b = self.before(op)
        place = b.add(b.mul(index[axis], b.index(self.ctas)), self.rank)
        return [*index[:axis], place, *index[axis + 1 :]]

    def load(self, op: Load) -> None:
        if op.result in self.cuts:
            op.index = self.part(op, op.index, self.cuts[op.result])

    def gather(self, op: Gather) -> None:
        self._indexed(op, op.result)

    def store(self, op: Store) -> None:
        if op.value in self.cuts:
            op.index = self.part(op, op.index, self.cuts[op.value])
        else:
            self.guard(op)

    def scatter(self, op: Scatter | Atomic) -> None:
        if isinstance(op, Atomic) and op.order != "relaxed":
            message = f"num_ctas={self.ctas}: an update that orders memory would order that of one block only"
            raise IRError(message, op.loc, HINT)
        if op.value in self.cuts:
            self._indexed(op, op.value)
        elif any(self.uses.get(result) for result in op.results):
            message = f"num_ctas={self.ctas}: '{op.name}' happens once, but all blocks need what it gives"
            raise IRError(message, op.loc, HINT)
        else:
            self.guard(op)

    def _indexed(self, op: Gather | Scatter | Atomic, tile: Value) -> None:
        free = free_axes(view_of(op.view).rank, op.axes)
        if tile in self.cuts and self.cuts[tile] in free:
            op.index = self.part(op, op.index, free.index(self.cuts[tile]))

    def guard(self, op: Operation) -> None:
        """What all blocks have, the first one tells."""
        guard(op, self.first)

    def iota(self, op: Iota) -> None:
        if op.result not in self.cuts:
            return
        b = self.before(op, behind=True)
        tile = tile_of(op.result)
        start = b.cast(b.mul(self.rank, b.index(tile.size)), tile.dtype)
        moved = b.add(op.result, b.splat(start, tile.shape))
        assert moved.op is not None
        self.replace(op.result, moved, [moved.op])

    def reduce(self, op: Reduce) -> None:
        """The block's part of the result, combined with the other blocks'."""
        if self.cuts.get(op.source) != op.axis:
            return
        dtype = element_type(op.source.type)
        wide = dtype if dtype.name in EXCHANGED else f32 if dtype.is_float else i32
        if dtype != wide and dtype.is_float and op.fn in ("sum", "prod"):  # rounded once, behind the exchange
            op.source = self.before(op).cast(op.source, wide)
            op.result.type = like(op.result.type, wide)
        b = self.before(op, behind=True)
        sent = b.cast(op.result, wide)
        combined = b.insert(ClusterReduce(sent, types=[sent.type], fn=op.fn)).result
        found = _as_bool(b, combined) if dtype == i1 else b.cast(combined, dtype)
        makers = [value.op for value in (sent, combined) if value.op is not None and value.op is not op]
        self.replace(op.result, found, makers)


def _as_bool(b: Builder, value: Value) -> Value:
    """The lowest bit: sums of bools are their parity."""
    return b.compare("ne", b.binary("and", value, b.constant(1, value.type)), b.constant(0, value.type))


_REWRITES: dict[type[Operation], Callable[[_Rewriter, Any], None]] = {
    Load: _Rewriter.load,
    Gather: _Rewriter.gather,
    Store: _Rewriter.store,
    Scatter: _Rewriter.scatter,
    Atomic: _Rewriter.scatter,
    Print: _Rewriter.guard,
    Iota: _Rewriter.iota,
    Reduce: _Rewriter.reduce,
}


def _check_control(function: Function) -> None:
    """How often blocks exchange must not depend on what the program writes: they might read it at different times."""
    loops, written = enclosing_operations(function), written_tensors(function)
    for op in [op for op in function.walk() if isinstance(op, ClusterReduce)]:
        assert op.parent is not None
        for value in backward_slice(control_values(op.parent, loops), loops):
            source = value.op
            if isinstance(source, Load | Gather | Element) and view_root(source.view) in written:
                message = "decides how often blocks exchange results, but the program writes to what it reads"
                raise IRError(f"num_ctas={cluster_size(function)}: '{source.name}' {message}", source.loc, HINT)
