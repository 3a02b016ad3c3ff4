"""What the tests of the compiler share."""

from __future__ import annotations

import sys

import pytest

from tilewright.compiler import lookup


@pytest.fixture(autouse=True)
def _unedited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels reach the cache although somebody may edit the sources while the tests run."""
    # two versions of a file within a second, of one size, would share their compiled form
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(lookup, "edited_since_start", lambda: False)
