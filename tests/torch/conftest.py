"""On a machine with a GPU these tests run there: every tensor that does not say otherwise is made on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        yield
        return
    with torch.device("cuda"):
        yield
