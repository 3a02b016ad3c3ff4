"""Products beside collectives: operators, gradients and ``torch.compile``, with groups of processes on the CPU.

There torch does the work inside of the operators; what our kernels do is shown by worlds of the interpreter here and in
tests/runtime/test_symmetric.py, on GPUs by tests/gpu/test_torch_collectives.py.
"""

from __future__ import annotations

import socket
from importlib import import_module

import pytest

torch = pytest.importorskip("torch")
distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available() or torch.cuda.is_available():
    pytest.skip("processes on the CPU", allow_module_level=True)
F, nn = torch.nn.functional, torch.nn
functional = import_module("torch.distributed._functional_collectives")
backend, collectives = (import_module(f"tilewright.torch.{name}") for name in ("backend", "collectives"))
parallel = import_module("tilewright.torch.parallel")
import tilewright as tw  # noqa: E402

EAGER = {"fallback": "eager", "cost_gate": False}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
AG, RS, AR = "all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce"


# --- torch's own collectives, differentiable ------------------------------------------------------


def gathered(x, dim):
    return functional.all_gather_tensor_autograd(x, dim, distributed.group.WORLD)


def scattered(x, dim, operation="sum"):
    return functional.reduce_scatter_tensor_autograd(x, operation, dim, distributed.group.WORLD)


def reduced(x, operation="sum"):
    return functional.all_reduce(x, operation, distributed.group.WORLD)


# --- several processes ----------------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_group(rank, check, size, port):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", rank=rank, world_size=size, init_method=address)
    check(rank, size)
    distributed.destroy_process_group()


def same(ours, theirs, inputs, seed):
    """Values, shapes, strides and gradients of two functions are the same."""
    a, b = ours(*inputs), theirs(*inputs)
    assert (a.shape, a.stride()) == (b.shape, b.stride())
    torch.testing.assert_close(a, b, **CLOSE)
    torch.manual_seed(seed)
    dy = torch.randn_like(b)
    gradients = (torch.autograd.grad(y, inputs, dy) for y in (a, b))
    torch.testing.assert_close(*gradients, **CLOSE)


def check_operators(rank, size):
    torch.manual_seed(rank)
    x = torch.randn(2, 3 * size, 4, 8, requires_grad=True)
    w = torch.randn(8, 6 * size, requires_grad=True)
    whole = torch.randn(8 * size, 5, requires_grad=True)
    for dim in (0, 1, -2):
        same(lambda x, w, dim=dim: collectives.all_gather_matmul(x, w, None, dim),
             lambda x, w, dim=dim: gathered(x, dim % 4) @ w, (x, w), rank)  # fmt: skip
    same(lambda x, w: collectives.all_gather_matmul(x, w, gather_dim=-1), lambda x, w: gathered(x, 3) @ w,
         (x, whole), rank)  # fmt: skip
    for dim in (1, 3, -1):
        same(lambda x, w, dim=dim: collectives.matmul_reduce_scatter(x, w, None, dim),
             lambda x, w, dim=dim: scattered(x @ w, dim % 4), (x, w), rank)  # fmt: skip
    same(collectives.matmul_all_reduce, lambda x, w: reduced(x @ w), (x, w), rank)
    with pytest.raises(ValueError, match="no multiple of the number of ranks"):
        collectives.matmul_reduce_scatter(x[:, : 3 * size - 1], w, None, 1)
    with pytest.raises(ValueError, match="no rows along dimension"):
        collectives.all_gather_matmul(x[0, 0, 0], w)


@pytest.mark.parametrize("size", [2, 3])
def test_operators_are_what_torch_computes_and_so_are_their_gradients(size):
    torch.multiprocessing.spawn(in_group, (check_operators, size, free_port()), nprocs=size)


class MLP(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.up, self.gate, self.down = (
            nn.Linear(*sizes, bias=False) for sizes in ((16, 24 * size), (16, 24 * size), (24 * size, 16))
        )

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def check_sums(rank, size):
    """A gated layer whose rows are divided: gradients of both first products are one sum, and scattered."""
    seen = recorded(parallel)
    torch.manual_seed(rank)
    x, *weights = (torch.randn(*sizes, requires_grad=True) for sizes in ((4, 3, 16), (24, 16), (24, 16), (16, 24)))

    def layer(x, gate, up, down):
        rows = gathered(x, 1)
        return scattered(F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down), 1)

    compiled = torch.compile(layer, backend=backend.compile_graph, options=EAGER)
    same(compiled, layer, (x, *weights), rank)
    assert [report.taken for report in seen] == [[AG, RS], [AG, RS]]


def check_plans(rank, size):
    """Tensor parallelism as torch spells it: rows divided among the ranks between layers, or not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    seen = recorded(parallel)
    mesh = init_device_mesh("cpu", (size,))
    forward = ["all_gather_matmul", "matmul_reduce_scatter"]
    plans = {
        True: [forward, forward, ["all_gather_matmul", *["matmul_reduce_scatter"] * 2]],
        False: [["matmul_all_reduce"], ["matmul_all_reduce"], ["matmul_all_reduce"] * 2],
    }
    for divided, expected in plans.items():
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = MLP(size)
        first = ColwiseParallel(input_layouts=Shard(1)) if divided else ColwiseParallel()
        last = RowwiseParallel(output_layouts=Shard(1)) if divided else RowwiseParallel()
        parallelize_module(model, mesh, {"up": first, "gate": first, "down": last})
        torch.manual_seed(rank if divided else 0)
        x, found = torch.randn(2, 4, 16, requires_grad=True), []
        for step in (model, torch.compile(model, backend=backend.compile_graph, options=EAGER)):
            model.zero_grad()
            x.grad = None
            with torch.no_grad():
                value = step(x)
            step(x).pow(2).sum().backward()
            found.append([value, x.grad, *(p.grad.to_local() for p in model.parameters())])
        torch.testing.assert_close(*found, **CLOSE)
        assert [report.taken for report in seen] == expected
        seen.clear()


def recorded(module):
    """The reports of a process on its graphs, as they come."""
    seen, rewrite = [], module.rewrite_collectives

    def recording(graph, *options):
        seen.append(rewrite(graph, *options))
        graph.lint()
        return seen[-1]

    module.rewrite_collectives = recording
    return seen


@pytest.mark.parametrize("check", [check_sums, check_plans])
def test_layers_match_eager(check):
    torch.multiprocessing.spawn(in_group, (check, 2, free_port()), nprocs=2)


# --- graphs ---------------------------------------------------------------------------------------


@pytest.fixture
def pretended():
    """A group of two ranks that are not there: for graphs, which nobody runs with meaning."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    distributed.destroy_process_group()


@pytest.fixture
def seen(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(parallel, "rewrite_collectives", parallel.rewrite_collectives)
    return recorded(parallel)


def shared_input(x, w):
    h = gathered(x, 1)
    return F.linear(h, w) * F.silu(F.linear(h, w + 1)) + h.sum()


GRAPHS = {
    "rows gathered": (lambda x, w: F.linear(gathered(x, 0), w), 16, [AG], [RS]),
    "another dimension gathered": (lambda x, w: F.linear(gathered(x, 1), w), 16, [AG], [RS]),
    "the last dimension gathered": (lambda x, w: F.linear(gathered(x, 2), w), 32, [AG], [RS]),
    "rows scattered": (lambda x, w: scattered(F.linear(x, w), 0), 16, [RS], [AG]),
    "another dimension scattered": (lambda x, w: scattered(F.linear(x, w), 1), 16, [RS], [AG]),
    "the last dimension scattered": (lambda x, w: scattered(F.linear(x, w), 2), 16, [RS], [AG]),
    "reduced": (lambda x, w: reduced(x @ w.t()), 16, [AR], []),
    "two products of what was gathered, and more": (shared_input, 16, [AG], []),
    "two products of what was gathered": (
        lambda x, w: F.linear(h := gathered(x, 1), w) * F.linear(h, w + 1), 16, [AG], [RS]),
    "a product with itself": (lambda x, w: (h := gathered(x, 1).flatten(0, 1)) @ h.t() + w.sum(), 16, [], []),
    "a product that others use": (lambda x, w: (y := F.linear(x, w)).sum() + reduced(y), 16, [], []),
    "a bias": (lambda x, w: F.linear(gathered(x, 0), w, w[:, 0]), 16, [], [RS]),
    "a maximum": (lambda x, w: reduced(F.linear(x, w).detach(), "max") * w.sum(), 16, [], []),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_found(name, pretended, seen):
    function, depth, forward, backward = GRAPHS[name]
    x, w = torch.randn(2, 8, 16, requires_grad=True), torch.randn(32, depth, requires_grad=True)
    compiled = torch.compile(function, backend=backend.compile_graph, options=EAGER)
    compiled(x, w).sum().backward()
    assert [report.taken for report in seen] == [forward, backward]
    with torch.no_grad():
        assert compiled(x, w).shape == function(x, w).shape


def test_the_mean_of_ranks_is_divided_and_inductor_takes_our_operators(pretended, seen):
    """The ranks that are not there leave a sum as it is."""
    x, w = torch.randn(2, 8, 16), torch.randn(32, 16)
    options = {"cost_gate": False}
    y = torch.compile(lambda x, w: reduced(F.linear(x, w), "avg"), backend=backend.compile_graph, options=options)(x, w)
    assert [report.taken for report in seen] == [[AR]]
    torch.testing.assert_close(y, F.linear(x, w) / 2, **CLOSE)


@pytest.mark.parametrize(("options", "reason"), [({}, "on the CPU"), ({"operators": (RS,)}, "not asked for")])
def test_the_gate_and_the_report(options, reason, pretended, seen, capsys):
    x, w = torch.randn(8, 16), torch.randn(32, 16)
    given = {"fallback": "eager", "explain": True, **options}
    torch.compile(lambda x, w: F.linear(gathered(x, 0), w), backend=backend.compile_graph, options=given)(x, w)
    assert [decision.reason[: len(reason)] for report in seen for decision in report.decisions] == [reason]
    assert "0 of 1 products beside collectives taken, the rest to eager" in capsys.readouterr().out


def test_the_gate_knows_groups_and_sizes(pretended):
    from torch._subclasses import FakeTensorMode

    from tilewright.torch.gate import not_worthwhile

    name, alone = distributed.group.WORLD.group_name, distributed.new_group([0]).group_name
    with FakeTensorMode():
        shapes = (4096, 4096), (64, 64), (4095, 4096), (4, 1024, 4096)
        large, small, uneven, batch = (torch.empty(x, device="cuda", dtype=torch.bfloat16) for x in shapes)
        for operator in (collectives.all_gather_matmul, collectives.matmul_all_reduce):
            assert not_worthwhile(operator, large, large, name) is None
            assert "small" in not_worthwhile(operator, large, small, name)
            assert "last dimension" in not_worthwhile(operator, large, large, name, True)
            assert "another size" in not_worthwhile(operator, large, large, alone)
            assert "multiples of 256" in not_worthwhile(operator, uneven, large, name)
            assert not_worthwhile(operator, batch, large, name) is None


def test_symbols_and_groups_of_one_are_left(pretended, seen):
    alone = distributed.new_group([0])
    x, w = torch.randn(8, 16), torch.randn(32, 16)
    single = torch.compile(lambda x, w: functional.all_reduce(F.linear(x, w), "sum", alone),
                           backend=backend.compile_graph, options=EAGER)  # fmt: skip
    single(x, w)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(lambda x, w: reduced(F.linear(x, w)), backend=backend.compile_graph, options=EAGER)(x, w)
    reasons = [decision.reason for report in seen for decision in report.decisions]
    assert reasons == ["a group of one", "sizes that are symbols"]


# --- a group of one rank --------------------------------------------------------------------------


@pytest.fixture
def alone():
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield distributed.group.WORLD.group_name
    distributed.destroy_process_group()


CALLS = {
    "gather rows": (collectives._gather, lambda x, w, g: (x, [w, w[:, :5]], 0, 1, g, True)),
    "gather columns": (collectives._gather, lambda x, w, g: (x, [w], 1, 1, g, True)),
    "gather and keep nothing": (collectives._gather, lambda x, w, g: (x, [w], 0, 1, g, False)),
    "scatter rows": (collectives._reduce_scatter, lambda x, w, g: (x, w, 0, 1, g)),
    "scatter columns": (collectives._reduce_scatter, lambda x, w, g: (x, w, 1, 1, g)),
    "all-reduce": (collectives._all_reduce, lambda x, w, g: (x, w, 1, g)),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name, alone):
    operator, arguments = CALLS[name]
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(8, 10, requires_grad=True)
    torch.library.opcheck(operator, arguments(x, w, alone))


@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_get_what_they_need(name, alone, monkeypatch):
    """In a world of one rank in the interpreter."""
    operator, arguments = CALLS[name]
    x, w = torch.randn(12, 8), torch.randn(10, 8).t()
    expected = operator(*arguments(x, w, alone))
    world = tw.World.interpreter(1)
    launches, launch = [], world.launch
    monkeypatch.setattr(world, "launch", lambda *args, **meta: (launches.append(args[0]), launch(*args, **meta)))
    monkeypatch.setattr(collectives, "_world", lambda *operands: world)
    for _ in range(2):  # with the buffers of the call before
        torch.testing.assert_close(operator(*arguments(x, w, alone)), expected, **CLOSE)
    assert launches
