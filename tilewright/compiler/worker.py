"""Runs LLVM and ptxas in a process of their own, since their fatal errors end the process.

The parent sends the scheduled IR; the worker answers with a `BackendResult` or a structured error. A worker that
dies becomes a `CompilerCrash` that keeps the IR as a reproducer file.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from dataclasses import dataclass, field
from typing import IO, Any

from tilewright.compiler.environment import PREFIX
from tilewright.compiler.errors import BackendFailure, CompilerCrash, how_it_ended, write_reproducer
from tilewright.ir.core import UNKNOWN, Location, Module

_LENGTH = struct.Struct("<Q")
#: what the worker runs: the caller's import path, and pipes apart from the standard streams, which anyone may write to
_START = (
    "import sys; sys.path[:] = sys.argv[4:]; "
    "from tilewright.compiler.worker import serve; serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
)
#: NumPy would start a thread for each processor when it is imported; the backend has no use for them
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
#: how much of what a dead worker printed its error quotes (bytes)
_QUOTED = 4000


@dataclass(frozen=True)
class Request:
    """Compile all functions of a module (text with locations) for a target into one binary.

    ``kernel`` and ``loc`` are for messages: the first entry's name and where it is defined. ``module`` is what ``ir``
    says, for who has it already: parsing the text costs the grammar, about a tenth of a first compilation.
    """

    ir: str
    target: str
    kernel: str = "kernel"
    loc: Location = UNKNOWN
    module: Module | None = None


@dataclass
class _Process:
    """A running worker: the process, the ends of its pipes, and the file that it prints to."""

    popen: subprocess.Popen[bytes]
    requests: IO[bytes]
    answers: IO[bytes]
    output: IO[bytes]
    #: how far ``output`` had grown when the current request was sent
    mark: int = 0

    @staticmethod
    def start(target: str) -> _Process:
        requests_read, requests_write = os.pipe()
        answers_read, answers_write = os.pipe()
        output = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        paths = [os.path.abspath(path) for path in sys.path]
        try:
            popen = subprocess.Popen(
                [sys.executable, "-c", _START, str(requests_read), str(answers_write), target, *paths],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **_ONE_THREAD},
                pass_fds=(requests_read, answers_write),
                start_new_session=True,  # Ctrl-C is for the caller; `end` takes ptxas along
            )
        except BaseException:
            os.close(requests_write)
            os.close(answers_read)
            output.close()
            raise
        finally:
            os.close(requests_read)
            os.close(answers_write)
        return _Process(popen, os.fdopen(requests_write, "wb"), os.fdopen(answers_read, "rb"), output)

    def exchange(self, request: Request) -> tuple[str, Any]:
        """Send a request and receive the answer; EOFError or OSError when the process dies."""
        self.mark = os.fstat(self.output.fileno()).st_size
        environment = {k: v for k, v in os.environ.items() if k.startswith(PREFIX) or k == "PATH"}
        _send(self.requests, (request, environment))
        answer: tuple[str, Any] = _receive(self.answers)
        return answer

    def printed(self) -> str:
        """The end of what the process printed since the current request was sent."""
        size = os.fstat(self.output.fileno()).st_size
        start = max(self.mark, size - _QUOTED)
        return os.pread(self.output.fileno(), size - start, start).decode(errors="replace").strip()

    def end(self) -> int:
        """Kill the process with what it started unless it is dead, and return its exit code."""
        if self.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.popen.pid, signal.SIGKILL)
        return self.popen.wait()

    def close(self) -> None:
        """Close our ends of the pipes. A request that is half written stays so."""
        for stream in (self.requests, self.answers, self.output):
            with contextlib.suppress(OSError):
                stream.close()


@dataclass(eq=False)
class Worker:
    """A backend process, started at once and reused. Thread safe: requests take turns.

    A forked child starts a process of its own.
    """

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _process: _Process | None = None

    def __post_init__(self) -> None:
        _workers.add(self)

    @property
    def pid(self) -> int | None:
        """The process that serves now, None where none runs."""
        return None if self._process is None else self._process.popen.pid

    def start(self, target: str) -> None:
        """Start the process if none runs; its imports, for that target, then overlap the caller's passes."""
        if self._lock.acquire(blocking=False):  # whoever else holds it has a process
            try:
                self._running(target)
            finally:
                self._lock.release()

    def stop(self) -> None:
        """End the process; a request that it serves fails."""
        process, self._process = self._process, None
        if process is not None:
            process.end()
            process.close()

    def compile(self, request: Request) -> Any:
        """The `BackendResult` of a request. `BackendFailure` when the backend refuses, `CompilerCrash` when it dies."""
        with self._lock:
            process = self._running(request.target)
            try:
                kind, answer = process.exchange(request)
            except (EOFError, OSError, pickle.UnpicklingError):
                self._process = None
                code, printed = process.end(), process.printed()
                process.close()
                raise _crash(request, code, printed) from None
            except BaseException:  # Ctrl-C: the answer to come would be taken for that of the next request
                self.stop()
                raise
        if kind == "error":
            raise _failure(request, **answer)
        return answer

    def _running(self, target: str) -> _Process:
        if self._process is not None and self._process.popen.poll() is not None:  # killed while it was idle
            self.stop()
        if self._process is None:
            self._process = _Process.start(target)
        return self._process

    def forget(self) -> None:
        """In a forked child: leave the parent's process alone, and be as new."""
        process, self._process, self._lock = self._process, None, threading.Lock()
        if process is not None:
            process.popen.returncode = 0  # not our child: nothing to wait for
            # Closed below Python's buffers: a request that the parent was writing must not be flushed twice.
            for stream in (process.requests, process.answers, process.output):
                with contextlib.suppress(OSError):
                    null = os.open(os.devnull, os.O_RDWR)
                    os.dup2(null, stream.fileno(), inheritable=False)
                    os.close(null)


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()
_shared: list[Worker] = []
_shared_lock = threading.Lock()


def shared_worker() -> Worker:
    """The worker of this process."""
    with _shared_lock:
        if not _shared:
            _shared.append(Worker())
        return _shared[0]


def _after_fork() -> None:
    global _shared_lock  # noqa: PLW0603  (another thread may have held it)
    _shared_lock = threading.Lock()
    for worker in list(_workers):
        worker.forget()


def _stop_all() -> None:
    for worker in list(_workers):
        worker.stop()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_stop_all)


# --- errors -----------------------------------------------------------------------------------------


def _failure(
    request: Request, stage: str, message: str, loc: Location = UNKNOWN, hint: str = "", details: str = ""
) -> BackendFailure:
    """The error for what the backend answered; with a reproducer unless the program is to blame."""
    common: dict[str, Any] = {"stage": stage, "kernel": request.kernel, "target": request.target}
    if stage == "lowering" and not details:
        text = f"{message} (kernel '{request.kernel}')"
        return BackendFailure(text, loc if loc != UNKNOWN else request.loc, hint, **common)
    text = f"compiling kernel '{request.kernel}' for {request.target} failed in stage '{stage}': {message}"
    return BackendFailure(text, request.loc, hint, details=details, **_reproducer(request, stage), **common)


def _crash(request: Request, code: int, printed: str) -> CompilerCrash:
    stage = _stage_of(printed)
    ended = how_it_ended(code)
    error = CompilerCrash(
        f"the backend's process died ({ended}) in stage '{stage}' of kernel '{request.kernel}' for {request.target}",
        request.loc,
        "out of memory?" if code == -signal.SIGKILL else "a fault of the compiler: please report it",
        stage=stage,
        kernel=request.kernel,
        target=request.target,
        details=printed,
        **_reproducer(request, f"{stage}, {ended}"),
    )
    error.exit_code = code
    return error


def _reproducer(request: Request, what: str) -> dict[str, Any]:
    header = f"// kernel '{request.kernel}' for {request.target}: failed in {what}\n"
    path = write_reproducer(header + request.ir, request.kernel)
    return {
        "reproducer": path,
        "rerun": f"tilewright compile {shlex.quote(str(path))} --target {request.target}",
    }


#: where in the sources each stage is, innermost first in what faulthandler prints
_STAGES = (("backends/llvm", "llvm"), ("ptxas", "ptxas"), ("backends/amd/link", "link"), ("codeobject", "link"))
_FRAME = re.compile(r'File "[^"]*?tilewright/([^"]+)\.py", line \d+ in')


def _stage_of(printed: str) -> str:
    """The stage in which a worker died, from the stack that faulthandler printed; "code generation" without one."""
    frames = _FRAME.findall(printed)
    for frame in frames:
        for part, stage in _STAGES:
            if part in frame:
                return stage
        if frame.startswith(("backends/lower", "backends/mlir", "backends/nvidia", "backends/amd")):
            return "lowering"
    return "parsing" if any(frame.startswith("ir/") for frame in frames) else "code generation"


# --- messages ---------------------------------------------------------------------------------------


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


# --- in the worker ------------------------------------------------------------------------------------


def _answer(request: Request) -> tuple[str, Any]:
    from tilewright.ir.core import IRError

    try:
        from tilewright.backends.dispatch import compile_module
        from tilewright.backends.errors import BackendError
        from tilewright.ir.target import get_target
    except ImportError as error:
        message = f"a package of the backend cannot be imported: {error}"
        return "error", {"stage": "start", "message": message, "hint": "install tilewright with its dependencies"}
    try:
        return "ok", compile_module(request.module or _parsed(request.ir), get_target(request.target))
    except IRError as error:
        return "error", {"stage": "lowering", "message": error.message, "loc": error.loc, "hint": error.hint}
    except BackendError as error:
        return "error", {"stage": error.stage, "message": error.message, "details": "\n".join(error.diagnostics)}
    except Exception as error:
        import traceback

        frames = traceback.extract_tb(error.__traceback__)
        listing = "\n".join(f'File "{f.filename}", line {f.lineno} in {f.name}' for f in reversed(frames))
        return "error", {
            "stage": _stage_of(listing),
            "message": f"internal error: {type(error).__name__}: {error}",
            "hint": "a fault of the compiler: please report it",
            "details": "".join(traceback.format_tb(error.__traceback__)[-4:]),
        }


def _parsed(text: str) -> Module:
    from tilewright.ir.parser import parse_module

    return parse_module(text, "<scheduled>")


def _end_with_requests(requests_from: int) -> None:
    """End this process, and what it started, when nobody can send requests any more: also amid a long one."""
    closed = select.poll()
    closed.register(requests_from, 0)  # a hangup is told without being asked for
    closed.poll()
    os.killpg(0, signal.SIGKILL)


def serve(requests_from: int, answers_to: int, target: str) -> None:
    """Serve requests from one pipe, with answers on another, until the first closes; the first is for ``target``."""
    import faulthandler
    import gc

    threading.Thread(target=_end_with_requests, args=(requests_from,), daemon=True).start()
    gc.disable()  # imports make no garbage worth the search
    faulthandler.enable(sys.stderr)
    for descriptor in (requests_from, answers_to):
        os.set_inheritable(descriptor, False)  # ptxas must not keep them open
    with os.fdopen(requests_from, "rb") as requests, os.fdopen(answers_to, "wb") as answers:
        with contextlib.suppress(Exception):  # which the answer to the first request reports
            from tilewright.backends import dispatch

            dispatch.preload(target)
        gc.freeze()
        gc.enable()
        while True:
            try:
                request, environment = _receive(requests)
            except EOFError:
                return
            os.environ.update(environment)
            for name in [n for n in os.environ if n.startswith(PREFIX) and n not in environment]:
                del os.environ[name]
            try:
                _send(answers, _answer(request))
            except BrokenPipeError:  # the parent is gone
                return
