"""Hand-written PTX for the emulator's tests: wrap instructions into kernels, check them with ptxas, run them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from tilewright.backends.errors import BackendError
from tilewright.backends.nvidia import ptxas
from tilewright.runtime.emulator.nvidia import GlobalMemory, LaunchStatistics, PtxEmulator

LANE = np.arange(32)
BITS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


@cache
def assembler() -> bool:
    try:
        ptxas.find_ptxas()
    except BackendError:
        return False
    return True


@cache
def legal(ptx: str, arch: str = "sm_90a") -> str:
    """The text, which ptxas accepts (where there is one)."""
    if assembler():
        ptxas.assemble(ptx, arch, level=1)
    return ptx


def wrap(body: str, params: int = 1, arch: str = "sm_90a", version: str = "8.6") -> str:
    """An entry k whose pointers p0, p1, ... are in %p0_, %p1_ ...; %thread and %lane hold the thread and the lane."""
    declared = ", ".join(f".param .u64 p{i}" for i in range(params))
    loads = "\n".join(f"  ld.param.u64 %ptr{i}, [p{i}];" for i in range(params))
    return f"""
.version {version}
.target {arch}
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry k({declared})
{{
  .reg .b64 %ptr<{params + 1}>;
  .reg .b32 %thread, %lane, %sm;
{loads}
  mov.u32 %thread, %tid.x;
  and.b32 %lane, %thread, 31;
  mov.u32 %sm, smem;
{body}
  ret;
}}
"""


def launch(
    ptx: str,
    arrays: Sequence[np.ndarray],
    threads: int = 32,
    blocks: Any = (1,),
    extra: bytes = b"",
    **options: Any,
) -> tuple[list[np.ndarray], LaunchStatistics]:
    """Run entry k with the addresses of the arrays (and ``extra`` parameter bytes): their contents afterwards.

    The race detector is on unless ``options`` say ``races=False``.
    """
    memory = GlobalMemory()
    addresses = [memory.allocate(array, f"array {i}") for i, array in enumerate(arrays)]
    packed = np.array(addresses, np.uint64).tobytes()
    packed += bytes(-len(packed) % 64 if extra else 0) + extra
    statistics = PtxEmulator(ptx, "k").launch(memory, blocks, (threads,), packed, **{"races": True} | options)
    return [memory.read_back(address) for address in addresses], statistics


def run(
    body: str,
    arrays: Sequence[np.ndarray],
    threads: int = 32,
    check: bool = True,
    blocks: Any = (1,),
    **options: Any,
) -> list[np.ndarray]:
    """Wrap, have ptxas check, run."""
    ptx = wrap(body, len(arrays))
    if check:
        legal(ptx)
    return launch(ptx, arrays, threads, blocks, **options)[0]


def evaluate(
    lines: Sequence[tuple[str, Any]],
    inputs: dict[str, np.ndarray],
    arch: str = "sm_90a",
    execute: Callable[..., list[np.ndarray]] | None = None,
) -> list[np.ndarray]:
    """Each line, an instruction that writes %d (bool results: a predicate), on every value of the inputs.

    ``lines`` has the dtype of each result. Inputs are registers of their names; bool ones predicates. The longest
    input, rounded up to warps, says how many values; the others repeat. ``execute``: what runs it, (ptx, arrays,
    threads, blocks) -> arrays; the emulator by default.
    """
    count = -(-max(value.size for value in inputs.values()) // 32) * 32
    threads = min(count, 256)
    registers, loads, stores = [], [], []
    image = np.zeros((len(inputs), count), np.uint64)
    for row, (name, value) in enumerate(inputs.items()):
        value = np.resize(value, count)
        raw = np.zeros((count, 8), np.uint8)
        raw[:, : value.itemsize] = np.ascontiguousarray(value)[:, None].view(np.uint8)
        image[row] = raw.view(np.uint64)[:, 0]
        bits = BITS[value.itemsize]
        place = f"[%in+{8 * count * row}]"
        if value.dtype == np.bool_:
            registers.append(f".reg .pred %{name}; .reg .b16 %{name}_;")
            loads.append(f"ld.global.b16 %{name}_, {place}; setp.ne.b16 %{name}, %{name}_, 0;")
        else:
            registers.append(f".reg .{bits} %{name};")
            loads.append(f"ld.global.{bits} %{name}, {place};")
    for row, (text, dtype) in enumerate(lines):
        dtype = np.dtype(dtype)
        bits = BITS[dtype.itemsize]
        place = f"[%out+{8 * count * row}]"
        registers.append(f".reg .{'pred' if dtype == np.bool_ else bits} %d{row};")
        loads.append(re.sub(r"%d\b", f"%d{row}", text))
        if dtype == np.bool_:
            registers.append(f".reg .b16 %e{row};")
            stores.append(f"selp.b16 %e{row}, 1, 0, %d{row}; st.global.b16 {place}, %e{row};")
        else:
            stores.append(f"st.global.{bits} {place}, %d{row};")
    body = "\n".join(
        [
            ".reg .b64 %in, %out, %off; .reg .b32 %place, %block;",
            f"mov.u32 %block, %ctaid.x; mad.lo.u32 %place, %block, {threads}, %thread;",
            "mul.wide.u32 %off, %place, 8; add.u64 %in, %ptr0, %off; add.u64 %out, %ptr1, %off;",
            *registers,
            *loads,
            *stores,
        ]
    )
    ptx = legal(wrap(body, 2, arch=arch), arch)
    arrays = [image, np.zeros((len(lines), count), np.uint64)]
    out = (execute or _emulate)(ptx, arrays, threads, (-(-count // threads),))[1]
    results = []
    for row, (_, dtype) in enumerate(lines):
        dtype = np.dtype(dtype)
        results.append(out[row][:, None].view(np.uint8)[:, : dtype.itemsize].copy().view(dtype)[:, 0])
    return results


def _emulate(ptx: str, arrays: Sequence[np.ndarray], threads: int, blocks: Any) -> list[np.ndarray]:
    return launch(ptx, arrays, threads, blocks)[0]


def check_table(cases: Sequence[tuple[str, Any, Any]], inputs: dict[str, np.ndarray], arch: str = "sm_90a") -> None:
    """(instruction, result dtype, expected values) each: bit-equal, NaN as NaN."""
    got = evaluate([(text, dtype) for text, dtype, _ in cases], inputs, arch)
    for (text, dtype, wanted), actual in zip(cases, got, strict=True):
        wanted = np.broadcast_to(np.asarray(wanted).astype(dtype), actual.shape)
        if np.dtype(dtype).kind == "f":
            np.testing.assert_array_equal(actual, wanted, err_msg=text)
            signs = np.isnan(wanted) | (np.signbit(actual) == np.signbit(wanted))
            assert signs.all(), f"{text}: signs"
        else:
            np.testing.assert_array_equal(actual, wanted, err_msg=text)


def ints(bits: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = [int(v) for v in rng.integers(0, 1 << (bits - 1), 20)] + [
        0,
        1,
        2,
        31,
        32,
        (1 << bits) - 1,
        1 << (bits - 1),
    ]
    values += [(1 << (bits - 1)) - 1, 3, 0xFF, 7, 100]
    return np.array([v & ((1 << bits) - 1) for v in values], object)


def typed(values: np.ndarray, dtype: Any) -> np.ndarray:
    bits = np.dtype(dtype).itemsize * 8
    return np.array([int(v) & ((1 << bits) - 1) for v in values], f"u{bits // 8}").view(dtype)
