"""The kernels of several GPUs: interpreted on up to eight ranks, and as assembly on emulated ones, against float64.

Memory of worlds begins as NaN there, and so do the outputs.
"""

from __future__ import annotations

import pytest

import tilewright as tw
from tests.support.multi_gpu_cases import CASES, SMALL, WGMMA


@pytest.mark.parametrize("ranks", [1, 2, 3, pytest.param(4, marks=pytest.mark.exhaustive), 8])
@pytest.mark.parametrize("case", CASES)
def test_interpreted(case: str, ranks: int) -> None:
    """Blocks go on in any order and puts land at any time; the second launch meets what the first has left.

    Eight ranks, which take long, launch once.
    """
    with tw.World.interpreter(ranks, seed=ranks) as world:
        for seed in (1, 2) if ranks < 8 else (1,):
            CASES[case](world, seed, SMALL)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.exhaustive if case == "ring_full" else ()) for case in CASES]
)
def test_hopper(case: str) -> None:
    with tw.World.emulated("sm_90a", 2, races=True, seed=2) as world:
        CASES[case](world, 2, WGMMA)


@pytest.mark.parametrize("case", ["gemm_rs", "reduce_all_two_shot", "exchange"])
def test_hopper_again(case: str) -> None:
    """Three ranks; the second launch meets what the first has left, and its flags."""
    with tw.World.emulated("sm_90a", 3, races=True, seed=3) as world:
        for seed in (4, 5):
            CASES[case](world, seed, WGMMA)


@pytest.mark.parametrize(("case", "target"), [("gemm_rs", "gfx942"), ("ag_gemm", "gfx950"), ("exchange", "gfx942")])
def test_amd(case: str, target: str) -> None:
    with tw.World.emulated(target, 2, seed=1) as world:
        for seed in (5, 6):
            CASES[case](world, seed, SMALL)
