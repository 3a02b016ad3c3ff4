"""`tw.kernel`: a tile program and its compiled forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tilewright.compiler.artifact import Artifact
from tilewright.compiler.launch import Grid, Launch, Plan
from tilewright.compiler.lookup import obtain, types_text
from tilewright.compiler.options import CompileOptions
from tilewright.frontend.definition import KernelDefinition
from tilewright.frontend.errors import CompileError
from tilewright.ir.core import Function


class Kernel:
    """A kernel definition with its compiled forms. ``kernel[grid](*args, **meta)`` launches it."""

    #: what binding a grid gives
    launch_class: type[Launch] = Launch

    def __init__(self, fn: Callable[..., Any]):
        self.definition = KernelDefinition(fn)
        self.__name__, self.__doc__ = self.definition.name, fn.__doc__
        self.plans: dict[Any, Plan] = {}
        self.repeats: dict[Any, Callable[[Any], None]] = {}
        #: `tilewright.runtime.native.extension.Table` of launches, once there was one that it could hold
        self.table: Any = None
        self._artifacts: dict[Any, Artifact] = {}
        self._functions: dict[Any, Function] = {}
        self._names: tuple[tuple[str, ...], frozenset[str]] | None = None

    def __repr__(self) -> str:
        return f"<tilewright kernel {self.__name__}>"

    def __getitem__(self, grid: Grid) -> Launch:
        return self.launch_class(self, grid)

    def bind(self, grid: Grid, device: str | None = None) -> Launch:
        """``kernel[grid]``, on a device by name instead of where the arrays live."""
        return self.launch_class(self, grid, device)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"kernel '{self.__name__}' needs a grid: {self.__name__}[grid](...)")

    @property
    def positional_names(self) -> tuple[str, ...]:
        """Parameters that may be passed by position, in order."""
        return self._parameter_names()[0]

    @property
    def constexpr_names(self) -> frozenset[str]:
        """Compile-time parameters and compile options."""
        return self._parameter_names()[1]

    @property
    def chosen_names(self) -> frozenset[str]:
        """Compile-time parameters that a launch need not give since `tw.autotune` chooses them."""
        return frozenset()

    def _parameter_names(self) -> tuple[tuple[str, ...], frozenset[str]]:
        if self._names is None:  # parsing waits for the first launch, where its errors belong
            parameters = self.definition.parameters
            for p in parameters:
                if p.name in CompileOptions.names() | {"stream"}:
                    message = f"kernel '{self.__name__}' cannot have a parameter '{p.name}'"
                    raise CompileError(message, p.loc, "that is a launch option: rename the parameter", len(p.name))
            positional = tuple(p.name for p in parameters if not p.keyword_only)
            compile_time = {p.name for p in parameters if p.kind == "constexpr"}
            self._names = positional, frozenset(compile_time | CompileOptions.names())
        return self._names

    def artifact(self, types: Mapping[str, Any], target: str, options: CompileOptions) -> Artifact:
        """The artifact for argument types, from the disk cache or compiled on first use."""
        key = (types_text(types), target, options)
        found = self._artifacts.get(key)
        if found is None:
            found = self._artifacts[key] = obtain(self.definition, target, types, options)
        return found

    def function(self, types: Mapping[str, Any]) -> Function:
        """The Tile IR for argument types as the frontend builds it, which the interpreter runs."""
        key = types_text(types)
        found = self._functions.get(key)
        if found is None:
            from tilewright.frontend.build import build_module  # not for kernels that come from the cache

            found = self._functions[key] = build_module(self.definition, dict(types)).functions[0]
        return found
