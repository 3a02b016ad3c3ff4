"""Matrix products with K split: in the interpreter and on emulated GPUs, the choice of runs, and the kept memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from tilewright.compiler.options import CompileOptions
from tilewright.frontend.build import build_module
from tilewright.ir.async_ops import BulkStore, BulkWait
from tilewright.ir.core import Function
from tilewright.ir.indexed_ops import Atomic
from tilewright.ir.interpreter import run
from tilewright.ir.target import get_target
from tilewright.ir.types import DTYPES, ViewType
from tilewright.kernels.gemm import add_partials, gemm_partial, matmul, reference, split_configuration
from tilewright.kernels.workspace import Workspace
from tilewright.passes.manager import PassContext, PassManager
from tilewright.passes.pipelines import default_pipeline

BF16 = ml_dtypes.bfloat16
#: of the largest value: bf16 rounds to 2**-9
TOLERANCE = 2**-8


def operands(m: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.standard_normal((m, k)).astype(BF16), random.standard_normal((k, n)).astype(BF16)


def error(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    exact = reference(a, b)
    return float(np.abs(c.astype(np.float64) - exact).max() / np.abs(exact).max())


@pytest.mark.parametrize("runs", [2, 4, 8])
@pytest.mark.parametrize("device", ["cpu", "emulate:sm_90a", "emulate:sm_80", "emulate:gfx942", "emulate:gfx950"])
def test_partial_sums(device: str, runs: int) -> None:
    (m, n, k), (bm, bn) = (72, 136, 520), (64, 128)
    a, b = operands(m, n, k)
    place, results = tw.device(device), []
    for _ in range(2):
        partials, c = np.full((runs, m, n), np.nan, np.float32), np.full((m, n), np.nan, BF16)
        grid = tw.cdiv(m, bm), tw.cdiv(n, bn), runs
        place.launch(gemm_partial, grid, a, b, partials, BM=bm, BN=bn, BK=64)
        place.launch(add_partials, (tw.cdiv(m, 8), tw.cdiv(n, 128)), partials, c, RUNS=runs)
        results.append(c)
    assert error(results[0], a, b) < TOLERANCE
    assert np.array_equal(results[0].view(np.uint16), results[1].view(np.uint16))


def test_matmul_of_few_tiles() -> None:
    a, b = operands(70, 90, 3000)
    c = np.full((70, 90), np.nan, BF16)
    assert split_configuration(70, 90, 3000)[1] > 1
    matmul(a, b, c)
    assert error(c, a, b) < TOLERANCE


@pytest.mark.parametrize(
    ("shape", "split"),
    [
        ((512, 512, 16384), True),
        ((64, 1024, 4096), True),
        ((2048, 2048, 2048), False),
        ((1024, 1024, 8192), False),
        ((8192, 8192, 8192), False),
        ((512, 512, 512), False),
    ],
)
def test_only_few_tiles_split(shape: tuple[int, int, int], split: bool) -> None:
    chosen, runs = split_configuration(*shape)
    tiles = tw.cdiv(shape[0], chosen["BM"]) * tw.cdiv(shape[1], chosen["BN"])
    assert (runs > 1) == split
    assert tiles * runs <= 132 or not split


def test_tiles_follow_the_length_of_k() -> None:
    """What alternating consumers hide weighs more where tiles are short."""
    assert split_configuration(4096, 4096, 512)[0] == {"BM": 128, "BN": 128, "BK": 64}
    assert split_configuration(4096, 4096, 4096)[0] == {"BM": 128, "BN": 256, "BK": 64}


# --- kept memory --------------------------------------------------------------------------------------


class OnGpu:
    """What `Workspace` sees of a torch tensor on a GPU; the memory it makes is the host's."""

    is_cuda, device = True, "cpu"

    def get_device(self) -> int:
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    torch = pytest.importorskip("torch")
    state = SimpleNamespace(stream=7, capturing=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=state.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def test_memory_is_kept_for_a_stream(cuda: SimpleNamespace) -> None:
    workspace = Workspace()
    first = workspace.take(OnGpu(), (4, 8, 8))
    assert first.shape == (4, 8, 8)
    assert workspace.take(OnGpu(), (4, 8, 8)) is first
    assert workspace.take(OnGpu(), (2, 8, 8)).data_ptr() == first.data_ptr(), "smaller requests take a part"
    larger = workspace.take(OnGpu(), (8, 8, 8))
    assert larger.numel() == 512
    assert workspace.take(OnGpu(), (4, 8, 8)).data_ptr() == larger.data_ptr()
    cuda.stream = 8
    assert workspace.take(OnGpu(), (2, 8, 8)).data_ptr() != larger.data_ptr(), "streams run side by side"


def test_threads_that_share_a_stream_get_memory_of_their_own(cuda: SimpleNamespace) -> None:
    """Launches of one come between those of another, which hand results through it."""
    workspace = Workspace()
    with ThreadPoolExecutor(1) as other:
        theirs = other.submit(workspace.take, OnGpu(), (2, 8)).result()
        assert workspace.take(OnGpu(), (2, 8)).data_ptr() != theirs.data_ptr()
        assert other.submit(workspace.take, OnGpu(), (2, 8)).result() is theirs


def test_views_of_many_shapes_are_not_all_kept(cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright.kernels.workspace._MOST_VIEWS", 4)
    workspace = Workspace()
    whole = workspace.take(OnGpu(), (64,))
    for n in range(1, 20):
        assert workspace.take(OnGpu(), (n,)).data_ptr() == whole.data_ptr()
    assert len(workspace._kept.views) <= 4


def test_graphs_get_memory_of_their_own(cuda: SimpleNamespace) -> None:
    workspace = Workspace()
    kept = workspace.take(OnGpu(), (2, 8))
    cuda.capturing = True
    captured = workspace.take(OnGpu(), (2, 8))
    assert captured.data_ptr() != kept.data_ptr()
    cuda.capturing = False
    assert workspace.take(OnGpu(), (2, 8)) is kept


# --- what releases and acquires -----------------------------------------------------------------------


@tw.kernel
def staged(x: tw.Tensor, w: tw.Tensor, parts: tw.Tensor, y: tw.Tensor, count: tw.Tensor) -> None:
    """Two programs hand products through memory, in stores that the copy engine makes on Hopper."""
    run = tw.program_id(0)
    tw.store(parts, (run, 0), tw.dot(tw.load(x, (run, 0), (64, 64)), tw.load(w, (0, 0), (64, 64))))
    if tw.atomic_add(count, 0, 1, order="acq_rel") == 1:
        tw.store(y, (0, 0), tw.load(parts, (0, 0), (64, 64)) + tw.load(parts, (1, 0), (64, 64)))


def scheduled(target: str) -> Function:
    matrix = {
        n: ViewType((None, None), DTYPES[d], (None, 1), 16)
        for n, d in zip("xwpy", ("bf16", "bf16", "f32", "f32"), strict=True)
    }
    views = {"x": matrix["x"], "w": matrix["w"], "parts": matrix["p"], "y": matrix["y"]}
    views["count"] = ViewType((None,), DTYPES["i32"], (1,), 4)
    context = PassContext(get_target(target), CompileOptions().pass_options())
    return (
        PassManager(default_pipeline(context.target), context).run(build_module(staged.definition, views)).functions[0]
    )


def run_staged(function: Function) -> float:
    x, w = operands(128, 64, 64)
    parts, y = np.full((128, 64), np.nan, np.float32), np.full((64, 64), np.nan, np.float32)
    arrays = {"x": x, "w": w, "parts": parts, "y": y, "count": np.zeros(1, np.int32)}
    run(function, arrays, grid=(2, 1, 1))
    exact = reference(x[:64], w) + reference(x[64:], w)
    return float(np.abs(y - exact).max() / np.abs(exact).max())


def test_releases_wait_for_bulk_stores() -> None:
    function = scheduled("sm_90a")
    ops = list(function.walk())
    (atomic,) = [op for op in ops if isinstance(op, Atomic)]
    assert any(isinstance(op, BulkStore) for op in ops[: ops.index(atomic)])
    assert run_staged(function) < 1e-5
    assert atomic.parent is not None
    before = atomic.parent.ops[atomic.parent.ops.index(atomic) - 1]
    assert isinstance(before, BulkWait) and not before.read and before.pending == 0
    atomic.parent.ops.remove(before)
    assert not run_staged(function) < 1e-5, "without the wait the sums are taken before they are there"
