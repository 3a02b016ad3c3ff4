"""``torch.compile(model, backend="tilewright")``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tilewright.torch.rewrite import OPERATORS, rewrite


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(..., options=)`` may say to this backend; other keys are settings of Inductor.

    ``fallback``: what compiles the rest of the graph, "inductor" or "eager" (traced by AOTAutograd, run as it is).
    ``cost_gate``: take only calls that were measured to be faster. ``operators``: names of functional operators to take
    wherever the kernels can, whatever the gate says, and no others. ``explain``: print what was taken, what not, why.
    """

    fallback: str = "inductor"
    cost_gate: bool = True
    explain: bool = False
    operators: tuple[str, ...] | None = None

    @classmethod
    def read(cls, given: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
        """Our options and Inductor's. ValueError where neither the name nor the value is known."""
        rest = dict(given or {})
        options = cls(**{name: rest.pop(name) for name in cls.__dataclass_fields__ if name in rest})
        for name in ("cost_gate", "explain"):
            if getattr(options, name) not in (True, False):
                raise ValueError(f"backend tilewright: {name}={getattr(options, name)!r} is neither True nor False")
        if options.fallback not in list(_FALLBACKS):
            known = ", ".join(_FALLBACKS)
            raise ValueError(f"backend tilewright: fallback={options.fallback!r}; it is one of {known}")
        if isinstance(options.operators, str):
            raise ValueError(f"backend tilewright: operators={options.operators!r}; it is a tuple of names")
        unknown = [name for name in options.operators or () if name not in OPERATORS]
        if unknown:
            known = ", ".join(sorted(OPERATORS))
            raise ValueError(f"backend tilewright: no operators {', '.join(map(str, unknown))}; there are {known}")
        if rest and options.fallback == "eager":
            raise ValueError(f"backend tilewright: no option {', '.join(rest)} with fallback='eager'")
        strange = rest.keys() - torch._inductor.list_options() if rest else None
        if strange:
            known = ", ".join(cls.__dataclass_fields__)
            raise ValueError(
                f"backend tilewright: no option {', '.join(strange)}; there are {known}, and settings of Inductor"
            )
        return options, rest


def compile_graph(
    module: Any, inputs: list[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """The backend: rewrites Dynamo's graph to our operators and hands it on. ``mode`` is Inductor's."""
    ours, rest = Options.read(options)
    report = rewrite(module.graph, ours.cost_gate, ours.operators)
    module.recompile()
    if ours.explain:
        print(report.text(ours.fallback))
    return _FALLBACKS[ours.fallback](module, inputs, rest, mode, ours)


def _in_group() -> bool:
    """Whether there may be collectives in a graph."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _with_collectives(ours: Options, graph: Any) -> None:
    """Rewrite products beside collectives in a graph of AOTAutograd."""
    from tilewright.torch.parallel import rewrite_collectives

    report = rewrite_collectives(graph, ours.cost_gate, ours.operators)
    if ours.explain and report.decisions:
        print(report.text(ours.fallback, "products beside collectives"))


def _inductor(
    module: Any, inputs: list[Any], settings: dict[str, Any], mode: str | None, ours: Options
) -> Callable[..., Any]:
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **settings}
    if _in_group():
        from tilewright.torch.inductor import GraphPass

        name = "post_grad_custom_pre_pass"
        key = None if ours.explain else (ours.cost_gate, ours.operators)
        patches[name] = GraphPass(partial(_with_collectives, ours), key, patches.get(name, getattr(config, name)))
    compiled: Callable[..., Any] = compile_fx(module, inputs, config_patches=patches)
    return compiled


def _eager(
    module: Any, inputs: list[Any], settings: dict[str, Any], mode: str | None, ours: Options
) -> Callable[..., Any]:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def as_it_is(traced: Any, inputs: list[Any]) -> Callable[..., Any]:
        if _in_group():
            _with_collectives(ours, traced.graph)
            traced.recompile()
        boxed: Callable[..., Any] = make_boxed_func(traced.forward)
        return boxed

    through = aot_autograd(fw_compiler=as_it_is, partition_fn=min_cut_rematerialization_partition)
    compiled: Callable[..., Any] = through(module, inputs)
    return compiled


_FALLBACKS = {"inductor": _inductor, "eager": _eager}


__all__ = ["Options", "compile_graph"]
