"""placement: which loads travel through shared memory, in which layout, and who copies them.

A load whose tile feeds a matrix product goes through shared memory: the unit reads it there, or the
warps share it. The shared layout comes from the matrix unit and the layout algebra; the copy engine
takes the copy when the view's strides and alignment allow, else threads do. A load stays an ordinary
register load when its address depends on results of the matrix unit or on tiles (the copying warps
could not compute it), or when the program also writes its tensor (order must be kept; a load that comes after a wait
for other ranks has its order from that).

Vectors that are loaded beside such tiles, in the same loop, may go with them (`riders`): a role that computes neither
waits for them nor holds them in registers from early on; elements of tensors go with their neighbours. So do tiles that
are cast before a product takes them (`cast_operands`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from typing import TypeVar

from tilewright.ir.builder import Builder
from tilewright.ir.comm_ops import Peer, Put
from tilewright.ir.core import Block, Function, Operation, Value, replace_uses, uses_of
from tilewright.ir.indexed_ops import Atomic
from tilewright.ir.layout import SharedLayout, shared_candidates
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import (
    Cast,
    Dot,
    Element,
    For,
    Load,
    OffsetView,
    PermuteView,
    Pick,
    Store,
    Subview,
    Transpose,
)
from tilewright.ir.types import ScalarType, TileType, ViewType, i32
from tilewright.passes.analysis import (
    backward_slice,
    control_values,
    enclosing_operations,
    trace_load,
    view_root,
    written_tensors,
)
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import ROLES, contiguous_axis, matrix_unit, schedule_of
from tilewright.passes.multiples import power_of_two

#: cuTensorMapEncodeTiled: base address and strides are multiples of 16 bytes, rank at most 5
TMA_ALIGNMENT, TMA_MAX_RANK = 16, 5
#: elements of a vector that one bulk copy brings (a box of the copy engine), and the alignment of where it puts them:
#: slots of a buffer follow each other
MOST_VECTOR, SLOT_ALIGNMENT = 256, 128
#: the smallest copy of cp.async
CP_ASYNC_BYTES = 4


@register_pass("placement")
class Placement(FunctionPass):
    """Sets ``shared`` and ``engine`` of loads, and ``num_warps`` of functions with dots."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        dots = [op for op in function.walk() if isinstance(op, Dot)]
        if not dots:
            return
        unit = matrix_unit(context.target, function)
        by_roles = schedule_of(function, context.target) == ROLES
        for dot in dots:
            unit.check(dot)
        warps = context.options.num_warps or unit.warps(dots)
        function.attributes["num_warps"] = warps
        travelling = set(dot_loads(function))
        for dot in dots:
            for which, value in (("a", dot.a), ("b", dot.b)):
                load, perm = trace_load(value)
                if load is None or load not in travelling or load.shared is not None:
                    continue
                layout = unit.shared(which, dot, contiguous_axis(load, perm), warps)
                if layout is None:
                    continue
                load.shared = layout if perm is None else layout.transpose(_inverse(perm))
                choose = copy_engine if by_roles else thread_engine
                load.engine = choose(load, context.target)
        if by_roles and unit.reads_slots:
            take_neighbours(function, context.target)
            for load in riders(function, context.target):
                load.shared, load.engine = _vector_layout(load), "tma"
            for load in cast_operands(function, context.target):
                load.shared, load.engine = _swizzled(load, context.target), "tma"


def riders(function: Function, target: Target) -> list[Load]:
    """Loads of vectors in loops that the copy engine can make together with those of dot operands around them.

    `tilewright.passes.pipeline` takes those that are used while the operands are.
    """
    loads = [op for op in function.walk() if isinstance(op, Load) and op.shared is None]
    return _beside_copies(function, [op for op in loads if _is_copyable_vector(op, target)])


Loads = TypeVar("Loads", Load, Element)


def _beside_copies(function: Function, loads: Sequence[Loads]) -> list[Loads]:
    """Those in loops where the copy engine makes all copies, and could make these too."""
    loops, written = enclosing_operations(function), written_tensors(function)
    engines: dict[Block, set[str]] = {}
    for load in [op for op in function.walk() if isinstance(op, Load) and op.shared is not None]:
        assert load.parent is not None
        engines.setdefault(load.parent, set()).add(load.engine)
    return [
        op
        for op in loads
        if op.parent is not None
        and engines.get(op.parent) == {"tma"}
        and isinstance(loops.get(op.parent), For)
        and view_root(op.view) not in written
        and early_address(op, loops, written)
    ]


def cast_operands(function: Function, target: Target) -> list[Load]:
    """Loads in loops, which the engine can copy, of tiles that are only cast before a dot takes them on its left.

    They travel in the memory's dtype, with the right operand; threads read and cast them, and the unit takes them from
    registers.
    """
    loops, written, uses = enclosing_operations(function), written_tensors(function), uses_of(function.body)
    found = []
    for dot in [op for op in function.walk() if isinstance(op, Dot) and trace_load(op.b)[0] is not None]:
        value, cast, right = dot.a, False, trace_load(dot.b)[0]
        while isinstance(value.op, Cast | Transpose) and len(uses[value]) == 1:
            cast, value = cast or isinstance(value.op, Cast), value.op.source
        load = value.op
        if not (cast and isinstance(load, Load) and load.shared is None and len(uses[value]) == 1):
            continue
        assert right is not None and load.parent is not None
        beside = right.parent is load.parent is dot.parent and right.engine == "tma" and right.shared is not None
        if not beside or not isinstance(loops.get(load.parent), For) or view_root(load.view) in written:
            continue
        if early_address(load, loops, written) and copy_engine(load, target) == "tma" and _swizzled(load, target):
            found.append(load)
    return found


def _swizzled(load: Load, target: Target) -> SharedLayout | None:
    """A layout that the copy engine writes and in which threads read rows of fragments without meeting a bank twice."""
    tile, view = load.result.type, load.view.type
    assert isinstance(tile, TileType) and isinstance(view, ViewType)
    fastest = view.contiguous_axis
    if tile.rank != 2 or fastest is None:
        return None
    layouts = shared_candidates(tile.shape, tile.dtype.bits, (fastest, 1 - fastest), target.banks)
    return max((layout for layout in layouts if layout.swizzle), key=lambda layout: layout.swizzle, default=None)


def take_neighbours(function: Function, target: Target) -> None:
    """Load a vector instead of an element where the copy engine brings it beside others, and pick the element from it.

    Not where copies or control flow need the element: who copies would have to wait for it.
    """
    elements = [op for op in function.walk() if isinstance(op, Element) and _is_copyable_element(op, target)]
    loops = enclosing_operations(function)
    loads = [op for op in function.walk() if isinstance(op, Load)]
    needed = [value for op in loads for value in op.operands]
    needed += [value for block in loops for value in control_values(block, loops)]
    early = backward_slice(needed, loops) if elements else set()
    for element in _beside_copies(function, [op for op in elements if op.result not in early]):
        block, view = element.parent, element.view.type
        assert block is not None and isinstance(view, ViewType)
        b, size = Builder(block, element.loc), SLOT_ALIGNMENT // view.dtype.bytes
        with b.at(block, block.ops.index(element)):
            place, inside = (b.binary(fn, element.index[0], b.index(size)) for fn in ("floordiv", "mod"))
            vector = b.load(element.view, [place], (size,))
            picked = b.insert(Pick(vector, inside, types=[element.result.type])).result
        block.ops.remove(element)
        replace_uses(function.body, {element.result: picked})


def _is_copyable_element(element: Element, target: Target) -> bool:
    view = element.view.type
    assert isinstance(view, ViewType)
    plain = element.pad == 0 and not element.after and view.dtype.bits >= 8
    fits = view.rank == 1 and element.index[0].type == ScalarType(i32)
    return plain and fits and bulk_copyable(element, target)


def _is_copyable_vector(load: Load, target: Target) -> bool:
    tile = load.result.type
    assert isinstance(tile, TileType)
    if tile.rank != 1 or tile.size > MOST_VECTOR or tile.size * tile.dtype.bytes % SLOT_ALIGNMENT:
        return False
    return copy_engine(load, target) == "tma"


def _vector_layout(load: Load) -> SharedLayout:
    tile = load.result.type
    assert isinstance(tile, TileType)
    return SharedLayout(tile.shape, tile.dtype.bits, (0,))


def dot_loads(function: Function) -> Iterator[Load]:
    """Loads of dot operands that can travel through shared memory, each once."""
    loops, uses = enclosing_operations(function), uses_of(function.body)
    written = written_tensors(function)
    operands = [v for op in function.walk() if isinstance(op, Dot) for v in (op.a, op.b)]
    for load in dict.fromkeys(trace_load(value)[0] for value in operands):
        if load is None or (view_root(load.view) in written and not load.after):
            continue
        if early_address(load, loops, written) and only_dots(load, uses):
            yield load


def only_dots(load: Load, uses: dict[Value, list[Operation]]) -> bool:
    """Every use, through transpositions, is an operand of a dot."""
    pending = [load.result]
    while pending:
        value = pending.pop()
        for op in uses.get(value, []):
            if isinstance(op, Transpose):
                pending.append(op.result)
            elif not isinstance(op, Dot) or op.acc is value:
                return False
    return True


def early_address(load: Load | Element, loops: dict[Block, Operation], written: set[Value]) -> bool:
    """Whether the address, waits and the control flow around need scalars alone, none of a tensor of ``written``."""
    assert load.parent is not None
    waits = [token.op.parent for token in load.after if token.op is not None and token.op.parent is not None]
    controls = [value for block in (load.parent, *waits) for value in control_values(block, loops)]
    values = backward_slice([load.view, *load.index, *load.after, *controls], loops)
    if any(isinstance(v.op, Element) and view_root(v.op.view) in written for v in values):
        return False
    return not any(isinstance(v.type, TileType) for v in values)


def copy_engine(load: Load, target: Target) -> str:
    """``tma`` where the bulk copy engine can fill the slot, else ``threads``."""
    return "tma" if load.pad == 0 and bulk_copyable(load, target) else "threads"


def thread_engine(load: Load, target: Target) -> str:
    """``cp_async`` where threads can copy whole words without registers, else ``threads``.

    The slot runs along the direction of global memory, and all rows start at multiples of the vector's size.
    """
    view, tile = load.view.type, load.result.type
    assert isinstance(view, ViewType) and isinstance(tile, TileType) and load.shared is not None
    axis = view.contiguous_axis
    if not target.has("cp_async") or load.pad != 0 or axis is None or load.shared.order[0] != axis:
        return "threads"
    size = view.dtype.bytes
    rows = [size * s if s is not None else view.align for n, s in enumerate(view.strides) if n != axis]
    return "cp_async" if gcd(view.align, size * tile.shape[axis], *rows) >= CP_ASYNC_BYTES else "threads"


def bulk_copyable(op: Load | Element | Store | Put | Atomic, target: Target) -> bool:
    """Whether the copy engine can move tiles of an operation's view: its tensor needs a descriptor (CUtensorMap)."""
    view, root = op.view.type, view_root(op.view).type
    assert isinstance(root, ViewType) and isinstance(view, ViewType)
    static = [s for s in root.strides if s is not None and s != 1]
    return (
        target.has("tma")
        and view.contiguous_axis is not None
        and root.align % TMA_ALIGNMENT == 0
        and root.rank <= TMA_MAX_RANK
        and root.strides.count(1) == 1
        and all(s * root.dtype.bytes % TMA_ALIGNMENT == 0 for s in static)
        and _keeps_alignment(op)
    )


def _keeps_alignment(op: Load | Element | Store | Put | Atomic) -> bool:
    """Whether every line that an engine copies begins at a multiple of 16 bytes of its tensor.

    No document asks for it, but other copies are reported to end as illegal instructions (Triton's issues 7385 and
    8657). Boxes are whole multiples wide: it is for offsets along the contiguous dimension to be some too.
    """
    view = op.view
    while isinstance(view.op, Subview | PermuteView | OffsetView | Peer):
        if isinstance(view.op, OffsetView):
            assert isinstance(view.type, ViewType) and view.type.contiguous_axis is not None
            offset = view.op.offsets[view.type.contiguous_axis]
            if power_of_two(offset, op) * view.type.dtype.bytes % TMA_ALIGNMENT:
                return False
        view = view.op.view
    return True


def _inverse(perm: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(perm.index(axis) for axis in range(len(perm)))
