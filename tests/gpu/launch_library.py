"""Launch the library's kernels in small on this machine's GPU, for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/launch_library.py [WORD ...]

Without torch's pool every array is an allocation of its own, whose end memcheck knows. The words pick kernels whose
names contain one of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from gpu_arrays import to_device
from library_launches import launches


def main(words: list[str]) -> None:
    for launch in launches():
        if words and not any(word in launch.name for word in words):
            continue
        arguments = [to_device(x) if isinstance(x, np.ndarray) else x for x in launch.arguments]
        launch.run("cuda:0", arguments)
        torch.cuda.synchronize()
        results = [x.float() for x in arguments if torch.is_tensor(x) and x.is_floating_point()]
        unwritten = any(bool(x.isnan().any()) for x in results)
        print(f"{launch.name}: {'NaN in a result' if unwritten else 'ran'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
