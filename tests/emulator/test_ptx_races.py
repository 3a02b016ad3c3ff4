"""Races that the PTX emulator finds though its schedule hides them, and code that must not be blamed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from ptx_snippets import legal, run, wrap

from tilewright.runtime.emulator.nvidia import EmulatorFault, GlobalMemory, PtxEmulator
from tilewright.runtime.emulator.races import Races
from tilewright.runtime.emulator.together import Setting, run_together

U32 = np.uint32
BARRIER = "bar.sync 0;"


def racy(body: str, message: str = "race: ", threads: int = 64, blocks: int = 1, **options: object) -> str:
    """The message of the race that the body has; its result would come out right."""
    arrays = [np.zeros(64, U32) for _ in range(2)]
    with pytest.raises(EmulatorFault, match=message) as caught:
        run(body, arrays, threads, blocks=(blocks,), shared_bytes=512, **options)
    return str(caught.value)


def clean(body: str, threads: int = 64, blocks: int = 1, **options: object) -> list[np.ndarray]:
    arrays = [np.zeros(64, U32) for _ in range(2)]
    return run(body, arrays, threads, blocks=(blocks,), shared_bytes=512, **options)


def check(body: str, needed: dict[str, str], message: str = "race: ", **options: object) -> None:
    """The body with each of the ``needed`` pieces put in is clean, and races with any one of them left out."""
    complete = body
    for name, text in needed.items():
        complete = complete.replace(name, text)
    clean(complete, **options)  # type: ignore[arg-type]
    for left_out in needed:
        broken = body.replace(left_out, "")
        for name, text in needed.items():
            broken = broken.replace(name, text)
        racy(broken, message, **options)  # type: ignore[arg-type]


# --- shared memory -----------------------------------------------------------------------------------

#: every thread stores a word and reads that of the thread 32 further on
EXCHANGE = """
    .reg .b32 %a, %b, %v; .reg .b64 %out;
    shl.b32 %a, %thread, 2; xor.b32 %b, %a, 128; add.u32 %a, %a, %sm; add.u32 %b, %b, %sm;
    st.shared.u32 [%a], %thread;
    FIRST
    ld.shared.u32 %v, [%b];
    SECOND
    st.shared.u32 [%a], %v;
    mul.wide.u32 %out, %thread, 4; add.u64 %out, %out, %ptr0; st.global.u32 [%out], %v;
"""


def test_warps_that_exchange_need_a_barrier_before_and_after() -> None:
    check(EXCHANGE, {"FIRST": BARRIER, "SECOND": BARRIER})
    text = racy(EXCHANGE.replace("FIRST", "").replace("SECOND", ""))
    assert "reads shared memory at 1152, which block 0, warp 1, lane 0 wrote and nothing orders the two" in text
    assert "[block 0, warp 0, lane 0]" in text
    assert text.count("line ") == 2 and "st.shared.u32 [%a], %thread" in text and "ld.shared.u32 %v, [%b]" in text


def test_both_lines_of_the_tile_program_are_named() -> None:
    body = (
        EXCHANGE.replace("FIRST", ".loc 1 9 1").replace("SECOND", "").replace("st.shared", ".loc 1 7 3\n st.shared", 1)
    )
    ptx = wrap(body, 2).replace(".address_size 64", '.address_size 64\n.file 1 "kernels/thing.py"')
    memory = GlobalMemory()
    parameters = np.array([memory.allocate(np.zeros(64, U32)) for _ in range(2)], np.uint64).tobytes()
    with pytest.raises(EmulatorFault, match=r"thing\.py:7:3(?s:.*)thing\.py:9:1"):
        PtxEmulator(ptx, "k").launch(memory, (1,), (64,), parameters, shared_bytes=512, races=True)


def test_warps_may_store_the_same_value() -> None:
    store = "st.shared.u32 [%sm], VALUE; stmatrix.sync.aligned.m8n8.x1.shared.b16 [%sm+128], {%r}; MEET"
    body = ".reg .b32 %v, %r; mov.u32 %r, 7;" + store + "ld.shared.u32 %v, [%sm]; ld.shared.u32 %v, [%sm+128];"
    check(body.replace("VALUE", "7"), {"MEET": BARRIER})
    racy(body.replace("VALUE", "%thread").replace("MEET", BARRIER))
    racy(body.replace("VALUE", "7").replace("mov.u32 %r, 7", "mov.u32 %r, %thread").replace("MEET", BARRIER))


@pytest.mark.parametrize("seed", [None, 1, 2, 3, 4])
def test_the_interleaving_does_not_matter(seed: int | None) -> None:
    racy(EXCHANGE.replace("FIRST", "").replace("SECOND", BARRIER), seed=seed)
    clean(EXCHANGE.replace("FIRST", BARRIER).replace("SECOND", BARRIER), seed=seed)


NEIGHBOURS = EXCHANGE.replace("xor.b32 %b, %a, 128", "xor.b32 %b, %a, 4")


def test_lanes_of_a_warp_are_ordered_by_its_barrier_alone() -> None:
    """9.7.13: bar.warp.sync orders memory; shuffles and votes only exchange values."""
    meet = "bar.warp.sync 0xFFFFFFFF;"
    check(NEIGHBOURS, {"FIRST": meet, "SECOND": meet})
    check(NEIGHBOURS, {"FIRST": BARRIER, "SECOND": meet})
    shuffle = "{ .reg .b32 %s; shfl.sync.idx.b32 %s, %thread, 0, 31, -1; }"
    racy(NEIGHBOURS.replace("FIRST", shuffle).replace("SECOND", meet))
    # a barrier of half of the warp is none for the other half
    halves = "{ .reg .pred %h; setp.lt.u32 %h, %lane, 16; @%h bra low; bar.warp.sync 0xFFFF0000; bra on;"
    halves += "low: bar.warp.sync 0xFFFF; on: }"
    clean(NEIGHBOURS.replace("FIRST", halves).replace("SECOND", halves))
    far = EXCHANGE.replace("xor.b32 %b, %a, 128", "xor.b32 %b, %a, 64")
    racy(far.replace("FIRST", halves).replace("SECOND", meet))


#: warp 0 fills a buffer and warp 1 reads it, with the barriers full (at 0) and empty (at 8)
HANDSHAKE = """
    .reg .b32 %a, %v, %i; .reg .pred %p, %one; .reg .b64 %out;
    setp.eq.u32 %p, %thread, 0;
    @%p mbarrier.init.shared.b64 [%sm], COUNT; @%p mbarrier.init.shared.b64 [%sm+8], COUNT;
    bar.sync 0;
    setp.eq.u32 %one, %lane, 0;
    shl.b32 %a, %lane, 2; add.u32 %a, %a, %sm; mov.u32 %v, 0;
    setp.ge.u32 %p, %thread, 32; @%p bra reader;
    st.shared.u32 [%a+16], %lane;
    MEET1
    ELECT mbarrier.arrive.shared::cta.b64 _, [%sm];
    { .reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%sm+8], 0; @!done bra wait; }
    st.shared.u32 [%a+16], %thread;
    bra end;
reader:
    { .reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%sm], 0; @!done bra wait; }
    ld.shared.u32 %v, [%a+16];
    MEET2
    ELECT mbarrier.arrive.shared::cta.b64 _, [%sm+8];
end:
"""


def test_an_elected_arrival_speaks_for_its_lane_alone() -> None:
    every = HANDSHAKE.replace("COUNT", "32").replace("ELECT", "")
    clean(every.replace("MEET1", "").replace("MEET2", ""))
    elected = HANDSHAKE.replace("COUNT", "1").replace("ELECT", "@%one")
    meet = "bar.warp.sync 0xFFFFFFFF;"
    check(elected, {"MEET1": meet, "MEET2": meet})


def test_a_relaxed_arrival_or_wait_orders_nothing() -> None:
    every = HANDSHAKE.replace("COUNT", "32").replace("ELECT", "").replace("MEET1", "").replace("MEET2", "")
    relaxed = every.replace("mbarrier.arrive.shared", "mbarrier.arrive.relaxed.cta.shared", 1)
    racy(relaxed, check=False)
    racy(every.replace("try_wait.parity.shared", "try_wait.parity.relaxed.cta.shared", 1), check=False)


def test_named_barriers_order_those_who_take_part() -> None:
    body = """
    .reg .b32 %a, %v; .reg .pred %p;
    setp.ge.u32 %p, %thread, 32;
    shl.b32 %a, %lane, 2; add.u32 %a, %a, %sm;
    @%p bra reader;
    st.shared.u32 [%a], %lane;
    bar.arrive 1, 64;
    LATE
    bra end;
reader:
    bar.sync 1, 64;
    ld.shared.u32 %v, [%a];
end:
    """
    clean(body.replace("LATE", ""))
    racy(body.replace("LATE", "st.shared.u32 [%a], %lane;"))


# --- the async proxy -----------------------------------------------------------------------------------

STORE = """
    .reg .b32 %a, %v; .reg .pred %p;
    setp.eq.u32 %p, %thread, 0;
    shl.b32 %a, %thread, 2; add.u32 %a, %a, %sm;
    st.shared.u32 [%a], %thread;
    BEFORE
    MEET
    AFTER
    @%p cp.async.bulk.global.shared::cta.bulk_group [%ptr0], [%sm], 256;
    @%p cp.async.bulk.commit_group;
    @%p cp.async.bulk.wait_group.read 0;
    AGAIN
    st.shared.u32 [%a], %thread;
"""
FENCE = "fence.proxy.async.shared::cta;"


def test_a_bulk_store_needs_a_fence_behind_the_writes() -> None:
    check(STORE.replace("AFTER", ""), {"BEFORE": FENCE, "MEET": BARRIER, "AGAIN": BARRIER}, "race: |proxy.async")
    clean(STORE.replace("BEFORE", "").replace("MEET", BARRIER).replace("AFTER", FENCE).replace("AGAIN", BARRIER))
    # the fence of another thread does not help, nor one before the barrier that others' writes come through
    other = "{ .reg .pred %q; setp.eq.u32 %q, %thread, 33; @%q fence.proxy.async.shared::cta; }"
    parts = STORE.replace("MEET", BARRIER).replace("AGAIN", BARRIER)
    racy(parts.replace("BEFORE", "").replace("AFTER", other), "no fence.proxy.async")
    racy(parts.replace("BEFORE", "@%p " + FENCE).replace("AFTER", ""), "no fence.proxy.async")


def test_global_memory_has_an_async_proxy_too() -> None:
    body = """
    .reg .b32 %v; .reg .pred %p; .reg .b64 %at;
    mul.wide.u32 %at, %thread, 4; add.u64 %at, %at, %ptr0;
    setp.eq.u32 %p, %thread, 0;
    @%p mbarrier.init.shared.b64 [%sm], 1; @%p fence.mbarrier_init.release.cluster;
    st.global.u32 [%at], %thread;
    FENCE
    bar.sync 0;
    @%p mbarrier.arrive.expect_tx.shared::cta.b64 _, [%sm], 256;
    @%p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%sm+16], [%ptr0], 256, [%sm];
    { .reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%sm], 0; @!done bra wait; }
    ld.shared.u32 %v, [%sm+16];
    """
    check(body, {"FENCE": "fence.proxy.async.global;"}, "no fence.proxy.async")
    clean(body.replace("FENCE", "fence.proxy.async;"))
    racy(body.replace("FENCE", FENCE), "no fence.proxy.async")


def test_what_a_bulk_store_writes_is_there_after_its_wait_alone() -> None:
    body = """
    .reg .b32 %v; .reg .pred %p;
    setp.eq.u32 %p, %thread, 0;
    @!%p bra end;
    st.shared.v4.u32 [%sm], {%thread, %thread, %thread, %thread}; fence.proxy.async;
    cp.async.bulk.global.shared::cta.bulk_group [%ptr0], [%sm], 16; cp.async.bulk.commit_group;
    WAIT
    ld.global.u32 %v, [%ptr0];
    cp.async.bulk.wait_group 0;
end:
    """
    check(body, {"WAIT": "cp.async.bulk.wait_group 0;"}, "writes asynchronously, and nothing has waited")
    racy(body.replace("WAIT", "cp.async.bulk.wait_group.read 0;"), "nothing has waited")


def test_reductions_of_blocks_do_not_race() -> None:
    body = """
    .reg .pred %p; setp.eq.u32 %p, %thread, 0; @!%p bra end;
    st.shared.v4.u32 [%sm], {%thread, %thread, %thread, %thread}; fence.proxy.async;
    cp.KIND [%ptr0], [%sm], 16; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
end:
    """
    clean(body.replace("KIND", "reduce.async.bulk.global.shared::cta.bulk_group.add.u32"), blocks=3)
    racy(body.replace("KIND", "async.bulk.global.shared::cta.bulk_group"), blocks=3)


def test_a_copy_by_threads_is_its_own_threads_until_they_meet() -> None:
    body = """
    .reg .b32 %a, %b, %v; .reg .b64 %from;
    shl.b32 %a, %thread, 2; xor.b32 %b, %a, 4; add.u32 %a, %a, %sm; add.u32 %b, %b, %sm;
    mul.wide.u32 %from, %thread, 4; add.u64 %from, %from, %ptr0;
    cp.async.ca.shared.global [%a], [%from], 4;
    cp.async.wait_all;
    MEET
    ld.shared.u32 %v, [%b];
    """
    check(body, {"MEET": "bar.warp.sync -1;"})


def test_copies_arrive_with_their_data() -> None:
    """cp.async.mbarrier.arrive: the arrival comes when the thread's copies have landed, and publishes them."""
    body = """
    .reg .b32 %a, %b, %v; .reg .b64 %from; .reg .pred %p;
    setp.eq.u32 %p, %thread, 0; @%p mbarrier.init.shared.b64 [%sm], 64; bar.sync 0;
    shl.b32 %a, %thread, 2; xor.b32 %b, %a, 128; add.u32 %a, %a, %sm; add.u32 %b, %b, %sm;
    mul.wide.u32 %from, %thread, 4; add.u64 %from, %from, %ptr0;
    cp.async.ca.shared.global [%a+16], [%from], 4;
    ARRIVE
    { .reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%sm], 0; @!done bra wait; }
    ld.shared.u32 %v, [%b+16];
    """
    later = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%sm];"
    for seed in (None, 1, 2):
        clean(body.replace("ARRIVE", later), seed=seed)
        racy(body.replace("ARRIVE", "mbarrier.arrive.shared::cta.b64 _, [%sm];"), "race: |copy in flight", seed=seed)


# --- global memory ---------------------------------------------------------------------------------------

#: block 0 writes data and raises a flag; block 1 polls the flag and reads
FLAG = """
    .reg .b32 %block, %v; .reg .pred %p, %one; .reg .b64 %at;
    mul.wide.u32 %at, %thread, 4; add.u64 %at, %at, %ptr0;
    setp.eq.u32 %one, %thread, 0;
    mov.u32 %block, %ctaid.x; setp.ne.u32 %p, %block, 0; @%p bra reader;
    st.global.u32 [%at], %thread;
    MEET1
    RELEASE
    bra end;
reader:
    @!%one bra over;
spin:
    ACQUIRE
    setp.eq.u32 %p, %v, 0; @%p bra spin;
    FENCE
over:
    MEET2
    ld.global.u32 %v, [%at];
end:
"""
RELEASES = {
    "st.release": "@%one st.release.SCOPE.global.u32 [%ptr1], 1;",
    "fence st": "fence.acq_rel.SCOPE; @%one st.relaxed.SCOPE.global.u32 [%ptr1], 1;",
    "fence red": "@%one fence.sc.SCOPE; @%one red.relaxed.SCOPE.global.add.u32 [%ptr1], 1;",
    "atom": "{ .reg .b32 %o; @%one atom.release.SCOPE.global.exch.b32 %o, [%ptr1], 1; }",
    "membar volatile": "membar.MEMBAR; @%one st.volatile.global.u32 [%ptr1], 1;",
}
ACQUIRES = {
    "ld.acquire": ("ld.acquire.SCOPE.global.u32 %v, [%ptr1];", ""),
    "ld fence": ("ld.relaxed.SCOPE.global.u32 %v, [%ptr1];", "fence.acq_rel.SCOPE;"),
    "atom": ("atom.acquire.SCOPE.global.or.b32 %v, [%ptr1], 0;", ""),
    "volatile membar": ("ld.volatile.global.u32 %v, [%ptr1];", "membar.MEMBAR;"),
}


def flag(release: str, acquire: str, scope: str = "gpu") -> str:
    poll, fence = ACQUIRES[acquire]
    body = FLAG.replace("RELEASE", RELEASES[release]).replace("ACQUIRE", poll).replace("FENCE", fence)
    return body.replace("SCOPE", scope).replace("MEMBAR", {"gpu": "gl", "cta": "cta", "sys": "sys"}[scope])


@pytest.mark.parametrize("acquire", ACQUIRES)
@pytest.mark.parametrize("release", RELEASES)
def test_a_flag_between_blocks(release: str, acquire: str) -> None:
    body = flag(release, acquire)
    check(body, {"MEET1": BARRIER, "MEET2": BARRIER}, blocks=2)
    complete = flag(release, acquire, "cta").replace("MEET1", BARRIER).replace("MEET2", BARRIER)
    racy(complete, blocks=2)  # the scope is too small


def test_flags_without_their_fences() -> None:
    parts = {"MEET1": BARRIER, "MEET2": BARRIER}
    body = flag("fence st", "ld fence")
    for part, text in parts.items():
        body = body.replace(part, text)
    clean(body, blocks=2)
    racy(body.replace("fence.acq_rel.gpu;", "", 1), blocks=2)
    racy(
        "fence.acq_rel.gpu;".join(body.rsplit("fence.acq_rel.gpu;", 1)[:1]) + body.rsplit("fence.acq_rel.gpu;", 1)[1],
        blocks=2,
    )
    # in front of the barrier the fence covers the writes of its own thread alone
    early = flag("fence red", "ld.acquire").replace("MEET2", BARRIER)
    early = early.replace("@%one fence.sc.gpu;", "").replace("MEET1", "@%one fence.sc.gpu;" + BARRIER)
    racy(early, blocks=2)
    # a plain flag is a race itself
    racy(body.replace("st.relaxed.gpu", "st").replace("ld.relaxed.gpu", "ld"), blocks=2)


def test_atomics_race_with_plain_accesses_alone() -> None:
    add = "red.relaxed.SCOPE.global.add.u32 [%ptr0], 1;"
    clean(add.replace("SCOPE", "gpu"), blocks=3)
    racy(add.replace("SCOPE", "cta"), blocks=2)
    clean(add.replace("SCOPE", "cta"))
    racy(add.replace("SCOPE", "gpu") + ".reg .b32 %v; ld.global.u32 %v, [%ptr0];", blocks=2)
    racy("st.global.u32 [%ptr0], %thread;", blocks=2)


def test_a_load_that_is_discarded_does_not_race() -> None:
    """Lanes beyond the end read the first element, and throw it away."""
    body = """
    .reg .b32 %v, %w; .reg .pred %p; .reg .b64 %at, %harmless;
    setp.lt.u32 %p, %thread, 40;
    mul.wide.u32 %at, %thread, 4; add.u64 %at, %at, %ptr0;
    selp.b64 %harmless, %at, %ptr0, %p;
    ld.global.u32 %v, [%harmless];
    selp.b32 %w, %v, 7, KEPT;
    @%p st.global.u32 [%at], %w;
    """
    clean(body.replace("KEPT", "%p"))
    racy(body.replace("KEPT", "%p").replace("%w, %v, 7", "%w, 7, %v"))
    racy(body.replace("KEPT", "%p") + "st.global.u32 [%at+128], %v;", "race: |outside")


def test_blocks_that_run_one_after_the_other_race_all_the_same() -> None:
    body = ".reg .b32 %block; mov.u32 %block, %ctaid.x; st.global.u32 [%ptr0], %block;"
    racy(body, threads=32, blocks=200)


def test_a_kernel_boundary_orders() -> None:
    ptx = legal(wrap(".reg .b32 %v; ld.global.u32 %v, [%ptr0]; bar.sync 0; st.global.u32 [%ptr0], %v;"))
    memory = GlobalMemory()
    parameters = np.array([memory.allocate(np.zeros(4, U32))], np.uint64).tobytes()
    for _ in range(2):
        PtxEmulator(ptx, "k").launch(memory, (1,), (32,), parameters, races=True)


# --- several GPUs ----------------------------------------------------------------------------------------


def on_two_gpus(bodies: Iterator[str] | list[str], seed: int | None = None) -> list[np.ndarray]:
    """Each body on a GPU of its own; both get the same two arrays."""
    memory, races = GlobalMemory(), Races()
    places = [memory.allocate(np.zeros(64, U32), f"array {i}") for i in range(2)]
    parameters = np.array(places, np.uint64).tobytes()
    machines = [
        PtxEmulator(legal(wrap(body, 2)), "k").start(
            memory, (1,), (64,), parameters, Setting(seed, races, rank, 2), shared_bytes=512
        )
        for rank, body in enumerate(bodies)
    ]
    run_together(machines, seed, progress=False)
    return [memory.read_back(place) for place in places]


def ranks_of(body: str) -> list[str]:
    """What block 0 and block 1 of the body do, on two GPUs."""
    return [body.replace("%ctaid.x", str(rank)) for rank in range(2)]


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("first", [0, 1])
def test_a_flag_between_gpus(first: int, seed: int | None) -> None:
    body = flag("fence st", "ld.acquire", "sys").replace("MEET1", BARRIER).replace("MEET2", BARRIER)
    ranks = ranks_of(body)
    np.testing.assert_array_equal(on_two_gpus(ranks if first == 0 else ranks[::-1], seed)[0], np.arange(64))
    with pytest.raises(EmulatorFault, match=r"race: (?s:.*)rank \d, block 0, warp"):
        on_two_gpus([rank.replace(".sys", ".gpu") for rank in ranks], seed)


def test_nobody_raises_the_flag() -> None:
    ranks = ranks_of(flag("fence st", "ld.acquire", "sys").replace("MEET1", BARRIER).replace("MEET2", BARRIER))
    with pytest.raises(EmulatorFault, match=r"livelock(?s:.*)rank 0, kernel k:(?s:.*)polls at(?s:.*)rank 1") as caught:
        on_two_gpus([ranks[1], ranks[1]])
    assert "ld.acquire.sys.global" in str(caught.value)


def test_gpus_that_wait_for_each_other() -> None:
    init = ".reg .pred %p; setp.eq.u32 %p, %thread, 0; @%p mbarrier.init.shared.b64 [%sm], 1; bar.sync 0;"
    wait = "{ .reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%sm], 0; @!done bra wait; }"
    with pytest.raises(EmulatorFault, match=r"deadlock(?s:.*)rank 0, kernel k(?s:.*)rank 1, block 0, warp 0"):
        on_two_gpus([init + wait, init + wait])


# --- launches that begin while the one before them runs --------------------------------------------------

#: one thread waits, or all; then every thread stores
EARLY = """
    .reg .pred %first; .reg .b64 %out; setp.eq.u32 %first, %thread, 0;
    mul.wide.u32 %out, %thread, 4; add.u64 %out, %out, %ptr0;
    BEFORE
    WAIT
    st.global.u32 [%out], %thread;
"""


def early(wait: str, before: str = "") -> str:
    return EARLY.replace("BEFORE", before).replace("WAIT", wait)


def test_global_memory_is_touched_behind_the_wait_for_the_launch_before() -> None:
    found = clean(early("griddepcontrol.wait; griddepcontrol.launch_dependents;"))
    assert np.array_equal(found[0], np.arange(64))
    clean(early(""))  # a kernel that never waits is launched behind the one before
    message = "comes to global memory without having waited for the launch before"
    racy(early("@%first griddepcontrol.wait;"), message)
    racy(early("griddepcontrol.wait;", ".reg .b32 %v; ld.global.u32 %v, [%out];"), message)
    fetch = """
    .reg .b32 %bar; add.u32 %bar, %sm, 256;
    @%first mbarrier.init.shared::cta.b64 [%bar], 1; fence.proxy.async;
    bar.sync 0;
    @%first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%sm], [%ptr1], 64, [%bar];
    """
    racy(early("griddepcontrol.wait;", fetch), message)
    racy(early("griddepcontrol.wait;", "cp.async.ca.shared.global [%sm], [%out], 4;"), message)
    racy(early("griddepcontrol.wait;", "red.relaxed.gpu.global.add.u32 [%out], 1;"), message)


def test_a_block_that_never_waits_tells_nothing_of_earlier_launches() -> None:
    skipped = "setp.eq.u32 %first, %thread, 99; @%first griddepcontrol.wait; ret;"
    racy(early(skipped), "ends without having waited for the launch before")
