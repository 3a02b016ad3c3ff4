"""What all tests share: cache directories of their own, so that none depends on what ran before."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

gc.set_threshold(10_000, 20, 100)


@pytest.fixture(autouse=True, scope="module")
def _frozen_objects() -> Iterator[None]:
    """Compiled kernels stay: millions of objects, which Python would search again and again, a quarter of its time."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ours, and Inductor's: a graph found in there never reaches the passes that tests look at."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TILEWRIGHT_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp("cache")))
        yield
