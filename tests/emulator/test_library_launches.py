"""The launches that `tests/gpu` compares with a GPU and runs under compute-sanitizer fit the library's kernels."""

from __future__ import annotations

import numpy as np
from library_launches import launches


def test_launches() -> None:
    every = list(launches())
    assert len({launch.name for launch in every}) == len(every) >= 30
    column_sum = next(launch for launch in every if launch.name == "column sum")
    column_sum.run("emulate:sm_90a", column_sum.arguments)
    x, _, arrived, sums = column_sum.arguments
    np.testing.assert_allclose(sums[0], x.astype(np.float64).sum(0), rtol=1e-5, atol=1e-4)
    assert not arrived.any()
