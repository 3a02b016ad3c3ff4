"""Matrix instructions of the PTX emulator against matrix products, with the fragment tables of the PTX ISA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from ptx_matrix_corpus import copy_in, products
from ptx_snippets import launch, legal, run, wrap

from tilewright.runtime.emulator.nvidia import EmulatorFault

BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
NUMPY: dict[str, Any] = {
    "bf16": BF16, "f16": np.float16, "tf32": np.float32, "f32": np.float32, "f64": np.float64, "s8": np.int8,
    "u8": np.uint8, "s32": np.int32, "e4m3": E4M3, "e5m2": E5M2,
}  # fmt: skip


def values(name: str, *shape: int, seed: int = 0) -> np.ndarray:
    """Small integers, whose sums are exact in every type: what matters here is where each value goes."""
    rng = np.random.default_rng(seed)
    if name in ("s8", "u8", "s32"):
        return rng.integers(-100 if name != "u8" else 0, 100, shape).astype(NUMPY[name])
    return rng.integers(-4, 5, shape).astype(NUMPY[name])


# --- mma.sync ----------------------------------------------------------------------------------------


def place_a(i: int, lane: int, per: int) -> tuple[int, int]:
    """Row and column of element i of a lane: "Matrix Fragments for mma.m16n8k16" and its relatives."""
    group, thread, register, part = lane // 4, lane % 4, i // per, i % per
    return group + (8 if register % 2 else 0), thread * per + part + (4 * per if register >= 2 else 0)


def place_b(i: int, lane: int, per: int) -> tuple[int, int]:
    group, thread, register, part = lane // 4, lane % 4, i // per, i % per
    return thread * per + part + (4 * per if register else 0), group


def place_c(i: int, lane: int) -> tuple[int, int]:
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2


MMA = [
    ("m16n8k8", "f32", "bf16"), ("m16n8k16", "f32", "bf16"), ("m16n8k8", "f32", "f16"), ("m16n8k16", "f32", "f16"),
    ("m16n8k16", "f16", "f16"), ("m16n8k4", "f32", "tf32"), ("m16n8k8", "f32", "tf32"), ("m16n8k16", "s32", "s8"),
    ("m16n8k32", "s32", "s8"), ("m16n8k32", "s32", "u8"), ("m16n8k32", "f32", "e4m3"), ("m16n8k32", "f32", "e5m2"),
    ("m8n8k4", "f64", "f64"), ("m16n8k4", "f64", "f64"), ("m16n8k8", "f64", "f64"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "result", "kind"), MMA)
def test_mma(shape: str, result: str, kind: str) -> None:
    m, n, k = (int(part) for part in shape.replace("m", "").replace("n", " ").replace("k", " ").split())
    a, b, c = values(kind, m, k), values(kind, k, n, seed=1), values(result, m, n, seed=2)
    width = 64 if kind == "f64" else 32
    per = width // 8 // a.itemsize
    counts = [m * k // 32, k * n // 32, m * n // 32]
    fragments = [np.zeros((32, count), array.dtype) for count, array in zip(counts, (a, b, c), strict=True)]
    for lane in range(32):
        for fragment, array, place in zip(
            fragments,
            (a, b, c),
            (lambda i, x: place_a(i, x, per), lambda i, x: place_b(i, x, per), place_c),
            strict=True,
        ):
            for i in range(fragment.shape[1]):
                fragment[lane, i] = array[place(i, lane)]
    out = np.zeros((32, counts[2]), c.dtype)
    words = [fragment.nbytes * 8 // width // 32 for fragment in fragments]
    names = [[f"%{letter}{i}" for i in range(count)] for letter, count in zip("abc", words, strict=True)]
    size = width // 8
    body = [f".reg .b{width} {', '.join(part)};" for part in names]
    body.append(f".reg .b{width} {', '.join(f'%d{i}' for i in range(words[2]))}; .reg .b64 %at, %off;")
    for number, part in enumerate(names):
        body.append(f"mul.wide.u32 %off, %lane, {len(part) * size}; add.u64 %at, %ptr{number}, %off;")
        body += [f"ld.global.b{width} {register}, [%at+{i * size}];" for i, register in enumerate(part)]
    lists = ["{" + ", ".join(part) + "}" for part in ([f"%d{i}" for i in range(words[2])], *names)]
    body.append(f"mma.sync.aligned.{shape}.row.col.{result}.{kind}.{kind}.{result} {', '.join(lists)};")
    body.append(f"mul.wide.u32 %off, %lane, {words[2] * size}; add.u64 %at, %ptr3, %off;")
    body += [f"st.global.b{width} [%at+{i * size}], %d{i};" for i in range(words[2])]
    got = run("\n".join(body), [*fragments, out])[3]
    product = np.zeros((m, n), c.dtype)
    for lane in range(32):
        for i in range(out.shape[1]):
            product[place_c(i, lane)] = got[lane, i]
    wanted = a.astype(np.float64) @ b.astype(np.float64) + c.astype(np.float64)
    np.testing.assert_array_equal(product, wanted.astype(c.dtype))


def test_sums_equal_those_of_an_h100() -> None:
    """Random normal operands over several binades; the results were read back from the GPU."""
    with np.load(Path(__file__).with_name("h100_products.npz")) as recorded:
        for product in products("normal"):
            blocks = len(recorded[product.name])
            arrays = [array[:blocks] for array in product.arrays]
            out = launch(legal(product.ptx), arrays, product.threads, (blocks,), shared_bytes=product.shared_bytes)[0]
            np.testing.assert_array_equal(
                product.unpack(out[-1]).astype(np.float64), recorded[product.name], err_msg=product.name
            )


def test_extreme_sums_equal_those_of_an_h200() -> None:
    """Any finite bit patterns: overflow, denormals, differences far below the largest term."""
    with np.load(Path(__file__).with_name("h200_extremes.npz")) as recorded:
        for product in products("extreme"):
            wanted = recorded[product.name]
            blocks = len(wanted)
            arrays = [array[:blocks] for array in product.arrays]
            out = launch(legal(product.ptx), arrays, product.threads, (blocks,), shared_bytes=product.shared_bytes)[0]
            assert out[-1].tobytes() == wanted.tobytes(), product.name


# --- ldmatrix, stmatrix --------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count: int, transposed: bool) -> None:
    """Matrices go through registers to another place; lane l holds elements 2 (l % 4), +1 of row l / 4."""
    matrices = np.random.default_rng(0).integers(0, 1 << 16, (count, 8, 8)).astype(np.uint16)
    trans = ".trans" if transposed else ""
    registers = [f"%r{i}" for i in range(count)]
    vector = "{" + ", ".join(registers) + "}"
    body = f"""
    .reg .b32 {", ".join(registers)}, %at, %to, %word; .reg .b64 %off, %place; .reg .pred %mine;
    shl.b32 %at, %lane, 4; add.u32 %at, %at, %sm; add.u32 %to, %at, 1024;
    mul.wide.u32 %off, %lane, 16; add.u64 %place, %ptr0, %off;
    setp.lt.u32 %mine, %lane, {8 * count};
    @%mine cp.async.cg.shared.global [%at], [%place], 16;
    cp.async.wait_all;
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {vector}, [%at];
    mul.wide.u32 %off, %lane, {4 * count}; add.u64 %place, %ptr1, %off;
    {" ".join(f"st.global.b32 [%place+{4 * i}], {r};" for i, r in enumerate(registers))}
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%to], {vector};
    bar.warp.sync -1;
    mul.wide.u32 %off, %lane, 16; add.u64 %place, %ptr2, %off;
    @!%mine bra end;
    {" ".join(f"ld.shared.b32 %word, [%to+{4 * i}]; st.global.b32 [%place+{4 * i}], %word;" for i in range(4))}
end:
    """
    arrays = [matrices, np.zeros((32, count, 2), np.uint16), np.zeros_like(matrices)]
    _, fragments, back = run(body, arrays, shared_bytes=4096)
    seen = matrices.transpose(0, 2, 1) if transposed else matrices
    for lane in range(32):
        np.testing.assert_array_equal(fragments[lane], seen[:, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2])
    np.testing.assert_array_equal(back, matrices)


# --- wgmma -------------------------------------------------------------------------------------------


def to_shared(matrix: np.ndarray, mn_major: bool, swizzle: int) -> tuple[np.ndarray, int, int, int]:
    """The canonical layout of [rows, k] in shared memory: its bytes, LBO, SBO and what 32 bytes of k advance by
    (PTX ISA 9.7.15.5.1)."""
    item = matrix.itemsize
    stored = matrix.T if mn_major else matrix  # [outer, contiguous]
    outer, inner = stored.shape
    line = swizzle or 16
    data = np.zeros((outer * inner * item,), np.uint8)
    octets = np.ascontiguousarray(stored).view(np.uint8).reshape(outer, inner * item)
    atom = 8 * line
    across = inner * item // line
    for o in range(outer):
        for byte in range(inner * item):
            column = byte // line
            address = (o // 8 * across + column) * atom + o % 8 * line + byte % line
            if swizzle:
                address ^= (address >> 7 & (swizzle // 16 - 1)) << 4
            data[address] = octets[o, byte]
    column_step, group_step = atom, across * atom
    if swizzle and not mn_major:
        return data, 16, group_step, 32
    if not swizzle and mn_major:  # grains SBO apart, groups of 8 k LBO
        return data, group_step, column_step, 2 * group_step
    return data, column_step, group_step, 2 * (group_step if mn_major else column_step)


def descriptor(start: int, leading: int, stride: int, swizzle: int) -> int:
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


WGMMA = [
    *[("bf16", "f32", n, s, (ta, tb)) for n in (8, 64, 192, 256) for s in (128,) for ta in (0, 1) for tb in (0, 1)
      if n >= 64 or not tb],
    *[("f16", "f32", 64, s, t) for s in (0, 32, 64) for t in ((0, 0), (1, 1))],
    ("f16", "f16", 64, 128, (0, 0)),
    ("tf32", "f32", 32, 128, (0, 0)), ("tf32", "f32", 32, 32, (0, 0)),
    ("e4m3", "f32", 64, 128, (0, 0)), ("e5m2", "f32", 16, 64, (0, 0)), ("s8", "s32", 32, 128, (0, 0)),
    ("u8", "s32", 32, 0, (0, 0)),
]  # fmt: skip


def wgmma_text(kind: str, result: str, n: int, k: int, trans: tuple[int, int], registers: int, scale_d: str) -> str:
    vector = "{" + ", ".join(f"%d{i}" for i in range(registers)) + "}"
    scales = "" if result == "s32" else ", 1, 1"
    if kind in ("bf16", "f16"):
        scales += f", {trans[0]}, {trans[1]}"
    return (
        f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{result}.{kind}.{kind} {vector}, %adesc, %bdesc, {scale_d}{scales};"
    )


def unpack(out: np.ndarray, n: int) -> np.ndarray:
    """[128 threads, values] -> [64, n]: value i of lane l, warp w is row 16 w + l / 4 + 8 (i / 2 % 2), ..."""
    matrix = np.zeros((64, n), out.dtype)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(out.shape[1]):
            matrix[16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + lane % 4 * 2 + i % 2] = out[thread, i]
    return matrix


@pytest.mark.parametrize(("kind", "result", "n", "swizzle", "trans"), WGMMA)
def test_wgmma(kind: str, result: str, n: int, swizzle: int, trans: tuple[int, int]) -> None:
    """A 64 x n product, as long as the swizzle: several instructions with advancing descriptors, from zero."""
    item = np.dtype(NUMPY[kind]).itemsize
    k = 32 // item
    length = (swizzle or 64) // item  # rows as long as the swizzle
    a, b = values(kind, 64, length), values(kind, n, length, seed=1)
    a_data, a_lead, a_stride, a_step = to_shared(a, bool(trans[0]), swizzle)
    b_data, b_lead, b_stride, b_step = to_shared(b, bool(trans[1]), swizzle)
    start = -(-a_data.size // 1024) * 1024
    image = np.zeros(start + b_data.size, np.uint8)
    image[: a_data.size], image[start:] = a_data, b_data
    registers = n // 2 if NUMPY[result] is not np.float16 else n // 4
    body = copy_in(image.size) + f".reg .b32 {', '.join(f'%d{i}' for i in range(registers))};"
    body += "wgmma.fence.sync.aligned;\n"
    for step in range(a.shape[1] // k):
        # all of shared memory starts at 1024 in the emulator and on sm_90; %sm is added to be independent of it
        for name, base, lead, stride in (
            ("%adesc", a_step * step, a_lead, a_stride),
            ("%bdesc", start + b_step * step, b_lead, b_stride),
        ):
            body += "{ .reg .b32 s; .reg .b64 t; shr.u32 s, %sm, 4; cvt.u64.u32 t, s; "
            body += f"add.u64 {name}, t, {descriptor(base, lead, stride, swizzle)}; }}\n"
        body += wgmma_text(kind, result, n, k, trans, registers, "%no" if step == 0 else "%yes") + "\n"
    body += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n"
    body += f"mul.wide.u32 %wide, %thread, {4 * registers}; add.u64 %from, %ptr1, %wide;"
    body += "".join(f"st.global.b32 [%from+{4 * i}], %d{i};\n" for i in range(registers))
    out = np.zeros((128, n // 2), NUMPY[result])
    got = run(body, [image, out], threads=128, shared_bytes=image.size)[1]
    wanted = np.zeros((64, n), NUMPY[result])
    for step in range(a.shape[1] // k):
        part = slice(step * k, step * k + k)
        exact = a[:, part].astype(np.float64) @ b[:, part].T.astype(np.float64)
        wanted = (wanted.astype(np.float64) + exact).astype(wanted.dtype)
    np.testing.assert_array_equal(unpack(got, n), wanted)


SETUP_A = """
    .reg .b32 %a<4>, %d<4>; .reg .b64 %out;
    mov.b32 %a0, 0x3F803F80; mov.b32 %a1, %a0; mov.b32 %a2, %a0; mov.b32 %a3, %a0;
    mov.b32 %d0, 0; mov.b32 %d1, 0; mov.b32 %d2, 0; mov.b32 %d3, 0;
    { .reg .b32 s; .reg .b64 t; shr.u32 s, %sm, 4; cvt.u64.u32 t, s; add.u64 %bdesc, t, DESCRIPTOR; }
    FENCE
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3},
        {%a0, %a1, %a2, %a3}, %bdesc, %yes, 1, 1, 0;
    COMMIT
    AFTER
    WAIT
    mul.wide.u32 %wide, %thread, 16; add.u64 %out, %ptr1, %wide;
    st.global.v4.b32 [%out], {%d0, %d1, %d2, %d3};
"""
PARTS = {
    "FENCE": "wgmma.fence.sync.aligned;",
    "COMMIT": "wgmma.commit_group.sync.aligned;",
    "AFTER": "",
    "WAIT": "wgmma.wait_group.sync.aligned 0;",
    "PROXY": "fence.proxy.async.shared::cta;",
}


def a_from_registers(**changes: str) -> np.ndarray:
    b = values("bf16", 8, 16, seed=1)
    data, lead, stride, _ = to_shared(b, False, 32)
    text = copy_in(data.size) + SETUP_A.replace("DESCRIPTOR", str(descriptor(0, lead, stride, 32)))
    text = text.replace(PARTS["PROXY"], changes.pop("PROXY", PARTS["PROXY"]))
    for name, part in PARTS.items():
        text = text.replace(name, changes.get(name, part))
    got = launch(legal(wrap(text, 2)), [data, np.zeros((128, 4), np.float32)], 128, shared_bytes=1024)[0][1]
    wanted = np.broadcast_to(b.astype(np.float64).sum(axis=1), (64, 8)).astype(np.float32)
    np.testing.assert_array_equal(unpack(got, 8), wanted)
    return got


def test_wgmma_with_a_in_registers() -> None:
    a_from_registers()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"FENCE": ""}, "no wgmma.fence before"),
        ({"FENCE": "wgmma.fence.sync.aligned; mov.b32 %a1, 0;"}, "%a1 was written after the last wgmma.fence"),
        ({"WAIT": ""}, "%d0 is read while a wgmma"),
        ({"COMMIT": ""}, "%d0 is read while a wgmma"),
        ({"WAIT": "wgmma.wait_group.sync.aligned 1;"}, "%d0 is read while a wgmma"),
        ({"AFTER": "mov.b32 %a2, 0;"}, "%a2 is written while a wgmma"),
        ({"AFTER": "mov.b32 %d2, 0;"}, "%d2 is written while a wgmma"),
        ({"AFTER": "st.shared.b32 [%sm], 0;"}, "an asynchronous operation still reads"),
        ({"PROXY": ""}, "no fence.proxy.async between"),
    ],
)
def test_races_of_wgmma(changes: dict[str, str], message: str) -> None:
    with pytest.raises(EmulatorFault, match=message):
        a_from_registers(**changes)


def test_undefined_operands_make_undefined_rows() -> None:
    """Only what depends on shared memory that was never written is undefined."""
    b = values("bf16", 8, 16, seed=1)
    data, lead, stride, _ = to_shared(b, False, 32)
    text = copy_in(data.size - 32) + SETUP_A.replace("DESCRIPTOR", str(descriptor(0, lead, stride, 32)))
    for name, part in PARTS.items():
        text = text.replace(name, part)
    with pytest.raises(EmulatorFault, match="never written"):
        launch(legal(wrap(text, 2)), [data, np.zeros((128, 4), np.float32)], 128, shared_bytes=1024)
    first_row = text.replace("st.global.v4.b32 [%out], {%d0, %d1, %d2, %d3};", "st.global.b32 [%out], %d0;")
    (_, got), _ = launch(
        legal(wrap(first_row.replace("st.global.b32", "setp.lt.u32 %more, %lane, 1; @%more st.global.b32"), 2)),
        [data, np.zeros((128, 4), np.float32)], 128, shared_bytes=1024,
    )  # fmt: skip
    assert got[0, 0] == np.float32(b[0].astype(np.float64).sum())
