"""``maxnreg=``: what users may ask for, and that the assembled kernels keep to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tilewright as tw
from tilewright.compiler.driver import run_passes
from tilewright.compiler.options import CompileOptions
from tilewright.kernels.gemm import gemm
from tilewright.kernels.rmsnorm import rmsnorm

ROWS = tw.spec("bf16", ("M", 4096), align=16)
NORM = {"x": ROWS, "weight": tw.spec("bf16", (4096,), align=16), "y": ROWS, "BN": 4096}
MATRICES = {name: tw.spec("bf16", ("M", "N"), align=16) for name in "abc"}


def compiled(target: str, **options: Any) -> Any:
    return tw.compile(rmsnorm, target, NORM, **options)


def test_the_assembler_keeps_to_the_limit() -> None:
    free, bound = (compiled("sm_90a", num_warps=4, maxnreg=limit) for limit in (None, 40))
    assert free.resources.registers > 40 >= bound.resources.registers
    assert ".maxnreg 40" in bound.asm["ptx"] and ".maxnreg" not in free.asm["ptx"]
    # the compiler's own wish for neighbours on the SM would speak against the user's
    assert ".minnctapersm" in free.asm["ptx"] and ".minnctapersm" not in bound.asm["ptx"]


@pytest.mark.parametrize(("limit", "waves"), [(512, 1), (256, 2), (255, 3), (128, 4), (100, 5), (64, 8)])
def test_amd_leaves_room_for_as_many_waves(limit: int, waves: int) -> None:
    artifact = compiled("gfx942", num_warps=1, maxnreg=limit)
    assert f'"amdgpu-waves-per-eu"="{waves}"' in artifact.asm["llvm"]
    assert artifact.resources.registers <= limit


@pytest.mark.parametrize(("target", "least"), [("sm_90a", 24), ("gfx950", 64)])
def test_fewer_than_threads_can_have_are_the_fewest(target: str, least: int) -> None:
    texts = run_passes(rmsnorm.definition, target, NORM, CompileOptions(maxnreg=16))
    assert f"maxnreg = {least}" in texts["register-limit"]


def test_a_block_needs_its_waves_whatever_the_limit() -> None:
    assert '"amdgpu-waves-per-eu"="4"' in compiled("gfx942", num_warps=16, maxnreg=512).asm["llvm"]


def test_products_without_roles_take_it() -> None:
    artifact = tw.compile(gemm, "sm_90a", {**MATRICES, "BM": 64, "BN": 64}, schedule="prefetch", maxnreg=128)
    assert artifact.resources.registers <= 128 and ".maxnreg 128" in artifact.asm["ptx"]


@pytest.mark.parametrize(
    ("kernel", "args", "target", "limit", "message"),
    [
        (gemm, MATRICES, "sm_90a", 128, r"maxnreg=128: the roles of 'gemm' divide .*\n(.|\n)*schedule=\"prefetch\""),
        (rmsnorm, NORM, "sm_90a", 256, r"maxnreg=256: a thread of sm_90a has at most 255(.|\n)*use 255"),
        (rmsnorm, NORM, "gfx950", 513, r"maxnreg=513: a thread of gfx950 has at most 512(.|\n)*use 512"),
    ],
)
def test_what_cannot_be_is_an_error(kernel: Any, args: Any, target: str, limit: int, message: str) -> None:
    with pytest.raises(tw.CompileError, match=message):
        run_passes(kernel.definition, target, args, CompileOptions(maxnreg=limit))


def test_rows_stay_right_where_registers_are_few() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 4096)).astype("f4"), rng.standard_normal(4096).astype("f4")
    y = np.full_like(x, np.nan)
    tw.emulate("sm_90a").launch(rmsnorm, (2,), x, weight, y, 1e-5, BN=4096, num_warps=4, maxnreg=32)
    exact = x.astype("f8") / np.sqrt((x.astype("f8") ** 2).mean(1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-6)
