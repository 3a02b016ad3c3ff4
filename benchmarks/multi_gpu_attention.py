"""The works of multi_gpu.py that are attention over a sequence divided among ranks; see multi_gpu_works.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as distributed
from multi_gpu_works import BF16, Case, Tensor, randn, world
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilewright.kernels.attention import sdpa
from tilewright.kernels.attention_backward import sdpa_backward

HEADS, GROUPS, DEPTH = 32, 8, 128


class Divided:
    """A sequence in chunks, 2 of each rank where causal (zigzag), else 1; this rank's q (C, 1, H, S, D), k and v."""

    def __init__(self, length: int, causal: bool) -> None:
        self.length, self.causal = length, causal
        self.rank, self.ranks = world()
        self.chunks = 2 if causal else 1
        self.size = length // (self.chunks * self.ranks)
        self.places = [self.rank, 2 * self.ranks - 1 - self.rank] if causal else [self.rank]
        #: (rank, chunk) in the order of the sequence
        self.order = [(r, 0) for r in range(self.ranks)]
        self.order += [(r, 1) for r in reversed(range(self.ranks))] if causal else []
        self.q, self.k, self.v = (self.input(name, self.rank) for name in "qkv")
        self.gathered = torch.empty(self.ranks, 2, *self.k.shape, device="cuda", dtype=BF16)

    def input(self, name: str, rank: int) -> Tensor:
        heads = GROUPS if name in "kv" else HEADS
        return randn(name, rank, self.chunks, 1, heads, self.size, DEPTH)

    def gather(self) -> tuple[Tensor, Tensor]:
        """All keys and all values (1, G, N, D) in the order of the sequence, by NCCL."""
        distributed.all_gather_into_tensor(self.gathered, torch.stack([self.k, self.v]))
        keys, values = (torch.cat([self.gathered[r, kind, c] for r, c in self.order], 2) for kind in range(2))
        return keys, values

    def seen(self, chunk: int) -> int:
        """How many keys the queries of a chunk see at most."""
        return (self.places[chunk] + 1) * self.size if self.causal else self.length

    def whole(self, name: str) -> Tensor:
        """An input of all ranks (heads, N, D), in the order of the sequence."""
        parts = [self.input(name, r) for r in range(self.ranks)]
        return torch.cat([parts[r][c] for r, c in self.order], 2)[0]


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """FlashAttention of torch; its mask ends at the last key."""
    x, y, z = (t.transpose(1, 2) for t in (q, k, v))
    found = torch.ops.aten._flash_attention_forward(x, y, z, None, None, x.shape[1], y.shape[1], 0.0, causal, False)
    return found[0].transpose(1, 2)


def cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    if causal and q.shape[2] != k.shape[2]:
        raise NotImplementedError("its mask starts at the first key")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def exact_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The output of one query (D,) in float64."""
    scores = keys.double() @ q.double() * DEPTH**-0.5
    return torch.softmax(scores, 0) @ values.double()


def ring_attention(length: int, causal: bool = False) -> Case:
    """o (C, 1, H, S / (C P), D) of this rank's chunks of the sequence."""
    s = Divided(length, causal)
    o = torch.empty_like(s.q)

    def with_attention(attend: Callable[[Tensor, Tensor, Tensor, Tensor], object]) -> Tensor:
        keys, values = s.gather()
        for chunk in range(s.chunks):
            seen = s.seen(chunk)
            attend(s.q[chunk], keys[:, :, :seen], values[:, :, :seen], o[chunk])
        return o

    def exact(rows: Tensor) -> Tensor:
        keys, values = s.whole("k"), s.whole("v")
        flat, results = s.q.reshape(-1, DEPTH), []
        for row in rows.tolist():
            chunk, head, place = row // (HEADS * s.size), row // s.size % HEADS, row % s.size
            seen = s.places[chunk] * s.size + place + 1 if causal else length
            group = head // (HEADS // GROUPS)
            results.append(exact_attention(flat[row], keys[group, :seen], values[group, :seen]))
        return torch.stack(results)

    return Case(
        "ring_attention_causal" if causal else "ring_attention",
        f"{length >> 10}k",
        {"q": s.q, "k": s.k, "v": s.v},
        {
            "gather_ours": lambda: with_attention(lambda q, k, v, out: sdpa(q, k, v, out, causal=causal)),
            "gather_flash": lambda: with_attention(lambda q, k, v, out: out.copy_(flash(q, k, v, causal))),
            "gather_cudnn": lambda: with_attention(lambda q, k, v, out: out.copy_(cudnn(q, k, v, causal))),
        },
        (s.chunks * HEADS * s.size, DEPTH),
        exact,
        4.0 * length * length * HEADS * DEPTH / s.ranks / (2 if causal else 1),
        (s.ranks - 1) * 2.0 * s.k.nbytes,
        {"gather": lambda: s.gather()[0]},
    )


def ring_attention_backward(length: int, causal: bool = False, name: str = "ring_backward") -> Case:
    """dk (C, 1, G, S / (C P), D) of this rank's chunks; forward has left all keys and values on every rank.

    Rivals compute gradients of all keys and values from the own queries, and NCCL sums them up.
    """
    s = Divided(length, causal)
    keys, values = s.gather()
    do = s.input("do", s.rank)
    o, lse = torch.empty_like(s.q), s.q.new_empty(s.q.shape[:-1], dtype=torch.float32)
    for chunk in range(s.chunks):
        seen = s.seen(chunk)
        sdpa(s.q[chunk], keys[:, :, :seen], values[:, :, :seen], o[chunk], causal=causal, lse=lse[chunk])
    dk = torch.empty_like(s.k)
    parts = torch.zeros(s.ranks, 2, *s.k.shape, device="cuda", dtype=BF16)  # what no query sees stays 0
    sums = torch.empty_like(parts[0])

    def reduced(gradients: Callable[[int], tuple[Tensor, Tensor]]) -> Tensor:
        for chunk in reversed(range(s.chunks)):  # the last chunk sees all that the first one sees
            for kind, gradient in enumerate(gradients(chunk)):
                for (r, c), part in zip(s.order, gradient.split(s.size, 2), strict=False):
                    if chunk == s.chunks - 1:
                        parts[r, kind, c].copy_(part)
                    else:
                        parts[r, kind, c] += part
        distributed.reduce_scatter_tensor(sums, parts)
        dk.copy_(sums[0])
        return dk

    def ours(deterministic: bool) -> Tensor:
        def gradients(chunk: int) -> tuple[Tensor, Tensor]:
            seen, q = s.seen(chunk), s.q[chunk]
            k, v = keys[:, :, :seen], values[:, :, :seen]
            dq, found = torch.empty_like(q), (torch.empty_like(k), torch.empty_like(v))
            sdpa_backward(q, k, v, o[chunk], do[chunk], lse[chunk], dq, *found, causal, deterministic=deterministic)
            return found

        return reduced(gradients)

    graphs: dict[str, list[tuple[Tensor, list[Tensor]]]] = {}

    def through(name: str, attend: Callable[[Tensor, Tensor, Tensor, bool], Tensor]) -> Tensor:
        if name not in graphs:
            made = []
            for chunk in range(s.chunks):
                seen = s.seen(chunk)
                leaves = [s.q[chunk], keys[:, :, :seen].clone(), values[:, :, :seen].clone()]
                leaves = [leaf.detach().requires_grad_() for leaf in leaves]
                made.append((attend(*leaves, causal), leaves))
            graphs[name] = made
        made = graphs[name]

        def gradients(chunk: int) -> tuple[Tensor, Tensor]:
            out, leaves = made[chunk]
            _, dk_part, dv_part = torch.autograd.grad(out, leaves, do[chunk], retain_graph=True)
            return dk_part, dv_part

        return reduced(gradients)

    def exact(rows: Tensor) -> Tensor:
        """From the logarithms and outputs that forward gave, which are exact enough."""
        shared, scale, results = HEADS // GROUPS, DEPTH**-0.5, []
        all_o, all_lse = (torch.empty(s.ranks, *x.shape, dtype=x.dtype, device="cuda") for x in (o, lse))
        distributed.all_gather_into_tensor(all_o, o)
        distributed.all_gather_into_tensor(all_lse, lse)
        out, logarithm = (torch.cat([x[r][c] for r, c in s.order], 2)[0] for x in (all_o, all_lse))
        q, gradient = s.whole("q"), s.whole("do")
        for row in rows.tolist():
            chunk, group, place = row // (GROUPS * s.size), row // s.size % GROUPS, row % s.size
            first = s.places[chunk] * s.size + place if causal else 0
            total = torch.zeros(DEPTH, device="cuda", dtype=torch.float64)
            for h in range(group * shared, (group + 1) * shared):
                queries, d = q[h, first:].double(), gradient[h, first:].double()
                delta = (d * out[h, first:].double()).sum(1)
                weights = torch.exp(
                    queries @ s.k[chunk, 0, group, place].double() * scale - logarithm[h, first:].double()
                )
                total += (weights * (d @ s.v[chunk, 0, group, place].double() - delta) * scale) @ queries
            results.append(total)
        return torch.stack(results)

    return Case(
        f"{name}_causal" if causal else name,
        f"{length >> 10}k",
        {"q": s.q, "k": s.k, "v": s.v, "o": o, "do": do, "lse": lse, "keys": keys, "values": values},
        {
            "ours_nccl": lambda: ours(True),
            "ours_nccl_any_order": lambda: ours(False),
            "flash_nccl": lambda: through("flash", flash),
            "cudnn_nccl": lambda: through("cudnn", cudnn),
        },
        (s.chunks * GROUPS * s.size, DEPTH),
        exact,
        10.0 * length * length * HEADS * DEPTH / s.ranks / (2 if causal else 1),
        (s.ranks - 1) * 2.0 * s.k.nbytes,
    )


def ulysses(length: int, causal: bool = False) -> Case:
    """o (1, S / P, H, D) of this rank's places of the sequence, from q, k and v (1, S / P, heads, D)."""
    rank, ranks = world()
    size = length // ranks
    shapes = {"q": HEADS, "k": GROUPS, "v": GROUPS}
    q, k, v = (randn(name, rank, 1, size, heads, DEPTH) for name, heads in shapes.items())

    def to_heads(x: Tensor) -> Tensor:
        """(1, heads / P, S, D): some heads of the whole sequence."""
        sent = x[0].view(size, ranks, -1, DEPTH).transpose(0, 1).contiguous()
        arrived = torch.empty_like(sent)
        distributed.all_to_all_single(arrived, sent)
        return arrived.view(1, length, -1, DEPTH).transpose(1, 2)

    def with_attention(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        out = attend(to_heads(q), to_heads(k), to_heads(v))
        sent = out[0].transpose(0, 1).contiguous()
        arrived = torch.empty_like(sent)
        distributed.all_to_all_single(arrived, sent)
        return arrived.view(ranks, size, -1, DEPTH).transpose(0, 1).reshape(1, size, HEADS, DEPTH)

    def ours(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out = torch.empty_like(queries)
        sdpa(queries, keys, values, out, causal=causal)
        return out

    def exact(rows: Tensor) -> Tensor:
        keys, values = (torch.cat([randn(name, r, 1, size, GROUPS, DEPTH)[0] for r in range(ranks)]) for name in "kv")
        results = []
        for row in rows.tolist():
            place, head = row // HEADS, row % HEADS
            seen, group = rank * size + place + 1 if causal else length, head // (HEADS // GROUPS)
            results.append(exact_attention(q[0, place, head], keys[:seen, group], values[:seen, group]))
        return torch.stack(results)

    return Case(
        "ulysses_causal" if causal else "ulysses",
        f"{length >> 10}k",
        {"q": q, "k": k, "v": v},
        {
            "nccl_ours": lambda: with_attention(ours),
            "nccl_flash": lambda: with_attention(lambda q, k, v: flash(q, k, v, causal)),
            "nccl_cudnn": lambda: with_attention(lambda q, k, v: cudnn(q, k, v, causal)),
        },
        (size * HEADS, DEPTH),
        exact,
        4.0 * length * length * HEADS * DEPTH / ranks / (2 if causal else 1),
        (ranks - 1) / ranks * (2.0 * q.nbytes + 2.0 * k.nbytes),
    )


LENGTHS = (16384, 32768, 65536, 131072)
WORKS: dict[str, tuple[Callable[[int], Case], Sequence[int]]] = {
    "ring_attention": (ring_attention, LENGTHS),
    "ring_attention_causal": (partial(ring_attention, causal=True), LENGTHS),
    "ring_backward": (ring_attention_backward, LENGTHS[:2]),
    "ring_backward_causal": (partial(ring_attention_backward, causal=True), LENGTHS[:2]),
    "ring_backward_any_order": (partial(ring_attention_backward, name="ring_backward_any_order"), LENGTHS[:2]),
    "ring_backward_any_order_causal": (
        partial(ring_attention_backward, causal=True, name="ring_backward_any_order"),
        LENGTHS[:2],
    ),
    "ulysses": (ulysses, LENGTHS[::2]),
    "ulysses_causal": (partial(ulysses, causal=True), LENGTHS[::2]),
}
