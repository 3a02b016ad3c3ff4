"""Parameters, launch arguments, and the fingerprint that a cache is keyed by."""

from __future__ import annotations

import types

import numpy as np
import pytest

import tilewright.frontend.language as tw
from tilewright.frontend.arguments import bind_arguments
from tilewright.frontend.build import build_module
from tilewright.frontend.definition import FunctionDefinition, KernelDefinition, as_kernel
from tilewright.frontend.errors import ArgumentError, CompileError

BLOCK = 16
CONFIG = types.SimpleNamespace(depth=2, name="x")


@tw.function
def helper(x):
    return x * BLOCK


@KernelDefinition
def kernel(a: tw.Tensor, b, n, scale: tw.float32 = 1.0, *, flag: tw.bool = False, B: tw.constexpr, D: tw.constexpr = 4):
    tw.store(a, 0, helper(tw.load(a, 0, CONFIG.depth)))


def test_parameters():
    kinds = {p.name: (p.kind, p.dtype, p.required) for p in kernel.parameters}
    assert kinds == {
        "a": ("tensor", None, True),
        "b": ("plain", None, True),
        "n": ("plain", None, True),
        "scale": ("scalar", tw.float32, False),
        "flag": ("scalar", tw.bool, False),
        "B": ("constexpr", None, True),
        "D": ("constexpr", None, False),
    }
    assert kernel.parameter["B"].keyword_only
    assert kernel.first_line == kernel.fn.__code__.co_firstlineno
    assert kernel.source.startswith("@KernelDefinition\ndef kernel(")
    assert kernel.__name__ == "kernel"


def test_bind_sorts_arguments():
    a, b = np.zeros(4, "float32"), np.zeros((2, 2), "float16")
    bound = bind_arguments(kernel, (a, b, 3), {"B": [1, 2], "scale": 2})
    assert bound.tensors.keys() == {"a", "b"}
    assert bound.tensors["a"] is a
    assert bound.scalars == {"n": 3, "scale": 2.0, "flag": False}
    assert bound.dtypes == {"n": tw.int32, "scale": tw.float32, "flag": tw.bool}
    assert bound.constexprs == {"B": (1, 2), "D": 4}


def test_bind_scalar_dtypes():
    def dtype(value):
        return bind_arguments(kernel, (np.zeros(1), value, 0), {"B": 1}).dtypes["b"]

    assert dtype(1) == tw.int32
    assert dtype(2**31) == tw.int64
    assert dtype(1.5) == tw.float32
    assert dtype(True) == tw.bool
    assert dtype(np.float64(1)) == tw.float64
    assert dtype(np.int8(1)) == tw.int8


def test_none_is_a_compile_time_value():
    bound = bind_arguments(kernel, (np.zeros(1), None, 0), {"B": 1})
    assert bound.constexprs["b"] is None
    assert "b" not in bound.tensors


A = np.zeros(4, "float32")
BAD = [
    ((), {}, "missing tensor 'a'", ""),
    ((A, 1, 2), {}, "missing constexpr 'B'", ""),
    ((A, 1, 2), {"B": 1, "E": 2}, "has no parameter 'E'", "did you mean|parameters"),
    ((A, 1, 2), {"B": 1, "falg": True}, "has no parameter 'falg'", "did you mean 'flag'"),
    ((A, 1, 2), {"B": 1, "a": A}, "argument 'a' is given twice", ""),
    ((A, 1, 2, 3.0, True), {"B": 1}, "takes 4 positional arguments, got 5", "a, b, n, scale"),
    ((3, 1, 2), {"B": 1}, "argument 'a' must be a tensor, got int", "NumPy"),
    ((np.zeros(()), 1, 2), {"B": 1}, "argument 'a' is a tensor of rank 0", ""),
    ((A, "x", 2), {"B": 1}, "argument 'b' must be a tensor or scalar, got str", "tw.constexpr"),
    ((A, 1, 2, "x"), {"B": 1}, "argument 'scale' must be a scalar, got str", ""),
    ((A, 1, 2), {"B": 1, "flag": 3}, "argument 'flag' is tw.bool, and 3 does not fit", ""),
    ((A, 1, 2**70), {"B": 1}, f"argument 'n' is {2**70}, which no integer dtype holds", ""),
    ((A, 1, 2), {"B": A}, "argument 'B' is a tensor, but the parameter is a tw.constexpr", "tw.Tensor"),
    ((A, 1, 2), {"B": {}}, "argument 'B' is not hashable", ""),
]


@pytest.mark.parametrize(("args", "kwargs", "message", "hint"), BAD)
def test_bind_errors(args, kwargs, message, hint):
    with pytest.raises(ArgumentError, match=hint or None) as caught:
        bind_arguments(kernel, args, kwargs)
    assert message in caught.value.message
    assert caught.value.loc.file == __file__
    assert isinstance(caught.value, TypeError)


def test_build_errors(view):
    for args, message in [
        ({}, "parameter 'a' is missing"),
        ({"a": 3}, "parameter 'a' needs a ViewType, got 3"),
        ({"z": 3}, "has no parameter 'z'"),
        ({"a": view("f32", 4), "b": "text"}, "parameter 'b' needs a ViewType or a DType"),
        ({"a": view("f32", 4), "b": None, "n": None, "scale": tw.float64}, "'scale' is tw.float32, got tw.float64"),
    ]:
        with pytest.raises(ArgumentError) as caught:
            build_module(kernel, args)
        assert message in caught.value.message


def test_bad_annotations():
    def text(x: str): ...

    def unknown(x: nothing): ...  # noqa: F821

    def stars(*xs): ...

    for fn, message in [
        (text, "an annotation that means nothing here"),
        (unknown, "cannot evaluate the annotation of parameter 'x'"),
        (stars, "cannot take *xs"),
    ]:
        with pytest.raises(CompileError) as caught:
            KernelDefinition(fn).parameters  # noqa: B018
        assert message in caught.value.message


def test_source_must_exist():
    namespace: dict = {}
    exec("def made(x): pass", namespace)
    with pytest.raises(CompileError, match="source of kernel 'made' is not available"):
        KernelDefinition(namespace["made"]).tree  # noqa: B018


def test_dependencies(monkeypatch):
    found = kernel.dependencies()
    assert [d.name for d in found.functions.values()] == ["kernel", "helper"]
    assert found.constants["helper.BLOCK"] == 16
    assert found.constants["kernel.CONFIG.depth"] == 2
    before = kernel.fingerprint()
    assert before == kernel.fingerprint()
    monkeypatch.setitem(globals(), "BLOCK", 32)
    changed = kernel.fingerprint()
    assert changed != before
    monkeypatch.setattr(CONFIG, "name", "y")
    assert kernel.fingerprint() == changed
    monkeypatch.setattr(CONFIG, "depth", 3)
    assert kernel.fingerprint() != changed


def test_fingerprint_covers_closures_and_defaults():
    def make(factor, default):
        def scaled(x: tw.float32, y: tw.Tensor, N: tw.constexpr = default):
            tw.store(y, 0, x * factor)

        return KernelDefinition(scaled)

    prints = {make(f, d).fingerprint() for f in (2, 2.0, 3) for d in (helper, None)}
    assert len(prints) == 6


def test_constexpr_outside_kernels():
    assert tw.constexpr(5) == 5
    assert isinstance(helper, FunctionDefinition)
    with pytest.raises(RuntimeError, match="only works inside"):
        helper(3)
    wrapper = types.SimpleNamespace(definition=kernel)
    assert as_kernel(wrapper) is kernel
    assert as_kernel(3) is None


def test_captured_builtins_and_functions_are_part_of_the_fingerprint() -> None:
    import math

    def make(function, constant):
        def kernel(x: tw.Tensor):
            tw.store(x, (0,), function(tw.load(x, (0,), (constant(4.0),))))

        return KernelDefinition(kernel).fingerprint()

    prints = {make(f, c) for f in (tw.exp, tw.log) for c in (math.sqrt, math.floor)}
    assert len(prints) == 4
    assert make(tw.exp, math.sqrt) in prints
