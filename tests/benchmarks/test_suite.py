"""The runner of benchmarks, with commands of the shell for jobs and GPUs that do not exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import limiters, suite
from benchmarks.suite import JOBS, Job, Suite

ROOT = Path(suite.__file__).parents[1]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "POLL", 0.005)
    monkeypatch.setattr(suite, "GRACE", 0.1)


def shell(script: str) -> str:
    return f"sh -c {shlex.quote(script)}"


def noted(name: str, wait_for: str = "") -> str:
    """A command that leaves its begin, end and GPUs in {out}/times; it ends when ``wait_for`` has begun."""
    wait = f"until [ -e {{out}}/{wait_for}.begun ]; do sleep 0.01; done; " if wait_for else ""
    begin = f"begin=$(date +%s.%N); touch {{out}}/{name}.begun; echo {name} says; {wait}"
    return shell(f'{begin}echo {name} $begin $(date +%s.%N) "$CUDA_VISIBLE_DEVICES" >> {{out}}/times')


def times(out: Path) -> dict[str, tuple[float, float, list[str]]]:
    lines = [line.split() for line in (out / "times").read_text().splitlines()]
    return {name: (float(begin), float(end), gpus.split(",")) for name, begin, end, gpus in lines}


def run(
    jobs: list[Job], out: Path, gpus: tuple[str, ...] = ("4", "7"), budget: float = 60, prepare: float = 10
) -> dict[str, Any]:
    now = time.monotonic()
    Suite(jobs, gpus, out, now + budget, now + prepare, workers=2).run()
    states: dict[str, Any] = json.loads((out / "summary.json").read_text())["jobs"]
    return states


def alive(pid: int) -> bool:
    """Whether a process runs: a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_phases_and_gpus(tmp_path: Path) -> None:
    jobs = [
        Job("check", noted("check"), 30, timed=False),  # too long for the time of preparations
        Job("a", noted("a", wait_for="b"), 0.1, prepare=noted("prepare-a")),
        Job("b", noted("b", wait_for="a"), 0.1, prepare=noted("prepare-b")),
        Job("c", noted("c"), 0.1, prepare=noted("prepare-c")),
        Job("pair", noted("pair"), 0.1, gpus=2, priority=1),
    ]
    states = run(jobs, tmp_path)
    assert all(state["state"] == "ok" and state["rc"] == 0 for state in states.values()), states
    found = times(tmp_path)
    prepared = max(found[f"prepare-{name}"][1] for name in "abc")
    assert prepared < found["pair"][0] and found["pair"][2] == ["4", "7"]
    assert all(found["pair"][1] < found[name][0] for name in "abc")
    assert {found["a"][2][0], found["b"][2][0]} == {"4", "7"} and len(found["c"][2]) == 1
    before = next(name for name in "ab" if found[name][2] == found["c"][2])
    assert found[before][1] < found["c"][0]
    assert max(found[name][1] for name in "abc") < found["check"][0]
    assert (tmp_path / "a.log").read_text() == "a says\n"
    assert (tmp_path / "a.prepare.log").read_text() == "prepare-a says\n"
    assert states["a"]["prepare"]["state"] == "ok" and states["a"]["seconds"] >= 0


def test_what_fails_hangs_or_has_no_place(tmp_path: Path) -> None:
    deaf = "trap '' TERM; (trap '' TERM; sleep 60) & echo $! > {out}/pid; echo begun; wait; wait"
    left = "sleep 60 & echo $! > {out}/left"
    jobs = [
        Job("hangs", shell(deaf), 0.1, limit=0.5),
        Job("fails", shell("echo first; echo the reason >&2; exit 3"), 0.1, prepare="no-such-compiler"),
        Job("missing", "no-such-program", 0.1),
        Job("leaves", shell(left), 0.1),
        Job("long", "true", 100),
        Job("wide", "true", 0.1, gpus=2),
        *(Job(f"slow-prepare-{i}", "true", 0.1, prepare="sleep 60") for i in range(2)),
        Job("late", "true", 0.1, prepare="touch {out}/late"),
    ]
    began = time.monotonic()
    states = run(jobs, tmp_path, ("0",), budget=30, prepare=0.1)
    assert time.monotonic() - began < 20
    assert states["hangs"]["state"] == "stopped" and states["hangs"]["why"].startswith("stopped after")
    assert not alive(int((tmp_path / "pid").read_text()))
    assert (states["fails"]["state"], states["fails"]["rc"], states["fails"]["why"]) == ("failed", 3, "the reason")
    assert states["fails"]["prepare"]["state"] == "failed"
    assert states["missing"]["state"] == "failed" and "no-such-program" in states["missing"]["why"]
    assert states["leaves"]["state"] == "ok" and not alive(int((tmp_path / "left").read_text()))
    assert (states["long"]["state"], states["long"]["why"]) == ("not run", "100 s would pass the deadline")
    assert (states["wide"]["state"], states["wide"]["why"]) == ("not run", "it needs 2 GPUs")
    for name in "slow-prepare-0", "slow-prepare-1":
        assert states[name]["prepare"]["state"] == "stopped" and states[name]["state"] == "ok"
    assert states["late"]["state"] == "ok" and not (tmp_path / "late").exists()


def test_nothing_outlives_the_deadline(tmp_path: Path) -> None:
    began = time.monotonic()
    states = run([Job("endless", "sleep 60", 0.1)], tmp_path, budget=0.3)
    assert states["endless"]["state"] == "stopped" and time.monotonic() - began < 20


def test_untimed_jobs_give_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "GRACE", 10)
    check = "trap 'sleep 0.05; touch {out}/gone; exit 1' TERM; echo x >> {out}/runs; [ -e {out}/gone ] || sleep 60"
    jobs = [
        Job("check", shell(check), 1, timed=False),
        Job("timed", shell("[ -e {out}/gone ]"), 0.1, prepare=shell("until [ -e {out}/runs ]; do sleep 0.01; done")),
    ]
    states = run(jobs, tmp_path)
    assert (tmp_path / "runs").read_text() == "x\nx\n"  # beside the preparation, and again at the end
    assert states["check"]["state"] == "ok" and states["timed"]["state"] == "ok"
    assert states["check"]["begun_s"] >= states["timed"]["begun_s"] + states["timed"]["seconds"] - 0.1


def test_jobs_that_fit_run_while_another_waits_for_gpus(tmp_path: Path) -> None:
    jobs = [
        Job("first", noted("first", wait_for="short"), 2, priority=1, limit=20),
        Job("pair", noted("pair"), 0.1, gpus=2, priority=2),
        Job("long", noted("long"), 5, priority=3),
        Job("short", noted("short"), 0.1, priority=4),
    ]
    run(jobs, tmp_path)
    found = times(tmp_path)
    assert found["short"][0] < found["first"][1] < found["pair"][0] < found["pair"][1] < found["long"][0]


def test_an_interrupted_run_tells_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pids").touch()
    jobs = [
        Job("done", "true", 0.1, priority=1),
        Job("hangs", shell("echo $$ > {out}/pid; sleep 60"), 0.1, priority=2),
        Job("waits", "true", 0.1, priority=3),
    ]
    pause = time.sleep

    def interrupted(seconds: float) -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            monkeypatch.setattr(suite.time, "sleep", pause)
            raise SystemExit(143)
        pause(seconds)

    monkeypatch.setattr(suite.time, "sleep", interrupted)
    with pytest.raises(SystemExit):
        run(jobs, tmp_path, ("0",))
    states = json.loads((tmp_path / "summary.json").read_text())["jobs"]
    assert states["done"]["state"] == "ok"
    assert states["hangs"]["state"] == "stopped" and states["hangs"]["why"] == "the suite ended"
    assert states["waits"]["state"] == "not run"
    assert not alive(int((tmp_path / "pid").read_text()))


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(suite, "JOBS", (Job("good", "true", 0.1), Job("bad", "false", 0.1), Job("other", "true", 1)))
    monkeypatch.setattr(suite.signal, "signal", lambda *_: None)

    def command(*words: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["suite", *words])
        code: object = 0
        try:
            suite.main()
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out

    assert "other" in command("--list", "--only", "o*")[1]
    assert command("--only", "unknown")[0] == 2
    code, said = command("--out", str(tmp_path), "--gpus", "0", "--only", "good", "bad", "--budget", "20")
    assert code and re.search(r"^good +ok .*\nbad +failed +1 ", said, re.MULTILINE)
    assert not command("--out", str(tmp_path), "--gpus", "0", "--only", "good")[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    assert suite.gpus_here() == ["2", "GPU-5"]


def test_commands_fit_the_scripts() -> None:
    for command in [command for job in JOBS for command in (job.command, job.prepare) if command]:
        words = shlex.split(command)
        scripts = [ROOT / word for word in words if word.endswith(".py")]
        scripts += [ROOT / (word.replace(".", os.sep) + ".py") for word in words if word.startswith("benchmarks.")]
        assert scripts and all(script.exists() for script in scripts), command
        if "pytest" not in words:
            source = scripts[0].read_text()
            script = max(i for i, word in enumerate(words) if word.startswith(("benchmarks", "tests")))
            for option in (word.removeprefix("--") for word in words[script:] if word.startswith("--")):
                assert f'"--{option}"' in source or f'("{option}", ' in source, f"{command}: no {option}"


def test_every_job_has_a_name_and_every_case_of_limiters_a_job() -> None:
    assert len({job.name for job in JOBS}) == len(JOBS)
    commands = [shlex.split(job.prepare) for job in JOBS if "benchmarks.limiters" in job.command]
    names = [name for words in commands for name in limiters.chosen(words[3:-1])]
    assert sorted(names) == sorted(limiters.cases())
    assert limiters.chosen(["rmsnorm 16384x1024"]) == ["rmsnorm 16384x1024"]
