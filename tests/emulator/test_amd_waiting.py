"""AMD waves that wait: s_waitcnt, loads to LDS, barriers, wait states, loops that poll memory, several launches."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import amd_programs as amd
import numpy as np
import pytest
from amd_assembly import ARCHS, LANE, compile_ir, ints, run, snippet, wrap

from tilewright.kernels.gemm import gemm
from tilewright.runtime.emulator.amd import AmdEmulator, EmulatorFault, GlobalMemory
from tilewright.runtime.emulator.amd.ordering import new_races
from tilewright.runtime.emulator.errors import EmulatorFault as AnyFault
from tilewright.runtime.emulator.together import Setting, run_together

X = ints(5, 17, -3, 90)
HEAD = """
    s_load_dwordx4 s[4:7], s[0:1], 0x0
    v_lshlrev_b32_e32 v31, 2, v0
    s_waitcnt lgkmcnt(0)
"""

# ---- s_waitcnt ---------------------------------------------------------------------------------------

#: (body, message): each is right with the wait that the comment names
TOO_EARLY = {
    "global load": (  # vmcnt(0)
        "global_load_dword v1, v31, s[4:5]\ns_waitcnt lgkmcnt(0)\nv_add_u32_e32 v2, v1, v1",
        r"v1 is read before `global_load_dword v1, v31, s\[4:5\]` \(line 7\) has arrived",
    ),
    "stores count too": (  # vmcnt(1)
        (
            "global_load_dword v1, v31, s[4:5]\nglobal_store_dword v31, v0, s[6:7]\ns_waitcnt vmcnt(2)\n"
            "v_add_u32_e32 v2, v1, v1"
        ),
        "v1 is read before",
    ),
    "LDS read": ("ds_write_b32 v31, v0\nds_read_b32 v1, v31\ns_waitcnt lgkmcnt(1)\nv_mov_b32_e32 v2, v1", "v1 is read"),
    "permute": ("ds_bpermute_b32 v1, v31, v0\ns_waitcnt vmcnt(0)\nv_mov_b32_e32 v2, v1", "v1 is read before `ds_bperm"),
    "second scalar load": (  # lgkmcnt(0): scalar loads come in any order
        "s_load_dword s8, s[4:5], 0x0\ns_load_dword s9, s[4:5], 0x4\ns_waitcnt lgkmcnt(1)\ns_add_u32 s8, s8, 1",
        "s8 is read before `s_load_dword s8",
    ),
    "LDS read next to a scalar load": (  # lgkmcnt(0): the scalar load may be what has finished
        (
            "ds_write_b32 v31, v0\ns_waitcnt lgkmcnt(0)\nds_read_b32 v1, v31\ns_load_dword s8, s[4:5], 0x0\n"
            "s_waitcnt lgkmcnt(1)\nv_mov_b32_e32 v2, v1"
        ),
        "v1 is read before `ds_read_b32",
    ),
    "stored data": ("global_load_dword v1, v31, s[4:5]\nglobal_store_dword v31, v1, s[6:7]", "v1 is read before"),
    "address": ("ds_write_b32 v31, v31\nds_read_b32 v1, v31\nds_read_b32 v2, v1", "v1 is read before `ds_read_b32 v1"),
    "overwritten": (
        "global_load_dword v1, v31, s[4:5]\nv_mov_b32_e32 v1, 0",
        "v1 is written while `global_load_dword v1.*in flight",
    ),
    "two kinds of load to one register": (
        "ds_write_b32 v31, v0\nglobal_load_dword v1, v31, s[4:5]\nds_read_b32 v1, v31",
        "v1 is written while `global_load",
    ),
    "atomic": (
        "v_mov_b32_e32 v2, 1\nglobal_atomic_add v1, v31, v2, s[6:7] sc0\nv_mov_b32_e32 v3, v1",
        "v1 is read before `global_atomic_add",
    ),
    "time": ("s_memtime s[8:9]\ns_add_u32 s8, s8, 1", "s8 is read before `s_memtime"),
    "flat": (
        (
            "v_mov_b32_e32 v2, s4\nv_mov_b32_e32 v3, s5\nflat_load_dword v1, v[2:3]\ns_waitcnt vmcnt(0)\n"
            "v_mov_b32_e32 v4, v1"
        ),
        "v1 is read before `flat_load",
    ),
    "accumulation register": (
        "global_load_dword a3, v31, s[4:5]\nv_accvgpr_read_b32 v2, a3",
        "a3 is read before `global_load_dword a3",
    ),
    "number of a wait": ("global_load_dword v1, v31, s[4:5]\ns_waitcnt 0xc07f\nv_mov_b32_e32 v2, v1", "v1 is read"),
}


@pytest.mark.parametrize("case", TOO_EARLY)
def test_data_before_its_wait(case: str) -> None:
    body, message = TOO_EARLY[case]
    with pytest.raises(EmulatorFault, match=message) as caught:
        run(wrap(HEAD + body, lds=256), "gfx942", [X, X], threads=64)
    assert caught.value.wave == (0, 0) and caught.value.line > 0


IN_TIME = {
    "loads in order": "global_load_dword v1, v31, s[4:5]\nglobal_load_dword v2, v31, s[4:5]\ns_waitcnt vmcnt(1)\n"
    "v_mov_b32_e32 v10, v1",
    "stores behind it": "global_load_dword v1, v31, s[4:5]\nglobal_store_dword v31, v0, s[4:5]\ns_waitcnt vmcnt(1)\n"
    "v_mov_b32_e32 v10, v1",
    "LDS in order": "ds_write_b32 v31, v1\nds_read_b32 v2, v31\nds_read_b32 v3, v31\ns_waitcnt lgkmcnt(1)\n"
    "v_mov_b32_e32 v10, v2",
    "the same register twice": "global_load_dword v2, v31, s[4:5]\nglobal_load_dword v2, v31, s[4:5]\n"
    "s_waitcnt vmcnt(0)\nv_mov_b32_e32 v10, v2",
    "a store reads its data at once": "v_mov_b32_e32 v2, v1\nglobal_store_dword v31, v2, s[6:7]\nv_mov_b32_e32 v2, 0\n"
    "v_mov_b32_e32 v10, v1",
    "a number": "global_load_dword v2, v31, s[4:5]\ns_waitcnt 0x0f70\nv_mov_b32_e32 v10, v2",
}


@pytest.mark.parametrize("case", IN_TIME)
def test_data_after_its_wait(case: str) -> None:
    np.testing.assert_array_equal(snippet(IN_TIME[case], [X], lds=256)[0], X)


# ---- loads to LDS ------------------------------------------------------------------------------------

TO_LDS = """
    v_mov_b32_e32 v5, 7
    ds_write_b32 v31, v5
    s_waitcnt lgkmcnt(0)
    s_mov_b32 m0, 0
    s_nop 0
    global_load_lds_dword v31, s[4:5]
    {wait}
    ds_read_b32 v10, v31
"""


def test_a_load_to_lds_lands_at_its_wait() -> None:
    np.testing.assert_array_equal(snippet(TO_LDS.format(wait="s_waitcnt vmcnt(0)"), [X], lds=256)[0], X)
    body = HEAD + TO_LDS.format(wait="") + "s_waitcnt vmcnt(0) lgkmcnt(0)\nglobal_store_dword v31, v10, s[6:7]"
    out = run(wrap(body, lds=256), "gfx942", [X, X], threads=64, races=False)[1]
    np.testing.assert_array_equal(out, 7)  # what LDS held before
    seen = [run(wrap(body, lds=256), "gfx942", [X, X], threads=64, races=False, seed=s)[1][0] for s in range(40)]
    assert set(seen) == {7, X[0]}  # a seed may let it land early


def test_reading_lds_under_a_load_to_it_is_a_race() -> None:
    body = HEAD + TO_LDS.format(wait="")
    with pytest.raises(EmulatorFault, match="race: reads byte 0 of LDS.*wave 0 of workgroup 0 wrote") as caught:
        run(wrap(body, lds=256), "gfx942", [X, X], threads=64)
    assert "global_load_lds_dword" in caught.value.message and caught.value.instruction.startswith("ds_read_b32")


def test_loads_of_four_words_to_lds() -> None:
    body = """
        s_mov_b32 m0, 64
        s_nop 0
        v_lshlrev_b32_e32 v2, 4, v0
        global_load_lds_dwordx4 v2, s[4:5]
        s_waitcnt vmcnt(0)
        v_add_u32_e32 v3, 64, v31
        ds_read_b32 v10, v3
    """
    np.testing.assert_array_equal(snippet(body, [X, X, X, X], "gfx950", lds=1088)[0], X)


# ---- memory nobody wrote -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["b32", "u16", "u8"])
def test_lds_that_nobody_wrote(kind: str) -> None:
    body = (
        HEAD + f"ds_write_b8 v31, v0\nds_read_{kind} v1, v31\ns_waitcnt lgkmcnt(0)\nglobal_store_dword v31, v1, s[6:7]"
    )
    if kind == "u8":
        run(wrap(body, lds=256), "gfx942", [X, X], threads=64)
        return
    with pytest.raises(EmulatorFault, match="stored data depends on a register or on LDS that was never written"):
        run(wrap(body, lds=256), "gfx942", [X, X], threads=64)


# ---- races -------------------------------------------------------------------------------------------

#: 256 work-items: each writes LDS, and reads what the next wave wrote
EXCHANGE = """
    v_add_u32_e32 v2, 256, v31
    v_and_b32_e32 v2, 0x3ff, v2
    ds_write_b32 v31, v0
    {between}
    ds_read_b32 v3, v2
    s_waitcnt lgkmcnt(0)
    global_store_dword v31, v3, s[6:7]
"""


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_waves_that_exchange_data(arch: str, seed: int | None) -> None:
    body = HEAD + EXCHANGE.format(between="s_waitcnt lgkmcnt(0)\ns_barrier")
    item = np.arange(256, dtype=np.uint32)
    out = run(wrap(body, lds=1024), arch, [item, item.copy()], seed=seed)[1]
    np.testing.assert_array_equal(out, (item + 64) % 256)


@pytest.mark.parametrize("between", ["s_waitcnt lgkmcnt(0)", "s_barrier", "s_barrier\ns_waitcnt lgkmcnt(0)"])
def test_waves_that_exchange_data_without_a_wait_and_a_barrier(between: str) -> None:
    item = np.arange(256, dtype=np.uint32)
    message = r"race: reads byte \d+ of LDS, which wave \d of workgroup 0 wrote"
    with pytest.raises(EmulatorFault, match=message) as caught:
        run(wrap(HEAD + EXCHANGE.format(between=between), lds=1024), "gfx942", [item, item.copy()])
    assert "ds_write_b32 v31, v0" in caught.value.message


def test_overwriting_what_others_may_still_read() -> None:
    again = EXCHANGE.format(between="s_waitcnt lgkmcnt(0)\ns_barrier")
    body = HEAD + again + "{} ds_write_b32 v31, v0"
    item = np.arange(256, dtype=np.uint32)
    run(wrap(body.format("s_barrier\n"), lds=1024), "gfx942", [item, item.copy()])
    with pytest.raises(EmulatorFault, match="race: writes byte .* of LDS, which wave . of workgroup 0 read"):
        run(wrap(body.format(""), lds=1024), "gfx942", [item, item.copy()])


def test_workgroups_that_write_the_same_place() -> None:
    body = HEAD + "v_add_u32_e32 v1, s2, v0\nglobal_store_dword v31, v1, s[6:7]"
    with pytest.raises(EmulatorFault, match="race: writes .*allocation.*which wave 0 of workgroup . wrote"):
        run(wrap(body), "gfx942", [X, X], grid=2, threads=64)
    with pytest.raises(EmulatorFault, match="wave 0 of workgroup 0 wrote"):  # also where they run one after the other
        run(wrap(body), "gfx942", [X, X], grid=2, threads=64, batch_waves=1)
    run(wrap(body.replace("s2, v0", "7, v0")), "gfx942", [X, X], grid=2, threads=64)  # of equal values: no race
    atomic = HEAD + "global_atomic_add v31, v0, s[6:7]"
    out = run(wrap(atomic), "gfx942", [X, np.zeros(64, np.uint32)], grid=2, threads=64)[1]
    np.testing.assert_array_equal(out, 2 * LANE)


# Workgroup 0 writes data and raises a flag; workgroup 1 waits for the flag and copies the data.
# s[4:5]: data [64], then the flag at byte 256; s[6:7]: output.
PRODUCER_CONSUMER = """
    v_mov_b32_e32 v4, 0
    v_mov_b32_e32 v5, 1
    s_cmp_eq_u32 s2, 0
    s_cbranch_scc0 .Lconsume
    v_add_u32_e32 v1, 100, v0
    global_store_dword v31, v1, s[4:5]
    {release}
    global_store_dword v4, v5, s[4:5] offset:256 {bits}
    s_endpgm
.Lconsume:
    global_load_dword v6, v4, s[4:5] offset:256 {bits}
    s_waitcnt vmcnt(0)
    v_readfirstlane_b32 s8, v6
    s_cmp_eq_u32 s8, 0
    s_cbranch_scc1 .Lconsume
    {acquire}
    global_load_dword v1, v31, s[4:5]
    s_waitcnt vmcnt(0)
    global_store_dword v31, v1, s[6:7]
"""
AGENT = {"release": "buffer_wbl2 sc1\ns_waitcnt vmcnt(0)", "acquire": "buffer_inv sc1", "bits": "sc1"}
SYSTEM = {"release": "buffer_wbl2 sc0 sc1\ns_waitcnt vmcnt(0)", "acquire": "buffer_inv sc0 sc1", "bits": "sc0 sc1"}


def _signal(parts: dict[str, str], **options: Any) -> np.ndarray:
    body = HEAD + PRODUCER_CONSUMER.format(**parts)
    arrays = [np.zeros(65, np.uint32), np.zeros(64, np.uint32)]
    return run(wrap(body), "gfx942", arrays, grid=2, threads=64, **options)[1]


@pytest.mark.parametrize("parts", [AGENT, SYSTEM], ids=["agent", "system"])
@pytest.mark.parametrize("options", [{}, {"seed": 3}, {"batch_waves": 1}], ids=str)
def test_a_signal_between_workgroups(parts: dict[str, str], options: dict[str, Any]) -> None:
    np.testing.assert_array_equal(_signal(parts, **options), LANE + 100)


@pytest.mark.parametrize(
    "change",
    [
        {"release": "s_waitcnt vmcnt(0)"},
        {"release": "buffer_wbl2 sc1"},
        {"release": "buffer_wbl2 sc0\ns_waitcnt vmcnt(0)"},
        {"acquire": ""},
        {"acquire": "buffer_inv sc0"},
        {"bits": ""},
        {"bits": "sc0"},
    ],
    ids=str,
)
def test_a_signal_that_lacks_a_part(change: dict[str, str]) -> None:
    with pytest.raises(EmulatorFault, match="race"):
        _signal(AGENT | change)


def test_a_signal_of_a_counter() -> None:
    """Read-modify-writes continue what they found: the last one to count knows of all before."""
    body = """
        v_lshl_add_u32 v1, s2, 8, v31
        v_mov_b32_e32 v4, 0
        v_mov_b32_e32 v5, 1
        global_store_dword v1, v0, s[4:5] offset:256
        buffer_wbl2 sc1
        s_waitcnt vmcnt(0)
        v_cmp_eq_u32_e32 vcc, 0, v0
        s_and_saveexec_b64 s[10:11], vcc
        global_atomic_add v6, v4, v5, s[4:5] sc0
        s_waitcnt vmcnt(0)
        s_mov_b64 exec, s[10:11]
        buffer_inv sc1
        v_readfirstlane_b32 s8, v6
        s_cmp_eq_u32 s8, 3
        s_cbranch_scc0 .Lend
    """
    for i in range(4):
        body += f"global_load_dword v{10 + i}, v31, s[4:5] offset:{256 * i + 256}\n"
    body += "s_waitcnt vmcnt(0)\nv_add_u32_e32 v10, v10, v11\nv_add3_u32 v10, v10, v12, v13\n"
    body += "global_store_dword v31, v10, s[6:7]\n.Lend:"
    for seed in (None, 1, 2, 3):
        arrays = [np.zeros(64 * 5, np.uint32), np.zeros(64, np.uint32)]
        out = run(wrap(HEAD + body), "gfx942", arrays, grid=4, threads=64, seed=seed)[1]
        np.testing.assert_array_equal(out, 4 * LANE)
    arrays = [np.zeros(64 * 5, np.uint32), np.zeros(64, np.uint32)]
    with pytest.raises(EmulatorFault, match="race"):
        run(wrap(HEAD + body.replace("buffer_wbl2 sc1", "")), "gfx942", arrays, grid=4, threads=64)


# ---- waiting for ever --------------------------------------------------------------------------------


def test_waiting_for_a_flag_that_nobody_raises_is_a_deadlock() -> None:
    with pytest.raises(
        EmulatorFault, match=r"(?s)deadlock.*wave 0 of workgroup 1 waits for memory to change"
    ) as caught:
        _signal(AGENT | {"release": "s_endpgm"})
    assert caught.value.line > 0


def test_a_wave_at_a_barrier_and_one_in_a_loop_are_a_deadlock() -> None:
    body = """
        v_mov_b32_e32 v4, 0
        ds_write_b32 v4, v4
        v_readfirstlane_b32 s8, v0
        s_cmp_lt_u32 s8, 64
        s_cbranch_scc1 .Lwait
        s_barrier
        s_endpgm
    .Lwait:
        ds_read_b32 v5, v4
        s_waitcnt lgkmcnt(0)
        v_readfirstlane_b32 s9, v5
        s_cmp_eq_u32 s9, 0
        s_cbranch_scc1 .Lwait
    """
    with pytest.raises(EmulatorFault, match="(?s)deadlock.*wave 0 .*in the loop.*wave 1 .*waits at a barrier"):
        run(wrap(HEAD + body, lds=16), "gfx942", [X, X], threads=128, races=False)


def test_only_resident_workgroups_can_raise_a_flag() -> None:
    """The one that waits comes first: the GPU must have room for both."""
    body = HEAD + PRODUCER_CONSUMER.replace("s_cmp_eq_u32 s2, 0", "s_cmp_eq_u32 s2, 1").format(**AGENT)
    arrays = [np.zeros(65, np.uint32), np.zeros(64, np.uint32)]
    out = run(wrap(body), "gfx942", [a.copy() for a in arrays], grid=2, threads=64, batch_waves=1)[1]
    np.testing.assert_array_equal(out, LANE + 100)
    with pytest.raises(EmulatorFault, match="deadlock"):
        run(wrap(body), "gfx942", [a.copy() for a in arrays], grid=2, threads=64, resident=1)


def _on_two_gpus(parts: dict[str, str], races: bool = True) -> np.ndarray:
    """One GPU raises a flag for the other, in one address space."""
    memory = GlobalMemory()
    data, out = memory.allocate(np.zeros(65, np.uint32)), memory.allocate(np.zeros(64, np.uint32))
    body = HEAD + PRODUCER_CONSUMER.format(**parts)
    kernarg = np.array([data, out], np.uint64).tobytes()
    detector = new_races() if races else None
    launches = [
        AmdEmulator(wrap(text), "k", "gfx942").start(memory, (1,), (64,), kernarg, Setting(None, detector, rank, 2))
        for rank, text in enumerate((body.replace("s_cmp_eq_u32 s2, 0", "s_cmp_eq_u32 s2, 1"), body))
    ]
    run_together(launches)
    return memory.read_back(out)


def test_two_gpus_that_share_memory() -> None:
    np.testing.assert_array_equal(_on_two_gpus(SYSTEM), LANE + 100)


@pytest.mark.parametrize("part", AGENT)
def test_the_scope_of_one_gpu_is_not_enough_for_two(part: str) -> None:
    with pytest.raises(EmulatorFault, match="race: .*wave 0 of workgroup 0 on GPU"):
        _on_two_gpus(SYSTEM | {part: AGENT[part]})


def test_two_gpus_that_wait_for_ever() -> None:
    with pytest.raises(AnyFault, match="(?s)deadlock.*wave 0 of workgroup 0 on GPU 0 waits for memory to change"):
        _on_two_gpus(SYSTEM | {"release": "s_endpgm"})


# ---- wait states around matrix instructions ----------------------------------------------------------

MFMA = "v_mfma_f32_16x16x16_f16 v[4:7], v[0:1], v[2:3], 0"


@pytest.mark.parametrize(
    ("after", "needed"),
    [
        ("v_mov_b32_e32 v8, v5", 7),
        ("global_store_dword v31, v7, s[6:7]", 7),
        ("v_mov_b32_e32 v6, 0", 7),
        ("v_mfma_f32_16x16x16_f16 v[8:11], v[4:5], v[2:3], 0", 7),
        ("v_mfma_f32_16x16x16_f16 v[8:11], v[0:1], v[2:3], v[6:9]", 5),
        ("v_mfma_f32_16x16x16_f16 v[4:7], v[0:1], v[2:3], v[4:7]", 0),
        ("v_mov_b32_e32 v8, v0", 0),
    ],
)
def test_wait_states_behind_a_matrix_instruction(after: str, needed: int) -> None:
    """Of four passes on gfx942 (CDNA3 ISA chapter 4, manually inserted wait states)."""
    AmdEmulator(wrap(f"{MFMA}\ns_nop {needed - 1}\n{after}" if needed else f"{MFMA}\n{after}"), "k", "gfx942")
    if needed:
        with pytest.raises(EmulatorFault, match=f"after {needed - 1} wait states, but {needed} are needed"):
            AmdEmulator(wrap(f"{MFMA}\ns_nop {needed - 2}\n{after}"), "k", "gfx942")


def test_wait_states_count_along_branches() -> None:
    loop = f"s_nop 7\n.Lloop:\nv_mov_b32_e32 v8, v5\ns_nop 1\n{MFMA}\n{{}}\ns_cbranch_scc1 .Lloop"
    AmdEmulator(wrap(loop.format("s_nop 5")), "k", "gfx942")
    with pytest.raises(EmulatorFault, match="after 6 wait states, but 7 are needed"):
        AmdEmulator(wrap(loop.format("s_nop 4")), "k", "gfx942")


def test_wait_states_before_a_matrix_instruction() -> None:
    AmdEmulator(wrap(f"v_mov_b32_e32 v1, 0\ns_nop 1\n{MFMA}"), "k", "gfx942")
    with pytest.raises(EmulatorFault, match="reads the result of `v_mov_b32_e32 v1, 0`"):
        AmdEmulator(wrap(f"v_mov_b32_e32 v1, 0\ns_nop 0\n{MFMA}"), "k", "gfx942")


MFMA_IR = """
declare <4 x float> @llvm.amdgcn.mfma.f32.16x16x16f16(<4 x half>, <4 x half>, <4 x float>, i32, i32, i32)
define amdgpu_kernel void @k(ptr addrspace(1) %a, ptr addrspace(1) %c) #0 {
  %t = call i32 @llvm.amdgcn.workitem.id.x()
  %pa = getelementptr <4 x half>, ptr addrspace(1) %a, i32 %t
  %x = load <4 x half>, ptr addrspace(1) %pa
  %r = call <4 x float> @llvm.amdgcn.mfma.f32.16x16x16f16(<4 x half> %x, <4 x half> %x, <4 x float> zeroinitializer,
      i32 0, i32 0, i32 0)
  %pc = getelementptr <4 x float>, ptr addrspace(1) %c, i32 %t
  store <4 x float> %r, ptr addrspace(1) %pc
  ret void
}
"""


@pytest.mark.parametrize("arch", ARCHS)
def test_llvm_inserts_exactly_the_wait_states_that_are_needed(arch: str) -> None:
    asm = compile_ir(MFMA_IR, arch, threads=64)
    AmdEmulator(asm, "k", arch)
    shorter = re.sub(r"s_nop (\d+)\n(\s*global_store)", lambda m: f"s_nop {int(m[1]) - 1}\n{m[2]}", asm)
    assert shorter != asm
    with pytest.raises(EmulatorFault, match="wait states"):
        AmdEmulator(shorter, "k", arch)


# ---- mutants -----------------------------------------------------------------------------------------


def _without(lines: list[str], index: int, instead: list[str]) -> str:
    return "\n".join([*lines[:index], *instead, *lines[index + 1 :]])


@pytest.mark.parametrize("target", ARCHS)
def test_every_wait_and_barrier_of_a_product_is_needed(target: str) -> None:
    """Each is deleted in turn: the emulator must notice, unless the kernel never comes by there."""
    module = amd.module_of(gemm, a=amd.matrix(), b=amd.matrix(), c=amd.matrix(), BM=32, BN=32, BK=16)
    result = amd.compiled(amd.scheduled(module, target), target)
    a, b, c = amd.normal(32, 64), amd.normal(64, 32, seed=1), amd.normal(32, 32)
    lines = result.asm["amdgcn"].splitlines()

    def run_with(text: str) -> None:
        amd.emulate(replace(result, asm={"amdgcn": text}), target, [a, b, c], (1, 1))

    run_with("\n".join(lines))
    noticed, skipped = 0, 0
    for index, line in enumerate(lines):
        if re.match(r"\s+s_(waitcnt|barrier)\b", line):
            try:
                run_with(_without(lines, index, []))
            except EmulatorFault:
                noticed += 1
            else:
                run_with(_without(lines, index, ["s_trap 2"]))
                skipped += 1
    assert noticed >= 10 and skipped < 20
