"""mbarriers and asynchronous copies of the PTX emulator: phases, transactions, tensor maps, races."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from ptx_snippets import launch, legal, run, wrap

from tilewright.runtime.emulator.nvidia import (
    EmulatorError,
    EmulatorFault,
    GlobalMemory,
    PtxEmulator,
    encode_tensor_map,
)

U32 = np.uint32
BF16 = ml_dtypes.bfloat16


# --- mbarrier ----------------------------------------------------------------------------------------


def test_phases_and_parities() -> None:
    """Two arrivals a phase; the waits of both parities, and the state that arrive gives."""
    body = """
    .reg .b64 %s<4>; .reg .b32 %r<9>; .reg .pred %p<9>;
    mbarrier.init.shared.b64 [%sm], 2;
    mbarrier.test_wait.parity.shared.b64 %p0, [%sm], 0;
    mbarrier.test_wait.parity.shared.b64 %p1, [%sm], 1;
    mbarrier.arrive.shared.b64 %s0, [%sm];
    mbarrier.test_wait.shared.b64 %p2, [%sm], %s0;
    mbarrier.pending_count.b64 %r8, %s0;
    mbarrier.arrive.shared.b64 %s1, [%sm];
    mbarrier.test_wait.shared.b64 %p3, [%sm], %s0;
    mbarrier.test_wait.parity.shared.b64 %p4, [%sm], 0;
    mbarrier.test_wait.parity.shared.b64 %p5, [%sm], 1;
    mbarrier.arrive.shared.b64 %s2, [%sm], 2;
    mbarrier.test_wait.parity.shared.b64 %p6, [%sm], 1;
    mbarrier.inval.shared.b64 [%sm];
    """
    for i in range(7):
        body += f"selp.b32 %r{i}, 1, 0, %p{i}; st.global.u32 [%ptr0+{4 * i}], %r{i};\n"
    body += "st.global.u32 [%ptr0+28], %r8;"
    (got,) = run(body, [np.full(8, 9, U32)], threads=1, shared_bytes=16)
    assert got.tolist() == [0, 1, 0, 1, 1, 0, 1, 2]


def test_transactions_hold_the_phase() -> None:
    body = """
    .reg .b64 %s<4>; .reg .b32 %r<9>; .reg .pred %p<9>;
    mbarrier.init.shared.b64 [%sm], 1;
    mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%sm], 48;
    mbarrier.arrive.expect_tx.shared.b64 %s0, [%sm], 16;
    mbarrier.test_wait.parity.shared.b64 %p0, [%sm], 0;
    mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%sm], 60;
    mbarrier.test_wait.parity.shared.b64 %p1, [%sm], 0;
    mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%sm], 4;
    mbarrier.test_wait.parity.shared.b64 %p2, [%sm], 0;
    """
    for i in range(3):
        body += f"selp.b32 %r{i}, 1, 0, %p{i}; st.global.u32 [%ptr0+{4 * i}], %r{i};\n"
    (got,) = run(body, [np.full(3, 9, U32)], threads=1, shared_bytes=16)
    assert got.tolist() == [0, 0, 1]


WAIT = """
{ .reg .pred done;
wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%sm], PARITY;
@done bra over;
bra wait;
over: }
"""


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_a_ring_between_warps(seed: int | None) -> None:
    """Warp 1 waits for every one of three phases, which warp 0 completes."""
    body = """
    .reg .b32 %r<9>; .reg .pred %p, %q;
    setp.eq.u32 %p, %thread, 0; @%p mbarrier.init.shared.b64 [%sm], 32; @%p mbarrier.init.shared.b64 [%sm+8], 32;
    bar.sync 0;
    mov.b32 %r1, 0; mov.b32 %r5, 0;
    setp.ge.u32 %p, %thread, 32; @%p bra reader;
writer:
    and.b32 %r2, %r1, 1; xor.b32 %r3, %r2, 1;
    { .reg .pred done;
    wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%sm+8], %r3; @!done bra wait; }
    shl.b32 %r4, %lane, 2; add.u32 %r4, %r4, %sm; add.u32 %r2, %r1, %lane; st.shared.u32 [%r4+16], %r2;
    mbarrier.arrive.shared::cta.b64 _, [%sm];
    add.u32 %r1, %r1, 1; setp.lt.u32 %q, %r1, 3; @%q bra writer;
    bra end;
reader:
    and.b32 %r2, %r1, 1;
    { .reg .pred done;
    wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%sm], %r2; @!done bra wait; }
    shl.b32 %r4, %lane, 2; add.u32 %r4, %r4, %sm; ld.shared.u32 %r2, [%r4+16];
    add.u32 %r5, %r5, %r2;
    mbarrier.arrive.shared::cta.b64 _, [%sm+8];
    add.u32 %r1, %r1, 1; setp.lt.u32 %q, %r1, 3; @%q bra reader;
    { .reg .b64 a; mul.wide.u32 a, %lane, 4; add.u64 a, a, %ptr0; st.global.u32 [a], %r5; }
end:
    """
    (got,) = run(body, [np.zeros(32, U32)], threads=64, shared_bytes=256, seed=seed)
    np.testing.assert_array_equal(got, 3 * np.arange(32) + 3)


def test_misuse_of_mbarriers() -> None:
    first = ".reg .pred %p; setp.eq.u32 %p, %thread, 0; @%p mbarrier.init.shared.b64 [%sm], 1; "
    with pytest.raises(EmulatorFault, match=r"deadlock(?s:.*)mbarrier at 1024 \(phase 0, 1 of 1 arrivals and 0 bytes"):
        run(first + "bar.sync 0;" + WAIT.replace("PARITY", "0"), [np.zeros(1, U32)], 64, shared_bytes=16)
    with pytest.raises(EmulatorFault, match="initialised by block 0, warp 0, with no barrier between"):
        run(first + WAIT.replace("PARITY", "1"), [np.zeros(1, U32)], 64, shared_bytes=16)
    with pytest.raises(EmulatorFault, match="overflows"):
        run(
            first + "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%sm], 0x100000;",
            [np.zeros(1, U32)],
            1,
            shared_bytes=16,
        )
    again = "mbarrier.init.shared.b64 [%sm], 1;"
    used = first + "mbarrier.arrive.shared::cta.b64 _, [%sm];"
    with pytest.raises(EmulatorFault, match="at 1024 is initialised a second time"):
        run(used + again, [np.zeros(1, U32)], 1, shared_bytes=16)
    run(used + "mbarrier.inval.shared.b64 [%sm];" + again, [np.zeros(1, U32)], 1, shared_bytes=16)
    with pytest.raises(EmulatorFault, match="writes over an mbarrier"):
        run(first + "st.shared.u32 [%sm+4], 1;", [np.zeros(1, U32)], 1, shared_bytes=16)


def test_bytes_that_nobody_expects_are_a_deadlock() -> None:
    """A transaction count too small: the copy overdraws it, and the phase never completes."""
    body = f"""
    mbarrier.init.shared.b64 [%sm], 1; fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%sm], EXPECTED;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%sm+16], [%ptr0], 64, [%sm];
    {WAIT.replace("PARITY", "0")}
    """
    run(body.replace("EXPECTED", "64"), [np.zeros(16, U32)], 1, shared_bytes=128)
    for expected, missing in ((48, -16), (80, 16)):
        with pytest.raises(EmulatorFault, match=f"deadlock(?s:.*)0 of 1 arrivals and {missing} bytes missing"):
            run(body.replace("EXPECTED", str(expected)), [np.zeros(16, U32)], 1, shared_bytes=128)


def test_work_in_flight_lands_at_random_times_with_a_seed() -> None:
    """What a bulk store writes may be seen before its wait, or not until then."""
    body = """
    .reg .b32 %v, %i; .reg .pred %p;
    st.shared.v4.u32 [%sm], {7, 7, 7, 7}; fence.proxy.async;
    cp.async.bulk.global.shared::cta.bulk_group [%ptr0], [%sm], 16; cp.async.bulk.commit_group;
    mov.u32 %i, 0;
loop: add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 4; @%p bra loop;
    ld.global.u32 %v, [%ptr0];
    st.global.u32 [%ptr1], %v;
    cp.async.bulk.wait_group 0;
    """
    seen = set()
    for seed in (None, *range(12)):
        stored, before = run(body, [np.zeros(4, U32), np.zeros(1, U32)], 1, shared_bytes=16, seed=seed, races=False)
        assert stored.tolist() == [7] * 4
        assert seed is not None or before[0] == 0, "as late as allowed"
        seen.add(int(before[0]))
    assert seen == {0, 7}


def test_copies_by_threads_land_at_random_times_with_a_seed() -> None:
    """cp.async reads global memory at any time until the wait: a store in between may come too early or too late."""
    body = """
    .reg .b32 %v, %i; .reg .pred %p;
    cp.async.ca.shared.global [%sm], [%ptr0], 4;
    mov.u32 %i, 0;
loop: add.u32 %i, %i, 1; setp.lt.u32 %p, %i, 4; @%p bra loop;
    st.global.u32 [%ptr0], 5;
    cp.async.wait_all;
    ld.shared.u32 %v, [%sm]; st.global.u32 [%ptr1], %v;
    """
    got = [
        int(run(body, [np.zeros(1, U32), np.zeros(1, U32)], 1, shared_bytes=16, seed=seed, races=False)[1][0])
        for seed in (None, *range(12))
    ]
    assert got[0] == 5 and set(got) == {0, 5}
    with pytest.raises(EmulatorFault, match="race: writes(?s:.*)reads asynchronously"):
        run(body, [np.zeros(1, U32), np.zeros(1, U32)], 1, shared_bytes=16)


# --- cp.async ------------------------------------------------------------------------------------------

THREAD_COPY = """
    .reg .b32 %at, %r<5>; .reg .b64 %off, %from, %to; .reg .pred %odd;
    mul.wide.u32 %off, %lane, 16; add.u64 %from, %ptr0, %off; add.u64 %to, %ptr1, %off;
    shl.b32 %at, %lane, 4; add.u32 %at, %at, %sm;
    and.b32 %r4, %lane, 15; setp.eq.u32 %odd, %r4, 9;
    FIRST
    cp.async.commit_group;
    SECOND
    ld.shared.v4.b32 {%r0, %r1, %r2, %r3}, [%at];
    st.global.v4.b32 [%to], {%r0, %r1, %r2, %r3};
"""


def thread_copy(first: str, second: str, wanted: np.ndarray | None = None) -> None:
    data = np.random.default_rng(0).integers(0, 256, (32, 16)).astype(np.uint8)
    body = THREAD_COPY.replace("FIRST", first).replace("SECOND", second)
    got = run(body, [data, np.zeros_like(data)], shared_bytes=512)[1]
    np.testing.assert_array_equal(got, data if wanted is None else np.where(wanted, data, 0))


def test_copies_by_threads() -> None:
    copy, wait = "cp.async.cg.shared.global [%at], [%from], 16;", "cp.async.wait_group 0;"
    thread_copy(copy, wait)
    thread_copy("cp.async.ca.shared.global [%at], [%from], 8; cp.async.ca.shared.global [%at+8], [%from+8], 8;", wait)
    thread_copy(copy, "cp.async.wait_all;")
    partial = np.arange(16) < np.arange(32)[:, None] % 16
    thread_copy("cp.async.cg.shared.global [%at], [%from], 16, %r4;", wait, partial)
    with pytest.raises(EmulatorFault, match="copy in flight"):
        thread_copy(copy, "")
    with pytest.raises(EmulatorFault, match="copy in flight"):
        thread_copy(copy, "cp.async.wait_group 1;")
    with pytest.raises(EmulatorFault, match="outside any allocation"):
        thread_copy("cp.async.cg.shared.global [%at], [%from+16], 16;", wait)


# --- tensor copies ---------------------------------------------------------------------------------------


def tensor(shape: tuple[int, ...], dtype: object = BF16) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 250, shape).astype(dtype)


def tensor_kernel(rank: int, coordinates: tuple[int, ...], size: int, steps: dict[str, str] | None = None) -> str:
    """Load a box at 1 KiB of shared memory, copy it raw to ptr0, store it through the second map."""
    places = ", ".join(f"%c{axis}" for axis in range(rank))
    part = {
        "FENCE": "fence.mbarrier_init.release.cluster;",
        "WAIT": WAIT.replace("PARITY", "0"),
        "PROXY": "fence.proxy.async.shared::cta;",
        "COMMIT": "cp.async.bulk.commit_group;",
        "END": "cp.async.bulk.wait_group 0;",
        "BETWEEN": "",
        "STORE": f"cp.async.bulk.tensor.{rank}d.global.shared::cta.bulk_group [%m1, {{{places}}}], [%to];",
    } | (steps or {})
    body = f"""
    .reg .b32 %c<5>, %to, %w, %i; .reg .b64 %m0, %m1, %from; .reg .pred %p;
    {" ".join(f"mov.b32 %c{axis}, {value};" for axis, value in enumerate(coordinates))}
    mov.b64 %m0, map0; cvta.param.u64 %m0, %m0; mov.b64 %m1, map1; cvta.param.u64 %m1, %m1;
    add.u32 %to, %sm, 1024;
    mbarrier.init.shared::cta.b64 [%sm], 1;
    {part["FENCE"]}
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%sm], {size};
    cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes [%to], [%m0, {{{places}}}], [%sm];
    {part["BETWEEN"]}
    {part["WAIT"]}
    mov.b32 %i, 0; mov.u64 %from, %ptr0;
copy:
    add.u32 %w, %to, %i; ld.shared.b32 %w, [%w]; st.global.b32 [%from], %w;
    add.u64 %from, %from, 4; add.u32 %i, %i, 4; setp.lt.u32 %p, %i, {size}; @%p bra copy;
    {part["PROXY"]}
    {part["STORE"]}
    {part["COMMIT"]}
    {part["END"]}
    """
    text = wrap(body, 1)
    maps = ", .param .align 64 .b8 map0[128], .param .align 64 .b8 map1[128])"
    return legal(text.replace("(.param .u64 p0)", "(.param .u64 p0" + maps))


def move_box(
    source: np.ndarray, box: tuple[int, ...], coordinates: tuple[int, ...], swizzle: int = 0,
    steps: dict[str, str] | None = None, element: str = "BFLOAT16", seed: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The raw bytes of a box in shared memory, and the tensor that a store of the same box wrote. Outermost first."""
    memory = GlobalMemory()
    size = int(np.prod(box)) * source.itemsize
    raw = memory.allocate(np.zeros(size, np.uint8), "raw")
    target = np.full(source.shape, 99, source.dtype)
    places = [memory.allocate(source, "source"), memory.allocate(target, "target")]
    dims, strides = source.shape[::-1], source.strides[::-1][1:]
    maps = [encode_tensor_map(element, place, dims, strides, box[::-1], swizzle) for place in places]
    packed = np.array([raw], np.uint64).tobytes().ljust(64, b"\0") + b"".join(maps)
    ptx = tensor_kernel(len(box), coordinates[::-1], size, steps)
    PtxEmulator(ptx, "k").launch(memory, (1,), (1,), packed, shared_bytes=1024 + size, seed=seed)
    return memory.read_back(raw), memory.read_back(places[1])


def boxed(source: np.ndarray, box: tuple[int, ...], start: tuple[int, ...]) -> np.ndarray:
    """The box with zeros outside of the tensor."""
    result = np.zeros(box, source.dtype)
    for place in itertools.product(*map(range, box)):
        at = tuple(s + p for s, p in zip(start, place, strict=True))
        if all(0 <= a < n for a, n in zip(at, source.shape, strict=True)):
            result[place] = source[at]
    return result


@pytest.mark.parametrize(
    ("shape", "box", "start"),
    [
        ((64,), (16,), (8,)), ((64,), (16,), (56,)), ((64,), (16,), (-8,)), ((10, 24), (4, 16), (2, 8)),
        ((10, 24), (4, 16), (8, 16)), ((10, 24), (4, 16), (-2, -8)), ((10, 24), (4, 16), (20, 0)),
        ((4, 5, 16), (2, 3, 8), (3, 3, 8)), ((2, 3, 4, 8), (1, 2, 2, 8), (1, 2, 3, 0)),
        ((2, 2, 3, 4, 8), (2, 1, 2, 2, 8), (1, 1, 2, -1, 0)),
    ],
)  # fmt: skip
def test_boxes_of_tensors(shape: tuple[int, ...], box: tuple[int, ...], start: tuple[int, ...]) -> None:
    """Zeros come from outside; a store writes only inside."""
    source = tensor(shape)
    raw, target = move_box(source, box, start)
    np.testing.assert_array_equal(raw.view(BF16).reshape(box), boxed(source, box, start))
    inside = np.zeros(shape, np.bool_)
    for place in itertools.product(*map(range, box)):
        at = tuple(s + p for s, p in zip(start, place, strict=True))
        if all(0 <= a < n for a, n in zip(at, shape, strict=True)):
            inside[at] = True
    np.testing.assert_array_equal(target, np.where(inside, source, BF16(99)))


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_swizzles(swizzle: int) -> None:
    source = tensor((16, 64))
    raw, target = move_box(source, (16, swizzle // 2), (0, 0), swizzle)
    for row, chunk in itertools.product(range(16), range(swizzle // 16)):
        address = row * swizzle + 16 * chunk
        swapped = address ^ (address >> 7 & (swizzle // 16 - 1)) << 4
        np.testing.assert_array_equal(raw[swapped : swapped + 16].view(BF16), source[row, 8 * chunk : 8 * chunk + 8])
    np.testing.assert_array_equal(target[:, : swizzle // 2], source[:, : swizzle // 2])


@pytest.mark.parametrize("operation", ["add", "min", "max"])
def test_reductions_into_tensors(operation: str) -> None:
    source = np.arange(-40, 88, dtype=np.float32).reshape(8, 16)
    name = f"cp.reduce.async.bulk.tensor.2d.global.shared::cta.{operation}.tile.bulk_group [%m1, {{%c0, %c1}}], [%to];"
    _, target = move_box(source, (4, 8), (2, 8), steps={"STORE": name}, element="FLOAT32")
    wanted = np.full_like(source, 99)
    function = {"add": np.add, "min": np.minimum, "max": np.maximum}[operation]
    wanted[2:6, 8:] = function(99, source[2:6, 8:])
    np.testing.assert_array_equal(target, wanted)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"WAIT": ""}, "reads shared memory that a copy in flight writes"),
        ({"FENCE": ""}, "no fence .* has made it visible to the async proxy"),
        ({"BETWEEN": "st.shared.b32 [%to], 0;"}, "writes shared memory that a copy in flight writes"),
        ({"PROXY": "st.shared.b32 [%to], 0;"}, "no fence.proxy.async between"),
        ({"COMMIT": "", "END": ""}, "the block ends while a bulk copy still reads"),
        ({"END": "st.shared.b32 [%to], 0; cp.async.bulk.wait_group 0;"}, "an asynchronous operation still reads"),
        ({"WAIT": WAIT.replace("PARITY", "0") + "mbarrier.arrive.shared::cta.b64 _, [%sm], 2;"}, "2 arrivals at"),
    ],
)
@pytest.mark.parametrize("seed", [None, 3])
def test_races_of_copies(steps: dict[str, str], message: str, seed: int | None) -> None:
    with pytest.raises(EmulatorFault, match=message):
        move_box(tensor((10, 24)), (4, 16), (2, 8), steps=steps, seed=seed)


def test_wrong_byte_counts_are_deadlocks() -> None:
    more = {"BETWEEN": "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%sm], 16;"}
    with pytest.raises(EmulatorFault, match="deadlock(?s:.*)16 bytes missing"):
        move_box(tensor((10, 24)), (4, 16), (2, 8), steps=more)


def test_tensor_maps_obey_the_driver() -> None:
    good = dict(element="BFLOAT16", address=1 << 20, dims=(64, 64), strides=(128,), box=(64, 8), swizzle=128)
    assert len(encode_tensor_map(**good)) == 128
    for change, message in [
        (dict(address=8), "address"), (dict(strides=(120,)), "strides"), (dict(box=(64, 300)), "box dimensions"),
        (dict(box=(4, 8)), "multiple of 16"), (dict(swizzle=64), "fit the swizzle"), (dict(dims=(64, 0)), "dimensions"),
        (dict(dims=(64,)), "fit the rank"), (dict(swizzle=7), "swizzle 7"),
    ]:  # fmt: skip
        with pytest.raises(EmulatorError, match=message):
            encode_tensor_map(**{**good, **change})


def test_bulk_copies_without_a_map() -> None:
    body = f"""
    .reg .b32 %to, %w;
    add.u32 %to, %sm, 16;
    mbarrier.init.shared::cta.b64 [%sm], 1; fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%sm], 64;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%to], [%ptr0], 64, [%sm];
    {WAIT.replace("PARITY", "0")}
    cp.async.bulk.global.shared::cta.bulk_group [%ptr1], [%to], 64;
    cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%ptr2], [%to], 64;
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
    """
    data = np.arange(16, dtype=U32)
    ptx = legal(wrap(body, 3))
    _, copied, added = launch(ptx, [data, np.zeros(16, U32), np.full(16, 5, U32)], 1, shared_bytes=128)[0]
    np.testing.assert_array_equal(copied, data)
    np.testing.assert_array_equal(added, data + 5)
