"""Reading what Nsight Compute says, with a script in its place, and which kernels the cases launch."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tilewright as tw
from benchmarks import limiters
from benchmarks.limiters import COLUMNS, METRICS, STALLED

IDENTITY = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC"'
)
PEAK = "pct_of_peak_sustained"
#: `--page raw`: names, units, a line for each kernel; metrics that nobody asked for are no harm
WIDE = f"""==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "softmax" - 0: 0%....50%....100% - 9 passes
==PROF== Disconnected from process 4711
{IDENTITY},"device__attribute_architecture","dram__bytes_read.sum","gpu__dram_throughput.avg.{PEAK}_elapsed",\
"gpu__time_duration.sum","launch__registers_per_thread","lts__throughput.avg.{PEAK}_elapsed",\
"{STALLED.format("long_scoreboard")}","{STALLED.format("selected")}","{STALLED.format("wait")}","thread__inst_new"
"","","","","","","","","","","","","Mbyte","%","ms","register/thread","%","inst","inst","inst",""
"0","4711","python3.12","127.0.0.1","softmax","1","7","(128, 1, 1)","(16384, 1, 1)","0","9.0","400",\
"1,402.75","83.50","1.25","32","n/a","6.00","1.00","3.00","(!) n/a"
"""
LONG = f"""==PROF== Connected to process 4711 (/usr/bin/python3.12)
{IDENTITY},"Section Name","Metric Name","Metric Unit","Metric Value"
"0","4711","python3","h","gemm","1","7","(384, 1, 1)","(132, 1, 1)","0","9.0","Command line profiler metrics",\
"gpu__time_duration.sum","ns","91,500"
"0","4711","python3","h","gemm","1","7","(384, 1, 1)","(132, 1, 1)","0","9.0","Command line profiler metrics",\
"sm__pipe_tensor_cycles_active.avg.{PEAK}_active","%","94.60"
"1","4711","python3","h","fill","1","7","(384, 1, 1)","(132, 1, 1)","0","9.0","Command line profiler metrics",\
"gpu__time_duration.sum","us","3.5"
"""


def test_a_line_for_each_kernel() -> None:
    (kernel,) = limiters.parse(WIDE)
    assert kernel["metrics"]["dram__bytes_read.sum"] == pytest.approx(1402.75e6)
    assert not any("throughput.avg" in name and "lts" in name for name in kernel["metrics"])
    row = limiters.summary("softmax 4096x8192", kernel)
    assert (row["kernel"], row["us"], row["dram"], row["L2"], row["tensor"]) == ("softmax", 1250, 83.5, None, None)
    assert row["verdict"] == "memory bandwidth"
    assert row["stalls"] == {"long_scoreboard": 60, "wait": 30}  # of 10 cycles, one of which is the instruction's own
    shown = limiters.line(row, 20)
    assert re.search(r"1250\.0 +83\.5 +- +- +- +- +-  memory bandwidth  \[long_scoreboard 60, wait 30\]$", shown)


def test_a_line_for_each_metric() -> None:
    gemm, fill = limiters.parse(LONG)
    assert limiters.summary("gemm", gemm)["us"] == 91.5 and limiters.summary("gemm", gemm)["verdict"] == "tensor pipe"
    assert fill == {"kernel": "fill", "metrics": {"gpu__time_duration.sum": 3.5}}


@pytest.mark.parametrize("text", ["", "==ERROR== no\n", IDENTITY + "\n", f"{IDENTITY}\n" + '"",' * 10 + '""\n'])
def test_no_kernel(text: str) -> None:
    assert limiters.parse(text) == []


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"dram": 76, "issue": 65, "tensor": 10}, "memory bandwidth"),
        ({"dram": 76, "issue": 75}, "issue slots"),  # further above its bound
        ({"tensor": 90, "shared": 60}, "tensor pipe"),
        ({"L2": 80, "dram": 70}, "L2 bandwidth"),
        ({"shared": 80}, "shared memory"),
        ({"dram": 74, "issue": 69, "tensor": 74, "occupancy": 100}, "latency: barrier"),
    ],
)
def test_verdicts(shares: dict[str, float], expected: str) -> None:
    row = dict.fromkeys(COLUMNS) | shares | {"stalls": {"barrier": 40.0, "wait": 20.0}}
    assert limiters.verdict(row) == expected


NCU = """#!{python}
import os, subprocess, sys, time
arguments = sys.argv[1:]
case, given = arguments[-1], dict(zip(arguments, arguments[1:]))
log, metrics = open(given["--log-file"], "w"), given["--metrics"].split(",")
with open("{folder}/calls", "a") as calls:
    print(case, len(metrics), os.environ["TMPDIR"], *arguments[:-1], sep="\\t", file=calls)
log.write("==PROF== Connected to process 1\\n")
print("the program's own words", flush=True)
if case == "hangs":
    child = subprocess.Popen(["sleep", "60"])
    open("{folder}/pid", "w").write(str(child.pid))
    time.sleep(60)
if case == "dies":
    log.write("==PROF== Disconnected\\n==WARNING== No kernels were profiled.\\n")
    sys.exit("CUDA error: an illegal instruction was encountered")
if case == "denied":
    log.write("==ERROR== ERR_NVGPUCTRPERM - no permission\\n")
    sys.exit(1)
if any(name.startswith("sm__inst_executed_pipe_xu") for name in metrics):
    log.write("==ERROR== Failed to find metric sm__inst_executed_pipe_xu.avg.pct\\n")
    sys.exit(1)
identity = ["ID", "Process ID", "Kernel Name"]
text = lambda cells: ",".join('"' + cell + '"' for cell in cells) + "\\n"
log.write(text([*identity, *metrics]) + text(["", "", "", *["%"] * len(metrics)]))
for i in range(2 if case == "twice" else 1):
    log.write(text([str(i), "1", f"kernel {{i}}", *[str(80 - 50 * i)] * len(metrics)]))
"""


@pytest.fixture
def ncu(tmp_path: Path) -> Path:
    program = tmp_path / "ncu"
    program.write_text(NCU.format(python=sys.executable, folder=tmp_path))
    program.chmod(0o755)
    return program


def test_every_case_has_a_process_of_its_own(tmp_path: Path, ncu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "limiters.json"
    names = ["fine", "dies", "denied", "twice"]
    assert limiters.profile_all(names, str(ncu), 60, out) == 2
    written = json.loads(out.read_text())
    fine, dies, denied, twice = written["rows"]
    assert fine["verdict"] == "issue slots" and fine["us"] == 80 and "note" not in fine
    assert set(fine["metrics"]) == set(METRICS) - set(written["left_out"])
    assert [name.partition(".")[0] for name in written["left_out"]] == ["sm__inst_executed_pipe_xu"]
    assert "illegal instruction" in dies["failed"] and "No kernels were profiled" in dies["failed"]
    assert "ERR_NVGPUCTRPERM" in denied["failed"]
    assert twice["kernel"] == "kernel 0" and "2 kernels" in twice["note"]
    calls = [line.split("\t") for line in (tmp_path / "calls").read_text().splitlines()]
    # what the profiler does not know is asked for once
    assert [call[0] for call in calls] == ["fine", *names]
    assert [int(call[1]) for call in calls] == [len(METRICS), *[len(METRICS) - 1] * 4]
    assert len({call[2] for call in calls}) == len(calls) and not any(Path(call[2]).exists() for call in calls)
    command = " ".join(calls[-1][3:])
    assert "--profile-from-start off" in command and "--clock-control none" in command
    assert "--target-processes application-only" in command and "--kernel-name" not in command
    assert command.endswith("-m benchmarks.limiters --run")
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(names) and table[2].startswith("dies    FAILED: exit 1: ")


def test_a_case_that_hangs_ends_with_its_processes(tmp_path: Path, ncu: Path) -> None:
    row = limiters.profile("hangs", str(ncu), list(METRICS), 1.0)
    assert row == {"case": "hangs", "failed": "not done within 1 s: the program's own words"}
    assert _ended(int((tmp_path / "pid").read_text()))


def _ended(pid: int) -> bool:
    """Whether a process has ended, or does so at once; nobody may have waited for it yet."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_cases_launch_the_kernels_that_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from torch.overrides import TorchFunctionMode

    from tilewright.compiler.kernel import Kernel

    class WithoutMemory(TorchFunctionMode):
        """Tensors of no device, of which only shapes, strides and dtypes exist."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if "device" in kwargs:
                kwargs["device"] = "meta"
            return args[0].to("meta") if function is torch.Tensor.cuda else function(*args, **kwargs)

    events: list[str] = []
    launch = lambda kernel, grid: lambda *arguments, **options: events.append(kernel.__name__)  # noqa: E731
    monkeypatch.setattr(Kernel, "__getitem__", launch)
    monkeypatch.setattr(tw, "supports", lambda array, feature: True)  # what Hopper launches
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: events.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: events.append("stop"))
    with WithoutMemory():
        for name, case in limiters.cases().items():
            events.clear()
            limiters.run(name)
            first, last = events.index("start"), events.index("stop")
            assert events[first + 1 : last] == [case.kernel], name
            assert events[:first].count(case.kernel) == 2, name  # it was warm
        monkeypatch.setattr(limiters, "cases", lambda: {"none": limiters.Case("other", case.prepare)})
        with pytest.raises(SystemExit, match="0 launches of other"):
            limiters.run("none")
    assert Kernel.__getitem__ is launch
