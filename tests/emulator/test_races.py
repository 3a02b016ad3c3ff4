"""The vector-clock race detector by itself: what orders two accesses, and what does not."""

from __future__ import annotations

import numpy as np
import pytest

from tilewright.runtime.emulator.races import BLOCK, DEVICE, SYSTEM, WEAK, Conflict, Races, Shadow, Team, Token

KEY = (0, 0)


class Bench:
    """Two blocks of two warps, the second on another GPU if ``ranks`` is 2, and 256 bytes of memory."""

    def __init__(self, lanes: int = 32, lane_agents: bool = True, proxies: int = 2, ranks: int = 1) -> None:
        self.races = Races(lanes, lane_agents, proxies)
        self.team: Team = self.races.team(2, 2, lambda warp: f"warp {warp}")
        self.far: Team = self.races.team(1, 1, lambda warp: "far warp", rank=ranks - 1)
        self.shadow = Shadow(256, 4, lambda offset: f"byte {offset}")
        self.sites = [self.races.site(name, name, line, "") for line, name in enumerate(("first", "second"))]

    def touch(
        self,
        writes: bool,
        warp: int,
        lane: int,
        offset: int,
        size: int = 4,
        strength: int = WEAK,
        team: Team | None = None,
    ) -> Conflict | None:
        at = [np.array([n]) for n in (warp, lane, offset)]
        access = (team or self.team).write if writes else (team or self.team).read
        return access(self.shadow, *at, size, self.sites[int(not writes)], strength=strength)

    def write(self, *where: int, **how: object) -> Conflict | None:
        return self.touch(True, *where, **how)  # type: ignore[arg-type]

    def read(self, *where: int, **how: object) -> Conflict | None:
        return self.touch(False, *where, **how)  # type: ignore[arg-type]


def test_a_thread_is_ordered_with_itself_alone() -> None:
    bench = Bench()
    assert bench.write(0, 3, 16) is None
    assert bench.read(0, 3, 16) is None
    assert bench.read(0, 4, 20) is None
    conflict = bench.read(0, 4, 18, 2)
    assert conflict is not None and conflict.offset == 18
    assert "reads byte 18, which warp 0, lane 3 wrote and nothing orders the two" in conflict.message
    assert "line 0: first" in conflict.message


def test_lanes_of_a_wave_are_one_agent_where_told_so() -> None:
    bench = Bench(lanes=64, lane_agents=False)
    assert bench.write(0, 3, 16) is None
    assert bench.read(0, 60, 16) is None
    assert bench.read(1, 3, 16) is not None


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True), (False, False)])
def test_what_conflicts(first: bool, second: bool) -> None:
    bench = Bench()
    assert bench.touch(first, 0, 0, 8) is None
    assert (bench.touch(second, 1, 0, 8) is None) == (not first and not second)


@pytest.mark.parametrize("strength", [WEAK, DEVICE])
def test_warps_in_step_that_write_the_same_bytes(strength: int) -> None:
    bench = Bench()
    warps, zeros = np.array([0, 0, 1]), np.zeros(3, int)
    lanes = np.array([0, 1, 0])
    alone = bench.team.write(bench.shadow, warps[:2], lanes[:2], zeros[:2], 4, bench.sites[0], strength)
    assert alone is None, "lanes of one instruction"
    both = bench.team.write(bench.shadow, warps, lanes, zeros + 64, 4, bench.sites[0], strength)
    assert (both is not None) == (strength == WEAK)


def test_writes_of_what_is_there_do_not_race_with_each_other() -> None:
    bench = Bench()
    where = np.array([0, 1]), np.array([0, 0]), np.array([0, 0])
    found, kept = np.array([False, False]), np.array([True, True])
    assert bench.team.write(bench.shadow, *where, 4, bench.sites[0], same=(found, kept)) is None
    conflict = bench.team.write(bench.shadow, *where, 4, bench.sites[0], same=(found, kept))
    assert conflict is not None, "another value than that which is there"
    assert bench.team.write(bench.shadow, *where, 4, bench.sites[0], same=(kept, kept)) is None
    assert bench.read(0, 0, 0) is not None, "but reads race with them"


def test_a_release_and_an_acquire_order_what_came_before() -> None:
    bench = Bench()
    bench.write(0, 0, 0)
    token = bench.team.release(0, 0)
    bench.write(0, 0, 4)
    bench.team.acquire(1, token, 5)
    assert bench.read(1, 5, 0) is None
    assert bench.read(1, 5, 4) is not None, "written after the release"
    assert bench.read(1, 6, 0) is not None, "another lane has not acquired"


def test_an_elected_lane_releases_its_own_accesses_only() -> None:
    """The classic: all lanes read, one arrives at the barrier with no __syncwarp before."""
    for meets in (False, True):
        bench = Bench()
        lanes = np.arange(32)
        bench.team.read(bench.shadow, np.zeros(32, int), lanes, lanes * 4, 4, bench.sites[0])
        if meets:
            bench.team.synchronize(0)
        bench.team.acquire(1, bench.team.release(0, 0))
        assert bench.write(1, 0, 0) is None
        assert (bench.write(1, 0, 4) is None) == meets


def test_all_readers_count_and_a_write_forgets_them() -> None:
    bench = Bench()
    bench.read(0, 0, 0), bench.read(1, 0, 0)
    bench.team.acquire(0, bench.team.release(1))
    assert bench.write(0, 0, 0) is None
    bench = Bench()
    bench.read(0, 0, 0), bench.read(1, 0, 0)
    conflict = bench.write(1, 0, 0)
    assert conflict is not None and "which warp 0, lane 0 read" in conflict.message


def test_barriers_are_transitive_across_blocks() -> None:
    bench = Bench()
    bench.write(0, 0, 0)
    bench.team.acquire(2, bench.team.release(0, 0), 1)
    assert bench.read(2, 1, 0) is None
    assert bench.read(2, 2, 0) is not None
    token = Token()
    token.join(bench.team.release(2))
    bench.far.acquire(0, token)
    assert bench.read(0, 9, 0, team=bench.far) is None


@pytest.mark.parametrize(
    ("scope", "ranks", "racing"),
    [(BLOCK, 1, True), (DEVICE, 1, False), (DEVICE, 2, True), (SYSTEM, 2, False)],
)
def test_strong_accesses_and_their_scope(scope: int, ranks: int, racing: bool) -> None:
    bench = Bench(ranks=ranks)
    bench.write(0, 0, 0, strength=scope)
    assert (bench.write(0, 0, 0, strength=scope, team=bench.far) is not None) == racing
    assert bench.read(0, 1, 0) is not None, "a plain access races with a strong one"


@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize("acquire", [True, False])
@pytest.mark.parametrize("scope", [BLOCK, DEVICE])
def test_a_flag_with_fences_or_semantics(release: bool, acquire: bool, scope: int) -> None:
    bench = Bench()
    team, far = bench.team, bench.far
    bench.write(0, 0, 128)
    if not release:
        team.fence(0, None, scope)
    bench.write(0, 0, 200)
    team.publish(KEY, 0, 0, DEVICE, release=release, rmw=False)
    far.observe(KEY, 0, 7, scope, acquire=acquire)
    if not acquire:
        assert bench.read(0, 7, 128, team=far) is not None, "no fence yet"
        far.fence(0, None, scope)
    assert (bench.read(0, 7, 128, team=far) is None) == (scope == DEVICE)
    assert (bench.read(0, 7, 200, team=far) is None) == (scope == DEVICE and release), "behind the fence"


def test_an_addition_continues_a_release_and_a_store_ends_it() -> None:
    for rmw in (True, False):
        bench = Bench()
        bench.write(0, 0, 128)
        bench.team.publish(KEY, 0, 0, DEVICE, release=True, rmw=False)
        bench.team.publish(KEY, 1, 0, DEVICE, release=False, rmw=rmw)
        bench.far.observe(KEY, 0, 0, DEVICE, acquire=True)
        assert (bench.read(0, 0, 128, team=bench.far) is None) == rmw


def test_the_asynchronous_proxy_needs_its_fence() -> None:
    bench = Bench()
    bench.write(0, 0, 0)
    bench.team.acquire(1, bench.team.release(0), 0)

    def look() -> Conflict | None:
        return bench.team.issue(bench.shadow, [1], 0, np.array([0]), 16, bench.sites[1], writes=False, proxy=1)[1]

    conflict = look()
    assert conflict is not None and "no fence.proxy.async lies between" in conflict.message
    bench.team.proxy_fence(1, [1], 0)
    assert look() is None
    # the fence of the writer, before it releases, does as well
    bench = Bench()
    bench.write(0, 0, 0)
    bench.team.proxy_fence(0, [1], 0)
    bench.write(0, 0, 4)
    bench.team.acquire(1, bench.team.release(0), 0)
    assert bench.team.issue(bench.shadow, [1], 0, np.array([0]), 4, bench.sites[1], writes=False, proxy=1)[1] is None
    assert (
        bench.team.issue(bench.shadow, [1], 0, np.array([4]), 4, bench.sites[1], writes=False, proxy=1)[1] is not None
    )


def test_work_in_flight_races_with_its_own_issuer_until_it_is_settled() -> None:
    bench = Bench()
    record, conflict = bench.team.issue(bench.shadow, [0], 0, np.arange(4) * 16, 16, bench.sites[0], writes=True)
    assert conflict is None
    late = bench.read(0, 0, 20)
    assert late is not None and "warp 0, lane 0 writes asynchronously, and nothing has waited" in late.message
    bench.team.settle([record])
    assert bench.read(0, 0, 20) is None
    assert bench.read(1, 0, 20) is not None
    bench.team.acquire(1, bench.team.release(0, 0), 0)
    assert bench.read(1, 0, 20) is None


def test_work_of_a_column_is_known_with_the_column() -> None:
    """What a byte-counting barrier does: the copy belongs to the barrier, whose waiters know it."""
    bench = Bench()
    columns = [bench.team.column(0) for _ in range(20)]
    for time, column in enumerate(columns, 1):
        record, _ = bench.team.issue(bench.shadow, [0], 0, np.array([64]), 4, bench.sites[0], writes=True, proxy=1)
        bench.team.settle([record], column=column, time=time)
        assert bench.read(1, 0, 64) is not None
        bench.team.learn(1, column, time)
        assert bench.read(1, 31, 64) is None
        bench.team.learn(0, column, time)
        bench.team.acquire(0, bench.team.release(1))


def test_work_of_several_warps_must_be_known_to_each() -> None:
    bench = Bench()
    bench.write(0, 5, 0)

    def look() -> Conflict | None:
        return bench.team.issue(bench.shadow, [0, 1], -1, np.array([0]), 4, bench.sites[1], writes=False)[1]

    assert look() is not None
    bench.team.acquire(1, bench.team.release(0, 5), 2)
    assert look() is None


def test_every_byte_counts_at_any_alignment() -> None:
    bench = Bench()
    rng = np.random.default_rng(0)
    owner = np.full(256, -1)
    for _ in range(300):
        warp, size = int(rng.integers(4)), int(rng.integers(1, 20))
        offset = int(rng.integers(256 - size))
        conflict = bench.touch(True, warp, 0, offset, size)
        part = owner[offset : offset + size]
        assert (conflict is not None) == bool(((part >= 0) & (part != warp)).any()), (offset, size)
        part[:] = warp
