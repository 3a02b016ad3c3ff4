"""Emulated GPUs with options in their names, and several of them with one address space."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tilewright as tw
from tilewright.ir.abi import KernelABI, TensorParam
from tilewright.runtime.device import open_device
from tilewright.runtime.emulated import EmulatedDevice, EmulationOptions
from tilewright.runtime.emulated_group import EmulatedGroup
from tilewright.runtime.errors import DeviceError

U32 = np.uint32


def entry(body: str) -> str:
    """PTX of a kernel that takes two arrays: %mine and %theirs point to their first elements."""
    return f"""
.version 8.6
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 mine, .param .u64 theirs, .param .u32 g0, .param .u32 g1, .param .u32 g2)
{{
  .reg .b64 %mine, %theirs; .reg .b32 %v; .reg .pred %p;
  ld.param.u64 %mine, [mine];
  ld.param.u64 %theirs, [theirs];
  setp.ne.u32 %p, %v, %v;
{body}
  ret;
}}
""".replace("  setp.ne.u32 %p, %v, %v;\n", "")


ABI = KernelABI("k", tuple(TensorParam(name, "i32", (4,), (1,)) for name in ("mine", "theirs")), 1, 0)
#: raise the other's flag, wait for one's own, read what the other left
EXCHANGE = """
  st.global.u32 [%theirs+4], VALUE;
  fence.acq_rel.sys;
  st.relaxed.sys.global.u32 [%theirs], 1;
spin:
  ld.acquire.sys.global.u32 %v, [%mine];
  setp.eq.u32 %p, %v, 0;
  @%p bra spin;
  ld.global.u32 %v, [%mine+4];
  st.global.u32 [%mine+8], %v;
"""


def launch(device: EmulatedDevice, body: str, mine: np.ndarray, theirs: np.ndarray) -> None:
    device.launch(device.load(b"", {"ptx": entry(body)}).function("k"), ABI, 1, [mine, theirs])


def exchange(group: EmulatedGroup, ranks: int = 2, body: str = EXCHANGE) -> list[np.ndarray]:
    """Around a ring: rank r sends 10 + r to rank r + 1."""
    arrays = [np.zeros(4, np.int32) for _ in range(ranks)]
    with group.together():
        for rank in range(ranks):
            launch(group[rank], body.replace("VALUE", str(10 + rank)), arrays[rank], arrays[(rank + 1) % ranks])
    return arrays


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_kernels_of_all_ranks_run_together(ranks: int, seed: int | None) -> None:
    group = EmulatedGroup("sm_90a", ranks, EmulationOptions(seed, races=True))
    assert len(group) == ranks
    arrays = exchange(group, ranks)
    assert [int(a[2]) for a in arrays] == [10 + (rank - 1) % ranks for rank in range(ranks)]
    assert all(device.statistics.instructions > 5 for device in group.devices)


def test_races_and_deadlocks_name_the_ranks() -> None:
    group = EmulatedGroup("sm_90a", 2, EmulationOptions(races=True))
    with pytest.raises(DeviceError, match=r"race: (?s:.*)into allocation rank \d: (?s:.*)rank \d, block 0"):
        exchange(group, body=EXCHANGE.replace("sys", "gpu"))
    with pytest.raises(DeviceError, match=r"livelock(?s:.*)rank 0, kernel k:(?s:.*)rank 1, kernel k:"):
        exchange(group, body=EXCHANGE.replace("[%theirs], 1", "[%theirs+12], 1"))


def test_alone_a_rank_waits_in_vain() -> None:
    group = EmulatedGroup("sm_90a", 2)
    with pytest.raises(DeviceError, match="livelock"):
        launch(group[0], EXCHANGE.replace("VALUE", "1"), np.zeros(4, np.int32), np.zeros(4, np.int32))


def test_what_a_group_refuses() -> None:
    group = EmulatedGroup("sm_90a", 2)
    array = np.zeros(4, np.int32)

    def twice() -> None:
        with group.together():
            for _ in range(2):
                launch(group[1], "st.global.u32 [%mine], 7;", array, array)

    with pytest.raises(DeviceError, match="already has a kernel"):
        twice()
    assert array[0] == 0, "a block that raises runs nothing"
    with pytest.raises(DeviceError, match="collected already"), group.together(), group.together():
        pass
    with pytest.raises(DeviceError, match="group of 0"):
        EmulatedGroup("sm_90a", 0)
    with group.together():
        pass


@tw.kernel
def add(x: tw.Tensor, y: tw.Tensor, *, B: tw.constexpr = 64):
    i = tw.program_id(0)
    tw.store(y, (i,), tw.load(x, (i,), (B,)) + tw.load(y, (i,), (B,)))


@pytest.mark.parametrize("target", ["sm_90a", "gfx942"])
def test_tile_programs_on_a_group(target: str) -> None:
    group = tw.emulate(target, ranks=2, races=target == "sm_90a")
    x = np.arange(130, dtype=np.float32)
    ys = [np.full(130, rank, np.float32) for rank in range(2)]
    with group.together():
        for rank in range(2):
            group[rank].launch(add, (3,), x, ys[rank])
        assert (ys[0] == 0).all()
    for rank in range(2):
        np.testing.assert_array_equal(ys[rank], x + rank)


def test_two_ranks_that_write_the_same_array_race() -> None:
    group = tw.emulate("sm_90a", ranks=2, races=True)
    x, y = np.ones(64, np.float32), np.ones(64, np.float32)

    def both() -> None:
        with group.together():
            for rank in range(2):
                group[rank].launch(add, (1,), x, y)

    with pytest.raises(DeviceError, match=r"race: (?s:.*)test_emulated_group\.py:\d+"):
        both()


@pytest.mark.parametrize(
    ("text", "target", "options"),
    [
        ("sm_90a", "sm_90a", EmulationOptions()),
        ("gfx942,seed=7", "gfx942", EmulationOptions(7)),
        ("sm_90a,races,seed=0,progress=0", "sm_90a", EmulationOptions(0, True, False)),
    ],
)
def test_options_in_a_name(text: str, target: str, options: EmulationOptions) -> None:
    assert EmulationOptions.parse(text) == (target, options)
    assert EmulationOptions.parse(target + options.suffix()) == (target, options)
    device = open_device(f"emulate:{text}")
    assert isinstance(device, EmulatedDevice) and device.options == options and open_device(device.name) is device


@pytest.mark.parametrize("text", ["sm_90a,seed", "sm_90a,seed=x", "sm_90a,fast", "sm_90a,", "sm_90a#0.7", "sm_90a#x.0"])
def test_names_of_nothing(text: str) -> None:
    with pytest.raises(DeviceError, match="no option|no emulated GPU"):
        open_device(f"emulate:{text}")


def test_a_member_is_opened_by_its_name() -> None:
    group = EmulatedGroup("sm_90a", 2)
    assert open_device(group[1].name) is group[1]


def test_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("tilewright.compiler.api.device", seen.append)
    tw.emulate("sm_90a", seed=3, races=True, progress=False)
    assert seen == ["emulate:sm_90a,races,seed=3,progress=0"]
