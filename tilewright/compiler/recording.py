"""Launches as programs of the extension `tilewright.runtime.native.extension`, which repeats them without Python.

A program is recorded at the second call with arguments of some kinds: a single launch, or all launches that a function
makes between its arguments and its results.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import TYPE_CHECKING, Any

from tilewright.runtime import native
from tilewright.runtime.device import open_device

if TYPE_CHECKING:
    from tilewright.compiler.kernel import Kernel
    from tilewright.compiler.launch import Launch

#: the recording that is under way in a thread, by the thread's number
recordings: dict[int, Recording] = {}
if native.extension is not None:
    native.extension.watch(recordings)
#: programs kept in a table
MOST_PROGRAMS = 1024
#: positions of a call whose numbers may be arguments of kernels: as many as a word has bits
_POSITIONS = 64
#: how the extension writes a number: (type of the argument, dtype of the parameter) -> its code
_ADDRESS = 0
_CODES: dict[tuple[type, str], int] = {
    (int, "i32"): 1,
    (int, "i64"): 2,
    (float, "f32"): 3,
    (float, "f64"): 4,
    (int, "f32"): 5,
    (int, "f64"): 6,
}


# --- single launches --------------------------------------------------------------------------------


def launch_table(kernel: Kernel, bind: Callable[[Any, Any], Launch], device: Any) -> Any:
    """A table of a kernel's launches on torch tensors, called with grid, device and arguments; None without extension.

    ``bind`` makes a launch that does not look for a table; ``device`` is where one has run.
    """
    host = native.host(device)
    if host is None:
        return None

    def slow(grid: Any, device: Any, /, *args: Any, **kwargs: Any) -> None:
        bind(grid, device).start(*args, **kwargs)

    def record(grid: Any, device: Any, /, *args: Any, **kwargs: Any) -> tuple[None, Any]:
        launch = bind(grid, device)
        launch.start(*args, **kwargs)
        kwargs.pop("stream", None)
        return None, _launch_program(launch.plan(args, kwargs), grid, args, kwargs)

    numbers = 0
    for i, name in enumerate(kernel.positional_names):
        if kernel.definition.parameter[name].kind in ("scalar", "plain") and i + 2 < _POSITIONS:
            numbers |= 1 << (i + 2)
    return native.extension.Table(
        host=host, slow=slow, record=record, recorded=None, launches=True, numbers=numbers, most=MOST_PROGRAMS
    )


def _launch_program(plan: Any, grid: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    form = plan.form(grid, args, kwargs)
    if form is None:
        return None
    named = {name: 2 + len(args) + i for i, name in enumerate(kwargs)}
    places = [2 + s if isinstance(s, int) else None if s is None else named[s] for s in plan.sources]
    values = plan.values(args, kwargs)
    patches, maps = [], []
    for offset, index in form.tensors:
        if places[index] is None:
            return None
        patches.append((offset, _ADDRESS, places[index], 0))
    for offset, index, dtype in form.scalars:
        if isinstance(plan.sources[index], int) and not isinstance(values[index], bool):
            code = _CODES.get((type(values[index]), dtype))
            if code is None:
                return None
            patches.append((offset, code, places[index], 0))
    for offset, index, *rest in form.maps:
        maps.append((offset, places[index], 0, *rest))
    return _program(form.device, [_start(form, patches, maps)], (), (), False, plan)


def _start(form: Any, patches: Iterable[Any], maps: Iterable[Any]) -> tuple[Any, ...]:
    launch = form.function, tuple(form.blocks), form.threads, form.shared_bytes, form.early, form.image, form.offsets
    return (*launch, tuple(patches), tuple(maps))


def _program(device: Any, starts: Sequence[Any], allocations: Any, results: Any, single: bool, keep: Any) -> Any:
    try:
        return native.extension.Program(
            context=device.context,
            ordinal=device.ordinal,
            starts=tuple(starts),
            allocations=tuple(allocations),
            results=tuple(results),
            single=single,
            keep=keep,
        )
    except ValueError:  # more arguments than it takes
        return None


# --- all launches of a function ---------------------------------------------------------------------


class Recording:
    """The launches that a function makes on torch tensors: those given, views of them, and new ones.

    Whoever runs the function tells what happens to tensors (`made`, `viewed`) and what else happens (`fail`).
    ``arguments``: those of the call, tensors among them each an object of its own.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        self._count = len(arguments)
        #: object -> (place among values, address there); objects are kept, so that none takes another's identity
        self._places = {id(x): (i, x.data_ptr()) for i, x in enumerate(arguments) if hasattr(x, "data_ptr")}
        self._kept: list[Any] = list(arguments)
        self._allocations: list[Any] = []
        self._starts: list[Any] = []
        self._plans: list[Any] = []
        self._device: Any = None
        self.failure: str | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the function runs, in this thread."""
        recordings[get_ident()] = self
        try:
            yield
        finally:
            del recordings[get_ident()]

    def fail(self, reason: str) -> None:
        """No program can do what happened."""
        self.failure = self.failure or reason

    def made(self, tensor: Any) -> None:
        """A new tensor, of undefined content."""
        self._places[id(tensor)] = self._count + len(self._allocations), tensor.data_ptr()
        self._allocations.append(tensor)
        self._kept.append(tensor)

    def viewed(self, tensor: Any, source: Any) -> None:
        """A new tensor in the memory of another."""
        place = self._places.get(id(source))
        if place is None:
            self.fail("a view of a tensor from elsewhere")
        elif id(tensor) not in self._places:
            self._places[id(tensor)] = place
            self._kept.append(tensor)

    def launch(self, plan: Any, grid: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], stream: Any) -> None:
        """A launch, told by `tilewright.compiler.launch`."""
        form = plan.form(grid, args, kwargs) if stream is None else None
        if form is None or (self._device is not None and form.device is not self._device):
            self.fail("a launch that is not repeated")
            return
        self._device = form.device
        tensors = plan.values(args, kwargs)
        sources = {}
        for _, index in form.tensors:
            place = self._places.get(id(tensors[index]))
            if place is None:
                self.fail("a tensor from elsewhere")
                return
            sources[index] = place[0], tensors[index].data_ptr() - place[1]
        patches = [(offset, _ADDRESS, *sources[index]) for offset, index in form.tensors]
        maps = [(offset, *sources[index], *rest) for offset, index, *rest in form.maps]
        self._starts.append((form, patches, maps))
        self._plans.append(plan)

    def program(self, results: Any) -> Any:
        """The program that makes such results (a tensor or a tuple of them), or None."""
        single = not isinstance(results, tuple)
        wanted: list[int] = []
        shapes: list[Any] = []
        for x in (results,) if single else results:
            place = self._places.get(id(x), (-1, 0))
            index = place[0] - self._count
            if index < 0 or index in wanted or x.data_ptr() != place[1] or not _whole(x, self._allocations[index]):
                self.fail("a result that is no new tensor")
                break
            shapes.append((tuple(x.shape), tuple(x.stride()), x.dtype))
            wanted.append(index)
        if self.failure is not None or self._device is None or not wanted:
            return None
        count, places = len(wanted), {self._count + index: (self._count + i, 0) for i, index in enumerate(wanted)}
        size = 0
        for index, x in enumerate(self._allocations):
            if index not in wanted:  # all that only kernels see lies in one new tensor
                places[self._count + index] = self._count + count, size
                size += -(-x.untyped_storage().nbytes() // _SCRATCH_ALIGNMENT) * _SCRATCH_ALIGNMENT
        if size:
            shapes.append(((size,), (1,), sys.modules["torch"].uint8))
        if len(shapes) + self._count > _MOST_VALUES:
            return None

        def placed(entries: Iterable[Any], at: int) -> Iterator[Any]:
            for entry in entries:
                source, add = places.get(entry[at], (entry[at], 0))
                yield (*entry[:at], source, entry[at + 1] + add, *entry[at + 2 :])

        starts = [_start(form, placed(patches, 2), placed(maps, 1)) for form, patches, maps in self._starts]
        return _program(self._device, starts, shapes, range(count), single, self._plans)


#: arguments and new tensors of a program
_MOST_VALUES = 48
#: of what only kernels see, in bytes: that of torch's own allocations on a GPU
_SCRATCH_ALIGNMENT = 512


def _whole(view: Any, made: Any) -> bool:
    """Whether a view shows all of a new tensor's memory, which may be none."""
    extents = [sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) for x in (view, made)]
    return view.dtype == made.dtype and extents[0] == extents[1] and view.numel() == made.numel()


def repeated(
    function: Callable[..., Any], run: Callable[..., Any], place: str, recorded: Callable[..., Any] | None = None
) -> Any:
    """A callable that does what ``function`` does on torch tensors, repeating its launches without Python.

    None where it cannot be had for the device called ``place``. ``run(recording, args, kwargs)`` does the same and
    tells the `Recording` what happens to tensors. The function's results are new tensors, and what it does must follow
    from the kinds of its arguments: shapes, strides, dtypes and alignment of tensors, and the values of others.
    ``recorded`` is called instead of ``function`` where torch records gradients.
    """
    host = native.host(open_device(place))
    if host is None:
        return None

    def record(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        args = tuple(map(_apart, args))
        kwargs = {name: _apart(value) for name, value in kwargs.items()}
        recording = Recording([*args, *kwargs.values()])
        with recording.running():
            results = run(recording, args, kwargs)
        return results, recording.program(results)

    return native.extension.Table(
        host=host, slow=function, record=record, recorded=recorded, launches=False, numbers=0, most=MOST_PROGRAMS
    )


def _apart(value: Any) -> Any:
    """A tensor as an object of its own, so that one that is passed twice is told apart."""
    return value.detach() if hasattr(value, "detach") else value


def recording() -> bool:
    """Whether launches of this thread are being recorded: what passes between them has to be new memory."""
    return get_ident() in recordings


__all__ = ["Recording", "launch_table", "recording", "recordings", "repeated"]
