"""Row kernels whose programs are spread over the blocks of a cluster: the scheduled IR in the interpreter, and the PTX
on the emulator, whose race detector knows what orders blocks, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kernel_checks import Array, check, launch, normal, poisoned

import tilewright as tw
from tilewright.compiler.kernel import Kernel
from tilewright.compiler.options import CompileOptions
from tilewright.frontend.build import build_module
from tilewright.ir.core import Function
from tilewright.ir.interpreter import run
from tilewright.ir.target import get_target
from tilewright.ir.types import DTYPES, ViewType
from tilewright.kernels import layernorm as layer_module
from tilewright.kernels import norm_backward as gradient_module
from tilewright.kernels import rmsnorm as rms_module
from tilewright.kernels import softmax as softmax_module
from tilewright.kernels.layernorm import layer_rows, layernorm
from tilewright.kernels.norm_backward import gradient_programs, norm_backward, norm_gradients
from tilewright.kernels.rmsnorm import rms_rows, rmsnorm
from tilewright.kernels.rows import (
    WIDEST,
    WIDEST_GRADIENTS,
    WIDEST_SPREAD,
    spread_gradient_tiles,
    spread_norm_tiles,
    spread_tiles,
)
from tilewright.kernels.softmax import softmax, softmax_backward, softmax_rows, softmax_rows_backward
from tilewright.passes.manager import PassContext, PassManager
from tilewright.passes.pipelines import default_pipeline

EMULATED, EPS, ROWS = "emulate:sm_90a,races", 1e-3, 3
DTYPE_NAMES = {"float32": "f32", "bfloat16": "bf16", "int32": "i32", "int64": "i64", "float16": "f16"}

#: launches a kernel on (grid, arguments, constexprs)
Runner = Callable[..., None]


def scheduled(kernel: Kernel, args: tuple[Any, ...], num_ctas: int, num_warps: int | None, meta: Any) -> Function:
    """The kernel's last IR for arguments like these."""
    types: dict[str, Any] = {}
    for parameter, value in zip(kernel.definition.parameters, args, strict=False):
        if isinstance(value, np.ndarray):
            dtype = DTYPES[DTYPE_NAMES[value.dtype.name]]
            types[parameter.name] = ViewType((None,) * value.ndim, dtype, (None,) * (value.ndim - 1) + (1,), 16)
        elif value is not None:
            types[parameter.name] = DTYPES["f32"]
    options = CompileOptions(num_ctas=num_ctas, num_warps=num_warps).pass_options()
    target = get_target("sm_90a")
    module = build_module(kernel.definition, {**types, **meta})
    return PassManager(default_pipeline(target), PassContext(target, options)).run(module).functions[0]


def interpreted(kernel: Kernel, grid: tuple[int, ...], *args: Any, num_ctas: int, num_warps: int, **meta: Any) -> None:
    function = scheduled(kernel, args, num_ctas, num_warps, meta)
    assert function.attributes["spread"]
    run(function, [a for a in args if a is not None], grid)


def emulated(kernel: Kernel, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    launch(EMULATED, kernel, grid, *args, **meta)


RUNNERS = [pytest.param(interpreted, id="interpreter"), pytest.param(emulated, id="emulator")]


@pytest.mark.parametrize("run_", RUNNERS)
@pytest.mark.parametrize(("ctas", "columns", "dtype"), [(2, 512, "bf16"), (4, 487, "bf16"), (8, 1000, "f32")])
def test_rmsnorm(run_: Runner, ctas: int, columns: int, dtype: str) -> None:
    """A residual, a bias; rows that end within a block, and in blocks before the last."""
    x, residual = (normal(ROWS, columns, dtype=dtype, seed=s) for s in range(2))
    weight, bias = (normal(columns, dtype=dtype, seed=s) for s in (2, 3))
    y, total, inverse = poisoned(ROWS, columns, dtype=dtype), poisoned(ROWS, columns, dtype=dtype), poisoned(ROWS)
    args = (x, weight, y, EPS, residual, total, bias, inverse)
    run_(rmsnorm, (ROWS,), *args, BM=1, BN=1024, num_ctas=ctas, num_warps=2)
    exact = x.astype(np.float64) + residual.astype(np.float64)
    check(y, rms_module.reference(x, weight, EPS, residual, bias), dtype)
    check(total, exact, dtype)
    check(inverse, 1 / np.sqrt((exact**2).mean(1) + EPS))


@pytest.mark.parametrize("run_", RUNNERS)
@pytest.mark.parametrize(("ctas", "columns", "rows"), [(4, 500, 1), (2, 512, 2), (8, 77, 8)])
def test_layernorm(run_: Runner, ctas: int, columns: int, rows: int) -> None:
    """Two exchanges, the second of the row minus its mean; several rows a program, of which there are too few."""
    x, weight, bias = normal(ROWS, columns), normal(columns, seed=1), normal(columns, seed=2)
    y, mean, inverse = poisoned(ROWS, columns), poisoned(ROWS), poisoned(ROWS)
    args = (x, weight, y, EPS, None, None, bias, mean, inverse)
    run_(layernorm, (tw.cdiv(ROWS, rows),), *args, BM=rows, BN=512, num_ctas=ctas, num_warps=4)
    check(y, layer_module.reference(x, weight, EPS, None, bias))
    check(mean, x.astype(np.float64).mean(1))
    check(inverse, 1 / np.sqrt(x.astype(np.float64).var(1) + EPS))


@pytest.mark.parametrize("run_", RUNNERS)
@pytest.mark.parametrize("columns", [2048, 1999])
def test_rows_that_wait_in_shared_memory(run_: Runner, columns: int) -> None:
    """Read again behind each reduction; each block has 1024 bytes or more of a row, which copies bring."""
    x, residual, weight = normal(ROWS, columns), normal(ROWS, columns, seed=1), normal(columns, seed=2)
    x, residual = (np.pad(a, ((0, 0), (0, 2048 - columns)))[:, :columns] for a in (x, residual))  # aligned rows
    meta = {"BM": 1, "BN": 2048, "AGAIN": True, "num_ctas": 4, "num_warps": 2}
    y, total = poisoned(ROWS, columns), poisoned(ROWS, columns)
    run_(rmsnorm, (ROWS,), x, weight, y, EPS, residual, total, **meta)
    check(y, rms_module.reference(x, weight, EPS, residual))
    check(total, x.astype(np.float64) + residual)
    total[...] = np.nan
    run_(softmax_backward, (ROWS,), residual, x, total, **meta)
    check(total, softmax_module.reference_backward(residual, x))


@pytest.mark.parametrize("run_", RUNNERS)
@pytest.mark.parametrize(("ctas", "rows", "warps"), [(2, 1, 4), (4, 4, 4), (8, 2, 1)])
def test_softmax_and_its_gradient(run_: Runner, ctas: int, rows: int, warps: int) -> None:
    """Two exchanges that follow each other; a block with nothing but minus infinity; rows of warps of their own."""
    x, dy, y, dx = (normal(ROWS, 450, seed=s) for s in range(4))
    x[1, 200:] = -np.inf
    y[...], dx[...] = np.nan, np.nan
    meta = {"BM": rows, "BN": 512, "num_ctas": ctas, "num_warps": warps}
    run_(softmax, (tw.cdiv(ROWS, rows),), x, y, **meta)
    check(y, softmax_module.reference(x))
    run_(softmax_backward, (tw.cdiv(ROWS, rows),), dy, y, dx, **meta)
    check(dx, softmax_module.reference_backward(dy, y))


def gradients(run_: Runner, ctas: int, centred: bool, **meta: Any) -> tuple[Array, Array]:
    """dx and partial sums of `norm_backward`, checked."""
    rows, columns, programs = 9, 480, 2
    dy, x, weight = normal(rows, columns), normal(rows, columns, seed=1), normal(columns, seed=2)
    exact = x.astype(np.float64)
    if centred:
        mean, inverse = exact.mean(1), 1 / np.sqrt(exact.var(1) + EPS)
        wanted = layer_module.reference_backward(dy, x, weight, EPS)
    else:
        mean, inverse = None, 1 / np.sqrt((exact**2).mean(1) + EPS)
        wanted = rms_module.reference_backward(dy, x, weight, EPS)
    dx, partial = poisoned(rows, columns), poisoned(programs, 1 + centred, columns)
    mean = None if mean is None else mean.astype(np.float32)
    args = (dy, x, weight, inverse.astype(np.float32), dx, partial, None, mean)
    run_(norm_backward, (programs,), *args, BIAS=centred, BN=512, num_ctas=ctas, **meta)
    check(dx, wanted[0])
    for part in range(1 + centred):
        check(partial.astype(np.float64).sum(0)[part], wanted[1 + part])
    return dx, partial


@pytest.mark.parametrize("run_", RUNNERS)
@pytest.mark.parametrize(("ctas", "centred", "meta"), [
    (2, True, {"num_warps": 4}), (4, False, {"num_warps": 2, "BM": 2}), (8, True, {"num_warps": 2, "AGAIN": True}),
    (4, False, {"num_warps": 1}),
])  # fmt: skip
def test_gradients_of_norms(run_: Runner, ctas: int, centred: bool, meta: Any) -> None:
    """Each program walks over rows, and uses a mailbox for every one of them."""
    gradients(run_, ctas, centred, **meta)


@pytest.mark.parametrize("seed", [1, 2])
def test_bits_do_not_depend_on_who_is_first(seed: int) -> None:
    """Messages land at any time, warps run in any order: no race, and the same bits."""
    expected = gradients(emulated, 4, True, num_warps=2)

    def shuffled(kernel: Kernel, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        launch(f"{EMULATED},seed={seed}", kernel, grid, *args, **meta)

    found = gradients(shuffled, 4, True, num_warps=2)
    assert [a.tobytes() for a in found] == [a.tobytes() for a in expected]


# --- what the library chooses -------------------------------------------------------------------------


class Recorder:
    """Stands for a kernel: keeps the tiles of its launches, and runs them."""

    def __init__(self, kernel: Kernel):
        self.kernel, self.launches = kernel, list[dict[str, Any]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run_(*args: Any, **named: Any) -> None:
            self.launches.append(named)
            self.kernel[grid](*args, **named)

        return run_


def recorded(monkeypatch: pytest.MonkeyPatch, clusters: bool) -> dict[str, Recorder]:
    """The kernels over rows by name, on hardware with clusters or without."""
    monkeypatch.setattr(tw, "supports", lambda array, feature: clusters and feature == "clusters", raising=False)
    found = {}
    for module in (rms_module, layer_module, softmax_module, gradient_module):
        for name, value in list(vars(module).items()):
            if isinstance(value, Kernel):
                found[name] = Recorder(value)
                monkeypatch.setattr(module, name, found[name])
    return found


def used(kernels: dict[str, Recorder]) -> dict[str, int]:
    """The kernels that were launched, and over how many blocks, the last time."""
    launched = {name: k.launches[-1].get("num_ctas", 1) for name, k in kernels.items() if k.launches}
    for kernel in kernels.values():
        kernel.launches.clear()
    return launched


#: the fewest columns that all eight blocks have some of
LEAST_SPREAD = 2 * WIDEST - 2 * WIDEST // 8 + 8


@pytest.mark.parametrize(
    ("clusters", "columns", "spread", "suffix"),
    [
        (True, LEAST_SPREAD, 8, ""),
        (True, LEAST_SPREAD - 8, 1, "_long"),
        (True, LEAST_SPREAD + 1, 1, "_long"),  # no multiple of 16 bytes
        (False, LEAST_SPREAD, 1, "_long"),
        (True, WIDEST, 1, ""),
    ],
)
def test_long_rows_are_spread_where_there_are_clusters(
    monkeypatch: pytest.MonkeyPatch, clusters: bool, columns: int, spread: int, suffix: str
) -> None:
    kernels = recorded(monkeypatch, clusters)
    x, dy, weight = normal(2, columns), normal(2, columns, seed=1), normal(columns, seed=2)
    y, dx, total = (poisoned(2, columns) for _ in range(3))
    rms_rows(x, weight, y, EPS)
    check(y, rms_module.reference(x, weight, EPS))
    assert used(kernels) == {f"rmsnorm{suffix}": spread}
    rms_rows(x, weight, y, EPS, residual=dy, total=total)
    check(y, rms_module.reference(x, weight, EPS, dy))
    check(total, x.astype(np.float64) + dy)
    assert used(kernels) == {f"rmsnorm{suffix}": spread}
    layer_rows(x, weight, y, EPS)
    check(y, layer_module.reference(x, weight, EPS))
    assert used(kernels) == {f"layernorm{suffix}": spread}
    halves = x.astype(ml_dtypes.bfloat16)
    layer_rows(halves, weight, y, EPS)
    check(y, layer_module.reference(halves, weight, EPS))
    assert used(kernels) == {"layernorm" if columns == WIDEST else "layernorm_long": 1}
    softmax_rows(x, y)
    check(y, softmax_module.reference(x))
    assert used(kernels) == {f"softmax{suffix}": spread}
    softmax_rows_backward(dy, y, dx)
    check(dx, softmax_module.reference_backward(dy, y))
    assert used(kernels) == {f"softmax_backward{suffix}": spread}


@pytest.mark.parametrize(("columns", "centred"), [
    (LEAST_SPREAD, False), (LEAST_SPREAD - 8, False), (LEAST_SPREAD, True),
])  # fmt: skip
def test_gradients_of_rmsnorm_are_spread_where_all_blocks_have_columns(
    monkeypatch: pytest.MonkeyPatch, columns: int, centred: bool
) -> None:
    kernels, module = recorded(monkeypatch, True), layer_module if centred else rms_module
    dy, x, weight = normal(3, columns), normal(3, columns, seed=1), normal(columns, seed=2)
    exact = x.astype(np.float64)
    mean = exact.mean(1).astype(np.float32) if centred else None
    inverse = (1 / np.sqrt((exact.var(1) if centred else (exact**2).mean(1)) + EPS)).astype(np.float32)
    dx, partial = poisoned(3, columns), poisoned(gradient_programs(3, columns), 1, columns)
    norm_gradients(dy, x, weight, inverse, dx, partial, mean=mean)
    wanted = module.reference_backward(dy, x, weight, EPS)
    check(dx, wanted[0])
    check(partial[:, 0].sum(0), wanted[1])
    spread = columns >= LEAST_SPREAD and not centred
    assert used(kernels) == ({"norm_backward": 8} if spread else {"norm_backward": 1, "norm_backward_sums": 1})


def test_arrays_of_the_interpreter_have_no_clusters() -> None:
    assert not tw.supports(np.zeros((2, 2)), "clusters")
    with pytest.raises(tw.ArgumentError, match="no target has a feature 'cluster'"):
        tw.supports(np.zeros((2, 2)), "cluster")


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_the_widest_rows_fit_into_eight_blocks(dtype: str) -> None:
    """Those of two matrices wait in shared memory; threads spill next to nothing."""
    matrix, vector = (tw.spec(dtype, shape, align=16) for shape in (("M", "N"), ("N",)))
    norm: dict[str, Any] = {
        "x": matrix,
        "weight": vector,
        "y": matrix,
        "eps": "f32",
        "residual": matrix,
        "total": matrix,
    }
    cases: list[tuple[Kernel, dict[str, Any], dict[str, Any], int]] = [
        (rmsnorm, norm, spread_norm_tiles(WIDEST_SPREAD, True), 2),
        (softmax, {"x": matrix, "y": matrix}, spread_tiles(WIDEST_SPREAD), 0),
        (norm_backward, {"dy": matrix, "x": matrix, "weight": vector, "inverse": tw.spec("f32", ("M",)), "dx": matrix,
                         "partial": tw.spec("f32", ("P", 1, "N"), align=16)},
         spread_gradient_tiles(4096, WIDEST_GRADIENTS)[0], 2),
    ]  # fmt: skip
    if dtype == "f32":
        types = {name: given for name, given in norm.items() if name not in ("residual", "total")}
        cases.append((layernorm, types | {"bias": vector}, spread_tiles(WIDEST_SPREAD), 0))
    for kernel, types, tiles, waiting in cases:
        options = {name: value for name, value in tiles.items() if name in CompileOptions.names()}
        meta = {name: value for name, value in tiles.items() if name not in options}
        artifact = tw.compile(kernel, "sm_90a", types | meta, **options)
        assert artifact.resources.spill_stores <= 64
        row_bytes = tiles["BN"] // 8 * DTYPES[dtype].bytes
        assert artifact.entries[0].abi.shared_bytes // row_bytes >= waiting
        if not waiting:
            assert artifact.entries[0].abi.shared_bytes < row_bytes
