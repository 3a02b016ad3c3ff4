"""Hints to the caches reach every kind of access, and change no value."""

from __future__ import annotations

import re
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from tilewright.frontend.errors import CompileError
from tilewright.kernels.rmsnorm import rmsnorm

BF16 = ml_dtypes.bfloat16


@tw.kernel
def doubled(x: tw.Tensor, y: tw.Tensor, *, POLICY: tw.constexpr = None):
    tile = tw.load(x, (tw.program_id(0), 0), (4, 256), eviction_policy=POLICY)
    tw.store(y, (tw.program_id(0), 0), tile + tile, eviction_policy=POLICY)


@tw.kernel
def product(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor, *, BM: tw.constexpr = 64, BK: tw.constexpr = 64):
    acc = tw.zeros((BM, BM), tw.float32)
    for k in tw.range(tw.cdiv(a.shape[1], BK)):
        left = tw.load(a, (0, k), (BM, BK), eviction_policy="evict_last")
        acc = tw.dot(left, tw.load(b, (k, 0), (BK, BM), eviction_policy="evict_first"), acc)
    tw.store(c, (0, 0), acc.to(c.dtype), eviction_policy="evict_first")


def accesses(artifact: Any) -> tuple[list[str], list[str]]:
    """The instructions that access global memory, with and without a hint."""
    assembly = artifact.asm["ptx" if "ptx" in artifact.asm else "amdgcn"]
    pattern = r"^\s*(?:@%p\d+ )?((?:ld|st)\.global|cp\.async\.(?:bulk\.tensor|c[ag])|buffer_(?:load|store))(.*)$"
    found = ["".join(match) for match in re.findall(pattern, assembly, re.MULTILINE)]
    hinted = [line for line in found if "L2::cache_hint" in line or line.endswith(" nt")]
    return hinted, [line for line in found if line not in hinted]


@pytest.mark.parametrize("name", ["i8", "bf16", "f32", "f64"])
@pytest.mark.parametrize(
    ("target", "policy"), [("sm_90a", "evict_first"), ("sm_90a", "evict_last"), ("gfx950", "evict_first")]
)
def test_threads(target: str, policy: str, name: str) -> None:
    """Whole vectors and, where tiles stick out, single elements."""
    dtype = {"i8": np.int8, "bf16": BF16, "f32": np.float32, "f64": np.float64}[name]
    x = (np.random.default_rng(0).standard_normal((7, 201)) * 20).astype(dtype)
    y = np.zeros_like(x)
    tw.emulate(target).launch(doubled, (2,), x, y, POLICY=policy)
    np.testing.assert_array_equal(y, x + x)
    spec = tw.spec(name, ("M", 512))
    hinted, plain = accesses(tw.compile(doubled, target, {"x": spec, "y": spec, "POLICY": policy}))
    assert len(hinted) >= 4
    assert not plain
    assert all(policy in line for line in hinted if line.startswith("ld"))


@pytest.mark.parametrize(("target", "kinds"), [
    ("sm_90a", ("cp.async.bulk.tensor.2d.shared::cluster", "cp.async.bulk.tensor.2d.global")),
    ("sm_80", ("cp.async.cg", "st.global")),
    ("gfx942", ("buffer_load", "buffer_store")),
])  # fmt: skip
def test_copies_of_a_pipeline(target: str, kinds: tuple[str, ...]) -> None:
    shapes = {"a": (64, 192), "b": (192, 64), "c": (64, 64)}
    artifact = tw.compile(product, target, {n: tw.spec("bf16", shape) for n, shape in shapes.items()})
    hinted, plain = accesses(artifact)
    assert all(any(line.startswith(kind) for line in hinted) for kind in kinds)
    assert bool(plain) == (target == "gfx942")  # which has no way to say evict_last
    a, b = (np.random.default_rng(1).standard_normal(shapes[n]).astype(BF16) for n in "ab")
    c = np.full(shapes["c"], np.nan, BF16)
    tw.emulate(target).launch(product, (1,), a, b, c)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(c.astype(np.float64), exact, rtol=2**-7, atol=0.01)


def test_an_unknown_policy_is_refused() -> None:
    x = np.zeros((4, 256), np.float32)
    with pytest.raises(CompileError, match=r"'evict_first', 'evict_last', got 'first'"):
        doubled[(1,)](x, x, POLICY="first")


def copies(cubin: bytes) -> list[int]:
    """The forms of the LDGSTS of a cubin, the low 12 bits of the instruction: 0xdae adds a uniform register."""
    (offset,), (size, count) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HH", cubin, 0x3A)
    found = []
    for place in range(offset, offset + size * count, size):
        _, kind, flags, _, start, length = struct.unpack_from("<IIQQQQ", cubin, place)
        if kind == 1 and flags & 4:  # instructions
            words = struct.unpack_from(f"<{length // 8}Q", cubin, start)
            found += [word & 0xFFF for word in words[::2] if word & 0xFFF in (0xFAE, 0xDAE)]
    return found


@pytest.mark.parametrize(("columns", "num_warps", "num_ctas"), [(8192, 16, 1), (32768, 16, 4)])
def test_no_hinted_copy_adds_a_uniform_register_to_its_address(columns: int, num_warps: int, num_ctas: int) -> None:
    """What ptxas makes of such a copy reads a broken descriptor: an illegal instruction."""
    given = {"x": ("bf16", ("M", "N")), "weight": ("bf16", ("N",)), "y": ("bf16", ("M", "N"))}
    types: dict[str, Any] = {name: tw.spec(dtype, shape, align=16) for name, (dtype, shape) in given.items()}
    types |= {"eps": "f32", "BN": columns, "READ": "evict_first", "AGAIN": True}
    artifact = tw.compile(rmsnorm, "sm_90a", types, num_warps=num_warps, num_ctas=num_ctas)
    found = copies(artifact.binary)
    assert found
    assert set(found) == {0xFAE}
