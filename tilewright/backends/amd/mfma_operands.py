"""Calls of MFMA: a lane's elements of an operand in the form that each instruction takes, and the LLVM intrinsics.

Names and types as in LLVM's IntrinsicsAMDGPU.td.
"""

from __future__ import annotations

from tilewright.backends.lower.context import Lowering
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir.mfma import MfmaProduct
from tilewright.ir.types import DType, f8e5m2

#: selectors of v_perm_b32: bytes 0 and 1, or 2 and 3, of the second source become the upper bytes of two halves
_LOW_HALVES, _HIGH_HALVES = 0x010C000C, 0x030C020C
#: formats of v_mfma_f32_*_f8f6f4
_F8F6F4_CODE = {"f8e4m3": 0, "f8e5m2": 1}
_HARDWARE_NAME = {"f8e4m3": "fp8", "f8e5m2": "bf8"}


def multiply(
    lw: Lowering, product: MfmaProduct, dtypes: tuple[DType, DType], a: mlir.Value, b: mlir.Value, acc: mlir.Value
) -> mlir.Value:
    """``acc + a @ b`` by one instruction; ``dtypes`` of a and b."""
    fb, zero = lw.fb, lw.fb.i32(0)
    if product.kind == "f8f6f4":
        codes = [fb.i32(_F8F6F4_CODE[dtype.name]) for dtype in dtypes]
        scales = [zero, zero, zero, zero]  # of both operands: none
        return fb.intrinsic(intrinsic(product, dtypes), acc.type, [a, b, acc, *codes, *scales])
    # no broadcast of blocks, no permutation of lanes
    return fb.intrinsic(intrinsic(product, dtypes), acc.type, [a, b, acc, zero, zero, zero])


def intrinsic(product: MfmaProduct, dtypes: tuple[DType, DType]) -> str:
    """The LLVM intrinsic: newer ones have a dot before the type, gfx90a's bf16 ones a "1k" behind it."""
    kind, m, k = product.kind, product.m, product.instruction_k
    shape, per_lane = f"{m}x{m}x{k}", product.width // product.steps
    if kind == "f8f6f4":
        return f"llvm.amdgcn.mfma.scale.f32.{shape}.f8f6f4"
    if kind == "fp8":
        names = ".".join(_HARDWARE_NAME[dtype.name] for dtype in dtypes)
        return f"llvm.amdgcn.mfma.f32.{shape}.{names}"
    if kind == "i8":
        return f"llvm.amdgcn.mfma.i32.{shape}.i8"
    if kind == "f64":
        return f"llvm.amdgcn.mfma.f64.{shape}f64"
    if kind == "xf32" or per_lane == 8:
        return f"llvm.amdgcn.mfma.f32.{shape}.{kind}"
    return f"llvm.amdgcn.mfma.f32.{shape}{kind}" + (".1k" if kind == "bf16" else "")


def split_operand(lw: Lowering, vector: mlir.Value, product: MfmaProduct, dtype: DType) -> list[mlir.Value]:
    """One operand for each instruction of the product, from the elements that a lane holds."""
    width = product.width // product.steps
    if dtype.bits == 8:
        return _octets(lw, vector, product, dtype)
    if width == 1:
        return lw.fb.unpack_vector(vector) if product.steps > 1 else [vector]
    parts = _slices(lw, vector, width)
    if product.kind == "bf16" and width == 4:  # gfx90a's instructions take bits
        return [lw.fb.bitcast(part, lw.fb.types.vec(4, lw.fb.types.i16)) for part in parts]
    return parts


def _slices(lw: Lowering, vector: mlir.Value, width: int) -> list[mlir.Value]:
    count = vector.type.shape[0]
    if count == width:
        return [vector]
    return [lw.fb.shuffle(vector, vector, range(first, first + width)) for first in range(0, count, width)]


def _octets(lw: Lowering, vector: mlir.Value, product: MfmaProduct, dtype: DType) -> list[mlir.Value]:
    fb, types = lw.fb, lw.fb.types
    width = product.width // product.steps
    if product.kind == "f16":
        words = fb.unpack_vector(fb.bitcast(vector, types.vec(product.width // 4, types.i32)))
        return [_four_halves(lw, word, dtype) for word in words]
    if width == 8:
        wide = fb.bitcast(vector, types.vec(product.steps, types.i64))
        return fb.unpack_vector(wide)
    return _slices(lw, fb.bitcast(vector, types.vec(product.width // 4, types.i32)), width // 4)


def _four_halves(lw: Lowering, word: mlir.Value, dtype: DType) -> mlir.Value:
    """Four 8-bit floats as f16, which holds all of them."""
    fb, types = lw.fb, lw.fb.types
    convert = _e5m2_pair if dtype == f8e5m2 else _e4m3_pair
    pairs = [convert(lw, _upper_bytes(lw, word, selector)) for selector in (_LOW_HALVES, _HIGH_HALVES)]
    return fb.bitcast(fb.pack_vector(pairs), types.vec(4, types.f16))


def _upper_bytes(lw: Lowering, word: mlir.Value, selector: int) -> mlir.Value:
    return lw.fb.intrinsic("llvm.amdgcn.perm", lw.fb.types.i32, [lw.fb.i32(0), word, lw.fb.i32(selector)])


def _e5m2_pair(lw: Lowering, halves: mlir.Value) -> mlir.Value:
    """e5m2 is the upper byte of an f16."""
    return halves


def _e4m3_pair(lw: Lowering, halves: mlir.Value) -> mlir.Value:
    """Exponent and mantissa moved to where f16 has them; biases 7 and 15; NaN (all ones) stays one."""
    fb, types = lw.fb, lw.fb.types
    size = fb.lshr(fb.and_(halves, 0x7F007F00), 1)
    small = fb.or_(size, fb.and_(halves, -0x7FFF8000))  # 0x80008000
    scale = fb.pack_vector([fb.const(256.0, types.f16)] * 2)
    scaled = fb.bitcast(fb.fmul(fb.bitcast(small, types.vec(2, types.f16)), scale), types.i32)
    # a carry into bit 14 marks NaN, which has come out as 480: one more exponent bit makes it a NaN again
    carry = fb.and_(fb.add(size, 0x00800080), 0x40004000)
    return fb.or_(scaled, fb.lshr(carry, 1))
