"""Layouts: fragments against the ISA's own formulas, algebra laws by property."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from conversion_kinds import conversion_kind
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.ir.layout import (
    LinearLayout,
    blocked,
    mfma_accumulator,
    mfma_operand,
    mma_sync_accumulator,
    mma_sync_operand_a,
    mma_sync_operand_b,
    wgmma_accumulator,
    wgmma_operand_a,
)


def threads(layout):
    return product(range(layout.num_registers), range(layout.num_lanes), range(layout.num_warps))


def assert_formula(layout, formula):
    """formula(register, lane, warp) -> coordinates, for every register of every thread."""
    for register, lane, warp in threads(layout):
        where = (register, lane, warp)
        assert layout.apply(register=register, lane=lane, warp=warp) == formula(*where), where


def holders(layout):
    """How many (register, lane, warp) hold each element."""
    flat = np.ravel_multi_index(layout.all_coords(), layout.tile_shape) if layout.rank else np.zeros((1,), np.int64)
    return np.bincount(flat.ravel(), minlength=prod(layout.tile_shape))


# ---- fragments: independent formulas ---------------------------------------------------------------------------------


def wgmma_d(register, lane, warp, columns):
    """PTX ISA, D fragment of wgmma m64nN: d[i], row and column of register i of a 64-row block."""
    row = 16 * (warp % 4) + lane // 4 + 8 * (register // 2 % 2)
    return row, 8 * (register // 4) + 2 * (lane % 4) + register % 2


@pytest.mark.parametrize("columns", [8, 24, 64, 96, 128, 192, 256])
def test_wgmma_accumulator_one_warpgroup(columns):
    layout = wgmma_accumulator((64, columns), 1)
    assert layout.num_registers == columns // 2
    assert layout.num_warps == 4
    assert_formula(layout, lambda r, lane, w: wgmma_d(r, lane, w, columns))
    assert (holders(layout) == 1).all()


@pytest.mark.parametrize(
    ("rows", "columns", "groups"), [(128, 64, 2), (256, 32, 2), (256, 64, 4), (192, 48, 1), (128, 96, 1)]
)
def test_wgmma_accumulator_blocks_are_outer_registers_and_warpgroups_have_contiguous_rows(rows, columns, groups):
    layout = wgmma_accumulator((rows, columns), groups)
    own_rows, per_block = rows // groups, columns // 2

    def formula(register, lane, warp):
        block, inside = divmod(register, per_block)
        row, column = wgmma_d(inside, lane, warp, columns)
        return own_rows * (warp // 4) + 64 * block + row, column

    assert_formula(layout, formula)


@pytest.mark.parametrize(("rows", "columns", "groups"), [(256, 192, 2), (128, 192, 1), (256, 128, 2)])
def test_wgmma_instruction_registers_are_in_ptx_order(rows, columns, groups):
    layout = wgmma_accumulator((rows, columns), groups)
    for block in range(rows // groups // 64):
        registers = layout.registers_in((64 * block, 0), (64, columns))
        assert len(registers) == columns // 2
        for i, register in enumerate(registers):
            for lane, warp in ((0, 0), (13, 1), (31, 4 * groups - 1)):
                row, column = wgmma_d(i, lane, warp, columns)
                expected = rows // groups * (warp // 4) + 64 * block + row, column
                assert layout.apply(register=register, lane=lane, warp=warp) == expected


def test_wgmma_accumulator_of_64_rows_splits_columns():
    layout = wgmma_accumulator((64, 128), 2)

    def formula(register, lane, warp):
        row, column = wgmma_d(register, lane, warp, 64)
        return row, 64 * (warp // 4) + column

    assert_formula(layout, formula)
    with pytest.raises(ValueError, match="power of two of columns"):
        wgmma_accumulator((64, 192), 2)
    with pytest.raises(ValueError, match="64-row blocks"):
        wgmma_accumulator((96, 64), 1)


def operand_a(register, lane, bits):
    """PTX ISA A fragments (mma m16 k16/k32/k8, wgmma m64): word i of a thread has row g + 8 (i % 2), K half i // 2."""
    packed = 32 // bits
    word, inside = divmod(register, packed)
    return lane // 4 + 8 * (word % 2), packed * (lane % 4) + inside + 4 * packed * (word // 2)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_wgmma_operand_a(bits):
    k = 256 // bits
    layout = wgmma_operand_a((128, 3 * k), bits, 2)
    per_step = layout.num_registers // 3

    def formula(register, lane, warp):
        step, inside = divmod(register, per_step)
        row, column = operand_a(inside, lane, bits)
        return 16 * warp + row, k * step + column

    assert_formula(layout, formula)


def test_wgmma_accumulator_is_the_16_bit_operand_a():
    """What lets P of attention stay in registers."""
    assert wgmma_accumulator((128, 64), 2) == wgmma_operand_a((128, 64), 16, 2)


def test_wgmma_operand_a_of_64_rows_is_replicated_over_warpgroups():
    layout = wgmma_operand_a((64, 64), 16, 2)
    assert layout.free_bits("warp") == (2,)
    assert (holders(layout) == 2).all()


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_mma_sync_operands(bits):
    k, packed = 256 // bits, 32 // bits
    assert_formula(mma_sync_operand_a((16, k), bits), lambda r, lane, w: operand_a(r, lane, bits))
    assert_formula(
        mma_sync_operand_b((k, 8), bits),
        lambda r, lane, w: (packed * (lane % 4) + r % packed + 4 * packed * (r // packed), lane // 4),
    )


def test_mma_sync_warps_interleave_and_operands_follow():
    shape_m, shape_n, shape_k, (wm, wn) = 96, 64, 32, (2, 4)
    accumulator = mma_sync_accumulator((shape_m, shape_n), (wm, wn))
    a = mma_sync_operand_a((shape_m, shape_k), 16, (wm, wn))
    b = mma_sync_operand_b((shape_k, shape_n), 16, (wm, wn))

    def formula(register, lane, warp):
        tile, inside = divmod(register, 4)
        tile_m, tile_n = divmod(tile, shape_n // 8 // wn)
        row = 16 * (wm * tile_m + warp % wm) + lane // 4 + 8 * (inside // 2)
        return row, 8 * (wn * tile_n + warp // wm) + 2 * (lane % 4) + inside % 2

    assert_formula(accumulator, formula)
    for warp in range(wm * wn):
        rows, columns = (set(x[..., warp].ravel().tolist()) for x in accumulator.all_coords())
        assert rows == set(a.all_coords()[0][..., warp].ravel().tolist())
        assert columns == set(b.all_coords()[1][..., warp].ravel().tolist())
    assert (holders(a) == wn).all()
    assert (holders(b) == wm).all()


def test_mfma_accumulators():
    assert_formula(mfma_accumulator((32, 32)), lambda r, lane, w: (8 * (r // 4) + 4 * (lane // 32) + r % 4, lane % 32))
    assert_formula(mfma_accumulator((16, 16), (16, 16)), lambda r, lane, w: (4 * (lane // 16) + r, lane % 16))
    assert_formula(mfma_accumulator((4, 64), (4, 64)), lambda r, lane, w: (r, lane))
    assert_formula(mfma_accumulator((64, 4), (64, 4)), lambda r, lane, w: (4 * (lane // 4) + r, lane % 4))


@pytest.mark.parametrize(
    ("mnk", "per_lane"),
    [((32, 32, 8), 4), ((16, 16, 16), 4), ((32, 32, 16), 8), ((16, 16, 32), 8), ((16, 16, 128), 32)],
)
def test_mfma_operands(mnk, per_lane):
    m, n, k = mnk
    assert_formula(mfma_operand((m, k), "a", mnk, per_lane), lambda r, lane, w: (lane % m, lane // m * per_lane + r))
    assert_formula(mfma_operand((k, n), "b", mnk, per_lane), lambda r, lane, w: (lane // n * per_lane + r, lane % n))


@pytest.mark.parametrize("mnk", [(4, 64, 4), (64, 4, 4)])
def test_mfma_4x4_operands_hold_k_per_lane(mnk):
    m, n, k = mnk
    assert_formula(mfma_operand((m, k), "a", mnk, 4), lambda r, lane, w: (lane % m, r))
    assert_formula(mfma_operand((k, n), "b", mnk, 4), lambda r, lane, w: (r, lane % n))


def test_mfma_warps_interleave_with_repetitions():
    layout = mfma_accumulator((192, 96), (32, 32), (2, 1))

    def formula(register, lane, warp):
        tile, r = divmod(register, 16)
        tile_m, tile_n = divmod(tile, 3)
        return 32 * (2 * tile_m + warp) + 8 * (r // 4) + 4 * (lane // 32) + r % 4, 32 * tile_n + lane % 32

    assert_formula(layout, formula)
    assert (holders(mfma_operand((64, 96), "b", (32, 32, 8), 4, (2, 1))) == 2).all()
    assert mfma_accumulator((32, 64), (32, 32), (2, 2)).free_bits("warp") == (0,)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: mfma_accumulator((32, 32), (8, 8)), "no MFMA with tile"),
        (lambda: mfma_accumulator((48, 32)), "not a multiple of the instruction tile"),
        (lambda: mfma_accumulator((96, 32), (32, 32), (2, 1)), "do not spread over 2 warps"),
        (lambda: mfma_operand((32, 8), "c", (32, 32, 8), 4), "neither 'a' nor 'b'"),
        (lambda: mfma_operand((32, 8), "a", (32, 32, 4), 4), "more than K"),
        (lambda: wgmma_operand_a((64, 24), 16, 1), "24 columns are not a multiple"),
        (lambda: wgmma_operand_a((64, 24), 64, 1), "64-bit elements"),
        (lambda: blocked((64,), 16, 3, 32, (0,)), "3 is not a power of two"),
        (lambda: blocked((64, 2), 16, 4, 32, (0,)), "not a permutation of 2 dims"),
    ],
)
def test_constructors_refuse_what_they_cannot_lay_out(make, why):
    with pytest.raises(ValueError, match=why):
        make()


# ---- blocked ---------------------------------------------------------------------------------------------------------


def test_blocked_is_coalesced():
    layout = blocked((128, 64), 16, 4, 32, (1, 0))
    assert_formula(
        layout,
        lambda r, lane, w: (4 * w + lane // 8 + 16 * (r // 8), 8 * (lane % 8) + r % 8),
    )
    assert layout.contiguity(1) == 8
    assert layout.contiguity(0) == 1
    assert blocked((128, 64), 16, 4, 32, (0, 1)).contiguity(0) == 8


@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 4, 8, 12, 16, 32, 96]), min_size=1, max_size=4),
    bits=st.sampled_from([8, 16, 32]),
    warps=st.sampled_from([1, 4, 8]),
    lanes=st.sampled_from([32, 64]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_blocked_covers_every_element_equally(shape, bits, warps, lanes, data):
    if prod(shape) > 50_000:
        return
    order = data.draw(st.permutations(range(len(shape))))
    layout = blocked(shape, bits, warps, lanes, order, warps_apart=data.draw(st.booleans()))
    assert layout.tile_shape == tuple(shape)
    assert (layout.num_lanes, layout.num_warps) == (lanes, warps)
    counts = holders(layout)
    assert counts.min() == counts.max() >= 1
    if counts.max() > 1:  # threads idle (replicate) only when each core element has a thread already
        assert layout.core_size("register") == 1


# ---- algebra ---------------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw, repeated=True, surjective=False):
    """Random layouts: a shuffled invertible map (unit vectors, sheared) plus zero bases, spread over three in-dims."""
    rank = draw(st.integers(1, 3))
    logs = draw(st.lists(st.integers(0, 3), min_size=rank, max_size=rank))
    shape = [1 << log for log in logs]
    repeat = draw(st.lists(st.sampled_from([1, 1, 2, 3, 6]), min_size=rank, max_size=rank)) if repeated else [1] * rank
    vectors = [tuple((1 << b) if i == d else 0 for i in range(rank)) for d in range(rank) for b in range(logs[d])]
    for i, j in draw(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=4)):
        if i < len(vectors) and j < len(vectors) and i != j:
            vectors[i] = tuple(a ^ b for a, b in zip(vectors[i], vectors[j], strict=True))
    if not surjective and vectors and draw(st.booleans()):
        vectors.pop()
    vectors += [(0,) * rank] * draw(st.integers(0, 2))
    vectors = draw(st.permutations(vectors))
    cut = sorted((draw(st.integers(0, len(vectors))), draw(st.integers(0, len(vectors)))))
    bases = {"register": vectors[: cut[0]], "lane": vectors[cut[0] : cut[1]], "warp": vectors[cut[1] :]}
    order = draw(st.permutations(range(rank)))
    return LinearLayout.make(bases, shape, repeat, order)


@given(layouts())
@settings(max_examples=150, deadline=None)
def test_text_round_trips(layout):
    assert LinearLayout.parse(str(layout)) == layout


def test_text_is_the_documented_form():
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    layout = LinearLayout.make({"register": [[0, 1], [8, 0]], "lane": lanes, "warp": [[16, 0], [32, 0]]}, [64, 16])
    text = "linear<register=[[0,1],[8,0]], lane=[[0,2],[0,4],[1,0],[2,0],[4,0]], warp=[[16,0],[32,0]], shape=[64,16]>"
    assert str(layout) == text
    assert LinearLayout.parse(text[:-1] + ", repeat=[1,1]>") == layout


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("linear<>", "expected name=list"),
        ("linear<register=[[0,1]]>", "without shape"),
        ("linear<register=[[0,1], shape=[64,16]>", "malformed list"),
        ("linear<register=[[1]], register=[[1]], shape=[2]>", "once"),
        ("blocked<shape=[4]>", "expected linear<...>"),
        ("linear<register=3, shape=[4]>", "malformed basis list"),
        ("linear<register=[[1]], shape=4>", "malformed basis list"),
        ("linear<register=[[9]], shape=[4]>", "does not fit core shape"),
        ("linear<register=[[1]], shape=[6]>", "use repeat"),
    ],
)
def test_malformed_text_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        LinearLayout.parse(text)


@given(layouts(), st.data())
@settings(max_examples=100, deadline=None)
def test_coords_agree_with_the_definition(layout, data):
    """XOR of the bases inside the core plus the copy's position, copies numbered by repeat order."""
    register, lane, warp = (data.draw(st.integers(0, layout.in_size(d) - 1)) for d in ("register", "lane", "warp"))
    copy, inside = divmod(register, layout.core_size("register"))
    expected = [0] * layout.rank
    for name, value in (("register", inside), ("lane", lane), ("warp", warp)):
        for bit, vector in enumerate(layout.basis(name)):
            if value >> bit & 1:
                expected = [a ^ b for a, b in zip(expected, vector, strict=True)]
    for axis in reversed(layout.repeated_dims):
        copy, position = divmod(copy, layout.repeat[axis])
        expected[axis] += position * layout.shape[axis]
    assert layout.apply(register=register, lane=lane, warp=warp) == tuple(expected)


def test_even_repetitions_fold_so_equal_maps_are_equal():
    once = LinearLayout.make({"register": [[0, 1]], "lane": [[1, 0]]}, [2, 2], [2, 2])
    assert once == LinearLayout.make({"register": [[0, 1], [0, 2], [2, 0]], "lane": [[1, 0]]}, [4, 4])
    with pytest.raises(ValueError, match="use repeat"):
        LinearLayout.make({"register": [[1]]}, [6])
    with pytest.raises(ValueError, match="rank"):
        LinearLayout.make({"register": [[1]]}, [2], [1, 1])
    with pytest.raises(ValueError, match="register index"):
        once.apply(register=8)


@given(layouts(repeated=False))
@settings(max_examples=80, deadline=None)
def test_surjective_matches_counting(layout):
    counts = holders(layout)
    assert layout.is_surjective == bool((counts > 0).all())


@given(layouts(surjective=True))
@settings(max_examples=100, deadline=None)
def test_inverse_finds_a_holder_and_leaves_replication_at_zero(layout):
    grid = np.meshgrid(*(np.arange(size) for size in layout.tile_shape), indexing="ij")
    register, lane, warp = layout.inverse().locate(*grid)
    for found, wanted in zip(layout.coords(register=register, lane=lane, warp=warp), grid, strict=True):
        assert (found == wanted).all()
    for name, found in (("register", register), ("lane", lane), ("warp", warp)):
        core = found % layout.core_size(name)
        assert all(not (core >> bit & 1).any() for bit in layout.free_bits(name))


@given(layouts(repeated=False, surjective=True))
@settings(max_examples=80, deadline=None)
def test_compose_with_inverse_is_identity_on_coordinates(layout):
    inverse = layout.inverse().core
    identity = inverse.compose(LinearLayout.make(dict(layout.bases), layout.shape))
    for d, size in enumerate(layout.shape):
        for bit, vector in enumerate(identity.basis(f"dim{d}")):
            assert vector == tuple((1 << bit) if i == d else 0 for i in range(layout.rank))
        assert len(identity.basis(f"dim{d}")) == size.bit_length() - 1
    there_and_back = layout.compose(inverse).compose(layout)
    assert there_and_back == layout


def test_inverse_and_compose_refuse():
    half = LinearLayout.make({"register": [[2]]}, [4])
    with pytest.raises(ValueError, match="inverse"):
        half.inverse()
    with pytest.raises(ValueError, match="repeated"):
        LinearLayout.make({"register": [[1]]}, [2], [3]).compose(half)


@given(layouts(), st.data())
@settings(max_examples=100, deadline=None)
def test_transpose_relabels_and_undoes(layout, data):
    perm = data.draw(st.permutations(range(layout.rank)))
    moved = layout.transpose(perm)
    for axis, source in enumerate(perm):
        assert (moved.all_coords()[axis] == layout.all_coords()[source]).all()
    assert moved.transpose([perm.index(d) for d in range(layout.rank)]) == layout


@given(layouts(), st.data())
@settings(max_examples=150, deadline=None)
def test_reshape_keeps_the_row_major_index_or_says_why(layout, data):
    size, new_shape = prod(layout.tile_shape), []
    while size > 1:
        part = data.draw(st.sampled_from([d for d in (1, 2, 3, 4, 6, 8, 12, size) if size % d == 0]))
        new_shape.append(part)
        size //= part
        if len(new_shape) == 4:
            new_shape[-1] *= size
            break
    new_shape = new_shape or [1]
    try:
        reshaped = layout.reshape(new_shape)
    except ValueError:
        assert layout.is_repeated
        with pytest.raises(ValueError, match="repetitions of"):
            layout.reshape(new_shape)
        return
    assert reshaped.tile_shape == tuple(new_shape)
    before = np.ravel_multi_index(layout.all_coords(), layout.tile_shape)
    assert (np.ravel_multi_index(reshaped.all_coords(), reshaped.tile_shape) == before).all()


@given(layouts(repeated=False), layouts(repeated=False))
@settings(max_examples=60, deadline=None)
def test_power_of_two_reshape_always_works_and_undoes(layout, other):
    size = prod(layout.tile_shape)
    for shape in ([size], [1, size, 1], [2, size // 2] if size > 1 else [1, 1]):
        assert layout.reshape(shape).reshape(layout.tile_shape) == layout


def test_reshape_of_repetitions():
    layout = blocked((96, 64), 16, 4, 32, (1, 0))
    assert layout.reshape((96, 8, 8)).tile_shape == (96, 8, 8)
    assert layout.reshape((3, 32, 64)).repeat == (3, 1, 1)
    assert layout.reshape((3, 32, 64)).reshape((96, 64)) == layout
    with pytest.raises(ValueError, match="repetitions of 32"):
        layout.reshape((32, 192))
    with pytest.raises(ValueError, match="sizes differ"):
        layout.reshape((96, 32))


@given(layouts(), st.data())
@settings(max_examples=100, deadline=None)
def test_slice_is_where_a_reduction_lands(layout, data):
    axis = data.draw(st.integers(0, layout.rank - 1))
    sliced, target = layout.slice_dim(axis), layout.slice_registers(axis)
    kept = [c for d, c in enumerate(layout.all_coords()) if d != axis]
    assert sorted(set(target)) == list(range(sliced.num_registers))  # minimal: every register is used
    for wanted, got in zip(kept, sliced.all_coords(), strict=True):
        got = np.broadcast_to(got, (sliced.num_registers, layout.num_lanes, layout.num_warps))
        assert (got[target] == wanted).all()
    rows = {tuple(c) for c in sliced.table("register").tolist()}
    assert len(rows) == sliced.num_registers  # no thread holds a value twice
    assert sliced.expand_dim(axis).slice_dim(axis) == sliced


def test_slice_of_wgmma_accumulator_is_the_row_statistic_of_attention():
    rows = wgmma_accumulator((128, 96), 2).slice_dim(1)
    assert rows.num_registers == 2
    assert rows.free_bits("lane") == (0, 1)
    assert_formula(rows, lambda r, lane, w: (16 * w + lane // 4 + 8 * r,))
    assert rows.slice_dim(0).tile_shape == ()
    assert rows.slice_dim(0).num_registers == 1


@given(layouts(), st.data())
@settings(max_examples=80, deadline=None)
def test_broadcast_adds_registers(layout, data):
    axis = data.draw(st.integers(0, layout.rank))
    size = data.draw(st.sampled_from([1, 2, 3, 8, 12]))
    thin = layout.expand_dim(axis)
    new_shape = [*layout.tile_shape[:axis], size, *layout.tile_shape[axis:]]
    wide = thin.broadcast(new_shape)
    held = {coords: register for register, coords in enumerate(map(tuple, thin.table("register").tolist()))}
    source = [held[(*c[:axis], 0, *c[axis + 1 :])] for c in wide.table("register").tolist()]
    assert wide.tile_shape == tuple(new_shape)
    assert wide.num_registers == layout.num_registers * size == len(source)
    for d, (wanted, got) in enumerate(zip(thin.all_coords(), wide.all_coords(), strict=True)):
        if d != axis:
            assert (wanted[source] == got).all()


def test_broadcast_refuses_to_shrink_or_stretch():
    layout = blocked((4, 1), 16, 1, 32, (1, 0))
    with pytest.raises(ValueError, match="cannot become 8"):
        layout.broadcast((8, 2))
    with pytest.raises(ValueError, match="rank"):
        layout.broadcast((4,))


@given(layouts(), st.data())
@settings(max_examples=150, deadline=None)
def test_extract_keeps_registers_in_place(layout, data):
    sizes = [data.draw(st.sampled_from([d for d in range(1, s + 1) if s % d == 0])) for s in layout.tile_shape]
    offsets = [data.draw(st.sampled_from(range(0, s, z))) for s, z in zip(layout.tile_shape, sizes, strict=True)]
    try:
        part, source = layout.extract(offsets, sizes)
    except ValueError:
        return
    assert part.tile_shape == tuple(sizes)
    assert len(source) == part.num_registers
    assert (part.num_lanes, part.num_warps) == (layout.num_lanes, layout.num_warps)
    for offset, got, whole in zip(offsets, part.all_coords(), layout.all_coords(), strict=True):
        assert (got + offset == whole[source]).all()


def test_extract_examples():
    accumulator = wgmma_accumulator((128, 192), 2)
    part, source = accumulator.extract((0, 64), (128, 64))
    assert part == wgmma_accumulator((128, 64), 2)
    assert source == list(range(32, 64))
    part, source = wgmma_accumulator((128, 256), 2).extract((0, 0), (128, 16))
    assert part == wgmma_operand_a((128, 16), 16, 2)
    assert source == list(range(8))
    part, source = wgmma_accumulator((64, 256), 1).extract((0, 0), (64, 64))
    assert part.num_registers == 32
    assert source == list(range(32))
    with pytest.raises(ValueError, match="warps"):
        accumulator.extract((0, 0), (64, 192))
    with pytest.raises(ValueError, match="aligned"):
        accumulator.extract((0, 32), (128, 64))


@given(layouts())
@settings(max_examples=100, deadline=None)
def test_contiguity_is_a_safe_vector_width(layout):
    coords = layout.all_coords()
    for axis in range(layout.rank):
        width = layout.contiguity(axis)
        for d in range(layout.rank):
            groups = coords[d].reshape(-1, width, *coords[d].shape[1:])
            step = np.arange(width)[None, :, None, None] if d == axis else 0
            assert (groups == groups[:, :1] + step).all()
            assert d != axis or not (groups[:, 0] % width).any()


def test_register_permutation_and_conversion_kind():
    a = blocked((64, 64), 16, 4, 32, (1, 0))
    registers = a.basis("register")
    shuffled = LinearLayout.make(dict(a.bases) | {"register": registers[::-1]}, a.shape)
    permutation = a.register_permutation(shuffled)
    assert permutation is not None
    assert permutation != list(range(a.num_registers))
    for i, source in enumerate(permutation):
        assert (shuffled.table("register")[i] == a.table("register")[source]).all()
    assert conversion_kind(a, a) == "identity"
    assert conversion_kind(a, shuffled) == "registers"
    swapped_lanes = LinearLayout.make(dict(a.bases) | {"lane": a.basis("lane")[::-1]}, a.shape)
    assert a.register_permutation(swapped_lanes) is None
    assert conversion_kind(a, swapped_lanes) == "shuffle"
    assert conversion_kind(a, wgmma_accumulator((64, 64), 1)) == "shared"
    assert conversion_kind(wgmma_accumulator((64, 64), 1), wgmma_operand_a((64, 64), 16, 1)) == "identity"
    assert conversion_kind(wgmma_accumulator((64, 64), 1), wgmma_operand_a((64, 64), 8, 1)) == "shuffle"
    with pytest.raises(ValueError, match="different tiles"):
        conversion_kind(a, wgmma_accumulator((64, 128), 1))


def test_replicated_source_reaches_fewer_copies_by_registers():
    everywhere = LinearLayout.make({"register": [[1], [2]], "lane": [[0]] * 5, "warp": []}, [4])
    fewer = LinearLayout.make({"register": [[2], [1]], "lane": [[0]] * 5, "warp": []}, [4])
    assert everywhere.register_permutation(fewer) == [0, 2, 1, 3]
    spread = LinearLayout.make({"register": [], "lane": [[1], [2], [0], [0], [0]], "warp": []}, [4])
    assert conversion_kind(everywhere, spread) == "shuffle"


def test_owners_are_equal_whatever_the_order_of_registers() -> None:
    bases = {"register": [(0, 1), (1, 0)], "lane": [(0, 2), (0, 4)], "warp": [(2, 0)]}
    layout = LinearLayout.make(bases, (4, 8))
    assert layout.owners == LinearLayout.make({**bases, "register": [(1, 0), (0, 1)]}, (4, 8)).owners is not None
    others = [{"register": [(0, 1), (2, 0)], "warp": [(1, 0)]}, {"lane": [(0, 4), (0, 2)]}]
    assert all(LinearLayout.make({**bases, **other}, (4, 8)).owners not in (None, layout.owners) for other in others)
    shared = [{"warp": [(0, 0)], "register": [(0, 1), (1, 0), (2, 0)]}, {"lane": [(0, 2), (0, 4), (1, 0)]}]
    assert all(LinearLayout.make({**bases, **other}, (4, 8)).owners is None for other in shared)
