"""The matrix instructions of AMD's CDNA (MFMA), and which of them compute a dot.

AMD CDNA3 and CDNA4 ISA guides, "Matrix Arithmetic Instructions". All are M x M x K with M 32 or 16. A lane holds
``width`` elements of one row of A and of one column of B; the instruction's K is ``width * 64 / M``.

As the order of K is free as long as A and B agree on it, a lane may hold more consecutive k than one instruction
takes: it then reads 16 bytes of an operand at once and spends them on several instructions (`MfmaProduct.steps`).
"""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.ir.target import Target
from tilewright.ir.types import DType, bf16, f8e4m3, f8e5m2, f16, f32, f64, i8, i32

#: bytes of an operand that a lane should read at once
READ_BYTES = 16
#: consecutive rows (or columns) of an accumulator that a lane holds; f64 has none
ACCUMULATOR_RUN = 4


@dataclass(frozen=True)
class MfmaProduct:
    """One step along K of a dot: ``steps`` instructions on ``width`` elements of each operand in a lane.

    ``kind`` names the operands of the instruction: f16, bf16, f32, xf32, f64, i8, fp8 or f8f6f4. ``run`` of the
    elements are consecutive along K; the runs of a lane lie as far apart as the runs of all lanes together are long.
    """

    kind: str
    m: int
    width: int
    steps: int
    run: int

    @property
    def k(self) -> int:
        """K of the whole step."""
        return self.width * 64 // self.m

    @property
    def instruction_k(self) -> int:
        """K of one instruction."""
        return self.k // self.steps

    @property
    def mnk(self) -> tuple[int, int, int]:
        return self.m, self.m, self.k

    @property
    def accumulators(self) -> int:
        """Elements of the accumulator in each lane."""
        return self.m * self.m // 64


@dataclass(frozen=True)
class _Instruction:
    m: int
    width: int
    feature: str = "mfma"


#: longest K first
_INSTRUCTIONS: dict[str, tuple[_Instruction, ...]] = {
    "f16": tuple(_Instruction(m, w, f) for w, f in ((8, "mfma_long"), (4, "mfma")) for m in (32, 16)),
    "bf16": tuple(_Instruction(m, w, f) for w, f in ((8, "mfma_long"), (4, "mfma")) for m in (32, 16)),
    "i8": tuple(_Instruction(m, w, f) for w, f in ((16, "mfma_long"), (8, "mfma")) for m in (32, 16)),
    "f32": (_Instruction(32, 1), _Instruction(16, 1)),
    "xf32": (_Instruction(32, 2, "mfma_xf32"), _Instruction(16, 2, "mfma_xf32")),
    "f64": (_Instruction(16, 1),),
    # Not the 32 x 32 x 64 one: its result may be read after 20 wait states on gfx950, and LLVM 22 looks back 19.
    "fp8": (_Instruction(16, 8, "fp8_ocp"),),
    "f8f6f4": (_Instruction(16, 32, "fp8_ocp"),),
}
#: operands -> what the instruction takes, best first. f16 holds all numbers of both 8-bit formats, for targets whose
#: own 8-bit formats are not OCP's (CDNA3's FNUZ has another bias and another NaN).
_KINDS: dict[DType, tuple[str, ...]] = {
    f16: ("f16",),
    bf16: ("bf16",),
    f32: ("f32",),
    f64: ("f64",),
    i8: ("i8",),
    f8e4m3: ("f8f6f4", "fp8", "f16"),
    f8e5m2: ("f8f6f4", "fp8", "f16"),
}
#: precisions of float32 dots that allow operands of 10 bits
_ROUNDING = ("tf32",)


def accumulator_dtype(operand: DType) -> DType | None:
    """What dots of these operands accumulate in; None where there is no instruction."""
    if operand not in _KINDS:
        return None
    return {i8: i32, f64: f64}.get(operand, f32)


def tile_sizes(target: Target, operand: DType) -> tuple[int, ...]:
    """Rows (and columns) of the target's best instructions for ``operand``, largest first."""
    for kind in _KINDS[operand]:
        sizes = {i.m for i in _INSTRUCTIONS[kind] if target.has(i.feature)}
        if sizes:
            return tuple(sorted(sizes, reverse=True))
    return ()


def mfma_products(target: Target, operand: DType, precision: str, m: int, run: int | None = None) -> list[MfmaProduct]:
    """What computes dots of ``operand`` in tiles of ``m``, best first. ``run``: bound on consecutive k of a lane."""
    kinds = _KINDS.get(operand, ())
    if operand == f32 and precision in _ROUNDING and target.has("mfma_xf32"):
        kinds = ("xf32",)
    found = []
    for kind in kinds:
        for instruction in _INSTRUCTIONS[kind]:
            if instruction.m == m and target.has(instruction.feature):
                found += _widths(kind, instruction, operand, run)
    return found


def _widths(kind: str, instruction: _Instruction, operand: DType, run: int | None) -> list[MfmaProduct]:
    steps = max(1, READ_BYTES // operand.bytes // instruction.width)
    products = []
    while steps:
        width = steps * instruction.width
        products.append(MfmaProduct(kind, instruction.m, width, steps, min(width, run or width)))
        steps //= 2
    return products


def least_k(target: Target, operand: DType, m: int) -> int:
    """What K must be a multiple of."""
    return min(product.k for product in mfma_products(target, operand, "default", m))
