"""`tw.kernel`: a tile program that launches where its arrays live."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tilewright.compiler.artifact import Artifact
from tilewright.compiler.environment import INTERPRET
from tilewright.compiler.options import CompileOptions
from tilewright.frontend.arguments import BoundArguments, bind_arguments
from tilewright.frontend.build import build_module
from tilewright.frontend.definition import KernelDefinition
from tilewright.frontend.errors import ArgumentError
from tilewright.ir.core import Function
from tilewright.ir.types import DTYPES, ViewType
from tilewright.runtime.arguments import DevicePointer, canonical_dtype

Grid = int | Sequence[int] | Callable[[Mapping[str, Any]], int | Sequence[int]]

FAST_ALIGNMENT = 16


class Kernel:
    """A kernel definition with its compiled forms. ``kernel[grid](*args, **meta)`` launches it."""

    def __init__(self, fn: Callable[..., Any]):
        self.definition = KernelDefinition(fn)
        self.__name__, self.__doc__ = self.definition.name, fn.__doc__
        self._artifacts: dict[Any, Artifact] = {}
        self._functions: dict[Any, Function] = {}

    def __repr__(self) -> str:
        return f"<tilewright kernel {self.__name__}>"

    def __getitem__(self, grid: Grid) -> Launch:
        return Launch(self, grid, None)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"kernel '{self.__name__}' needs a grid: {self.__name__}[grid](...)")

    def artifact(self, types: Mapping[str, Any], target: str, options: CompileOptions) -> Artifact:
        """The artifact for argument types, compiled on first use."""
        key = (tuple(types.items()), target, options)
        found = self._artifacts.get(key)
        if found is None:
            from tilewright.compiler.driver import compile_definition

            found = self._artifacts[key] = compile_definition(self.definition, target, types, options)
        return found

    def function(self, types: Mapping[str, Any]) -> Function:
        """The Tile IR for argument types as the frontend builds it, which the interpreter runs."""
        key = tuple(types.items())
        found = self._functions.get(key)
        if found is None:
            found = self._functions[key] = build_module(self.definition, dict(types)).functions[0]
        return found


class Launch:
    """A kernel bound to a grid and a device (None: where the arrays live)."""

    def __init__(self, kernel: Kernel, grid: Grid, device: str | None):
        self.kernel, self.grid, self.device = kernel, grid, device

    def __call__(self, *args: Any, stream: Any = None, **kwargs: Any) -> None:
        options, arguments = CompileOptions.split(kwargs)
        bound = bind_arguments(self.kernel.definition, args, arguments)
        grid = resolve_grid(self.grid, bound.constexprs)
        device = self.device or where(bound.tensors)
        if device == "cpu" or INTERPRET.get():
            _interpret(self.kernel, bound, grid)
            return
        from tilewright.runtime.device import open_device

        opened = open_device(device)
        types = bound.types({name: view_type(value) for name, value in bound.tensors.items()})
        artifact = self.kernel.artifact(types, opened.target, options)
        values = [bound.tensors.get(p.name, bound.scalars.get(p.name)) for p in artifact.abi.params]
        artifact.launch(opened, grid, values, stream)


def resolve_grid(grid: Grid, meta: Mapping[str, Any]) -> tuple[int, int, int]:
    """Three sizes from an int, a tuple of up to three, or a function of the compile-time parameters."""
    given = grid(meta) if callable(grid) else grid
    sizes = (given,) if isinstance(given, int | np.integer) else tuple(given)
    if not 1 <= len(sizes) <= 3:
        raise ArgumentError(f"a grid has one to three dimensions, got {len(sizes)}")
    x, y, z = (*(int(n) for n in sizes), *(1,) * (3 - len(sizes)))
    if min(x, y, z) < 0:
        raise ArgumentError(f"grid {(x, y, z)} has a negative size")
    return x, y, z


def where(tensors: Mapping[str, Any]) -> str:
    """The device that holds the arrays: "cpu" or "cuda:N". ArgumentError when they are spread."""
    places = {name: _place(value) for name, value in tensors.items()}
    distinct = sorted(set(places.values()))
    if len(distinct) > 1:
        listing = ", ".join(f"{name} on {place}" for name, place in places.items())
        raise ArgumentError(f"the arrays of one launch live on several devices: {listing}", hint="move them to one")
    return distinct[0] if distinct else "cpu"


def _place(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return "cpu"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return f"cuda:{value.get_device()}" if value.is_cuda else "cpu"
    if isinstance(value, DevicePointer) or hasattr(value, "__cuda_array_interface__"):
        return "cuda:0"
    return "cpu"


def view_type(value: Any) -> ViewType:
    """The view type of an array: dynamic sizes, its unit stride, and 16-byte alignment where it has it."""
    view = tensor_view(value)
    dtype = DTYPES.get(canonical_dtype(view.dtype))
    if dtype is None:
        raise ArgumentError(f"arrays of {view.dtype} are not supported")
    unit = contiguous_axis(view.shape, view.strides)
    strides = tuple(1 if axis == unit else None for axis in range(len(view.shape)))
    steps = [s * dtype.bytes for axis, s in enumerate(view.strides) if axis != unit and view.shape[axis] > 1]
    aligned = all(n % FAST_ALIGNMENT == 0 for n in [view.address, *steps])
    return ViewType((None,) * len(view.shape), dtype, strides, FAST_ALIGNMENT if aligned else dtype.bytes)


def contiguous_axis(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The axis to address with stride one: the last that has it, preferring axes longer than one."""
    axes = [axis for axis, stride in enumerate(strides) if stride == 1]
    long = [axis for axis in axes if shape[axis] > 1]
    return (long or axes or [None])[-1]


def tensor_view(value: Any) -> Any:
    """Address, shape, strides (elements) and dtype of a NumPy array or a GPU tensor."""
    from tilewright.runtime.arguments import TensorView, read_tensor

    if isinstance(value, np.ndarray):
        steps = tuple(s // value.itemsize for s in value.strides)
        return TensorView(value.ctypes.data, value.shape, steps, value.dtype.name, None)
    return read_tensor(value, "tensor", sys.modules.get("torch"))[0]


def host_array(value: Any) -> np.ndarray[Any, Any]:
    """A NumPy array that shares memory with a NumPy array or a CPU torch tensor."""
    if isinstance(value, np.ndarray):
        return value
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if value.is_cuda:
            raise ArgumentError("a CUDA tensor cannot run on the cpu device", hint="move it with .cpu()")
        if str(value.dtype) in ("torch.bfloat16", "torch.float8_e4m3fn", "torch.float8_e5m2"):
            import ml_dtypes

            raw = torch.int16 if value.element_size() == 2 else torch.int8
            return value.detach().view(raw).numpy().view(getattr(ml_dtypes, str(value.dtype).removeprefix("torch.")))
        return np.asarray(value.detach().numpy())
    raise ArgumentError(f"expected a NumPy array or a CPU torch tensor, got {type(value).__name__}")


def _interpret(kernel: Kernel, bound: BoundArguments, grid: tuple[int, int, int]) -> None:
    from tilewright.ir.interpreter import run

    arrays = {name: host_array(value) for name, value in bound.tensors.items()}
    types = bound.types({name: view_type(value) for name, value in arrays.items()})
    run(kernel.function(types), {**arrays, **bound.scalars}, grid=grid)
