"""Tiles from registers to slots: matrix fragments leave through ``stmatrix``.

An 8 x 8 matrix of 16-bit elements is one 32-bit word of each thread: lane l has row l / 4, columns 2 (l % 4) + {0, 1}
(PTX ISA, "stmatrix"). One instruction stores four matrices, that is, four words of each thread, and takes the
address of a 16-byte row from each lane: row l % 8 of matrix l / 8. Where a register layout consists of such
fragments, these addresses are linear in the lane too: they are the addresses of a layout in which the lanes walk
rows and matrices.
"""

from __future__ import annotations

from tilewright.backends.lower.context import Lowering, SlotRef, Table, lowers
from tilewright.backends.lower.coordinates import sole_holder
from tilewright.backends.lower.shared import SharedAccess, lower_local_store
from tilewright.backends.nvidia import ptx
from tilewright.backends.nvidia.wgmma import pack_words
from tilewright.ir.async_ops import LocalStore
from tilewright.ir.layout import LinearLayout

_FRAGMENT_LANES = ((0, 2), (0, 4), (1, 0), (2, 0), (4, 0))

LOCAL_LOWERINGS: Table = {}


@lowers(LocalStore, table=LOCAL_LOWERINGS)
def lower_store(lw: Lowering, op: LocalStore) -> None:
    slot, layout = lw.slot(op.slot), lw.layout(op.value)
    if not lw.target.has("stmatrix") or not stores_matrices(slot, layout) or sole_holder(lw, layout) is not None:
        lower_local_store(lw, op)
        return
    rows = matrix_rows(layout, slot.layout.order[0])
    access = SharedAccess(lw, slot.base, slot.layout, rows, slot.dtype)
    words = pack_words(lw, lw.registers(op.value))
    count = len(words) // rows.num_registers
    transposed = slot.layout.order[0] == 0
    for number in range(rows.num_registers):
        address = lw.fb.ptrtoint(access.pointer(number), lw.fb.types.i32)
        ptx.store_matrices(lw.fb, address, words[number * count : (number + 1) * count], transposed)


def stores_matrices(slot: SlotRef, layout: LinearLayout) -> bool:
    """Whether the registers are words of 8 x 8 matrices whose rows lie in 16 bytes each."""
    if slot.type.rank != 2 or slot.dtype.bits != 16 or slot.layout.block_size % 8 or slot.layout.max_phase > 1:
        return False
    registers = layout.basis("register")
    if layout.basis("lane") != _FRAGMENT_LANES or registers[:1] != ((0, 1),):
        return False
    others = [*registers[1:], *layout.basis("warp")]
    return not any(c % 8 for vector in others for c in vector) and not any(size % 8 for size in layout.shape)


def matrix_rows(layout: LinearLayout, contiguous: int) -> LinearLayout:
    """Where each lane's row address points: lanes 0-7 walk a matrix's rows, lane bits 3 and 4 the matrices.

    Its register r stands for the words of the instruction's up to four matrices, registers 8 r ... of ``layout``.
    """
    registers = layout.basis("register")
    along = [(1, 0), (2, 0), (4, 0)] if contiguous == 1 else [(0, 1), (0, 2), (0, 4)]
    matrices = list(registers[1:3])
    lanes = [*along, *matrices, *[(0, 0)] * (2 - len(matrices))]
    bases = {"register": registers[1 + len(matrices) :], "lane": lanes, "warp": layout.basis("warp")}
    return LinearLayout.make(bases, layout.shape, layout.repeat, layout.repeat_order)
