"""Calls of operators that repeat earlier ones without Python and without torch's dispatcher.

On a GPU, where nothing records gradients, traces, maps or autocasts, all that a call of an operator does is to make its
results and to launch kernels that depend on the kinds of its arguments. `tw.repeated` keeps that, where it can.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tilewright as tw

#: operator -> its implementation, which makes the results and launches
implementations: dict[Any, Callable[..., Any]] = {}
_EMPTY = frozenset(
    (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    )
)


class _Watch(TorchDispatchMode):
    """Tells a recording of new tensors and views, and that it fails with any other operator than ours."""

    def __init__(self, recording: Any) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in implementations:
            with self:
                return implementations[func](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            self.recording.made(result)
        elif func.is_view and isinstance(result, torch.Tensor):
            self.recording.viewed(result, args[0])
        else:
            self.recording.fail(f"{func} between the launches")
        return result


class Direct:
    """A call in front of ``function`` that repeats its launches; ``traced`` is the same function, to be recorded.

    ``use`` is told what to call, first and when that changes. ``recorded`` is called where gradients are recorded and
    nothing else is at work, without it the function.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        traced: Callable[..., Any],
        use: Callable[[Callable[..., Any]], None],
        recorded: Callable[..., Any] | None = None,
    ) -> None:
        self._function, self._traced, self._use, self._recorded = function, traced, use, recorded
        use(self._first)

    def _first(self, *args: Any, **kwargs: Any) -> Any:
        """Until a call has tensors on a GPU, there is nothing to repeat."""
        result = self._function(*args, **kwargs)
        plain = (x for x in (*args, *kwargs.values()) if type(x) in (torch.Tensor, torch.nn.Parameter))
        first = next(plain, None)
        if first is not None and first.is_cuda and torch.version.hip is None:
            table = tw.repeated(self._function, self._record, f"cuda:{first.get_device()}", self._recorded)
            self._use(self._function if table is None else table)
        return result

    def _record(self, recording: Any, args: Any, kwargs: Any) -> Any:
        with _Watch(recording):
            return self._traced(*args, **kwargs)


def repeating(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which repeats its launches."""
    call = function

    def use(changed: Callable[..., Any]) -> None:
        nonlocal call
        call = changed

    Direct(function, function, use)

    @wraps(function)
    def repeated(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return repeated


def make_direct(operator: Any, implementation: Callable[..., Any], recorded: Callable[..., Any] | None) -> None:
    """Let calls of a registered operator, and of its name, repeat their launches."""
    implementations[operator] = implementation
    packet = operator.overloadpacket
    # what is called is an attribute of the class, so each gets its own
    classes = [type(type(each).__name__, (type(each),), {}) for each in (operator, packet)]

    def use(call: Callable[..., Any]) -> None:
        for each in classes:
            each.__call__ = staticmethod(call)  # type: ignore[method-assign]

    operator.direct = Direct(operator._op, implementation, use, recorded)
    operator.__class__, packet.__class__ = classes


def counts() -> dict[str, tuple[int, int]]:
    """Of each operator that has repeated launches: its calls so far, and those of them that needed no Python."""
    tables: dict[str, Any] = {str(operator): type(operator).__call__ for operator in implementations}
    return {name: (t.calls, t.repeated) for name, t in tables.items() if hasattr(t, "repeated")}


__all__ = ["Direct", "counts", "implementations", "make_direct", "repeating"]
