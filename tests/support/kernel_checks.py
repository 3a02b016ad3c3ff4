"""What the tests of the kernel library share: devices, inputs, and the tolerance against float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw

Array = np.ndarray[Any, Any]
#: the interpreter, and the emulated GPUs that execute the emitted assembly
DEVICES = [
    *("cpu", "emulate:sm_90a,races", "emulate:gfx942"),
    pytest.param("emulate:gfx950", marks=pytest.mark.exhaustive),
]
NUMPY: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
#: most error of a result against float64 from the rounded inputs, over the result's root mean square: its root mean
#: square, and its largest beside the rounding of the element itself, which is relative to that
GATES = {"f32": (2e-5, 2e-4), "f16": (1e-3, 1e-2), "bf16": (4e-3, 5e-2)}
ROUNDING = {"f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-8}


def normal(*shape: int, dtype: str = "f32", seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(NUMPY[dtype])


def strided(*shape: int, dtype: str = "f32", seed: int = 0) -> Array:
    """Normal numbers with rows apart that begin at no multiple of 16 bytes."""
    return normal(*shape[:-1], shape[-1] + 9, dtype=dtype, seed=seed)[..., 5:-4]


def poisoned(*shape: int, dtype: str = "f32") -> Array:
    """An output that nobody has written."""
    return np.full(shape, np.nan, NUMPY[dtype])


def launch(device: str, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    tw.device(device).launch(kernel, grid, *args, **meta)


def errors(actual: Array, exact: Array, dtype: str) -> tuple[float, float]:
    size = float(np.sqrt(np.mean(np.square(exact, dtype=np.float64))))
    apart = actual.astype(np.float64) - exact
    beyond = np.abs(apart) - ROUNDING[dtype] * np.abs(exact)
    return float(np.sqrt(np.mean(np.square(apart)))) / size, float(beyond.max()) / size


def close(actual: Array, exact: Array, dtype: str) -> bool:
    return all(error <= gate for error, gate in zip(errors(actual, exact, dtype), GATES[dtype], strict=True))


def check(actual: Array, exact: Array, dtype: str = "f32") -> None:
    """Within the gates of ``dtype``, which an output of zeros is not."""
    assert not close(np.zeros_like(exact), exact, dtype), "zeros would pass"
    assert actual.shape == exact.shape
    assert close(actual, exact, dtype), f"errors {errors(actual, exact, dtype)}, allowed {GATES[dtype]}"
