"""Loads whose value is discarded in some lanes.

Where a guarded load has no branch, a compiler loads something harmless in the lanes that must not:
``selp a, wanted, harmless, p; ld r, [a]; selp d, r, 0, p``. What such a lane reads does not matter,
so it cannot race. (LLVM does the same when it speculates a load.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tilewright.runtime.emulator.nvidia import syntax
from tilewright.runtime.emulator.nvidia.operands import parts
from tilewright.runtime.emulator.nvidia.state import DEFINED
from tilewright.runtime.emulator.nvidia.types import Array

if TYPE_CHECKING:
    from tilewright.runtime.emulator.nvidia.decode import Instruction, Kernel
    from tilewright.runtime.emulator.nvidia.state import State

#: register name -> the instructions that mention it as an operand or guard, by their place
Mentions = dict[str, list[int]]


def used_lanes(load: Instruction) -> Callable[[State], Array | None]:
    """A function of the state that gives the lanes [selected, 32] which use what ``load`` loads; None for all."""
    found: list[tuple[int, bool] | None] = []

    def lanes(state: State) -> Array | None:
        if not found:
            found.append(_condition(load))
        if found[0] is None:
            return None
        predicate, polarity = found[0]
        known = state.known[predicate][state.w] == DEFINED
        used: Array = (state.reg[predicate][state.w] == polarity) | ~known
        return used

    return lanes


def _condition(load: Instruction) -> tuple[int, bool] | None:
    """The predicate, and its value, under which all loaded registers are used; None without one."""
    kernel = load.kernel
    mentions = _mentions(kernel)
    place = kernel.instructions.index(load)
    conditions = {_use(kernel, mentions, operand, place) for operand in parts(load.operands[0])}
    only = conditions.pop() if len(conditions) == 1 else None
    if only is None:
        return None
    name, polarity = only
    writers = [at for at in mentions[name] if name in _names(kernel.instructions[at].operands[0])]
    if len(writers) != 1 or writers[0] >= place:
        return None
    return kernel.registers[name], polarity


def _use(kernel: Kernel, mentions: Mentions, operand: syntax.Operand, place: int) -> tuple[str, bool] | None:
    """(predicate, value) under which the only use of a register, a selp, takes it."""
    name = operand.text if isinstance(operand, syntax.Name) else ""
    uses = [at for at in mentions.get(name, []) if at != place]
    if len(uses) != 1 or kernel.instructions[uses[0]].name != "selp":
        return None
    _, if_true, if_false, predicate = kernel.instructions[uses[0]].operands
    takes = [name in _names(choice) for choice in (if_true, if_false)]
    if sum(takes) != 1 or not isinstance(predicate, syntax.Name):
        return None
    return predicate.text, takes[0]


def _mentions(kernel: Kernel) -> Mentions:
    if not kernel.mentions:
        named = {number: name for name, number in kernel.registers.items()}
        for place, inst in enumerate(kernel.instructions):
            names = {name for operand in inst.operands for name in _names(operand)}
            if inst.guard >= 0:
                names.add(named[inst.guard])
            for name in names:
                kernel.mentions.setdefault(name, []).append(place)
    return kernel.mentions


def _names(operand: syntax.Operand) -> list[str]:
    """The names in an operand."""
    if isinstance(operand, syntax.Name):
        return [operand.text]
    if isinstance(operand, syntax.Group):
        return [name for part in operand.parts for name in _names(part)]
    if isinstance(operand, syntax.Memory):
        return [name for part in (operand.base, *operand.extra) for name in _names(part)]
    if isinstance(operand, syntax.Pair):
        return [*_names(operand.first), *_names(operand.second)]
    if isinstance(operand, syntax.Negated):
        return _names(operand.operand)
    return []
