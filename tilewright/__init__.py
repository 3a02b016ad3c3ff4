"""tilewright: tile programs in Python, compiled to GPU binaries.

The names of the language (`load`, `dot`, `float32`, ...) and the tools around it (`kernel`,
`compile`, `device`, ...) load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

#: public name -> module that defines it; every other public name belongs to the language
_TOOLS = {
    "Config": "tilewright.compiler.config",
    "autotune": "tilewright.compiler.autotune",
    "kernel": "tilewright.compiler.api",
    "compile": "tilewright.compiler.api",
    "device": "tilewright.compiler.api",
    "supports": "tilewright.compiler.api",
    "devices": "tilewright.runtime.device",
    "emulate": "tilewright.compiler.api",
    "recording": "tilewright.compiler.recording",
    "repeated": "tilewright.compiler.recording",
    "jit_cache": "tilewright.compiler.shipping",
    "Artifact": "tilewright.compiler.artifact",
    "torch_op": "tilewright.torch.operator",
    "DevicePointer": "tilewright.runtime.arguments",
    "DeviceError": "tilewright.runtime.errors",
    "World": "tilewright.compiler.world",
    "SymmetricTensor": "tilewright.runtime.symmetric",
    "CompileError": "tilewright.frontend.errors",
    "ArgumentError": "tilewright.frontend.errors",
    "PerformanceWarning": "tilewright.compiler.limits",
}
_LANGUAGE = "tilewright.frontend.language"


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        value = getattr(import_module(_TOOLS.get(name, _LANGUAGE)), name, None)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(f"tw.{name} needs PyTorch: pip install 'tilewright[torch]'", name="torch") from None
    if value is None:
        raise AttributeError(f"module 'tilewright' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    language = import_module(_LANGUAGE)
    return sorted([*_TOOLS, *language.EXPORTS, "__version__"])
