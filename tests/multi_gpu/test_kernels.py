"""The kernels of several GPUs: interpreted on up to eight ranks, and as assembly on emulated ones, against float64."""

from __future__ import annotations

import pytest

import tilewright as tw
from tests.support.multi_gpu_cases import CASES, SMALL, WGMMA, poisoned_workspaces  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("poisoned_workspaces")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_interpreted(case: str, ranks: int) -> None:
    """Blocks go on in any order and puts land at any time; the second launch meets what the first has left."""
    with tw.World.interpreter(ranks, seed=ranks) as world:
        for seed in (1, 2):
            CASES[case](world, seed, SMALL)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_hopper(case: str, ranks: int) -> None:
    with tw.World.emulated("sm_90a", ranks, races=True, seed=ranks) as world:
        for seed in (3, 4):
            CASES[case](world, seed, WGMMA)


@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
@pytest.mark.parametrize("case", ["gemm_rs", "ag_gemm", "reduce_all_two_shot", "exchange"])
def test_amd(case: str, target: str) -> None:
    with tw.World.emulated(target, 2, seed=1) as world:
        for seed in (5, 6):
            CASES[case](world, seed, SMALL)
