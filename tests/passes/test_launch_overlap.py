"""Launches that begin early: where functions wait for the launch before them, and what never waits."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import tilewright as tw
from tests.passes.test_levels import CASES, build
from tests.support.comm_cases import CASES as CASES_OF_RANKS
from tests.support.comm_cases import scheduled as communicating
from tilewright.backends.nvidia.compile import lower_function
from tilewright.compiler.kernel import Kernel
from tilewright.frontend.build import build_module
from tilewright.ir.async_ops import AwaitGrid, MakeRing, Role
from tilewright.ir.core import Effect, Function
from tilewright.ir.interpreter import run
from tilewright.ir.target import TARGETS, get_target
from tilewright.ir.types import DTYPES, ViewType
from tilewright.kernels.gemm import gemm, gemm_partial
from tilewright.kernels.softmax import softmax
from tilewright.passes.manager import PassContext, PassManager, PassOptions
from tilewright.passes.pipelines import default_pipeline

MEMORY = Effect.READ | Effect.WRITE
#: PTX that reaches global memory
ACCESS = re.compile(r"\b(ld|st|red|atom)\b[\w.]*\.global|cp\.(reduce\.)?async|\bcall\b")


def scheduled(module: Any, target: str = "sm_90a", **options: Any) -> Function:
    context = PassContext(get_target(target), PassOptions(**options))
    return PassManager(default_pipeline(context.target), context).run(module).functions[0]


def of_kernel(
    kernel: Kernel, target: str = "sm_90a", align: int = 16, schedule: str | None = None, **given: Any
) -> Function:
    """Matrices by (dtype, rank), scalars by their dtype, and compile-time values."""
    types = {
        n: ViewType((None,) * g[1], DTYPES[g[0]], (None,) * (g[1] - 1) + (1,), align) if isinstance(g, tuple) else g
        for n, g in given.items()
    }
    return scheduled(build_module(kernel.definition, types), target, schedule=schedule)


def waits(function: Function) -> list[int]:
    """Where among the operations of the whole block it waits; it must wait nowhere else."""
    found = [i for i, op in enumerate(function.body.block.ops) if isinstance(op, AwaitGrid)]
    assert len(found) == sum(isinstance(op, AwaitGrid) for op in function.walk())
    return found


MATRICES = {"a": ("bf16", 2), "b": ("bf16", 2), "c": ("bf16", 2)}
PROGRAMS = {
    "rows": lambda: of_kernel(softmax, x=("bf16", 2), y=("bf16", 2), BN=1024),
    "roles": lambda: of_kernel(gemm, **MATRICES, BM=128, BN=128),
    "roles, threads copy": lambda: of_kernel(gemm, align=2, **MATRICES, BM=64, BN=64),
    "split": lambda: of_kernel(gemm_partial, a=("bf16", 2), b=("bf16", 2), partials=("f32", 3)),
    "clusters": lambda: scheduled(build(CASES["gemm"], 16), num_ctas=2),
    "alternating": lambda: of_kernel(gemm, schedule="alternate", **MATRICES, BM=128, BN=128),
    "prefetch": lambda: scheduled(build(CASES["gemm"], 16), schedule="prefetch"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_functions_wait_once_in_front_of_global_memory(name: str) -> None:
    function = PROGRAMS[name]()
    ops = function.body.block.ops
    (place,) = waits(function)
    for op in ops[:place]:
        assert not any(isinstance(each, Role) or each.effect & MEMORY for each in op.walk())
    assert not any(isinstance(op, MakeRing) for op in ops[place:]), "barriers are set up meanwhile"


@pytest.mark.parametrize("name", PROGRAMS)
def test_instructions_stay_behind_the_wait(name: str) -> None:
    function = PROGRAMS[name]()
    entry = lower_function(function, get_target("sm_90a"))
    assert entry.abi.awaits_grid
    (ptx,) = ptx_of(entry)
    wait = ptx.index("griddepcontrol.wait;")
    assert ptx.count("griddepcontrol") == 1, "nothing lets the next launch begin before the end"
    accesses = [found.start() for found in ACCESS.finditer(ptx)]
    assert accesses and min(accesses) > wait
    barriers = [found.start() for found in re.finditer("mbarrier.init", ptx)]
    assert bool(barriers) == (name not in ("rows", "prefetch")) and all(place < wait for place in barriers)


def ptx_of(*entries: Any) -> list[str]:
    from tilewright.backends.llvm import TargetMachineSpec, emit_assembly, optimize

    target = get_target("sm_90a")
    spec = TargetMachineSpec(target.triple, target.cpu, target.llvm_features)
    return [emit_assembly(optimize(entry.module.finish(debug_info=False), spec)) for entry in entries]


@tw.kernel
def looks_up(x: tw.Tensor, starts: tw.Tensor, y: tw.Tensor) -> None:
    """The first thing is a scalar from memory, and a loop that stores."""
    tw.assume(x.shape[1] % 8 == 0)
    first = tw.load(starts, tw.program_id(0))
    for m in tw.range(first, x.shape[0]):
        tw.store(y, (m, 0), tw.load(x, (m, 0), (1, 256)) * 2)


def test_a_scalar_from_memory_is_read_behind_the_wait() -> None:
    function = of_kernel(looks_up, x=("f32", 2), starts=("i32", 1), y=("f32", 2))
    ops = function.body.block.ops
    (place,) = waits(function)
    assert not any(op.effect & MEMORY for op in ops[:place]) and any(op.effect & MEMORY for op in ops[place:])
    x, y = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32), np.full((3, 256), np.nan, np.float32)
    run(function, {"x": x, "starts": np.array([0], np.int32), "y": y}, grid=(1, 1, 1))
    assert np.array_equal(y, x * 2)


@tw.kernel
def speaks(x: tw.Tensor) -> None:
    tw.device_print("here {}", tw.program_id(0))
    tw.store(x, 0, tw.zeros((128,), tw.float32))


def test_prints_come_behind_the_wait() -> None:
    function = of_kernel(speaks, x=("f32", 1))
    names = [op.name for op in function.body.block.ops]
    assert names.index("async.await_grid") < names.index("tile.print")


@tw.kernel
def idle(x: tw.Tensor) -> None:
    tw.assume(x.shape[0] % 8 == 0)


def test_even_who_does_nothing_waits() -> None:
    """Who waits for its end relies on the end of what was before."""
    assert waits(of_kernel(idle, x=("f32", 1)))


@pytest.mark.parametrize("target", TARGETS)
def test_targets(target: str) -> None:
    function = of_kernel(softmax, target, x=("bf16", 2), y=("bf16", 2), BN=1024)
    assert bool(waits(function)) == (target.startswith("sm_") and int(target[3:].rstrip("a")) >= 90)


def test_functions_that_communicate_are_launched_behind_the_one_before() -> None:
    (function,) = communicating(next(iter(CASES_OF_RANKS)), "sm_90a").functions
    assert function.attributes["communicates"] and not waits(function)
