"""Every function of the language on the emulated MI300, and compiled for the other targets."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from amd_programs import compiled, emulate, module_of, scheduled
from language_programs import CASES, Case

from tilewright.backends.nvidia.compile import compile_function as compile_nvidia
from tilewright.ir import interpreter, interpreter_numerics
from tilewright.ir.core import Module
from tilewright.ir.target import get_target
from tilewright.ir.types import ViewType


def module(case: Case, arrays: list[np.ndarray]) -> tuple[Module, dict[str, int]]:
    options = {k: v for k, v in case.meta.items() if k == "num_warps"}
    meta = {k: v for k, v in case.meta.items() if k not in options}
    names = [p.name for p in case.kernel.definition.parameters if p.kind == "tensor"]
    types: dict[str, Any] = {
        name: ViewType((None,) * x.ndim, interpreter_numerics.dtype_of(x), (None,) * (x.ndim - 1) + (1,), x.itemsize)
        for name, x in zip(names, arrays, strict=True)
    }
    return module_of(case.kernel, **types, **meta), options


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_emulated(case: Case):
    arrays = case.arrays()
    built, options = module(case, arrays)
    function = scheduled(built, "gfx942", **options)
    interpreted = [x.copy() for x in arrays]
    interpreter.run(function, interpreted, case.grid)
    case.check(interpreted)
    emulate(compiled(function, "gfx942"), "gfx942", arrays, case.grid)
    case.check(arrays)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=pytest.mark.exhaustive if number % 3 else ())
        for number, case in enumerate(CASES)
    ],
)
def test_compiles_for_hopper(case: Case):
    built, options = module(case, case.arrays())
    result = compile_nvidia(scheduled(built, "sm_90a", **options), get_target("sm_90a"))
    assert result.binary and result.resources.registers <= 255


def test_an_ordered_update_stands_between_barriers_and_fences():
    """All threads' writes, the barrier, one thread's release, update and acquire, the barrier, all threads' reads."""
    case = next(case for case in CASES if case.name == "atomic-arrival")
    built, _ = module(case, case.arrays())
    ptx = compile_nvidia(scheduled(built, "sm_90a"), get_target("sm_90a")).asm["ptx"]
    marks = re.findall(r"bar\.sync|fence\.\w+\.\w+|atom\.\S+|st\.global|ld\.global", ptx)
    update = marks.index("atom.global.add.u32")
    assert marks[update - 1] == marks[update + 1] == "fence.acq_rel.gpu"
    assert marks[update - 2] == marks[update + 2] == "bar.sync"
    assert "st.global" in marks[:update] and "ld.global" in marks[update:]
    built, _ = module(case, case.arrays())
    text = compiled(scheduled(built, "gfx942"), "gfx942").asm["amdgcn"]
    marks = re.findall(r"s_barrier|buffer_wbl2|buffer_inv|global_atomic_add", text)
    update = marks.index("global_atomic_add")
    assert marks[update - 2 : update + 3] == [
        "s_barrier",
        "buffer_wbl2",
        "global_atomic_add",
        "buffer_inv",
        "s_barrier",
    ]
