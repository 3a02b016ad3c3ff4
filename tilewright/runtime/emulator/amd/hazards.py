"""Wait states that software must leave around matrix instructions, checked on the text of a kernel.

The hardware does not interlock most uses of a matrix instruction's result: whoever comes too early
reads the old value, or has its own overwritten (CDNA3 ISA chapter 4, "Manually Inserted Wait States";
the same section for CDNA4; LLVM's GCNHazardRecognizer inserts s_nop for them). The number of wait
states depends on the passes of four cycles that the instruction takes. The check is static: from
each matrix instruction, and each vector instruction that feeds one, along all paths for as many
instructions as a hazard can reach. Those between other instructions are in `wait_states`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from tilewright.runtime.emulator.amd.decode import Instruction, Kernel
from tilewright.runtime.emulator.amd.mfma import parse_shape
from tilewright.runtime.emulator.amd.operands import Operand, Where

_FURTHEST = 20
_VALU_BEFORE_MATRIX = 2
_SPARSE = "v_smfmac"
_MEMORY = ("ds_", "buffer_", "global_", "flat_", "scratch_")
_STORES = ("_store_", "ds_write")
#: vector instructions that read their destination
_ACCUMULATING = ("v_fmac", "v_mac_", "v_pk_fmac", "v_dot2c", "v_dot4c", "v_dot8c", "v_swap", "v_permlane")


@dataclass(frozen=True)
class Timing:
    """Passes of a matrix instruction, and the unit: "xdl", "f32" (the f32 path) or "f64"."""

    passes: int
    unit: str

    def result_read(self, arch: str, *, memory: bool) -> int:
        """Wait states before a vector or memory instruction, or a source A or B, may read the result."""
        if self.unit == "f64":
            small, large = (9, 18) if memory else (6, 11)
            return small if self.passes == 4 else large + (8 if self.passes == 16 and not memory else 0)
        if self.unit == "f32":
            return self.passes + 2
        return self.passes + 3 + (1 if arch == "gfx950" and self.passes != 2 else 0)

    def accumulate(self, same: bool, next_unit: str) -> int:
        """Wait states before it may be source C; ``same``: of exactly the same registers."""
        if self.unit == "f64":
            small, large = (4, 0) if same else (4, 9)
            return small if self.passes == 4 else large
        if same:
            return 2 if self.passes == 2 else 0
        if self.unit == "f32":
            return 0 if next_unit == "xdl" else self.passes
        return self.passes + 1

    @property
    def addend_overwritten(self) -> int:
        """Wait states before a vector instruction may overwrite source C."""
        return {2: 1, 4: 3, 8: 7}.get(self.passes, 15) if self.unit == "xdl" else 0


@lru_cache(maxsize=256)
def timing(name: str, settings: tuple[int, int], arch: str) -> Timing:
    """Of a matrix instruction by its mnemonic; ``settings`` are CBSZ and BLGP (CDNA3 ISA chapter 7, passes)."""
    if name.startswith(_SPARSE):
        return Timing(8 if "32x32" in name else 4, "xdl")
    tail = name.removeprefix("v_mfma_").removeprefix("scale_")
    if tail.endswith("f8f6f4"):
        slow = min(settings) < 2
        return Timing((8 if slow else 4) * (2 if "32x32" in tail else 1), "xdl")
    shape = parse_shape(tail)
    if shape.result == "f64":
        return Timing(4 if shape.m == 4 else 16 if arch == "gfx950" else 8, "f64")
    unit = "f32" if shape.a == "f32" else "xdl"
    if shape.m == 4:
        return Timing(2, unit)
    deep = shape.blocks == 1 and unit == "xdl"
    return Timing((4 if deep else 8) * (2 if shape.m == 32 else 1), unit)


def check_hazards(kernel: Kernel) -> Iterator[tuple[Instruction, str]]:
    """The instructions that come too early, with what is wrong."""
    for index, inst in enumerate(kernel.instructions):
        if _is_matrix(inst):
            yield from _after_matrix(kernel, index)
        elif inst.name.startswith("v_") and registers(written_operands(inst)):
            yield from _before_matrix(kernel, index)


def _is_matrix(inst: Instruction) -> bool:
    return inst.name.startswith(("v_mfma", _SPARSE))


def _factors(inst: Instruction) -> tuple[Operand, ...]:
    """What is read before the addend: A and B, and the indices of a sparse A."""
    return inst.operands[1:4] if inst.name.startswith(_SPARSE) else inst.operands[1:3]


def _addend(inst: Instruction) -> tuple[Operand, ...]:
    """Source C, which is the destination where A is sparse."""
    return inst.operands[:1] if inst.name.startswith(_SPARSE) else inst.operands[3:4]


def _timing(inst: Instruction, arch: str) -> Timing:
    return timing(_spelling(inst.name), (inst.number("cbsz"), inst.number("blgp")), arch)


@lru_cache(maxsize=256)
def _spelling(name: str) -> str:
    """CDNA3's spelling of a mnemonic: LLVM also prints 16x16x16f16 and 16x16x16bf16_1k."""
    name = name.removesuffix("_1k")
    for types in ("xf32", "bf16", "f16", "f32", "f64", "i8"):
        if name.endswith(types) and name[-len(types) - 1].isdigit():
            return f"{name[: -len(types)]}_{types}"
    return name


def following(kernel: Kernel, index: int, reach: int) -> Iterator[tuple[Instruction, int]]:
    """Instructions behind number ``index`` on any path, with the fewest wait states that lie between."""
    best: dict[int, int] = {}
    todo = [(index + 1, 0)]
    while todo:
        at, waited = todo.pop()
        while waited < reach and at < len(kernel.instructions) and best.get(at, _FURTHEST) > waited:
            best[at] = waited
            inst = kernel.instructions[at]
            waited += inst.operands[0].value + 1 if inst.name == "s_nop" else 1
            if inst.target >= 0:
                todo.append((inst.target, waited))
            if inst.name in ("s_branch", "s_endpgm"):
                break
            at += 1
    for at, waited in best.items():
        yield kernel.instructions[at], waited


def _after_matrix(kernel: Kernel, index: int) -> Iterator[tuple[Instruction, str]]:
    producer = kernel.instructions[index]
    its = _timing(producer, kernel.arch)
    result, addend = registers(producer.operands[:1]), registers(_addend(producer))
    for inst, waited in following(kernel, index, _FURTHEST):
        memory = inst.name.startswith(_MEMORY)
        needed, what = 0, ""
        if _is_matrix(inst):
            if result & registers(_factors(inst)):
                needed, what = its.result_read(kernel.arch, memory=False), "reads the result"
            elif result & (third := registers(_addend(inst))):
                needed = its.accumulate(third == result, _timing(inst, kernel.arch).unit)
                what = "accumulates to the result"
                if waited < needed and _renewed(kernel, index, inst, result & third):
                    continue
        elif memory or inst.name.startswith("v_"):
            if result & registers(read_operands(inst)):
                needed, what = its.result_read(kernel.arch, memory=memory), "reads the result"
            elif result & registers(written_operands(inst)):
                needed, what = its.result_read(kernel.arch, memory=False), "overwrites the result"
            elif addend & registers(written_operands(inst)):
                needed, what = its.addend_overwritten, "overwrites source C"
        if waited < needed:
            text = f"{what} of `{producer.text}` (line {producer.line}) after {waited} wait states"
            yield inst, f"{text}, but {needed} are needed"


def _renewed(kernel: Kernel, index: int, inst: Instruction, shared: frozenset[int]) -> bool:
    """Whether a matrix instruction between the two has written these registers: then its result is accumulated to.

    It is checked on its own, and came in order behind the first. LLVM looks at the last writer alone, too.
    """
    end = next(at for at, other in enumerate(kernel.instructions) if other is inst)
    between = kernel.instructions[index + 1 : end]
    entered = any(index < other.target <= end for other in kernel.instructions)
    if entered or any(other.target >= 0 for other in between):
        return False
    return any(_is_matrix(other) and shared <= registers(written_operands(other)) for other in between)


def _before_matrix(kernel: Kernel, index: int) -> Iterator[tuple[Instruction, str]]:
    producer = kernel.instructions[index]
    result = registers(written_operands(producer))
    for inst, waited in following(kernel, index, _VALU_BEFORE_MATRIX):
        if _is_matrix(inst) and result & (registers(inst.operands[1:]) | registers(_addend(inst))):
            text = f"reads the result of `{producer.text}` (line {producer.line}) after {waited} wait states"
            yield inst, f"{text}, but {_VALU_BEFORE_MATRIX} are needed"


def registers(operands: tuple[Operand, ...]) -> frozenset[int]:
    """The vector registers that operands name."""
    return frozenset(
        operand.index + part for operand in operands if operand.where is Where.VECTOR for part in range(operand.count)
    )


def written_operands(inst: Instruction) -> tuple[Operand, ...]:
    """Operands that name vector registers which the instruction writes."""
    if any(part in inst.name for part in _STORES) or inst.flag("lds"):
        return ()
    if inst.name.startswith("ds_") and not inst.name.startswith(("ds_read", "ds_bpermute", "ds_permute", "ds_swizzle")):
        return inst.operands[:1] if "_rtn_" in inst.name else ()
    if "_atomic_" in inst.name:
        return inst.operands[:1] if inst.flag("sc0") else ()
    if inst.name.startswith(("v_swap", "v_permlane")):
        return inst.operands[:2]
    return inst.operands[:1]


def read_operands(inst: Instruction) -> tuple[Operand, ...]:
    """Operands that may name vector registers which it reads."""
    if not written_operands(inst) or inst.name.startswith(_ACCUMULATING) or "_atomic_" in inst.name:
        return inst.operands
    return inst.operands[1:]
