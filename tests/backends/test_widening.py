"""bfloat16 becomes float32 by moving bits, whole vectors of it without taking words apart."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw

BF16 = ml_dtypes.bfloat16


@tw.kernel
def widened(x: tw.Tensor, y: tw.Tensor):
    m = tw.program_id(0)
    tw.store(y, (m, 0), tw.load(x, (m, 0), (2, 4096)).to(tw.float32))


@pytest.mark.parametrize("columns", [4096, 4093])
@pytest.mark.parametrize("device", ["emulate:sm_80", "emulate:sm_90a", "emulate:gfx942"])
def test_every_bfloat16_keeps_its_bits(device: str, columns: int) -> None:
    """Infinities, subnormals and NaNs with their payloads too; in vectors and, where rows are odd, one by one."""
    bits = np.random.default_rng(0).permutation(1 << 16).astype(np.uint16)[: 16 * columns].reshape(16, columns)
    y = np.full((16, columns), 7, np.float32)
    tw.device(device).launch(widened, (8,), bits.view(BF16), y)
    np.testing.assert_array_equal(y.view(np.uint32), bits.astype(np.uint32) << 16)


def test_the_upper_half_of_a_word_takes_one_instruction() -> None:
    x, y = (tw.spec(dtype, (2, 4096), align=16) for dtype in ("bf16", "f32"))
    ptx = tw.compile(widened, "sm_90a", {"x": x, "y": y}, num_warps=4).asm["ptx"]
    each = 2 * 4096 // 128
    assert len(re.findall(r"and\.b32 .*, -65536;", ptx)) == each // 2
    assert "cvt.f32.bf16" not in ptx and "{%rs" not in ptx
