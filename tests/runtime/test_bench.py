"""Measurement arithmetic, on a clock that the test winds."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from fake_driver import FakeDriver

from tilewright.runtime.bench import Clock, Comparison, Measurement, WallClock, compare, measure, pick_clock
from tilewright.runtime.cuda import CudaDevice
from tilewright.runtime.errors import DeviceError


class HandClock(Clock):
    """Stands still except when the measured functions move it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.prepared: list[bool] = []

    def prepare(self, flush: bool) -> None:
        self.prepared.append(flush)

    def stamp(self) -> float:
        return self.now

    def synchronize(self) -> None:
        pass

    def elapsed_us(self, start: Any, stop: Any) -> float:
        return float(stop - start)


def test_candidates_take_turns_and_none_always_goes_first() -> None:
    clock, order = HandClock(), []

    def candidate(name: str, cost: float) -> Any:
        def run() -> None:
            order.append(name)
            clock.now += cost

        return run

    result = compare({"ours": candidate("o", 2), "theirs": candidate("t", 3)}, 4, warmup=0, clock=clock)
    assert "".join(order) == "ottootto"
    assert result["ours"].times_us == (2,) * 4
    assert result.speedup("ours", over="theirs") == 1.5


def test_a_speedup_is_of_neighbouring_runs() -> None:
    drifting = {"a": Measurement("a", (1.0, 2.0, 4.0)), "b": Measurement("b", (2.0, 4.0, 8.0))}
    assert Comparison(drifting).speedup("a", over="b") == 2.0


def test_statistics_and_rates() -> None:
    measurement = Measurement("m", (5.0, 1.0, 3.0, 2.0, 4.0, 6.0))
    assert (measurement.median_us, measurement.min_us) == (3.5, 1.0)
    assert (measurement.p20_us, measurement.p80_us) == (2.0, 5.0)
    assert measurement.tflops(7e6) == pytest.approx(2.0)
    assert measurement.terabytes_per_second(7e6) == pytest.approx(2.0)
    assert measurement.to_json()["repeats"] == 6


def test_calls_share_a_sample_and_warmup_is_not_timed() -> None:
    clock = HandClock()
    count = 0

    def run() -> None:
        nonlocal count
        count += 1
        clock.now += 10

    result = measure(run, warmup=3, repeats=2, calls=5, flush_l2=True, clock=clock)
    assert (result.name, result.times_us, count) == ("run", (10.0, 10.0), 13)
    assert clock.prepared == [True, True]


def test_impossible_measurements() -> None:
    with pytest.raises(ValueError, match="at least one repeat"):
        measure(lambda: None, repeats=0, clock=HandClock())
    with pytest.raises(DeviceError, match="needs a GPU"):
        measure(lambda: None, flush_l2=True, clock=WallClock())


def test_events_of_the_driver_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    driver.values["cuEventElapsedTime"] = 0.25
    monkeypatch.setitem(sys.modules, "torch", None)
    device = CudaDevice(0, driver)
    for _ in range(2):
        result = measure(lambda: None, warmup=0, repeats=3, flush_l2=True, clock=pick_clock(device))
        assert result.times_us == (250.0,) * 3
    assert len(driver.named("cuEventCreate")) == len(driver.named("cuEventDestroy")) == 12
    assert len(driver.named("cuMemAlloc")) == 1, "memory to flush the cache with is taken once"
