"""The schedule checker: every schedule that the passes make is sound, and no synchronisation in it can be missed.

`mutants.md` is the committed table of what happens when one is taken out or weakened. Write it anew with
``PYTHONPATH=.:tests/support python tests/passes/test_check_schedule.py``.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from schedule_mutants import Mutant, mutants

import tilewright as tw
from tests.passes.test_levels import CASES, build, levels, of_two_warpgroups
from tilewright.compiler.environment import CHECK_SCHEDULE
from tilewright.frontend.build import build_module
from tilewright.ir.core import IRError, Module
from tilewright.ir.parser import parse_module
from tilewright.ir.target import TARGETS, get_target
from tilewright.ir.tile_ops import For
from tilewright.ir.types import DTYPES, ViewType
from tilewright.passes.check_schedule import Result, check
from tilewright.passes.manager import PassContext, PassManager, PassOptions, parse_pipeline
from tilewright.passes.pipelines import default_pipeline

TABLE = Path(__file__).with_name("mutants.md")


def scheduled(name: str, target: str, align: int = 16, **options: Any) -> Module:
    module = build(of_two_warpgroups(name) if options.get("schedule") == "turns" else CASES[name], align)
    for _ in levels(module, target, PassOptions(**options)):
        pass
    return module


def checked(module: Module, target: str = "sm_90a") -> Result:
    return check(module.functions[0], PassContext(get_target(target)))


# --- schedules that the passes make -----------------------------------------------------------------


@pytest.mark.parametrize("align", [16, 2])
@pytest.mark.parametrize("name", sorted(CASES))
def test_loops_and_branches_are_covered(name: str, align: int) -> None:
    missed = checked(scheduled(name, "sm_90a", align)).missed
    masks_the_end = name == "attention" or name.startswith("chained")
    assert len(missed) == masks_the_end  # those loops mask one block at most: they never run twice


@tw.kernel
def by_request(x: tw.Tensor, w: tw.Tensor, y: tw.Tensor, steps: tw.int32, wide: tw.int32):
    """Scalars of the caller decide how often loops run."""
    acc = tw.zeros((64, 64), tw.float32)
    for k in tw.range(steps):
        acc = tw.dot(tw.load(x, (0, k), (64, 32)), tw.load(w, (k, 0), (32, 64)), acc)
    if wide > 1:
        for k in tw.range(0, wide, 32):
            acc = tw.dot(tw.load(x, (1, k), (64, 32)), tw.load(w, (k, 1), (32, 64)), acc)
    tw.store(y, (0, 0), acc.to(y.dtype))


@pytest.mark.parametrize("target", ["sm_90a", "sm_80", "gfx942"])
def test_scalar_arguments_decide(target: str) -> None:
    types: dict[str, Any] = {name: ViewType((None, None), DTYPES["bf16"], (None, 1), 16) for name in "xwy"}
    module = build_module(by_request.definition, {**types, "steps": DTYPES["i32"], "wide": DTYPES["i32"]})
    PassManager(default_pipeline(get_target(target)), PassContext(get_target(target))).run(module)
    result = checked(module, target)
    assert not any(isinstance(op, For) for op, _ in result.missed)
    assert any(inputs.scalars for inputs in result.inputs)


@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("target", ["sm_90a", "sm_80", "gfx950"])
def test_any_depth_is_sound(target: str, stages: int) -> None:
    checked(scheduled("gemm-small", target, num_stages=stages), target)


def test_default_pipelines_end_with_the_check() -> None:
    for target in TARGETS.values():
        assert [str(p) for p in parse_pipeline(default_pipeline(target))[-2:]] == ["check-schedule", "check-protocol"]
        assert "check-schedule" not in default_pipeline(target, check=False)
    assert CHECK_SCHEDULE.default is True


def test_it_is_fast() -> None:
    """A few milliseconds, where code generation takes hundreds."""
    module = scheduled("gemm", "sm_90a")
    checked(module)
    times = []
    for _ in range(5):
        start = perf_counter()
        checked(module)
        times.append(perf_counter() - start)
    assert min(times) < 0.05


def test_long_constant_loops_are_shortened() -> None:
    text = RING.replace("%n = tile.constant {value = 9} : i32", "%n = tile.constant {value = 100000} : i32")
    assert checked(parse_module(text)).steps < 5000
    with pytest.raises(IRError, match="deadlock"):
        checked(parse_module(text.replace("async.release %ring, %j", "")))


# --- what it finds, on small programs ---------------------------------------------------------------


SLOT = "slot<64x64xbf16, shared<128B, order=[1,0], shape=[64,64], bits=16>>"
TILE = (
    "tile<64x64xbf16, linear<register=[[0,1],[0,8],[0,16],[0,32],[8,0]], "
    "lane=[[0,2],[0,4],[1,0],[2,0],[4,0]], warp=[[16,0],[32,0]], shape=[64,64]>>"
)

RING = f"""
func @ring(%a: view<?x?xbf16, strides=[?, 1], align=16>) {{num_warps = 4, threads = 256, shared_bytes = 32768}} {{
  %ring = async.ring {{offset = 16384}} : ring<2>
  %buffer = async.alloc ring(%ring) {{offset = 0}} : buffer<2 x {SLOT}>
  async.role @producer {{warps = 4, single_thread = true}} {{
    %0 = tile.constant {{value = 0}} : i32
    %1 = tile.constant {{value = 1}} : i32
    %n = tile.constant {{value = 9}} : i32
    tile.for %i = %0 to %n step %1 {{
      async.acquire %ring, %i
      %slot = async.slot %buffer, %i : {SLOT}
      %t = async.copy %a, [%i, %0], %slot : token<tma>
      async.publish %ring, %i, [%t]
      tile.yield []
    }}
  }}
  async.role @consumer {{warps = 4}} {{
    %0 = tile.constant {{value = 0}} : i32
    %1 = tile.constant {{value = 1}} : i32
    %n = tile.constant {{value = 9}} : i32
    tile.for %j = %0 to %n step %1 {{
      async.await %ring, %j
      %slot = async.slot %buffer, %j : {SLOT}
      %x = async.local_load %slot : {TILE}
      async.release %ring, %j
      tile.store %a, [%j, %0], %x
      tile.yield []
    }}
  }}
}}
"""

STAGED = f"""
func @staged(%a: view<?x?xbf16, strides=[?, 1], align=16>) {{num_warps = 4, threads = 128, shared_bytes = 16384}} {{
  %one = async.alloc {{offset = 0}} : buffer<1 x {SLOT}>
  %two = async.alloc {{offset = 8192}} : buffer<1 x {SLOT}>
  %0 = tile.constant {{value = 0}} : i32
  %x = tile.load %a, [%0, %0] : {TILE}
  %slot = async.slot %one, %0 : {SLOT}
  %other = async.slot %two, %0 : {SLOT}
  async.local_store %x, %slot
  async.local_store %x, %other
  async.fence
  async.barrier
  async.bulk_store %slot, %a, [%0, %0]
  async.bulk_store %other, %a, [%0, %0]
  async.bulk_wait {{pending = 0}}
}}
"""

WIDE = "slot<64x128xf32, shared<128B, order=[1,0], shape=[64,128], bits=32>>"
COLUMNS = (
    "tile<64x128xf32, linear<register=[[1,0],[0,8],[8,0],[16,0],[32,0]], "
    "lane=[[2,0],[4,0],[0,1],[0,2],[0,4]], warp=[[0,16],[0,32],[0,64]], shape=[64,128]>>"
)

GROUPS = f"""
func @groups(%a: view<?x?xf32, strides=[?, 1], align=16>) {{num_warps = 8, threads = 256, shared_bytes = 32768}} {{
  %one = async.alloc {{offset = 0}} : buffer<1 x {WIDE}>
  async.role @consumer {{warps = 8}} {{
    %0 = tile.constant {{value = 0}} : i32
    %x = tile.load %a, [%0, %0] : {COLUMNS}
    %slot = async.slot %one, %0 : {WIDE}
    async.local_store %x, %slot
    async.fence
    async.barrier {{scope = "warpgroup"}}
    async.bulk_store %slot, %a, [%0, %0] {{scope = "warpgroup", axis = 1}}
    async.bulk_wait {{pending = 0, scope = "warpgroup"}}
  }}
}}
"""

DOTS = f"""
func @dots(%a: view<?x?xbf16, strides=[?, 1], align=16>) {{num_warps = 4, threads = 256, shared_bytes = 32768}} {{
  %ring = async.ring {{offset = 16384}} : ring<2>
  %buffer = async.alloc ring(%ring) {{offset = 0}} : buffer<2 x {SLOT}>
  async.role @producer {{warps = 4, single_thread = true}} {{
    %0 = tile.constant {{value = 0}} : i32
    async.acquire %ring, %0
    %slot = async.slot %buffer, %0 : {SLOT}
    %t = async.copy %a, [%0, %0], %slot : token<tma>
    async.publish %ring, %0, [%t]
  }}
  async.role @consumer {{warps = 4}} {{
    %0 = tile.constant {{value = 0}} : i32
    %acc = tile.constant {{value = 0.0}} : tile<64x64xf32>
    async.await %ring, %0
    %slot = async.slot %buffer, %0 : {SLOT}
    %r, %g = async.dot %slot, %slot, %acc : tile<64x64xf32>, token<mma>
    %s, %h = async.dot %slot, %slot, %r : tile<64x64xf32>, token<mma>
    %w = async.wait [%s], token(%h) : tile<64x64xf32>
    async.release %ring, %0
    %y = tile.add %w, %w : tile<64x64xf32>
  }}
}}
"""


@pytest.mark.parametrize("text", [RING, STAGED, GROUPS, DOTS], ids=["ring", "staged", "groups", "dots"])
def test_sound_programs_pass(text: str) -> None:
    assert checked(parse_module(text)).inputs


FAULTS = {
    "deadlock: a use is never released": (RING, "async.release %ring, %j", "", "deadlock.*released"),
    "deadlock: nobody publishes": (
        RING, "tile.for %i = %0 to %n", "tile.for %i = %0 to %1", "deadlock.*use 1 of %ring to be published"
    ),
    "race: no acquire": (RING, "async.acquire %ring, %i", "", "race"),
    "race: no await": (RING, "async.await %ring, %j", "", "race|arrive"),
    "race: the wrong slot": (RING, "%slot = async.slot %buffer, %j", "%slot = async.slot %buffer, %0", "race|nothing"),
    "too few arrivals": (RING, "async.ring {", "async.ring {consumers = 2, ", "deadlock.*1 of 2 arrivals"),
    "too many arrivals": (
        RING, "async.release %ring, %j", "async.release %ring, %j\nasync.release %ring, %j", "too many"
    ),
    "the ring's barriers in a slot": (RING, "offset = 16384", "offset = 16376", "share bytes"),
    "beyond the shared memory": (RING, "shared_bytes = 32768", "shared_bytes = 16384", "ends at byte"),
    "one role alone at the block's barrier": (
        RING, "async.await %ring, %j", "async.barrier\nasync.await %ring, %j", "deadlock.*at a barrier"
    ),
    "a copy that nobody waits for": (RING, "[%t]", "[]", "nobody waits"),
    "missing fence": (STAGED, "async.fence", "", "missing proxy fence"),
    "a fence too late": (STAGED, "async.fence\n  async.barrier", "async.barrier\n  async.fence", "missing proxy fence"),
    "missing barrier": (STAGED, "async.fence\n  async.barrier", "async.fence", "race"),
    "stores outlive the block": (STAGED, "pending = 0", "pending = 1", "give its shared memory back"),
    "buffers overlap": (STAGED, "offset = 8192", "offset = 4096", "shares bytes"),
    "read before written": (STAGED, "async.local_store %x, %slot\n", "", "nothing was written"),
    "warpgroups that store what others wrote": (GROUPS, ", axis = 1", "", "race"),
    "a result read in flight": (DOTS, "tile.add %w, %w", "tile.add %s, %w", "whose dot is in flight"),
    "a wait that lets the dot go on": (DOTS, "token(%h)", "token(%h) {pending = 1}", "among the 1 that may stay"),
    "dots in flight at the end": (
        DOTS, "%w = async.wait [%s], token(%h) :", "%w = tile.add %acc, %acc :", "in flight"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str) -> None:
    text, old, new, message = FAULTS[name]
    assert old in text
    with pytest.raises(IRError, match=rf"(?s){message}"):
        checked(parse_module(text.replace(old, new), "faulty.tw", text_locations=True))


def test_scratch_over_a_buffer_in_use() -> None:
    """Scratch memory may lie where a buffer's contents are no longer needed, and nowhere else."""
    reduced = "%m = tile.reduce.max %x {axis = 0, scratch = SCRATCH} : tile<64xbf16, " + _sliced() + ">\n"
    text = STAGED.replace("shared_bytes = 16384", "shared_bytes = 20480")
    text = text.replace("  async.fence\n", "  " + reduced + "  async.fence\n")
    checked(parse_module(text.replace("SCRATCH", "16384")))
    with pytest.raises(IRError, match="shares bytes|other data was written over it"):
        checked(parse_module(text.replace("SCRATCH", "0")))


def _sliced() -> str:
    tile = parse_module(STAGED).functions[0].body.block.ops[3].results[0].type
    return str(tile.layout.slice_dim(0))  # type: ignore[union-attr]


def test_an_error_names_both_lines_and_the_sequence() -> None:
    text = STAGED.replace("async.fence\n  async.barrier", "async.fence")
    lines = text.split("\n")
    with pytest.raises(IRError) as caught:
        checked(parse_module(text, "staged.tw", text_locations=True))
    message = str(caught.value)
    writer = next(n for n, line in enumerate(lines, 1) if "local_store %x, %slot" in line)
    reader = next(n for n, line in enumerate(lines, 1) if "bulk_store %slot" in line)
    assert f'"staged.tw":{writer}' in message and f'"staged.tw":{reader}' in message
    assert "shortest failing sequence" in message and "hint: a barrier" in message
    assert "the block first thread: bulk_store" in message and "the block other threads: local_store" in message


def test_the_pass_reports_the_fault() -> None:
    module = parse_module(STAGED.replace("  async.fence\n", ""), "staged.tw", text_locations=True)
    with pytest.raises(Exception, match="missing proxy fence"):
        PassManager("check-schedule", PassContext(get_target("sm_90a"))).run(module)


# --- mutants ----------------------------------------------------------------------------------------


#: (title, case, target, alignment of the tensors in bytes, schedule where it is named, blocks of a cluster)
SUBJECTS: list[tuple[str, str, str, int, str | None, int]] = [
    ("GEMM", "gemm", "sm_90a", 16, None, 1),
    ("GEMM in clusters of two", "gemm", "sm_90a", 16, None, 2),
    ("GEMM, copied by threads", "gemm", "sm_90a", 2, None, 1),
    ("GEMM, consumers that alternate", "gemm-small", "sm_90a", 16, "alternate", 1),
    ("Attention, products in turn", "attention", "sm_90a", 16, "turns", 1),
    ("MLP", "mlp", "sm_90a", 16, None, 1),
    ("Residual", "residual", "sm_90a", 16, None, 1),
    ("Attention", "attention", "sm_90a", 16, None, 1),
    ("Attention, causal", "attention-causal", "sm_90a", 16, None, 1),
    ("GEMM", "gemm", "sm_80", 16, None, 1),
    *((title, name, target, 16, None, 1) for target in ("gfx942", "gfx950") for title, name in (
        ("GEMM", "gemm"), ("MLP", "mlp"), ("Residual", "residual")
    )),
]  # fmt: skip

BEHIND_VALUES = (
    "keys' stage n + 8 is filled behind values' n + 7, whose acquire needs the release of values' n - 1: after the wait"
)
TURNS_ARE_GIVEN = "nobody acquires a turn: which tile it is for follows from the turns before"
#: why a mutant is as good as the schedule: (case or "", target, what its place and change contain, the rule)
REDUNDANT = [
    ("", "sm_90a", "of its buffers too", "fewer stages: the producer waits more often, for the same releases"),
    ("", "sm_90a", "wait for the reads alone", "memory is free once read; the kernel's end completes the writes"),
    *(
        (case, "sm_90a", f"loop if loop release {number} before the wait", BEHIND_VALUES)
        for case in ("attention", "attention-causal") for number in (1, 3)
    ),
    ("gemm-small", "sm_90a", "ring 1 consumers 1 -> 2", TURNS_ARE_GIVEN),
    *(("gemm-small", "sm_90a", f"consumer_{group}: loop if release 1 delete", TURNS_ARE_GIVEN) for group in (0, 1)),
    ("gemm", "sm_80", "barrier 1 ", "nothing touches the slots behind the last iteration's barrier"),
]  # fmt: skip


def verdict(mutant: Mutant, module: Module, target: str) -> str:
    """``rejected: <first line>`` or ``accepted``."""
    try:
        checked(mutant.make(module), target)
    except IRError as error:
        return f"rejected: {in_short(error.message)}"
    return "accepted"


def in_short(message: str) -> str:
    """A fault in a few words: source lines and numbers of uses left out."""
    first = message.split("\n")[0]
    for start, text in (
        ("race", "race"), ("missing proxy fence", "missing proxy fence"), ("deadlock", "deadlock"),
        ("too many arrivals", "too many arrivals"), ("nobody waits", "nobody waits for the copy"),
        ("the block may end", "shared memory given back too early"),
        ("block ", "a block of the cluster ends too early"),
    ):  # fmt: skip
        if first.startswith(start):
            return text
    for part, text in (
        ("in flight", "result or dot in flight"), ("may arrive at", "arrival may count for another use"),
        ("may come", "wait may miss its use"), ("may complete", "wait may miss its use"),
        ("slots, but its ring has", "buffer and ring disagree"), ("nothing was written", "read before written"),
        ("no producers or no consumers", "no arrivals"), ("use count of", "negative use count"),
        ("waits for a dot that", "result or dot in flight"), ("the turn may be", "turns out of step"),
    ):  # fmt: skip
        if part in first:
            return text
    return first


def rule_for(name: str, target: str, mutant: Mutant) -> str | None:
    text = f"{mutant.place} {mutant.change}"
    for case, where, part, rule in REDUNDANT:
        if case in ("", name) and where == target and part in text:
            return rule
    return None


def table() -> str:
    """The text of `mutants.md`; AssertionError where an accepted mutant has no rule."""
    lines = [
        "# Mutants of schedules",
        "",
        "One synchronisation of a schedule is deleted or weakened at a time, and the schedule checker judges the rest.",
        "Written and compared by `tests/passes/test_check_schedule.py`.",
        "A place is a role, the loops and branches around, the operation, and its number among its like.",
    ]
    total, rejected = 0, 0
    body: list[str] = []
    for title, name, target, align, schedule, ctas in SUBJECTS:
        module = scheduled(name, target, align, schedule=schedule, num_ctas=ctas)
        body += ["", f"## {title}, {target}", "", "| place | change | verdict |", "|---|---|---|"]
        for mutant in mutants(module):
            found = verdict(mutant, module, target)
            if found == "accepted":
                rule = rule_for(name, target, mutant)
                assert rule is not None, f"{title}, {target}: {mutant.place}, {mutant.change} is not noticed"
                found = f"redundant: {rule}"
            total, rejected = total + 1, rejected + found.startswith("rejected")
            body.append(f"| {mutant.place} | {mutant.change} | {found} |")
    lines += ["", f"{total} mutants: {rejected} rejected, {total - rejected} redundant, none missed."]
    return "\n".join([*lines, *body, ""])


def test_every_mutant_is_rejected_or_redundant() -> None:
    assert table() == TABLE.read_text(encoding="utf-8"), "write it anew (see the docstring)"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
