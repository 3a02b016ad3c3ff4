"""From a kernel and the types of its arguments to an artifact."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from time import perf_counter
from typing import Any

from tilewright.compiler.artifact import Artifact, Entry, dump_folder, variant_of
from tilewright.compiler.environment import CHECK_SCHEDULE, DUMP_DIR
from tilewright.compiler.errors import PassFailure, write_reproducer
from tilewright.compiler.limits import check_spills, warn_of
from tilewright.compiler.options import CompileOptions
from tilewright.compiler.pool import shared_pool
from tilewright.compiler.worker import Request
from tilewright.frontend.build import build_module
from tilewright.frontend.definition import KernelDefinition
from tilewright.frontend.errors import ArgumentError
from tilewright.frontend.markers import TensorSpec, as_dtype
from tilewright.ir.core import UNKNOWN, IRError, Module
from tilewright.ir.printer import print_module
from tilewright.ir.target import Target, get_target
from tilewright.ir.types import ViewType
from tilewright.ir.verifier import verify
from tilewright.passes.manager import Collect, Dump, Instrument, PassContext, PassError, PassManager
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
    args = complete_types(definition, args)
    shared_pool().start(target)  # its imports overlap the frontend and the passes
    name = name or definition.name
    modules = []
    for number, variant in enumerate(alignment_variants(args)):
        entry = name if number == 0 else f"{name}_unaligned"
        modules.append(build_module(definition, variant, entry))
    return compile_modules(modules, target, options, start)


def complete_types(definition: KernelDefinition, args: Mapping[str, Any]) -> dict[str, Any]:
    """The argument types with names of dtypes resolved, and annotated scalars without a default that were left out."""
    complete = dict(args)
    for parameter in definition.parameters:
        given = complete.get(parameter.name)
        if parameter.kind in ("scalar", "plain") and isinstance(given, str):
            try:
                complete[parameter.name] = as_dtype(given)
            except ValueError as error:
                message = f"kernel '{definition.name}': parameter '{parameter.name}': {error}"
                raise ArgumentError(message, parameter.loc, length=len(parameter.name)) from None
        elif parameter.kind in ("tensor", "symmetric") and not isinstance(given, TensorSpec | ViewType | None):
            message = f"kernel '{definition.name}': parameter '{parameter.name}' is a tensor, got {given!r}"
            hint = 'describe it: tw.spec("f32", ("M", 64))'
            raise ArgumentError(message, parameter.loc, hint, len(parameter.name))
        elif parameter.dtype is not None and parameter.required and parameter.name not in complete:
            complete[parameter.name] = parameter.dtype
    return complete


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
    variant = variant_of([print_module(module) for module in modules], repr(options))
    for module in modules:
        name, collect = module.functions[0].name, Collect()
        instruments: list[Instrument] = [collect]
        if dump is not None:  # as the passes go, so that a failing one leaves its predecessors' files
            instruments.append(Dump(dump / dump_folder(name, target, variant)))
        _schedule(module, machine, options, instruments)
        passes[name] = collect.texts
    merged = Module([f for m in modules for f in m.functions], {"target": target})
    first = modules[0].functions[0]
    text = print_module(merged, locations=True)
    result = shared_pool().compile(Request(text, target, first.name, first.loc, merged))
    check_spills(result.entries, target, first.loc)
    warn_of(result.advisories, first.name, first.loc)
    artifact = _artifact(first.name, target, result, passes, start, variant)
    if dump is not None:
        artifact.dump(dump)
    return artifact


def run_passes(
    definition: KernelDefinition, target: str, args: Mapping[str, Any], options: CompileOptions
) -> dict[str, str]:
    """The IR of the first entry after each pass, by the pass's name, as in ``Artifact.ir``; no backend runs."""
    machine, collect = get_target(target), Collect()
    first = alignment_variants(complete_types(definition, args))[0]
    _schedule(build_module(definition, first), machine, options, [collect])
    return collect.texts


def compile_text(text: str, target: str | None = None, file: str = "<text>") -> Artifact:
    """Run the backend alone on scheduled IR text, such as a reproducer file.

    ``target`` defaults to the one that the module names. Errors point into ``file`` where the
    operations do not say where they come from. Raises `ParseError`, IRError or CompileError.
    """
    from tilewright.ir.parser import parse_module  # the grammar is not needed otherwise

    start = perf_counter()
    module = parse_module(text, file, text_locations=True)
    verify(module)
    if not module.functions:
        raise IRError(f"{file} has no function")
    first, named = module.functions[0], module.attributes.get("target")
    target = target or named
    if target is None:
        raise IRError("the module names no target", first.loc, 'write module {target = "sm_90a"}, or use --target')
    if named not in (None, target):
        raise IRError(f"the module was scheduled for {named}, not for {target}", first.loc, f"use --target {named}")
    get_target(target)
    request = Request(print_module(module, locations=True), target, first.name, first.loc, module)
    result = shared_pool().compile(request)
    warn_of(result.advisories, first.name, first.loc)
    return _artifact(first.name, target, result, {first.name: {"input": text}}, start)


def _artifact(
    name: str, target: str, result: Any, passes: Mapping[str, Mapping[str, str]], start: float, variant: str = ""
) -> Artifact:
    entries = tuple(Entry(abi, resources) for abi, resources in result.entries)
    return Artifact(name, target, result.binary, entries, dict(result.asm), passes, variant, perf_counter() - start)


def schedule(module: Module, target: Target, options: CompileOptions, instruments: Sequence[Instrument] = ()) -> Module:
    """Run the target's pipeline in place. Raises PassError."""
    context = PassContext(target, options.pass_options())
    return PassManager(default_pipeline(target, CHECK_SCHEDULE.get()), context, instruments).run(module)


def _schedule(module: Module, target: Target, options: CompileOptions, instruments: Sequence[Instrument]) -> None:
    """`schedule` with errors as users read them: the source line, and a reproducer where the compiler is at fault."""
    function = module.functions[0]
    try:
        schedule(module, target, options, instruments)
    except PassError as error:
        original = error.original
        loc = error.loc if error.loc != UNKNOWN else function.loc
        common: dict[str, Any] = {"stage": error.pass_name, "kernel": function.name, "target": target.name}
        if isinstance(original, IRError) and f"'{error.pass_name}' failed" in error.message:
            first, line_end, rest = original.message.partition("\n")
            where = f"(pass '{error.pass_name}' on kernel '{function.name}' for {target.name})"
            message = f"{first.removesuffix(':')} {where}{':' * first.endswith(':')}{line_end}{rest}"
            raise PassFailure(message, loc, error.hint, **common) from error
        path = write_reproducer(error.reproducer, function.name)
        pipeline = error.reproducer.partition("\n")[0].removeprefix("// RUN: opt -p ")
        given = {name: value for name, value in asdict(options).items() if value is not None}
        fixed = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        rerun = shlex.join(["tilewright", "opt", str(path), "--target", target.name, *fixed, "-p", pipeline])
        hint = error.hint or "a fault of the compiler: please report it"
        raise PassFailure(error.message, loc, hint, reproducer=path, rerun=rerun, **common) from error


__all__ = [
    "alignment_variants",
    "compile_definition",
    "compile_modules",
    "compile_text",
    "complete_types",
    "run_passes",
    "schedule",
]
