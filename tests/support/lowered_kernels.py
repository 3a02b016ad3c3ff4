"""Kernels written as text: compiled for all targets, run on emulated GPUs, compared with the interpreter."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from tilewright.backends.amd import compile as amd
from tilewright.backends.nvidia import compile as nvidia
from tilewright.ir import interpreter
from tilewright.ir.abi import KernelABI, ScalarParam, TensorParam
from tilewright.ir.core import Function
from tilewright.ir.layout import blocked
from tilewright.ir.parser import parse_module
from tilewright.ir.scratch import scratch_bytes
from tilewright.ir.target import get_target
from tilewright.ir.verifier import verify_function
from tilewright.runtime.emulator.amd import AmdEmulator, GlobalMemory
from tilewright.runtime.emulator.nvidia import PtxEmulator

BF16 = ml_dtypes.bfloat16
TOLERANCE = {np.dtype(np.float32): 3e-6, np.dtype(np.float16): 2e-3, np.dtype(BF16): 1.6e-2}


def layouts(**shapes: tuple[Any, ...]) -> Any:
    """warp size -> alias definitions of blocked layouts: name=(shape, element bits, warps, order)."""

    def text(warp_size: int) -> str:
        made = {n: blocked(s[0], s[1], s[2], warp_size, s[3]) for n, s in shapes.items()}
        return "".join(f"#{name} = {layout}\n" for name, layout in made.items())

    return text


def parse(text: str, aliases: Any, warp_size: int) -> Function:
    """The only function of the text, with the scratch of its operations placed one behind the other."""
    function = parse_module(aliases(warp_size) + text).functions[0]
    verify_function(function)
    used = int(function.attributes.get("shared_bytes", 0))
    for op in function.walk():
        size = scratch_bytes(op)
        if size:
            op.attributes["scratch"] = used
            used += -(-size // 128) * 128
    function.attributes["shared_bytes"] = used
    return function


def pack_arguments(
    abi: KernelABI, addresses: Mapping[str, int], values: Mapping[str, Any], grid: Sequence[int]
) -> bytes:
    """The kernel's arguments as `tilewright.ir.abi` orders them, each aligned to its size."""
    fields: list[bytes] = []
    for param in abi.params:
        value = values[param.name]
        if isinstance(param, ScalarParam):
            fields.append(np.asarray(value).tobytes())
            continue
        assert isinstance(param, TensorParam)
        fields.append(struct.pack("<Q", addresses[param.name]))
        fields += [struct.pack("<i", n) for n, known in zip(value.shape, param.shape, strict=True) if known is None]
        strides = [s // value.itemsize for s in value.strides]
        assert all(k or s % param.alignment == 0 for s, k in zip(value.strides, param.strides, strict=True)), param
        fields += [struct.pack("<q", s) for s, known in zip(strides, param.strides, strict=True) if known is None]
    fields += [struct.pack("<i", n) for n in grid]
    packed = b""
    for f in fields:
        packed += bytes(-len(packed) % len(f)) + f
    return packed + bytes(64)


def emulate(
    function: Function, arguments: Mapping[str, Any], grid: Sequence[int], blocks: int | None = None
) -> dict[str, np.ndarray]:
    """The arrays after running the gfx942 code on the emulator."""
    result = amd.compile_function(function, get_target("gfx942"))
    emulator = AmdEmulator(result.asm["amdgcn"], result.abi.name, "gfx942")
    return run(emulator.launch, result.abi, arguments, grid, blocks)


def emulate_ptx(function: Function, arguments: Mapping[str, Any], grid: Sequence[int]) -> dict[str, np.ndarray]:
    """The arrays after running the sm_90a code on the emulator, which looks for races."""
    result = nvidia.compile_function(function, get_target("sm_90a"))
    emulator = PtxEmulator(result.asm["ptx"], result.abi.name)
    return run(partial(emulator.launch, shared_bytes=result.abi.shared_bytes, races=True), result.abi, arguments, grid)


def run(
    launch: Callable[..., Any],
    abi: KernelABI,
    arguments: Mapping[str, Any],
    grid: Sequence[int],
    blocks: int | None = None,
) -> dict[str, np.ndarray]:
    """The arrays after a launch on an emulator."""
    memory = GlobalMemory()
    arrays = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
    addresses = {name: memory.allocate(array, name) for name, array in arrays.items()}
    full = (*grid, 1, 1, 1)[:3]
    launched = full if blocks is None else (blocks,)
    launch(memory, launched, (abi.threads,), pack_arguments(abi, addresses, arguments, full))
    return {name: memory.read_back(address) for name, address in addresses.items()}


def check(text: str, aliases: Any, arguments: Mapping[str, Any], grid: Sequence[int], tolerance: float | None = None):
    """Compile for every target, run on the emulator, compare all arrays with the interpreter's."""
    hopper = emulate_ptx(parse(text, aliases, 32), arguments, grid)
    amd.compile_function(parse(text, aliases, 64), get_target("gfx950"))
    function = parse(text, aliases, 64)
    got = emulate(function, arguments, grid)
    wanted = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in arguments.items()}
    interpreter.run(function, wanted, grid)
    for name, array in got.items():
        assert_close(array, wanted[name], name, tolerance)
        assert_close(hopper[name], wanted[name], f"{name} on sm_90a", tolerance)
    assert any(array.tobytes() != arguments[name].tobytes() for name, array in got.items()), "nothing was written"
    return got


def assert_close(got: np.ndarray, wanted: np.ndarray, name: str, tolerance: float | None) -> None:
    if got.dtype.kind in "iub" and got.dtype != BF16:
        np.testing.assert_array_equal(got, wanted, err_msg=name)
        return
    bound = tolerance or TOLERANCE[got.dtype]
    np.testing.assert_allclose(got.astype(np.float64), wanted.astype(np.float64), bound, bound, err_msg=name)


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)
