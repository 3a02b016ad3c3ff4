"""Matrix products with a collective of torch.distributed before or behind them, which run beside each other.

Ranks are those of a process group. Where its GPUs have no world, the operators are torch's collectives and products:
on the CPU, for other dtypes, without access to each other's memory, for a group of one.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.distributed as distributed
from torch.distributed import _functional_collectives as functional_collectives

from tilewright.kernels.multi_gpu.copy_engine import gather_columns_gemms, gather_gemms
from tilewright.kernels.multi_gpu.gemm_all_reduce import gemm_ar
from tilewright.kernels.multi_gpu.gemm_reduce_scatter import gemm_rs
from tilewright.kernels.multi_gpu.workspace import share, symmetric
from tilewright.torch.operator import torch_op
from tilewright.torch.support import refuse_tensors, trains
from tilewright.torch.worlds import finished, world_of

_c10d = torch.ops._c10d_functional


def _world(group: str, work: Any, x: Any, *others: Any) -> Any:
    """The world for a kind of work and its operands, None where torch does it. The same on all ranks."""
    if x.dtype == torch.float32 or refuse_tensors(x, *others) is not None:
        return None
    return world_of(group, work, x, *others)


# --- all-gather and products ----------------------------------------------------------------------


def _gather_outputs(x: Any, others: Any, dim: int, ranks: int, group: str, keep: bool) -> tuple[Any, list[Any]]:
    shape = [*x.shape]
    shape[dim] *= ranks
    return x.new_empty(shape if keep else (0, 0)), [x.new_empty((shape[0], other.shape[1])) for other in others]


def _gather_launch(made: Any, x: Any, others: Any, dim: int, ranks: int, group: str, keep: bool) -> None:
    whole, products = made
    x, others = x.contiguous(), [other.detach() for other in others]
    world = _world(group, ("gather", dim), x, *others)
    if world is None:
        gathered = _all_gather(x, dim, ranks, group)
        for other, product in zip(others, products, strict=True):
            torch.mm(gathered, other, out=product)
        if keep:
            whole.copy_(gathered)
        return
    if dim == 0:
        parts = (whole if keep else x.new_empty((ranks * x.shape[0], x.shape[1]))).view(ranks, *x.shape)
        gather_gemms(world, x, parts, others, [c.view(ranks, x.shape[0], c.shape[1]) for c in products])
    else:
        parts = x.new_empty((ranks, *x.shape))
        gather_columns_gemms(world, x, parts, others, products)
        if keep:
            whole.view(x.shape[0], ranks, x.shape[1]).copy_(parts.transpose(0, 1))
    finished(group)


def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, others, ctx.dim, ctx.ranks, ctx.group, ctx.keep = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(x, output[0], *others)


def _gather_backward(ctx: Any, dwhole: Any, dproducts: Any) -> tuple[Any, ...]:
    x, whole, *others = ctx.saved_tensors
    needs_x, needs_others, *_ = ctx.needs_input_grad
    where = ctx.dim, ctx.ranks, ctx.group
    dx, dothers = None, None
    if needs_x:
        parts = [_reduce_scatter(dy, other.t(), *where) for dy, other in zip(dproducts, others, strict=True)]
        dx = sum(parts[1:], parts[0])
    if any(needs_others) if isinstance(needs_others, list | tuple) else needs_others:
        whole = whole if ctx.keep else _all_gather(x, *where)
        dothers = [whole.t() @ dy for dy in dproducts]
    return dx, dothers, None, None, None, None


#: (the ranks' x (R, K) behind one another along ``dim``, empty unless kept; its product with each of others)
_gather = torch_op(
    "tilewright::all_gather_matmul(Tensor x, Tensor[] others, int dim, int ranks, str group, bool keep)"
    " -> (Tensor, Tensor[])",
    outputs=_gather_outputs,
    launch=_gather_launch,
    backward=_gather_backward,
    setup_context=_gather_context,
)


def _all_gather(x: Any, dim: int, ranks: int, group: str) -> Any:
    """The ranks' matrices behind one another along a dimension, by torch."""
    rows = _c10d.wait_tensor(_c10d.all_gather_into_tensor(x.contiguous(), ranks, group))
    return rows if dim == 0 else torch.cat(rows.chunk(ranks), 1)


# --- product and reduce-scatter -------------------------------------------------------------------


def _scatter_outputs(x: Any, other: Any, dim: int, ranks: int, group: str) -> Any:
    sizes = [x.shape[0], other.shape[1]]
    sizes[dim] //= ranks
    return x.new_empty(sizes)


def _scatter_launch(out: Any, x: Any, other: Any, dim: int, ranks: int, group: str) -> None:
    world = _world(group, ("scatter", dim), x, other)
    if world is None:
        product = torch.mm(x, other)
        parts = product if dim == 0 else torch.cat(product.chunk(ranks, 1))
        out.copy_(_c10d.wait_tensor(_c10d.reduce_scatter_tensor(parts, "sum", ranks, group)))
        return
    if dim == 0:
        gemm_rs(world, x, other, out)
    else:
        gemm_rs(world, other.t(), x.t(), out.t())
    finished(group)


def _scatter_backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
    (x, other), (dim, ranks, group) = ctx.saved_tensors, ctx.numbers
    needs_x, needs_other, *_ = ctx.needs_input_grad
    whole, products = _gather(dy, [other.t()] if needs_x else [], dim, ranks, group, needs_other)
    dx = products[0] if needs_x else None
    return dx, x.t() @ whole if needs_other else None, None, None, None


_reduce_scatter = torch_op(
    "tilewright::matmul_reduce_scatter(Tensor x, Tensor other, int dim, int ranks, str group) -> Tensor",
    outputs=_scatter_outputs,
    launch=_scatter_launch,
    backward=_scatter_backward,
)


# --- product and all-reduce -----------------------------------------------------------------------


def _reduce_launch(out: Any, x: Any, other: Any, ranks: int, group: str) -> None:
    world = _world(group, "reduce", x, other)
    if world is None:
        product = torch.mm(x, other)
        out.copy_(_c10d.wait_tensor(_c10d.all_reduce(product, "sum", group)))
        return
    rows, columns = out.shape
    # in one hop the sums could go to any memory, but more rows than there are would have no place
    sums = symmetric(world, "all_reduce", (ranks, share(rows, ranks), columns), out.dtype)
    gemm_ar(world, x, other, sums)
    out.copy_(torch.as_tensor(sums.local).view(-1, columns)[:rows])
    finished(group)


def _reduce_backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
    (x, other), (_, group) = ctx.saved_tensors, ctx.numbers
    total = _c10d.wait_tensor(_c10d.all_reduce(dy.contiguous(), "sum", group))
    needs_x, needs_other, *_ = ctx.needs_input_grad
    return total @ other.t() if needs_x else None, x.t() @ total if needs_other else None, None, None


_all_reduce = torch_op(
    "tilewright::matmul_all_reduce(Tensor x, Tensor other, int ranks, str group) -> Tensor",
    outputs=lambda x, other, *rest: x.new_empty((x.shape[0], other.shape[1])),
    launch=_reduce_launch,
    backward=_reduce_backward,
)


# --- functions ------------------------------------------------------------------------------------


def all_gather_matmul(input: Any, other: Any, group: Any = None, gather_dim: int = 0) -> Any:
    """``all_gather(input) @ other``: input (..., K) has a rank's part of the dimension, other (K, N).

    ``group``: a process group, a device mesh of one dimension, or None for all ranks. What has arrived is multiplied
    while the rest is on its way. The gradient of input is `matmul_reduce_scatter` of the result's: as with torch's
    own collectives, gradients are those of the sum of all ranks' losses.
    """
    group, ranks = _group(group)
    input, other = _lowered(input, other)
    dim = _dimension(input, gather_dim)
    last = dim == input.ndim - 1
    _, (product,) = _gather(input.reshape(-1, input.shape[-1]), [other], int(last), ranks, group, trains(other))
    if last:
        return product.view((*input.shape[:-1], other.shape[1]))
    return with_ranks_at(product, input.shape[:-1], dim, ranks)


def matmul_reduce_scatter(input: Any, other: Any, group: Any = None, scatter_dim: int = 0) -> Any:
    """This rank's part of the sum over ranks of ``input @ other``: input (..., K), other (K, N).

    The part is of dimension ``scatter_dim`` of the product, whose size is a multiple of the number of ranks. Parts
    are sent while the next ones are computed. The gradient is `all_gather_matmul`'s; groups and losses as there.
    """
    group, ranks = _group(group)
    input, other = _lowered(input, other)
    dim = _dimension(input, scatter_dim)
    shape = [*input.shape[:-1], other.shape[1]]
    if shape[dim] % ranks:
        raise ValueError(f"matmul_reduce_scatter: {shape[dim]} is no multiple of the number of ranks, {ranks}")
    shape[dim] //= ranks
    last = dim == input.ndim - 1
    rows = input.reshape(-1, input.shape[-1]) if last else ranks_in_front(input, dim, ranks)
    return _reduce_scatter(rows, other, int(last), ranks, group).view(shape)


def matmul_all_reduce(input: Any, other: Any, group: Any = None) -> Any:
    """The sum over ranks of ``input @ other``, on every rank: input (..., K), other (K, N).

    Groups and losses as of `all_gather_matmul`: the gradient of the sum is added up over the ranks too.
    """
    group, ranks = _group(group)
    input, other = _lowered(input, other)
    product = _all_reduce(input.reshape(-1, input.shape[-1]), other, ranks, group)
    return product.view((*input.shape[:-1], other.shape[1]))


def with_ranks_at(product: Any, shape: Any, dim: int, ranks: int) -> Any:
    """Rows (ranks * all of ``shape``, N) as a tensor of that shape whose dimension ``dim`` all ranks have a part of."""
    lead, tail = prod(shape[:dim]), shape[dim:]
    parts = product.view(ranks, lead, -1, product.shape[-1]).transpose(0, 1)
    return parts.reshape((*shape[:dim], ranks * tail[0], *tail[1:], product.shape[-1]))


def ranks_in_front(input: Any, dim: int, ranks: int) -> Any:
    """The rows of a tensor (..., K), those of each rank's part of dimension ``dim`` together."""
    lead = prod(input.shape[:dim])
    return input.reshape(lead, ranks, -1, input.shape[-1]).transpose(0, 1).reshape(-1, input.shape[-1])


def _group(group: Any) -> tuple[str, int]:
    """The name of a process group and its size."""
    group = distributed.group.WORLD if group is None else group
    name = functional_collectives._resolve_group_name(group, "")
    return name, distributed.distributed_c10d._get_group_size_by_name(name)


def _lowered(*tensors: Any) -> tuple[Any, ...]:
    """In autocast's dtype inside of it, as products are."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _dimension(input: Any, dim: int) -> int:
    if input.ndim < 2 or not -input.ndim <= dim < input.ndim:
        raise ValueError(f"an input of {input.ndim} dimensions has no rows along dimension {dim}")
    return dim % input.ndim


__all__ = [
    "all_gather_matmul",
    "matmul_all_reduce",
    "matmul_reduce_scatter",
    "ranks_in_front",
    "with_ranks_at",
]
