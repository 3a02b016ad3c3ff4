"""NVIDIA: what the shared lowerings ask of the target. PTX ISA 8.x section names in the comments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tilewright.backends.lower.context import Lowering
from tilewright.backends.lower.elements import element
from tilewright.backends.lower.math_f32 import SOFTWARE
from tilewright.backends.lower.target_ops import Store, TargetOps
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.backends.nvidia import debug, ptx
from tilewright.ir.types import DType

_AXES = "xyz"
_FULL_MASK = -1
_FIRST_WARPGROUP_BARRIER = 8
_FP8 = {"f8e4m3": "e4m3", "f8e5m2": "e5m2"}
#: nanoseconds between two looks at a flag
_PAUSE = 20
#: PTX type and register letter of an addition to memory
_RED = {
    "i32": ("u32", "r"), "i64": ("u64", "l"), "f32": ("f32", "f"), "f64": ("f64", "d"),
    "f16": ("noftz.f16", "h"), "bf16": ("noftz.bf16", "h"),
}  # fmt: skip
_LN2 = 0.693147182464599609375
#: log2(e) in two terms
_LOG2E, _LOG2E_LOW = 1.44269502162933349609375, 1.925963033500011079e-08


def _intrinsic(name: str) -> Callable[[Lowering, mlir.Value], mlir.Value]:
    return lambda lw, x: lw.fb.intrinsic(name, x.type, [x])


def _float_unary(name: str) -> Callable[[Lowering, mlir.Value], mlir.Value]:
    return lambda lw, x: lw.fb.float_unary(name, x)


def _exp2(lw: Lowering, x: mlir.Value) -> mlir.Value:
    """ex2.approx.ftz: without ftz ptxas spends three more instructions on subnormals."""
    return lw.fb.intrinsic("llvm.nvvm.ex2.approx.ftz", x.type, [x])


def _exp(lw: Lowering, x: mlir.Value) -> mlir.Value:
    """`math_f32.exp`, whose clamp and rounding to an integer are one instruction each here.

    n + 126 = floor(252 y) of y = x log2(e) / 252 + 1/2, held between 0 and 1; NaN and infinities reach the result
    through the rest.
    """
    fb = lw.fb
    unit = _asm(lw, "fma.rn.sat.f32 $0, $1, $2, $3;", x, fb.f32(_LOG2E / 252), fb.f32(0.5))
    biased = _asm(lw, "fma.rm.f32 $0, $1, $2, $3;", unit, fb.f32(252.0), fb.f32(12582913.0))
    n = fb.fadd(biased, fb.f32(-12583039.0))
    rest = fb.fma(x, fb.f32(_LOG2E_LOW), fb.fma(x, fb.f32(_LOG2E), fb.fneg(n)))
    scale = fb.bitcast(fb.shl(fb.bitcast(biased, fb.types.i32), fb.i32(23)), fb.types.f32)
    return fb.fmul(_exp2(lw, rest), scale)


def _sigmoid(lw: Lowering, x: mlir.Value) -> mlir.Value:
    """1 / (1 + exp(-x)): what is divided by lies between 1 and infinity, so one approximation does."""
    return _asm(lw, "rcp.approx.ftz.f32 $0, $1;", lw.fb.fadd(lw.fb.f32(1.0), _exp(lw, lw.fb.fneg(x))))


def _asm(lw: Lowering, text: str, *operands: mlir.Value) -> mlir.Value:
    """An instruction of float32 alone, which LLVM may move and merge."""
    constraints = ",".join(["=f", *"f" * len(operands)])
    return lw.fb.inline_asm(lw.fb.types.f32, text, constraints, list(operands), side_effects=False)


def _log(lw: Lowering, x: mlir.Value) -> mlir.Value:
    return lw.fb.fmul(_MATH["log2"](lw, x), _LN2)


#: exp2: at most 2 ulp, subnormal results are 0; log2: 2^-22 absolute between 0.5 and 2, 2^-22.6 relative elsewhere
_MATH: dict[str, Callable[[Lowering, mlir.Value], mlir.Value]] = {
    **SOFTWARE,
    "exp": _exp,
    "exp2": _exp2,
    "sigmoid": _sigmoid,
    "log2": _intrinsic("llvm.nvvm.lg2.approx.f"),
    "log": _log,
    "rsqrt": _intrinsic("llvm.nvvm.rsqrt.approx.f"),
    "sqrt": _float_unary("sqrt"),
    "floor": _float_unary("floor"),
    "ceil": _float_unary("ceil"),
}


class NvidiaOps(TargetOps):
    """Hopper and its relatives: warps of 32 threads."""

    device_scope = "device"

    def _register(self, lw: Lowering, name: str) -> mlir.Value:
        return lw.fb.op(f"nvvm.read.ptx.sreg.{name}", [lw.fb.types.i32]).result

    def thread_id(self, lw: Lowering) -> mlir.Value:
        return self._register(lw, "tid.x")

    def warp_index(self, lw: Lowering, thread: mlir.Value) -> mlir.Value:
        return self.shuffle(lw, lw.fb.lshr(thread, 5), lw.fb.i32(0))

    def block_id(self, lw: Lowering, axis: int) -> mlir.Value:
        return self._register(lw, f"ctaid.{_AXES[axis]}")

    def num_blocks(self, lw: Lowering, axis: int) -> mlir.Value:
        return self._register(lw, f"nctaid.{_AXES[axis]}")

    def is_leader(self, lw: Lowering) -> mlir.Value:
        text = "{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 $0, 1, 0, p; }"
        return lw.fb.icmp("ne", lw.fb.inline_asm(lw.fb.types.i32, text, "=r"), 0)

    def shuffle_xor(self, lw: Lowering, value: mlir.Value, mask: int) -> mlir.Value:
        fb = lw.fb
        operands = [fb.i32(_FULL_MASK), value, fb.i32(mask), fb.i32(31)]
        return fb.intrinsic("llvm.nvvm.shfl.sync.bfly.i32", fb.types.i32, operands)

    def shuffle(self, lw: Lowering, value: mlir.Value, lane: mlir.Value) -> mlir.Value:
        fb = lw.fb
        operands = [fb.i32(_FULL_MASK), value, lane, fb.i32(31)]
        return fb.intrinsic("llvm.nvvm.shfl.sync.idx.i32", fb.types.i32, operands)

    def barrier(self, lw: Lowering, scope: str) -> None:
        """bar.sync; a role of one warp needs only the warp's own. Barriers 8 to 15 are the warpgroups'."""
        fb, here = lw.fb, lw.scope
        if scope == "cluster":
            ptx.cluster_barrier(fb)
            return
        if scope == "block":
            fb.inline_asm(None, "bar.sync 0;", "~{memory}")
            return
        warps = 4 if scope == "warpgroup" else here.num_warps
        if warps == 1:
            ptx.meet_in_warp(fb)
            return
        number: mlir.Value = fb.i32(here.barrier_id)
        if scope == "warpgroup" and here.num_warps > 4:
            number = fb.add(fb.lshr(here.warp, 2), _FIRST_WARPGROUP_BARRIER + here.first_warp // 4)
        fb.inline_asm(None, f"bar.sync $0, {warps * 32};", "r,~{memory}", [number])

    def shared_base(self, lw: Lowering) -> mlir.Value:
        return lw.fb.ptrtoint(lw.fb.address_of(lw.entry.shared_symbol(None)), lw.fb.types.i32)

    def load_global(
        self, lw: Lowering, pointer: mlir.Value, type_: mlir.Type, align: int, evict: str | None
    ) -> mlir.Value:
        if evict is None:
            return super().load_global(lw, pointer, type_, align, evict)
        fb, types = lw.fb, lw.fb.types
        bits = _bits(type_)
        if bits > 64:
            words = ptx.load_words(fb, pointer, [types.i32] * (bits // 32), 32, evict)
            return fb.bitcast(fb.pack_vector(words), type_)
        (word,) = ptx.load_words(fb, pointer, [types.int(32 if bits == 8 else bits)], bits, evict)
        return fb.bitcast(fb.trunc(word, types.i8) if bits == 8 else word, type_)

    def store_if(self, lw: Lowering, accesses: Sequence[Store], evict: str | None = None) -> None:
        for predicate, pointer, value, align in accesses:
            if predicate is None and evict is None:
                lw.fb.store(value, pointer, align)
            else:
                ptx.store_words(lw.fb, pointer, *_words(lw, value), predicate, evict)

    def all_lanes(self, lw: Lowering, condition: mlir.Value) -> mlir.Value:
        fb = lw.fb
        return fb.intrinsic("llvm.nvvm.vote.all.sync", fb.types.i1, [fb.i32(_FULL_MASK), condition])

    def store_words(self, lw: Lowering, pointer: mlir.Value, words: Sequence[mlir.Value]) -> None:
        """A vector access is one for each of its elements, and those are atomic ("Vector Data-types", memory model)."""
        if len(words) != 2:
            return super().store_words(lw, pointer, words)
        ptx.emit(lw.fb, "st.relaxed.sys.global.v2.b64 [$0], {$1, $2};", "lll", [pointer, *words])
        return None

    def load_words(self, lw: Lowering, pointer: mlir.Value, count: int) -> list[mlir.Value]:
        if count != 2:
            return super().load_words(lw, pointer, count)
        text, i64 = "ld.relaxed.sys.global.v2.b64 {$0, $1}, [$2];", lw.fb.types.i64
        return list(lw.fb.inline_asm([i64, i64], text, "=l,=l,l,~{memory}", [pointer]))

    def pause(self, lw: Lowering) -> None:
        ptx.emit(lw.fb, f"nanosleep.u32 {_PAUSE};")

    def nanoseconds(self, lw: Lowering) -> mlir.Value:
        return lw.fb.inline_asm(lw.fb.types.i64, "mov.u64 $0, %globaltimer;", "=l")

    def add_to_memory(self, lw: Lowering, pointer: mlir.Value, value: mlir.Value, dtype: DType) -> None:
        """PTX as text: LLVM would add among the threads of one GPU."""
        type_, letter = _RED[dtype.name]
        bits = lw.fb.bitcast(value, lw.fb.types.i16) if letter == "h" else value
        ptx.emit(lw.fb, f"red.relaxed.sys.global.add.{type_} [$0], $1;", f"l{letter}", [pointer, bits])

    def from_here(self, lw: Lowering, value: mlir.Value) -> mlir.Value:
        """Without this LLVM computes masks of rare iterations in front of the loop, and keeps them in registers."""
        return lw.fb.inline_asm(value.type, "", "=r,0", [value])

    def print_line(self, lw: Lowering, text: str, values: Sequence[mlir.Value]) -> None:
        debug.print_line(lw, text, values)

    def fail(self, lw: Lowering, text: str, file: str, line: int) -> None:
        debug.fail(lw, text, file, line)

    def math(self, lw: Lowering, fn: str, x: mlir.Value) -> mlir.Value:
        return _MATH[fn](lw, x)

    def divide(self, lw: Lowering, x: mlir.Value, y: mlir.Value) -> mlir.Value:
        """div.full.f32: at most 2 ulp over the full range."""
        return _asm(lw, "div.full.f32 $0, $1, $2;", x, y)

    def to_int(self, lw: Lowering, x: mlir.Value) -> mlir.Value:
        """cvt.rzi.s32.f32 saturates, and gives 0 for NaN by itself ("Floating Point Conversions"); LLVM adds code."""
        if x.type != lw.fb.types.f32:
            return super().to_int(lw, x)
        text = "cvt.rzi.s32.f32 $0, $1;"
        return lw.fb.inline_asm(lw.fb.types.i32, text, "=r,f", [x], side_effects=False)

    def widen_half(self, lw: Lowering, value: mlir.Value) -> mlir.Value:
        """The upper bf16 of a word is its f32 when the lower one is cut off, the lower one when it moves up.

        One instruction each, where LLVM and ptxas take a word apart first.
        """
        fb, types = lw.fb, lw.fb.types
        place = fb.place_in_vector(value) if value.type == types.bf16 else None
        if place is None or place[0].type.shape[0] % 2:
            return super().widen_half(lw, value)
        vector, number = place
        count = vector.type.shape[0] // 2
        whole = fb.bitcast(vector, types.vec(count, types.i32) if count > 1 else types.i32)
        word = fb.extractelement(whole, number // 2) if count > 1 else whole
        return fb.bitcast(fb.and_(word, -65536) if number % 2 else fb.shl(word, 16), types.f32)

    def widen_fp8(self, lw: Lowering, value: mlir.Value, dtype: DType) -> mlir.Value:
        """cvt.rn.f16x2.e4m3x2 and e5m2x2 (sm_89 and later): f16 holds every 8-bit float."""
        fb, types = lw.fb, lw.fb.types
        text = f"cvt.rn.f16x2.{_FP8[dtype.name]}x2 $0, $1;"
        pair = fb.inline_asm(types.i32, text, "=r,h", [fb.zext(value, types.i16)], side_effects=False)
        return fb.fpext(fb.bitcast(fb.trunc(pair, types.i16), types.f16), types.f32)

    def round_fp8(self, lw: Lowering, values: Sequence[mlir.Value], dtype: DType) -> list[mlir.Value]:
        """cvt.rn.satfinite.e4m3x2.f32 and e5m2x2: two values a conversion, the first operand is the upper byte.

        Two conversions make a word, so that four neighbours are packed for whoever stores them.
        """
        fb, types = lw.fb, lw.fb.types
        name, rounded = f"cvt.rn.satfinite.{_FP8[dtype.name]}x2.f32", []
        text = f"{{ .reg .b16 l, h; {name} l, $2, $1; {name} h, $4, $3; mov.b32 $0, {{l, h}}; }}"
        for first in range(0, len(values), 4):
            four = [*values[first : first + 4], *[fb.f32(0.0)] * 3][:4]
            word = fb.inline_asm(types.i32, text, "=r,f,f,f,f", four, side_effects=False)
            rounded += fb.unpack_vector(fb.bitcast(word, types.vec(4, types.i8)))
        return rounded[: len(values)]

    def round_pairs(self, lw: Lowering, values: Sequence[mlir.Value], dtype: DType) -> list[mlir.Value] | None:
        """cvt.rn.bf16x2.f32 and f16x2: two values a conversion, and the pair is already packed for a store."""
        if len(values) % 2:
            return None
        rounded: list[mlir.Value] = []
        for low, high in zip(values[::2], values[1::2], strict=True):
            pair = lw.fb.fptrunc(lw.fb.pack_vector([low, high]), lw.fb.types.vec(2, element(lw, dtype)))
            rounded += lw.fb.unpack_vector(pair)
        return rounded


def _bits(type_: mlir.Type) -> int:
    is_vector = isinstance(type_, mlir.VectorType)
    width: int = type_.element_type.width * type_.shape[0] if is_vector else type_.width
    return width


def _words(lw: Lowering, value: mlir.Value) -> tuple[list[mlir.Value], int]:
    """A value of 1 to 16 bytes as equal words, and their bits. Bytes lie in 32-bit registers."""
    fb, types = lw.fb, lw.fb.types
    bits = _bits(value.type)
    if bits <= 64:
        whole = fb.bitcast(value, getattr(types, f"i{bits}"))
        return [fb.zext(whole, types.i32) if bits == 8 else whole], bits
    return fb.unpack_vector(fb.bitcast(value, types.vec(bits // 32, types.i32))), 32
