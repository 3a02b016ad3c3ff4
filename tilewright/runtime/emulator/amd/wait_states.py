"""Wait states that software must leave between instructions other than matrix ones, checked on the text of a kernel.

The hardware does not check for these dependencies (CDNA3 and CDNA4 ISA section 4.5, "Manually Inserted Wait States",
table 11). Like `hazards`, along all paths, from each instruction for as many as its table rows reach. Not checked: uses
of VCCZ and EXECZ as data, s_sendmsg, relative moves, traps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tilewright.runtime.emulator.amd.decode import Instruction, Kernel
from tilewright.runtime.emulator.amd.hazards import following, read_operands, registers, written_operands
from tilewright.runtime.emulator.amd.hwreg import accesses_mode
from tilewright.runtime.emulator.amd.operands import EXEC, M0, VCC, Operand, Where

#: vector instructions with a second destination, a mask of lanes
_SECOND_RESULT = ("v_add_co_", "v_sub_co_", "v_subrev_co_", "v_addc_co_", "v_subb_co_", "v_subbrev_co_",
                  "v_div_scale_", "v_mad_u64_u32", "v_mad_i64_i32")  # fmt: skip
#: vector instructions whose last operand is a mask of lanes, which is read as a carry is: without waiting
_CARRY = ("v_addc_co_", "v_subb_co_", "v_subbrev_co_", "v_cndmask_")
_MEMORY = ("buffer_", "global_", "flat_", "scratch_")
_LANE = ("v_readlane", "v_readfirstlane", "v_writelane")
_TRANSCENDENTAL = ("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_", "v_sin_", "v_cos_")
_WIDE_STORES = ("_dwordx3", "_dwordx4", "cmpswap_x2")

Registers = frozenset[int]
Pick = Callable[[Instruction], Registers]


def _is_vector(inst: Instruction) -> bool:
    return inst.name.startswith("v_")


def _scalars(operands: tuple[Operand, ...]) -> Registers:
    """The scalar registers that operands name."""
    return frozenset(
        operand.index + part for operand in operands if operand.where is Where.SCALAR for part in range(operand.count)
    )


def _scalars_written(inst: Instruction) -> Registers:
    """Scalar registers that a vector instruction writes; EXEC of v_cmpx among them."""
    if not _is_vector(inst):
        return frozenset()
    results = inst.operands[:2] if inst.name.startswith(_SECOND_RESULT) else inst.operands[:1]
    return _scalars(results) | (frozenset((EXEC, EXEC + 1)) if inst.name.startswith("v_cmpx") else frozenset())


def _constants(inst: Instruction) -> Registers:
    """Scalar registers that a vector instruction reads as constants, not as a carry."""
    if not _is_vector(inst):
        return frozenset()
    sources = inst.operands[2 if inst.name.startswith(_SECOND_RESULT) else 1 :]
    return _scalars(sources[:-1] if inst.name.startswith(_CARRY) else sources)


def _lane_select(inst: Instruction) -> Registers:
    return _scalars(inst.operands[2:3]) if inst.name.startswith(("v_readlane", "v_writelane")) else frozenset()


def _scalars_of_memory(inst: Instruction) -> Registers:
    return _scalars(inst.operands) if inst.name.startswith(_MEMORY) else frozenset()


def _vectors_written(inst: Instruction) -> Registers:
    return registers(written_operands(inst)) if _is_vector(inst) else frozenset()


def _vectors_read(inst: Instruction) -> Registers:
    return registers(read_operands(inst)) if _is_vector(inst) else frozenset()


def _moves_bits(inst: Instruction) -> bool:
    """Whether SDWA or OP_SEL puts the result where it usually is not."""
    if inst.modifiers.get("dst_sel", "DWORD") not in ("DWORD", "WORD_0", "BYTE_0"):
        return True
    if "op_sel" not in inst.modifiers or inst.name.startswith(("v_pk_", "v_mfma", "v_dot", "v_fma_mix")):
        return False
    selects = inst.bits("op_sel", 4, 0)
    return any(
        selects[2:] if inst.name.startswith(("v_cvt_sr", "v_cvt_scalef32")) else selects[len(inst.operands) - 1 :]
    )


def _only(pick: Pick, condition: Callable[[Instruction], bool]) -> Pick:
    return lambda inst: pick(inst) if condition(inst) else frozenset()


def _named(*prefixes: str) -> Callable[[Instruction], bool]:
    return lambda inst: inst.name.startswith(prefixes)


def _fixed(condition: Callable[[Instruction], bool], *numbers: int) -> Pick:
    """These registers, of the instructions for which ``condition`` holds."""
    return lambda inst: frozenset(numbers) if condition(inst) else frozenset()


def _stored(inst: Instruction) -> Registers:
    """Data of wide stores; a buffer store that takes an SGPR as its offset needs no wait."""
    if not (inst.name.startswith(_MEMORY) and inst.name.endswith(_WIDE_STORES)) or "_load_" in inst.name:
        return frozenset()
    if inst.name.startswith("buffer_"):
        by_register = any(operand.where is Where.SCALAR and operand.count == 1 for operand in inst.operands[2:])
        return frozenset() if by_register else registers(inst.operands[:1])
    return registers(inst.operands[1:2])


def _sets_m0(inst: Instruction) -> Registers:
    return _scalars(inst.operands[:1]) & {M0} if inst.name.startswith("s_") else frozenset()


@dataclass(frozen=True)
class Rule:
    """A row of the table: registers that the first instruction writes (or reads), and the second uses too early."""

    first: Pick
    second: Pick
    needed: int
    what: str


_DPP = lambda inst: inst.encoding.endswith("dpp")  # noqa: E731
RULES = (
    Rule(_scalars_written, _lane_select, 4, "selects a lane by"),
    Rule(_only(_scalars_written, lambda i: VCC in _scalars_written(i)), _fixed(_named("v_div_fmas"), VCC), 4, "reads"),
    Rule(_scalars_written, _scalars_of_memory, 5, "reads"),
    Rule(_scalars_written, _constants, 2, "reads"),
    Rule(_fixed(_named("v_cmpx"), EXEC), _fixed(_named(*_LANE, "v_permlane"), EXEC), 4, "depends on EXEC of"),
    Rule(_fixed(_named("v_cmpx"), EXEC), _fixed(_DPP, EXEC), 5, "depends on EXEC of"),
    Rule(_vectors_written, _only(_vectors_read, _DPP), 2, "reads through DPP"),
    Rule(_vectors_written, _only(_vectors_read, _named("v_permlane")), 2, "exchanges"),
    Rule(_vectors_written, _only(_vectors_read, _named("v_readlane", "v_readfirstlane")), 1, "reads a lane of"),
    Rule(_only(_vectors_written, _moves_bits), _vectors_read, 1, "reads"),
    Rule(_only(_vectors_written, _named(*_TRANSCENDENTAL)),
         _only(_vectors_read, lambda i: not i.name.startswith(_TRANSCENDENTAL)), 1, "reads"),
    Rule(_stored, _vectors_written, 2, "overwrites the stored data of"),
    Rule(_sets_m0, _fixed(lambda i: i.flag("lds") or "_lds_" in i.name, M0), 1, "reads M0 of"),
    Rule(_fixed(lambda i: i.name.startswith("s_setreg") and accesses_mode(i), 0), _fixed(accesses_mode, 0), 2,
         "accesses the register of"),
)  # fmt: skip


def check_wait_states(kernel: Kernel) -> Iterator[tuple[Instruction, str]]:
    """The instructions that come too early, with what is wrong."""
    for index, producer in enumerate(kernel.instructions):
        rules = [(rule, written) for rule in RULES if (written := rule.first(producer))]
        if not rules:
            continue
        for inst, waited in following(kernel, index, max(rule.needed for rule, _ in rules)):
            for rule, written in rules:
                if waited < rule.needed and written & rule.second(inst):
                    place = f"`{producer.text}` (line {producer.line})"
                    yield inst, f"{rule.what} {place} after {waited} wait states, but {rule.needed} are needed"
