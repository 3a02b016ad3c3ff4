"""PTX to cubin with NVIDIA's ptxas, and what ptxas reports about each kernel.

A C75xx line is how ptxas says, at exit status 0, that it gave up on what the program asked for:
``setmaxnreg`` ignored (C7508), all ``wgmma`` serialised (C7510, C7513), a wait injected (C7517).
The kernel runs several times slower than planned, of which users are warned (`compiler.limits`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tilewright.backends.errors import BackendError

#: names a ptxas that goes before all others
PTXAS_VARIABLE = "TILEWRIGHT_PTXAS"


@dataclass(frozen=True)
class Resources:
    """What one kernel uses: registers per thread, the rest in bytes (stack and spills per thread)."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack_bytes: int
    shared_bytes: int  # static shared memory only
    barriers: int


@dataclass(frozen=True)
class Assembled:
    """A cubin, the resources of each entry by name, and what ptxas printed."""

    cubin: bytes
    resources: dict[str, Resources]
    log: str
    #: the C75xx lines
    advisories: tuple[str, ...] = ()


# --- finding ptxas --------------------------------------------------------------------------


def _wheel_ptxas() -> list[Path]:
    """ptxas of the nvidia-cuda-nvcc wheel: ``nvidia/cu13/bin``, in CUDA 12 ``nvidia/cuda_nvcc/bin``."""
    spec = importlib.util.find_spec("nvidia")
    folders = (spec.submodule_search_locations or []) if spec else []
    return [path for folder in folders for path in sorted(Path(folder).glob("*/bin/ptxas"), reverse=True)]


def find_ptxas() -> Path:
    """The ptxas of ``TILEWRIGHT_PTXAS``, else of the wheel, else on PATH."""
    named = os.environ.get(PTXAS_VARIABLE)
    if named:
        if not os.access(named, os.X_OK):
            raise BackendError("ptxas", f"{PTXAS_VARIABLE} names {named!r}, which is not an executable file")
        return Path(named)
    for path in _wheel_ptxas():
        if os.access(path, os.X_OK):
            return path
    on_path = shutil.which("ptxas")
    if on_path is None:
        raise BackendError(
            "ptxas", f"ptxas not found: install nvidia-cuda-nvcc, put it on PATH, or set {PTXAS_VARIABLE}"
        )
    return Path(on_path)


# --- running it -----------------------------------------------------------------------------


def assemble(ptx: str, arch: str, *, options: Sequence[str] = (), level: int = 3) -> Assembled:
    """Assemble ``ptx`` for ``arch`` ("sm_90a"). Raises BackendError on an error, quoting the PTX lines at fault."""
    ptxas = find_ptxas()
    with tempfile.TemporaryDirectory(prefix="tilewright-ptxas-") as folder:
        source, output = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [str(ptxas), f"-arch={arch}", f"-O{level}", "-v", *options, str(source), "-o", str(output)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        log = (result.stdout + result.stderr).replace(f"{folder}{os.sep}", "")
        if result.returncode != 0 or not output.exists():
            raise BackendError("ptxas", _failure(result.returncode), _explain(log, ptx))
        cubin = output.read_bytes()
    return Assembled(cubin, parse_resources(log), log, tuple(_ADVISORY.findall(log)))


def _failure(status: int) -> str:
    # ptxas itself exits with 255 on any error; a signal or anything else is a crash.
    return "the PTX does not assemble" if status in (1, 255) else f"ptxas ended with status {status}"


_ADVISORY = re.compile(r"^.*\(C75\d\d\).*$", re.MULTILINE)
_ERROR_LINE = re.compile(r"line (\d+); (?:error|fatal)")


def _explain(log: str, ptx: str) -> list[str]:
    """The log's lines, each error followed by the PTX line that it is about."""
    source = ptx.splitlines()
    explained = []
    for line in log.splitlines():
        explained.append(line)
        match = _ERROR_LINE.search(line)
        if match and 1 <= int(match[1]) <= len(source):
            explained.append(f"{match[1]} | {source[int(match[1]) - 1].strip()}")
    return explained


# --- its report -----------------------------------------------------------------------------

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_BARRIERS = re.compile(r"used (\d+) barriers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_resources(log: str) -> dict[str, Resources]:
    """The resources of each entry from the output of ``ptxas -v``.

    The report of an entry may contain those of the functions that it calls, whose stack frames the
    entry's own does not include; they are not reported.
    """
    resources: dict[str, Resources] = {}
    entry = function = ""
    stack = (0, 0, 0)
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            entry, stack = match[1], (0, 0, 0)
        elif match := _PROPERTIES.search(line):
            function = match[1]
        elif (match := _STACK.search(line)) and function == entry:
            stack = (int(match[1]), int(match[2]), int(match[3]))
        elif entry and (match := _REGISTERS.search(line)):
            frame, stores, loads = stack
            resources[entry] = Resources(
                int(match[1]), stores, loads, frame, _number(_SHARED, line), _number(_BARRIERS, line)
            )
    return resources


def _number(pattern: re.Pattern[str], line: str) -> int:
    match = pattern.search(line)
    return int(match[1]) if match else 0
