"""AMD CDNA: what the shared lowerings ask of the target. Instructions are named as in AMD's ISA guides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from tilewright.backends.amd.buffers import BufferAccess, spans_too_much
from tilewright.backends.lower.context import Lowering
from tilewright.backends.lower.math_f32 import SOFTWARE
from tilewright.backends.lower.memory import TileAccess
from tilewright.backends.lower.target_ops import Store, TargetOps
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir.core import Value
from tilewright.ir.types import DType, ViewType

_AXES = "xyz"
#: grid_size_x of hsa_kernel_dispatch_packet_t, in work items (HSA Platform System Architecture, "Kernel dispatch")
_GRID_SIZE_OFFSET = 12
#: DPP controls, one after the other, that exchange lanes so far apart: quad_perm, row_half_mirror, row_ror:8
_DPP = {1: (0xB1,), 2: (0x4E,), 4: (0x141, 0x1B), 8: (0x128,)}
#: instructions of CDNA4 that exchange halves of two registers, and ds_swizzle's pattern in groups of 32 lanes
_SWAPS = {16: "llvm.amdgcn.permlane16.swap", 32: "llvm.amdgcn.permlane32.swap"}
_SWIZZLE_XOR_16 = 16 << 10 | 0x1F


def _intrinsic(name: str) -> Callable[[Lowering, mlir.Value], mlir.Value]:
    return lambda lw, x: lw.fb.intrinsic(name, x.type, [x])


def _float_unary(name: str) -> Callable[[Lowering, mlir.Value], mlir.Value]:
    return lambda lw, x: lw.fb.float_unary(name, x)


#: LLVM lowers exp, exp2, log and log2 with the scaling that denormals need, 1 ulp; sqrt is correctly rounded
_MATH: dict[str, Callable[[Lowering, mlir.Value], mlir.Value]] = {
    **SOFTWARE,
    "exp2": _float_unary("exp2"),
    "log2": _float_unary("log2"),
    "log": _float_unary("log"),
    "rsqrt": _intrinsic("llvm.amdgcn.rsq"),
    "sqrt": _float_unary("sqrt"),
    "floor": _float_unary("floor"),
    "ceil": _float_unary("ceil"),
}


#: s_waitcnt vmcnt(0), the other counters at their greatest (CDNA3 ISA guide, "S_WAITCNT")
_NO_VECTOR_ACCESSES = 0x0F70


class AmdOps(TargetOps):
    """CDNA3 and CDNA4: waves of 64 threads."""

    device_scope = "agent"
    barriers_add_up = False
    #: tensors are memory of this GPU, where float atomics are instructions and no loops of compare-and-swap
    atomic_attributes = ("rocdl.no_fine_grained_memory", "rocdl.no_remote_memory", "rocdl.ignore_denormal_mode")

    def _register(self, lw: Lowering, name: str) -> mlir.Value:
        return lw.fb.op(f"rocdl.{name}", [lw.fb.types.i32]).result

    def thread_id(self, lw: Lowering) -> mlir.Value:
        return self._register(lw, "workitem.id.x")

    def warp_index(self, lw: Lowering, thread: mlir.Value) -> mlir.Value:
        return lw.fb.intrinsic("llvm.amdgcn.readfirstlane", lw.fb.types.i32, [lw.fb.lshr(thread, 6)])

    def block_id(self, lw: Lowering, axis: int) -> mlir.Value:
        return self._register(lw, f"workgroup.id.{_AXES[axis]}")

    def num_blocks(self, lw: Lowering, axis: int) -> mlir.Value:
        """The grid of the arguments; a persistent launch, which is smaller, has its size in the dispatch packet."""
        if not lw.function.attributes.get("persistent"):
            return lw.entry.grid[axis]
        fb = lw.fb
        packet = fb.intrinsic("llvm.amdgcn.dispatch.ptr", fb.types.ptr(4))
        work_items = fb.load(fb.gep(packet, _GRID_SIZE_OFFSET + 4 * axis), fb.types.i32, 4, invariant=True)
        return fb.udiv(work_items, lw.entry.abi.threads) if axis == 0 else work_items

    def is_leader(self, lw: Lowering) -> mlir.Value:
        return lw.fb.icmp("eq", lw.scope.lane, 0)

    def shuffle_xor(self, lw: Lowering, value: mlir.Value, mask: int) -> mlir.Value:
        """Without memory and addresses where there is a way; CDNA3 has none for halves of a wave."""
        fb, types = lw.fb, lw.fb.types
        if mask in _DPP:
            for control in _DPP[mask]:
                operands = [fb.poison(types.i32), value, fb.i32(control), fb.i32(15), fb.i32(15), fb.i1(True)]
                value = fb.intrinsic("llvm.amdgcn.update.dpp.i32", types.i32, operands)
            return value
        if mask in _SWAPS and self.target.has("permlane_swap"):
            pair = fb.intrinsic(_SWAPS[mask], types.struct([types.i32, types.i32]), [value, value, *[fb.i1(False)] * 2])
            low, high = fb.unpack_struct(pair, [types.i32, types.i32])
            return fb.select(fb.icmp("eq", fb.and_(lw.scope.lane, mask), 0), high, low)
        if mask == 16:
            return fb.intrinsic("llvm.amdgcn.ds.swizzle", types.i32, [value, fb.i32(_SWIZZLE_XOR_16)])
        return self.shuffle(lw, value, fb.xor(lw.scope.lane, mask))

    def shuffle(self, lw: Lowering, value: mlir.Value, lane: mlir.Value) -> mlir.Value:
        address = lw.fb.shl(lane, 2)
        return lw.fb.intrinsic("llvm.amdgcn.ds.bpermute", lw.fb.types.i32, [address, value])

    def barrier(self, lw: Lowering, scope: str) -> None:
        """s_barrier between fences of the workgroup. There is one barrier: every scope is the block's."""
        if lw.scope.num_warps != lw.entry.abi.threads // self.target.warp_size:
            raise lw.error("AMD has no barrier for a part of the block")
        lw.fb.fence("release", "workgroup")
        lw.fb.op("rocdl.s.barrier")
        lw.fb.fence("acquire", "workgroup")

    def shared_base(self, lw: Lowering) -> mlir.Value:
        size = lw.entry.abi.shared_bytes
        if size <= 0:
            raise lw.error("the function has no shared_bytes: the shared-memory plan must run before lowering")
        return lw.fb.ptrtoint(lw.fb.address_of(lw.entry.shared_symbol(size)), lw.fb.types.i32)

    def store_if(self, lw: Lowering, accesses: Sequence[Store], evict: str | None = None) -> None:
        for predicate, group in groupby(accesses, key=lambda access: access[0]):
            if predicate is None:
                _store_all(lw, group, evict)
            else:
                with lw.fb.if_then(predicate):
                    _store_all(lw, group, evict)

    def tile_access(self, view: Value, sizes: tuple[int, ...]) -> type[TileAccess] | None:
        """Buffer descriptors, where offsets inside the tile fit into 32 bits."""
        assert isinstance(view.type, ViewType)
        return None if spans_too_much(view.type, sizes) else BufferAccess

    def fence(self, lw: Lowering, order: str) -> None:
        """LLVM drops the wait behind buffer_wbl2 where nothing else is under way, so that it is said once more."""
        lw.fb.fence(order)
        if order == "release":
            lw.fb.intrinsic("llvm.amdgcn.s.waitcnt", None, [lw.fb.i32(_NO_VECTOR_ACCESSES)])

    def store_release(self, lw: Lowering, value: mlir.Value, pointer: mlir.Value) -> None:
        self.fence(lw, "release")
        lw.fb.store(value, pointer, 4, ordering="monotonic")

    def all_lanes(self, lw: Lowering, condition: mlir.Value) -> mlir.Value:
        fb = lw.fb
        others = fb.intrinsic("llvm.amdgcn.ballot.i64", fb.types.i64, [fb.not_(condition)])
        return fb.icmp("eq", others, fb.i64(0))

    def pause(self, lw: Lowering) -> None:
        lw.fb.op("rocdl.s.sleep", attributes={"count": lw.fb.module.integer(32, 1)})

    def nanoseconds(self, lw: Lowering) -> mlir.Value:
        """s_memrealtime counts at 100 MHz (CDNA3 ISA guide)."""
        ticks = lw.fb.intrinsic("llvm.amdgcn.s.memrealtime", lw.fb.types.i64)
        return lw.fb.mul(ticks, 10)

    def add_to_memory(self, lw: Lowering, pointer: mlir.Value, value: mlir.Value, dtype: DType) -> None:
        """Floats by compare-and-swap: other GPUs' memory has no additions of floats on every one of these GPUs."""
        if dtype.is_float:
            _add_float(lw, pointer, value, dtype)
        else:
            lw.fb.atomicrmw("add", pointer, value, "monotonic", None, dtype.bytes)

    def math(self, lw: Lowering, fn: str, x: mlir.Value) -> mlir.Value:
        return _MATH[fn](lw, x)

    def divide(self, lw: Lowering, x: mlir.Value, y: mlir.Value) -> mlir.Value:
        """llvm.amdgcn.fdiv.fast: v_rcp_f32 with the divisor scaled out of the denormals, 2.5 ulp."""
        return lw.fb.intrinsic("llvm.amdgcn.fdiv.fast", x.type, [x, y])


def _add_float(lw: Lowering, pointer: mlir.Value, value: mlir.Value, dtype: DType) -> None:
    """Swap the word around the element until nobody else has changed it in between. The first guess is 0."""
    fb, types = lw.fb, lw.fb.types
    size = max(4, dtype.bytes)
    word, bits = types.int(8 * size), types.int(dtype.bits)
    shift = None
    if dtype.bytes < size:
        address = fb.ptrtoint(pointer, types.i64)
        shift = fb.trunc(fb.shl(fb.and_(address, size - 1), 3), word)
        pointer = fb.inttoptr(fb.and_(address, -size), types.ptr(1))
    head, done = fb.block(word), fb.block()
    fb.br(head, [fb.const(0, word)])
    fb.position_at_end(head)
    (old,) = head.arguments
    part = old if shift is None else fb.trunc(fb.lshr(old, shift), bits)
    summed = fb.bitcast(fb.fadd(fb.bitcast(part, value.type), value), bits)
    new = summed
    if shift is not None:
        mask = fb.shl(fb.const((1 << dtype.bits) - 1, word), shift)
        new = fb.or_(fb.and_(old, fb.not_(mask)), fb.shl(fb.zext(summed, word), shift))
    found = fb.cmpxchg(pointer, old, new, size)
    fb.cond_br(fb.icmp("eq", found, old), done, head, else_arguments=[found])
    fb.position_at_end(done)


def _store_all(lw: Lowering, accesses: Iterable[Store], evict: str | None) -> None:
    for _, pointer, value, align in accesses:
        lw.fb.store(value, pointer, align, nontemporal=evict == "evict_first")
