"""Global memory of CDNA through buffer descriptors: bounds in hardware, views, pads, and tiles that span too much."""

from __future__ import annotations

import re

import numpy as np
import pytest
from amd_programs import COLUMN_MAJOR, NUMPY, ROW_MAJOR, compiled, emulate, matrix, module_of, normal, scheduled

import tilewright as tw
from tilewright.backends.amd.buffers import EXTENT
from tilewright.ir.types import DTYPES, ViewType
from tilewright.kernels.gemm import gemm
from tilewright.runtime.emulator.amd.errors import EmulatorError

TARGETS = ["gfx942", "gfx950"]


def instructions(asm: str) -> list[str]:
    return [line.split()[0] for line in asm.splitlines() if re.match(r"\t[a-z]", line)]


def view(dtype: str, *strides: int | None, align: int = 16) -> ViewType:
    return ViewType((None,) * len(strides), DTYPES[dtype], strides, align)


@tw.kernel
def copy(x: tw.Tensor, y: tw.Tensor, *, M: tw.constexpr, N: tw.constexpr, PAD: tw.constexpr = 0):
    """y = x, in tiles; y may be larger: PAD there."""
    place = (tw.program_id(0), tw.program_id(1))
    tw.store(y, place, tw.load(x, place, (M, N), pad=PAD))


@pytest.mark.parametrize("dtype", ["bf16", "f32", "f64", "i8", "i32", "f8e4m3"])
@pytest.mark.parametrize("strides", [ROW_MAJOR, COLUMN_MAJOR])
@pytest.mark.parametrize("target", TARGETS)
def test_ragged_tiles_of_every_dtype(target: str, strides: tuple[int | None, ...], dtype: str):
    x = (np.random.default_rng(0).standard_normal((71, 83)) * 20).astype(NUMPY[dtype])
    x = x if strides == ROW_MAJOR else np.asfortranarray(x)
    y = np.zeros_like(x)
    align = np.dtype(NUMPY[dtype]).itemsize
    module = module_of(copy, x=matrix(dtype, strides, align), y=matrix(dtype, strides, align), M=32, N=64)
    result = compiled(scheduled(module, target), target)
    emulate(result, target, [x, y], (3, 2))
    assert x.tobytes() == y.tobytes()
    names = set(instructions(result.asm["amdgcn"]))
    assert not any(name.startswith("global_") for name in names)


@pytest.mark.parametrize("pad", [0, 1, -7])
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_outside_reads_as_the_pad(target: str, pad: int):
    x, y = normal(20, 50, dtype="f32"), np.zeros((40, 70), np.float32)
    module = module_of(copy, x=matrix("f32"), y=matrix("f32"), M=16, N=32, PAD=pad)
    emulate(compiled(scheduled(module, target), target), target, [x, y], (3, 3))
    expected = np.full((40, 70), pad, np.float32)
    expected[:20, :50] = x
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_masked_stores_have_no_branches(target: str):
    """One uniform choice between whole and ragged tiles; behind it every store is unconditional."""
    module = module_of(gemm, a=matrix(), b=matrix(), c=matrix("f32"), BM=128, BN=128, BK=64)
    asm = compiled(scheduled(module, target), target).asm["amdgcn"]
    blocks = re.split(r"^\.LBB\w+:.*$", asm, flags=re.MULTILINE)
    stores = [[n for n in instructions(block) if n.startswith("buffer_store")] for block in blocks]
    assert len([group for group in stores if group]) <= 2
    assert not any(name.startswith(("global_", "flat_")) for name in instructions(asm))


@pytest.mark.parametrize("target", TARGETS)
def test_offsets_of_whole_tiles_share_one_register(target: str):
    """Rows are scalar offsets and immediates: one lane offset serves all loads of a tile."""
    static = ViewType((1024, 1024), DTYPES["bf16"], (1024, 1), 16)
    module = module_of(gemm, a=static, b=static, c=static, BM=128, BN=128, BK=64)
    asm = compiled(scheduled(module, target), target).asm["amdgcn"]
    loads = [line.split() for line in asm.splitlines() if line.startswith("\tbuffer_load_dwordx4")]
    assert len(loads) >= 12
    loop = max(re.split(r"^\.LBB\w+:.*$", asm, flags=re.MULTILINE), key=lambda block: block.count("v_mfma"))
    lanes = {line.split(", ")[1] for line in loop.splitlines() if line.startswith("\tbuffer_load_dwordx4")}
    assert 1 <= len(lanes) <= 2


@tw.kernel
def subview_at(x: tw.Tensor, y: tw.Tensor, *, INDEX: tw.constexpr):
    """One matrix of a batch, transposed."""
    tw.store(y, (0, 0), tw.load(x[INDEX].T, (0, 0), (32, 16)))


@pytest.mark.parametrize("target", TARGETS)
def test_a_tile_of_a_subview_transposed(target: str):
    x = normal(3, 13, 29, dtype="f32")
    for index in range(3):
        y = np.zeros((29, 13), np.float32)
        module = module_of(subview_at, x=view("f32", None, None, 1, align=4), y=matrix("f32", align=4), INDEX=index)
        emulate(compiled(scheduled(module, target), target), target, [x, y], (1,))
        np.testing.assert_array_equal(y, x[index].T)


# --- tiles that span too much -------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_known_strides_too_far_apart_take_64_bits(target: str):
    far = ViewType((64, 64), DTYPES["f32"], (EXTENT // 64, 1), 16)
    near = ViewType((64, 64), DTYPES["f32"], (64, 1), 16)
    module = module_of(copy, x=far, y=near, M=32, N=32)
    names = instructions(compiled(scheduled(module, target), target).asm["amdgcn"])
    assert any(name.startswith("global_load") for name in names)
    assert any(name.startswith("buffer_store") for name in names)


@pytest.mark.parametrize("target", TARGETS)
def test_strides_of_the_launch_too_far_apart_stop_the_kernel(target: str):
    module = module_of(copy, x=matrix("f32"), y=matrix("f32"), M=32, N=32)
    result = compiled(scheduled(module, target), target)
    for stride, stops in ((64, False), (EXTENT // 4 // 31 - 64, False), (EXTENT // 4 // 31 + 64, True), (-64, True)):
        x = np.lib.stride_tricks.as_strided(normal(1, 32, dtype="f32"), (1, 32), (4 * stride, 4))
        y = np.zeros((1, 32), np.float32)
        if stops:
            with pytest.raises(EmulatorError, match="trap"):
                emulate(result, target, [x, y], (1, 1))
        else:
            emulate(result, target, [x, y], (1, 1))
            np.testing.assert_array_equal(y, x)
