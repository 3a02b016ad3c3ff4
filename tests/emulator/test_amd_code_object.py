"""The code object of a kernel must say what its assembly says, which the emulator executes."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

import tilewright as tw
from tilewright.compiler.artifact import Artifact
from tilewright.kernels.softmax import softmax
from tilewright.runtime.emulated import EmulatedDevice
from tilewright.runtime.errors import DeviceError


@pytest.fixture(scope="module", params=["gfx942", "gfx950"])
def artifact(request: pytest.FixtureRequest) -> Artifact:
    matrix = tw.spec("f32", ("M", "N"), align=16)
    return tw.compile(softmax, request.param, {"x": matrix, "y": matrix, "BN": 256})


def load(artifact: Artifact, binary: bytes, change: Callable[[str], str] = lambda text: text) -> None:
    device = EmulatedDevice(artifact.target)
    device.load(binary, {"amdgcn": change(artifact.asm["amdgcn"])}).function(artifact.entries[0].abi.name)


def test_what_the_compiler_emits_agrees(artifact: Artifact) -> None:
    load(artifact, artifact.binary)
    x, y = np.random.default_rng(0).standard_normal((3, 200)).astype(np.float32), np.zeros((3, 200), np.float32)
    tw.device(f"emulate:{artifact.target}").launch(softmax, (3,), x, y, BN=256)
    np.testing.assert_allclose(y.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            r"(amdhsa_float_denorm_mode_32) 3",
            r"\1 0",
            "float_denorm_mode_32 is 3 in the code object, 0 in the assembly",
        ),
        (r"(amdhsa_kernarg_size) \d+", r"\1 8", r"kernarg_size is \d+ in the code object, 8 in the assembly"),
        (r"(amdhsa_next_free_vgpr) \d+", r"\1 200", "vector registers are allocated by the code object, 200"),
        (r"(amdhsa_accum_offset) \d+", r"\1 252", "accum_offset is"),
        (r"\n\ts_endpgm", "\n\ts_nop 0\n\ts_endpgm", "instructions are in the code object"),
    ],
)
def test_other_assembly_does_not(artifact: Artifact, old: str, new: str, message: str) -> None:
    def change(text: str) -> str:
        changed = re.sub(old, new, text, count=1)
        assert changed != text
        return changed

    with pytest.raises(DeviceError, match=f"is not its assembly:(?s:.*){message}"):
        load(artifact, artifact.binary, change)


def test_files_that_are_no_code_objects(artifact: Artifact) -> None:
    with pytest.raises(DeviceError, match="no 64-bit little-endian ELF file"):
        load(artifact, b"\x7fELF")
    name = artifact.entries[0].abi.name.encode()
    with pytest.raises(DeviceError, match=r"has no symbol .*\.kd"):
        load(artifact, artifact.binary.replace(name + b".kd", name + b".kx"))
