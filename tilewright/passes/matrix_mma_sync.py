"""mma.sync, the matrix unit that every NVIDIA GPU since Ampere has: operands and accumulators in registers.

PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions": m16n8k16 (f16, bf16), m16n8k32 (s8, e4m3, e5m2),
m16n8k8 (tf32) and the f64 shapes. All of them have one accumulator fragment, 16 x 8. Where `ldmatrix` can read an
operand (``backends/nvidia/mma_sync.py``), rows of 16 bytes in a byte-swizzled slot meet no bank twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.ir.async_ops import AsyncDot
from tilewright.ir.core import IRError
from tilewright.ir.layout import (
    LinearLayout,
    SharedLayout,
    mma_sync_accumulator,
    mma_sync_operand_a,
    mma_sync_operand_b,
    shared_candidates,
)
from tilewright.ir.layout_shared import Access
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Dot
from tilewright.ir.types import DType, bf16, f8e4m3, f8e5m2, f16, f32, f64, i8, i32
from tilewright.passes.copy_layouts import copied_layout, copy_layouts, engine_layout
from tilewright.passes.matrix import MatrixUnit, operand_dtype, operand_shape, result_type
from tilewright.passes.matrix_fma import Fma
from tilewright.passes.warp_grid import warp_grid

#: rows and columns of one instruction
TILE = (16, 8)
MOST_WARPS = 8
#: 32-bit accumulators per thread that leave room for operands and copies in flight, of 16-bit elements and others
MOST_ACCUMULATORS, MOST_OTHERS = 128, 64
#: precisions of float32 dots that the matrix unit computes
TF32_PRECISIONS = ("tf32", "3xtf32")


@dataclass(frozen=True)
class Kind:
    """One family of instructions: what it accumulates in, the K of its fragments, the feature that it needs."""

    accumulates: DType
    k: int
    feature: str = "mma_sync"


KINDS: dict[DType, Kind] = {
    f16: Kind(f32, 16),
    bf16: Kind(f32, 16),
    f32: Kind(f32, 8),
    f64: Kind(f64, 8),
    i8: Kind(i32, 32),
    f8e4m3: Kind(f32, 32, "mma_fp8"),
    f8e5m2: Kind(f32, 32, "mma_fp8"),
}


class MmaSync(MatrixUnit):
    """Every dot is a grid of 16 x 8 tiles, dealt to the warps in turn (`mma_sync_accumulator`)."""

    reads_slots = False
    asynchronous = False

    def __init__(self, target: Target, whole_rows: bool = False, by_roles: bool = False):
        super().__init__(target)
        self.whole_rows, self.by_roles = whole_rows, by_roles

    def check(self, dot: Dot) -> None:
        (m, k), n = operand_shape(dot, "a"), operand_shape(dot, "b")[1]
        dtype, name = operand_dtype(dot), self.target.name
        kind = KINDS.get(dtype)
        if kind is None:
            hint = "convert the operands, for example to int8, float16 or float32"
            raise IRError(f"{name} has no dot of {dtype}", dot.loc, hint)
        if not self.target.has(kind.feature):
            raise IRError(f"{name} has no dot of {dtype}", dot.loc, "convert the operands to bfloat16 or float16")
        if result_type(dot).dtype != kind.accumulates:
            raise IRError(
                f"dot of {dtype} accumulates in {kind.accumulates}, not in {result_type(dot).dtype}",
                dot.loc,
                f"make the accumulator with tw.zeros(shape, tw.{_LONG_NAMES[kind.accumulates]})",
            )
        if m % TILE[0] or n % TILE[1] or k % kind.k:
            raise IRError(
                f"dot of ({m}, {k}) @ ({k}, {n}) in {dtype} does not fit {name}",
                dot.loc,
                f"M must be a multiple of {TILE[0]}, N of {TILE[1]} and K of {kind.k}: load a larger tile, "
                "parts outside the tensor read as 0",
            )

    def warps(self, dots: Sequence[Dot]) -> int:
        """Four; eight where the accumulators of four would fill the registers; fewer where tiles are fewer.

        Roles get eight, so that two warps take turns on each matrix unit: one reads operands, the other computes.
        """
        most = MOST_ACCUMULATORS if all(operand_dtype(dot).bits == 16 for dot in dots) else MOST_OTHERS
        words = max(result_type(dot).size * result_type(dot).dtype.bits // 32 for dot in dots)
        tiles = max(result_type(dot).size for dot in dots) // (TILE[0] * TILE[1])
        warps = MOST_WARPS if self.by_roles else 4
        while warps < MOST_WARPS and words > warps * self.target.warp_size * most:
            warps *= 2
        while warps > 1 and tiles < warps:
            warps //= 2
        return warps

    def grid(self, shape: tuple[int, ...], warps: int) -> tuple[int, int]:
        """Warps along M and N."""
        return warp_grid(shape, TILE, warps, self.whole_rows)

    def accumulator(self, shape: tuple[int, ...], warps: int) -> LinearLayout:
        return mma_sync_accumulator(shape, self.grid(shape, warps))

    def operand(self, which: str, dot: Dot | AsyncDot, warps: int) -> LinearLayout:
        make = mma_sync_operand_a if which == "a" else mma_sync_operand_b
        return make(operand_shape(dot, which), operand_dtype(dot).bits, self.grid(result_type(dot).shape, warps))

    def shared(self, which: str, dot: Dot, contiguous: int | None, warps: int) -> SharedLayout | None:
        """The direction of global memory, so that nothing is turned; K fastest for bytes, whose fragments run along it.

        `ldmatrix` reads both directions of 16-bit elements, and wider or narrower ones where K is fastest.
        """
        shape, bits = operand_shape(dot, which), operand_dtype(dot).bits
        depth = 1 if which == "a" else 0
        fastest = depth if contiguous is None or bits == 8 else contiguous
        order = (fastest, 1 - fastest)
        if bits == 16 or (fastest == depth and bits < 64):
            return shared_candidates(shape, bits, order, self.target.banks)[0]
        reader = self.reader(which, dot, contiguous, warps)
        if self.by_roles:
            return engine_layout(shape, bits, order, reader, self.target.banks)
        copies = copy_layouts(shape, bits, contiguous, fastest, warps, self.target.warp_size)
        return copied_layout(shape, bits, order, reader, copies.store, self.target.banks)


_LONG_NAMES = {f32: "float32", f64: "float64", i32: "int32"}


class SynchronousUnits(MatrixUnit):
    """The units with operands in registers, by what each dot asks for: `MmaSync`, and `Fma` for exact float32."""

    reads_slots = False
    asynchronous = False

    def __init__(self, target: Target, whole_rows: bool = False, by_roles: bool = False):
        super().__init__(target)
        self.matrix = MmaSync(target, whole_rows, by_roles)
        self.vector = Fma(target, whole_rows, by_roles)

    def of(self, dot: Dot | AsyncDot) -> MmaSync | Fma:
        """The unit that computes a dot."""
        exact = isinstance(dot, Dot) and dot.precision not in TF32_PRECISIONS
        return self.vector if operand_dtype(dot) == f32 and exact else self.matrix

    def check(self, dot: Dot) -> None:
        self.of(dot).check(dot)

    def warps(self, dots: Sequence[Dot]) -> int:
        """As many as the most demanding dot wants, or the most below over which every dot can be spread."""
        wanted = max(self.of(dot).warps([dot]) for dot in dots)
        while wanted > 1 and not all(self._spreads(dot, wanted) for dot in dots):
            wanted //= 2
        return wanted

    def _spreads(self, dot: Dot, warps: int) -> bool:
        try:
            self.of(dot).grid(result_type(dot).shape, warps)
        except IRError:
            return False
        return True

    def accumulator(self, shape: tuple[int, ...], warps: int) -> LinearLayout:
        return self.matrix.accumulator(shape, warps)

    def result(self, dot: Dot | AsyncDot, warps: int) -> LinearLayout:
        return self.of(dot).result(dot, warps)

    def operand(self, which: str, dot: Dot | AsyncDot, warps: int) -> LinearLayout:
        return self.of(dot).operand(which, dot, warps)

    def reader(self, which: str, dot: Dot, contiguous: int | None, warps: int) -> Access:
        return self.of(dot).reader(which, dot, contiguous, warps)

    def shared(self, which: str, dot: Dot, contiguous: int | None, warps: int) -> SharedLayout | None:
        return self.of(dot).shared(which, dot, contiguous, warps)
