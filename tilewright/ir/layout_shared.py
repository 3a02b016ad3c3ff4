"""Shared-memory layouts: swizzles as linear maps, bank conflicts by counting, and the choice between swizzles.

Sources: PTX ISA, "Tensor swizzling modes" (TMA); Triton's swizzled shared encoding (vec, per_phase, max_phase);
LDS phases: HipKittens (App. D.2) for CDNA4 and CK-Tile's "LDS bank conflicts" page for CDNA3 reads and b128 writes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tilewright.ir.layout_bits import Vector, is_power_of_two, log2_exact, power_of_two_part, unit
from tilewright.ir.layout_linear import IntArray, LinearLayout, parse_fields


class MemoryLayout(Protocol):
    """What counting accesses asks of a layout in shared memory."""

    @property
    def shape(self) -> Vector: ...
    @property
    def core_shape(self) -> Vector: ...
    @property
    def element_bits(self) -> int: ...
    def offset_of(self, *coords: npt.ArrayLike) -> IntArray: ...


Access = tuple[LinearLayout, int]  # (register layout, wanted bytes per lane and instruction)

_SWIZZLE_CHUNK_BITS = {0: 0, 32: 1, 64: 2, 128: 3}  # swizzle bytes -> how many bits of the 16-byte chunk index change


@dataclass(frozen=True)
class SharedLayout:
    """Where each element of a tile lies in shared memory, relative to a base aligned to `alignment` bytes.

    A *line* is a run along order[0] (the fastest dim); lines are numbered by order[1], order[2], ... (slower and
    slower). The tile is cut along order[0] into blocks of `block_size` elements, stored one after another, each with
    its lines packed: element = (block * lines + line) * block_size + column. Then, one of
    - swizzle 128, 64 or 32 (bytes = block width, the TMA modes): address bits [4:6] ^= bits [7:9] (128), [4:5] ^=
      [7:8] (64), [4] ^= [7] (32). One TMA box per block writes exactly this.
    - max_phase > 1 (AMD, as Triton): column ^= (line // per_phase % max_phase) * vec, vec in elements.
    - phases: line * block_size + column ^= vec * (XOR of phases[i] over the set bits i of line), any linear swizzle
      by lines. Short lines share a round of the banks; so phases[i] may also change the bits of line below bit i.
    - neither: plain. The block is then the whole width, or its power-of-two part where the width is not one.
    """

    shape: Vector
    element_bits: int
    order: Vector
    swizzle: int = 0
    vec: int = 1
    per_phase: int = 1
    max_phase: int = 1
    phases: Vector = ()

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.shape))) or not self.shape or min(self.shape) < 1:
            raise ValueError(f"order {list(self.order)} does not fit shape {list(self.shape)}")
        if not is_power_of_two(self.element_bits):
            raise ValueError(f"elements of {self.element_bits} bits: shared layouts take a power of two of bits")
        if self.swizzle not in _SWIZZLE_CHUNK_BITS:
            raise ValueError(f"swizzle of {self.swizzle} bytes: only 0, 32, 64 and 128 exist")
        if (self.swizzle > 0) + (self.max_phase > 1) + (len(self.phases) > 0) > 1:
            raise ValueError("a layout is either byte-swizzled or phase-swizzled, not both")
        if not all(is_power_of_two(value) for value in (self.vec, self.per_phase, self.max_phase)):
            raise ValueError("vec, per_phase and max_phase are powers of two")
        width = self.shape[self.order[0]]
        if self.block_size == 0 or width % self.block_size:
            raise ValueError(
                f"a line of {width} x {self.element_bits} bits is not a multiple of the {self.swizzle}-byte swizzle"
            )
        if self.max_phase > 1 and self.vec * self.max_phase > self.block_size:
            raise ValueError(f"{self.max_phase} phases of {self.vec} elements exceed a line of {self.block_size}")
        if any(p < 0 or (p + 1) * self.vec > self.block_size << bit for bit, p in enumerate(self.phases)):
            raise ValueError(
                f"phases {list(self.phases)} of {self.vec} elements exceed a line of {self.block_size} and those below"
            )
        self._check_repetitions()

    def _check_repetitions(self) -> None:
        core = self._core()
        if core == self.shape:
            return
        period_bits = 8 * self.swizzle * 8  # the byte swizzle repeats every 8 lines of `swizzle` bytes
        if self.swizzle and prod(core) * self.element_bits % period_bits:
            raise ValueError(f"{list(self.shape)} repeats a core of {list(core)}, which cuts the swizzle's pattern")
        lines, core_lines = self.num_lines, prod(core) // core[self.order[0]]
        period = 1 << len(self.phases) if self.phases else self.per_phase * self.max_phase if self.max_phase > 1 else 1
        if lines != core_lines and core_lines % period:
            raise ValueError(f"{lines} lines repeat {core_lines}, which cuts the pattern of {period} phases")

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @property
    def block_size(self) -> int:
        """Elements along order[0] of one block; for TMA the inner size of its box."""
        if self.swizzle:
            return self.swizzle * 8 // self.element_bits
        return power_of_two_part(self.shape[self.order[0]])

    @property
    def num_lines(self) -> int:
        return prod(self.shape) // self.shape[self.order[0]]

    @property
    def bytes(self) -> int:
        return -(-prod(self.shape) * self.element_bits // 8)

    @property
    def alignment(self) -> int:
        """Bytes the base must be a multiple of, for address bits and offset bits to agree."""
        return max(128, 8 * self.swizzle)

    # ---- the map ----------------------------------------------------------------------------------------------------

    def offset_of(self, *coords: npt.ArrayLike) -> IntArray:
        """Element offsets of coordinate arrays, one per tile dim."""
        arrays = [np.asarray(c, np.int64) for c in coords]
        if len(arrays) != len(self.shape):
            raise ValueError(f"{len(arrays)} coordinates for a tile of rank {len(self.shape)}")
        line: IntArray = np.zeros((), np.int64)
        for axis in reversed(self.order[1:]):
            line = line * self.shape[axis] + arrays[axis]
        column = arrays[self.order[0]]
        block, column = column // self.block_size, column % self.block_size
        column = column ^ (line // self.per_phase % self.max_phase * self.vec)
        within: IntArray = line * self.block_size + column
        for bit, phase in enumerate(self.phases):
            within = within ^ ((line >> bit & 1) * (phase * self.vec))
        offset = block * self.num_lines * self.block_size + within
        if not self.swizzle:
            return offset
        bit_address = offset * self.element_bits
        rows = bit_address >> 10 & ((1 << _SWIZZLE_CHUNK_BITS[self.swizzle]) - 1)
        swizzled: IntArray = (bit_address ^ rows << 7) // self.element_bits
        return swizzled

    def part_bytes(self, axis: int, parts: int) -> int | None:
        """Bytes from one to the next of ``parts`` equal parts along a dim, which lie alike; None where they do not."""
        size, rest = divmod(self.shape[axis], parts)
        unit = self.block_size if axis == self.order[0] else 1
        if rest or size % unit or self.max_phase > 1 or self.phases:
            return None
        start = [0] * len(self.shape)
        start[axis] = size if parts > 1 else 0
        step = int(self.offset_of(*start)) * self.element_bits // 8
        return None if step % self.alignment else step

    def _core(self) -> Vector:
        """Largest power-of-two corner whose elements lie contiguously and whose offsets are linear over F2."""
        core = [1] * len(self.shape)
        core[self.order[0]] = self.block_size
        for axis in (*self.order[1:], self.order[0]):
            core[axis] = power_of_two_part(self.shape[axis])
            if core[axis] != self.shape[axis]:
                break
        return tuple(core)

    def linear(self) -> LinearLayout:
        """In-dim "offset" (elements) -> coordinates; repetitions are the outermost offsets."""
        return _linear(self)

    @property
    def core_shape(self) -> Vector:
        """The part of each dim over which offsets combine by XOR (`offset_bases`); beyond it they add."""
        return self._core()

    def offset_bases(self) -> tuple[Vector, ...]:
        """Per dim, per bit of the coordinate inside `core_shape`: its XOR contribution to the *byte* offset.

        byte offset = XOR of the contributions of the set bits of (coordinate % core) + sum over dims of
        (coordinate // core) * repeat_strides. Elements below a byte: the bits inside a byte contribute 0.
        """
        rank, core = len(self.shape), self.core_shape

        def byte_offset(axis: int, bit: int) -> int:
            return int(self.offset_of(*unit(rank, axis, 1 << bit))) * self.element_bits // 8

        return tuple(tuple(byte_offset(d, bit) for bit in range(log2_exact(size))) for d, size in enumerate(core))

    def repeat_strides(self) -> Vector:
        """Bytes per repetition of the core along each dim (0 where the dim does not repeat)."""
        core, rank = self.core_shape, len(self.shape)
        return tuple(
            int(self.offset_of(*unit(rank, d, core[d]))) * self.element_bits // 8 if core[d] < self.shape[d] else 0
            for d in range(rank)
        )

    def transpose(self, perm: Sequence[int]) -> SharedLayout:
        """The same bytes seen as the transposed tile: dim i of the view is dim perm[i] of self."""
        if sorted(perm) != list(range(len(self.shape))):
            raise ValueError(f"{list(perm)} is not a permutation of {len(self.shape)} dims")
        order = tuple(list(perm).index(axis) for axis in self.order)
        return replace(self, shape=tuple(self.shape[p] for p in perm), order=order)

    # ---- text -------------------------------------------------------------------------------------------------------

    @property
    def short(self) -> str:
        """Text without shape and element size, for places where a type already says them."""
        kind = f"{self.swizzle}B" if self.swizzle else "none"
        if self.max_phase > 1:
            kind = f"xor, vec={self.vec}, per_phase={self.per_phase}, max_phase={self.max_phase}"
        elif self.phases:
            kind = f"xor, vec={self.vec}, phases={_list_text(self.phases)}"
        return f"shared<{kind}, order={_list_text(self.order)}>"

    def __str__(self) -> str:
        return f"{self.short[:-1]}, shape={_list_text(self.shape)}, bits={self.element_bits}>"

    @classmethod
    def parse(cls, text: str, shape: Sequence[int] | None = None, element_bits: int | None = None) -> SharedLayout:
        """Inverse of `str`; of `short` when shape and element_bits are given."""
        match = re.fullmatch(r"\s*shared<\s*(none|xor|32B|64B|128B)\s*,(.*)>\s*", text, re.DOTALL)
        if match is None:
            raise ValueError(f"expected shared<none|xor|32B|64B|128B, ...>, got {text!r}")
        fields = parse_fields(match[2])
        size, bits = fields.pop("shape", shape), fields.pop("bits", element_bits)
        if "order" not in fields or size is None or bits is None:
            raise ValueError(f"{text!r} lacks order, or shape and bits that its context does not give")
        order, kind = fields.pop("order"), match[1]
        allowed = [{"vec", "per_phase", "max_phase"}, {"vec", "phases"}] if kind == "xor" else [set()]
        if set(fields) not in allowed:
            raise ValueError(f"unexpected or missing fields in {text!r}: {sorted(fields)}")
        swizzle = int(kind[:-1]) if kind.endswith("B") else 0
        if "phases" in fields:
            fields["phases"] = tuple(fields["phases"])
        return cls(tuple(size), bits, tuple(order), swizzle, **fields)


@lru_cache(maxsize=512)
def _linear(layout: SharedLayout) -> LinearLayout:
    core, rank = layout.core_shape, len(layout.shape)
    forward = {
        f"dim{d}": [(int(layout.offset_of(*unit(rank, d, 1 << bit))),) for bit in range(log2_exact(size))]
        for d, size in enumerate(core)
    }
    to_coords = LinearLayout.make(forward, (prod(core),)).inverse().core.basis("dim0")
    repeat = [whole // part for whole, part in zip(layout.shape, core, strict=True)]
    outermost_first = (layout.order[0], *reversed(layout.order[1:]))
    return LinearLayout.make({"offset": to_coords}, core, repeat, outermost_first)


def _list_text(values: Sequence[int]) -> str:
    return "[" + ",".join(map(str, values)) + "]"


# ---- bank conflicts ------------------------------------------------------------------------------------------------

WARP_SIZES = {"nvidia": 32, "cdna3": 64, "cdna4": 64}


def _consecutive(lanes: int, per_phase: int) -> list[list[int]]:
    return [list(range(first, first + per_phase)) for first in range(0, lanes, per_phase)]


def _runs_of_four(*groups: Sequence[int]) -> list[list[int]]:
    """Phases given as starts of runs of four lanes, for lanes 0-31 and again for 32-63."""
    return [[half + start + i for start in group for i in range(4)] for half in (0, 32) for group in groups]


def access_phases(target: str, vector_bytes: int, op: str) -> tuple[int, list[list[int]]]:
    """(number of 4-byte banks, lanes served together) of one shared-memory instruction."""
    if target not in WARP_SIZES or op not in ("read", "write") or vector_bytes not in (1, 2, 4, 8, 16):
        raise ValueError(f"no phases for {vector_bytes}-byte {op} on {target}")
    if target == "nvidia":
        return 32, _consecutive(32, min(32, 128 // vector_bytes))
    if op == "read" and target == "cdna4":
        if vector_bytes == 16:
            return 64, _runs_of_four((0, 12, 20, 24), (4, 8, 16, 28))
        return 64, _consecutive(64, 32 if vector_bytes == 8 else 64)
    if op == "read" and vector_bytes == 16:
        return 32, _runs_of_four((0, 20), (4, 16), (8, 28), (12, 24))
    return 32, _consecutive(64, min(32, 128 // vector_bytes))


def _instruction_addresses(registers: LinearLayout, shared: MemoryLayout, vector_bytes: int) -> IntArray:
    """[instruction, lane] first byte of each access; ValueError where a vector is not contiguous and aligned.

    Without repetitions the map from (register, lane, warp) to addresses is linear: instructions differ by the XOR of
    a constant, which renames banks, so the first instruction and one per register and warp bit stand for all.
    """
    if registers.tile_shape != shared.shape:
        raise ValueError(f"register tile {list(registers.tile_shape)} is not shared tile {list(shared.shape)}")
    width = vector_bytes * 8 // shared.element_bits
    if width < 1 or registers.num_registers % width:
        count = registers.num_registers
        raise ValueError(f"{count} registers of {shared.element_bits} bits make no {vector_bytes}-byte vectors")
    groups, warps = registers.num_registers // width, registers.num_warps
    linear = not registers.is_repeated and shared.core_shape == shared.shape

    def representatives(count: int) -> IntArray:
        return np.asarray([0, *(1 << b for b in range(count.bit_length() - 1))] if linear else range(count), np.int64)

    register = representatives(groups)[:, None] * width + np.arange(width)
    coords = registers.coords(
        register=register[:, None, None, :],
        warp=representatives(warps)[:, None, None],
        lane=np.arange(registers.num_lanes)[:, None],
    )
    offsets = shared.offset_of(*coords)
    first = offsets[..., 0]
    if (offsets != first[..., None] + np.arange(width)).any() or (first % width).any():
        raise ValueError(f"{vector_bytes}-byte vectors of {registers} are not contiguous and aligned in {shared}")
    return (first * shared.element_bits // 8).reshape(-1, registers.num_lanes)


def bank_conflicts(
    register_layout: LinearLayout, shared_layout: MemoryLayout, vector_bytes: int, target: str, op: str = "read"
) -> int:
    """Extra cycles of the worst instruction when registers move to or from shared memory; 0 = conflict free.

    target: "nvidia", "cdna3" or "cdna4". A phase takes as many cycles as the busiest bank has distinct words; lanes
    on the same word share it. ValueError when the layouts do not allow vectors of that size.
    """
    banks, phases = access_phases(target, vector_bytes, op)
    if register_layout.num_lanes != WARP_SIZES[target]:
        raise ValueError(f"{target} has {WARP_SIZES[target]} lanes a warp, the layout has {register_layout.num_lanes}")
    addresses = _instruction_addresses(register_layout, shared_layout, vector_bytes)
    extra = np.zeros(len(addresses), np.int64)
    for lanes in phases:
        words = addresses[:, lanes, None] // 4 + np.arange(max(1, vector_bytes // 4))
        extra += _busiest_bank(words.reshape(len(addresses), -1), banks) - 1
    return int(extra.max())


def _busiest_bank(words: IntArray, banks: int) -> IntArray:
    """Per row: the most distinct words that fall into one bank."""
    words = np.sort(words, axis=1)
    distinct = np.ones(words.shape, bool)
    distinct[:, 1:] = words[:, 1:] != words[:, :-1]
    slot = np.arange(len(words))[:, None] * banks + words % banks
    counts = np.bincount(slot[distinct], minlength=len(words) * banks)
    busiest: IntArray = counts.reshape(len(words), banks).max(axis=1)
    return busiest


# ---- choice --------------------------------------------------------------------------------------------------------


def shared_vector_bytes(register_layout: LinearLayout, shared_layout: MemoryLayout, max_bytes: int = 16) -> int:
    """Widest access, at most max_bytes, that both layouts allow (at least one element)."""
    width = max_bytes
    while width * 8 > shared_layout.element_bits and width > 1:
        try:
            _instruction_addresses(register_layout, shared_layout, width)
        except ValueError:
            width //= 2
        else:
            break
    return width


def shared_cycles(
    register_layout: LinearLayout, shared_layout: MemoryLayout, max_bytes: int, target: str, op: str
) -> int:
    """Cycles a warp needs to move its part of the tile: instructions * (phases + worst conflicts)."""
    width = shared_vector_bytes(register_layout, shared_layout, max_bytes)
    _, phases = access_phases(target, width, op)
    instructions = max(1, register_layout.num_registers * shared_layout.element_bits // (8 * width))
    return instructions * (len(phases) + bank_conflicts(register_layout, shared_layout, width, target, op))


def shared_candidates(shape: Sequence[int], element_bits: int, order: Sequence[int], target: str) -> list[SharedLayout]:
    """The swizzles of a target that fit the tile, in order of preference."""
    settings: list[dict[str, Any]] = [{"swizzle": size} for size in (128, 64, 32, 0)]
    if target != "nvidia":
        vectors = [size * 8 // element_bits for size in (16, 8) if size * 8 >= element_bits]
        settings = [{}]
        settings += [
            {"vec": vec, "per_phase": per_phase, "max_phase": max_phase}
            for vec in vectors
            for per_phase in (1, 2, 4)
            for max_phase in (2, 4, 8, 16)
        ]
    candidates = []
    for setting in settings:
        try:
            candidates.append(SharedLayout(tuple(shape), element_bits, tuple(order), **setting))
        except ValueError:
            continue
    return candidates


def choose_shared_layout(
    shape: Sequence[int],
    element_bits: int,
    order: Sequence[int],
    readers: Sequence[Access],
    writers: Sequence[Access],
    target: str,
    candidates: Sequence[SharedLayout] | None = None,
) -> SharedLayout:
    """The candidate with the fewest shared-memory cycles over all readers and writers; the first on a tie."""
    options = shared_candidates(shape, element_bits, order, target) if candidates is None else list(candidates)
    if not options:
        raise ValueError(f"no shared layout of {list(shape)} x {element_bits} bits fits {target}")
    accesses = [(*access, "read") for access in readers] + [(*access, "write") for access in writers]

    def cycles(option: SharedLayout) -> int:
        return sum(shared_cycles(layout, option, size, target, op) for layout, size, op in accesses)

    return min(options, key=cycles)
