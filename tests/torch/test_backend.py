"""``torch.compile(backend="tilewright")`` on small models on the CPU, with eager as the fallback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
backend = import_module("tilewright.torch.backend")
F, nn = torch.nn.functional, torch.nn
ROOT = Path(__file__).parents[2]
ALL = {"fallback": "eager", "cost_gate": False}


class MLP(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(24, 40), nn.Linear(40, 24, bias=False), activation

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """A transformer block with grouped-query attention, and a loss."""

    def __init__(self, width=32, heads=4, groups=2, depth=16, classes=50):
        super().__init__()
        self.heads, self.groups, self.depth = heads, groups, depth
        self.embedding = nn.Embedding(classes, width)
        self.before, self.after, self.last = nn.RMSNorm(width), nn.LayerNorm(width), nn.LayerNorm(width, bias=False)
        self.q, self.kv = nn.Linear(width, heads * depth), nn.Linear(width, 2 * groups * depth)
        self.out = nn.Linear(heads * depth, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens, target):
        x = self.embedding(tokens)
        b, t, _ = x.shape
        h = self.before(x)
        q = self.q(h).view(b, t, self.heads, self.depth).transpose(1, 2)
        k, v = self.kv(h).view(b, t, 2, self.groups, self.depth).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, -1))
        x = x + self.down(F.relu(self.up(self.after(x))))
        logits = self.last(x) @ self.embedding.weight.t()
        return logits.softmax(-1), F.cross_entropy(logits.flatten(0, 1), target.flatten())


TAKEN = ["rms_norm", *["linear"] * 2, "attention", "linear+residual", "layer_norm", "linear+relu", "linear+residual"]
TAKEN += ["layer_norm", "matmul", "softmax", "cross_entropy"]


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


def compiled(model, **options):
    return torch.compile(model, backend=backend.compile_graph, fullgraph=True, options={**ALL, **options})


def tokens(rows=7):
    return torch.randint(0, 50, (2, rows)), torch.randint(0, 50, (2, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_of_a_block(reports, dtype):
    model, inputs = Block().to(dtype).eval(), tokens()
    with torch.no_grad():
        probabilities, loss = compiled(model)(*inputs)
        expected, expected_loss = model(*inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(probabilities, expected, rtol=tolerance, atol=tolerance, check_stride=True)
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance)
    assert [report.taken for report in reports] == [TAKEN]


def test_training_steps_of_a_block(reports):
    ours, theirs = Block(), Block()
    theirs.load_state_dict(ours.state_dict())
    for model, step in ((ours, compiled(ours)), (theirs, theirs)):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            probabilities, loss = step(*tokens())
            (loss + probabilities.square().sum()).backward()
            optimizer.step()
    for (name, weight), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert not torch.equal(ours.q.weight, Block().q.weight)
    assert [report.taken for report in reports] == [TAKEN]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU()], ids=str)
def test_an_activation_joins_its_product(reports, activation):
    model, x = MLP(activation), torch.randn(3, 24)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(reports[0].taken) == 2 and reports[0].taken[0].startswith("linear+")


class Gated(nn.Module):
    def __init__(self, width=24, hidden=40):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + F.dropout(self.down(self.up(x) * F.silu(self.gate(x))), 0.0)


@pytest.mark.parametrize("grad", [False, True])
def test_a_gated_layer_and_its_residual(reports, grad):
    model, x = Gated(), torch.randn(2, 3, 24, requires_grad=grad)
    ours, theirs = compiled(model), model
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert reports[0].taken == ["gated+silu", "linear+residual"]
    if grad:
        ours, theirs = (torch.autograd.grad(f(x).square().sum(), [x, *model.parameters()]) for f in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [lambda x: x, lambda x: x.view(-1, 50), lambda x: x.flatten(0, 1)])
def test_a_loss_reads_logits_before_their_cast(reports, shape):
    def f(x, w, target):
        logits = F.linear(x, w).float()
        return F.cross_entropy(shape(logits), target, ignore_index=3)

    x = torch.randn(*((2, 3) if shape(torch.zeros(2, 3, 50)).ndim == 2 else (6,)), 16, dtype=torch.bfloat16)
    x, w = x.requires_grad_(), torch.randn(50, 16, dtype=torch.bfloat16, requires_grad=True)
    target = torch.tensor([3, 4, 0, 49, 17, 3])
    ours, theirs = compiled(f)(x, w, target), f(x, w, target)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    gradients = (torch.autograd.grad(y, (x, w)) for y in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=5e-2, atol=5e-2)
    assert reports[0].taken == ["linear", "cross_entropy+cast"]


def _norm_of_what_changes(x, w):
    wide = x.float()
    x.mul_(3.0)
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)).to(x.dtype)


def _loss_of_what_changes(x, w):
    wide = x.float()
    x.mul_(3.0)
    return F.cross_entropy(wide, torch.tensor([1, 2, 0, 3]))


def _attention_of_what_changes(x, w):
    keys = x.view(1, 1, 4, 16)
    repeated = keys[:, :, None].expand(1, 1, 2, 4, 16).reshape(1, 2, 4, 16)
    x.mul_(3.0)
    return F.scaled_dot_product_attention(repeated + 1, repeated, repeated)


@pytest.mark.parametrize("f", [_norm_of_what_changes, _loss_of_what_changes, _attention_of_what_changes])
def test_what_changes_behind_a_cast_or_a_copy_is_read_before(f):
    x, w = torch.randn(4, 16, dtype=torch.bfloat16), torch.randn(16, dtype=torch.bfloat16)
    torch.testing.assert_close(compiled(f)(x.clone(), w), f(x.clone(), w), rtol=2e-2, atol=2e-2)


def test_a_residual_that_changes_is_read_where_it_was(reports):
    def f(x, w):
        y = F.linear(x, w)
        x.mul_(2.0)
        return y + x

    x, w = torch.randn(4, 4), torch.randn(4, 4)
    torch.testing.assert_close(compiled(f)(x.clone(), w), f(x.clone(), w), rtol=1e-5, atol=1e-5)
    assert reports[0].taken == ["linear"]


def test_a_product_stays_before_a_change_of_its_input(reports):
    def f(x, w):
        y = F.linear(input=x, weight=w)
        x.add_(1.0)
        return F.relu(y)

    x, w = torch.randn(3, 24), torch.randn(4, 24)
    torch.testing.assert_close(compiled(f)(x.clone(), w), f(x.clone(), w), rtol=1e-5, atol=1e-5)
    assert reports[0].taken == ["linear+relu"]


def test_with_gradients_an_activation_that_needs_its_input_stays(reports):
    model, x = MLP(nn.GELU()), torch.randn(3, 24)
    torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-5, atol=1e-5)
    assert reports[0].taken == ["linear", "linear"] and reports[0].others["gelu"] == 1


def test_sizes_may_change_without_compiling_again(reports):
    model = Block()
    step = torch.compile(model, backend=backend.compile_graph, fullgraph=True, dynamic=True, options=ALL)
    for rows in (5, 9, 12):
        graphs, inputs = len(reports), tokens(rows)
        for ours, theirs in zip(step(*inputs), model(*inputs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        # Dynamo may start over while it compiles for the first size
        assert len(reports) == graphs if graphs else reports[-1].taken == TAKEN


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # Inductor's own
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor compiles C++ for the CPU")
def test_inductor_compiles_the_rest(reports, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = MLP(nn.GELU()), torch.randn(3, 24, requires_grad=True)
    step = torch.compile(model, backend=backend.compile_graph, options={"cost_gate": False, "compile_threads": 1})
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), [x, *model.parameters()]) for f in (step, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert reports[0].taken == ["linear", "linear"]


def test_explain(capsys):
    def f(x):
        y = F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        return F.scaled_dot_product_attention(y, x, x).sin()

    compiled(f, explain=True)(torch.randn(1, 2, 5, 16))
    lines = capsys.readouterr().out.splitlines()
    here = f.__code__.co_firstlineno
    assert lines[0] == "tilewright: 1 of 2 calls taken, the rest to eager"
    assert lines[1].split() == ["attention", f"test_backend.py:{here + 1}", "left:", "dropout"]
    assert lines[2].split() == ["attention", f"test_backend.py:{here + 2}", "taken"]
    assert lines[3].split() == ["no", "kernel", "for:", "sin", "x1"]


def test_the_gate_leaves_the_cpu_to_torch(reports):
    x = torch.randn(3, 8, device="cpu")
    compiled(lambda x: x.softmax(-1), cost_gate=True)(x)
    assert reports[0].taken == [] and "interpreter" in reports[0].decisions[0].reason


def test_operators_may_be_asked_for_by_name(reports):
    x, w = torch.randn(3, 8), torch.randn(4, 8)
    step = compiled(lambda x, w: F.linear(x, w).softmax(-1), cost_gate=True, operators=("softmax",))
    torch.testing.assert_close(step(x, w), F.linear(x, w).softmax(-1))
    assert reports[0].taken == ["softmax"] and reports[0].decisions[0].reason == "not asked for"


def test_the_gate_on_a_gpu():
    from torch._subclasses.fake_tensor import FakeTensorMode

    import tilewright.torch as twt
    from tilewright.torch.gate import not_worthwhile

    def gate(operator, *shapes, dtype=torch.bfloat16, grad=False, **options):
        tensors = [torch.empty(shape, dtype=dtype, device="cuda", requires_grad=grad) for shape in shapes]
        return not_worthwhile(operator, *tensors, **options)

    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("speaks of the GPU that was measured")
    with FakeTensorMode():
        assert gate(twt.linear, (4096, 4096), (4096, 4096), activation="gelu") is None
        assert "small" in gate(twt.linear, (64, 64), (64, 64), activation="gelu")
        assert "cuBLAS" in gate(twt.linear, (4096, 4096), (4096, 4096))
        assert "cuBLAS" in gate(twt.linear, (16384, 4096), (512, 4096))
        assert gate(twt.linear, (4, 4096, 4096), (1024, 4096)) is None
        assert "gradient" in gate(twt.linear, (16384, 4096), (4096, 4096), grad=True)
        assert "float32" in gate(twt.linear, (4096, 4096), (4096, 4096), activation="gelu", dtype=torch.float32)
        assert gate(twt.attention, *[(1, 8, 1024, 64)] * 3) is None
        assert "2048" in gate(twt.attention, *[(1, 8, 1024, 64)] * 3, is_causal=True)
        assert "gradient" in gate(twt.attention, *[(1, 8, 1024, 64)] * 3, grad=True)
        with torch.no_grad():
            assert gate(twt.attention, *[(1, 8, 1024, 64)] * 3, grad=True) is None
            assert gate(twt.gated_linear, (4096, 4096), (4096, 4096), (4096, 4096), grad=True) is None
        assert "gradient" in gate(twt.gated_linear, (4096, 4096), (4096, 4096), (4096, 4096), grad=True)
        assert "windows" in gate(twt.attention, *[(1, 8, 4096, 64)] * 3, is_causal=True, window=100)
        capped = {"softcap": 50.0, "is_causal": True}
        assert gate(twt.attention, *[(1, 8, 4096, 128)] * 3, grad=True, **capped) is None
        assert gate(twt.attention, *[(1, 8, 4096, 128)] * 3, **capped, window=1024) is None
        assert "4096" in gate(twt.attention, *[(1, 8, 2048, 128)] * 3, **capped)
        assert gate(twt.attention, *[(1, 8, 4096, 256)] * 3, **capped) is None
        assert "short heads" in gate(twt.attention, *[(1, 8, 4096, 512)] * 3, **capped)
        assert "short heads" in gate(twt.attention, *[(1, 8, 4096, 128)] * 3, softcap=50.0)
        assert "casts" in gate(twt.cast_linear, (4096, 4096), (4096, 4096))
        for tokens, taken in ((1, False), (16, True), (64, True), (512, False)):
            x = torch.empty(tokens, 4096, dtype=torch.bfloat16, device="cuda")
            w = torch.empty(14336, 4096, dtype=torch.float8_e4m3fn, device="cuda")
            assert (not_worthwhile(twt.cast_linear, x, w) is None) == taken
        assert "casts" in gate(twt.cast_linear, (64, 4096), (14336, 4096))
        assert gate(twt.softmax, (4096, 4096), grad=True) is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.matmul(x[0], x[0]),
        lambda x: x.double().softmax(-1),
        lambda x: torch.mm(x, x.t(), out=torch.empty(4, 4)),
        lambda x: F.softmax(x, 0) + torch.softmax(x, -1, dtype=torch.float64),
        lambda x: x[x.sum(-1) > 0] @ x.t(),
        lambda x: F.layer_norm(x.t(), (4,)),
        lambda x: x.flatten(1)[:, :0] @ x[:0],
        lambda x: x.to_sparse().to_dense() @ x.t(),
    ],
)
def test_what_is_unsupported_is_no_error(function):
    x = torch.randn(4, 8)
    step = torch.compile(function, backend=backend.compile_graph, options=ALL)
    torch.testing.assert_close(step(x), function(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_a_graph_that_switches_autocast(reports, grad):
    def f(x, w):
        y = F.linear(x, w)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            inner = F.relu(F.linear(x, w))
            with torch.autocast(x.device.type, enabled=False):
                third = F.linear(x, w)
            other = F.linear(x, w)
        return y, inner, third, F.relu(other)

    x, w = torch.randn(3, 8, requires_grad=grad), torch.randn(4, 8, requires_grad=grad)
    ours, theirs = compiled(f)(x, w), f(x, w)
    assert [y.dtype for y in ours] == [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    assert reports[0].taken == ["linear", "linear+relu", "linear", "linear"]  # relu outside of the region stays there
    if grad:
        ours, theirs = (torch.autograd.grad(sum(y.float().sum() for y in ys), (x, w)) for ys in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


def test_compiled_inside_autocast(reports):
    def f(x, w):
        return F.linear(x, w).softmax(-1)

    x, w = torch.randn(3, 8), torch.randn(4, 8)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(f)(x, w), f(x, w), rtol=2e-2, atol=2e-2)
    assert [decision.reason for decision in reports[0].decisions] == [None, "inside autocast"]


def test_a_size_that_dynamo_knows_and_aotautograd_does_not(reports):
    def f(x, w, n):
        rows = n.item()
        torch._check(rows >= 0)
        torch._check(rows <= x.shape[0])
        return x[:rows] @ w

    arguments = torch.randn(8, 4), torch.randn(4, 4), torch.tensor(3)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        torch.testing.assert_close(compiled(f)(*arguments), f(*arguments))


def test_transforms_inside_of_a_graph_are_torchs(reports):
    """Weights of several models, mapped: in the graph their values have axes that it does not show."""

    def f(weights, x):
        mapped = torch.func.vmap(lambda w: F.linear(x, w).softmax(-1))(weights)
        return mapped, torch.func.grad(lambda z: F.linear(z, weights[0]).square().sum())(x), x @ weights[1].T

    weights, x = torch.randn(3, 5, 4), torch.randn(2, 4)
    torch.testing.assert_close(compiled(f)(weights, x), f(weights, x))
    assert reports[0].taken == ["matmul"]


def test_tangents_inside_of_a_graph_are_torchs(reports):
    twt, forward = import_module("tilewright.torch"), torch.autograd.forward_ad

    def f(x, tangent, w):
        with forward.dual_level():
            y = twt.rms_norm(F.linear(forward.make_dual(x, tangent), w), (5,))
            tangents = forward.unpack_dual(y).tangent
        return tangents, F.linear(x, w)

    x, tangent, w = torch.randn(2, 4), torch.randn(2, 4), torch.randn(5, 4)
    torch.testing.assert_close(compiled(f)(x, tangent, w), f(x, tangent, w))
    assert reports[0].taken == ["linear"]


def test_options_are_checked():
    with pytest.raises(ValueError, match="fallback='triton'; it is one of inductor, eager"):
        backend.Options.read({"fallback": "triton"})
    with pytest.raises(ValueError, match="no option max_autotun with fallback='eager'"):
        backend.Options.read({"fallback": "eager", "max_autotun": True})
    with pytest.raises(ValueError, match="no operators gelu; there are add_layer_norm, .*softmax"):
        backend.Options.read({"operators": ("softmax", "gelu")})
    with pytest.raises(ValueError, match="operators='softmax'; it is a tuple of names"):
        backend.Options.read({"operators": "softmax"})
    with pytest.raises(ValueError, match="no option explian; there are fallback, cost_gate, explain, operators, and"):
        backend.Options.read({"explian": True})
    with pytest.raises(ValueError, match="cost_gate='no' is neither True nor False"):
        backend.Options.read({"cost_gate": "no"})
    assert backend.Options.read({"explain": True, "max_autotune": True})[1] == {"max_autotune": True}


def test_torch_finds_the_backend_by_name(tmp_path):
    """Through the entry point of pyproject.toml, installed as pip does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"]["torch_dynamo_backends"]
    info = tmp_path / "backend_of_this_checkout-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: backend-of-this-checkout\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[torch_dynamo_backends]", *lines, ""]))
    script = (
        "import torch\n"
        "assert 'tilewright' in torch.compiler.list_backends()\n"
        f"f = torch.compile(lambda x: x.softmax(-1), backend='tilewright', options={ALL | {'explain': True}!r})\n"
        "x = torch.randn(3, 8)\n"
        "torch.testing.assert_close(f(x), x.softmax(-1))\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 calls taken" in done.stdout
