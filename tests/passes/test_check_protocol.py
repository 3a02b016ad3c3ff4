"""The protocol checker: every kernel that communicates is sound, and nothing that orders its ranks can be missed.

`protocol_mutants.md` is the committed table of what happens when one is taken out or weakened. Write it anew with
``PYTHONPATH=.:tests/support python tests/passes/test_check_protocol.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from schedule_mutants import Mutant, protocol_mutants

from tests.support.comm_cases import CASES, scheduled
from tilewright.ir.core import IRError, Module
from tilewright.ir.interpreter import run_ranks
from tilewright.ir.target import get_target
from tilewright.ir.verifier import verify
from tilewright.passes import check_schedule
from tilewright.passes.check_protocol import Result, check
from tilewright.passes.manager import PassContext

TABLE = Path(__file__).with_name("protocol_mutants.md")
BF16 = ml_dtypes.bfloat16
TARGETS = ("sm_90a", "sm_80", "gfx942")


def checked(module: Module, target: str = "sm_90a") -> Result:
    return check(module.functions[0], PassContext(get_target(target)))


# --- kernels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_sound(name: str, target: str) -> None:
    result = checked(scheduled(name, target), target)
    assert {text[:7] for text in result.launches} == {"2 ranks", "3 ranks"}
    #: what the own rank has written is there: its wait never waits
    never = {"all-gather + GEMM", "ring attention", "ring attention, causal"}
    assert len(result.missed) == (name in never), result.missed


# --- mutants ----------------------------------------------------------------------------------------

#: (case, target)
SUBJECTS = [
    *((name, "sm_90a") for name in CASES),
    *((name, "gfx942") for name in ("small all-reduce", "GEMM + reduce-scatter", "all-reduce, pull")),
]

AT_THE_END = "nothing in the block uses what is waited for, and its end has a barrier of its own"
OTHER_BARRIER = "each block passes the barrier behind a credit, and no thread does anything behind that"
COME_BEFORE = "a credit or flag of each of these ranks was waited for before"
OWN_RANK = "the rank is the own one"
NEVER = "the condition never holds: what the own rank has written is there"
ONE_THREAD = "one thread waits, stores, waits for its stores, and signals"
ORDINARY = "these puts are ordinary stores: the copies are those of results, which no other rank sees"
TWICE = "the other wait in front of the signal is for the same copies"
DONE = "tokens keep operations in order while passes move them; in the schedule the waits and the barrier count"
EXIT = "ranks read each other's memory here: none ends before all have come to their ends"
SUMS = "each rank waits for the sums of all others, which come behind their reads"
NOT_READ = "nothing is read behind it"
TOLD = "what the threads have put was told by signals, each behind a fence"
#: why a mutant is as good as the schedule: (case or "", target or "", what its place and change begin with, the rule)
REDUNDANT: list[tuple[str, str, str, str]] = [
    *(("all-reduce, two-shot", "sm_90a", f"loop loop {place}", COME_BEFORE) for place in ("credit 2", "barrier 2")),
    ("all-reduce, two-shot", "sm_90a", "loop loop barrier 3", EXIT),
    ("all-reduce, two-shot", "sm_90a", "leave 1 before all", SUMS),
    ("all-reduce, two-shot", "sm_90a", "loop barrier 1", AT_THE_END),
    ("all-gather", "sm_90a", "loop barrier 1", AT_THE_END),
    ("all-to-all", "sm_90a", "loop barrier 2", AT_THE_END),
    ("all-to-all", "sm_90a", "barrier 1 delete", OTHER_BARRIER),
    *(("GEMM + all-reduce", "sm_90a", f"consumer: loop if if loop {place} 1", COME_BEFORE)
      for place in ("credit", "barrier", "fence")),
    ("GEMM + all-reduce", "sm_90a", "consumer: loop if barrier 1", AT_THE_END),
    *(("GEMM + all-reduce, one-shot", "sm_90a", f"consumer: loop loop barrier {n} ", ONE_THREAD) for n in (1, 6)),
    *((name, "sm_90a", f"consumer: loop if loop {place} 1", NEVER) for place in ("wait", "barrier")
      for name in ("all-gather + GEMM", "ring attention", "ring attention, causal")),
    ("all-gather + GEMM", "sm_90a", "consumer: loop if loop loop bulk_wait 1", ORDINARY),
    ("ring attention", "sm_90a", "consumer: loop if loop loop bulk_wait 1", ORDINARY),
    ("ring attention, causal", "sm_90a", "consumer: loop if loop loop if bulk_wait 1", ORDINARY),
    ("ring attention, gradients", "sm_90a", "consumer: loop if bulk_wait 1", ORDINARY),
    ("Ulysses attention", "sm_90a", "consumer: loop if if loop barrier 1", AT_THE_END),
    *(("mixture of experts", "sm_90a", f"consumer: loop if {place} 1", OWN_RANK)
      for place in ("credit", "barrier", "fence")),
    *(("mixture of experts", "sm_90a", f"consumer: loop if loop loop {place} {n} ", COME_BEFORE)
      for place in ("credit", "barrier") for n in (2, 3, 4, 5)),
    *(("mixture of experts", "sm_90a", f"consumer: loop if loop bulk_wait {n}", TWICE) for n in (17, 18)),
    ("mixture of experts", "sm_90a", "consumer: loop if loop barrier 33", ONE_THREAD),
    ("small all-reduce", "gfx942", "loop fence 1", NOT_READ),
    ("small all-reduce", "gfx942", "fence 1", TOLD),
    ("GEMM + reduce-scatter", "gfx942", "if fence 1", NOT_READ),
    ("GEMM + reduce-scatter", "gfx942", "fence 1", TOLD),
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
        if case in ("", name) and where in ("", target) and text.startswith(part):
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
