"""The protocol checker: every kernel that communicates is sound, and nothing that orders its ranks can be missed.

`protocol_mutants.md` is the committed table of what happens when one is taken out or weakened. Write it anew with
``PYTHONPATH=.:tests/support python tests/passes/test_check_protocol.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import process_time
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from schedule_mutants import Mutant, protocol_mutants

import tilewright as tw
from tests.support.comm_cases import CASES, all_ranks, flags, own, schedule, scheduled
from tilewright.ir.core import IRError, Module
from tilewright.ir.interpreter import run_ranks
from tilewright.ir.target import get_target
from tilewright.ir.types import DTYPES, ViewType
from tilewright.ir.verifier import verify
from tilewright.passes import check_schedule
from tilewright.passes.check_protocol import Result, check
from tilewright.passes.manager import PassContext, PassError, PassManager

TABLE = Path(__file__).with_name("protocol_mutants.md")
BF16 = ml_dtypes.bfloat16
TARGETS = ("sm_90a", "sm_80", "gfx942")
#: kernels with programs that push what the own rank has written
PUSHING = ("all-gather + GEMM", "ring attention", "ring attention, causal")


def checked(module: Module, target: str = "sm_90a") -> Result:
    return check(module.functions[0], PassContext(get_target(target)))


# --- kernels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_sound(name: str, target: str) -> None:
    result = checked(scheduled(name, target), target)
    assert {text[:7] for text in result.launches} == {"2 ranks", "3 ranks"}
    #: what the own rank has written is there: its wait never waits
    assert len(result.missed) == (name in PUSHING), result.missed


@pytest.mark.parametrize("schedule_name", ["prefetch", "turns", "alternate"])
@pytest.mark.parametrize("name", ["GEMM + reduce-scatter", "GEMM + all-reduce", "all-gather + GEMM"])
def test_other_schedules_are_sound(name: str, schedule_name: str) -> None:
    """Consumers that alternate hand turns to each other, behind which no signal may stay that a peer waits for."""
    kernel, types = CASES[name]
    sizes = {"BM": 64, "BN": 64} if schedule_name == "alternate" else {}
    checked(schedule(kernel, {**types, **sizes}, "sm_90a", schedule=schedule_name))


@pytest.mark.parametrize("name", ["GEMM + reduce-scatter", "all-to-all", "ring attention, causal"])
def test_it_is_fast(name: str) -> None:
    """Some tens of milliseconds, where code generation takes hundreds."""
    module, times = scheduled(name, "sm_90a"), []
    for _ in range(3):
        start = process_time()
        checked(module)
        times.append(process_time() - start)
    assert min(times) < 0.2


# --- what it finds ----------------------------------------------------------------------------------


@tw.kernel
def own_rows_first(
    a: tw.Tensor, b: tw.Tensor, c: tw.Tensor, parts: tw.Symmetric, flags: tw.Symmetric, *, FIRST: tw.constexpr = 0
):
    """A reduce-scatter whose blocks wait for peers before they send, with FIRST 0."""
    me, world = tw.rank(), tw.world_size()
    owner = (me + FIRST + tw.program_id(0)) % world
    acc = tw.dot(tw.load(a, (owner, 0), (64, 64)), tw.load(b, (0, 0), (64, 64)))
    if owner != me:
        token = tw.put(parts.peer(owner)[me], (0, 0), acc)
        tw.signal(flags[me], owner, after=token)
    else:
        for step in tw.range(1, world):
            source = (me + step) % world
            acc += tw.load(parts[source], (0, 0), (64, 64), after=tw.wait(flags[source]))
        tw.store(c, (0, 0), acc.to(c.dtype))


@tw.kernel
def twice_through_a_slot(
    x: tw.Tensor, y: tw.Tensor, slot: tw.Symmetric, sent: tw.Symmetric, read: tw.Symmetric,
    *, GIVE_BACK: tw.constexpr,
):  # fmt: skip
    """Two tiles go to the next rank through one slot (1, 256); flags (2,)."""
    me, world = tw.rank(), tw.world_size()
    after, before = (me + 1) % world, (me + world - 1) % world
    for step in tw.range(2):
        tile = tw.load(x, (step, 0), (1, 256))
        if GIVE_BACK:
            free = tw.wait(read[0], when=step > 0)
            token = tw.put(slot.peer(after), (0, 0), tile, after=free)
        else:
            token = tw.put(slot.peer(after), (0, 0), tile)
        tw.signal(sent[step], after, after=token)
        tw.store(y, (step, 0), tw.load(slot, (0, 0), (1, 256), after=tw.wait(sent[step])))
        if GIVE_BACK and step == 0:
            tw.signal(read[0], before)


@tw.kernel
def one_flag_for_all(y: tw.Tensor, flags: tw.Symmetric):
    tw.signal(flags[0], 0)
    if tw.rank() == 0:
        tw.wait(flags[0])


@tw.kernel
def wrong_slot(x: tw.Tensor, y: tw.Tensor, slots: tw.Symmetric, flags: tw.Symmetric, *, SHIFT: tw.constexpr):
    """Flags of one rank, data of another, unless SHIFT is 0."""
    me, world = tw.rank(), tw.world_size()
    for peer in tw.range(world):
        token = tw.put(slots.peer(peer)[me], (0, 0), tw.load(x, (0, 0), (1, 256)))
        tw.signal(flags[me], peer, after=token)
    for source in tw.range(world):
        arrived = tw.wait(flags[source])
        place = (source + SHIFT) % world
        tw.store(y, (source, 0), tw.load(slots[place], (0, 0), (1, 256), after=arrived))


@tw.kernel
def nobody_waits(x: tw.Tensor, slots: tw.Symmetric, flags: tw.Symmetric):
    for peer in tw.range(tw.world_size()):
        token = tw.put(slots.peer(peer)[tw.rank()], (0, 0), tw.load(x, (0, 0), (1, 256)))
        tw.signal(flags[tw.rank()], peer, after=token)


@tw.kernel
def nobody_signals(flags: tw.Symmetric):
    tw.wait(flags[tw.rank()])


@tw.kernel
def own_flag(flags: tw.Symmetric):
    tw.signal(flags[tw.rank()], tw.rank())
    tw.wait(flags[tw.rank()])


@tw.kernel
def for_two_ranks(flags: tw.Symmetric, *, SAID: tw.constexpr):
    """The other rank of two."""
    if SAID:
        tw.assume(tw.world_size() == 2)
    tw.signal(flags[0], 1 - tw.rank())
    tw.wait(flags[0])


@tw.kernel
def as_data_says(x: tw.Tensor, flags: tw.Symmetric):
    """The flags that a tensor names."""
    tw.signal(flags[tw.load(x, tw.rank())], 0)
    if tw.rank() == 0:
        for source in tw.range(tw.world_size()):
            tw.wait(flags[tw.load(x, source + 1)])


_SLOT = {"x": own("bf16", 2), "y": own("bf16", 2), "slot": all_ranks("bf16", 2), "sent": flags(1), "read": flags(1)}
_SLOTS = {"x": own("bf16", 2), "y": own("bf16", 2), "slots": all_ranks("bf16", 3), "flags": flags(1)}
_PRODUCT = {
    "a": own("bf16", 2),
    "b": own("bf16", 2),
    "c": own("bf16", 2),
    "parts": all_ranks("f32", 3),
    "flags": flags(1),
}
FAULTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no progress on few blocks": (own_rows_first, _PRODUCT, "deadlock.*later than what it waits for.*one block"),
    "rewritten while it may be read": (twice_through_a_slot, {**_SLOT, "GIVE_BACK": False}, "race: .* %slot of rank"),
    "a flag for several ranks": (one_flag_for_all, {"y": own("bf16", 2), "flags": flags(1)}, "double signal"),
    "another rank's data": (wrong_slot, {**_SLOTS, "SHIFT": 1}, "race: 'tile.load'.*nothing orders it with 'comm.put'"),
    "nobody waits": (
        nobody_waits, {name: t for name, t in _SLOTS.items() if name != "y"},
        "'comm.put'.*when the launch of rank . has ended|nobody waits for flag",
    ),
    "nobody signals": (nobody_signals, {"flags": flags(1)}, "deadlock.*flag .* which nobody signals"),
    "a flag that is not there": (
        own_flag, {"flags": ViewType((1,), DTYPES["i32"], (1,), 16, symmetric=True)}, r"no flag \[1\] of %flags"
    ),
    "two ranks alone": (for_two_ranks, {"flags": flags(1), "SAID": False}, "3 ranks"),
}  # fmt: skip


#: only persistent kernels run several programs in a block
_PERSISTENT = ("no progress on few blocks", "sm_90a")


@pytest.mark.parametrize(
    ("name", "target"), [(n, t) for n in FAULTS for t in TARGETS if n != _PERSISTENT[0] or t == _PERSISTENT[1]]
)
def test_faults_are_found(name: str, target: str) -> None:
    kernel, types, message = FAULTS[name]
    with pytest.raises(IRError, match=f"(?s){message}"):
        checked(schedule(kernel, types, target), target)


SOUND: list[tuple[Any, dict[str, Any]]] = [
    (own_rows_first, {**_PRODUCT, "FIRST": 1}),
    (twice_through_a_slot, {**_SLOT, "GIVE_BACK": True}),
    (wrong_slot, {**_SLOTS, "SHIFT": 0}),
    (for_two_ranks, {"flags": flags(1), "SAID": True}),
    (own_flag, {"flags": flags(1)}),
    (as_data_says, {"x": own("i32", 1), "flags": flags(1)}),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("kernel", "types"), SOUND, ids=lambda value: getattr(value, "__name__", ""))
def test_the_same_done_right(kernel: Any, types: dict[str, Any], target: str) -> None:
    checked(schedule(kernel, types, target), target)


def test_an_error_names_both_lines_and_the_sequence() -> None:
    kernel, types, _ = FAULTS["rewritten while it may be read"]
    with pytest.raises(IRError) as caught:
        checked(schedule(kernel, types, "sm_80"), "sm_80")
    message = str(caught.value)
    lines = Path(__file__).read_text(encoding="utf-8").split("\n")
    for part in ("token = tw.put(slot.peer(after), (0, 0), tile)", "tw.load(slot, (0, 0)"):
        line = next(n for n, text in enumerate(lines, 1) if part in text)
        assert f'test_check_protocol.py":{line}' in message
    assert "shortest failing sequence (2 ranks" in message and "hint: a flag between the two" in message


def test_the_pass_is_for_functions_that_communicate() -> None:
    module = schedule(nobody_signals, {"flags": flags(1)}, "sm_90a")
    with pytest.raises(PassError, match="nobody signals"):
        PassManager("check-protocol", PassContext(get_target("sm_90a"))).run(module)
    del module.functions[0].attributes["communicates"]
    PassManager("check-protocol", PassContext(get_target("sm_90a"))).run(module)


# --- mutants ----------------------------------------------------------------------------------------

#: (case, target)
SUBJECTS = [
    *((name, "sm_90a") for name in CASES),
    *((name, "gfx942") for name in ("small all-reduce", "GEMM + reduce-scatter", "all-reduce, pull")),
]

AT_THE_END = "nothing in the block uses what is waited for, and a launch ends with its last thread"
OTHER_BARRIER = "each block passes the barrier behind a credit or wait, and no thread does anything behind that"
NEXT_BARRIER = "the barrier behind the next wait comes before any put"
STAGED = "the barrier in front of the staging slot comes before any put"
EITHER = "the barriers behind the credit and before the signal both come between the put and the signal"
NEVER = "the condition never holds: what the own rank has written is there"
ONE_THREAD = "one thread waits, stores, waits for its stores, and signals"
DONE = "tokens keep operations in order while passes move them; in the schedule the waits and the barrier count"
EXIT = "ranks read each other's memory here: none ends before all have come to their ends"
SUMS = "each rank waits for the sums of all others, which come behind their reads"
LAST = "a block's last signal comes behind all of its puts, and nobody looks at sums before all signals have come"
NOT_READ = "nothing is read behind it"
#: why a mutant is as good as the schedule: (case, target, what its place and change begin with, the rule)
REDUNDANT: list[tuple[str, str, str, str]] = [
    ("small all-gather + GEMM", "sm_90a", "consumer: barrier 1", STAGED),
    *(("barrier", "sm_90a", place, EITHER) for place in ("barrier 1", "loop barrier 1")),
    ("all-reduce, two-shot", "sm_90a", "loop loop barrier 1", EXIT),
    ("all-reduce, two-shot", "sm_90a", "leave 1 delete", SUMS),
    ("all-reduce, two-shot", "sm_90a", "loop barrier 1", AT_THE_END),
    ("all-reduce, two-shot", "sm_90a", "barrier 2 delete", OTHER_BARRIER),
    *((name, "sm_90a", "barrier 2", AT_THE_END) for name in ("all-gather", "all-to-all")),
    ("GEMM + all-reduce", "sm_90a", "consumer: loop if if barrier 11", AT_THE_END),
    *(("GEMM + all-reduce", "sm_90a", f"consumer: loop if if loop {place} 1", LAST)
      for place in ("bulk_wait", "barrier")),
    ("GEMM + all-reduce, one-shot", "sm_90a", "consumer: barrier 1", ONE_THREAD),
    ("GEMM + all-reduce, one-shot", "sm_90a", "consumer: loop loop barrier 5", ONE_THREAD),
    *((name, "sm_90a", f"consumer: loop if loop {'loop ' * (name == PUSHING[0])}{place} 1", NEVER)
      for place in ("wait", "barrier") for name in PUSHING),
    *((name, "sm_90a", "consumer: barrier 1", NEXT_BARRIER) for name in PUSHING),
    ("Ulysses attention", "sm_90a", "consumer: loop if if loop barrier 1", AT_THE_END),
    *((name, "gfx942", "fence 1", NOT_READ) for name in ("small all-reduce", "GEMM + reduce-scatter")),
]  # fmt: skip


def verdict(name: str, mutant: Mutant, module: Module, target: str) -> str:
    """``rejected: <why>`` or ``accepted``."""
    changed, context = mutant.make(module), PassContext(get_target(target))
    try:
        verify(changed)
    except IRError as error:
        return f"rejected by the verifier: {in_short(error.message)}"
    try:
        check_schedule.check(changed.functions[0], context)
        check(changed.functions[0], context)
    except IRError as error:
        return f"rejected: {in_short(error.message)}"
    if name == "small all-reduce" and not sums_up(changed):
        return "rejected by the interpreter: wrong result"
    return "accepted"


def in_short(message: str) -> str:
    """A fault in a few words."""
    first = message.split("\n")[0]
    for part, text in (
        ("token reaches no signal", "nobody may read what is put"), ("race: ", "race"), ("deadlock: ", "deadlock"),
        ("missing credit: ", "missing credit"), ("missing fence: ", "missing fence"),
        ("nobody waits for flag", "nobody waits for a flag"), ("unfinished: ", "access after a rank's launch"),
        ("ends the block's part", "block ends too early"), ("without leaving", "launch never ends"),
    ):  # fmt: skip
        if part in first:
            return text
    return first


def sums_up(module: Module) -> bool:
    """Whether the small all-reduce gives the sum on two interpreted ranks."""
    rng, rows, columns = np.random.default_rng(0), 2, 256
    x = [rng.standard_normal((rows, columns), np.float32).astype(BF16) for _ in range(2)]
    ranks = [
        {
            "x": x[rank],
            "y": np.full((rows, columns), np.nan, BF16),
            "slots": np.full((2, rows, columns), np.nan, BF16),
            "flags": np.zeros((2, rows), np.int32),
        }
        for rank in range(2)
    ]
    run_ranks(module.functions[0], ranks, (rows, 1, 1))
    total = (x[0].astype(np.float32) + x[1].astype(np.float32)).astype(BF16)
    return all(np.array_equal(arguments["y"], total) for arguments in ranks)


def rule_for(name: str, target: str, mutant: Mutant) -> str | None:
    text = f"{mutant.place} {mutant.change}"
    for case, where, part, rule in REDUNDANT:
        if (case, where) == (name, target) and text.startswith(part):
            return rule
    return DONE if mutant.change.startswith("without the puts") else None


def mutants_of(name: str, module: Module) -> Iterator[Mutant]:
    """A put left out makes a result wrong, which tests of results show: here one case does."""
    for mutant in protocol_mutants(module):
        if name == "small all-reduce" or mutant.place.split()[-2] not in ("put", "reduce_put.add"):
            yield mutant


def table() -> str:
    """The text of `protocol_mutants.md`; AssertionError where an accepted mutant has no rule."""
    total, rejected, unused = 0, 0, set(REDUNDANT)
    body: list[str] = []
    for name, target in SUBJECTS:
        module = scheduled(name, target)
        body += ["", f"## {name}, {target}", "", "| place | change | verdict |", "|---|---|---|"]
        for mutant in mutants_of(name, module):
            found = verdict(name, mutant, module, target)
            if found == "accepted":
                rule = rule_for(name, target, mutant)
                assert rule is not None, f"{name}, {target}: {mutant.place}, {mutant.change} is not noticed"
                found = f"redundant: {rule}"
                text = f"{mutant.place} {mutant.change}"
                unused -= {r for r in unused if r[:2] == (name, target) and text.startswith(r[2])}
            total, rejected = total + 1, rejected + found.startswith("rejected")
            body.append(f"| {mutant.place} | {mutant.change} | {found} |")
    assert not unused, f"rules without a mutant: {unused}"
    lines = [
        "# Mutants of protocols",
        "",
        "Of each kernel that communicates, one thing that orders ranks, or the threads of a block towards other ranks,",
        "is deleted or weakened at a time; the verifier, `check-schedule` and `check-protocol` judge the rest.",
        "Written and compared by `tests/passes/test_check_protocol.py`.",
        "A place is a role, the loops and branches around, the operation, and its number among its like.",
        "",
        f"{total} mutants: {rejected} rejected, {total - rejected} redundant, none missed.",
    ]
    return "\n".join([*lines, *body, ""])


def test_every_mutant_is_rejected_or_redundant() -> None:
    assert table() == TABLE.read_text(encoding="utf-8"), "write it anew (see the docstring)"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
