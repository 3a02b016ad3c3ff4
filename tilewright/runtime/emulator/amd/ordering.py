"""What orders the memory accesses of waves, for the race detector (`tilewright.runtime.emulator.races`).

A wave's operations of one counter complete in order, those of different counters do not, and nothing
outside the wave knows of an operation before the wave has waited for it. So each wave is three
agents of the detector, one for each counter, with the numbers of its operations as time: s_waitcnt
tells the wave's other agents, a barrier tells the workgroup what its waves have waited for.

Between workgroups, the LLVM AMDGPU memory model of gfx942 (AMDGPU usage, "Memory Model GFX942", which gfx950
shares): an access with sc0, sc1 or both is atomic at workgroup, agent or system scope, atomic
instructions at agent scope at least. A release is buffer_wbl2, s_waitcnt vmcnt(0), the atomic store;
an acquire is the atomic load, s_waitcnt vmcnt(0), buffer_inv; all three with the bits of the scope. A
workgroup needs neither cache instruction, as its compute unit has one L1 and one L2.

Not modelled: tgsplit mode; the scalar cache (a scalar load of memory that the kernel writes is checked
like any other); atomic loads and stores of LDS, which look like plain ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tilewright.runtime.emulator.amd.counters import Counter, Counters
from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.operands import Array
from tilewright.runtime.emulator.races import BLOCK, DEVICE, SYSTEM, WEAK, Conflict, Races, Shadow, Token

_KINDS = len(Counter)
#: the time up to which an agent knows itself, as in `races`
_OWN = np.iinfo(np.int32).max - 1


def new_races() -> Races:
    """A detector for kernels of this emulator."""
    return Races(lanes=64, lane_agents=False)


def new_shadow(size: int, waves_per_group: int, describe: Callable[[int], str]) -> Shadow:
    """The shadow of a memory of ``size`` bytes. The readers of a workgroup fall into different slots."""
    slots = waves_per_group if waves_per_group % _KINDS else waves_per_group + 1
    return Shadow(size, slots, describe)


def scope_of(inst: Instruction) -> int:
    """The scope that the bits sc0 and sc1 of a load, store or cache instruction name.

    The guess before a compare-and-swap counts as atomic: a stale one only costs a turn.
    """
    if inst.guess:
        return DEVICE
    if inst.flag("sc1"):
        return SYSTEM if inst.flag("sc0") else DEVICE
    return BLOCK if inst.flag("sc0") else WEAK


def scope_of_atomic(inst: Instruction) -> int:
    """The scope of a read-modify-write, for which sc0 says that it returns the old value."""
    return SYSTEM if inst.flag("sc1") else DEVICE


@dataclass
class _Flush:
    """A buffer_wbl2: its number among the wave's vector operations, and what it makes visible, by column."""

    number: int
    rows: Array


@dataclass
class _Seen:
    """What an atomic load has read and no buffer_inv has acquired yet; ``scope`` holds writer and reader."""

    number: int
    token: Token
    scope: int


class WaveOrder:
    """The order of the accesses of the waves of a batch. ``name(wave)`` names one of them."""

    def __init__(
        self,
        races: Races,
        counters: Counters,
        groups: int,
        waves_per_group: int,
        name: Callable[[int], str],
        rank: int = 0,
    ) -> None:
        self.races, self.counters = races, counters
        self.groups, self.waves_per_group = groups, waves_per_group
        self.team = races.team(groups, _KINDS * waves_per_group, lambda agent: name(agent // _KINDS), rank)
        self.agents = _KINDS * waves_per_group
        #: number of the last store that was not atomic at least at the scope: [scope][wave]
        self._dirty = {scope: np.zeros(groups * waves_per_group, np.int32) for scope in (DEVICE, SYSTEM)}
        self._flushes: dict[tuple[int, int], list[_Flush]] = {}
        self._seen: dict[int, dict[tuple[int, int], _Seen]] = {}

    # ---- within a workgroup --------------------------------------------------------------------

    def _know(self) -> Array:
        """The clocks as [group, wave, counter, wave, counter]: a view."""
        know = self.team.know[:, :, 0, : self.agents]
        group, agent, column = know.strides
        view: Array = np.lib.stride_tricks.as_strided(
            know,
            (self.groups, self.waves_per_group, _KINDS, self.waves_per_group, _KINDS),
            (group, agent * _KINDS, agent, column * _KINDS, column),
        )
        return view

    def waited(self, waves: Array) -> None:
        """These waves have waited: operations of one counter now know which ones of the others are finished."""
        group, row = np.divmod(waves, self.waves_per_group)
        know = self._know()
        for kind in Counter:
            know[group, row, :, row, kind] = self.counters.finished[kind, waves][:, None]
            know[group, row, kind, row, kind] = _OWN
        if self._seen:
            self._acquire(waves, BLOCK)

    def barrier(self, groups: Array) -> None:
        """All waves of these workgroups have met."""
        know = self._know()
        chosen = know[groups]
        shape = (_KINDS, self.groups, self.waves_per_group)
        finished = self.counters.finished.reshape(shape)[:, groups]
        told = chosen.copy()
        rows, kinds = np.meshgrid(np.arange(self.waves_per_group), np.arange(_KINDS), indexing="ij")
        told[:, rows, kinds, rows, kinds] = finished.transpose(1, 2, 0)
        know[groups] = np.maximum(chosen, told.max(axis=(1, 2), keepdims=True))
        if self.team._remote:
            for group in groups.tolist():
                self._share_remote(group)

    def _share_remote(self, group: int) -> None:
        token = Token()
        for agent in range(self.agents):
            token.join(self.team._remote.get((group, agent)))
        for agent in range(self.agents):
            self.team.acquire(group * self.agents + agent, token)

    # ---- accesses ------------------------------------------------------------------------------

    def touch(
        self,
        shadow: Shadow,
        counter: Counter,
        waves: Array,
        lanes: Array,
        offsets: Array,
        size: int,
        inst: Instruction,
        *,
        writes: bool,
        strength: int = WEAK,
        same: tuple[Array, Array] | None = None,
    ) -> Conflict | None:
        """Accesses of the operation that the waves are about to issue: flat arrays, waves ascending.

        ``same``: of stores, see `Team.write`.
        """
        agents = waves * _KINDS + counter
        self.team.now[agents] = self.counters.issued[counter, waves] + 1
        site = self.races.site(inst, inst.text, inst.line, inst.source)
        if writes:
            return self.team.write(shadow, agents, lanes, offsets, size, site, strength, same)
        return self.team.read(shadow, agents, lanes, offsets, size, site, strength)

    def stored(self, waves: Array, offsets: Array, scope: int, *, atomic: bool) -> None:
        """Global stores, or atomics, of the operation that the waves are about to issue."""
        for bound, dirty in self._dirty.items():
            if scope < bound:
                dirty[waves] = self.counters.issued[Counter.VECTOR, waves] + 1
        if scope == WEAK:
            return
        tokens = {wave: self._released(wave, scope) for wave in np.unique(waves).tolist()}
        joined: dict[tuple[int, int], Token] = {}
        for wave, offset in zip(waves.tolist(), offsets.tolist(), strict=True):
            token, reach = tokens[wave], scope
            before = self.races.locations.get((0, offset))
            if atomic and before is not None:
                token = joined.setdefault((id(before[0]), wave), _joined(before[0], token))
                reach = min(scope, before[1])
            self.races.locations[0, offset] = token, reach, self.team.first + wave // self.waves_per_group

    def loaded(self, waves: Array, offsets: Array, scope: int) -> None:
        """Atomic global loads of the operation that the waves are about to issue."""
        if not self.races.locations:
            return
        noted: set[tuple[int, int]] = set()
        for wave, offset in zip(waves.tolist(), offsets.tolist(), strict=True):
            found = self.races.locations.get((0, offset))
            if found is None or (wave, id(found[0])) in noted:
                continue
            token, written, home = found
            mine = self.team.first + wave // self.waves_per_group
            if not self.races.within(min(scope, written), mine, home):
                continue
            noted.add((wave, id(token)))
            needed = next(s for s in (BLOCK, DEVICE, SYSTEM) if self.races.within(s, mine, home))
            number = int(self.counters.issued[Counter.VECTOR, wave]) + 1
            # polls that find the same again tell nothing more than the first
            self._seen.setdefault(wave, {}).setdefault((id(token), needed), _Seen(number, token, needed))

    # ---- caches --------------------------------------------------------------------------------

    def write_back(self, waves: Array, scope: int) -> None:
        """A buffer_wbl2 that the waves are about to issue."""
        for wave in waves.tolist() if scope >= DEVICE else ():
            number = int(self.counters.issued[Counter.VECTOR, wave]) + 1
            rows = self._finished_row(wave)
            rows[wave % self.waves_per_group * _KINDS + Counter.VECTOR] = number
            for bound in (DEVICE, SYSTEM):
                if bound <= scope:
                    self._flushes.setdefault((wave, bound), []).append(_Flush(number, rows))

    def invalidate(self, waves: Array, scope: int) -> None:
        """A buffer_inv: what these waves read from here on is no older than their finished atomic loads."""
        if self._seen:
            self._acquire(waves, scope)

    def _acquire(self, waves: Array, scope: int) -> None:
        for wave in waves.tolist():
            done = self.counters.finished[Counter.VECTOR, wave]
            waiting = {}
            for key, seen in self._seen.get(wave, {}).items():
                if seen.number > done or seen.scope > scope:
                    waiting[key] = seen
                    continue
                for kind in Counter:
                    self.team.acquire(wave * _KINDS + kind, seen.token)
            if waiting:
                self._seen[wave] = waiting
            else:
                self._seen.pop(wave, None)

    def _finished_row(self, wave: int) -> Array:
        """What a wave knows to be finished, by column of its workgroup."""
        group, row = divmod(wave, self.waves_per_group)
        agents = slice(row * _KINDS, row * _KINDS + _KINDS)
        rows: Array = self.team.know[group, agents, 0].max(axis=0)
        rows[agents] = self.counters.finished[:, wave]
        return rows

    def _released(self, wave: int, scope: int) -> Token:
        """What an atomic store of a wave tells those who acquire it."""
        group, row = divmod(wave, self.waves_per_group)
        rows = self._finished_row(wave)
        if scope > BLOCK:
            done = self.counters.finished[Counter.VECTOR, wave]
            flushes = self._flushes.get((wave, scope), [])
            complete = [flush for flush in flushes if flush.number <= done]
            flushed = complete[-1].rows if complete else np.zeros_like(rows)
            self._flushes[wave, scope] = complete[-1:] + flushes[len(complete) :]
            columns = np.arange(self.waves_per_group) * _KINDS + Counter.VECTOR
            mates = group * self.waves_per_group + np.arange(self.waves_per_group)
            for column, mate in zip(columns.tolist(), mates.tolist(), strict=True):
                # what this wave knows to be finished of the other's own write-backs counts as well
                own = [flush.number for flush in self._flushes.get((mate, scope), []) if flush.number <= rows[column]]
                flushed[column] = max([flushed[column], *own])
            unsafe = columns[self._dirty[scope][mates] > flushed[columns]]
            rows[unsafe] = np.minimum(rows[unsafe], flushed[unsafe])
        return self.team._with_remote(group, np.arange(row * _KINDS, row * _KINDS + _KINDS), rows[None])


def _joined(first: Token, second: Token) -> Token:
    token = Token(dict(first.known))
    token.join(second)
    return token
