"""Clusters of blocks on the PTX emulator: their barrier, arrivals at other blocks' mbarriers, multicast copies."""

from __future__ import annotations

import re

import numpy as np
import pytest
from ptx_snippets import launch, legal, wrap

from tilewright.runtime.emulator.nvidia import EmulatorError, EmulatorFault

U32 = np.uint32


def run_cluster(
    body: str, words: int = 8, blocks: int = 4, size: int = 2, threads: int = 32, **options: object
) -> list[int]:
    """The words of the only array after ``blocks`` blocks, ``size`` in a cluster, have run ``body``."""
    ptx = legal(re.sub(r"(\.entry k\([^)]*\))", rf"\1 .explicitcluster .reqnctapercluster {size}, 1, 1", wrap(body)))
    arrays, _ = launch(ptx, [np.zeros(words, U32)], threads, (blocks,), shared_bytes=64, **options)
    return arrays[0].view(U32).tolist()


FIRST = ".reg .pred %one; setp.eq.u32 %one, %thread, 0;"
MEET = "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"
STORE = """
.reg .b32 %x; .reg .b64 %at;
mov.u32 %x, %ctaid.x; mul.wide.u32 %at, %x, 4; add.u64 %at, %at, %ptr0; @%one st.global.u32 [%at], %value;
"""


@pytest.mark.parametrize(
    ("register", "values"),
    [
        ("%cluster_ctarank", [0, 1, 0, 1]),
        ("%cluster_nctarank", [2] * 4),
        ("%clusterid.x", [0, 0, 1, 1]),
        ("%nclusterid.x", [2] * 4),
        ("%cluster_ctaid.x", [0, 1, 0, 1]),
        ("%cluster_nctaid.x", [2] * 4),
    ],
)
def test_special_registers(register: str, values: list[int]) -> None:
    body = f"{FIRST} .reg .b32 %value; mov.u32 %value, {register};" + STORE
    assert run_cluster(body, 4) == values


def test_grids_are_whole_clusters() -> None:
    with pytest.raises(EmulatorError, match="no multiple of the cluster's 2"):
        run_cluster(FIRST, blocks=3)


ARRIVE = """
.reg .b32 %value, %there, %peer; .reg .pred %done;
mov.u32 %peer, %cluster_ctarank; xor.b32 %peer, %peer, 1;
mapa.shared::cluster.u32 %there, %sm, %peer;
INIT
@%one mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%there];
@%one mbarrier.arrive.shared::cta.b64 _, [%sm];
wait: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %done, [%sm], 0; @!%done bra wait;
mov.u32 %value, 7;
"""
INIT = "@%one mbarrier.init.shared::cta.b64 [%sm], 2; fence.mbarrier_init.release.cluster;"


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_blocks_arrive_at_each_other(seed: int | None) -> None:
    body = FIRST + ARRIVE.replace("INIT", INIT + MEET) + STORE + MEET
    assert run_cluster(body, 4, seed=seed) == [7] * 4


def test_a_remote_arrival_needs_the_cluster_to_know_the_barrier() -> None:
    with pytest.raises(EmulatorFault, match="no barrier of the cluster between|no mbarrier has been initialised"):
        run_cluster(FIRST + ARRIVE.replace("INIT", INIT + "bar.sync 0;") + STORE + MEET)


def test_a_block_that_has_ended_cannot_be_reached() -> None:
    """Rank 0 ends at once, rank 1 arrives there later."""
    body = FIRST + ARRIVE.replace(
        "INIT", INIT + MEET + ".reg .pred %p; setp.eq.u32 %p, %peer, 1; @%p ret; nanosleep.u32 9;"
    )
    with pytest.raises(EmulatorFault, match="block 0 of the cluster, which has ended"):
        run_cluster(body + STORE)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("barrier.cluster.wait;", "without having arrived"),
        ("barrier.cluster.arrive; barrier.cluster.arrive;", "arrives twice"),
        ("mbarrier.init.shared::cta.b64 [%sm], 32; mov.u32 %t, %cluster_ctarank; setp.eq.u32 %p, %t, 0; @%p bra meet; "
         "wait: mbarrier.try_wait.parity.shared::cta.b64 %p, [%sm], 0; @!%p bra wait; meet: " + MEET,
         "deadlock(?s:.*)the cluster's barrier"),
        ("mapa.shared::cluster.u32 %t, %sm, 2; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%t];",
         "block 2 of a cluster of 2"),
    ],
)  # fmt: skip
def test_misuse(body: str, message: str) -> None:
    with pytest.raises(EmulatorFault, match=message):
        run_cluster(".reg .b32 %t; .reg .pred %p;" + body, threads=1)


def test_warps_that_have_ended_are_not_waited_for() -> None:
    body = f"{FIRST} .reg .b32 %value; .reg .pred %p; setp.ge.u32 %p, %thread, 32; @%p ret; {MEET} mov.u32 %value, 5;"
    assert run_cluster(body + STORE, 4, threads=64) == [5] * 4


# --- the race detector -------------------------------------------------------------------------------

#: rank 1 tells rank 0 a word through global memory; SIGNAL and WAIT order the two
TELL = """
.reg .b32 %value, %rank, %there; .reg .b64 %at; .reg .pred %reads, %done;
mov.u32 %rank, %cluster_ctarank; setp.eq.u32 %reads, %rank, 0; mapa.shared::cluster.u32 %there, %sm, 0;
@%one mbarrier.init.shared::cta.b64 [%sm], 1; fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.release; barrier.cluster.wait.acquire;
@%reads bra reader;
@%one st.global.u32 [%ptr0+12], 9;
SIGNAL
bra end;
reader:
WAIT
@%one ld.global.u32 %value, [%ptr0+12];
@%one st.global.u32 [%ptr0], %value;
end:
barrier.cluster.arrive.release; barrier.cluster.wait.acquire;
"""
ARRIVAL = "@%one mbarrier.arrive.SEM.cluster.shared::cluster.b64 _, [%there];"
AWAIT = "wait: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %done, [%sm], 0; @!%done bra wait;"
BOTH = "barrier.cluster.arrive.SEM; barrier.cluster.wait.acquire;"


@pytest.mark.parametrize(("signal", "wait"), [(ARRIVAL, AWAIT), (BOTH, BOTH)])
def test_remote_arrivals_and_the_barrier_order_unless_relaxed(signal: str, wait: str) -> None:
    body = FIRST + TELL.replace("SIGNAL", signal).replace("WAIT", wait)
    assert run_cluster(body.replace("SEM", "release"), 4, blocks=2)[0] == 9
    with pytest.raises(EmulatorFault, match="race: reads 12 bytes into(?s:.*)nothing orders the two"):
        run_cluster(body.replace("SEM", "relaxed"), 4, blocks=2)


# --- messages ----------------------------------------------------------------------------------------

#: each block tells the next one 5 + its rank, in slot 0 of its shared memory; the mbarrier at 0, the slot at 16
TALK = """
.reg .b32 %value, %rank, %peer, %base, %bar, %slot, %bartoo, %to; .reg .pred %done;
mov.u32 %rank, %cluster_ctarank; add.u32 %peer, %rank, 1; and.b32 %peer, %peer, 1;
mov.u32 %base, %sm; add.u32 %slot, %base, 16;
mapa.shared::cluster.u32 %bar, %base, %peer; mapa.shared::cluster.u32 %to, %slot, %peer;
@%one mbarrier.init.shared::cta.b64 [%sm], 1; fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.relaxed; barrier.cluster.wait.acquire;
add.u32 %value, %rank, 5;
@%one mbarrier.arrive.expect_tx.shared::cta.b64 _, [%sm], BYTES;
SEND
WAIT
ld.shared.b32 %value, [%slot];
"""
SEND = "@%one st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%to], %value, [%bar];"


def talk(send: str = SEND, wait: str = AWAIT, size: int = 4, **options: object) -> list[int]:
    body = FIRST + TALK.replace("SEND", send).replace("WAIT", wait).replace("BYTES", str(size)) + STORE
    return run_cluster(body, 4, blocks=4, **options)


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_messages_arrive_with_their_barrier(seed: int | None) -> None:
    assert talk(seed=seed) == [6, 5, 6, 5]


def test_vectors_of_words() -> None:
    send = ".reg .b64 %wide; cvt.u64.u32 %wide, %value; " + SEND.replace(
        ".b32 [%to], %value", ".v2.b64 [%to], {%wide, %wide}"
    )
    assert talk(send, size=16) == [6, 5, 6, 5]


@pytest.mark.parametrize(
    ("send", "wait", "size", "message"),
    [
        (SEND, "", 4, "reads shared memory that a copy in flight writes|never written"),
        (SEND, AWAIT, 8, "deadlock(?s:.*)4 bytes missing"),
        (SEND.replace("[%bar]", "[%base]"), AWAIT, 4, "counts at a barrier of another"),
        (SEND.replace("[%to]", "[%to+2]"), AWAIT, 4, "misaligned st.async"),
        (SEND + SEND, AWAIT, 8, "that a copy in flight writes|race: writes"),
        (SEND, AWAIT.replace("acquire.cluster", "relaxed.cluster"), 4, "race: reads"),
    ],
)
def test_messages_that_go_wrong(send: str, wait: str, size: int, message: str) -> None:
    with pytest.raises(EmulatorFault, match=message):
        talk(send, wait, size)


@pytest.mark.parametrize("order", [SEND + "ORDER", "ORDER" + SEND])
def test_a_message_releases_what_came_before_it(order: str) -> None:
    """Rank 0 writes to global memory and tells rank 1, which reads it."""
    write = ".reg .pred %writes; setp.eq.and.u32 %writes, %rank, 0, %one; @%writes st.global.u32 [%ptr0+12], 9;"
    send = order.replace("ORDER", write)
    body = FIRST + TALK.replace("SEND", send).replace("WAIT", AWAIT).replace("BYTES", "4")
    body += (
        ".reg .pred %reads; setp.eq.and.u32 %reads, %rank, 1, %one; @%reads ld.global.u32 %value, [%ptr0+12];" + STORE
    )
    if order.startswith("ORDER"):
        assert run_cluster(body, 4, blocks=2)[:2] == [6, 9]
    else:
        with pytest.raises(EmulatorFault, match="race: reads 12 bytes into"):
            run_cluster(body, 4, blocks=2)
