"""Measuring callables on a device: medians of many short runs, rivals in the same run.

Times are microseconds. On a GPU they come from events on the current stream, so they are the
device's time, not Python's. GPUs change their clocks with power and heat within seconds; `compare`
therefore takes turns between its candidates, and its ratios are of neighbouring runs.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from statistics import median
from types import ModuleType
from typing import Any

from tilewright.runtime.cuda import CudaDevice
from tilewright.runtime.device import Device
from tilewright.runtime.errors import DeviceError

#: what the flush writes when the size of the last-level cache is unknown
_DEFAULT_FLUSH_BYTES = 256 * 2**20
#: idle time queued before each sample, in cycles (about 140 us): while the GPU spins, Python
#: queues the events and the call, so that short kernels are not timed with their launch
_LEAD_CYCLES = 250_000


@dataclass(frozen=True)
class Measurement:
    """Times of one callable, in the order they were taken."""

    name: str
    times_us: tuple[float, ...]

    @property
    def median_us(self) -> float:
        return median(self.times_us)

    @property
    def min_us(self) -> float:
        return min(self.times_us)

    @property
    def p20_us(self) -> float:
        return self.quantile_us(0.2)

    @property
    def p80_us(self) -> float:
        return self.quantile_us(0.8)

    def quantile_us(self, fraction: float) -> float:
        """The time below which ``fraction`` of the runs lie, interpolated."""
        ordered = sorted(self.times_us)
        position = fraction * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    def tflops(self, operations: float) -> float:
        """TFLOP/s at the median, for that many floating-point operations a call."""
        return operations / self.median_us / 1e6

    def terabytes_per_second(self, transferred: float) -> float:
        """TB/s at the median, for that many bytes a call."""
        return transferred / self.median_us / 1e6

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "median_us": self.median_us,
            "min_us": self.min_us,
            "p20_us": self.p20_us,
            "p80_us": self.p80_us,
            "repeats": len(self.times_us),
        }


@dataclass(frozen=True)
class Comparison:
    """Measurements whose runs alternated: the i-th times of all names were taken together."""

    measurements: dict[str, Measurement]

    def __getitem__(self, name: str) -> Measurement:
        return self.measurements[name]

    def speedup(self, name: str, over: str) -> float:
        """How many times as fast ``name`` is as ``over``: the median of the rounds' ratios."""
        pairs = zip(self[over].times_us, self[name].times_us, strict=True)
        return median(theirs / ours for theirs, ours in pairs)

    def to_json(self) -> dict[str, Any]:
        return {name: measurement.to_json() for name, measurement in self.measurements.items()}


class Clock(ABC):
    """Takes time stamps in the order of the device's work."""

    @abstractmethod
    def prepare(self, flush: bool) -> None:
        """Queue what comes before a sample: with ``flush``, overwrite the last-level cache."""

    @abstractmethod
    def stamp(self) -> Any:
        """Queue a time stamp."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the stamps queued so far can be read."""

    @abstractmethod
    def elapsed_us(self, start: Any, stop: Any) -> float:
        """Microseconds between two stamps, which are not asked about again."""


class TorchClock(Clock):
    """CUDA or HIP events on torch's current stream."""

    def __init__(self, torch: ModuleType) -> None:
        self._cuda = torch.cuda
        self._torch = torch
        self._scratch: Any = None

    def prepare(self, flush: bool) -> None:
        if flush:
            if self._scratch is None:
                size = 2 * getattr(self._cuda.get_device_properties(), "L2_cache_size", _DEFAULT_FLUSH_BYTES // 2)
                self._scratch = self._torch.empty(size, dtype=self._torch.uint8, device="cuda")
            self._scratch.zero_()
        self._cuda._sleep(_LEAD_CYCLES)

    def stamp(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def synchronize(self) -> None:
        self._cuda.synchronize()

    def elapsed_us(self, start: Any, stop: Any) -> float:
        return float(start.elapsed_time(stop)) * 1e3


class CudaClock(Clock):
    """Driver events on the legacy default stream, for processes without torch."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._size = 2 * device.l2_bytes or _DEFAULT_FLUSH_BYTES
        self._scratch: Any = None

    def prepare(self, flush: bool) -> None:
        if not flush:
            return
        with self._device.current():
            if self._scratch is None:
                self._scratch = self._device.call("cuMemAlloc", self._size)
            self._device.call("cuMemsetD8Async", self._scratch, 0, self._size, 0)

    def stamp(self) -> Any:
        with self._device.current():
            event = self._device.call("cuEventCreate", 0)
            self._device.call("cuEventRecord", event, 0)
        return event

    def synchronize(self) -> None:
        self._device.synchronize()

    def elapsed_us(self, start: Any, stop: Any) -> float:
        with self._device.current():
            elapsed = float(self._device.call("cuEventElapsedTime", start, stop))
            for event in (start, stop):
                self._device.call("cuEventDestroy", event)
        return elapsed * 1e3


class WallClock(Clock):
    """Python's clock, for devices whose launches return when they have finished."""

    def prepare(self, flush: bool) -> None:
        if flush:
            raise DeviceError("Flushing the cache needs a GPU: measure without flush_l2 on this device.")

    def stamp(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_us(self, start: Any, stop: Any) -> float:
        return float(stop - start) * 1e6


def pick_clock(device: Device | None = None) -> Clock:
    """The clock for ``device``; without one, torch's if torch is loaded and sees a GPU, else the wall's."""
    gpu = device is None or device.name.startswith(("cuda:", "hip:"))
    torch = sys.modules.get("torch")
    if gpu and torch is not None and torch.cuda.is_available():
        return TorchClock(torch)
    return _cuda_clock(device) if isinstance(device, CudaDevice) else WallClock()


@cache
def _cuda_clock(device: CudaDevice) -> CudaClock:
    """The only one of a device, for what its flush writes is as large as two caches and stays."""
    return CudaClock(device)


@contextmanager
def on_device(device: Device) -> Iterator[None]:
    """Make a GPU torch's current one, so that torch's events and streams are of the device that is measured."""
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    ordinal = getattr(device, "ordinal", None)
    if cuda is None or ordinal is None or not cuda.is_available():
        yield
        return
    with cuda.device(ordinal):
        yield


def measure(
    fn: Callable[[], Any],
    warmup: int = 10,
    repeats: int = 50,
    *,
    calls: int = 1,
    flush_l2: bool = False,
    clock: Clock | None = None,
    name: str = "",
) -> Measurement:
    """Time ``fn`` ``repeats`` times after ``warmup`` calls. See `compare` for the options."""
    name = name or getattr(fn, "__name__", "fn")
    return compare({name: fn}, repeats, warmup=warmup, calls=calls, flush_l2=flush_l2, clock=clock)[name]


def compare(
    candidates: Mapping[str, Callable[[], Any]],
    repeats: int = 50,
    *,
    warmup: int = 10,
    calls: int = 1,
    flush_l2: bool = False,
    clock: Clock | None = None,
) -> Comparison:
    """Time several callables in turns, so that drifting clocks and heat meet all alike.

    Each round runs every candidate once and the next round starts with the next candidate, so that
    none always follows the same one. ``calls`` repeats a very short candidate inside one sample
    (the time is per call); ``flush_l2`` overwrites the GPU's cache before each sample.
    """
    if repeats < 1 or calls < 1 or not candidates:
        raise ValueError("A measurement needs candidates, and at least one repeat of one call.")
    clock = pick_clock() if clock is None else clock
    for fn in candidates.values():
        for _ in range(warmup):
            fn()
    clock.synchronize()
    stamps: dict[str, list[tuple[Any, Any]]] = {name: [] for name in candidates}
    names = list(candidates)
    for turn in range(repeats):
        for position in range(len(names)):
            name = names[(turn + position) % len(names)]
            stamps[name].append(_sample(candidates[name], calls, flush_l2, clock))
    clock.synchronize()
    return Comparison(
        {
            name: Measurement(name, tuple(clock.elapsed_us(start, stop) / calls for start, stop in pairs))
            for name, pairs in stamps.items()
        }
    )


def _sample(fn: Callable[[], Any], calls: int, flush: bool, clock: Clock) -> tuple[Any, Any]:
    clock.prepare(flush)
    start = clock.stamp()
    for _ in range(calls):
        fn()
    return start, clock.stamp()
