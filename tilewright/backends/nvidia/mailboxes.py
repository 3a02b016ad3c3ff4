"""Mailboxes: what the blocks of a cluster tell each other, in messages that go one way.

Each block writes its values into a slot of every block's shared memory, its own among them, with ``st.async``, which
counts their bytes at a barrier there. The barrier of a slot waits for the values of all blocks; whoever has seen that
reads them from its own memory. Nobody answers: two slots, of which uses take turns, suffice.

- A block writes for use n + 2 where it has written for use n. It has seen use n + 1 complete by then, so every block
  has sent its values for n + 1, and a block sends behind its reads of use n: a thread sends what it holds itself, and
  where others hold it too, they have met since (`_meet`).
- For the same reason no barrier completes a second phase before all threads that wait for the first have seen it.
- A block ends when its last use is complete. Then nobody will write to its memory any more.

Before its first message a block must know that the others' barriers are initialised, a barrier of the cluster, at
which blocks arrive as soon as theirs are (PTX ISA, "barrier.cluster", "st.async").
"""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.backends.lower.context import Lowering, Registers, Table, lowers
from tilewright.backends.lower.coordinates import TileCoordinates
from tilewright.backends.lower.elements import memory_type, split_vector
from tilewright.backends.lower.index import IntLike
from tilewright.backends.lower.memory import run_if
from tilewright.backends.lower.reduce import Reduction
from tilewright.backends.lower.scalars import define_registers
from tilewright.backends.lower.shared import shared_address, shared_pointer
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.backends.nvidia import ptx
from tilewright.ir.cluster_ops import AwaitMailboxes, ClusterReduce, MakeMailbox
from tilewright.ir.scratch import MAILBOX_BARRIERS, axis_bits
from tilewright.ir.tile_ops import Cast, Constant, Reduce
from tilewright.ir.types import MailboxType, TileType, element_type

BARRIER_BYTES, VECTOR_BYTES, LANE_BITS = 8, 16, 5

MAILBOX_LOWERINGS: Table = {}


@dataclass(frozen=True)
class MailboxRef:
    """A mailbox; ``base`` is the address of its barriers (i32), in every block of the cluster the same."""

    base: mlir.Value
    type: MailboxType


@lowers(MakeMailbox, table=MAILBOX_LOWERINGS)
def lower_mailbox(lw: Lowering, op: MakeMailbox) -> None:
    if op.offset is None:
        raise lw.error("the mailbox has no place in shared memory: the shared-memory plan must run before lowering")
    assert isinstance(op.result.type, MailboxType)
    lw.define(op.result, MailboxRef(shared_address(lw, op.offset), op.result.type))
    boxes = [o for o in lw.function.walk() if isinstance(o, MakeMailbox)]
    if op is boxes[-1]:
        _initialise(lw, [lw.lowered(box.result).base for box in boxes])


def _initialise(lw: Lowering, bases: list[mlir.Value]) -> None:
    """One thread initialises all barriers; then the block arrives where `lower_await` waits for the others."""
    fb = lw.fb
    with fb.if_then(fb.icmp("eq", lw.scope.thread, fb.i32(0))):
        for base in bases:
            for slot in range(2):
                ptx.init_barrier(fb, fb.add(base, slot * BARRIER_BYTES), 1)
        ptx.fence_barrier_init(fb)
    ptx.arrive_at_cluster(fb, release=False)


@lowers(AwaitMailboxes, table=MAILBOX_LOWERINGS)
def lower_await(lw: Lowering, op: AwaitMailboxes) -> None:
    ptx.wait_for_cluster(lw.fb)


@lowers(ClusterReduce, table=MAILBOX_LOWERINGS)
def lower_cluster_reduce(lw: Lowering, op: ClusterReduce) -> None:
    if op.mailbox is None:
        raise lw.error("the exchange has no mailbox: the pass 'mailboxes' must run before lowering")
    use = _Use(lw, op)
    use.meet()
    use.send()
    use.wait()
    define_registers(lw, op.result, use.read())


class _Use:
    """One use of a mailbox: its slot, and who holds which values."""

    def __init__(self, lw: Lowering, op: ClusterReduce):
        assert op.mailbox is not None and op.count is not None
        box = lw.lowered(op.mailbox)
        assert isinstance(box, MailboxRef)
        self.lw, self.op, self.box = lw, op, box
        self.dtype = element_type(op.source.type)
        self.blocks = box.type.blocks
        fb, count = lw.fb, lw.scalar(op.count)
        slot = fb.and_(count, 1)
        #: whether this is the only use
        self.single = isinstance(op.count.op, Constant)
        self.parity = fb.and_(fb.lshr(count, 1), 1)
        self.barrier = fb.add(box.base, fb.mul(slot, BARRIER_BYTES))
        self.slot = fb.add(fb.add(box.base, MAILBOX_BARRIERS), fb.mul(slot, box.type.slot_bytes))
        self.layout = lw.layout(op.source) if isinstance(op.source.type, TileType) else None
        self.flat = self._places()

    def _places(self) -> list[IntLike]:
        """The row-major number of each register's element."""
        if self.layout is None:
            return [0]
        coordinates, math, found = TileCoordinates(self.lw, self.layout), self.lw.index, list[IntLike]()
        for register in range(self.layout.num_registers):
            flat: IntLike = 0
            for axis, size in enumerate(self.layout.tile_shape):
                flat = math.add(math.mul(flat, size), coordinates.of(register, axis))
            found.append(math.value(flat))
        return found

    def _free_bits(self, dim: str) -> list[int]:
        """Bits of the lane or the warp that make no difference: all of them have the same elements."""
        if self.layout is not None:
            return list(self.layout.free_bits(dim))
        return [*range(LANE_BITS if dim == "lane" else self.lw.scope.num_warps.bit_length() - 1)]

    def _distinct(self) -> list[int]:
        """One register for each element that a thread holds."""
        if self.layout is None:
            return [0]
        first: dict[tuple[int, ...], int] = {}
        for register, coordinate in enumerate(self.layout.table("register").tolist()):
            first.setdefault(tuple(coordinate), register)
        return list(first.values())

    # --- steps --------------------------------------------------------------------------------------

    def meet(self) -> None:
        """Threads that hold what another of them will send have read what the use before brought."""
        if self.single:
            return
        if not self._free_bits("warp"):
            ptx.meet_in_warp(self.lw.fb)
        elif not self._have_met():
            self.lw.ops.barrier(self.lw, "role")

    def _have_met(self) -> bool:
        """Whether the values come from a reduction in which all warps meet, which follows the use before."""
        source = self.op.source.op
        while isinstance(source, Cast):
            source = source.source.op
        if not isinstance(source, Reduce) or source.parent is not self.op.parent:
            return False
        return bool(axis_bits(self.lw.layout(source.source), source.axis).warp)

    def send(self) -> None:
        """The sole holder of an element tells all blocks; where several lanes hold it, each tells another block."""
        lw, fb = self.lw, self.lw.fb
        bytes_ = self.box.type.slot_bytes
        ptx.arrive_expect_tx(fb, self.barrier, bytes_, fb.icmp("eq", lw.scope.thread, fb.i32(0)))
        spare = self._free_bits("lane")[: self.blocks.bit_length() - 1]
        columns = [1 << spare.index(bit) if bit in spare else 0 for bit in range(LANE_BITS)]
        own, peer = ptx.cluster_rank(fb), lw.index.value(lw.index.linear_map(lw.scope.lane, columns))
        words = {register: lw.registers(self.op.source)[register] for register in self._distinct()}

        def tell() -> None:
            for first in range(0, self.blocks, 1 << len(spare)):
                there = fb.add(peer, first)
                barrier, slot = (ptx.map_to_block(fb, address, there) for address in (self.barrier, self.slot))
                for register, value in words.items():
                    place = lw.index.add(lw.index.mul(self.flat[register], self.blocks), own)
                    address = lw.index.value(lw.index.add(slot, lw.index.mul(place, self.dtype.bytes)))
                    ptx.store_async(fb, address, _bits(lw, value, self.dtype.bits), self.dtype.bits, barrier)

        run_if(lw, self._senders(spare), tell)

    def _senders(self, spare: list[int]) -> mlir.Value | None:
        """i1: the first of the threads that hold the same elements, and those of its lanes that tell other blocks."""
        lw, fb = self.lw, self.lw.fb
        lanes = sum(1 << bit for bit in self._free_bits("lane") if bit not in spare)
        warps = sum(1 << bit for bit in self._free_bits("warp"))
        masks = [(value, mask) for value, mask in ((lw.scope.lane, lanes), (lw.scope.warp, warps)) if mask]
        conditions = [fb.icmp("eq", fb.and_(value, fb.i32(mask)), fb.i32(0)) for value, mask in masks]
        if not conditions:
            return None
        return conditions[0] if len(conditions) == 1 else fb.and_(*conditions)

    def wait(self) -> None:
        ptx.wait_parity(self.lw.fb, self.barrier, self.parity, "cluster")

    def read(self) -> Registers:
        """All blocks' values in their order, combined."""
        lw, bytes_ = self.lw, self.dtype.bytes
        reduction, width = Reduction(lw, self.op.fn, self.dtype), min(self.blocks, VECTOR_BYTES // self.dtype.bytes)
        known: dict[IntLike, mlir.Value] = {}
        for flat in self.flat:
            if flat in known:
                continue
            values: Registers = []
            for first in range(0, self.blocks, width):
                place = lw.index.add(lw.index.mul(flat, self.blocks * bytes_), first * bytes_)
                pointer = shared_pointer(lw, lw.index.add(self.slot, place))
                vector = lw.fb.load(pointer, memory_type(lw, self.dtype, width), width * bytes_)
                values += split_vector(lw, vector, width)
            known[flat] = reduction.tree(values)
        return [known[flat] for flat in self.flat]


def _bits(lw: Lowering, value: mlir.Value, bits: int) -> mlir.Value:
    return lw.fb.bitcast(value, getattr(lw.fb.types, f"i{bits}"))
