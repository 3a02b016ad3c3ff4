"""What the schedule checker knows of a function: its memory, rings, roles, and the threads that it follows.

A role's threads run the same code on the same scalars, so a few stand for all. Of each warpgroup (of the whole role
where warpgroups make no difference) the checker follows two: the *first*, which acts for the warpgroup where one
thread is enough, and one *other*, in another warp. Barriers treat all others alike, so what orders these two orders
any two; what does not order them is a race. Where blocks of a cluster share copies, each block has its own of all this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tilewright.ir.async_ops import (
    Alloc,
    AsyncDot,
    Barrier,
    BulkStore,
    Copy,
    LocalLoad,
    MakeRing,
    Publish,
    Release,
    Role,
    Slot,
    Wait,
    ring_of,
)
from tilewright.ir.comm_ops import Leave, view_root
from tilewright.ir.core import Function, IRError, Operation, Value
from tilewright.ir.scratch import exchange_places, scratch_bytes
from tilewright.ir.target import Target
from tilewright.ir.types import BufferType, RingType, TileType, TokenType

WARPGROUP = 4
BARRIER_BYTES = 8


@dataclass(eq=False)
class Region:
    """A slot, or the scratch memory of operations. ``start`` is None before the shared-memory plan."""

    number: int
    label: str
    start: int | None
    size: int
    op: Operation
    #: regions that share bytes with this one
    overlaps: list[Region] = field(default_factory=list)


@dataclass(eq=False)
class RingModel:
    """A ring's barriers; `number` counts the rings."""

    number: int
    label: str
    op: MakeRing
    stages: int
    producers: int
    consumers: int
    #: blocks of the cluster at whose barriers a release arrives
    ctas: int = 1
    #: threads read slots of it with their own loads: its release begins with a barrier of the warpgroup
    read_by_threads: bool = False


@dataclass(eq=False)
class RoleModel:
    """The code of one role, or all of a function without roles (``op`` None)."""

    number: int
    name: str
    op: Role | None
    warps: int
    threads: int
    groups: int
    single_thread: bool

    def operations(self, model: Model) -> list[Operation]:
        """All that it runs, but for what stands beside roles."""
        return model.ops if self.op is None else list(self.op.walk())


@dataclass(eq=False)
class Agent:
    """A thread that the checker follows. ``weight``: how many threads it stands for; ``cta``: its block's number."""

    number: int
    role: RoleModel
    group: int
    first: bool
    weight: int
    cta: int = 0
    #: which block that is, where more than one is followed
    where: str = ""

    @property
    def name(self) -> str:
        name = f"{self.where}, {self.role.name}" if self.where else self.role.name
        if self.role.groups > 1:
            name += f" warpgroup {self.group}"
        return name if self.role.single_thread else name + (" first thread" if self.first else " other threads")

    @property
    def leads_role(self) -> bool:
        return self.first and self.group == 0


class Model:
    """The facts. Raises IRError where they contradict each other in any execution."""

    def __init__(self, function: Function, target: Target):
        self.function, self.target = function, target
        ctas, spread = int(function.attributes.get("num_ctas", 1)), bool(function.attributes.get("spread"))
        #: blocks of the cluster, all of which the checker follows; of those that run one program together, which share
        #: no rings, it follows one
        self.ctas, self.program_blocks = (1, ctas) if spread else (ctas, 1)
        self.ops = list(function.walk())
        self.rings: dict[Value, RingModel] = {}
        self.buffers: dict[Value, list[Region]] = {}
        #: the places that operations exchange elements through: two where reductions take turns with them
        self.scratch: dict[Operation, list[Region]] = {}
        self.regions: list[Region] = []
        self.publishes = {token: op for op in self.ops if isinstance(op, Publish) for token in op.tokens}
        #: kinds of tokens that threads wait for by their order, not by a ring
        self.waited = {kind_of(op.token) for op in self.ops if isinstance(op, Wait) and op.token is not None}
        self._find_memory()
        self._find_overlaps()
        self.roles = list(self._find_roles())
        self.groups = max(role.groups for role in self.roles)
        names = [f"block {cta}" for cta in range(self.ctas)] if self.ctas > 1 else [""]
        self.agents = list(find_agents(self.roles, names))
        self._check_tokens()

    @property
    def asynchronous(self) -> bool:
        """Whether there is anything to check."""
        return bool(self.regions or self.rings or any(isinstance(op, AsyncDot) for op in self.ops))

    @cached_property
    def most_stages(self) -> int:
        depths = [ring.stages for ring in self.rings.values()]
        return max([*depths, *(len(slots) for slots in self.buffers.values())], default=1)

    # --- memory -------------------------------------------------------------------------------------

    def _find_memory(self) -> None:
        for op in self.ops:
            if isinstance(op, MakeRing):
                type_: Any = op.result.type
                assert isinstance(type_, RingType)
                label = f"%{op.result.hint}" if op.result.hint else "the ring"
                ring = RingModel(len(self.rings), label, op, type_.stages, op.producers, op.consumers, op.ctas)
                self.rings[op.result] = ring
            elif isinstance(op, Alloc):
                self._add_buffer(op)
            elif op.attributes.get("scratch") is not None:
                self._add_scratch(op)
            elif isinstance(op, LocalLoad):
                found = ring_of(op.slot)
                if found is not None:
                    self.rings[found].read_by_threads = True

    def _add_buffer(self, op: Alloc) -> None:
        type_ = op.result.type
        assert isinstance(type_, BufferType)
        label = f"%{op.result.hint}" if op.result.hint else self._purpose(op)
        slots = []
        for stage in range(type_.stages):
            start = None if op.offset is None else op.offset + stage * type_.slot.stride
            slots.append(self._region(f"slot {stage} of {label}", start, type_.slot.bytes, op))
        self.buffers[op.result] = slots
        if op.ring is not None and self.rings[op.ring].stages != type_.stages:
            raise IRError(
                f"{label} has {type_.stages} slots, but its ring has {self.rings[op.ring].stages} stages", op.loc
            )

    def _purpose(self, buffer: Alloc) -> str:
        """A name for a buffer that has none: the tensor that is copied to it, or its shape."""
        for op in self.ops:
            if isinstance(op, Copy) and isinstance(op.slot.op, Slot) and op.slot.op.buffer is buffer.result:
                return f"the buffer of %{view_root(op.view).hint}"
        type_ = buffer.result.type
        assert isinstance(type_, BufferType)
        return f"a buffer of {'x'.join(map(str, type_.slot.shape))} {type_.slot.dtype}"

    def _add_scratch(self, op: Operation) -> None:
        start, size = op.attributes["scratch"], scratch_bytes(op)
        if size == 0:
            return
        count = exchange_places(op)
        wanted = [(start + n * size // count, size // count) for n in range(count)]
        for others in self.scratch.values():
            if [(other.start, other.size) for other in others] == wanted:
                self.scratch[op] = others
                return
        self.scratch[op] = [self._region(f"the scratch memory of '{op.name}'", *place, op) for place in wanted]

    def _region(self, label: str, start: int | None, size: int, op: Operation) -> Region:
        region = Region(len(self.regions), label, start, size, op)
        self.regions.append(region)
        return region

    def _find_overlaps(self) -> None:
        """Regions that share bytes; memory that holds barriers may not share any."""
        placed: list[tuple[int, int, Region | RingModel]] = [
            (r.start, r.start + r.size, r) for r in self.regions if r.start is not None
        ]
        for ring in self.rings.values():
            if ring.op.offset is not None:
                placed.append((ring.op.offset, ring.op.offset + 2 * ring.stages * BARRIER_BYTES, ring))
        placed.sort(key=lambda item: item[0])
        limit = self.function.attributes.get("shared_bytes")
        for position, (_, end, one) in enumerate(placed):
            if limit is not None and end > limit:
                raise IRError(f"{one.label} ends at byte {end} of {limit} of shared memory", one.op.loc)
            for start, _, other in placed[position + 1 :]:
                if start >= end:
                    break
                if isinstance(one, Region) and isinstance(other, Region):
                    one.overlaps.append(other)
                    other.overlaps.append(one)
                else:
                    raise IRError(
                        f"{one.label} and {other.label} (from {other.op.loc}) share bytes of shared memory, "
                        "and one holds barriers",
                        one.op.loc,
                        "the shared-memory plan gave them overlapping offsets",
                    )

    # --- roles and threads --------------------------------------------------------------------------

    def _find_roles(self) -> Iterator[RoleModel]:
        top = [op for op in self.function.body.block.ops if isinstance(op, Role)]
        lanes = self.target.warp_size
        if not top:
            warps = int(self.function.attributes.get("num_warps") or 1)
            yield RoleModel(0, "the block", None, warps, warps * lanes, self._groups(warps, self.ops), False)
        for number, op in enumerate(top):
            threads = 1 if op.single_thread else op.warps * lanes
            groups = 1 if op.single_thread else self._groups(op.warps, list(op.walk()))
            yield RoleModel(number, f"role @{op.kind}", op, op.warps, threads, groups, op.single_thread)
        beside = [op for op in self.function.body.block.ops if top and _stands_beside(op)]
        for found in beside:
            raise IRError(f"'{found.name}' stands beside roles; the checker knows it inside them only", found.loc)

    def _groups(self, warps: int, ops: list[Operation]) -> int:
        """How many warpgroups act each on their own; 1 where none does."""
        alone = any(
            isinstance(op, AsyncDot | Release | BulkStore) or op.attributes.get("scope") == "warpgroup" for op in ops
        )
        return max(1, warps // WARPGROUP) if alone and self.target.vendor == "nvidia" else 1

    # --- checks of the text -------------------------------------------------------------------------

    def _check_tokens(self) -> None:
        for op in self.ops:
            if not isinstance(op, Copy) or op.result in self.publishes:
                continue
            if by_engine(op.result) or kind_of(op.result) not in self.waited:
                raise IRError(
                    "nobody waits for this copy: its token is neither published nor waited for",
                    op.loc,
                    "async.publish the token to a ring, or async.wait for it",
                )
        for ring in self.rings.values():
            if ring.ctas not in (1, self.ctas):
                text = f"{ring.label} is used in step by {ring.ctas} blocks, the cluster has {self.ctas}"
                raise IRError(text, ring.op.loc)
            if ring.producers < 1 or ring.consumers < 1:
                raise IRError(f"{ring.label} has no producers or no consumers", ring.op.loc)


def find_agents(roles: Sequence[RoleModel], blocks: Sequence[str]) -> Iterator[Agent]:
    """The threads to follow of blocks that run ``roles``; ``blocks``: the name of each."""
    number = 0
    for cta, where in enumerate(blocks):
        for role in roles:
            for group in range(role.groups):
                yield Agent(number, role, group, True, 1, cta, where)
                number += 1
                if role.threads > 1:
                    others = role.threads // role.groups - 1
                    yield Agent(number, role, group, False, others, cta, where)
                    number += 1


#: what acts on the machine and has no place beside roles
BESIDE_ROLES = frozenset(
    f"async.{name}"
    for name in (
        "acquire", "copy", "publish", "await", "release", "dot", "wait", "local_load", "local_store", "bulk_store",
        "bulk_wait", "barrier",
    )
)  # fmt: skip


def _stands_beside(op: Operation) -> bool:
    """Where the blocks of a cluster meet, or a block leaves a launch, all roles are at their ends or have not begun."""
    return op.base_name in BESIDE_ROLES and not (isinstance(op, Barrier) and (op.scope == "cluster" or _ends(op)))


def _ends(barrier: Barrier) -> bool:
    """Whether nothing follows a barrier but that the block leaves the launch."""
    assert barrier.parent is not None
    behind = barrier.parent.ops[barrier.parent.ops.index(barrier) + 1 :]
    return all(isinstance(op, Leave) for op in behind)


def kind_of(token: Value) -> str:
    """The unit that completes a token."""
    return token.type.kind if isinstance(token.type, TokenType) else ""


def by_engine(token: Value) -> bool:
    """Whether the copy engine completes the token."""
    return kind_of(token) == "tma"


def engine_alone(op: Publish) -> bool:
    """The engine makes all copies that a publish announces, and the first of them is its only arrival."""
    arrives = not isinstance(op.ring.op, MakeRing) or op.ring.op.producers > 1
    return not arrives and bool(op.tokens) and all(by_engine(token) for token in op.tokens)


def split_axis(tile: Any, groups: int) -> int | None:
    """The dim along which each of ``groups`` warpgroups holds an equal run of a tile, if there is one."""
    if groups < 2 or not isinstance(tile, TileType) or tile.layout is None:
        return None
    axis = tile.layout.group_axis()
    return axis if 1 << len(tile.layout.basis("warp")[2:]) == groups else None
