"""Operators whose calls repeat without Python, on a device whose kernels the interpreter runs."""

from __future__ import annotations

import threading
from importlib import import_module

import pytest

from tilewright.runtime import native

torch = pytest.importorskip("torch")
if native.extension is None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    pytest.skip("needs the extension, and a torch that it can read", allow_module_level=True)

from host_launches import HostLaunches  # noqa: E402
from test_operators import _operators as operators  # noqa: E402

import tilewright as tw  # noqa: E402

twt = import_module("tilewright.torch")
direct = import_module("tilewright.torch.direct")


@pytest.fixture
def launches(monkeypatch):
    made = HostLaunches()
    made.install(monkeypatch)
    yield made
    made.remove()
    assert not made.errors


class InFront:
    """What `Direct` puts in front of a function once it has seen a GPU; ``calls`` counts those of the function."""

    def __init__(self, function):
        self.calls = 0

        def counted(*args, **kwargs):
            self.calls += 1
            return function(*args, **kwargs)

        made = direct.Direct(counted, counted, lambda call: None)
        self.table = tw.repeated(counted, made._record, "cuda:0")

    def __call__(self, *args, **kwargs):
        return self.table(*args, **kwargs)

    def quietly(self, *args, **kwargs):
        """The result of a call that the function must have no part in."""
        calls = self.calls
        result = self(*args, **kwargs)
        assert self.calls == calls
        return result

    def by_python(self, *args, **kwargs):
        """The result of a call that the function must compute."""
        calls = self.calls
        result = self(*args, **kwargs)
        assert self.calls == calls + 1
        return result


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def heads(rows=16):
    return tuple(normal(1, 2, rows, 16) for _ in range(3))


CALLS = {
    "softmax": (twt.softmax, lambda: (normal(3, 5, 20),), {"dim": -1}),
    "softmax, bfloat16": (twt.softmax, lambda: (normal(4, 24, dtype=torch.bfloat16),), {"dim": -1}),
    "linear": (twt.linear, lambda: (normal(2, 4, 16), normal(8, 16), normal(8)), {"activation": "relu"}),
    "matmul, rows of rows": (twt.matmul, lambda: (normal(2, 4, 16), normal(16, 8)), {}),
    "matmul, turned": (twt.matmul, lambda: (normal(16, 4).T, normal(8, 16).T), {}),
    "gated_linear": (twt.gated_linear, lambda: (normal(4, 16), normal(8, 16), normal(8, 16)), {}),
    "attention": (twt.attention, heads, {"is_causal": True}),
    "attention, window": (twt.attention, heads, {"is_causal": True, "window": 3}),
    "attention, order of dimensions": (
        twt.attention,
        lambda: tuple(normal(1, 16, 2, 16).transpose(1, 2) for _ in range(3)),
        {},
    ),
    "rms_norm": (twt.rms_norm, lambda: (normal(3, 16), [16], normal(16)), {"eps": 1e-5}),
    "add_rms_norm": (twt.add_rms_norm, lambda: (normal(3, 16), normal(3, 16), (16,), normal(16), 1e-5), {}),
    "three products": (
        lambda x, w: twt.linear(twt.linear(twt.linear(x, w), w), w),
        lambda: (normal(4, 16), normal(16, 16)),
        {},
    ),
    "attention_decode": (
        twt.attention_decode,
        lambda: (
            normal(2, 2, 16),
            *(normal(2, 1, 600, 16) for _ in range(2)),
            torch.tensor([600, 5], dtype=torch.int32),
        ),
        {},
    ),
    "layer_norm": (twt.layer_norm, lambda: (normal(2, 3, 16), (16,), normal(16), normal(16)), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_repeats(launches, name):
    torch.manual_seed(0)
    function, arguments, options = CALLS[name]
    table = InFront(function)
    kept = []
    for i in range(4):
        given = arguments()
        expected = function(*given, **options)
        result = (table if i < 2 else table.quietly)(*given, **options)
        kept.append((result, expected))
    for results, wanted in kept:  # at the end: no call has written to an earlier one's results
        for x, y in zip(*(z if isinstance(z, tuple) else (z,) for z in (results, wanted)), strict=True):
            assert torch.equal(x, y) and x.abs().max() > 0
            assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
    results = [z for result, _ in kept for z in (result if isinstance(result, tuple) else (result,))]
    assert len({x.data_ptr() for x in results}) == len(results)


def _pure_operators():
    """Names of operators with arguments; of gradients, those that graphs give them too."""
    heads, row = [normal(1, 2, 4, 16) for _ in range(5)], normal(2, 8)
    return {
        **{name: arguments for name, arguments in operators().items() if overload(name) in direct.implementations},
        "attention_backward, no bias": (*heads, normal(1, 2, 4), None, None, None, True, 0.25, None, False),
        "rms_norm_backward, alone": (row, None, row, normal(8), normal(2)),
    }


def overload(name):
    return getattr(torch.ops.tilewright, name.partition(",")[0]).default


@pytest.mark.parametrize("name", _pure_operators())
def test_an_operator_repeats(launches, name):
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in _pure_operators()[name]]
    table = InFront(overload(name).direct._function)
    for _ in range(2):
        expected = table(*arguments)
    result = table.quietly(*arguments)
    for x, y in zip(*(z if isinstance(z, tuple) else (z,) for z in (result, expected)), strict=True):
        assert torch.equal(x, y) and (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
        assert not y.numel() or y.abs().max() > 0


def test_one_tensor_as_several_arguments_is_no_promise(launches):
    table = InFront(twt.attention)
    q, k, v = heads()
    for _ in range(3):
        table(q, q, q)
    assert torch.equal(table.quietly(q, k, v), twt.attention(q, k, v))
    packed = normal(1, 2, 16, 3, 16)
    parts = packed.unbind(3)
    for _ in range(2):
        table(*parts)
    assert torch.equal(table.quietly(*parts), twt.attention(*parts))


@pytest.fixture
def watched(launches):
    """A table that repeats a call, and the call's arguments."""
    table = InFront(twt.linear)
    x, w = normal(4, 16), normal(8, 16)
    for _ in range(3):
        table(x, w)
    table.quietly(x, w)
    return table, x, w


def test_gradients_are_recorded(watched):
    table, x, w = watched
    leaf = w.clone().requires_grad_()
    y = table.by_python(x, leaf)
    y.sum().backward()
    assert torch.equal(leaf.grad, x.sum(0).expand(8, 16)) or torch.allclose(leaf.grad, x.sum(0).expand(8, 16))
    with torch.no_grad():
        assert not table.quietly(x, leaf).requires_grad
    assert not table.quietly(x, torch.nn.Parameter(w, requires_grad=False)).requires_grad


RECORDED = {
    "softmax": lambda: (normal(4, 16),),
    "linear": lambda: (normal(4, 16), normal(8, 16), normal(8), None, "gelu"),
    "attention": lambda: (*heads(), None, None, None, True, 0.25, None),
    "add_rms_norm": lambda: (normal(4, 16), normal(4, 16), normal(16), 1e-5),
}


@pytest.mark.parametrize("name", RECORDED)
def test_gradients_without_the_dispatcher(launches, name):
    """An operator records its gradients itself, as what is registered with torch does."""
    operator = getattr(torch.ops.tilewright, name).default
    made = operator.direct
    calls = []

    def counted(*args):
        calls.append(args)
        return made._function(*args)

    table = tw.repeated(counted, made._record, "cuda:0", made._recorded)
    torch.manual_seed(0)
    arguments = RECORDED[name]()
    for _ in range(4):
        results = []
        for call in (table, made._function):
            given = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
            leaves = [x for x in given if isinstance(x, torch.Tensor)]
            outputs = call(*given)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            flows = [y for y in outputs if y.requires_grad]
            gradients = torch.autograd.grad(sum(y.square().sum() for y in flows), leaves)
            results.append((len(flows), *(y.detach() for y in outputs), *gradients))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert not calls
    leaf = arguments[0].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):  # the dispatcher's again
        table(leaf, *arguments[1:])
    assert len(calls) == 1


def test_second_derivatives_are_refused_there_too(launches):
    made = torch.ops.tilewright.softmax.default.direct
    table = tw.repeated(made._function, made._record, "cuda:0", made._recorded)
    x = normal(4, 16).requires_grad_()
    (dx,) = torch.autograd.grad(table(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="softmax_backward has no gradient"):
        dx.sum().backward()


def test_a_negated_view(launches):
    """Torch negates it when somebody reads it."""
    table = InFront(twt.softmax)
    x = normal(4, 16)
    for _ in range(3):
        table(x, -1)
    table.quietly(x, -1)
    torch.testing.assert_close(table.by_python(torch._neg_view(x), -1), torch.softmax(-x, -1))


def test_modes_transforms_and_autocast_are_seen(watched):
    table, x, w = watched
    seen = []

    class Dispatched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Called(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    for mode in (Dispatched(), Called()):
        with mode:
            table.by_python(x, w)
        assert any("linear" in name for name in seen)
        seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert table.by_python(x, w).dtype == torch.bfloat16
    mapped = torch.vmap(lambda a: table.by_python(a[None], w)[0])(x)
    torch.testing.assert_close(mapped, x @ w.T)
    gradient = torch.func.grad(lambda a: table.by_python(a, w).sum())(x)
    torch.testing.assert_close(gradient, w.sum(0).expand(4, 16))
    with torch.autograd.profiler.profile() as profile:
        table.by_python(x, w)
    assert any("linear" in event.name for event in profile.function_events)


def test_forward_mode_differentiation_is_seen(watched):
    table, x, w = watched
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        tangent = torch.autograd.forward_ad.unpack_dual(table.by_python(dual, w)).tangent
    torch.testing.assert_close(tangent, x @ w.T)
    table.quietly(x, w)


def test_a_default_device_is_none(watched):
    table, x, w = watched
    with torch.device("cpu"):
        table.quietly(x, w)
        with torch.autograd.profiler.profile():
            table.by_python(x, w)


def test_without_a_view_of_the_dispatcher(launches, monkeypatch):
    """The same where the extension does not find torch's state."""
    monkeypatch.setattr(native, "_LIBRARY", "no_such_library.so")
    made = HostLaunches()
    assert made.host.state() is None
    made.install(monkeypatch)
    table = InFront(twt.linear)
    x, w = normal(4, 16), normal(8, 16)
    for _ in range(3):
        table(x, w)
    table.quietly(x, w)
    test_modes_transforms_and_autocast_are_seen((table, x, w))
    made.remove()


def test_inference_mode(watched):
    table, x, w = watched
    with torch.inference_mode():
        assert table.quietly(x, w).is_inference()
    assert not table.quietly(x, w).is_inference()


def test_threads_see_their_own_modes(watched):
    table, x, w = watched
    found = []

    def work():
        found.append(table.quietly(x, w))

    with torch.autocast("cpu", torch.bfloat16):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found[0].dtype == torch.float32


def test_what_is_no_launch_is_not_repeated(launches):
    """Torch's operators between launches, results that are arguments, tensors from elsewhere."""
    x, w, hidden = normal(4, 16), normal(8, 16), normal(8)
    functions = [
        lambda x, w: twt.linear(x + 1, w),
        lambda x, w: twt.linear(x, w).relu(),
        lambda x, w: (twt.linear(x, w), x),
        lambda x, w: twt.linear(x, w)[:2],
        lambda x, w: (lambda y: (y, y.view(-1)))(twt.linear(x, w)),
        lambda x, w: twt.linear(x, w, hidden),
    ]
    for function in functions:
        table = InFront(function)
        for _ in range(4):
            result = table.by_python(x, w)
            wanted = function(x, w)
            for a, b in zip(*(z if isinstance(z, tuple) else (z,) for z in (result, wanted)), strict=True):
                assert torch.equal(a, b)


def test_results_that_are_views_of_new_tensors(launches):
    table = InFront(lambda x, w: twt.linear(x, w).t().view(2, 4, 4))
    for _ in range(4):
        x, w = normal(4, 16), normal(8, 16)
        result = table(x, w)
        assert torch.equal(result, twt.linear(x, w).t().view(2, 4, 4))
        assert result.stride() == (4, 1, 8)
    assert launches.started


def test_an_operator_and_its_name_have_classes_of_their_own():
    operator = torch.ops.tilewright.linear.default
    assert isinstance(operator, torch._ops.OpOverload)
    assert isinstance(torch.ops.tilewright.linear, torch._ops.OpOverloadPacket)
    assert torch.ops.tilewright.softmax.default.__class__ is not operator.__class__
    assert torch.ops.tilewright.linear.default is operator and operator in {operator}
    x, w = normal(2, 16), normal(8, 16)
    for call in (operator, torch.ops.tilewright.linear):
        torch.testing.assert_close(call(x, w, None, None, "none"), x @ w.T)
        torch.testing.assert_close(call(x, weight=w, bias=None, residual=None, activation="relu"), (x @ w.T).relu())
