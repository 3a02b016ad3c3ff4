"""On a machine with a GPU these tests run there: every tensor that does not say otherwise is made on it.

And what tests of the backend look at.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        yield
        return
    with torch.device("cuda"):
        yield


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The report of each graph that the backend gets, as they come; Dynamo starts afresh."""
    torch = pytest.importorskip("torch")
    backend = import_module("tilewright.torch.backend")
    torch._dynamo.reset()
    torch.manual_seed(0)
    seen: list[Any] = []
    rewrite = backend.rewrite

    def recording(*args: Any) -> Any:
        seen.append(rewrite(*args))
        return seen[-1]

    monkeypatch.setattr(backend, "rewrite", recording)
    return seen
