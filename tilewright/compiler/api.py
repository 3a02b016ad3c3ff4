"""The tools that users call besides the language: `tw.kernel`, `tw.compile`, `tw.device`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tilewright.compiler.artifact import Artifact
from tilewright.compiler.kernel import Kernel
from tilewright.compiler.launch import Grid
from tilewright.compiler.lookup import obtain
from tilewright.compiler.options import CompileOptions
from tilewright.frontend.errors import ArgumentError, suggestion
from tilewright.runtime.errors import DeviceError


def kernel(fn: Callable[..., Any]) -> Kernel:
    """Make a tile program of a Python function; launch it with ``fn[grid](*args, **meta)``.

    It runs where its arrays live: NumPy arrays and CPU tensors in the interpreter, CUDA tensors on
    their GPU. Options by name: ``num_warps``, ``num_stages``, ``num_ctas``, ``schedule``, ``stream``.
    """
    return Kernel(fn)


def compile(
    kernel: Kernel, target: str, args: Mapping[str, Any], *, name: str | None = None, **options: Any
) -> Artifact:
    """Compile ahead of time for ``target`` ("sm_90a", "gfx942", "gfx950").

    ``args`` maps parameters to ``tw.spec`` (tensors), dtypes (scalars) or values (constexprs with no
    default). ``options`` as on a launch. Raises CompileError with the place in the kernel's source.
    """
    if not isinstance(kernel, Kernel):
        raise TypeError(f"tw.compile takes a function under @tw.kernel, got {type(kernel).__name__}")
    if name is not None and not name.isidentifier():
        raise ArgumentError(f"name={name!r} cannot name an entry point", hint="use letters, digits and underscores")
    chosen, rest = CompileOptions.split(options)
    if rest:
        unknown, names = next(iter(rest)), CompileOptions.names()
        hint = suggestion(unknown, names) or f"options: {', '.join(sorted(names))}; a constexpr goes into args"
        raise ArgumentError(f"tw.compile has no option {unknown!r}", hint=hint)
    return obtain(kernel.definition, target, args, chosen, name)


class BoundDevice:
    """A device by name; `launch` runs a kernel there whatever the default would be."""

    def __init__(self, name: str):
        self.name = name

    def launch(self, kernel: Kernel, grid: Grid, *args: Any, **meta: Any) -> None:
        """``kernel[grid](*args, **meta)`` on this device."""
        kernel.bind(grid, self.name)(*args, **meta)

    def synchronize(self) -> None:
        """Wait for everything launched on this device."""
        if self.name != "cpu":
            from tilewright.runtime.device import open_device

            open_device(self.name).synchronize()

    def __repr__(self) -> str:
        return f"tw.device({self.name!r})"


def device(name: str) -> BoundDevice:
    """The device called ``name``: "cpu", "cuda:0", "hip:0", "emulate:gfx942". DeviceError when it does not exist."""
    if name != "cpu":
        from tilewright.runtime.device import open_device

        open_device(name)
    return BoundDevice(name)


def emulate(target: str, ranks: int = 1) -> BoundDevice:
    """The emulated device of a target, which takes NumPy arrays: ``emulate("gfx942")``."""
    if ranks != 1:
        raise DeviceError("Emulating several GPUs is not supported yet: leave out ranks.")
    return device(f"emulate:{target}")
