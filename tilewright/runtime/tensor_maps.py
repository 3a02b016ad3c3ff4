"""CUtensorMap values: which part of a tensor one TMA copy moves.

The limits come from the CUDA driver API, `cuTensorMapEncodeTiled`: rank 1 to 5, addresses and
strides of 16 bytes, boxes of at most 256 elements a dimension, the box's innermost row no longer
than the swizzle.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tilewright.ir.abi import TensorMapParam
from tilewright.ir.types import DTYPES
from tilewright.runtime.arguments import TENSOR_MAP_BYTES, TensorView, canonical_dtype
from tilewright.runtime.errors import ArgumentError, DeviceError
from tilewright.runtime.lru import LRU

#: the ends of CU_TENSOR_MAP_DATA_TYPE names
ELEMENT_TYPES = {
    "i1": "UINT8",
    "i8": "UINT8",
    "f8e4m3": "UINT8",
    "f8e5m2": "UINT8",
    "i16": "UINT16",
    "i32": "INT32",
    "i64": "INT64",
    "f16": "FLOAT16",
    "bf16": "BFLOAT16",
    "f32": "FLOAT32",
    "f64": "FLOAT64",
}
_SWIZZLES = {0: "NONE", 32: "32B", 64: "64B", 128: "128B"}
_MAX_STRIDE = 2**40


@dataclass(frozen=True)
class TensorMapGeometry:
    """A tensor map's numbers, innermost dimension first.

    ``dims`` and ``box`` count elements; ``strides`` are bytes and leave out the innermost
    dimension, whose stride is one element.
    """

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


def tensor_map_geometry(param: TensorMapParam, view: TensorView) -> TensorMapGeometry:
    """Reorder a view for cuTensorMapEncodeTiled, and check what the TMA unit demands.

    An empty tensor, of which TMA has no notion, becomes a single element: `TensorMapEncoder` puts
    it on a zeroed spare cell.
    """
    item = DTYPES[canonical_dtype(view.dtype)].bytes
    _check_order(param, view)
    box = tuple(param.box[axis] for axis in param.order)
    _check_box(param, box, item)
    shape = (1,) * len(view.shape) if 0 in view.shape else view.shape
    dims = tuple(shape[axis] for axis in param.order)
    strides: list[int] = []
    reach = item  # bytes that the dimensions so far span, for strides that no address depends on
    for position, axis in enumerate(param.order):
        step = view.strides[axis] * item
        if shape[axis] == 1:
            step = item if position == 0 else -(-reach // 16) * 16
        _check_stride(param, axis, position, step, item)
        if position > 0:
            strides.append(step)
        reach = max(reach, step * shape[axis])
    if view.address % 16 and 0 not in view.shape:
        raise ArgumentError(
            f"Argument '{param.param}': address {view.address:#x} is not a multiple of 16 bytes, which TMA needs. "
            "Pass an aligned copy (.clone())."
        )
    return TensorMapGeometry(dims, tuple(strides), box)


def _check_order(param: TensorMapParam, view: TensorView) -> None:
    rank = len(view.shape)
    if not 1 <= rank <= 5 or len(param.box) != rank or sorted(param.order) != list(range(rank)):
        raise ArgumentError(
            f"Tensor map of '{param.param}': box {param.box} and order {param.order} do not describe a tensor of "
            f"rank {rank} (TMA takes ranks 1 to 5)."
        )


def _check_box(param: TensorMapParam, box: tuple[int, ...], item: int) -> None:
    row = box[0] * item
    if any(not 1 <= extent <= 256 for extent in box):
        raise ArgumentError(f"Tensor map of '{param.param}': box {param.box} is not within 1 to 256 per dimension.")
    if row % 16 or (param.swizzle and row > param.swizzle):
        limit = f" and at most the swizzle's {param.swizzle}" if param.swizzle else ""
        raise ArgumentError(
            f"Tensor map of '{param.param}': the box's innermost row has {row} bytes; "
            f"TMA needs a multiple of 16{limit}."
        )


def _check_stride(param: TensorMapParam, axis: int, position: int, step: int, item: int) -> None:
    if position == 0 and step != item:
        raise ArgumentError(
            f"Argument '{param.param}': dimension {axis} must be contiguous for its TMA copy, but has a stride of "
            f"{step // item} elements."
        )
    if position > 0 and (step % 16 or not 0 <= step < _MAX_STRIDE):
        raise ArgumentError(
            f"Argument '{param.param}': dimension {axis} has a stride of {step} bytes; TMA needs a multiple of 16 "
            "from 0 to below 2**40. Pad the rows, or pass a contiguous copy."
        )


class TensorMapEncoder:
    """Encodes tensor maps through the driver and keeps the last ``capacity`` of them.

    ``call(name, *args)`` invokes a driver function and returns its value; ``spare_cell`` gives the
    address of 16 zeroed bytes of device memory, asked for when an empty tensor comes by.
    """

    def __init__(
        self, driver: Any, call: Callable[..., Any], spare_cell: Callable[[], int], capacity: int = 1024
    ) -> None:
        self._driver = driver
        self._call = call
        self._spare_cell = spare_cell
        self.cache: LRU[tuple[Any, ...], bytes] = LRU(capacity)

    def encode(self, param: TensorMapParam, view: TensorView) -> bytes:
        """The 128 bytes of the map of ``view``, from the cache where it has been encoded before."""
        key = (view.address, view.shape, view.strides, view.dtype, param.box, param.order, param.swizzle)
        return self.cache.get(key) or self.cache.put(key, self._encode(param, view))

    def kinds(self, param: TensorMapParam, view: TensorView) -> tuple[Any, Any]:
        """The driver's constants for the element type and the swizzle."""
        element = ELEMENT_TYPES[canonical_dtype(view.dtype)]
        return (
            getattr(self._driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{element}"),
            getattr(self._driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{_SWIZZLES[param.swizzle]}"),
        )

    def _encode(self, param: TensorMapParam, view: TensorView) -> bytes:
        geometry = tensor_map_geometry(param, view)
        driver, rank = self._driver, len(geometry.dims)
        element, swizzle = self.kinds(param, view)
        address = self._spare_cell() if 0 in view.shape else view.address
        try:
            value = self._call(
                "cuTensorMapEncodeTiled",
                element,
                rank,
                address,
                [driver.cuuint64_t(extent) for extent in geometry.dims],
                [driver.cuuint64_t(step) for step in geometry.strides],
                [driver.cuuint32_t(extent) for extent in geometry.box],
                [driver.cuuint32_t(1)] * rank,
                driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        except DeviceError as error:
            raise DeviceError(f"Tensor map of '{param.param}' ({geometry}): {error}", error.code) from error
        return ctypes.string_at(int(value.getPtr()), TENSOR_MAP_BYTES)
