"""All-to-all of large tensors by the GPUs' copy engines, which leave the SMs to others.

Ranks meet before the copies, so that nobody writes to what another one still reads, and behind them.
"""

from __future__ import annotations

from typing import Any

import tilewright as tw
from tilewright.kernels.multi_gpu.workspace import flags


@tw.kernel
def meet(here: tw.Symmetric) -> None:
    """Ends when all ranks have begun it. ``here`` flags (world,). Grid: (1,)."""
    tw.barrier(here)


def all_to_all(world: Any, x: Any, y: Any, stream: Any = None) -> None:
    """``y[p]`` of rank r becomes ``x[r]`` of rank p.

    x and symmetric y (world, ...) have one shape and dtype and are row-major.
    """
    here = flags(world, "meet", (world.size,))
    world.launch(meet, (1,), here, stream=stream)
    world.push(x, y, stream)
    world.launch(meet, (1,), here, stream=stream)


__all__ = ["all_to_all", "meet"]
