"""Distributed tile layouts as linear maps over F2 ("Linear Layouts", arXiv 2505.23819).

A layout sends the bits of (register, lane, warp) to tile coordinates: each input bit has a basis vector and a
coordinate is the XOR of the basis vectors of the set bits. Tile sizes that are not a power of two are `repeat`
copies of a power-of-two core; copy number r owns registers [r * core_registers, (r + 1) * core_registers).

Because a copy moves a coordinate by a multiple of the core's power-of-two size, it never carries into the core's
bits. So every coordinate, copies included, is `register part ^ lane part ^ warp part`: most methods rest on that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.ir.layout_bits import F2Span, Vector, is_power_of_two, log2_exact, pack, power_of_two_part, unit, unpack

IntArray = npt.NDArray[np.int64]
Bases = tuple[tuple[str, tuple[Vector, ...]], ...]

THREAD_DIMS = ("register", "lane", "warp")


@dataclass(frozen=True)
class LinearLayout:
    """Linear map over F2 from input bits to tile coordinates.

    bases: ordered (in-dim, basis vectors) pairs; one vector per bit, least significant first, one int per tile dim.
    shape: size of the power-of-two core. repeat: copies of the core per dim; tile shape = shape * repeat.
    Copies are extra values of `register` (or of the first in-dim where there is no register), outermost, and
    numbered row-major over `repeat`, or in the order of `repeat_order` (repeated dims, outermost first) when given:
    transposing a tile leaves its registers where they are, so it may leave another order behind.

    Two constructions of the same map compare equal: even innermost repetitions are folded into the core, and any
    layout that names one of register, lane, warp has all three, in that order.
    """

    bases: Bases
    shape: Vector
    repeat: Vector
    repeat_order: Vector = ()

    def __post_init__(self) -> None:
        bases = {name: [tuple(int(c) for c in v) for v in vectors] for name, vectors in self.bases}
        if len(bases) != len(self.bases):
            raise ValueError(f"an in-dim is named twice in {[name for name, _ in self.bases]}")
        if any(name in bases for name in THREAD_DIMS):
            rest = [name for name in bases if name not in THREAD_DIMS]
            bases = {name: bases.get(name, []) for name in (*THREAD_DIMS, *rest)}
        shape, repeat = [int(s) for s in self.shape], [int(r) for r in self.repeat]
        self._validate(bases, shape, repeat)
        order = self._fold_even_repetitions(bases, shape, repeat)
        object.__setattr__(self, "bases", tuple((name, tuple(vectors)) for name, vectors in bases.items()))
        object.__setattr__(self, "shape", tuple(shape))
        object.__setattr__(self, "repeat", tuple(repeat))
        object.__setattr__(self, "repeat_order", tuple(order) if order != sorted(order) else ())

    @staticmethod
    def _validate(bases: Mapping[str, Iterable[Vector]], shape: Sequence[int], repeat: Sequence[int]) -> None:
        if len(repeat) != len(shape):
            raise ValueError(f"repeat {list(repeat)} and shape {list(shape)} differ in rank")
        if any(not is_power_of_two(size) for size in shape):
            raise ValueError(f"core shape {list(shape)} has a size that is not a power of two: use repeat")
        if any(count < 1 for count in repeat):
            raise ValueError(f"repeat {list(repeat)} has a count below 1")
        if not bases and prod(repeat) > 1:
            raise ValueError("a repeated layout needs an in-dim to number its copies")
        for name, vectors in bases.items():
            for vector in vectors:
                if len(vector) != len(shape) or any(not 0 <= c < size for c, size in zip(vector, shape, strict=True)):
                    raise ValueError(f"basis vector {list(vector)} of {name} does not fit core shape {list(shape)}")

    def _fold_even_repetitions(self, bases: dict[str, list[Vector]], shape: list[int], repeat: list[int]) -> list[int]:
        """Turn even innermost repetitions into register bits of the core; returns the dims still repeated."""
        order = list(self.repeat_order) or list(range(len(shape)))
        if len(set(order)) != len(order) or any(r > 1 and d not in order for d, r in enumerate(repeat)):
            raise ValueError(f"repeat_order {order} does not name each repeated dim of {repeat} once")
        order = [d for d in order if repeat[d] > 1]
        while order:
            axis = order[-1]
            while repeat[axis] % 2 == 0:
                name = "register" if "register" in bases else next(iter(bases))
                bases[name].append(unit(len(shape), axis, shape[axis]))
                shape[axis] *= 2
                repeat[axis] //= 2
            if repeat[axis] > 1:
                break
            order.pop()
        return order

    # ---- construction and text ----------------------------------------------------------------------------------

    @classmethod
    def make(
        cls,
        bases: Mapping[str, Iterable[Sequence[int]]],
        shape: Sequence[int],
        repeat: Sequence[int] | None = None,
        repeat_order: Sequence[int] = (),
    ) -> LinearLayout:
        """Build from plain lists; repeat defaults to all ones."""
        frozen = tuple((name, tuple(tuple(v) for v in vectors)) for name, vectors in bases.items())
        return cls(frozen, tuple(shape), tuple(repeat or [1] * len(shape)), tuple(repeat_order))

    def __str__(self) -> str:
        fields: list[tuple[str, Any]] = [*self.bases, ("shape", self.shape)]
        if self.is_repeated:
            fields.append(("repeat", self.repeat))
        if self.repeat_order:
            fields.append(("repeat_order", self.repeat_order))
        return "linear<" + ", ".join(f"{k}={json.dumps(v, separators=(',', ':'))}" for k, v in fields) + ">"

    @classmethod
    def parse(cls, text: str) -> LinearLayout:
        """Exact inverse of `str`; ValueError on anything else."""
        match = re.fullmatch(r"\s*linear<(.*)>\s*", text, re.DOTALL)
        if match is None:
            raise ValueError(f"expected linear<...>, got {text!r}")
        fields = parse_fields(match[1])
        if "shape" not in fields:
            raise ValueError(f"linear<...> without shape: {text!r}")
        shape, repeat, order = fields.pop("shape"), fields.pop("repeat", None), fields.pop("repeat_order", ())
        try:
            return cls.make(fields, shape, repeat, order)
        except TypeError as error:
            raise ValueError(f"malformed basis list in {text!r}") from error

    # ---- sizes --------------------------------------------------------------------------------------------------

    @property
    def in_dims(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.bases)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def tile_shape(self) -> Vector:
        return tuple(s * r for s, r in zip(self.shape, self.repeat, strict=True))

    @property
    def is_repeated(self) -> bool:
        return prod(self.repeat) > 1

    @property
    def repeated_dims(self) -> Vector:
        """Dims with more than one copy of the core, outermost first."""
        return self.repeat_order or tuple(d for d, r in enumerate(self.repeat) if r > 1)

    @property
    def repeat_dim(self) -> str:
        """The in-dim whose outermost values number the copies."""
        return "register" if "register" in self.in_dims or not self.bases else self.bases[0][0]

    def basis(self, dim: str) -> tuple[Vector, ...]:
        """Basis vectors of an in-dim (none for a dim the layout lacks)."""
        return next((vectors for name, vectors in self.bases if name == dim), ())

    def core_size(self, dim: str) -> int:
        return 1 << len(self.basis(dim))

    def in_size(self, dim: str) -> int:
        """Number of values of an in-dim, copies included."""
        return self.core_size(dim) * (prod(self.repeat) if dim == self.repeat_dim else 1)

    @property
    def num_registers(self) -> int:
        return self.in_size("register")

    @property
    def num_lanes(self) -> int:
        return self.in_size("lane")

    @property
    def num_warps(self) -> int:
        return self.in_size("warp")

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def table(self, dim: str) -> IntArray:
        """[in_size(dim), rank] coordinates at dim = 0, 1, ... with every other in-dim 0 (read-only)."""
        return _table(self, dim)

    def apply(self, **ins: int) -> Vector:
        """Coordinates of one element; in-dims left out are 0."""
        return tuple(int(axis) for axis in self.coords(**ins))

    def coords(self, **ins: npt.ArrayLike) -> tuple[IntArray, ...]:
        """Coordinates per tile dim for broadcastable index arrays; in-dims left out are 0."""
        result: IntArray = np.zeros((self.rank,), np.int64)
        for name, values in ins.items():
            if name not in self.in_dims:
                raise ValueError(f"{self} has no in-dim {name}")
            index = np.asarray(values, np.int64)
            if index.size and (index.min() < 0 or index.max() >= self.in_size(name)):
                raise ValueError(f"{name} index outside [0, {self.in_size(name)})")
            result = result ^ self.table(name)[index]
        return tuple(result[..., axis] for axis in range(self.rank))

    def all_coords(self) -> tuple[IntArray, ...]:
        """Coordinates per tile dim as arrays indexed [register, lane, warp]."""
        ranges = np.ix_(*(np.arange(self.in_size(dim)) for dim in THREAD_DIMS))
        return self.coords(**{dim: r for dim, r in zip(THREAD_DIMS, ranges, strict=True) if dim in self.in_dims})

    # ---- properties ---------------------------------------------------------------------------------------------

    def _packed(self) -> list[int]:
        return [pack(vector, self.shape) for _, vectors in self.bases for vector in vectors]

    def _span(self) -> F2Span:
        span = F2Span()
        for index, vector in enumerate(self._packed()):
            span.insert(vector, index)
        return span

    @property
    def is_surjective(self) -> bool:
        """Every tile element is held by somebody."""
        return len(self._span()) == log2_exact(prod(self.shape))

    @property
    def owners(self) -> tuple[object, ...] | None:
        """Who holds what, in whatever order of registers; None where threads share elements.

        Each thread has the same elements in two layouts of a tile whose owners are equal, and nobody else has them.
        """
        span = F2Span()
        for vector in self.basis("register"):
            span.insert(pack(vector, self.shape), 0)
        threads = self.basis("lane"), self.basis("warp")
        if not all(span.insert(pack(vector, self.shape), 0) for basis in threads for vector in basis):
            return None
        return (*threads, frozenset(map(tuple, self.table("register").tolist())))

    def free_bits(self, dim: str) -> Vector:
        """Positions of the zero basis vectors of an in-dim: bits along which the tile is replicated."""
        return tuple(bit for bit, vector in enumerate(self.basis(dim)) if not any(vector))

    def group_axis(self) -> int | None:
        """The dim along which each group of four warps holds an equal run of the tile; None where there is none."""
        bits = self.basis("warp")[2:]
        for axis, size in enumerate(self.tile_shape):
            run = tuple(unit(self.rank, axis, size >> len(bits) << n) for n in range(len(bits)))
            if self.repeat[axis] == 1 and size >> len(bits) and bits == run:
                return axis
        return None

    def contiguity(self, axis: int) -> int:
        """Registers 0..n-1 (and every aligned group of n) walk n consecutive, n-aligned elements along axis."""
        registers = self.basis("register")
        width = 0
        while width < len(registers) and registers[width] == unit(self.rank, axis, 1 << width):
            width += 1
        others = [*registers[width:], *(v for name, vs in self.bases if name != "register" for v in vs)]
        while width and any(v[axis] & ((1 << width) - 1) for v in others):
            width -= 1
            others.append(registers[width])
        return 1 << width

    # ---- algebra ------------------------------------------------------------------------------------------------

    def compose(self, outer: LinearLayout) -> LinearLayout:
        """outer after self: coordinate i of self feeds in-dim number i of outer. No repetitions on either side."""
        if self.is_repeated or outer.is_repeated:
            raise ValueError("compose works on power-of-two layouts; one of these is repeated")
        if len(outer.bases) != self.rank:
            raise ValueError(f"outer layout takes {len(outer.bases)} inputs, inner layout gives {self.rank}")
        for size, name in zip(self.shape, outer.in_dims, strict=True):
            if size > outer.in_size(name):
                raise ValueError(f"coordinates reach {size} but in-dim {name} has {outer.in_size(name)} values")

        def image(vector: Vector) -> Vector:
            return outer.apply(**dict(zip(outer.in_dims, vector, strict=True)))

        return LinearLayout.make({n: [image(v) for v in vectors] for n, vectors in self.bases}, outer.shape)

    def inverse(self) -> LayoutInverse:
        """Pseudo-inverse of a surjective layout; bits that only replicate come out as 0."""
        if not self.is_surjective:
            raise ValueError(f"{self} does not reach every coordinate, so it has no inverse")
        span = self._span()
        sizes = [self.core_size(name) for name in self.in_dims]
        shifts = np.cumsum([0, *(len(vectors) for _, vectors in self.bases)])

        def preimage(axis: int, bit: int) -> Vector:
            _, mask = span.reduce(pack(unit(self.rank, axis, 1 << bit), self.shape))
            return tuple(mask >> int(shift) & (size - 1) for shift, size in zip(shifts[:-1], sizes, strict=True))

        bases = {f"dim{d}": [preimage(d, b) for b in range(log2_exact(size))] for d, size in enumerate(self.shape)}
        return LayoutInverse(self, LinearLayout.make(bases, sizes))

    def _rebuild(
        self,
        vector_map: Any,
        shape: Sequence[int],
        repeat: Sequence[int],
        repeated_dims: Sequence[int],
        **replaced: Iterable[Vector],
    ) -> LinearLayout:
        bases = {n: list(replaced[n]) if n in replaced else [vector_map(v) for v in vs] for n, vs in self.bases}
        return LinearLayout.make(bases, shape, repeat, repeated_dims)

    def transpose(self, perm: Sequence[int]) -> LinearLayout:
        """Dim i of the result is dim perm[i] of self (NumPy's meaning); no register moves."""
        if sorted(perm) != list(range(self.rank)):
            raise ValueError(f"{list(perm)} is not a permutation of {self.rank} dims")
        return self._rebuild(
            lambda v: tuple(v[p] for p in perm),
            [self.shape[p] for p in perm],
            [self.repeat[p] for p in perm],
            [list(perm).index(d) for d in self.repeated_dims],
        )

    def reshape(self, new_shape: Sequence[int]) -> LinearLayout:
        """Row-major reshape without moving a register; ValueError where a repetition would have to be split."""
        if prod(new_shape) != prod(self.tile_shape):
            raise ValueError(f"cannot reshape {list(self.tile_shape)} to {list(new_shape)}: sizes differ")
        core, repeat, moved = list(new_shape), [1] * len(new_shape), {}
        for old_dims, new_dims in _reshape_groups(self.tile_shape, new_shape):
            repeated = [d for d in old_dims if self.repeat[d] > 1]
            if not repeated:
                continue
            target = next(d for d in new_dims if new_shape[d] > 1)
            count = self.repeat[repeated[0]]
            outermost = next(d for d in old_dims if self.tile_shape[d] > 1)
            core[target] //= count
            whole = new_shape[target] % count == 0 and all(is_power_of_two(core[d]) for d in new_dims)
            if repeated != [outermost] or not whole:
                raise ValueError(
                    f"cannot reshape {list(self.tile_shape)} to {list(new_shape)}: dim {repeated[0]} is {count} "
                    f"repetitions of {self.shape[repeated[0]]}, which must stay whole at the front of one new dim"
                )
            repeat[target], moved[repeated[0]] = count, target
        return self._rebuild(
            lambda v: unpack(pack(v, self.shape), core), core, repeat, [moved[d] for d in self.repeated_dims]
        )

    def slice_dim(self, axis: int) -> LinearLayout:
        """Layout of a reduction's result over axis: the coordinate goes, threads along it hold duplicates (zero bases).

        Registers that would duplicate others of the same thread are removed; see `slice_registers`.
        """
        shape = _without(self.shape, axis)
        span = F2Span()
        kept: list[Vector] = []
        for vector in (_without(v, axis) for v in self.basis("register")):
            if span.insert(pack(vector, shape), len(kept)):
                kept.append(vector)
        order = [d - (d > axis) for d in self.repeated_dims if d != axis]
        return self._rebuild(lambda v: _without(v, axis), shape, _without(self.repeat, axis), order, register=kept)

    def slice_registers(self, axis: int) -> list[int]:
        """For each register of self, the register of `slice_dim(axis)` it is reduced into (or broadcast from)."""
        position = _first_register(self.slice_dim(axis))
        return [position[_without(c, axis)] for c in self.table("register").tolist()]

    def expand_dim(self, axis: int) -> LinearLayout:
        """Insert a dim of size 1 before axis."""
        order = [d + (d >= axis) for d in self.repeated_dims]
        return self._rebuild(
            lambda v: _inserted(v, axis, 0), _inserted(self.shape, axis, 1), _inserted(self.repeat, axis, 1), order
        )

    def broadcast(self, new_shape: Sequence[int]) -> LinearLayout:
        """Grow size-1 dims by adding registers (innermost dim first, outside the existing core registers)."""
        if len(new_shape) != self.rank:
            raise ValueError(f"broadcast of {list(self.tile_shape)} to {list(new_shape)} changes the rank")
        shape, repeat, registers = list(self.shape), list(self.repeat), list(self.basis("register"))
        order = list(self.repeated_dims)
        for axis in reversed(range(self.rank)):
            if new_shape[axis] == self.tile_shape[axis]:
                continue
            if self.tile_shape[axis] != 1:
                raise ValueError(f"dim {axis} of {list(self.tile_shape)} is not 1, it cannot become {new_shape[axis]}")
            shape[axis] = power_of_two_part(new_shape[axis])
            repeat[axis] = new_shape[axis] // shape[axis]
            registers += [unit(self.rank, axis, 1 << bit) for bit in range(log2_exact(shape[axis]))]
            order = [axis, *order] if repeat[axis] > 1 else order
        return self._rebuild(lambda v: v, shape, repeat, order, register=registers)

    def extract(self, offsets: Sequence[int], sizes: Sequence[int]) -> tuple[LinearLayout, list[int]]:
        """Static sub-tile in which every thread keeps what it has.

        Returns its layout and, for each of its registers, the register of self. Offsets are multiples of sizes.
        ValueError where lanes or warps span more than the sub-tile, so that data would have to move.
        """
        for axis, (offset, size, whole) in enumerate(zip(offsets, sizes, self.tile_shape, strict=True)):
            if size < 1 or offset % size or offset < 0 or offset + size > whole:
                raise ValueError(f"dim {axis}: [{offset}, {offset + size}) is not an aligned part of size {whole}")
        core = [c if s % c == 0 else power_of_two_part(s) for s, c in zip(sizes, self.shape, strict=True)]
        core = [min(c, own) for c, own in zip(core, self.shape, strict=True)]
        for name, vectors in self.bases:
            if name != "register" and any(c >= size for v in vectors for c, size in zip(v, core, strict=True)):
                raise ValueError(f"sub-tile {list(sizes)} cuts across the {name}s of {self}: convert the layout first")
        inside = []
        for vector in self.basis("register"):
            low = tuple(c & (size - 1) for c, size in zip(vector, core, strict=True))
            if any(low) and low != vector:
                raise ValueError(f"register basis {list(vector)} lies partly inside sub-tile {list(sizes)}")
            if low == vector:
                inside.append(vector)
        repeat = [s // c for s, c in zip(sizes, core, strict=True)]
        order = [d for d in self.repeated_dims if repeat[d] > 1]
        order = [d for d in range(self.rank) if repeat[d] > 1 and d not in order] + order
        layout = self._rebuild(lambda v: v, core, repeat, order, register=inside)
        position = _first_register(self)
        wanted = (layout.table("register") + np.asarray(offsets, np.int64)).tolist()
        if any(tuple(c) not in position for c in wanted):
            raise ValueError(f"sub-tile {list(sizes)} at {list(offsets)} is not held in registers of its own by {self}")
        return layout, [position[tuple(c)] for c in wanted]

    def registers_in(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Registers that thread 0 holds inside a box, in register order.

        For a fragment layout and the box of one instruction (offsets as thread 0 sees them) these are the
        instruction's operand registers, in its own order, in every thread.
        """
        low = np.asarray(offsets, np.int64)
        table = self.table("register")
        inside = ((table >= low) & (table < low + np.asarray(sizes, np.int64))).all(axis=1)
        return [int(index) for index in np.flatnonzero(inside)]

    def register_permutation(self, other: LinearLayout) -> list[int] | None:
        """p with other's register i = self's register p[i] in every thread; None when data crosses lanes or warps."""
        _same_tile(self, other)
        if any(self.basis(dim) != other.basis(dim) for dim in ("lane", "warp")):
            return None
        position = _first_register(self)
        wanted = [tuple(c) for c in other.table("register").tolist()]
        return [position[c] for c in wanted] if all(c in position for c in wanted) else None


@dataclass(frozen=True)
class LayoutInverse:
    """Coordinate -> one holder. `core` is the linear part: in-dims dim0, dim1, ... to the in-dims of `layout`."""

    layout: LinearLayout
    core: LinearLayout

    def locate(self, *coords: npt.ArrayLike) -> tuple[IntArray, ...]:
        """Index per in-dim of `layout` (register, lane, warp) for coordinate arrays, one per tile dim."""
        arrays = np.broadcast_arrays(*(np.asarray(c, np.int64) for c in coords))
        inside = {f"dim{d}": a % size for d, (a, size) in enumerate(zip(arrays, self.layout.shape, strict=True))}
        found = list(self.core.coords(**inside))
        copy: IntArray = np.zeros((), np.int64)
        for axis in self.layout.repeated_dims:
            copy = copy * self.layout.repeat[axis] + arrays[axis] // self.layout.shape[axis]
        where = self.layout.in_dims.index(self.layout.repeat_dim)
        found[where] = found[where] + copy * self.layout.core_size(self.layout.repeat_dim)
        return tuple(found)


def parse_fields(text: str) -> dict[str, Any]:
    """`a=[[0,1]], b=3` -> {"a": [[0, 1]], "b": 3}; integers and nested lists of integers only."""
    fields: dict[str, Any] = {}
    for part in re.split(r",\s*(?=[A-Za-z_]\w*\s*=)", text.strip()):
        match = re.fullmatch(r"([A-Za-z_]\w*)\s*=\s*([\[\]\d,\s]+)", part.strip())
        if match is None or match[1] in fields:
            raise ValueError(f"expected name=list once, got {part!r}")
        try:
            fields[match[1]] = json.loads(match[2])
        except json.JSONDecodeError as error:
            raise ValueError(f"malformed list in {part!r}") from error
    return fields


@lru_cache(maxsize=512)
def _table(layout: LinearLayout, dim: str) -> IntArray:
    size = layout.core_size(dim)
    table = np.zeros((size, layout.rank), np.int64)
    index = np.arange(size)
    for bit, vector in enumerate(layout.basis(dim)):
        table ^= (index >> bit & 1)[:, None] * np.asarray(vector, np.int64)
    if dim == layout.repeat_dim:
        for axis in reversed(layout.repeated_dims):
            step = np.asarray(unit(layout.rank, axis, layout.shape[axis]), np.int64)
            copies = np.arange(layout.repeat[axis])[:, None, None] * step
            table = (copies + table[None]).reshape(-1, layout.rank)
    table.flags.writeable = False
    return table


def _reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split both shapes into the smallest runs of dims with equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        left, right, size_left, size_right = [i], [j], old[i], new[j]
        i, j = i + 1, j + 1
        while size_left != size_right:
            if size_left < size_right:
                left.append(i)
                size_left, i = size_left * old[i], i + 1
            else:
                right.append(j)
                size_right, j = size_right * new[j], j + 1
        groups.append((left, right))
    return groups  # dims left over have size 1


def _same_tile(a: LinearLayout, b: LinearLayout) -> None:
    if a.tile_shape != b.tile_shape:
        raise ValueError(f"layouts of different tiles: {list(a.tile_shape)} and {list(b.tile_shape)}")


def _first_register(layout: LinearLayout) -> dict[Vector, int]:
    """Coordinate held by thread 0 -> its lowest register."""
    table = layout.table("register").tolist()
    return {tuple(table[index]): index for index in reversed(range(len(table)))}


def _without(values: Sequence[int], axis: int) -> Vector:
    return (*values[:axis], *values[axis + 1 :])


def _inserted(values: Sequence[int], axis: int, value: int) -> Vector:
    return (*values[:axis], value, *values[axis:])
