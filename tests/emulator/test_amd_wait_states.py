"""Wait states that software must leave, by the ISA's table 11: each row too early, and just in time."""

from __future__ import annotations

import pytest
from amd_assembly import wrap

from tilewright.runtime.emulator.amd import AmdEmulator, EmulatorFault

#: (first instruction, second one, wait states that must lie between)
ROWS = [
    ("v_readfirstlane_b32 s8, v0", "v_readlane_b32 s9, v1, s8", 4),
    ("v_cmp_eq_u32_e64 s[8:9], v0, v1", "v_writelane_b32 v2, 5, s8", 4),
    ("v_cmp_eq_u32_e32 vcc, v0, v1", "v_div_fmas_f32 v2, v3, v4, v5", 4),
    ("v_div_scale_f32 v2, vcc, v3, v4, v3", "v_div_fmas_f32 v5, v3, v4, v3", 4),
    ("v_readfirstlane_b32 s8, v0", "global_load_dword v1, v2, s[8:9]", 5),
    ("v_readlane_b32 s9, v0, 3", "buffer_load_dword v1, v2, s[8:11], 0 offen", 5),
    ("v_readfirstlane_b32 s8, v0", "v_add_u32_e32 v1, s8, v2", 2),
    ("v_cmp_eq_u32_e64 s[8:9], v0, v1", "v_mov_b32_e32 v2, s9", 2),
    ("v_add_co_u32_e32 v1, vcc, v2, v3", "v_mov_b32_e32 v4, vcc_lo", 2),
    ("v_cmpx_eq_u32_e32 exec, v0, v1", "v_readfirstlane_b32 s8, v2", 4),
    ("v_cmpx_eq_u32_e32 exec, v0, v1", "v_mov_b32_dpp v2, v3 row_shr:1 row_mask:0xf bank_mask:0xf", 5),
    ("v_mov_b32_e32 v3, v0", "v_mov_b32_dpp v2, v3 row_shr:1 row_mask:0xf bank_mask:0xf", 2),
    ("v_mov_b32_e32 v3, v0", "v_readlane_b32 s8, v3, 1", 1),
    ("v_exp_f32_e32 v3, v0", "v_add_f32_e32 v4, v3, v3", 1),
    ("v_mov_b32_sdwa v3, v0 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:WORD_0", "v_mov_b32_e32 v4, v3", 1),
    ("v_add_f16_e64 v3, v0, v1 op_sel:[0,0,1]", "v_mov_b32_e32 v4, v3", 1),
    ("global_store_dwordx4 v0, v[4:7], s[8:9]", "v_mov_b32_e32 v6, 0", 2),
    ("buffer_store_dwordx3 v[4:6], v0, s[8:11], 0 offen", "v_mov_b32_e32 v6, 0", 2),
    ("s_mov_b32 m0, 0", "buffer_load_dword v1, s[8:11], 0 offen lds", 1),
    ("s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 2), 1", "s_getreg_b32 s8, hwreg(HW_REG_MODE)", 2),
]
#: pairs that need none: a carry, an unrelated register, transcendental to transcendental, a narrow store
FREE = [
    ("v_cmp_eq_u32_e32 vcc, v0, v1", "v_cndmask_b32_e32 v2, v3, v4, vcc"),
    ("v_add_co_u32_e32 v1, vcc, v2, v3", "v_addc_co_u32_e32 v4, vcc, v5, v6, vcc"),
    ("v_readfirstlane_b32 s8, v0", "v_add_u32_e32 v1, s9, v2"),
    ("v_exp_f32_e32 v3, v0", "v_log_f32_e32 v4, v3"),
    ("global_store_dwordx2 v0, v[4:5], s[8:9]", "v_mov_b32_e32 v4, 0"),
    ("v_mov_b32_e32 v3, v0", "v_add_u32_e32 v4, v3, v3"),
    ("v_readfirstlane_b32 s8, v0", "s_add_u32 s9, s8, 1"),
]


def check(text: str) -> None:
    AmdEmulator(wrap(text), "k", "gfx942")


@pytest.mark.parametrize(("first", "second", "needed"), ROWS)
def test_rows_of_the_table(first: str, second: str, needed: int) -> None:
    for waited in range(needed):
        between = f"s_nop {waited - 1}\n" if waited else ""
        with pytest.raises(EmulatorFault, match=f"after {waited} wait states, but {needed} are needed") as caught:
            check(f"{first}\n{between}{second}")
        assert caught.value.instruction == second
    check(f"{first}\ns_nop {needed - 1}\n{second}")


@pytest.mark.parametrize(("first", "second"), FREE)
def test_pairs_that_need_no_wait(first: str, second: str) -> None:
    check(f"{first}\n{second}")


def test_the_last_writer_of_an_accumulator_counts() -> None:
    product = "v_mfma_f32_16x16x16_bf16 {}, v[0:1], v[2:3], {}\n".format
    chain = product("v[12:15]", "v[12:15]") + product("v[10:13]", "v[12:15]")
    check(chain + product("v[10:13]", "v[10:13]"))  # as LLVM emits it: v[12:13] are the second one's
    with pytest.raises(EmulatorFault, match="accumulates to the result"):
        check(chain + product("v[12:15]", "v[12:15]"))


def test_along_branches() -> None:
    """The second instruction stands before the first, in a loop."""
    loop = "again:\nv_add_u32_e32 v1, s8, v2\nv_readfirstlane_b32 s8, v0\ns_cbranch_scc1 again"
    with pytest.raises(EmulatorFault, match="after 1 wait states, but 2 are needed"):
        check(loop)
    check(loop.replace("s_cbranch", "s_nop 0\ns_cbranch"))
