"""What of our operators could stand for a call in Dynamo's graph, together with its neighbours, largest first."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.torch import cast_products, gated, grouped, losses, products, sdpa
from tilewright.torch.graphs import CALLS, example, insert, is_call, is_tensor, name_of, only_user, without_dropout
from tilewright.torch.masks import Band, band_of
from tilewright.torch.spelled_attention import order_is_unseen, spelled_attention

_RELU = (F.relu, torch.relu, "relu")
_ACTIVATIONS = (F.silu, F.gelu, *_RELU)
_ADD = (operator.add, torch.add, "add")
_MULTIPLY = (operator.mul, torch.mul, "mul")
#: what a collective along another dimension is made with, and other shapes of the same rows
_REARRANGED = (
    *(torch.chunk, "chunk", torch.split, "split", torch.cat, operator.getitem),
    *("view", "reshape", torch.reshape, "flatten", torch.flatten, "contiguous"),
)
#: what makes an ordinary tensor of a collective's result, and where gradients flow hides it from view
_WAITS = ("wait_tensor", "autograd_function_apply")


@dataclass(frozen=True)
class Candidate:
    """A call of ``ours`` that would give the result of the node ``last``.

    ``consumed`` are the nodes that disappear with it, ``last`` among them.
    """

    ours: Any
    args: tuple[Any, ...]
    last: Any
    consumed: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    #: what to call it in a report
    name: str = ""
    #: the node whose result ``ours`` gives second, where it has two; ``last``'s is the first
    second: Any = None
    #: whether nothing sees in which order the result lies in memory
    any_order: bool = False


def linear(node: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Candidate]:
    """A product, with the bias, the activation, the second product and the residual that belong to it."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    ours = products.linear
    if given.get("bias") is None and beside_collective(node, given["input"]):
        # `parallel` takes the product with the collective, which is worth more than what is fused into it
        yield Candidate(ours, (), node, (node,), given, "linear")
        return
    yield from _gated(node)
    activated = _activation(node)
    if activated is not None:
        name, user = activated
        if name == "relu" or not _needs_gradient(node):
            options = {"activation": name}
            yield from _with_residual(ours, given, options, (node, user), f"linear+{name}")
            yield Candidate(ours, (), user, (node, user), {**given, **options}, f"linear+{name}")
    yield from _with_residual(ours, given, {}, (node,), "linear")
    for cast, consumed in _without_casts(node, given):
        yield Candidate(cast_products.cast_linear, (), node, consumed, cast, "cast_linear")
    yield Candidate(ours, (), node, (node,), given, "linear")


def added_product(node: Any) -> Iterator[Candidate]:
    """``addmm(bias, x, weight)``: a linear layer whose weight lies the other way, with its neighbours."""
    given = dict(zip(("input", "mat1", "mat2"), node.args, strict=False)) | dict(node.kwargs)
    bias, x, weight = (given.pop(name) for name in ("input", "mat1", "mat2"))
    if any(value != 1 for value in given.values()) or not all(map(is_tensor, (bias, x, weight))):
        return
    if example(bias).ndim != 1 or example(weight).ndim != 2:
        return
    turned = insert(node, "t", (weight,), {}, example(weight).t())
    yield from linear(node, (x, turned, bias), {})
    if not turned.users:
        turned.graph.erase_node(turned)


def loss(node: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Candidate]:
    """Cross-entropy; of logits that were only cast to float32, it reads those before the cast: it sums in float32."""
    given = dict(inspect.signature(losses.cross_entropy).bind(*args, **kwargs).arguments)
    found = _before_cast(given["input"])
    if found is not None:
        narrow, between = found
        sums = {**given, "input": narrow, "float32": True}
        yield Candidate(losses.cross_entropy, (), node, (*between, node), sums, "cross_entropy+cast")
        if not narrow.users and narrow.op in CALLS and narrow is not between[0].args[0]:
            narrow.graph.erase_node(narrow)
    yield Candidate(losses.cross_entropy, (), node, (node,), given, "cross_entropy")


def _before_cast(logits: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """16-bit logits whose cast to float32, perhaps reshaped, the loss takes; the nodes between."""
    shaped = is_call(logits, "view", "reshape", "flatten", torch.flatten) and is_tensor(logits)
    cast = logits.args[0] if shaped else logits
    if not is_call(cast, "float", "to") or not is_tensor(cast) or example(cast).dtype != torch.float32:
        return None
    narrow = cast.args[0]
    if not is_tensor(narrow) or example(narrow).dtype not in (torch.bfloat16, torch.float16):
        return None
    if example(narrow).device != example(cast).device:
        return None
    if not shaped:
        return narrow, (cast,)
    shape = tuple(example(logits).shape)
    if any(not isinstance(size, int) for size in shape):
        shape = (-1, shape[-1])
    like = example(narrow).reshape(example(logits).shape)
    return insert(logits, "reshape", (narrow, shape), {}, like), (cast, logits)


def grouped_product(node: Any) -> Iterator[Candidate]:
    """Torch's grouped product, or the stand-in of transformers where torch has none."""
    given = dict(zip(("mat_a", "mat_b"), node.args, strict=False)) | dict(node.kwargs)
    yield Candidate(grouped.grouped_mm, (), node, (node,), given, "grouped_mm")


def _gated(node: Any) -> Iterator[Candidate]:
    """``activation(x @ gate) * (x @ up)``, of which the node is either product."""
    for side in (node, only_user(node)):
        product = only_user(side)
        if not is_call(product, *_MULTIPLY) or len(product.args) != 2:
            continue
        for activated, up in (product.args, product.args[::-1]):
            gate = activated.args[0] if is_call(activated, *_ACTIVATIONS) and activated.args else None
            found = _activation(gate) if is_call(gate, F.linear) else None
            if found is None or found[1] is not activated or not is_call(up, F.linear):
                continue
            first, second = _linear_arguments(gate), _linear_arguments(up)
            single = only_user(activated) is product and only_user(up) is product
            biased = first.get("bias") is not None or second.get("bias") is not None
            if single and not biased and first["input"] is second["input"]:
                weights = {"input": first["input"], "gate": first["weight"], "up": second["weight"]}
                consumed = (gate, activated, up, product)
                kwargs = {**weights, "activation": found[0]}
                yield Candidate(gated.gated_linear, (), product, consumed, kwargs, f"gated+{found[0]}")
                return


def beside_collective(product: Any, input: Any) -> bool:
    """Whether a product's input has just been gathered from all ranks, or its result is about to be summed over them.

    Also along another dimension than the first, for which tensors are cut into parts that are put together again.
    """
    while is_call(input, *_REARRANGED) or _named(input, *_WAITS):
        sources = input.args[0] if isinstance(input.args[0], list | tuple) else input.args
        hidden = _named(input, *_WAITS)  # among what else a function of autograd is given
        input = next((source for source in sources if is_tensor(source)), None) if hidden else sources[0]
        if _named(input, "all_gather_into_tensor"):
            return True
    results = [product]
    while results:
        users = list(results.pop().users)
        if any(_named(user, "reduce_scatter_tensor", "all_reduce") for user in users):
            return True
        results += [user for user in users if is_call(user, *_REARRANGED)]
    return False


def _named(node: Any, *names: str) -> bool:
    """Whether a node calls a function of one of these names: torch has its functional collectives in two libraries."""
    return isinstance(node, torch.fx.Node) and node.op == "call_function" and name_of(node.target) in names


def _without_casts(node: Any, given: dict[str, Any]) -> Iterator[tuple[dict[str, Any], tuple[Any, ...]]]:
    """Arguments of a product with what its weight, or its input, was cast from for it alone, and the nodes that go."""
    for name in ("weight", "input"):
        found = _before_narrowing(given[name])
        if found is None or only_user(given[name]) is not node:
            continue
        source, scale, nodes = found
        if scale is None:
            yield {**given, name: source}, (*nodes, node)
        elif name == "weight":
            yield {**given, name: source, "scale": scale}, (*nodes, node)


def _before_narrowing(value: Any) -> tuple[Any, Any, tuple[Any, ...]] | None:
    """Source, scale or None, and nodes of ``source.to(half)``, or of this times a scale, in either dtype."""
    if not is_tensor(value) or example(value).dtype not in cast_products.HALVES:
        return None
    if _is_cast(value) and example(value.args[0]).dtype in cast_products.SOURCES:
        inner = value.args[0]
        scaled = _scaled_cast(inner) if only_user(inner) is value and example(inner).dtype == torch.float32 else None
        if scaled is not None:
            return scaled[0], scaled[1], (*scaled[2], value)
        return inner, None, (value,)
    return _scaled_cast(value)


def _scaled_cast(value: Any) -> tuple[Any, Any, tuple[Any, ...]] | None:
    """The same of a product of a cast with a scale."""
    if not is_call(value, *_MULTIPLY) or len(value.args) != 2 or not all(map(is_tensor, value.args)):
        return None
    for cast, scale in (value.args, value.args[::-1]):
        narrow = cast.args[0] if _is_cast(cast) and only_user(cast) is value else None
        if narrow is None or example(narrow).dtype not in cast_products.SOURCES:
            continue
        if example(cast).shape == example(value).shape and example(cast).dtype == example(value).dtype:
            return narrow, scale, (cast, value)
    return None


def _is_cast(node: Any) -> bool:
    same = is_call(node, "to", "type", "type_as", "float", "bfloat16", "half") and is_tensor(node.args[0])
    return same and example(node.args[0]).device == example(node).device


def _linear_arguments(node: Any) -> dict[str, Any]:
    return dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)


def _with_residual(
    ours: Any, given: dict[str, Any], options: dict[str, Any], nodes: tuple[Any, ...], name: str
) -> Iterator[Candidate]:
    value = without_dropout(nodes[-1])
    user = only_user(value)
    if not is_call(user, *_ADD) or user.kwargs or len(user.args) != 2 or user.args[0] is user.args[1]:
        return
    other = user.args[1] if user.args[0] is value else user.args[0]
    if is_tensor(other) and example(other).shape == example(value).shape:
        consumed = tuple(dict.fromkeys((*nodes, value, user)))
        yield Candidate(ours, (), user, consumed, {**given, **options, "residual": other}, f"{name}+residual")


def normalised(ours: Any, adding: Any) -> Callable[..., Iterator[Candidate]]:
    """Candidates for a norm: with the addition before it, then alone."""

    def candidates(node: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Candidate]:
        given = dict(inspect.signature(ours).bind(*args, **kwargs).arguments)
        yield from with_addition(adding, given, (node,))
        yield Candidate(ours, (), node, (node,), given, ours.__name__)

    return candidates


def with_addition(adding: Any, given: dict[str, Any], nodes: tuple[Any, ...]) -> Iterator[Candidate]:
    """The norm that ``nodes`` compute, together with the addition that makes its input."""
    total = given["input"]
    if not is_call(total, *_ADD) or total.kwargs or len(total.args) != 2 or not all(map(is_tensor, total.args)):
        return
    if all(example(x).shape == example(total).shape for x in total.args):
        sums = {**given, "input": total.args[0], "residual": total.args[1]}
        yield Candidate(adding, (), nodes[-1], (total, *nodes), sums, adding.__name__, second=total)


def product(node: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Candidate]:
    """A product of tensors: attention that begins with it, or the product alone."""
    found = spelled_attention(node)
    if found is not None:
        given, nodes, last = found
        yield from _attentions(last, given, nodes, "attention+softcap" if "softcap" in given else "attention")
    x, weight = args if len(args) == 2 else (None, None)
    if is_tensor(x) and is_tensor(weight) and example(weight).ndim == 2 and not beside_collective(node, x):
        for cast, consumed in _without_casts(node, {"input": x, "weight": weight}):
            turned = insert(node, "t", (cast["weight"],), {}, example(cast["weight"]).t())
            yield Candidate(cast_products.cast_linear, (), node, consumed, {**cast, "weight": turned}, "cast_linear")
            if not turned.users:
                turned.graph.erase_node(turned)
    yield Candidate(products.matmul, args, node, (node,), kwargs, "matmul")


def attention(node: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Candidate]:
    """Torch's function."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    yield from _attentions(node, dict(zip(names, args, strict=False)) | kwargs, (node,), "attention")


def _attentions(last: Any, given: dict[str, Any], nodes: tuple[Any, ...], name: str) -> Iterator[Candidate]:
    """Attention, without masks that say "causal" and without keys and values that were only repeated for heads."""

    def candidate(consumed: tuple[Any, ...], given: dict[str, Any], name: str) -> Candidate:
        return Candidate(sdpa.attention, (), last, consumed, given, name, any_order=order_is_unseen(last))

    single, repeating = _without_repetition(given)
    plain, consumed = {**given, **single}, (*repeating, *nodes)
    mask = given.get("attn_mask")
    if isinstance(mask, torch.fx.Node):
        found = _positions(band_of(mask), *(example(given[name]) for name in ("query", "key", "attn_mask")))
        if found is not None and not given.get("is_causal"):
            masked = f"{name}+window" if "window" in found else f"{name}+causal mask"
            yield candidate(consumed, {**plain, "attn_mask": None, **found}, masked)
    yield candidate(consumed, plain, name)
    if plain != given:
        yield candidate(nodes, given, name)


def _positions(band: Band | None, query: Any, key: Any, mask: Any) -> dict[str, Any] | None:
    """The arguments of attention that stand for a band."""
    if band is None or band.high != 0 or tuple(mask.shape[-2:]) != (query.shape[-2], query.shape[-2]):
        return None
    if query.shape[-2] != key.shape[-2]:
        return None
    if band.low == float("-inf"):
        return {"is_causal": True}
    return {"is_causal": True, "window": int(-band.low)} if band.low <= 0 else None


def _without_repetition(given: dict[str, Any]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Keys and values before each was repeated for the queries' heads that share it, and the nodes that did so."""
    key, value = _repeated(given["key"]), _repeated(given["value"])
    if key is None or value is None:
        return {}, ()
    return {"key": key[0], "value": value[0], "enable_gqa": True}, (*key[1], *value[1])


def _repeated(node: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """What ``x[:, :, None].expand(b, g, n, s, d).reshape(b, g * n, s, d)`` or its like repeats, and these nodes."""
    if is_call(node, torch.repeat_interleave, "repeat_interleave"):
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        whole = is_tensor(node.args[0]) and isinstance(node.args[1], int) and example(node).ndim == 4
        return (node.args[0], (node,)) if whole and dim in (1, -3) else None
    if not is_call(node, "reshape", torch.reshape, "view", "flatten"):
        return None
    wide = node.args[0]
    if not is_call(wide, "expand") or not is_tensor(wide) or example(wide).ndim != 5 or example(node).ndim != 4:
        return None
    narrow = wide.args[0]
    source = narrow.args[0] if is_call(narrow, operator.getitem, "unsqueeze", torch.unsqueeze) else None
    if not is_tensor(source) or example(source).ndim != 4:
        return None
    batch, groups, rows, depth = example(source).shape
    added, grown = example(narrow).shape, example(wide).shape
    same = (*grown[:2], *grown[3:]) == (batch, groups, rows, depth) and tuple(added) == (batch, groups, 1, rows, depth)
    return (source, (narrow, wide, node)) if same and example(node).shape[1] == groups * grown[2] else None


def _activation(node: Any) -> tuple[str, Any] | None:
    """The activation that alone uses a node's result, and its node."""
    user = only_user(node)
    if user is None or not is_call(user, *_ACTIVATIONS) or user.args[:1] != (node,):
        return None
    if user.kwargs.get("inplace") or (len(user.args) > 1 and user.args[1] is True):
        return None
    if user.target in _RELU:
        return "relu", user
    if user.target is F.silu:
        return "silu", user
    return ("gelu_tanh" if user.kwargs.get("approximate") == "tanh" else "gelu"), user


def _needs_gradient(node: Any) -> bool:
    """Whether a gradient flows here: of an activation other than relu it needs the value before, which is not kept."""
    return getattr(example(node), "requires_grad", True)


__all__ = [
    "Candidate", "added_product", "attention", "grouped_product", "linear", "loss", "normalised", "product",
    "with_addition",
]  # fmt: skip
