"""`tw.jit_cache`: compiled kernels in a folder that goes to other machines, which then need no compiler."""

from __future__ import annotations

import importlib.util
import math
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tilewright.compiler.artifact import Artifact
from tilewright.compiler.cache import DiskCache

#: the innermost last
_open: list[DiskCache] = []


class JitCache:
    """An open folder of compiled kernels; a context manager that closes it, or `close`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._cache = DiskCache(Path(path), math.inf)  # what is shipped is never evicted
        _open.append(self._cache)

    def __enter__(self) -> JitCache:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Neither look here nor store here any more."""
        with suppress(ValueError):
            _open.remove(self._cache)


def jit_cache(path: str | os.PathLike[str]) -> JitCache:
    """Take compiled kernels from the folder ``path``, and put those there that it lacks, until closed.

    Entries are for a kernel's source, argument types, compile-time values, options and target, whatever version of the
    compiler and of its tools made them: a machine that has the folder needs none of these. There a kernel that is not
    in the folder raises CompileError. Kernels that this process has loaded before are not stored again: open the
    folder first. A folder that cannot be written is only read.
    """
    return JitCache(path)


def shipped(key: str) -> Artifact | None:
    """The artifact under ``key`` in the innermost open folder that has it."""
    return next(filter(None, (cache.load(key) for cache in reversed(_open))), None)


def ship(key: str, artifact: Artifact) -> None:
    """Put an artifact into the innermost open folder, if any, where that can be written."""
    if _open and _writable(_open[-1].directory):
        _open[-1].store(key, artifact)


def is_open() -> bool:
    """Whether a folder is open."""
    return bool(_open)


def missing_compiler() -> str | None:
    """Where kernels were looked for, if there is no compiler here to make them."""
    try:
        present = importlib.util.find_spec("mlir") is not None
    except ImportError:
        present = False
    return None if present else ", ".join(str(cache.directory) for cache in reversed(_open)) or "the disk cache"


def _writable(directory: Path) -> bool:
    existing = next((folder for folder in (directory, *directory.parents) if folder.exists()), directory)
    return os.access(existing, os.W_OK)


__all__ = ["JitCache", "is_open", "jit_cache", "missing_compiler", "ship", "shipped"]
