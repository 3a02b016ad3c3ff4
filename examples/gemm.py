"""One tile program, three GPU targets and the CPU.

Compiles a bf16 matrix product for each target, runs it in the interpreter on this machine and
compares with NumPy. Run it with ``make demo``.
"""

import sys

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

import tilewright as tw


@tw.kernel
def gemm(
    a: tw.Tensor, b: tw.Tensor, c: tw.Tensor, *, BM: tw.constexpr = 128, BN: tw.constexpr = 256, BK: tw.constexpr = 64
):
    m, n = tw.program_id(0), tw.program_id(1)
    acc = tw.zeros((BM, BN), tw.float32)
    for k in tw.range(tw.cdiv(a.shape[1], BK)):
        acc = tw.dot(tw.load(a, (m, k), (BM, BK)), tw.load(b, (k, n), (BK, BN)), acc)
    tw.store(c, (m, n), acc.to(c.dtype))


def compile_for(target: str) -> tw.Artifact:
    """The kernel for row-major matrices of any size."""
    args = {"a": tw.spec("bf16", ("M", "K")), "b": tw.spec("bf16", ("K", "N")), "c": tw.spec("bf16", ("M", "N"))}
    return tw.compile(gemm, target=target, args=args)


def check_on_cpu(m: int = 1000, n: int = 1111, k: int = 1003) -> float:
    """Run on NumPy arrays; returns the largest error relative to the largest exact value."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((m, k)).astype(ml_dtypes.bfloat16)
    b = rng.standard_normal((k, n)).astype(ml_dtypes.bfloat16)
    c = np.full((m, n), np.nan, ml_dtypes.bfloat16)
    gemm[(tw.cdiv(m, 128), tw.cdiv(n, 256))](a, b, c)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    return float(np.abs(c.astype(np.float64) - exact).max() / np.abs(exact).max())


def main() -> int:
    table = Table(
        "target", "binary", "registers", "shared memory", "spills", "compile time", title="gemm 128x256x64 bf16"
    )
    for target in ("sm_90a", "gfx942", "gfx950"):
        artifact = compile_for(target)
        used = artifact.resources
        table.add_row(
            target,
            f"{len(artifact.binary):,} B",
            str(used.registers),
            f"{artifact.abi.shared_bytes:,} B",
            str(used.spills),
            f"{artifact.seconds:.2f} s",
        )
    console = Console()
    console.print(table)
    error = check_on_cpu()
    right = error < 2**-8
    console.print(f"cpu: 1000x1111x1003 against NumPy float64: error {error:.1e} ({'ok' if right else 'WRONG'})")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
