"""Assembly text -> a decoded kernel: instructions bound to their handlers, labels, descriptor fields."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tilewright.runtime.emulator.amd.errors import DecodeError
from tilewright.runtime.emulator.amd.operands import Operand, Where, parse_operand
from tilewright.runtime.emulator.amd.registry import TABLE, Handler

_SUFFIX = re.compile(r"_(e64_dpp|e32|e64|dpp|sdwa)$")
_LABEL = re.compile(r"^([.\w$]+):")
_LOCATION = re.compile(r"^\.loc\s+(\d+)\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', re.MULTILINE)
_COMMENT = re.compile(r";.*$|//.*$|/\*.*?\*/")
#: a comma that separates operands: not within [], () or a quoted string
_COMMA = re.compile(r",(?![^\[]*\])(?![^(]*\))")
_MODIFIER = re.compile(r"^[a-z_0-9]+:")
_FLAGS = frozenset(
    "offen idxen lds gds glc slc dlc sc0 sc1 nt tfe lwe clamp high unorm addr64 row_mirror row_half_mirror".split()
)
#: instructions whose operands are not values but settings
_UNPARSED = frozenset(
    "s_waitcnt s_getreg_b32 s_setreg_b32 s_setreg_imm32_b32 s_sendmsg s_waitcnt_depctr s_sethalt s_trap".split()
)


@dataclass(eq=False)
class Instruction:
    """One decoded instruction. ``name`` has no encoding suffix; ``target`` is a branch's destination.

    ``source`` is the place in the tile program, "file:line:column", where the text has line tables.
    """

    name: str
    encoding: str
    operands: tuple[Operand, ...]
    modifiers: dict[str, str]
    text: str
    line: int
    target: int = -1
    handler: Handler | None = None
    ends_run: bool = False
    settings: str = ""
    source: str = ""
    #: of a backward branch: whether its loop polls memory; None until somebody asks
    polls: bool | None = None
    #: of a load: whether it only guesses what a compare-and-swap will find
    guess: bool = False

    def flag(self, name: str) -> bool:
        """Whether a modifier without a value is there, such as ``offen``."""
        return name in self.modifiers

    def number(self, name: str, default: int = 0) -> int:
        """The integer value of a modifier, such as ``offset:16``."""
        text = self.modifiers.get(name)
        return default if not text else int(text, 0)

    def bits(self, name: str, count: int, default: int) -> list[int]:
        """The list value of a modifier, such as ``op_sel:[0,1,0]``, padded with ``default``."""
        text = self.modifiers.get(name)
        values = [int(part) for part in text.strip("[]").split(",")] if text else []
        return (values + [default] * count)[:count]


@dataclass
class Kernel:
    """A decoded kernel. ``fields`` are the ``.amdhsa_*`` directives (LLVM AMDGPU usage, kernel descriptor)."""

    name: str
    arch: str
    instructions: list[Instruction]
    fields: dict[str, int]
    labels: dict[str, int] = field(default_factory=dict)

    def get(self, name: str, default: int = 0) -> int:
        """A descriptor field without its ``.amdhsa_`` prefix."""
        return self.fields.get(name, default)

    @property
    def vector_registers(self) -> int:
        """Size of the unified vector register file of a wave (granules of 8)."""
        return min(512, -(-max(self.get("next_free_vgpr", 512), 1) // 8) * 8)


def decode_kernel(text: str, name: str, arch: str) -> Kernel:
    """Decode kernel ``name``. Raises DecodeError, naming *every* line that it cannot execute on ``arch``."""
    fields = _descriptor_fields(text, name)
    accum_offset = fields.get("accum_offset", 256)
    kernel = Kernel(name, arch, [], fields)
    problems: list[str] = []
    files, source = _files(text), ""
    for number, body in _function_lines(text, name):
        while match := _LABEL.match(body):
            kernel.labels[match[1]] = len(kernel.instructions)
            body = body[match.end() :].strip()
        if location := _LOCATION.match(body):
            file, line, column = (int(part) for part in location.groups())
            # line 0 is code of no particular line
            source = f"{files.get(file, f'file {file}')}:{line}:{column}" if line else source
        if not body or body.startswith("."):
            continue
        decoded = _decode_line(body, number, accum_offset, arch)
        if isinstance(decoded, str):
            problems.append(decoded)
        else:
            decoded.source = source
            kernel.instructions.append(decoded)
    for inst in kernel.instructions:
        problems += _resolve(inst, kernel)
    if not kernel.instructions and not problems:
        problems.append(f"kernel {name} has no instructions")
    _mark_guesses(kernel.instructions)
    if problems:
        raise DecodeError(f"cannot execute kernel {name} on {arch}:\n  " + "\n  ".join(problems))
    return kernel


def _mark_guesses(code: list[Instruction]) -> None:
    """Find the loads whose value nothing trusts, as a compare-and-swap at the same place follows.

    LLVM starts the loop of an atomic operation that the hardware lacks with a plain load.
    """
    loads: dict[tuple[str, ...], Instruction] = {}
    for inst in code:
        scope = [inst.modifiers.get("offset", "")]
        kind = inst.name.partition("_")[0]
        texts = [operand.text for operand in inst.operands]
        if re.match(r"^(global|flat|buffer)_load_dword(x2)?$", inst.name):
            loads[kind, *texts[1:], *scope] = inst
        elif "_atomic_cmpswap" in inst.name:
            place = texts[1:] if kind == "buffer" or "sc0" in inst.modifiers else texts
            if kind != "buffer":
                place = [place[0], *place[2:]]
            if load := loads.get((kind, *place, *scope)):
                load.guess = True


def _files(text: str) -> dict[int, str]:
    """The source files by their numbers in line tables."""
    return {int(number): f"{first}/{name}" if name else first for number, first, name in _FILE.findall(text)}


def _function_lines(text: str, name: str) -> list[tuple[int, str]]:
    """The numbered, comment-free lines from the kernel's label to its end."""
    lines: list[tuple[int, str]] = []
    inside = False
    for number, raw in enumerate(text.splitlines(), 1):
        body = _COMMENT.sub("", raw).strip()
        if not inside:
            if body.startswith((f"{name}:", f'"{name}":')):
                inside = True
            continue
        if re.match(r"^(\.section|\.size|\.amdhsa_kernel|\.Lfunc_end)", body):
            break
        lines.append((number, body))
    if not inside:
        raise DecodeError(f"the assembly text has no kernel {name}")
    return lines


def _descriptor_fields(text: str, name: str) -> dict[str, int]:
    """The integer ``.amdhsa_*`` directives of the kernel, without the prefix."""
    match = re.search(rf"\.amdhsa_kernel\s+\"?{re.escape(name)}\"?\s*\n(.*?)\.end_amdhsa_kernel", text, re.DOTALL)
    if match is None:
        raise DecodeError(f"the assembly text has no kernel descriptor (.amdhsa_kernel) for {name}")
    pairs = re.findall(r"\.amdhsa_(\w+)\s+(-?\w+)\s*(?:;.*)?$", match[1], re.MULTILINE)
    return {key: int(value, 0) for key, value in pairs if re.match(r"^-?(0x[0-9a-fA-F]+|\d+)$", value)}


def split_operands(text: str) -> tuple[list[str], dict[str, str]]:
    """Split the text after a mnemonic into operand texts and modifiers."""
    operands: list[str] = []
    modifiers: dict[str, str] = {}
    for piece in _COMMA.split(text):
        words = re.sub(r"\s*(:)\s*", r"\1", piece).split()
        for position, word in enumerate(words):
            if word in _FLAGS or _MODIFIER.match(word):
                key, _, value = word.partition(":")
                modifiers[key] = value
            elif position == 0:
                operands.append(word)
            else:
                operands[-1] += " " + word
    return operands, modifiers


def _decode_line(body: str, number: int, accum_offset: int, arch: str) -> Instruction | str:
    mnemonic, _, rest = body.partition(" ")
    if "\t" in mnemonic:
        mnemonic, _, rest = body.partition("\t")
    suffix = _SUFFIX.search(mnemonic)
    name = mnemonic[: suffix.start()] if suffix else mnemonic
    encoding = suffix[1] if suffix else ""
    entry = TABLE.get(name)
    if entry is None:
        return f"line {number}: unknown instruction {mnemonic}: {body}"
    if arch not in entry.archs:
        return f"line {number}: {mnemonic} does not exist on {arch}: {body}"
    inst = Instruction(name, encoding, (), {}, body, number, handler=entry.handler, ends_run=entry.ends_run)
    if name in _UNPARSED:
        inst.settings = rest.strip()
        first = rest.split(",")[0].strip()
        operand = parse_operand(first, accum_offset) if re.match(r"^s\d+$", first) else None
        inst.operands = (operand,) if operand else ()
        return inst
    texts, inst.modifiers = split_operands(rest.strip())
    operands = []
    for piece in texts:
        operand = parse_operand(piece, accum_offset)
        if operand is None:
            return f"line {number}: cannot parse operand {piece!r}: {body}"
        operands.append(operand)
    inst.operands = tuple(operands)
    return inst


def _resolve(inst: Instruction, kernel: Kernel) -> list[str]:
    """Resolve labels, check the register numbers, and wrap the handler of DPP and SDWA encodings."""
    from tilewright.runtime.emulator.amd.lanes import wrap_dpp, wrap_sdwa

    problems = []
    limit = kernel.vector_registers
    for operand in inst.operands:
        if operand.where is Where.LABEL:
            target = kernel.labels.get(operand.text)
            if target is None:
                problems.append(f"line {inst.line}: unknown symbol {operand.text}: {inst.text}")
            else:
                inst.target = target
        elif operand.where is Where.VECTOR and operand.index + operand.count > limit:
            problems.append(f"line {inst.line}: register beyond the {limit} allocated: {inst.text}")
    if inst.encoding.endswith("dpp"):
        problem = wrap_dpp(inst)
    elif inst.encoding == "sdwa":
        problem = wrap_sdwa(inst)
    else:
        problem = None
    if problem:
        problems.append(f"line {inst.line}: {problem}: {inst.text}")
    return problems
