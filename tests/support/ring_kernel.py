"""A communicating kernel written by hand, which shows how the runtime passes ranks, tables and control blocks.

Every rank puts its x (N) into its row of everybody's slots (world, N), signals, waits for all, and copies the slots
to y (world, N). It ends when all have ended, and gives up as its control block says.
"""

from __future__ import annotations

from tilewright.ir.abi import FAULT_WORDS, Control, Fault, KernelABI, TensorParam, kernel_number

N = 256
#: the source line that the kernel reports
LINE = 31


def ring_abi(world: int, persistent: bool = True) -> KernelABI:
    return KernelABI(
        "ring",
        (
            TensorParam("slots", "f32", (world, N), (N, 1), 16, symmetric=True),
            TensorParam("flags", "i32", (world,), (1,), 4, symmetric=True),
            TensorParam("x", "f32", (N,), (1,), 4),
            TensorParam("y", "f32", (world, N), (N, 1), 4),
        ),
        N,
        0,
        persistent=persistent,
        communicates=True,
        source="ring.py",
    )


def _wait(label: str, base: str, offset: int, flag: str) -> str:
    """Thread p < world waits until the word p behind ``base`` has the number of this launch."""
    stores = "\n".join(
        f"  st.relaxed.sys.global.u32 [%record+{4 * place}], {value};"
        for place, value in [
            (Fault.LINE, LINE), (Fault.FLAG, flag), (Fault.PEER, "%t"), (Fault.RANK, "%rank"),
            (Fault.KERNEL, kernel_number("ring") & 0xFFFFFFFF), (Fault.PARAM, 1),
        ]
    )  # fmt: skip
    return f"""
  @!%waits bra {label}_done;
  mul.wide.u32 %a, %t, 4;
  add.u64 %a, %a, {base};
  mov.u64 %start, %globaltimer;
{label}_poll:
  ld.acquire.sys.global.u32 %v, [%a+{offset}];
  sub.s32 %v, %v, %number;
  setp.ge.s32 %p, %v, 0;
  @%p bra {label}_done;
  setp.eq.u32 %p, %limit, 0;
  @%p bra {label}_poll;
  mov.u64 %now, %globaltimer;
  sub.u64 %now, %now, %start;
  cvt.u64.u32 %ns, %limit;
  mul.lo.u64 %ns, %ns, 1000000;
  setp.lt.u64 %p, %now, %ns;
  @%p bra {label}_poll;
  ld.global.u64 %record, [%control+{4 * Control.FAULT}];
{stores}
  fence.acq_rel.sys;
  st.relaxed.sys.global.u32 [%record], 1;
  fence.acq_rel.sys;
  trap;
{label}_done:
  bar.sync 0;
"""


def _tell(table: str, offset: int) -> str:
    """Thread p < world writes the number of this launch into peer p's word for this rank."""
    return f"""
  @!%waits bra TOLD_{offset};
  mul.wide.u32 %a, %t, 8;
  add.u64 %a, %a, {table};
  ld.global.u64 %a, [%a];
  mul.wide.u32 %b, %rank, 4;
  add.u64 %a, %a, %b;
  st.release.sys.global.u32 [%a+{offset}], %number;
TOLD_{offset}:
"""


PTX = f"""
.version 8.0
.target sm_90a
.address_size 64
.visible .entry ring(
  .param .u64 slots, .param .u64 slots_table, .param .u64 flags, .param .u64 flags_table, .param .u64 x, .param .u64 y,
  .param .u32 g0, .param .u32 g1, .param .u32 g2,
  .param .u32 rank, .param .u32 world, .param .u64 control, .param .u64 controls)
{{
  .reg .b64 %slots, %slots_table, %flags, %flags_table, %x, %y, %control, %controls;
  .reg .b64 %a, %b, %start, %now, %ns, %record;
  .reg .b32 %rank, %world, %t, %v, %number, %limit, %p_rank, %row;
  .reg .f32 %value;
  .reg .pred %p, %waits;
  ld.param.u64 %slots, [slots];
  ld.param.u64 %slots_table, [slots_table];
  ld.param.u64 %flags, [flags];
  ld.param.u64 %flags_table, [flags_table];
  ld.param.u64 %x, [x];
  ld.param.u64 %y, [y];
  ld.param.u64 %control, [control];
  ld.param.u64 %controls, [controls];
  ld.param.u32 %rank, [rank];
  ld.param.u32 %world, [world];
  mov.u32 %t, %tid.x;
  setp.lt.u32 %waits, %t, %world;
  ld.global.u32 %number, [%control];
  add.u32 %number, %number, 1;
  ld.global.u32 %limit, [%control+{4 * Control.TIMEOUT}];
  mul.wide.u32 %a, %t, 4;
  add.u64 %a, %x, %a;
  ld.global.f32 %value, [%a];
  mov.u32 %p_rank, 0;
put:
  mul.wide.u32 %a, %p_rank, 8;
  add.u64 %a, %slots_table, %a;
  ld.global.u64 %a, [%a];
  mad.lo.u32 %row, %rank, {N}, %t;
  mul.wide.u32 %b, %row, 4;
  add.u64 %a, %a, %b;
  st.global.f32 [%a], %value;
  add.u32 %p_rank, %p_rank, 1;
  setp.lt.u32 %p, %p_rank, %world;
  @%p bra put;
  bar.sync 0;
{_tell("%flags_table", 0)}
{_wait("flag", "%flags", 0, "%t")}
  mov.u32 %p_rank, 0;
get:
  mad.lo.u32 %row, %p_rank, {N}, %t;
  mul.wide.u32 %b, %row, 4;
  add.u64 %a, %slots, %b;
  ld.global.f32 %value, [%a];
  add.u64 %a, %y, %b;
  st.global.f32 [%a], %value;
  add.u32 %p_rank, %p_rank, 1;
  setp.lt.u32 %p, %p_rank, %world;
  @%p bra get;
  bar.sync 0;
{_tell("%controls", 4 * Control.LEFT)}
{_wait("left", "%control", 4 * Control.LEFT, str(Fault.EXIT))}
  setp.eq.u32 %p, %t, 0;
  @%p st.global.u32 [%control], %number;
  ret;
}}
"""
assert FAULT_WORDS > Fault.PARAM
