"""The same LLVM operation on the CPU and in the AMD emulator."""

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from amd_assembly import ARCHS, compile_ir, elementwise, run

_TYPES = {"i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64, "float": np.float32, "double": np.float64}
_INTRINSIC = {"float": "f32", "double": "f64"}
_INTEGER_OPERATIONS = """smin smax umin umax uadd.sat usub.sat sadd.sat ssub.sat fshl fshr ctpop bitreverse ctlz cttz
abs""".split()
_FLOAT_OPERATIONS = "floor ceil trunc rint roundeven round fabs canonicalize copysign minnum maxnum fma".split()
_COMPARISONS = [f"icmp {c}" for c in "eq ne ugt uge ult ule sgt sge slt sle".split()]
_COMPARISONS += [f"fcmp {c}" for c in "oeq ogt oge olt ole one ord ueq ugt uge ult ule une uno".split()]


def _differential_cases() -> list[tuple[str, str]]:
    integers, reals = ("i8", "i16", "i32", "i64"), ("float", "double")
    cases = [(name, kind) for name in _INTEGER_OPERATIONS for kind in integers]
    cases += [(name, kind) for name in _FLOAT_OPERATIONS for kind in reals]
    cases += [(name, kind) for name in _COMPARISONS for kind in (integers if name.startswith("i") else reals)]
    return cases


def _operation(name: str, kind: str) -> tuple[str, str]:
    """(body that computes %r from %x0, %x1; declarations)."""
    if "cmp" in name:
        return f"%bit = {name} {kind} %x0, %x1\n%r = select i1 %bit, {kind} %x0, {kind} %x1", ""
    count = {"fshl": 3, "fshr": 3, "fma": 3}.get(name, 1)
    binary = name[:4] in ("smin", "smax", "umin", "umax", "uadd", "usub", "sadd", "ssub", "copy", "minn", "maxn")
    count = 2 if binary else count
    function = f"@llvm.{name}.{_INTRINSIC.get(kind, kind)}"
    arguments = ", ".join(f"{kind} %x{i}" for i in (0, 1, 0)[:count])
    flag = ", i1 false" if name in ("ctlz", "cttz", "abs") else ""
    declaration = f"declare {kind} {function}({', '.join([kind] * count)}{', i1' if flag else ''})\n"
    return f"%r = call {kind} {function}({arguments}{flag})", declaration


@pytest.fixture(scope="module")
def on_the_cpu() -> Any:
    """Run every differential case on this machine: one JIT module, a function per case."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    text, declarations = "", set()
    for i, (name, kind) in enumerate(_differential_cases()):
        body, declaration = _operation(name, kind)
        declarations.add(declaration)
        text += f"define void @f{i}(ptr %a, ptr %b, ptr %c) {{\n%x0 = load {kind}, ptr %a\n%x1 = load {kind}, ptr %b\n"
        text += f"{body}\nstore {kind} %r, ptr %c\nret void\n}}\n"
    module = llvm.parse_assembly("".join(sorted(declarations)) + text)
    machine = llvm.Target.from_default_triple().create_target_machine(opt=1)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)

    def compute(case: tuple[str, str], a: np.ndarray, b: np.ndarray) -> np.ndarray:
        function = prototype(engine.get_function_address(f"f{_differential_cases().index(case)}"))
        out = np.zeros_like(a)
        for i in range(len(a)):
            function(a[i:].ctypes.data, b[i:].ctypes.data, out[i:].ctypes.data)
        return out

    return compute


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", _differential_cases(), ids=" ".join)
def test_the_emulator_and_the_cpu_agree(case: tuple[str, str], arch: str, on_the_cpu: Any) -> None:
    name, kind = case
    dtype = _TYPES[kind]
    rng = np.random.default_rng(10)
    if np.dtype(dtype).kind == "i":
        info = np.iinfo(dtype)
        a, b = (rng.integers(info.min, info.max, 256, dtype=dtype, endpoint=True) for _ in range(2))
        a[::3] %= 7
        a[5::7], b[6::11], b[::9] = info.max, info.min, a[::9]
    else:
        a, b = ((rng.normal(size=256) * 10.0 ** rng.integers(-3, 3, 256)).astype(dtype) for _ in range(2))
        a[3::17], a[4::19], b[5::23], b[::9] = 0, np.inf, np.nan, a[::9]
    body, declaration = _operation(name, kind)
    asm = compile_ir(elementwise(body, (kind, kind), kind) + declaration, arch)
    result = run(asm, arch, [a, b, np.zeros(256, dtype)])[2]
    np.testing.assert_array_equal(result, on_the_cpu(case, a, b))
