"""Launch the library's kernels in small on this machine's GPU, for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no
        python tests/gpu/launch_library.py [--share K/N] [WORD ...]

Without torch's pool every array is an allocation of its own, whose end memcheck knows. The words pick kernels whose
names contain one of them, a share every Nth of these, from number K on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from gpu_arrays import to_device
from library_launches import launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--share", default="0/1", metavar="K/N")
    options = parser.parse_args()
    first, shares = (int(number) for number in options.share.split("/"))
    every = [x for x in launches() if not options.words or any(word in x.name for word in options.words)]
    for launch in every[first::shares]:
        arguments = [to_device(x) if isinstance(x, np.ndarray) else x for x in launch.arguments]
        launch.run("cuda:0", arguments)
        torch.cuda.synchronize()
        results = [x.float() for x in arguments if torch.is_tensor(x) and x.is_floating_point()]
        unwritten = any(bool(x.isnan().any()) for x in results)
        print(f"{launch.name}: {'NaN in a result' if unwritten else 'ran'}", flush=True)


if __name__ == "__main__":
    main()
