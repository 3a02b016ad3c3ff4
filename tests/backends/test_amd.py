"""Programs compiled for CDNA: right on the emulator, no spills, and the waits and accesses that they should have."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from amd_programs import COLUMN_MAJOR, ROW_MAJOR, compiled, emulate, matrix, module_of, normal, scheduled

import tilewright as tw
from tilewright.backends.amd.compile import compile_functions
from tilewright.backends.amd.link import read_elf
from tilewright.backends.amd.registers import accumulation_registers
from tilewright.ir.interpreter import run
from tilewright.ir.target import get_target
from tilewright.kernels.gemm import gemm
from tilewright.kernels.mlp import mlp
from tilewright.kernels.softmax import softmax

TARGETS = ["gfx942", "gfx950"]
#: one unit in the last place of the output (two float32 sums may round to neighbours), and float32 sums near zero
TOLERANCE = {"bf16": (2**-7, 1e-4), "f16": (2**-10, 1e-4), "f32": (1e-5, 1e-4)}


def assert_close(got: np.ndarray, wanted: np.ndarray, dtype: str) -> None:
    assert np.abs(got.astype(np.float64)).max() > 0
    relative, absolute = TOLERANCE[dtype]
    np.testing.assert_allclose(got.astype(np.float64), wanted.astype(np.float64), relative, absolute)


# --- matrix products ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("operands", ["nn", "nt", "tn"])
@pytest.mark.parametrize(
    ("shape", "align", "stages"), [((100, 111, 103), 2, None), ((256, 256, 128), 16, None), ((128, 64, 96), 16, 1)]
)
@pytest.mark.parametrize("target", TARGETS)
def test_gemm(target: str, shape: tuple[int, int, int], align: int, stages: int | None, operands: str, dtype: str):
    m, n, k = shape
    strides = [ROW_MAJOR if letter == "n" else COLUMN_MAJOR for letter in operands]
    a, b = normal(m, k, dtype=dtype), normal(k, n, dtype=dtype, seed=1)
    a, b = (x if s == ROW_MAJOR else np.asfortranarray(x) for x, s in zip((a, b), strides, strict=True))
    views = {name: matrix(dtype, s, align) for name, s in zip("ab", strides, strict=True)}
    module = module_of(gemm, **views, c=matrix(dtype, align=align), BM=64, BN=64, BK=32)
    options = {} if stages is None else {"num_stages": stages}
    function = scheduled(module, target, **options)
    grid = (-(-m // 64), -(-n // 64))
    c, interpreted = np.zeros((m, n), a.dtype), np.zeros((m, n), a.dtype)
    emulate(compiled(function, target), target, [a, b, c], grid)
    assert_close(c, a.astype(np.float64) @ b.astype(np.float64), dtype)
    run(function, [a, b, interpreted], grid)
    assert_close(c, interpreted, dtype)


@pytest.mark.parametrize("tile", [(16, 16, 16), (32, 32, 16), (48, 64, 48), (48, 48, 32), (96, 48, 64), (256, 16, 32)])
@pytest.mark.parametrize("target", TARGETS)
def test_every_tile_shape_that_fits_the_unit(target: str, tile: tuple[int, int, int]):
    bm, bn, bk = tile
    a, b = normal(2 * bm - 3, 2 * bk + 8), normal(2 * bk + 8, 2 * bn - 8, seed=1)
    module = module_of(gemm, a=matrix(), b=matrix(), c=matrix("f32"), BM=bm, BN=bn, BK=bk)
    c = np.zeros((a.shape[0], b.shape[1]), np.float32)
    emulate(compiled(scheduled(module, target), target), target, [a, b, c], (2, 2))
    assert_close(c, a.astype(np.float64) @ b.astype(np.float64), "f32")


@pytest.mark.parametrize("target", TARGETS)
def test_two_chained_dots(target: str):
    x, w1, w2 = normal(100, 90), normal(90, 64, seed=1, scale=0.2), normal(64, 120, seed=2)
    module = module_of(mlp, x=matrix(), w1=matrix(), w2=matrix(), y=matrix(), BM=64, BH=64, BN=64, BK=32)
    function = scheduled(module, target)
    y, interpreted = np.zeros((100, 120), x.dtype), np.zeros((100, 120), x.dtype)
    emulate(compiled(function, target), target, [x, w1, w2, y], (2,))
    run(function, [x, w1, w2, interpreted], (2,))
    assert_close(y, interpreted, "bf16")
    hidden = np.maximum(x.astype(np.float64) @ w1.astype(np.float64), 0).astype(x.dtype)
    exact = hidden.astype(np.float64) @ w2.astype(np.float64)
    np.testing.assert_allclose(y.astype(np.float64), exact, 2**-7, 0.1)


@tw.kernel
def attention(q: tw.Tensor, k: tw.Tensor, v: tw.Tensor, o: tw.Tensor):
    """Streaming softmax over blocks of 64 keys (base 2, no scale)."""
    query = tw.load(q, (tw.program_id(0), 0), (64, 64))
    acc = tw.zeros((64, 64), tw.float32)
    most, total = tw.full((64,), -1e30, tw.float32), tw.zeros((64,), tw.float32)
    keys = tw.arange(64)
    for j in tw.range(tw.cdiv(k.shape[0], 64)):
        scores = tw.dot(query, tw.load(k, (j, 0), (64, 64)).T)
        scores = tw.where((keys + j * 64 < k.shape[0])[None, :], scores, -1e30)
        new = tw.maximum(most, tw.max(scores, axis=1))
        p = tw.exp2(scores - new[:, None])
        scale = tw.exp2(most - new)
        total = total * scale + tw.sum(p, axis=1)
        acc = tw.dot(p.to(v.dtype), tw.load(v, (j, 0), (64, 64)), acc * scale[:, None])
        most = new
    tw.store(o, (tw.program_id(0), 0), acc / total[:, None])


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("target", TARGETS)
def test_attention(target: str, dtype: str):
    q, k, v = (
        normal(100, 64, dtype=dtype, scale=0.3),
        normal(150, 64, dtype=dtype, seed=1),
        normal(150, 64, dtype=dtype),
    )
    module = module_of(attention, q=matrix(dtype), k=matrix(dtype), v=matrix(dtype), o=matrix("f32"))
    function = scheduled(module, target)
    o, interpreted = np.zeros((100, 64), np.float32), np.zeros((100, 64), np.float32)
    emulate(compiled(function, target), target, [q, k, v, o], (2,))
    run(function, [q, k, v, interpreted], (2,))
    np.testing.assert_allclose(o, interpreted, 1e-3, 1e-3)
    scores = q.astype(np.float64) @ k.astype(np.float64).T
    p = 2 ** (scores - scores.max(axis=1, keepdims=True))
    np.testing.assert_allclose(o, p @ v.astype(np.float64) / p.sum(axis=1, keepdims=True), 2**-6, 2**-7)


@pytest.mark.parametrize("target", TARGETS)
def test_softmax_rows(target: str):
    x = normal(6, 1000, scale=3)
    module = module_of(softmax, x=matrix(), y=matrix(), BN=1024)
    y = np.zeros_like(x)
    result = compiled(scheduled(module, target), target)
    emulate(result, target, [x, y], (6,))
    moves = [name for name in re.findall(r"^\t(\S+)", result.asm["amdgcn"], re.MULTILINE) if "permute" in name]
    assert len(moves) == (2 if target == "gfx942" else 0), "only halves of a wave need an address, on CDNA3"
    e = np.exp(x.astype(np.float64) - x.astype(np.float64).max(axis=1, keepdims=True))
    assert_close(y, e / e.sum(axis=1, keepdims=True), "bf16")


# --- code quality -----------------------------------------------------------------------------------


def hot_loop(asm: str) -> list[str]:
    """The instructions of the basic block with the most matrix instructions."""
    blocks = re.split(r"^\.LBB\w+:.*$", asm, flags=re.MULTILINE)
    best = max(blocks, key=lambda block: block.count("v_mfma"))
    return [line.strip() for line in best.splitlines() if re.match(r"\t[a-z]", line)]


@pytest.mark.parametrize("b_strides", [ROW_MAJOR, COLUMN_MAJOR])
@pytest.mark.parametrize("target", TARGETS)
def test_the_default_gemm_stays_in_registers(target: str, b_strides: tuple[int | None, ...]):
    module = module_of(gemm, a=matrix(), b=matrix(strides=b_strides), c=matrix(), BM=128, BN=256, BK=64)
    result = compiled(scheduled(module, target), target)
    resources = result.resources
    assert resources.registers <= 512
    assert resources.spill_stores == resources.spill_loads == resources.stack_bytes == 0
    assert "scratch_" not in result.asm["amdgcn"]
    loop = hot_loop(result.asm["amdgcn"])
    counts = Counter(line.split()[0] for line in loop)
    width = 128 * 256 * 64 // 4  # elements of all the loop's products in one wave
    (mfma,) = [name for name in counts if "mfma" in name]
    assert mfma == ("v_mfma_f32_32x32x8_bf16" if target == "gfx942" else "v_mfma_f32_32x32x16_bf16")
    assert counts[mfma] == width // (32 * 32 * (8 if target == "gfx942" else 16))
    assert not any("accvgpr" in name for name in counts), "accumulators move between register files"
    assert counts["s_barrier"] == (2 if target == "gfx942" else 1)
    reads = sum(n * (2 if "read2" in name else 1) for name, n in counts.items() if name.startswith("ds_read"))
    assert reads == 24, "one read for the operand of a step, on gfx942 of two"


@pytest.mark.parametrize("target", TARGETS)
def test_barriers_wait_for_shared_memory_alone(target: str):
    """Global loads stay in flight across barriers: the fences of a barrier cover local memory only."""
    module = module_of(gemm, a=matrix(), b=matrix(), c=matrix(), BM=64, BN=64, BK=32)
    asm = compiled(scheduled(module, target), target).asm["amdgcn"]
    lines = [line.strip() for line in asm.splitlines() if re.match(r"\t[a-z]", line)]
    barriers = [i for i, line in enumerate(lines) if line == "s_barrier"]
    assert barriers
    for position in barriers:
        before = next(line for line in reversed(lines[:position]) if line.startswith(("s_waitcnt", "v_mfma")))
        assert before == "s_waitcnt lgkmcnt(0)" or before.startswith("v_mfma"), before


def test_the_binary_is_an_hsaco_that_names_its_kernel():
    module = module_of(gemm, a=matrix(), b=matrix(), c=matrix(), BM=64, BN=64, BK=32)
    result = compiled(scheduled(module, "gfx950"), "gfx950")
    names = {symbol.name for symbol in read_elf(result.binary).symbols}
    assert {"gemm", "gemm.kd"} <= names


@pytest.mark.parametrize("target", TARGETS)
def test_accumulators_alone_in_their_loop_take_accumulation_registers(target: str):
    module = module_of(gemm, a=matrix(), b=matrix(), c=matrix(), BM=128, BN=256, BK=64)
    assert accumulation_registers(scheduled(module.clone(), target), get_target(target)) == 128
    assert accumulation_registers(scheduled(module.clone(), target, num_warps=8), get_target(target)) == 0
    module = module_of(attention, q=matrix(), k=matrix(), v=matrix(), o=matrix("f32"))
    assert accumulation_registers(scheduled(module, target), get_target(target)) == 0


@pytest.mark.parametrize("target", TARGETS)
def test_eight_waves_share_the_registers_without_spills(target: str):
    module = module_of(gemm, a=matrix(), b=matrix(), c=matrix(), BM=256, BN=256, BK=64 if target == "gfx950" else 32)
    result = compiled(scheduled(module, target), target)
    assert result.abi.threads == 512 and result.resources.registers <= 256
    assert result.resources.spills == result.resources.stack_bytes == 0


@pytest.mark.parametrize("b_strides", [ROW_MAJOR, COLUMN_MAJOR])
@pytest.mark.parametrize("target", TARGETS)
def test_the_default_gemm_computes(target: str, b_strides: tuple[int | None, ...]):
    module = module_of(gemm, a=matrix(), b=matrix(strides=b_strides), c=matrix(), BM=128, BN=256, BK=64)
    a, b = normal(200, 200), normal(200, 304, seed=1)
    b = b if b_strides == ROW_MAJOR else np.asfortranarray(b)
    c = np.zeros((200, 304), a.dtype)
    emulate(compiled(scheduled(module, target), target), target, [a, b, c], (2, 2))
    assert_close(c, a.astype(np.float64) @ b.astype(np.float64), "bf16")


def test_one_binary_holds_several_kernels_each_with_its_own_memory():
    functions = []
    for tile, name in ((64, "small"), (128, "large")):
        module = module_of(gemm, a=matrix(), b=matrix(), c=matrix(), BM=tile, BN=tile, BK=32)
        functions.append(scheduled(module, "gfx950"))
        functions[-1].name = name
    result = compile_functions(functions, get_target("gfx950"))
    assert [abi.name for abi, _ in result.entries] == ["small", "large"]
    assert [resources.shared_bytes for _, resources in result.entries] == [16384, 32768]
