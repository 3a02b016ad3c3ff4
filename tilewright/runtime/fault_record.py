"""Why a kernel gave up waiting for another rank, read from the record that it left in host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.ir.abi import Fault, KernelABI
from tilewright.runtime.peers import Endpoint

_TIMED_OUT = 1


@dataclass(frozen=True)
class FaultRecord:
    """The record of one rank: ``words`` are int32 of host memory that its device writes (`tilewright.ir.abi.Fault`)."""

    words: np.ndarray[Any, Any]
    endpoint: Endpoint
    timeout: float

    def message(self) -> str | None:
        """Who waited where for what, or None if nobody gave up."""
        if self.words[Fault.KIND] != _TIMED_OUT:
            return None
        return (
            f"rank {self.words[Fault.RANK]} waited {self.timeout:g} s {self._where()} {self._what()}. That rank has "
            "died, hangs, or does not launch the same kernels in the same order; restart all ranks. "
            "TILEWRIGHT_WAIT_TIMEOUT sets the seconds, 0 waits forever."
        )

    def _abi(self) -> KernelABI | None:
        """The kernel that gave up, if this process launched it."""
        return self.endpoint.kernels.get(int(self.words[Fault.KERNEL]))

    def _where(self) -> str:
        abi, line = self._abi(), self.words[Fault.LINE]
        if abi is None:
            return f"at line {line} of a kernel"
        return f"in kernel {abi.name} at {f'{abi.source}:' if abi.source else 'line '}{line}"

    def _what(self) -> str:
        flag, peer = int(self.words[Fault.FLAG]), int(self.words[Fault.PEER])
        who = f"rank {peer}" if peer >= 0 else "the other ranks"
        if flag == Fault.ENTRY:
            return f"for {who} to start the launch"
        if flag == Fault.EXIT:
            return f"for {who} to end the launch"
        return f"for flag {flag}{self._flags()} (never signalled by {who if peer >= 0 else 'any rank'})"

    def _flags(self) -> str:
        abi, index = self._abi(), int(self.words[Fault.PARAM])
        if abi is None or not 0 <= index < len(abi.params):
            return ""
        return f" of '{abi.params[index].name}'"
