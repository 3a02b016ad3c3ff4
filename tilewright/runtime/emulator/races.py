"""A race detector with vector clocks, for emulated kernels of any vendor.

Two accesses to a byte race when at least one writes, they are not both strong (atomic) within a scope
that holds both, and neither happens before the other. Happens-before is kept as vector clocks
(Mattern 1989; the last write of a byte as one epoch: Flanagan and Freund, "FastTrack", 2009; the
reads of a byte in a few slots: Serebryany and Iskhodzhanov, "ThreadSanitizer", 2009). A schedule
that happens to come out right does not hide a race; the few slots may, but none is ever invented.

How a machine uses it
- One `Races` for all that runs together. ``lane_agents``: lanes of a warp are ordered only by what
  synchronises them (NVIDIA); without it a wave is one agent (AMD). ``proxies``: how many views of
  memory there are: 1, and one more for each kind of memory that an asynchronous proxy sees.
- `Races.team` for the blocks that are resident together, a `Shadow` for each memory.
- Every plain access calls `Team.read` or `Team.write` with flat arrays over its active lanes (warp,
  lane, byte offset, and the size of each access), strong ones with their scope as ``strength``.
  The answer is None or a `Conflict`, whose ``message`` the machine raises as a fault.
- Ordering: `Team.release` gives what a thread (or warp) knows as a `Token` and ends its epoch;
  `Team.acquire` takes one over. A barrier joins the tokens of those that arrive and gives the sum
  to those that leave. Atomics: `Team.publish` after a strong write, `Team.observe` after a strong
  read, `Team.fence` for fences. Nothing survives a kernel: make a new `Races` for each.
- Asynchronous work: `Team.issue` (one lane's) and `Team.start` (of many lanes) check and mark it when
  it starts: from then on it races with everybody. `Team.settle` at the wait of the thread that issued it makes it that
  thread's access of now; with ``column`` it belongs to that clock column instead, at ``time``:
  whoever knows the column up to then is behind it (a barrier that counts bytes, a group of
  products that several warps wait for; see `Team.column` and `Team.learn`).
- ``proxy``: an access through the asynchronous proxy number n (from 1) sees a plain write only if
  a `Team.proxy_fence` lies on the way. Accesses of that proxy need no such fence among themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.runtime.emulator.memory import BASE, GlobalMemory
from tilewright.runtime.emulator.shadow import AccessTable, Conflict, Shadow, Site, cells, coarse, set_cells

Array = NDArray[Any]

#: strength of an access: the scope within which it is atomic
WEAK, BLOCK, CLUSTER, DEVICE, SYSTEM = 0, 1, 2, 3, 4
#: the time of work in flight, which nobody knows; and what a thread knows of itself
_PENDING, _OWN = 2**31 - 1, 2**31 - 2
_I32 = np.int32
#: readers of a byte of global memory that are remembered
GLOBAL_SLOTS = 4


@dataclass
class Token:
    """What somebody knows: for each block (by its number in `Races`) the times of its columns [proxies, columns]."""

    known: dict[int, Array] = field(default_factory=dict)

    def join(self, other: Token | None) -> None:
        """Know what ``other`` knows too."""
        for home, rows in other.known.items() if other is not None else ():
            mine = self.known.get(home)
            self.known[home] = rows if mine is None else _maximum(mine, rows)


def _maximum(a: Array, b: Array) -> Array:
    """Elementwise, of rows that may differ in their number of columns."""
    if a.shape[-1] < b.shape[-1]:
        a, b = b, a
    result = a.copy()
    part = result[..., : b.shape[-1]]
    np.maximum(part, b, out=part)
    return result


class Races:
    """What the detector knows of everything that runs together."""

    def __init__(self, lanes: int = 32, lane_agents: bool = True, proxies: int = 1) -> None:
        self.lane_bits = max(1, (lanes - 1).bit_length())
        self.per_warp = lanes if lane_agents else 1
        self.lanes, self.lane_agents, self.proxies = lanes, lane_agents, proxies
        self.records = AccessTable()
        self.sites: list[Site] = []
        self._site_numbers: dict[int, int] = {}
        #: by block number: GPU, cluster, the team
        self.rank_of: list[int] = []
        self.cluster_of: list[int] = []
        self.team_of: list[Team] = []
        self._memories: dict[int, tuple[GlobalMemory, Shadow]] = {}
        #: what the last strong write of a location released: token, scope, block
        self.locations: dict[tuple[int, int], tuple[Token, int, int]] = {}

    def site(self, owner: object, text: str, line: int, source: str) -> int:
        """The number of an instruction; ``owner`` is its decoded form, which must stay alive."""
        number = self._site_numbers.get(id(owner))
        if number is None:
            number = self._site_numbers[id(owner)] = len(self.sites)
            self.sites.append(Site(text, line, source))
        return number

    def of_memory(self, memory: GlobalMemory) -> Shadow:
        """The shadow of global memory, by offset; it grows with the memory."""
        if id(memory) not in self._memories:
            shadow = Shadow(memory.data.size, GLOBAL_SLOTS, lambda offset: memory.describe(BASE + offset))
            self._memories[id(memory)] = memory, shadow
        shadow = self._memories[id(memory)][1]
        shadow.grow(memory.data.size)
        return shadow

    def team(
        self, blocks: int, warps: int, name: Callable[[int], str], rank: int = 0, clusters: Sequence[int] | None = None
    ) -> Team:
        """``blocks`` new blocks of ``warps`` warps on GPU ``rank``; ``name(warp)`` names a warp of the team.

        ``clusters``: the cluster of each block, by any number (default: each is its own).
        """
        first = len(self.rank_of)
        self.rank_of += [rank] * blocks
        self.cluster_of += [first + c for c in (range(blocks) if clusters is None else clusters)]
        team = Team(self, first, blocks, warps, name)
        self.team_of += [team] * blocks
        return team

    def within(self, scope: int, home: int, other: int) -> bool:
        """Whether two blocks lie in one scope."""
        if home == other:
            return scope >= BLOCK
        if self.cluster_of[home] == self.cluster_of[other] and self.rank_of[home] == self.rank_of[other]:
            return scope >= CLUSTER
        return scope >= (DEVICE if self.rank_of[home] == self.rank_of[other] else SYSTEM)


class Team:
    """The clocks of some resident blocks. Warps are numbered through the team, blocks by `Races`.

    ``know`` [block, agent, proxy, column]: up to which time an agent knows each column of its block;
    columns are the agents, then those of `column`. ``now`` is the epoch of each warp.
    """

    def __init__(self, races: Races, first: int, blocks: int, warps: int, name: Callable[[int], str]) -> None:
        self.races, self.first, self.blocks, self.warps, self.name = races, first, blocks, warps, name
        self.agents = warps * races.per_warp
        self.know = np.zeros((blocks, self.agents, races.proxies, self.agents + 8), _I32)
        each = np.arange(self.agents)
        self.know[:, each, 0, each] = _OWN
        self.now = np.ones(blocks * warps, _I32)
        self._columns = [self.agents] * blocks
        #: what agents (block, agent) know of other blocks
        self._remote: dict[tuple[int, int], Token] = {}
        #: what relaxed reads have seen and no fence has acquired yet, by the block that wrote it
        self._seen: dict[tuple[int, int], dict[int, Token]] = {}
        self._fenced: dict[tuple[int, int], tuple[Token, int]] = {}

    # ---- ordering --------------------------------------------------------------------------------

    def column(self, block: int) -> int:
        """A new column of a block's clocks, for work that is nobody's own. Its times start at 1."""
        column = self._columns[block]
        self._columns[block] += 1
        if column >= self.know.shape[3]:
            self.know = np.concatenate([self.know, np.zeros((*self.know.shape[:3], 16), _I32)], axis=3)
        return column

    def column_token(self, block: int, column: int, time: int) -> Token:
        """What somebody knows who knows a column of a block up to ``time``."""
        rows = np.zeros((self.races.proxies, column + 1), _I32)
        rows[0, column] = time
        return Token({self.first + block: rows})

    def learn(self, warp: int, column: int, time: int) -> None:
        """All lanes of a warp know a column of their block up to ``time``."""
        block, agents = self._agents(warp, None)
        part = self.know[block, agents[0] : agents[-1] + 1, 0, column]
        np.maximum(part, time, out=part)

    def _agents(self, warp: int, lanes: Array | int | None) -> tuple[int, Array]:
        """The block of a warp and the agents that some of its lanes are (a bool mask, one lane, or all)."""
        block, row = divmod(warp, self.warps)
        per = self.races.per_warp
        if lanes is None or not self.races.lane_agents:
            return block, np.arange(row * per, row * per + per)
        if isinstance(lanes, (int, np.integer)):
            return block, np.array([row * per + int(lanes)])
        return block, row * per + np.nonzero(lanes)[0]

    def release(self, warp: int, lanes: Array | int | None = None) -> Token:
        """What these lanes (bool [lanes], one, or all) know together, their own accesses included."""
        block, agents = self._agents(warp, lanes)
        rows: Array = self.know[block, agents].max(axis=0)
        rows[0, agents] = self.now[warp]
        self.now[warp] += 1
        return self._with_remote(block, agents, rows)

    def _with_remote(self, block: int, agents: Array, rows: Array) -> Token:
        token = Token({self.first + block: rows})
        if self._remote:
            for agent in agents.tolist():
                token.join(self._remote.get((block, agent)))
        return token

    def acquire(self, warp: int, token: Token | None, lanes: Array | int | None = None) -> None:
        """These lanes know what the token says from here on."""
        if token is None:
            return
        block, agents = self._agents(warp, lanes)
        home = self.first + block
        elsewhere = {}
        for number, rows in token.known.items():
            if number == home:
                width = rows.shape[-1]
                low, high = int(agents[0]), int(agents[-1]) + 1
                if high - low == len(agents):
                    part = self.know[block, low:high, :, :width]
                    np.maximum(part, rows, out=part)
                else:
                    self.know[block, agents, :, :width] = np.maximum(self.know[block, agents, :, :width], rows)
            else:
                elsewhere[number] = rows
        if elsewhere:
            for agent in agents.tolist():
                merged = Token(dict(elsewhere))
                merged.join(self._remote.get((block, agent)))
                self._remote[block, agent] = merged

    def synchronize(self, warp: int, lanes: Array | None = None) -> None:
        """Lanes of one warp have met."""
        self.acquire(warp, self.release(warp, lanes), lanes)

    def proxy_fence(self, warp: int, proxies: Sequence[int], lanes: Array | int | None = None) -> None:
        """What these lanes know, the asynchronous ``proxies`` see in work of these lanes and of who follows them."""
        block, agents = self._agents(warp, lanes)
        plain = self.know[block, agents, 0]
        plain[np.arange(len(agents)), agents] = self.now[warp]
        for proxy in proxies:
            self.know[block, agents, proxy] = np.maximum(self.know[block, agents, proxy], plain)
        for agent in agents.tolist() if self._remote else ():
            known = self._remote.get((block, agent))
            if known is not None:
                copies = {home: rows.copy() for home, rows in known.known.items()}
                for rows in copies.values():
                    for proxy in proxies:
                        np.maximum(rows[proxy], rows[0], out=rows[proxy])
                self._remote[block, agent] = Token(copies)
        self.now[warp] += 1

    def fence(self, warp: int, lanes: Array | int | None, scope: int) -> None:
        """A fence of acquire and release semantics: strong reads before it acquire, strong writes behind it release."""
        block, agents = self._agents(warp, lanes)
        for agent in agents.tolist():
            seen = self._seen.get((block, agent), {})
            for home in [h for h in seen if self.races.within(scope, self.first + block, h)]:
                self.acquire(warp, seen.pop(home), agent % self.races.per_warp)
        rows = self.know[block, agents]
        rows[np.arange(len(agents)), 0, agents] = self.now[warp]
        for row, agent in enumerate(agents.tolist()):
            self._fenced[block, agent] = self._with_remote(block, agents[row : row + 1], rows[row]), scope
        self.now[warp] += 1

    def publish(self, key: tuple[int, int], warp: int, lane: int, scope: int, *, release: bool, rmw: bool) -> None:
        """A strong write to the location ``key`` (memory, offset); a read-modify-write continues what it found."""
        block, agents = self._agents(warp, lane)
        before = self.races.locations.pop(key, None)
        token: Token | None
        if release:
            token = self.release(warp, lane)
        else:
            token, fence_scope = self._fenced.get((block, int(agents[0])), (None, scope))
            scope = min(scope, fence_scope)
        if rmw and before is not None:
            joined = Token(dict(before[0].known))
            joined.join(token)
            token, scope = joined, before[1] if scope < before[1] else scope
        if token is not None:
            self.races.locations[key] = token, scope, self.first + block

    def observe(self, key: tuple[int, int], warp: int, lane: int, scope: int, *, acquire: bool) -> None:
        """A strong read of the location ``key``: acquires at once, or at the next fence."""
        found = self.races.locations.get(key)
        if found is None:
            return
        token, written, home = found
        block, agents = self._agents(warp, lane)
        if not self.races.within(min(scope, written), self.first + block, home):
            return
        if acquire:
            self.acquire(warp, token, lane)
        else:
            self._seen.setdefault((block, int(agents[0])), {}).setdefault(home, Token()).join(token)

    # ---- accesses --------------------------------------------------------------------------------

    def read(
        self, shadow: Shadow, warps: Array, lanes: Array, offsets: Array, size: int, site: int, strength: int = WEAK
    ) -> Conflict | None:
        """Lanes read ``size`` bytes at each offset: flat arrays over the accesses, warps ascending."""
        return self._touch(shadow, warps, lanes, offsets, size, site, strength, False)[1]

    def write(
        self,
        shadow: Shadow,
        warps: Array,
        lanes: Array,
        offsets: Array,
        size: int,
        site: int,
        strength: int = WEAK,
        same: tuple[Array, Array] | None = None,
    ) -> Conflict | None:
        """Like `read`. Lanes that write the same bytes in one instruction do not race.

        ``same`` (bool over the accesses): which found there what they write, and which found it there
        afterwards. Writes of equal values do not race with each other.
        """
        return self._touch(shadow, warps, lanes, offsets, size, site, strength, True, same=same)[1]

    def start(
        self, shadow: Shadow, warps: Array, lanes: Array, offsets: Array, size: int, site: int, *, writes: bool
    ) -> tuple[list[int], Conflict | None]:
        """Like `read` and `write`, of copies in flight that lanes start: a record for each warp, for `settle`."""
        return self._touch(shadow, warps, lanes, offsets, size, site, WEAK, writes, in_flight=True)

    def _touch(
        self,
        shadow: Shadow,
        warps: Array,
        lanes: Array,
        offsets: Array,
        size: int,
        site: int,
        strength: int,
        writes: bool,
        in_flight: bool = False,
        same: tuple[Array, Array] | None = None,
    ) -> tuple[list[int], Conflict | None]:
        if not len(offsets):
            return [], None
        races, per = self.races, self.races.per_warp
        fresh = np.ones(len(warps), np.bool_)
        fresh[1:] = warps[1:] != warps[:-1]
        who = warps[fresh]
        row = who % self.warps
        first = races.records.add(
            len(who), 1 << 31 - races.lane_bits, column=row * per, spread=int(races.lane_agents), warp=who, lane=-1,
            time=_PENDING if in_flight else self.now[who], home=self.first + who // self.warps, site=site,
            strength=strength, proxy=0,
        )  # fmt: skip
        codes = (first - 1 + np.cumsum(fresh)) << races.lane_bits | lanes
        agents = (warps % self.warps) * per + (lanes if races.lane_agents else 0)
        view = _View(self, warps // self.warps, agents)
        slots = (self.first * self.warps + warps) % len(shadow.reads)
        conflict = _apply(shadow, view, offsets, size, codes.astype(_I32), slots, writes, 0, strength, same)
        return list(range(first, first + len(who))), conflict

    def issue(
        self,
        shadow: Shadow,
        warps: Sequence[int],
        lane: int,
        offsets: Array,
        size: int,
        site: int,
        *,
        writes: bool,
        proxy: int = 0,
        strength: int = WEAK,
    ) -> tuple[int, Conflict | None]:
        """Asynchronous work that a lane of one warp (several warps together: -1) starts: its record, in flight."""
        races, leader = self.races, int(warps[0])
        block, row = divmod(leader, self.warps)
        record = races.records.add(
            1, 1 << 31 - races.lane_bits, column=row * races.per_warp, spread=int(races.lane_agents), time=_PENDING,
            home=self.first + block, warp=leader, lane=lane, site=site, strength=strength, proxy=proxy,
        )  # fmt: skip
        code = record << races.lane_bits | max(lane, 0)
        if lane >= 0:
            view = _View(self, np.array([block]), self._agents(leader, lane)[1][:1])
        else:
            per = races.per_warp
            known = [self.know[block, w % self.warps * per : w % self.warps * per + per].max(axis=0) for w in warps]
            view = _View(self, np.array([block]), np.array([row * per]), np.minimum.reduce(known))
        slot = (self.first * self.warps + leader + self.warps) % len(shadow.reads)
        return record, _apply(shadow, view, offsets, size, code, slot, writes, proxy, strength)

    def settle(
        self, records: Sequence[int], *, column: int | None = None, time: int = 0, block: int | None = None
    ) -> None:
        """Work in flight has ended: it is an access of its issuer now, or of a column of a block at ``time``.

        ``block``: whose column that is, where it need not be the issuer's block (in the team).
        """
        table = self.races.records
        for record in records:
            if column is None:
                table.time[record] = self.now[table.warp[record]]
            else:
                table.column[record], table.spread[record], table.time[record] = column, 0, time
                if block is not None:
                    table.home[record] = self.first + block


@dataclass
class _View:
    """Who looks: agents of blocks [n] or [1], or what several warps all know (``rows``, [proxies, columns])."""

    team: Team
    blocks: Array
    agents: Array
    rows: Array | None = None

    def known(self, index: tuple[Array, ...], layer: Array, column: Array) -> Array:
        """Up to which time the viewer of each access in ``index`` knows a column of its own block."""
        if self.rows is not None:
            return self.rows[layer, column]
        if len(self.agents) == 1:
            return self.team.know[self.blocks[0], self.agents[0], layer, column]
        return self.team.know[self.blocks[index[0]], self.agents[index[0]], layer, column]

    def at(self, index: int) -> tuple[int, int]:
        """Block (in the team) and agent of one access."""
        return int(self.blocks[index % len(self.blocks)]), int(self.agents[index % len(self.agents)])


def _apply(
    shadow: Shadow,
    view: _View,
    offsets: Array,
    size: int,
    codes: Array | int,
    slots: Array | int,
    writes: bool,
    proxy: int,
    strength: int,
    same: tuple[Array, Array] | None = None,
) -> Conflict | None:
    """Check accesses against those before and note them."""
    before = cells(shadow.writes, offsets, size)
    if same is not None and same[0].any():
        before = np.where(same[0][:, None], 0, before)
    conflict = _find(shadow, view, before, offsets, proxy, strength, "wrote", writes)
    column = codes[:, None] if isinstance(codes, np.ndarray) else codes
    if not writes:
        if isinstance(slots, np.ndarray):
            if size & (size - 1) == 0 and size <= 64 and not (offsets & (size - 1)).any():
                shadow.reads.reshape(len(shadow.reads), -1, size)[slots, offsets // size] = column
            else:
                shadow.reads[slots[:, None], offsets[:, None] + np.arange(size)] = column
        else:
            set_cells(shadow.reads[slots], offsets, size, column)
        return conflict
    readers = cells(shadow.reads, offsets, size)
    if readers.any():
        for slot in readers[readers.any(axis=(1, 2))]:
            conflict = conflict or _find(shadow, view, slot, offsets, 0, strength, "read", True)
        set_cells(shadow.reads, offsets, size, 0)
    set_cells(shadow.writes, offsets, size, column)
    if isinstance(codes, np.ndarray):  # warps in step may write the same bytes at once
        present = cells(shadow.writes, offsets, size)
        bits = view.team.races.lane_bits
        others = np.where(present >> bits != column >> bits, present, 0)
        if same is not None:
            others[same[1]] = 0
        conflict = conflict or _find(shadow, view, others, offsets, 0, strength, "wrote", writes)
    return conflict


def _find(
    shadow: Shadow, view: _View, codes: Array, offsets: Array, proxy: int, strength: int, did: str, writes: bool
) -> Conflict | None:
    """The first of the earlier accesses ``codes`` [n, size] that the viewer does not know of."""
    if not codes.any():
        return None
    codes, step = coarse(codes)
    races = view.team.races
    table, own = races.records, view.team.first + view.blocks
    index = np.nonzero(codes)
    found = codes[index]
    record = found >> races.lane_bits
    column = table.column[record] + (found & (1 << races.lane_bits) - 1) * table.spread[record]
    layer = np.where(table.proxy[record] == 0, proxy, 0)
    home = table.home[record]
    here = home == (own[0] if len(own) == 1 else own[index[0]])
    known = view.known(index, layer, np.where(here, column, 0))
    late = ~here | (known < table.time[record])
    for place in np.nonzero(late)[0].tolist():
        access, byte, number = int(index[0][place]), step * int(index[1][place]), int(record[place])
        block, agent = view.at(access)
        mine, other = view.team.first + block, int(home[place])
        if not here[place] and _knows_remote(view, block, agent, other, int(layer[place]), int(column[place]), number):
            continue
        shared = min(strength, int(table.strength[number]))
        if shared and races.within(shared, mine, other):
            continue
        at = int(offsets[access]) + byte
        unordered = not layer[place] or not here[place]
        if not unordered:  # ordered in the plain view of memory, then only the proxy fence is missing
            plain = view.known((index[0][place : place + 1],), np.array([0]), column[place : place + 1])
            unordered = int(plain[0]) < int(table.time[number])
        lane = int(found[place]) & (1 << races.lane_bits) - 1
        return Conflict(access, at, _describe(races, shadow.describe(at), number, lane, did, writes, unordered))
    return None


def _knows_remote(view: _View, block: int, agent: int, home: int, layer: int, column: int, record: int) -> bool:
    token = view.team._remote.get((block, agent))
    rows = None if token is None else token.known.get(home)
    if rows is None or column >= rows.shape[1]:
        return False
    return bool(rows[layer, column] >= view.team.races.records.time[record])


def _describe(races: Races, place: str, record: int, lane: int, did: str, writes: bool, unordered: bool) -> str:
    """The message of a race with an earlier access."""
    table = races.records
    home, warp = int(table.home[record]), int(table.warp[record])
    who = races.team_of[home].name(warp)
    if table.spread[record]:
        who += f", lane {lane}"
    if table.time[record] == _PENDING:
        did = "writes" if did == "wrote" else "reads"
        why = "asynchronously, and nothing has waited for that"
    elif unordered:
        why = "and nothing orders the two"
    else:
        why = "through the generic proxy, and no fence.proxy.async lies between"
    verb = "writes" if writes else "reads"
    return f"race: {verb} {place}, which {who} {did} {why}; the other access:{races.sites[int(table.site[record])]}"


__all__ = ["BLOCK", "CLUSTER", "DEVICE", "SYSTEM", "WEAK", "Conflict", "Races", "Shadow", "Site", "Team", "Token"]
