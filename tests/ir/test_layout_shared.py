"""Layouts of shared memory: placement and swizzles, bank conflicts against a plain count."""

from __future__ import annotations

from collections import Counter
from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.ir.layout import (
    LinearLayout,
    SharedLayout,
    bank_conflicts,
    blocked,
    choose_shared_layout,
    mfma_operand,
    shared_candidates,
    shared_vector_bytes,
    wgmma_accumulator,
)
from tilewright.ir.layout_shared import access_phases


@st.composite
def shared_layouts(draw):
    rank = draw(st.integers(1, 3))
    shape = draw(st.lists(st.sampled_from([1, 2, 8, 16, 24, 32, 64, 96, 128]), min_size=rank, max_size=rank))
    bits = draw(st.sampled_from([8, 16, 32]))
    order = draw(st.permutations(range(rank)))
    options = [layout for t in ("nvidia", "cdna4") for layout in shared_candidates(shape, bits, order, t)]
    layout = draw(st.sampled_from(options))
    return layout if prod(shape) <= 1 << 16 else SharedLayout((8,), bits, (0,))


def tile_grid(shape):
    return np.meshgrid(*(np.arange(size) for size in shape), indexing="ij")


@given(shared_layouts())
@settings(max_examples=120, deadline=None)
def test_shared_layout_is_a_bijection_and_all_its_forms_agree(layout):
    grid = tile_grid(layout.shape)
    offsets = layout.offset_of(*grid)
    count = prod(layout.shape)
    assert sorted(offsets.ravel().tolist()) == list(range(count))
    assert layout.bytes == count * layout.element_bits // 8

    linear = layout.linear()
    assert linear.in_size("offset") == count
    for found, wanted in zip(linear.coords(offset=offsets), grid, strict=True):
        assert (found == wanted).all()

    address = np.zeros_like(offsets)
    for axis, (bases, core) in enumerate(zip(layout.offset_bases(), layout.core_shape, strict=True)):
        for bit, contribution in enumerate(bases):
            address ^= (grid[axis] % core >> bit & 1) * contribution
    for axis, stride in enumerate(layout.repeat_strides()):
        address += grid[axis] // layout.core_shape[axis] * stride
    assert (address == offsets * layout.element_bits // 8).all()

    assert SharedLayout.parse(str(layout)) == layout
    assert SharedLayout.parse(layout.short, layout.shape, layout.element_bits) == layout


@given(shared_layouts(), st.data())
@settings(max_examples=50, deadline=None)
def test_shared_transpose_is_a_view(layout, data):
    perm = data.draw(st.permutations(range(len(layout.shape))))
    view, grid = layout.transpose(perm), tile_grid(layout.shape)
    assert (view.offset_of(*(grid[p] for p in perm)) == layout.offset_of(*grid)).all()


@pytest.mark.parametrize("swizzle", [32, 64, 128])
@pytest.mark.parametrize("shape", [(64, 128), (96, 64), (192, 192)])
def test_hopper_swizzle_matches_thunderkittens(shape, swizzle):
    """TK's st: addr = outer*rows*subcols + r*subcols + c%subcols; addr ^= ((addr % (swizzle*8)) >> 7) << 4 (bytes)."""
    rows, _ = shape
    r, c = tile_grid(shape)
    sub = swizzle // 2
    address = 2 * (c // sub * rows * sub + r * sub + c % sub)
    address ^= (address % (swizzle * 8) >> 7) << 4
    assert (SharedLayout(shape, 16, (1, 0), swizzle).offset_of(r, c) * 2 == address).all()


def test_phase_swizzle_matches_its_formula():
    r, c = tile_grid((64, 64))
    expected = r * 64 + ((c // 8) ^ (r // 2 % 4)) * 8 + c % 8
    assert (SharedLayout((64, 64), 16, (1, 0), 0, 8, 2, 4).offset_of(r, c) == expected).all()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (((64, 96), 16, (1, 0), 128), "not a multiple of the 128-byte swizzle"),
        (((12, 64), 16, (1, 0), 128), "cuts the swizzle's pattern"),  # a copy of 4 lines, a pattern of 8
        (((64, 64), 16, (0, 0), 128), "order"),
        (((64, 64), 6, (1, 0), 0), "power of two of bits"),
        (((64, 64), 16, (1, 0), 16), "only 0, 32, 64 and 128"),
        (((64, 64), 16, (1, 0), 128, 8, 1, 8), "not both"),
        (((64, 64), 16, (1, 0), 0, 8, 1, 16), "exceed a line"),
        (((64, 64), 16, (1, 0), 0, 8, 3, 4), "powers of two"),
        (((12, 64), 16, (1, 0), 0, 8, 1, 8), "cuts the pattern of 8 phases"),
    ],
)
def test_shared_layout_refuses(arguments, why):
    with pytest.raises(ValueError, match=why):
        SharedLayout(*arguments)


def test_shared_text():
    layout = SharedLayout((64, 64), 16, (1, 0), 128)
    assert layout.short == "shared<128B, order=[1,0]>"
    assert str(layout) == "shared<128B, order=[1,0], shape=[64,64], bits=16>"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("shared<128B>", "expected shared"),
        ("shared<16B, order=[0]>", "expected shared"),
        ("shared<none, order=[0]>", "lacks order, or shape and bits"),
        ("shared<xor, order=[0], shape=[8], bits=8>", "unexpected or missing"),
        ("shared<none, vec=8, order=[0], shape=[8], bits=8>", "unexpected or missing"),
    ],
)
def test_malformed_shared_text_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        SharedLayout.parse(text)


# ---- bank conflicts --------------------------------------------------------------------------------------------------


def count_conflicts(registers, shared, vector_bytes, banks, phases):
    """Plain count over every instruction, from the definition."""
    width, worst = vector_bytes * 8 // shared.element_bits, 0
    for warp, first in product(range(registers.num_warps), range(0, registers.num_registers, width)):
        extra = 0
        for lanes in phases:
            words = set()
            for lane in lanes:
                coords = registers.apply(register=first, lane=lane, warp=warp)
                start = int(shared.offset_of(*coords)) * shared.element_bits // 8
                words |= {start // 4 + i for i in range(max(1, vector_bytes // 4))}
            extra += max(Counter(word % banks for word in words).values()) - 1
        worst = max(worst, extra)
    return worst


def lanes_of(*ranges):
    """Inclusive lane ranges of one phase, and the same 32 lanes further on."""
    return [[half + lane for low, high in ranges for lane in range(low, high + 1)] for half in (0, 32)]


CDNA4_READ_16 = [*lanes_of((0, 3), (12, 15), (20, 27)), *lanes_of((4, 11), (16, 19), (28, 31))]
CDNA3_READ_16 = [
    *lanes_of((0, 3), (20, 23)),
    *lanes_of((4, 7), (16, 19)),
    *lanes_of((8, 11), (28, 31)),
    *lanes_of((12, 15), (24, 27)),
]
RULES = [
    ("nvidia", 16, "read", 32, [list(range(i, i + 8)) for i in range(0, 32, 8)]),
    ("nvidia", 8, "write", 32, [list(range(i, i + 16)) for i in range(0, 32, 16)]),
    ("nvidia", 4, "write", 32, [list(range(32))]),
    ("nvidia", 2, "read", 32, [list(range(32))]),
    ("cdna4", 16, "read", 64, CDNA4_READ_16),
    ("cdna4", 8, "read", 64, [list(range(32)), list(range(32, 64))]),
    ("cdna4", 8, "write", 32, [list(range(i, i + 16)) for i in range(0, 64, 16)]),
    ("cdna3", 16, "read", 32, CDNA3_READ_16),
    ("cdna3", 16, "write", 32, [list(range(i, i + 8)) for i in range(0, 64, 8)]),
]


@pytest.mark.parametrize(("target", "vector_bytes", "op", "banks", "phases"), RULES)
def test_phases_are_the_published_ones(target, vector_bytes, op, banks, phases):
    found_banks, found = access_phases(target, vector_bytes, op)
    assert found_banks == banks
    assert {frozenset(phase) for phase in found} == {frozenset(phase) for phase in phases}


@pytest.mark.parametrize(("target", "vector_bytes", "op", "banks", "phases"), RULES)
@pytest.mark.parametrize("rows", [64, 96])
def test_bank_conflicts_match_a_plain_count(target, vector_bytes, op, banks, phases, rows):
    lanes = 32 if target == "nvidia" else 64
    assert sorted(lane for phase in phases for lane in phase) == list(range(lanes))
    register_layouts = [blocked((rows, 64), 16, 2, lanes, (1, 0), 16), blocked((rows, 64), 16, 2, lanes, (0, 1), 2)]
    if target != "nvidia":
        register_layouts.append(mfma_operand((rows, 64), "a", (32, 32, 16), 8))
        register_layouts.append(mfma_operand((rows, 64), "a", (16, 16, 16), 4))
    elif rows == 64:
        register_layouts.append(wgmma_accumulator((64, 64), 1))
    compared = 0
    for registers, shared in product(register_layouts, shared_candidates((rows, 64), 16, (1, 0), target)):
        if shared_vector_bytes(registers, shared, vector_bytes) == vector_bytes:
            expected = count_conflicts(registers, shared, vector_bytes, banks, phases)
            assert bank_conflicts(registers, shared, vector_bytes, target, op) == expected, f"{registers} {shared}"
            compared += 1
    assert compared >= 2


def test_known_conflicts():
    accumulator, plain = wgmma_accumulator((64, 64), 1), SharedLayout((64, 64), 16, (1, 0))
    assert bank_conflicts(accumulator, plain, 4, "nvidia", "write") == 7  # 8 rows of 128 bytes, one bank column
    assert bank_conflicts(accumulator, SharedLayout((64, 64), 16, (1, 0), 128), 4, "nvidia", "write") == 0
    with pytest.raises(ValueError, match="contiguous"):
        bank_conflicts(accumulator, plain, 16, "nvidia", "write")
    with pytest.raises(ValueError, match="lanes"):
        bank_conflicts(accumulator, plain, 4, "cdna3", "write")
    with pytest.raises(ValueError, match="tile"):
        bank_conflicts(accumulator, SharedLayout((64, 128), 16, (1, 0)), 4, "nvidia", "write")
    assert shared_vector_bytes(accumulator, plain) == 4
    broadcast = LinearLayout.make({"register": [[1]], "lane": [[0]] * 5, "warp": []}, [2])
    assert bank_conflicts(broadcast, SharedLayout((2,), 16, (0,)), 4, "nvidia") == 0


@pytest.mark.parametrize("rows", [128, 192])
@pytest.mark.parametrize(
    ("target", "mnk", "per_lane", "size"), [("cdna4", (16, 16, 32), 8, 16), ("cdna3", (32, 32, 8), 4, 8)]
)
def test_choice_is_conflict_free_where_plain_is_not(target, mnk, per_lane, size, rows):
    reader, writer = mfma_operand((rows, 64), "a", mnk, per_lane, (2, 2)), blocked((rows, 64), 16, 4, 64, (1, 0))
    chosen = choose_shared_layout((rows, 64), 16, (1, 0), [(reader, size)], [(writer, size)], target)
    assert bank_conflicts(reader, SharedLayout((rows, 64), 16, (1, 0)), size, target) > 0
    assert bank_conflicts(reader, chosen, size, target) == bank_conflicts(writer, chosen, size, target, "write") == 0


def test_choice_on_nvidia():
    accumulator, rows = wgmma_accumulator((64, 64), 1), blocked((64, 64), 16, 4, 32, (1, 0))
    chosen = choose_shared_layout((64, 64), 16, (1, 0), [(rows, 16)], [(accumulator, 16)], "nvidia")
    assert chosen.swizzle == 128
    plain = SharedLayout((64, 64), 16, (1, 0))
    assert choose_shared_layout((64, 64), 16, (1, 0), [(rows, 16)], [], "nvidia", [plain]) == plain
    with pytest.raises(ValueError, match="no shared layout"):
        choose_shared_layout((64, 64), 16, (1, 0), [], [], "nvidia", [])
