"""The launch contract between a compiled kernel and the runtime.

Kernel arguments are passed in this order, nothing else is implied:

1. for each parameter of the Python function, in order:
   - a tensor: the data pointer, then every run-time dimension (int32, elements), then every
     run-time stride (int64, elements); a symmetric one then the device address of an int64 for each
     rank, the address of that rank's tensor;
   - a scalar: its value;
2. the launch grid (three int32), which a persistent kernel walks and a direct one never reads
   unless the program asks for ``num_programs``;
3. of a kernel that communicates: the own rank and the number of ranks (int32), the address of the own
   control block, and the device address of an int64 for each rank, the address of that rank's;
4. the tensor maps (128-byte CUtensorMap values, NVIDIA only), in the order of ``tensor_maps``; where one
   has ``peers``, the device address of a map for each rank instead.

Ranks reach each other's memory: tensors and control blocks of all ranks have addresses in the own
rank's address space. A control block is `CONTROL_WORDS` int32, zero when it is made; see `Control`.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

#: the most ranks of a world
MOST_RANKS = 64
#: int32 words of a control block
CONTROL_WORDS = 256
#: int32 words of a fault record
FAULT_WORDS = 16


class Control:
    """Places in a control block, in int32 words.

    A launch's number is the epoch plus one; `ENTERED` and `LEFT` hold, for each rank, the number of the last launch
    that it has told to have begun and ended. Flags of kernels hold the number of the launch that set them.
    """

    EPOCH = 0  #: launches of the world that all blocks have begun
    BEGUN = 1  #: blocks of the present launch that have begun it; with `EPOCH` one int64, which they add to
    ENDED = 2  #: blocks of the present launch that have ended, where the ranks end it together
    FAULT = 4  #: two words: the address of the fault record, host memory that the device writes
    TIMEOUT = 6  #: milliseconds after which a wait gives up; 0: never
    ENTERED = 64
    LEFT = 64 + MOST_RANKS


class Fault:
    """Places in a fault record, in int32 words."""

    KIND = 0  #: 1: a wait timed out
    LINE = 1  #: of the wait, or of the call that it was inlined for, in the kernel's source
    FLAG = 2  #: the element of the tensor of flags (row-major), or ENTRY or EXIT
    PEER = 3  #: the rank that is waited for, -1 where that is not known
    RANK = 4  #: the rank that waited
    KERNEL = 5  #: CRC-32 of the kernel's name
    PARAM = 6  #: the parameter that the flag belongs to, among all of the kernel's; -1 for none
    ENTRY, EXIT = -1, -2


def kernel_number(name: str) -> int:
    """The int32 by which a fault record names a kernel."""
    (number,) = struct.unpack("<i", struct.pack("<I", zlib.crc32(name.encode())))
    return int(number)


@dataclass(frozen=True)
class TensorParam:
    """A view of global memory. ``None`` in ``shape`` or ``strides`` is passed at run time."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    strides: tuple[int | None, ...]
    #: every run-time stride and the pointer are multiples of this many bytes (1 = nothing known)
    alignment: int = 1
    #: one such tensor on each rank
    symmetric: bool = False
    #: (2, ...), of which launches use the halves in turn
    turns: bool = False
    #: the copy engine writes it, in pieces of 16 bytes: lines of the contiguous dimension have a whole number of them,
    #: or what follows a line would be overwritten
    whole_lines: bool = False


@dataclass(frozen=True)
class ScalarParam:
    """A run-time scalar, passed by value. ``dtype`` is one of i1 i8 i16 i32 i64 f16 bf16 f32 f64."""

    name: str
    dtype: str


@dataclass(frozen=True)
class TensorMapParam:
    """A TMA descriptor that the runtime encodes from a tensor argument at launch.

    ``box`` is in the tensor's own dimension order (outermost first, elements); ``order`` lists the
    tensor's dimensions from the contiguous one outwards, which is the order CUtensorMap wants.
    ``swizzle`` is 0, 32, 64 or 128 bytes. With ``peers`` there is one for the tensor of each rank.
    """

    param: str
    box: tuple[int, ...]
    order: tuple[int, ...]
    swizzle: int
    peers: bool = False


@dataclass(frozen=True)
class KernelABI:
    """Everything that the runtime must know to launch one entry point of a binary."""

    name: str
    params: tuple[TensorParam | ScalarParam, ...]
    threads: int
    shared_bytes: int
    tensor_maps: tuple[TensorMapParam, ...] = ()
    #: launch min(product of the grid, resident blocks of the device) one-dimensional blocks
    persistent: bool = False
    #: blocks of this kernel that fit on one SM or CU at once (for persistent launches)
    blocks_per_unit: int = 1
    #: programs of the grid, along each axis, that run in one cluster of as many blocks (persistent launches)
    cluster: tuple[int, int, int] = (1, 1, 1)
    #: blocks of a cluster, neighbours along x, that run one program together
    spread: int = 1
    #: the ranks of a world launch this kernel together
    communicates: bool = False
    #: every thread waits for the launch before this one ahead of its first access to global memory, so that the
    #: blocks may start while that one still runs
    awaits_grid: bool = False
    #: the file of the kernel's source, for messages
    source: str = ""

    @property
    def cluster_blocks(self) -> int:
        """Blocks of a cluster."""
        return prod(self.cluster) * self.spread

    def direct_blocks(self, counts: tuple[int, int, int]) -> tuple[int, int, int]:
        """The blocks of a launch that is not persistent: those of each program."""
        return counts[0] * self.spread, counts[1], counts[2]

    def persistent_blocks(self, counts: tuple[int, int, int], resident_clusters: int) -> int:
        """The blocks of a persistent launch over a grid: whole clusters, at most as many as run at once."""
        groups = prod(-(-count // size) for count, size in zip(counts, self.cluster, strict=True))
        return min(groups, resident_clusters) * self.cluster_blocks

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form; `from_json` is its inverse."""
        params = [dict(asdict(p), kind=type(p).__name__) for p in self.params]
        return dict(asdict(self), params=params)

    @staticmethod
    def from_json(data: dict[str, Any]) -> KernelABI:
        def param(entry: dict[str, Any]) -> TensorParam | ScalarParam:
            fields = {k: v for k, v in entry.items() if k != "kind"}
            if entry["kind"] == "ScalarParam":
                return ScalarParam(**fields)
            fields["shape"], fields["strides"] = tuple(fields["shape"]), tuple(fields["strides"])
            return TensorParam(**fields)

        maps = tuple(
            TensorMapParam(m["param"], tuple(m["box"]), tuple(m["order"]), m["swizzle"], m.get("peers", False))
            for m in data["tensor_maps"]
        )
        rest = {k: v for k, v in data.items() if k not in ("params", "tensor_maps", "cluster")}
        x, y, z = data.get("cluster", (1, 1, 1))
        return KernelABI(params=tuple(param(p) for p in data["params"]), tensor_maps=maps, cluster=(x, y, z), **rest)
