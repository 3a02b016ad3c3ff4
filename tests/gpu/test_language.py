"""Every function and dtype of the language on a real CUDA device, against NumPy. Skipped where there is none."""

from __future__ import annotations

import subprocess
import sys

import pytest
from language_programs import CASES, Case
from products import product_behind

import tilewright as tw
from tilewright.compiler.options import CompileOptions

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from gpu_arrays import to_device, to_host  # noqa: E402


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_the_device(case: Case):
    arrays = case.arrays()
    tensors = [to_device(array) for array in arrays]
    options, meta = CompileOptions.split(case.meta)
    case.kernel[case.grid](*tensors, **case.meta)
    torch.cuda.synchronize()
    assert options is not None and meta is not None
    case.check([to_host(t, a) for t, a in zip(tensors, arrays, strict=True)])


PRINTS = """
import torch, tilewright as tw

@tw.kernel
def show(x: tw.Tensor, n: tw.int64, s: tw.float32):
    t = tw.load(x, 0, 4)
    tw.device_print("n = {}, s = {}, 100%, {{}}", n, s)
    tw.device_print("{} is {}", t, t > 1)

show[(1,)](torch.arange(4, device="cuda", dtype=torch.float16) + 0.5, 2**40, 1.5)
torch.cuda.synchronize()
"""


def test_device_print(tmp_path):
    (tmp_path / "program.py").write_text(PRINTS)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"n = {2**40}, s = 1.5, 100%, {{}}" in lines
    assert sorted(line for line in lines if "is" in line) == [f"[{i}] {i + 0.5} is {int(i > 0)}" for i in range(4)]


ASSERTS = """
import torch, tilewright as tw

@tw.kernel
def checked(x: tw.Tensor):
    t = tw.load(x, 0, 256)
    tw.device_assert(t >= 0, "x is negative")
    tw.store(x, 0, t + 1)

x = torch.zeros(256, device="cuda")
checked[(1,)](x)
torch.cuda.synchronize()
assert x.sum() == 256
print("passed once", flush=True)
x[200] = -5
checked[(1,)](x)
torch.cuda.synchronize()
"""


def test_device_assert(tmp_path):
    (tmp_path / "program.py").write_text(ASSERTS)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode != 0
    assert "passed once" in done.stdout
    assert "x is negative" in done.stdout + done.stderr


@tw.kernel
def promised(x: tw.Tensor, y: tw.Tensor):
    tw.assume(x.shape[0] % 512 == 0)
    i = tw.program_id(0)
    tw.store(y, i, tw.load(x, i, 512) * 2)


def test_assume():
    x = torch.randn(4096, device="cuda")
    y = torch.empty_like(x)
    promised[(8,)](x, y)
    assert torch.equal(y, x * 2)


@pytest.mark.parametrize("first", [0, 4, 8, 13, 36])
def test_products_begin_and_end_anywhere(first):
    """Lines that begin at no multiple of 16 bytes are reported to be an illegal instruction of the copy engine."""
    a, b = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((64, 72), (96, 64)))
    whole = torch.full((64, 64), 7.0, device="cuda")
    product_behind[(1,)](a, b, whole[:, :61], first)
    exact = a[:, first:].float() @ b[: 72 - first, :61].float()
    torch.testing.assert_close(whole[:, :61], exact, rtol=1e-4, atol=1e-4)
    assert (whole[:, 61:] == 7).all(), "it writes 16 bytes at once, also behind the end of a line"
