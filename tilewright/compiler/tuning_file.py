"""Choices of the autotuner in a JSON file that processes share: the first to pin a key decides for all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tilewright.compiler.cache import write_atomically
from tilewright.compiler.environment import CACHE_DIR, TUNING_FILE, default_cache_dir

_VERSION = 1


def tuning_file() -> TuningFile:
    """The file that the environment names."""
    return TuningFile(TUNING_FILE.get() or (CACHE_DIR.get() or default_cache_dir()) / "tuning.json")


class TuningFile:
    """Entries by key. Reading never fails: a missing or damaged file holds nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> dict[str, dict[str, Any]]:
        """All entries, now."""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(data, dict) or data.get("version") != _VERSION or not isinstance(data.get("entries"), dict):
            return {}
        return {key: entry for key, entry in data["entries"].items() if isinstance(entry, dict)}

    def pin(self, key: str, entry: dict[str, Any], replace: bool = False) -> dict[str, Any]:
        """Store an entry unless the key has one, and return the one that counts.

        OSError where the file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            entries = self.entries()
            if key in entries and not replace:
                return entries[key]
            entries[key] = entry
            data = {"version": _VERSION, "entries": dict(sorted(entries.items()))}
            write_atomically(self.path, (json.dumps(data, indent=1) + "\n").encode())
        return entry

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among the processes that pin; the kernel frees the lock when its holder dies."""
        import fcntl

        handle = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
