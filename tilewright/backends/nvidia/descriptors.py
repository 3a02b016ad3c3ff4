"""Shared-memory matrix descriptors of wgmma, derived from the slot's layout.

PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions": "Shared Memory Matrix Layout"
and "Matrix Descriptor Format". A descriptor holds, in units of 16 bytes, bits 0-13 the start address, 16-29 the
leading dimension offset, 32-45 the stride dimension offset, and bits 62-63 the swizzle.

Lines below are those of `SharedLayout`: runs along the contiguous dimension, ``swizzle`` bytes wide in each block.

- K-major (lines along K): groups of 8 lines are ``stride`` apart; the leading offset is not used. The 32 bytes
  of one instruction lie inside a block.
- MN-major (lines along M or N, "transposed"): blocks are ``leading`` apart, groups of 8 lines (8 steps of K)
  ``stride``.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.ir.layout import SharedLayout

#: K of one instruction in bytes, and in elements of 16 bits
INSTRUCTION_BYTES = 32
INSTRUCTION_K = 16
ADDRESS_MASK = 0x3FFF
_SWIZZLE_CODES = {128: 1, 64: 2, 32: 3}


@dataclass(frozen=True)
class MatrixDescriptor:
    """How wgmma walks one operand. ``bits``: the descriptor with start address 0. ``axis``: the tile's M or N dim."""

    layout: SharedLayout
    axis: int
    bits: int
    transposed: bool

    def start(self, position: int, k: int) -> int:
        """Bytes from the slot's base to the instruction's part at (M or N position, k)."""
        coordinates = [k, k]
        coordinates[self.axis] = position
        return int(self.layout.offset_of(*coordinates)) * self.layout.element_bits // 8

    def step(self, size: int, count: int) -> int:
        """Bytes between consecutive parts of ``size`` rows (columns); ValueError unless all steps are equal."""
        starts = [self.start(size * part, 0) for part in range(count)]
        step = starts[1] if count > 1 else 0
        if starts != [part * step for part in range(count)]:
            raise ValueError(f"parts of {size} of {self.layout} are not evenly spaced")
        return step


def instruction_k(element_bits: int) -> int:
    """K of one instruction in elements."""
    return INSTRUCTION_BYTES * 8 // element_bits


def matrix_descriptor(layout: SharedLayout, axis: int) -> MatrixDescriptor:
    """The descriptor of an operand whose M or N dim is ``axis``; ValueError where the unit cannot read it.

    Elements have 16 bits, or 8 or 32 (tf32) where lines run along K.
    """
    transposed = layout.order[0] == axis
    if layout.element_bits not in (8, 16, 32) or len(layout.shape) != 2:
        raise ValueError(f"the matrix unit reads two-dimensional tiles of 8-, 16- or 32-bit elements, not {layout}")
    if layout.element_bits != 16 and transposed:
        raise ValueError(f"the matrix unit reads only 16-bit elements across the lines of {layout}")
    if layout.swizzle not in _SWIZZLE_CODES:
        raise ValueError(f"the matrix unit needs a layout swizzled by 32, 64 or 128 bytes, not {layout}")
    k = layout.shape[1 - axis]
    step = instruction_k(layout.element_bits)
    if k % step or layout.num_lines % 8:
        raise ValueError(f"K = {k} and {layout.num_lines} lines are not multiples of {step} and 8")
    stride = 8 * layout.swizzle
    leading = layout.num_lines * layout.swizzle if transposed else 16
    bits = leading >> 4 << 16 | stride >> 4 << 32 | _SWIZZLE_CODES[layout.swizzle] << 62
    return MatrixDescriptor(layout, axis, bits, transposed)
