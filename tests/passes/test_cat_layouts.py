"""Joining equal parts: in any layout the whole follows from a part and the part from the whole, and nothing moves."""

from __future__ import annotations

import amd_programs as amd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tilewright as tw
from tilewright.ir.layout import blocked
from tilewright.ir.scratch import convert_plan
from tilewright.ir.tile_ops import Convert
from tilewright.passes.cat_layouts import joined, part_of


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.sampled_from([8, 16, 32]),
    st.integers(0, 2),
    st.sampled_from([2, 4]),
    st.permutations(range(3)),
)
def test_part_and_whole_follow_from_each_other(
    sizes: list[int], bits: int, axis: int, parts: int, order: list[int]
) -> None:
    shape = [1 << size for size in sizes]
    axis %= len(shape)
    part = blocked(shape, bits, 4, 32, tuple(a for a in order if a < len(shape)))
    whole = joined(part, axis, parts)
    assert whole is not None
    assert whole.tile_shape == tuple(n * parts if a == axis else n for a, n in enumerate(shape))
    for dim in ("lane", "warp"):
        assert whole.basis(dim) == part.basis(dim)
    back = part_of(whole, axis, parts)
    assert back is not None and back.register_permutation(part) is not None


def test_parts_that_threads_divide_among_them_have_no_layout() -> None:
    assert part_of(blocked((64, 32), 32, 4, 32, (1, 0)), 1, 2) is None  # eight lanes hold a row
    assert joined(blocked((64, 32), 32, 4, 32, (1, 0)), 0, 3) is None


@tw.kernel
def swapped(x: tw.Tensor, y: tw.Tensor):
    """Neighbours change places."""
    pairs = tw.load(x, (tw.program_id(0), 0), (1, 1024)).reshape(1, 512, 2)
    both = tw.cat((pairs[:, :, 1:], pairs[:, :, :1]), axis=2)
    tw.store(y, (tw.program_id(0), 0), both.reshape(1, 1024))


@tw.kernel
def doubled(x: tw.Tensor, y: tw.Tensor):
    """Rows twice, one copy behind the other."""
    row = tw.load(x, (tw.program_id(0), 0), (8, 256))
    tw.store(y, (tw.program_id(0), 0), tw.cat((row, row), axis=0))


@pytest.mark.parametrize("target", ["sm_90a", "gfx942"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("kernel", [swapped, doubled], ids=lambda kernel: kernel.__name__)
def test_a_join_between_load_and_store_moves_nothing(kernel: object, dtype: str, target: str) -> None:
    function = amd.scheduled(amd.module_of(kernel, x=amd.matrix(dtype), y=amd.matrix(dtype)), target)
    plans = [convert_plan(op) for op in function.walk() if isinstance(op, Convert)]
    assert all(plan.registers is not None for plan in plans)  # at most renamed
