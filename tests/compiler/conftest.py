"""What the tests of the compiler share."""

from __future__ import annotations

import pytest

from tilewright.compiler import lookup


@pytest.fixture(autouse=True)
def _unedited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels reach the cache although somebody may edit the sources while the tests run."""
    monkeypatch.setattr(lookup, "edited_since_start", lambda: False)
