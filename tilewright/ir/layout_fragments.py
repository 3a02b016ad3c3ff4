"""Constructors of register layouts: coalesced (blocked) tiles and the fragments of matrix instructions.

Sources: PTX ISA "Asynchronous Warpgroup Level Matrix Fragment" (wgmma) and "Matrix Fragments for mma.m16n8k16";
AMD CDNA3 and CDNA4 ISA guides, "Matrix Arithmetic Instructions" (checked with the AMD matrix instruction calculator's
formulas). g = lane // 4 and t = lane % 4 below are PTX's groupID and threadIDInGroup.

Where warps tile a matrix as (wm, wn): warp = m + wm * n, that is M bits first. mma.sync and MFMA tiles are
interleaved: warp m has instruction tiles m, m + wm, m + 2 wm, ...; the tiles of one warp are registers, outside
those of one instruction, row-major over the tile. Accumulators and operands agree on it, and an operand is
replicated (zero bases) over the warps of the dimension it does not have. wgmma gives each warpgroup contiguous rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.ir.layout_bits import Vector, log2_exact, power_of_two_part, unit
from tilewright.ir.layout_linear import LinearLayout

_MFMA_ACCUMULATORS: dict[tuple[int, int], tuple[list[Vector], list[Vector]]] = {
    # instruction (m, n) -> (register bases, lane bases) of D
    (32, 32): ([(1, 0), (2, 0), (8, 0), (16, 0)], [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (4, 0)]),
    (16, 16): ([(1, 0), (2, 0)], [(0, 1), (0, 2), (0, 4), (0, 8), (4, 0), (8, 0)]),
    # 4x4 instructions compute 16 blocks; here B's blocks (4, 64) or A's blocks (64, 4) are laid side by side
    (4, 64): ([(1, 0), (2, 0)], [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (0, 32)]),
    (64, 4): ([(1, 0), (2, 0)], [(0, 1), (0, 2), (4, 0), (8, 0), (16, 0), (32, 0)]),
}
#: f64 16 x 16: a lane has every fourth row
_MFMA_F64: tuple[list[Vector], list[Vector]] = ([(4, 0), (8, 0)], [(0, 1), (0, 2), (0, 4), (0, 8), (1, 0), (2, 0)])


def blocked(
    shape: Sequence[int],
    element_bits: int,
    num_warps: int,
    warp_size: int,
    order: Sequence[int],
    max_vector_bytes: int = 16,
    warps_apart: bool = False,
    min_vector_bytes: int = 1,
) -> LinearLayout:
    """Coalesced layout: vectors along order[0] in registers, then lanes, then warps, then more registers.

    order: dims, fastest first. Vectors shrink, to the least, before threads idle; a tile with fewer elements than
    threads is replicated over the threads left. Sizes that are not a power of two repeat their power-of-two part.
    ``warps_apart``: warps divide the slowest dims instead, as far as these go.
    """
    if sorted(order) != list(range(len(shape))):
        raise ValueError(f"order {list(order)} is not a permutation of {len(shape)} dims")
    lane_bits, warp_bits = log2_exact(warp_size), log2_exact(num_warps)
    core = [power_of_two_part(size) for size in shape]
    pending = [unit(len(shape), axis, 1 << bit) for axis in order for bit in range(log2_exact(core[axis]))]
    spare_bits = max(0, len(pending) - lane_bits - warp_bits)
    widest = max(1, max_vector_bytes * 8 // element_bits)
    least = max(1, min_vector_bytes * 8 // element_bits).bit_length() - 1
    vector_bits = min(widest.bit_length() - 1, log2_exact(core[order[0]]) if order else 0, max(spare_bits, least))

    def take(count: int) -> list[Vector]:
        taken = pending[:count]
        del pending[:count]
        return taken

    zero = unit(len(shape), -1, 0)
    vector, lane = take(vector_bits), take(lane_bits)
    if warps_apart:
        slow = [step for step in pending if not step[order[0]]]
        pending = slow[::-1][:warp_bits] + [step for step in pending if step not in slow[::-1][:warp_bits]]
    warp = take(warp_bits)
    bases = {
        "register": vector + pending,
        "lane": lane + [zero] * (lane_bits - len(lane)),
        "warp": warp + [zero] * (warp_bits - len(warp)),
    }
    return LinearLayout.make(bases, core, [size // c for size, c in zip(shape, core, strict=True)])


# ---- NVIDIA ------------------------------------------------------------------------------------------------------

_MMA_LANES: list[Vector] = [(0, 2), (0, 4), (1, 0), (2, 0), (4, 0)]


def _operand_a_fragment(element_bits: int) -> tuple[int, list[Vector], list[Vector]]:
    """(instruction K, register bases, lane bases) of a 16-row A fragment: eight registers of K, four lanes a row.

    64-bit elements have the map of 32-bit ones, in pairs of registers (PTX ISA, "Matrix Fragments for mma.m16n8k8"),
    but for the order of K, which A and B are free to choose together: lanes 0 to 3 have k = 0, 1, 4, 5 and then
    2, 3, 6, 7. So a half warp's reads meet no bank twice in a slot with the copy engine's 64-byte swizzle, whether it
    runs along K or not.
    """
    if element_bits not in (8, 16, 32, 64):
        raise ValueError(f"no register A fragment for {element_bits}-bit elements (8, 16, 32 or 64)")
    if element_bits == 64:
        return 8, [(8, 0), (0, 2)], [(0, 1), (0, 4), (1, 0), (2, 0), (4, 0)]
    packed = 32 // element_bits  # elements of one 32-bit register, consecutive along K
    in_word: list[Vector] = [(0, 1 << bit) for bit in range(log2_exact(packed))]
    registers: list[Vector] = [*in_word, (8, 0), (0, 4 * packed)]
    return 8 * packed, registers, [(0, packed), (0, 2 * packed), (1, 0), (2, 0), (4, 0)]


def _warpgroup_tiles(
    shape: Sequence[int], columns: int, registers: list[Vector], lanes: list[Vector], num_warpgroups: int
) -> LinearLayout:
    """Stack 64 x columns fragments: warpgroups take contiguous rows, or replicate a tile of 64 rows."""
    rows, width = shape
    if width % columns or width < columns:
        raise ValueError(f"{width} columns are not a multiple of the instruction's {columns}")
    split = num_warpgroups if rows > 64 else 1
    if rows % (64 * split):
        raise ValueError(f"{rows} rows do not split into 64-row blocks over {num_warpgroups} warpgroups")
    blocks = rows // (64 * split)
    core_width = power_of_two_part(width)
    registers = registers + [(0, 1 << bit) for bit in range(log2_exact(columns), log2_exact(core_width))]
    warps: list[Vector] = [(16, 0), (32, 0)]
    group_bits = log2_exact(num_warpgroups)
    if split == 1:
        core_rows, warps = 64, warps + [(0, 0)] * group_bits
    else:
        core_rows = 64 * blocks * split
        registers += [(64 << bit, 0) for bit in range(log2_exact(blocks))]
        warps += [((64 * blocks) << bit, 0) for bit in range(group_bits)]
    bases = {"register": registers, "lane": lanes, "warp": warps}
    return LinearLayout.make(bases, (core_rows, core_width), (rows // core_rows, width // core_width))


def wgmma_accumulator(shape: Sequence[int], num_warpgroups: int) -> LinearLayout:
    """D fragment of wgmma m64nN (PTX ISA, "wgmma register fragment D").

    Warp w of a warpgroup has rows 16 w..., a lane rows g and g + 8, columns 2 t + {0, 1} of each 8-column chunk;
    registers walk (column pair, +8 rows, chunk). Warpgroups have M / num_warpgroups contiguous rows; further
    64-row blocks of a warpgroup are outer registers. With M = 64 warpgroups take contiguous columns instead.
    `layout.registers_in((64 * block, 0), (64, N))` lists the registers of one instruction in the PTX order; for N
    not a power of two and several blocks in several warpgroups they are not consecutive.
    """
    rows, columns = shape
    if rows == 64 and num_warpgroups > 1:
        own = columns // num_warpgroups
        if columns % (8 * num_warpgroups) or own != power_of_two_part(own):
            raise ValueError(
                f"64 x {columns} over {num_warpgroups} warpgroups: each needs a power of two of columns, at least 8"
            )
        registers: list[Vector] = [(0, 1), (8, 0), *((0, 1 << bit) for bit in range(3, log2_exact(own)))]
        warps: list[Vector] = [(16, 0), (32, 0), *((0, own << bit) for bit in range(log2_exact(num_warpgroups)))]
        return LinearLayout.make({"register": registers, "lane": _MMA_LANES, "warp": warps}, (64, columns))
    return _warpgroup_tiles(shape, 8, [(0, 1), (8, 0)], _MMA_LANES, num_warpgroups)


def wgmma_operand_a(shape: Sequence[int], element_bits: int, num_warpgroups: int) -> LinearLayout:
    """Register A fragment (M, K) of wgmma: m64k16 for 16-bit elements, m64k32 for 8-bit, m64k8 for 32-bit (tf32).

    Registers walk (32-bit word, +8 rows, upper half of K, K step, 64-row block). Rows as in `wgmma_accumulator`;
    with M = 64 every warpgroup holds all of A.
    """
    if element_bits == 64:
        raise ValueError("no register A fragment of wgmma for 64-bit elements")
    instruction_k, registers, lanes = _operand_a_fragment(element_bits)
    return _warpgroup_tiles(shape, instruction_k, registers, lanes, num_warpgroups)


def _warp_tiles(
    shape: Sequence[int],
    instruction: tuple[int, int],
    registers: Sequence[Vector],
    lanes: Sequence[Vector],
    tiled: tuple[int, int],
    warps: tuple[int, int],
) -> LinearLayout:
    """Interleaved warp tiling: `warps` in (M, N) numbering, `tiled` the count along each dim of this matrix (1 = none).

    A dim with fewer instruction tiles than warps is replicated over the warps left over.
    """
    core, warp_bases, repeat = [0, 0], [], [1, 1]
    for axis in range(2):
        tiles = shape[axis] // instruction[axis]
        if shape[axis] % instruction[axis] or not tiles:
            raise ValueError(f"{list(shape)} is not a multiple of the instruction tile {list(instruction)}")
        used = min(tiles, tiled[axis])
        if tiles % used or tiled[axis] % used:
            raise ValueError(f"{tiles} instruction tiles along dim {axis} do not spread over {tiled[axis]} warps")
        log2_exact(used)
        core[axis], repeat[axis] = instruction[axis] * used, tiles // used
    for axis in range(2):  # warp = m + wm * n
        for bit in range(log2_exact(warps[axis])):
            step = instruction[axis] << bit
            warp_bases.append(unit(2, axis, step) if tiled[axis] > 1 and step < core[axis] else (0, 0))
    return LinearLayout.make({"register": registers, "lane": lanes, "warp": warp_bases}, core, repeat)


def mma_sync_accumulator(shape: Sequence[int], warps: tuple[int, int] = (1, 1)) -> LinearLayout:
    """C/D fragment of mma.sync m16n8: rows g, g + 8, columns 2 t + {0, 1}; registers (column pair, +8 rows)."""
    return _warp_tiles(shape, (16, 8), [(0, 1), (8, 0)], _MMA_LANES, warps, warps)


def mma_sync_operand_a(shape: Sequence[int], element_bits: int = 16, warps: tuple[int, int] = (1, 1)) -> LinearLayout:
    """A fragment (M, K) of mma.sync m16n8k16 (16-bit), k32 (8-bit) or k8 (tf32, f64)."""
    instruction_k, registers, lanes = _operand_a_fragment(element_bits)
    return _warp_tiles(shape, (16, instruction_k), registers, lanes, (warps[0], 1), warps)


def mma_sync_operand_b(shape: Sequence[int], element_bits: int = 16, warps: tuple[int, int] = (1, 1)) -> LinearLayout:
    """B fragment (K, N) of mma.sync m16n8k16 (16-bit), k32 (8-bit) or k8 (tf32, f64): column g, rows as A's columns."""
    instruction_k, registers, lanes = _operand_a_fragment(element_bits)
    transposed = [(k, m) for m, k in registers if m == 0]
    return _warp_tiles(shape, (instruction_k, 8), transposed, [(k, m) for m, k in lanes], (1, warps[1]), warps)


def fma_tile(columns: int) -> tuple[int, int]:
    """Rows and columns of an (M, columns) tile that the 4 x 8 lanes of a warp hold at once (see `fma_accumulator`)."""
    return 16, 8 * min(4, power_of_two_part(columns // 8))


def fma_accumulator(shape: Sequence[int], warps: tuple[int, int] = (1, 1)) -> LinearLayout:
    """Accumulators of outer products: lanes 4 x 8, each with runs of 4 rows and (N permitting) 4 columns.

    A lane's runs lie ``fma_tile`` apart, so that 16-byte reads of an operand by the lanes of a warp are contiguous.
    """
    rows, columns = _fma_bases(shape[1])
    registers: list[Vector] = [*((0, 1 << bit) for bit in range(log2_exact(columns))), (1, 0), (2, 0)]
    lanes: list[Vector] = [*((0, columns << bit) for bit in range(3)), *((rows << bit, 0) for bit in range(2))]
    return _warp_tiles(shape, fma_tile(shape[1]), registers, lanes, warps, warps)


def fma_operand_a(
    shape: Sequence[int], columns: int, warps: tuple[int, int] = (1, 1), along_k: bool = False
) -> LinearLayout:
    """Operand (M, K) of outer products into ``columns`` columns: a lane has the rows of its accumulators, all of K.

    ``along_k``: runs of up to four consecutive k are innermost, instead of the lane's runs of rows.
    """
    rows, _ = _fma_bases(columns)
    lanes: list[Vector] = [*[(0, 0)] * 3, *((rows << bit, 0) for bit in range(2))]
    run = _fma_run(shape[1], along_k)
    registers: list[Vector] = [*((0, 1 << bit) for bit in range(log2_exact(run))), (1, 0), (2, 0)]
    return _warp_tiles(shape, (fma_tile(columns)[0], run), registers, lanes, (warps[0], 1), warps)


def fma_operand_b(shape: Sequence[int], warps: tuple[int, int] = (1, 1), along_k: bool = False) -> LinearLayout:
    """Operand (K, N) of outer products: a lane has the columns of its accumulators, all of K (see `fma_operand_a`)."""
    _, columns = _fma_bases(shape[1])
    run = _fma_run(shape[0], along_k)
    along: list[Vector] = [(1 << bit, 0) for bit in range(log2_exact(run))]
    registers = [*along, *((0, 1 << bit) for bit in range(log2_exact(columns)))]
    lanes: list[Vector] = [*((0, columns << bit) for bit in range(3)), (0, 0), (0, 0)]
    return _warp_tiles(shape, (run, fma_tile(shape[1])[1]), registers, lanes, (1, warps[1]), warps)


def _fma_run(depth: int, along_k: bool) -> int:
    return min(4, power_of_two_part(depth)) if along_k else 1


def _fma_bases(columns: int) -> tuple[int, int]:
    """Consecutive rows and columns of one lane."""
    rows, width = fma_tile(columns)
    return rows // 4, width // 8


# ---- AMD ---------------------------------------------------------------------------------------------------------


def mfma_accumulator(
    shape: Sequence[int],
    instr: tuple[int, int] = (32, 32),
    warps: tuple[int, int] = (1, 1),
    element_bits: int = 32,
    transposed: bool = False,
) -> LinearLayout:
    """D fragment of MFMA on wave64. instr: (32, 32), (16, 16), (4, 64) or (64, 4); f64: (16, 16) alone.

    32x32: column l % 32, row 8 (r // 4) + 4 (l // 32) + r % 4, r in 0..15. 16x16: column l % 16, row 4 (l // 16) + r,
    in f64 l // 16 + 4 r. ``transposed``: the product of the transposed operands, rows and columns exchanged.
    """
    if instr not in _MFMA_ACCUMULATORS or (element_bits == 64 and instr != (16, 16)):
        known = [(16, 16)] if element_bits == 64 else sorted(_MFMA_ACCUMULATORS)
        raise ValueError(f"no MFMA with tile {instr} of {element_bits}-bit accumulators; known: {known}")
    registers, lanes = _MFMA_F64 if element_bits == 64 else _MFMA_ACCUMULATORS[instr]
    if transposed:
        registers, lanes = ([vector[::-1] for vector in bases] for bases in (registers, lanes))
    return _warp_tiles(shape, instr, registers, lanes, warps, warps)


def mfma_operand(
    shape: Sequence[int],
    operand: str,
    instr_mnk: tuple[int, int, int],
    k_per_lane: int,
    warps: tuple[int, int] = (1, 1),
) -> LinearLayout:
    """A (M, K) or B (K, N) operand of MFMA on wave64: lane l has row (column) l % M and k = (l // M) k_per_lane + j.

    K may be a multiple of the 64 / M * k_per_lane that this covers (the rest are outer registers): any order of K
    computes the same product as long as A and B agree. The 4x4 shapes' K is held per lane alone, blocks replicated.
    """
    if operand not in ("a", "b"):
        raise ValueError(f"operand {operand!r} is neither 'a' nor 'b'")
    size, instruction_k = instr_mnk[0 if operand == "a" else 1], instr_mnk[2]
    other = instr_mnk[1 if operand == "a" else 0]
    size_bits, per_lane_bits, k_bits = log2_exact(size), log2_exact(k_per_lane), log2_exact(instruction_k)
    lane_k_bits = 6 - size_bits if max(size, other) < 64 else 0
    if instr_mnk[:2] not in _MFMA_ACCUMULATORS or per_lane_bits + lane_k_bits > k_bits:
        raise ValueError(f"MFMA {instr_mnk} with {k_per_lane} k per lane: the lanes hold more than K")
    registers: list[Vector] = [(0, 1 << bit) for bit in range(per_lane_bits)]
    registers += [(0, 1 << bit) for bit in range(per_lane_bits + lane_k_bits, k_bits)]
    lanes: list[Vector] = [(1 << bit, 0) for bit in range(size_bits)]
    lanes += [(0, k_per_lane << bit) for bit in range(lane_k_bits)]
    lanes += [(0, 0)] * (6 - len(lanes))
    if operand == "a":
        return _warp_tiles(shape, (size, instruction_k), registers, lanes, (warps[0], 1), warps)
    swapped = [(k, n) for n, k in registers], [(k, n) for n, k in lanes]
    return _warp_tiles(shape, (instruction_k, size), *swapped, (1, warps[1]), warps)
