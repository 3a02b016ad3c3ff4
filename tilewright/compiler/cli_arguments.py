"""Kernels and arguments as the command line names them."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tilewright.compiler.kernel import Kernel
from tilewright.compiler.user_program import load_program
from tilewright.frontend.definition import KernelDefinition, Parameter
from tilewright.frontend.markers import DTYPE_NAMES, TensorSpec, row_major_strides
from tilewright.ir.types import DTYPES, DType

if TYPE_CHECKING:
    import numpy as np

_TENSOR = re.compile(r"(?P<dtype>\w+)\[(?P<dims>[^\]]*)\]$")


@dataclass
class Arguments:
    """What ``--arg`` gave: tensors by spec, scalars by dtype, constexprs and scalars by value."""

    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    dtypes: dict[str, DType] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def types(self, definition: KernelDefinition) -> Mapping[str, Any]:
        """The arguments of `tw.compile`; the value of a scalar stands for its dtype."""
        values = dict(self.values)
        for name, value in self.values.items():
            parameter = definition.parameter[name]
            if parameter.kind in ("scalar", "plain") and value is not None:
                values[name] = parameter.dtype or _dtype_of(value)
        return {**self.tensors, **self.dtypes, **values}


def _dtype_of(value: bool | int | float) -> DType:
    if isinstance(value, bool):
        return DTYPES["i1"]
    if isinstance(value, int):
        return DTYPES["i32" if -(2**31) <= value < 2**31 else "i64"]
    return DTYPES["f32"]


def load_kernel(text: str) -> Kernel:
    """The kernel that ``FILE.py:NAME`` names (``FILE.py`` if it has one alone); usage errors say what is missing."""
    path, _, name = (text, "", "") if Path(text).is_file() else text.rpartition(":")
    if not Path(path).is_file():
        reason = f"there is no file {path!r}" if path else "no file is named"
        raise click.UsageError(f"{text!r}: expected FILE.py:NAME, but {reason}")
    kernels = {k: v for k, v in vars(load_program(Path(path))).items() if isinstance(v, Kernel)}
    if not name and len(kernels) == 1:
        return next(iter(kernels.values()))
    if name not in kernels:
        missing = f"has no kernel {name!r}" if name else "is not the name of a kernel: write FILE.py:NAME"
        raise click.UsageError(f"{path} {missing} (kernels: {', '.join(kernels) or 'none'})")
    return kernels[name]


def parse_grid(text: str) -> tuple[int, ...]:
    """The grid that ``8`` or ``8,5`` names."""
    parts = text.split(",")
    if len(parts) > 3 or not all(part.strip().isdecimal() for part in parts):
        raise click.UsageError(f"--grid {text}: expected one to three numbers separated by commas, as in 8,5")
    return tuple(int(part) for part in parts)


# --- --arg --------------------------------------------------------------------------------------


def parse_arguments(
    definition: KernelDefinition, texts: tuple[str, ...], to_run: bool = False, chosen: Collection[str] = ()
) -> Arguments:
    """Sort ``name=spec`` texts by what they describe; usage errors for wrong and missing ones.

    ``to_run``: sizes and scalars must have values, as a launch needs them. ``chosen``: parameters
    that the autotuner gives.
    """
    given = Arguments()
    seen: set[str] = set()
    for text in texts:
        name, equals, spec = (part.strip() for part in text.partition("="))
        if not equals or name not in definition.parameter:
            known = ", ".join(definition.parameter)
            raise click.UsageError(f"--arg {text}: expected NAME=SPEC with a parameter of the kernel ({known})")
        if name in seen:
            raise click.UsageError(f"--arg {text}: {name} is given twice")
        seen.add(name)
        _sort(definition.parameter[name], text, spec, to_run, given)
    missing = [p for p in definition.parameters if p.name not in {*seen, *chosen} and _is_needed(p, to_run)]
    if missing:
        wanted = " ".join(f"--arg {p.name}={_example(p, to_run)}" for p in missing)
        raise click.UsageError(f"kernel {definition.name!r} needs {wanted}")
    return given


def _is_needed(parameter: Parameter, to_run: bool) -> bool:
    known = parameter.kind == "scalar" and parameter.dtype is not None and not to_run
    return parameter.required and not known


def _example(parameter: Parameter, to_run: bool) -> str:
    if parameter.kind == "constexpr":
        return "VALUE"
    if parameter.kind == "scalar":
        return "VALUE" if to_run else "DTYPE"
    return "DTYPE[SIZES]"


def _sort(parameter: Parameter, text: str, spec: str, to_run: bool, given: Arguments) -> None:
    name, kind = parameter.name, parameter.kind
    match = _TENSOR.match(spec)
    if kind == "constexpr":
        given.values[name] = DTYPE_NAMES[spec] if spec in DTYPE_NAMES else _literal(spec)
    elif match:
        if kind == "scalar":
            raise click.UsageError(f"--arg {text}: {name} is a scalar, not a tensor")
        given.tensors[name] = _tensor(text, match["dtype"], match["dims"], to_run)
    elif spec == "None":
        given.values[name] = None
    elif kind in ("tensor", "symmetric"):
        raise click.UsageError(f"--arg {text}: {name} is a tensor: write {name}=f32[{'64,64' if to_run else 'M,64'}]")
    elif spec in DTYPE_NAMES:
        if to_run:
            raise click.UsageError(f"--arg {text}: running needs the value of {name}, not its dtype")
        given.dtypes[name] = DTYPE_NAMES[spec]
    else:
        value = _literal(spec)
        if not isinstance(value, bool | int | float):
            known = ", ".join(DTYPE_NAMES)
            raise click.UsageError(f"--arg {text}: {spec!r} is neither a number nor a dtype ({known})")
        given.values[name] = value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _tensor(text: str, dtype: str, dims: str, to_run: bool) -> TensorSpec:
    if dtype not in DTYPE_NAMES:
        raise click.UsageError(f"--arg {text}: unknown dtype {dtype!r} (known: {', '.join(DTYPE_NAMES)})")
    sizes = [part.strip() for part in dims.split(",")]
    for size in sizes:
        if not (size.isdecimal() or size.isidentifier()):
            raise click.UsageError(f"--arg {text}: {size!r} is no size: write a number, or a name for any size")
        if to_run and not size.isdecimal():
            raise click.UsageError(f"--arg {text}: running needs a number for {size}")
    shape = tuple(int(size) if size.isdecimal() else size for size in sizes)
    known = tuple(n if isinstance(n, int) else None for n in shape)
    return TensorSpec(DTYPE_NAMES[dtype], shape, row_major_strides(known), None)


# --- tensors to run on --------------------------------------------------------------------------


def random_arrays(given: Arguments, seed: int, device: str) -> dict[str, Any]:
    """Normally distributed tensors (ten times that for integer dtypes) where ``device`` wants them."""
    import numpy as np

    rng = np.random.default_rng(seed)
    arrays = {}
    for name, spec in given.tensors.items():
        values = rng.standard_normal([int(n) for n in spec.shape])
        arrays[name] = to_device(values if spec.dtype.is_float else values * 10, spec.dtype, device)
    return arrays


def to_device(values: np.ndarray[Any, Any], dtype: DType, device: str) -> Any:
    """An array in a dtype where ``device`` wants it: a NumPy array, or a torch tensor on a GPU."""
    import numpy as np

    from tilewright.ir.interpreter_numerics import NUMPY
    from tilewright.runtime.errors import DeviceError

    array = values.astype(NUMPY[dtype])
    if device == "cpu" or device.startswith("emulate:"):
        return array
    try:
        import torch
    except ImportError:
        raise click.UsageError("running on a GPU needs torch to hold the tensors: pip install torch") from None
    small = {"bf16": torch.bfloat16, "f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2}
    kind = small.get(dtype.name)
    raw = torch.from_numpy(array if kind is None else array.view(np.int16 if array.itemsize == 2 else np.int8))
    try:
        # torch calls AMD's GPUs "cuda" as well
        return (raw if kind is None else raw.view(kind)).to(device.replace("hip", "cuda", 1))
    except (AssertionError, RuntimeError) as error:
        raise DeviceError(f"torch cannot put tensors on {device}: {error}") from None


def snapshot(value: Any) -> bytes:
    """A digest of an array's bits, which tells whether a kernel wrote it."""
    import numpy as np

    array = value if isinstance(value, np.ndarray) else value.cpu().view(_raw(value)).numpy()
    return hashlib.sha256(array.tobytes()).digest()


def _raw(tensor: Any) -> Any:
    import torch

    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]


def summarize(value: Any) -> dict[str, Any]:
    """Dtype, shape, mean and extremes of the finite elements (None without any), and how many are not finite."""
    import numpy as np

    array = np.asarray(value if isinstance(value, np.ndarray) else value.double().cpu().numpy())
    dtype = str(value.dtype).removeprefix("torch.")
    array = array.astype(np.float64)
    finite = array[np.isfinite(array)]
    return {
        "dtype": dtype,
        "shape": list(array.shape),
        "mean": float(finite.mean()) if finite.size else None,
        "min": float(finite.min()) if finite.size else None,
        "max": float(finite.max()) if finite.size else None,
        "nan": int(np.isnan(array).sum()),
        "inf": int(np.isinf(array).sum()),
    }


def describe(summary: Mapping[str, Any]) -> str:
    """A summary in one line."""
    size = "x".join(map(str, summary["shape"]))
    figures = [f"{key} {summary[key]:.6g}" for key in ("mean", "min", "max") if summary[key] is not None]
    odd = [f"{summary[key]} {text}" for key, text in (("nan", "NaN"), ("inf", "infinite")) if summary[key]]
    return f"{summary['dtype']} {size}: " + ", ".join([*figures, *(odd or ["all finite"])])
