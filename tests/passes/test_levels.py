"""Every pass keeps every program valid, printable and bit-equal, on every target.

GEMM, two chained dots and row softmax take the same pipelines; nothing here is special to one of them.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from tilewright.compiler.kernel import Kernel
from tilewright.frontend.build import build_module
from tilewright.ir.async_ops import AsyncDot, Barrier, LocalStore, Role, buffer_of
from tilewright.ir.core import IRError, Module
from tilewright.ir.interpreter import run
from tilewright.ir.parser import parse_module
from tilewright.ir.printer import print_module
from tilewright.ir.target import TARGETS, get_target
from tilewright.ir.tile_ops import For
from tilewright.ir.types import DTYPES, TileType, ViewType
from tilewright.ir.verifier import verify
from tilewright.kernels.attention import attention
from tilewright.kernels.gemm import gemm
from tilewright.kernels.mlp import mlp
from tilewright.kernels.softmax import softmax
from tilewright.passes.manager import PassContext, PassOptions, parse_pipeline
from tilewright.passes.pipelines import default_pipeline

BF16 = ml_dtypes.bfloat16
ROW_MAJOR, COLUMN_MAJOR = (None, 1), (1, None)


@tw.kernel
def residual(x: tw.Tensor, w: tw.Tensor, r: tw.Tensor, y: tw.Tensor, scale: tw.float32):
    """A dot with an epilogue that loads, reduces and branches."""
    m = tw.program_id(0)
    acc = tw.zeros((64, 64), tw.float32)
    for k in tw.range(tw.cdiv(x.shape[1], 32)):
        acc = tw.dot(tw.load(x, (m, k), (64, 32)), tw.load(w, (k, 0), (32, 64)), acc)
    acc = acc * scale + tw.load(r, (m, 0), (64, 64)).to(tw.float32)
    if m > 0:
        acc = acc - tw.max(acc, axis=1)[:, None]
    tw.store(y, (m, 0), acc.to(y.dtype))


@tw.kernel
def promoted(x: tw.Tensor, w: tw.Tensor, scale: tw.Tensor, y: tw.Tensor):
    """Each step's product is scaled, and added up by the vector unit."""
    m = tw.program_id(0)
    acc = tw.zeros((64, 64), tw.float32)
    for k in tw.range(tw.cdiv(x.shape[1], 32)):
        product = tw.dot(tw.load(x, (m, k), (64, 32)), tw.load(w, (k, 0), (32, 64)))
        acc += product * tw.load(scale, (m, k), (64, 1)).to(tw.float32)
    tw.store(y, (m, 0), acc.to(y.dtype))


@tw.kernel
def kept(x: tw.Tensor, w: tw.Tensor, y: tw.Tensor):
    """One operand stays; the products are worked on."""
    m = tw.program_id(0)
    rows, acc = tw.load(x, (m, 0), (64, 64)), tw.zeros((64, 64), tw.float32)
    for k in tw.range(tw.cdiv(w.shape[0], 64)):
        acc = acc * 0.5 + tw.maximum(tw.dot(rows, tw.load(w, (k, 0), (64, 64))), 0.0)
    tw.store(y, (m, 0), acc.to(y.dtype))


@tw.kernel
def held(x: tw.Tensor, w: tw.Tensor, y: tw.Tensor):
    """Left operands that are calculated in front of a loop with products of several."""
    m = tw.program_id(0)
    rows, acc = tw.load(x, (m, 0), (64, 64)), tw.zeros((64, 64), tw.float32)
    left, right = tw.maximum(rows, 0.0), tw.minimum(rows, 0.0)
    for k in tw.range(tw.cdiv(w.shape[0], 64)):
        tile = tw.load(w, (k, 0), (64, 64))
        acc = acc * 0.5 + tw.maximum(tw.dot(left, tile), 1.0) * tw.dot(right, tile)
    tw.store(y, (m, 0), acc.to(y.dtype))


@tw.kernel
def streamed(x: tw.Tensor, y: tw.Tensor, *, BM: tw.constexpr = 16):
    """A loop without products that loads tiles and ends inside one."""
    total = tw.zeros((BM, 128), tw.float32)
    for k in tw.range(tw.program_id(0), tw.cdiv(x.shape[0], BM), tw.num_programs(0)):
        total = total * 0.5 + tw.load(x, (k, 0), (BM, 128)).to(tw.float32)
    tw.store(y, (tw.program_id(0), 0), tw.sum(total, axis=0)[None, :].to(y.dtype))


@tw.kernel
def chained(x: tw.Tensor, y: tw.Tensor, z: tw.Tensor, v: tw.Tensor, out: tw.Tensor):
    """Vector work on one product, then products with it and with what follows from it, as in attention backward."""
    m = tw.program_id(0)
    left, right = tw.load(x, (m, 0), (128, 64)), tw.load(z, (m, 0), (128, 64))
    one, other = tw.zeros((128, 64), tw.float32), tw.zeros((128, 64), tw.float32)
    for j in tw.range(tw.cdiv(y.shape[0], 64)):
        tile, weight = tw.load(y, (j, 0), (64, 64)), tw.load(v, j, (64,)).to(tw.float32)
        s = tw.dot(left, tile.T)
        t = tw.dot(right, tile.T)
        p = tw.exp2(s * 0.125 - weight[None, :])
        p = tw.where((j * 64 + tw.arange(0, 64) < y.shape[0])[None, :], p, 0.0)
        one = tw.dot(p.to(y.dtype), tile, one)
        other = tw.dot((p * t).to(y.dtype), tile, other)
    tw.store(out, (m, 0), (one + other).to(out.dtype))


@tw.kernel
def exchanged(
    x: tw.Tensor, y: tw.Tensor, v: tw.Tensor, out: tw.Tensor, *, BM: tw.constexpr = 128, BN: tw.constexpr = 64
):
    """Products whose operand the warps exchange, and whose results leave in every iteration."""
    m = tw.program_id(0)
    left, right = tw.load(x, (m, 0), (BM, 64)), tw.load(v, (m, 0), (64, BM))
    for j in tw.range(tw.cdiv(y.shape[0], BN)):
        s = tw.dot(left, tw.load(y, (j, 0), (BN, 64)).T)
        tw.store(out, (m, j), tw.dot(right, tw.maximum(s, 0.0).to(y.dtype)).to(out.dtype))


@dataclass
class Case:
    kernel: Kernel
    inputs: dict[str, tuple[int, ...]]
    output: tuple[str, tuple[int, ...]]
    grid: tuple[int, int, int]
    strides: dict[str, Any]
    scalars: dict[str, Any]
    meta: dict[str, Any]


def case(kernel, inputs, output, grid, strides=None, scalars=None, **meta):
    return Case(kernel, inputs, output, grid, strides or {}, scalars or {}, meta)


SMALL = {"BM": 64, "BN": 64, "BK": 32}
CASES = {
    "gemm": case(gemm, {"a": (200, 150), "b": (150, 300)}, ("c", (200, 300)), (2, 2, 1)),
    "gemm-small": case(gemm, {"a": (70, 33), "b": (33, 130)}, ("c", (70, 130)), (2, 3, 1), **SMALL),
    "gemm-nt": case(
        gemm, {"a": (130, 96), "b": (96, 70)}, ("c", (130, 70)), (3, 2, 1), strides={"b": COLUMN_MAJOR}, **SMALL
    ),
    "gemm-tn": case(
        gemm, {"a": (130, 96), "b": (96, 70)}, ("c", (130, 70)), (3, 2, 1), strides={"a": COLUMN_MAJOR}, **SMALL
    ),
    "gemm-empty-k": case(gemm, {"a": (64, 0), "b": (0, 64)}, ("c", (64, 64)), (1, 1, 1), **SMALL),
    "mlp": case(
        mlp, {"x": (130, 100), "w1": (100, 64), "w2": (64, 90)}, ("y", (130, 90)), (3, 1, 1), BM=64, BH=64, BN=64, BK=32
    ),
    "attention": case(
        attention, {"q": (1, 2, 150, 64), "k": (1, 1, 200, 64), "v": (1, 1, 200, 64)}, ("o", (1, 2, 150, 64)),
        (3, 2, 1), scalars={"scale": 0.18}, D=64, BM=64, BN=64,
    ),
    "attention-causal": case(
        attention, {"q": (2, 1, 200, 64), "k": (2, 1, 200, 64), "v": (2, 1, 200, 64)}, ("o", (2, 1, 200, 64)),
        (4, 1, 2), scalars={"scale": 0.18}, D=64, BM=64, BN=64, CAUSAL=True,
    ),
    **{
        f"promoted-{k}": case(
            promoted, {"x": (100, k), "w": (k, 64), "scale": (100, 9)}, ("y", (100, 64)), (2, 1, 1)
        )
        for k in (0, 30, 64, 150)
    },
    **{f"kept-{k}": case(kept, {"x": (100, 64), "w": (k, 64)}, ("y", (100, 64)), (2, 1, 1)) for k in (0, 64, 150)},
    **{f"held-{k}": case(held, {"x": (100, 64), "w": (k, 64)}, ("y", (100, 64)), (2, 1, 1)) for k in (0, 150)},
    **{
        f"chained-{n}": case(
            chained, {"x": (200, 64), "y": (n, 64), "z": (200, 64), "v": (n,)}, ("out", (200, 64)), (2, 1, 1)
        )
        for n in (0, 50, 300)
    },
    **{
        f"exchanged-{n}": case(
            exchanged, {"x": (200, 64), "y": (n, 64), "v": (128, 128)}, ("out", (128, n)), (2, 1, 1)
        )
        for n in (50, 130, 300)
    },
    "softmax": case(softmax, {"x": (5, 1000)}, ("y", (5, 1000)), (5, 1, 1), BN=1024),
    "streamed": case(streamed, {"x": (75, 100)}, ("y", (3, 100)), (3, 1, 1)),
    "streamed-empty": case(streamed, {"x": (0, 100)}, ("y", (3, 100)), (3, 1, 1)),
    "residual": case(
        residual, {"x": (100, 70), "w": (70, 64), "r": (100, 64)}, ("y", (100, 64)), (2, 1, 1), scalars={"scale": 0.5}
    ),
}  # fmt: skip


def build(entry: Case, align: int) -> Module:
    shapes = {**entry.inputs, entry.output[0]: entry.output[1]}
    types: dict[str, Any] = {
        name: ViewType(
            (None,) * len(shape), DTYPES["bf16"], entry.strides.get(name, (None,) * (len(shape) - 1) + (1,)), align
        )
        for name, shape in shapes.items()
    }
    types |= dict.fromkeys(entry.scalars, DTYPES["f32"])
    return build_module(entry.kernel.definition, {**types, **entry.meta})


def arrays(entry: Case) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    values = {}
    for name, shape in entry.inputs.items():
        array = rng.standard_normal(shape).astype(BF16)
        values[name] = np.asfortranarray(array) if entry.strides.get(name) == COLUMN_MAJOR else array
    return values


def execute(module: Module, entry: Case) -> np.ndarray:
    """The output's bits."""
    function = module.functions[0]
    name, shape = entry.output
    out = np.full(shape, np.nan, BF16)
    blocks = {"blocks": max(2, function.attributes.get("num_ctas", 1))} if function.attributes.get("persistent") else {}
    run(function, {**arrays(entry), **entry.scalars, name: out}, grid=entry.grid, **blocks)
    return out.view(np.uint16)


def levels(module: Module, target: str, options: PassOptions) -> Iterator[str]:
    context = PassContext(get_target(target), options)
    for pass_ in parse_pipeline(default_pipeline(context.target)):
        pass_.run(module, context)
        yield str(pass_)


def check_levels(entry: Case, module: Module, target: str, options: PassOptions, run_after: Container[str]) -> str:
    """The text behind all passes; behind each that changed something, validity, its text and the bits.

    ``run_after``: names of the passes after which the program is run.
    """
    expected = execute(module, entry)
    assert not np.isnan(expected.view(BF16).astype(np.float32)).any()
    text = ""
    for level in levels(module, target, options):
        before, text = text, print_module(module, locations=True)
        if text == before:
            continue
        verify(module)
        assert print_module(parse_module(text), locations=True) == text, level
        if level.split("{")[0] in run_after:
            np.testing.assert_array_equal(execute(module, entry), expected, err_msg=f"after {level}")
    return text


#: targets with pipelines of their own, and addresses that copy engines or vectors cannot take
LEVELS = {("sm_90a", 16), ("sm_90a", 2), ("sm_80", 16), ("gfx942", 16)}


@pytest.mark.parametrize(
    ("target", "align"),
    [
        pytest.param(target, align, marks=() if (target, align) in LEVELS else pytest.mark.exhaustive)
        for target in sorted(TARGETS)
        for align in (16, 2)
    ],
)
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_level_gives_the_same_bits(name: str, target: str, align: int) -> None:
    entry = CASES[name]
    check_levels(entry, build(entry, align), target, PassOptions(), CHANGES_SCHEDULE)


#: the passes after which the program is run again; the others are covered by their own tests
CHANGES_SCHEDULE = {
    "tile-order", "pipeline", "roles", "peel", "skew", "mma", "copy-ahead", "prefetch", "layouts", "staging", "fences",
    "shared-plan", "alternate", "turns", "barriers", "issue-ahead",
}  # fmt: skip


@pytest.mark.parametrize("ctas", [2, 4])
@pytest.mark.parametrize(
    "name", ["gemm", "gemm-small", "gemm-nt", "gemm-tn", "gemm-empty-k", "mlp", "attention", "residual"]
)
def test_clusters_give_the_same_bits(name: str, ctas: int) -> None:
    """Grids that are no multiple of the cluster, too: blocks without a program of their own take part."""
    entry = CASES[name]
    text = check_levels(entry, build(entry, 16), "sm_90a", PassOptions(num_ctas=ctas), CHANGES_SCHEDULE)
    assert f"ctas = {ctas}" in text and "multicast" in text


def of_two_warpgroups(name: str) -> Case:
    """A case with tiles of 128 rows, which two warpgroups share unless they alternate."""
    entry = CASES[name]
    meta = {**entry.meta, "BM": 128} | ({"BN": 128} if name == "gemm" else {})
    return replace(entry, meta=meta, grid=(2, 3, 1) if name == "gemm" else (2, *entry.grid[1:]))


@pytest.mark.parametrize(
    ("name", "schedule", "align", "ctas"),
    [
        ("gemm", "alternate", 16, 1),
        ("gemm-tn", "alternate", 2, 1),
        ("attention-causal", "alternate", 16, 1),
        ("attention", "turns", 16, 1),
        ("attention", "turns", 16, 2),
        ("attention-causal", "turns", 2, 1),
    ],
)
def test_consumers_take_turns(name: str, schedule: str, align: int, ctas: int) -> None:
    """On tiles, or with their products: the bits stay those of the program, and the checker agrees."""
    entry = of_two_warpgroups(name) if schedule == "turns" else CASES[name]
    entry = replace(entry, meta={**entry.meta, "BN": 128}, grid=(2, 3, 1)) if name == "gemm" else entry
    options = PassOptions(schedule=schedule, num_ctas=ctas)
    run_after = "alternate", "mma", "turns", "shared-plan"
    text = check_levels(entry, build(entry, align), "sm_90a", options, run_after)
    assert ("@consumer_1" in text) == (schedule == "alternate")
    assert ("async.take_turn" in text) == (schedule == "turns")


def scheduled(name: str, **options: Any) -> str:
    module = build(of_two_warpgroups(name), 16)
    for _ in levels(module, "sm_90a", PassOptions(**options)):
        pass
    return print_module(module)


def test_loops_of_several_products_keep_no_operand_in_registers() -> None:
    """ptxas 13.0 was seen to give such registers away; where there is one product, they stay."""
    kept = {}
    for name in ("held-150", "mlp"):
        module = build(CASES[name], 16)
        for _ in levels(module, "sm_90a", PassOptions()):
            pass
        dots = [op for function in module.functions for op in function.walk() if isinstance(op, AsyncDot)]
        kept[name] = [isinstance(dot.a.type, TileType) for dot in dots]
    assert any(kept["mlp"]) and kept["held-150"] and not any(kept["held-150"])


def test_consumers_alternate_where_one_warpgroup_holds_a_tile() -> None:
    assert "@consumer_1" in scheduled("gemm")
    assert "@consumer_1" not in scheduled("gemm", schedule="roles")
    assert "@consumer_1" not in scheduled("attention")  # vector work between the products
    small = build(replace(CASES["gemm-small"], meta={"BM": 128, "BN": 64, "BK": 32}), 16)
    for _ in levels(small, "sm_90a", PassOptions()):
        pass
    assert "@consumer_1" not in print_module(small)
    wide = build(CASES["gemm"], 16)  # 128 x 256: too large for one warpgroup
    for _ in levels(wide, "sm_90a", PassOptions()):
        pass
    assert "@consumer_1" not in print_module(wide)
    assert "@consumer_1" not in scheduled("gemm", num_warps=4)
    with pytest.raises(IRError, match="consumers that alternate have 8 warps"):
        scheduled("gemm", num_warps=4, schedule="alternate")
    assert "@consumer_1" not in scheduled("gemm", num_ctas=2)
    with pytest.raises(IRError, match="consumers of blocks in clusters do not alternate"):
        scheduled("gemm", num_ctas=2, schedule="alternate")
    with pytest.raises(IRError, match=r"a tile of \(128, 256\) does not fit the registers of one warpgroup"):
        list(levels(build(CASES["gemm"], 16), "sm_90a", PassOptions(schedule="alternate")))


def test_two_slots_for_what_warps_exchange_take_one_barrier_an_iteration() -> None:
    module = build(CASES["exchanged-300"], 16)
    list(levels(module, "sm_90a", PassOptions()))
    ops = list(module.functions[0].walk())
    loop = next(op for op in ops if isinstance(op, For) and any(isinstance(o, AsyncDot) for o in op.body.block.ops))
    read = {buffer_of(op.b) for op in loop.body.block.ops if isinstance(op, AsyncDot)}
    writes = [op for op in loop.body.block.ops if isinstance(op, LocalStore) and buffer_of(op.slot) in read]
    assert [buffer_of(op.slot).type.stages for op in writes] == [2]
    before = loop.body.block.ops[: loop.body.block.ops.index(writes[0])]
    assert not any(isinstance(op, Barrier) for op in before), "its readers met behind the writes to the other"


@pytest.mark.parametrize(("rows", "blocks"), [(64, 2), (128, None)])
def test_two_blocks_share_a_multiprocessor_where_one_warpgroup_computes(rows: int, blocks: int | None) -> None:
    """Exchanges between a loop's products leave the matrix unit idle; a second block fills it."""
    entry = replace(CASES["exchanged-300"], meta={"BM": rows})
    module = build(entry, 16)
    list(levels(module, "sm_90a", PassOptions()))
    function = module.functions[0]
    assert function.attributes.get("blocks_per_unit") == blocks
    assert int(function.attributes["shared_bytes"]) <= (115712 if blocks else 232448)
    registers = [op.registers for op in function.walk() if isinstance(op, Role)]
    assert registers == ([24, 232] if blocks else [40, 232])


def test_a_block_that_needs_more_than_half_of_the_memory_stays_alone() -> None:
    entry = replace(CASES["exchanged-300"], meta={"BM": 64, "BN": 256})
    module = build(entry, 16)
    list(levels(module, "sm_90a", PassOptions()))
    function = module.functions[0]
    assert "blocks_per_unit" not in function.attributes and int(function.attributes["shared_bytes"]) > 115712


def test_numbers_of_rows_and_columns_need_no_exchange() -> None:
    """One `tile.arange` counts both in the program; each use has a layout of its own."""
    assert "tile.convert" not in scheduled("attention-causal")


def test_turns_where_products_take_longest() -> None:
    assert "async.take_turn" not in scheduled("attention")  # 64 columns of values: as long as the exponentials
    four = build(replace(of_two_warpgroups("attention"), meta={"D": 64, "BM": 256, "BN": 64}), 16)
    for _ in levels(four, "sm_90a", PassOptions(num_warps=16)):  # one of four waits while the others compute
        pass
    assert "async.take_turn" in print_module(four)
    entry = of_two_warpgroups("attention")
    long = replace(
        entry, inputs={n: (*shape[:-1], 128) for n, shape in entry.inputs.items()}, meta={**entry.meta, "D": 128}
    )
    module = build(long, 16)
    for _ in levels(module, "sm_90a", PassOptions()):
        pass
    assert "async.take_turn" in print_module(module)


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_any_ring_depth_gives_the_same_bits(stages: int) -> None:
    entry = CASES["gemm-small"]
    module = build(entry, 16)
    expected = execute(module, entry)
    for _ in levels(module, "sm_90a", PassOptions(num_stages=stages)):
        pass
    assert f"ring<{stages}>" in print_module(module)
    np.testing.assert_array_equal(execute(module, entry), expected)


def test_the_reference_agrees() -> None:
    """The levels are compared with each other; this ties them to NumPy."""
    entry = CASES["gemm"]
    out = execute(build(entry, 16), entry).view(BF16).astype(np.float64)
    values = arrays(entry)
    exact = values["a"].astype(np.float64) @ values["b"].astype(np.float64)
    np.testing.assert_allclose(out, exact, rtol=2**-7, atol=2**-4)
