"""A product divided among ranks: each multiplies its part of K and sends rows to their owners, who add them up.

Runs on a machine without a GPU: in the interpreter, and on emulated Hopper GPUs, which execute the compiled assembly.
On two GPUs of one host use `tw.World.local([0, 1])`.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

import tilewright as tw


@tw.kernel
def gemm_reduce_scatter(
    a: tw.Tensor, b: tw.Tensor, c: tw.Tensor, parts: tw.Symmetric, sent: tw.Symmetric, *, BM: tw.constexpr = 64
) -> None:
    """c: this rank's rows of the sum over ranks of a @ b, peers' rows first. Grid: (row tiles of a rank, ranks)."""
    m, me, world = tw.program_id(0), tw.rank(), tw.world_size()
    owner = (me + 1 + tw.program_id(1)) % world
    rows = tw.load(a.offset(owner * c.shape[0], 0), (m, 0), (BM, 64))
    acc = tw.dot(rows, tw.load(b, (0, 0), (64, 64)), tw.zeros((BM, 64), tw.float32))
    if owner != me:
        token = tw.put(parts.peer(owner)[me], (m, 0), acc)
        tw.signal(sent[me, m], owner, after=token)
    else:
        for hop in tw.range(1, world):
            source = (me + hop) % world
            arrived = tw.wait(sent[source, m])
            acc = acc + tw.load(parts[source], (m, 0), (BM, 64), after=arrived)
        tw.store(c, (m, 0), acc)


def check(world: tw.World, ranks: int, rows: int = 128) -> float:
    """The largest error of all ranks' rows against NumPy."""
    rng = np.random.default_rng(0)
    a, b = (
        [rng.standard_normal(s).astype(ml_dtypes.bfloat16) for _ in range(ranks)]
        for s in ((ranks * rows, 64), (64, 64))
    )
    c = [np.full((rows, 64), np.nan, "float32") for _ in range(ranks)]
    with world:
        parts, sent = world.empty((ranks, rows, 64), "f32"), world.flags(ranks, rows // 64)
        world.launch(gemm_reduce_scatter, (rows // 64, ranks), a, b, c, parts, sent)
    exact = sum(x.astype("float64") @ y.astype("float64") for x, y in zip(a, b, strict=True))
    return float(np.abs(np.concatenate(c) - exact).max())


if __name__ == "__main__":
    for name, world in {
        "4 ranks in the interpreter": tw.World.interpreter(4),
        "4 emulated H100, races detected": tw.World.emulated("sm_90a", 4, races=True),
    }.items():
        error = check(world, 4)
        print(f"{name}: error {error:.1e} ({'ok' if error < 1e-3 else 'WRONG'})")
