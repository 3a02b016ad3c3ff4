"""Compiled kernels for machines without the compiler."""

from __future__ import annotations

from tilewright import jit_cache

__all__ = ["jit_cache"]
