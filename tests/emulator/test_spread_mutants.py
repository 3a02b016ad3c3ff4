"""What orders the blocks that run one program together: each way to weaken it is noticed by the emulator."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from lowered_kernels import normal, pack_arguments

import tilewright as tw
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.backends.nvidia import compile as nvidia
from tilewright.backends.nvidia import mailboxes
from tilewright.compiler.options import CompileOptions
from tilewright.frontend.build import build_module
from tilewright.ir.target import get_target
from tilewright.ir.types import DTYPES, ViewType
from tilewright.passes.manager import PassContext, PassManager
from tilewright.passes.pipelines import default_pipeline
from tilewright.runtime.emulator.nvidia import EmulatorFault, GlobalMemory, PtxEmulator

CTAS, ROWS, COLUMNS = 2, 5, 64


@tw.kernel
def walk(x: tw.Tensor, y: tw.Tensor, *, BM: tw.constexpr = 1):
    """Divides rows by their sums, one tile after the other."""
    for m in tw.range(tw.cdiv(x.shape[0], BM)):
        row = tw.load(x, (m, 0), (BM, 64))
        tw.store(y, (m, 0), row / tw.sum(row, axis=1)[:, None])


def run(kernel: Any, warps: int, changes: dict[str, str], seed: int | None = None, rows: int = 1) -> None:
    """Compile, replace text of the PTX, emulate and check."""
    view, target = ViewType((None, None), DTYPES["f32"], (None, 1), 16), get_target("sm_90a")
    module = build_module(kernel.definition, {"x": view, "y": view, "BM": rows})
    options = CompileOptions(num_ctas=CTAS, num_warps=warps).pass_options()
    function = PassManager(default_pipeline(target), PassContext(target, options)).run(module).functions[0]
    result = nvidia.compile_function(function, target)
    text = result.asm["ptx"]
    for old, new in changes.items():
        assert old in text, f"the kernel has no {old}"
        text = text.replace(old, new)
    memory, x, y = GlobalMemory(), normal(ROWS, COLUMNS) + 3, np.zeros((ROWS, COLUMNS), np.float32)
    places = {"x": memory.allocate(x, "x"), "y": memory.allocate(y, "y")}
    arguments = pack_arguments(result.abi, places, {"x": x, "y": y}, (1, 1, 1))
    launch = partial(PtxEmulator(text, result.abi.name).launch, shared_bytes=result.abi.shared_bytes)
    launch(memory, result.abi.direct_blocks((1, 1, 1)), (result.abi.threads,), arguments, races=True, seed=seed)
    got = memory.read_back(places["y"]).view(np.float32).reshape(y.shape)
    np.testing.assert_allclose(got, x / x.sum(1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize(("warps", "rows"), [(1, 1), (2, 1), (4, 4)])
def test_unchanged(seed: int | None, warps: int, rows: int) -> None:
    run(walk, warps, {}, seed, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [": "setp.eq.u32 done, 0, 0; // ["},
         "copy in flight writes|never written"),
        ({"mbarrier.try_wait.parity.acquire.cluster": "mbarrier.try_wait.parity.relaxed.cluster"}, "race: reads"),
        ({"barrier.cluster.wait.acquire;": ""}, "initialised"),
        ({"barrier.cluster.arrive.relaxed;": "", "barrier.cluster.wait.acquire;": ""}, "initialised"),
    ],
)  # fmt: skip
def test_waits_that_are_missing(change: dict[str, str], message: str) -> None:
    with pytest.raises(EmulatorFault, match=message):
        run(walk, 2, change)


def test_threads_that_do_not_meet_before_they_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane that has not read yet might find the values of the use after the next."""
    monkeypatch.setattr(mailboxes._Use, "meet", lambda use: None)
    with pytest.raises(EmulatorFault, match=r"race: writes (?s:.*) read and nothing orders the two"):
        run(walk, 1, {})


def test_one_slot_does_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others may be one use ahead of a block that still reads."""
    begin = mailboxes._Use.__init__

    def single(use: Any, lw: Any, op: Any) -> None:
        begin(use, lw, op)
        box, fb, count = use.box, lw.fb, lw.scalar(op.count)
        use.parity: mlir.Value = fb.and_(count, 1)
        use.barrier, use.slot = box.base, fb.add(box.base, mailboxes.MAILBOX_BARRIERS)

    monkeypatch.setattr(mailboxes._Use, "__init__", single)
    with pytest.raises(EmulatorFault, match=r"race: writes (?s:.*) and nothing orders the two"):
        run(walk, 2, {})
