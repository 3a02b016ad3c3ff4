"""Calls that repeat earlier ones without Python, on a GPU: that they do, and give the bits that Python gives."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from test_gpu import _calls, normal, twt  # noqa: E402

import tilewright as tw  # noqa: E402
from tilewright.compiler.launch import Launch  # noqa: E402
from tilewright.runtime import native  # noqa: E402
from tilewright.runtime.errors import ArgumentError  # noqa: E402
from tilewright.torch import direct  # noqa: E402

if native.extension is None:
    pytest.skip("needs the extension", allow_module_level=True)

#: whose results torch computes in part
IN_PYTHON = {"attention, masked", "cross_entropy"}
CALLS = _calls()


@pytest.fixture(params=["with a default device", "without"], autouse=True)
def _on_the_gpu(request):
    with torch.device("cuda") if request.param == "with a default device" else nullcontext():
        yield


@pytest.fixture
def no_python(monkeypatch):
    """From `forbid()` on, launches that Python makes are errors."""

    def refuse(*args, **kwargs):
        raise AssertionError("launched by Python")

    class Guard:
        def forbid(self):
            monkeypatch.setattr(Launch, "start", refuse)

        def allow(self):
            monkeypatch.undo()

    return Guard()


def fresh(value):
    """A tensor of the same kind elsewhere; floating-point values are new ones."""
    if not isinstance(value, torch.Tensor):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)
    if value.dtype == torch.bfloat16:
        copy.copy_(torch.randn_like(value) * value.float().std())
    return copy


def listed(results):
    return results if isinstance(results, tuple) else (results,)


def same(results, expected):
    for result, wanted in zip(listed(results), listed(expected), strict=True):
        assert wanted.float().abs().max() > 0
        assert result.shape == wanted.shape and result.stride() == wanted.stride()
        assert torch.equal(result.view(torch.uint8), wanted.view(torch.uint8))


def poison():
    """What the next allocations hold."""
    del [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(8)][:]


@pytest.mark.parametrize("name", sorted(set(CALLS) - IN_PYTHON))
def test_operators(name, no_python):
    torch.manual_seed(0)
    operator, tensors, others, options = CALLS[name]
    kept = []

    with torch.no_grad():
        rounds = []
        for _ in range(5):
            arguments = [fresh(x) for x in (*tensors, *others)]
            named = {key: fresh(value) for key, value in options.items()}
            with torch.autograd.profiler.profile():  # goes through Python
                rounds.append((arguments, named, operator(*arguments, **named)))
        for arguments, named, _ in rounds[:4]:  # what a function calls is seen later than itself
            operator(*arguments, **named)
        no_python.forbid()
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        for i, (arguments, named, expected) in enumerate(rounds):
            poison()
            with torch.cuda.stream(side if i % 2 else torch.cuda.current_stream()):
                kept.append(operator(*arguments, **named))
            torch.cuda.synchronize()
            same(kept[-1], expected)
        for (_, _, expected), result in zip(rounds, kept, strict=True):
            same(result, expected)  # none has been written to by a later call
        arguments, named, expected = rounds[0]
        with torch.cuda.graph(graph):
            captured = operator(*arguments, **named)
        for result in listed(captured):
            result.fill_(float("nan"))
        graph.replay()
        same(captured, expected)
        with torch.inference_mode():
            inside = operator(*arguments, **named)
            assert listed(inside)[0].is_inference()
        same(inside, expected)
        assert not listed(operator(*arguments, **named))[0].is_inference()


def test_one_tensor_as_several_arguments(no_python):
    q, k, v = (normal(1, 4, 256, 64) for _ in range(3))
    expected = [twt.attention(*x, is_causal=True).clone() for x in ((q, q, q), (q, k, v))]
    for _ in range(3):
        twt.attention(q, q, q, is_causal=True)
    no_python.forbid()
    same(twt.attention(q, k, v, is_causal=True), expected[1])
    same(twt.attention(q, q, q, is_causal=True), expected[0])
    fused = torch.stack((q, k, v), -1)
    views = [x.contiguous() for x in fused.unbind(-1)]
    same(twt.attention(*views, is_causal=True), expected[1])


def test_views_of_one_tensor(no_python):
    packed = normal(2, 256, 3, 4, 64)
    parts = [x.transpose(1, 2) for x in packed.unbind(2)]
    expected = twt.attention(*parts, is_causal=True)
    for _ in range(2):
        twt.attention(*parts, is_causal=True)
    no_python.forbid()
    result = twt.attention(*parts, is_causal=True)
    same(result, expected)
    error = (result.float() - torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True).float()).norm()
    assert error / expected.float().norm() < 1e-2


def test_alignment_shapes_and_numbers_are_told_apart():
    memory = normal(64 * 1024 + 8)
    for offset in (0, 1, 2, 8, 0, 1, 2, 8, 0, 1, 2, 8):
        x = memory[offset : offset + 64 * 1000].view(64, 1000)
        assert (twt.softmax(x, -1).float() - x.float().softmax(-1)).abs().max() < 1e-2
    for _ in range(3):
        for rows in (3, 5):
            for eps in (1e-5, 1.0):
                x, w = normal(rows, 512), normal(512)
                expected = torch.nn.functional.rms_norm(x, (512,), w, eps)
                assert (twt.rms_norm(x, (512,), w, eps).float() - expected.float()).abs().max() < 0.1


def test_gradients_modes_and_autocast_go_their_way():
    x, w = normal(64, 512), normal(256, 512, scale=0.05)
    for _ in range(4):
        twt.linear(x, w)
    leaf = w.clone().requires_grad_()
    y = twt.linear(x, leaf)
    y.float().square().sum().backward()
    assert leaf.grad.abs().max() > 0
    with torch.autocast("cuda", torch.float16):
        assert twt.linear(x, w).dtype == torch.float16
    mapped = torch.vmap(lambda a: twt.linear(a[None], w)[0])(x)
    assert torch.equal(mapped, twt.linear(x, w))
    dx = torch.func.grad(lambda a: twt.linear(a, w).float().sum())(x)
    assert dx.shape == x.shape and dx.abs().max() > 0
    with torch._subclasses.FakeTensorMode() as mode:
        fake = twt.linear(mode.from_tensor(x), mode.from_tensor(w))
    assert isinstance(fake, torch._subclasses.FakeTensor)


def test_autograds_threads():
    """Backward passes on a GPU run in a thread of their own, whose dispatcher leaves out names of dimensions."""
    x, dy = normal(256, 256).requires_grad_(), normal(256, 256)
    expected, product, repeated = twt.matmul(dy.t(), dy), torch.ops.tilewright.matmul.default, []

    class Turned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.t()

        @staticmethod
        def backward(ctx, dy):
            before = direct.counts()[str(product)][1]
            dx = product(dy.t(), dy)
            repeated.append(direct.counts()[str(product)][1] - before)
            return dx

    for _ in range(4):
        (dx,) = torch.autograd.grad(Turned.apply(x), x, dy)
        same(dx, expected)
    assert repeated[2:] == [1, 1]


def test_threads(no_python):
    """Each with its stream, at once."""
    a, b = normal(256, 4096), normal(4096, 256)
    with torch.no_grad():
        for _ in range(4):
            expected = twt.matmul(a, b)
        no_python.forbid()
        failures = []

        def work():
            try:
                with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                    for _ in range(200):
                        same(twt.matmul(a, b), expected)
            except BaseException as error:
                failures.append(error)

        torch.cuda.synchronize()
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@tw.kernel
def _scaled(x: tw.Tensor, y: tw.Tensor, factor: tw.float32, n: tw.int32, *, B: tw.constexpr = 128):
    i = tw.program_id(0)
    tw.store(y, i, tw.load(x, i, B) * factor + n.to(tw.float32))


def test_launches(no_python):
    """Numbers and addresses of a launch change, and streams."""
    x = torch.randn(1000, device="cuda")
    for i in range(3):
        _scaled[(8,)](x, torch.empty_like(x), 1.0 + i, i)
    no_python.forbid()
    stream = torch.cuda.Stream()
    for i, given in enumerate((None, stream, stream.cuda_stream, None)):
        x, y = torch.randn(1000, device="cuda"), torch.full((1000,), float("nan"), device="cuda")
        torch.cuda.synchronize()
        _scaled[(8,)](x, y, 0.5 * 2**i, -i, stream=given)
        torch.cuda.synchronize()
        assert torch.equal(y, x * (0.5 * 2**i) - i)  # exact factors, since the kernel rounds once
    _scaled[(8,)](torch.nn.Parameter(x), y.fill_(0), 2.0, 7)
    assert torch.equal(y, x * 2.0 + 7)
    no_python.allow()
    _scaled[(8,)](x, y.fill_(0), 2, 1)
    assert torch.equal(y, x * 2 + 1)
    for factor, n in ((1e300, 1), (1.0, 2**40)):
        with pytest.raises((tw.ArgumentError, ArgumentError)):
            _scaled[(8,)](x, y, factor, n)
