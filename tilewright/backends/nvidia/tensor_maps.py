"""Tensor maps as kernel parameters: the lowering asks for them while it goes, `append_parameters` declares them.

A map is a ``CUtensorMap`` of 128 bytes passed by value (``__grid_constant__``); instructions take its generic
address. The launch contract puts the maps behind all other parameters, in the order of `KernelABI.tensor_maps`.
"""

from __future__ import annotations

from tilewright.backends.lower.context import Lowering
from tilewright.backends.mlir_builder import FunctionBuilder
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.backends.nvidia.state import state
from tilewright.ir.abi import TensorMapParam

_ATTRIBUTES = {"llvm.byval": "!llvm.array<128 x i8>", "llvm.align": "64 : i64", "nvvm.grid_constant": "unit"}


def tensor_map(lw: Lowering, param: TensorMapParam) -> mlir.Value:
    """The address of a tensor map (generic pointer); one parameter for all that are equal."""
    maps = state(lw).tensor_maps
    if param not in maps:
        entry = lw.fb.operation.regions[0].blocks[0]
        maps[param] = entry.add_argument(lw.fb.types.ptr(), lw.fb.module.location)
    return maps[param]


def append_parameters(lw: Lowering) -> tuple[TensorMapParam, ...]:
    """Give the function the parameters that `tensor_map` handed out; the maps in parameter order."""
    maps, fb = state(lw).tensor_maps, lw.fb
    if maps:
        _extend_signature(fb, len(maps))
    return tuple(maps)


def _extend_signature(fb: FunctionBuilder, count: int) -> None:
    attributes, module = fb.operation.attributes, fb.module
    arguments = list(fb.operation.regions[0].blocks[0].arguments)
    texts = ", ".join(str(a.type).removeprefix("!llvm.") for a in arguments)
    attributes["function_type"] = module.type_attribute(fb.types.parse(f"!llvm.func<void ({texts})>"))
    before = len(arguments) - count
    known = list(attributes["arg_attrs"]) if "arg_attrs" in attributes else []
    known += [mlir.DictAttr.get({}, context=module.context)] * (before - len(known))
    table = {name: module.attribute(text) for name, text in _ATTRIBUTES.items()}
    added = [mlir.DictAttr.get(table, context=module.context)] * count
    attributes["arg_attrs"] = mlir.ArrayAttr.get([*known, *added], context=module.context)
