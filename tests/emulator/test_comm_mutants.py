"""What orders ranks below the IR: each way to weaken an instruction of signals, waits and puts is noticed on two ranks.

The rest of the mutation proof, of what the passes emit, is in `tests/passes/test_check_protocol.py`. What credits and
exits order are accesses of other launches, which are over when the emulator begins one; their instructions are those of
signals and waits.
"""

from __future__ import annotations

import re

import pytest

import tilewright as tw
from tests.emulator import test_comm_kernels as kernels
from tilewright.runtime.emulated import EmulatedDevice, EmulatedModule


def reduce_scatter(target: str, seed: int | None) -> None:
    kernels.test_gemm_reduce_scatter(target, 2, seed)


def all_reduce(target: str, seed: int | None) -> None:
    kernels.test_all_reduce(target, 2, seed)


def gather(target: str, seed: int | None) -> None:
    kernels.test_all_gather_gemm(target, seed, False)


#: what is done to every such instruction of a kernel: (kernel, target, pattern, replacement)
MUTANTS = {
    "signal among one GPU": (all_reduce, "sm_90a", r"st\.release\.sys", "st.release.gpu"),
    "signal without order": (all_reduce, "sm_90a", r"st\.release\.sys", "st.relaxed.sys"),
    "wait among one GPU": (all_reduce, "sm_90a", r"ld\.acquire\.sys", "ld.acquire.gpu"),
    "wait without order": (all_reduce, "sm_90a", r"ld\.acquire\.sys", "ld.relaxed.sys"),
    "fence among one GPU": (gather, "sm_90a", r"fence\.acq_rel\.sys", "fence.acq_rel.gpu"),
    "no fence": (gather, "sm_90a", r"fence\.acq_rel\.sys;", ""),
    "puts not waited for": (reduce_scatter, "sm_90a", r"cp\.async\.bulk\.wait_group 0;", ""),
    "puts waited for as reads": (
        reduce_scatter, "sm_90a", r"cp\.async\.bulk\.wait_group 0;", "cp.async.bulk.wait_group.read 0;"
    ),
    "no proxy fence": (gather, "sm_90a", r"fence\.proxy\.async\.global;", ""),
    "AMD: no write-back": (all_reduce, "gfx942", r"buffer_wbl2 sc0 sc1", "s_nop 0"),
    "AMD: no invalidation": (all_reduce, "gfx942", r"buffer_inv sc0 sc1", "s_nop 0"),
}  # fmt: skip


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What to replace in assembly before it is emulated."""
    changes: list[tuple[str, str]] = []
    load = EmulatedModule.__init__

    def changed(self: EmulatedModule, device: EmulatedDevice, asm: str, _: bytes) -> None:
        for pattern, replacement in changes:
            asm, count = re.subn(pattern, replacement, asm)
            assert count, f"the kernel has no {pattern}"
        load(self, device, asm)  # the binary, if one is looked at, is that of other assembly

    monkeypatch.setattr(EmulatedModule, "__init__", changed)
    return changes


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_rejected(name: str, change: list[tuple[str, str]]) -> None:
    run, target, pattern, replacement = MUTANTS[name]
    change.append((pattern, replacement))
    with pytest.raises(tw.DeviceError, match=r"race: (reads|writes)|no fence\.proxy\.async|copy still reads"):
        run(target, None)


@pytest.mark.parametrize("run", [all_reduce, reduce_scatter, gather])
def test_the_same_unchanged(run: object, change: list[tuple[str, str]]) -> None:
    run("sm_90a", None)  # type: ignore[operator]
