"""Products next to collectives in the graph of AOTAutograd, replaced by the operators of `collectives`.

On this level, forward and backward alike, tensors that are distributed over a mesh have become the tensors of one rank
and the collectives between them, whatever the model was written with. What `torch.distributed` makes of a collective
along another dimension than the first, parts that are cut off and put together again, is taken along.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as distributed

from tilewright.torch import collectives
from tilewright.torch.gate import Gate, gate_of
from tilewright.torch.report import Decision, Report, place
from tilewright.torch.support import Refusal, refuse_tensors

_aten = torch.ops.aten
_c10d = torch.ops._c10d_functional
_OURS = torch.ops.tilewright
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)
#: what may be computed earlier, if what it reads is there: it costs nothing
_FREE = (*_VIEWS, _aten.t.default, _aten.permute.default, _aten.transpose.int)


def rewrite_collectives(graph: Any, cost_gate: bool = True, only: Collection[str] | None = None) -> Report:
    """Rewrite a ``torch.fx.Graph`` of ATen's operators in place; options and report as of `rewrite`."""
    report, gate = Report(), gate_of(cost_gate, only)
    _share_gathers(graph)
    for node in list(graph.nodes):
        finder = _FINDERS.get(node.target) if node.op == "call_function" else None
        found = None if finder is None or node._erased else next(finder(node), None)
        if found is None:
            continue
        reason = _refuse(found, gate)
        if reason is None:
            found.replace()
        report.decisions.append(Decision(found.ours.__name__, place(found.products[0].node) or place(node), reason))
    return report


@dataclass(frozen=True)
class Product:
    """``left @ right`` with left (..., K); right is (K, N), or (N, K) where it is ``turned``."""

    node: Any
    left: Any
    right: Any
    turned: bool

    @classmethod
    def of(cls, node: Any) -> Product | None:
        if not isinstance(node, torch.fx.Node) or node.op != "call_function":
            return None
        if node.target is _aten.mm.default or node.target is _OURS.matmul.default:
            return cls(node, node.args[0], node.args[1], False)
        if node.target is _OURS.linear.default and tuple(node.args[2:]) == (None, None, "none"):
            return cls(node, node.args[0], node.args[1], True)
        return None

    @property
    def factor(self) -> Any:
        """The description of right as (K, N)."""
        right = _value(self.right)
        return right.t() if self.turned else right


@dataclass(frozen=True)
class Found:
    """A collective and its products: our operator's function, what it would get, and what puts it into the graph."""

    ours: Any
    rows: Any
    products: tuple[Product, ...]
    group: str
    #: whether the last dimension is gathered or scattered
    columns: bool
    replace: Callable[[], None]


def _refuse(found: Found, gate: Gate) -> Refusal:
    rows = _value(found.rows)
    factors = [product.factor for product in found.products]
    if any(not isinstance(n, int) for x in (rows, *factors) for n in x.shape):
        return "sizes that are symbols"
    if distributed.distributed_c10d._get_group_size_by_name(found.group) == 1:
        return "a group of one"
    reason = refuse_tensors(rows, *factors)
    if reason is None and rows.device.type == "cuda" and rows.dtype == torch.float32:
        reason = "dtype float32"
    widest = max(factors, key=lambda factor: factor.shape[1])
    return reason or gate(found.ours, rows, widest, found.group, found.columns)


# --- all-gather -----------------------------------------------------------------------------------


def _share_gathers(graph: Any) -> None:
    """Gather what several collectives gather, layers of one input for instance, only once."""
    known: dict[Any, Any] = {}
    for node in list(graph.nodes):
        if node.target is not _c10d.all_gather_into_tensor.default:
            continue
        first = known.setdefault((_same(node.args[0]), *node.args[1:]), node)
        waits = [user for user in node.users if user.target is _c10d.wait_tensor.default]
        before = next((user for user in first.users if user.target is _c10d.wait_tensor.default), None)
        if first is not node and before is not None and len(waits) == len(node.users):
            if not all(before < user for wait in waits for user in wait.users):
                continue
            for wait in waits:
                wait.replace_all_uses_with(before)
                graph.erase_node(wait)
            graph.erase_node(node)


def _same(node: Any) -> Any:
    """The tensor that a view of the same shape is of."""
    while node.target in _VIEWS and _value(node).shape == _value(node.args[0]).shape:
        node = node.args[0]
    return node


def _gathered(node: Any) -> Iterator[Found]:
    source, ranks, group = node.args
    wait = _only_user(node, _c10d.wait_tensor.default)
    if wait is None or not wait.users or _value(source).ndim < 2:
        return
    whole, dim = _put_together(wait, ranks)
    where = min(whole.users, default=None)
    products = tuple(product for product in _products(whole) if _movable(product.right, where, whole))
    if products:
        gather = _Gather(source, whole, dim, ranks, group)
        replace = partial(gather.replace, products)
        yield Found(collectives.all_gather_matmul, source, products, group, gather.columns, replace)


def _put_together(wait: Any, ranks: int) -> tuple[Any, int]:
    """The tensor gathered along another dimension, from the parts of that gathered along the first; and which."""
    for user in wait.users:
        parts = user.users if user.target in _SPLITS else {user: None}
        for part in parts:
            for cat in part.users:
                found = _joined(cat, ranks)
                if found is not None and found[0] is wait and found[1] == 0 and found[2] != 0:
                    return cat, found[2]
    return wait, 0


def _products(node: Any) -> Iterator[Product]:
    """The products whose left factor is a tensor, or its rows in another shape."""
    for user in node.users:
        product = Product.of(user)
        if user.target in _VIEWS and _value(user).shape[-1] == _value(node).shape[-1]:
            yield from _products(user)
        elif product is not None and product.left is node and product.right is not node:
            yield product


@dataclass(frozen=True)
class _Gather:
    """``whole``: the ranks' ``source`` behind one another along ``dim``."""

    source: Any
    whole: Any
    dim: int
    ranks: int
    group: str

    @property
    def columns(self) -> bool:
        """Whether it is the last dimension, along which the products sum."""
        return self.dim == _value(self.source).ndim - 1

    def replace(self, products: tuple[Product, ...]) -> None:
        """One call of ours before anything uses what was gathered, and with that again where others need it."""
        where = min(self.whole.users)
        for product in products:
            _move(product.right, where)
        make = _Maker(where)
        rows = make(_aten.reshape.default, self.source, [-1, _value(self.source).shape[-1]])
        factors = [_factor(make, product) for product in products]
        taken = {product.node for product in products}
        keep = any(user not in taken for user in _ends(self.whole))
        arguments = int(self.columns), self.ranks, self.group, keep
        made = make(_OURS.all_gather_matmul.default, rows, factors, *arguments)
        listed = make(operator.getitem, made, 1)
        for i, product in enumerate(products):
            result = make(operator.getitem, listed, i)
            product.node.replace_all_uses_with(self._in_order(make, result, _value(product.node).shape))
        if keep:
            again = self._in_order(make, make(operator.getitem, made, 0), _value(self.whole).shape)
            self.whole.replace_all_uses_with(again, delete_user_cb=lambda user: user not in taken)
        for product in products:
            _erase_unused(product.node)
        _erase_unused(self.whole)

    def _in_order(self, make: _Maker, tensor: Any, shape: Any) -> Any:
        """Rows rank by rank as those of a tensor of that shape, whose dimension ``dim`` they are parts of."""
        lead = prod(_value(self.source).shape[: self.dim])
        if lead != 1 and not self.columns:
            tensor = make(_aten.reshape.default, tensor, [self.ranks, lead, -1, _value(tensor).shape[-1]])
            tensor = make(_aten.permute.default, tensor, [1, 0, 2, 3])
        return make(_aten.reshape.default, tensor, [*shape])


def _ends(node: Any) -> Iterator[Any]:
    """What uses a tensor or its rows in another shape."""
    for user in node.users:
        if user.target in _VIEWS and user.users and _value(user).shape[-1] == _value(node).shape[-1]:
            yield from _ends(user)
        else:
            yield user


def _movable(node: Any, place: Any, without: Any) -> bool:
    """Whether a node is computed before another one, or may be, for nothing and ``without`` a third one."""
    if node is without:
        return False
    return node < place or (
        node.target in _FREE and all(_movable(each, place, without) for each in node.all_input_nodes)
    )


def _move(node: Any, place: Any) -> None:
    """Have a node computed before another one."""
    if not node < place:
        for each in node.all_input_nodes:
            _move(each, place)
        place.prepend(node)


# --- reduce-scatter and all-reduce ----------------------------------------------------------------


def _scattered(node: Any) -> Iterator[Found]:
    given, operation, ranks, group = node.args
    wait = _only_user(node, _c10d.wait_tensor.default)
    joined = _joined(given, ranks)
    summed, dim = given, 0
    if joined is not None and joined[2] == 0 and _single(given) and _cut_for(joined[0], given):
        summed, dim = joined[0], joined[1]
    terms = _terms(summed, single=summed is given)
    if wait is None or not terms or operation not in ("sum", "avg"):
        return
    shape = _value(summed).shape
    columns = dim == len(shape) - 1
    if columns and len(shape) < 2:
        return

    def replace() -> None:
        make = _Maker(wait)
        rows, factor = _operands(make, terms)
        if not columns and prod(shape[:dim]) != 1:
            depth = _value(rows).shape[-1]
            rows = make(_aten.reshape.default, rows, [prod(shape[:dim]), ranks, -1, depth])
            rows = make(_aten.permute.default, rows, [1, 0, 2, 3])
            rows = make(_aten.reshape.default, rows, [-1, depth])
        part = make(_OURS.matmul_reduce_scatter.default, rows, factor, int(columns), ranks, group)
        _stand_for(make, part, wait, operation, ranks)

    yield Found(collectives.matmul_reduce_scatter, terms[0].left, terms, group, columns, replace)


def _reduced(node: Any) -> Iterator[Found]:
    given, operation, group = node.args
    wait, terms = _only_user(node, _c10d.wait_tensor.default), _terms(given, single=True)
    if wait is None or not terms or operation not in ("sum", "avg"):
        return
    ranks = distributed.distributed_c10d._get_group_size_by_name(group)

    def replace() -> None:
        make = _Maker(wait)
        total = make(_OURS.matmul_all_reduce.default, *_operands(make, terms), ranks, group)
        _stand_for(make, total, wait, operation, ranks)

    yield Found(collectives.matmul_all_reduce, terms[0].left, terms, group, False, replace)


def _operands(make: _Maker, terms: tuple[Product, ...]) -> tuple[Any, Any]:
    """The rows and the factor of the one product that a sum of products is, along a longer K."""
    rows = [make(_aten.reshape.default, term.left, [-1, _value(term.left).shape[-1]]) for term in terms]
    factors = [_factor(make, term) for term in terms]
    if len(terms) == 1:
        return rows[0], factors[0]
    return make(_aten.cat.default, rows, 1), make(_aten.cat.default, factors, 0)


def _factor(make: _Maker, product: Product) -> Any:
    return make(_aten.permute.default, product.right, [1, 0]) if product.turned else product.right


def _stand_for(make: _Maker, sums: Any, wait: Any, operation: str, ranks: int) -> None:
    """Let what waits for the collective's result have our sums."""
    result = make(_aten.reshape.default, sums, [*_value(wait).shape])
    if operation == "avg":
        result = make(_aten.div.Tensor, result, ranks)
    wait.replace_all_uses_with(result)
    _erase_unused(wait)


def _terms(node: Any, *, single: bool) -> tuple[Product, ...]:
    """The products whose sum a node is, rows perhaps in another shape, and that nobody else uses; () if it is none."""
    if single and not _single(node):
        return ()
    if node.target in _VIEWS and _value(node.args[0]).shape[-1] == _value(node).shape[-1]:
        return _terms(node.args[0], single=True)
    if node.target is _aten.add.Tensor and not node.kwargs and all(isinstance(x, torch.fx.Node) for x in node.args):
        parts = [_terms(x, single=True) for x in node.args]
        whole = all(parts) and all(_value(x).shape == _value(node).shape for x in node.args)
        return sum(parts, ()) if whole else ()
    product = Product.of(node)
    return () if product is None else (product,)


# --- parts ----------------------------------------------------------------------------------------

_SPLITS = (_aten.split.Tensor, _aten.split_with_sizes.default)


def _joined(cat: Any, ranks: int) -> tuple[Any, int, int] | None:
    """(tensor, dimension that it was cut along, dimension that its parts in order are put together along)."""
    if not isinstance(cat, torch.fx.Node) or cat.target is not _aten.cat.default or len(cat.args[0]) != ranks:
        return None
    parts = [_part(node) for node in cat.args[0]]
    if any(part is None for part in parts):
        return None
    source, dim, _ = parts[0]
    extent = _value(source).shape[dim]
    if not isinstance(extent, int) or extent % ranks:
        return None
    if any(part != (source, dim, i * (extent // ranks)) for i, part in enumerate(parts)):
        return None
    if any(_value(node).shape[dim] != extent // ranks for node in cat.args[0]):
        return None
    along = cat.args[1] if len(cat.args) > 1 else 0
    return source, dim, along % _value(cat).ndim


def _part(node: Any) -> Any:
    """(tensor, dimension, where it begins) of a part that was cut off."""
    if node.target is _aten.slice.Tensor:
        given = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
        return (given[0], given[1] % _value(given[0]).ndim, given[2] or 0) if given[4] == 1 else None
    if node.target is not operator.getitem or node.args[0].target not in _SPLITS:
        return None
    split, index = node.args
    source, sizes = split.args[:2]
    dim = (split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)) % _value(source).ndim
    start = index * sizes if isinstance(sizes, int) else sum(sizes[:index])
    return source, dim, start


def _cut_for(source: Any, cat: Any) -> bool:
    """Whether nobody uses a tensor but for the parts that are put together."""
    parts = set(cat.args[0])
    users = [part for user in source.users for part in (user.users if user.target in _SPLITS else (user,))]
    return all(user in parts and set(user.users) <= {cat} for user in users)


# --- nodes ----------------------------------------------------------------------------------------


class _Maker:
    """Puts calls, with the description of their results, before a place of the graph."""

    def __init__(self, place: Any) -> None:
        self.place = place

    def __call__(self, target: Any, *args: Any) -> Any:
        graph = self.place.graph
        with graph.inserting_before(self.place):
            new = graph.call_function(target, args)
        new.meta = {key: value for key, value in self.place.meta.items() if key in ("stack_trace", "nn_module_stack")}
        values = torch.fx.node.map_arg(args, _value)
        tensors: list[Any] = []
        torch.utils._pytree.tree_map_only(torch.Tensor, tensors.append, values)
        with tensors[0].fake_mode if tensors else torch.no_grad():
            new.meta["val"] = target(*values)
        return new


def _value(node: Any) -> Any:
    """What describes a node's result."""
    return node.meta["val"]


def _erase_unused(node: Any) -> None:
    """Take a node that nobody uses out of the graph, and what only it has used, as far as that is ours to judge."""
    ours = node.target in _REPLACED or Product.of(node) is not None
    if node.op != "call_function" or node.users or not ours or node._erased:
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for each in inputs:
        _erase_unused(each)


def _single(node: Any) -> bool:
    return len(node.users) == 1


def _only_user(node: Any, target: Any) -> Any:
    """The one user of a node, if it calls ``target``."""
    user = next(iter(node.users)) if _single(node) else None
    return user if user is not None and user.target is target else None


#: what a rewrite may leave without users
_REPLACED = frozenset(
    (
        *_FREE,
        *_SPLITS,
        _aten.cat.default,
        _aten.add.Tensor,
        _aten.slice.Tensor,
        operator.getitem,
        _c10d.wait_tensor.default,
    )
) | {_c10d.all_gather_into_tensor.default, _c10d.reduce_scatter_tensor.default, _c10d.all_reduce.default}
_FINDERS = {
    _c10d.all_gather_into_tensor.default: _gathered,
    _c10d.reduce_scatter_tensor.default: _scattered,
    _c10d.all_reduce.default: _reduced,
}


__all__ = ["rewrite_collectives"]
