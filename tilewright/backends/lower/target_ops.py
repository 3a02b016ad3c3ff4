"""What the shared lowerings ask of a GPU: threads, shuffles, barriers, math functions, predicated stores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from tilewright.backends.lower import fp8
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir.core import Value
from tilewright.ir.target import Target
from tilewright.ir.types import DType

if TYPE_CHECKING:
    from tilewright.backends.lower.context import Lowering
    from tilewright.backends.lower.memory import TileAccess


#: (i1 or None for always, pointer, value, alignment in bytes)
Store: TypeAlias = tuple[Any, Any, Any, int]


class TargetOps(ABC):
    """Hooks of one GPU vendor. Methods emit operations at the lowering's insertion point."""

    #: LLVM's name for all threads of the GPU, and what atomic operations must carry to become instructions
    device_scope: str = ""
    atomic_attributes: tuple[str, ...] = ()
    #: whether one thread's fence for the device also orders what others of its block did before a barrier
    barriers_add_up: bool = True

    def __init__(self, target: Target):
        self.target = target

    # --- where this code runs -----------------------------------------------------------------

    @abstractmethod
    def thread_id(self, lw: Lowering) -> mlir.Value:
        """Index of the thread in its block (i32)."""

    @abstractmethod
    def warp_index(self, lw: Lowering, thread: mlir.Value) -> mlir.Value:
        """``thread // warp_size`` as a value that the hardware knows to be the same in all lanes (i32)."""

    @abstractmethod
    def block_id(self, lw: Lowering, axis: int) -> mlir.Value:
        """Index of the block along axis 0, 1 or 2 of the launch (i32)."""

    @abstractmethod
    def num_blocks(self, lw: Lowering, axis: int) -> mlir.Value:
        """Number of blocks launched along an axis (i32)."""

    @abstractmethod
    def is_leader(self, lw: Lowering) -> mlir.Value:
        """i1: true in one thread of the current warp. All threads of the warp must arrive together."""

    # --- threads talking to each other ----------------------------------------------------------

    @abstractmethod
    def shuffle_xor(self, lw: Lowering, value: mlir.Value, mask: int) -> mlir.Value:
        """The i32 that lane ``lane ^ mask`` of the warp holds."""

    @abstractmethod
    def shuffle(self, lw: Lowering, value: mlir.Value, lane: mlir.Value) -> mlir.Value:
        """The i32 that another lane of the warp holds."""

    @abstractmethod
    def barrier(self, lw: Lowering, scope: str) -> None:
        """All threads of ``block``, ``role`` or ``warpgroup`` meet; shared-memory accesses before are visible after."""

    # --- memory ---------------------------------------------------------------------------------

    @abstractmethod
    def shared_base(self, lw: Lowering) -> mlir.Value:
        """Byte address of the block's shared memory in address space 3 (i32)."""

    def load_global(
        self, lw: Lowering, pointer: mlir.Value, type_: mlir.Type, align: int, evict: str | None
    ) -> mlir.Value:
        """A load from global memory, with a hint to the caches (`tile_ops.EVICTION`) where the target has such."""
        return lw.fb.load(pointer, type_, align, nontemporal=evict == "evict_first")

    @abstractmethod
    def store_if(self, lw: Lowering, accesses: Sequence[Store], evict: str | None = None) -> None:
        """Global stores, each done where its predicate holds, with a hint to the caches as for `load_global`."""

    def tile_access(self, view: Value, sizes: tuple[int, ...]) -> type[TileAccess] | None:
        """How tiles of these sizes are read and written, where not by 64-bit addresses and branches."""
        return None

    def from_here(self, lw: Lowering, value: mlir.Value) -> mlir.Value:
        """The same i32; on targets where it pays, what follows from it is not moved in front of this place."""
        return value

    # --- other ranks ----------------------------------------------------------------------------

    def fence(self, lw: Lowering, order: str) -> None:
        """Among all GPUs: ``release`` this thread's accesses before, or ``acquire`` for those behind."""
        lw.fb.fence(order)

    def store_release(self, lw: Lowering, value: mlir.Value, pointer: mlir.Value) -> None:
        """Write an i32 that tells any GPU of what this thread knows."""
        lw.fb.store(value, pointer, 4, ordering="release")

    def store_words(self, lw: Lowering, pointer: mlir.Value, words: Sequence[mlir.Value]) -> None:
        """Write i64s that follow each other, each at once for all GPUs, in no order."""
        for place, word in enumerate(words):
            lw.fb.store(word, lw.fb.gep(pointer, 8 * place), 8, ordering="monotonic")

    def load_words(self, lw: Lowering, pointer: mlir.Value, count: int) -> list[mlir.Value]:
        """Read i64s that follow each other, as `store_words` writes them."""
        return [lw.fb.load(lw.fb.gep(pointer, 8 * i), lw.fb.types.i64, 8, ordering="monotonic") for i in range(count)]

    @abstractmethod
    def all_lanes(self, lw: Lowering, condition: mlir.Value) -> mlir.Value:
        """i1, the same in the whole warp: the condition holds in all its lanes, which arrive together."""

    @abstractmethod
    def pause(self, lw: Lowering) -> None:
        """Let others run for a moment, between two looks at a flag."""

    @abstractmethod
    def nanoseconds(self, lw: Lowering) -> mlir.Value:
        """A clock (i64)."""

    @abstractmethod
    def add_to_memory(self, lw: Lowering, pointer: mlir.Value, value: mlir.Value, dtype: DType) -> None:
        """Add to an element of global memory, atomically among all GPUs."""

    # --- messages -------------------------------------------------------------------------------

    def print_line(self, lw: Lowering, text: str, values: Sequence[mlir.Value]) -> None:
        """Print a text in printf's notation; values are i32, i64 or f64."""
        raise lw.error(
            f"device_print does not exist on {self.target.name}", "store the value, or run on the cpu device"
        )

    def fail(self, lw: Lowering, text: str, file: str, line: int) -> None:
        """Stop the kernel; with the message where the hardware's runtime can show one."""
        lw.fb.intrinsic("llvm.trap", None)

    # --- arithmetic -----------------------------------------------------------------------------

    @abstractmethod
    def math(self, lw: Lowering, fn: str, x: mlir.Value) -> mlir.Value:
        """A function of `tilewright.ir.tile_ops.FLOAT_ONLY` on an f32; see `lower.math_f32` for the errors."""

    @abstractmethod
    def divide(self, lw: Lowering, x: mlir.Value, y: mlir.Value) -> mlir.Value:
        """f32 quotient, at most 2.5 ulp off."""

    def to_int(self, lw: Lowering, x: mlir.Value) -> mlir.Value:
        """The i32 nearest to an f32 or f64 towards zero, NaN as 0."""
        return lw.fb.fptosi_sat(x, lw.fb.types.i32)

    def widen_half(self, lw: Lowering, value: mlir.Value) -> mlir.Value:
        """An f16 or bf16 as f32."""
        return lw.fb.fpext(value, lw.fb.types.f32)

    def widen_fp8(self, lw: Lowering, value: mlir.Value, dtype: DType) -> mlir.Value:
        """An 8-bit float as f32."""
        return fp8.widen(lw, value, dtype)

    def round_fp8(self, lw: Lowering, values: Sequence[mlir.Value], dtype: DType) -> list[mlir.Value]:
        """f32 values as 8-bit floats: nearest even, saturating."""
        return [fp8.round_to(lw, value, dtype) for value in values]

    def round_pairs(self, lw: Lowering, values: Sequence[mlir.Value], dtype: DType) -> list[mlir.Value] | None:
        """f32 values rounded to f16 or bf16 two at a time; None where that gains nothing."""
        return None
