"""Shared memory that single operations borrow: to combine results of warps, and to pass elements between threads.

The shared-memory plan asks `scratch_bytes`, places as many bytes and sets the operation's ``scratch``; the backends
lay the data out as described here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tilewright.ir.cluster_ops import MakeMailbox
from tilewright.ir.core import IRError, Operation
from tilewright.ir.indexed_ops import Atomic
from tilewright.ir.layout import ConversionPlan, LinearLayout, plan_conversion
from tilewright.ir.tile_ops import Convert, Reduce, Reshape, Scan
from tilewright.ir.types import DType, MailboxType, ScalarType, TileType, Type

#: what the scratch of any operation is aligned to, and mailboxes
SCRATCH_ALIGNMENT, MAILBOX_ALIGNMENT = 128, 16
#: the barriers in front of a mailbox's slots
MAILBOX_BARRIERS = 2 * 8

_BANKS = {32: "nvidia", 64: "cdna3"}


def scratch_bytes(op: Operation) -> int:
    """Bytes of shared memory that the operation needs at ``scratch``; 0 where registers and shuffles do."""
    if isinstance(op, Reduce):
        return _reduce_bytes(op)
    if isinstance(op, Convert):
        return convert_plan(op).scratch_bytes
    if isinstance(op, Reshape):
        return _reshape_bytes(op)
    if isinstance(op, Scan):
        return _scan_bytes(op)
    if isinstance(op, Atomic):
        return _atomic_bytes(op)
    return 0


def mailbox_bytes(op: MakeMailbox) -> int:
    """Bytes of a mailbox: the barriers of its two slots, then the slots."""
    assert isinstance(op.result.type, MailboxType)
    return MAILBOX_BARRIERS + 2 * op.result.type.slot_bytes


# --- reductions ---------------------------------------------------------------------------------


def exchange_places(op: Operation) -> int:
    """Into how many equal places, one behind the other, an operation's scratch is divided."""
    return 2 if isinstance(op, Reduce) and op.turn is not None else 1


@dataclass(frozen=True)
class AxisBits:
    """The lane and warp bits that a reduction over one axis combines."""

    lane: tuple[int, ...]
    warp: tuple[int, ...]


def accumulator(dtype: DType) -> int:
    """Bytes of one partial result: small floats are reduced in f32, bools as bytes."""
    return 4 if dtype.is_float and dtype.bits < 32 else dtype.bytes


def axis_bits(layout: LinearLayout, axis: int) -> AxisBits:
    """The thread bits along ``axis``; ValueError where a bit moves along other axes too."""
    found: dict[str, list[int]] = {"lane": [], "warp": []}
    for name, bits in found.items():
        for bit, vector in enumerate(layout.basis(name)):
            if vector[axis]:
                if any(c for other, c in enumerate(vector) if other != axis):
                    raise ValueError(f"{name} bit {bit} moves along several axes: convert the layout")
                bits.append(bit)
    return AxisBits(tuple(found["lane"]), tuple(found["warp"]))


def _reduce_bytes(op: Reduce) -> int:
    type_ = op.source.type
    if not isinstance(type_, TileType) or type_.layout is None:
        raise IRError(f"'{op.name}': the source has no layout", op.loc)
    warps = len(axis_bits(type_.layout, op.axis).warp)
    left = op.result.type.size if isinstance(op.result.type, TileType) else 1
    assert isinstance(op.result.type, TileType | ScalarType)
    return exchange_places(op) * (left << warps) * accumulator(type_.dtype) if warps else 0


# --- scans and atomic updates -------------------------------------------------------------------


@dataclass(frozen=True)
class AxisBit:
    """Who moves along an axis by ``1 << bit``: bit ``position`` of ``dim`` (register, lane or warp)."""

    dim: str
    position: int


def scan_bits(layout: LinearLayout, axis: int) -> tuple[AxisBit, ...]:
    """The owner of each coordinate bit along ``axis`` inside the core, lowest first.

    ValueError where a bit has several owners, or an owner moves along more than that bit.
    """
    owners: dict[int, AxisBit] = {}
    for dim in ("register", "lane", "warp"):
        for position, vector in enumerate(layout.basis(dim)):
            step = vector[axis]
            if not step:
                continue
            if step & (step - 1) or sum(map(bool, vector)) > 1 or step in owners:
                raise ValueError(f"{dim} bit {position} of {layout} shares its way along axis {axis}")
            owners[step] = AxisBit(dim, position)
    count = layout.shape[axis].bit_length() - 1
    if len(owners) != count:
        raise ValueError(f"{layout} does not cover axis {axis}")
    return tuple(owners[1 << bit] for bit in range(count))


def distinct_totals(layout: LinearLayout, axis: int, bit: int) -> int:
    """The totals that a thread holds once its runs of ``1 << bit`` elements along ``axis`` are added up."""
    table = layout.table("register").copy()
    table[:, axis] >>= bit
    return len({tuple(row) for row in table.tolist()})


def _scan_bytes(op: Scan) -> int:
    """Every thread's totals, for the largest exchange between warps."""
    layout, dtype = _source_layout(op, op.source.type)
    threads = layout.num_lanes * layout.num_warps
    bits = [bit for bit, owner in enumerate(scan_bits(layout, op.axis)) if owner.dim == "warp"]
    return max((distinct_totals(layout, op.axis, bit) * threads * accumulator(dtype) for bit in bits), default=0)


def _atomic_bytes(op: Atomic) -> int:
    """The old values of all threads, where warps hold copies of one element."""
    layout, dtype = _source_layout(op, op.value.type)
    threads = layout.num_lanes * layout.num_warps
    return layout.num_registers * threads * dtype.bytes if layout.free_bits("warp") else 0


def _source_layout(op: Operation, type_: Type) -> tuple[LinearLayout, DType]:
    if not isinstance(type_, TileType) or type_.layout is None:
        raise IRError(f"'{op.name}': a tile has no layout", op.loc)
    return type_.layout, type_.dtype


# --- conversions ----------------------------------------------------------------------------------


def convert_plan(op: Convert) -> ConversionPlan:
    """How the conversion is done; scheduling and lowering agree on it. Bools take a byte each."""
    source, result = op.source.type, op.result.type
    if not isinstance(source, TileType) or source.layout is None or not isinstance(result, TileType):
        raise IRError(f"'{op.name}': the source has no layout", op.loc)
    assert result.layout is not None
    banks = _BANKS[source.layout.num_lanes]
    return plan_conversion(source.layout, result.layout, max(8, source.dtype.bits), banks)


# --- reshapes -------------------------------------------------------------------------------------


def renames_registers(source: LinearLayout, result: LinearLayout) -> bool:
    """Whether every thread holds the elements of a reshape's result already, as its source."""
    try:
        return source.reshape(result.tile_shape).register_permutation(result) is not None
    except ValueError:
        return False


def _reshape_bytes(op: Reshape) -> int:
    """The tile, row-major; bools take a byte each."""
    layout, dtype = _source_layout(op, op.source.type)
    result, _ = _source_layout(op, op.result.type)
    return 0 if renames_registers(layout, result) else prod(layout.tile_shape) * dtype.bytes


__all__ = [
    "MAILBOX_ALIGNMENT", "MAILBOX_BARRIERS", "SCRATCH_ALIGNMENT", "AxisBit", "AxisBits", "accumulator", "axis_bits",
    "convert_plan", "distinct_totals", "exchange_places", "mailbox_bytes", "renames_registers", "scan_bits",
    "scratch_bytes",
]  # fmt: skip
