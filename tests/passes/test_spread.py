"""Programs spread over the blocks of a cluster: what is cut, what is told to all, and what is refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from tilewright.compiler.driver import run_passes
from tilewright.compiler.kernel import Kernel
from tilewright.compiler.options import CompileOptions
from tilewright.frontend.build import build_module
from tilewright.frontend.errors import CompileError
from tilewright.ir.async_ops import Copy
from tilewright.ir.cluster_ops import AwaitMailboxes, ClusterReduce, MakeMailbox
from tilewright.ir.core import Function, IRError, Module
from tilewright.ir.interpreter import run
from tilewright.ir.parser import parse_module
from tilewright.ir.printer import print_module
from tilewright.ir.target import get_target
from tilewright.ir.tile_ops import If, Load, Store
from tilewright.ir.types import DTYPES, TileType, ViewType
from tilewright.ir.verifier import verify
from tilewright.kernels.norm_backward import norm_backward
from tilewright.kernels.rmsnorm import rmsnorm
from tilewright.kernels.softmax import softmax
from tilewright.passes.manager import PassContext, PassManager, PassOptions, parse_pipeline
from tilewright.passes.pipelines import default_pipeline

DTYPE_OF = {np.dtype(np.float32): "f32", np.dtype(np.int32): "i32", np.dtype(ml_dtypes.bfloat16): "bf16"}


def view(dtype: str, rank: int) -> ViewType:
    return ViewType((None,) * rank, DTYPES[dtype], (None,) * (rank - 1) + (1,), 16)


def module_of(kernel: Kernel, *arrays: Any, **meta: Any) -> Module:
    """The frontend's module for arrays (and scalars, of float32) like these."""
    types: dict[str, Any] = {}
    for parameter, value in zip(kernel.definition.parameters, arrays, strict=False):
        given = view(DTYPE_OF[value.dtype], value.ndim) if isinstance(value, np.ndarray) else DTYPES["f32"]
        types[parameter.name] = given
    return build_module(kernel.definition, {**types, **meta})


def spread(module: Module, ctas: int, pipeline: str = "", warps: int | None = None) -> Function:
    target = get_target("sm_90a")
    context = PassContext(target, PassOptions(num_ctas=ctas, num_warps=warps))
    return PassManager(pipeline or default_pipeline(target), context).run(module).functions[0]


# --- every level -----------------------------------------------------------------------------------------


@tw.kernel
def norm(x: tw.Tensor, y: tw.Tensor, sums: tw.Tensor, *, BN: tw.constexpr = 256):
    """Walks over rows, sums them up, and the columns too."""
    total = tw.zeros((BN,), tw.float32)
    for m in tw.range(tw.program_id(0), x.shape[0], tw.num_programs(0)):
        row = tw.load(x, (m, 0), (1, BN)).to(tw.float32)
        scale = tw.rsqrt(tw.sum(row * row, axis=1) / x.shape[1] + 1.0)
        total = total + tw.sum(row, axis=0)
        tw.store(y, (m, 0), (row * scale[:, None]).to(y.dtype))
    tw.store(sums, (tw.program_id(0), 0), total[None, :])


@pytest.mark.parametrize("persistent", [None, True])
def test_every_level_is_the_program(persistent: bool | None) -> None:
    """After each pass: valid, printable, and the same numbers to rounding."""
    x = np.random.default_rng(0).standard_normal((7, 200)).astype(np.float32)
    y, sums = np.empty_like(x), np.empty((3, 200), np.float32)
    module = module_of(norm, x, y, sums)
    scale = 1 / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1)
    target = get_target("sm_90a")
    context = PassContext(target, PassOptions(num_ctas=4, num_warps=2, persistent=persistent))
    spread_yet = False
    for pass_ in parse_pipeline(default_pipeline(target)):
        pass_.run(module, context)
        verify(module)
        again = parse_module(print_module(module), "again")
        assert print_module(again) == print_module(module)
        spread_yet |= pass_.name == "spread"
        if pass_.name not in ("spread", "tile-order", "waiting-rows", "copy-ahead", "mailboxes", "shared-plan"):
            continue
        y[...], sums[...] = np.nan, np.nan
        run(again.functions[0], [x, y, sums], (3,))
        np.testing.assert_allclose(y, x * scale, rtol=1e-5, atol=1e-6, err_msg=pass_.name)
        np.testing.assert_allclose(sums.sum(0), x.sum(0), rtol=1e-4, atol=1e-5, err_msg=pass_.name)
    assert spread_yet and any(isinstance(op, MakeMailbox) for op in module.walk())


@tw.kernel
def several(x: tw.Tensor, y: tw.Tensor, n: tw.Tensor, *, BN: tw.constexpr = 64):
    """Exchanges of all kinds: of integers and bools, in branches and loops, of scalars and of several rows."""
    m, j = tw.program_id(0), tw.program_id(1)
    row = tw.load(x, (m, j), (4, BN))
    best = tw.argmax(row, axis=1)
    positive = tw.max((row > 0.0).to(tw.int32), axis=1)
    factor = 1.0
    if tw.load(n, m) > 1:
        factor = tw.sum(row)
    steps = 0
    while tw.max(row) > 1.0:
        row = row * 0.5
        steps += 1
    for _ in tw.range(tw.load(n, m)):
        row = row + tw.min(row, axis=1)[:, None]
    tw.store(y, (m, j), row * factor + (best + positive + steps)[:, None].to(tw.float32))


def expected(x: np.ndarray, n: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    for m in range(x.shape[0] // 4):
        for j in range(x.shape[1] // 64):
            part = np.s_[4 * m : 4 * m + 4, 64 * j : 64 * j + 64]
            row = x[part].astype(np.float64)
            extra = row.argmax(1) + (row > 0).any(1)
            factor, steps = row.sum() if n[m] > 1 else 1.0, 0
            while row.max() > 1:
                row, steps = row * 0.5, steps + 1
            for _ in range(n[m]):
                row = row + row.min(1, keepdims=True)
            y[part] = row * factor + (extra + steps)[:, None]
    return y


@pytest.mark.parametrize(("ctas", "warps"), [(2, 4), (4, 1), (8, 2)])
def test_exchanges_of_all_kinds(ctas: int, warps: int) -> None:
    x = 2 * np.random.default_rng(1).standard_normal((8, 128)).astype(np.float32)
    n, y = np.array([2, 0], np.int32), np.full((8, 128), np.nan, np.float32)
    function = spread(module_of(several, x, y, n), ctas, warps=warps)
    run(function, [x, y, n], (2, 2))
    np.testing.assert_allclose(y, expected(x, n), rtol=1e-5, atol=1e-4)
    y[...] = np.nan
    tw.device("emulate:sm_90a,races,seed=3").launch(several, (2, 2), x, y, n, num_ctas=ctas, num_warps=warps)
    np.testing.assert_allclose(y, expected(x, n), rtol=1e-5, atol=1e-4)


@tw.kernel
def touching(x: tw.Tensor, indices: tw.Tensor, y: tw.Tensor, counts: tw.Tensor, one: tw.Tensor):
    """Gathers, scatters and atomic updates, of parts and of what all blocks have."""
    m = tw.program_id(0)
    places = tw.load(indices, 0, 64)
    row = tw.gather(x, places, 1, tile=(m, 0), shape=(1, 64))
    tw.scatter(y, places, row * 2.0, 1, tile=(m, 0))
    tw.atomic_add(counts, 0, tw.full((64,), 1, tw.int32))
    tw.atomic_add(one, 0, 1)
    if tw.sum(row) > 1e30:
        tw.store(y, (m, 0), row)


def test_updates_happen_once() -> None:
    random = np.random.default_rng(2)
    x, places = random.standard_normal((2, 64)).astype(np.float32), random.permutation(64).astype(np.int32)
    y, counts, one = np.zeros_like(x), np.zeros(64, np.int32), np.zeros(1, np.int32)
    function = spread(module_of(touching, x, places, y, counts, one), 4)
    run(function, [x, places, y, counts, one], (2,))
    np.testing.assert_array_equal(y, 2 * x)
    assert (counts == 2).all() and one[0] == 2


# --- what is chosen ---------------------------------------------------------------------------------------


def test_the_widest_dim_is_cut_and_no_other() -> None:
    x = np.empty((4, 4), ml_dtypes.bfloat16)
    function = spread(module_of(softmax, x, x, BM=2, BN=1024), 4, "canonicalize,cse,licm,dce,spread")
    shapes = {v.type.shape for op in function.walk() for v in op.results if isinstance(v.type, TileType)}
    assert shapes == {(2, 256), (2,), (2, 1)}
    exchanges = [op for op in function.walk() if isinstance(op, ClusterReduce)]
    assert [op.fn for op in exchanges] == ["max", "sum"]


def test_every_exchange_has_a_mailbox_and_all_are_awaited_once() -> None:
    x, row = np.empty((4, 4), ml_dtypes.bfloat16), np.empty(4, np.float32)
    module = module_of(
        norm_backward, x, x, row.astype(ml_dtypes.bfloat16), row, x, np.empty((1, 1, 4), np.float32), BN=1024
    )
    function = spread(module, 2)
    boxes = [op.result for op in function.walk() if isinstance(op, MakeMailbox)]
    assert [op.mailbox for op in function.walk() if isinstance(op, ClusterReduce)] == boxes
    assert len([op for op in function.walk() if isinstance(op, AwaitMailboxes)]) == 1
    assert any(isinstance(op, Copy) for op in function.walk()), "rows of the loop travel ahead"


def test_a_square_tile_is_cut_by_columns() -> None:
    @tw.kernel
    def square(x: tw.Tensor, y: tw.Tensor):
        tw.store(y, (0, 0), tw.load(x, (0, 0), (64, 64)) * 2.0)

    x = np.empty((4, 4), np.float32)
    function = spread(module_of(square, x, x), 2, "spread")
    assert [op.result.type.shape for op in function.walk() if isinstance(op, Load)] == [(64, 32)]


def test_what_all_blocks_have_one_stores() -> None:
    x, w = np.empty((4, 4), np.float32), np.empty(4, np.float32)
    module = module_of(rmsnorm, x, w, x, 0.0, BN=256)
    assert not [op for op in spread(module, 2, "spread").walk() if isinstance(op, If)]
    types = {"x": view("f32", 2), "weight": view("f32", 1), "y": view("f32", 2), "inverse": view("f32", 1)}
    module = build_module(rmsnorm.definition, {**types, "eps": DTYPES["f32"], "BN": 256})
    (branch,) = [op for op in spread(module, 2, "spread").walk() if isinstance(op, If)]
    assert [op.view.hint for op in branch.walk() if isinstance(op, Store)] == ["inverse"]


# --- what is refused ----------------------------------------------------------------------------------------


@tw.kernel
def running(x: tw.Tensor, y: tw.Tensor):
    tw.store(y, (0, 0), tw.cumsum(tw.load(x, (0, 0), (1, 64)), axis=1))


@tw.kernel
def flat(x: tw.Tensor, y: tw.Tensor):
    tw.store(y, (0, 0), tw.load(x, (0, 0), (2, 128)).reshape(4, 64)[:2, :])


@tw.kernel
def halves(x: tw.Tensor, y: tw.Tensor):
    tw.store(y, (0, 0), tw.load(x, (0, 0), (1, 64))[:, :32])


@tw.kernel
def joined(x: tw.Tensor, y: tw.Tensor):
    row = tw.load(x, (0, 0), (1, 64))
    tw.store(y, (0, 0), tw.cat((row, row), axis=1))


@tw.kernel
def symmetric(x: tw.Tensor, y: tw.Tensor):
    square = tw.load(x, (0, 0), (64, 64))
    tw.store(y, (0, 0), square + square.T)


@tw.kernel
def ordered(x: tw.Tensor, y: tw.Tensor, n: tw.Tensor):
    tw.store(y, (0, 0), tw.load(x, (0, 0), (1, 64)))
    tw.atomic_add(n, 0, 1, order="acq_rel")


@tw.kernel
def numbered(x: tw.Tensor, y: tw.Tensor, n: tw.Tensor):
    place = tw.atomic_add(n, 0, 1)
    tw.store(y, (place, 0), tw.load(x, (0, 0), (1, 64)))


@tw.kernel
def changing(x: tw.Tensor, y: tw.Tensor, n: tw.Tensor):
    if tw.load(n, 0) > 0:
        tw.store(y, 0, tw.sum(tw.load(x, (0, 0), (1, 64)), axis=1))
    tw.atomic_add(n, 0, 1)


@tw.kernel
def narrow(x: tw.Tensor, y: tw.Tensor):
    tw.store(y, (0, 0), tw.load(x, (0, 0), (1, 2)))


MATRICES = {name: tw.spec("f32", ("M", "N"), align=16) for name in "xy"}
COUNTED = {**MATRICES, "n": tw.spec("i32", ("K",))}


@pytest.mark.parametrize(
    ("kernel", "args", "message", "line"),
    [
        (running, MATRICES, "'tile.scan.sum' adds up along a dim, so that 64 elements cannot be spread", "tw.cumsum"),
        (flat, MATRICES, "'tile.reshape' moves elements along a dim", "reshape(4, 64)"),
        (halves, MATRICES, "'tile.extract' moves elements along a dim", "[:, :32]"),
        (joined, MATRICES, "'tile.cat' joins tiles along a dim", "tw.cat"),
        (symmetric, MATRICES, "ties both dims of a tile together", "square"),
        (ordered, COUNTED, "an update that orders memory would order that of one block only", "acq_rel"),
        (numbered, COUNTED, "happens once, but all blocks need what it gives", "tw.atomic_add"),
        (changing, {**COUNTED, "y": tw.spec("f32", ("M",))}, "decides how often blocks exchange", "tw.load(n, 0)"),
        (narrow, MATRICES, "have 2 elements at most along one dim, which do not divide among 4 blocks", "narrow"),
    ],
)  # fmt: skip
def test_what_cannot_be_spread_is_an_error_in_its_line(kernel: Kernel, args: Any, message: str, line: str) -> None:
    with pytest.raises((CompileError, IRError), match="num_ctas=4") as caught:
        run_passes(kernel.definition, "sm_90a", args, CompileOptions(num_ctas=4))
    assert message in str(caught.value) and line in str(caught.value)


@pytest.mark.parametrize("target", ["sm_80", "gfx942", "sm_100a"])
def test_targets_without_clusters_say_so(target: str) -> None:
    with pytest.raises((CompileError, IRError), match=f"{target} has no clusters"):
        run_passes(softmax.definition, target, {**MATRICES, "BN": 64}, CompileOptions(num_ctas=4))


# --- a wrong protocol in the interpreter ----------------------------------------------------------------------

EXCHANGE = """
func @exchange(%y: view<?xf32, strides=[1], align=16>) {num_ctas = 2, spread = true} {
  %zero = tile.constant {value = 0} : i32
  %one = tile.constant {value = 1} : i32
  %two = tile.constant {value = 2} : i32
  %id = tile.block_id : i32
  %member = tile.mod %id, %two : i32
  %x = tile.cast %id : f32
  %box = async.mailbox : mailbox<2 x f32>
  async.await_mailboxes
  %a = tile.cluster_reduce.sum %x, mailbox(%box), count(%zero) : f32
  %b = tile.cluster_reduce.max %a, mailbox(%box), count(%one) : f32
  %c = tile.splat %b : tile<1xf32>
  tile.store %y, [%id], %c
}
"""


SECOND = "  %b = tile.cluster_reduce.max %a, mailbox(%box), count(%one) : f32"
#: which only one of the blocks takes
IN_A_BRANCH = f"""
  %first = tile.eq %member, %zero : i1
  %b = tile.if %first : f32 {{ {SECOND.replace("%b =", "%d =")}
    tile.yield [%d] }} else {{ tile.yield [%a] }}
"""


def test_a_mailbox_serves_several_exchanges() -> None:
    y = np.zeros(4, np.float32)
    run(parse_module(EXCHANGE, "exchange").functions[0], [y], (2,))
    assert y.tolist() == [1, 1, 5, 5]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  async.await_mailboxes\n", "", "before the other blocks are known to have mailboxes"),
        ("count(%one)", "count(%zero)", "use 0 of a mailbox comes after 1 uses"),
        ("count(%one)", "count(%two)", "use 2 of a mailbox comes after 1 uses"),
        (SECOND, IN_A_BRANCH, "deadlock|which has ended"),
    ],
)  # fmt: skip
def test_a_wrong_protocol_is_an_error(old: str, new: str, message: str) -> None:
    with pytest.raises(IRError, match=message):
        run(parse_module(EXCHANGE.replace(old, new), "exchange").functions[0], [np.zeros(4, np.float32)], (2,))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mailbox(%box), count(%zero)", "mailbox(%box)", "a mailbox and a count, or neither"),
        ("mailbox<2 x f32>", "mailbox<2 x i32>", "takes a mailbox of f32"),
        ("mailbox<2 x f32>", "mailbox<1 x f32>", "has one block only"),
        ("%x = tile.cast %id : f32", "%x = tile.cast %id : f16", "exchange i32, i64, f32, f64, not f16"),
    ],
)
def test_the_verifier_knows_exchanges(old: str, new: str, message: str) -> None:
    text = EXCHANGE.replace(old, new)
    text = text.replace(": f32\n  %b", ": f16\n  %b") if "f16" in new else text
    with pytest.raises(IRError, match=message):
        verify(parse_module(text, "exchange"))
