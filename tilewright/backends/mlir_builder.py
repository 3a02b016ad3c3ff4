"""Appends operations of MLIR's ``llvm`` dialect to the functions of a `Module`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tilewright.backends.errors import BackendError
from tilewright.backends.integer_folding import signed
from tilewright.backends.mlir_arithmetic import Arithmetic
from tilewright.backends.mlir_module import Block, Module, Type, Value, ir
from tilewright.backends.mlir_operations import numbered

#: GEP index that stands for "take the next operand" (``LLVM::GEPOp::kDynamicIndex``).
_DYNAMIC_INDEX = -(2**31)
#: Constant GEP indices are stored in this many bits (``LLVM::kGEPConstantBitWidth``), signed.
_GEP_CONSTANT_BITS = 29

# The numbers of LLVM dialect enumerations (LLVMEnums.td).
_ATOMIC_OPS = numbered(
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


class FunctionBuilder(Arithmetic):
    """Appends operations to the current block of one function.

    The entry block is kept for constants and allocas; ``arguments`` are the function's.
    """

    def __init__(self, module: Module, operation: Any, argument_types: Sequence[Type]):
        super().__init__(module, operation)
        self._places: dict[Value, tuple[Value, int]] = {}
        entry = self.block(*argument_types)
        self.arguments = list(entry.arguments)
        body = self.block()
        self.position_at_end(entry)
        self.br(body)
        self._entry_point = ir.InsertionPoint(entry.operations[len(entry.operations) - 1])
        self.position_at_end(body)

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
        nontemporal: bool = False,
        ordering: str | None = None,
    ) -> Value:
        """``align`` in bytes. ``invariant``: the memory does not change while the kernel runs.

        With an ``ordering`` (as in `fence`, or monotonic) the access is atomic, for the whole system.
        """
        attributes = self._access(align, volatile, invariant, nontemporal) | (
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
        attributes = self._access(align, volatile, False, nontemporal) | (
            {} if ordering is None else self._atomic(ordering, None)
        )
        self.op("llvm.store", (), [value, pointer], attributes)

    def _access(self, align: int, volatile: bool, invariant: bool, nontemporal: bool) -> dict[str, Any]:
        attributes = {"alignment": self.module.integer(64, align)}
        if volatile:
            attributes["volatile_"] = self.module.attribute("unit")
        if invariant:
            attributes["invariant"] = self.module.attribute("unit")
        if nontemporal:
            attributes["nontemporal"] = self.module.attribute("unit")
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
        element = self._value("llvm.extractelement", vector.type.element_type, [vector, position], {})
        if isinstance(index, int):
            self._places[element] = vector, index
        return element

    def place_in_vector(self, element: Value) -> tuple[Value, int] | None:
        """(vector, number) of what `extractelement` has taken out with a known number, else None."""
        return self._places.get(element)

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
