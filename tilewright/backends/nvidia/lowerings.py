"""The lowering table of NVIDIA targets: the shared one, and the asynchronous operations."""

from __future__ import annotations

from tilewright.backends.lower import LOWERINGS, Table
from tilewright.backends.nvidia.fragments import FRAGMENT_LOWERINGS
from tilewright.backends.nvidia.local import LOCAL_LOWERINGS
from tilewright.backends.nvidia.mailboxes import MAILBOX_LOWERINGS
from tilewright.backends.nvidia.mma_sync import MMA_LOWERINGS
from tilewright.backends.nvidia.rings import RING_LOWERINGS
from tilewright.backends.nvidia.roles import ROLE_LOWERINGS
from tilewright.backends.nvidia.tma import TMA_LOWERINGS
from tilewright.backends.nvidia.wgmma import WGMMA_LOWERINGS, lower_pinned_for
from tilewright.ir.tile_ops import For

NVIDIA_LOWERINGS: Table = (
    LOWERINGS
    | RING_LOWERINGS
    | ROLE_LOWERINGS
    | TMA_LOWERINGS
    | WGMMA_LOWERINGS
    | LOCAL_LOWERINGS
    | MAILBOX_LOWERINGS
    | FRAGMENT_LOWERINGS
    | MMA_LOWERINGS
)

#: for kernels whose products ptxas serialises otherwise
PINNED_LOWERINGS: Table = {**NVIDIA_LOWERINGS, For: lower_pinned_for}
