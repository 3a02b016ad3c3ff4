"""A part of torch's database of operators through the backend; `opinfo.py` beside this file goes through all of it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest", reason="torch's database of operators needs it")
if torch.cuda.is_available():
    pytest.skip("compares on the CPU", allow_module_level=True)

from opinfo import entries, sweep  # noqa: E402

#: what the backend rewrites, by the names of the database
REWRITTEN = [
    *("nn.functional.linear", "matmul", "__rmatmul__", "mm", "addmm", "nn.functional.scaled_dot_product_attention"),
    *("nn.functional.rms_norm", "nn.functional.layer_norm", "softmax", "nn.functional.softmax_with_dtype"),
    *("nn.functional.cross_entropy", "rsqrt", "nn.functional.relu", "nn.functional.silu", "nn.functional.gelu"),
]
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # torch's own, about its samples
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.exhaustive)])
def test_what_is_rewritten_with_gradients(dtype):
    ops = [op for op in entries() if op.name in REWRITTEN]
    assert len(ops) >= len(REWRITTEN) - 1
    summary = sweep(ops, [getattr(torch, dtype)], most=3, gradients=True)
    assert summary.failures == []
    assert summary.taken["linear"] and summary.taken["matmul"] and summary.taken["softmax"], summary.taken


@pytest.mark.parametrize("part", range(2))
def test_each_twentieth_entry(part):
    ops = [op for op in entries(every=10)[part::2] if op.name not in REWRITTEN]
    summary = sweep(ops, [torch.float32], most=1)
    assert summary.failures == []
    assert summary.samples > 25
