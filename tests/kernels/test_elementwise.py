"""Rotary embedding, dropout, embedding, activations and quantisation on the interpreter and the emulated GPUs."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kernel_checks import DEVICES, Array, check, launch, normal, poisoned, strided

import tilewright as tw
from tilewright.kernels import activations, embedding, quantize
from tilewright.kernels import dropout as dropout_module
from tilewright.kernels import rotary as rotary_module
from tilewright.kernels.dropout import dropout
from tilewright.kernels.random import philox, reference_philox
from tilewright.kernels.rotary import rotary
from tilewright.kernels.rows import block_tiles, row_major_grid

DTYPES = ("f32", "bf16")
FORMATS = {ml_dtypes.float8_e4m3fn: quantize.E4M3_MAX, ml_dtypes.float8_e5m2: quantize.E5M2_MAX}


# --- rotary embedding -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_rotary_and_back(device: str, interleaved: bool, dtype: str) -> None:
    x = strided(2, 7, 3, 64, dtype=dtype).transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3)  # heads before positions
    angle = normal(7, 32, seed=1)
    cos, sin = np.cos(angle), np.sin(angle)
    y, back = poisoned(2, 7, 3, 64, dtype=dtype), poisoned(2, 7, 3, 64, dtype=dtype)
    meta = {"D": 64, "BS": 4, "BH": 2, "INTERLEAVED": interleaved}
    launch(device, rotary, (2, 2, 2), x, cos, sin, y, **meta)
    check(y, rotary_module.reference(x, cos, sin, interleaved), dtype)
    launch(device, rotary, (2, 2, 2), y, cos, sin, back, INVERSE=True, **meta)
    check(back, rotary_module.reference(y, cos, sin, interleaved, inverse=True), dtype)
    check(back, x.astype(np.float64), dtype)


# --- dropout --------------------------------------------------------------------------------------


@tw.kernel
def words(counter: tw.Tensor, out: tw.Tensor, key0: tw.int32, key1: tw.int32):
    first, second = tw.load(counter, (0, 0), (1, 64)), tw.load(counter, (1, 0), (1, 64))
    third, fourth = tw.load(counter, (2, 0), (1, 64)), tw.load(counter, (3, 0), (1, 64))
    a, b, c, d = philox(first, second, third, fourth, key0, key1)
    tw.store(out, (0, 0), a)
    tw.store(out, (1, 0), b)
    tw.store(out, (2, 0), c)
    tw.store(out, (3, 0), d)


#: known answers of Random123: counter, key, words
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip


def signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("device", DEVICES)
def test_philox_gives_the_published_words(device: str, known: Any) -> None:
    counter, key, expected = known
    given = np.broadcast_to(np.array(counter, np.uint32)[:, None], (4, 64)).copy()
    out = np.zeros((4, 64), np.int32)
    launch(device, words, (1,), given.view(np.int32), out, signed(key[0]), signed(key[1]))
    assert [hex(v) for v in out.view(np.uint32)[:, 63]] == [hex(v) for v in expected]
    assert [int(w[0]) for w in reference_philox(tuple(given), key)] == list(expected)


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_draws_the_same_mask_everywhere(device: str) -> None:
    x, y, again = strided(5, 301), poisoned(5, 301), poisoned(5, 301)
    launch(device, dropout, row_major_grid(5, 301, 4, 256), x, y, 0.3, 2**40 + 5, 7, BM=4, BN=256)
    launch(
        device, dropout, row_major_grid(5, 301, 1, 512), x, again, 0.3, 2**40 + 5, 7, BM=1, BN=512
    )  # tiles do not matter
    exact = dropout_module.reference(x, 0.3, 2**40 + 5, 7)
    check(y, exact)
    assert ((y == 0) == (exact == 0)).all() and y.tobytes() == again.tobytes()


@pytest.mark.parametrize("device", DEVICES)
def test_rates_of_nothing_and_of_everything(device: str) -> None:
    x, y = normal(4, 256), poisoned(4, 256)
    launch(device, dropout, (1,), x, y, 0.0, 3, 0, BM=4, BN=256)
    np.testing.assert_array_equal(y, x)
    launch(device, dropout, (1,), x, y, 1.0, 3, 0, BM=4, BN=256)
    assert (y == 0).all()


def test_seeds_and_sequences_differ_and_rates_hold() -> None:
    masks = [dropout_module.kept(200, 500, 0.25, seed, sequence) for seed, sequence in ((1, 0), (2, 0), (1, 1))]
    for n, mask in enumerate(masks):
        assert abs(mask.mean() - 0.75) < 0.01  # seven standard deviations
        for other in masks[:n]:
            assert abs((mask == other).mean() - 0.625) < 0.01


# --- embedding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_embedding_and_gradient(device: str, dtype: str) -> None:
    table, tokens = strided(11, 150, dtype=dtype), np.array([3, 3, 0, 10, 3, 7], np.int64)
    y, dy = poisoned(6, 150, dtype=dtype), normal(6, 150, dtype=dtype, seed=1)
    launch(device, embedding.embedding, row_major_grid(6, 150, 4, 128), table, tokens, y, BM=4, BN=128)
    np.testing.assert_array_equal(y, embedding.reference(table, tokens))
    dtable = poisoned(11, 150, dtype=dtype)
    order, first, counts = ordered(device, tokens, 11)
    launch(
        device, embedding.embedding_backward, row_major_grid(11, 150, 1, 128), dy, order, first, counts, dtable, BN=128
    )
    exact = embedding.reference_backward(dy, tokens, 11)
    check(dtable, exact, dtype)
    assert (dtable[exact.any(1) == 0] == 0).all()


def ordered(device: str, tokens: Array, vocabulary: int) -> tuple[Array, Array, Array]:
    """The order of the tokens as the kernels find it, with tiles of four."""
    grid, m = (tw.cdiv(len(tokens), 4),), len(tokens)
    counts, given, first = np.zeros(vocabulary, np.int32), np.zeros(1, np.int32), np.full(vocabulary, -1, np.int32)
    tickets, unordered, order = (np.full(m, -1, np.int32) for _ in range(3))
    launch(device, embedding.take_tickets, grid, tokens, counts, tickets, BM=4)
    launch(device, embedding.share_places, (tw.cdiv(vocabulary, 4),), counts, given, first, BV=4)
    launch(device, embedding.take_places, grid, tokens, tickets, first, unordered, BM=4)
    launch(device, embedding.order_places, grid, tokens, counts, first, unordered, order, BM=4)
    return order, first, counts


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_keep_their_order(device: str) -> None:
    tokens = np.array([5, 0, 5, 5, -1, 9, 0, 5, 10, 5, 3], np.int32)
    order, first, counts = ordered(device, tokens, 10)
    for v in range(10):
        np.testing.assert_array_equal(order[first[v] : first[v] + counts[v]], np.flatnonzero(tokens == v))


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_by_atomic_updates(device: str) -> None:
    tokens, dy, dtable = np.array([3, 3, 0, 3, 2], np.int32), normal(5, 150), np.zeros((4, 150), np.float32)
    launch(
        device, embedding.embedding_backward_atomic, row_major_grid(5, 150, 4, 128), dy, tokens, dtable, BM=4, BN=128
    )
    check(dtable, embedding.reference_backward(dy, tokens, 4))


def test_tokens_out_of_range_are_dropped() -> None:
    table, tokens, y = normal(4, 64), np.array([-1, 4, 2], np.int32), poisoned(3, 64)
    embedding.embedding[(1,)](table, tokens, y, BM=4, BN=64)
    assert (y[:2] == 0).all() and (y[2] == table[2]).all()
    dtable = poisoned(4, 64)
    embedding.embedding_gradient(y, tokens, dtable)
    assert (dtable[2] == table[2]).all() and (dtable[[0, 1, 3]] == 0).all()


# --- activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", list(activations.REFERENCES), ids=lambda fn: fn.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_activations(device: str, dtype: str, fn: Any) -> None:
    whole = normal(5, 400, dtype=dtype)
    gate, up, dy = whole[:, :200], whole[:, 200:], strided(5, 200, dtype=dtype, seed=1)  # halves of one matrix
    y, dx, dup = (poisoned(5, 200, dtype=dtype) for _ in range(3))
    meta = {"FN": fn, "BM": 4, "BN": 256}
    launch(device, activations.activation, (2,), gate, y, up, **meta)
    check(y, activations.reference(fn, gate, up), dtype)
    launch(device, activations.activation_backward, (2,), dy, gate, dx, up, dup, **meta)
    exact_dx, exact_dup = activations.reference_backward(fn, dy, gate, up)
    check(dx, exact_dx, dtype)
    check(dup, exact_dup, dtype)


def test_an_activation_alone() -> None:
    x, dy, y, dx = normal(5, 200), normal(5, 200, seed=1), poisoned(5, 200), poisoned(5, 200)
    activations.activation[(2,)](x, y, FN=activations.gelu, BM=4, BN=256)
    check(y, activations.reference(activations.gelu, x))
    activations.activation_backward[(2,)](dy, x, dx, FN=activations.gelu, BM=4, BN=256)
    check(dx, activations.reference_backward(activations.gelu, dy, x, np.ones_like(x))[0])


def test_gelu_keeps_its_small_values_and_its_ends() -> None:
    """Where 1 plus the error function cancels, the tail itself is right to five digits."""
    x = np.linspace(-6, 6, 4096, dtype=np.float32).reshape(2, -1)
    y, exact = poisoned(2, 2048), activations.reference(activations.gelu, x)
    activations.activation[(2,)](x, y, FN=activations.gelu, BM=1, BN=2048)
    assert (np.abs(y - exact) <= 3e-5 * np.abs(exact) + 1e-30).all()
    assert np.abs(y - exact).max() < 1e-6
    x = np.array([[np.inf, -np.inf, np.nan, 0, 40, -40, 3e38, -3e38]], np.float32)
    y, slope = poisoned(1, 8), poisoned(1, 8)
    activations.activation[(1,)](x, y, FN=activations.gelu, BM=1, BN=8)
    np.testing.assert_array_equal(y, [[np.inf, 0, np.nan, 0, 40, 0, x[0, 6], 0]])
    activations.activation_backward[(1,)](np.ones_like(x), x, slope, FN=activations.gelu, BM=1, BN=8)
    np.testing.assert_array_equal(slope[0, 2:6], [np.nan, 0.5, 1, 0])


# --- quantisation ---------------------------------------------------------------------------------


def assert_rounded(q: Array, exact: Array) -> None:
    """Each element is one of the two neighbours that its exact value lies between, or the nearest but for a hair."""
    step = np.maximum(np.abs(exact) * 2.0 ** -(3 if q.dtype == ml_dtypes.float8_e4m3fn else 2), 2.0**-9)
    assert (np.abs(q.astype(np.float64) - exact) <= 0.51 * step).all()
    assert np.abs(q.astype(np.float64)).max() > 0.9 * np.abs(exact).max() > 0


@pytest.mark.parametrize("format_", list(FORMATS), ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_quantize_rows(device: str, dtype: str, format_: Any) -> None:
    x, q, scale = strided(5, 200, dtype=dtype), np.zeros((5, 200), format_), poisoned(5)
    launch(device, quantize.quantize_rows, (3,), x, q, scale, BM=2, BN=256)
    exact, exact_scale = quantize.reference(x, 1, 200, FORMATS[format_])
    check(scale, exact_scale[:, 0])
    assert_rounded(q, exact)


@pytest.mark.parametrize("format_", list(FORMATS), ids=lambda f: f.__name__)
@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
@pytest.mark.parametrize("device", DEVICES)
def test_quantize_blocks(device: str, block: tuple[int, int], format_: Any) -> None:
    rows, columns = block
    x = strided(130, 300) * np.geomspace(1, 100, 300, dtype=np.float32)
    q, scale = np.zeros((130, 300), format_), poisoned(tw.cdiv(130, rows), 3)
    height = max(rows, 16)
    meta = {"ROWS": rows, "COLUMNS": columns, "BM": height, "BN": 256}
    launch(device, quantize.quantize_blocks, row_major_grid(130, 300, height, 256), x, q, scale, **meta)
    exact, exact_scale = quantize.reference(x, rows, columns, FORMATS[format_])
    check(scale, exact_scale)
    assert_rounded(q, exact)


def test_rows_of_zeros_have_scale_one() -> None:
    x, q, scale = np.zeros((1, 64), np.float32), np.ones((1, 64), ml_dtypes.float8_e4m3fn), poisoned(1)
    quantize.quantize_rows[(1,)](x, q, scale, BN=64)
    assert scale[0] == 1 and (q.astype(np.float32) == 0).all()


def test_block_tiles_lie_together_in_memory() -> None:
    assert block_tiles(1000) == {"BM": 4, "BN": 1024}
    assert block_tiles(9000) == {"BM": 1, "BN": 4096}
    assert block_tiles(4096, 2048) == {"BM": 1, "BN": 2048}
