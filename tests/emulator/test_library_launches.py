"""The launches that `tests/gpu` compares with a GPU and runs under compute-sanitizer fit the library's kernels."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

import numpy as np
from library_launches import launches

import tilewright.kernels
from tilewright.compiler.kernel import Kernel


def test_every_kernel_of_the_library_is_launched() -> None:
    every = list(launches())
    assert len({launch.name for launch in every}) == len(every)
    modules = [import_module(f"tilewright.kernels.{m.name}") for m in iter_modules(tilewright.kernels.__path__)]
    kernels = {value for module in modules for value in vars(module).values() if isinstance(value, Kernel)}
    assert kernels - {launch.kernel for launch in every} == set()


def test_a_launch() -> None:
    column_sum = next(launch for launch in launches() if launch.name == "column sum")
    column_sum.run("emulate:sm_90a", column_sum.arguments)
    x, _, arrived, sums = column_sum.arguments
    np.testing.assert_allclose(sums[0], x.astype(np.float64).sum(0), rtol=1e-5, atol=1e-4)
    assert not arrived.any()
