"""The backend's process: crashes and internal errors become errors with a reproducer, and the next compile works."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from compiler_programs import gemm, scale

import tilewright as tw
from tilewright.compiler.cli import main
from tilewright.compiler.driver import compile_text
from tilewright.compiler.errors import BackendFailure, CompilerCrash
from tilewright.compiler.worker import Request, Worker, _stage_of
from tilewright.ir.core import Location

SPEC = {"x": tw.spec("f32", ("N",), align=16), "y": tw.spec("f32", ("N",), align=16)}


@pytest.fixture(scope="module")
def scheduled():
    """Scheduled IR for sm_90a that compiles in a moment."""
    text = list(tw.compile(scale, "sm_90a", SPEC).ir.values())[-1]
    return text.replace("module {", 'module {target = "sm_90a"} {', 1)


@pytest.fixture
def worker(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_DUMP_DIR", str(tmp_path))  # where reproducers go
    found = Worker()
    yield found
    found.stop()


class Bomb(str):
    """IR text that ends whoever unpickles it."""

    how = (os.abort, ())

    def __reduce__(self):
        return self.how


class Exit(Bomb):
    how = (os._exit, (3,))


class Kill(Bomb):
    how = (signal.raise_signal, (signal.SIGKILL,))


@contextmanager
def later(seconds, call):
    timer = threading.Timer(seconds, call)
    timer.start()
    yield
    timer.join()


@pytest.mark.parametrize(
    ("bomb", "ended", "code"),
    [(Bomb, "killed by SIGABRT", -6), (Exit, "exit code 3", 3), (Kill, "killed by SIGKILL", -9)],
)
def test_a_crash_is_an_error_with_kernel_stage_and_reproducer(worker, scheduled, tmp_path, bomb, ended, code):
    request = Request(bomb(scheduled), "sm_90a", "scale", Location(__file__, 30, 1))
    with pytest.raises(CompilerCrash) as caught:
        worker.compile(request)
    error = caught.value
    assert isinstance(error, tw.CompileError)
    assert (error.kernel, error.target, error.exit_code, error.stage) == ("scale", "sm_90a", code, "code generation")
    for text in (
        "kernel 'scale'",
        "sm_90a",
        "stage 'code generation'",
        ended,
        f"{__file__}:30:1",
        str(error.reproducer),
    ):
        assert text in str(error)
    assert error.reproducer.parent == tmp_path
    assert pickle.loads(pickle.dumps(error)).exit_code == code
    assert worker.compile(Request(scheduled, "sm_90a")).binary, "the next request gets a new process"


def test_a_reproducer_compiles_again(worker, scheduled):
    with pytest.raises(CompilerCrash) as caught:
        worker.compile(Request(Bomb(scheduled), "sm_90a", "scale"))
    path = caught.value.reproducer
    binary = path.with_suffix(".cubin")
    done = CliRunner().invoke(main, ["compile", str(path), "-o", str(binary)])
    assert done.exit_code == 0, done.output
    assert binary.read_bytes() == compile_text(scheduled).binary


def test_killed_in_the_middle_of_a_request(worker):
    text = list(tw.compile(gemm, "gfx950", {n: tw.spec("bf16", ("M", "N")) for n in "abc"}).ir.values())[-1]
    worker.start("sm_90a")
    worker.compile(Request('module {target = "gfx950"} {func @f() {threads = 64, num_warps = 1} {}}', "gfx950"))
    with later(0.1, lambda: os.kill(worker.pid, signal.SIGSEGV)), pytest.raises(CompilerCrash) as caught:
        worker.compile(Request(text, "gfx950", "gemm"))
    assert caught.value.stage in ("parsing", "lowering", "llvm", "link"), caught.value
    assert "killed by SIGSEGV" in str(caught.value)
    assert "Current thread" in caught.value.details, "the stack of the process"


def test_killed_while_idle(worker, scheduled):
    request = Request(scheduled, "sm_90a")
    worker.compile(request)
    first = worker.pid
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert worker.compile(request).binary
    assert worker.pid != first


def test_stages_are_read_from_the_stack():
    stack = (
        "Fatal Python error: Aborted\n\n"
        '  File "/x/llvmlite/binding/ffi.py", line 1 in f\n  File "/x/tilewright/{}.py", line 3 in g\n'
    )
    stages = {
        "backends/llvm": "llvm",
        "backends/nvidia/ptxas": "ptxas",
        "backends/lower/memory": "lowering",
        "backends/amd/link": "link",
        "ir/parser": "parsing",
    }
    assert {path: _stage_of(stack.format(path)) for path in stages} == stages


def test_internal_errors_name_the_kernel_and_keep_a_reproducer(worker, scheduled):
    with pytest.raises(BackendFailure) as caught:
        worker.compile(Request(scheduled, "no_such_target", "scale"))
    error = caught.value
    assert not isinstance(error, CompilerCrash)
    for text in ("kernel 'scale' for no_such_target", "internal error: ValueError: unknown target", "get_target"):
        assert text in str(error)
    assert error.reproducer.read_text().endswith(scheduled)
    pid = worker.pid
    worker.compile(Request(scheduled, "sm_90a"))
    assert worker.pid == pid, "an exception does not cost the process"


def test_a_failing_tool_names_the_stage(worker, scheduled, monkeypatch):
    worker.start("sm_90a")
    monkeypatch.setenv("TILEWRIGHT_PTXAS", "/nowhere/ptxas")
    with pytest.raises(
        BackendFailure, match=r"kernel 'scale' for sm_90a failed in stage 'ptxas': .*/nowhere/ptxas"
    ) as caught:
        worker.compile(Request(scheduled, "sm_90a", "scale"))
    assert caught.value.stage == "ptxas"
    monkeypatch.delenv("TILEWRIGHT_PTXAS")
    assert worker.compile(Request(scheduled, "sm_90a")).binary, "the environment of the caller counts, at each request"


def test_threads_take_turns(worker, scheduled):
    names = [f"k{n}" for n in range(6)]
    requests = [Request(scheduled.replace("@scale", f"@{name}"), "sm_90a", name) for name in names]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(worker.compile, requests))
    assert [r.abi.name for r in results] == names


def test_interrupting_a_request_leaves_no_stale_answer(worker, scheduled):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # starting the process alone takes longer
        with pytest.raises(KeyboardInterrupt):
            worker.compile(Request(scheduled, "sm_90a"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert worker.compile(Request(scheduled.replace("@scale", "@other"), "sm_90a")).abi.name == "other"


def python(script, *, check=True, **variables):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=Path(__file__).parents[1] / "support",
        env={**os.environ, "TILEWRIGHT_CACHE_SIZE": "0", **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=check,
    )


PRELUDE = """
import os, signal, subprocess, sys
sys.path.insert(0, "")
import tilewright as tw
from compiler_programs import scale
from tilewright.compiler.worker import shared_worker
spec = {"x": tw.spec("f32", ("N",), align=16), "y": tw.spec("f32", ("N",), align=16)}
compile = lambda name: tw.compile(scale, "sm_90a", spec, name=name)
"""


def alive(pid):
    """Whether a process runs: a zombie that nobody waits for counts, as it holds its entry."""
    return Path(f"/proc/{pid}").exists()


def wait_until_gone(pid):
    end = time.monotonic() + 5
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(pid)


def test_exit_takes_the_process_along_and_noise_does_no_harm(tmp_path):
    # whatever prints at the start of Python or in a module of ours must not reach the answers
    (tmp_path / "sitecustomize.py").write_text("print('noise ' * 10000)")
    script = PRELUDE + "compile('a'); print(shared_worker().pid)"
    started = time.monotonic()
    done = python(script, PYTHONPATH=os.pathsep.join([str(tmp_path), str(Path(tw.__file__).parents[1])]))
    assert wait_until_gone(int(done.stdout.split()[-1]))
    assert time.monotonic() - started < 20


def test_a_killed_program_takes_the_process_along():
    script = PRELUDE + "compile('a'); print(shared_worker().pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    done = python(script, check=False)
    assert done.returncode == -signal.SIGKILL
    assert wait_until_gone(int(done.stdout))


def test_a_killed_program_takes_a_process_along_that_works():
    script = PRELUDE + (
        "import threading, time\nfrom tilewright.compiler.worker import Request\n"
        "class Endless(str):\n    def __reduce__(self): return time.sleep, (60,)\n"
        "worker = shared_worker(); worker.start('sm_90a'); print(worker.pid, flush=True)\n"
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "worker.compile(Request(Endless(), 'sm_90a'))"
    )
    done = python(script, check=False)
    assert done.returncode == -signal.SIGKILL
    assert wait_until_gone(int(done.stdout))


def test_ctrl_c_reaches_the_program_alone():
    # the whole process group gets the signal, as from a terminal
    script = PRELUDE + (
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it\n"
        "os.setpgrp(); compile('a'); pid = shared_worker().pid\n"
        "try:\n    os.killpg(0, signal.SIGINT); signal.pause()\n"
        "except KeyboardInterrupt:\n    compile('b'); assert shared_worker().pid == pid; print('fine')"
    )
    assert python(script).stdout == "fine\n"


def test_a_forked_child_has_a_process_of_its_own():
    script = PRELUDE + (
        "compile('a'); pid = shared_worker().pid; child = os.fork()\n"
        "if child == 0:\n    assert compile('b').name == 'b'; assert shared_worker().pid != pid; sys.exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "assert compile('c').name == 'c'; assert shared_worker().pid == pid; print('fine')"
    )
    done = python(script)
    assert done.stdout == "fine\n", done.stderr
