"""Random tile programs: every pass of every pipeline keeps their bits, and compiled code agrees with them."""

from __future__ import annotations

import numpy as np
import pytest
from amd_programs import compiled, emulate, scheduled
from hypothesis import HealthCheck, given, settings
from random_tiles import GRID, PARAMETERS, arrays, definition, tile_programs

from tilewright.frontend.build import build_module
from tilewright.ir.core import Function, Module
from tilewright.ir.interpreter import run
from tilewright.ir.parser import parse_module
from tilewright.ir.printer import print_module
from tilewright.ir.target import get_target
from tilewright.ir.types import DTYPES, ViewType
from tilewright.ir.verifier import verify
from tilewright.passes.manager import PassContext, parse_pipeline
from tilewright.passes.pipelines import default_pipeline

SETTINGS = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def module(text: str, align: int = 16) -> Module:
    views = {
        name: ViewType((None,) * rank, DTYPES[dtype], (*[None] * (rank - 1), 1), align)
        for name, (dtype, rank) in PARAMETERS.items()
    }
    return build_module(definition(text), views)


def execute(function: Function) -> dict[str, np.ndarray]:
    values = arrays()
    blocks = {"blocks": 2} if function.attributes.get("persistent") else {}
    run(function, values, GRID, **blocks)
    return values


def assert_same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray], message: str) -> None:
    for name, array in got.items():  # NaN equals NaN, and 0.0 is not -0.0
        same = (array == wanted[name]) & (np.signbit(array) == np.signbit(wanted[name]))
        assert (same | ((array != array) & (wanted[name] != wanted[name]))).all(), f"{message}: {name} differs"


@pytest.mark.parametrize("target", ["sm_90a", "gfx942"])
@settings(max_examples=50, **SETTINGS)
@given(text=tile_programs())
def test_every_pass_keeps_the_bits(target: str, text: str):
    built = module(text)
    verify(built)
    expected = execute(built.functions[0])
    context = PassContext(get_target(target))
    before = print_module(built)
    for pass_ in parse_pipeline(default_pipeline(context.target)):
        pass_.run(built, context)
        verify(built)
        after = print_module(built)
        if after != before:
            assert print_module(parse_module(after)) == after
            assert_same(execute(built.functions[0]), expected, f"after {pass_}")
        before = after


@settings(max_examples=30, **SETTINGS)
@given(text=tile_programs(exact=True, with_dots=False))
def test_compiled_integers_are_exact(text: str):
    function = scheduled(module(text, align=4), "gfx942")
    got = arrays()
    emulate(compiled(function, "gfx942"), "gfx942", list(got.values()), GRID)
    assert_same(got, execute(function), "on the emulator")
