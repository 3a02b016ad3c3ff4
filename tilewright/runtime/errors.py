"""Errors of the runtime: what a device, a driver or a launch refused, and what to do about it."""

from __future__ import annotations


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
