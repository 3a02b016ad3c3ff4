"""tilewright for torch: operators over the kernel library, and the backend ``torch.compile(backend="tilewright")``.

    import tilewright.torch as twt
    y = twt.linear(x, weight, bias, activation="gelu")

The operators have the signatures of their namesakes in `torch.nn.functional` and compute what those do; on what the
kernels do not take, they call them. They load on first use. See docs/torch.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {
    "add_layer_norm": "norms",
    "add_rms_norm": "norms",
    "all_gather_matmul": "collectives",
    "attention": "sdpa",
    "attention_decode": "serving",
    "attention_varlen": "serving",
    "cast_linear": "cast_products",
    "cross_entropy": "losses",
    "gated_linear": "gated",
    "grouped_mm": "grouped",
    "jit_cache": "shipping",
    "layer_norm": "norms",
    "linear": "products",
    "matmul": "products",
    "matmul_all_reduce": "collectives",
    "matmul_reduce_scatter": "collectives",
    "rms_norm": "norms",
    "rotary": "positions",
    "scaled_linear": "scaled",
    "softmax": "rows",
    "torch_op": "operator",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'tilewright.torch' has no attribute {name!r}")
    value = getattr(import_module(f"tilewright.torch.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_PLACES)
