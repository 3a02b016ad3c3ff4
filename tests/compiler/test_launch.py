"""Launches on the CPU: arrays of all kinds, grids, plans that are reused, errors that name the parameter."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from compiler_programs import add, count, gemm, scale

import tilewright as tw
from tilewright.compiler.launch import repeat_key


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def poisoned(*shape, dtype="f4"):
    return np.full(shape, np.nan, dtype)


# --- arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f2", "f4", ml_dtypes.bfloat16])
def test_numpy(rng, dtype):
    x = rng.standard_normal(300).astype(dtype)
    y = poisoned(300, dtype=dtype)
    scale[tw.cdiv(300, 128)](x, y, 2.0)
    np.testing.assert_array_equal(y, (x.astype("f4") * 2).astype(dtype))


VIEWS = {
    "contiguous": lambda a: a,
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
    "every second column": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "every second row": lambda a: np.repeat(a, 2, axis=0)[::2],
    "offset by one element": lambda a: np.pad(a, ((1, 0), (1, 0)))[1:, 1:],
    "reversed": lambda a: a[::-1].copy()[::-1],
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_strided_arrays(rng, kind):
    x, y = VIEWS[kind](rng.standard_normal((70, 90)).astype("f4")), rng.standard_normal((70, 90)).astype("f4")
    out = np.asarray(VIEWS["offset by one element"](poisoned(70, 90)))
    add[3, 2](x, y, out)
    np.testing.assert_array_equal(out, x + y)


def test_writes_only_inside_a_view():
    frame = np.zeros((100, 100), "f4")
    ones = np.ones((40, 50), "f4")
    add[2, 1](ones, ones, frame[10:50, 20:70])
    assert frame.sum() == 2 * ones.size
    assert (frame[10:50, 20:70] == 2).all()


def test_torch(rng):
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.from_numpy(rng.standard_normal(300).astype("f4")).to(dtype)
        y = torch.full((600,), float("nan"), dtype=dtype)[::2]
        scale[3](x, y, 3.0)
        assert torch.equal(y, (x.float() * 3).to(dtype)), dtype


def test_torch_transposed_and_mixed_with_numpy(rng):
    torch = pytest.importorskip("torch")
    a = torch.from_numpy(rng.standard_normal((100, 80)).astype("f4")).T
    b = rng.standard_normal((100, 60)).astype("f4")
    c = poisoned(80, 60)
    gemm[1, 1](a, b, c)
    np.testing.assert_allclose(c, a.numpy().astype("f8") @ b.astype("f8"), atol=1e-4)


def test_torch_parameter_that_requires_a_gradient():
    torch = pytest.importorskip("torch")
    y = torch.zeros(128)
    scale[1](torch.nn.Parameter(torch.ones(128)), y, 5.0)
    assert (y == 5).all()


def test_empty_arrays_and_empty_grids():
    scale[0](np.zeros(0, "f4"), np.zeros(0, "f4"), 1.0)
    scale[1](np.zeros(0, "f4"), np.zeros(0, "f4"), 1.0)


# --- grids ------------------------------------------------------------------------------------------


GRIDS = [3, (3,), [3], (3, 1), (3, 1, 1), np.int64(3), lambda meta: (tw.cdiv(300, meta["B"]),), lambda meta: 3]


@pytest.mark.parametrize("grid", GRIDS)
def test_grids(grid):
    x, y = np.ones(300, "f4"), poisoned(300)
    scale[grid](x, y, 2.0)
    assert (y == 2).all()


def test_a_grid_function_sees_defaults_and_given_values():
    seen = []
    x, y = np.ones(64, "f4"), poisoned(64)
    scale[lambda meta: seen.append(dict(meta)) or 2](x, y, 1.0, B=32)
    scale[lambda meta: seen.append(dict(meta)) or 1](x, y, 1.0)
    assert seen == [{"B": 32}, {"B": 128}]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (2.5, "got 2.5"),
        ((1, 1, 1, 1), "one to three dimensions, got 4"),
        ((), "one to three dimensions, got 0"),
        (-1, "negative"),
        (lambda meta: meta["BM"], "asks for 'BM'.*\n.*B"),
    ],
)
def test_bad_grids(grid, message):
    with pytest.raises(tw.ArgumentError, match=message):
        scale[grid](np.ones(3, "f4"), np.ones(3, "f4"), 1.0)


def test_a_kernel_without_a_grid():
    with pytest.raises(TypeError, match=r"scale\[grid\]"):
        scale(np.ones(3, "f4"), np.ones(3, "f4"), 1.0)


# --- plans ------------------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    """A kernel without plans, and how many it has."""
    from tilewright.compiler.kernel import Kernel

    return Kernel(scale.definition.fn)


def test_arguments_of_the_same_kinds_share_a_plan(fresh):
    for factor in (1.0, 2.5, -3.0):
        x, y = np.arange(128, dtype="f4"), poisoned(128)
        fresh[1](x, y, factor)
        np.testing.assert_array_equal(y, x * np.float32(factor))
    assert len(fresh.plans) == 1


def test_new_kinds_make_new_plans_and_share_what_is_compiled(fresh):
    for n in (100, 200, 300):
        x, y = np.ones(n, "f4"), poisoned(n)
        fresh[3](x, y, 2.0)
        assert (y == 2).all()
    assert len(fresh.plans) == 3
    assert len(fresh._functions) <= 2  # by alignment


def test_a_constexpr_recompiles(fresh):
    for b in (32, 64):
        x, y = np.ones(128, "f4"), poisoned(128)
        fresh[lambda meta: 128 // meta["B"]](x, y, 2.0, B=b)
        assert (y == 2).all()
    assert len(fresh.plans) == len(fresh._functions) == 2


def test_equal_constexprs_of_different_types_are_different():
    scale[1](np.ones(32, "f4"), np.ones(32, "f4"), 1.0, B=32)
    with pytest.raises(tw.CompileError, match="compile-time float"):
        scale[1](np.ones(32, "f4"), np.ones(32, "f4"), 1.0, B=32.0)  # equals 32: must not be taken for its plan


def test_integers_are_checked_on_every_launch():
    out = np.zeros(16, "i4")
    count[1](out, 100)
    assert (out == 101).all()
    with pytest.raises(tw.ArgumentError, match="'start'.*300"):
        count[1](out, 300)
    count[1](out, -100)
    assert (out == -99).all()


def test_floats_are_checked_on_every_launch():
    x, y = np.ones(128, "f4"), poisoned(128)
    for factor in (3e38, float("inf"), -3e38):
        scale[1](x, y, factor)
        assert (y == np.float32(factor)).all()
    for factor in (1e300, -1e300, np.float64(3.5e38)):
        with pytest.raises(tw.ArgumentError, match="'factor': .* is no f32"):
            scale[1](x, y, factor)


def test_scalars_of_many_kinds():
    for factor in (2, 2.0, np.float32(2), np.float64(2), np.int64(2)):
        y = poisoned(128)
        scale[1](np.ones(128, "f4"), y, factor)
        assert (y == 2).all()


def test_arguments_by_name_in_any_order():
    x, y = np.ones(128, "f4"), poisoned(128)
    scale[1](factor=2.0, y=y, x=x)
    assert (y == 2).all()


def test_options_are_accepted_and_checked():
    x, y = np.ones(128, "f4"), poisoned(128)
    scale[1](x, y, 2.0, num_warps=8, num_stages=3)
    assert (y == 2).all()
    for options, message in [
        ({"num_warps": 0}, "num_warps must be a positive integer, got 0"),
        ({"num_stages": "3"}, "num_stages must be a positive integer"),
        ({"num_warp": 4}, "no parameter 'num_warp'(.|\n)*did you mean 'num_warps'"),
        ({"schedule": "fast"}, "unknown schedule 'fast'"),
        ({"num_ctas": 3}, "num_ctas=3: a cluster has 1, 2, 4 or 8 blocks"),
        ({"maxnreg": 0}, "maxnreg must be a positive integer, got 0"),
        ({"persistent": 1}, "persistent must be True or False, got 1"),
    ]:
        with pytest.raises(tw.ArgumentError, match=message):
            scale[1](x, y, 2.0, **options)


def test_a_parameter_cannot_be_called_like_an_option():
    @tw.kernel
    def clash(x: tw.Tensor, stream: tw.constexpr = 1):
        tw.store(x, (0,), tw.zeros((16,), tw.float32))

    with pytest.raises(tw.CompileError, match="cannot have a parameter 'stream'"):
        clash[1](np.zeros(16, "f4"))


# --- errors -----------------------------------------------------------------------------------------

X, Y = np.ones(128, "f4"), np.ones(128, "f4")


@pytest.mark.parametrize(
    ("args", "meta", "message"),
    [
        ((X, Y), {}, "missing scalar 'factor'"),
        ((X,), {"factor": 1.0}, "missing tensor 'y'"),
        ((X, Y, 1.0, 2), {}, "takes 3 positional arguments, got 4"),
        ((X, Y, 1.0), {"y": Y}, "'y' is given twice"),
        ((X, Y, "1"), {}, "'factor' must be a scalar, got str"),
        ((X, [1.0], 1.0), {}, "'y' must be a tensor, got list"),
        ((X, Y, 1.0), {"BB": 3}, "no parameter 'BB'"),
        ((X, Y, 1.0), {"B": {}}, "'B' is not hashable"),
        ((X.astype("u2"), Y, 1.0), {}, "'x'.*uint16"),
        ((X.astype(">f4"), Y, 1.0), {}, "'x'.*>f4"),
        ((X, np.ones((), "f4"), 1.0), {}, "'y' is a tensor of rank 0"),
    ],
)
def test_errors_name_the_parameter(args, meta, message):
    with pytest.raises(tw.ArgumentError, match=message):
        scale[1](*args, **meta)


def test_an_error_while_running_shows_the_line():
    frozen = np.ones(128, "f4")
    frozen.flags.writeable = False
    with pytest.raises(
        tw.CompileError, match=r"compiler_programs\.py:\d+:\d+: error: .*read-only(.|\n)*tw\.store\(y(.|\n)*\^"
    ):
        scale[1](X, frozen, 1.0)


def test_meta_and_cuda_tensors_do_not_run_on_the_cpu():
    torch = pytest.importorskip("torch")
    with pytest.raises(tw.ArgumentError, match="'x' is on meta"):
        scale[1](torch.empty(128, device="meta"), torch.zeros(128), 1.0)


def test_devices():
    y = poisoned(128)
    tw.device("cpu").launch(scale, 1, X, y, 2.0)
    tw.device("cpu").synchronize()
    assert (y == 2).all()
    assert "cpu" in [d.name for d in tw.devices()]
    with pytest.raises(tw.DeviceError, match="'moon'"):
        tw.device("moon")


def test_interpreting_is_chosen_at_each_launch(monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_INTERPRET", "1")
    y = poisoned(128)
    scale[1](X, y, 2.0)
    assert (y == 2).all()
    monkeypatch.setenv("TILEWRIGHT_INTERPRET", "perhaps")
    with pytest.raises(ValueError, match="TILEWRIGHT_INTERPRET='perhaps': expected 0 or 1"):
        scale[1](X, y, 2.0)


def test_repeated_launches_are_told_apart_by_all_that_they_depend_on() -> None:
    torch = pytest.importorskip("torch")
    a, b = torch.zeros(4, 4), torch.zeros(4, 4)
    keys = [
        repeat_key((1,), None, (a, 1), {}),
        repeat_key((2,), None, (a, 1), {}),
        repeat_key((1,), "cuda:0", (a, 1), {}),
        repeat_key((1,), None, (a, 1.0), {}),
        repeat_key((1,), None, (a, True), {}),
        repeat_key((1,), None, (b, 1), {}),
        repeat_key((1,), None, (a.T, 1), {}),
        repeat_key((1,), None, (a[:2], 1), {}),
        repeat_key((1,), None, (a.view(torch.int32), 1), {}),
        repeat_key((1,), None, (a, 0.0), {}),
        repeat_key((1,), None, (a, -0.0), {}),
        repeat_key((1,), None, (a,), {"n": 1}),
        repeat_key((1,), None, (a, None), {}),
        repeat_key((1,), None, (a,), {"n": None}),
        repeat_key((1,), None, (a,), {"n": pytest.importorskip}),
        repeat_key((1,), None, (a,), {"n": repeat_key}),
        repeat_key((1,), None, (a,), {"n": (pytest.importorskip, repeat_key)}),
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert repeat_key((1,), None, (a, 1), {}) == keys[0]
    assert repeat_key(lambda meta: 1, None, (a,), {}) is None
    assert repeat_key((1,), None, (np.zeros(3),), {}) is None
    assert repeat_key((1,), None, (a, "text"), {}) is None
    assert repeat_key((1,), None, (a,), {"n": (1, True)}) is None
