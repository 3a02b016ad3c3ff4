"""The operations of one LLVM function under construction: appending them, their locations, and constants.

Constants live in the entry block, one operation each, so every block can use them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tilewright.backends.integer_folding import signed
from tilewright.backends.mlir_module import Block, Module, Type, Value, ir

Number = int | float


def numbered(names: str) -> dict[str, int]:
    """The numbers of an enumeration's cases."""
    return {name: number for number, name in enumerate(names.split())}


def named(method: Callable[..., Value], name: str) -> Callable[..., Value]:
    """``method`` with the operation name filled in. (functools.partialmethod costs a microsecond a call.)"""

    def call(self: Operations, *operands: Any, **options: Any) -> Value:
        return method(self, name, *operands, **options)

    return call


class Operations:
    """Appends operations to the current block of one function."""

    #: the end of the entry block: constants and allocas go here
    _entry_point: Any

    def __init__(self, module: Module, operation: Any):
        self.module, self.types, self.operation = module, module.types, operation
        self._create = ir.Operation.create
        self._location = module.location
        self._blocks = operation.regions[0].blocks
        self._constants: dict[Any, Value] = {}
        self._integers: dict[Value, int] = {}
        self._once: dict[Any, Value] = {}
        self._templates: dict[str, tuple[Any, Any]] = {}
        #: whether the current block has its terminator
        self.terminated = False

    def block(self, *types: Type) -> Block:
        """A new block at the end of the function; its ``arguments`` have ``types``."""
        return self._blocks.append(*types, arg_locs=[self.module.location] * len(types))

    def position_at_end(self, block: Block) -> None:
        """Append to ``block``, which has no terminator yet."""
        self._point, self.terminated = ir.InsertionPoint(block), False

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
