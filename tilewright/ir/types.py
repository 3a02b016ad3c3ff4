"""Types of the Tile IR: scalars, tiles, views of global memory, and shared-memory objects.

Every type prints to the text that the parser reads back to an equal type.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from tilewright.ir.layout import LinearLayout, SharedLayout


@dataclass(frozen=True)
class DType:
    """An element type. ``name`` is the text form, ``bits`` the storage size."""

    name: str
    bits: int
    kind: str  # "int", "float" or "bool"

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_int(self) -> bool:
        return self.kind == "int"

    @property
    def bytes(self) -> int:
        return max(1, self.bits // 8)

    def __str__(self) -> str:
        return self.name


i1 = DType("i1", 1, "bool")
i8, i16, i32, i64 = (DType(f"i{n}", n, "int") for n in (8, 16, 32, 64))
f16, bf16 = DType("f16", 16, "float"), DType("bf16", 16, "float")
f32, f64 = DType("f32", 32, "float"), DType("f64", 64, "float")
f8e4m3, f8e5m2 = DType("f8e4m3", 8, "float"), DType("f8e5m2", 8, "float")

DTYPES: dict[str, DType] = {t.name: t for t in (i1, i8, i16, i32, i64, f16, bf16, f32, f64, f8e4m3, f8e5m2)}
FP8 = (f8e4m3, f8e5m2)


def multipliable(a: DType, b: DType) -> bool:
    """Whether a matrix product takes operands of these dtypes: alike, or 8-bit floats of either format."""
    return a == b or (a in FP8 and b in FP8)


class Type:
    """Base of all types. Types are immutable, hashable values."""


@dataclass(frozen=True)
class ScalarType(Type):
    """One element, the same in every thread of the program."""

    dtype: DType

    def __str__(self) -> str:
        return str(self.dtype)


@dataclass(frozen=True)
class TileType(Type):
    """An immutable array of static ``shape``; ``layout`` says which thread holds which element.

    ``layout`` is None until the layout pass has run.
    """

    shape: tuple[int, ...]
    dtype: DType
    layout: LinearLayout | None = None

    @cached_property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def rank(self) -> int:
        return len(self.shape)

    def with_layout(self, layout: LinearLayout | None) -> TileType:
        return replace(self, layout=layout)

    def with_dtype(self, dtype: DType) -> TileType:
        return replace(self, dtype=dtype)

    def __str__(self) -> str:
        tail = "" if self.layout is None else f", {self.layout}"
        return f"tile<{_dims(self.shape, self.dtype)}{tail}>"


@dataclass(frozen=True)
class ViewType(Type):
    """A strided view of global memory. Strides count elements; None is known at run time only.

    ``align``: the base address and every run-time stride are multiples of this many bytes.
    ``symmetric``: every rank has such a view at the same place of its own tensor, which comm.peer gives.
    """

    shape: tuple[int | None, ...]
    dtype: DType
    strides: tuple[int | None, ...]
    align: int = 1
    symmetric: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def contiguous_axis(self) -> int | None:
        """The axis of stride one, or None. The last one where several have it."""
        axes = [axis for axis, stride in enumerate(self.strides) if stride == 1]
        return axes[-1] if axes else None

    def __str__(self) -> str:
        strides = ", ".join("?" if s is None else str(s) for s in self.strides)
        tail = ", symmetric" if self.symmetric else ""
        return f"view<{_dims(self.shape, self.dtype)}, strides=[{strides}], align={self.align}{tail}>"


@dataclass(frozen=True)
class SlotType(Type):
    """A reference to one tile in shared memory (LDS)."""

    shape: tuple[int, ...]
    dtype: DType
    layout: SharedLayout

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.bytes

    @property
    def stride(self) -> int:
        """Bytes from one slot of a buffer to the next, which starts where the layout's pattern does."""
        return -(-self.bytes // self.layout.alignment) * self.layout.alignment

    def __str__(self) -> str:
        return f"slot<{_dims(self.shape, self.dtype)}, {self.layout}>"


@dataclass(frozen=True)
class BufferType(Type):
    """``stages`` slots of the same kind, one behind the other in shared memory."""

    stages: int
    slot: SlotType

    @property
    def bytes(self) -> int:
        return (self.stages - 1) * self.slot.stride + self.slot.bytes

    def __str__(self) -> str:
        return f"buffer<{self.stages} x {self.slot}>"


@dataclass(frozen=True)
class RingType(Type):
    """Full and empty barriers that pass ``stages`` stages between producers and consumers."""

    stages: int

    def __str__(self) -> str:
        return f"ring<{self.stages}>"


@dataclass(frozen=True)
class MailboxType(Type):
    """Where each block of a cluster of ``blocks`` gets the others' ``message``, a scalar or a tile without a layout.

    There are two slots with a value of each block, which uses take in turns.
    """

    blocks: int
    message: ScalarType | TileType

    @property
    def values(self) -> int:
        """The elements of a message."""
        return self.message.size if isinstance(self.message, TileType) else 1

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: for each element, a value of each block."""
        return self.blocks * self.values * self.message.dtype.bytes

    def __str__(self) -> str:
        return f"mailbox<{self.blocks} x {self.message}>"


@dataclass(frozen=True)
class TokenType(Type):
    """A handle on asynchronous work. ``kind`` is the unit that completes it.

    tma (bulk copy engine), threads (ordinary stores of the copying threads), cp_async (their asynchronous copies; every
    copy is a group of its own, which `async.wait` counts), mma (matrix unit),
    bulk_store (shared to global by the copy engine), put (a store that a signal publishes to another rank),
    flag (that other ranks have signalled).
    """

    kind: str

    def __str__(self) -> str:
        return f"token<{self.kind}>"


def _dims(shape: tuple[int | None, ...], dtype: DType) -> str:
    return "x".join([*("?" if n is None else str(n) for n in shape), str(dtype)])


def element_type(type_: Type) -> DType:
    """The dtype of a scalar, tile, view or slot."""
    if isinstance(type_, ScalarType | TileType | ViewType | SlotType):
        return type_.dtype
    raise TypeError(f"{type_} has no element type")


def like(type_: Type, dtype: DType) -> Type:
    """The type with the shape and layout of a scalar or tile and another dtype."""
    if isinstance(type_, TileType):
        return type_.with_dtype(dtype)
    if isinstance(type_, ScalarType):
        return ScalarType(dtype)
    raise TypeError(f"{type_} is neither a scalar nor a tile")
