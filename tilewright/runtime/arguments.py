"""Launch arguments: reading array objects, checking them against the ABI, packing their bytes.

Nothing here knows a driver: CUDA and HIP take the same block of arguments, which is the one that
`tilewright.ir.abi` describes.
"""

from __future__ import annotations

import ctypes
import operator
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

from tilewright.ir.abi import KernelABI, ScalarParam, TensorParam
from tilewright.ir.types import DTYPES
from tilewright.runtime.errors import ArgumentError
from tilewright.runtime.peers import Endpoint, SymmetricPlace

INT32_MAX = 2**31 - 1
#: CUtensorMap: size and alignment of the value, in bytes
TENSOR_MAP_BYTES, TENSOR_MAP_ALIGN = 128, 64
#: bytes that the copy engine writes at once
LINE_PIECE = 16

_ALIASES = {
    "bool": "i1",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "float16": "f16",
    "bfloat16": "bf16",
    "float32": "f32",
    "float64": "f64",
    "float8_e4m3": "f8e4m3",
    "float8_e4m3fn": "f8e4m3",
    "float8_e5m2": "f8e5m2",
}
_TYPESTRS = {"b1": "i1", "i1": "i8", "i2": "i16", "i4": "i32", "i8": "i64", "f2": "f16", "f4": "f32", "f8": "f64"}
#: struct codes of scalars; bf16 is rounded to its bits first
_SCALAR_CODES = {
    "i1": "?",
    "i8": "b",
    "i16": "h",
    "i32": "i",
    "i64": "q",
    "f16": "e",
    "bf16": "H",
    "f32": "f",
    "f64": "d",
}


class TensorView(NamedTuple):
    """What a launch needs of a tensor: address in bytes; shape and strides in elements.

    ``dtype`` is a torch dtype or the name of a type, ``device`` the CUDA ordinal the memory lies
    on (-1: host memory, None: unknown). A view is hashable and says all that packing depends on,
    so it serves as the key of the launch caches. ``symmetric``: where the other ranks' tensors are, if it has them.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    device: int | None
    symmetric: SymmetricPlace | None = None


class Viewed:
    """Base of arguments that know their own views. No abstract class, of which every launch would ask at some cost."""

    @property
    def view(self) -> TensorView:
        """Where and how it lies. ArgumentError if it cannot be launched on."""
        raise NotImplementedError


@dataclass(frozen=True)
class DevicePointer(Viewed):
    """Device memory by its address, for callers without an array library.

    ``shape`` and ``strides`` count elements; without ``strides`` the tensor is row-major.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    dtype: str = "f32"

    @property
    def view(self) -> TensorView:
        shape = tuple(self.shape)
        strides = row_major(shape) if self.strides is None else tuple(self.strides)
        if len(strides) != len(shape):
            raise ArgumentError(f"DevicePointer has {len(shape)} dimensions but {len(strides)} strides.")
        return TensorView(self.address, shape, strides, self.dtype, None)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a dense row-major array."""
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


@lru_cache(maxsize=64)
def canonical_dtype(dtype: Any) -> str:
    """The IR's name of a dtype ("bf16") given that name, a NumPy-like name or a torch dtype.

    Names that the IR does not have ("uint16") come back as they are, for the error message.
    """
    name = str(dtype).removeprefix("torch.")
    return _ALIASES.get(name, name)


# -- reading -------------------------------------------------------------------------------------


def read_tensor(argument: Any, name: str, torch: ModuleType | None) -> tuple[TensorView, int | None]:
    """The view of an array object, and the stream that its producer asks us to wait for, if any.

    Understands `Viewed` arguments, torch tensors and ``__cuda_array_interface__`` (versions 2, 3).
    """
    if isinstance(argument, Viewed):
        return argument.view, None
    if isinstance(argument, getattr(torch, "Tensor", ())):
        return read_torch(argument, name), None
    if (interface := getattr(argument, "__cuda_array_interface__", None)) is not None:
        return _read_interface(interface, name)
    if hasattr(argument, "__array_interface__"):
        raise ArgumentError(
            f"Argument '{name}' is a {_type_name(argument)} in host memory: copy it to the GPU first, "
            "or launch on the cpu device."
        )
    raise ArgumentError(
        f"Argument '{name}' must be a tensor in GPU memory (a torch CUDA tensor, an object with "
        f"__cuda_array_interface__, or a DevicePointer), not {_type_name(argument)}."
    )


def read_torch(tensor: Any, name: str) -> TensorView:
    """The view of a torch tensor; ``device`` is -1 for one in host memory."""
    try:
        return TensorView(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device())
    except RuntimeError as error:  # fake, meta, sparse and functional tensors have no data pointer
        raise ArgumentError(f"Argument '{name}' is a torch tensor without memory of its own: {error}") from error


def _read_interface(data: dict[str, Any], name: str) -> tuple[TensorView, int | None]:
    typestr = data["typestr"]
    kind = typestr[1:]
    dtype = _TYPESTRS.get(kind)
    if dtype is None or typestr[0] == ">":
        raise ArgumentError(
            f"Argument '{name}' has the array-interface type {typestr!r}, which names none of ours: "
            "wrap its address in a DevicePointer that states the dtype."
        )
    shape = tuple(data["shape"])
    item = DTYPES[dtype].bytes
    steps = data.get("strides")
    if steps is None:
        strides = row_major(shape)
    elif any(step % item for step in steps):
        raise ArgumentError(f"Argument '{name}' has byte strides {tuple(steps)}, no multiples of {item}-byte items.")
    else:
        strides = tuple(step // item for step in steps)
    stream = data.get("stream")
    # the interface writes the legacy default stream as 1, drivers also as 0
    return TensorView(data["data"][0] or 0, shape, strides, dtype, None), 0 if stream == 1 else stream


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


# -- checking ------------------------------------------------------------------------------------


def check_tensor(param: TensorParam, view: TensorView, ordinal: int | None = None) -> None:
    """Raise `ArgumentError` unless ``view`` is what the kernel was compiled for.

    Strides of dimensions of extent one, and all strides of an empty tensor, are free: no address
    depends on them.
    """
    _check_device(param, view, ordinal)
    dtype = canonical_dtype(view.dtype)
    if dtype != param.dtype:
        raise ArgumentError(f"Argument '{param.name}' has dtype {dtype}; the kernel was compiled for {param.dtype}.")
    if len(view.shape) != len(param.shape):
        raise ArgumentError(
            f"Argument '{param.name}' has {len(view.shape)} dimensions {tuple(view.shape)}; "
            f"the kernel was compiled for {len(param.shape)}."
        )
    if param.symmetric and view.symmetric is None:
        raise ArgumentError(
            f"Argument '{param.name}' must be a tensor that every rank has: make it with the world's empty, zeros, "
            "flags or tensor."
        )
    if param.symmetric:
        _check_turns(param, view)
    for axis, (actual, static) in enumerate(zip(view.shape, param.shape, strict=True)):
        _check_extent(param, axis, actual, static)
    if 0 not in view.shape:
        _check_strides(param, view)
        _check_alignment(param, view)
        if breaks_lines(param, view):
            raise ArgumentError(
                f"Argument '{param.name}': lines of {_line(param, view)} elements are no multiple of the {LINE_PIECE} "
                "bytes that the kernel writes at once. Compile for an alignment of one element, or pass whole lines."
            )


def _check_turns(param: TensorParam, view: TensorView) -> None:
    """Kernels use a symmetric tensor's halves in turn or all of it, not both: others write to the one half already."""
    if view.symmetric is None:
        return
    if param.turns and view.shape[0] != 2:
        raise ArgumentError(
            f"Argument '{param.name}' has {view.shape[0]} parts along its first dimension; the kernel uses two in turn."
        )
    if view.symmetric.endpoint.turns.setdefault(view.symmetric, param.turns) != param.turns:
        uses = ("all of it", "its halves in turn")
        raise ArgumentError(
            f"Argument '{param.name}': the kernel uses {uses[param.turns]}, and one before it {uses[not param.turns]}, "
            "while other ranks write to it: give each a tensor of its own."
        )


def refuse_negative_strides(param: TensorParam, view: TensorView) -> None:
    """Raise `ArgumentError` for a reversed tensor: AMD kernels address tiles through buffer descriptors, forwards."""
    for axis, stride in enumerate(view.strides):
        if stride < 0 and view.shape[axis] > 1:
            raise ArgumentError(
                f"Argument '{param.name}' runs backwards along dimension {axis} (stride {stride}), which kernels for "
                "AMD GPUs do not support: copy the tensor first."
            )


def _check_device(param: TensorParam, view: TensorView, ordinal: int | None) -> None:
    if view.device is None or ordinal is None or view.device == ordinal:
        return
    if view.device < 0:
        raise ArgumentError(
            f"Argument '{param.name}' is in host memory; the launch is on cuda:{ordinal}: move it there (.cuda())."
        )
    raise ArgumentError(f"Argument '{param.name}' is on cuda:{view.device}; the launch is on cuda:{ordinal}.")


def _check_extent(param: TensorParam, axis: int, actual: int, static: int | None) -> None:
    if not 0 <= actual <= INT32_MAX:
        raise ArgumentError(
            f"Argument '{param.name}': dimension {axis} has {actual} elements; "
            f"a kernel takes at most {INT32_MAX} per dimension."
        )
    if static is not None and actual != static:
        raise ArgumentError(
            f"Argument '{param.name}': dimension {axis} has {actual} elements; the kernel was compiled for {static}."
        )


def _check_strides(param: TensorParam, view: TensorView) -> None:
    for axis, static in enumerate(param.strides):
        actual = view.strides[axis]
        if static is not None and actual != static and view.shape[axis] != 1:
            raise ArgumentError(
                f"Argument '{param.name}': dimension {axis} has a stride of {actual} elements; the kernel was "
                f"compiled for {static} (shape {tuple(view.shape)}, strides {tuple(view.strides)}). "
                "Pass a contiguous copy, or compile for these strides."
            )


def _check_alignment(param: TensorParam, view: TensorView) -> None:
    if view.address % param.alignment:
        raise ArgumentError(
            f"Argument '{param.name}': address {view.address:#x} is not a multiple of the {param.alignment} bytes "
            "that the kernel was compiled for. Pass an aligned copy (.clone())."
        )
    item = DTYPES[param.dtype].bytes
    for axis, static in enumerate(param.strides):
        step = view.strides[axis] * item
        if static is None and view.shape[axis] != 1 and step % param.alignment:
            raise ArgumentError(
                f"Argument '{param.name}': dimension {axis} has a stride of {view.strides[axis]} elements, {step} "
                f"bytes, no multiple of the {param.alignment} bytes that the kernel was compiled for."
            )


def breaks_lines(param: TensorParam, view: TensorView) -> bool:
    """Whether the copy engine would write behind the ends of a tensor's lines."""
    return param.whole_lines and _line(param, view) * DTYPES[param.dtype].bytes % LINE_PIECE != 0


def _line(param: TensorParam, view: TensorView) -> int:
    """Elements of a line."""
    return view.shape[param.strides.index(1)]


# -- packing -------------------------------------------------------------------------------------


def bf16_bits(value: float) -> int:
    """The bits of ``value`` rounded to bfloat16, nearest even. Overflow of f32 is an error."""
    number = float(value)
    (bits,) = struct.unpack("<I", struct.pack("<f", number))
    if number != number:
        return (bits >> 16) | 0x40  # keep it a NaN whatever the low payload bits were
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    if rounded & 0x7FFF == 0x7F80 and abs(number) != float("inf"):
        raise OverflowError("too large for bfloat16")
    return rounded


def _bool_bit(value: Any) -> bool:
    index = operator.index(value) if not hasattr(value, "dtype") else int(value)
    if index not in (0, 1):
        raise ValueError("not a bool")
    return bool(index)


_CONVERT: dict[str, Callable[[Any], Any]] = {"bf16": bf16_bits, "i1": _bool_bit}


@dataclass(frozen=True)
class ArgumentBlock:
    """The arguments of one launch: ``pointers`` is the address of the void*[] that drivers take.

    ``owner`` keeps the memory alive. Nothing writes to a block after its creation, so threads may
    launch with the same one.
    """

    pointers: int
    owner: Any
    offsets: tuple[int, ...]
    base: int

    def read(self, index: int, size: int) -> bytes:
        """The ``size`` bytes of argument ``index``, for tests and dumps."""
        return ctypes.string_at(self.base + self.offsets[index], size)

    def image(self, size: int) -> bytes:
        """All arguments as they lie in memory: ``size`` bytes, the layout's."""
        return ctypes.string_at(self.base, size)


class ArgumentLayout:
    """Where each argument of an ABI lies in its block, and how to write one."""

    def __init__(self, abi: KernelABI) -> None:
        self.abi = abi
        self.scalars = [p for p in abi.params if isinstance(p, ScalarParam)]
        unknown = [p for p in self.scalars if p.dtype not in _SCALAR_CODES]
        if unknown:
            raise ArgumentError(f"Parameter '{unknown[0].name}' of {abi.name} has no scalar type: {unknown[0].dtype}.")
        self._scalar_structs = [struct.Struct("<" + _SCALAR_CODES[p.dtype]) for p in self.scalars]
        self._all_scalars = struct.Struct("<" + "".join(_SCALAR_CODES[p.dtype] for p in self.scalars))
        self._converters = [(i, _CONVERT[p.dtype]) for i, p in enumerate(self.scalars) if p.dtype in _CONVERT]
        fields = [field for param in abi.params for field in _fields(param)]
        fields += ["i"] * 3 + (["i", "i", "Q", "Q"] if abi.communicates else [])
        fields += ["Q" if param.peers else f"{TENSOR_MAP_BYTES}s" for param in abi.tensor_maps]
        self.offsets, self._struct = _lay_out(fields)
        counts = [len(_fields(param)) for param in abi.params]
        #: where the first field of each parameter lies, and each tensor map
        self.starts = tuple(self.offsets[sum(counts[:i])] for i in range(len(counts)))
        self.map_starts = self.offsets[len(fields) - len(abi.tensor_maps) :]

    @property
    def size(self) -> int:
        """Bytes of all arguments together."""
        return self._struct.size

    def pack_scalars(self, values: Sequence[Any]) -> bytes:
        """The scalars' bytes, without padding. They are part of launch keys: 0.0 == -0.0, bytes differ."""
        try:
            if self._converters:
                converted = list(values)
                for index, convert in self._converters:
                    converted[index] = convert(values[index])
                return self._all_scalars.pack(*converted)
            return self._all_scalars.pack(*values)
        except (struct.error, OverflowError, TypeError, ValueError):
            self._explain(values)
            raise

    def _explain(self, values: Sequence[Any]) -> None:
        """Raise the error of the first scalar that does not fit its type."""
        for param, code, value in zip(self.scalars, self._scalar_structs, values, strict=True):
            try:
                code.pack(_CONVERT[param.dtype](value) if param.dtype in _CONVERT else value)
            except (struct.error, OverflowError, TypeError, ValueError) as error:
                raise ArgumentError(
                    f"Argument '{param.name}' = {value!r} ({_type_name(value)}) does not fit {param.dtype}."
                ) from error

    def pack(
        self,
        views: Sequence[TensorView],
        scalars: bytes,
        grid: tuple[int, int, int],
        maps: Sequence[bytes | int] = (),
        endpoint: Endpoint | None = None,
    ) -> ArgumentBlock:
        """A block of arguments in the order of the ABI. Views must have been checked.

        ``maps``: tensor maps, or where they lie for those of all ranks; ``endpoint``: of kernels that communicate.
        """
        values: list[Any] = []
        next_view, position = iter(views), 0
        for param in self.abi.params:
            if isinstance(param, TensorParam):
                values += _tensor_values(param, next(next_view))
            else:
                size = struct.calcsize(_SCALAR_CODES[param.dtype])
                values.append(scalars[position : position + size])
                position += size
        values += grid
        if endpoint is not None:
            values += [endpoint.rank, endpoint.size, endpoint.control, endpoint.controls_table]
        return self._write([*values, *maps])

    def _write(self, values: list[Any]) -> ArgumentBlock:
        count = len(self.offsets)
        memory = ctypes.create_string_buffer(self._struct.size + TENSOR_MAP_ALIGN)
        start = -ctypes.addressof(memory) % TENSOR_MAP_ALIGN
        self._struct.pack_into(memory, start, *values)
        base = ctypes.addressof(memory) + start
        pointers = (ctypes.c_void_p * count)(*[base + offset for offset in self.offsets])
        return ArgumentBlock(ctypes.addressof(pointers), (memory, pointers), self.offsets, base)


def _fields(param: TensorParam | ScalarParam) -> list[str]:
    """struct codes of the kernel arguments that one parameter becomes."""
    if isinstance(param, ScalarParam):
        return [f"{struct.calcsize(_SCALAR_CODES[param.dtype])}s"]  # packed, and checked, beforehand
    table = ["Q"] if param.symmetric else []
    return ["Q"] + ["i"] * param.shape.count(None) + ["q"] * param.strides.count(None) + table


def _lay_out(fields: Sequence[str]) -> tuple[tuple[int, ...], struct.Struct]:
    offsets: list[int] = []
    codes, end = "<", 0
    for code in fields:
        size = struct.calcsize("<" + code)
        offset = -(-end // min(size, TENSOR_MAP_ALIGN)) * min(size, TENSOR_MAP_ALIGN)
        codes += "x" * (offset - end) + code
        offsets.append(offset)
        end = offset + size
    return tuple(offsets), struct.Struct(codes)


def _tensor_values(param: TensorParam, view: TensorView) -> list[int]:
    extents = [actual for actual, static in zip(view.shape, param.shape, strict=True) if static is None]
    strides = [actual for actual, static in zip(view.strides, param.strides, strict=True) if static is None]
    table = [view.symmetric.table] if param.symmetric and view.symmetric is not None else []
    return [view.address, *extents, *strides, *table]


def endpoint_of(abi: KernelABI, views: Sequence[TensorView]) -> Endpoint | None:
    """The rank that a communicating kernel runs for, which its symmetric tensors know; None for other kernels."""
    if not abi.communicates:
        return None
    endpoints = {view.symmetric.endpoint for view in views if view.symmetric is not None}
    if len(endpoints) != 1:
        found = "tensors of several worlds" if endpoints else "no tensor of a world"
        raise ArgumentError(f"{abi.name} communicates, and its arguments are {found}: its ranks cannot be told.")
    return endpoints.pop()


# -- grids ---------------------------------------------------------------------------------------


def normalize_grid(grid: int | Sequence[int], kernel: str) -> tuple[int, int, int]:
    """Three block counts from one to three; missing ones are 1. Errors name the kernel."""
    extents = grid if isinstance(grid, Sequence) else (grid,)
    try:
        counts = tuple(operator.index(extent) for extent in extents)
    except TypeError:
        raise ArgumentError(f"The grid of {kernel} must be one to three integers, not {grid!r}.") from None
    if not 1 <= len(counts) <= 3:
        raise ArgumentError(f"The grid of {kernel} must have one to three dimensions, not {len(counts)}: {grid!r}.")
    if any(not 0 <= count <= INT32_MAX for count in counts):
        raise ArgumentError(f"The grid of {kernel} must count between 0 and {INT32_MAX} per dimension: {grid!r}.")
    x, y, z = (*counts, 1, 1)[:3]
    return x, y, z
