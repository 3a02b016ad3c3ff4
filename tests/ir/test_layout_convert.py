"""Plans of layout conversions, executed element by element: every thread must end up with what its layout says."""

from __future__ import annotations

import random
from itertools import permutations

import numpy as np
import pytest
from conversion_kinds import conversion_kind

from tilewright.ir.layout import (
    LinearLayout,
    bank_conflicts,
    blocked,
    conversion_cost,
    mfma_accumulator,
    mfma_operand,
    mma_sync_operand_b,
    plan_conversion,
    shared_vector_bytes,
    wgmma_accumulator,
    wgmma_operand_a,
)
from tilewright.ir.layout_exchange import ExchangePlan, plan_exchange
from tilewright.ir.layout_shuffle import ShufflePlan, copies, plan_shuffles
from tilewright.ir.layout_spaces import complement, contains, intersection, span_of
from tilewright.passes.copy_layouts import copy_layouts


def elements(layout: LinearLayout) -> np.ndarray:
    """[register, lane, warp] flat number of the element held."""
    return np.ravel_multi_index(layout.all_coords(), layout.tile_shape)


def parity(value: int) -> int:
    return value.bit_count() & 1


def run_shuffles(plan: ShufflePlan, source: LinearLayout, result: LinearLayout) -> np.ndarray:
    held = elements(source)
    out = np.full((result.num_registers, result.num_lanes, result.num_warps), -1)

    def turned(words, turns, lane, warp):
        for t in turns:
            if parity(lane & t.lanes) ^ parity(warp & t.warps):
                words = [words[j ^ t.step] for j in range(len(words))]
        return words

    def linear(columns, value):
        image = 0
        for bit, column in enumerate(columns):
            image ^= column if value >> bit & 1 else 0
        return image

    for warp in range(source.num_warps):
        received = []
        for copy in plan.sent:
            words = [
                turned([tuple(held[r, lane, warp] for r in word) for word in copy], plan.before, lane, warp)
                for lane in range(source.num_lanes)
            ]
            at = []
            for lane in range(source.num_lanes):
                asked = linear(plan.lane_map, lane) ^ linear(plan.warp_map, warp)
                arrived = [words[asked ^ step.lane][step.word] for step in plan.rounds]
                at.append(turned(arrived, plan.after, lane, warp))
            received.append(at)
        for register, (copy, word, position) in enumerate(plan.received):
            for lane in range(source.num_lanes):
                out[register, lane, warp] = received[copy][lane][word][position]
    return out


def run_exchange(plan: ExchangePlan, source: LinearLayout, result: LinearLayout) -> np.ndarray:
    held = elements(source)
    out = np.full((result.num_registers, result.num_lanes, result.num_warps), -1)
    offsets_w = plan.memory.offset_of(*plan.writer.all_coords())
    offsets_r = plan.memory.offset_of(*plan.reader.all_coords())
    for write, read in zip(plan.writes, plan.reads, strict=True):
        memory = np.full(plan.memory.shape[0], -1)
        for part, offsets, is_write in ((write, offsets_w, True), (read, offsets_r, False)):
            for warp in range(source.num_warps):
                lanes = [
                    lane
                    for lane in range(source.num_lanes)
                    if all(parity(lane & own) ^ parity(warp & mask) == odd for own, mask, odd in part.threads)
                ]
                for position, register in enumerate(part.registers):
                    if is_write:
                        memory[offsets[position, lanes, warp]] = held[register, lanes, warp]
                    else:
                        out[register, lanes, warp] = memory[offsets[position, lanes, warp]]
    return out[list(plan.equal)]


def random_layout(rng: random.Random, shape: tuple[int, ...], lanes: int, warps: int) -> LinearLayout:
    order = rng.choice(list(permutations(range(len(shape)))))
    return blocked(shape, rng.choice([8, 16, 32]), warps, lanes, order)


def shuffled_bits(rng: random.Random, layout: LinearLayout) -> LinearLayout:
    """The same elements in the same warps: register and lane bits mixed."""
    vectors = [*layout.basis("register"), *layout.basis("lane")]
    rng.shuffle(vectors)
    for _ in range(3):
        i, j = rng.sample(range(len(vectors)), 2)
        if rng.random() < 0.3:
            vectors[i] = tuple(x ^ y for x, y in zip(vectors[i], vectors[j], strict=True))
    count = len(layout.basis("register"))
    bases = {"register": vectors[:count], "lane": vectors[count:], "warp": layout.basis("warp")}
    return LinearLayout.make(bases, layout.shape, layout.repeat, layout.repeat_order)


SHAPES = [(64, 64), (16, 64), (256,), (4, 8, 32), (96, 64), (8, 8), (1, 512)]


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_shuffles_inside_a_warp(bits):
    rng, planned = random.Random(bits), 0
    for _ in range(60):
        warps, lanes = rng.choice([(1, 32), (4, 32), (2, 64)])
        source = random_layout(rng, rng.choice(SHAPES), lanes, warps)
        result = shuffled_bits(rng, source)
        plan = plan_shuffles(source, result, bits)
        kind = conversion_kind(source, result)
        if plan is None:
            continue
        assert kind != "shared"
        planned += 1
        np.testing.assert_array_equal(run_shuffles(plan, source, result), elements(result))
        words = -(-result.num_registers // len(copies(result)) * min(bits, 32) // 32)
        assert len(plan.rounds) >= words or result.num_registers == 1
    assert planned > 40


def test_no_shuffle_plan_across_warps():
    source = blocked((64, 64), 16, 4, 32, (1, 0))
    assert plan_shuffles(source, blocked((64, 64), 16, 4, 32, (0, 1)), 16) is None


def test_every_warp_local_pair_of_bijections_has_a_plan():
    rng = random.Random(5)
    for _ in range(100):
        source = blocked((32, 64), 16, 4, 32, (1, 0))
        result = shuffled_bits(rng, source)
        if result.is_surjective:
            assert plan_shuffles(source, result, 16) is not None, result


@pytest.mark.parametrize("banks", ["nvidia", "cdna3", "cdna4"])
@pytest.mark.parametrize("limit", [1 << 20, 2048, 512])
def test_exchange_through_shared_memory(banks, limit):
    rng = random.Random(f"{banks}{limit}")
    for _ in range(40):
        lanes, warps, shape = 32 if banks == "nvidia" else 64, rng.choice([1, 4, 8]), rng.choice(SHAPES)
        source, result = (random_layout(rng, shape, lanes, warps) for _ in range(2))
        plan = plan_exchange(source, result, 16, banks, limit)
        assert plan is not None
        np.testing.assert_array_equal(run_exchange(plan, source, result), elements(result))


LARGE = [
    (blocked((128, 128), 16, 8, 32, (1, 0)), blocked((128, 128), 16, 8, 32, (0, 1)), 16, "nvidia"),
    (blocked((64, 64), 32, 4, 32, (1, 0)), blocked((64, 64), 32, 4, 32, (0, 1)), 32, "nvidia"),
    (wgmma_accumulator((128, 256), 2), blocked((128, 256), 16, 8, 32, (1, 0)), 16, "nvidia"),
    (wgmma_accumulator((128, 192), 2), blocked((128, 192), 16, 8, 32, (1, 0)), 16, "nvidia"),
    (blocked((128, 128), 16, 4, 64, (1, 0)), blocked((128, 128), 16, 4, 64, (0, 1)), 16, "cdna3"),
    (mfma_accumulator((128, 128), (32, 32), (2, 2)), blocked((128, 128), 16, 4, 64, (1, 0)), 16, "cdna3"),
    (mfma_accumulator((128, 128), (32, 32), (2, 2)), blocked((128, 128), 32, 4, 64, (1, 0)), 32, "cdna4"),
]


@pytest.mark.parametrize(("source", "result", "bits", "banks"), LARGE)
def test_large_tiles_go_in_slices_without_bank_conflicts(source, result, bits, banks):
    plan = plan_exchange(source, result, bits, banks)
    assert plan is not None and plan.bytes <= 32768
    np.testing.assert_array_equal(run_exchange(plan, source, result), elements(result))
    for side, op in ((plan.writer, "write"), (plan.reader, "read")):
        assert bank_conflicts(side, plan.memory, shared_vector_bytes(side, plan.memory), banks, op) == 0


def test_transposed_blocks_of_threads_travel_as_16_byte_vectors():
    """Threads that hold 8 x 8 elements write and read whole vectors though their directions differ."""
    source = copy_layouts((128, 128), 16, 1, 0, 8, 32).load
    result = blocked((128, 128), 16, 8, 32, (0, 1))
    plan = plan_exchange(source, result, 16, "nvidia")
    assert plan is not None
    assert [shared_vector_bytes(side, plan.memory) for side in (plan.writer, plan.reader)] == [16, 16]


def test_the_accumulator_of_one_product_is_the_operand_of_the_next_without_moving():
    source, result = wgmma_accumulator((128, 64), 2), wgmma_operand_a((128, 64), 16, 2)
    assert conversion_cost(source, result, 16, "nvidia") == 0


def test_chained_mfma_can_stay_inside_the_wave():
    source = mfma_accumulator((128, 128), (32, 32), (4, 1))
    result = mfma_operand((128, 128), "a", (32, 32, 16), 8, (4, 1))
    shuffles = plan_shuffles(source, result, 16)
    assert shuffles is not None and shuffles.shuffles == 32  # two elements a word
    np.testing.assert_array_equal(run_shuffles(shuffles, source, result), elements(result))
    plan = plan_conversion(source, result, 16, "cdna3")
    assert plan.scratch_bytes <= 16384


def test_costs_are_ordered():
    rows = blocked((64, 64), 16, 4, 32, (1, 0))
    columns = blocked((64, 64), 16, 4, 32, (0, 1))
    near = LinearLayout.make(
        {"register": rows.basis("register"), "lane": rows.basis("lane")[::-1], "warp": rows.basis("warp")}, rows.shape
    )
    assert conversion_cost(rows, rows, 16, "nvidia") == 0
    assert 0 < conversion_cost(rows, near, 16, "nvidia") < conversion_cost(rows, columns, 16, "nvidia")
    assert plan_conversion(rows, near, 16, "nvidia").kind == "shuffle"
    assert plan_conversion(rows, columns, 16, "nvidia").kind == "shared"
    assert conversion_cost(rows, near, 32, "nvidia") > conversion_cost(rows, near, 16, "nvidia")


def test_replicated_sources_and_results():
    source = blocked((8, 8), 32, 4, 32, (1, 0))  # 64 elements in 128 threads
    for result in (mma_sync_operand_b((8, 8), 32), blocked((8, 8), 32, 4, 32, (0, 1))):
        if result.num_warps != 4:
            continue
        plan = plan_conversion(source, result, 32, "nvidia")
        run = (
            run_shuffles(plan.shuffles, source, result)
            if plan.shuffles
            else run_exchange(plan.exchange, source, result)
        )
        np.testing.assert_array_equal(run, elements(result))


def test_subspaces():
    rng = random.Random(1)
    for _ in range(200):
        a, b = ([rng.randrange(256) for _ in range(rng.randrange(1, 7))] for _ in range(2))
        common = intersection(a, b)
        brute = [v for v in range(256) if contains(span_of(a), v) and contains(span_of(b), v)]
        assert 1 << len(common) == len(brute) and all(v in brute for v in common)
        found = complement([a, b], 8)
        for space in (a, b):
            missing = 8 - len(span_of(space))
            assert len(span_of(space, found[:missing])) == 8
