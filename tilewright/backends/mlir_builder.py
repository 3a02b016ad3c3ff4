"""Appends operations of MLIR's ``llvm`` dialect to the functions of a `Module`.

Operands may be Python numbers wherever another operand fixes the type. Constants live in the entry
block, one operation each, so every block can use them. Integer operations on constants and with
neutral operands fold at once; everything else is left to LLVM.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tilewright.backends.errors import BackendError
from tilewright.backends.integer_folding import (
    ABSORBING,
    COMMUTATIVE,
    NEUTRAL,
    fold_compare,
    fold_integers,
    signed,
)
from tilewright.backends.mlir_module import Block, Module, Type, Value, ir

Number = int | float
_NUMBER = (int, float)  # a union would be built anew at every isinstance

#: GEP index that stands for "take the next operand" (``LLVM::GEPOp::kDynamicIndex``).
_DYNAMIC_INDEX = -(2**31)
#: Constant GEP indices are stored in this many bits (``LLVM::kGEPConstantBitWidth``), signed.
_GEP_CONSTANT_BITS = 29


def _numbered(names: str) -> dict[str, int]:
    return {name: number for number, name in enumerate(names.split())}


# The numbers of LLVM dialect enumerations (LLVMEnums.td).
_ICMP = _numbered("eq ne slt sle sgt sge ult ule ugt uge")
_FCMP = _numbered("false oeq ogt oge olt ole one ord ueq ugt uge ult ule une uno true")
_ATOMIC_OPS = _numbered(
    "xchg add sub and nand or xor max min umax umin fadd fsub fmax fmin uinc_wrap udec_wrap usub_cond usub_sat"
)
_ORDERING = {"monotonic": 2, "acquire": 4, "release": 5, "acq_rel": 6, "seq_cst": 7}


@dataclass
class Loop:
    """A loop under construction. Call ``yields`` with the next carried values, once."""

    index: Value
    values: list[Value]
    #: the carried values after the last iteration; use them after the ``with``
    results: list[Value] = field(default_factory=list)
    next_values: list[Value] | None = None

    def yields(self, values: Sequence[Value]) -> None:
        self.next_values = list(values)


def _named(method: Callable[..., Value], name: str) -> Callable[..., Value]:
    """``method`` with the operation name filled in. (functools.partialmethod costs a microsecond a call.)"""

    def call(self: FunctionBuilder, *operands: Any, **options: Any) -> Value:
        return method(self, name, *operands, **options)

    return call


class FunctionBuilder:
    """Appends operations to the current block of one function.

    The entry block is kept for constants and allocas; ``arguments`` are the function's.
    """

    def __init__(self, module: Module, operation: Any, argument_types: Sequence[Type]):
        self.module, self.types, self.operation = module, module.types, operation
        self._create = ir.Operation.create
        self._location = module.location
        self._blocks = operation.regions[0].blocks
        self._constants: dict[Any, Value] = {}
        self._integers: dict[Value, int] = {}
        self._once: dict[Any, Value] = {}
        self._fastmath: dict[str, dict[str, Any]] = {}
        self._templates: dict[str, tuple[Any, Any]] = {}
        entry = self.block(*argument_types)
        self.arguments = list(entry.arguments)
        #: whether the current block has its terminator
        self.terminated = False
        body = self.block()
        self.position_at_end(entry)
        self.br(body)
        self._entry_point = ir.InsertionPoint(entry.operations[len(entry.operations) - 1])
        self.position_at_end(body)

    # --- raw operations and locations -------------------------------------------------------

    def op(
        self,
        name: str,
        results: Sequence[Type] = (),
        operands: Sequence[Value] = (),
        attributes: dict[str, Any] | None = None,
        successors: Sequence[Block] | None = None,
    ) -> Any:
        """Append any operation (an ``nvvm`` or ``rocdl`` one, say); returns the operation."""
        return self._create(
            name,
            results=results,
            operands=operands,
            attributes=attributes,
            successors=successors,
            loc=self._location,
            ip=self._point,
        )

    def _value(self, name: str, type_: Type, operands: Sequence[Value], attributes: dict[str, Any]) -> Value:
        return self._create(
            name, results=[type_], operands=operands, attributes=attributes, loc=self._location, ip=self._point
        ).result

    def _template(self, text: str, operands: Sequence[Value]) -> Value:
        """Append an operation written as text over ``%0, %1, ...``, the operands.

        Properties that are no attributes (overflow and no-wrap flags) cannot be passed to
        ``Operation.create``, which drops them silently. So the text is parsed once and cloned.
        """
        if text not in self._templates:
            arguments = ", ".join(f"%{i}: {operand.type}" for i, operand in enumerate(operands))
            source = f"llvm.func @template({arguments}) {{ %result = {text} llvm.return }}"
            module = ir.Module.parse(source, context=self.module.context)
            operation = module.body.operations[0].regions[0].blocks[0].operations[0].operation
            self._templates[text] = (module, operation)  # the module owns the operation
        clone = self._templates[text][1].clone(ip=self._point)
        for position, operand in enumerate(operands):
            clone.operands[position] = operand
        clone.location = self._location
        return clone.result

    @contextmanager
    def location(self, file: str, line: int, column: int = 0) -> Iterator[None]:
        """The operations made inside the ``with`` come from this place in the source."""
        saved = self._location
        self._location = ir.Location.file(file, line, column, context=self.module.context)
        try:
            yield
        finally:
            self._location = saved

    def set_location(self, file: str | None, line: int = 0, column: int = 0) -> None:
        """Give the operations that follow this source location; ``None`` is the kernel's own."""
        if file is None:
            self._location = self.module.location
        else:
            self._location = ir.Location.file(file, line, column, context=self.module.context)

    # --- constants --------------------------------------------------------------------------

    def const(self, value: Number | bool, type_: Type) -> Value:
        """An integer or float constant, or the splat of one for a vector type.

        Integers wrap to the type's width; floats round to it.
        """
        vector = isinstance(type_, ir.VectorType)
        element = type_.element_type if vector else type_
        if isinstance(element, ir.IntegerType):
            number = signed(int(value), element.width)
            key: Any = (type_, number)
        else:
            key = (type_, struct.pack("<d", value))  # by bits: -0.0 is not 0.0, a NaN equals itself
        found = self._constants.get(key)
        if found is not None:
            return found
        if isinstance(element, ir.IntegerType):
            attribute = ir.IntegerAttr.get(element, number)
        else:
            attribute = ir.FloatAttr.get(element, float(value), loc=self.module.unknown_location)
        if vector:
            attribute = ir.DenseElementsAttr.get_splat(type_, attribute)
        result = self._entry("llvm.mlir.constant", type_, {"value": attribute})
        self._constants[key] = result
        if not vector and isinstance(element, ir.IntegerType):
            self._integers[result] = number
        return result

    def const_value(self, value: Value) -> int | None:
        """The number behind a scalar integer constant of this function, else None. Signed."""
        return self._integers.get(value)

    def _entry(self, name: str, type_: Type, attributes: dict[str, Any], operands: Sequence[Value] = ()) -> Value:
        return self._create(
            name,
            results=[type_],
            operands=operands,
            attributes=attributes,
            loc=self.module.location,
            ip=self._entry_point,
        ).result

    def _entry_once(self, name: str, type_: Type, attributes: dict[str, Any], key: Any = None) -> Value:
        cache_key = (name, type_, key)
        if cache_key not in self._once:
            self._once[cache_key] = self._entry(name, type_, attributes)
        return self._once[cache_key]

    def i32(self, value: int) -> Value:
        return self.const(value, self.types.i32)

    def i64(self, value: int) -> Value:
        return self.const(value, self.types.i64)

    def i1(self, value: bool) -> Value:
        return self.const(value, self.types.i1)

    def f32(self, value: float) -> Value:
        return self.const(value, self.types.f32)

    def undef(self, type_: Type) -> Value:
        return self._entry_once("llvm.mlir.undef", type_, {})

    def poison(self, type_: Type) -> Value:
        return self._entry_once("llvm.mlir.poison", type_, {})

    def zero(self, type_: Type) -> Value:
        """All bits zero: null pointers, zero structs and vectors."""
        return self._entry_once("llvm.mlir.zero", type_, {})

    def address_of(self, symbol: str) -> Value:
        """The address of a global declared by ``Module.shared_global``."""
        attribute = ir.FlatSymbolRefAttr.get(symbol, context=self.module.context)
        pointer = self.types.ptr(self.module.address_space(symbol))
        return self._entry_once("llvm.mlir.addressof", pointer, {"global_name": attribute}, symbol)

    def alloca(self, type_: Type, count: int = 1, align: int | None = None, space: int = 0) -> Value:
        """Stack memory, made in the entry block. AMD's private memory is address space 5."""
        attributes = {"elem_type": self.module.type_attribute(type_)}
        if align is not None:
            attributes["alignment"] = self.module.integer(64, align)
        return self._entry("llvm.alloca", self.types.ptr(space), attributes, [self.i32(count)])

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
    add = _named(_integer, "add")
    sub = _named(_integer, "sub")
    mul = _named(_integer, "mul")
    shl = _named(_integer, "shl")
    sdiv = _named(_integer, "sdiv")
    srem = _named(_integer, "srem")
    udiv = _named(_integer, "udiv")
    urem = _named(_integer, "urem")
    and_ = _named(_integer, "and")
    or_ = _named(_integer, "or")
    xor = _named(_integer, "xor")
    lshr = _named(_integer, "lshr")
    ashr = _named(_integer, "ashr")

    def _integer_intrinsic(self, name: str, x: Value | int, y: Value | int) -> Value:
        x, y, type_ = self._pair(x, y)
        return self._value(f"llvm.intr.{name}", type_, [x, y], {})

    smin = _named(_integer_intrinsic, "smin")
    smax = _named(_integer_intrinsic, "smax")
    umin = _named(_integer_intrinsic, "umin")
    umax = _named(_integer_intrinsic, "umax")

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

    fadd = _named(_float, "llvm.fadd")
    fsub = _named(_float, "llvm.fsub")
    fmul = _named(_float, "llvm.fmul")
    fdiv = _named(_float, "llvm.fdiv")
    frem = _named(_float, "llvm.frem")  # the sign of its first operand
    minnum = _named(_float, "llvm.intr.minnum")  # of a number and a NaN, the number
    maxnum = _named(_float, "llvm.intr.maxnum")
    minimum = _named(_float, "llvm.intr.minimum")  # NaN if an operand is; -0.0 < 0.0
    maximum = _named(_float, "llvm.intr.maximum")
    copysign = _named(_float, "llvm.intr.copysign")

    def fneg(self, x: Value, fastmath: str = "none") -> Value:
        return self._value("llvm.fneg", x.type, [x], self._fast(fastmath))

    def float_unary(self, name: str, x: Value, fastmath: str = "none") -> Value:
        """``llvm.intr.<name>``: fabs, sqrt, floor, ceil, trunc, rint, roundeven, and exp2.

        exp2 is the one transcendental function that every GPU target has. The NVPTX back end kills the
        process on exp, log2, and tanh or sin without "afn": a math library belongs to the target.
        """
        return self._value(f"llvm.intr.{name}", x.type, [x], self._fast(fastmath))

    fabs = _named(float_unary, "fabs")
    sqrt = _named(float_unary, "sqrt")
    exp2 = _named(float_unary, "exp2")
    floor = _named(float_unary, "floor")
    ceil = _named(float_unary, "ceil")
    rint = _named(float_unary, "rint")  # to nearest, ties to even

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

    fptrunc = _named(_cast, "fptrunc")
    fpext = _named(_cast, "fpext")
    sitofp = _named(_cast, "sitofp")
    uitofp = _named(_cast, "uitofp")
    fptosi = _named(_cast, "fptosi")  # poison outside the range of the type
    fptoui = _named(_cast, "fptoui")
    bitcast = _named(_cast, "bitcast")
    ptrtoint = _named(_cast, "ptrtoint")
    inttoptr = _named(_cast, "inttoptr")
    addrspacecast = _named(_cast, "addrspacecast")

    def fptosi_sat(self, x: Value, type_: Type) -> Value:
        """To the nearest value of the type, NaN to 0."""
        return self.intrinsic("llvm.fptosi.sat", type_, [x])

    # --- memory -----------------------------------------------------------------------------

    def gep(
        self,
        base: Value,
        index: Value | int | Sequence[Value | int],
        element: Type | None = None,
        inbounds: bool = False,
    ) -> Value:
        """``base`` plus ``index`` elements (bytes by default); several indices step into ``element``.

        Integer indices narrower than the pointer are sign-extended. ``inbounds`` (for one index) says that
        the result stays inside the same allocation.
        """
        indices: Sequence[Any] = index if isinstance(index, list | tuple) else [index]
        constants = [self._index_constant(i) for i in indices]
        if not any(constants) and None not in constants:
            return base
        element = element or self.types.i8
        if inbounds and len(indices) == 1:
            offset: Value = self.i64(indices[0]) if isinstance(indices[0], int) else indices[0]
            signature = f"({base.type}, {offset.type}) -> {base.type}, {element}"
            return self._template(f"llvm.getelementptr inbounds %0[%1] : {signature}", [base, offset])
        dynamic = [
            self.i64(i) if isinstance(i, int) else i
            for i, known in zip(indices, constants, strict=True)
            if known is None
        ]
        raw = ", ".join(str(_DYNAMIC_INDEX if known is None else known) for known in constants)
        attributes = {
            "elem_type": self.module.type_attribute(element),
            "rawConstantIndices": self.module.attribute(f"array<i32: {raw}>"),
        }
        return self._value("llvm.getelementptr", base.type, [base, *dynamic], attributes)

    def _index_constant(self, index: Value | int) -> int | None:
        known = index if isinstance(index, int) else self._integers.get(index)
        if known is None or known != signed(known, _GEP_CONSTANT_BITS):
            return None
        return known

    def load(
        self,
        pointer: Value,
        type_: Type,
        align: int,
        *,
        volatile: bool = False,
        invariant: bool = False,
        ordering: str | None = None,
    ) -> Value:
        """``align`` in bytes. ``invariant``: the memory does not change while the kernel runs.

        With an ``ordering`` (as in `fence`, or monotonic) the access is atomic, for the whole system.
        """
        attributes = self._access(align, volatile, invariant) | (
            {} if ordering is None else self._atomic(ordering, None)
        )
        return self._value("llvm.load", type_, [pointer], attributes)

    def store(
        self,
        value: Value,
        pointer: Value,
        align: int,
        *,
        volatile: bool = False,
        nontemporal: bool = False,
        ordering: str | None = None,
    ) -> None:
        attributes = self._access(align, volatile, False) | ({} if ordering is None else self._atomic(ordering, None))
        if nontemporal:
            attributes["nontemporal"] = self.module.attribute("unit")
        self.op("llvm.store", (), [value, pointer], attributes)

    def _access(self, align: int, volatile: bool, invariant: bool) -> dict[str, Any]:
        attributes = {"alignment": self.module.integer(64, align)}
        if volatile:
            attributes["volatile_"] = self.module.attribute("unit")
        if invariant:
            attributes["invariant"] = self.module.attribute("unit")
        return attributes

    def fence(self, ordering: str, syncscope: str | None = None) -> None:
        """``ordering``: acquire release acq_rel seq_cst; ``syncscope`` is the target's ("workgroup")."""
        self.op("llvm.fence", (), (), self._atomic(ordering, syncscope))

    def atomicrmw(
        self,
        operation: str,
        pointer: Value,
        value: Value,
        ordering: str = "monotonic",
        syncscope: str | None = None,
        align: int | None = None,
    ) -> Value:
        """The old value. ``operation``: xchg add sub and or xor max min umax umin fadd fmax fmin ..."""
        attributes = self._atomic(ordering, syncscope)
        attributes["bin_op"] = self.module.integer(64, _ATOMIC_OPS[operation])
        if align is not None:
            attributes["alignment"] = self.module.integer(64, align)
        return self._value("llvm.atomicrmw", value.type, [pointer, value], attributes)

    def cmpxchg(self, pointer: Value, expected: Value, value: Value, align: int, syncscope: str | None = None) -> Value:
        """The old value; ``value`` is written where that is ``expected``. Relaxed, on integers."""
        attributes = {
            "success_ordering": self.module.integer(64, _ORDERING["monotonic"]),
            "failure_ordering": self.module.integer(64, _ORDERING["monotonic"]),
            "alignment": self.module.integer(64, align),
        }
        if syncscope is not None:
            attributes["syncscope"] = self.module.string(syncscope)
        pair = self.types.struct([expected.type, self.types.i1])
        both = self.op("llvm.cmpxchg", [pair], [pointer, expected, value], attributes).result
        return self.extractvalue(both, 0, expected.type)

    def _atomic(self, ordering: str, syncscope: str | None) -> dict[str, Any]:
        attributes = {"ordering": self.module.integer(64, _ORDERING[ordering])}
        if syncscope is not None:
            attributes["syncscope"] = self.module.string(syncscope)
        return attributes

    # --- aggregates -------------------------------------------------------------------------

    def extractvalue(self, aggregate: Value, position: int, type_: Type) -> Value:
        attributes = {"position": self.module.attribute(f"array<i64: {position}>")}
        return self._value("llvm.extractvalue", type_, [aggregate], attributes)

    def insertvalue(self, aggregate: Value, value: Value, position: int) -> Value:
        attributes = {"position": self.module.attribute(f"array<i64: {position}>")}
        return self._value("llvm.insertvalue", aggregate.type, [aggregate, value], attributes)

    def extractelement(self, vector: Value, index: Value | int) -> Value:
        position = self.i32(index) if isinstance(index, int) else index
        return self._value("llvm.extractelement", vector.type.element_type, [vector, position], {})

    def insertelement(self, vector: Value, value: Value, index: Value | int) -> Value:
        position = self.i32(index) if isinstance(index, int) else index
        return self._value("llvm.insertelement", vector.type, [vector, value, position], {})

    def shuffle(self, x: Value, y: Value, mask: Sequence[int]) -> Value:
        """Elements of the concatenation of two vectors, by number."""
        attributes = {"mask": self.module.attribute(f"array<i32: {', '.join(map(str, mask))}>")}
        type_ = self.types.vec(len(mask), x.type.element_type)
        return self._value("llvm.shufflevector", type_, [x, y], attributes)

    def pack_vector(self, values: Sequence[Value]) -> Value:
        vector = self.poison(self.types.vec(len(values), values[0].type))
        for position, value in enumerate(values):
            vector = self.insertelement(vector, value, position)
        return vector

    def unpack_vector(self, vector: Value) -> list[Value]:
        return [self.extractelement(vector, i) for i in range(vector.type.shape[0])]

    def pack_struct(self, values: Sequence[Value]) -> Value:
        aggregate = self.poison(self.types.struct([v.type for v in values]))
        for position, value in enumerate(values):
            aggregate = self.insertvalue(aggregate, value, position)
        return aggregate

    def unpack_struct(self, aggregate: Value, types: Sequence[Type]) -> list[Value]:
        return [self.extractvalue(aggregate, i, type_) for i, type_ in enumerate(types)]

    # --- calls ------------------------------------------------------------------------------

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

    def call(self, name: str, result: Type | None, arguments: Sequence[Value]) -> Any:
        """Call a function declared by ``Module.declare``; None if it returns nothing."""
        attributes = {
            "callee": ir.FlatSymbolRefAttr.get(name, context=self.module.context),
            "op_bundle_sizes": self.module.attribute("array<i32>"),
            "operandSegmentSizes": self.module.attribute(f"array<i32: {len(arguments)}, 0>"),
        }
        call = self.op("llvm.call", [] if result is None else [result], arguments, attributes)
        return None if result is None else call.result

    def text(self, text: str) -> Value:
        """A generic pointer to a constant C string."""
        return self.addrspacecast(self.address_of(self.module.text_global(text)), self.types.ptr())

    def inline_asm(
        self,
        result: Type | Sequence[Type] | None,
        text: str,
        constraints: str,
        arguments: Sequence[Value] = (),
        side_effects: bool = True,
    ) -> Any:
        """Inline assembly; a sequence of result types gives the list of results.

        Whatever means something to a whole warp or block (barriers, wgmma, shuffles) must have
        ``side_effects``: those calls become convergent in ``tilewright.backends.llvm``.
        """
        if isinstance(result, list | tuple):
            # One result is a plain type to LLVM, not a struct of one.
            type_ = self.types.struct(result) if len(result) > 1 else result[0] if result else None
            value = self.inline_asm(type_, text, constraints, arguments, side_effects)
            return self.unpack_struct(value, result) if len(result) > 1 else [value] if result else []
        attributes = {"asm_string": self.module.string(text), "constraints": self.module.string(constraints)}
        if side_effects:
            attributes["has_side_effects"] = self.module.attribute("unit")
        call = self.op("llvm.inline_asm", [] if result is None else [result], arguments, attributes)
        return None if result is None else call.result

    # --- control flow -----------------------------------------------------------------------

    def block(self, *types: Type) -> Block:
        """A new block at the end of the function; its ``arguments`` have ``types``."""
        return self._blocks.append(*types, arg_locs=[self.module.location] * len(types))

    def position_at_end(self, block: Block) -> None:
        """Append to ``block``, which has no terminator yet."""
        self._point, self.current_block, self.terminated = ir.InsertionPoint(block), block, False

    def br(self, target: Block, arguments: Sequence[Value] = (), unroll: bool | int | None = None) -> None:
        """``unroll`` is for the back edge of a loop: False forbids, a number sets the factor."""
        attributes = {} if unroll is None else {"loop_annotation": self.module.attribute(_loop_annotation(unroll))}
        self.op("llvm.br", (), arguments, attributes, [target])
        self.terminated = True

    def cond_br(
        self,
        condition: Value,
        then_block: Block,
        else_block: Block,
        then_arguments: Sequence[Value] = (),
        else_arguments: Sequence[Value] = (),
    ) -> None:
        sizes = f"array<i32: 1, {len(then_arguments)}, {len(else_arguments)}>"
        operands = [condition, *then_arguments, *else_arguments]
        attributes = {"operandSegmentSizes": self.module.attribute(sizes)}
        self.op("llvm.cond_br", (), operands, attributes, [then_block, else_block])
        self.terminated = True

    def ret(self, value: Value | None = None) -> None:
        self.op("llvm.return", (), [] if value is None else [value])
        self.terminated = True

    def unreachable(self) -> None:
        self.op("llvm.unreachable")
        self.terminated = True

    @contextmanager
    def if_then(self, condition: Value) -> Iterator[None]:
        """Operations inside the ``with`` run where ``condition`` holds."""
        body, after = self.block(), self.block()
        self.cond_br(condition, body, after)
        self.position_at_end(body)
        yield
        if not self.terminated:
            self.br(after)
        self.position_at_end(after)

    def if_else(
        self,
        condition: Value,
        types: Sequence[Type],
        then_body: Callable[[], Sequence[Value]],
        else_body: Callable[[], Sequence[Value]],
    ) -> list[Value]:
        """Build both sides by call; each returns values of ``types``, of which the taken side's result."""
        then_block, else_block, after = self.block(), self.block(), self.block(*types)
        self.cond_br(condition, then_block, else_block)
        for block, body in ((then_block, then_body), (else_block, else_body)):
            self.position_at_end(block)
            values = body()
            if not self.terminated:
                self.br(after, values)
        self.position_at_end(after)
        return list(after.arguments)

    @contextmanager
    def for_loop(
        self,
        lower: Value | int,
        upper: Value | int,
        step: Value | int,
        initial: Sequence[Value] = (),
        unroll: bool | int | None = None,
    ) -> Iterator[Loop]:
        """``for index in range(lower, upper, step)`` (signed, ``step`` > 0) with carried values.

        ``with f.for_loop(0, n, 1, [acc]) as loop: ...; loop.yields([...])``, then ``loop.results``.
        """
        if isinstance(lower, int) and isinstance(upper, int):
            upper = self.i32(upper)
        lower, upper, index_type = self._pair(lower, upper)
        head, body, after = self.block(index_type, *(v.type for v in initial)), self.block(), self.block()
        self.br(head, [lower, *initial])
        self.position_at_end(head)
        index, *carried = head.arguments
        self.cond_br(self.icmp("slt", index, upper), body, after)
        self.position_at_end(body)
        loop = Loop(index, carried, results=carried)
        yield loop
        if loop.next_values is None and initial:
            raise BackendError("mlir", "a loop that carries values must call yields()")
        # "nsw" lets LLVM derive the trip count; the last increment may not pass the type's range.
        self.br(head, [self.add(index, step, "nsw"), *(loop.next_values or [])], unroll)
        self.position_at_end(after)


def _loop_annotation(unroll: bool | int) -> str:
    if unroll is False:
        return "#llvm.loop_annotation<unroll = <disable = true>>"
    if unroll is True:
        return "#llvm.loop_annotation<unroll = <disable = false, full = true>>"
    return f"#llvm.loop_annotation<unroll = <disable = false, count = {unroll} : i32>>"
