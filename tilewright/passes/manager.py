"""Passes, the text form of pipelines, and the pass manager with its instruments.

A pass turns a valid module into another, in place. Its arguments are the typed fields of a frozen
dataclass, so that pipelines have a text form::

    @register_pass("pipeline")
    class Pipeline(Pass):
        num_stages: int | None = None

        def run(self, module: Module, context: PassContext) -> None: ...

    parse_pipeline("canonicalize,pipeline{num-stages=4},dce")
"""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from tilewright.ir.core import UNKNOWN, Function, IRError, Module
from tilewright.ir.printer import print_module
from tilewright.ir.target import Target


@dataclass(frozen=True)
class PassOptions:
    """What the user fixed by name; None leaves the choice to the passes."""

    num_warps: int | None = None
    num_stages: int | None = None
    num_ctas: int | None = None
    schedule: str | None = None
    persistent: bool | None = None
    maxnreg: int | None = None


@dataclass(frozen=True)
class PassContext:
    """What every pass may ask for. There is no other state between passes than the module."""

    target: Target
    options: PassOptions = PassOptions()


class Pass(ABC):
    """A transformation of a module. Subclasses are frozen dataclasses made by `register_pass`."""

    name: ClassVar[str] = ""

    @abstractmethod
    def run(self, module: Module, context: PassContext) -> None:
        """Rewrite ``module`` in place; raise `IRError` where the program cannot be compiled."""

    def __str__(self) -> str:
        return pass_text(self)


class FunctionPass(Pass):
    """A pass that treats each function on its own."""

    def run(self, module: Module, context: PassContext) -> None:
        for function in module.functions:
            self.run_on_function(function, context)

    @abstractmethod
    def run_on_function(self, function: Function, context: PassContext) -> None:
        """Rewrite one function in place."""


#: pass name -> class. Filled by `register_pass` when the files of tilewright/passes are imported.
PASSES: dict[str, type[Pass]] = {}

P = TypeVar("P", bound=Pass)


@dataclass_transform(frozen_default=True)
def register_pass(name: str) -> Callable[[type[P]], type[P]]:
    """Make a class a frozen dataclass (unless it is one) and register it under ``name``."""

    def register(cls: type[P]) -> type[P]:
        other = PASSES.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"two passes are called {name!r}: {other.__module__} and {cls.__module__}")
        if "__dataclass_params__" not in vars(cls):
            cls = dataclass(frozen=True)(cls)
        cls.name = name
        PASSES[name] = cls
        return cls

    return register


# --- text form of pipelines -------------------------------------------------------------------


class PipelineError(ValueError):
    """The text of a pipeline is wrong: unknown pass, unknown argument or a value of the wrong type."""


def parse_pipeline(text: str) -> list[Pass]:
    """Read ``a,b{num-stages=4 flag=true},c``. Arguments are separated by commas or spaces."""
    return [_parse_pass(item) for item in _split(text, ",") if item]


def pipeline_text(passes: Sequence[Pass]) -> str:
    """The inverse of `parse_pipeline`; arguments that have their default value are left out."""
    return ",".join(pass_text(p) for p in passes)


def pass_text(pass_: Pass) -> str:
    """One pass as pipeline text, for example ``pipeline{num-stages=4}``."""
    parts = []
    for f in fields(pass_):  # type: ignore[arg-type]  # every registered pass is a dataclass
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        value = getattr(pass_, f.name)
        if type(value) is not type(default) or value != default:
            parts.append(f"{_dashed(f.name)}={_value_text(value)}")
    return pass_.name + ("{" + " ".join(parts) + "}" if parts else "")


def make_pass(name: str, /, **arguments: Any) -> Pass:
    """The pass of that name with arguments given as Python values or as text."""
    cls = _pass_class(name)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    types_ = get_type_hints(cls)
    values = {}
    for key, value in arguments.items():
        if key not in known:
            names = [_dashed(n) for n in known]
            guess = _did_you_mean(_dashed(key), names)
            raise PipelineError(
                f"pass {name!r} has no argument {_dashed(key)!r}{guess} (arguments: {', '.join(names) or 'none'})"
            )
        try:
            values[key] = _convert(value, types_[key]) if isinstance(value, str) else value
        except ValueError:
            expected = _type_text(types_[key])
            raise PipelineError(f"pass {name!r}: {_dashed(key)}={value} is not of type {expected}") from None
    missing = [
        _dashed(n)
        for n, f in known.items()
        if n not in values and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise PipelineError(f"pass {name!r} needs {', '.join(missing)}")
    try:
        return cls(**values)
    except ValueError as error:
        raise PipelineError(f"pass {name!r}: {error}") from error


def _parse_pass(text: str) -> Pass:
    name, brace, rest = text.partition("{")
    name = name.strip()
    if not brace:
        return make_pass(name)
    if not rest.endswith("}"):
        raise PipelineError(f"expected '}}' at the end of {text!r}")
    arguments: dict[str, str] = {}
    for item in _split(rest[:-1], ", \t\n"):
        key, equals, value = item.partition("=")
        if not equals and item:
            raise PipelineError(f"pass {name!r}: expected argument=value, got {item!r}")
        if key.replace("-", "_") in arguments:
            raise PipelineError(f"pass {name!r}: {key} is given twice")
        if item:
            arguments[key.replace("-", "_")] = value
    return make_pass(name, **arguments)


def _pass_class(name: str) -> type[Pass]:
    if name not in PASSES:
        known = ", ".join(sorted(PASSES))
        raise PipelineError(f"unknown pass {name!r}{_did_you_mean(name, list(PASSES))} (known: {known})")
    return PASSES[name]


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = get_close_matches(word, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _split(text: str, separators: str) -> list[str]:
    """Split outside of quotes, braces and brackets; parts are stripped."""
    parts, current, depth, quoted, escaped = [], "", 0, False, False
    for char in text:
        if quoted:
            quoted, escaped = (char != '"') or escaped, char == "\\" and not escaped
        elif char == '"':
            quoted = True
        elif char in "{[":
            depth += 1
        elif char in "}]":
            depth -= 1
        if char in separators and not quoted and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
        if depth < 0:
            raise PipelineError(f"unexpected {char!r} in pipeline {text!r}")
    if depth or quoted:
        raise PipelineError(f"unclosed {'quote' if quoted else 'brace or bracket'} in pipeline {text!r}")
    return [*parts, current.strip()]


def _convert(text: str, type_: Any) -> Any:
    """Read ``text`` as a value of ``type_``; ValueError when it is none."""
    origin = get_origin(type_)
    if origin in (Union, types.UnionType):
        return _convert_union(text, get_args(type_))
    if origin is Literal:
        if text not in map(str, get_args(type_)):
            raise ValueError(text)
        return next(v for v in get_args(type_) if str(v) == text)
    if origin is tuple:
        if not (text.startswith("[") and text.endswith("]")):
            raise ValueError(text)
        return tuple(_convert(item, get_args(type_)[0]) for item in _split(text[1:-1], ", ") if item)
    if type_ is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    if type_ is str and text.startswith('"'):
        return text[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    if type_ in (int, float, str):
        return type_(text)
    raise ValueError(f"pass arguments cannot have type {type_}")


def _convert_union(text: str, choices: Sequence[Any]) -> Any:
    if type(None) in choices and text == "none":
        return None
    for choice in choices:
        if choice is not type(None):
            try:
                return _convert(text, choice)
            except ValueError:
                continue
    raise ValueError(text)


def _value_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ",".join(_value_text(v) for v in value) + "]"
    text = str(value)
    if isinstance(value, str) and (not text or text == "none" or any(c in text for c in ' ,={}[]"\\\t\n')):
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return text


def _type_text(type_: Any) -> str:
    origin = get_origin(type_)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_text(a) for a in get_args(type_))
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(type_)))
    if origin is tuple:
        return f"[{_type_text(get_args(type_)[0])}, ...]"
    return "none" if type_ is type(None) else getattr(type_, "__name__", str(type_))


def _dashed(name: str) -> str:
    return name.replace("_", "-")


# --- running ------------------------------------------------------------------------------------


class PassError(IRError):
    """A pass failed, or left an invalid module behind.

    ``ir_before`` is the IR text that the pass was given; ``reproducer`` a file for ``tilewright opt``.
    Location and hint are those of the original error when it is an `IRError`.
    """

    def __init__(self, pass_: Pass, kernel: str, original: Exception, ir_before: str, phase: str = "failed"):
        self.pass_name, self.kernel, self.original, self.ir_before = pass_.name, kernel, original, ir_before
        self.reproducer = f"// RUN: opt -p {pass_text(pass_)}\n{ir_before}"
        if isinstance(original, IRError):
            text, loc, hint = original.message, original.loc, original.hint
        else:
            text, loc, hint = f"{type(original).__name__}: {original}", UNKNOWN, ""
        super().__init__(f"pass '{pass_.name}' {phase} on kernel '{kernel}': {text}", loc, hint)


@dataclass(frozen=True)
class PassEvent:
    """A pass that has run: its number in the pipeline (from 1) and the seconds of `Pass.run` alone."""

    number: int
    pass_: Pass
    module: Module
    seconds: float


class Instrument:
    """Watches a pipeline; the hooks must not change the module."""

    def before_pipeline(self, module: Module, passes: Sequence[Pass], context: PassContext) -> None:
        """Called once, with the input."""

    def after_pass(self, event: PassEvent) -> None:
        """Called after each pass; an exception counts as a failure of that pass."""


class Verify(Instrument):
    """Check the module after each pass."""

    def after_pass(self, event: PassEvent) -> None:
        from tilewright.ir.verifier import verify  # the verifier imports every operation: only when needed

        verify(event.module)


@dataclass
class Dump(Instrument):
    """Write ``00-input.tw``, ``01-canonicalize.tw``, ... into ``directory``."""

    directory: Path | str
    locations: bool = False
    written: list[Path] = field(default_factory=list)

    def before_pipeline(self, module: Module, passes: Sequence[Pass], context: PassContext) -> None:
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        self._write(0, "input", module)

    def after_pass(self, event: PassEvent) -> None:
        self._write(event.number, event.pass_.name, event.module)

    def _write(self, number: int, name: str, module: Module) -> None:
        path = Path(self.directory) / f"{number:02d}-{name}.tw"
        path.write_text(print_module(module, self.locations), encoding="utf-8")
        self.written.append(path)


@dataclass
class Timing(Instrument):
    """Seconds of each pass, in order."""

    entries: list[tuple[str, float]] = field(default_factory=list)

    def after_pass(self, event: PassEvent) -> None:
        self.entries.append((event.pass_.name, event.seconds))

    def report(self) -> str:
        """A table, one line a pass, and the total."""
        lines = [*self.entries, ("total", sum(seconds for _, seconds in self.entries))]
        return "".join(f"{seconds * 1e3:10.2f} ms  {name}\n" for name, seconds in lines)


@dataclass
class Collect(Instrument):
    """The text after each pass, by pass name; ``input`` is what the pipeline was given.

    A pass that runs again appears as ``canonicalize.2``, ``canonicalize.3``, ...
    """

    texts: dict[str, str] = field(default_factory=dict)

    def before_pipeline(self, module: Module, passes: Sequence[Pass], context: PassContext) -> None:
        self.texts["input"] = print_module(module)

    def after_pass(self, event: PassEvent) -> None:
        name, n = event.pass_.name, 1
        while name in self.texts:
            n += 1
            name = f"{event.pass_.name}.{n}"
        self.texts[name] = print_module(event.module)


class PassManager:
    """Runs passes in order. ``verify`` checks the module after each pass (and before the first)."""

    def __init__(
        self,
        passes: Sequence[Pass] | str,
        context: PassContext,
        instruments: Sequence[Instrument] = (),
        verify: bool = True,
    ):
        self.passes = parse_pipeline(passes) if isinstance(passes, str) else list(passes)
        self.context = context
        # Dumps come before verification: the file of an invalid module is the one to look at.
        self.instruments: list[Instrument] = [*instruments, *([Verify()] if verify else [])]

    def run(self, module: Module) -> Module:
        """Run all passes on ``module`` in place and return it. Raises `PassError`."""
        for instrument in self.instruments:
            instrument.before_pipeline(module, self.passes, self.context)
        for number, pass_ in enumerate(self.passes, 1):
            self._run_pass(number, pass_, module)
        return module

    def _run_pass(self, number: int, pass_: Pass, module: Module) -> None:
        before = module.clone()  # a failing pass may leave half of its work; printing is for failures only
        phase = "failed"
        try:
            start = perf_counter()
            pass_.run(module, self.context)
            event = PassEvent(number, pass_, module, perf_counter() - start)
            phase = "left invalid IR"
            for instrument in self.instruments:
                instrument.after_pass(event)
        except OSError:
            raise  # a dump that cannot be written is no fault of the pass
        except Exception as error:
            kernel = ", ".join(_kernel_names(module)) or "<empty module>"
            raise PassError(pass_, kernel, error, print_module(before), phase) from error


def _kernel_names(module: Module) -> Iterator[str]:
    for function in module.functions:
        yield function.name
