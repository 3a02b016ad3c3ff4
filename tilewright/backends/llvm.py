"""LLVM IR text to optimised module to assembly text or object file, through llvmlite.

Three things here are easy to get wrong, and were:

- Side-effecting inline assembly must be ``convergent`` or LLVM may duplicate a barrier into both
  sides of a branch, and the kernel hangs. MLIR cannot say it, so ``mark_convergent`` edits the text.
- Emitting code changes the module, and a second emission then dies: every emission clones.
- LLVM reports many failures of code generation by ending the process. Nothing here can catch that;
  the compiler driver runs this module in a worker process.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding as binding

from tilewright.backends.errors import BackendError


@dataclass(frozen=True)
class TargetMachineSpec:
    """What LLVM generates code for: ``("nvptx64-nvidia-cuda", "sm_90a", "+ptx80")``."""

    triple: str
    cpu: str
    features: str = ""


@dataclass(frozen=True)
class OptimizedModule:
    """An optimised LLVM module and the machine it was optimised for."""

    spec: TargetMachineSpec
    module: Any
    machine: Any

    def text(self) -> str:
        """The LLVM IR, for dumps."""
        return str(self.module)


# --- convergence ----------------------------------------------------------------------------

#: The head of a call of side-effecting inline assembly up to its argument list. The two strings
#: cannot contain a quote: LLVM prints one as \22.
_ASM_CALL = re.compile(r'^\s*(?:%\S+ = )?(?:tail |musttail |notail )?call .*?\basm sideeffect [^"]*"[^"]*", "[^"]*"\(')
_ATTRIBUTE_GROUP = re.compile(r"^attributes #(\d+) = \{(.*)\}")
_CONVERGENT = "convergent nounwind"


def _end_of_arguments(line: str, start: int) -> int:
    """The position after the parenthesis that closes the argument list opened before ``start``."""
    depth, quoted = 1, False
    for position in range(start, len(line)):
        character = line[position]
        if character == '"':
            quoted = not quoted
        elif not quoted and character in "()":
            depth += 1 if character == "(" else -1
            if depth == 0:
                return position + 1
    raise BackendError("llvm", "cannot find the end of an inline assembly call", [line.strip()])


def _attribute_groups(lines: list[str]) -> dict[int, str]:
    matches = (_ATTRIBUTE_GROUP.match(line) for line in lines if line.startswith("attributes"))
    return {int(m[1]): m[2] for m in matches if m}


def _call_attributes(line: str, end: int, groups: dict[int, str]) -> str:
    """The attributes of a call, groups spelled out; metadata after the first comma left off."""
    attributes = line[end:].split(",")[0]
    return re.sub(r"#(\d+)", lambda m: groups.get(int(m[1]), ""), attributes)


def _asm_calls(lines: list[str]) -> list[tuple[int, int]]:
    """(line number, position after the arguments) of every call of side-effecting inline assembly."""
    return [
        (number, _end_of_arguments(line, match.end()))
        for number, line in enumerate(lines)
        if "asm sideeffect" in line and (match := _ASM_CALL.match(line))
    ]


def mark_convergent(ir_text: str) -> str:
    """Make every call of side-effecting inline assembly ``convergent nounwind``."""
    lines = ir_text.splitlines()
    groups = _attribute_groups(lines)
    group = max(groups, default=-1) + 1
    marked = False
    for number, end in _asm_calls(lines):
        if not re.search(r"\bconvergent\b", _call_attributes(lines[number], end, groups)):
            lines[number] = f"{lines[number][:end]} #{group}{lines[number][end:]}"
            marked = True
    if marked:
        lines.append(f"attributes #{group} = {{ {_CONVERGENT} }}")
    return "\n".join(lines) + "\n"


def unmarked_calls(ir_text: str) -> list[str]:
    """The lines that call side-effecting inline assembly without ``convergent``.

    Counts every line that mentions such a call, also one that ``mark_convergent`` cannot parse.
    """
    lines = ir_text.splitlines()
    groups, ends = _attribute_groups(lines), dict(_asm_calls(lines))
    mentions = [n for n, line in enumerate(lines) if "asm sideeffect" in line and re.search(r"\bcall\b", line)]
    return [
        lines[n].strip()
        for n in mentions
        if n not in ends or not re.search(r"\bconvergent\b", _call_attributes(lines[n], ends[n], groups))
    ]


def check_convergent(ir_text: str) -> None:
    """Raise unless every call of side-effecting inline assembly is convergent."""
    if unmarked := unmarked_calls(ir_text):
        raise BackendError("llvm", f"{len(unmarked)} inline assembly calls are not convergent", unmarked)


# --- optimisation and emission --------------------------------------------------------------


@cache
def _initialize_targets() -> None:
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()


def _target_machine(spec: TargetMachineSpec, level: int) -> Any:
    _initialize_targets()
    try:
        target = binding.Target.from_triple(spec.triple)
        # AMDGPU code objects are shared objects, hence pic; NVPTX ignores both.
        return target.create_target_machine(
            cpu=spec.cpu, features=spec.features, opt=level, reloc="pic", codemodel="small"
        )
    except RuntimeError as error:
        raise BackendError("llvm", f"no target machine for {spec}", [str(error)]) from error


def _with_target(ir_text: str, triple: str, layout: str) -> str:
    """The text with this triple and data layout.

    They must be there before parsing: the parser fills in omitted alignments from the layout.
    """
    lines = [line for line in ir_text.splitlines() if not re.match(r"target (triple|datalayout) =", line)]
    return "\n".join([f'target datalayout = "{layout}"', f'target triple = "{triple}"', *lines]) + "\n"


def _parse(ir_text: str) -> Any:
    # In the global context: a context of its own may be collected before its module, which crashes.
    try:
        module = binding.parse_assembly(ir_text)
        module.verify()
    except RuntimeError as error:
        raise BackendError("llvm", "the LLVM IR is not valid", [str(error).strip()]) from error
    return module


def optimize(ir_text: str, spec: TargetMachineSpec, level: int = 3, unroll: bool = True) -> OptimizedModule:
    """Mark inline assembly convergent, optimise at ``level`` (0 to 3), and check that it still is.

    Vectorisation is off: the tile compiler has chosen every vector access, and what LLVM would
    merge costs registers. ``unroll`` False leaves loops alone that do not ask for unrolling.
    """
    machine = _target_machine(spec, level)
    text = _with_target(mark_convergent(ir_text), spec.triple, str(machine.target_data))
    check_convergent(text)
    module = _parse(text)
    options = binding.create_pipeline_tuning_options(speed_level=level)
    options.loop_vectorization = options.slp_vectorization = options.loop_interleaving = False
    options.loop_unrolling = unroll
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    check_convergent(str(module))
    return OptimizedModule(spec, module, machine)


def merge(modules: Sequence[OptimizedModule]) -> OptimizedModule:
    """One module with the functions of all, which stay as they are optimised."""
    first, *others = modules
    if not others:
        return first
    merged = first.module.clone()
    for other in others:
        merged.link_in(other.module.clone())
    return OptimizedModule(first.spec, merged, first.machine)


def emit_assembly(optimized: OptimizedModule) -> str:
    """PTX or AMDGCN assembly text."""
    return optimized.machine.emit_assembly(optimized.module.clone())


#: A call of inline assembly whose text is not empty.
_ASM_TEXT = re.compile(r'\bcall\b.*?\basm [^"]*"[^"]+", "')


def emit_object(optimized: OptimizedModule) -> bytes:
    """A relocatable object file, for AMD.

    Raises BackendError for NVPTX, which has none, and for inline assembly other than the empty
    string: llvmlite has no AMDGPU assembly parser, and LLVM would end the process.
    """
    if optimized.spec.triple.startswith("nvptx"):
        raise BackendError("llvm", "NVPTX has no object format; assemble its PTX with ptxas")
    if calls := [line.strip() for line in optimized.text().splitlines() if _ASM_TEXT.search(line)]:
        raise BackendError("llvm", "inline assembly cannot become an object file; use an intrinsic", calls)
    return optimized.machine.emit_object(optimized.module.clone())
