"""The benchmarks and GPU tests on the GPUs of one machine within a time: python -m benchmarks.suite --out DIR.

    [--budget SECONDS] [--only NAME ...] [--gpus 0,1] [--prepare SECONDS] [--workers N] [--list]

Jobs first compile what they need (`prepare`), side by side. Timed jobs follow, each alone on its GPUs; correctness jobs
run beside the preparations, where they give way to timed jobs and begin anew later, and at the end. No job begins that
is expected to pass the deadline; whatever runs too long is stopped with its processes. Output goes to DIR/NAME.log at
once, states to DIR/summary.json after each change. Exit code 0: all jobs ran and succeeded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: seconds between two looks at the processes, and from the request to end to the end
POLL, GRACE = 0.05, 3.0


@dataclass(frozen=True)
class Job:
    """A command with ``{out}`` for the folder of results; ``seconds`` are expected, and twice these and 30 the limit.

    ``prepare`` is a command that fills the cache of compiled kernels. Lower ``priority`` comes first.
    """

    name: str
    command: str
    seconds: float
    gpus: int = 1
    timed: bool = True
    priority: int = 5
    prepare: str = ""
    limit: float = 0.0

    @property
    def most_seconds(self) -> float:
        return self.limit or 2 * self.seconds + 30


@dataclass
class Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    gpus: tuple[str, ...]
    begun: float
    #: when it is stopped
    end: float
    preparing: bool
    #: why it was asked to end, and when
    stopped: str = ""
    asked: float = math.inf


class Suite:
    """One run. ``gpus``: what CUDA_VISIBLE_DEVICES calls them; ``deadline``, ``prepare_until``: by time.monotonic."""

    def __init__(
        self, jobs: Sequence[Job], gpus: Sequence[str], out: Path, deadline: float, prepare_until: float, workers: int
    ) -> None:
        self.gpus, self.out, self.deadline, self.workers = tuple(gpus), out.resolve(), deadline, workers
        self.prepare_until = min(prepare_until, deadline)
        self.waiting = sorted(jobs, key=lambda job: job.priority)
        self.to_prepare = [job for job in self.waiting if job.prepare]
        self.running: list[Running] = []
        self.states: dict[str, dict[str, Any]] = {
            job.name: {"state": "waiting", "timed": job.timed, "expected_s": job.seconds} for job in self.waiting
        }
        self.out.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        self.save()

    def run(self) -> None:
        try:
            # a process that not even a kill ends must not keep us
            while self.step() and time.monotonic() < self.deadline + GRACE:
                time.sleep(POLL)
        finally:
            for running in self.running:
                self.ask_to_end(running, "the suite ended")
            last = time.monotonic() + GRACE
            while self.running and time.monotonic() < last + GRACE:
                for running in self.running if time.monotonic() > last else ():
                    signal_group(running.process, signal.SIGKILL)
                self.reap()
                time.sleep(POLL)
            for state in self.states.values():
                if state["state"] in ("waiting", "running"):
                    state |= {"state": {"waiting": "not run", "running": "stopped"}[state["state"]]}
                    state |= {"why": "the suite ended"}
            self.save()

    def step(self) -> bool:
        """Look at what runs and start what can; whether there is more to do."""
        self.reap()
        now = time.monotonic()
        for running in self.running:
            if now > running.asked + GRACE:
                signal_group(running.process, signal.SIGKILL)
            elif now > running.end:
                self.ask_to_end(running, f"stopped after {now - running.begun:.0f} s")
        if now > self.prepare_until:
            self.to_prepare.clear()
        while self.to_prepare and sum(r.preparing for r in self.running) < self.workers:
            self.prepare(self.to_prepare.pop(0))
        if self.to_prepare or any(r.preparing for r in self.running):
            self.start_jobs(timed=False, horizon=self.prepare_until)
        elif self.any_left(timed=True):
            for running in self.running:
                if not running.job.timed:
                    self.ask_to_end(running, "gave way")
            if all(r.job.timed for r in self.running):
                self.start_jobs(timed=True)
        else:
            self.start_jobs(timed=False)
        return bool(self.running or self.waiting)

    def any_left(self, timed: bool) -> bool:
        return any(job.timed == timed for job in [*self.waiting, *(r.job for r in self.running)])

    def start_jobs(self, timed: bool, horizon: float = math.inf) -> None:
        """Start waiting jobs by priority. A later one goes first only where it is expected to end before ``horizon``.

        That is when the GPUs of an earlier one that needs several are expected to be free.
        """
        now = time.monotonic()
        for job in [job for job in self.waiting if job.timed == timed]:
            free = [gpu for gpu in self.gpus if not any(gpu in r.gpus for r in self.running if not r.preparing)]
            if job.gpus > len(self.gpus):
                self.leave_out(job, f"it needs {job.gpus} GPUs")
            elif now + job.seconds > self.deadline:
                self.leave_out(job, f"{job.seconds:.0f} s would pass the deadline")
            elif job.gpus > len(free):
                ends = [r.begun + r.job.seconds for r in self.running if not r.preparing]
                horizon = min(horizon, max(ends))
            elif now + job.seconds <= horizon:
                self.waiting.remove(job)
                self.start(job, job.command, tuple(free[: job.gpus]), job.most_seconds)

    def prepare(self, job: Job) -> None:
        if job.gpus <= len(self.gpus):
            # those that need one share the GPUs evenly
            first = len([s for s in self.states.values() if "prepare" in s]) % len(self.gpus) if job.gpus == 1 else 0
            self.start(job, job.prepare, self.gpus[first : first + job.gpus], math.inf, preparing=True)

    def start(self, job: Job, command: str, gpus: tuple[str, ...], limit: float, preparing: bool = False) -> None:
        now, log = time.monotonic(), self.out / f"{job.name}{'.prepare' if preparing else ''}.log"
        words = [word.replace("{out}", str(self.out)) for word in shlex.split(command)]
        words = [sys.executable if word == "python" else word for word in words]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        try:
            with log.open("wb") as file:
                process = subprocess.Popen(
                    words, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=file,
                    stderr=file, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            self.note(job, preparing, state="failed", why=str(error))
            return
        end = min(now + limit, self.prepare_until if preparing else self.deadline - GRACE)
        self.running.append(Running(job, process, log, gpus, now, end, preparing))
        self.note(job, preparing, state="running", gpus=list(gpus), begun_s=round(now - self.began, 1))

    def ask_to_end(self, running: Running, why: str) -> None:
        if not running.stopped:
            running.stopped, running.asked = why, time.monotonic()
            signal_group(running.process, signal.SIGTERM)

    def reap(self) -> None:
        """Take note of what has ended, and end what it left behind."""
        for running in list(self.running):
            process, job = running.process, running.job
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            signal_group(process, signal.SIGKILL)  # its number is taken as long as nobody has waited for it
            code = process.wait()
            self.running.remove(running)
            seconds = round(time.monotonic() - running.begun, 1)
            if running.stopped == "gave way" and code:
                self.waiting.append(job)
                self.note(job, False, state="waiting")
                continue
            state = "ok" if code == 0 else "stopped" if running.stopped else "failed"
            why = "" if code == 0 else running.stopped or last_line(running.log)
            self.note(job, running.preparing, state=state, rc=code, seconds=seconds, why=why)

    def leave_out(self, job: Job, why: str) -> None:
        self.waiting.remove(job)
        self.note(job, False, state="not run", why=why)

    def note(self, job: Job, preparing: bool, **what: Any) -> None:
        whole = self.states[job.name]
        state = whole.setdefault("prepare", {}) if preparing else whole
        state |= {key: value for key, value in what.items() if value != ""}
        step = "prepare " if preparing else ""
        shown = ", ".join(f"{key} {value}" for key, value in what.items() if key != "state" and value != "")
        print(f"{time.monotonic() - self.began:7.1f} s  {step}{job.name}: {what['state']} {shown}", flush=True)
        self.save()

    def save(self) -> None:
        """Whole at any moment: a new file takes the place of the old one."""
        new = self.out / "summary.json.new"
        new.write_text(json.dumps({"gpus": self.gpus, "jobs": self.states}, indent=1) + "\n")
        new.replace(self.out / "summary.json")

    def table(self) -> Iterator[str]:
        for name, state in self.states.items():
            numbers = f"{state.get('rc', '-')!s:>4} {state.get('seconds', '-')!s:>7} s"
            prepared = state.get("prepare", {"state": "-"})["state"]
            yield f"{name:<24} {state['state']:<8}{numbers}  prepared: {prepared:<8} {state.get('why', '')}".rstrip()


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip()[:120] for line in reversed(lines) if line.strip()), "no output")


def gpus_here() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    with suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
        return [str(i) for i, line in enumerate(x for x in listed.splitlines() if x.startswith("GPU "))]
    return []


# --- the jobs ----------------------------------------------------------------------------------------


def _bench(name: str, arguments: str, seconds: float, *, few: str = "--repeats 1", **job: Any) -> Job:
    """A benchmark with its results in {out}/NAME.json; with the arguments ``few`` it only needs to compile."""
    script = f"python benchmarks/{arguments}"
    return Job(name, f"{script} --json {{out}}/{name}.json", seconds, prepare=few and f"{script} {few}", **job)


def _limiters(name: str, words: str, seconds: float) -> Job:
    command = f"python -m benchmarks.limiters {words}"
    return Job(name, f"{command} --out {{out}}/{name}.json", seconds, prepare=f"{command} --run", priority=4)


def _test(name: str, arguments: str, seconds: float = 60, gpus: int = 1) -> Job:
    return Job(name, f"python -m pytest -q {arguments}", seconds, gpus, timed=False)


def _sanitizer(tool: str, share: int, shares: int) -> Job:
    # NVIDIA's bindings ask for functions that drivers may lack: such errors of calls tell nothing
    options = f"--tool {tool} --report-api-errors no --error-exitcode 9"
    command = f"compute-sanitizer {options} python tests/gpu/launch_library.py --share {share}/{shares}"
    seconds = 30 if tool == "memcheck" else 120
    settings = "env PYTORCH_NO_CUDA_MEMORY_CACHING=1"
    return Job(f"{tool}_{share}", f"{settings} {command}", seconds, timed=False, priority=6)


#: what docs/performance.md rests on, limiters, and tests that need GPUs. The seconds are guesses, but for those of
#: limiters (7 for each case), Llama's layers, memcheck and the tests of torch and of several GPUs
JOBS = (
    _bench("multi_gpu", "multi_gpu.py --repeats 15", 240, gpus=2, priority=1, few="--repeats 1 --together"),
    _bench("torch_parallel", "torch_parallel.py", 150, gpus=2, priority=1),
    _bench("gemm", "gemm.py --shapes all", 60, priority=2),
    _bench("gemm_small", "gemm.py --shapes small", 40, priority=3),
    _bench("gemm_llama", "gemm.py --shapes llama --launches 8", 60, priority=3),
    _bench("gemm_f16", "gemm.py --dtype f16", 30, priority=5),
    _bench("gemm_family", "gemm_family.py", 90, priority=2),
    _bench("gemm_cast", "gemm_cast.py", 60, priority=3),
    _bench("clusters", "clusters.py", 60),
    _bench("precision", "precision.py", 60),
    _bench("rows", "rows.py", 60, priority=3),
    _bench("norms", "norms.py --long", 180, priority=2),
    _bench("attention", "attention.py", 60, priority=2),
    _bench("attention_backward", "attention_backward.py", 90, priority=2),
    _bench("attention_masks", "attention_masks.py", 120, priority=3, few="--repeats 0"),
    _bench("torch_llama", "torch_llama.py", 120, priority=3, few="--repeats 1 --no-check"),
    _bench("torch_llama_host", "torch_llama.py --host --layers 2 --take attention,gated_linear", 25),
    _bench("torch_operators", "torch_operators.py", 30),
    _bench("host", "host.py", 40, few=""),
    _bench("compile_time", "compile_time.py", 60, few=""),
    _limiters("limiters_attention", "attention", 100),
    _limiters("limiters_rows", "norm softmax", 110),
    _limiters("limiters_others", "cross swiglu embedding column fp8", 80),
    *(_test(f"test_{x}", f"tests/gpu/test_{x}.py") for x in ("kernels", "language", "rows", "fallback", "gemm_split")),
    _test("test_tools", "tests/gpu/test_tools.py"),
    _test("test_emulator", "tests/gpu/test_emulator.py", 120),
    _test("test_torch", "tests/torch/test_gpu.py tests/torch/test_gpu_repeats.py", 95),
    _test("test_symmetric", "tests/gpu/test_symmetric.py", 120, gpus=2),
    _test("test_multi_gpu_kernels", "tests/gpu/test_multi_gpu_kernels.py", 60, gpus=2),
    _test("test_torch_collectives", "tests/gpu/test_torch_collectives.py", 80, gpus=2),
    *(_sanitizer(tool, share, 3) for tool in ("memcheck", "racecheck") for share in range(3)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of results")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all of it (default 540)")
    parser.add_argument("--prepare", type=float, help="of these at most for preparations (default: a quarter)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="jobs, or patterns such as 'test_*'")
    parser.add_argument("--gpus", help="as CUDA_VISIBLE_DEVICES has them (default: all)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) // 4), help="preparations at once")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    start = time.monotonic()
    for pattern in options.only or ():
        if not any(fnmatch(job.name, pattern) for job in JOBS):
            parser.error(f"no job is named {pattern}; --list prints them")
    jobs = [job for job in JOBS if not options.only or any(fnmatch(job.name, pattern) for pattern in options.only)]
    if options.list:
        for job in sorted(jobs, key=lambda job: (not job.timed, job.priority)):
            kind = f"{'timed' if job.timed else 'untimed':<8}{job.gpus} GPU {job.seconds:4.0f} s"
            print(f"{job.name:<24} {kind}  priority {job.priority}  {job.command}")
        return
    if options.out is None:
        parser.error("--out names the folder of results")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    gpus = options.gpus.split(",") if options.gpus else gpus_here()
    prepare = options.budget / 4 if options.prepare is None else options.prepare
    suite = Suite(jobs, gpus, options.out, start + options.budget, start + prepare, options.workers)
    try:
        suite.run()
    finally:
        print("\n".join(suite.table()), flush=True)
    sys.exit(any(state["state"] != "ok" for state in suite.states.values()))


if __name__ == "__main__":
    main()
