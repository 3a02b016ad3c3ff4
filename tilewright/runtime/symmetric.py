"""Symmetric tensors: one of the same shape and dtype on each rank of a world, which all ranks reach.

`SymmetricHeap` is the part of a world (`tw.World`) that knows no compiler: it makes the tensors, keeps the
control blocks that communicating kernels share, and explains why one gave up waiting.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from types import TracebackType
from typing import Any

import numpy as np

from tilewright.ir.abi import CONTROL_WORDS, Control
from tilewright.ir.interpreter_numerics import NUMPY
from tilewright.ir.types import DTYPES, DType
from tilewright.runtime.arguments import TensorView, Viewed, canonical_dtype, read_tensor, row_major
from tilewright.runtime.emulated import host_view
from tilewright.runtime.errors import ArgumentError, DeviceError
from tilewright.runtime.fault_record import FaultRecord
from tilewright.runtime.peers import Endpoint, SymmetricPlace, address_table
from tilewright.runtime.symmetric_memory import Allocation, Copy, Run, SymmetricMemory

#: bytes of the smallest allocation, so that empty tensors have an address too
_LEAST_BYTES = 16


class SymmetricTensor(Viewed):
    """A tensor on every rank, of one ``shape`` and ``dtype`` (the IR's name: "bf16"), row-major.

    ``x[r]`` is the array of a rank of this process, ``x.local`` that of the only one: a torch tensor on GPUs
    where torch is loaded, else a `DeviceArray`; a NumPy array in worlds without GPUs. ``x.rank`` is the rank whose
    kernels this object is an argument of, None while it stands for all ranks of one process. Arrays must not be
    used after the world has been closed.
    """

    def __init__(
        self,
        heap: SymmetricHeap,
        allocation: Allocation,
        shape: tuple[int, ...],
        dtype: str,
        places: Mapping[int, SymmetricPlace],
    ) -> None:
        self.heap, self.shape, self.dtype = heap, shape, dtype
        self.allocation, self._places = allocation, places
        ranks = heap.memory.ranks
        #: the arrays of this process's ranks, and the tensor as their kernels get it
        self.arrays = [heap.memory.array(rank, allocation, shape, dtype) for rank in ranks]
        self.bound = [BoundTensor(self, rank, places[rank]) for rank in ranks]
        self.rank: int | None = ranks[0] if len(ranks) == 1 else None

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where each rank's tensor lies in this process's address space."""
        return self.allocation.addresses

    @property
    def nbytes(self) -> int:
        """Bytes of one rank's tensor."""
        return prod(self.shape) * DTYPES[self.dtype].bytes

    @property
    def local(self) -> Any:
        """The array of this process's rank. ArgumentError where it has several."""
        if self.rank is None:
            raise ArgumentError(f"This process has {self.heap.size} ranks: write x[rank] for the array of one.")
        return self.arrays[0]

    def __getitem__(self, rank: int) -> Any:
        return self.arrays[self._index(rank)]

    def on(self, rank: int) -> BoundTensor:
        """This tensor as an argument of a rank's kernel."""
        return self.bound[self._index(rank)]

    def _index(self, rank: int) -> int:
        ranks = list(self.heap.memory.ranks)
        if rank not in ranks:
            raise ArgumentError(f"Rank {rank} is not of this process; it has rank {ranks}.")
        return ranks.index(rank)

    def part(self, index: tuple[int, ...]) -> tuple[int, int]:
        """Where ``self[index]`` begins, an index of leading dimensions, and its size, both in bytes."""
        sizes = self.shape[: len(index)]
        if len(index) > len(self.shape) or any(not 0 <= i < size for i, size in zip(index, sizes, strict=True)):
            raise ArgumentError(f"{self!r} has no part {index}.")
        nbytes = prod(self.shape[len(index) :]) * DTYPES[self.dtype].bytes
        return sum(i * step for i, step in zip(index, row_major(sizes), strict=True)) * nbytes, nbytes

    def reshape(self, *shape: int) -> SymmetricTensor:
        """The same elements, on every rank, under another shape."""
        if prod(shape) != prod(self.shape):
            raise ArgumentError(f"{self!r} cannot take the shape {list(shape)}: it has {prod(self.shape)} elements.")
        return SymmetricTensor(self.heap, self.allocation, shape, self.dtype, self._places)

    @property
    def view(self) -> TensorView:
        if self.rank is None:
            raise ArgumentError(f"{self!r}, all in this process: launch with world.launch(kernel, grid, ...).")
        return self.bound[0].view

    @property
    def device(self) -> str:
        """The device that a launch on it runs on."""
        return self.bound[0].device

    def __repr__(self) -> str:
        return f"<symmetric {self.dtype} tensor {list(self.shape)} on {self.heap.size} ranks>"


#: a tensor, the rank whose it is, and an index of leading dimensions
Part = tuple[SymmetricTensor, int, tuple[int, ...]]
#: flags, where ranks are told what they hold, a tensor (n, world, *flags.shape), and an index into that
Tell = tuple[SymmetricTensor, SymmetricTensor, int]
#: a rank of this process, the stream that its copies begin behind, and these
Started = tuple[int, Any, Sequence[Run]]


class BoundTensor(Viewed):
    """A symmetric tensor as one rank's kernel gets it."""

    def __init__(self, tensor: SymmetricTensor, rank: int, place: SymmetricPlace) -> None:
        self.tensor, self.rank = tensor, rank
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.device = tensor.heap.memory.device(rank)
        self._view = TensorView(tensor.addresses[rank], self.shape, row_major(self.shape), self.dtype, None, place)

    @property
    def array(self) -> Any:
        """The rank's array."""
        return self.tensor[self.rank]

    @property
    def view(self) -> TensorView:
        if self.tensor.heap.closed:
            raise ArgumentError("The tensor's world has been closed, and its memory given back.")
        return self._view


@dataclass(frozen=True)
class Copies:
    """Copies in progress: for each rank of this process its stream, and the copies in their order.

    What ranks are told behind a copy belongs to it.
    """

    memory: SymmetricMemory
    started: Sequence[tuple[int, Any, list[Any]]]
    #: each rank's follow one another
    ordered: bool

    def join(self, count: int | None = None) -> None:
        """Let the streams wait for the first ``count`` copies of each rank (None: for all)."""
        for rank, stream, copies in self.started:
            first = copies[:count]
            for copy in first[-1:] if self.ordered else first:
                self.memory.join(rank, copy, stream)

    @property
    def streams(self) -> list[Any]:
        """Streams, by rank of this process: what they are given follows the copies, if these are ordered. `rejoin`!"""
        return [self.memory.side_stream(rank) for rank, _, _ in self.started]

    def rejoin(self) -> None:
        """Let the streams wait for all that `streams` have been given."""
        for rank, stream, _ in self.started:
            self.memory.rejoin(rank, stream)


class SymmetricHeap:
    """Symmetric tensors of one world, from one provider of memory.

    ``timeout``: seconds after which a kernel that waits for another rank gives up; 0: never.
    """

    def __init__(self, memory: SymmetricMemory, timeout: float = 30.0) -> None:
        self.memory = memory
        self.timeout = timeout
        self.closed = False
        #: of this process's ranks
        self.devices = [memory.device(rank) for rank in memory.ranks]
        #: tensors that kernels keep for their next launches, by what they are for
        self.workspaces: dict[Any, SymmetricTensor] = {}
        self.endpoints: dict[int, Endpoint] = {}
        self.faults: dict[int, FaultRecord] = {}
        try:
            self.control = memory.allocate(4 * CONTROL_WORDS)
            for rank in memory.ranks:
                self.endpoints[rank], self.faults[rank] = self._endpoint(rank)
                memory.explain(rank, self.faults[rank].message)
            memory.barrier()  # no rank writes to another's control block before it has been cleared
        except BaseException:
            memory.close()
            raise

    def _endpoint(self, rank: int) -> tuple[Endpoint, FaultRecord]:
        memory, controls = self.memory, self.control.addresses
        table = memory.place(rank, address_table(controls))
        endpoint = Endpoint(
            rank, memory.size, controls, table, lambda data: memory.place(rank, data), memory.uses_torch
        )
        shared = memory.fault_record(rank)
        words = np.zeros(CONTROL_WORDS, np.int32)
        words[Control.FAULT : Control.FAULT + 2] = np.array([shared.address], np.uint64).view(np.int32)
        words[Control.TIMEOUT] = min(round(self.timeout * 1000), 2**31 - 1)
        memory.fill(rank, self.control, words)
        return endpoint, FaultRecord(shared.words, endpoint, self.timeout)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.memory.size

    @property
    def ranks(self) -> Sequence[int]:
        """The ranks of this process."""
        return self.memory.ranks

    @property
    def rank(self) -> int:
        """The rank of this process. ArgumentError where it has several."""
        if len(self.memory.ranks) != 1:
            raise ArgumentError(f"This process has all {self.size} ranks of its world: it is none of them alone.")
        return self.memory.ranks[0]

    # --- tensors, made by all ranks in the same order ---------------------------------------------------

    def empty(self, shape: int | Sequence[int], dtype: Any) -> SymmetricTensor:
        """A tensor of ``shape`` (int or several) on each rank, with any contents.

        ``dtype``: a name ("bf16", "float32"), or a dtype of tilewright, torch or NumPy. DeviceError on every
        rank where ranks ask for different ones.
        """
        if self.closed:
            raise DeviceError("The world has been closed.")
        sizes = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
        kind = dtype_of(dtype)
        if not sizes or min(sizes) < 0:
            raise ArgumentError(f"A symmetric tensor has one or more dimensions, none negative, not {sizes}.")
        self.memory.agree("the tensor to make", f"{kind} {list(sizes)}")
        allocation = self.memory.allocate(max(prod(sizes) * kind.bytes, _LEAST_BYTES))
        table = address_table(allocation.addresses)
        places = {
            rank: SymmetricPlace(endpoint, allocation.addresses, self.memory.place(rank, table))
            for rank, endpoint in self.endpoints.items()
        }
        return SymmetricTensor(self, allocation, sizes, kind.name, places)

    def zeros(self, shape: int | Sequence[int], dtype: Any) -> SymmetricTensor:
        """Like `empty`, filled with zeros on every rank before any rank returns."""
        tensor = self.empty(shape, dtype)
        for rank in self.memory.ranks:
            self.memory.fill(rank, tensor.allocation, None)
        self.memory.barrier()
        return tensor

    def flags(self, *shape: int | Sequence[int]) -> SymmetricTensor:
        """Flags for `tw.signal` and `tw.wait`: int32, none of them set. Only kernels may write to them."""
        sizes = [n for part in shape for n in ([part] if isinstance(part, int) else part)]
        return self.zeros(sizes, "i32")

    def tensor(self, values: Any) -> SymmetricTensor:
        """A tensor with values: an array of this process's rank, or a list of one for each rank.

        Takes NumPy arrays and torch tensors, which are copied; shape and dtype are theirs.
        """
        ranks = self.memory.ranks
        given = values if isinstance(values, list | tuple) else [values] * len(ranks)
        if len(given) != len(ranks):
            raise ArgumentError(f"There are {len(ranks)} ranks in this process, and {len(given)} arrays for them.")
        kinds = {(tuple(array.shape), dtype_of(array.dtype)) for array in given}
        if len(kinds) != 1:
            listing = ", ".join(f"{dtype} {list(shape)}" for shape, dtype in kinds)
            raise ArgumentError(
                f"The arrays of the ranks differ: {listing}. A symmetric tensor has one shape and dtype."
            )
        shape, dtype = kinds.pop()
        tensor = self.empty(shape, dtype)
        for rank, array in zip(ranks, given, strict=True):
            self.memory.fill(rank, tensor.allocation, array)
        self.memory.barrier()
        return tensor

    # --- copies by the GPUs' copy engines -----------------------------------------------------------------

    def push(self, source: Any, target: SymmetricTensor, stream: Any = None, tell: Tell | None = None) -> None:
        """Copy parts to all ranks: ``target[r]`` of rank p becomes ``source[p]`` of rank r.

        ``source``: an array of this process's rank, a list of one for each, or a symmetric tensor; of the target's
        shape (world, ...) and dtype, row-major. It is queued on ``stream`` like a launch, with no wait for other
        ranks: kernels before and behind must see to it that all may write and that all have
        (`tilewright.kernels.multi_gpu.copy_engine`). ``tell``: as of `start_push`.
        """
        started = self._pushes(source, target, stream, range(1, self.size + 1), tell=tell)
        others = self._start([(rank, queue, runs[1:]) for rank, queue, runs in started], ordered=False)
        for rank, queue, runs in started:
            for copy in chain.from_iterable(runs[:1]):  # in the stream itself: costs less than to wait for another one
                self.memory.copy(rank, copy, queue)
        others.join()

    def start_push(
        self,
        source: Any,
        target: SymmetricTensor,
        stream: Any = None,
        rows: tuple[int, int] | None = None,
        tell: Tell | None = None,
    ) -> Copies:
        """Start what `push` does with the parts for other ranks, beside what ``stream`` is given from now on.

        `Copies.join` lets the stream wait. ``rows``: of each part only those from the first to before the last.
        ``tell``: behind each copy the rank's ``flags`` go to ``places[index, rank]`` of the rank that it is for, where
        kernels may wait for them (`tw.wait`, ``earlier``).
        """
        return self._start(self._pushes(source, target, stream, range(1, self.size), rows, tell), ordered=False)

    def _pushes(
        self,
        source: Any,
        target: SymmetricTensor,
        stream: Any,
        hops: Sequence[int],
        rows: tuple[int, int] | None = None,
        tell: Tell | None = None,
    ) -> list[Started]:
        """Of each rank of this process its stream and the copies to ranks so many ``hops`` behind it."""
        if target.shape[0] != self.size:
            raise ArgumentError(f"{target!r} cannot be pushed to: its shape must be (world, ...).")
        part, started = target.nbytes // self.size, list[Started]()
        first, nbytes = _of_part(target, rows)
        for i, (rank, array) in enumerate(zip(self.ranks, self._by_process(source), strict=True)):
            address, runs = self._dense(array, target.shape, target.dtype, f"pushed to {target!r}"), []
            for peer in [(rank + hop) % self.size for hop in hops if nbytes]:
                copy = (target.addresses[peer] + rank * part + first, address + peer * part + first, nbytes)
                runs.append([copy, *self._told(rank, peer, tell)])
            started.append((rank, self._of(stream, i), runs))
        return started

    def spread(
        self,
        tensor: SymmetricTensor,
        stream: Any = None,
        rows: tuple[int, int] | None = None,
        tell: Tell | None = None,
    ) -> Copies:
        """Start copying each rank's own part, ``tensor[rank]`` of (world, ...), to the same place of all others.

        To the next rank first, then to the one behind it, beside what ``stream`` is given from now on: `Copies.join`
        lets it wait. As with `push` nobody waits for other ranks. ``rows``, ``tell``: as of `start_push`.
        """
        if tensor.shape[0] != self.size:
            raise ArgumentError(f"{tensor!r} cannot be spread: its shape must be (world, ...).")
        part, started = tensor.nbytes // self.size, list[Started]()
        first, nbytes = _of_part(tensor, rows)
        for i, rank in enumerate(self.ranks):
            places, runs = [address + rank * part + first for address in tensor.addresses], []
            for peer in [(rank + hop) % self.size for hop in range(1, self.size) if nbytes]:
                runs.append([(places[peer], places[rank], nbytes), *self._told(rank, peer, tell)])
            started.append((rank, self._of(stream, i), runs))
        return self._start(started, ordered=True)

    def _told(self, rank: int, peer: int, tell: Tell | None) -> list[Copy]:
        """The copy of a rank's flags to another one."""
        if tell is None or peer == rank:
            return []
        flags, places, index = tell
        start, nbytes = places.part((index, rank))
        if nbytes != flags.nbytes:
            raise ArgumentError(f"{flags!r} cannot be told in {places!r}: its shape must be (n, world, *flags.shape).")
        return [(places.addresses[peer] + start, flags.addresses[rank], nbytes)]

    def fetch(self, source: SymmetricTensor, target: Any, stream: Any = None) -> Copies:
        """Start copying every rank's ``source`` to ``target[r]``, the next rank's first and the own one last.

        As with `spread` it runs beside what ``stream`` is given from now on. ``target``: an array of this process's
        rank, or a list of one for each, in any memory, row-major, of shape (world, *source.shape) and the source's
        dtype. Nobody waits until what is read is there: a kernel before must.
        """
        started: list[Started] = []
        for i, (rank, array) in enumerate(zip(self.ranks, self._by_process(target), strict=True)):
            address = self._dense(array, (self.size, *source.shape), source.dtype, f"filled from {source!r}")
            peers = [(rank + 1 + hop) % self.size for hop in range(self.size)]
            size = source.nbytes
            runs = [[(address + p * size, source.addresses[p], size)] for p in peers if size]
            started.append((rank, self._of(stream, i), runs))
        return self._start(started, ordered=True)

    def fill_own(self, target: SymmetricTensor, source: Any, stream: Any = None) -> None:
        """Copy each rank's array ``source`` to its own ``target``, queued on ``stream`` like a launch.

        Both have one shape and dtype, and the array is row-major. ``source`` may be a list of one for each rank.
        """
        started: list[Started] = []
        for i, (rank, array) in enumerate(zip(self.ranks, self._by_process(source), strict=True)):
            address = self._dense(array, target.shape, target.dtype, f"copied to {target!r}")
            runs = [[(target.addresses[rank], address, target.nbytes)]] if target.nbytes else []
            started.append((rank, self._of(stream, i), runs))
        self._start(started, ordered=True).join()

    def pull(self, wanted: Callable[[int], Sequence[Part]], stream: Any = None, ordered: bool = True) -> Copies:
        """Start copying parts of other ranks' tensors to the same places of the own ones.

        One after the other, or beside each other if not ``ordered``.
        ``wanted(rank)``: what a rank wants, in order: (tensor, peer, index) for ``tensor[index]`` of rank ``peer``,
        with an ``index`` of leading dimensions. The copies run beside what ``stream`` is given from now on. As with
        `push` nobody waits for other ranks.
        """
        started: list[Started] = []
        for i, rank in enumerate(self.ranks):
            runs = []
            for tensor, peer, index in wanted(rank):
                start, nbytes = tensor.part(index)
                if nbytes:
                    runs.append([(tensor.addresses[rank] + start, tensor.addresses[peer] + start, nbytes)])
            started.append((rank, self._of(stream, i), runs))
        return self._start(started, ordered)

    def _start(self, started: Sequence[Started], ordered: bool) -> Copies:
        memory = self.memory
        events = [(rank, stream, memory.start_copies(rank, runs, stream, ordered)) for rank, stream, runs in started]
        return Copies(memory, events, ordered)

    def _of(self, stream: Any, index: int) -> Any:
        return stream[index] if isinstance(stream, list) else stream

    def _by_process(self, arrays: Any) -> Sequence[Any]:
        """The array of each of this process's ranks."""
        return arrays if isinstance(arrays, list) else getattr(arrays, "arrays", [arrays] * len(self.ranks))

    def _dense(self, array: Any, shape: tuple[int, ...], dtype: str, use: str) -> int:
        """The address of an array that copy engines take. ArgumentError unless it is row-major, of that form."""
        view = host_view(array, "source") if self.devices[0].startswith(("cpu", "emulate")) else tensor_view(array)
        found, dense = canonical_dtype(view.dtype), row_major(view.shape)
        if (tuple(view.shape), found) != (tuple(shape), dtype):
            raise ArgumentError(f"A {found} array {list(view.shape)} cannot be {use}: {dtype} {list(shape)} can.")
        if any(size > 1 and step != wanted for size, step, wanted in zip(view.shape, view.strides, dense, strict=True)):
            raise ArgumentError(f"What is {use} must be row-major: pass a contiguous copy.")
        return view.address

    # --- the ranks together -------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Wait for the kernels of this process's ranks. DeviceError says whom one waited for in vain."""
        try:
            self.memory.synchronize()
        except DeviceError as error:
            self.check(error)
            raise
        self.check()

    def check(self, error: Exception | None = None) -> None:
        """DeviceError if a kernel of this process gave up waiting; for use after torch reported a failed launch."""
        for record in self.faults.values():
            message = record.message()
            if message is not None:
                raise DeviceError(message, getattr(error, "code", None)) from error

    def barrier(self) -> None:
        """Wait for this process's kernels and then for all processes. DeviceError when a rank is gone."""
        self.synchronize()
        self.memory.barrier()

    def close(self) -> None:
        """Give the memory back: collective. Tensors of this world and arrays in them must not be used any more."""
        if not self.closed:
            self.closed = True
            self.memory.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _of_part(tensor: SymmetricTensor, rows: tuple[int, int] | None) -> tuple[int, int]:
    """Where rows of each part of a tensor (world, R, ...) begin, and their size, in bytes; None: all of the part."""
    part = tensor.nbytes // tensor.shape[0]
    first, end = (0, part) if rows is None else (row * part // tensor.shape[1] for row in rows)
    return first, end - first


def tensor_view(array: Any) -> TensorView:
    """Where an array in a GPU's memory lies."""
    return read_tensor(array, "source", sys.modules.get("torch"))[0]


def dtype_of(dtype: Any) -> DType:
    """The IR's dtype of a name or of another library's dtype. ArgumentError for others."""
    if isinstance(dtype, type):  # np.float32 as opposed to np.dtype("float32")
        dtype = np.dtype(dtype)
    name = canonical_dtype(str(getattr(dtype, "name", dtype)))
    found = DTYPES.get(name)
    if found is None or found not in NUMPY:
        raise ArgumentError(f"{dtype!r} is no dtype of a tensor; there are: {', '.join(kind.name for kind in NUMPY)}.")
    return found
