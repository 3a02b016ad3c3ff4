"""The LLVM function of a kernel: parameters in the order of `tilewright.ir.abi`, and the kernel attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tilewright.backends.lower.context import Handler, Lowering, ViewRef
from tilewright.backends.lower.occupancy import waiting_words
from tilewright.backends.lower.target_ops import TargetOps
from tilewright.backends.mlir_builder import FunctionBuilder, Module
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir.abi import KernelABI, ScalarParam, TensorMapParam, TensorParam
from tilewright.ir.async_ops import AsyncDot, AwaitGrid, BulkStore, Role
from tilewright.ir.comm_ops import takes_turns, view_root
from tilewright.ir.core import Function, IRError, Operation, Value, uses_of
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Dot
from tilewright.ir.types import ScalarType, Type, ViewType, i1

SHARED_SYMBOL = "smem"
#: kernels without matrix products leave room for blocks that wait at other barriers: threads of an SM, and the words of
#: tiles that each may hold at a reduction to be one of them (more would spill; with fewer ptxas leaves room by itself)
SHARED_OUT = {1024: range(24, 33), 512: range(48, 105)}
#: most threads of a block that leaves room
PAIRED_THREADS = 256
#: with more threads two blocks on an SM leave a thread fewer than 64 registers
MOST_PAIRED_THREADS = 512
#: AMD allots registers in such steps (LLVM, "User Guide for AMDGPU Backend", granulated_workitem_vgpr_count)
REGISTER_GRANULE = 8


@dataclass(frozen=True)
class WorldRef:
    """The ranks that run the kernel. Pointers are !llvm.ptr<1>, numbers i32."""

    rank: mlir.Value
    size: mlir.Value
    #: the own control block, and where the address of each rank's lies (see `tilewright.ir.abi.Control`)
    control: mlir.Value
    controls: mlir.Value
    #: the number of this launch, behind `tilewright.ir.comm_ops.Enter`
    launch: mlir.Value | None = None
    #: and what a credit is likely to ask for: a rank's `Control.ENTERED` in each lane of the first warp
    entered: mlir.Value | None = None


@dataclass
class KernelEntry:
    """A kernel under construction: its MLIR module, its builder, and what its parameters lowered to."""

    module: Module
    fb: FunctionBuilder
    abi: KernelABI
    #: function parameter -> `ViewRef` or scalar
    params: dict[Value, Any]
    #: the grid arguments x, y, z (i32)
    grid: list[mlir.Value]
    #: generic pointers to the tensor maps, in the order of ``abi.tensor_maps``; with ``peers``, to those of all ranks
    tensor_maps: list[mlir.Value]
    #: of a kernel that communicates
    world: WorldRef | None = None
    _shared: str | None = field(default=None)

    def shared_symbol(self, size: int | None) -> str:
        """The symbol of the block's shared memory (``size`` as in `Module.shared_global`), declared at first use."""
        if self._shared is None:
            self._shared = self.module.shared_global(SHARED_SYMBOL, size)
        return self._shared

    def tensor_map(self, wanted: TensorMapParam) -> mlir.Value:
        """The pointer to one tensor map; KeyError for one that `declare_kernel` was not told of."""
        try:
            return self.tensor_maps[self.abi.tensor_maps.index(wanted)]
        except ValueError:
            raise KeyError(f"{wanted} is not among the kernel's tensor maps") from None


def block_threads(function: Function, target: Target) -> int:
    """Threads of a block: the attribute ``threads``, or ``num_warps`` warps."""
    threads = function.attributes.get("threads") or function.attributes.get("num_warps", 0) * target.warp_size
    if not threads or threads % target.warp_size or threads > 1024:
        raise IRError(f"@{function.name} has {threads} threads: set num_warps", function.loc)
    return int(threads)


def declare_kernel(
    function: Function,
    target: Target,
    name: str | None = None,
    tensor_maps: Sequence[TensorMapParam] = (),
    llvm_attributes: Mapping[str, str] | None = None,
) -> KernelEntry:
    """Begin the kernel's LLVM function and lower its parameters. ``llvm_attributes``: for LLVM's own target (AMD)."""
    threads, uses = block_threads(function, target), uses_of(function.body)
    copied = {view_root(op.view) for op in function.walk() if isinstance(op, BulkStore)}
    abi = KernelABI(
        name=name or function.name,
        params=tuple(_abi_param(p, uses, p in copied) for p in function.params),
        threads=threads,
        shared_bytes=int(function.attributes.get("shared_bytes", 0)),
        tensor_maps=tuple(tensor_maps),
        persistent=bool(function.attributes.get("persistent", False)),
        blocks_per_unit=int(function.attributes.get("blocks_per_unit", 1)),
        cluster=_cluster(function),
        spread=int(function.attributes["num_ctas"]) if function.attributes.get("spread") else 1,
        communicates=bool(function.attributes.get("communicates", False)),
        awaits_grid=any(isinstance(op, AwaitGrid) for op in function.body.block.ops),
        source=function.loc.file,
    )
    module = Module(target.triple, function.loc.file, function.loc.line)
    types, attributes = _signature(module, function, abi)
    kernel_attributes = _kernel_attributes(function, target, threads, llvm_attributes or {})
    fb = module.function(abi.name, types, kernel_attributes, attributes)
    arguments = iter(fb.arguments)
    params = {p: _lower_param(fb, p, arguments) for p in function.params}
    grid = [next(arguments) for _ in range(3)]
    world = WorldRef(*(next(arguments) for _ in range(4))) if abi.communicates else None
    return KernelEntry(module, fb, abi, params, grid, list(arguments), world)


def start_lowering(
    entry: KernelEntry, function: Function, target: Target, ops: TargetOps, table: Mapping[type[Operation], Handler]
) -> Lowering:
    """A context in which the function's parameters are defined; enter a scope before lowering its body."""
    lowering = Lowering(function, target, ops, entry, table)
    for param, lowered in entry.params.items():
        lowering.define(param, lowered)
    return lowering


def _cluster(function: Function) -> tuple[int, int, int]:
    """How many programs along each axis of the grid run in one cluster."""
    shape = [1, 1, 1]
    if function.attributes.get("spread"):
        return (1, 1, 1)
    shape[int(function.attributes.get("cluster_axis", 0))] = int(function.attributes.get("num_ctas", 1))
    return (shape[0], shape[1], shape[2])


# --- parameters -----------------------------------------------------------------------------------


def _abi_param(param: Value, uses: dict[Value, list[Operation]], copied: bool) -> TensorParam | ScalarParam:
    type_ = param.type
    if isinstance(type_, ViewType):
        turns = type_.symmetric and takes_turns(param, uses)
        return TensorParam(
            param.hint, str(type_.dtype), type_.shape, type_.strides, type_.align, type_.symmetric, turns, copied
        )
    if isinstance(type_, ScalarType):
        return ScalarParam(param.hint, str(type_.dtype))
    raise IRError(f"a kernel cannot have a parameter of type {type_}")


def _signature(module: Module, function: Function, abi: KernelABI) -> tuple[list[Any], list[dict[str, str]]]:
    """MLIR types and attributes of all arguments."""
    types = module.types
    arguments: list[tuple[Any, dict[str, str]]] = []
    for param in function.params:
        arguments += _argument_types(module, param.type)
    arguments += [(types.i32, {}) for _ in range(3)]
    if abi.communicates:
        arguments += [(types.i32, {}), (types.i32, {}), (types.ptr(1), {}), (types.ptr(1), {})]
    by_value = {"llvm.byval": "!llvm.array<128 x i8>", "llvm.align": "64 : i64", "nvvm.grid_constant": "unit"}
    arguments += [(types.ptr(), {} if param.peers else by_value) for param in abi.tensor_maps]
    return [type_ for type_, _ in arguments], [attributes for _, attributes in arguments]


def _argument_types(module: Module, type_: Type) -> list[tuple[Any, dict[str, str]]]:
    types = module.types
    if isinstance(type_, ViewType):
        align = {"llvm.align": f"{type_.align} : i64"} if type_.align > 1 else {}
        dims: list[tuple[Any, dict[str, str]]] = [(types.i32, {}) for size in type_.shape if size is None]
        strides: list[tuple[Any, dict[str, str]]] = [(types.i64, {}) for stride in type_.strides if stride is None]
        table: list[tuple[Any, dict[str, str]]] = [(types.ptr(1), {})] if type_.symmetric else []
        return [(types.ptr(1), align), *dims, *strides, *table]
    assert isinstance(type_, ScalarType)
    return [(types.i8 if type_.dtype == i1 else types.dtype(type_.dtype.name), {})]


def _lower_param(fb: FunctionBuilder, param: Value, arguments: Any) -> Any:
    type_ = param.type
    if isinstance(type_, ScalarType):
        value = next(arguments)
        return fb.icmp("ne", value, 0) if type_.dtype == i1 else value
    assert isinstance(type_, ViewType)
    base = next(arguments)
    shape = tuple(next(arguments) if size is None else size for size in type_.shape)
    strides = tuple(next(arguments) if stride is None else stride for stride in type_.strides)
    return ViewRef(
        base=base,
        dtype=type_.dtype,
        shape=shape,
        strides=strides,
        origin=(0,) * type_.rank,
        align=type_.align,
        stride_align=type_.align,
        root=param.hint,
        root_dims=tuple(range(type_.rank)),
        table=next(arguments) if type_.symmetric else None,
    )


# --- kernel attributes ------------------------------------------------------------------------------


def _kernel_attributes(function: Function, target: Target, threads: int, extra: Mapping[str, str]) -> dict[str, str]:
    if target.vendor == "nvidia":
        return _nvidia_attributes(function, threads)
    return _amd_attributes(function, target, threads, extra)


def _nvidia_attributes(function: Function, threads: int) -> dict[str, str]:
    attributes = {"nvvm.kernel": "unit", "nvvm.maxntid": f"array<i32: {threads}, 1, 1>"}
    ctas = int(function.attributes.get("num_ctas", 1))
    if ctas > 1:
        attributes["nvvm.cluster_dim"] = f"array<i32: {ctas}, 1, 1>"
    if (limit := function.attributes.get("maxnreg")) is not None:
        attributes["nvvm.maxnreg"] = f"{limit} : i32"
    if any(isinstance(op, Role) and op.registers for op in function.walk()):
        # setmaxnreg needs a launch bound, from which ptxas takes the registers at entry
        attributes["nvvm.minctasm"] = f"{function.attributes.get('blocks_per_unit', 1)} : i32"
    elif limit is None and threads <= PAIRED_THREADS and (wanted := _shared_out(function)) is not None:
        # one block's loads run while another waits at its barriers
        attributes["nvvm.minctasm"] = f"{wanted // threads} : i32"
    elif threads > MOST_PAIRED_THREADS or any(isinstance(op, Dot) for op in function.walk()):
        attributes["nvvm.minctasm"] = "1 : i32"  # or ptxas spills, accumulators say, to make room for a second block
    return attributes


def _shared_out(function: Function) -> int | None:
    """How many threads an SM should have: more than one block's where there are no matrix products and tiles spare
    registers; None: as ptxas finds best."""
    if any(isinstance(op, Dot | AsyncDot | Role) for op in function.walk()):
        return None
    words = waiting_words(function)
    return next((threads for threads, fitting in SHARED_OUT.items() if words in fitting), None)


def _amd_attributes(function: Function, target: Target, threads: int, extra: Mapping[str, str]) -> dict[str, str]:
    """A fixed block size; as few waves as a block needs on each of the CU's four SIMDs, so that registers are free.

    More where ``maxnreg`` bounds a thread's registers: the compiler leaves room for the waves that it is told of.
    """
    waves = max(1, threads // target.warp_size // 4)
    if limit := function.attributes.get("maxnreg"):
        while target.registers_per_thread // waves // REGISTER_GRANULE * REGISTER_GRANULE > limit:
            waves += 1
    passed = {"uniform-work-group-size": "true", "amdgpu-no-hostcall-ptr": "", **extra}
    return {
        "rocdl.kernel": "unit",
        "rocdl.flat_work_group_size": f'"{threads},{threads}"',
        "rocdl.reqd_work_group_size": f"array<i32: {threads}, 1, 1>",
        "rocdl.waves_per_eu": f"{waves} : i32",
        "passthrough": "[" + ", ".join(f'["{name}", "{value}"]' for name, value in passed.items()) + "]",
    }
