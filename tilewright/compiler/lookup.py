"""Artifacts by what they are made of: from the disk cache, else compiled.

A hit needs the kernel's source and the cached file alone: neither frontend, passes nor backends run
or are imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from tilewright.compiler import shipping
from tilewright.compiler.artifact import Artifact
from tilewright.compiler.cache import disk_cache
from tilewright.compiler.environment import ALWAYS_COMPILE, DUMP_DIR
from tilewright.compiler.options import CompileOptions
from tilewright.compiler.version import compiler_version, edited_since_start
from tilewright.frontend.definition import KernelDefinition, constant_text
from tilewright.frontend.errors import CompileError
from tilewright.frontend.markers import TensorSpec
from tilewright.ir.types import ScalarType, ViewType


def obtain(
    definition: KernelDefinition, target: str, args: Mapping[str, Any], options: CompileOptions, name: str | None = None
) -> Artifact:
    """The artifact of `tilewright.compiler.driver.compile_definition`, which runs only where the cache has none."""
    start = perf_counter()
    cache = disk_cache()
    key = None if cache is None else cache_key(definition, target, args, options, name)
    shipping_key = portable_key(definition, target, args, options, name) if shipping.is_open() else None
    if not ALWAYS_COMPILE.get():
        found = shipping.shipped(shipping_key) if shipping_key is not None else None
        if found is None and cache is not None and key is not None:
            found = cache.load(key)
            if found is not None and shipping_key is not None:
                shipping.ship(shipping_key, found)
        if found is not None:
            found.seconds = perf_counter() - start
            dump = DUMP_DIR.get()
            if dump is not None:
                found.dump(dump)
            return found
    searched = shipping.missing_compiler()
    if searched is not None:
        message = f"kernel '{definition.name}' for {target} is not in {searched}, and no compiler is installed here"
        raise CompileError(
            message, definition.loc, "run once with the compiler and tw.jit_cache open, and copy the folder"
        )
    from tilewright.compiler.driver import compile_definition

    artifact = compile_definition(definition, target, args, options, name)
    if not edited_since_start():
        if cache is not None and key is not None:
            cache.store(key, artifact)
        if shipping_key is not None:
            shipping.ship(shipping_key, artifact)
    return artifact


def cache_key(
    definition: KernelDefinition, target: str, args: Mapping[str, Any], options: CompileOptions, name: str | None = None
) -> str | None:
    """A digest of all that the compiled code depends on; None if a constant has no text that identifies it."""
    given = _given(definition, target, args, options, name)
    return None if given is None else _digest([compiler_version(), *given])


def portable_key(
    definition: KernelDefinition, target: str, args: Mapping[str, Any], options: CompileOptions, name: str | None = None
) -> str | None:
    """`cache_key` but for what the compiler is and where sources lie: the same on all machines."""
    given = _given(definition, target, args, options, name, places=False)
    return None if given is None else _digest(["any compiler", *given])


def _given(
    definition: KernelDefinition,
    target: str,
    args: Mapping[str, Any],
    options: CompileOptions,
    name: str | None,
    places: bool = True,
) -> list[str] | None:
    dependencies = definition.dependencies()
    values = types_text(args, places)
    if any(map(_nameless, [values, *map(constant_text, dependencies.constants.values())])):
        return None
    return [dependencies.digest(places), target, repr(options), name or definition.name, values]


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def types_text(args: Mapping[str, Any], places: bool = True) -> str:
    """Argument types and compile-time values as a text that differs wherever the compiled code may (1 from True).

    Without ``places`` functions are the same wherever their files lie.
    """
    return "\n".join(f"{name} = {_type_text(args[name], places)}" for name in sorted(args))


def _type_text(value: Any, places: bool) -> str:
    if isinstance(value, TensorSpec):
        return f"spec {value.view_type()} align={value.align}"
    if isinstance(value, ViewType | ScalarType):
        return f"type {value}"
    return constant_text(value, places)


def _nameless(text: str) -> bool:
    """Whether an object is described by its address, which another process gives to something else."""
    return " at 0x" in text
