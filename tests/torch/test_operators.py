"""The functional operators: values and gradients against torch, in the interpreter; what they leave to torch."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
twt = import_module("tilewright.torch")
F = torch.nn.functional
functional = import_module("tilewright.torch.functional")
refusal = functional.refusal
for name in dir(twt):  # loads and so registers all
    getattr(twt, name)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def starts(*values):
    return torch.tensor(values, dtype=torch.int32)


def target():
    return torch.tensor([3, -100, 0, 19])


def normal(*shape, dtype=torch.float32, grad=False):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_same(ours, theirs, inputs, tolerance):
    """Equal values, dtypes and strides of the results, and equal gradients of all inputs for a random gradient."""
    left, right = ([x.detach().clone().requires_grad_() for x in inputs] for _ in range(2))
    y, exact = ours(*left), theirs(*right)
    torch.testing.assert_close(y, exact, rtol=tolerance, atol=tolerance, check_stride=True)
    dy = torch.randn_like(exact)
    gradients = torch.autograd.grad(y, left, dy), torch.autograd.grad(exact, right, dy)
    for gradient, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient, expected, rtol=4 * tolerance, atol=4 * tolerance)


@DTYPES
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_linear(activation, dtype):
    def exact(x, weight, bias):
        y = F.linear(x.float(), weight.float(), bias.float())
        return (ACTIVATIONS[activation](y) if activation else y).to(dtype)

    inputs = [normal(2, 5, 24, dtype=dtype), normal(17, 24, dtype=dtype), normal(17, dtype=dtype)]
    assert_same(lambda *xs: twt.linear(*xs, activation=activation), exact, inputs, TOLERANCE[dtype])


@DTYPES
def test_linear_with_a_residual(dtype):
    inputs = [normal(2, 5, 24, dtype=dtype), normal(17, 24, dtype=dtype), normal(2, 5, 17, dtype=dtype)]
    assert_same(
        lambda x, w, r: twt.linear(x, w, activation="relu", residual=r),
        lambda x, w, r: (F.relu(F.linear(x.float(), w.float())) + r.float()).to(dtype),
        inputs,
        TOLERANCE[dtype],
    )


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated_linear(activation, dtype):
    def exact(x, gate, up):
        x, gate, up = (t.float() for t in (x, gate, up))
        return (ACTIVATIONS[activation](F.linear(x, gate)) * F.linear(x, up)).to(dtype)

    inputs = [normal(2, 5, 24, dtype=dtype), *(0.3 * normal(17, 24, dtype=dtype) for _ in range(2))]
    with torch.no_grad():
        ours = twt.gated_linear(*inputs, activation)
    torch.testing.assert_close(ours, exact(*inputs), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_same(lambda *xs: twt.gated_linear(*xs, activation), exact, inputs, 2 * TOLERANCE[dtype])


def test_linear_gives_only_the_gradients_that_are_needed():
    x, weight = normal(5, 8), normal(3, 8, grad=True)
    twt.linear(x, weight, activation="silu").sum().backward()
    expected = torch.autograd.grad(F.silu(F.linear(x, weight)).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected)
    assert x.grad is None


@DTYPES
def test_matmul(dtype):
    inputs = [normal(2, 5, 24, dtype=dtype), normal(3, 24, dtype=dtype).t()]
    assert_same(twt.matmul, torch.matmul, inputs, TOLERANCE[dtype])


BATCHES = {
    "one axis": lambda: (normal(3, 5, 24), normal(3, 24, 7)),
    "heads": lambda: (normal(2, 5, 3, 24).transpose(1, 2), normal(2, 7, 3, 24).permute(0, 2, 3, 1)),
    "broadcast": lambda: (normal(3, 1, 5, 24), normal(2, 24, 7)),
    "one matrix on the left": lambda: (normal(5, 24), normal(3, 24, 7)),
    "three axes": lambda: (normal(2, 1, 3, 5, 24), normal(2, 3, 24, 7)),
}


@DTYPES
@pytest.mark.parametrize("batch", sorted(BATCHES))
def test_matmul_of_batches(batch, dtype):
    inputs = [x.to(dtype) for x in BATCHES[batch]()]
    assert refusal(twt.matmul, *inputs) is None
    assert_same(twt.matmul, torch.matmul, inputs, 2 * TOLERANCE[dtype])


def test_batches_and_heads_are_read_where_they_lie(monkeypatch):
    products, seen = import_module("tilewright.torch.products"), []
    monkeypatch.setattr(products, "batched", lambda a, b, c: seen.append((a.data_ptr(), b.data_ptr())))
    q, k = normal(2, 5, 3, 24), normal(2, 7, 3, 24)
    twt.matmul(q.transpose(1, 2), k.permute(0, 2, 3, 1))
    assert seen == [(q.data_ptr(), k.data_ptr())]


@DTYPES
@pytest.mark.parametrize(
    ("heads", "groups", "rows", "keys", "options"),
    [
        (4, 4, 19, 19, {}),
        (4, 4, 19, 19, {"is_causal": True, "scale": 0.3}),
        (4, 2, 19, 19, {"is_causal": True, "enable_gqa": True}),
        (2, 2, 7, 150, {}),
    ],
)
def test_attention(heads, groups, rows, keys, options, dtype):
    q = normal(2, rows, heads, 16, dtype=dtype).transpose(1, 2)
    k, v = (normal(2, groups, keys, 16, dtype=dtype) for _ in range(2))
    exact = F.scaled_dot_product_attention
    assert_same(
        lambda *xs: twt.attention(*xs, **options), lambda *xs: exact(*xs, **options), [q, k, v], TOLERANCE[dtype]
    )


@DTYPES
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_rms_norm(eps, dtype):
    small = [normal(3, 2, 20, dtype=dtype) * 1e-2, normal(20, dtype=dtype)]
    if dtype != torch.float16 or eps is not None:  # gradients there pass what float16 can hold
        assert_same(
            lambda *xs: twt.rms_norm(xs[0], (20,), xs[1], eps),
            lambda *xs: F.rms_norm(xs[0], (20,), xs[1], eps),
            small,
            10 * TOLERANCE[dtype],
        )
    x = normal(3, 2, 20, dtype=dtype)
    assert_same(
        lambda x: twt.rms_norm(x, (20,), eps=eps), lambda x: F.rms_norm(x, (20,), eps=eps), [x], TOLERANCE[dtype]
    )


@DTYPES
@pytest.mark.parametrize("parameters", [0, 1, 2])
def test_layer_norm(parameters, dtype):
    inputs = [normal(3, 2, 20, dtype=dtype), *(normal(20, dtype=dtype) for _ in range(parameters))]
    assert_same(
        lambda x, *p: twt.layer_norm(x, (20,), *p), lambda x, *p: F.layer_norm(x, (20,), *p), inputs, TOLERANCE[dtype]
    )


@DTYPES
@pytest.mark.parametrize(("name", "parameters"), [("rms_norm", 1), ("layer_norm", 0), ("layer_norm", 2)])
def test_norms_of_sums(name, parameters, dtype):
    ours, theirs = getattr(twt, f"add_{name}"), getattr(F, name)
    inputs = [*(normal(3, 2, 20, dtype=dtype) for _ in range(2)), *(normal(20, dtype=dtype) for _ in range(parameters))]

    def both(norm):
        def f(x, residual, *p):
            y, total = norm(x, residual, p)
            return torch.stack((y, total.sin()))

        return f

    exact = both(lambda x, residual, p: (theirs(x + residual, (20,), *p, eps=1e-5), x + residual))
    assert_same(
        both(lambda x, residual, p: ours(x, residual, (20,), *p, eps=1e-5)), exact, inputs, 2 * TOLERANCE[dtype]
    )


@DTYPES
def test_softmax(dtype):
    x = normal(3, 2, 20, dtype=dtype)
    x[1, 0, 3:] = float("-inf")
    assert_same(lambda x: twt.softmax(x, -1), lambda x: F.softmax(x, -1), [x], TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 19}],
    ids=str,
)
def test_cross_entropy(options, dtype):
    classes = target().abs() % 20 if "ignore_index" in options else target()
    assert_same(
        lambda x: twt.cross_entropy(x, classes, **options),
        lambda x: F.cross_entropy(x, classes, **options),
        [normal(4, 20, dtype=dtype)],
        TOLERANCE[dtype],
    )


def _operators():
    """Every operator that the package registers, with arguments."""
    return {
        "matmul": (normal(3, 5, grad=True), normal(5, 4, grad=True)),
        "batched_matmul": (normal(2, 3, 5, grad=True), normal(2, 5, 4, grad=True)),
        "cast_matmul": (
            normal(3, 8, grad=True),
            normal(8, 5, dtype=torch.bfloat16, grad=True),
            None,
            normal(5, dtype=torch.bfloat16, grad=True),
            False,
        ),
        "linear": (
            *(normal(2, 3, 8, grad=True), normal(4, 8, grad=True), normal(4, grad=True)),
            *(normal(2, 3, 4, grad=True), "gelu"),
        ),
        "gated_linear": (normal(2, 3, 8, grad=True), normal(4, 8, grad=True), normal(4, 8, grad=True), "silu"),
        "gated_linear_kept": (normal(2, 3, 8, grad=True), normal(4, 8, grad=True), normal(4, 8, grad=True), "gelu"),
        "gated_backward": (normal(2, 3), normal(2, 3), normal(2, 3), "silu"),
        "activation_backward": (normal(2, 3), normal(2, 3), "silu"),
        "attention": (
            *(normal(1, 2, 4, 16, grad=True), *(normal(1, 1, 4, 16, grad=True) for _ in range(2))),
            *(normal(1, 1, 4, 4, grad=True), starts(3), None, True, 0.3, 2.0),
        ),
        "attention_backward": (
            *(normal(1, 2, 4, 16), normal(1, 2, 4, 16), normal(1, 1, 4, 16), normal(1, 1, 4, 16)),
            *(normal(1, 2, 4, 16), normal(1, 2, 4), normal(1, 1, 1, 4), starts(3), 2, True, 0.3, 2.0, True),
        ),
        "attention_varlen": (
            *(normal(5, 1, 16, grad=True) for _ in range(3)),
            *(starts(0, 3, 5), starts(0, 3, 5), 3, 4, True, 2, 0.3, 2.0),
        ),
        "attention_varlen_backward": (
            *(normal(5, 2, 16), normal(5, 2, 16), normal(5, 1, 16), normal(5, 1, 16), normal(5, 2, 16), normal(2, 5)),
            *(starts(0, 3, 5), starts(0, 3, 5), 3, 4, True, None, 0.3, None),
        ),
        "attention_decode": (normal(2, 2, 16), normal(2, 1, 9, 16), normal(2, 1, 9, 16), starts(9, 4), None, 0.3),
        "grouped_mm": (normal(6, 4, grad=True), normal(2, 4, 3, grad=True), starts(0, 2, 6)),
        "grouped_mm_weights": (normal(6, 4), normal(6, 3), starts(0, 2, 6)),
        "rotary": (normal(1, 3, 2, 8, grad=True), normal(3, 4), normal(3, 4), True, False),
        "scaled_linear": (
            *(normal(3, 16).to(torch.int8), normal(4, 16).to(torch.int8), normal(3), normal(4)),  # compares arguments
            *(normal(4), torch.bfloat16, True),
        ),
        "rms_norm": (normal(2, 3, 8, grad=True), normal(8, grad=True), 1e-5),
        "add_rms_norm": (*(normal(2, 3, 8, grad=True) for _ in range(2)), normal(8, grad=True), 1e-5),
        "rms_norm_backward": (*(normal(2, 3, 8) for _ in range(3)), normal(8), normal(2, 3)),
        "layer_norm": (normal(2, 3, 8, grad=True), normal(8, grad=True), None, 1e-5),
        "add_layer_norm": (
            *(normal(2, 3, 8, grad=True) for _ in range(2)),
            *(normal(8, grad=True), normal(8, grad=True), 1e-5),
        ),
        "layer_norm_backward": (normal(2, 3, 8), None, normal(2, 3, 8), normal(8), normal(2, 3), normal(2, 3)),
        "softmax": (normal(2, 3, 8, grad=True),),
        "softmax_backward": (normal(2, 3), normal(2, 3)),
        "cross_entropy": (normal(4, 20, grad=True), target(), -100, 0.1),
        "cross_entropy_backward": (normal(4), normal(4, 20), target(), normal(4), -100, 0.1),
    }


@pytest.mark.parametrize("name", sorted(_operators()))
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.tilewright, name).default, _operators()[name])


def test_opcheck_covers_all():
    from tilewright.torch.gate import COLLECTIVES
    from tilewright.torch.operator import _libraries

    registered = {name.partition("::")[2] for name in _libraries if name.startswith("tilewright::")}
    assert registered - COLLECTIVES == set(_operators()), "those with a process group are in test_collectives.py"


def _refused():
    """(part of the reason, operator, torch's function, arguments, options)."""
    attention, exact = twt.attention, F.scaled_dot_product_attention
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    more = [normal(1, 1, 7, 16), normal(1, 1, 5, 16), normal(1, 1, 5, 16)]
    return [
        ("dtype float64", twt.softmax, F.softmax, [normal(2, 3).double(), -1], {}),
        ("the dtypes differ", twt.rms_norm, F.rms_norm, [normal(2, 3), (3,), normal(3).bfloat16()], {}),
        ("not along the last dimension", twt.softmax, F.softmax, [normal(2, 3), 0], {}),
        ("a mask of another dtype", attention, exact, [normal(1, 1, 5, 16).half()] * 3, {"attn_mask": mask.float()}),
        ("more queries", attention, exact, more, {"is_causal": True}),
        ("heads of 8", attention, exact, [normal(1, 1, 5, 8)] * 3, {}),
        ("is not positive", attention, exact, [normal(1, 1, 5, 16)] * 3, {"scale": -0.5}),
        ("scale or soft cap that is", attention, exact, [normal(1, 1, 5, 16)] * 3, {"scale": 0.0}),
        ("an empty tensor", twt.linear, F.linear, [normal(2, 0), normal(3, 0), normal(3)], {}),
        ("class weights", twt.cross_entropy, F.cross_entropy, [normal(4, 20), target(), normal(20).abs()], {}),
        ("no class indices", twt.cross_entropy, F.cross_entropy, [normal(4, 20), normal(4, 20)], {}),
        ("several dimensions", twt.layer_norm, F.layer_norm, [normal(2, 3, 4), (3, 4)], {}),
        ("1 and 2 dimensions", twt.matmul, torch.matmul, [normal(3), normal(3, 4)], {}),
    ]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's own, about its fast path
@pytest.mark.parametrize("case", _refused(), ids=lambda case: case[0])
def test_what_the_kernels_do_not_take_runs_in_torch(case):
    reason, operator, exact, args, options = case
    assert reason in refusal(operator, *args, **options)
    assert torch.equal(operator(*args, **options), exact(*args, **options))


@pytest.mark.parametrize(
    ("operator", "args", "message"),
    [
        (twt.matmul, [normal(2, 3), None], "must be Tensor, not NoneType"),
        (twt.linear, [normal(2, 3), None], "must be Tensor, not NoneType"),
        (twt.attention, [normal(1, 1, 5, 16), None, None], "must be Tensor, not NoneType"),
        (twt.cross_entropy, [normal(4, 20), 3], "must be Tensor, not int"),
        (twt.softmax, [normal(2, 3), 1.0], "must be int, not float"),
    ],
)
def test_errors_of_arguments_are_torchs(operator, args, message):
    with pytest.raises(TypeError, match=message):
        operator(*args)


def test_tensors_without_memory():
    assert twt.matmul(torch.empty(2, 3, device="meta"), torch.empty(3, 4, device="meta")).shape == (2, 4)


def test_attention_in_float32_on_a_gpu_is_left_to_torch():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        tensors = {d: [torch.empty(1, 2, 5, 64, dtype=d, device="cuda")] * 3 for d in (torch.float32, torch.bfloat16)}
        reasons = [refusal(twt.attention, *given) for given in tensors.values()]
    assert reasons == ["float32 on a GPU", None]


def test_a_gpu_without_tile_sizes_is_left_to_torch(monkeypatch):
    """Only what decides is run: no GPU is there."""
    import tilewright as tw

    support = import_module("tilewright.torch.support")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    places = {f"{kind}:{n}": target for kind in ("cuda", "hip") for n, target in enumerate(("sm_90a", "sm_75"))}
    infos = [SimpleNamespace(name=name, target=target) for name, target in places.items()]
    monkeypatch.setattr(tw, "devices", lambda: infos, raising=False)
    answers = [support._refuse_gpu.__wrapped__(n) for n in range(3)]
    assert answers[0] is None
    assert "sm_75" in answers[1] and "unknown" in answers[2]


MASKS = {
    "padding": lambda: torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)[:, None, None],
    "summand": lambda: normal(1, 2, 5, 3),
    "summand, each": lambda: normal(2, 2, 5, 3),
    "a row": lambda: torch.tensor([[True, False, True]]),
    "a row of summands": lambda: normal(3),
    "one column": lambda: normal(2, 1, 5, 1),
    "a row that sees nothing": lambda: torch.ones(5, 3, dtype=torch.bool).index_fill(0, torch.tensor(2), False),
}


@DTYPES
@pytest.mark.parametrize("mask", sorted(MASKS))
def test_attention_with_a_mask(mask, dtype):
    inputs = [normal(2, 4, 5, 16, dtype=dtype), *(normal(2, 2, 3, 16, dtype=dtype) for _ in range(2))]
    made = MASKS[mask]()
    if made.ndim == 4 and made.shape[1] == 2:
        made = made.repeat(1, 2, 1, 1)
    exact = lambda *xs, m=made: F.scaled_dot_product_attention(*xs, attn_mask=m, enable_gqa=True)  # noqa: E731
    ours = lambda *xs, m=made: twt.attention(*xs, attn_mask=m, enable_gqa=True)  # noqa: E731
    if made.dtype == torch.bool:
        assert refusal(twt.attention, *inputs, attn_mask=made, enable_gqa=True) is None
        assert_same(ours, exact, inputs, TOLERANCE[dtype])
        return
    made = made.to(dtype)
    assert refusal(twt.attention, *inputs, attn_mask=made.requires_grad_(), enable_gqa=True) is None
    left, right = ([x.detach().clone().requires_grad_() for x in (*inputs, made)] for _ in range(2))
    y = twt.attention(*left[:3], attn_mask=left[3], enable_gqa=True)
    wanted = F.scaled_dot_product_attention(*(x.float() for x in right[:3]), right[3].float(), enable_gqa=True)
    torch.testing.assert_close(y, wanted.to(dtype), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, left, dy), torch.autograd.grad(wanted, right, dy.float())
    for gradient, expected in zip(*gradients, strict=True):
        assert gradient.shape == expected.shape and gradient.dtype == dtype
        torch.testing.assert_close(gradient, expected, rtol=4 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"softcap": 2.0, "is_causal": True, "window": 3},
        {"softcap": 1.0, "attn_mask": True, "lengths": True},
        {"lengths": True, "is_causal": True},
    ],
    ids=str,
)
def test_attention_with_a_soft_cap_and_lengths(options, dtype):
    """What torch's function does not have, against formulas."""
    given = dict(options)
    if "lengths" in given:
        given["lengths"] = starts(7, 0)
    if "attn_mask" in given:
        given["attn_mask"] = normal(1, 4, 9, 9) > -1
    inputs = [normal(2, 4, 9, 16, dtype=dtype), *(normal(2, 2, 9, 16, dtype=dtype) for _ in range(2))]

    def exact(q, k, v):
        k, v = (x.float().repeat_interleave(2, 1) for x in (k, v))
        scores = q.float() @ k.mT / 4
        if "softcap" in given:
            scores = given["softcap"] * torch.tanh(scores / given["softcap"])
        rows, columns = torch.arange(9)[:, None], torch.arange(9)
        seen = torch.ones(2, 4, 9, 9, dtype=torch.bool)
        if "is_causal" in given:
            seen = seen & (columns <= rows) & (columns >= rows - given.get("window", 99))
        if "lengths" in given:
            seen = seen & (columns < given["lengths"][:, None, None, None])
        seen = seen & given.get("attn_mask", True)
        weights = scores.exp() * seen
        return ((weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)) @ v).to(dtype)

    assert refusal(twt.attention, *inputs, enable_gqa=True, **given) is None
    assert_same(lambda *xs: twt.attention(*xs, enable_gqa=True, **given), exact, inputs, TOLERANCE[dtype])
    eager = functional.eager(twt.attention)
    left = eager(*(x.float() for x in inputs), enable_gqa=True, **given).nan_to_num()
    torch.testing.assert_close(left.to(dtype), exact(*inputs), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("depth", "width"), [(96, 96), (192, 128), (256, 256)])
def test_attention_with_other_heads(depth, width):
    inputs = [normal(1, 2, 5, depth), normal(1, 2, 5, depth), normal(1, 2, 5, width)]
    options = {"is_causal": True}
    exact = F.scaled_dot_product_attention
    inputs = [x.bfloat16() for x in inputs]
    assert refusal(twt.attention, *inputs, **options) is None
    assert_same(lambda *xs: twt.attention(*xs, **options), lambda *xs: exact(*xs, **options), inputs, 2e-2)


def test_attention_in_a_window_and_with_fewer_queries():
    rows, columns = torch.arange(19)[:, None], torch.arange(19)
    seen = (columns <= rows) & (columns >= rows - 4)
    inputs = [normal(1, 2, 19, 16) for _ in range(3)]
    assert_same(
        lambda *xs: twt.attention(*xs, is_causal=True, window=4),
        lambda *xs: F.scaled_dot_product_attention(*xs, attn_mask=seen),
        inputs,
        1e-5,
    )
    inputs[0] = inputs[0][:, :, :7]
    exact = F.scaled_dot_product_attention
    assert_same(lambda *xs: twt.attention(*xs, is_causal=True), lambda *xs: exact(*xs, is_causal=True), inputs, 1e-5)
    for operator in (twt.attention, lambda *xs, **options: twt.attention(*xs[:3], dropout_p=0.5, **options)):
        with pytest.raises(ValueError, match="a window needs is_causal"):
            operator(*inputs, window=3)


def test_inside_autocast_products_are_cast_and_torch_does_the_rest():
    x, weight = normal(2, 3, 4, grad=True), normal(5, 4, grad=True)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y, expected = twt.linear(x, weight, activation="relu"), F.relu(F.linear(x, weight))
        assert refusal(twt.linear, x, weight) is None
        assert twt.softmax(x, -1).dtype == F.softmax(x, -1).dtype
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    ours, theirs = (torch.autograd.grad(z.float().square().sum(), (x, weight)) for z in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


def _mapped():
    """(function of one element, arguments with the mapped dimension, where it is)."""
    heads = [normal(3, 2, 2, 5, 16) for _ in range(3)]
    return {
        "softmax": (lambda x: twt.softmax(x, -1), [normal(3, 2, 4)], 1),
        "linear": (lambda x: twt.linear(x, _weight(), activation="silu"), [normal(2, 3, 4)], 0),
        "linear, weights": (twt.linear, [normal(3, 2, 4), normal(3, 5, 4)], 0),
        "rms_norm": (lambda x: twt.rms_norm(x, (4,)), [normal(2, 3, 4)], 1),
        "attention": (lambda *xs: twt.attention(*xs, is_causal=True), heads, 0),
    }


def _weight():
    return torch.linspace(-1, 1, 20).view(5, 4)


@pytest.mark.parametrize("name", sorted(_mapped()))
def test_vmap(name):
    function, arguments, dim = _mapped()[name]
    elements = zip(*(x.unbind(dim) for x in arguments), strict=True)
    expected = torch.stack([function(*element) for element in elements])
    torch.testing.assert_close(torch.vmap(function, in_dims=dim)(*arguments), expected)


def test_gradients_by_torch_func_are_torchs():
    x = normal(2, 3)
    ours, theirs = (torch.func.grad(lambda x, f=f: f(x, -1)[0, 0])(x) for f in (twt.softmax, F.softmax))
    torch.testing.assert_close(ours, theirs)


def test_tangents_are_torchs():
    x, tangent = normal(2, 3), normal(2, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        ours, theirs = (torch.autograd.forward_ad.unpack_dual(f(dual, -1)).tangent for f in (twt.softmax, F.softmax))
    torch.testing.assert_close(ours, theirs)


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="no activation 'swish'; it has relu, gelu, gelu_tanh, silu"):
        twt.linear(normal(2, 3), normal(4, 3), activation="swish")


def test_torch_compile_sees_one_graph():
    compiled = torch.compile(
        lambda x, weight: twt.linear(twt.softmax(x, -1), weight, activation="gelu"), backend="aot_eager", fullgraph=True
    )
    x, weight = normal(3, 4), normal(5, 4)
    torch.testing.assert_close(compiled(x, weight), F.gelu(F.linear(x.softmax(-1), weight)))
