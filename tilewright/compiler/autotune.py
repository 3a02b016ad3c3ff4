"""`tw.autotune`: a kernel that picks its configuration by measuring, once for each key."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tilewright.compiler.arrays import where
from tilewright.compiler.config import Config
from tilewright.compiler.environment import INTERPRET
from tilewright.compiler.kernel import Kernel
from tilewright.compiler.launch import Launch
from tilewright.compiler.lookup import types_text
from tilewright.compiler.options import CompileOptions
from tilewright.compiler.tuning_file import tuning_file
from tilewright.frontend.definition import KernelDefinition, constant_text
from tilewright.frontend.errors import ArgumentError, suggestion
from tilewright.runtime.device import Device, open_device
from tilewright.runtime.errors import DeviceError

#: ``prune(configs, arguments) -> configs``: leaves out candidates before anything is compiled
Prune = Callable[[list[Config], Mapping[str, Any]], Sequence[Config]]


def autotune(
    configs: Sequence[Config],
    key: Sequence[str],
    *,
    prune: Prune | None = None,
    restore_value: Sequence[str] = (),
    reset_to_zero: Sequence[str] = (),
) -> Callable[[Kernel], AutotunedKernel]:
    """Choose among ``configs`` by measuring, on the first launch with each value of ``key``.

    ``key`` lists what the choice depends on: names of scalar or compile-time parameters, and
    expressions of tensors such as ``"a.shape[0]"``. Dtypes, the device and compile-time arguments
    count anyway. ``prune(configs, arguments)`` may leave candidates out. Tensors that the kernel
    writes keep their contents while it is tuned, as do those named in ``restore_value`` and
    ``reset_to_zero``. The choice is pinned in ``TILEWRIGHT_TUNING_FILE``, for all processes and
    later runs. On the CPU and on emulated devices nothing is measured: the first config is used.

    Put it above ``@tw.kernel``. A grid function sees the config's parameters.
    """

    def decorate(kernel: Kernel) -> AutotunedKernel:
        if not isinstance(kernel, Kernel) or isinstance(kernel, AutotunedKernel):
            raise TypeError("tw.autotune goes above @tw.kernel")
        return AutotunedKernel(kernel, configs, key, prune, (*restore_value, *reset_to_zero))

    return decorate


class AutotunedLaunch(Launch):
    """A launch that chooses a config first."""

    __slots__ = ()
    kernel: AutotunedKernel

    def __call__(self, *args: Any, stream: Any = None, **kwargs: Any) -> None:
        """Launch with the best config; see `tilewright.kernel`."""
        config = self._choose(args, kwargs)
        self.kernel.best_config = config
        given = config.arguments()
        twice = [name for name in given if kwargs.get(name) is not None]
        if twice:
            hint = "leave it out, or launch the kernel without tw.autotune"
            raise ArgumentError(f"'{twice[0]}' is chosen by tw.autotune of '{self.kernel.__name__}'", hint=hint)
        super().__call__(*args, stream=stream, **{**kwargs, **given})

    def _choose(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Config:
        kernel = self.kernel
        if len(kernel.configs) == 1:
            return kernel.configs[0]
        arguments = {**dict(zip(kernel.positional_names, args, strict=False)), **kwargs}
        place = self.device or where({n: v for n, v in arguments.items() if hasattr(v, "shape")})
        if INTERPRET.get() or not place.startswith(("cuda", "hip")):
            return self._pruned(arguments)[0]
        key = (place, *_quick_key(kernel, arguments))
        found = kernel.choices.get(key)
        if found is None:
            found = kernel.choices[key] = self._pinned_or_tuned(place, arguments, args, kwargs)
        return found

    def _pinned_or_tuned(
        self, place: str, arguments: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Config:
        from tilewright.compiler.tuner import Trial, tune

        kernel, device = self.kernel, open_device(place)
        key = tuning_key(kernel, arguments)
        full = " | ".join([f"{kernel.__name__} {program_digest(kernel.definition)}", _hardware(device), key])
        file = tuning_file()
        pinned = file.entries().get(full)
        choice = None if pinned is None else _matching(kernel.configs, pinned)
        if choice is not None:
            return choice
        _refuse_capture()
        configs = self._pruned(arguments)
        trial = Trial(kernel, device, self.grid, args, kwargs, kernel.protect)
        title = f"{kernel.__name__} for {key or 'all arguments'}"
        outcome = tune(trial, configs, title)
        entry = {"config": _as_json(outcome.best), "times_us": outcome.times_us, "skipped": outcome.skipped}
        try:
            pinned = file.pin(full, entry, replace=pinned is not None)
        except OSError as error:
            warnings.warn(
                f"the choice of tw.autotune is not kept in {file.path}: {error}", RuntimeWarning, stacklevel=4
            )
            pinned = entry
        return _matching(kernel.configs, pinned) or outcome.best

    def _pruned(self, arguments: Mapping[str, Any]) -> list[Config]:
        configs = list(self.kernel.configs)
        if self.kernel.prune is None:
            return configs
        left = list(self.kernel.prune(configs, arguments))
        if not left:
            raise ArgumentError(f"tw.autotune of '{self.kernel.__name__}': prune left no config")
        return left


class AutotunedKernel(Kernel):
    """A kernel with candidates. ``best_config`` is the one that the last launch used."""

    launch_class = AutotunedLaunch

    def __init__(
        self, kernel: Kernel, configs: Sequence[Config], key: Sequence[str], prune: Prune | None, protect: Sequence[str]
    ) -> None:
        super().__init__(kernel.definition.fn)
        self.configs = tuple(configs)
        self.prune, self.protect = prune, tuple(protect)
        self.best_config: Config | None = None
        self.choices: dict[Any, Config] = {}
        signature = inspect.signature(kernel.definition.fn).parameters
        if not self.configs:
            raise ArgumentError(f"tw.autotune of '{self.__name__}' has no configs")
        for config in self.configs:
            for name in config.meta:
                _known(self.__name__, name, signature, f"the config ({config})")
        for name in self.protect:
            _known(self.__name__, name, signature, "restore_value or reset_to_zero")
        self.key = tuple(_KeyPart(self.__name__, text, signature) for text in key)

    @property
    def chosen_names(self) -> frozenset[str]:
        return frozenset(name for config in self.configs for name in config.meta)

    def __repr__(self) -> str:
        return f"<tilewright kernel {self.__name__}, {len(self.configs)} configs>"


# --- keys -------------------------------------------------------------------------------------------


class _KeyPart:
    """One entry of ``key``: a parameter's name, or an expression of parameters."""

    def __init__(self, kernel: str, text: str, signature: Mapping[str, inspect.Parameter]) -> None:
        self.text = text
        try:
            tree = ast.parse(text, mode="eval")
        except SyntaxError:
            raise ArgumentError(f"tw.autotune of '{kernel}': the key {text!r} is no expression") from None
        self.names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for name in self.names:
            _known(kernel, name, signature, f"the key {text!r}")
        self.defaults = {n: signature[n].default for n in self.names if signature[n].default is not inspect._empty}
        self._code = compile(tree, "<key of tw.autotune>", "eval")

    def value(self, arguments: Mapping[str, Any]) -> Any:
        """The value for a launch. ArgumentError where it cannot be computed."""
        try:
            return eval(self._code, {"__builtins__": {}}, {**self.defaults, **arguments})
        except Exception as error:
            raise ArgumentError(f"the key {self.text!r} of tw.autotune: {type(error).__name__}: {error}") from error


def _quick_key(kernel: AutotunedKernel, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """`tuning_key` without making texts: equal for equal ones."""
    parts = [part.value(arguments) for part in kernel.key]
    constexprs = kernel.constexpr_names
    for name, value in arguments.items():
        if name in constexprs:
            parts += [name, type(value), tuple(value) if isinstance(value, list) else value]
        elif (dtype := getattr(value, "dtype", None)) is not None:
            parts += [name, dtype]
    return tuple(parts)


def tuning_key(kernel: AutotunedKernel, arguments: Mapping[str, Any]) -> str:
    """What a choice is pinned under, besides program and device: key values, dtypes and compile-time arguments."""
    parts = [f"{part.text}={part.value(arguments)}" for part in kernel.key]
    parts += [f"{n}:{str(v.dtype).removeprefix('torch.')}" for n, v in arguments.items() if hasattr(v, "dtype")]
    fixed = {n: v for n, v in arguments.items() if n in kernel.constexpr_names and v is not None}
    return ", ".join([*parts, *types_text(fixed).splitlines()])


def program_digest(definition: KernelDefinition) -> str:
    """Names a program whatever file and line it stands in, so that ranks and checkouts share choices."""
    dependencies = definition.dependencies()
    texts = [function.source for function in dependencies.functions.values()]
    texts += [f"{name} = {constant_text(value)}" for name, value in sorted(dependencies.constants.items())]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def _hardware(device: Device) -> str:
    """The GPU by what it is, not by its number."""
    info = getattr(device, "info", None)
    return device.target if info is None else f"{device.target} {info.description}"


def _known(kernel: str, name: str, signature: Mapping[str, inspect.Parameter], where: str) -> None:
    if name in signature or (where.startswith("the config") and name in CompileOptions.names()):
        return
    hint = suggestion(name, signature) or f"parameters: {', '.join(signature)}"
    if where.startswith("the key"):
        hint += "; a dimension is written as in 'a.shape[0]'"
    raise ArgumentError(f"tw.autotune of '{kernel}': {where} names '{name}', which is no parameter", hint=hint)


# --- pins -------------------------------------------------------------------------------------------


def _as_json(config: Config) -> dict[str, Any]:
    meta = {n: v if isinstance(v, int | float | str) else constant_text(v) for n, v in config.meta.items()}
    return {"meta": meta, **config.options()}


def _matching(configs: Sequence[Config], entry: Mapping[str, Any]) -> Config | None:
    """The config that an entry names; None if the program no longer has it."""
    wanted = json.dumps(entry.get("config"), sort_keys=True)
    return next((c for c in configs if json.dumps(_as_json(c), sort_keys=True) == wanted), None)


def _refuse_capture() -> None:
    """Measuring synchronises, which a CUDA graph under capture does not survive."""
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is not None and cuda.is_initialized() and cuda.is_current_stream_capturing():
        raise DeviceError("A kernel cannot be tuned while a CUDA graph is captured: launch it once before.")
