"""Matrix instructions on a sparse A: D = A x B + D, where A has two of every four elements along K.

The two are stored next to each other; two bits for each say which of the four it is (CDNA3 and CDNA4 ISA section 7.5,
"Sparse Matrices"). Source 2 holds those indices of a lane's elements of A, the first in the lowest bits. Several sets
of them fit where A has few: ABID picks one, unless CBSZ is not zero, then it is the first.

Each lane holds ``2 * stored`` elements of B that are consecutive in K. The instructions that CDNA4 added hold two runs,
in the two halves of K (section 7.5.1.3): B's layout is given, A's follows from it.
"""

from __future__ import annotations

import numpy as np

from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.mfma import Shape, accumulate, multiply, parse_shape, read_elements
from tilewright.runtime.emulator.amd.operands import Array
from tilewright.runtime.emulator.amd.registry import ARCHITECTURES, Handler, define
from tilewright.runtime.emulator.amd.state import WaveState

_U32 = np.uint32
_INDEX_BITS = 2


def _selected_set(inst: Instruction, stored: int) -> int:
    """The lowest bit of the indices that the instruction uses."""
    bits = _INDEX_BITS * stored
    return 0 if inst.number("cbsz") & 3 else inst.number("abid") % (32 // bits) * bits


def expand(stored: Array, indices: Array) -> Array:
    """The stored elements [waves, 64, n] at their places in [waves, 64, 2 n]; ``indices``: uint32 [waves, 64]."""
    count = stored.shape[-1]
    item = np.arange(count)
    places = (indices[..., None] >> (_INDEX_BITS * item).astype(_U32) & _U32(3)) + (item // 2 * 4).astype(_U32)
    dense = np.zeros((*stored.shape[:-1], 2 * count), stored.dtype)
    for one in range(count):  # two of a group at one place, which the ISA forbids, would add up
        place = places[..., one : one + 1].astype(np.int64)
        value = np.take_along_axis(dense, place, -1) + stored[..., one : one + 1]
        np.put_along_axis(dense, place, value, -1)
    return dense


def _tiled(elements: Array, rows: int, runs: int) -> Array:
    """What the lanes hold [waves, 64, items] -> [waves, 1, rows, K], ``runs`` of consecutive elements in each lane."""
    waves, lanes, items = elements.shape
    split = elements.reshape(waves, lanes // rows, rows, runs, items // runs)
    return split.transpose(0, 2, 3, 1, 4).reshape(waves, 1, rows, lanes // rows * items)


def _handler(shape: Shape, runs: int) -> Handler:
    held = shape.n * shape.k // 64

    def execute(state: WaveState, inst: Instruction) -> None:
        destination, left, right, index = inst.operands
        stored = read_elements(state, left, shape.a, held // 2)
        indices = np.broadcast_to(state.raw(index), (state.count, 64)) >> _U32(_selected_set(inst, held // 2))
        a = _tiled(expand(stored, indices), shape.m, runs)
        b = _tiled(read_elements(state, right, shape.b, held), shape.n, runs)
        accumulate(state, destination, destination, multiply(a, b), shape)

    return execute


_EIGHT_BITS = [f"{a}_{b}" for a in ("fp8", "bf8") for b in ("fp8", "bf8")]
_CDNA3 = [f"f32_{shape}_{types}" for shape in ("16x16x32", "32x32x16") for types in ("f16", "bf16")]
_CDNA3 += [f"i32_{shape}_i8" for shape in ("16x16x64", "32x32x32")]
_CDNA3 += [f"f32_{shape}_{types}" for shape in ("16x16x64", "32x32x32") for types in _EIGHT_BITS]
_CDNA4 = [f"f32_{shape}_{types}" for shape in ("16x16x64", "32x32x32") for types in ("f16", "bf16")]
_CDNA4 += [f"i32_{shape}_i8" for shape in ("16x16x128", "32x32x64")]
_CDNA4 += [f"f32_{shape}_{types}" for shape in ("16x16x128", "32x32x64") for types in _EIGHT_BITS]
for _tail in _CDNA3:
    define(f"v_smfmac_{_tail}", _handler(parse_shape(_tail), 1), archs=ARCHITECTURES)
for _tail in _CDNA4:
    define(f"v_smfmac_{_tail}", _handler(parse_shape(_tail), 2), archs=("gfx950",))
