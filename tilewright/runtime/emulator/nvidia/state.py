"""What the warps of a batch of blocks hold: registers, program counters, what they wait for.

All warps lie in one array axis; an instruction executes for those that are selected. Registers are
[warps, 32] arrays. Whether a register has a defined value is kept twice: per lane in ``known``, and
per warp as bits of a Python int in ``_defined``, which makes the common case one comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from tilewright.runtime.emulator.errors import EmulatorFault
from tilewright.runtime.emulator.nvidia.types import LANES, UNSIGNED, Array

if TYPE_CHECKING:
    from tilewright.runtime.emulator.nvidia.decode import Instruction
    from tilewright.runtime.emulator.nvidia.launch import Launch

#: values of ``known``: a register whose value wgmma will write, and one that it may still read
UNDEFINED, DEFINED, WRITING, READING = 0, 1, 2, 3
#: the program counter of lanes that cannot run
FAR = 1 << 30


def warp_bits(chosen: Array) -> int:
    """A bool array over warps as the bits of an int."""
    return int.from_bytes(np.packbits(chosen, bitorder="little").tobytes(), "little")


class State:
    """Registers and control state of ``warps`` warps, with the selection that the current instruction sees.

    ``w`` indexes the selected warps, ``lanes`` [selected, 32] says which of their lanes are active,
    ``full`` that all are.
    """

    def __init__(self, launch: Launch, first_block: int, blocks: int, warps_per_block: int, threads: int) -> None:
        kernel = launch.kernel
        self.launch: Launch = launch
        self.first_block: int = first_block
        self.blocks: int = blocks
        self.warps_per_block: int = warps_per_block
        self.warps: int = blocks * warps_per_block
        warps = self.warps
        self.block: Array = np.arange(warps) // warps_per_block
        self.rank: Array = np.arange(warps) % warps_per_block
        self.reg: list[Array] = []
        counts = {bits: sum(1 for width in kernel.widths if width == bits) for bits in UNSIGNED}
        files = {bits: np.zeros((count, warps, LANES), UNSIGNED[bits]) for bits, count in counts.items()}
        taken = dict.fromkeys(UNSIGNED, 0)
        for width in kernel.widths:
            self.reg.append(files[width][taken[width]])
            taken[width] += 1
        self.files = list(files.values())
        self.known = np.zeros((len(self.reg), warps, LANES), np.uint8)
        self._defined = [0] * len(self.reg)
        #: when a register was last written, and by which warps (bits)
        self.written: list[tuple[int, int]] = [(0, 0)] * len(self.reg)
        self.carry = np.zeros((warps, LANES), np.bool_)
        # control
        self.exited = self.rank[:, None] * LANES + np.arange(LANES) >= threads
        if self.exited.any():
            self.known[:, self.exited] = DEFINED
        self.pc = np.zeros((warps, LANES), np.int64)
        #: lanes that wait for something: a barrier, an mbarrier, registers
        self.blocked = np.zeros((warps, LANES), np.bool_)
        #: lanes that wait for others of their warp or warpgroup to reach the same instruction
        self.gathering = np.zeros((warps, LANES), np.bool_)
        #: pc where a lane can run, else FAR
        self.ready = np.where(self.exited, FAR, self.pc)
        self.tick = 0
        # selection
        self.w: Any = slice(None)
        self.count = warps
        self.lanes = ~self.exited
        self.full = False
        self.mask = 0
        self.taint: Array | None = None
        self.instruction: Instruction | None = None

    # ---- selection -------------------------------------------------------------------------------

    def select(self, warps: Array, lanes: Array) -> None:
        """Select warps by index (sorted), with their active lanes."""
        self.w = slice(None) if len(warps) == self.warps else warps
        self.count = len(warps)
        self.lanes = lanes
        self.full = bool(lanes.all())
        if self.count == self.warps:
            self.mask = (1 << self.warps) - 1
        else:
            chosen = np.zeros(self.warps, np.bool_)
            chosen[warps] = True
            self.mask = warp_bits(chosen)

    @contextmanager
    def restricted(self, lanes: Array) -> Iterator[None]:
        """Within the context only ``lanes`` [selected, 32] are active."""
        before = self.lanes, self.full
        self.lanes, self.full = lanes, bool(lanes.all())
        try:
            yield
        finally:
            self.lanes, self.full = before

    def selected(self) -> Array:
        """The selected warps, as indices."""
        return np.arange(self.warps)[self.w]

    def selected_blocks(self) -> Array:
        """The block (within the batch) of each selected warp."""
        value: Array = self.block[self.w]
        return value

    # ---- faults ----------------------------------------------------------------------------------

    def name(self, warp: int) -> str:
        """A warp by its block and its rank in it, for messages."""
        block = int(self.first_block + self.block[warp])
        return self.launch.warp_name(block, int(self.rank[warp]))

    def fault(self, message: str, lanes: Array | None = None, warp: int | None = None) -> NoReturn:
        """Raise a fault of the current instruction; ``lanes`` [selected, 32] or [selected] are the guilty ones."""
        place = ""
        if warp is not None:
            place = self.name(warp)
        elif self.count:
            guilty = self.lanes if lanes is None else np.asarray(lanes)
            guilty = np.broadcast_to(guilty if guilty.ndim == 2 else guilty[:, None], (self.count, LANES))
            first = int(guilty.reshape(-1).argmax())
            place = f"{self.name(int(self.selected()[first // LANES]))}, lane {first % LANES}"
        inst = self.instruction
        if inst is None:
            raise EmulatorFault(message, place=place)
        raise EmulatorFault(message, instruction=inst.text, line=inst.line, place=place, source=inst.source)

    # ---- undefined values ------------------------------------------------------------------------

    def begin(self, inst: Instruction) -> None:
        """Start an instruction: nothing undefined has been read yet."""
        self.instruction = inst
        self.taint = None
        self.tick += 1

    def add_taint(self, undefined: Array) -> None:
        """What the instruction read is undefined in these lanes [selected, 32]."""
        undefined = undefined & self.lanes
        if undefined.any():
            self.taint = undefined if self.taint is None else self.taint | undefined

    def take_taint(self) -> Array | None:
        """What is tainted so far [selected, 32]; from here on nothing is."""
        taint, self.taint = self.taint, None
        return taint

    def require_defined(self, use: str) -> None:
        """Fault if the instruction has read something undefined in an active lane."""
        if self.taint is not None and (self.taint & self.lanes).any():
            self.fault(f"{use} depends on a value that was never written", self.taint & self.lanes)

    def _suspect(self, register: int) -> None:
        known = self.known[register][self.w]
        writing = (known == WRITING) & self.lanes
        if writing.any():
            name = self.launch.kernel.names[register]
            self.fault(f"{name} is read while a wgmma that writes it is in flight (no wgmma.wait_group yet)", writing)
        self.add_taint(known == UNDEFINED)

    # ---- registers -------------------------------------------------------------------------------

    def read(self, register: int) -> Array:
        """The bits [selected, 32]; may be the register itself: do not modify."""
        if self._defined[register] & self.mask != self.mask:
            self._suspect(register)
        value: Array = self.reg[register][self.w]
        return value

    def write(self, register: int, value: Array) -> None:
        """Write bits, broadcastable to [selected, 32], in the active lanes."""
        target = self.reg[register]
        if self.full:
            target[self.w] = value
        elif isinstance(self.w, slice):
            np.copyto(target, value, where=self.lanes)
        else:
            target[self.w] = np.where(self.lanes, value, target[self.w])
        self.written[register] = (self.tick, self.mask)
        if self.taint is not None or self._defined[register] & self.mask != self.mask:
            self._mark(register)

    def _mark(self, register: int) -> None:
        known = self.known[register][self.w]
        busy = (known >= WRITING) & self.lanes
        if busy.any():
            name = self.launch.kernel.names[register]
            self.fault(f"{name} is written while a wgmma that uses it is in flight (no wgmma.wait_group yet)", busy)
        fresh = DEFINED if self.taint is None else np.where(self.taint, UNDEFINED, DEFINED)
        self.set_known([register], np.where(self.lanes, fresh, known).astype(np.uint8))

    def set_known(self, registers: Sequence[int], codes: Array | int) -> None:
        """Set ``known`` of registers in the selected warps; ``codes`` broadcasts to [selected, 32]."""
        for register in registers:
            self.known[register, self.w] = codes
            defined = (self.known[register][self.w] == DEFINED).all(axis=1)
            chosen = np.zeros(self.warps, np.bool_)
            chosen[self.w] = defined
            self._defined[register] = self._defined[register] & ~self.mask | warp_bits(chosen)

    def set_all_known(self, registers: Sequence[int], code: int) -> None:
        """Set ``known`` of registers to one code in all lanes of the selected warps."""
        if not registers:
            return
        if isinstance(self.w, slice):
            self.known[np.asarray(registers)] = code
        else:
            self.known[np.ix_(registers, self.w)] = code
        for register in registers:
            bits = self._defined[register]
            self._defined[register] = bits | self.mask if code == DEFINED else bits & ~self.mask

    # ---- control ---------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Recompute ``ready`` of the selected warps."""
        stopped = self.exited[self.w] | self.blocked[self.w] | self.gathering[self.w]
        self.ready[self.w] = np.where(stopped, FAR, self.pc[self.w])

    def wake(self, warp: int, lanes: Array | slice = slice(None)) -> None:
        """Let blocked lanes of a warp go on."""
        self.launch.effects += 1
        self.blocked[warp, lanes] = False
        stopped = self.exited[warp] | self.blocked[warp] | self.gathering[warp]
        self.ready[warp] = np.where(stopped, FAR, self.pc[warp])
