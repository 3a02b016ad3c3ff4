"""Compare the PTX emulator with this machine's GPU, and write what was found.

    python tests/gpu/emulator_agreement.py OUT.json [--operands N] [--parts instructions,matrix,snippets,kernels]
        [--share K/N]

Four parts: the generated corpus of instructions, each on N values for each operand, matrix instructions on random
operands, kernels of the library on random normal inputs, and every snippet that the emulator's own tests run, which is
replayed on the GPU with the same inputs. A share is every Nth of the kernels, from number K on.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "support"))

import library_launches  # noqa: E402
import ptx_corpus  # noqa: E402
import ptx_matrix_corpus  # noqa: E402
import ptx_snippets  # noqa: E402
from ptx_corpus import FLOATS, Family, families  # noqa: E402
from ptx_on_gpu import PtxOnGpu  # noqa: E402

from tilewright.backends.errors import BackendError  # noqa: E402
from tilewright.runtime.errors import DeviceError  # noqa: E402

TARGET = "sm_90a"
#: recorded results of an instruction that differ, at most
EXAMPLES = 4
#: what differs from machine to machine, or from run to run
UNREPEATABLE = ("globaltimer", "%clock", "%smid", "%nsmid", "nanosleep", "brkpt", "vprintf", "trap")


def distance(emulated: np.ndarray, real: np.ndarray, kind: str) -> np.ndarray:
    """Units in the last place between two arrays of bit patterns of a float type; 0 for two NaNs."""
    width, dtype = FLOATS[kind], ptx_matrix_corpus.NUMPY[kind]
    a, b = (x.view(dtype).astype(np.float64) for x in (emulated, real))
    ordered = []
    for bits in (emulated, real):
        wide = bits.view(f"u{bits.itemsize}").astype(np.int64)
        sign = wide >> (width - 1) & 1
        ordered.append(np.where(sign == 1, -(wide & ((1 << (width - 1)) - 1)), wide))
    far: np.ndarray = np.abs(ordered[0] - ordered[1])
    return np.where(np.isnan(a) & np.isnan(b), 0, far)


def compare_family(gpu: PtxOnGpu, family: Family) -> dict[str, Any]:
    """Each instruction of the family: how many results differ, and a few of them."""

    def on_gpu(ptx: str, arrays: Sequence[np.ndarray], threads: int, blocks: Sequence[int]) -> list[np.ndarray]:
        return gpu.launch(ptx, arrays, threads, blocks)

    emulated = ptx_snippets.evaluate(family.lines, family.inputs)
    real = ptx_snippets.evaluate(family.lines, family.inputs, execute=on_gpu)
    wrong, furthest = [], 0
    for (text, _), ours, theirs in zip(family.lines, emulated, real, strict=True):
        if family.ulps:
            far = distance(ours, theirs, family.kind)
            furthest = max(furthest, int(far.max()))
            different = far > family.ulps
        else:
            different = ours.view(f"u{ours.itemsize}") != theirs.view(f"u{theirs.itemsize}")
        if different.any():
            used = {name: value for name, value in family.inputs.items() if re.search(rf"%{name}\b", text)}
            examples = []
            for i in np.flatnonzero(different)[:EXAMPLES]:
                inputs = {name: hex(int(np.resize(value, len(ours))[i])) for name, value in used.items()}
                examples.append({**inputs, "emulated": hex(int(ours[i])), "gpu": hex(int(theirs[i]))})
            wrong.append({"instruction": text, "different": int(different.sum()), "examples": examples})
    row: dict[str, Any] = {"instructions": len(family.lines), "values": len(emulated[0]), "different": wrong}
    if family.ulps:
        row |= {"allowed_ulps": family.ulps, "furthest_ulps": furthest}
    return row


def compare_product(gpu: PtxOnGpu, product: ptx_matrix_corpus.Product) -> dict[str, Any]:
    """How many results differ, and a few of them, emulated and real."""
    blocks = (ptx_matrix_corpus.BLOCKS,)
    options = {"shared_bytes": product.shared_bytes}
    ptx = ptx_snippets.legal(product.ptx)
    ours = ptx_snippets.launch(ptx, product.arrays, product.threads, blocks, **options)[0][-1]
    theirs = gpu.launch(ptx, product.arrays, product.threads, blocks, **options)[-1]
    different = ours.view(f"u{ours.itemsize}") != theirs.view(f"u{theirs.itemsize}")
    row: dict[str, Any] = {"values": ours.size, "different": int(different.sum())}
    if different.any():
        pairs = zip(ours[different][:EXAMPLES], theirs[different][:EXAMPLES], strict=True)
        row["emulated and gpu"] = [[str(a), str(b)] for a, b in pairs]
    return row


def compare_kernel(launch: library_launches.Launch) -> dict[str, Any]:
    """The same artifact on both devices: elements of all arrays that differ, and by how much at most.

    Kernels with exponentials and the like use ``ex2.approx``, ``rsqrt.approx``, ..., which may differ in the last
    places.
    """
    from gpu_arrays import to_device, to_host

    real = [to_device(x) if isinstance(x, np.ndarray) else x for x in launch.arguments]
    launch.run("cuda:0", real)
    launch.run("emulate:sm_90a", launch.arguments)
    values = different = 0
    furthest = 0.0
    for position, ours in launch.arrays():
        theirs = to_host(real[position], ours)
        mine, other = (np.ascontiguousarray(x).astype(np.float64) for x in (ours, theirs))
        if position in launch.unordered:
            mine, other = np.sort(mine, axis=None), np.sort(other, axis=None)
        apart = (mine != other) & ~(np.isnan(mine) & np.isnan(other))
        values, different = values + ours.size, different + int(apart.sum())
        if apart.any():
            relative = np.abs(mine[apart] - other[apart]) / np.maximum(np.abs(other[apart]), 1e-3)
            furthest = max(furthest, float(relative.max()))
    return {"exact": launch.exact, "values": values, "different": different, "largest_relative": furthest}


class Replay:
    """A pytest plugin: every launch of the emulator's tests is repeated on the GPU."""

    def __init__(self, gpu: PtxOnGpu) -> None:
        self.gpu = gpu
        self.launches = self.skipped = 0
        self.different: list[str] = []
        #: the same for instructions that the PTX ISA calls approximate
        self.approximate: list[str] = []
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
            if "atom." in ptx:  # which thread gets which old value is open
                ours, theirs = np.sort(ours, axis=None), np.sort(theirs, axis=None)
            mine, other = (np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8) for x in (ours, theirs))
            if not np.array_equal(mine, other):
                words = [x[: x.size // 4 * 4].view(np.uint32) for x in (mine, other)]
                apart = np.flatnonzero(words[0] != words[1])
                some = [f"word {n}: {words[0][n]:#x} {words[1][n]:#x}" for n in apart[:EXAMPLES]]
                kept = self.approximate if ".approx" in ptx else self.different
                kept.append(f"{self.test}: array {i}, emulated and gpu: {', '.join(some)}")


def replay(gpu: PtxOnGpu) -> dict[str, Any]:
    plugin = Replay(gpu)
    found = sorted((TESTS / "emulator").glob("test_ptx*.py"))
    files = [str(path) for path in found if "ptx_snippets" in path.read_text()]
    status = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", *files], plugins=[plugin])
    return {"status": int(status), "launches": plugin.launches, "skipped": plugin.skipped,
            "different": plugin.different, "approximate": plugin.approximate}  # fmt: skip


PARTS = ("instructions", "matrix", "snippets", "kernels")


def agreement(path: Path, parts: Sequence[str], share: slice) -> None:
    """Compare ``parts``, of the kernels a ``share``.

    The file is written again and again, as a fault of the GPU may end the process.
    """
    import torch

    gpu = PtxOnGpu()
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name()}

    def record(part: str, cases: Iterable[Any], compare: Callable[[Any], dict[str, Any]]) -> None:
        rows = result[part] = {}
        for case in cases:
            try:
                rows[case.name] = compare(case)
            except (BackendError, DeviceError) as error:
                rows[case.name] = {"error": str(error)}
            path.write_text(json.dumps(result, indent=1) + "\n")

    if "instructions" in parts:
        record("instructions", families(), partial(compare_family, gpu))
    for operands in ("integers", "normal", "extreme") if "matrix" in parts else ():
        record(f"matrix, {operands}", ptx_matrix_corpus.products(operands), partial(compare_product, gpu))
    if "snippets" in parts:
        result["snippets of the tests"] = replay(gpu)
        path.write_text(json.dumps(result, indent=1) + "\n")
    if "kernels" in parts:
        record("kernels", list(library_launches.launches())[share], compare_kernel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--operands", type=int, default=ptx_corpus.VALUES, help="values of each (a multiple of 1024)")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--share", default="0/1", metavar="K/N")
    options = parser.parse_args()
    ptx_corpus.VALUES = options.operands
    first, shares = (int(number) for number in options.share.split("/"))
    agreement(options.out, options.parts.split(","), slice(first, None, shares))


if __name__ == "__main__":
    main()
