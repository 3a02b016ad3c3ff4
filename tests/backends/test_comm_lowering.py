"""The instructions that communication becomes."""

from __future__ import annotations

import re
from functools import cache

import pytest

import tilewright as tw
from tests.support import comm_kernels

SPECS = {
    "all_reduce": {
        "x": tw.spec("f32", ("M", "N"), align=16), "y": tw.spec("f32", ("M", "N"), align=16),
        "slots": tw.spec("f32", ("W", "M", "N"), align=16), "flags": tw.spec("i32", ("W", "M"), align=4), "N": 256,
    },
    "add_to_first": {
        "x": tw.spec("bf16", ("M", "N"), align=16), "y": tw.spec("bf16", ("M", "N"), align=16),
        "total": tw.spec("bf16", ("M", "N"), align=16), "flags": tw.spec("i32", ("W",), align=4), "M": 8, "N": 64,
    },
    "gemm_reduce_scatter": {
        "a": tw.spec("bf16", ("M", "K"), align=16), "b": tw.spec("bf16", ("K", "N"), align=16),
        "c": tw.spec("bf16", ("m", "N"), align=16), "parts": tw.spec("bf16", ("W", "m", "N"), align=16),
        "flags": tw.spec("i32", ("W", "m", "n"), align=4), "BM": 128, "BN": 128, "BK": 64,
    },
}  # fmt: skip


@cache
def artifact(name: str, target: str) -> tw.Artifact:
    return tw.compile(getattr(comm_kernels, name), target=target, args=SPECS[name])


def text(name: str, target: str) -> str:
    return artifact(name, target).asm["ptx" if target.startswith("sm") else "amdgcn"]


@pytest.mark.parametrize("name", ["all_reduce", "gemm_reduce_scatter"])
def test_warps_wait_together(name: str) -> None:
    """A loop that lanes leave one by one would cost the wgmmas of the kernel their uniform registers."""
    ptx = text(name, "sm_90a")
    polls = ptx.count("nanosleep")
    assert polls >= 2 and ptx.count("vote.sync.all") >= 3 * polls
    assert "ld.acquire.sys" in ptx, "which costs less than a fence behind a relaxed load"


def test_signals_release_to_the_system() -> None:
    assert re.search(r"st\.release\.sys\.global\.b32", text("all_reduce", "sm_90a"))
    assert "\tred." not in text("all_reduce", "sm_90a"), "flags are set, not counted"


def test_additions_are_atomic_among_gpus() -> None:
    assert "red.relaxed.sys.global.add.noftz.bf16" in text("add_to_first", "sm_90a")
    assert "red.relaxed.gpu" not in text("add_to_first", "sm_90a")


def test_puts_leave_by_the_peers_tensor_maps() -> None:
    abi = artifact("gemm_reduce_scatter", "sm_90a").abi
    assert abi.communicates and [p.name for p in abi.params if getattr(p, "symmetric", False)] == ["parts", "flags"]
    assert [(m.param, m.peers) for m in abi.tensor_maps] == [("a", False), ("b", False), ("parts", True), ("c", False)]
    ptx = text("gemm_reduce_scatter", "sm_90a")
    assert "fence.proxy.async.global" in ptx and "cp.async.bulk.wait_group 0" in ptx


def test_releases_on_amd_wait_for_the_write_back() -> None:
    """LLVM leaves the wait out where no other access is under way; then the flag might overtake the data."""
    lines = [line.strip() for line in text("all_reduce", "gfx942").splitlines()]
    lines = [line for line in lines if line and not line.startswith((";", "."))]
    places = [n for n, line in enumerate(lines) if line.startswith("buffer_wbl2 sc0 sc1")]
    assert places
    for place in places:
        assert lines[place + 1].startswith("s_waitcnt vmcnt(0)"), lines[place : place + 3]
