"""Decoder layers of Llama 3 8B's shapes through torch.compile: this backend against Inductor alone, in the same run.

Random bfloat16 weights. Forward without gradients, and forward with backward. Errors, relative in the Frobenius norm:
of the output and of the input's gradient against float32, and how far the rivals are apart, in all gradients too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tilewright.runtime.bench import compare
from tilewright.torch.backend import compile_graph
from tilewright.torch.direct import counts

WORKS = "forward", "forward and backward"


class Layer(nn.Module):
    """A decoder layer: grouped-query attention with rotary positions, and a gated feed-forward network."""

    def __init__(self, hidden: int, feed: int, heads: int, groups: int, depth: int) -> None:
        super().__init__()
        self.heads, self.groups, self.depth = heads, groups, depth
        self.before, self.after = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.q = nn.Linear(hidden, heads * depth, bias=False)
        self.k = nn.Linear(hidden, groups * depth, bias=False)
        self.v = nn.Linear(hidden, groups * depth, bias=False)
        self.o = nn.Linear(heads * depth, hidden, bias=False)
        self.gate, self.up = nn.Linear(hidden, feed, bias=False), nn.Linear(hidden, feed, bias=False)
        self.down = nn.Linear(feed, hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, rows, _ = x.shape
        h = self.before(x)
        q = turn(self.q(h).view(batch, rows, self.heads, self.depth).transpose(1, 2), cos, sin)
        k = turn(self.k(h).view(batch, rows, self.groups, self.depth).transpose(1, 2), cos, sin)
        v = self.v(h).view(batch, rows, self.groups, self.depth).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).reshape(batch, rows, -1))
        h = self.after(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Stack(nn.Module):
    def __init__(self, layers: int, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(*sizes) for _ in range(layers))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions as the models of Hugging Face write them; cos and sin (S, D)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def positions(rows: int, depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(
        torch.arange(rows, device="cuda").float(),
        500000.0 ** (-torch.arange(0, depth, 2, device="cuda").float() / depth),
    )
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.float() - exact.float()).norm() / exact.float().norm())


def steps(function: Callable[..., torch.Tensor], inputs: Any, dy: torch.Tensor) -> dict[str, Callable[[], Any]]:
    def forward() -> torch.Tensor:
        with torch.no_grad():
            return function(*inputs)

    def both() -> tuple[torch.Tensor, ...]:
        out = function(*inputs)
        return torch.autograd.grad(out, [inputs[0], *function_parameters(function)], dy)

    return dict(zip(WORKS, (forward, both), strict=True))


def function_parameters(function: Any) -> list[torch.Tensor]:
    return list(function.parameters())


def build(options: argparse.Namespace) -> tuple[Stack, tuple[torch.Tensor, ...], torch.Tensor]:
    torch.manual_seed(0)
    depth = options.hidden // options.heads
    with torch.device("cuda"):
        model = Stack(options.layers, options.hidden, options.feed, options.heads, options.groups, depth).bfloat16()
        x = torch.randn(options.batch, options.rows, options.hidden, dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn_like(x)
    return model, (x, *positions(options.rows, depth, torch.bfloat16)), dy


def rivals(model: Stack, options: argparse.Namespace) -> dict[str, Any]:
    ours = {"explain": options.explain, "cost_gate": not options.no_gate}
    if options.take:
        ours["operators"] = tuple(options.take.split(","))
    torch._dynamo.reset()
    return {"inductor": torch.compile(model), "tilewright": torch.compile(model, backend=compile_graph, options=ours)}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    model, inputs, dy = build(options)
    exact = references(model, inputs, dy) if options.check else {}
    compiled = {name: steps(f, inputs, dy) for name, f in rivals(model, options).items()}
    rows = []
    for work in WORKS if options.work is None else (options.work,):
        calls = {name: found[work] for name, found in compiled.items()}
        row: dict[str, Any] = {"work": work, "take": options.take or "by the gate", **shape(options)}
        results = {name: call() for name, call in calls.items()}
        row["apart"] = apart(*results.values())
        for name, result in results.items():
            row[f"{name}_error"] = error(first(result), exact[work]) if exact else float("nan")
        del results, result
        times = compare(calls, repeats=options.repeats)
        row |= {f"{name}_ms": times[name].median_us / 1e3 for name in calls}
        row["ratio"] = times.speedup("tilewright", "inductor")
        text = (
            "{work:<22} tilewright {tilewright_ms:.2f} ms, inductor {inductor_ms:.2f} ms, ratio {ratio:.3f}; "
            "errors {tilewright_error:.2e}, {inductor_error:.2e}, apart {apart:.2e}"
        )
        print(text.format(**row), flush=True)
        if options.profile:
            for name, call in calls.items():
                profile(f"{work}, {name}", call)
        rows.append(row)
        save(options, rows)
    return rows


def references(model: Stack, inputs: Any, dy: torch.Tensor) -> dict[str, Any]:
    """For the first sequence, the output and the gradient of the input, in float32 of the bfloat16 weights."""
    x, *angles = (value.detach().float() for value in inputs)
    x = x[:1].requires_grad_()
    out = model.float()(x, *angles)
    (dx,) = torch.autograd.grad(out, x, dy[:1].float())
    model.bfloat16()
    return dict(zip(WORKS, (out.detach(), dx), strict=True))


def first(results: Any) -> torch.Tensor:
    """The first sequence of a step's output or of its gradient of the input."""
    return (results[0] if isinstance(results, tuple) else results)[:1]


def apart(ours: Any, theirs: Any) -> float:
    """How far the results of two steps are from each other, gradients of all weights included."""
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    return max(error(a, b) for a, b in pairs)


def shape(options: argparse.Namespace) -> dict[str, int]:
    names = ("layers", "batch", "rows", "hidden", "feed", "heads", "groups")
    return {name: getattr(options, name) for name in names}


def profile(title: str, call: Callable[[], Any]) -> None:
    """Kernels by their time in one call."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    call()
    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        call()
        torch.cuda.synchronize()
    kernels = [e for e in found.key_averages() if e.self_device_time_total > 0 and e.device_type.name == "CUDA"]
    print(f"--- {title}")
    for event in sorted(kernels, key=lambda e: -e.self_device_time_total)[:24]:
        print(f"{event.self_device_time_total / 1e3:9.3f} ms {event.count:4d} x  {event.key[:110]}")


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Host microseconds of a call on few rows, where the GPU has next to nothing to do."""
    few = argparse.Namespace(**{**vars(options), "batch": 1, "rows": 16, "hidden": 256, "feed": 512, "heads": 4,
                                "groups": 2, "no_gate": True, "explain": False})  # fmt: skip
    model, inputs, dy = build(few)
    functions = rivals(model, few)
    compiled = {name: steps(f, inputs, dy) for name, f in functions.items()}
    row: dict[str, Any] = {"work": "host", "take": options.take or "all", **shape(few)}
    for work in WORKS:
        times = host_times({name: calls[work] for name, calls in compiled.items()})
        row |= {f"{work}, {name}, us": value for name, value in times.items()}
        row[f"{work}, ratio"] = times["inductor"] / times["tilewright"]
        text = ", ".join(f"{name} {value:.0f} us" for name, value in times.items())
        print(f"host, {work}: {text}, ratio {row[f'{work}, ratio']:.2f}", flush=True)
    for name, function in functions.items():
        for part, value in parts(function, inputs, dy).items():
            row[f"{part}, {name}, us"] = value
            print(f"host, {part} alone: {name} {value:.0f} us", flush=True)
    row["operators called through Python"] = by_python(compiled["tilewright"]["forward and backward"])
    print(f"operators called through Python in a step: {row['operators called through Python']}", flush=True)
    return row


def parts(function: Any, inputs: Any, dy: torch.Tensor, repeats: int = 300) -> dict[str, float]:
    """Medians in microseconds of the two halves of a step with gradients."""
    wanted = [inputs[0], *function_parameters(function)]
    forward, backward = [], []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = function(*inputs)
        middle = time.perf_counter()
        torch.autograd.grad(out, wanted, dy)
        backward.append(time.perf_counter() - middle)
        forward.append(middle - start)
    return {"forward with gradients": median(forward) * 1e6, "backward": median(backward) * 1e6}


def by_python(call: Callable[[], Any]) -> dict[str, int]:
    """Calls of our operators in a step that went through Python, of those that ever went another way."""
    before = counts()
    call()
    found = {name: calls - repeated for name, (calls, repeated) in counts().items()}
    changed = {name: n - (before[name][0] - before[name][1]) for name, n in found.items() if name in before}
    return {name: n for name, n in changed.items() if n}


def host_times(calls: dict[str, Callable[[], Any]], repeats: int = 20, rounds: int = 15) -> dict[str, float]:
    """Microseconds of each call: medians over batches in turns, with the GPU idle before each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn_number in range(rounds + 1):
        for name in sorted(calls, reverse=bool(turn_number % 2)):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                calls[name]()
            times[name].append((time.perf_counter() - start) / repeats * 1e6)
    return {name: median(values[1:]) for name, values in times.items()}


def save(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if options.json:
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("layers", 4), ("batch", 4), ("rows", 4096), ("hidden", 4096), ("feed", 14336), ("heads", 32),
                        ("groups", 8), ("repeats", 12)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--take", default="", help="take calls of these operators alone, whatever the gate says")
    parser.add_argument("--no-gate", action="store_true", help="take every call that the kernels can")
    parser.add_argument("--work", choices=WORKS, help="this one alone")
    parser.add_argument("--explain", action="store_true")
    parser.add_argument("--profile", action="store_true", help="list the kernels of a call by their time")
    parser.add_argument("--no-check", dest="check", action="store_false", help="skip the errors against float32")
    parser.add_argument("--host", action="store_true", help="measure the host's time of a call alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {shape(options)}", flush=True)
    if options.host:
        save(options, [overhead(options)])
    else:
        measure(options)


if __name__ == "__main__":
    main()
