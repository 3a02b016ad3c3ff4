"""The PTX emulator: control flow, memory, barriers, faults, printing, in hand-written PTX that ptxas accepts."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_snippets import LANE, launch, legal, run, wrap

from tilewright.runtime.emulator.nvidia import DecodeError, EmulatorError, EmulatorFault, GlobalMemory, PtxEmulator
from tilewright.runtime.emulator.nvidia.control import format_text
from tilewright.runtime.emulator.nvidia.syntax import parse_text
from tilewright.runtime.emulator.together import Setting, run_together

U32 = np.uint32
#: %at points to element %thread of 32 bits behind pointer 0
ELEMENT = ".reg .b64 %off, %at; mul.wide.u32 %off, %thread, 4; add.u64 %at, %ptr0, %off;\n"


def store(register: str = "%r0") -> str:
    return f"st.global.b32 [%at], {register};\n"


# --- control flow ----------------------------------------------------------------------------------


def test_loops_of_different_length_reconverge() -> None:
    body = (
        ELEMENT
        + """
    .reg .b32 %r<4>; .reg .pred %p;
    mov.b32 %r0, 0; mov.b32 %r1, 0;
loop:
    add.u32 %r0, %r0, %r1;
    add.u32 %r1, %r1, 1;
    setp.le.u32 %p, %r1, %lane;
    @%p bra loop;
    shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;
    add.u32 %r0, %r0, %r2;
    """
        + store()
    )
    (got,) = run(body, [np.zeros(64, U32)], threads=64)
    triangle = LANE * (LANE + 1) // 2
    np.testing.assert_array_equal(got, np.tile(triangle + triangle[LANE ^ 1], 2))


def test_nested_branches_and_exits() -> None:
    body = (
        ELEMENT
        + """
    .reg .b32 %r<4>; .reg .pred %p, %q;
    mov.b32 %r0, 5;
    setp.lt.u32 %p, %lane, 20;
    @!%p bra other;
    setp.lt.u32 %q, %lane, 10;
    @%q exit;
    mov.b32 %r0, 6;
    bra join;
other:
    setp.eq.u32 %q, %lane, 25;
    @%q bra join;
    mov.b32 %r0, 7;
join:
    """
        + store()
    )
    (got,) = run(body, [np.full(32, 9, U32)])
    np.testing.assert_array_equal(got, [9] * 10 + [6] * 10 + [7] * 5 + [5] + [7] * 6)


def test_blocks_of_partial_warps_and_grids() -> None:
    body = """
    .reg .b64 %off, %at; .reg .b32 %r<9>;
    mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ctaid.y; mov.u32 %r2, %nctaid.x; mov.u32 %r3, %ntid.x;
    mad.lo.u32 %r4, %r1, %r2, %r0; mad.lo.u32 %r5, %r4, %r3, %thread;
    mul.wide.u32 %off, %r5, 4; add.u64 %at, %ptr0, %off;
    bar.sync 0;
    st.global.u32 [%at], %r5;
    """
    (got,) = run(body, [np.zeros(6 * 40, U32)], threads=40, blocks=(3, 2), batch_warps=5)
    np.testing.assert_array_equal(got, np.arange(240))


# --- decoding ----------------------------------------------------------------------------------------


def test_every_unknown_line_is_listed() -> None:
    ptx = wrap(
        "  tex.2d.v4.f32.f32 %a;\n  add.u32 %thread, %thread, 1;\n  cp.async.frob;\n  add.f33 %thread, %thread, %lane;"
    )
    with pytest.raises(DecodeError) as caught:
        PtxEmulator(ptx, "k")
    message = str(caught.value)
    assert "unknown instruction tex" in message and "cp.async.frob" in message and "add.f33" in message
    assert message.count("line ") == 3
    with pytest.raises(DecodeError, match="no entry other: it has k"):
        PtxEmulator(wrap(""), "other")


def test_scopes_have_names_of_their_own() -> None:
    module = parse_text(
        wrap("{ .reg .pred p; a: @p bra a; { .reg .pred p; a: @!p bra a; } } { .reg .pred p; @p ret; }")
    )
    entry = module.entries["k"]
    targets = [s.operands[0] for s in entry.statements if s.opcode == "bra"]
    assert len({str(t) for t in targets}) == 2
    assert len({name for name, kind in entry.registers if kind == "pred"}) == 3


@pytest.mark.parametrize(
    "text", ["add.u32 %lane, %lane 1;", "mov.u32 %lane, [;", "@ bra;", ".frob %x;", "mov.b32 %lane, 'x';"]
)
def test_syntax_errors_name_their_line(text: str) -> None:
    with pytest.raises(DecodeError, match="line 1[0-9]|line 2[0-9]|does not end"):
        parse_text(wrap("\n\n" + text))


# --- memory --------------------------------------------------------------------------------------------


def test_vectors_bytes_and_state_spaces() -> None:
    body = """
    .reg .b64 %rd<9>; .reg .b32 %r<9>; .reg .b16 %h<5>; .local .align 8 .b8 mine[16];
    mul.wide.u32 %rd1, %thread, 16; add.u64 %rd2, %ptr0, %rd1; add.u64 %rd3, %ptr1, %rd1;
    ld.global.nc.v4.b32 {%r0, %r1, %r2, %r3}, [%rd2];
    shl.b32 %r5, %thread, 4; add.u32 %r5, %r5, %sm;
    st.shared.v2.b32 [%r5], {%r0, %r1};
    cvt.u64.u32 %rd4, %r5; cvta.shared.u64 %rd5, %rd4;
    st.v2.b32 [%rd5+8], {%r2, %r3};
    ld.shared.u8 %r6, [%r5+1]; ld.shared.s8 %r7, [%r5+3];
    ld.shared.v4.b16 {%h0, %h1, %h2, %h3}, [%r5+8];
    mov.b64 %rd6, mine; cvta.local.u64 %rd7, %rd6;
    st.local.b32 [mine+4], %r6; st.local.b32 [%rd6], %r7;
    ld.v2.b32 {%r0, %r1}, [%rd7];
    mov.b32 %r2, {%h3, %h2}; mov.b32 %r3, {%h1, %h0};
    st.global.v4.b32 [%rd3], {%r0, %r1, %r2, %r3};
    """
    data = np.random.default_rng(0).integers(0, 1 << 32, (64, 4)).astype(U32)
    got = run(body, [data, np.zeros_like(data)], threads=64, shared_bytes=1024)[1]
    octets, halves = data.view(np.uint8), data.view(np.uint16)
    np.testing.assert_array_equal(got[:, 0].view(np.int32), octets[:, 3].view(np.int8))
    np.testing.assert_array_equal(got[:, 1], octets[:, 1])
    np.testing.assert_array_equal(got[:, 2:].copy().view(np.uint16), halves[:, [7, 6, 5, 4]])


def test_bytes_that_nobody_uses_may_lie_behind_an_array() -> None:
    """LLVM widens the load of five bytes, and says so in a pragma."""
    body = """
    .reg .b32 %r<2>; .pragma "used_bytes_mask 0x1f";
    ld.global.v2.b32 {%r0, %r1}, [%ptr0];
    st.global.b8 [%ptr0], %r1;
    """
    five = np.arange(5, dtype=np.uint8)
    assert run(body, [five], threads=1)[0].tolist() == [4, 1, 2, 3, 4]
    with pytest.raises(EmulatorFault, match="outside any allocation"):
        run(body.replace("0x1f", "0x3f"), [five], threads=1)
    with pytest.raises(EmulatorFault, match="never written"):
        run(body.replace('.pragma "used_bytes_mask 0x1f";', ""), [five], threads=1)


def test_parameters_and_module_variables() -> None:
    ptx = legal("""
.version 8.0
.target sm_90a
.address_size 64
.global .align 4 .u32 table[4] = {10, 20, 30, 40};
.const .align 4 .f32 half = 0f3F000000;
.global .align 1 .b8 text[3] = {65, 66, 0};
.visible .entry k(.param .u64 out, .param .align 8 .b8 blob[24], .param .u16 small) {
  .reg .b64 %rd<9>; .reg .b32 %r<9>; .reg .b16 %h; .reg .f32 %f;
  ld.param.u64 %rd1, [out];
  mov.u64 %rd2, table; ld.global.u32 %r1, [%rd2+8]; ld.global.u32 %r2, [table+4];
  ld.const.f32 %f, [half];
  mov.b64 %rd3, blob; cvta.param.u64 %rd4, %rd3; ld.b32 %r3, [%rd4+16]; ld.param.b32 %r4, [blob+4];
  ld.param.u16 %h, [small]; cvt.u32.u16 %r5, %h;
  st.global.u32 [%rd1], %r1; st.global.u32 [%rd1+4], %r2; st.global.f32 [%rd1+8], %f;
  st.global.u32 [%rd1+12], %r3; st.global.u32 [%rd1+16], %r4; st.global.u32 [%rd1+20], %r5;
  ret;
}
""")
    from tilewright.runtime.emulator.nvidia import GlobalMemory

    memory = GlobalMemory()
    out = memory.allocate(np.zeros(6, U32))
    packed = np.array([out], np.uint64).tobytes() + np.arange(100, 106, dtype=U32).tobytes() + b"\x07\x01"
    PtxEmulator(ptx, "k").launch(memory, (1,), (1,), packed)
    assert memory.read_back(out).tolist() == [30, 20, 0x3F000000, 104, 101, 0x107]
    with pytest.raises(EmulatorError, match="34 bytes of parameters"):
        PtxEmulator(ptx, "k").launch(memory, (1,), (1,), packed[:-1])


def test_atomics_of_colliding_lanes() -> None:
    body = """
    .reg .b32 %r<9>; .reg .f32 %f1; .reg .b64 %off, %at, %rd1; .reg .b16 %h1; .reg .pred %p;
    atom.global.add.u32 %r1, [%ptr0], 3;
    red.global.max.s32 [%ptr0+4], %lane;
    atom.global.cas.b32 %r2, [%ptr0+8], 0, 77;
    mov.f32 %f1, 0f3F000000; red.relaxed.gpu.global.add.f32 [%ptr0+12], %f1;
    mov.b32 %r3, 0x3F803F80; red.global.add.noftz.bf16x2 [%ptr0+16], %r3;
    atom.global.inc.u32 %r4, [%ptr0+20], 5;
    setp.eq.u32 %p, %thread, 0; @%p st.shared.u32 [%sm], 0; bar.sync 0;
    atom.shared.exch.b32 %r5, [%sm], %thread;
    atom.shared.add.u32 %r6, [%sm+0], 0;
    mul.wide.u32 %off, %thread, 4; add.u64 %at, %ptr1, %off; st.global.u32 [%at], %r1;
    """
    counters = np.zeros(8, U32)
    counters, old = run(body, [counters, np.zeros(64, U32)], threads=64, shared_bytes=16)
    assert counters[:4].tolist() == [192, 31, 77, np.float32(32).view(U32)]
    assert counters[4] == 0x42804280 and counters[5] == 64 % 6
    np.testing.assert_array_equal(np.sort(old), np.arange(64) * 3)


FAULTS = {
    "global access outside any allocation.*128 bytes into allocation array 0 of 128": ELEMENT
    + "st.global.u32 [%at+4], %lane;",
    "misaligned global access of 4 bytes": ELEMENT + "ld.global.u32 %thread, [%at+2];",
    "shared store out of range: 4 bytes at 1152": "shl.b32 %lane, %lane, 3; add.u32 %lane, %lane, %sm;"
    "st.shared.u32 [%lane], %thread;",
    "misaligned shared load of 8 bytes": ".reg .b64 %x; ld.shared.b64 %x, [%sm+4];",
    "an address depends on a value that was never written": ".reg .b64 %x; ld.global.u32 %lane, [%x];",
    "the value stored depends on one that was never written": ELEMENT + ".reg .b32 %x, %y; add.u32 %y, %x, 1;"
    "st.global.u32 [%at], %y;",
    "the value stored depends": ELEMENT + ".reg .b32 %x; ld.shared.u32 %x, [%sm+16]; st.global.u32 [%at], %x;",
    "the value stored depends on one": ELEMENT + ".local .b32 %stack[2]; .reg .b32 %x; st.local.u32 [%stack], %lane;"
    "ld.local.u32 %x, [%stack]; ld.local.u32 %x, [%stack+4]; st.global.u32 [%at], %x;",
    "the guard depends": ".reg .pred %p; @%p mov.u32 %lane, 1;",
    "the kernel trapped": "trap;",
    "barrier 1 cannot wait for 48 threads": ".reg .b32 %x; mov.u32 %x, 48; bar.sync 1, %x;",
    "no barrier 16": ".reg .b32 %x; mov.u32 %x, 16; bar.sync %x;",
    "no mbarrier has been initialised at 1032": "mbarrier.arrive.shared::cta.b64 _, [%sm+8];",
    "not in its own membermask": "shfl.sync.idx.b32 %lane, %lane, 0, 31, 0xFFFF;",
    "reads an mbarrier object as data": ".reg .pred %p; setp.eq.u32 %p, %lane, 0;"
    "@%p mbarrier.init.shared.b64 [%sm], 32; ld.shared.u32 %lane, [%sm+4];",
    "second time": "mbarrier.init.shared.b64 [%sm], 32;",
    "cannot count 0 arrivals": ".reg .b32 %x; mov.u32 %x, 0; mbarrier.init.shared.b64 [%sm], %x;",
    "waits for 0 more in this phase": ".reg .pred %p; setp.eq.u32 %p, %lane, 0; @%p mbarrier.init.shared.b64 [%sm], 1;"
    "@%p mbarrier.arrive.expect_tx.shared.b64 _, [%sm], 16; @%p mbarrier.arrive.shared.b64 _, [%sm];",
    "setmaxnreg.dec to 248 of a warp that has 240": "setmaxnreg.dec.sync.aligned.u32 248;",
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults(message: str) -> None:
    threads = 128 if "setmaxnreg" in message else 32
    options = {"registers": 240} if "setmaxnreg" in message else {}
    with pytest.raises(EmulatorFault, match=message) as caught:
        run(FAULTS[message], [np.zeros(threads, U32)], threads, shared_bytes=128, check="16" not in message, **options)
    assert "block 0, warp 0" in str(caught.value) and caught.value.line > 0


def test_a_fault_names_the_program_line() -> None:
    ptx = wrap(".loc 1 17 5\n trap;").replace(".address_size 64", '.address_size 64\n.file 1 "kernels/thing.py"')
    with pytest.raises(EmulatorFault, match=r"kernels/thing.py:17:5") as caught:
        launch(ptx, [np.zeros(1, U32)])
    assert ptx.splitlines()[caught.value.line - 1].strip() == caught.value.instruction == "trap;"


def test_undefined_values_that_have_no_effect_are_fine() -> None:
    body = (
        ELEMENT
        + """
    .reg .b32 %x, %y, %r0; .reg .pred %p, %q, %u;
    setp.lt.u32 %p, %lane, 99;
    add.u32 %y, %x, 1;
    selp.b32 %r0, %lane, %y, %p;
    setp.eq.u32 %u, %x, 3;
    or.pred %q, %p, %u;
    @%q st.global.u32 [%at], %r0;
    """
    )
    (got,) = run(body, [np.zeros(32, U32)])
    np.testing.assert_array_equal(got, LANE)


def test_a_vector_load_may_reach_past_the_end_within_its_alignment() -> None:
    body = ELEMENT + ".reg .b32 %r<4>; ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%ptr0]; st.global.u32 [%ptr0], %rX;"
    (got,) = run(body.replace("%rX", "%r2"), [np.array([5, 6, 7], U32)], threads=1)
    assert got[0] == 7
    with pytest.raises(EmulatorFault, match="never written"):
        run(body.replace("%rX", "%r3"), [np.array([5, 6, 7], U32)], threads=1)


# --- barriers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_producers_and_consumers_with_named_barriers(seed: int | None) -> None:
    body = (
        ELEMENT
        + """
    .reg .b32 %r<5>; .reg .pred %p;
    setp.ge.u32 %p, %thread, 32;
    @%p bra consumer;
    shl.b32 %r1, %thread, 2; add.u32 %r1, %r1, %sm; st.shared.u32 [%r1], %thread;
    bar.arrive 3, 64;
    bra end;
consumer:
    bar.sync 3, 64;
    shl.b32 %r1, %lane, 2; add.u32 %r1, %r1, %sm; ld.shared.u32 %r0, [%r1];
    st.global.u32 [%at], %r0;
end:
    """
    )
    (got,) = run(body, [np.full(64, 9, U32)], threads=64, shared_bytes=128, seed=seed)
    np.testing.assert_array_equal(got, [9] * 32 + list(range(32)))


def test_barrier_reductions() -> None:
    body = (
        ELEMENT
        + """
    .reg .b32 %r<5>; .reg .pred %p, %q, %s;
    setp.lt.u32 %p, %thread, 40;
    bar.red.popc.u32 %r0, 1, %p;
    bar.red.and.pred %q, 1, %p; bar.red.or.pred %s, 1, %p;
    selp.b32 %r1, 1000, 0, %q; selp.b32 %r2, 100, 0, %s;
    add.u32 %r0, %r0, %r1; add.u32 %r0, %r0, %r2;
    """
        + store()
    )
    (got,) = run(body, [np.zeros(64, U32)], threads=64)
    assert (got == 140).all()


def test_a_barrier_that_not_all_reach_is_a_deadlock() -> None:
    body = ".reg .pred %p; setp.ge.u32 %p, %thread, 32; @%p exit; bar.sync 2;"
    with pytest.raises(EmulatorFault, match=r"1 warps have ended(?s:.*)warp 0 waits for barrier 2(?s:.*)32 of 64"):
        run(body, [np.zeros(1, U32)], threads=64)
    body = ".reg .pred %p; setp.ge.u32 %p, %thread, 32; @%p bra b; bar.sync 2, 64; bra e;\nb: bar.sync 2, 32;\ne:\n"
    with pytest.raises(EmulatorFault, match="expects 64 threads, this warp says 32"):
        run(body, [np.zeros(1, U32)], threads=64)


def test_lanes_that_never_meet_are_a_deadlock() -> None:
    body = """
    .reg .b32 %x; .reg .pred %p; setp.lt.u32 %p, %lane, 16; @%p bra there;
    shfl.sync.idx.b32 %x, %lane, 0, 31, -1; bra end;
there:
    shfl.sync.idx.b32 %x, %lane, 0, 31, -1;
end:
    """
    with pytest.raises(EmulatorFault, match="deadlock(?s:.*)the other threads of its warp"):
        run(body, [np.zeros(1, U32)])


def test_a_spinning_block_lets_others_go_on() -> None:
    body = """
    .reg .b32 %r<5>; .reg .pred %p;
    mov.u32 %r1, %ctaid.x; setp.ne.u32 %p, %r1, 0; @%p bra other;
spin:
    ld.acquire.gpu.global.u32 %r0, [%ptr0];
    setp.eq.u32 %p, %r0, 0;
    @%p bra spin;
    st.global.u32 [%ptr0+4], %r0;
    bra end;
other:
    mov.u32 %r2, 42;
    st.release.gpu.global.u32 [%ptr0], %r2;
end:
    """
    (got,) = run(body, [np.zeros(2, U32)], threads=32, blocks=(2,))
    assert got.tolist() == [42, 42]
    with pytest.raises(EmulatorFault, match="livelock(?s:.*)polls at line(?s:.*)ld.acquire|livelock(?s:.*)bra"):
        run(body, [np.zeros(2, U32)], threads=32, blocks=(1,))
    with pytest.raises(EmulatorFault, match="still runs after 1000 steps"):
        run(body, [np.zeros(2, U32)], threads=32, blocks=(1,), max_steps=1000)


@pytest.mark.parametrize("seed", [None, 5])
def test_blocks_start_beside_those_that_wait_for_them(seed: int | None) -> None:
    """The first block waits for the last, which does not fit beside it at once; only as many as are resident help."""
    body = """
    .reg .b32 %block, %v; .reg .pred %p;
    mov.u32 %block, %ctaid.x; setp.eq.u32 %p, %block, 9; @%p st.release.gpu.global.u32 [%ptr0], 1;
    setp.ne.u32 %p, %block, 0; @%p bra end;
spin: ld.acquire.gpu.global.u32 %v, [%ptr0]; setp.eq.u32 %p, %v, 0; @%p bra spin;
end:
    """
    run(body, [np.zeros(1, U32)], threads=32, blocks=(10,), batch_warps=2, seed=seed)
    memory = GlobalMemory()
    parameters = np.array([memory.allocate(np.zeros(1, U32))], np.uint64).tobytes()
    everybody = wrap(body.replace("setp.ne.u32 %p, %block, 0;", ""))
    waiting = PtxEmulator(legal(everybody), "k").start(
        memory, (10,), (32,), parameters, Setting(seed, resident=4), batch_warps=2
    )
    with pytest.raises(EmulatorFault, match="livelock(?s:.*)6 blocks have not started"):
        run_together([waiting], seed, progress=False)


def test_registers_move_between_warpgroups() -> None:
    body = """
    .reg .pred %p; setp.ge.u32 %p, %thread, 128; @%p bra high;
    setmaxnreg.dec.sync.aligned.u32 LOW; bra end;
high:
    setmaxnreg.inc.sync.aligned.u32 232;
end:
    """
    run(body.replace("LOW", "24"), [np.zeros(1, U32)], threads=256, registers=128)
    with pytest.raises(EmulatorFault, match="deadlock(?s:.*)104 registers a thread"):
        run(body.replace("LOW", "40"), [np.zeros(1, U32)], threads=256, registers=128)


def test_blocks_that_share_a_multiprocessor_share_its_registers() -> None:
    text = wrap("setmaxnreg.dec.sync.aligned.u32 136;")
    launch(text, [np.zeros(1, U32)], threads=256)
    with pytest.raises(EmulatorFault, match="setmaxnreg.dec to 136 of a warp that has 128"):
        launch(text.replace("\n{", "\n.maxntid 256, 1, 1\n.minnctapersm 2\n{", 1), [np.zeros(1, U32)], threads=256)


# --- printing --------------------------------------------------------------------------------------------


def test_device_print() -> None:
    ptx = wrap(
        """
    .local .align 8 .b8 arguments[16]; .reg .b64 %rd<9>; .reg .b32 %r<3>; .reg .pred %p;
    setp.ne.u32 %p, %lane, 7; @%p bra end;
    mov.b64 %rd1, arguments; cvta.local.u64 %rd2, %rd1;
    st.local.u32 [%rd1], %lane; mov.b64 %rd3, 0d3FF8000000000000; st.local.b64 [%rd1+8], %rd3;
    mov.u64 %rd4, text; cvta.global.u64 %rd5, %rd4;
    { .param .b64 param0; st.param.b64 [param0], %rd5; .param .b64 param1; st.param.b64 [param1], %rd2;
    .param .b32 retval0; call.uni (retval0), vprintf, (param0, param1); ld.param.b32 %r1, [retval0]; }
end:
    """
    )
    text = b"lane %d: %.2f%%\n\0"
    ptx = ptx.replace(
        ".visible",
        ".extern .func (.param .b32 r) vprintf (.param .b64 a, .param .b64 b);\n"
        f".global .align 1 .b8 text[{len(text)}] = {{{', '.join(map(str, text))}}};\n.visible",
        1,
    )
    _, statistics = launch(legal(ptx), [np.zeros(1, U32)], 64)
    assert statistics.printed == ["lane 7: 1.50%\n"] * 2


def test_printf_formats() -> None:
    data = iter([(5).to_bytes(4, "little"), (-3).to_bytes(8, "little", signed=True), (255).to_bytes(4, "little")])
    assert format_text("%u|%5lld|%x|%%", lambda size: next(data), lambda address: "") == "5|   -3|ff|%"


def test_statistics() -> None:
    _, statistics = launch(wrap("bar.sync 0;"), [np.zeros(1, U32)], 64, (3,))
    assert statistics.warps == 6 and statistics.by_opcode["bar.sync"] == 6 and statistics.instructions == 6 * 6
