"""Gradients of attention with masks, biases, soft caps and packed sequences: the interpreter and emulated Hopper."""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kernel_checks import check, normal, poisoned

import tilewright as tw
from tilewright.compiler.kernel import Kernel
from tilewright.kernels import attention_backward, attention_bias_gradient
from tilewright.kernels.attention import reference as forward
from tilewright.kernels.attention import sdpa
from tilewright.kernels.attention_backward import every_gradient, sdpa_backward, varlen_backward

HOPPER = "emulate:sm_90a,races"


class On:
    """A kernel that is launched on a device by name."""

    def __init__(self, kernel: Any, device: str) -> None:
        self.kernel, self.device = kernel, device

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(tw.device(self.device).launch, self.kernel, grid)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every kernel of the backward pass runs there."""
    for module in (attention_backward, attention_bias_gradient):
        for name, value in list(vars(module).items()):
            if isinstance(value, Kernel):
                monkeypatch.setattr(module, name, On(value, request.param))
    return str(request.param)


def arrays(
    shape: tuple[int, ...], bias: tuple[int, ...] | None = None, mask: bool = False, **options: Any
) -> tuple[Any, ...]:
    """q, k, v, o, do, lse for (B, H, G, M, N, D, DV), and the options with arrays in them."""
    b, h, g, m, n, d, dv = shape
    shapes = (b, h, m, d), (b, g, n, d), (b, g, n, dv), (b, h, m, dv)
    q, k, v, do = (normal(*s, dtype="bf16", seed=i) for i, s in enumerate(shapes))
    if options.get("lengths") is not None:
        options["lengths"] = np.array(options["lengths"], np.int32)
    if bias is not None:
        options["bias"] = np.broadcast_to(normal(*bias, dtype="bf16", seed=9), (b, h, m, n))
    if mask:
        options["bias"] = np.random.default_rng(7).random((b, 1, m, n)) < 0.7
        options["bias"] = np.broadcast_to(options["bias"], (b, h, m, n))
    o, lse = forward(q, k, v, **options)
    return (q, k, v, o.astype(q.dtype), do, lse.astype(np.float32)), options


CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 2, 1, 70, 150, 64, 64), {"lengths": [100, 0]}),
    ((1, 1, 1, 150, 150, 64, 64), {"causal": True, "left": 20, "cap": 2.0}),
    ((2, 2, 1, 70, 150, 64, 64), {"bias": (2, 2, 70, 150), "lengths": [150, 30]}),
    ((2, 2, 2, 70, 100, 64, 64), {"bias": (1, 2, 70, 100)}),
    ((1, 2, 1, 70, 70, 64, 64), {"bias": (1, 1, 1, 70), "causal": True, "cap": 3.0}),
    ((1, 2, 1, 100, 130, 128, 128), {"mask": True, "causal": True}),
    ((1, 1, 1, 70, 100, 96, 96), {"causal": True, "cap": 5.0}),
    ((1, 1, 1, 70, 100, 192, 128), {"lengths": [77], "left": 60}),
    ((1, 1, 1, 40, 70, 256, 256), {"bias": (1, 1, 40, 70), "causal": True}),
]


#: on the interpreter all cases; emulated, which is slow, the default way to sum, with every option and width of tiles
RUNS = [("cpu", *case, deterministic) for case in CASES for deterministic in (True, False)]
RUNS += [(HOPPER, *CASES[i], True) for i in (0, 1, 3, 5, 7)]


@pytest.mark.parametrize(("device", "shape", "options", "deterministic"), RUNS, indirect=["device"])
def test_gradients(device: str, shape: tuple[int, ...], options: dict[str, Any], deterministic: bool) -> None:
    given, named = arrays(shape, **options)
    q, k, v, _, do, _ = given
    results = [poisoned(*x.shape, dtype="bf16") for x in (q, k, v)]
    dbias = poisoned(*options["bias"]) if "bias" in options else None
    sdpa_backward(*given, *results, dbias=dbias, deterministic=deterministic, **named)
    *wanted, wanted_bias = every_gradient(q, k, v, do, **named)
    for actual, exact in zip(results, wanted, strict=True):
        check(actual, exact, "bf16")
    if dbias is not None:
        shared = tuple(axis for axis, size in enumerate(dbias.shape) if size == 1)
        check(dbias, wanted_bias.sum(shared, keepdims=True), "bf16")
    if "lengths" in options:
        assert not results[1][0, :, options["lengths"][0] :].any(), "keys that do not exist have gradients"


def packed(rows: list[int], keys: list[int], heads: int, groups: int, **options: Any) -> dict[str, Any]:
    """Arguments of `varlen_backward`, rows at both ends belonging to no sequence, and what must come out."""
    d, ahead, spare = 64, 3, 5
    q_starts, k_starts = (np.cumsum([ahead, *n]).astype(np.int32) for n in (rows, keys))
    q, do = (normal(q_starts[-1] + spare, heads, d, dtype="bf16", seed=s) for s in (0, 1))
    k, v = (normal(k_starts[-1] + spare, groups, d, dtype="bf16", seed=s) for s in (2, 3))
    for nobodys in (slice(ahead), slice(k_starts[-1], None)):
        k[nobodys] = v[nobodys] = 1e4  # no bound of a gradient knows them
    o, lse = np.zeros_like(q), np.zeros((heads, len(q)), np.float32)
    wanted = [np.full(x.shape, np.nan) for x in (q, k, v)]
    for i in range(len(rows)):
        mine, theirs = slice(*q_starts[i : i + 2]), slice(*k_starts[i : i + 2])
        one = [x.transpose(1, 0, 2)[None] for x in (q[mine], k[theirs], v[theirs], do[mine])]
        if rows[i] and keys[i]:
            out, logarithm = forward(*one[:3], **options)
            o[mine], lse[:, mine] = out[0].transpose(1, 0, 2).astype(q.dtype), logarithm[0]
            found = every_gradient(*one, **options)[:3]
        else:
            lse[:, mine], found = -np.inf, tuple(np.zeros(x.shape) for x in one[:3])
        for target, part, gradient in zip(wanted, (mine, theirs, theirs), found, strict=True):
            target[part] = gradient[0].transpose(1, 0, 2)
    return {"arrays": (q, k, v, o, do, lse), "starts": (q_starts, k_starts), "wanted": wanted}


SEQUENCES: list[tuple[Any, ...]] = [
    ([30, 0, 150, 7, 64], [40, 5, 150, 3, 0], 2, 1, {"causal": True}),
    ([70, 100], [130, 20], 2, 2, {"cap": 3.0}),
    ([130, 90], [130, 90], 1, 1, {"causal": True, "left": 40}),
]


PACKED = [("cpu", case, deterministic) for case in SEQUENCES for deterministic in (True, False)]
PACKED += [(HOPPER, SEQUENCES[i], True) for i in (0, 2)]


@pytest.mark.parametrize(("device", "case", "deterministic"), PACKED, indirect=["device"])
def test_gradients_of_packed_sequences(device: str, case: tuple[Any, ...], deterministic: bool) -> None:
    rows, keys, heads, groups, options = case
    made = packed(rows, keys, heads, groups, **options)
    q, k, v = made["arrays"][:3]
    results = [poisoned(*x.shape, dtype="bf16") for x in (q, k, v)]
    longest = max(rows) + 3, max(keys) + 3
    varlen_backward(*made["arrays"], *results, *made["starts"], *longest, deterministic=deterministic, **options)
    for actual, exact in zip(results, made["wanted"], strict=True):
        nobodys = np.isnan(exact[:, 0, 0])
        assert np.isnan(actual[nobodys].astype(np.float32)).all(), "a row of no sequence was written"
        check(actual[~nobodys], exact[~nobodys], "bf16")


def gradients_of(given: tuple[Any, ...], **options: Any) -> list[np.ndarray[Any, Any]]:
    results = [poisoned(*x.shape, dtype="bf16") for x in given[:3]]
    sdpa_backward(*given, *results, **options)
    return results


def beyond_range(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], causal: bool) -> tuple[Any, ...]:
    """Arguments with a key, of the last group of heads alone, that the guess of sizes does not see; and temporaries.

    What is temporary is poisoned, and gets into the list.
    """
    (q, k, v, _, do, _), _ = arrays(shape)
    k[-1, -1, 100] *= 30
    v[-1, -1, 100] *= 30
    o, lse = forward(q, k, v, causal)
    taken: list[Any] = []

    def temporary(like: Any, shape: tuple[int, ...], dtype: Any = "float32") -> Any:
        integers = dtype == "int32"
        taken.append(np.full(shape, 0x7FFFFFFF, dtype) if integers else np.full(shape, np.nan, dtype))
        return taken[-1]

    monkeypatch.setattr(attention_backward, "temporary", temporary)
    return (q, k, v, o.astype(q.dtype), do, lse.astype(np.float32)), taken


BEYOND = [("cpu", causal, depth) for causal in (False, True) for depth in (64, 96, 128, 256)]
BEYOND += [(HOPPER, True, 64), (HOPPER, False, 128)]


@pytest.mark.parametrize(("device", "causal", "depth"), BEYOND, indirect=["device"])
def test_contributions_beyond_the_range(device: str, monkeypatch: pytest.MonkeyPatch, causal: bool, depth: int) -> None:
    """Of one group of heads: its dq is calculated again. Others are what sums in two parts come to."""
    entries, heads = 2 if device == "cpu" else 1, 4 if device == "cpu" or causal else 2
    given, taken = beyond_range(monkeypatch, (entries, heads, 2, 130, 150, depth, depth), causal)
    results = gradients_of(given, causal=causal)
    flags = [x for x in taken if x.dtype == np.int32 and x.ndim == 2]
    assert [x[:-1].tolist() for x in flags] == [[[0, 0], [0, 1]][-entries:]] and flags[0][-1, 0] == 1
    q, k, v, _, do, _ = given
    exact = every_gradient(q, k, v, do, causal)[:3]
    # dP - delta nearly cancels where a weight is near 1: o, of which delta is, was rounded
    found = errors_of_heads(results, exact)
    assert (found < 0.1).all()
    if device == "cpu":
        again = gradients_of(given, causal=causal)
        assert [x.tobytes() for x in again] == [x.tobytes() for x in results]
        monkeypatch.setattr(attention_backward, "MOST_ADDED", 0)
        assert (found < 1.01 * errors_of_heads(gradients_of(given, causal=causal), exact)).all()


def errors_of_heads(results: Any, exact: Any) -> np.ndarray[Any, Any]:
    """Relative ones of the last entry's second half of heads, whose gradients are larger, and of the first."""
    pairs = [
        (half.astype(np.float64), wanted)
        for x, y in zip(results, exact, strict=True)
        for half, wanted in zip(np.split(x[-1], 2), np.split(y[-1], 2), strict=True)
    ]
    return np.array([np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs])


@pytest.mark.parametrize("options", [{"left": 90}, {"cap": 9.0}, {"lengths": [150]}, {"deterministic": False}])
def test_sums_that_are_not_checked(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """Options that leave out keys or change their weights, and sums in any order: there is no flag."""
    _, taken = beyond_range(monkeypatch, (1, 2, 1, 130, 150, 64, 64), False)
    deterministic = options.get("deterministic", True)
    given, named = arrays((1, 2, 1, 130, 150, 64, 64), **{n: x for n, x in options.items() if n != "deterministic"})
    results = gradients_of(given, deterministic=deterministic, **named)
    assert not any(x.dtype == np.int32 and x.ndim == 2 for x in taken)
    for actual, exact in zip(results, every_gradient(*given[:3], given[4], **named)[:3], strict=True):
        check(actual, exact, "bf16")


def test_very_negative_scores_and_keys_beyond_the_last() -> None:
    """A weight of a score of 0 would be infinite there, where there is no key."""
    given, _ = arrays((1, 1, 1, 64, 100, 64, 64))
    q, k, v, _, do, _ = given
    q[..., 0], k[..., 0] = 16, -64  # all scores near -128; what comes of this feature cancels
    o, lse = forward(q, k, v)
    assert lse.max() < -100
    results = [poisoned(*x.shape, dtype="bf16") for x in (q, k, v)]
    sdpa_backward(q, k, v, o.astype(q.dtype), do, lse.astype(np.float32), *results)
    for actual, exact in zip(results, every_gradient(q, k, v, do)[:3], strict=True):
        check(actual[..., 1:], exact[..., 1:], "bf16")


def test_masks_and_rows_that_see_nothing() -> None:
    given, _ = arrays((1, 2, 2, 70, 90, 64, 64))
    q, k, v, _, do, _ = given
    seen = np.random.default_rng(1).random((1, 1, 70, 90)) < 0.5
    seen[:, :, [3, 69]] = False
    bias = np.broadcast_to(np.where(seen, 0, -np.inf).astype(ml_dtypes.bfloat16), (1, 2, 70, 90))
    dbias, found = poisoned(1, 1, 70, 90), []
    for pairs, gradient in ((bias, dbias), (np.broadcast_to(seen, bias.shape), None)):
        o, lse = poisoned(*q.shape, dtype="bf16"), poisoned(*q.shape[:3])
        sdpa(q, k, v, o, lse=lse, bias=pairs)
        assert not o[:, :, [3, 69]].any() and np.isneginf(lse[:, :, [3, 69]]).all()
        results = [poisoned(*x.shape, dtype="bf16") for x in (q, k, v)]
        sdpa_backward(q, k, v, o, do, lse, *results, bias=pairs, dbias=gradient)
        found.append([x.tobytes() for x in (o, lse, *results)])
    *wanted, wanted_bias = every_gradient(q, k, v, do, bias=np.broadcast_to(seen, bias.shape))
    for actual, exact in zip(results, wanted, strict=True):
        check(actual, exact, "bf16")
    check(dbias, wanted_bias.sum(1, keepdims=True), "bf16")
    assert not results[0][:, :, [3, 69]].any() and not dbias[~seen].any()
    assert found[0] == found[1], "a mask says the same as a summand"


def test_garbage_behind_the_last_key_makes_no_step_coarser() -> None:
    given, named = arrays((1, 1, 1, 70, 150, 64, 64), lengths=[100])
    q, k, v, o, do, lse = given
    results = []
    for garbage in (0, 1e30):
        k[:, :, 100:], v[:, :, 100:] = garbage, garbage
        results.append([poisoned(*x.shape, dtype="bf16") for x in (q, k, v)])
        sdpa_backward(q, k, v, o, do, lse, *results[-1], **named)
    assert [x.tobytes() for x in results[0]] == [x.tobytes() for x in results[1]]


@pytest.mark.parametrize("spoiled", ["query", "bias"])
def test_not_a_number_stays_with_its_query(spoiled: str) -> None:
    given, named = arrays((1, 1, 1, 64, 100, 64, 64), bias=(1, 1, 64, 100), cap=4.0)
    q, k, v, _, do, _ = given
    bias = named["bias"].copy()
    if spoiled == "query":
        q[0, 0, 3] = np.nan
    else:
        bias[0, 0, 3, 5] = np.nan
    o, lse = forward(q, k, v, bias=bias, cap=4.0)
    results = [poisoned(*x.shape, dtype="bf16") for x in (q, k, v)]
    dbias = np.zeros((1, 1, 64, 100), np.float32)
    arguments = q, k, v, o.astype(q.dtype), do, lse.astype(np.float32), *results
    sdpa_backward(*arguments, bias=bias, cap=4.0, dbias=dbias)
    for found in (results[0][0, 0].astype(np.float32), dbias[0, 0]):
        assert np.isnan(found[3]).all() and np.isfinite(np.delete(found, 3, axis=0)).all()
