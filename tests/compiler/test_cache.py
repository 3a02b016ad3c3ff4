"""The disk cache of compiled kernels: what is found, what is not, and what survives."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tilewright as tw
from tilewright.compiler import lookup, version
from tilewright.compiler.artifact import Artifact, Entry
from tilewright.compiler.cache import CorruptEntryError, DiskCache, disk_cache, pack, unpack
from tilewright.compiler.lookup import cache_key, types_text
from tilewright.compiler.options import CompileOptions
from tilewright.ir.abi import KernelABI, ScalarParam, TensorMapParam, TensorParam
from tilewright.ir.resources import Resources

SOURCE = """
import tilewright as tw

FACTOR = 2.0
TABLE = [1.0, 2.0]

@tw.function
def twice(x):
    return x * 2.0

@tw.kernel
def scale(x: tw.Tensor, y: tw.Tensor, *, BN: tw.constexpr = 128):
    i = tw.program_id(0)
    tw.store(y, (i,), twice(tw.load(x, (i,), (BN,)) * FACTOR * TABLE[1]))
"""
SPEC = {"x": tw.spec("f32", ("N",)), "y": tw.spec("f32", ("N",))}
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    # the sources may be edited while these tests run; what the check does is tested below
    monkeypatch.setattr(lookup, "edited_since_start", lambda: False)
    return tmp_path / "cache"


def load_module(path: Path, source: str) -> ModuleType:
    """A module of ``source``, fresh each time."""
    path.write_text(source)
    import linecache

    linecache.checkcache(str(path))
    spec = importlib.util.spec_from_file_location(f"cached_{next(_numbers)}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kernels(tmp_path: Path) -> Callable[..., Any]:
    """The kernel ``scale`` of a fresh import of SOURCE with replacements."""

    def load(**replacements: str) -> Any:
        source = SOURCE
        for old, new in replacements.items():
            source = source.replace(old, new)
        return load_module(tmp_path / "program.py", source).scale

    return load


def entry_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.kernel"))


def made_up(binary: bytes = b"\x7fELF" + bytes(100)) -> Artifact:
    params = (TensorParam("x", "f32", (None, 8), (None, 1), 16), ScalarParam("s", "i32"))
    abi = KernelABI("k", params, 128, 1024, (TensorMapParam("x", (64, 8), (1, 0), 128),), True, 2, (1, 2, 1))
    resources = Resources(32, 1024, barriers=1)
    return Artifact("k", "sm_90a", binary, (Entry(abi, resources),), {"ptx": ".version"}, {"k": {"input": "µ"}})


# --- hits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_90a", "gfx942"])
def test_a_hit_gives_the_same_artifact(kernels: Any, target: str) -> None:
    first = tw.compile(kernels(), target, SPEC)
    second = tw.compile(kernels(), target, SPEC)
    assert (first.cached, second.cached) == (False, True)
    assert (second.name, second.target, second.binary) == (first.name, target, first.binary)
    assert second.entries == first.entries and len(first.entries) == 2
    assert dict(second.asm) == dict(first.asm) and second.asm["llvm"]
    assert list(second.ir) == list(first.ir) and dict(second.ir) == dict(first.ir)


def test_launching_looks_kernels_up(kernels: Any, folder: Path) -> None:
    types = {name: spec.view_type() for name, spec in SPEC.items()}
    kernel = kernels()
    first = kernel.artifact({**types, "BN": 128}, "gfx942", CompileOptions())
    assert not first.cached and kernel.artifact({**types, "BN": 128}, "gfx942", CompileOptions()) is first
    assert kernels().artifact({**types, "BN": 128}, "gfx942", CompileOptions()).cached
    assert len(entry_files(folder)) == 1


def test_dumps_are_the_same_on_a_hit(kernels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dumps = []
    for name in ("miss", "hit"):
        monkeypatch.setenv("TILEWRIGHT_DUMP_DIR", str(tmp_path / name))
        artifact = tw.compile(kernels(), "sm_90a", SPEC)
        assert artifact.cached == (name == "hit")
        root = tmp_path / name
        dumps.append({str(f.relative_to(root)): f.read_text() for f in root.rglob("*") if f.is_file()})
    assert dumps[0] == dumps[1]
    key = f"sm_90a-{artifact.variant}"
    assert {f"scale-{key}/00-input.tw", f"scale-{key}/scale.ptx"} <= {*dumps[0]}
    assert f"scale_unaligned-{key}/02-canonicalize.tw" in dumps[0]


PROBE = """
import json, sys
import tilewright as tw
sys.path.insert(0, sys.argv[1])
from program import scale
types = {"x": tw.spec("f32", ("N",)), "y": tw.spec("f32", ("N",))}
artifact = tw.compile(scale, "sm_90a", types)
view = types["x"].view_type()
launched = scale.artifact({"x": view, "y": view, "BN": 128}, "gfx942", __import__(
    "tilewright.compiler.options", fromlist=["x"]).CompileOptions())
print(json.dumps({"cached": artifact.cached and launched.cached, "modules": sorted(sys.modules)}))
"""


def test_a_hit_imports_no_compiler(kernels: Any, tmp_path: Path) -> None:
    kernels()
    runs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROBE, str(tmp_path)], check=True, capture_output=True, text=True, cwd=Path.cwd()
        )
        runs.append(json.loads(done.stdout))
    assert [run["cached"] for run in runs] == [False, True]
    forbidden = ("tilewright.passes", "tilewright.backends", "mlir", "llvmlite", "lark", "tilewright.frontend.build")
    loaded = [[m for m in run["modules"] if m.startswith(forbidden)] for run in runs]
    assert loaded[0] and not loaded[1]
    drivers = {"tilewright.compiler.driver", "tilewright.compiler.worker", "tilewright.frontend.emitter"}
    assert not drivers & {*runs[1]["modules"]}


def test_the_command_line_says_when_it_hits(kernels: Any, tmp_path: Path) -> None:
    kernels()
    command = ["compile", f"{tmp_path}/program.py:scale", "--target", "gfx942", "--arg", "x=f32[N]"]
    command += ["--arg", "y=f32[N]", "-o", str(tmp_path / "out.hsaco"), "--json"]
    reports = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "tilewright.compiler.cli", *command], check=True, capture_output=True, text=True
        )
        reports.append(json.loads(done.stdout))
    assert [report["cached"] for report in reports] == [False, True]
    assert reports[0]["entries"] == reports[1]["entries"]


def test_always_compile(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tw.compile(kernels(), "gfx942", SPEC)
    monkeypatch.setenv("TILEWRIGHT_ALWAYS_COMPILE", "1")
    assert not tw.compile(kernels(), "gfx942", SPEC).cached


def test_size_zero_keeps_nothing(kernels: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE_SIZE", "0")
    assert disk_cache() is None
    tw.compile(kernels(), "gfx942", SPEC)
    assert not tw.compile(kernels(), "gfx942", SPEC).cached
    assert not folder.exists()


def test_a_directory_that_cannot_be_written_costs_a_warning(
    kernels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="not kept"):
        assert tw.compile(kernels(), "gfx942", SPEC).binary


# --- keys -----------------------------------------------------------------------------------------


def key_of(kernel: Any, target: str = "sm_90a", args: Any = SPEC, name: str | None = None, **options: Any) -> str:
    key = cache_key(kernel.definition, target, args, CompileOptions(**options), name)
    assert key is not None
    return key


@pytest.mark.parametrize(
    "replacement",
    [
        {"tw.program_id(0)": "tw.program_id(0) + 1"},
        {"return x * 2.0": "return x + x"},
        {"FACTOR = 2.0": "FACTOR = 3.0"},
        {"FACTOR = 2.0": "FACTOR = 2"},
        {"[1.0, 2.0]": "[1.0, 4.0]"},
        {"BN: tw.constexpr = 128": "BN: tw.constexpr = 64"},
    ],
    ids=["source", "helper", "constant", "constant type", "list", "default"],
)
def test_keys_change_with_the_program(kernels: Any, replacement: dict[str, str]) -> None:
    assert key_of(kernels()) == key_of(kernels())
    assert key_of(kernels()) != key_of(kernels(**replacement))


def test_keys_change_with_a_constant_set_at_run_time(kernels: Any) -> None:
    kernel = kernels()
    before = key_of(kernel)
    kernel.definition.globals["FACTOR"] = 5.0
    assert key_of(kernel) != before


def test_keys_change_with_everything_else(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernels()
    bf16 = {**SPEC, "x": tw.spec("bf16", ("N",))}
    keys = [
        key_of(kernel),
        key_of(kernel, "gfx942"),
        key_of(kernel, name="other"),
        key_of(kernel, num_warps=8),
        key_of(kernel, num_stages=8),
        key_of(kernel, num_ctas=2),
        key_of(kernel, maxnreg=64),
        key_of(kernel, args=bf16),
        key_of(kernel, args={**SPEC, "x": tw.spec("f32", (128,))}),
        key_of(kernel, args={**SPEC, "x": tw.spec("f32", ("N",), align=4)}),
        key_of(kernel, args={**SPEC, "x": tw.spec("f32", ("N",), strides=(2,))}),
        key_of(kernel, args={**SPEC, "BN": 64}),
        *(key_of(kernel, args={**SPEC, "BN": value}) for value in (1, 1.0, True, "1")),
    ]
    monkeypatch.setattr(lookup, "compiler_version", lambda: "another compiler")
    keys.append(key_of(kernel))
    assert len({*keys}) == len(keys)


def test_one_and_true_are_different_kernels() -> None:
    assert types_text({"x": 1}) != types_text({"x": True}) != types_text({"x": 1.0})


def test_constants_known_by_address_alone_are_not_cached(kernels: Any) -> None:
    assert cache_key(kernels().definition, "sm_90a", {**SPEC, "BN": object()}, CompileOptions()) is None


def test_the_version_follows_sources_and_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    for room in ("ir", "frontend", "passes", "backends/deep", "compiler"):
        (package / room).mkdir(parents=True)
    for name in ("driver", "worker"):
        (package / "compiler" / f"{name}.py").write_text("pass")
    source = package / "backends" / "deep" / "a.py"
    source.write_text("x = 1")
    digests = [version.source_digest(package)]
    source.write_text("x = 2")
    os.utime(source, ns=(1, 1))
    digests.append(version.source_digest(package))
    assert version.source_digest(package) == digests[1]
    os.utime(source, ns=(2, 2))  # touched: hashed again, and equal
    assert version.source_digest(package) == digests[1] != digests[0]
    tools = version.tool_versions()
    assert tools[0].startswith("llvmlite-") and len(tools) == 5
    fake = tmp_path / "ptxas"
    fake.write_text("")
    monkeypatch.setenv("TILEWRIGHT_PTXAS", str(fake))
    named = version.compiler_version()
    monkeypatch.delenv("TILEWRIGHT_PTXAS")
    assert named != version.compiler_version()


def test_an_edited_compiler_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    newest = max(modified for _, _, modified in version.source_files(version._PACKAGE))
    monkeypatch.setattr(version, "_LOADED", newest)
    assert not version.edited_since_start()
    monkeypatch.setattr(version, "_LOADED", newest - 1)
    assert version.edited_since_start()


# --- damage ---------------------------------------------------------------------------------------


def test_entries_read_back() -> None:
    artifact = made_up()
    read = unpack(pack(artifact))
    assert (read.name, read.target, read.binary, read.entries) == ("k", "sm_90a", artifact.binary, artifact.entries)
    assert dict(read.asm) == artifact.asm and dict(read.ir) == {"input": "µ"} and read.cached


def test_every_damage_is_noticed() -> None:
    data = pack(made_up())
    for length in range(len(data)):
        with pytest.raises(CorruptEntryError):
            unpack(data[:length])
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 4
        with pytest.raises(CorruptEntryError):
            unpack(bytes(changed))
    with pytest.raises(CorruptEntryError):
        unpack(data + b"\0")


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: b"", lambda d: d[:200] + b"\xff" + d[201:]])
def test_a_damaged_entry_is_removed_and_rebuilt(kernels: Any, folder: Path, damage: Any) -> None:
    first = tw.compile(kernels(), "gfx942", SPEC)
    (path,) = entry_files(folder)
    path.write_bytes(damage(path.read_bytes()))
    cache = disk_cache()
    assert cache is not None and cache.load(path.stem) is None and not path.exists()
    again = tw.compile(kernels(), "gfx942", SPEC)
    assert not again.cached and again.binary == first.binary
    assert tw.compile(kernels(), "gfx942", SPEC).cached


# --- other processes ------------------------------------------------------------------------------

WRITER = """
import os, sys
from pathlib import Path
from tilewright.compiler.cache import DiskCache, unpack
folder, source, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
artifact = unpack(source.read_bytes())
cache = DiskCache(folder, int(sys.argv[4]))
print("ready", flush=True)
n = 0
while n != count:
    key = f"{n % 7:064x}"
    found = cache.load(key)
    assert found is None or found.binary == artifact.binary
    cache.store(key, artifact)
    n += 1
"""


def start_writer(tmp_path: Path, folder: Path, count: int, limit: int = 2**30) -> subprocess.Popen[str]:
    source = tmp_path / "artifact"
    if not source.exists():
        source.write_bytes(pack(made_up(os.urandom(300_000))))
    command = [sys.executable, "-c", WRITER, str(folder), str(source), str(count), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_the_directory(tmp_path: Path, folder: Path) -> None:
    writers = [start_writer(tmp_path, folder, 60, limit=1_200_000) for _ in range(4)]
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0 and not errors
    assert all(unpack(path.read_bytes()) for path in entry_files(folder))
    assert not list(folder.rglob(".writing-*"))


def test_killed_writers_leave_nothing_half(tmp_path: Path, folder: Path) -> None:
    for round_ in range(6):
        writer = start_writer(tmp_path, folder, -1)
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(0.011 * (round_ + 1))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    files = entry_files(folder)
    assert files and all(unpack(path.read_bytes()) for path in files)
    left = folder / "kernels" / "00" / ".writing-left"
    left.write_bytes(b"half")
    fresh = folder / "kernels" / "00" / ".writing-fresh"
    fresh.write_bytes(b"half")
    os.utime(left, (0, 0))
    DiskCache(folder, 2**30).store("00" * 32, made_up())
    assert fresh.exists() and not left.exists()


# --- eviction -------------------------------------------------------------------------------------


def test_the_least_recently_used_entries_go(folder: Path) -> None:
    size = len(pack(made_up()))
    cache = DiskCache(folder, 10 * size)
    keys = [f"{n:02x}" * 32 for n in range(11)]
    for age, key in enumerate(keys[:10]):
        cache.store(key, made_up())
        os.utime(cache.path(key), (1000 + age, 1000 + age))
    assert cache.load(keys[0]) is not None  # used: now the youngest
    cache.store(keys[10], made_up())
    left = [key for key in keys if cache.path(key).exists()]
    assert left == [keys[0], *keys[3:]]


def test_an_entry_larger_than_the_cache_is_not_kept(folder: Path) -> None:
    cache = DiskCache(folder, 100)
    cache.store("ab" * 32, made_up())
    assert not entry_files(folder)


def test_sizes_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilewright.compiler.environment import CACHE_SIZE

    for text, size in {"0": 0, "512": 512, "3k": 3072, "500M": 500 * 2**20, "2GiB": 2**31, "1tb": 2**40}.items():
        monkeypatch.setenv("TILEWRIGHT_CACHE_SIZE", text)
        assert CACHE_SIZE.get() == size
    for text in ("two", "-1", "1.5G", "G"):
        monkeypatch.setenv("TILEWRIGHT_CACHE_SIZE", text)
        with pytest.raises(ValueError, match="TILEWRIGHT_CACHE_SIZE"):
            CACHE_SIZE.get()
