"""Target descriptions. Passes and backends ask a `Target`; nothing compares target names.

Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; PTX ISA 8.x;
AMD Instinct MI300 and CDNA4 ISA guides.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True)
class Target:
    """What a compiler must know of one GPU architecture.

    ``units`` is the number of SMs or CUs of the usual part, a default for cost decisions only:
    the runtime asks the device. Sizes are bytes.
    """

    name: str
    vendor: str  # "nvidia" or "amd"
    warp_size: int
    shared_bytes: int  # most that one block may use
    registers_per_thread: int
    least_registers: int  # to which a compiler can hold a thread
    units: int
    triple: str
    cpu: str
    llvm_features: str
    #: bank model of `tilewright.ir.layout.bank_conflicts`: nvidia, cdna3 or cdna4
    banks: str
    features: frozenset[str] = frozenset()
    registers_per_unit: int = 65536
    #: dies to which blocks are dealt in turn, each with an L2 cache of its own, and how many neighbouring tiles one
    #: should get; rows of tiles that run at the same time (as measured for HipKittens' GEMM)
    chiplets: int = 1
    chiplet_chunk: int = 1
    tile_group: int = 8

    def has(self, feature: str) -> bool:
        """Whether the hardware has a feature, and tilewright uses it there.

        tma, wgmma, mbarrier, setmaxnreg, clusters (blocks that reach each other's shared memory, multicast copies);
        dependent_launch (a launch that begins while the one before it runs);
        cp_async, mma_sync, mma_fp8 (fp8 operands of mma.sync), mma_f64 (its larger f64 shapes), stmatrix; mfma,
        mfma_long (twice the K), mfma_xf32, fp8_ocp (the 8-bit formats are OCP's), permlane_swap.
        """
        return feature in self.features


_NVIDIA: dict[str, Any] = dict(
    vendor="nvidia",
    warp_size=32,
    registers_per_thread=255,
    least_registers=24,
    triple="nvptx64-nvidia-cuda",
    banks="nvidia",
)
#: what all NVIDIA targets have, and what came with Hopper and stayed; PTX ISA, "Target ISA Notes" of mma and stmatrix
_AMPERE = frozenset({"cp_async", "mma_sync"})
_HOPPER = _AMPERE | {"mma_fp8", "mma_f64", "stmatrix", "dependent_launch"}
_AMD: dict[str, Any] = dict(
    vendor="amd", warp_size=64, registers_per_thread=512, least_registers=64, triple="amdgcn-amd-amdhsa",
    llvm_features="", registers_per_unit=131072, chiplets=8,
)  # fmt: skip

TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            "sm_80", shared_bytes=166912, units=108, cpu="sm_80", llvm_features="+ptx80",
            features=_AMPERE, **_NVIDIA,
        ),
        Target(
            "sm_89", shared_bytes=101376, units=128, cpu="sm_89", llvm_features="+ptx84",
            features=_AMPERE | {"mma_fp8"}, **_NVIDIA,
        ),
        Target(
            "sm_90a", shared_bytes=232448, units=132, cpu="sm_90a", llvm_features="+ptx84",
            features=_HOPPER | {"tma", "wgmma", "mbarrier", "setmaxnreg", "clusters"}, **_NVIDIA,
        ),
        Target(
            "sm_100a", shared_bytes=232448, units=148, cpu="sm_100a", llvm_features="+ptx86",
            features=_HOPPER, **_NVIDIA,
        ),
        Target(
            "sm_120a", shared_bytes=101376, units=170, cpu="sm_120a", llvm_features="+ptx87",
            features=_HOPPER, **_NVIDIA,
        ),
        Target(
            "gfx942", shared_bytes=65536, units=304, cpu="gfx942", banks="cdna3",
            features=frozenset({"mfma", "mfma_xf32"}), chiplet_chunk=16, tile_group=4, **_AMD,
        ),
        Target(
            "gfx950", shared_bytes=163840, units=256, cpu="gfx950", banks="cdna4",
            features=frozenset({"mfma", "mfma_long", "fp8_ocp", "permlane_swap"}), chiplet_chunk=64, **_AMD,
        ),
    )
}  # fmt: skip


def get_target(name: str) -> Target:
    """The target of that name; ValueError lists the known ones."""
    if name in TARGETS:
        return TARGETS[name]
    close = get_close_matches(name, TARGETS, 1)
    guess = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown target {name!r}{guess} (known: {', '.join(TARGETS)})")
