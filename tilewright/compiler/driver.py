"""From a kernel and the types of its arguments to an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from tilewright.compiler.artifact import Artifact, Entry
from tilewright.compiler.environment import DUMP_DIR
from tilewright.compiler.options import CompileOptions
from tilewright.compiler.worker import Request, shared_worker
from tilewright.frontend.build import build_module
from tilewright.frontend.definition import KernelDefinition
from tilewright.frontend.markers import TensorSpec
from tilewright.ir.core import Module
from tilewright.ir.printer import print_module
from tilewright.ir.target import Target, get_target
from tilewright.passes.manager import Collect, Dump, Instrument, PassContext, PassManager
from tilewright.passes.pipelines import default_pipeline

#: what the fast entry of a binary assumes of addresses and strides (bytes): that of TMA and of 16-byte vectors
FAST_ALIGNMENT = 16


def compile_definition(
    definition: KernelDefinition, target: str, args: Mapping[str, Any], options: CompileOptions, name: str | None = None
) -> Artifact:
    """Compile for argument types: `tw.spec` or ViewType of tensors, dtypes of scalars, values of constexprs.

    A spec without ``align`` gives two entries in one binary: one that assumes 16-byte alignment of
    addresses and strides, and one for all other values.
    """
    start = perf_counter()
    get_target(target)
    shared_worker().start()  # its imports overlap the frontend and the passes
    name = name or definition.name
    modules = []
    for number, variant in enumerate(alignment_variants(args)):
        entry = name if number == 0 else f"{name}_unaligned"
        modules.append(build_module(definition, variant, entry))
    return compile_modules(modules, target, options, start)


def alignment_variants(args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The argument types of each entry: aligned first, then with nothing assumed."""
    open_specs = [k for k, v in args.items() if isinstance(v, TensorSpec) and v.align is None]
    fast, general = dict(args), dict(args)
    for key, value in args.items():
        if isinstance(value, TensorSpec):
            view = value.view_type()
            fast[key] = replace(view, align=FAST_ALIGNMENT if value.align is None else value.align)
            general[key] = replace(view, align=view.dtype.bytes if value.align is None else value.align)
    return [fast, general] if open_specs else [fast]


def compile_modules(modules: Sequence[Module], target: str, options: CompileOptions, start: float) -> Artifact:
    """Run the passes on each module, and the backend on all of them together: one binary with an entry each."""
    machine = get_target(target)
    dump = DUMP_DIR.get()
    passes: dict[str, Mapping[str, str]] = {}
    for module in modules:
        name, collect = module.functions[0].name, Collect()
        instruments: list[Instrument] = [collect]
        if dump is not None:  # as the passes go, so that a failing one leaves its predecessors' files
            instruments.append(Dump(dump / f"{name}-{target}"))
        schedule(module, machine, options, instruments)
        passes[name] = collect.texts
    merged = Module([f for m in modules for f in m.functions], {"target": target})
    result = shared_worker().compile(Request(print_module(merged, locations=True), target))
    artifact = _artifact(modules[0].functions[0].name, target, result, passes, start)
    if dump is not None:
        artifact.dump(dump)
    return artifact


def compile_text(text: str, target: str) -> Artifact:
    """Run the backend alone on scheduled IR text, such as a reproducer file."""
    start = perf_counter()
    result = shared_worker().compile(Request(text, target))
    name = result.abi.name
    return _artifact(name, target, result, {name: {"input": text}}, start)


def _artifact(name: str, target: str, result: Any, passes: Mapping[str, Mapping[str, str]], start: float) -> Artifact:
    entries = tuple(Entry(abi, resources) for abi, resources in result.entries)
    return Artifact(name, target, result.binary, entries, dict(result.asm), passes, perf_counter() - start)


def schedule(
    module: Module, target: Target, options: CompileOptions, instruments: Sequence[Instrument] = ()
) -> Module:
    """Run the target's pipeline in place."""
    context = PassContext(target, options.pass_options())
    return PassManager(default_pipeline(target), context, instruments).run(module)


__all__ = ["alignment_variants", "compile_definition", "compile_modules", "schedule"]
