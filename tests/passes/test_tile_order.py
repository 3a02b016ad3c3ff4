"""tile-order: which tiles run at the same time, and on GPUs of chiplets where."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from amd_programs import matrix, module_of, normal, scheduled

from tilewright.compiler.kernel import Kernel
from tilewright.frontend.build import build_module
from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Value
from tilewright.ir.interpreter import run
from tilewright.ir.target import get_target
from tilewright.ir.tile_ops import Binary, BlockId, Compare, Constant, Select
from tilewright.ir.types import DTYPES, ViewType
from tilewright.kernels.attention import attention
from tilewright.kernels.attention_backward import attention_gradients
from tilewright.kernels.gemm import gemm
from tilewright.kernels.softmax import softmax
from tilewright.passes.manager import PassContext, PassOptions, parse_pipeline
from tilewright.passes.tile_order import by_chiplet, decode, decode_longest_first, sloping_axis

_FUNCTIONS = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "mod": lambda x, y: x % y,
    "floordiv": lambda x, y: x // y,
    "min": min,
    "max": max,
}


def number(value: Value) -> int:
    """What integer arithmetic on constants comes to."""
    op = value.op
    if isinstance(op, Constant):
        return int(op.value)
    if isinstance(op, Binary):
        return _FUNCTIONS[op.fn](number(op.lhs), number(op.rhs))
    if isinstance(op, Select):
        return number(op.on_true if number(op.condition) else op.on_false)
    assert isinstance(op, Compare) and op.fn == "lt"
    return int(number(op.lhs) < number(op.rhs))


def tiles_by_chiplet(total: int, chiplets: int, chunk: int) -> list[int]:
    b = Builder(Block())
    return [number(by_chiplet(b, b.index(w), b.index(total), chiplets, chunk)) for w in range(total)]


@pytest.mark.parametrize(("chiplets", "chunk"), [(8, 16), (8, 64), (6, 16), (2, 1), (8, 3)])
@pytest.mark.parametrize("total", [1, 7, 8, 127, 128, 129, 512, 600, 1030])
def test_every_tile_has_one_block(total: int, chiplets: int, chunk: int):
    assert sorted(tiles_by_chiplet(total, chiplets, chunk)) == list(range(total))


@pytest.mark.parametrize(("chiplets", "chunk"), [(8, 16), (8, 64)])
def test_neighbours_run_on_one_chiplet(chiplets: int, chunk: int):
    tiles = np.array(tiles_by_chiplet(2 * chiplets * chunk, chiplets, chunk))
    for chiplet in range(chiplets):
        mine = tiles[chiplet::chiplets]
        assert (np.diff(mine.reshape(-1, chunk), axis=1) == 1).all()


def test_a_chiplet_s_chunk_is_a_window_of_rows_and_columns():
    """16 tiles need 4 + 4 tiles of operands, not 1 + 16."""
    target = get_target("gfx942")
    b = Builder(Block())
    sizes = [b.index(32), b.index(32), b.index(1)]
    places = set()
    for block in range(0, 128, target.chiplets):  # the first chunk of chiplet 0
        tile = by_chiplet(b, b.index(block), b.index(1024), target.chiplets, target.chiplet_chunk)
        places.add(tuple(map(number, decode(b, tile, sizes, (0, 1), target.tile_group)[:2])))
    assert places == {(m, n) for m in range(4) for n in range(4)}


@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
def test_the_order_changes_no_bit(target: str):
    m, n, k = 16 * 33, 16 * 17, 32
    a, b = normal(m, k), normal(k, n, seed=1)
    module = module_of(gemm, a=matrix(), b=matrix(), c=matrix("f32"), BM=16, BN=16, BK=16)
    function = scheduled(module.clone(), target)
    assert [op for op in function.walk() if isinstance(op, BlockId)]
    results = []
    for program in (module.functions[0], function):
        results.append(np.zeros((m, n), np.float32))
        run(program, [a, b, results[-1]], (33, 17))
    np.testing.assert_array_equal(*results)
    assert np.abs(results[0]).max() > 0


def test_programs_that_share_nothing_keep_their_order():
    module = build_module(softmax.definition, {"x": matrix(), "y": matrix(), "BN": 64})
    (order,) = parse_pipeline("tile-order")
    order.run(module, PassContext(get_target("gfx950")))
    assert not [op for op in module.functions[0].walk() if isinstance(op, BlockId)]


@pytest.mark.parametrize("slope", [1, -1])
def test_long_programs_run_first(slope: int):
    """Within windows of as many other places as given; each program once."""
    b, sizes = Builder(Block()), (5, 2, 3)
    counts = [b.index(size) for size in sizes]
    order = [
        tuple(number(v) for v in decode_longest_first(b, b.index(tile), counts, 0, slope, 4)) for tile in range(30)
    ]
    assert sorted(order) == sorted(itertools.product(*map(range, sizes)))
    for window, width in ((order[:20], 4), (order[20:], 2)):
        lengths = [n if slope > 0 else 4 - n for n, _, _ in window]
        assert lengths == sorted(lengths, reverse=True)
        assert len({place[1:] for place in window}) == width


@pytest.mark.parametrize("persistent", [None, False])
def test_long_programs_run_first_whoever_hands_them_out(persistent: bool | None):
    view = ViewType((None,) * 4, DTYPES["bf16"], (None, None, None, 1), 16)
    types: dict[str, Any] = {"q": view, "k": view, "v": view, "o": view, "scale": DTYPES["f32"]}
    module = build_module(attention.definition, {**types, "CAUSAL": True, "D": 64, "DV": 64})
    context = PassContext(get_target("sm_90a"), PassOptions(persistent=persistent))
    parse_pipeline("tile-order")[0].run(module, context)
    function = module.functions[0]
    assert function.attributes.get("persistent", False) is (persistent is None)
    assert any(isinstance(op, BlockId) for op in function.walk()), "programs keep the order of the grid"


def test_which_programs_are_long():
    def slope(kernel: Kernel, causal: bool) -> tuple[int, int] | None:
        view = ViewType((None,) * 4, DTYPES["bf16"], (None, None, None, 1), 16)
        row = ViewType((None,) * 4, DTYPES["f32"], (None, None, None, 1), 16)
        types: dict[str, Any] = {"scale": DTYPES["f32"], "CAUSAL": causal, "D": 64, "DV": 64}
        for name in kernel.definition.parameter:
            if name in ("q", "k", "v", "o", "do", "dk", "dv"):
                types[name] = view
            elif name in ("rows", "sums"):
                types[name] = row
        if "EXACT" in kernel.definition.parameter:
            types["EXACT"] = False
        return sloping_axis(build_module(kernel.definition, types).functions[0])

    assert slope(attention, True) == (0, 1), "later queries see more keys"
    assert slope(attention_gradients, True) == (0, -1), "later keys are seen by fewer queries"
    assert slope(attention, False) is None and slope(attention_gradients, False) is None
