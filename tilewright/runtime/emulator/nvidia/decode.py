"""Parsed PTX -> a kernel: instructions bound to what executes them, memory laid out, labels resolved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tilewright.runtime.emulator.errors import DecodeError
from tilewright.runtime.emulator.nvidia import syntax
from tilewright.runtime.emulator.nvidia.registry import TABLE, Execute, Row, find
from tilewright.runtime.emulator.nvidia.syntax import Entry, Statement, Text, Variable
from tilewright.runtime.emulator.nvidia.types import TYPES, Array, Type

if TYPE_CHECKING:
    from tilewright.runtime.emulator.nvidia.state import State

#: the first bytes of shared memory belong to the system (PTX ISA 5.1.7, reserved shared memory; sm_90: 1 KiB)
RESERVED_SHARED = 1024


class Problem(Exception):
    """Why one instruction cannot be executed."""


@dataclass(eq=False)
class Instruction:
    """One instruction while and after it is bound.

    ``modifiers`` are the parts of the opcode behind its table name that no binder has taken yet.
    """

    name: str
    modifiers: list[str]
    operands: tuple[syntax.Operand, ...]
    text: str
    line: int
    source: str
    kernel: Kernel
    guard: int = -1
    guard_negated: bool = False
    ends_run: bool = False
    gathers: str = ""
    #: reads the membermask of an instruction that only some lanes of a warp gather for
    membermask: Callable[[State], Array] | None = None
    execute: Execute | None = None
    #: a bit for each byte of a load that matters, where not all do
    used_bytes: int | None = None

    def flag(self, name: str) -> bool:
        """Take a modifier; whether it was there."""
        if name in self.modifiers:
            self.modifiers.remove(name)
            return True
        return False

    def one_of(self, *names: str, default: str | None = None) -> str:
        """Take the first modifier that is one of ``names``. A Problem without one and without a default."""
        for modifier in self.modifiers:
            if modifier in names:
                self.modifiers.remove(modifier)
                return modifier
        if default is None:
            raise Problem(f"needs one of .{', .'.join(names)}")
        return default

    def type(self, *names: str) -> Type:
        """Take the first modifier that is a type (one of ``names``, if any are given)."""
        for modifier in self.modifiers:
            if modifier in TYPES:
                if names and modifier not in names:
                    raise Problem(f"type .{modifier} is not implemented")
                self.modifiers.remove(modifier)
                return TYPES[modifier]
        raise Problem("needs a type")

    def types(self) -> list[Type]:
        """Take all types, in order."""
        found = [TYPES[m] for m in self.modifiers if m in TYPES]
        self.modifiers = [m for m in self.modifiers if m not in TYPES]
        return found

    def need(self, *counts: int) -> None:
        """A Problem unless the number of operands is one of ``counts``."""
        if len(self.operands) not in counts:
            raise Problem(f"takes {' or '.join(map(str, counts))} operands, not {len(self.operands)}")


@dataclass
class Kernel:
    """A decoded kernel. Registers are numbers: ``names`` and ``widths`` (bits) by number.

    ``params`` gives each parameter's offset; ``shared_offsets`` those of shared variables;
    ``local_offsets`` those in a thread's local memory; ``constants`` are module variables, which a
    launch places in global memory; dynamic shared memory starts at ``dynamic_offset``.
    """

    name: str
    target: str
    names: list[str] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    params: dict[str, int] = field(default_factory=dict)
    param_bytes: int = 0
    shared_offsets: dict[str, int] = field(default_factory=dict)
    dynamic_offset: int = RESERVED_SHARED
    local_offsets: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    constants: dict[str, Variable] = field(default_factory=dict)
    #: where each register is mentioned, once somebody asks
    mentions: dict[str, list[int]] = field(default_factory=dict)
    #: directives such as maxntid
    directives: dict[str, list[int]] = field(default_factory=dict)


def decode_kernel(text: str, name: str) -> Kernel:
    """Decode entry ``name``. Raises DecodeError, naming *every* line that cannot be executed."""
    module = syntax.parse_text(text)
    if name not in module.entries:
        known = ", ".join(module.entries) or "no entry"
        raise DecodeError(f"the PTX has no entry {name}: it has {known}")
    entry = module.entries[name]
    kernel = Kernel(name, module.target, labels=entry.labels, directives=entry.directives)
    problems: list[str] = []
    for register, element in entry.registers:
        if element not in TYPES:
            problems.append(f"register {register} has type .{element}, which is not implemented")
            continue
        kernel.registers[register] = len(kernel.names)
        kernel.names.append(register.partition("#")[0])
        kernel.widths.append(TYPES[element].bits)
    _lay_out(kernel, module, entry)
    for statement in entry.statements:
        problem = _bind(kernel, module, statement)
        if problem:
            problems.append(f"line {statement.line}: {problem}: {statement.text[:160]}")
    if problems:
        raise DecodeError(f"cannot execute kernel {name}:\n  " + "\n  ".join(problems))
    return kernel


def _align(offset: int, align: int) -> int:
    return -(-offset // align) * align


def _lay_out(kernel: Kernel, module: Text, entry: Entry) -> None:
    """Offsets of parameters, shared and local variables."""
    for param in entry.params:
        offset = _align(kernel.param_bytes, param.align)
        kernel.params[param.name] = offset
        kernel.param_bytes = offset + param.size
    dynamic: list[Variable] = []
    for variable in [*module.variables.values(), *entry.variables]:
        if variable.space in ("global", "const"):
            kernel.constants[variable.name] = variable
        elif variable.space == "local":
            offset = _align(kernel.local_bytes, variable.align)
            kernel.local_offsets[variable.name] = offset
            kernel.local_bytes = offset + variable.size
        elif variable.unsized:
            dynamic.append(variable)
        else:
            offset = _align(kernel.dynamic_offset, variable.align)
            kernel.shared_offsets[variable.name] = offset
            kernel.dynamic_offset = offset + variable.size
    kernel.dynamic_offset = _align(kernel.dynamic_offset, max([16, *(v.align for v in dynamic)]))
    kernel.local_bytes = _align(kernel.local_bytes, 16)
    for variable in dynamic:
        kernel.shared_offsets[variable.name] = kernel.dynamic_offset


def _bind(kernel: Kernel, module: Text, statement: Statement) -> str | None:
    found = find(statement.opcode)
    if found is None:
        return f"unknown instruction {statement.opcode}"
    name, row = found
    modifiers = [part for part in statement.opcode[len(name) :].split(".") if part]
    inst = Instruction(
        name, modifiers, statement.operands, statement.text, statement.line, _source(module, statement), kernel
    )
    inst.ends_run, inst.gathers, inst.used_bytes = row.ends_run, row.gathers, statement.used_bytes
    try:
        _bind_guard(inst, statement)
        inst.execute = row.binder(inst)
    except Problem as problem:
        return f"{statement.opcode}: {problem}"
    if inst.modifiers:
        return f"{statement.opcode}: the modifier .{inst.modifiers[0]} is not implemented"
    kernel.instructions.append(inst)
    return None


def _bind_guard(inst: Instruction, statement: Statement) -> None:
    if statement.guard is None:
        return
    name, inst.guard_negated = statement.guard
    inst.guard = inst.kernel.registers.get(name, -1)
    if inst.guard < 0 or inst.kernel.widths[inst.guard] != 1:
        raise Problem(f"the guard {name} is no predicate")


def _source(module: Text, statement: Statement) -> str:
    if statement.location is None:
        return ""
    file, line, column = statement.location
    return f"{module.files.get(file, f'file {file}')}:{line}:{column}"


__all__ = ["RESERVED_SHARED", "TABLE", "Instruction", "Kernel", "Problem", "Row", "decode_kernel"]
