"""Rings: mbarriers that pass stages between producers and consumers.

Every ring has ``full[stages]`` and ``empty[stages]``. Use number ``count`` takes stage ``count % stages`` in round
``count // stages``. A fresh barrier is in phase 0, and the phase "before" it counts as complete: waiting for parity
1 passes. So consumers wait on full with parity ``round & 1`` and producers on empty with its opposite.

Blocks of a cluster that use a ring in step have it at the same place of their shared memory. A block's copies write
stages of all, so its empty barrier waits for the consumers of all; a full barrier waits for the bytes from all.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.backends.lower.context import Lowering, Table, lowers
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.backends.nvidia import ptx
from tilewright.backends.nvidia.state import WARPGROUP_WARPS, leader, state, warpgroup_leader, warpgroup_thread
from tilewright.ir.async_ops import Acquire, Await, Barrier, Copy, Fence, LocalLoad, MakeRing, Publish, Release, ring_of
from tilewright.ir.core import Value
from tilewright.ir.types import RingType, SlotType, TokenType

BARRIER_BYTES, TENSOR_MAP_BYTES = 8, 128

RING_LOWERINGS: Table = {}


@dataclass(frozen=True)
class RingRef:
    """A ring; ``base`` is the address of its barriers (i32)."""

    base: mlir.Value
    stages: int
    producers: int
    consumers: int
    ctas: int
    read_by_threads: bool

    @property
    def scope(self) -> str:
        """Of the memory that releases and acquires order: none but the matrix unit's, done by its wait, or threads'."""
        return "cluster" if self.ctas > 1 and self.read_by_threads else "cta"


@lowers(MakeRing, table=RING_LOWERINGS)
def lower_ring(lw: Lowering, op: MakeRing) -> None:
    if op.offset is None:
        raise lw.error("the ring has no place in shared memory: the shared-memory plan must run before lowering")
    assert isinstance(op.result.type, RingType)
    base = lw.fb.add(lw.ops.shared_base(lw), op.offset)
    read_by_threads = op.result in state(lw).read_by_threads
    stages = op.result.type.stages
    lw.define(op.result, RingRef(base, stages, op.producers, op.consumers, op.ctas, read_by_threads))
    rings = [o for o in lw.function.walk() if isinstance(o, MakeRing)]
    if op is rings[-1]:
        _initialise(lw, [lw.lowered(r.result) for r in rings])


def _initialise(lw: Lowering, rings: list[RingRef]) -> None:
    """One thread initialises all barriers, for the other threads and for the copy engine (the async proxy)."""
    fb = lw.fb
    with fb.if_then(fb.icmp("eq", lw.scope.thread, fb.i32(0))):
        for ring in rings:
            for place in range(2 * ring.stages):
                arrivals = ring.producers if place < ring.stages else ring.consumers
                ptx.init_barrier(fb, fb.add(ring.base, place * BARRIER_BYTES), arrivals)
        ptx.fence_barrier_init(fb)
        ptx.fence_async_proxy(fb)
        _acquire_maps(lw)
    if any(ring.ctas > 1 for ring in rings):
        ptx.cluster_barrier(fb, release=False)
    else:
        ptx.block_barrier(fb)


def _acquire_maps(lw: Lowering) -> None:
    """Maps of all ranks' tensors lie in global memory: each block needs a fence (CUDA C++ Programming Guide, TMA)."""
    for param, maps in zip(lw.entry.abi.tensor_maps, lw.entry.tensor_maps, strict=True):
        if param.peers:
            assert lw.entry.world is not None, "kernels that know no other ranks have no maps of theirs"
            with lw.fb.for_loop(0, lw.entry.world.size, 1, unroll=False) as loop:
                place = lw.index.mul(lw.index.wide(loop.index), TENSOR_MAP_BYTES)
                ptx.acquire_tensor_map(lw.fb, lw.fb.gep(maps, lw.index.value(place, 64)))


# --- where a count leads --------------------------------------------------------------------------


def ring(lw: Lowering, value: Value) -> RingRef:
    ref = lw.lowered(value)
    if not isinstance(ref, RingRef):
        raise lw.error(f"{value} is not a ring")
    return ref


def full_barrier(lw: Lowering, ref: RingRef, count: mlir.Value) -> mlir.Value:
    """The barrier of a stage that producers complete."""
    stage = lw.fb.urem(count, ref.stages) if ref.stages > 1 else lw.fb.i32(0)
    return lw.fb.add(ref.base, lw.fb.mul(stage, BARRIER_BYTES))


def empty_barrier(lw: Lowering, ref: RingRef, count: mlir.Value) -> mlir.Value:
    """The barrier of a stage that consumers complete."""
    return lw.fb.add(full_barrier(lw, ref, count), ref.stages * BARRIER_BYTES)


def _round_parity(lw: Lowering, ref: RingRef, count: mlir.Value) -> mlir.Value:
    rounds = lw.fb.udiv(count, ref.stages) if ref.stages > 1 else count
    return lw.fb.and_(rounds, 1)


# --- operations -----------------------------------------------------------------------------------


@lowers(Acquire, table=RING_LOWERINGS)
def lower_acquire(lw: Lowering, op: Acquire) -> None:
    ref, count = ring(lw, op.ring), lw.scalar(op.count)
    parity = lw.fb.xor(_round_parity(lw, ref, count), 1)
    ptx.wait_parity(lw.fb, empty_barrier(lw, ref, count), parity, ref.scope)


@lowers(Await, table=RING_LOWERINGS)
def lower_await(lw: Lowering, op: Await) -> None:
    ref, count = ring(lw, op.ring), lw.scalar(op.count)
    ptx.wait_parity(lw.fb, full_barrier(lw, ref, count), _round_parity(lw, ref, count))


@lowers(Release, table=RING_LOWERINGS)
def lower_release(lw: Lowering, op: Release) -> None:
    """One arrival of each warpgroup. Its threads' own reads must be over first: the matrix unit's are, by its wait.

    A barrier alone orders them before other threads' writes, not before those of the copy engine (the async proxy),
    which may overtake reads that wait for busy banks. In blocks that use the ring in step, the first threads of the
    warpgroup arrive at one block's barrier each.
    """
    ref = ring(lw, op.ring)
    reads = ref.read_by_threads and not _met_since_reads(op)
    if reads and _filled_by_engine(lw, op.ring):
        ptx.fence_async_proxy(lw.fb)
    if reads and not lw.scope.single_thread:
        lw.ops.barrier(lw, "warpgroup" if lw.scope.num_warps >= WARPGROUP_WARPS else "role")
    barrier = empty_barrier(lw, ref, lw.scalar(op.count))
    if ref.ctas == 1:
        ptx.arrive(lw.fb, barrier, warpgroup_leader(lw))
    elif lw.scope.single_thread:
        for block in range(ref.ctas):
            ptx.arrive_in_block(lw.fb, barrier, lw.fb.i32(block), scope=ref.scope)
    else:
        thread = warpgroup_thread(lw)
        ptx.arrive_in_block(lw.fb, barrier, thread, lw.fb.icmp("ult", thread, lw.fb.i32(ref.ctas)), ref.scope)


def _met_since_reads(op: Release) -> bool:
    """Whether the threads have fenced and met behind their last reads of the stage anyway."""
    assert op.parent is not None
    met = fenced = False
    for earlier in reversed(op.parent.ops[: op.parent.ops.index(op)]):
        if any(isinstance(o, LocalLoad) and ring_of(o.slot) is op.ring for o in earlier.walk()):
            return met and fenced
        if isinstance(earlier, Await) and earlier.ring is op.ring:
            return False
        met |= isinstance(earlier, Barrier) and earlier.scope != "cluster"
        fenced |= met and isinstance(earlier, Fence)
    return False


def _filled_by_engine(lw: Lowering, value: Value) -> bool:
    return any(is_engine(token) for token, op in state(lw).publishes.items() if op.ring is value)


def announce(lw: Lowering, op: Publish) -> None:
    """Tell the stage's barrier how many bytes the copy engine will bring; before its copies start.

    Where only the engine fills the stage this is also the only arrival.
    """
    copies = [token.op for token in op.tokens if is_engine(token)]
    bytes_ = sum(slot_bytes(copy.slot) for copy in copies if isinstance(copy, Copy))
    ref = ring(lw, op.ring)
    address = full_barrier(lw, ref, lw.scalar(op.count))
    (ptx.arrive_expect_tx if engine_alone(op) else ptx.expect_tx)(lw.fb, address, bytes_)


@lowers(Publish, table=RING_LOWERINGS)
def lower_publish(lw: Lowering, op: Publish) -> None:
    """Threads that filled the stage arrive; the copy engine's part was announced with its first copy."""
    ref = ring(lw, op.ring)
    if engine_alone(op):
        return
    only_leader = leader(lw) if ref.producers == 1 else None
    ptx.arrive(lw.fb, full_barrier(lw, ref, lw.scalar(op.count)), only_leader)


def is_engine(token: Value) -> bool:
    """Whether the copy engine completes a token."""
    return isinstance(token.type, TokenType) and token.type.kind == "tma"


def engine_alone(op: Publish) -> bool:
    """Whether the copy engine does all copies that a publish announces, and nobody else arrives."""
    arrives = not isinstance(op.ring.op, MakeRing) or op.ring.op.producers > 1
    return not arrives and bool(op.tokens) and all(is_engine(t) for t in op.tokens)


def slot_bytes(slot: Value) -> int:
    assert isinstance(slot.type, SlotType)
    return slot.type.bytes
