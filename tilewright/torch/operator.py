"""`tw.torch_op`: a function that launches tile kernels becomes a torch operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tilewright.torch.direct import make_direct, repeating
from tilewright.torch.mapping import mapped

#: torch forgets the operators of a library that is gone
_libraries: dict[str, Any] = {}
#: the types that an operator can return
_RETURNED = ("Tensor", "List[Tensor]")


def torch_op(
    schema: str,
    *,
    outputs: Callable[..., Any],
    launch: Callable[..., None],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    leading: Sequence[str] = (),
    pure: bool = False,
) -> Any:
    """Register a torch operator that eager code, autograd and torch.compile know, and return it.

    ``schema``: namespace, name and types in torch's notation, ``"mine::scale(Tensor x, float factor) -> Tensor"``.
    ``outputs(*arguments)`` gives the new tensors that the operator returns, contents undefined: one, or a tuple of
    them. It alone decides shapes, dtypes and strides, also for torch.compile, which calls it with tensors that have
    no memory: it may use what torch offers for shapes (``torch.empty_like``, ``x.new_empty``), but look at no element.
    ``launch(outputs, *arguments)`` fills them, with any number of launches of ``@tw.kernel``; on CPU tensors these run
    in the interpreter. It must not write to the arguments.

    ``backward(ctx, *gradients)`` gives the gradients of the arguments (None for those that have none), as in
    `torch.library.register_autograd`. For torch.compile it must consist of torch's operators and of others made here.
    Without ``setup_context(ctx, inputs, output)``, ``ctx.saved_tensors`` are the tensor arguments and ``ctx.numbers``
    the others, in order. Gradients through an operator without ``backward`` raise NotImplementedError.

    `torch.vmap` calls the operator once where it maps tensor arguments named in ``leading`` alone, which then have one
    more dimension in front, as all results must have; else once for each element.

    ``pure``: what ``outputs`` and ``launch`` do follows from the shapes, strides and dtypes of the tensors and the
    values of the other arguments, and is nothing but launches of kernels, views and ``torch.empty``. Calls on a GPU
    then repeat earlier ones of their kind without Python (docs/torch.md).

    Raises ValueError if the operator exists, or the schema names no namespace or what such an operator cannot do.
    """
    qualified = schema.partition("(")[0].strip()
    namespace, separator, name = qualified.partition("::")
    if not separator:
        raise ValueError(f"torch_op: no namespace in {schema!r}: write 'mine::{qualified}(...) -> ...'")
    if qualified in _libraries or torch._C._dispatch_has_kernel(qualified):
        raise ValueError(f"torch_op: the operator {qualified} exists")
    _check_schema(schema, name, leading)
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(schema.strip().removeprefix(f"{namespace}::"), tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(getattr(torch.ops, namespace), name).default
    complete, parameter = _completion(operator._schema), torch.nn.Parameter
    outputs = _checked(outputs, qualified, operator._schema.returns)

    def make(*given: Any, **named: Any) -> Any:
        return outputs(*complete(given, named))

    def run(*given: Any, **named: Any) -> Any:
        # parameters as tensors, which the fast path of launches knows
        arguments = [value.detach() if type(value) is parameter else value for value in complete(given, named)]
        made = outputs(*arguments)
        launch(made, *arguments)
        return made

    below = repeating(run) if pure else run
    save, gradient = setup_context or _save_arguments, backward or _no_backward(qualified)
    library.impl(name, below, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, make, lib=library)
    torch.library.register_autograd(qualified, gradient, setup_context=save, lib=library)
    names = [argument.name for argument in operator._schema.arguments]
    torch.library.register_vmap(qualified, mapped(operator, names, frozenset(leading)), lib=library)
    _libraries[qualified] = library
    if pure:
        keywords = any(argument.kwarg_only for argument in operator._schema.arguments)
        make_direct(operator, run, None if keywords else _recording(name, below, save, gradient, complete))
    return operator


def _check_schema(schema: str, name: str, leading: Sequence[str]) -> None:
    """ValueError for what torch can parse and operators of `torch_op` cannot be."""
    if "." in name:
        raise ValueError(f"torch_op: {name!r} names an overload: give each operator a name of its own")
    parsed = torch._C.parse_schema(schema.strip())
    aliased = any(each.alias_info is not None for each in (*parsed.arguments, *parsed.returns))
    if aliased or not parsed.returns or any(str(each.type) not in _RETURNED for each in parsed.returns):
        raise ValueError(f"torch_op: {schema!r}: an operator returns new tensors, and writes to none of its arguments")
    unknown = set(leading) - {argument.name for argument in parsed.arguments}
    if unknown:
        raise ValueError(f"torch_op: leading={leading!r}: {schema!r} has no argument {', '.join(sorted(unknown))}")


def _checked(outputs: Callable[..., Any], qualified: str, returns: Sequence[Any]) -> Callable[..., Any]:
    """``outputs`` with a clear error where it gives another number of tensors than the schema."""
    count = len(returns)
    single = count == 1 and str(returns[0].type) == "Tensor"

    def checked(*arguments: Any) -> Any:
        made = outputs(*arguments)
        several = isinstance(made, list | tuple)
        if single != isinstance(made, torch.Tensor) or single == several or (count > 1 and len(made) != count):
            found = f"{len(made)} results" if several else type(made).__name__
            wanted = "a tensor" if single else f"{count} tensors" if count > 1 else "a list of tensors"
            raise ValueError(f"{qualified}: outputs gives {found}, the schema returns {wanted}")
        if any(result is x for result in ((made,) if single else made) for x in arguments):
            raise ValueError(f"{qualified}: outputs gives an argument, and results are new tensors")
        return made

    return checked


def _completion(schema: Any) -> Callable[[tuple[Any, ...], dict[str, Any]], Sequence[Any]]:
    """A function that puts arguments into the schema's order; the dispatcher drops those that equal the default."""
    names = [argument.name for argument in schema.arguments]
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}

    def complete(given: tuple[Any, ...], named: dict[str, Any]) -> Sequence[Any]:
        if len(given) == len(names):
            return given
        return [*given, *(named[n] if n in named else defaults[n] for n in names[len(given) :])]

    return complete


def _recording(
    name: str,
    function: Callable[..., Any],
    save: Callable[..., None],
    gradient: Callable[..., Any],
    complete: Callable[..., Sequence[Any]],
) -> Callable[..., Any]:
    """What `torch.library.register_autograd` does where the dispatcher has nothing to add, in less time."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            results = function(*arguments)
        save(ctx, arguments, results)
        return results

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    apply = type(name, (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]
    return lambda *given, **named: apply(*complete(given, named))


def _save_arguments(
    ctx: Any, inputs: tuple[Any, ...], output: Any, keyword_only_inputs: Mapping[str, Any] | None = None
) -> None:
    arguments = *inputs, *(keyword_only_inputs or {}).values()
    ctx.save_for_backward(*(value for value in arguments if isinstance(value, torch.Tensor)))
    ctx.numbers = tuple(value for value in arguments if not isinstance(value, torch.Tensor))


def _no_backward(qualified: str) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(f"{qualified} has no gradient: give torch_op a backward")

    return backward


__all__ = ["torch_op"]
