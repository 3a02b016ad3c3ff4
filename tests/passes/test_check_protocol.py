"""The protocol checker: every kernel that communicates is sound, and nothing that orders its ranks can be missed.

`protocol_mutants.md` is the committed table of what happens when one is taken out or weakened. Write it anew with
``PYTHONPATH=.:tests/support python tests/passes/test_check_protocol.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from schedule_mutants import Mutant, protocol_mutants

from tests.support.comm_cases import CASES, scheduled
from tilewright.ir.core import IRError, Module
from tilewright.ir.target import get_target
from tilewright.ir.verifier import verify
from tilewright.passes import check_schedule
from tilewright.passes.check_protocol import Result, check
from tilewright.passes.manager import PassContext

TABLE = Path(__file__).with_name("protocol_mutants.md")
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
#: why a mutant is as good as the schedule: (case or "", target or "", what its place and change contain, the rule)
REDUNDANT: list[tuple[str, str, str, str]] = []


def verdict(mutant: Mutant, module: Module, target: str) -> str:
    """``rejected: <first line>`` or ``accepted``."""
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
    return "accepted"


def in_short(message: str) -> str:
    """A fault in a few words."""
    return message.split("\n")[0]


def rule_for(name: str, target: str, mutant: Mutant) -> str | None:
    text = f"{mutant.place} {mutant.change}"
    for case, where, part, rule in REDUNDANT:
        if case in ("", name) and where in ("", target) and part in text:
            return rule
    return None


if __name__ == "__main__":
    import sys, time
    for name, target in SUBJECTS:
        if sys.argv[1:] and name not in sys.argv[1:]: continue
        t = time.time()
        module = scheduled(name, target)
        print("##", name, target)
        for m in protocol_mutants(module):
            print("  ", m.place, "|", m.change, "|", verdict(m, module, target)[:230])
        print(time.time() - t)
