"""Arithmetic of LLVM's integers and floats, comparisons and casts.

Operands may be Python numbers wherever another operand fixes the type. Integer operations on constants and with
neutral operands fold at once; everything else is left to LLVM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tilewright.backends.integer_folding import (
    ABSORBING,
    COMMUTATIVE,
    NEUTRAL,
    fold_compare,
    fold_integers,
)
from tilewright.backends.mlir_module import Module, Type, Value, ir
from tilewright.backends.mlir_operations import Number, Operations, named, numbered

_NUMBER = (int, float)  # a union would be built anew at every isinstance

# The numbers of LLVM dialect enumerations (LLVMEnums.td).
_ICMP = numbered("eq ne slt sle sgt sge ult ule ugt uge")
_FCMP = numbered("false oeq ogt oge olt ole one ord ueq ugt uge ult ule une uno true")


class Arithmetic(Operations):
    """What computes with values and touches no memory."""

    def __init__(self, module: Module, operation: Any):
        super().__init__(module, operation)
        self._fastmath: dict[str, dict[str, Any]] = {}

    # --- integers ---------------------------------------------------------------------------

    def _pair(self, x: Value | Number, y: Value | Number) -> tuple[Value, Value, Type]:
        """Both operands as values of one type; a Python number takes the other's type."""
        if isinstance(y, _NUMBER):
            if isinstance(x, _NUMBER):
                raise TypeError("two plain numbers have no LLVM type: compute with them in Python")
            type_ = x.type
            return x, self.const(y, type_), type_
        type_ = y.type
        return (self.const(x, type_) if isinstance(x, _NUMBER) else x), y, type_

    def _integer(self, name: str, x: Value | int, y: Value | int, flags: str = "") -> Value:
        x, y, type_ = self._pair(x, y)
        known_x, known_y = self._integers.get(x), self._integers.get(y)
        if known_x is not None and known_y is not None:
            folded = fold_integers(name, known_x, known_y, type_.width)
            if folded is not None:
                return self.const(folded, type_)
        if known_x is not None and known_y is None and name in COMMUTATIVE:
            x, y, known_y = y, x, known_x
        if known_y is not None:
            if known_y == NEUTRAL.get(name):
                return x
            if known_y == ABSORBING.get(name):
                return self.const(0, type_)
        if flags:
            return self._template(f"llvm.{name} %0, %1 overflow<{flags}> : {type_}", [x, y])
        return self._value(f"llvm.{name}", type_, [x, y], {})

    # ``flags`` (of the first four): "", "nsw", "nuw" or "nsw, nuw"
    add = named(_integer, "add")
    sub = named(_integer, "sub")
    mul = named(_integer, "mul")
    shl = named(_integer, "shl")
    sdiv = named(_integer, "sdiv")
    srem = named(_integer, "srem")
    udiv = named(_integer, "udiv")
    urem = named(_integer, "urem")
    and_ = named(_integer, "and")
    or_ = named(_integer, "or")
    xor = named(_integer, "xor")
    lshr = named(_integer, "lshr")
    ashr = named(_integer, "ashr")

    def _integer_intrinsic(self, name: str, x: Value | int, y: Value | int) -> Value:
        x, y, type_ = self._pair(x, y)
        return self._value(f"llvm.intr.{name}", type_, [x, y], {})

    smin = named(_integer_intrinsic, "smin")
    smax = named(_integer_intrinsic, "smax")
    umin = named(_integer_intrinsic, "umin")
    umax = named(_integer_intrinsic, "umax")

    def neg(self, x: Value) -> Value:
        return self.sub(0, x)

    def not_(self, x: Value) -> Value:
        return self.xor(x, -1)

    def iabs(self, x: Value) -> Value:
        return self._value("llvm.intr.abs", x.type, [x], {"is_int_min_poison": self.module.attribute("false")})

    def icmp(self, predicate: str, x: Value | int, y: Value | int) -> Value:
        """``predicate``: eq ne slt sle sgt sge ult ule ugt uge. Pointers compare too."""
        x, y, type_ = self._pair(x, y)
        known_x, known_y = self._integers.get(x), self._integers.get(y)
        if known_x is not None and known_y is not None:
            return self.i1(fold_compare(predicate, known_x, known_y, type_.width))
        attributes = {"predicate": self.module.integer(64, _ICMP[predicate])}
        return self._value("llvm.icmp", self._boolean_like(type_), [x, y], attributes)

    def _boolean_like(self, type_: Type) -> Type:
        return self.types.vec(type_.shape[0], self.types.i1) if isinstance(type_, ir.VectorType) else self.types.i1

    def select(self, condition: Value, x: Value | Number, y: Value | Number) -> Value:
        x, y, type_ = self._pair(x, y)
        known = self._integers.get(condition)
        if known is not None:
            return x if known else y
        return self._value("llvm.select", type_, [condition, x, y], {})

    # --- floats -----------------------------------------------------------------------------

    def _fast(self, flags: str) -> dict[str, Any]:
        """``fastmathFlags`` of a comma-separated list: none nnan ninf nsz arcp contract afn reassoc fast."""
        if flags not in self._fastmath:
            self._fastmath[flags] = {"fastmathFlags": self.module.attribute(f"#llvm.fastmath<{flags}>")}
        return self._fastmath[flags]

    def _float(self, name: str, x: Value | float, y: Value | float, fastmath: str = "none") -> Value:
        x, y, type_ = self._pair(x, y)
        return self._value(name, type_, [x, y], self._fast(fastmath))

    fadd = named(_float, "llvm.fadd")
    fsub = named(_float, "llvm.fsub")
    fmul = named(_float, "llvm.fmul")
    fdiv = named(_float, "llvm.fdiv")
    minnum = named(_float, "llvm.intr.minnum")  # of a number and a NaN, the number
    maxnum = named(_float, "llvm.intr.maxnum")
    minimum = named(_float, "llvm.intr.minimum")  # NaN if an operand is; -0.0 < 0.0
    maximum = named(_float, "llvm.intr.maximum")
    copysign = named(_float, "llvm.intr.copysign")

    def fneg(self, x: Value, fastmath: str = "none") -> Value:
        return self._value("llvm.fneg", x.type, [x], self._fast(fastmath))

    def float_unary(self, name: str, x: Value, fastmath: str = "none") -> Value:
        """``llvm.intr.<name>``: fabs, sqrt, floor, ceil, trunc, rint, roundeven, and exp2.

        exp2 is the one transcendental function that every GPU target has. The NVPTX back end kills the
        process on exp, log2, and tanh or sin without "afn": a math library belongs to the target.
        """
        return self._value(f"llvm.intr.{name}", x.type, [x], self._fast(fastmath))

    fabs = named(float_unary, "fabs")
    sqrt = named(float_unary, "sqrt")
    exp2 = named(float_unary, "exp2")
    floor = named(float_unary, "floor")
    ceil = named(float_unary, "ceil")
    rint = named(float_unary, "rint")  # to nearest, ties to even

    def fma(self, x: Value, y: Value | float, z: Value | float, fastmath: str = "none") -> Value:
        """x * y + z, rounded once."""
        x, y, type_ = self._pair(x, y)
        z = self.const(z, type_) if isinstance(z, _NUMBER) else z
        return self._value("llvm.intr.fma", type_, [x, y, z], self._fast(fastmath))

    def fcmp(self, predicate: str, x: Value | float, y: Value | float, fastmath: str = "none") -> Value:
        """``predicate``: oeq ogt oge olt ole one ord, ueq ugt uge ult ule une uno, true, false."""
        x, y, type_ = self._pair(x, y)
        attributes = {"predicate": self.module.integer(64, _FCMP[predicate]), **self._fast(fastmath)}
        return self._value("llvm.fcmp", self._boolean_like(type_), [x, y], attributes)

    # --- casts: to the same type they are the value itself ------------------------------------

    def sext(self, x: Value, type_: Type) -> Value:
        known = self._integers.get(x)
        return self._cast("sext", x, type_) if known is None else self.const(known, type_)

    def zext(self, x: Value, type_: Type) -> Value:
        known = self._integers.get(x)
        return self._cast("zext", x, type_) if known is None else self.const(known % (1 << x.type.width), type_)

    def trunc(self, x: Value, type_: Type) -> Value:
        known = self._integers.get(x)
        return self._cast("trunc", x, type_) if known is None else self.const(known, type_)

    def _cast(self, name: str, x: Value, type_: Type) -> Value:
        return x if x.type == type_ else self._value(f"llvm.{name}", type_, [x], {})

    fptrunc = named(_cast, "fptrunc")
    fpext = named(_cast, "fpext")
    sitofp = named(_cast, "sitofp")
    uitofp = named(_cast, "uitofp")
    bitcast = named(_cast, "bitcast")
    ptrtoint = named(_cast, "ptrtoint")
    inttoptr = named(_cast, "inttoptr")
    addrspacecast = named(_cast, "addrspacecast")

    def fptosi_sat(self, x: Value, type_: Type) -> Value:
        """To the nearest value of the type, NaN to 0."""
        return self.intrinsic("llvm.fptosi.sat", type_, [x])

    # --- intrinsics -----------------------------------------------------------------------------

    def intrinsic(self, name: str, result: Type | None, arguments: Sequence[Value] = (), fastmath: str = "") -> Any:
        """Call an LLVM intrinsic; None if it returns nothing. Immediate operands are constants.

        The name may leave out the type suffixes of an overloaded intrinsic.
        """
        attributes = {
            "intrin": self.module.string(name),
            "op_bundle_sizes": self.module.attribute("array<i32>"),
            "operandSegmentSizes": self.module.attribute(f"array<i32: {len(arguments)}, 0>"),
        }
        if fastmath:
            attributes.update(self._fast(fastmath))
        call = self.op("llvm.call_intrinsic", [] if result is None else [result], arguments, attributes)
        return None if result is None else call.result
