"""`tw.torch_op`: a user's kernel as an operator of torch."""

from __future__ import annotations

import pytest

import tilewright as tw

torch = pytest.importorskip("torch")


@tw.kernel
def scaled(x: tw.Tensor, y: tw.Tensor, factor: tw.float32, *, BM: tw.constexpr = 4, BN: tw.constexpr = 64) -> None:
    m, n = tw.program_id(0), tw.program_id(1)
    tw.store(y, (m, n), (tw.load(x, (m, n), (BM, BN)).to(tw.float32) * factor).to(y.dtype))


def launch_scaled(y, x, factor):
    scaled[(tw.cdiv(x.shape[0], 4), tw.cdiv(x.shape[1], 64))](x, y, factor)


@pytest.fixture(scope="module")
def scale():
    operator = tw.torch_op(
        "tilewright_test::scale(Tensor x, float factor=2.0) -> Tensor",
        outputs=lambda x, factor: torch.empty_like(x),
        launch=launch_scaled,
        backward=lambda ctx, dy: (operator(dy, *ctx.numbers), None),
    )
    return operator


def test_it_computes_with_defaults_and_any_strides(scale):
    x = torch.randn(70, 9).t()
    torch.testing.assert_close(scale(x), 2 * x)
    torch.testing.assert_close(scale(x, factor=-0.5), -0.5 * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(scale, dtype):
    torch.library.opcheck(scale, (torch.randn(5, 7, dtype=dtype, requires_grad=True), 3.0))


def test_the_backward_is_a_kernel_too(scale):
    x = torch.nn.Parameter(torch.randn(5, 7))
    scale(x, 3.0).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((5, 7), 3.0))


def test_torch_compile_keeps_one_graph(scale):
    compiled = torch.compile(lambda x: scale(x.sin(), 3.0) + 1, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 7, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, x.sin() * 3 + 1)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, 3 * x.cos())


def test_several_outputs_and_keyword_only_arguments():
    def launch(made, x, low, high):
        launch_scaled(made[0], x, low)
        launch_scaled(made[1], x, high)

    both = tw.torch_op(
        "tilewright_test::both(Tensor x, float low, *, float high=4.0) -> (Tensor, Tensor)",
        outputs=lambda x, low, high: (torch.empty_like(x), torch.empty_like(x)),
        launch=launch,
        backward=lambda ctx, dlow, dhigh: (ctx.numbers[0] * dlow + ctx.numbers[1] * dhigh, None),
    )
    x = torch.randn(3, 4, requires_grad=True)
    for expected, low_and_high in ((4.0, both(x, 3.0)), (5.0, both(x, 3.0, high=5.0))):
        low, high = low_and_high
        torch.testing.assert_close(low, 3 * x)
        torch.testing.assert_close(high, expected * x)
        (gradient,) = torch.autograd.grad(low.sum() + high.sum(), x)
        torch.testing.assert_close(gradient, torch.full((3, 4), 3 + expected))


def test_gradients_without_a_backward_raise():
    lone = tw.torch_op(
        "tilewright_test::lone(Tensor x) -> Tensor",
        outputs=torch.empty_like,
        launch=lambda y, x: launch_scaled(y, x, 1.0),
    )
    y = lone(torch.randn(3, 4, requires_grad=True))
    with pytest.raises(NotImplementedError, match="tilewright_test::lone has no gradient"):
        y.sum().backward()


def test_bad_schemas_are_refused(scale):
    rest = {"outputs": torch.empty_like, "launch": lambda y, x: None}
    with pytest.raises(ValueError, match="no namespace in 'plain"):
        tw.torch_op("plain(Tensor x) -> Tensor", **rest)
    with pytest.raises(ValueError, match="tilewright_test::scale exists"):
        tw.torch_op("tilewright_test::scale(Tensor x) -> Tensor", **rest)
    with pytest.raises(ValueError, match="aten::relu exists"):
        tw.torch_op("aten::relu(Tensor x) -> Tensor", **rest)
    with pytest.raises(ValueError, match="a.over' names an overload"):
        tw.torch_op("tilewright_test::a.over(Tensor x) -> Tensor", **rest)
    for returned in ("Tensor(a!) x) -> ()", "Tensor(a) x) -> Tensor(a)", "Tensor x) -> int"):
        with pytest.raises(ValueError, match="an operator returns new tensors, and writes to none"):
            tw.torch_op(f"tilewright_test::bad({returned}", **rest)
    with pytest.raises(ValueError, match="has no argument rows"):
        tw.torch_op("tilewright_test::bad(Tensor x) -> Tensor", leading=["x", "rows"], **rest)


@pytest.mark.parametrize(
    ("name", "outputs", "message"),
    [
        ("tuple", lambda x: (torch.empty_like(x),), "gives 1 results, the schema returns a tensor"),
        ("nothing", lambda x: None, "gives NoneType, the schema returns a tensor"),
        ("itself", lambda x: x, "gives an argument"),
    ],
)
def test_bad_outputs_are_refused(name, outputs, message):
    operator = tw.torch_op(f"tilewright_test::{name}(Tensor x) -> Tensor", outputs=outputs, launch=lambda y, x: None)
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=f"tilewright_test::{name}: outputs {message}"):
            operator(torch.ones(2, device=device))
