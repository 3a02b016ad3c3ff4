"""Dynamo's graph, rewritten: calls of torch's functions become calls of our functional operators.

On this level and not on that of ATen, where attention and rms_norm are no longer one call. A call is replaced only if
the kernels take its arguments, the cost gate lets it pass, and the result has the very shape, strides and dtype that
torch's has: what follows in the graph may rely on them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch._prims_common import check_significant_strides
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tilewright.torch import candidates, cast_products, gated, grouped, losses, norms, products, rows, sdpa, spelled
from tilewright.torch.candidates import Candidate
from tilewright.torch.casting import autocast_regions, entered
from tilewright.torch.functional import eager, is_functional, refusal
from tilewright.torch.gate import COLLECTIVES, Gate, always, gate_of
from tilewright.torch.graphs import CALLS, example, is_tensor, name_of, precede, quiet
from tilewright.torch.report import Decision, Report, place
from tilewright.torch.support import IN_FORWARD_MODE, Refusal

Call = tuple[tuple[Any, ...], dict[str, Any]]
#: how calls in a graph change the level of forward-mode differentiation
_DUAL_LEVELS = {"_enter_dual_level": 1, "_exit_dual_level": -1}


def _softmax_call(input: Any, dim: Any, dtype: Any = None) -> Call:
    """`torch.softmax` has no _stacklevel."""
    return (input, dim), {"dtype": dtype}


def _bmm_call(input: Any, mat2: Any) -> Call:
    return (input, mat2), {}


#: function of torch, or name of a method -> functional operator, and what makes its arguments if they differ
_OPERATORS: dict[Any, tuple[Any, Callable[..., Call] | None]] = {
    F.linear: (products.linear, None),
    torch.matmul: (products.matmul, None),
    torch.mm: (products.matmul, None),
    operator.matmul: (products.matmul, None),
    "matmul": (products.matmul, None),
    "mm": (products.matmul, None),
    **dict.fromkeys((torch.bmm, "bmm"), (products.matmul, _bmm_call)),
    F.scaled_dot_product_attention: (sdpa.attention, None),
    F.rms_norm: (norms.rms_norm, None),
    torch.rms_norm: (norms.rms_norm, None),
    F.layer_norm: (norms.layer_norm, None),
    F.softmax: (rows.softmax, None),
    torch.softmax: (rows.softmax, _softmax_call),
    "softmax": (rows.softmax, _softmax_call),
    F.cross_entropy: (losses.cross_entropy, None),
}
#: functional operator -> the calls that could stand for one of torch's with its neighbours
_LARGER: dict[Any, Callable[..., Iterator[Candidate]]] = {
    products.linear: candidates.linear,
    products.matmul: candidates.product,
    sdpa.attention: candidates.attention,
    losses.cross_entropy: candidates.loss,
    norms.rms_norm: candidates.normalised(norms.rms_norm, norms.add_rms_norm),
    norms.layer_norm: candidates.normalised(norms.layer_norm, norms.add_layer_norm),
}
#: function that others are spelled with, or of other parameters -> what could stand for it
_FOUND_BY: dict[Any, Callable[[Any], Iterator[Candidate]]] = {
    **dict.fromkeys((torch.rsqrt, "rsqrt"), spelled.rms_norm),
    torch.addmm: candidates.added_product,
    torch._grouped_mm: candidates.grouped_product,
    getattr(F, "grouped_mm", torch._grouped_mm): candidates.grouped_product,
}
#: the same for operators of libraries that may not be there, by their names
_FOUND_BY_NAME = {"transformers.grouped_mm_fallback": candidates.grouped_product}
_OURS = {ours for ours, _ in _OPERATORS.values()}
_OURS |= {cast_products.cast_linear, gated.gated_linear, grouped.grouped_mm}
_OURS |= {norms.add_rms_norm, norms.add_layer_norm}


#: names of what may stand in a rewritten graph; those with collectives come into that of AOTAutograd (`parallel`)
OPERATORS = frozenset(operator.__name__ for operator in _OURS) | COLLECTIVES


def rewrite(graph: Any, cost_gate: bool = True, only: Collection[str] | None = None) -> Report:
    """Rewrite a ``torch.fx.Graph`` from Dynamo in place; with ``only``, for these operators, whatever the gate says."""
    report, gate = Report(), gate_of(cost_gate, only)
    regions, level = autocast_regions(graph), 0
    for node in list(graph.nodes):
        if node.op not in CALLS or node._erased:
            continue
        level += _DUAL_LEVELS.get(name_of(node.target), 0)
        if level and (is_functional(node.target) or _generator(node.target) is not None):
            if is_functional(node.target):  # which would not see that its arguments have tangents
                node.target = eager(node.target)
            report.decisions.append(Decision(name_of(node.target), place(node), IN_FORWARD_MODE))
        elif node.target in _OURS:  # the user's own calls stay; the operator itself chooses between kernels and torch
            bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
            with entered(regions[node]):
                reason = _refuse((node,), node.target, bound.args, bound.kwargs, always)
            report.decisions.append(Decision(node.target.__name__, place(node), reason))
        elif _generator(node.target) is None:
            report.calls[node] = name_of(node.target)
        else:
            with entered(regions[node]):
                decision = _decide(node, gate, regions)
            if decision is None:
                report.calls[node] = name_of(node.target)
            else:
                report.decisions.append(decision)
    return report


def _decide(node: Any, gate: Gate, regions: Mapping[Any, Any]) -> Decision | None:
    """Replace the call if it is ours to take, with as many of its neighbours as one kernel can do.

    None if nothing of ours is like it.
    """
    decision: Decision | None = None
    try:
        for candidate in _generator(node.target)(node):
            where = _position(candidate)
            if where is None or any(regions.get(other) != regions[node] for other in candidate.consumed):
                continue
            bound = inspect.signature(candidate.ours).bind(*candidate.args, **candidate.kwargs)
            stands_for = (candidate.last,) if candidate.second is None else (candidate.last, candidate.second)
            reason = _refuse(stands_for, candidate.ours, bound.args, bound.kwargs, gate, candidate.any_order)
            if reason is None:
                _replace(candidate, where, bound.args, bound.kwargs)
                return Decision(candidate.name, place(node), None)
            decision = Decision(candidate.ours.__name__, place(node), reason)
    except TypeError:
        return Decision(name_of(node.target), place(node), "arguments that ours does not have")
    return decision


def _generator(target: Any) -> Any:
    """What finds the candidates for a call of a function, None if no operator of ours is like it."""
    if target in _OPERATORS:
        return _candidates
    named = str(target).removesuffix(".default") if isinstance(target, torch._ops.OpOverload) else str(target)
    return _FOUND_BY.get(target) or _FOUND_BY_NAME.get(named)


def _candidates(node: Any) -> Iterator[Candidate]:
    ours, adapt = _OPERATORS[node.target]
    args, kwargs = adapt(*node.args, **node.kwargs) if adapt else (node.args, dict(node.kwargs))
    inspect.signature(ours).bind(*args, **kwargs)
    if ours in _LARGER:
        yield from _LARGER[ours](node, args, kwargs)
    else:
        yield Candidate(ours, args, node, (node,), kwargs, ours.__name__)


def _position(candidate: Candidate) -> Any:
    """The node before which the new call reads what all the old ones read; None if there is no such place."""
    first, last = min(candidate.consumed), candidate.last
    others = (node for node in candidate.consumed if node is not first)
    alone = all(source in candidate.consumed for node in others for source in node.all_input_nodes)
    if precede((candidate.args, candidate.kwargs), first) and (alone or quiet(first, last)):
        return first
    if candidate.second is not None:  # others may use that before the last node
        return None
    return last if quiet(first, last) else None


def _refuse(
    stands_for: tuple[Any, ...],
    ours: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    gate: Gate,
    any_order: bool = False,
) -> Refusal:
    """Why the call of ours must or should not stand for these nodes, whose values are its results in order."""
    nodes: list[Any] = []
    torch.fx.node.map_arg((args, dict(kwargs)), nodes.append)
    if any(example(n) is None for n in (*stands_for, *nodes)):
        return "values that the graph does not describe"
    if any(free_unbacked_symbols(example(n)) for n in (*stands_for, *nodes)):
        return "sizes that depend on data"
    if any(map(_is_transformed, (*stands_for, *nodes))):
        return "inside a transform of torch.func"
    values, named = torch.fx.node.map_arg((args, dict(kwargs)), example)
    if not any(isinstance(x, FakeTensor) for x in values):
        return "values that the graph does not describe"
    reason = refusal(ours, *values, **named) or gate(ours, *values, **named)
    if reason is not None:
        return reason
    results, expected = _fake(ours, values, named), tuple(map(example, stands_for))
    pairs = zip(
        results, expected[0] if len(expected) == 1 and isinstance(expected[0], tuple) else expected, strict=True
    )
    return next(filter(None, (_differs(result, wanted, any_order) for result, wanted in pairs)), None)


def _is_transformed(node: Any) -> bool:
    """Whether a node's value has axes or gradients that a transform of torch.func hides."""
    return is_tensor(node) and torch._C._functorch.is_functorch_wrapped_tensor(example(node))


def _fake(ours: Any, values: Any, named: Any) -> tuple[Any, ...]:
    """The results' description: the operator on tensors without memory."""
    # the tensors' own mode, not that of the tracing context, which Dynamo renews before it calls a backend
    mode = next(x.fake_mode for x in values if isinstance(x, FakeTensor))
    with torch.no_grad(), mode:
        results = ours(*values, **named)
    return results if isinstance(results, tuple) else (results,)


def _differs(result: Any, expected: Any, any_order: bool) -> Refusal:
    if result.dtype != expected.dtype or result.device != expected.device:
        return "the dtype of the result differs"
    if tuple(result.shape) != tuple(expected.shape):
        return "the shape of the result differs"
    same, _ = check_significant_strides(result, expected, only_cuda=False)
    return None if same or any_order else "the order of the result in memory differs"


def _replace(candidate: Candidate, where: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Put the call before the node ``where`` and take what it stands for out of the graph."""
    graph = where.graph
    with graph.inserting_before(where):
        new = graph.call_function(candidate.ours, args, dict(kwargs))
        if candidate.second is not None:
            new.meta["stack_trace"] = candidate.last.meta.get("stack_trace")
            first, second = (graph.call_function(operator.getitem, (new, i)) for i in range(2))
            second.meta = dict(candidate.second.meta)
            candidate.second.replace_all_uses_with(second, delete_user_cb=lambda user: user is not new)
            new = first
    new.meta = dict(candidate.last.meta)
    candidate.last.replace_all_uses_with(new)
    for node in sorted(candidate.consumed, reverse=True):
        if not node.users:
            graph.erase_node(node)


__all__ = ["rewrite"]
