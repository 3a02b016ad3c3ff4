"""Compare the PTX emulator with this machine's GPU, and write what was found.

    python tests/gpu/emulator_agreement.py OUT.json

Four parts: the generated corpus of instructions, matrix instructions on random operands, kernels of the library on
random normal inputs, and every snippet that the emulator's own tests run, which is replayed on the GPU with the same
inputs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "support"))

import ptx_matrix_corpus  # noqa: E402
import ptx_snippets  # noqa: E402
from ptx_corpus import Family, families  # noqa: E402
from ptx_on_gpu import PtxOnGpu  # noqa: E402

TARGET = "sm_90a"
#: what differs from machine to machine, or from run to run
UNREPEATABLE = ("globaltimer", "%clock", "%smid", "%nsmid", "nanosleep", "brkpt", "vprintf", "trap")


def distance(emulated: np.ndarray, real: np.ndarray, width: int) -> np.ndarray:
    """Units in the last place between two arrays of float bit patterns; 0 for two NaNs."""
    dtype = {16: np.float16, 32: np.float32, 64: np.float64}[width]
    a, b = emulated.view(dtype), real.view(dtype)
    ordered = []
    for bits in (emulated, real):
        wide = bits.astype(np.int64)
        sign = wide >> (width - 1) & 1
        ordered.append(np.where(sign == 1, -(wide & ((1 << (width - 1)) - 1)), wide))
    far: np.ndarray = np.abs(ordered[0] - ordered[1])
    return np.where(np.isnan(a) & np.isnan(b), 0, far)


def compare_family(gpu: PtxOnGpu, family: Family) -> dict[str, Any]:
    """Each instruction of the family: how many results differ, and the first of them."""

    def on_gpu(ptx: str, arrays: Sequence[np.ndarray], threads: int, blocks: Sequence[int]) -> list[np.ndarray]:
        return gpu.launch(ptx, arrays, threads, blocks)

    emulated = ptx_snippets.evaluate(family.lines, family.inputs)
    real = ptx_snippets.evaluate(family.lines, family.inputs, execute=on_gpu)
    wrong, furthest = [], 0
    for (text, _), ours, theirs in zip(family.lines, emulated, real, strict=True):
        if family.ulps:
            far = distance(ours, theirs, 32)
            furthest = max(furthest, int(far.max()))
            different = far > family.ulps
        else:
            different = ours.view(f"u{ours.itemsize}") != theirs.view(f"u{theirs.itemsize}")
        if different.any():
            i = int(np.flatnonzero(different)[0])
            inputs = {name: hex(int(np.resize(value, len(ours))[i])) for name, value in family.inputs.items()}
            wrong.append(
                {"instruction": text, "different": int(different.sum()), "inputs": inputs,
                 "emulated": hex(int(ours[i])), "gpu": hex(int(theirs[i]))}
            )  # fmt: skip
    row: dict[str, Any] = {"instructions": len(family.lines), "values": len(emulated[0]), "different": wrong}
    if family.ulps:
        row |= {"allowed_ulps": family.ulps, "furthest_ulps": furthest}
    return row


def compare_product(gpu: PtxOnGpu, product: ptx_matrix_corpus.Product) -> dict[str, Any]:
    """How many results differ, and the first of them, emulated and real."""
    blocks = (ptx_matrix_corpus.BLOCKS,)
    options = {"shared_bytes": product.shared_bytes}
    ptx = ptx_snippets.legal(product.ptx)
    ours = ptx_snippets.launch(ptx, product.arrays, product.threads, blocks, **options)[0][-1]
    theirs = gpu.launch(ptx, product.arrays, product.threads, blocks, **options)[-1]
    different = ours.view(f"u{ours.itemsize}") != theirs.view(f"u{theirs.itemsize}")
    row: dict[str, Any] = {"values": ours.size, "different": int(different.sum())}
    if different.any():
        row["first"] = [float(product.unpack(x)[product.unpack(different)][0]) for x in (ours, theirs)]
    return row


def compare_kernels() -> dict[str, Any]:
    """Kernels of the library, the same artifact on both devices: results that differ, and by how much at most.

    Those with exponentials use ``ex2.approx``, which may differ in the last places.
    """
    import ml_dtypes
    import torch

    import tilewright as tw
    from tilewright.kernels.attention import LOG2E, attention
    from tilewright.kernels.gemm import gemm
    from tilewright.kernels.rmsnorm import rmsnorm
    from tilewright.kernels.softmax import softmax

    rng = np.random.default_rng(0)

    def normal(*shape: int, dtype: Any = ml_dtypes.bfloat16) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    def on_gpu(array: np.ndarray) -> torch.Tensor:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
        return torch.from_numpy(array).cuda()

    square = [normal(300, 200), normal(200, 264), np.zeros((300, 264), ml_dtypes.bfloat16)]
    wide = [normal(256, 192, dtype=np.float32), normal(192, 128, dtype=np.float32), np.zeros((256, 128), np.float32)]
    heads = [normal(1, 2, 200, 64) for _ in range(3)]
    cases: dict[str, tuple[Any, tuple[int, ...], list[Any], dict[str, Any]]] = {
        "gemm bf16": (gemm, (3, 2), square, {"BM": 128, "BN": 256}),
        "gemm f16": (gemm, (3, 3), [x.astype(np.float16) for x in square], {"BM": 128, "BN": 128}),
        "gemm f32": (gemm, (2, 1), wide, {"BM": 128, "BN": 128, "BK": 32}),
        "rmsnorm f32": (rmsnorm, (64,), [normal(64, 1000, dtype=np.float32), normal(1000, dtype=np.float32),
                                         np.zeros((64, 1000), np.float32), 1e-5], {"BM": 1, "BN": 1024}),
        "softmax f32": (softmax, (64,), [normal(64, 1000, dtype=np.float32), np.zeros((64, 1000), np.float32)],
                        {"BN": 1024}),
        "attention bf16": (attention, (2, 2, 1), [*heads, np.zeros_like(heads[0]), 64**-0.5 * LOG2E],
                           {"D": 64, "CAUSAL": True}),
    }  # fmt: skip
    rows = {}
    for name, (kernel, grid, arguments, meta) in cases.items():
        real = [on_gpu(x) if isinstance(x, np.ndarray) else x for x in arguments]
        tw.device("cuda:0").launch(kernel, grid, *real, **meta)
        tw.device("emulate:sm_90a").launch(kernel, grid, *arguments, **meta)
        place = max(i for i, x in enumerate(arguments) if isinstance(x, np.ndarray))
        ours, theirs = arguments[place].astype(np.float64), real[place].double().cpu().numpy()
        rows[name] = {
            "values": ours.size,
            "different": int((ours != theirs).sum()),
            "largest_relative": float((np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1e-3)).max()),
        }
    return rows


class Replay:
    """A pytest plugin: every launch of the emulator's tests is repeated on the GPU."""

    def __init__(self, gpu: PtxOnGpu) -> None:
        self.gpu = gpu
        self.launches = self.skipped = 0
        self.different: list[str] = []
        self.test = ""
        self._emulate = ptx_snippets.launch

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        modules: set[ModuleType] = {item.module for item in items if isinstance(item, pytest.Function)}
        for module in [ptx_snippets, *modules]:
            if getattr(module, "launch", None) is self._emulate:
                module.launch = self.launch  # type: ignore[attr-defined]

    def pytest_runtest_call(self, item: pytest.Item) -> None:
        self.test = item.nodeid.split("/")[-1]

    def launch(
        self, ptx: str, arrays: Sequence[np.ndarray], threads: int = 32, blocks: Any = (1,), extra: bytes = b"",
        **options: Any,
    ) -> Any:  # fmt: skip
        result = self._emulate(ptx, arrays, threads, blocks, extra, **options)
        self._repeat(result[0], ptx, arrays, threads, blocks, extra, options)
        return result

    def _repeat(
        self, emulated: list[np.ndarray], ptx: str, arrays: Sequence[np.ndarray], threads: int, blocks: Any,
        extra: bytes, options: dict[str, Any],
    ) -> None:  # fmt: skip
        # a tensor map lies among the parameters in the emulator's own form
        other = f".target {TARGET}\n" not in ptx
        if extra or other or "seed" in options or any(word in ptx for word in UNREPEATABLE):
            self.skipped += 1
            return
        real = self.gpu.launch(ptx, arrays, threads, blocks, shared_bytes=options.get("shared_bytes", 0))
        self.launches += 1
        for i, (ours, theirs) in enumerate(zip(emulated, real, strict=True)):
            if np.ascontiguousarray(ours).tobytes() != theirs.tobytes():
                self.different.append(f"{self.test}: array {i}")


def replay(gpu: PtxOnGpu) -> dict[str, Any]:
    plugin = Replay(gpu)
    files = sorted(str(path) for path in (TESTS / "emulator").glob("test_ptx*.py"))
    status = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", *files], plugins=[plugin])
    return {"status": int(status), "launches": plugin.launches, "skipped": plugin.skipped,
            "different": plugin.different}  # fmt: skip


def agreement() -> dict[str, Any]:
    gpu = PtxOnGpu()
    result: dict[str, Any] = {"gpu": gpu.device.name}
    result["instructions"] = {family.name: compare_family(gpu, family) for family in families()}
    for operands in ("integers", "normal", "extreme"):
        cases = ptx_matrix_corpus.products(operands)
        result[f"matrix, {operands}"] = {product.name: compare_product(gpu, product) for product in cases}
    result["kernels"] = compare_kernels()
    result["snippets of the tests"] = replay(gpu)
    return result


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(agreement(), indent=1) + "\n")
