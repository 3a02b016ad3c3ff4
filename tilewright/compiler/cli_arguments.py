"""Kernels and arguments as the command line names them."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from tilewright.compiler.kernel import Kernel
from tilewright.frontend.definition import KernelDefinition
from tilewright.frontend.markers import DTYPE_NAMES, TensorSpec, row_major_strides
from tilewright.ir.types import DType

ArgumentText = Any
_TENSOR = re.compile(r"(?P<dtype>\w+)\[(?P<dims>[^\]]*)\]$")


@dataclass
class Arguments:
    """What ``--arg`` gave: tensors by spec, scalars by dtype, constexprs and scalars by value."""

    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    dtypes: dict[str, DType] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def types(self) -> Mapping[str, Any]:
        """The arguments of `tw.compile`."""
        return {**self.tensors, **self.dtypes, **self.values}


def load_kernel(text: str) -> Kernel:
    """The kernel that ``FILE.py:NAME`` names; usage errors say what is missing."""
    path, _, name = text.rpartition(":")
    if not path or not Path(path).is_file():
        raise click.UsageError(f"{text!r}: expected FILE.py:NAME of an existing file")
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        names = runpy.run_path(path)
    finally:
        sys.path.pop(0)
    kernels = {k: v for k, v in names.items() if isinstance(v, Kernel)}
    if name not in kernels:
        raise click.UsageError(f"{path} has no kernel {name!r} (kernels: {', '.join(kernels) or 'none'})")
    return kernels[name]


def parse_arguments(definition: KernelDefinition, texts: tuple[str, ...]) -> Arguments:
    """Sort ``name=spec`` texts by what they describe."""
    given = Arguments()
    for text in texts:
        name, equals, spec = text.partition("=")
        if not equals or name not in definition.parameter:
            known = ", ".join(definition.parameter)
            raise click.UsageError(f"--arg {text}: expected NAME=SPEC with a parameter of the kernel ({known})")
        match = _TENSOR.match(spec)
        if match:
            given.tensors[name] = _tensor(text, match["dtype"], match["dims"])
        elif spec in DTYPE_NAMES and definition.parameter[name].kind != "constexpr":
            given.dtypes[name] = DTYPE_NAMES[spec]
        else:
            given.values[name] = DTYPE_NAMES[spec] if spec in DTYPE_NAMES else _literal(spec)
    return given


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _tensor(text: str, dtype: str, dims: str) -> TensorSpec:
    if dtype not in DTYPE_NAMES:
        raise click.UsageError(f"--arg {text}: unknown dtype {dtype!r} (known: {', '.join(DTYPE_NAMES)})")
    shape = tuple(int(d) if d.strip().isdigit() else d.strip() for d in dims.split(","))
    known = tuple(n if isinstance(n, int) else None for n in shape)
    return TensorSpec(DTYPE_NAMES[dtype], shape, row_major_strides(known), None)


def random_arrays(given: Arguments, seed: int, device: str) -> dict[str, Any]:
    """Normally distributed tensors (small integers for integer dtypes) where ``device`` wants them."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, spec in given.tensors.items():
        if any(not isinstance(n, int) for n in spec.shape):
            raise click.UsageError(f"--arg {name}: every dimension needs a number to run")
        values = rng.standard_normal(spec.shape)
        arrays[name] = _to_device((values * 10 if not spec.dtype.is_float else values), spec.dtype, device)
    return arrays


def _to_device(values: np.ndarray[Any, Any], dtype: DType, device: str) -> Any:
    from tilewright.ir.interpreter_numerics import NUMPY

    array = values.astype(NUMPY[dtype])
    if device == "cpu" or device.startswith("emulate:"):
        return array
    try:
        import torch
    except ImportError:
        raise click.UsageError("running on a GPU needs torch to hold the tensors") from None
    raw = torch.from_numpy(array.view(np.int16) if dtype.name == "bf16" else array)
    # torch calls AMD's GPUs "cuda" as well
    return (raw.view(torch.bfloat16) if dtype.name == "bf16" else raw).to(device.replace("hip", "cuda", 1))


def summarize(value: Any) -> dict[str, Any]:
    """Shape, mean, extremes and the number of NaNs of a tensor."""
    array = np.asarray(value if isinstance(value, np.ndarray) else value.float().cpu().numpy()).astype(np.float64)
    finite = array[np.isfinite(array)]
    low, high, mean = (finite.min(), finite.max(), finite.mean()) if finite.size else (0.0, 0.0, 0.0)
    return {
        "shape": "x".join(map(str, array.shape)),
        "mean": f"{mean:.6g}",
        "min": f"{low:.6g}",
        "max": f"{high:.6g}",
        "nan": int(np.isnan(array).sum()),
    }
