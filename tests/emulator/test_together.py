"""Machines that take turns: order, deadlocks, livelocks and progress, with machines that only pretend."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from tilewright.runtime.emulator.errors import EmulatorFault
from tilewright.runtime.emulator.together import Machine, Stuck, _Report, run_together


class Pretend(Machine):
    """Calls ``step(machine)`` for each turn; ends after ``turns`` of them that ran."""

    def __init__(self, turns: int, step: Callable[[Pretend], bool] = lambda machine: True, rank: int = 0) -> None:
        self.name, self.rank, self.blocks = "pretend", rank, turns
        self.blocks_ended = 0
        self._step = step
        self.closed = False
        self.register = 0

    @property
    def ended(self) -> bool:
        return self.blocks_ended >= self.blocks

    @property
    def instructions(self) -> int:
        return 1000 * self.blocks_ended

    def turn(self) -> bool:
        ran = self._step(self)
        self.blocks_ended += ran and self.quiet == 0
        return ran

    def state(self) -> int:
        return self.register

    def longest_wait(self) -> int:
        return 0

    def stuck(self) -> Stuck:
        return Stuck("\n  somebody waits", "wait;", 7)

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_all_end_and_are_closed(seed: int | None) -> None:
    order: list[int] = []

    def step(machine: Pretend) -> bool:
        order.append(machine.rank)
        return True

    machines = [Pretend(20, step, rank) for rank in range(3)]
    run_together(machines, seed, progress=False)
    assert all(machine.ended and machine.closed for machine in machines)
    assert sorted(order) == sorted([0, 1, 2] * 20)
    assert (order == [0, 1, 2] * 20) == (seed is None), "without a seed in turn, with one not"


@pytest.mark.parametrize("seed", [None, 0])
def test_a_deadlock_needs_everybody(seed: int | None) -> None:
    first = Pretend(50, rank=0)
    second = Pretend(5, lambda machine: first.ended, rank=1)
    run_together([first, second], seed, progress=False)
    first, third = Pretend(50), Pretend(5, lambda machine: False, rank=2)
    with pytest.raises(
        EmulatorFault, match=r"deadlock: no warp can run(?s:.*)somebody waits(?s:.*)line 7: wait;"
    ) as error:
        run_together([first, third, Pretend(1, lambda machine: False, rank=3)], seed, progress=False)
    assert "rank 2, kernel pretend" in str(error.value) and "rank 0" not in str(error.value)
    assert first.closed and third.closed


def poll(machine: Pretend, period: int) -> bool:
    machine.quiet += 1
    machine.register = machine.quiet % period
    return True


def test_a_livelock_is_a_state_that_comes_back() -> None:
    with pytest.raises(EmulatorFault, match="livelock"):
        run_together([Pretend(1, lambda m: poll(m, 3)), Pretend(1, lambda m: poll(m, 100))], progress=False)


def test_a_long_computation_is_no_livelock() -> None:
    def count(machine: Pretend) -> bool:
        machine.register += 1
        machine.quiet = machine.register % 20000
        return True

    run_together([Pretend(1, count)], progress=False)


def test_a_fault_closes_everybody() -> None:
    def fail(machine: Pretend) -> bool:
        raise EmulatorFault("no")

    machines = [Pretend(5), Pretend(5, fail)]
    with pytest.raises(EmulatorFault, match="no"):
        run_together(machines, progress=False)
    assert all(machine.closed for machine in machines)


def test_progress_is_one_line_about_long_runs() -> None:
    now = [0.0]
    out = io.StringIO()
    machine = Pretend(40)
    report = _Report([machine], out, lambda: now[0])
    for seconds in (0.5, 1.9):
        now[0] = seconds
        report.show()
    assert out.getvalue() == ""
    report.clear()
    assert out.getvalue() == ""
    now[0], machine.blocks_ended = 2.1, 12
    report.show()
    assert out.getvalue() == "\rpretend: 12 of 40 blocks, 12,000 instructions, 2 s"
    now[0] = 2.2
    report.show()
    assert out.getvalue().count("\r") == 1
    now[0] = 3.0
    report.show()
    assert out.getvalue().count("\r") == 2
    report.clear()
    assert out.getvalue().endswith(" \r")


def test_progress_can_be_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright.runtime.emulator.together._FIRST_REPORT", 0.0)
    for shown in (True, False, None):
        run_together([Pretend(3)], progress=shown)
        assert ("3 blocks" in capsys.readouterr().err) == (shown is True)
