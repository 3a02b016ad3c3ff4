"""The kernels of several GPUs on two real ones, against float64; the cases of tests/multi_gpu with larger tiles."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from tests.support.multi_gpu_cases import CASES, Tiles

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

TILES = (Tiles(64, 64, 32, 150), Tiles(128, 128, 64, 300))


class Mirrored:
    """A symmetric tensor and NumPy arrays that launches copy to the GPUs and back."""

    def __init__(self, tensor: Any, arrays: list[np.ndarray]) -> None:
        self.tensor, self.arrays = tensor, arrays
        self.shape, self.dtype, self.addresses = tensor.shape, tensor.dtype, tensor.addresses
        self.nbytes = arrays[0].nbytes

    def __getitem__(self, rank: int) -> np.ndarray:
        return self.arrays[rank]

    def reshape(self, *shape: int) -> Mirrored:
        return Mirrored(self.tensor.reshape(*shape), [array.reshape(shape) for array in self.arrays])


class MirroredWorld:
    """A world of this process's GPUs, with the arrays of ranks in host memory."""

    def __init__(self, world: Any) -> None:
        self.world, self.size, self.ranks = world, world.size, world.ranks
        self.flags, self.zeros, self.workspaces = world.flags, world.zeros, {}  # which stay on the GPUs

    def empty(self, shape: Any, dtype: Any) -> Mirrored:
        tensor = self.world.empty(shape, dtype)
        arrays = [on_host(tensor[rank]) for rank in self.ranks]
        for array in arrays:
            if array.dtype.kind not in "iu":
                array[...] = np.nan
        return Mirrored(tensor, arrays)

    def tensor(self, values: list[np.ndarray]) -> Mirrored:
        mirrored = self.empty(values[0].shape, values[0].dtype)
        for array, value in zip(mirrored.arrays, values, strict=True):
            array[...] = value
        return mirrored

    def launch(self, kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        pairs: list[tuple[np.ndarray, Any]] = []
        given = [self._place(value, pairs) for value in args]
        self.world.launch(kernel, grid, *given, **meta)
        self.world.synchronize()
        for array, tensor in pairs:
            array[...] = on_host(tensor)

    def pull(self, wanted: Any, ordered: bool = True) -> Any:
        """The copies, of what the ranks have in host memory; they have happened on return."""
        parts = {rank: list(wanted(rank)) for rank in self.ranks}
        mirrored = {id(tensor): tensor for listed in parts.values() for tensor, _, _ in listed}
        for tensor in mirrored.values():
            for rank in self.ranks:
                tensor.tensor[rank].copy_(on_gpu(tensor.arrays[rank], tensor.tensor[rank].device))
        torch.cuda.synchronize()
        copies = self.world.pull(
            lambda rank: [(tensor.tensor, peer, index) for tensor, peer, index in parts[rank]], ordered=ordered
        )
        copies.rejoin()
        self.world.synchronize()
        for tensor in mirrored.values():
            for rank in self.ranks:
                tensor.arrays[rank][...] = on_host(tensor.tensor[rank])
        return copies

    def _place(self, value: Any, pairs: list[tuple[np.ndarray, Any]]) -> Any:
        """An argument on the GPUs; ``pairs`` gets each array with its copy there."""
        if isinstance(value, Mirrored):
            placed = [value.tensor[rank] for rank in self.ranks]
            for array, tensor in zip(value.arrays, placed, strict=True):
                tensor.copy_(on_gpu(array, tensor.device))
            pairs += zip(value.arrays, placed, strict=True)
            return value.tensor
        if isinstance(value, list) and isinstance(value[0], np.ndarray):
            placed = [on_gpu(array, f"cuda:{rank}") for rank, array in zip(self.ranks, value, strict=True)]
            pairs += zip(value, placed, strict=True)
            return placed
        return value


def on_gpu(array: np.ndarray, device: Any) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(array.copy()).to(device)


def on_host(tensor: Any) -> np.ndarray:
    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.numpy().copy()


@pytest.mark.filterwarnings("ignore::tilewright.compiler.limits.PerformanceWarning")  # tiles for tests, not for speed
@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_two_gpus(case: str, tiles: Tiles) -> None:
    with tw.World.local([0, 1]) as world:
        mirrored = MirroredWorld(world)
        for seed in range(4):
            CASES[case](mirrored, seed, tiles)
