"""Runs LLVM and ptxas in a process of their own, since their fatal errors end the process.

The parent sends the scheduled IR as text; the worker answers with a `BackendResult` or a structured
error. A worker that dies becomes a `CompilerCrash` that keeps the IR as a reproducer file.
"""

from __future__ import annotations

import atexit
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from tilewright.compiler.errors import BackendFailure, CompilerCrash

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Request:
    """Compile all functions of a module (text with locations) for a target into one binary."""

    ir: str
    target: str


class Worker:
    """A backend process, started at once and reused. Thread safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None

    def start(self) -> None:
        """Start the process if none runs; its imports then overlap the caller's passes."""
        if self._process is not None and self._process.poll() is None:
            return
        self._stderr = tempfile.TemporaryFile()
        command = [sys.executable, "-m", "tilewright.compiler.worker"]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, env=environment
        )
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the process."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._process = None

    def compile(self, request: Request) -> Any:
        """The `BackendResult` of a request. `BackendFailure` when the backend refuses, `CompilerCrash` when it dies."""
        with self._lock:
            self.start()
            assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
            try:
                _send(self._process.stdin, request)
                kind, answer = _receive(self._process.stdout)
            except (EOFError, BrokenPipeError):
                raise self._crash(request) from None
        if kind == "error":
            raise BackendFailure(**answer)
        return answer

    def _crash(self, request: Request) -> CompilerCrash:
        assert self._process is not None and self._stderr is not None
        code = self._process.wait()
        self._process = None
        self._stderr.seek(0)
        tail = self._stderr.read()[-4000:].decode(errors="replace")
        handle, name = tempfile.mkstemp(prefix="tilewright-crash-", suffix=".tw")
        with os.fdopen(handle, "w") as file:
            file.write(request.ir)
        return CompilerCrash(code, tail, Path(name), request.target)


@cache
def shared_worker() -> Worker:
    """The worker of this process."""
    return Worker()


def _send(stream: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (size,) = _LENGTH.unpack(head)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)


def _answer(request: Request) -> tuple[str, Any]:
    from tilewright.backends.dispatch import compile_module
    from tilewright.backends.errors import BackendError
    from tilewright.ir.core import IRError
    from tilewright.ir.parser import parse_module
    from tilewright.ir.target import get_target

    try:
        module = parse_module(request.ir, "<scheduled>")
        return "ok", compile_module(module, get_target(request.target))
    except IRError as error:
        return "error", {"stage": "lowering", "message": error.message, "loc": error.loc, "hint": error.hint}
    except BackendError as error:
        return "error", {"stage": error.stage, "message": str(error)}
    except Exception:
        import traceback

        return "error", {"stage": "internal", "message": traceback.format_exc()}


def main() -> None:
    """Serve requests from standard input until it closes."""
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever LLVM prints must not reach the answers
    from tilewright.backends import dispatch

    dispatch.preload()
    while True:
        try:
            request = _receive(requests)
        except EOFError:
            return
        _send(answers, _answer(request))


if __name__ == "__main__":
    main()
