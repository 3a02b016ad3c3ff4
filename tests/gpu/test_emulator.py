"""The PTX emulator against this machine's GPU (`emulator_agreement`; committed results in benchmarks/results)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

from emulator_agreement import compare_family, compare_kernel, compare_product  # noqa: E402
from library_launches import launches  # noqa: E402
from ptx_corpus import families  # noqa: E402
from ptx_matrix_corpus import products  # noqa: E402
from ptx_on_gpu import PtxOnGpu  # noqa: E402


@pytest.fixture(scope="module")
def gpu() -> PtxOnGpu:
    return PtxOnGpu()


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_instructions(gpu, family):
    assert compare_family(gpu, family)["different"] == []


@pytest.mark.parametrize("operands", ["integers", "normal", "extreme"])
def test_matrix_instructions(gpu, operands):
    assert {p.name: compare_product(gpu, p)["different"] for p in products(operands)} == {
        p.name: 0 for p in products(operands)
    }


@pytest.mark.parametrize("launch", launches(), ids=lambda launch: launch.name)
def test_kernels(launch):
    row = compare_kernel(launch)
    assert row["different"] == 0 if launch.exact else row["largest_relative"] <= launch.tolerance
