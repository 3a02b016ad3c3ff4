"""A bounded cache that drops the entry unused for longest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LRU(Generic[K, V]):
    """At most ``capacity`` values by key. ``hits`` and ``misses`` count the calls of `get`.

    Threads may share it: every step is one call into the C dictionary, and losing a race against
    an eviction costs a miss, never a wrong value.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.hits = 0
        self.misses = 0
        self._items: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        value = self._items.get(key)
        if value is None:
            self.misses += 1
            return None
        self.hits += 1
        with suppress(KeyError):  # evicted by another thread in between; the value is still right
            self._items.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> V:
        self._items[key] = value
        while len(self._items) > self.capacity:
            with suppress(KeyError):  # another thread emptied it
                self._items.popitem(last=False)
        return value

    def __len__(self) -> int:
        return len(self._items)
