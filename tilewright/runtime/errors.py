"""Errors of the runtime: what a device, a driver or a launch refused, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


class DeviceError(RuntimeError):
    """A device could not be found, opened or used.

    ``code`` is the driver's own name of the error (``"CUDA_ERROR_NO_DEVICE"``), or None where no
    driver call failed.
    """

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class ArgumentError(DeviceError):
    """A launch argument does not fit the compiled kernel. The message names the parameter."""


def explain_failure(faults: Iterable[Callable[[], str | None]], status: Any) -> None:
    """Raise a DeviceError with the first reason that is known of a failed call; return if there is none."""
    for fault in faults:
        reason = fault()
        if reason is not None:
            raise DeviceError(reason, getattr(status, "name", str(status)))
