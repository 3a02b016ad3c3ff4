"""What all tests share: cache directories of their own, so that none depends on what ran before."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

# Compiled kernels stay in their modules: millions of objects, which Python would search fifty times in a run, for a
# twelfth of its time.
gc.set_threshold(10_000, 20, 100)


@pytest.fixture(autouse=True, scope="session")
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ours, and Inductor's: a graph found in there never reaches the passes that tests look at."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TILEWRIGHT_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp("cache")))
        yield
