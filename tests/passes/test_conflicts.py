"""Swizzles: what the algebra finds for readers and writers together, and that GEMM on CDNA meets no bank twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from amd_programs import COLUMN_MAJOR, ROW_MAJOR, matrix, module_of, scheduled
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.ir.layout import SharedLayout, bank_conflicts, blocked, mfma_operand
from tilewright.ir.layout_swizzle import choose_swizzle, find_phases, rank_of
from tilewright.ir.target import get_target
from tilewright.ir.types import SlotType
from tilewright.kernels.gemm import TILES, gemm
from tilewright.passes.conflicts import shared_conflicts, shared_traffic
from tilewright.passes.copy_layouts import copy_layouts

TARGETS = ["gfx942", "gfx950"]


def gemm_function(target: str, letters: str, tile: tuple[int, int, int]):
    strides = [ROW_MAJOR if letter == "n" else COLUMN_MAJOR for letter in letters]
    views = {name: matrix(strides=s) for name, s in zip("ab", strides, strict=True)}
    bm, bn, bk = tile
    return scheduled(module_of(gemm, **views, c=matrix(), BM=bm, BN=bn, BK=bk), target)


@pytest.mark.parametrize("letters", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_default_gemm_has_no_conflicts(target: str, letters: str):
    function = gemm_function(target, letters, TILES[0][0])
    traffic = shared_traffic(function, get_target(target))
    assert {t.kind for t in traffic} == {"read", "write"}
    assert all(t.vector_bytes == 16 for t in traffic if t.kind == "read")
    assert shared_conflicts(function, get_target(target)) == 0


@pytest.mark.parametrize("tile", [tile for tile, _ in TILES[1:]], ids=str)
@pytest.mark.parametrize("letters", ["nn", "nt", "tn"])
@pytest.mark.parametrize("target", TARGETS)
def test_other_tiles_of_the_library_have_none_either(target: str, letters: str, tile: tuple[int, int, int]):
    assert shared_conflicts(gemm_function(target, letters, tile), get_target(target)) == 0


@pytest.mark.parametrize("tile", [(32, 32, 32), (64, 32, 32), (32, 64, 32), (64, 64, 32), (64, 128, 32)], ids=str)
@pytest.mark.parametrize("letters", ["nn", "tt", "tn"])
@pytest.mark.parametrize("target", TARGETS)
def test_turned_tiles_whose_lines_are_shorter_than_the_banks(target: str, letters: str, tile: tuple[int, int, int]):
    """Lines of 64 bytes share a round of the banks: their swizzle leaves the line."""
    assert shared_conflicts(gemm_function(target, letters, tile), get_target(target)) == 0


def test_a_plain_layout_is_counted():
    function = gemm_function("gfx942", "nt", (128, 256, 64))
    for op in function.walk():
        for value in op.results:
            if isinstance(value.type, SlotType):
                value.type = replace(value.type, layout=replace(value.type.layout, phases=()))
    assert shared_conflicts(function, get_target("gfx942")) > 0


@pytest.mark.parametrize("banks", ["cdna3", "cdna4"])
def test_one_swizzle_serves_a_turned_writer_and_the_reader(banks: str):
    """No shift of consecutive line bits does: the writer's lanes lie eight lines apart."""
    reader = (mfma_operand((256, 64), "a", (32, 32, 16), 8, (1, 4)), 16)
    writer = (copy_layouts((256, 64), 16, 0, 1, 4, 64).store, 16)
    chosen = choose_swizzle((256, 64), 16, (1, 0), (reader,), (writer,), banks)
    assert chosen.phases
    assert bank_conflicts(*reader[:1], chosen, 16, banks, "read") == 0
    assert bank_conflicts(*writer[:1], chosen, 16, banks, "write") == 0
    for per_phase in (1, 2, 4, 8):
        usual = SharedLayout((256, 64), 16, (1, 0), vec=8, per_phase=per_phase, max_phase=8)
        worst = [bank_conflicts(x[0], usual, 16, banks, op) for x, op in ((reader, "read"), (writer, "write"))]
        assert max(worst) > 0


def test_where_no_swizzle_helps_none_is_found():
    column = blocked((64, 64), 32, 1, 64, (0, 1), 4)  # a lane a line, all in one column of two chunks
    plain = SharedLayout((64, 64), 32, (1, 0))
    assert find_phases(plain, [(column, 4, "write")], "cdna3", 128) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.sampled_from([(32, 64), (64, 64), (128, 64)]))
def test_phases_permute_every_line_and_survive_text(phases: list[int], shape: tuple[int, int]):
    layout = SharedLayout(shape, 16, (1, 0), vec=8, phases=tuple(phases))
    rows, columns = np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij")
    offsets = layout.offset_of(rows, columns)
    assert sorted(offsets.ravel()) == list(range(shape[0] * shape[1]))
    assert (offsets // shape[1] == rows).all()
    assert SharedLayout.parse(str(layout)) == layout
    coords = layout.linear().coords(offset=offsets)
    assert (coords[0] == rows).all() and (coords[1] == columns).all()


def test_rank_of_bit_vectors():
    assert rank_of([1, 2, 3]) == 2
    assert rank_of([5, 6, 3]) == 2
    assert rank_of([1, 2, 4], mask=6) == 2
    assert rank_of([]) == 0


def test_phases_may_change_lower_bits_of_the_line():
    layout = SharedLayout((16, 32), 16, (1, 0), vec=8, phases=(1, 2 | 4, 4 | 8, 8))
    rows, columns = np.meshgrid(np.arange(16), np.arange(32), indexing="ij")
    offsets = layout.offset_of(rows, columns)
    assert sorted(offsets.reshape(-1).tolist()) == list(range(512))
    assert offsets[2, 0] == (2 * 32) ^ (6 * 8)  # line 2 begins in what line 3 would hold
    inverse = layout.linear().coords(offset=np.arange(512))
    assert (layout.offset_of(*inverse) == np.arange(512)).all()
    assert SharedLayout.parse(str(layout)) == layout
    with pytest.raises(ValueError, match="exceed a line of 32 and those below"):
        SharedLayout((16, 32), 16, (1, 0), vec=8, phases=(4,))
