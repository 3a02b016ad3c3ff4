"""Torch's own database of operators and sample inputs, through the backend: gate off, eager for the rest.

python tests/torch/opinfo.py --json summary.json              all of it, two samples of float32 each (minutes)
python tests/torch/opinfo.py --dtypes float32,bfloat16 --gradients --match softmax
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves, tree_map

import tilewright.torch.backend as backend

#: their results are memory that nobody wrote to, so two calls differ
UNDEFINED = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
#: relative and absolute: as far as sums in another order may be apart
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float64: 1e-7}
#: how many times as far gradients may be, which cancel and divide by small numbers
GRADIENTS = 4
OPTIONS = {"fallback": "eager", "cost_gate": False}


@dataclass
class Summary:
    """Of a sweep: samples compared, graphs compiled, calls that were ours, and what failed."""

    samples: int = 0
    skipped: int = 0
    graphs: int = 0
    taken: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "taken": dict(self.taken.most_common())}


def entries(match: str = "", every: int = 1) -> list[Any]:
    """Entries of the database whose full names contain ``match``, each ``every``-th of them."""
    found = [op for op in op_db if match in op.full_name]
    return found[::every]


def sweep(ops: Iterable[Any], dtypes: Iterable[torch.dtype], most: int = 2, gradients: bool = False) -> Summary:
    """Compare the backend with eager, on the CPU, for up to ``most`` samples of each entry and dtype."""
    summary, rewrite = Summary(), backend.rewrite

    def recording(*args: Any) -> Any:
        report = rewrite(*args)
        summary.graphs += 1
        summary.taken.update(report.taken)
        return report

    backend.rewrite = recording
    try:
        for op in ops:
            for dtype in dtypes:
                if dtype in op.supported_dtypes("cpu") and op.full_name not in UNDEFINED:
                    _sweep_entry(summary, op, dtype, most, gradients and dtype in op.supported_backward_dtypes("cpu"))
    finally:
        backend.rewrite = rewrite
    return summary


def _sweep_entry(summary: Summary, op: Any, dtype: torch.dtype, most: int, gradients: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_call, backend=backend.compile_graph, options=OPTIONS)
    for number, sample in enumerate(_samples(op, dtype, most, gradients)):
        inputs = sample.input, sample.args, sample.kwargs
        try:
            expected = _run(_call, op.op, inputs, gradients)
        except Exception:
            summary.skipped += 1
            continue
        summary.samples += 1
        try:
            ours = _run(compiled, op.op, inputs, gradients)
            _compare(ours, expected, TOLERANCES.get(dtype, 0.0) * (GRADIENTS if gradients else 1))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            summary.failures.append(f"{op.full_name}, {str(dtype)[6:]}, sample {number}: {reason}")


def _samples(op: Any, dtype: torch.dtype, most: int, gradients: bool) -> Iterator[Any]:
    torch.manual_seed(0)
    found = op.sample_inputs("cpu", dtype, requires_grad=gradients)
    try:
        yield from islice(found, most)
    except Exception:  # samples that this build of torch cannot make
        return


def _call(function: Any, inputs: Any) -> Any:
    first, args, kwargs = inputs
    return function(first, *args, **kwargs)


def _run(call: Any, function: Any, inputs: Any, gradients: bool) -> list[Any]:
    """Results, and the gradients of all inputs for random gradients of the results."""
    torch.manual_seed(0)
    fresh = tree_map(lambda x: x.detach().clone().requires_grad_(x.requires_grad) if _is_tensor(x) else x, inputs)
    results = [x for x in tree_leaves(call(function, fresh)) if _is_tensor(x)]
    if not gradients:
        return results
    differentiable = [x for x in results if x.requires_grad]
    leaves = [x for x in tree_leaves(fresh) if _is_tensor(x) and x.requires_grad]
    if not differentiable or not leaves:
        return results
    given = [torch.randn(x.shape, dtype=torch.float64).to(x.dtype) for x in differentiable]
    found = torch.autograd.grad(differentiable, leaves, given, allow_unused=True)
    return [*results, *(x for x in found if x is not None)]


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _compare(ours: list[Any], expected: list[Any], tolerance: float) -> None:
    assert len(ours) == len(expected), f"{len(ours)} results, eager has {len(expected)}"
    for left, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(
            left.detach(), right.detach(), rtol=tolerance, atol=tolerance, equal_nan=True, check_stride=False
        )
        if right.layout == torch.strided and not right.is_conj() and right.numel() > 0:
            strides = [[s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1] for x in (left, right)]
            assert strides[0] == strides[1], f"strides {strides[0]}, eager has {strides[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--match", default="", help="entries whose names contain this")
    parser.add_argument("--every", type=int, default=1, help="each n-th entry alone")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dtypes = [getattr(torch, name) for name in options.dtypes.split(",")]
    start, ops = time.perf_counter(), entries(options.match, options.every)
    summary = sweep(ops, dtypes, options.samples, options.gradients)
    print(
        f"torch {torch.__version__}: {len(ops)} entries, {summary.samples} samples, {summary.skipped} that eager"
        f" refuses, {summary.graphs} graphs, {sum(summary.taken.values())} calls taken,"
        f" {len(summary.failures)} failures in {time.perf_counter() - start:.0f} s"
    )
    print("\n".join(summary.failures))
    if options.json:
        about = {"torch": torch.__version__, "entries": len(ops), "dtypes": options.dtypes.split(",")}
        about |= {"gradients": options.gradients, "not_compared": list(UNDEFINED)}
        options.json.write_text(json.dumps({**about, **summary.to_json()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
