"""An MLIR module in the ``llvm`` dialect: its types, attributes, globals and functions, and the way to LLVM IR.

Operations are made by ``ir.Operation.create`` with cached types and attributes, which is more than twice as fast as the
generated operation classes. MLIR aborts or crashes on some malformed input that verification lets through (unknown
intrinsics' operand types, for one): run it in a worker process where that must not take the caller down.
"""

from __future__ import annotations

import builtins
import ctypes
import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.backends.errors import BackendError

if TYPE_CHECKING:
    from tilewright.backends.mlir_builder import FunctionBuilder


def _preload_libllvm() -> None:
    """Load the ``llvm`` package's libLLVM.so, which the MLIR extension modules link against and find by its name.

    Not globally: another library with an LLVM of its own (Triton's) would take symbols from this one and abort.
    """
    spec = importlib.util.find_spec("llvm")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for library in sorted(Path(folder, "lib").glob("libLLVM.so*")):
            ctypes.CDLL(str(library))
            return
    # No such package: the bindings may find libLLVM by themselves, and say so if they cannot.


_preload_libllvm()

import mlir.ir as ir  # noqa: E402
from mlir.dialects import llvm as llvm_dialect  # noqa: E402
from mlir.passmanager import PassManager  # noqa: E402

# The bindings carry no type information.
Value = Any
Type = Any
Block = Any


class Types:
    """The LLVM types of one context, made once."""

    def __init__(self, context: ir.Context):
        self._context = context
        self._parsed: dict[str, Type] = {}
        self.i1, self.i8, self.i16, self.i32, self.i64 = (self.int(n) for n in (1, 8, 16, 32, 64))
        self.f16, self.bf16 = ir.F16Type.get(context=context), ir.BF16Type.get(context=context)
        self.f32, self.f64 = ir.F32Type.get(context=context), ir.F64Type.get(context=context)

    def dtype(self, name: str) -> Type:
        """The type of a Tile IR element type. 8-bit floats are plain bytes to LLVM."""
        return self.i8 if name.startswith("f8") else getattr(self, name)

    def int(self, bits: builtins.int) -> Type:
        return self.parse(f"i{bits}")

    def ptr(self, space: builtins.int = 0) -> Type:
        return self.parse(f"!llvm.ptr<{space}>" if space else "!llvm.ptr")

    def vec(self, count: builtins.int, element: Type) -> Type:
        return self.parse(f"vector<{count}x{element}>")

    def struct(self, elements: Sequence[Type]) -> Type:
        return self.parse(f"!llvm.struct<({', '.join(map(str, elements))})>")

    def array(self, count: builtins.int, element: Type) -> Type:
        return self.parse(f"!llvm.array<{count} x {element}>")

    def parse(self, text: str) -> Type:
        """Any MLIR type by its text."""
        if text not in self._parsed:
            self._parsed[text] = ir.Type.parse(text, context=self._context)
        return self._parsed[text]


class Module:
    """An MLIR module for one ``triple``. ``finish`` gives its LLVM IR and ends its life."""

    def __init__(self, triple: str, file: str = "<unknown>", line: int = 1):
        self.triple = triple
        self.context = ir.Context()
        self.context.enable_multithreading(False)
        self.types = Types(self.context)
        self.unknown_location = ir.Location.unknown(context=self.context)
        #: where the kernel is defined; debug information names this file for every line
        self.location = ir.Location.file(file, line, 0, context=self.context)
        self._attributes: dict[str, Any] = {}
        self._type_attributes: dict[Type, Any] = {}
        self._symbols: dict[str, int] = {}
        self._declared: set[str] = set()
        self._module = ir.Module.create(self.unknown_location)
        self._module.operation.attributes["llvm.target_triple"] = self.string(triple)
        self._top = ir.InsertionPoint(self._module.body)

    def attribute(self, text: str) -> Any:
        """Any MLIR attribute by its text, cached: ``"array<i32: 128, 1, 1>"``, ``"unit"``."""
        if text not in self._attributes:
            self._attributes[text] = ir.Attribute.parse(text, context=self.context)
        return self._attributes[text]

    def integer(self, bits: int, value: int) -> Any:
        return self.attribute(f"{value} : i{bits}")

    def string(self, text: str) -> Any:
        return ir.StringAttr.get(text, context=self.context)

    def type_attribute(self, type_: Type) -> Any:
        if type_ not in self._type_attributes:
            self._type_attributes[type_] = ir.TypeAttr.get(type_, context=self.context)
        return self._type_attributes[type_]

    def _create_top(self, name: str, attributes: dict[str, Any], regions: int = 0) -> Any:
        return ir.Operation.create(name, attributes=attributes, regions=regions, loc=self.location, ip=self._top)

    def shared_global(self, name: str = "smem", size: int | None = None, align: int = 1024, space: int = 3) -> str:
        """Declare shared memory; returns ``name`` for ``FunctionBuilder.address_of``.

        ``size`` None is an external array of size zero, which the launch sizes (NVIDIA's dynamic
        shared memory); a number of bytes is an internal array (AMD's LDS, sized in the kernel).
        """
        linkage = "external" if size is None else "internal"
        self._create_top(
            "llvm.mlir.global",
            {
                "sym_name": self.string(name),
                "global_type": self.type_attribute(self.types.array(size or 0, self.types.i8)),
                "linkage": self.attribute(f"#llvm.linkage<{linkage}>"),
                "addr_space": self.integer(32, space),
                "alignment": self.integer(64, align),
            },
            regions=1,
        )
        self._symbols[name] = space
        return name

    def text_global(self, text: str) -> str:
        """Declare a constant C string in global memory; returns its symbol. Equal texts are one."""
        name = f"text_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        if name not in self._symbols:
            data = text.encode() + b"\0"
            self._create_top(
                "llvm.mlir.global",
                {
                    "sym_name": self.string(name),
                    "global_type": self.type_attribute(self.types.array(len(data), self.types.i8)),
                    "linkage": self.attribute("#llvm.linkage<internal>"),
                    "addr_space": self.integer(32, 1),
                    "constant": self.attribute("unit"),
                    "value": ir.StringAttr.get(data, context=self.context),
                },
                regions=1,
            )
            self._symbols[name] = 1
        return name

    def declare(self, name: str, argument_types: Sequence[Type], result: Type | None) -> None:
        """Declare an external function for `FunctionBuilder.call`, once."""
        if name in self._declared:
            return
        self._declared.add(name)
        arguments = ", ".join(str(t).removeprefix("!llvm.") for t in argument_types)
        signature = self.types.parse(f"!llvm.func<{str(result) if result else 'void'} ({arguments})>")
        table = {
            "sym_name": self.string(name),
            "function_type": self.type_attribute(signature),
            "linkage": self.attribute("#llvm.linkage<external>"),
        }
        self._create_top("llvm.func", table, regions=1)

    def address_space(self, symbol: str) -> int:
        return self._symbols[symbol]

    def flag(self, behaviour: str, name: str, value: int) -> None:
        """Add an LLVM module flag, e.g. ``("error", "amdhsa_code_object_version", 500)``."""
        text = f'[#llvm.mlir.module_flag<{behaviour}, "{name}", {value} : i32>]'
        self._create_top("llvm.module_flags", {"flags": self.attribute(text)})

    def function(
        self,
        name: str,
        argument_types: Sequence[Type],
        attributes: Mapping[str, str] | None = None,
        argument_attributes: Sequence[Mapping[str, str]] | None = None,
        result: Type | None = None,
    ) -> FunctionBuilder:
        """Define a function and return the builder at its first block.

        Attributes are MLIR attribute text by name: ``{"nvvm.kernel": "unit", "nvvm.maxntid":
        "array<i32: 384, 1, 1>"}``, ``{"passthrough": '[["amdgpu-waves-per-eu", "1,1"]]'}``;
        of an argument ``{"llvm.byval": "!llvm.array<128 x i8>", "llvm.align": "64 : i64"}``.
        """
        arguments = ", ".join(str(t).removeprefix("!llvm.") for t in argument_types)
        signature = self.types.parse(f"!llvm.func<{str(result) if result else 'void'} ({arguments})>")
        table = {key: self.attribute(text) for key, text in (attributes or {}).items()}
        table["sym_name"] = self.string(name)
        table["function_type"] = self.type_attribute(signature)
        table["linkage"] = self.attribute("#llvm.linkage<external>")
        if argument_attributes is not None:
            table["arg_attrs"] = self._argument_attributes(argument_attributes)
        operation = self._create_top("llvm.func", table, regions=1)
        from tilewright.backends.mlir_builder import FunctionBuilder

        return FunctionBuilder(self, operation, argument_types)

    def _argument_attributes(self, tables: Sequence[Mapping[str, str]]) -> Any:
        dictionaries = [
            ir.DictAttr.get({key: self.attribute(text) for key, text in table.items()}, context=self.context)
            for table in tables
        ]
        return ir.ArrayAttr.get(dictionaries, context=self.context)

    def text(self) -> str:
        """The MLIR text as built so far, for dumps."""
        return str(self._module)

    def verify(self) -> None:
        _checked("the kernel is not valid MLIR", self._module.operation.verify)

    def finish(self, debug_info: bool = False) -> str:
        """Verify, lower what NVVM operations remain, and translate to LLVM IR text.

        ``debug_info`` keeps the locations: ``.loc`` in PTX, DWARF line tables elsewhere. Every line
        counts as one of the file that the module's own location names.
        """
        self.verify()
        passes = ["convert-nvvm-to-llvm"]
        if debug_info:
            # Full line tables make LLVM write ".target sm_90a, debug" and ptxas stop optimising.
            kind = "DebugDirectivesOnly" if self.triple.startswith("nvptx") else "LineTablesOnly"
            passes.append(f"ensure-debug-info-scope-on-llvm-func{{emission-kind={kind}}}")
        pipeline = PassManager.parse(f"builtin.module({','.join(passes)})", context=self.context)
        _checked("lowering NVVM operations failed", lambda: pipeline.run(self._module.operation))
        self.verify()
        # A failed translation is a null string, which the bindings do not survive: hence the
        # second verification, after which it has not been seen to fail.
        return llvm_dialect.translate_module_to_llvmir(self._module.operation)


def _checked(message: str, action: Callable[[], Any]) -> None:
    try:
        action()
    except ir.MLIRError as error:
        diagnostics = [f"{d.location}: {d.message}" for d in error.error_diagnostics]
        raise BackendError("mlir", message, diagnostics) from error
