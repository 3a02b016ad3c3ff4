"""The disk cache of compiled kernels: one file an entry, named by its key.

A file is a digest of the rest, a JSON header with the entries' ABI and resources, the binary, and
the assembly and the IR of every pass, compressed and unpacked on first use. Files appear whole, by
renaming, so that readers and killed writers cannot leave half of one; what a broken disk leaves is
found by the digest, removed, and compiled again. The entries used least recently are evicted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tilewright.compiler.artifact import Artifact, Entry
from tilewright.compiler.environment import CACHE_DIR, CACHE_SIZE, default_cache_dir
from tilewright.ir.abi import KernelABI
from tilewright.ir.resources import Resources

_MAGIC = b"tilewright-1\n"
_DIGEST_BYTES = 32
_HEADER = struct.Struct("<I")
_SUFFIX = ".kernel"
_TEMPORARY = ".writing-"
#: a temporary file that old (seconds) belongs to a writer that was killed
_ABANDONED = 3600.0
#: entries are evicted down to this part of the limit, and the folder is looked through again after
#: this process has stored that part of it
_EVICT_TO, _LOOK_AFTER = 0.9, 1 / 64

T = TypeVar("T")


class CorruptEntryError(ValueError):
    """The bytes are no complete cache entry."""


class Packed(Mapping[str, T]):
    """A mapping from its compressed JSON, read on first use."""

    def __init__(self, blob: bytes) -> None:
        self._blob = blob
        self._values: dict[str, T] | None = None

    @property
    def values_by_name(self) -> dict[str, T]:
        if self._values is None:
            self._values = json.loads(zlib.decompress(self._blob))
        return self._values

    def __getitem__(self, key: str) -> T:
        return self.values_by_name[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)


class DiskCache:
    """Artifacts by key (a hexadecimal digest) below ``directory``, at most ``limit`` bytes of them.

    Any number of processes may share the directory. Failing to write costs a warning, never the
    compilation.
    """

    def __init__(self, directory: Path, limit: float) -> None:
        self.directory = directory
        self.limit = limit
        self._unseen: float = limit  # bytes stored since the last look; the first store looks

    def path(self, key: str) -> Path:
        """The file of an entry."""
        return self.directory / "kernels" / key[:2] / (key + _SUFFIX)

    def load(self, key: str) -> Artifact | None:
        """The artifact stored under ``key``, or None. A damaged file is removed."""
        path = os.path.join(self.directory, "kernels", key[:2], key + _SUFFIX)
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError:
            return None
        try:
            artifact = unpack(data)
        except CorruptEntryError:
            with contextlib.suppress(OSError):
                os.unlink(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the time of last use, which eviction goes by
        return artifact

    def store(self, key: str, artifact: Artifact) -> None:
        """Keep an artifact. Another process may store the same one at the same time."""
        data = pack(artifact)
        if len(data) > self.limit:
            return
        try:
            write_atomically(self.path(key), data)
            self._unseen += len(data)
            if self._unseen > self.limit * _LOOK_AFTER:
                self._unseen = 0.0
                self.evict()
        except OSError as error:
            warnings.warn(f"compiled kernels are not kept in {self.directory}: {error}", RuntimeWarning, stacklevel=2)

    def evict(self) -> None:
        """Remove the entries used least recently while they exceed the limit, and abandoned files."""
        entries, now = [], time.time()
        for folder in _directories(self.directory / "kernels"):
            for entry in _files(folder):
                with contextlib.suppress(OSError):
                    status = entry.stat()
                    if not entry.name.startswith(_TEMPORARY):
                        entries.append((status.st_mtime_ns, status.st_size, entry.path))
                    elif now - status.st_mtime > _ABANDONED:
                        os.unlink(entry.path)
        total = sum(size for _, size, _ in entries)
        if total <= self.limit:
            return
        for _, size, path in sorted(entries):
            with contextlib.suppress(OSError):  # another process may have been faster
                os.unlink(path)
            total -= size
            if total <= self.limit * _EVICT_TO:
                return


_caches: dict[tuple[Path, int], DiskCache] = {}


def disk_cache() -> DiskCache | None:
    """The cache that the environment names; None where it is off or there is no home directory."""
    limit = CACHE_SIZE.get()
    if limit <= 0:
        return None
    try:
        directory = CACHE_DIR.get() or default_cache_dir()
    except RuntimeError:  # no home directory
        return None
    found = _caches.get((directory, limit))
    if found is None:
        found = _caches[directory, limit] = DiskCache(directory, limit)
    return found


def write_atomically(path: Path, data: bytes) -> None:
    """Make ``path`` hold ``data``: readers see all of it or what was there before."""
    import tempfile

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


# --- the file format ----------------------------------------------------------------------------


def pack(artifact: Artifact) -> bytes:
    """The bytes of an entry."""
    passes = {entry: dict(texts) for entry, texts in artifact.passes.items()}
    parts = [artifact.binary, _compress(dict(artifact.asm)), _compress(passes)]
    header = {
        "name": artifact.name,
        "target": artifact.target,
        "variant": artifact.variant,
        "sizes": [len(part) for part in parts],
        "entries": [{"abi": e.abi.to_json(), "resources": e.resources.to_json()} for e in artifact.entries],
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    body = b"".join([_HEADER.pack(len(text)), text, *parts])
    return _MAGIC + hashlib.sha256(body).digest() + body


def unpack(data: bytes) -> Artifact:
    """The artifact in the bytes of an entry; `CorruptEntryError` unless they are just what was written."""
    start = len(_MAGIC) + _DIGEST_BYTES
    body = memoryview(data)[start:]
    if not data.startswith(_MAGIC) or hashlib.sha256(body).digest() != data[len(_MAGIC) : start]:
        raise CorruptEntryError
    (length,) = _HEADER.unpack_from(body)
    header: dict[str, Any] = json.loads(bytes(body[_HEADER.size : _HEADER.size + length]))
    position = start + _HEADER.size + length
    parts = []
    for size in header["sizes"]:
        parts.append(data[position : position + size])
        position += size
    entries = tuple(Entry(KernelABI.from_json(e["abi"]), Resources(**e["resources"])) for e in header["entries"])
    name, target, variant = header["name"], header["target"], header["variant"]
    return Artifact(name, target, parts[0], entries, Packed(parts[1]), Packed(parts[2]), variant, cached=True)


def _compress(value: Any) -> bytes:
    return zlib.compress(json.dumps(value).encode(), 1)


def _directories(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _files(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.is_file(follow_symlinks=False)]
    except OSError:
        return []
