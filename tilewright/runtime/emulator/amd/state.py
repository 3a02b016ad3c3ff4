"""The state of the waves that run in step: registers, EXEC, SCC, program counters, poison.

Arrays are register-major, so that one register of all waves is contiguous: vector registers are
[register, wave, 64 lanes], scalar ones [register, wave]. An instruction acts on the *selected*
waves ``state.w`` (a slice when all are selected: then reads are views and cost nothing).
ISA chapter 3, "Kernel State".

Poison: a register that a wave never wrote is undefined. Undefinedness flows through instructions
(compilers do copy and shift undefined halves legally) and faults where it takes effect: an
address, stored data, a comparison of scalars, EXEC. It is tracked per register and wave, not per lane.

A register that a load in flight will write (`counters`) faults at once: nothing may read it, and
only a later load of the same counter may write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from tilewright.runtime.emulator.amd.counters import Counter, Counters, RegisterStatus
from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.errors import EmulatorFault
from tilewright.runtime.emulator.amd.mode import is_plain
from tilewright.runtime.emulator.amd.operands import (
    EXEC,
    KINDS,
    VCC,
    Array,
    Kind,
    Operand,
    Where,
    constant_array,
    constant_part,
)

if TYPE_CHECKING:
    from tilewright.runtime.emulator.amd.memory import MemorySystem

LANES = 64
SCALAR_REGISTERS = 128
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def pack_lanes(mask: Array) -> Array:
    """bool [waves, 64] -> uint64 [waves], bit i for lane i."""
    packed: Array = np.packbits(mask, axis=1, bitorder="little").view(np.uint64)[:, 0]
    return packed


def unpack_lanes(bits: Array) -> Array:
    """uint64 [waves] -> bool [waves, 64]."""
    octets = np.ascontiguousarray(bits, np.uint64).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets, axis=1, bitorder="little").view(np.bool_)


def split64(values: Array) -> tuple[Array, Array]:
    """uint64 -> its low and high uint32."""
    return (values & _LOW).astype(np.uint32), (values >> _32).astype(np.uint32)


def join64(low: Array, high: Array) -> Array:
    """Two uint32 arrays -> uint64."""
    joined: Array = low.astype(np.uint64) | (high.astype(np.uint64) << _32)
    return joined


class WaveState:
    """Registers of ``waves`` waves and the operations handlers use to read and write operands."""

    def __init__(
        self,
        waves: int,
        waves_per_group: int,
        vector_registers: int,
        memory: MemorySystem,
        poison: bool = True,
        mode: int = 0x3F0,
    ) -> None:
        self.waves, self.waves_per_group, self.memory = waves, waves_per_group, memory
        self.first_group = 0
        #: number of the first accumulation register among the vector registers
        self.accumulators = vector_registers
        self.sgprs = np.zeros((SCALAR_REGISTERS, waves), np.uint32)
        self.vgprs = np.zeros((vector_registers, waves, LANES), np.uint32)
        self.exec_bits = np.full(waves, 0xFFFFFFFFFFFFFFFF, np.uint64)
        self.exec_mask = np.ones((waves, LANES), np.bool_)
        self.scc = np.zeros(waves, np.bool_)
        self.mode = np.full(waves, mode, np.uint32)
        #: whether no wave's MODE asks for anything but what NumPy does
        self.plain_mode = is_plain(self.mode)
        self.pc = np.zeros(waves, np.int64)
        self.done = np.zeros(waves, np.bool_)
        self.waiting = np.zeros(waves, np.bool_)
        self.group = np.arange(waves) // waves_per_group
        self.instruction: Instruction | None = None
        self.counters = Counters(waves)
        kinds = (Counter.VECTOR, Counter.LDS)
        self._vector = RegisterStatus(vector_registers, waves, poison, self.counters, kinds)
        self._scalar = RegisterStatus(SCALAR_REGISTERS, waves, poison, self.counters, (Counter.SCALAR,))
        #: counters of the current instruction, if what it writes arrives later
        self._arriving: Sequence[Counter] = ()
        #: selected waves whose current instruction has read something undefined
        self.taint: Array | None = None
        #: the same for upper halves of 64-bit sources, apart until `_settle` merges it into ``taint``
        self._upper_taint: Array | None = None
        self._halves_apart = False
        self.w: slice | Array = slice(None)
        self.count = waves
        #: lanes that the current instruction may write, [selected waves, 64], and whether that is all
        self.lanes: Array = self.exec_mask
        self.full = True

    # ---- selection -----------------------------------------------------------------------------

    def select(self, waves: Array | None) -> None:
        """Select waves by index array; None selects all of them."""
        self.w = slice(None) if waves is None else waves
        self.count = self.waves if waves is None else len(waves)
        self._refresh_lanes()

    @property
    def selected(self) -> Array:
        """The indices of the selected waves."""
        indices: Array = np.arange(self.waves)[self.w]
        return indices

    def _refresh_lanes(self) -> None:
        self.lanes = self.exec_mask[self.w]
        self.full = bool(self.lanes.all())

    @contextmanager
    def restricted(self, mask: Array) -> Iterator[None]:
        """Within the context only the lanes of ``mask`` that EXEC enables are written."""
        lanes, full = self.lanes, self.full
        self.lanes = lanes & mask
        self.full = bool(self.lanes.all())
        try:
            yield
        finally:
            self.lanes, self.full = lanes, full

    @contextmanager
    def all_lanes(self) -> Iterator[None]:
        """Within the context EXEC is ignored, as MFMA and v_writelane do."""
        lanes, full = self.lanes, self.full
        self.full = True
        try:
            yield
        finally:
            self.lanes, self.full = lanes, full

    def look(self) -> int:
        """A hash of all that the waves do next: registers, program counters, who waits or has ended."""
        parts = (self.sgprs, self.vgprs, self.exec_bits, self.scc, self.mode, self.pc, self.done, self.waiting)
        return hash(tuple(part.tobytes() for part in parts))

    def fault(self, message: str, selected: Array | None = None) -> NoReturn:
        """Raise a fault of the current instruction; ``selected`` is a bool array of guilty selected waves."""
        indices = self.selected
        wave = int(indices[selected.argmax()] if selected is not None else indices[0])
        inst = self.instruction
        raise EmulatorFault(
            message,
            instruction=inst.text if inst else "",
            line=inst.line if inst else 0,
            wave=(self.first_group + wave // self.waves_per_group, wave % self.waves_per_group),
            source=inst.source if inst else "",
        )

    # ---- poison --------------------------------------------------------------------------------

    def _inspect(self, status: RegisterStatus, letter: str, register: int) -> None:
        """Read a register that is not clean: fault if a load will still write it, note if it is undefined."""
        pending = status.in_flight(register, self.w)
        if pending is not None:
            load = status.load_of(register)
            self.fault(
                f"{self._name(letter, register)} is read before {load} has arrived: no s_waitcnt covers it", pending
            )
        guilty = status.undefined[register][self.w]
        if guilty.any():
            self.read_undefined(guilty)
        status.refresh(register)

    def _name(self, letter: str, register: int) -> str:
        """A register as the assembly calls it: accumulation registers follow the others in one file."""
        if letter == "v" and register >= self.accumulators:
            return f"a{register - self.accumulators}"
        return f"{letter}{register}"

    def read_undefined(self, guilty: Array) -> None:
        """The current instruction has read something undefined in these selected waves."""
        self.taint = guilty.copy() if self.taint is None else self.taint | guilty

    def begin(self, inst: Instruction) -> None:
        """Start an instruction: nothing undefined has been read yet."""
        self.instruction = inst
        self.taint = self._upper_taint = None
        self._arriving = ()

    def issue(self, *counters: Counter) -> None:
        """The current instruction is a memory operation of these counters: what it writes from now on arrives late."""
        for counter in counters:
            self.counters.issue(counter, self.w)
        self._arriving = counters

    def forget_taint(self) -> None:
        """What the current instruction has read cannot show in its result."""
        self.taint = self._upper_taint = None

    def _read_upper(self, read: Callable[[], Array]) -> Array:
        """Read an upper half, keeping what it taints apart."""
        lower, self.taint = self.taint, self._upper_taint
        value = read()
        self._upper_taint, self.taint = self.taint, lower
        return value

    def _settle(self) -> None:
        if self._upper_taint is not None and not self._halves_apart:
            upper, self._upper_taint = self._upper_taint, None
            self.taint = upper if self.taint is None else self.taint | upper

    def _write_halves(self, halves: str, low: Callable[[], None], high: Callable[[], None]) -> None:
        """Write the halves of a 64-bit result.

        ``halves`` says what they depend on: "mixed" (each on all), "up" (the low one on low halves
        alone, as in an addition) or "apart" (each on its like, as in a copy).
        """
        self._halves_apart = halves != "mixed"
        low()
        self._halves_apart = False
        if halves == "apart":
            self.taint, self._upper_taint = self._upper_taint, None
        high()

    def _mark(self, status: RegisterStatus, letter: str, register: int, lanes: Array | None) -> None:
        """Record a write to ``register``: it is now as undefined as what the instruction read."""
        self._settle()
        # loads of a counter that goes in order land one after the other
        ordered = [counter for counter in self._arriving if counter is not Counter.SCALAR]
        pending = status.in_flight(register, self.w, ordered)
        if pending is not None:
            name, load = self._name(letter, register), status.load_of(register)
            self.fault(f"{name} is written while {load} is in flight to it", pending)
        selected = status.undefined[register][self.w]
        fresh: Array = self.taint if self.taint is not None else np.zeros_like(selected)
        if lanes is not None:
            # a partial write of an undefined value leaves a defined register defined
            fresh = np.where(lanes.any(axis=1), fresh & (selected | lanes.all(axis=1)), selected)
        status.undefined[register, self.w] = fresh
        if self._arriving and self.instruction is not None:
            status.expect(register, self.w, self._arriving, self.instruction)
        else:
            status.refresh(register)

    def require_defined(self, use: str) -> None:
        """Fault if the current instruction has read a never-written register (in a wave with active lanes)."""
        self._settle()
        if self.taint is None:
            return
        guilty = self.taint & self.lanes.any(axis=1)
        if guilty.any():
            self.fault(f"{use} depends on a register or on LDS that was never written", guilty)

    def require_defined_scalar(self, use: str) -> None:
        """Like `require_defined`, for effects that EXEC does not mask."""
        self._settle()
        if self.taint is not None and self.taint.any():
            self.fault(f"{use} depends on a register or on LDS that was never written", self.taint)

    # ---- registers -----------------------------------------------------------------------------

    @property
    def _unusual(self) -> bool:
        """Whether what the current instruction writes is undefined or arrives later."""
        return bool(self._arriving) or self.taint is not None or self._upper_taint is not None

    def read_vgpr(self, register: int) -> Array:
        """uint32 [waves, 64]; may be a view of the register: do not modify it."""
        if not self._vector.clean[register]:
            self._inspect(self._vector, "v", register)
        value: Array = self.vgprs[register][self.w]
        return value

    def write_vgpr(self, register: int, value: Array) -> None:
        """Write uint32, broadcastable to [waves, 64], in the active lanes."""
        if self.full:
            self.vgprs[register, self.w] = value
        elif isinstance(self.w, slice):
            np.copyto(self.vgprs[register], value, where=self.lanes)
        else:
            self.vgprs[register, self.w] = np.where(self.lanes, value, self.vgprs[register, self.w])
        if self._unusual or not self._vector.clean[register]:
            self._mark(self._vector, "v", register, None if self.full else self.lanes)

    def read_sgpr(self, register: int) -> Array:
        """uint32 [waves]."""
        if register >= EXEC:
            bits = self.exec_bits[self.w]
            return split64(bits)[register - EXEC]
        if not self._scalar.clean[register]:
            self._inspect(self._scalar, "s", register)
        value: Array = self.sgprs[register][self.w]
        return value

    def write_sgpr(self, register: int, value: Array) -> None:
        """Write uint32, broadcastable to [waves]; EXEC is register 126, 127."""
        if register >= EXEC:
            low, high = split64(self.exec_bits[self.w])
            halves = [low, high]
            halves[register - EXEC] = np.broadcast_to(value, low.shape)
            self.write_exec(join64(halves[0], halves[1]))
            return
        self.sgprs[register, self.w] = value
        if self._unusual or not self._scalar.clean[register]:
            self._mark(self._scalar, "s", register, None)

    def read_sgpr64(self, register: int) -> Array:
        """uint64 [waves]."""
        if register == EXEC:
            bits: Array = self.exec_bits[self.w]
            return bits
        return join64(self.read_sgpr(register), self._read_upper(lambda: self.read_sgpr(register + 1)))

    def write_sgpr64(self, register: int, value: Array, halves: str = "mixed") -> None:
        """Write uint64, broadcastable to [waves]."""
        if register == EXEC:
            self.write_exec(value)
            return
        low, high = split64(value)
        self._write_halves(halves, lambda: self.write_sgpr(register, low), lambda: self.write_sgpr(register + 1, high))

    def write_exec(self, bits: Array) -> None:
        """Set EXEC of the selected waves (ISA chapter 3, "EXECute Mask")."""
        self.require_defined_scalar("EXEC")
        self.exec_bits[self.w] = bits
        self.exec_mask[self.w] = unpack_lanes(np.broadcast_to(bits, (self.count,)))
        self._refresh_lanes()

    @property
    def scc_selected(self) -> Array:
        """SCC of the selected waves, bool [waves]."""
        value: Array = self.scc[self.w]
        return value

    def write_scc(self, value: Array) -> None:
        """Set SCC of the selected waves."""
        self.scc[self.w] = value

    def write_mode(self, value: Array) -> None:
        """Set MODE of the selected waves."""
        self.mode[self.w] = value
        self.plain_mode = is_plain(self.mode)

    def mode_bit(self, bit: int) -> Array:
        """Whether a bit of MODE is set, bool [waves, 1]."""
        result: Array = (self.mode[self.w] & np.uint32(bit) != 0)[:, None]
        return result

    # ---- operands ------------------------------------------------------------------------------

    def raw(self, operand: Operand, part: int = 0) -> Array:
        """32-bit part ``part`` of an operand, as uint32 broadcastable to [waves, 64]; no modifiers."""
        if operand.where is Where.VECTOR:
            return self.read_vgpr(operand.index + part)
        if operand.where is Where.SCALAR:
            return self.read_sgpr(operand.index + part)[:, None]
        if operand.where is Where.CONSTANT:
            return constant_part(operand, part)
        if operand.where is Where.VALUE:
            value: Array = operand.value[part]
            return value
        if operand.where is Where.SCC:
            return self.scc_selected.astype(np.uint32)[:, None]
        self.fault(f"operand {operand.text} cannot be read as a value")

    def vector(self, operand: Operand, kind: Kind, high_half: bool = False) -> Array:
        """A source of a vector instruction in ``kind``'s dtype, broadcastable to [waves, 64].

        ``high_half`` selects bits 31:16 of a 16-bit source (OP_SEL, ISA chapter 6).
        """
        if operand.where is Where.CONSTANT:
            value = constant_array(operand, kind)
        elif kind.bits == 32:
            value = self.raw(operand).view(kind.dtype)
        elif kind.bits == 64:
            value = join64(self.raw(operand), self._upper(operand)).view(kind.dtype)
        else:
            raw = self.raw(operand)
            value = (raw >> np.uint32(16) if high_half else raw).astype(np.uint16).view(kind.dtype)
        if kind.is_float:
            if operand.absolute:
                value = np.abs(value)
            if operand.negate:
                value = -value
        return value

    def _upper(self, operand: Operand) -> Array:
        if operand.where is Where.SCC:
            return np.zeros((1, 1), np.uint32)
        return self._read_upper(lambda: self.raw(operand, 1))

    def write_vector(
        self, operand: Operand, kind: Kind, value: Array, high_half: bool | None = None, halves: str = "mixed"
    ) -> None:
        """Write a result. 16-bit results zero bits 31:16, unless ``high_half`` names the half to replace."""
        if value.dtype != kind.dtype:
            value = value.astype(kind.dtype)
        if kind.bits == 32:
            self.write_vgpr(operand.index, value.view(np.uint32))
        elif kind.bits == 64:
            low, high = split64(value.view(np.uint64))
            register = operand.index
            self._write_halves(
                halves, lambda: self.write_vgpr(register, low), lambda: self.write_vgpr(register + 1, high)
            )
        else:
            bits = value.view(np.uint16).astype(np.uint32)
            if high_half is not None:
                old = self.vgprs[operand.index][self.w]
                bits = (
                    (old & np.uint32(0xFFFF)) | (bits << np.uint32(16))
                    if high_half
                    else (old & np.uint32(0xFFFF0000)) | bits
                )
            self.write_vgpr(operand.index, bits)

    def scalar(self, operand: Operand, kind: Kind) -> Array:
        """A source of a scalar instruction in ``kind``'s dtype, [waves] or [1]."""
        if operand.where is Where.CONSTANT:
            return constant_array(operand, kind)[0]
        if operand.where is Where.SCC:
            return self.scc_selected.astype(kind.dtype)
        if operand.where is not Where.SCALAR:
            self.fault(f"operand {operand.text} is not scalar")
        if kind.bits == 64:
            return self.read_sgpr64(operand.index).view(kind.dtype)
        value = self.read_sgpr(operand.index)
        if kind.bits == 16:
            value = value.astype(np.uint16)
        return value.view(kind.dtype)

    def write_scalar(self, operand: Operand, kind: Kind, value: Array, halves: str = "mixed") -> None:
        """Write a scalar result, broadcastable to [waves]."""
        if value.dtype != kind.dtype:
            value = value.astype(kind.dtype)
        if kind.bits == 64:
            self.write_sgpr64(operand.index, value.view(np.uint64), halves)
        else:
            self.write_sgpr(operand.index, value.view(f"u{kind.bits // 8}"))

    def lane_mask(self, operand: Operand) -> Array:
        """A 64-bit scalar read as a mask of lanes: bool [waves, 64]."""
        bits = self.scalar(operand, KINDS["b64"])
        return unpack_lanes(np.broadcast_to(bits, (self.count,)))

    def vcc_mask(self) -> Array:
        """VCC as a mask of lanes."""
        return unpack_lanes(self.read_sgpr64(VCC))

    def write_lane_mask(self, operand: Operand, mask: Array) -> None:
        """Write a per-lane condition as 64 bits; inactive lanes give 0 (ISA chapter 6, VOPC)."""
        active = np.broadcast_to(mask, self.lanes.shape)
        self.write_sgpr64(operand.index, pack_lanes(active if self.full else active & self.lanes))
