"""Layouts in which threads take a matrix from one slot to another that runs along the other dim."""

from __future__ import annotations

import numpy as np
import pytest

from tilewright.ir.layout import SharedLayout, bank_conflicts
from tilewright.passes.copy_layouts import copy_layouts, lane_orders, turning_layouts


@pytest.mark.parametrize(
    ("shape", "warps"), [((32, 128), 4), ((32, 128), 8), ((32, 64), 4), ((64, 128), 8), ((32, 256), 8)]
)
def test_turning_a_swizzled_slot_meets_no_bank_twice(shape, warps):
    source, target = SharedLayout(shape, 32, (1, 0), 128), SharedLayout(shape, 32, (0, 1), 128)
    layouts = turning_layouts(source, target, warps, 32, "nvidia")
    assert bank_conflicts(layouts.load, source, 16, "nvidia", "read") == 0
    assert bank_conflicts(layouts.store, target, 16, "nvidia", "write") == 0
    plain = copy_layouts(shape, 32, 1, 0, warps, 32)  # what it improves on
    assert bank_conflicts(plain.load, source, 16, "nvidia") or bank_conflicts(
        plain.store, target, 16, "nvidia", "write"
    )
    # turning renames registers: a thread loads what it stores, and the threads together the whole matrix
    flat = [np.ravel_multi_index(part.all_coords(), shape) for part in (layouts.load, layouts.store)]
    loaded, stored = (np.sort(part, axis=0) for part in flat)
    np.testing.assert_array_equal(loaded, stored)
    np.testing.assert_array_equal(np.sort(loaded, axis=None), np.arange(shape[0] * shape[1]))


def test_a_slot_that_runs_along_the_same_dim_is_not_turned():
    slot = SharedLayout((32, 64), 32, (0, 1), 128)
    assert not turning_layouts(slot, slot, 8, 32, "nvidia").turns


def test_lane_orders_span_what_the_lanes_span():
    lanes = [(0, 4), (0, 8), (4, 0), (8, 0), (16, 0)]
    for order in lane_orders(lanes):
        values = {0}
        for row, column in order:
            values |= {value ^ (row << 8 | column) for value in values}
        assert len(values) == 32
