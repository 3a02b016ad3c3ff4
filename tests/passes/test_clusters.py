"""Clusters: which grid axis is chosen, which copies are shared, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

import tilewright as tw
from tests.passes.test_levels import CASES, build
from tilewright.compiler.driver import run_passes
from tilewright.compiler.kernel import Kernel
from tilewright.compiler.options import CompileOptions
from tilewright.frontend.build import build_module
from tilewright.frontend.errors import CompileError
from tilewright.ir.async_ops import Barrier, Copy, MakeRing
from tilewright.ir.check_ops import Print
from tilewright.ir.core import Function, IRError
from tilewright.ir.layout_shared import SharedLayout
from tilewright.ir.target import get_target
from tilewright.ir.tile_ops import If, Store
from tilewright.ir.types import DTYPES, ViewType
from tilewright.kernels.gemm import gemm
from tilewright.passes.manager import PassContext, PassManager, PassOptions

FIRST_PASSES = "canonicalize,cse,licm,dce,schedule,tile-order,canonicalize,cse,placement,pipeline,roles"


def clustered(module: Any, ctas: int = 2, target: str = "sm_90a") -> Function:
    context = PassContext(get_target(target), PassOptions(num_ctas=ctas))
    return PassManager(FIRST_PASSES, context).run(module).functions[0]


def of_kernel(kernel: Kernel, tensors: dict[str, int], ctas: int = 2, align: int = 16, **meta: Any) -> Function:
    types: dict[str, Any] = {
        name: ViewType((None,) * rank, DTYPES["bf16"], (None,) * (rank - 1) + (1,), align)
        for name, rank in tensors.items()
    }
    return clustered(build_module(kernel.definition, {**types, **meta}), ctas)


def shared_tensors(function: Function) -> set[str]:
    return {op.view.hint for op in function.walk() if isinstance(op, Copy) and op.multicast is not None}


# --- what is chosen -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiles", "axis", "shared"), [({"BM": 64, "BN": 128}, 0, {"b"}), ({"BM": 256, "BN": 64}, 1, {"a"})]
)
def test_the_axis_that_shares_most_bytes(tiles: dict[str, int], axis: int, shared: set[str]) -> None:
    function = of_kernel(gemm, {"a": 2, "b": 2, "c": 2}, **tiles)
    assert function.attributes["num_ctas"] == 2 and function.attributes["cluster_axis"] == axis
    assert shared_tensors(function) == shared


@pytest.mark.parametrize("ctas", [2, 4])
def test_rings_count_the_consumers_of_all_blocks(ctas: int) -> None:
    function = clustered(build(CASES["gemm"], 16), ctas)
    (ring,) = [op for op in function.walk() if isinstance(op, MakeRing)]
    assert (ring.ctas, ring.consumers, ring.producers) == (ctas, 2 * ctas, 1)
    last = function.body.block.ops[-1]
    assert isinstance(last, Barrier) and last.scope == "cluster"


def test_a_program_with_one_axis_shares_what_does_not_follow_it() -> None:
    assert shared_tensors(clustered(build(CASES["mlp"], 16))) == {"w1", "w2"}


def test_rings_of_own_copies_stay_with_their_block() -> None:
    """Attention loads its queries once a program, from a place that follows the axis."""
    function = clustered(build(CASES["attention"], 16))
    ctas = [op.ctas for op in function.walk() if isinstance(op, MakeRing)]
    assert sorted(ctas) == [1, 2, 2]


@tw.kernel
def triangular(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor):
    """The loop ends where the row's diagonal is, so only the columns of a row run in step."""
    m, n = tw.program_id(0), tw.program_id(1)
    acc = tw.zeros((64, 64), tw.float32)
    for k in tw.range(m + 1):
        acc = tw.dot(tw.load(a, (m, k), (64, 64)), tw.load(b, (k, n), (64, 64)), acc)
    tw.store(c, (m, n), acc.to(c.dtype))


def test_loops_of_different_lengths_do_not_go_in_step() -> None:
    function = of_kernel(triangular, {"a": 2, "b": 2, "c": 2})
    assert function.attributes["cluster_axis"] == 1 and shared_tensors(function) == {"a"}


@tw.kernel
def talking(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor):
    m, n = tw.program_id(0), tw.program_id(1)
    acc = tw.zeros((64, 64), tw.float32)
    for k in tw.range(tw.cdiv(a.shape[1], 64)):
        acc = tw.dot(tw.load(a, (m, k), (64, 64)), tw.load(b, (k, n), (64, 64)), acc)
    tw.device_print("row {}", m)
    tw.store(c, (m, n), acc.to(c.dtype))


def test_blocks_without_a_program_have_no_effects() -> None:
    function = of_kernel(talking, {"a": 2, "b": 2, "c": 2})
    effects = [op for op in function.walk() if isinstance(op, Store | Print)]
    owners = [op.parent.parent.parent for op in effects]  # type: ignore[union-attr]
    assert len(effects) == 2 and all(isinstance(owner, If) for owner in owners)


# --- what is left as it is, or refused ------------------------------------------------------------------


def test_tensors_without_alignment_have_no_clusters() -> None:
    function = of_kernel(gemm, {"a": 2, "b": 2, "c": 2}, align=2)
    assert "num_ctas" not in function.attributes and not shared_tensors(function)


@tw.kernel
def batched(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor):
    i = tw.program_id(0)
    product = tw.dot(tw.load(a[i], (0, 0), (64, 64)), tw.load(b[i], (0, 0), (64, 64)), tw.zeros((64, 64), tw.float32))
    tw.store(c[i], (0, 0), product.to(c.dtype))


@tw.kernel
def counting(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor, n: tw.Tensor):
    """A program uses what an atomic update gives."""
    m = tw.program_id(0)
    place = tw.atomic_add(n, (m,), tw.full((1,), 1, tw.int32))
    product = tw.dot(tw.load(a, (m, 0), (64, 64)), tw.load(b, (0, 0), (64, 64)), tw.zeros((64, 64), tw.float32))
    tw.store(c, (m, 0), (product + tw.sum(place, axis=0).to(tw.float32)).to(c.dtype))


@tw.kernel
def narrow(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor):
    """Eight columns, the fewest that the unit takes."""
    m = tw.program_id(0)
    product = tw.dot(tw.load(a, (m, 0), (64, 64)), tw.load(b.T, (0, 0), (64, 8)), tw.zeros((64, 8), tw.float32))
    tw.store(c, (m, 0), product.to(c.dtype))


MATRICES = {name: tw.spec("bf16", ("M", "N"), align=16) for name in "abc"}
STACKS = {name: tw.spec("bf16", ("B", "M", "N"), align=16) for name in "abc"}


@pytest.mark.parametrize(
    ("kernel", "args", "target", "message"),
    [
        (gemm, MATRICES, "sm_80", "num_ctas=2: sm_80 has no clusters"),
        (gemm, MATRICES, "gfx942", "num_ctas=2: gfx942 has no clusters"),
        (narrow, MATRICES, "sm_90a", "do not divide among 2 blocks"),
        (batched, STACKS, "sm_90a", "load no tile in common"),
        (counting, {**MATRICES, "n": tw.spec("i32", ("K",))}, "sm_90a", "gives a value that the program uses"),
    ],
)
def test_what_clusters_cannot_do_is_an_error(kernel: Kernel, args: Any, target: str, message: str) -> None:
    with pytest.raises((CompileError, IRError), match=message):
        run_passes(kernel.definition, target, args, CompileOptions(num_ctas=2))


def test_prefetching_programs_have_no_clusters() -> None:
    with pytest.raises((CompileError, IRError), match="copies without rings"):
        run_passes(gemm.definition, "sm_90a", MATRICES, CompileOptions(num_ctas=2, schedule="prefetch"))


# --- parts of a tile ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "order", "axis", "parts", "step"),
    [
        ((64, 256), (0, 1), 1, 2, 128 * 128),  # lines of K: half of them
        ((64, 256), (0, 1), 0, 2, None),  # half of a swizzled line
        ((64, 256), (1, 0), 1, 2, 2 * 64 * 128),  # two of four blocks
        ((64, 256), (1, 0), 0, 4, 16 * 128),
        ((8, 64), (1, 0), 0, 2, None),  # four lines: the swizzle repeats after eight
        ((64, 192), (1, 0), 1, 2, None),  # three blocks
    ],
)
def test_parts_of_a_shared_tile(
    shape: tuple[int, int], order: tuple[int, int], axis: int, parts: int, step: int | None
) -> None:
    layout = SharedLayout(shape, 16, order, swizzle=128)
    assert layout.part_bytes(axis, parts) == step
