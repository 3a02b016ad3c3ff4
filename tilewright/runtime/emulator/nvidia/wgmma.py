"""Matrix instructions of a warpgroup (PTX ISA 9.7.15): wgmma.mma_async and its fence, commit and wait.

A product happens at the ``wait_group`` that waits for it: until then its operands in shared memory
are held against writes, its accumulators against any access, its A registers against writes. Sums
are float64, rounded once per instruction together with D: hardware differs in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from tilewright.runtime.emulator.nvidia import syntax
from tilewright.runtime.emulator.nvidia.decode import Instruction, Problem
from tilewright.runtime.emulator.nvidia.fragments import a_places, as_float64, elements, read_registers, scatter
from tilewright.runtime.emulator.nvidia.mma import round_result, take_shape
from tilewright.runtime.emulator.nvidia.operands import integer, registers, source
from tilewright.runtime.emulator.nvidia.registry import Execute, instruction
from tilewright.runtime.emulator.nvidia.shared_memory import GRAIN
from tilewright.runtime.emulator.nvidia.state import DEFINED, READING, UNDEFINED, WRITING, State
from tilewright.runtime.emulator.nvidia.tensor_core import multiply
from tilewright.runtime.emulator.nvidia.types import LANES, Array, Type

WARPS, ROWS = 4, 64
#: k of one instruction, which is always 32 bytes of an operand's row
_K = {"f16": 16, "bf16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32, "s8": 32, "u8": 32}
_ROW_GRAINS = 2
_serial = count()


# --- operands in shared memory ---------------------------------------------------------------------


def descriptor_grains(descriptors: Array, extent: int, k: int, transposed: bool) -> Array:
    """The 16-byte grains of a matrix (PTX ISA 9.7.15.5.1, "Shared memory matrix layout", and 9.7.15.5.1.2.2,
    "Matrix-descriptor format"), from uint64 [g] descriptors.

    K-major: [g, extent, 2], the two grains of each row. MN-major (``transposed``): [g, extent / 8, k], grains
    of 8 elements along M or N. With a swizzle of 32, 64 or 128 bytes ``p`` grains lie side by side:
    - K-major: rows of a group of 8 are p apart, groups SBO; without swizzle rows are 1 apart and the second
      grain LBO on;
    - MN-major: grains beyond p are LBO apart, k is p apart, groups of 8 k SBO; without swizzle grains are SBO
      apart, k 1, groups of 8 k LBO.
    The grain's address is then XORed: bits 4-6 with bits 7-9, counted from the pattern's start (base offset).
    """
    start = (descriptors & np.uint64(0x3FFF)).astype(np.int64)
    leading = (descriptors >> np.uint64(16) & np.uint64(0x3FFF)).astype(np.int64)
    stride = (descriptors >> np.uint64(32) & np.uint64(0x3FFF)).astype(np.int64)
    base = (descriptors >> np.uint64(49) & np.uint64(7)).astype(np.int64)
    mode = (descriptors >> np.uint64(62)).astype(np.int64)
    side = np.array([1, 8, 4, 2])[mode]
    start, leading, stride, base, side = (v[:, None, None] for v in (start, leading, stride, base, side))
    plain = side == 1
    if transposed:
        grain, row = np.arange(extent // 8)[None, :, None], np.arange(k)[None, None]
        swizzled = grain % side + grain // side * leading + row % 8 * side + row // 8 * stride
        linear = np.where(plain, grain * stride + row % 8 + row // 8 * leading, swizzled)
    else:
        row, part = np.arange(extent)[None, :, None], np.arange(_ROW_GRAINS)[None, None]
        linear = row % 8 * side + row // 8 * stride + np.where(plain, part * leading, part)
    place: Array = start + linear
    return place ^ ((place >> 3) - base & side - 1)


@dataclass(frozen=True)
class Operand:
    """A or B from descriptors: ``extent`` rows of A (64) or columns of B."""

    type: Type
    extent: int
    k: int
    transposed: bool
    negated: bool

    def grains(self, state: State, descriptors: Array, blocks: Array) -> Array:
        """Flat grain numbers [g, ...]. Faults outside of shared memory."""
        shared = state.launch.shared
        place = descriptor_grains(descriptors, self.extent, self.k, self.transposed)
        if place.min() * GRAIN < shared.first or (place.max() + 1) * GRAIN > shared.size:
            state.fault(f"a matrix descriptor reaches {int(place.max() + 1) * GRAIN} of {shared.size} bytes")
        flat: Array = place + (blocks * shared.grains_per_block)[:, None, None]
        return flat

    def values(self, data: Array) -> Array:
        """Grains' bytes [g, ..., 16] -> float64 [g, extent, k]."""
        bits = np.ascontiguousarray(data).view(self.type.unsigned)
        groups = bits.shape[0]
        if self.transposed:  # [g, extent / 8, k, 8]
            bits = np.ascontiguousarray(bits.transpose(0, 1, 3, 2))
        value = as_float64(bits.reshape(groups, self.extent, self.k), self.type)
        return -value if self.negated else value

    def undefined(self, written: Array) -> Array:
        """Grains' ``written`` flags [g, ..., 16] -> rows with undefined elements, bool [g, extent]."""
        groups = written.shape[0]
        if self.transposed:
            pairs = np.all(written.reshape(groups, self.extent // 8, self.k, 8, 2), axis=(2, 4))
            return np.logical_not(pairs.reshape(groups, self.extent))
        return np.logical_not(np.all(written.reshape(groups, self.extent, -1), axis=-1))


# --- products in flight ----------------------------------------------------------------------------


@dataclass(eq=False)
class Product:
    """One wgmma of some warpgroups (``leaders``: their first warps), arrays by position in it."""

    leaders: list[int]
    d_registers: Sequence[int]
    d_type: Type
    columns: int
    a: Operand
    b: Operand
    #: of A in registers: values [g, 64, k]
    a_values: Array | None
    a_registers: Sequence[int]
    a_grains: Array | None
    b_grains: Array
    accumulates: Array
    clamps: bool
    #: values of D that will be undefined, bool [g, 64, columns]
    undefined: Array | None
    serial: int = field(default_factory=lambda: next(_serial))
    #: for each warpgroup its reads of shared memory, by number in the race detector
    records: list[list[int]] = field(default_factory=list)

    def result(self, state: State, positions: list[int], d: Array) -> Array:
        """D [g, 64, columns] after this product, for the warpgroups at ``positions``."""
        shared = state.launch.shared
        if self.a_values is not None:
            a = self.a_values[positions]
        else:
            assert self.a_grains is not None
            a = self.a.values(shared.grains[self.a_grains[positions]])
        b = self.b.values(shared.grains[self.b_grains[positions]])
        c = np.where(self.accumulates[positions][:, None, None], d.astype(np.float64), 0)
        product = multiply(a, b.transpose(0, 2, 1), c, self.a.type.name, self.d_type.name, asynchronous=True)
        return round_result(product, self.d_type, self.clamps)

    def hold(self, state: State) -> None:
        """Protect the operands in shared memory."""
        for position in range(len(self.leaders)):
            for grains in (self.a_grains, self.b_grains):
                if grains is not None:
                    state.launch.shared.hold(grains[position])

    def note(self, state: State) -> None:
        """Tell the race detector what it reads."""
        ordering = state.launch.ordering
        for position, leader in enumerate(self.leaders if ordering is not None else ()):
            assert ordering is not None
            warps = range(leader, leader + WARPS)
            self.records.append([])
            for grains in (self.a_grains, self.b_grains):
                if grains is not None:
                    offsets = grains[position].reshape(-1) * GRAIN
                    record = ordering.issue(state, "shared", warps, -1, offsets, GRAIN, writes=False)
                    self.records[-1].append(record)

    def release(self, state: State, positions: list[int]) -> None:
        """The end of `hold`."""
        for position in positions:
            for grains in (self.a_grains, self.b_grains):
                if grains is not None:
                    state.launch.shared.release(grains[position])


def _pending(state: State, leader: int) -> list[Product]:
    return [product for group in state.launch.products.get(leader, []) for product in group]


def read_accumulators(state: State, warps: Array, numbers: Sequence[int], type_: Type) -> Array:
    """Registers of warpgroups -> D [g, 64, columns] in its type (s32 as float64)."""
    bits = np.stack([state.reg[number][warps] for number in numbers])
    groups = len(warps) // WARPS
    per = 32 // type_.bits
    values = np.ascontiguousarray(bits[..., None]).view(type_.dtype)  # [n, warps, 32, per]
    values = values.transpose(0, 3, 1, 2).reshape(len(numbers) * per // 4, 2, 2, groups, WARPS, 8, 4)
    return values.transpose(3, 4, 1, 5, 0, 6, 2).reshape(groups, ROWS, -1)


def spread(matrix: Array, per: int) -> Array:
    """D [g, 64, columns] -> [registers, warps, 32, per]: the reverse of `read_accumulators`."""
    groups, _, columns = matrix.shape
    parts = matrix.reshape(groups, WARPS, 2, 8, columns // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
    flat = parts.reshape(columns // 2 // per, per, groups * WARPS, LANES)
    return np.ascontiguousarray(flat.transpose(0, 2, 3, 1))


# --- instructions ----------------------------------------------------------------------------------


@instruction("wgmma.fence", gathers="warpgroup")
def _fence(inst: Instruction) -> Execute:
    """Orders earlier accesses of registers before those of later wgmma (9.7.15.7.1)."""
    inst.flag("sync"), inst.flag("aligned")

    def execute(state: State) -> None:
        for warp in state.selected().tolist():
            state.launch.product_fence[warp] = state.tick

    return execute


@instruction("wgmma.commit_group", gathers="warpgroup")
def _commit(inst: Instruction) -> Execute:
    inst.flag("sync"), inst.flag("aligned")

    def execute(state: State) -> None:
        for leader in state.selected()[::WARPS].tolist():
            state.launch.products.setdefault(leader, [[]]).append([])

    return execute


@instruction("wgmma.wait_group", gathers="warpgroup")
def _wait(inst: Instruction) -> Execute:
    inst.flag("sync"), inst.flag("aligned")
    pending = integer(inst.operands[0])

    def execute(state: State) -> None:
        due: dict[Product, list[int]] = {}
        for leader in state.selected()[::WARPS].tolist():
            groups = state.launch.products.setdefault(leader, [[]])
            done = max(0, len(groups) - 1 - pending)
            for product in (p for group in groups[:done] for p in group):
                due.setdefault(product, []).append(product.leaders.index(leader))
            del groups[:done]
        _complete(state, due)
        if state.launch.ordering is not None:
            _tell_waiters(state, due)

    return execute


def _complete(state: State, due: dict[Product, list[int]]) -> None:
    """Do the products, in order; accumulators stay unpacked while the next product goes on with them."""
    current: tuple[list[int], Sequence[int]] | None = None
    matrix, last = np.zeros(0), None
    for product in sorted(due, key=lambda p: p.serial):
        positions = due[product]
        leaders = [product.leaders[p] for p in positions]
        if current != (leaders, product.d_registers):
            if last is not None:
                _deliver(state, last, matrix)
            warps = np.concatenate([np.arange(leader, leader + WARPS) for leader in leaders])
            matrix = read_accumulators(state, warps, product.d_registers, product.d_type)
            current = leaders, product.d_registers
        if product.d_type.name == "s32":
            matrix = matrix.view(np.int32)
        matrix = product.result(state, positions, matrix)
        product.release(state, positions)
        last = (product, positions)
    if last is not None:
        _deliver(state, last, matrix)
    _free_operands(state, due)


def _tell_waiters(state: State, due: dict[Product, list[int]]) -> None:
    """The warpgroups know that these products have read shared memory."""
    assert state.launch.ordering is not None
    records: dict[int, list[int]] = {}
    for product, positions in due.items():
        for position in positions:
            records.setdefault(product.leaders[position], []).extend(product.records[position])
    for leader, numbers in records.items():
        state.launch.ordering.group_ended(leader, range(leader, leader + WARPS), numbers)


def _free_operands(state: State, due: dict[Product, list[int]]) -> None:
    """The A registers of these products may be written again, where no later product reads them."""
    before = state.w, state.count, state.lanes, state.full, state.mask
    for leader in sorted({product.leaders[p] for product, positions in due.items() for p in positions}):
        busy = {r for p in _pending(state, leader) for r in p.a_registers}
        done = {r for product in due for r in product.a_registers if leader in product.leaders}
        state.select(np.arange(leader, leader + WARPS), np.ones((WARPS, LANES), np.bool_))
        state.set_all_known(sorted(done - busy), DEFINED)
    state.w, state.count, state.lanes, state.full, state.mask = before


def _deliver(state: State, last: tuple[Product, list[int]], matrix: Array) -> None:
    """Write accumulators back. They stay in flight where a later product uses them."""
    product, positions = last
    leaders = [product.leaders[p] for p in positions]
    warps = np.concatenate([np.arange(leader, leader + WARPS) for leader in leaders])
    per = 32 // product.d_type.bits
    bits = spread(matrix, per).view(np.uint32)[..., 0]
    unknown = None
    if product.undefined is not None:
        unknown = np.any(spread(product.undefined[positions], per), axis=-1)
    for i, number in enumerate(product.d_registers):
        state.reg[number][warps] = bits[i]
        state.written[number] = (state.tick, state.mask)
    before = state.w, state.count, state.lanes, state.full, state.mask
    for row, leader in enumerate(leaders):
        later = _pending(state, leader)
        members = np.arange(leader, leader + WARPS)
        heirs = [p for p in later if p.d_registers == product.d_registers]
        if heirs:
            if product.undefined is not None:
                _inherit(heirs, leader, product.undefined[positions[row]])
            continue
        state.select(members, np.ones((WARPS, LANES), np.bool_))
        state.set_all_known(product.d_registers, DEFINED)
        if unknown is not None:
            for i, number in enumerate(product.d_registers):
                codes = np.where(unknown[i, row * WARPS : (row + 1) * WARPS], UNDEFINED, DEFINED)
                state.set_known([number], codes.astype(np.uint8))
    state.w, state.count, state.lanes, state.full, state.mask = before


def _inherit(heirs: list[Product], leader: int, undefined: Array) -> None:
    for heir in heirs:
        position = heir.leaders.index(leader)
        if not heir.accumulates[position]:
            return
        if heir.undefined is None:
            heir.undefined = np.zeros((len(heir.leaders), *undefined.shape), np.bool_)
        heir.undefined[position] |= undefined


@instruction("wgmma.mma_async", gathers="warpgroup")
def _product(inst: Instruction) -> Execute:
    """d, a (descriptor or registers), b descriptor, scale-d{, imm-scale-a, imm-scale-b{, trans-a}, trans-b}."""
    inst.flag("sync"), inst.flag("aligned")
    m, n, k = take_shape(inst)
    clamps = inst.flag("satfinite")
    d_type, a_type, b_type = inst.types()
    integers = a_type.name in ("s8", "u8")
    if m != ROWS or n % 8 or not 8 <= n <= 256 or _K.get(a_type.name) != k or a_type.bits != b_type.bits:
        raise Problem("this shape does not exist for the types")
    if d_type.name not in (("s32",) if integers else ("f32", "f16")):
        raise Problem(f"D cannot be .{d_type.name}")
    d_registers = registers(inst, inst.operands[0])
    if len(d_registers) != n * d_type.bits // 64:
        raise Problem(f"D takes {n * d_type.bits // 64} registers, not {len(d_registers)}")
    in_registers = isinstance(inst.operands[1], syntax.Group)
    scales = [integer(operand) for operand in inst.operands[4:]]
    wanted = 0 if integers else 2 if a_type.bits != 16 else 3 if in_registers else 4
    if len(scales) != wanted:
        raise Problem(f"takes {wanted} constants at the end, not {len(scales)}")
    scale_a, scale_b, *transposes = [*scales, *[1, 1][len(scales) :]] if wanted else [1, 1]
    trans_a, trans_b = [0, *transposes][-2:] if transposes else (0, 0)
    a = Operand(a_type, ROWS, k, bool(trans_a), scale_a == -1)
    b = Operand(b_type, n, k, bool(trans_b), scale_b == -1)
    a_registers = registers(inst, inst.operands[1]) if in_registers else []
    a_descriptor = None if in_registers else source(inst, inst.operands[1], "b64")
    b_descriptor = source(inst, inst.operands[2], "b64")
    scale_d = source(inst, inst.operands[3], "pred")

    def execute(state: State) -> None:
        leaders = state.selected()[::WARPS]
        blocks = state.block[leaders]
        b_grains = b.grains(state, _uniform(state, b_descriptor, "a matrix descriptor"), blocks)
        accumulates = _uniform(state, scale_d, "scale-d")
        a_grains = a_values = None
        a_unknown: Array | None = None
        shared = state.launch.shared
        _check_fence(state, leaders.tolist(), d_registers, a_registers)
        if a_descriptor is not None:
            a_grains = a.grains(state, _uniform(state, a_descriptor, "a matrix descriptor"), blocks)
            shared.check_async_read(state, a_grains, "wgmma reads")
            flags = shared.written_grains[a_grains].view(np.bool_)
            a_unknown = None if flags.all() else a.undefined(flags)
        else:
            a_values, a_unknown = _register_operand(state, a, a_registers)
        shared.check_async_read(state, b_grains, "wgmma reads")
        flags = shared.written_grains[b_grains].view(np.bool_)
        b_unknown = None if flags.all() else b.undefined(flags)
        undefined = _accumulators(state, leaders.tolist(), d_registers, d_type, n, accumulates)
        if a_unknown is not None or b_unknown is not None:
            undefined = np.zeros((len(leaders), ROWS, n), np.bool_) if undefined is None else undefined
            undefined |= False if a_unknown is None else a_unknown[:, :, None]
            undefined |= False if b_unknown is None else b_unknown[:, None, :]
        product = Product(
            leaders.tolist(), d_registers, d_type, n, a, b, a_values, a_registers, a_grains, b_grains,
            accumulates, clamps, undefined,
        )  # fmt: skip
        product.hold(state)
        product.note(state)
        state.launch.effects += 1
        state.set_all_known(d_registers, WRITING)
        if a_registers:
            state.set_all_known(a_registers, READING)
        for leader in leaders.tolist():
            state.launch.products.setdefault(leader, [[]])[-1].append(product)

    return execute


def _uniform(state: State, read: Callable[[State], Array], what: str) -> Array:
    """An operand that all threads of a warpgroup give alike: [g]."""
    value = np.broadcast_to(read(state), state.lanes.shape)
    state.require_defined(what)
    by_group = value.reshape(-1, WARPS * LANES)
    if (by_group != by_group[:, :1]).any():
        state.fault(f"the threads of a warpgroup differ in {what}")
    return by_group[:, 0].copy()


def _register_operand(state: State, a: Operand, numbers: Sequence[int]) -> tuple[Array, Array | None]:
    """A from registers [g, 64, k], and its rows with undefined elements. A wgmma in flight may read them too."""
    per = 32 // a.type.bits
    places = a_places(per, len(numbers))
    bits, unknown = read_registers(state, numbers)
    values = as_float64(elements(bits, a.type), a.type)
    matrix = scatter(values, places, (16, a.k)).reshape(-1, ROWS, a.k)
    rows = None
    if unknown is not None:
        marked = scatter(np.repeat(unknown, per, axis=-1), places, (16, a.k))
        rows = marked.any(axis=-1).reshape(-1, ROWS)
    return (-matrix if a.negated else matrix), rows


def _check_fence(state: State, leaders: list[int], d_registers: Sequence[int], a_registers: Sequence[int]) -> None:
    """Registers that anything but a wgmma has written since the last wgmma.fence (9.7.15.7.1)."""
    chained = all(any(p.d_registers == d_registers for p in _pending(state, leader)) for leader in leaders)
    fence = state.launch.product_fence
    warps = [w for leader in leaders for w in range(leader, leader + WARPS)]
    oldest = min(fence.get(w, -1) for w in warps)
    if oldest < 0:
        state.fault("wgmma.mma_async with no wgmma.fence before")
    for number in [*a_registers, *([] if chained else d_registers)]:
        tick, mask = state.written[number]
        if tick > oldest and mask & state.mask:
            name = state.launch.kernel.names[number]
            if any(tick > fence[w] and mask >> w & 1 for w in warps):
                state.fault(f"{name} was written after the last wgmma.fence")


def _accumulators(
    state: State, leaders: list[int], numbers: Sequence[int], type_: Type, columns: int, accumulates: Array
) -> Array | None:
    """Checks the use of accumulators; where they are undefined and added to: bool [g, 64, columns]."""
    for leader in leaders:
        for product in _pending(state, leader):
            if product.d_registers != numbers and set(product.d_registers) & set(numbers):
                state.fault("accumulators of a wgmma in flight of another shape", warp=leader)
            if product.d_registers == numbers and product.columns != columns:
                state.fault("accumulators of a wgmma in flight of another shape", warp=leader)
    known = state.known[np.asarray(numbers)][:, state.w]
    unknown = known == UNDEFINED
    if not unknown.any() or not accumulates.any():
        return None
    per = 32 // type_.bits
    groups = len(leaders)
    parts = np.repeat(unknown[..., None], per, axis=-1).transpose(0, 3, 1, 2)
    parts = parts.reshape(len(numbers) * per // 4, 2, 2, groups, WARPS, 8, 4)
    matrix: Array = parts.transpose(3, 4, 1, 5, 0, 6, 2).reshape(groups, ROWS, -1)
    return matrix & accumulates[:, None, None]
