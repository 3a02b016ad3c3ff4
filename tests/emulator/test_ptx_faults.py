"""Faults of copies, barriers and matrix instructions in the PTX emulator that the tests of what works do not meet."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_snippets import launch, legal, run, wrap

from tilewright.runtime.emulator.nvidia import EmulatorFault, GlobalMemory, PtxEmulator, encode_tensor_map

U32 = np.uint32
BARRIER = "mbarrier.init.shared::cta.b64 [%sm], 1; fence.mbarrier_init.release.cluster; "
BULK = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
#: message: (threads, text)
FAULTS: dict[str, tuple[int, str]] = {
    "the lanes of a warp name different membermasks": (32, """
        .reg .pred %p; .reg .b32 %m; setp.lt.u32 %p, %lane, 16; selp.b32 %m, -1, 0xFFFF0000, %p;
        shfl.sync.idx.b32 %lane, %lane, 0, 31, %m;"""),
    "local access out of range: 4 bytes at": (1, """
        .local .b32 %stack[2]; .reg .b64 %a; mov.u64 %a, %stack; add.u64 %a, %a, 4096; st.local.u32 [%a], %lane;"""),
    "misaligned mbarrier: it has 8 bytes": (1, """
        .reg .b32 %at; add.u32 %at, %sm, 4; mbarrier.init.shared::cta.b64 [%at], 1;"""),
    "an mbarrier is invalidated while warps wait for it": (64, """
        .reg .pred %p, %done, %more; .reg .b32 %i; setp.eq.u32 %p, %thread, 0;
        @%p mbarrier.init.shared::cta.b64 [%sm], 1; bar.sync 0;
        setp.ge.u32 %p, %thread, 32; @%p bra other;
        wait: mbarrier.try_wait.parity.shared::cta.b64 %done, [%sm], 0; @!%done bra wait; bra end;
        other: setp.eq.u32 %p, %lane, 0; @%p mbarrier.inval.shared::cta.b64 [%sm];
        end:"""),
    "the phase parity 2 is neither 0 nor 1": (1, BARRIER + """
        .reg .pred %p; .reg .b32 %x; mov.b32 %x, 2;
        mbarrier.test_wait.parity.shared::cta.b64 %p, [%sm], %x;"""),
    "cp.async reads more than its 4 bytes": (1, """
        .reg .b32 %n; mov.b32 %n, 8; cp.async.ca.shared.global [%sm], [%ptr0], 4, %n;"""),
    "a bulk copy of 24 bytes from or to .*: not multiples of 16": (1, BARRIER + f"""
        .reg .b32 %n; mov.b32 %n, 24; {BULK} [%sm+16], [%ptr0], %n, [%sm];"""),
    "a bulk copy outside any allocation: .* into allocation array 0": (1, BARRIER + f"""
        {BULK} [%sm+16], [%ptr0+112], 32, [%sm];"""),
    "a copy to shared memory out of range: 64 bytes at 1104 of 1152": (1, BARRIER + f"""
        {BULK} [%sm+80], [%ptr0], 64, [%sm];"""),
    "the block ends while a copy into its shared memory is in flight": (1, BARRIER + f"""
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%sm], 32; {BULK} [%sm+16], [%ptr0], 32, [%sm];"""),
    "waits for the other threads of its warp, at line .*: mma.sync": (32, """
        .reg .b32 %a<9>; .reg .pred %p; setp.lt.u32 %p, %lane, 5; @%p bra end;
        mov.b32 %a0, 0; mov.b32 %a1, 0; mov.b32 %a2, 0;
        mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%a3, %a4, %a5, %a6}, {%a0, %a1}, {%a2},
            {%a0, %a0, %a0, %a0};
        end:"""),
}  # fmt: skip


@pytest.mark.parametrize("message", FAULTS)
def test_faults(message: str) -> None:
    threads, body = FAULTS[message]
    with pytest.raises(EmulatorFault, match=message) as caught:
        run(body, [np.zeros(32, U32)], threads, shared_bytes=128)
    assert caught.value.line > 0


# --- tensor maps -----------------------------------------------------------------------------------------


def tensor_load(
    place: str = "%sm+128",
    rank: int = 2,
    at: int | None = None,
    junk: bool = False,
    rows: int = 8,
    column: int = 0,
    outside: str = "",
) -> None:
    """Load a box of 4 x 16 bytes of an 8 x 16 tensor through a map, to ``place`` in shared memory.

    ``at``: the address of the map, ``junk``: bytes that are none, ``rows``: of the tensor as the map has it,
    ``column``: where the box begins, ``outside``: what comes before the use of a map in global memory.
    """
    memory = GlobalMemory()
    data = memory.allocate(np.zeros((8, 16), np.uint8), "data")
    map_ = encode_tensor_map("UINT8", data, (16, rows), (16,), (16, 4))
    if outside:
        at = memory.allocate(np.frombuffer(map_, np.uint8), "map")
    places = ", ".join(f"%c{axis}" for axis in range(rank))
    body = f"""
    .reg .b32 %c<3>, %to; .reg .b64 %m; mov.b32 %c0, {column}; mov.b32 %c1, {rows - 4}; mov.b32 %c2, 0; {BARRIER}
    {"mov.b64 %m, map; cvta.param.u64 %m, %m;" if at is None else f"mov.b64 %m, {at};"} {outside}
    add.u32 %to, {place.replace("+", ", ")};
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%sm], 64;
    cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes [%to], [%m, {{{places}}}], [%sm];
    {{ .reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%sm], 0; @!done bra wait; }}
    """
    text = wrap(body, 1).replace("(.param .u64 p0)", "(.param .u64 p0, .param .align 64 .b8 map[128])")
    packed = np.array([data], np.uint64).tobytes().ljust(64, b"\0") + (bytes(range(128)) if junk else map_)
    PtxEmulator(legal(text), "k").launch(memory, (1,), (1,), packed, shared_bytes=512)


def test_tensor_maps() -> None:
    tensor_load()
    tensor_load(column=-16)
    tensor_load(outside="fence.proxy.tensormap::generic.acquire.sys [%m], 128;")
    for options, message in (
        ({"at": 96}, "no tensor map at 0x60"),
        ({"junk": True}, "is no tensor map"),
        ({"rows": 16}, "the tensor of the map does not lie in one allocation"),
        ({"rank": 3}, "a copy of 3 dimensions with a tensor map of 2"),
        ({"place": "%sm+144"}, "aligned to 128 bytes, not 1168"),
        ({"outside": "fence.proxy.async;"}, "no fence.proxy.tensormap in the block before it uses the tensor map"),
        ({"column": 8}, "begins 8 bytes into the innermost dimension, no multiple of 16"),
    ):
        with pytest.raises(EmulatorFault, match=message):
            tensor_load(**options)


# --- wgmma ------------------------------------------------------------------------------------------------

#: descriptors without a swizzle at the start of shared memory, and a product of 64 x 8 x 16 from zero
WGMMA = """
    .reg .b32 %d<8>, %s; .reg .b64 %desc, %other; .reg .pred %no, %first;
    setp.ne.u32 %no, 0, 0; shr.u32 %s, %sm, 4; cvt.u64.u32 %desc, %s; add.u64 %desc, %desc, OFFSET;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %desc, %desc, %no, 1, 1, 0, 0;
    SECOND
    wgmma.commit_group.sync.aligned;
    END
"""
#: 128 bytes between the core matrices of K, 256 between those of rows
STRIDES = 128 >> 4 << 16 | 256 >> 4 << 32
SHAPE = """wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3, %d4, %d5, %d6, %d7},
    %desc, %desc, %no, 1, 1, 0, 0;"""


@pytest.mark.parametrize(
    ("offset", "second", "end", "message"),
    [
        (1 << 12, "", "", r"a matrix descriptor reaches \d+ of 3072 bytes"),
        (0, SHAPE, "wgmma.wait_group.sync.aligned 0;", "accumulators of a wgmma in flight of another shape"),
        (0, "", "", "the warp ends while a wgmma is in flight"),
    ],
)
def test_products(offset: int, second: str, end: str, message: str) -> None:
    body = WGMMA.replace("OFFSET", str(STRIDES + offset)).replace("SECOND", second).replace("END", end)
    with pytest.raises(EmulatorFault, match=message):
        launch(legal(wrap(body, 1)), [np.zeros(1, U32)], 128, shared_bytes=2048)


def test_descriptors_that_differ_between_threads() -> None:
    body = WGMMA.replace("OFFSET", str(STRIDES)).replace("SECOND", "").replace("END", "")
    body = body.replace("wgmma.fence", "cvt.u64.u32 %other, %lane; add.u64 %desc, %desc, %other; wgmma.fence", 1)
    with pytest.raises(EmulatorFault, match="the threads of a warpgroup differ in a matrix descriptor"):
        launch(legal(wrap(body, 1)), [np.zeros(1, U32)], 128, shared_bytes=4096)
