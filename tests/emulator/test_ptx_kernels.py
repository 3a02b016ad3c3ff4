"""The library's kernels on the emulated Hopper GPU, under several interleavings, and broken on purpose."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from language_programs import CASES, Case

import tilewright as tw
from tilewright.compiler.artifact import Artifact
from tilewright.kernels import attention as attention_module
from tilewright.kernels import mlp as mlp_module
from tilewright.kernels import softmax as softmax_module
from tilewright.kernels.attention import attention
from tilewright.kernels.gemm import gemm
from tilewright.kernels.mlp import mlp
from tilewright.kernels.softmax import softmax
from tilewright.runtime.emulated import EmulatedDevice, EmulationOptions
from tilewright.runtime.errors import DeviceError

BF16 = ml_dtypes.bfloat16


def normal(*shape: int, dtype: Any = BF16, seed: int = 0, transposed: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape[::-1]).astype(dtype).T if transposed else rng.standard_normal(shape).astype(dtype)


def relative(actual: np.ndarray, exact: np.ndarray) -> float:
    assert not np.isnan(actual.astype(np.float64)).any()
    return float(np.linalg.norm(actual.astype(np.float64) - exact) / np.linalg.norm(exact))


def multiply(shape: tuple[int, int, int], layout: str = "NN", dtype: Any = BF16, **meta: int) -> float:
    m, n, k = shape
    a = normal(m, k, dtype=dtype, transposed=layout[0] == "T")
    b = normal(k, n, dtype=dtype, seed=1, transposed=layout[1] == "T")
    c = np.full((m, n), np.nan, dtype)
    grid = (tw.cdiv(m, meta.get("BM", 128)), tw.cdiv(n, meta.get("BN", 256)))
    tw.device("emulate:sm_90a,races").launch(gemm, grid, a, b, c, **meta)
    return relative(c, a.astype(np.float64) @ b.astype(np.float64))


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("NN", BF16), ("NT", BF16), ("TN", BF16), ("TT", BF16), ("NN", np.float16), ("TT", np.float16)],
)
@pytest.mark.parametrize("shape", [(128, 256, 64), (200, 264, 136), (261, 511, 131), (1, 1, 1)])
def test_gemm(shape: tuple[int, int, int], layout: str, dtype: Any) -> None:
    assert multiply(shape, layout, dtype) < (4e-3 if dtype is BF16 else 5e-4)


@pytest.mark.parametrize(
    "meta",
    [
        {"BM": 64, "BN": 64, "BK": 64}, {"BM": 64, "BN": 64, "BK": 32}, {"BM": 128, "BN": 128, "BK": 128},
        {"BM": 256, "BN": 128}, {"num_stages": 1}, {"num_stages": 2},
    ],
)  # fmt: skip
def test_gemm_configurations(meta: dict[str, int]) -> None:
    assert multiply((200, 264, 264), **meta) < 2e-3


@pytest.mark.parametrize("ctas", [2, 4])
@pytest.mark.parametrize(
    ("shape", "meta", "layout"),
    [
        # an odd number of rows of tiles
        *(((192, 136, 200), {"BM": 64, "BN": 64}, layout) for layout in ("NN", "NT", "TN", "TT")),
        ((64, 200, 136), {"BM": 64, "BN": 64}, "TT"),  # one row: a block without a program of its own
        ((300, 264, 72), {"BM": 256, "BN": 128}, "NN"),
        ((190, 101, 99), {"BM": 64, "BN": 64}, "TN"),  # the entry without clusters
    ],
)
def test_gemm_in_clusters(shape: tuple[int, int, int], meta: dict[str, int], layout: str, ctas: int) -> None:
    assert multiply(shape, layout, BK=64, num_ctas=ctas, **meta) < 3e-3


def test_a_cluster_writes_its_part_of_the_grid_only() -> None:
    """Three of five rows of tiles: the second cluster's last block copies, but stores nothing."""
    a, b, c = normal(320, 64), normal(64, 64, seed=1), np.full((320, 64), np.nan, BF16)
    tw.device("emulate:sm_90a,races").launch(gemm, (3, 1), a, b, c, BM=64, BN=64, BK=64, num_ctas=2)
    assert np.isnan(c[192:].astype(np.float32)).all()
    assert relative(c[:192], a[:192].astype(np.float64) @ b.astype(np.float64)) < 3e-3


def test_other_programs_in_clusters() -> None:
    m, k, h, n = 200, 136, 128, 264
    x, w1, w2, y = normal(m, k), normal(k, h, seed=1), normal(h, n, seed=2), np.full((m, n), np.nan, BF16)
    tw.device("emulate:sm_90a,races").launch(mlp, (tw.cdiv(m, 128),), x, w1, w2, y, num_ctas=2)
    assert relative(y, mlp_module.reference(x, w1, w2)) < 3e-3


def test_a_large_product() -> None:
    assert multiply((512, 512, 512)) < 2e-3


@pytest.mark.parametrize("shape", [(200, 136, 128, 264), (100, 130, 100, 70)])
def test_chained_products(shape: tuple[int, int, int, int]) -> None:
    m, k, h, n = shape
    x, w1, w2, y = normal(m, k), normal(k, h, seed=1), normal(h, n, seed=2), np.full((m, n), np.nan, BF16)
    tw.device("emulate:sm_90a,races").launch(mlp, (tw.cdiv(m, 128),), x, w1, w2, y)
    assert relative(y, mlp_module.reference(x, w1, w2)) < 3e-3


@pytest.mark.parametrize("columns", [4096, 4095, 17])
@pytest.mark.parametrize("rows", [1, 4])
def test_softmax(columns: int, rows: int) -> None:
    x, y = normal(9, columns), np.full((9, columns), np.nan, BF16)
    tw.device("emulate:sm_90a,races").launch(softmax, (tw.cdiv(9, rows),), x, y, BM=rows)
    assert relative(y, softmax_module.reference(x)) < 3e-3


@pytest.mark.parametrize("schedule", ["roles", "turns"])
@pytest.mark.parametrize(("depth", "causal", "ctas"), [(64, False, 1), (64, False, 2), (128, True, 1)])
def test_attention(depth: int, causal: bool, ctas: int, schedule: str) -> None:
    q, o = normal(1, 2, 200, depth), np.full((1, 2, 200, depth), np.nan, BF16)
    k, v = normal(1, 1, 264, depth, seed=1), normal(1, 1, 264, depth, seed=2)
    scale = depth**-0.5 * math.log2(math.e)
    tw.device("emulate:sm_90a,races").launch(
        attention, (2, 2, 1), q, k, v, o, scale, D=depth, DV=depth, CAUSAL=causal, schedule=schedule, num_ctas=ctas
    )
    assert relative(o, attention_module.reference(q, k, v, causal)[0]) < 3e-3


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_four_warpgroups(causal: bool) -> None:
    meta = attention_module.configuration(300, 64)
    assert meta["num_warps"] == 16
    q, o = normal(1, 2, 300, 64), np.full((1, 2, 300, 64), np.nan, BF16)
    k, v = normal(1, 1, 330, 64, seed=1), normal(1, 1, 330, 64, seed=2)
    scale = 64**-0.5 * math.log2(math.e)
    meta |= {"D": 64, "DV": 64, "CAUSAL": causal}
    tw.device("emulate:sm_90a,races").launch(attention, (2, 2, 1), q, k, v, o, scale, **meta)
    assert relative(o, attention_module.reference(q, k, v, causal)[0]) < 3e-3


@pytest.mark.parametrize("case", CASES[::7], ids=lambda case: case.name)
def test_programs_of_the_language(case: Case) -> None:
    """A sample: all of them run on a GPU in tests/gpu, and on the emulated MI300."""
    arrays = case.arrays()
    tw.device("emulate:sm_90a,races").launch(case.kernel, case.grid, *arrays, **case.meta)
    case.check(arrays)


# --- interleavings and mutations -----------------------------------------------------------------------

#: several tiles a block and more steps than stages, so that every ring turns around
SHAPE, META = (128, 128, 320), {"BM": 64, "BN": 64, "BK": 64, "num_stages": 2}


@cache
def compiled(aligned: bool, schedule: str = "roles", ctas: int = 1) -> Artifact:
    align = 16 if aligned else 2
    spec = tw.spec("bf16", ("M", "N"), align=align)
    blocks = {name: META[name] for name in ("BM", "BN", "BK")}
    options = {"num_stages": META["num_stages"], "schedule": schedule, "num_ctas": ctas}
    return tw.compile(gemm, "sm_90a", {"a": spec, "b": spec, "c": spec, **blocks}, **options)


def run_text(artifact: Artifact, ptx: str, seed: int | None, aligned: bool = True) -> float:
    """The error of a product computed by ``ptx`` on a GPU with units for one block, or one cluster."""
    blocks = artifact.entries[0].abi.cluster_blocks
    device = EmulatedDevice("sm_90a", units=blocks, options=EmulationOptions(seed, races=True))
    m, n, k = SHAPE
    m *= blocks
    if not aligned:
        m, n, k = m - 3, n - 1, k - 1
    a, b, c = normal(m, k), normal(k, n, seed=1), np.full((m, n), np.nan, BF16)
    abi = artifact.entries[0 if aligned else -1].abi
    function = device.load(b"", {"ptx": ptx}).function(abi.name)
    device.launch(function, abi, (tw.cdiv(m, 64), tw.cdiv(n, 64)), [a, b, c])
    wrong = np.isnan(c.astype(np.float64)).any()
    return 1.0 if wrong else relative(c, a.astype(np.float64) @ b.astype(np.float64))


@pytest.mark.parametrize(
    ("aligned", "schedule", "ctas"),
    [(aligned, schedule, 1) for aligned in (True, False) for schedule in ("roles", "alternate")] + [(True, "roles", 2)],
)
@pytest.mark.parametrize("seed", [None, 1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_random_interleavings(aligned: bool, schedule: str, ctas: int, seed: int | None) -> None:
    artifact = compiled(aligned, schedule, ctas)
    assert run_text(artifact, artifact.asm["ptx"], seed, aligned) < 2e-3


#: instructions whose removal must show, by what is emitted; those of `REDUNDANT` another one covers
SYNCHRONISATION = re.compile(
    r"^(@%p\d+ )?(mbarrier\.(init|arrive|try_wait)|fence\.|bar\.sync|barrier\.cluster|wgmma\.(fence|commit|wait)|"
    r"cp\.async\.bulk\.(commit|wait))"
)


def mutants(ptx: str) -> list[tuple[int, str]]:
    """(line number, text) of every mutant: a line removed, of a try_wait its result made true."""
    lines = ptx.splitlines()
    found = []
    for number, line in enumerate(lines):
        if not SYNCHRONISATION.match(line.strip()):
            continue
        changed = list(lines)
        wait = re.search(r"try_wait\S* (\w+),", line)
        changed[number] = f"setp.eq.u32 {wait[1]}, 0, 0;" if wait else ""
        found.append((number, "\n".join(changed)))
    return found


def verdict(artifact: Artifact, ptx: str, aligned: bool, seeds: Sequence[int | None] = (None,)) -> str:
    for seed in seeds:
        try:
            if run_text(artifact, ptx, seed, aligned) > 2e-3:
                return "wrong"
        except DeviceError as error:
            return str(error)
    return ""


#: what may go: one of the two fences after mbarrier.init, the wait for a group before the loop, and the loop's
#: wgmma.fence, since nothing but wgmma writes accumulators in it
REDUNDANT = re.compile(r"^(fence\.(mbarrier_init|proxy)|wgmma\.fence|wgmma\.wait_group\S* 1)")


@pytest.mark.parametrize(
    ("aligned", "ctas"), [(True, 1), pytest.param(False, 1, marks=pytest.mark.exhaustive), (True, 2)]
)
def test_removing_synchronisation_shows(aligned: bool, ctas: int) -> None:
    artifact = compiled(aligned, ctas=ctas)
    entry = artifact.entries[0 if aligned else -1].abi.name
    ptx = artifact.asm["ptx"]
    start = ptx.index(f".entry {entry}(")
    first = ptx[:start].count("\n")
    last = first + ptx[start + 1 :].partition(".visible .entry")[0].count("\n")
    survivors, caught = [], []
    for number, text in mutants(ptx):
        if not first <= number <= last:
            continue
        if verdict(artifact, text, aligned):
            caught.append(ptx.splitlines()[number].strip())
        else:
            survivors.append(ptx.splitlines()[number].strip())
    assert len(caught) >= (20 if aligned else 15), (caught, survivors)
    assert len(survivors) <= 4 and all(REDUNDANT.match(line) for line in survivors), survivors
