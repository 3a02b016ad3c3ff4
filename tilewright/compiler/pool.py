"""Several backend processes, for compilations that run at the same time (the autotuner's)."""

from __future__ import annotations

import os
import threading
from typing import Any

from tilewright.compiler.worker import Request, Worker, shared_worker

#: processes are about 150 MB each, and the frontend and the passes of all kernels share one thread's time
_MOST_WORKERS = 4


def default_workers() -> int:
    """How many kernels are compiled at once: the processors that we may use, at most four."""
    return max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0))))


class WorkerPool:
    """Up to ``size`` workers behind the interface of one. A worker starts when all others are busy.

    The first is the shared worker of the process. Thread safe.
    """

    def __init__(self, size: int | None = None) -> None:
        self.size = default_workers() if size is None else size
        self._free = [Worker() for _ in range(self.size - 1)] + [shared_worker()]
        self._changed = threading.Condition()

    def start(self, target: str) -> None:
        """Start the process that the next request would go to; its imports then overlap the caller's passes."""
        with self._changed:
            worker = self._free[-1] if self._free else None
        if worker is not None:
            worker.start(target)

    def compile(self, request: Request) -> Any:
        """`Worker.compile` on a free worker; waits for one if there is none."""
        with self._changed:
            while not self._free:
                self._changed.wait()
            worker = self._free.pop()
        try:
            return worker.compile(request)
        finally:
            with self._changed:
                self._free.append(worker)  # last in, first out: a single caller uses a single process
                self._changed.notify()

    def stop(self) -> None:
        """End the processes of the workers that are free."""
        with self._changed:
            for worker in self._free:
                worker.stop()


_pools: list[WorkerPool] = []
_pools_lock = threading.Lock()


def shared_pool() -> WorkerPool:
    """The pool of this process."""
    with _pools_lock:
        if not _pools:
            _pools.append(WorkerPool())
        return _pools[0]


def _after_fork() -> None:
    """Workers that were busy in the parent would stay so: a child begins with a pool of its own."""
    global _pools_lock  # noqa: PLW0603  (another thread may have held it)
    _pools_lock = threading.Lock()
    _pools.clear()


os.register_at_fork(after_in_child=_after_fork)
